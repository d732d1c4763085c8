"""The ranges of a partition that readers of committed records skip: what aborted transactions wrote.

A range goes from the transaction's first record to its abort marker and hides the records of one producer in
it; records of others lie in between. Ranges stand in order of their markers, which is not the order of their
first offsets: a transaction that began early may end late. To find those that overlap ``[start, end)``
without looking at all the rest, each keeps the last stable offset as its marker left it::

    offset   0   1   2   3   4   5        a: record of A; xA: its abort marker
             a   b   xA  c   xC  xB
    ranges   (A, 0 to 2, stable 1)  (C, 3 to 4, stable 1)  (B, 1 to 5, stable 6)

Whatever ends later was open when that was said, or began later still, so it begins at or above ``stable``:
once that reaches ``end`` no further range overlaps. The last stable offset never moves back, so the search
may stop there. (Kafka's transaction index does the same.)
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from typing import Final, NamedTuple

from raftlog.record.frame import Buffer

_RANGE: Final = struct.Struct(">qhqqq")


class AbortedRange(NamedTuple):
    """One aborted transaction that wrote to the partition."""

    producer_id: int
    epoch: int
    first_offset: int
    marker_offset: int
    stable: int
    """The last stable offset after the marker."""


class AbortedRanges:
    """All of them above the log's start, packed: 34 bytes each."""

    __slots__ = ("_packed",)

    def __init__(self, packed: Buffer = b"") -> None:
        self._packed = bytearray(packed)
        assert len(self._packed) % _RANGE.size == 0, len(self._packed)

    def __len__(self) -> int:
        return len(self._packed) // _RANGE.size

    def __getitem__(self, position: int) -> AbortedRange:
        if not 0 <= position < len(self):
            raise IndexError(position)
        return AbortedRange(*_RANGE.unpack_from(self._packed, position * _RANGE.size))

    def append(self, aborted: AbortedRange) -> None:
        """The next one to end."""
        assert aborted.first_offset < aborted.marker_offset, aborted
        self._packed += _RANGE.pack(*aborted)

    def _first_ending_at(self, offset: int) -> int:
        """Position of the first range whose marker is not below ``offset``."""
        return bisect_left(range(len(self)), offset, key=lambda position: self[position].marker_offset)

    def overlapping(self, start: int, end: int) -> list[AbortedRange]:
        """Those with an offset in ``[start, end)``, in order of their markers."""
        found = []
        for position in range(self._first_ending_at(start), len(self)):
            each = self[position]
            if each.first_offset < end:
                found.append(each)
            if each.stable >= end:
                break
        return found

    def drop_below(self, offset: int) -> None:
        """Forget those that ended below ``offset``."""
        del self._packed[: self._first_ending_at(offset) * _RANGE.size]

    def copy(self) -> AbortedRanges:
        """An independent copy: one copy of memory."""
        return AbortedRanges(self._packed)

    def packed(self) -> bytes:
        """All of it, for a snapshot."""
        return bytes(self._packed)
