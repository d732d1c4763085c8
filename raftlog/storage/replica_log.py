"""One replica's log: newest entries in memory, the rest in segments.

::

    index:   first_index …… flushed_index …… committed …… durable_index …… last_index
             |--- segments ---|
                    |-------------- tail (in memory) -------------------------------|
                              |------------- only the journal has these ------------|

``flushed_index`` <= min(``committed``, ``durable_index``): only what can no longer be truncated goes to a
segment, so segments never need a cut, and recovery trusts them up to the flushed index of the last checkpoint
and no further.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol, TypeAlias

import msgspec

from raftlog.errors import OffsetOutOfRange, RaftlogError
from raftlog.raft.types import ConfState, Entry, HardState, Snapshot
from raftlog.record.frame import CONF, Buffer
from raftlog.storage.journal_format import Checkpoint, Place
from raftlog.storage.segment import Segment, batch_base_offset, decode_conf
from raftlog.storage.segment_index import NO_TIMESTAMP
from raftlog.storage.segment_reader import SegmentReader
from raftlog.storage.snapshot_file import LogSnapshot
from raftlog.storage.spec import ReplicaSpec, StorageConfig
from raftlog.storage.tail import Tail


@dataclass(frozen=True, slots=True)
class Recovered:
    """What recovery found: the fields that the Raft core asks for, under its names."""

    hard_state: HardState
    confs: tuple[tuple[int, ConfState], ...]
    first_index: int
    prev_term: int
    prev_crc: int
    terms: tuple[tuple[int, int], ...]
    last_index: int
    tail: tuple[Entry, ...]
    """All entries above the flushed index."""
    last_crc: int
    last_leader_time_ms: int
    """Of the last entry (of the last one dropped, when the log is empty behind a snapshot)."""


Accept: TypeAlias = Callable[[], bool]
"""Whether a snapshot shall still replace the log, asked when all that was appended before is durable."""


class LogOwner(Protocol):
    """What a log asks of the store it belongs to."""

    def request_flush(self, log: ReplicaLog) -> None: ...

    async def truncate_prefix(self, log: ReplicaLog, index: int) -> None: ...

    async def snapshot_chunk(
        self, log: ReplicaLog, index: int, position: int, size: int
    ) -> tuple[bytes, int]: ...

    async def keep_snapshot(self, log: ReplicaLog, index: int, data: Buffer) -> LogSnapshot: ...

    async def begin_behind(self, log: ReplicaLog, snapshot: LogSnapshot, accept: Accept) -> bool: ...

    async def cured(self, log: ReplicaLog) -> None: ...


class ReplicaLog:
    """Made by the store, on creation of a replica or by recovery."""

    __slots__ = (
        "_direct",
        "_direct_barrier",
        "_owner",
        "_pending",
        "_reader",
        "amnesiac",
        "committed",
        "config",
        "confs",
        "durable_index",
        "flushed",
        "hard_state",
        "memory",
        "pending_snapshots",
        "recovered",
        "removed",
        "segments",
        "snapshot",
        "snapshots",
        "spec",
    )

    def __init__(
        self,
        spec: ReplicaSpec,
        config: StorageConfig,
        reader: SegmentReader,
        recovered: Recovered,
        segments: list[Segment],
        flushed: Checkpoint,
        owner: LogOwner,
    ) -> None:
        assert segments
        self.spec = spec
        self.config = config
        self.recovered = recovered
        self.snapshot: LogSnapshot | None = None
        """The newest usable one at recovery."""
        self.snapshots: list[int] = []
        """Indexes of the durable snapshots, ascending."""
        self.pending_snapshots: dict[int, LogSnapshot] = {}
        self.segments = segments
        self.flushed = flushed
        """What the segments hold, synced; its hard_state is not kept up to date."""
        self.hard_state = recovered.hard_state
        """As of the journal's last group."""
        self.confs = list(recovered.confs)
        """Stack of (index, configuration), oldest first, uncommitted ones included."""
        self.committed = flushed.index
        self.durable_index = recovered.last_index
        self.removed = False
        self.amnesiac = False
        """Entries that were confirmed as written may be missing: see :meth:`cured`."""
        last = segments[-1]
        base_time = max(segment.max_timestamp for segment in segments)
        self.memory = Tail(flushed.index + 1, last.end_offset, base_time)
        self._reader = reader
        self._owner = owner
        self._pending: deque[tuple[int, int]] = deque()
        """(first, last index) of each append that is not durable; (0, 0) for one without entries."""
        self._direct: dict[int, Place] = {}
        self._direct_barrier = 0
        """How many of the oldest appends under way it takes until the last truncation is durable."""
        for entry in recovered.tail:
            self._place(entry)

    # -- what recovery found, under the Raft core's names ----------------------------------------------------

    @property
    def prev_term(self) -> int:
        """Term of the entry before ``first_index``."""
        return self.segments[0].prev_term

    @property
    def prev_crc(self) -> int:
        """crc of the entry before ``first_index``."""
        return self.segments[0].prev_crc

    @property
    def terms(self) -> tuple[tuple[int, int], ...]:
        """At recovery: (first index, term) runs."""
        return self.recovered.terms

    @property
    def tail(self) -> tuple[Entry, ...]:
        """At recovery: all entries above the flushed index."""
        return self.recovered.tail

    @property
    def last_crc(self) -> int:
        """At recovery: crc of the last entry."""
        return self.recovered.last_crc

    @property
    def last_leader_time_ms(self) -> int:
        """At recovery: leader_time_ms of the last entry."""
        return self.recovered.last_leader_time_ms

    def conf_at(self, index: int) -> ConfState:
        """The configuration in force at ``index``, which must not be below the newest snapshot found at
        recovery."""
        return next(conf for start, conf in reversed(self.confs) if start <= index)

    # -- numbers ---------------------------------------------------------------------------------------------

    @property
    def first_index(self) -> int:
        """Index of the first entry still there (of the next one, in an empty log)."""
        return self.segments[0].base_index

    @property
    def last_index(self) -> int:
        return self.memory.last_index

    @property
    def start_offset(self) -> int:
        """Record offset of the first record still there."""
        return self.segments[0].base_offset

    @property
    def end_offset(self) -> int:
        """Record offset of the next record, uncommitted ones included."""
        return self.memory.end_offset

    @property
    def size_bytes(self) -> int:
        """What it takes on the disk, or will when all of it is flushed."""
        return sum(segment.append_position for segment in self.segments)

    @property
    def flushed_index(self) -> int:
        return self.flushed.index

    @property
    def flushable_index(self) -> int:
        """Up to here the lazy flush may write."""
        return min(self.committed, self.durable_index)

    def set_committed(self, index: int) -> None:
        """Entries up to ``index`` are committed: from now on they may be flushed, and never truncated."""
        if index > self.committed:
            assert index <= self.memory.last_index, (index, self.last_index)
            self.committed = index

    # -- append (called by the store) ------------------------------------------------------------------------

    def take(self, entries: tuple[Entry, ...]) -> tuple[int, dict[int, Segment] | None]:
        """Take entries into memory and give each its place.

        Returns:
            Bytes dropped by truncation, and the large entries (by index) that the journal shall write to
            their segments itself (None: there are none).
        """
        if not entries:
            self._pending.append((0, 0))
            return 0, None
        first, end = entries[0].index, self.memory.last_index + 1
        dropped = 0
        if first < end:
            dropped = self._truncate(first)
            # A large frame might overwrite the bytes of a truncated one, which a crash before this append is
            # durable would bring back. Until then everything goes through the journal.
            self._direct_barrier = len(self._pending) + 1
            end = self.memory.last_index + 1
        assert first == end, f"append of {first} leaves a gap after {self.last_index}"
        direct: dict[int, Segment] | None = None
        direct_bytes = 1 << 62 if self._direct_barrier else self.config.direct_bytes
        for entry in entries:
            segment, position = self._place(entry)
            if len(entry.frame) >= direct_bytes:
                direct = {} if direct is None else direct
                direct[entry.index] = segment
                self._direct[entry.index] = Place(segment.base_index, segment.base_offset, position)
        self._pending.append((first, entries[-1].index))
        return dropped, direct

    def place_of(self, index: int) -> Place | None:
        """Where a large entry was written by the journal; None for one that the lazy flush writes."""
        return self._direct.get(index)

    def mark_direct(self, index: int, place: Place) -> None:
        """Recovery found the entry's bytes in its segment already."""
        self._direct[index] = place

    def _place(self, entry: Entry) -> tuple[Segment, int]:
        segment = self.segments[-1]
        if segment.append_position >= self.spec.segment_bytes:
            previous = self.memory.entries[-1] if self.memory.entries else None
            segment = Segment(
                self.spec,
                entry.index,
                self.memory.end_offset,
                previous.term if previous else segment.last_term,
                previous.crc if previous else segment.last_crc,
                self.config.index_interval_bytes,
            )
            self.segments.append(segment)
        position = segment.append_position
        segment.append_position += len(entry.frame)
        self.memory.append(entry, position)
        if entry.kind == CONF and entry.index > self.confs[-1][0]:
            self.confs.append((entry.index, decode_conf(entry.payload)))
        return segment, position

    def _truncate(self, index: int) -> int:
        assert index > self.committed, f"entry {index} is committed ({self.committed}) and cannot be replaced"
        while self.segments[-1].base_index > index:
            # Its file, if there is one, stays until recovery or until a segment of the same name overwrites
            # it.
            self._reader.forget(self.segments.pop())
        self.segments[-1].append_position = self.memory.position_of(index)
        for large in [i for i in self._direct if i >= index]:
            del self._direct[large]
        while self.confs[-1][0] >= index:
            self.confs.pop()
        self.durable_index = min(self.durable_index, index - 1)
        return self.memory.truncate(index)

    def made_durable(self, count: int) -> None:
        """The oldest ``count`` appends under way are durable."""
        reached = 0
        pending = self._pending
        for _ in range(count):
            reached = pending.popleft()[1] or reached
        if pending:
            # What a later append, still under way, has truncated is not what became durable.
            reached = min([reached, *(first - 1 for first, _ in pending if first)])
        if reached > self.durable_index:
            self.durable_index = reached
        if self._direct_barrier:
            self._direct_barrier = max(0, self._direct_barrier - count)

    def checkpoint(self) -> Checkpoint:
        """What a CHECKPOINT record says of this replica now. Its commit index must not speak of entries that
        the journal may yet lack: others may stand in their places."""
        state = self.hard_state
        return msgspec.structs.replace(
            self.flushed,
            hard_state=HardState(
                state.term, state.vote, max(state.commit, min(self.committed, self.durable_index))
            ),
            first_index=self.first_index,
        )

    def segment_of(self, index: int) -> Segment:
        """The segment in which the entry has its place."""
        return self.segments[bisect_right(self.segments, index, key=_base_index) - 1]

    def flushed_to(self, segment: Segment) -> None:
        """The lazy flush has synced all that ``segment`` says of itself."""
        assert segment.last_index <= self.flushable_index
        self.flushed = Checkpoint(
            self.hard_state,
            segment.last_index,
            segment.last_term,
            segment.last_crc,
            segment.end_offset,
            segment.last_leader_time_ms,
            self.first_index,
        )
        for large in [i for i in self._direct if i <= segment.last_index]:
            del self._direct[large]

    def sealed(self, segment: Segment) -> None:
        """The segment is complete: its index and open file now count against the broker's limits."""
        segment.sealed = True
        self._reader.sealed(segment)

    # -- reads -----------------------------------------------------------------------------------------------

    async def entries(self, lo: int, hi: int, bytes_max: int) -> list[Entry]:
        """Entries [lo, hi): at least one, and no more than ``bytes_max`` bytes beyond that.

        Raises:
            DamagedData: a frame in a segment does not check.
        """
        assert self.first_index <= lo < hi <= self.last_index + 1, (self.first_index, lo, hi, self.last_index)
        if lo >= self.memory.first_index:
            return self.memory.slice(lo, hi, bytes_max)
        return await self._reader.entries(self.segment_of(lo), lo, hi, bytes_max)

    def try_read(self, offset: int, limit_index: int, bytes_max: int) -> list[Buffer] | None:
        """Contiguous frames from the one that holds record ``offset`` (or from the next batch, if ``offset``
        is below the log's start) up to and including ``limit_index``.

        Args:
            offset: record offset.
            limit_index: log index; the high watermark as an index.
            bytes_max: soft limit; at least one batch is returned if there is one.

        Returns:
            Buffers that follow one another, [] when there is no batch to return, None when reading would
            block.
        """
        if offset >= self.memory.base_offset or not self._in_segments():
            return self.memory.frames(offset, limit_index, bytes_max)
        segment = self._segment_by_offset(offset)
        if segment.base_index > limit_index:
            return []
        views = self._reader.try_read(segment, max(offset, segment.base_offset), limit_index, bytes_max)
        return None if views is None else [*views]

    async def read(self, offset: int, limit_index: int, bytes_max: int) -> list[Buffer]:
        """As :meth:`try_read`, waiting for the device if need be.

        Raises:
            DamagedData: a frame in a segment does not check.
            OffsetOutOfRange: the segment was dropped meanwhile.
        """
        found = self.try_read(offset, limit_index, bytes_max)
        if found is not None:
            return found
        segment = self._segment_by_offset(offset)
        start = max(offset, segment.base_offset)
        try:
            return [*await self._reader.read(segment, start, limit_index, bytes_max)]
        except RaftlogError as error:
            if segment.base_index >= self.first_index:
                raise
            raise OffsetOutOfRange(
                f"offset {offset} of {self.spec.topic}/{self.spec.partition} was dropped while it was read",
                start=self.start_offset,
                end=self.end_offset,
            ) from error

    def term_before(self, offset: int) -> int | None:
        """Term of the last record below ``offset``, which must be above ``start_offset`` and not above
        ``end_offset``; None if only reading tells."""
        if offset > self.memory.base_offset:
            return self.memory.term_before(offset)
        terms = self._segment_by_offset(offset - 1).terms
        return terms[0][1] if len(terms) == 1 else None

    async def find_time(self, timestamp_ms: int, limit_index: int) -> int | None:
        """Base offset of the first batch, up to ``limit_index``, whose greatest timestamp is at least
        ``timestamp_ms``; None if there is none."""
        timestamp_ms = max(timestamp_ms, NO_TIMESTAMP + 1)  # what stands for none is no batch's
        if timestamp_ms > self.memory.base_time:
            entry = self.memory.find_time(timestamp_ms)
            if entry is None or entry.index > limit_index:
                return None
            return batch_base_offset(entry.frame)
        for segment in self.segments:
            if segment.base_index > limit_index:
                return None
            if segment.max_timestamp >= timestamp_ms:
                try:
                    return await self._reader.find_time(segment, timestamp_ms, limit_index)
                except RaftlogError:
                    if segment.base_index >= self.first_index:
                        raise
                    return await self.find_time(timestamp_ms, limit_index)  # it was dropped meanwhile
        return None

    def _in_segments(self) -> bool:
        return self.memory.first_index > self.first_index

    def _segment_by_offset(self, offset: int) -> Segment:
        """The segment that holds the record, which is below the tail."""
        slot = bisect_right(self.segments, offset, key=_base_offset) - 1
        slot = max(slot, 0)
        while self.segments[slot].end_offset <= max(offset, self.segments[slot].base_offset):
            slot += 1
        return self.segments[slot]

    # -- snapshots and prefix --------------------------------------------------------------------------------

    def is_segment_end(self, index: int) -> bool:
        """A segment ends with this entry: after applying it the host calls :meth:`save_snapshot`."""
        memory = self.memory
        place = index - memory.first_index
        if place >= 0:
            entries = memory.entries
            if place >= len(entries):
                return False
            return memory.positions[place] + len(entries[place].frame) >= self.spec.segment_bytes
        slot = bisect_right(self.segments, index + 1, key=_base_index) - 1
        return slot > 0 and self.segments[slot].base_index == index + 1

    def save_snapshot(self, snapshot: Snapshot) -> None:
        """Keep a snapshot of the state machine; it is written once the log is synced up to its index."""
        self.set_committed(snapshot.index)  # a state machine holds only what is committed
        if snapshot.index not in self.snapshots:
            offset, time = self._place_behind(snapshot.index)
            self.pending_snapshots[snapshot.index] = LogSnapshot(
                snapshot.index, snapshot.term, snapshot.crc, snapshot.conf, snapshot.data, offset, time
            )
            self._owner.request_flush(self)

    def _place_behind(self, index: int) -> tuple[int, int]:
        """(record offset after the entry at ``index``, its leader_time_ms)."""
        memory = self.memory
        if index >= memory.first_index:
            return memory.ends[index - memory.first_index], memory.at(index).leader_time_ms
        segment = self.segment_of(index)
        assert segment.last_index == index, f"entry {index} is flushed and ends no segment"
        return segment.end_offset, segment.last_leader_time_ms

    async def snapshot_chunk(self, index: int, position: int, size: int) -> tuple[bytes, int]:
        """Bytes of the durable snapshot at ``index``, for a follower that is too far behind.

        Returns:
            At most ``size`` bytes from ``position`` on, and how many there are in all.

        Raises:
            StorageFailed: there is no such snapshot (any more), or it cannot be read.
        """
        return await self._owner.snapshot_chunk(self, index, position, size)

    async def keep_snapshot(self, index: int, data: Buffer) -> LogSnapshot:
        """Make a snapshot durable that came from the leader, for :meth:`begin_behind`. The log stays as it
        is.

        Args:
            index: of the snapshot, above all that is committed here.
            data: the bytes of the leader's snapshot file.

        Raises:
            DamagedData: the bytes do not check; nothing has changed.
            StorageFull, StorageFailed: the device.
        """
        return await self._owner.keep_snapshot(self, index, data)

    async def begin_behind(self, snapshot: LogSnapshot, accept: Accept) -> bool:
        """Replace the log by a snapshot from :meth:`keep_snapshot`: if ``accept`` still wants it, the log is
        empty behind it in the same step, and this returns once that is durable. A crash leaves the old log or
        the new one.

        Args:
            accept: asked once nothing of this log is on its way to the disk. Nothing may be appended to it
            from
                this call until its return.

        Returns:
            What ``accept`` said.

        Raises:
            StorageFailed: the device. If ``accept`` had said yes, the replica cannot go on.
        """
        return await self._owner.begin_behind(self, snapshot, accept)

    def restart_behind(self, snapshot: LogSnapshot) -> list[Segment]:
        """Become an empty log behind ``snapshot`` (called by the store). Returns the segments it had."""
        index = snapshot.index
        assert index > self.committed, f"entry {index} is committed here ({self.committed})"
        assert not self._pending, "an append is under way"
        before = self.segments
        segment = Segment(
            self.spec,
            index + 1,
            snapshot.next_offset,
            snapshot.term,
            snapshot.crc,
            self.config.index_interval_bytes,
        )
        segment.last_leader_time_ms = snapshot.leader_time_ms
        self.segments = [segment]
        self.memory = Tail(index + 1, snapshot.next_offset)
        self.flushed = Checkpoint(
            self.hard_state,
            index,
            snapshot.term,
            snapshot.crc,
            snapshot.next_offset,
            snapshot.leader_time_ms,
            index + 1,
        )
        self.confs = [(index, snapshot.conf)]
        self.committed = self.durable_index = index
        self.pending_snapshots.clear()
        self._direct.clear()
        self._direct_barrier = 0
        return before

    async def cured(self) -> None:
        """The log again holds all that it can ever have confirmed: it is not amnesiac any more, also after a
        restart.

        Raises:
            StorageFull, StorageFailed: the device; a restart finds it amnesiac again, which does no harm.
        """
        await self._owner.cured(self)

    async def truncate_prefix(self, index: int) -> None:
        """Drop whole segments that end at or below ``index``: up to the last of them at whose end there is a
        durable snapshot that checks, for a follower that needs what was dropped gets that snapshot. The
        newest segment stays."""
        await self._owner.truncate_prefix(self, index)

    def memory_starts_at(self, index: int) -> None:
        """Forget the entries below ``index``: their segments are gone."""
        self.memory.evict(index - 1)

    async def checksum(self, lo: int, hi: int) -> bytes:
        """SHA-256 of the frames [lo, hi), to compare replicas while they run."""
        digest = sha256()
        while lo < hi:
            for entry in await self.entries(lo, hi, 1 << 20):
                digest.update(entry.frame)
                lo = entry.index + 1
        return digest.digest()


def _base_index(segment: Segment) -> int:
    return segment.base_index


def _base_offset(segment: Segment) -> int:
    return segment.base_offset
