"""Reading frames back from segment files, through the sparse index.

Every frame is checked each time it is read, and that it follows from the one before: what a disk has spoiled
since it was written, or put in the wrong place, is not handed out. Reading then ends before the frame that
does not check, and fails once it is the first one wanted.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, TypeAlias

from crc32c import crc32c

from raftlog.errors import DamagedData
from raftlog.raft.types import Entry
from raftlog.record.frame import FRAME_HEADER_BYTES, FrameKind
from raftlog.storage.disk import Disk, DiskFile
from raftlog.storage.segment import Segment, batch_base_offset, batch_fields
from raftlog.storage.segment_index import SparseIndex, read_index
from raftlog.storage.segment_recovery import rescan
from raftlog.storage.spec import StorageConfig

_HEADER: Final = struct.Struct(">IIIB9xQ8x")
"""Of a frame: length, crc, crc of the one before, kind, index."""
assert _HEADER.size == FRAME_HEADER_BYTES
_Frame: TypeAlias = tuple[int, int, int, int]
"""Position in what was read, end, kind, index."""


class SegmentReader:
    """Shared by all logs of a broker: bounds how many indexes are in memory and how many files are open.

    Args:
        on_damage: told of each segment in which something did not check.
    """

    def __init__(
        self,
        disk: Disk,
        config: StorageConfig,
        on_damage: Callable[[Segment], None],
    ) -> None:
        self._disk = disk
        self._on_damage = on_damage
        self._config = config
        self._indexed: OrderedDict[str, Segment] = OrderedDict()
        self._opened: OrderedDict[str, Segment] = OrderedDict()

    # -- by record offset ------------------------------------------------------------------------------------

    def try_read(
        self, segment: Segment, offset: int, limit_index: int, bytes_max: int
    ) -> list[memoryview] | None:
        """Frames of the segment from the batch that holds ``offset`` on, None when that would block."""
        index, file = segment.index, segment.file
        if index is None or file is None:
            return None
        slot = index.slot_of_offset(offset)
        start, size = _range(segment, index, slot, bytes_max)
        data = file.try_read(start, size)
        if data is None:
            return None
        frames, damage = self._checked(segment, index, slot, start, size, data)
        return _cut(data, frames, offset, limit_index, damage)

    async def read(self, segment: Segment, offset: int, limit_index: int, bytes_max: int) -> list[memoryview]:
        """The same, waiting for the device."""
        index = await self.load_index(segment)
        data, frames, damage = await self._frames(segment, index, index.slot_of_offset(offset), bytes_max)
        return _cut(data, frames, offset, limit_index, damage)

    async def _frames(
        self, segment: Segment, index: SparseIndex, slot: int, bytes_max: int
    ) -> tuple[bytes, list[_Frame], DamagedData | None]:
        """What was read from that slot on, the frames in it that check, and what is wrong behind them."""
        start, size = _range(segment, index, slot, bytes_max)
        data = await self._read(segment, start, size)
        return data, *self._checked(segment, index, slot, start, size, data)

    def _checked(
        self, segment: Segment, sparse: SparseIndex, slot: int, start: int, size: int, data: bytes
    ) -> tuple[list[_Frame], DamagedData | None]:
        """The frames that were read from ``start`` on, where that slot begins, up to the first that does not
        check; and what is wrong there."""
        view = memoryview(data)
        frames: list[_Frame] = []
        index, before = sparse.indexes[slot], sparse.prev_crcs[slot]
        at, have = 0, len(data)
        while at < size:
            if have - at < FRAME_HEADER_BYTES:
                return frames, self._damaged(segment, start + at, "the file ends early")
            length, crc, prev_crc, kind, found = _HEADER.unpack_from(data, at)
            end = at + length
            if (
                not FRAME_HEADER_BYTES <= length <= have - at
                or crc32c(view[at + 8 : end]) != crc
                or found != index
                or prev_crc != before
            ):
                return frames, self._damaged(segment, start + at, f"entry {index} does not check")
            frames.append((at, end, kind, index))
            at, before = end, crc
            index += 1
        return frames, None

    # -- by log index and time -------------------------------------------------------------------------------

    async def entries(self, segment: Segment, lo: int, hi: int, bytes_max: int) -> list[Entry]:
        """Entries [lo, hi) as far as this segment holds them; at least one. Each frame's crc is checked."""
        index = await self.load_index(segment)
        slot = index.slot_of_index(lo)
        data, frames, damage = await self._frames(segment, index, slot, bytes_max)
        found: list[Entry] = []
        total = 0
        for at, end, _, entry_index in frames:
            if entry_index >= hi or (found and total + end - at > bytes_max):
                break
            if entry_index >= lo:
                found.append(Entry.parse(data, at, check=False))
                total += end - at
        if not found and damage is not None:
            raise damage
        return found

    async def find_time(self, segment: Segment, timestamp_ms: int, limit_index: int) -> int | None:
        """Base offset of the segment's first batch that reaches ``timestamp_ms``; None if above
        ``limit_index``."""
        index = await self.load_index(segment)
        slot = index.slot_of_time(timestamp_ms)
        data, frames, damage = await self._frames(segment, index, slot, 1)
        for at, _, kind, entry_index in frames:
            if entry_index > limit_index:
                return None
            if kind == FrameKind.BATCH and batch_fields(data, at)[1] >= timestamp_ms:
                return batch_base_offset(data, at)
        if damage is not None:
            raise damage
        return None

    # -- files and indexes -----------------------------------------------------------------------------------

    async def load_index(self, segment: Segment) -> SparseIndex:
        """The segment's index, from its file if need be."""
        index = segment.index
        if index is None:
            try:
                _, index = await read_index(self._disk, segment.index_path)
            except (FileNotFoundError, DamagedData):
                index = None
            if index is None or index.begin != (segment.base_index, segment.prev_crc):
                index = await self._index_from_frames(segment)  # it is not there, or of another segment
            segment.index = index
        if segment.sealed:
            self._indexed_now(segment)
        return index

    async def _index_from_frames(self, segment: Segment) -> SparseIndex:
        """The index file is gone or damaged: the frames say the same."""
        fresh = Segment(
            segment.spec,
            segment.base_index,
            segment.base_offset,
            segment.prev_term,
            segment.prev_crc,
            segment.interval,
        )
        try:
            await rescan(await self.open(segment), fresh, segment.last_index)
        except DamagedData:
            self._on_damage(segment)
            raise
        if fresh.last_index < segment.last_index:
            raise self._damaged(segment, fresh.end_position, "the file ends early")
        assert fresh.index is not None
        return fresh.index

    async def open(self, segment: Segment) -> DiskFile:
        """The segment's file."""
        file = segment.file
        if file is None:
            try:
                file = await self._disk.open(segment.path)
            except FileNotFoundError as error:
                raise self._damaged(segment, 0, "the file is missing") from error
            if segment.file is not None:  # another read was faster
                file.close()
                file = segment.file
            segment.file = file
        if segment.sealed:
            self._opened_now(segment)
        return file

    def sealed(self, segment: Segment) -> None:
        """The segment is complete: from now on its index and its open file are part of the caches."""
        self._indexed_now(segment)
        self._opened_now(segment)

    def _indexed_now(self, segment: Segment) -> None:
        _touch(self._indexed, segment)
        while len(self._indexed) > self._config.index_cache_entries:
            self._indexed.popitem(last=False)[1].index = None

    def _opened_now(self, segment: Segment) -> None:
        _touch(self._opened, segment)
        while len(self._opened) > self._config.open_files_max:
            _close(self._opened.popitem(last=False)[1])

    def forget(self, segment: Segment) -> None:
        """The segment is gone: close its file."""
        self._indexed.pop(segment.path, None)
        self._opened.pop(segment.path, None)
        _close(segment)

    async def _read(self, segment: Segment, start: int, size: int) -> bytes:
        file = await self.open(segment)
        data = file.try_read(start, size)
        if data is None:
            data = await file.read(start, size)
        return data

    def _damaged(self, segment: Segment, position: int, what: str) -> DamagedData:
        self._on_damage(segment)
        return DamagedData(
            f"{segment.path}: {what} at byte {position}: this replica of {segment.spec.topic}-"
            f"{segment.spec.partition} is repaired from others",
            path=segment.path,
            position=position,
            replica_id=segment.spec.replica_id,
        )


