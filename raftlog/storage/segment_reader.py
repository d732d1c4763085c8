"""Reading frames back from segment files, through the sparse index."""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Final

from raftlog.errors import CorruptFrame, DamagedData
from raftlog.raft.types import Entry
from raftlog.record.frame import FRAME_BYTES_MAX, FRAME_HEADER_BYTES, FrameKind
from raftlog.storage.disk import Disk, DiskFile
from raftlog.storage.segment import Segment, batch_base_offset, batch_fields
from raftlog.storage.segment_index import SparseIndex, read_index
from raftlog.storage.segment_recovery import rescan
from raftlog.storage.spec import StorageConfig

_LENGTH_KIND_INDEX: Final = struct.Struct(">I8xB9xQ8x")
assert _LENGTH_KIND_INDEX.size == FRAME_HEADER_BYTES


class SegmentReader:
    """Shared by all logs of a broker: bounds how many indexes are in memory and how many files are open."""

    def __init__(self, disk: Disk, config: StorageConfig) -> None:
        self._disk = disk
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
        start, size, last_index = _range(segment, index, index.slot_of_offset(offset), bytes_max)
        data = file.try_read(start, size)
        if data is None:
            return None
        return _cut(
            segment, index, start, _whole(segment, start, size, data), offset, limit_index, last_index
        )

    async def read(self, segment: Segment, offset: int, limit_index: int, bytes_max: int) -> list[memoryview]:
        """The same, waiting for the device."""
        index = await self.load_index(segment)
        start, size, last_index = _range(segment, index, index.slot_of_offset(offset), bytes_max)
        data = await self._read(segment, start, size)
        return _cut(segment, index, start, data, offset, limit_index, last_index)

    # -- by log index and time -------------------------------------------------------------------------------

    async def entries(self, segment: Segment, lo: int, hi: int, bytes_max: int) -> list[Entry]:
        """Entries [lo, hi) as far as this segment holds them; at least one. Each frame's crc is checked."""
        index = await self.load_index(segment)
        start, size, _ = _range(segment, index, index.slot_of_index(lo), bytes_max)
        data = await self._read(segment, start, size)
        found: list[Entry] = []
        at = total = 0
        while at < len(data):
            try:
                entry = Entry.parse(data, at)
            except CorruptFrame as error:
                raise _damaged(segment, start + at, str(error)) from error
            at += entry.size
            if entry.index >= hi or (found and total + entry.size > bytes_max):
                break
            if entry.index >= lo:
                found.append(entry)
                total += entry.size
        return found

    async def find_time(self, segment: Segment, timestamp_ms: int, limit_index: int) -> int | None:
        """Base offset of the segment's first batch that reaches ``timestamp_ms``; None if above
        ``limit_index``."""
        index = await self.load_index(segment)
        start, size, _ = _range(segment, index, index.slot_of_time(timestamp_ms), 1)
        data = await self._read(segment, start, size)
        at = 0
        while at < len(data):
            length, kind, entry_index = _LENGTH_KIND_INDEX.unpack_from(data, at)
            if entry_index > limit_index:
                return None
            if kind == FrameKind.BATCH and batch_fields(data, at)[1] >= timestamp_ms:
                return batch_base_offset(data, at)
            at += _checked_length(segment, start + at, length)
        return None

    # -- files and indexes -----------------------------------------------------------------------------------

    async def load_index(self, segment: Segment) -> SparseIndex:
        """The segment's index, from its file if need be."""
        index = segment.index
        if index is None:
            try:
                _, index = await read_index(self._disk, segment.index_path)
            except (FileNotFoundError, DamagedData):
                index = await self._index_from_frames(segment)
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
        await rescan(await self.open(segment), fresh, segment.last_index)
        assert fresh.index is not None
        return fresh.index

    async def open(self, segment: Segment) -> DiskFile:
        """The segment's file."""
        file = segment.file
        if file is None:
            try:
                file = await self._disk.open(segment.path)
            except FileNotFoundError as error:
                raise _damaged(segment, 0, "the file is missing") from error
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
        return _whole(segment, start, size, data)


def _touch(cache: OrderedDict[str, Segment], segment: Segment) -> None:
    cache[segment.path] = segment
    cache.move_to_end(segment.path)


def _close(segment: Segment) -> None:
    if segment.file is not None:
        segment.file.close()
        segment.file = None


def _range(segment: Segment, index: SparseIndex, slot: int, bytes_max: int) -> tuple[int, int, int]:
    """(position, size, last index) of whole granules from ``slot`` on that hold at least ``bytes_max``
    bytes."""
    start = index.positions[slot]
    behind = index.slot_behind(slot, start + bytes_max)
    if behind < len(index.positions):
        return start, index.positions[behind] - start, index.indexes[behind] - 1
    return start, segment.end_position - start, segment.last_index


def _whole(segment: Segment, start: int, size: int, data: bytes) -> bytes:
    if len(data) < size:
        raise _damaged(segment, start + len(data), "the file ends early")
    return data


def _cut(
    segment: Segment,
    index: SparseIndex,
    start: int,
    data: bytes,
    offset: int,
    limit_index: int,
    last_index: int,
) -> list[memoryview]:
    """Of whole granules: from the batch that holds ``offset`` to ``limit_index``."""
    at = 0
    while True:
        if at >= len(data):
            return []
        length, kind, entry_index = _LENGTH_KIND_INDEX.unpack_from(data, at)
        if entry_index > limit_index:
            return []
        if kind == FrameKind.BATCH and batch_fields(data, at)[0] > offset:
            break
        at += _checked_length(segment, start + at, length)
    end = len(data)
    if last_index > limit_index:
        # Every frame before the granule that begins at or below limit_index + 1 is wanted; then walk.
        end = max(at, index.positions[index.slot_of_index(limit_index + 1)] - start)
        while end < len(data):
            length, _, entry_index = _LENGTH_KIND_INDEX.unpack_from(data, end)
            if entry_index > limit_index:
                break
            end += _checked_length(segment, start + end, length)
    return [memoryview(data)[at:end]]


def _checked_length(segment: Segment, position: int, length: int) -> int:
    if not FRAME_HEADER_BYTES <= length <= FRAME_BYTES_MAX:
        raise _damaged(segment, position, f"impossible frame length {length}")
    return length


def _damaged(segment: Segment, position: int, what: str) -> DamagedData:
    return DamagedData(
        f"{segment.path}: {what} at byte {position}: this replica of {segment.spec.topic}-"
        f"{segment.spec.partition} must be replaced from its peers",
        path=segment.path,
        position=position,
        replica_id=segment.spec.replica_id,
    )
