"""The follower's side of replication: accept or refuse entries, acknowledge what is durable.

An acknowledgement means: *I hold everything up to `index` durably, and it is what the leader of this term
has.* So it is the lower of two positions. ``matched_index``, how far the log is known to agree with this
leader, starts from 0 in each term; ``durability.index``, how far it is synced, falls when the log is cut. An
answer to an append therefore often waits for the disk, and answers to several appends become one.
"""

from __future__ import annotations

from raftlog.raft import amnesia, quiescence
from raftlog.raft.log import UNKNOWN_CRC, LogDiverged
from raftlog.raft.node import Node
from raftlog.raft.types import (
    AppendRequest,
    AppendResponse,
    Entry,
    Heartbeat,
    HeartbeatResponse,
    Role,
    Snapshot,
)


def handle_append(node: Node, message: AppendRequest) -> None:
    """AppendEntries, receiver's side (Raft figure 2), from the leader of this term."""
    node.heard_leader(message.sender)
    log = node.log
    prev_index, prev_term, prev_crc = message.prev_index, message.prev_term, message.prev_crc
    entries = message.entries
    last = prev_index + len(entries)
    if prev_index < log.commit:
        # Every leader has what is committed (leader completeness), so up to there the logs agree, and the
        # terms below may be compacted away here: look at the rest only.
        known = log.commit - prev_index
        prev_crc = entries[known - 1].crc if len(entries) >= known else UNKNOWN_CRC
        entries = entries[known:]
        prev_index = log.commit
        last = max(last, prev_index)
    elif log.term(prev_index) != prev_term:
        _reject(node, message)
        return
    if prev_crc != UNKNOWN_CRC:
        known = log.crc(prev_index)
        if known not in (UNKNOWN_CRC, prev_crc):
            raise LogDiverged(
                f"entry {prev_index} of term {prev_term} has crc {known:08x} here and {prev_crc:08x} on "
                f"leader {message.sender}"
            )
    if entries:
        _merge(node, entries)
    if last > node.matched_index:
        node.matched_index = last
    commit = min(message.commit, last)
    news = commit > log.commit
    if news:
        log.commit = commit
    # A message that only tells the commit index asks for no answer; unless what it would confirm was never
    # said.
    if message.entries or not news or last > node.acked_index:
        node.ack_wanted = last
    if node.ack_wanted >= 0 and node.ack_wanted <= node.durability.index:
        acknowledge(node)
    if node.amnesiac:
        amnesia.told(node, message.commit)


def _merge(node: Node, entries: tuple[Entry, ...]) -> None:
    """Add what is new; cut the log first where an entry differs from the leader's."""
    log = node.log
    fresh = 0
    if entries[0].index <= log.last_index:
        for entry in entries:
            if log.term(entry.index) != entry.term:
                break
            known = log.crc(entry.index)
            if known not in (UNKNOWN_CRC, entry.crc):
                raise LogDiverged(
                    f"entry {entry.index} of term {entry.term} has crc {known:08x} here and {entry.crc:08x} "
                    f"on leader {node.leader}"
                )
            fresh += 1
        else:
            return
        entries = entries[fresh:]
        # Only a conflict cuts. A shorter message that agrees says nothing of what follows it: it may be an
        # old one, and cutting would take back entries already acknowledged.
        if entries[0].index <= log.last_index and node.cut(entries[0].index):
            _configuration_changed(node)
    if node.append(entries):
        _configuration_changed(node)


def _configuration_changed(node: Node) -> None:
    learner = node.id in node.confs.current.learners
    node.role = Role.LEARNER if learner else Role.FOLLOWER


def _reject(node: Node, message: AppendRequest) -> None:
    """Refuse, with a guess of where the logs meet: our last index whose term is not above the leader's
    there."""
    hint = node.log.meeting_point(message.prev_index, message.prev_term)
    node.messages.append(
        AppendResponse(
            message.sender, node.id, node.term, message.prev_index, True, hint, node.log.term(hint) or 0
        )
    )


def acknowledge(node: Node) -> None:
    """Tell the leader how far we agree and are durable, if that is news or it asked.

    An append calls this only when all it brought is durable already, so that the first answer to a probe is
    not a part of it; each sync calls it, and then a part is welcome news.
    """
    durability = node.durability
    if not node.leader or durability.term != node.term:
        return
    index = min(node.matched_index, durability.index)
    wanted = 0 <= node.ack_wanted <= index
    if index > node.acked_index or wanted:
        node.messages.append(AppendResponse(node.leader, node.id, node.term, index))
        node.acked_index = index
        if wanted:
            node.ack_wanted = -1


def restore(node: Node, snapshot: Snapshot, leader_time_ms: int) -> bool:
    """Take over a snapshot that the host holds durably (Raft section 7); see RawNode.restore."""
    assert node.role is not Role.LEADER, "a leader has all that is committed"
    log, index = node.log, snapshot.index
    fresh = index > log.commit and log.term(index) != snapshot.term
    if fresh:
        log.restore(index, snapshot.term, snapshot.crc, leader_time_ms)
        node.confs.restore(index, snapshot.conf)
        node.durability.restored(index)
        _configuration_changed(node)
    elif index > log.commit:
        log.commit = index  # the log holds the entry itself: what a snapshot covers is committed
    # What is committed is in the log of whoever leads now.
    node.matched_index = max(node.matched_index, log.commit)
    node.ack_wanted = log.commit
    acknowledge(node)
    return fresh


def handle_heartbeat(node: Node, message: Heartbeat) -> None:
    """A sign of life. The leader never sends a commit index above what we have acknowledged to it."""
    node.heard_leader(message.sender)
    log = node.log
    # What we acknowledged is still there unless a disk forgot it; then appends must first say how far we
    # agree.
    if log.commit < message.commit <= log.last_index:
        log.commit = message.commit
    if not quiescence.rest_with_leader(node, message):
        node.messages.append(
            HeartbeatResponse(
                message.sender, node.id, node.term, message.context, log.last_index, node.amnesiac
            )
        )
