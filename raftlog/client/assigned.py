"""What a consumer keeps of one partition: where it is, what was fetched ahead, and what is decoded.

Two sides touch it. The fetcher, on the loop, adds chunks of frames; the consumer, on whichever thread polls,
takes them and decodes. What both touch is guarded by the consumer's lock; ``epoch`` grows with every jump (a
seek, a reset), so that an answer to a question from before the jump is recognised and dropped.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from operator import attrgetter
from threading import Lock
from typing import Final

from raftlog.client.metadata import PartitionView
from raftlog.errors import CorruptFrame
from raftlog.record.batch import BatchHeader
from raftlog.record.codec import decode_batch
from raftlog.record.frame import FRAME_HEADER_BYTES, FrameHeader, FrameKind, iter_frames
from raftlog.record.types import Record, TopicPartition

_LENGTH_KIND_TERM: Final = struct.Struct(">I8xBxQ")
_BATCH: Final = int(FrameKind.BATCH)
UNKNOWN_TERM: Final = -1
_offset: Final = attrgetter("offset")


class AssignedPartition:
    """One partition of a consumer's assignment."""

    __slots__ = (
        "buffered",
        "chunks",
        "committed",
        "cursor",
        "decoded",
        "epoch",
        "error",
        "failures",
        "fetch_offset",
        "fetching",
        "frames",
        "last_term",
        "limit",
        "name",
        "pause_until",
        "paused",
        "position",
        "reset",
        "resolving",
        "view",
    )

    def __init__(self, view: PartitionView, reset: int | None) -> None:
        self.view = view
        self.name = TopicPartition(view.topic, view.index)
        self.epoch = 0
        self.position: int | None = None
        """Offset of the next record to hand out; None until it is looked up."""
        self.reset = reset
        """What to look up while there is no position: OFFSET_EARLIEST or OFFSET_LATEST."""
        self.limit: int | None = None
        """Hand out nothing from this offset on."""
        self.paused = False
        self.error: Exception | None = None
        """To be raised when everything before it was handed out."""
        self.committed = -1
        """The offset after the last committed record, as of the last fetch; -1: unknown."""
        # the fetcher's
        self.fetch_offset = 0
        self.last_term = UNKNOWN_TERM
        self.fetching = False
        self.resolving = False
        self.pause_until = 0.0
        self.failures = 0
        self.chunks: deque[memoryview] = deque()
        self.buffered = 0
        """Bytes fetched and not decoded."""
        # the consumer's
        self.frames: tuple[memoryview, Iterator[tuple[FrameHeader, int]]] | None = None
        """The chunk that is being decoded, frame by frame."""
        self.decoded: list[Record] = []
        self.cursor = 0
        """Index in ``decoded`` of the next record to hand out."""

    def jump(self, offset: int | None, reset: int | None = None, *, last_term: int = UNKNOWN_TERM) -> None:
        """Go on from ``offset``, or from what looking up ``reset`` gives; forget all that was fetched
        ahead. ``last_term``: of the record before ``offset``, if that was read."""
        self.epoch += 1
        self.position = offset
        self.reset = reset
        self.fetch_offset = 0 if offset is None else offset
        self.last_term = last_term
        self.fetching = False
        self.error = None
        self.pause_until = 0.0
        self.failures = 0
        self.chunks.clear()
        self.buffered = 0
        self.frames = None
        self.decoded = []
        self.cursor = 0

    def available(self) -> int:
        """How many decoded records may be handed out."""
        if self.paused:
            return 0
        end = len(self.decoded)
        if self.limit is not None and end and self.decoded[-1].offset >= self.limit:
            end = bisect_left(self.decoded, self.limit, key=_offset)
        return max(end - self.cursor, 0)

    def decode_next(self, lock: Lock) -> bool:
        """Decode the next batch that holds anything from ``position`` on; False when no chunk is left.

        Args:
            lock: the consumer's; held only to take a chunk.

        Raises:
            CorruptFrame, CorruptBatch: what was fetched does not check.
        """
        while True:
            if self.frames is None:
                with lock:
                    if not self.chunks:
                        return False
                    chunk = self.chunks.popleft()
                    self.buffered -= len(chunk)
                self.frames = chunk, iter_frames(chunk)
            chunk, frames = self.frames
            for header, at in frames:
                if header.kind != _BATCH:
                    continue
                batch = chunk[at + FRAME_HEADER_BYTES : at + header.length]
                position = self.position or 0
                if BatchHeader.parse(batch).next_offset <= position:
                    continue
                # the frame's crc has just covered the same bytes
                records = decode_batch(batch, self.name.topic, self.name.partition, check=False)
                if records[0].offset < position:
                    records = [record for record in records if record.offset >= position]
                if records:
                    self.decoded, self.cursor = records, 0
                    return True
            self.frames = None


def end_of(chunk: memoryview) -> tuple[int, int] | None:
    """(offset after the last record, its term) of a range of frames; None if it holds no batch.

    Goes from frame to frame without looking inside, so that it may be done on the loop.

    Raises:
        CorruptFrame: the lengths do not add up.
    """
    at, size = 0, len(chunk)
    last = None
    unpack = _LENGTH_KIND_TERM.unpack_from
    while at < size:
        if size - at < FRAME_HEADER_BYTES:
            raise CorruptFrame(f"{size - at} bytes are too few for a frame header")
        length, kind, term = unpack(chunk, at)
        if length < FRAME_HEADER_BYTES or at + length > size:
            raise CorruptFrame(f"frame of {length} bytes cut at {size - at}")
        if kind == _BATCH:
            last = at, term
        at += length
    if last is None:
        return None
    return BatchHeader.parse(chunk, last[0] + FRAME_HEADER_BYTES).next_offset, last[1]
