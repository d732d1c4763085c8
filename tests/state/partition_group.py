"""A group in miniature: the leader decides on its staged state, entries are appended, replicas apply them."""

from __future__ import annotations

from raftlog.raft.types import Entry
from raftlog.record.batch import check_batch, stamped
from raftlog.record.codec import encode_batch
from raftlog.record.control import Marker, encode_marker
from raftlog.record.frame import FrameKind
from raftlog.state.partition import Command, PartitionState, encode_command
from raftlog.state.producers import Duplicate


class Group:
    """One partition. ``state`` is the leader's staged state, ``entries`` its log."""

    def __init__(self) -> None:
        self.state = PartitionState()
        self.entries: list[Entry] = []
        self.term = 1
        self.now_ms = 1_000_000

    def produce(
        self, count: int = 1, pid: int = -1, epoch: int = -1, seq: int = -1, txn: bool = False
    ) -> int | Duplicate:
        """Send a batch; returns its base offset, or the Duplicate it was recognised as."""
        batch = encode_batch(
            [b"v"] * count,
            None,
            5,
            producer_id=pid,
            producer_epoch=epoch,
            base_sequence=seq,
            transactional=txn,
        )
        duplicate = self.state.check(check_batch(batch))
        if duplicate is not None:
            return duplicate
        offset = self.append(FrameKind.BATCH, stamped(batch, self.state.next_offset, self.term))
        assert isinstance(offset, int)
        return offset

    def mark(self, pid: int, epoch: int, commit: bool, coordinator: int = 1) -> int | None:
        """Send a marker; returns its offset, or None if that transaction has ended so already."""
        marker = Marker(pid, epoch, coordinator, commit)
        if not self.state.check_marker(marker):
            return None
        batch = stamped(encode_marker(marker, self.now_ms), self.state.next_offset, self.term)
        offset = self.append(FrameKind.BATCH, batch)
        assert isinstance(offset, int)
        return offset

    def command(self, command: Command) -> object:
        return self.append(FrameKind.COMMAND, encode_command(command))

    def append(self, kind: int, payload: bytes) -> object:
        entry = Entry.create(0, kind, self.term, self.state.applied_index + 1, self.now_ms, payload)
        result = self.state.apply(entry)
        self.entries.append(entry)
        return result

    def replay(self, snapshot_at: int | None = None) -> PartitionState:
        """A follower's state: all entries applied, through a snapshot after ``snapshot_at`` of them if
        given."""
        state = PartitionState()
        for position, entry in enumerate(self.entries):
            if position == snapshot_at:
                state = PartitionState.restore(state.snapshot())
            state.apply(entry)
        return state
