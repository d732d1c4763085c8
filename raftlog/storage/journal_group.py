"""One gathered write of the journal under construction."""

from __future__ import annotations

from raftlog.raft.types import Append, Entry, HardState
from raftlog.record.frame import Buffer
from raftlog.storage.journal_format import (
    ENTRY,
    RECORD_HEADER_BYTES,
    RecordKind,
    encode_checkpoint,
    encode_entry_ref,
    encode_hard_state,
    record_head,
)
from raftlog.storage.journal_sync import must_sync
from raftlog.storage.replica_log import ReplicaLog
from raftlog.storage.segment import Segment
from raftlog.storage.ward import Sleeper


class Group:
    """Records for one file, in order.

    Args:
        position: where it begins in the unbounded journal.

    Attributes:
        position: where it ends.
        buffers: its bytes.
        direct: large frames that go to their segments instead: (segment, position, frame).
        resets: replicas whose logs begin anew in it.
        entries: (replica id, first index, last index) of the entries in it.
        checkpoints: (log, flushed index) of the checkpoints in it.
        sync: nobody is told before it is synced.
        interval_ms: otherwise, a sync follows within this.
    """

    __slots__ = (
        "buffers",
        "checkpoints",
        "direct",
        "entries",
        "interval_ms",
        "position",
        "resets",
        "sync",
    )

    def __init__(self, position: int) -> None:
        self.position = position
        self.buffers: list[Buffer] = []
        self.direct: list[tuple[Segment, int, Buffer]] = []
        self.resets: list[ReplicaLog] = []
        self.entries: list[tuple[int, int, int]] = []
        self.checkpoints: list[tuple[ReplicaLog, int]] = []
        self.sync = False
        self.interval_ms = 0

    def add(self, record: bytes) -> None:
        """Add a whole record, made for ``position``."""
        self.buffers.append(record)
        self.position += len(record)

    def add_append(self, log: ReplicaLog, append: Append, direct: dict[int, Segment] | None) -> None:
        """Term and vote, then the entries; the ``direct`` ones as references."""
        if log.removed:
            return
        replica_id = log.spec.replica_id
        interval_ms = log.spec.flush_interval_ms
        if not interval_ms or must_sync(log, append):
            self.sync = True
        else:
            self.interval_ms = min(self.interval_ms or interval_ms, interval_ms)
        entries = append.entries
        state = append.hard_state
        if state is not None:
            log.hard_state = state
            if entries and state.commit >= entries[0].index:
                # A group torn between the two must not make committed what was about to be replaced.
                state = HardState(state.term, state.vote, entries[0].index - 1)
            self.add(encode_hard_state(self.position, replica_id, state))
        if not entries:
            return
        self.entries.append((replica_id, entries[0].index, entries[-1].index))
        buffers = self.buffers
        position = self.position
        for entry in entries:
            frame = entry.frame
            if direct is not None and entry.index in direct:
                place = log.place_of(entry.index)
                # No longer in the log: truncated by a later append of this very group, its place is
                # another's.
                if place is not None and log.memory.at(entry.index) is entry:
                    self.direct.append((direct[entry.index], place.position, frame))
                    record = encode_entry_ref(position, replica_id, entry, place)
                    buffers.append(record)
                    position += len(record)
                    continue
            buffers.append(record_head(position, ENTRY, replica_id, frame))
            buffers.append(frame)
            position += RECORD_HEADER_BYTES + len(frame)
        self.position = position

    def add_copy(self, log: ReplicaLog, index: int) -> None:
        """Write again all entries from ``index`` on (the memory agrees with the journal at the end of a
        group)."""
        index = max(index, log.flushed_index + 1)
        if log.removed or index > log.last_index:
            return
        replica_id = log.spec.replica_id
        self.entries.append((replica_id, index, log.last_index))
        for entry in log.memory.entries[index - log.memory.first_index :]:
            place = log.place_of(entry.index)
            if place is not None:
                synced = entry.index <= log.durable_index
                self.add(encode_entry_ref(self.position, replica_id, entry, place, synced=synced))
            else:
                self._add_frame(replica_id, entry.frame)

    def add_checkpoint(self, log: ReplicaLog, kind: RecordKind = RecordKind.CHECKPOINT) -> None:
        """What the segments hold; or (RESET) that the log begins anew."""
        if not log.removed:
            self.add(encode_checkpoint(self.position, log.spec.replica_id, log.checkpoint(), kind))
            self.checkpoints.append((log, log.flushed_index))

    def add_sleeper(self, sleeper: Sleeper) -> None:
        """Write again all that the journal says of a damaged replica: no older file is needed for it."""
        replica_id, entries = sleeper.spec.replica_id, sleeper.entries
        self.add(encode_checkpoint(self.position, replica_id, sleeper.checkpoint))
        if entries:
            self.entries.append((replica_id, entries[0].header.index, entries[-1].header.index))
        for entry in entries:
            header = entry.header
            if entry.place is not None:
                head = Entry.of(header, header.encode())
                self.add(encode_entry_ref(self.position, replica_id, head, entry.place, synced=True))
            else:
                assert entry.frame is not None
                self._add_frame(replica_id, entry.frame)

    def _add_frame(self, replica_id: int, frame: Buffer) -> None:
        self.add(record_head(self.position, ENTRY, replica_id, frame))
        self.buffers.append(frame)
        self.position += len(frame)
