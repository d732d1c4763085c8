"""What must hold for one node between two inputs. Cheap enough for tests after every step, not for
production."""

from __future__ import annotations

from raftlog.raft.node import NEVER, Node
from raftlog.raft.types import TERM_MAX, Role


def check_invariants(node: Node) -> None:
    """Assert every invariant of ``node``.

    Raises:
        AssertionError: the first one that does not hold.
    """
    log = node.log
    log.check()
    assert 0 <= node.term <= TERM_MAX
    assert log.last_term <= node.term, (log.last_term, node.term)
    assert node.durability.index <= log.handed, (node.durability.index, log)
    assert node.durability.term <= node.term
    assert node.handed_state.term <= node.term
    assert node.confs.current_index <= log.last_index
    if node.quiet:
        assert node.leader, "only a leader and those who follow one rest"
        assert node.deadline_ms == NEVER
        assert node.log.commit == node.log.last_index
    if node.role is Role.LEADER:
        _check_leader(node)
    else:
        assert not node.progress
        assert node.leader != node.id
        assert node.deadline_ms < NEVER or node.quiet or not node.is_promotable
        assert node.matched_index <= log.last_index, (node.matched_index, log)
        assert node.acked_index <= node.matched_index
        assert node.acked_index <= node.durability.index, (node.acked_index, node.durability.index)
    assert not node.amnesiac or node.role in (Role.FOLLOWER, Role.LEARNER)
    if node.role in (Role.CANDIDATE, Role.LEADER):
        assert node.vote == node.id
    if node.role in (Role.CANDIDATE, Role.PRE_CANDIDATE):
        assert node.leader == 0


def _check_leader(node: Node) -> None:
    log = node.log
    assert node.leader == node.id
    assert node.durability.term == node.term, "a leader's own vote is durable before it counts"
    assert log.term(max(node.term_start, log.first_index - 1)) == node.term
    assert node.progress.keys() == node.confs.current.members - {node.id}
    assert node.uncommitted_bytes == log.size_of(log.commit + 1, log.last_index + 1)
    for progress in node.progress.values():
        progress.check()
        assert progress.next <= log.last_index + 1, (progress, log)