def _cut(
    data: bytes, frames: list[_Frame], offset: int, limit_index: int, damage: DamagedData | None
) -> list[memoryview]:
    """From the batch that holds ``offset`` to ``limit_index``, or to the damage, which is raised if it comes
    before."""
    begin, end = -1, 0
    for at, after, kind, found in frames:
        if found > limit_index:
            break
        if begin < 0:
            if kind != FrameKind.BATCH or batch_fields(data, at)[0] <= offset:
                continue
            begin = at
        end = after
    if begin < 0 and damage is not None:
        raise damage
    return [memoryview(data)[begin:end]] if begin >= 0 else []


def _touch(cache: OrderedDict[str, Segment], segment: Segment) -> None:
    cache[segment.path] = segment
    cache.move_to_end(segment.path)


def _close(segment: Segment) -> None:
    if segment.file is not None:
        segment.file.close()
        segment.file = None


def _range(segment: Segment, index: SparseIndex, slot: int, bytes_max: int) -> tuple[int, int]:
    """(position, size) of whole granules from ``slot`` on that hold at least ``bytes_max`` bytes."""
    start = index.positions[slot]
    behind = index.slot_behind(slot, start + bytes_max)
    end = index.positions[behind] if behind < len(index.positions) else segment.end_position
    return start, end - start
