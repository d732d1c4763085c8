"""Leadership transfer (thesis section 3.10): bring one follower level, then tell it to campaign at once.

Proposals are refused meanwhile, or the follower might never catch up. If it takes longer than an election
timeout the transfer is given up and the leader goes on.
"""

from __future__ import annotations

from raftlog.errors import ConfigError
from raftlog.raft.node import Node
from raftlog.raft.progress import Progress, ProgressState
from raftlog.raft.quorum import is_voter
from raftlog.raft.types import TimeoutNow


def begin(node: Node, to: int) -> None:
    """Hand leadership to ``to`` (on a leader)."""
    if to == node.id:
        return
    if to not in node.progress or not is_voter(node.confs.current, to):
        raise ConfigError(f"replica {to} is not a voter of this group, or not known")
    node.wake()
    node.transfer_to = to
    node.transfer_until_ms = node.now_ms + node.config.election_timeout_ms
    node.pump_wanted = True
    go_on(node, node.progress[to])


def go_on(node: Node, progress: Progress) -> None:
    """``progress`` moved: if it is the transfer's target and holds the whole log, tell it to campaign."""
    if progress.id == node.transfer_to and progress.match == node.log.last_index:
        node.messages.append(TimeoutNow(progress.id, node.id, node.term))


def give_up_late(node: Node) -> None:
    """End a transfer that takes too long."""
    if node.transfer_to and node.now_ms >= node.transfer_until_ms:
        node.transfer_to = 0


def nudge_best_follower(node: Node) -> None:
    """This leader steps down: tell the follower that holds most to campaign, so that nobody waits for a
    timeout."""
    since = node.now_ms - node.config.election_timeout_ms
    able = [
        progress
        for progress in node.progress.values()
        if progress.state is ProgressState.REPLICATE
        and progress.connected
        and progress.heard_ms >= since
        and is_voter(node.confs.current, progress.id)
    ]
    if able:
        best = max(able, key=lambda progress: (progress.match, -progress.id))
        node.messages.append(TimeoutNow(best.id, node.id, node.term))
