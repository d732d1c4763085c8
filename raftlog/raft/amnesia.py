"""Replicas that may have forgotten entries which they had acknowledged.

With flush=interval an entry is acknowledged when it is written. If the machine fails before the sync, the
replica comes back with a shorter log. Term, vote and configurations are always synced; its log is a beginning
of what it was. Let T be its term as it comes back, and e an entry that was committed with its help: e's term
is at most T.

*While it is amnesiac it grants no vote and does not campaign.* So every vote it ever gave, it gave while it
held what it had acknowledged, and the proof of leader completeness (Raft section 5.4.3) stands: each leader
of a term above e's has e. The leader of e's own term has it anyhow. Each leader that this replica still
listens to is one of these, for it refuses terms below T.

*It may acknowledge.* An acknowledgement says that its log agrees with this leader's up to an index, which is
true again of what was written since; and the leader needs it to go on.

*It is cured* once it has written its log up to an index c which

- the leader of its term named as its commit index, in an AppendRequest that it sent after it had learned of
  this incarnation. A leader then takes back what the former incarnation acknowledged
  (``RawNode.peer_restored`` with ``forgot``); what it commits later, it commits without those. A heartbeat's
  commit index will not do: it is no more than what this follower acknowledged, and there may be more;
- and which holds an entry of that leader's own term. A new leader's commit index may lag behind what earlier
  ones committed, until it has committed its no-op. All earlier terms' entries stand below that.

Then c is at or above every e. A leader that was told (in a heartbeat's answer) that a follower is amnesiac
sends it its commit index, so that this needs no new entries.

*Where a configuration has one or two voters* a forgetful one is let in at once: every quorum is all of them,
so nobody is elected against the vote of the other one, who has e; and of a single one nobody holds more.
"""

from __future__ import annotations

from raftlog.raft.config import RecoveredLog
from raftlog.raft.confstack import ConfStack
from raftlog.raft.node import NEVER, Node

UNTOLD = -1


def matters(recovered: RecoveredLog, confs: ConfStack, commit: int) -> bool:
    """Whether a recovered replica has to be taken for amnesiac."""
    return recovered.amnesiac and any(
        len(half) > 2 for conf in confs.possible(commit) for half in (conf.voters, conf.outgoing)
    )


def told(node: Node, commit: int) -> None:
    """The leader of this term has committed up to ``commit``.

    The first index told stays the aim until the log reaches it, or a busy leader would always be ahead; then
    it counts, or is found to be of an earlier term and gives way to a later one."""
    review(node)
    if node.cure_index == UNTOLD or _is_reached(node):
        node.cure_index = commit
        review(node)


def review(node: Node) -> None:
    """See whether this replica is cured: after news of the leader's commit index, or of its own disk."""
    if node.cure_index == UNTOLD or not _is_reached(node) or node.log.term(node.cure_index) != node.term:
        return
    node.amnesiac = False
    node.cure_index = UNTOLD
    if node.deadline_ms == NEVER:
        node.arm_election()


def _is_reached(node: Node) -> bool:
    return node.cure_index <= min(node.matched_index, node.durability.index)
