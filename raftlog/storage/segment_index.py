"""The sparse index of a segment, by position, log index, record offset and time; and its file.

One entry stands for a *granule*: the frames from its position to that of the next entry. A lookup finds the
granule by bisection and then walks its few frames.

The file has two checked parts (:mod:`raftlog.storage.checked_file`): the summary, which recovery reads of
every segment, and the arrays, read when a lookup first needs them.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, bisect_right
from typing import Final

import msgspec

from raftlog.errors import DamagedData
from raftlog.raft.types import ConfState
from raftlog.storage.checked_file import seal, sealed_bytes, unseal, unseal_as
from raftlog.storage.disk import Disk

_SUMMARY_MAGIC: Final = b"RLOGIDXS"
_ARRAYS_MAGIC: Final = b"RLOGIDXA"
_VERSION: Final = 1
_HEAD_READ_BYTES: Final = 4096
NO_TIMESTAMP: Final = -(1 << 63)
"""Below every timestamp."""


class SegmentSummary(msgspec.Struct, frozen=True, array_like=True):
    """What the frames of a segment up to ``last_index`` amount to."""

    replica_id: int
    base_index: int
    base_offset: int
    last_index: int
    last_term: int
    last_crc: int
    last_leader_time_ms: int
    end_position: int
    """Where the frame after ``last_index`` begins in the file."""
    end_offset: int
    """Record offset after the last batch."""
    max_timestamp: int
    terms: tuple[tuple[int, int], ...]
    """(first index, term) runs."""
    confs: tuple[tuple[int, ConfState], ...]
    """Configurations and the index of the entry that brought each."""


class SparseIndex:
    """Five parallel arrays, one slot per granule."""

    __slots__ = ("indexes", "max_before", "offsets", "positions", "prev_crcs")

    def __init__(self) -> None:
        self.positions = array("Q")
        self.indexes = array("Q")
        self.offsets = array("Q")
        """Record offset of the first batch at or after the granule's first frame."""
        self.max_before = array("q")
        """Greatest timestamp in the segment before the granule."""
        self.prev_crcs = array("Q")
        """What the granule's first frame follows: proof that it belongs there."""

    def add(self, position: int, index: int, offset: int, max_before: int, prev_crc: int) -> None:
        """Begin a granule."""
        self.positions.append(position)
        self.indexes.append(index)
        self.offsets.append(offset)
        self.max_before.append(max_before)
        self.prev_crcs.append(prev_crc)

    @property
    def begin(self) -> tuple[int, int]:
        """(index, prev_crc) of the first frame; (0, 0) without any."""
        return (self.indexes[0], self.prev_crcs[0]) if self.indexes else (0, 0)

    def slot_of_index(self, index: int) -> int:
        """The granule that holds the entry (or the last one before it)."""
        return max(0, bisect_right(self.indexes, index) - 1)

    def slot_of_offset(self, offset: int) -> int:
        """The granule that holds the batch with this record offset."""
        return max(0, bisect_right(self.offsets, offset) - 1)

    def slot_of_time(self, timestamp_ms: int) -> int:
        """The granule in which the timestamps first reach ``timestamp_ms``."""
        return max(0, bisect_left(self.max_before, timestamp_ms) - 1)

    def slot_behind(self, slot: int, position: int) -> int:
        """The first granule after ``slot`` that begins at or above ``position``; may be one past the last."""
        return bisect_left(self.positions, position, slot + 1)

    def encode(self) -> bytes:
        """All arrays, big endian, one after another."""
        return b"".join(_big_endian(a) for a in self._arrays())

    @classmethod
    def decode(cls, data: bytes) -> SparseIndex:
        """The inverse of :meth:`encode`."""
        index = cls()
        size = len(data) // 5
        for part, into in enumerate(index._arrays()):
            into.frombytes(data[part * size : (part + 1) * size])
            if sys.byteorder == "little":
                into.byteswap()
        return index

    def _arrays(self) -> tuple[array[int], ...]:
        return self.positions, self.indexes, self.offsets, self.max_before, self.prev_crcs


def _big_endian(values: array[int]) -> bytes:
    if sys.byteorder == "little":
        values = values[:]
        values.byteswap()
    return values.tobytes()


async def write_index(disk: Disk, path: str, summary: SegmentSummary, index: SparseIndex) -> None:
    """Write the index file atomically."""
    head = seal(_SUMMARY_MAGIC, _VERSION, msgspec.msgpack.encode(summary))
    await disk.replace_file(path, head + seal(_ARRAYS_MAGIC, _VERSION, index.encode()))


async def read_summary(disk: Disk, path: str) -> SegmentSummary:
    """The first part of an index file.

    Raises:
        FileNotFoundError: there is none.
        DamagedData: it does not check.
    """
    file = await disk.open(path)
    try:
        data = await file.read(0, _HEAD_READ_BYTES)
        size = sealed_bytes(_SUMMARY_MAGIC, data, path)
        if size > len(data):
            data += await file.read(len(data), size - len(data))
        return unseal_as(SegmentSummary, _SUMMARY_MAGIC, _VERSION, data, path, exact=False)
    finally:
        file.close()


async def read_index(disk: Disk, path: str) -> tuple[SegmentSummary, SparseIndex]:
    """Both parts of an index file (errors as of :func:`read_summary`)."""
    data = await disk.read_file(path)
    size = sealed_bytes(_SUMMARY_MAGIC, data, path)
    summary = unseal_as(SegmentSummary, _SUMMARY_MAGIC, _VERSION, data[:size], path)
    arrays = bytes(unseal(_ARRAYS_MAGIC, _VERSION, data[size:], path))
    if len(arrays) % 40:
        raise DamagedData(f"{path}: arrays of {len(arrays)} bytes", path=path, position=size)
    return summary, SparseIndex.decode(arrays)
