"""Putting a replica's log right with bytes from peers.

A :class:`Patch` takes frames that follow from the last good one. They are kept aside until they have reached
an anchor, an entry whose crc was known before: only then is it proved that they are what stood here, and not
the same indexes of a branch that was never committed. Then they are written where they belong, the same bytes
at the same positions.

A crash at any moment is harmless. Before the proof nothing but a file aside has changed, which recovery
removes. While the bytes are put in place, damaged ones are replaced by right ones: whatever part of that
survives, the next look at the log finds the rest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from raftlog.errors import CorruptFrame
from raftlog.record.frame import FRAME_BYTES_MAX, Buffer, FrameHeader, FrameKind, frame_length, parse_frame
from raftlog.storage.damage import Anchor, BrokenLog
from raftlog.storage.disk import Disk, DiskFile, Write
from raftlog.storage.salvage import READ_BYTES, chained
from raftlog.storage.segment import Segment, batch_fields, replica_folder

_RUN_BYTES: Final = 4 << 20
"""Written and synced at a time."""


class Patch:
    """What is needed at one break.

    Args:
        disk: of the damaged replica.
        broken: where, and what recovery knows of what follows.
        anchors: from :func:`~raftlog.storage.salvage.find_anchors`.

    Attributes:
        index: of the next frame it needs.
        prev_crc: of the entry before that.
        last_index: no frame above this one is needed.
    """

    def __init__(self, disk: Disk, broken: BrokenLog, anchors: frozenset[Anchor]) -> None:
        segment = broken.segment
        self.index = segment.last_index + 1
        self.prev_crc = segment.last_crc
        self.last_index: Final = max(index for index, _ in anchors)
        self._first = (self.index, self.prev_crc)
        self._disk = disk
        self._segment = segment
        self._anchors = anchors
        self._path = f"{replica_folder(segment.spec.replica_id)}/repair"
        self._file: DiskFile | None = None
        self._size = 0
        self._proved_size = 0

    @property
    def is_proved(self) -> bool:
        """The frames so far have reached an anchor. (None are needed where only a header is damaged.)"""
        if self._proved_size:
            return True
        index, crc = self._first
        return not self._segment.header_written and (index - 1, crc) in self._anchors

    @property
    def is_hopeless(self) -> bool:
        """The frames so far are of another branch: they have passed every anchor."""
        return not self.is_proved and self.index > self.last_index

    async def add(self, data: Buffer) -> None:
        """Take frames.

        Raises:
            CorruptFrame: they do not check, or do not follow from those before.
            StorageFull, StorageFailed: the device.
        """
        run = chained(data, self.index, self.prev_crc, len(data))
        if not run:
            raise CorruptFrame(f"no frame that follows entry {self.index - 1}")
        if self._file is None:
            await self._disk.remove(self._path)
            self._file = await self._disk.open(self._path, create=True)
        at = 0
        while at < len(run) and not self._proved_size:
            header = FrameHeader(run, at)
            at += header.length
            self.index, self.prev_crc = header.index + 1, header.crc
            if (header.index, header.crc) in self._anchors:
                self._proved_size = self._size + at
        await self._disk.write([Write(self._file, self._size, (run[:at],))], sync=False)
        self._size += at

    def restart(self) -> None:
        """Drop the frames so far: they lead nowhere."""
        assert not self.is_proved
        self.index, self.prev_crc = self._first
        self._size = 0

    async def apply(self) -> None:
        """Put the frames, and the headers of segments that they begin, where they belong; synced.

        Raises:
            StorageFull, StorageFailed: the device. It may be called again.
        """
        assert self.is_proved
        writer = _Writer(self._disk, self._segment)
        async for frame in self._frames():
            await writer.add(frame)
        await writer.flush()

    async def close(self) -> None:
        """Remove what was kept aside."""
        if self._file is not None:
            self._file.close()
            self._file = None
            await self._disk.remove(self._path)

    async def _frames(self) -> AsyncIterator[memoryview]:
        """The frames kept aside (checked again: they have been on a disk)."""
        position, data, at = 0, b"", 0
        while position + at < self._proved_size:
            left = len(data) - at
            wanted = min(frame_length(data, at), FRAME_BYTES_MAX) if left >= 4 else READ_BYTES
            if left < 4 or left < wanted:
                assert self._file is not None
                position, at = position + at, 0
                data = await self._file.read(position, max(wanted, READ_BYTES))
            header = parse_frame(data, at)
            yield memoryview(data)[at : at + header.length]
            at += header.length


class _Writer:
    """Writes frames from a position of one segment on, into the next ones where that is full."""

    def __init__(self, disk: Disk, segment: Segment) -> None:
        self._disk = disk
        self._segment = segment
        self._header_due = not segment.header_written
        self._has_rolled = False
        self._end_offset = segment.end_offset
        self._position = segment.end_position
        self._run: list[Buffer] = []
        self._run_bytes = 0

    async def add(self, frame: memoryview) -> None:
        """Take the next frame."""
        header = FrameHeader(frame)
        self._run.append(bytes(frame))
        self._run_bytes += header.length
        if header.kind == FrameKind.BATCH:
            self._end_offset = batch_fields(frame)[0]
        spec = self._segment.spec
        if self._position + self._run_bytes >= spec.segment_bytes:
            await self.flush()
            self._segment = Segment(spec, header.index + 1, self._end_offset, header.term, header.crc, 1)
            self._position = self._segment.end_position
            self._header_due = self._has_rolled = True
        elif self._run_bytes >= _RUN_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Write and sync what was taken; with it the header of its segment, where that is due."""
        if not self._run and (self._has_rolled or not self._header_due):
            return
        file = await self._disk.open(self._segment.path, create=True)
        try:
            writes = [Write(file, self._position, self._run)] if self._run else []
            if self._header_due:
                writes.append(Write(file, 0, (self._segment.header.encode(),)))
            await self._disk.write(writes)
        finally:
            file.close()
        self._header_due = False
        self._position += self._run_bytes
        self._run, self._run_bytes = [], 0
