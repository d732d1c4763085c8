"""The entries of a log that are in memory: always its newest ones, without a gap up to the end.

Parallel lists with one item per entry, because bisection over plain lists of integers is the fastest lookup
there is::

      entries     [e(first) … e(last)]
      ends        record offset after each entry            (ascending; equal where an entry is no batch)
      times       greatest timestamp up to each entry       (ascending)
      positions   place of each frame in its segment's file
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from raftlog.raft.types import Entry
from raftlog.record.frame import BATCH, Buffer
from raftlog.storage.segment import batch_fields
from raftlog.storage.segment_index import NO_TIMESTAMP

_JOIN_BYTES = 16 << 10
"""Frames below this size are joined with their neighbours before they are handed out: a few large buffers
cost a transport far less than thousands of small ones."""


class Tail:
    """See the module. ``base_offset`` and ``base_time`` describe the log before ``first_index``."""

    __slots__ = ("base_offset", "base_time", "ends", "entries", "first_index", "positions", "times")

    def __init__(self, first_index: int, base_offset: int, base_time: int = NO_TIMESTAMP) -> None:
        self.first_index = first_index
        self.base_offset = base_offset
        self.base_time = base_time
        self.entries: list[Entry] = []
        self.ends: list[int] = []
        self.times: list[int] = []
        self.positions: list[int] = []

    @property
    def last_index(self) -> int:
        return self.first_index + len(self.entries) - 1

    @property
    def end_offset(self) -> int:
        return self.ends[-1] if self.ends else self.base_offset

    def append(self, entry: Entry, position: int) -> None:
        """Add the next entry."""
        entries, times = self.entries, self.times
        assert entry.index == self.first_index + len(entries), (entry.index, self.last_index)
        last_time = times[-1] if times else self.base_time
        if entry.kind == BATCH:
            end, time = batch_fields(entry.frame)
            if time < last_time:
                time = last_time
        else:
            end, time = self.end_offset, last_time
        entries.append(entry)
        self.ends.append(end)
        times.append(time)
        self.positions.append(position)

    def truncate(self, index: int) -> int:
        """Drop the entries from ``index`` on; returns their bytes."""
        assert index >= self.first_index, (index, self.first_index)
        keep = index - self.first_index
        dropped = sum(len(entry.frame) for entry in self.entries[keep:])
        for values in (self.entries, self.ends, self.times, self.positions):
            del values[keep:]
        return dropped

    def evict(self, index: int) -> int:
        """Forget the entries up to ``index`` (they can be read from segments); returns their bytes."""
        count = index + 1 - self.first_index
        if count <= 0:
            return 0
        freed = sum(len(entry.frame) for entry in self.entries[:count])
        self.base_offset = self.ends[count - 1]
        self.base_time = self.times[count - 1]
        self.first_index += count
        for values in (self.entries, self.ends, self.times, self.positions):
            del values[:count]
        return freed

    def at(self, index: int) -> Entry:
        """The entry of that index."""
        assert index >= self.first_index, (index, self.first_index)
        return self.entries[index - self.first_index]

    def position_of(self, index: int) -> int:
        """Its place in its segment's file."""
        return self.positions[index - self.first_index]

    def slice(self, lo: int, hi: int, bytes_max: int) -> list[Entry]:
        """Entries [lo, hi), at least one, and no more once ``bytes_max`` is passed."""
        found: list[Entry] = []
        size = 0
        for entry in self.entries[lo - self.first_index : hi - self.first_index]:
            size += len(entry.frame)
            if found and size > bytes_max:
                break
            found.append(entry)
        return found

    def frames(self, offset: int, limit_index: int, bytes_max: int) -> list[Buffer]:
        """Frames from the batch that holds ``offset`` on; see ReplicaLog.try_read."""
        slot = bisect_right(self.ends, offset)  # first entry that ends above it: necessarily a batch
        stop = min(len(self.entries), limit_index + 1 - self.first_index)
        found: list[Buffer] = []
        size = 0
        for entry in self.entries[slot:stop]:
            size += len(entry.frame)
            if found and size > bytes_max:
                break
            found.append(entry.frame)
        return join_small(found)

    def term_before(self, offset: int) -> int:
        """Term of the last record below ``offset``, which is above ``base_offset``."""
        return self.entries[bisect_left(self.ends, offset)].term

    def find_time(self, timestamp_ms: int) -> Entry | None:
        """The first batch at which the timestamps reach ``timestamp_ms`` (which ``base_time`` does not)."""
        slot = bisect_left(self.times, timestamp_ms)
        return self.entries[slot] if slot < len(self.entries) else None


def join_small(frames: list[Buffer]) -> list[Buffer]:
    """The same bytes in fewer buffers: runs of small frames become one."""
    if len(frames) < 2:
        return frames
    joined: list[Buffer] = []
    run: list[Buffer] = []
    for frame in frames:
        if len(frame) < _JOIN_BYTES:
            run.append(frame)
            continue
        if run:
            joined.append(run[0] if len(run) == 1 else b"".join(run))
            run = []
        joined.append(frame)
    if run:
        joined.append(run[0] if len(run) == 1 else b"".join(run))
    return joined
