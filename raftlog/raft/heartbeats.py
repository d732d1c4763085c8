"""A leader's signs of life, and the reads that ride on them.

ReadIndex (thesis section 6.4): a leader may answer a read without writing to the log if, after the read came,
a quorum confirms that it still leads. The index to wait for is the commit index when the read came, which
covers all that was ever acknowledged once an entry of this term is committed.

Reads that come between two Readys share one *round*: a heartbeat to all with the round's number, which the
    answers
echo. An answer to round n confirms every round up to n, so rounds are confirmed like log indexes: by a
quorum.
"""

from __future__ import annotations

from raftlog.raft.node import Node
from raftlog.raft.progress import Progress
from raftlog.raft.quorum import VoteResult, quorum_index, vote_result
from raftlog.raft.types import Heartbeat, ReadIndexRequest, ReadIndexResponse


def has_quorum(node: Node) -> bool:
    """Whether a quorum answered within the last election timeout (CheckQuorum, thesis section 6.2)."""
    since = node.now_ms - node.config.election_timeout_ms
    active = {replica: progress.heard_ms >= since for replica, progress in node.progress.items()}
    active[node.id] = True
    return vote_result(node.confs.current, active) is VoteResult.WON


def broadcast(node: Node) -> None:
    """One heartbeat to every follower, with the commit index as far as it is known to have the entries."""
    commit = node.log.commit
    for progress in node.progress.values():
        known = min(progress.match, commit)
        node.messages.append(Heartbeat(progress.id, node.id, node.term, known, node.reads.round))
        if known > progress.commit_sent:
            progress.commit_sent = known


def read(node: Node, replica: int, context: int) -> None:
    """A read came to this leader, from ``replica`` (itself or a follower)."""
    node.wake()
    node.reads.arrived.append((replica, context))
    node.pump_wanted = True


def start_round(node: Node) -> None:
    """Ask a quorum about the reads that have arrived, unless nothing of this term is committed yet."""
    reads = node.reads
    if not reads.arrived or node.log.commit < node.term_start:
        return
    reads.round += 1
    for replica, context in reads.arrived:
        reads.waiting.append((reads.round, node.log.commit, replica, context))
    reads.arrived.clear()
    broadcast(node)
    _confirm(node)


def answered(node: Node, progress: Progress, context: int) -> None:
    """A follower echoed round ``context``."""
    if context > progress.read_round:
        progress.read_round = context
        if node.reads.waiting:
            _confirm(node)


def _confirm(node: Node) -> None:
    reads = node.reads
    rounds = {replica: progress.read_round for replica, progress in node.progress.items()}
    rounds[node.id] = reads.round
    reads.confirmed = quorum_index(node.confs.current, rounds)
    while reads.waiting and reads.waiting[0][0] <= reads.confirmed:
        _, index, replica, context = reads.waiting.popleft()
        if replica == node.id:
            node.reads_done.append((context, index))
        else:
            node.messages.append(ReadIndexResponse(replica, node.id, node.term, context, index))


def forward_read(node: Node, context: int) -> None:
    """Ask the leader on behalf of this follower."""
    node.messages.append(ReadIndexRequest(node.leader, node.id, node.term, context))
