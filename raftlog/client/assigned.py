"""What a consumer keeps of one partition: where it is, what was fetched ahead, and what is decoded.

Two sides touch it. The fetcher, on the loop, adds chunks of frames; the consumer, on whichever thread polls,
takes them and decodes. What both touch is guarded by the consumer's lock; ``epoch`` grows with every jump (a
seek, a reset), so that an answer to a question from before the jump is recognised and dropped.

Control batches, and what aborted transactions wrote, are never decoded: the position moves over them.
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
from raftlog.client.offsets import UNKNOWN_TERM
from raftlog.errors import CorruptFrame
from raftlog.record.batch import BatchHeader
from raftlog.record.codec import decode_batch
from raftlog.record.frame import FRAME_HEADER_BYTES, FrameHeader, FrameKind, iter_frames
from raftlog.record.types import Record, TopicPartition

_LENGTH_KIND_TERM: Final = struct.Struct(">I8xBxQ")
_BATCH: Final = int(FrameKind.BATCH)
COMMITTED: Final = -3
"""To look up: the offset that the consumer's group committed. (The other numbers are those of the rpc.)"""
_offset: Final = attrgetter("offset")

Aborted = list[tuple[int, int, int]]
"""(producer id, first offset, offset of the marker): batches of that producer in between are hidden."""


class AssignedPartition:
    """One partition of a consumer's assignment."""

    __slots__ = (
        "_decoded_term",
        "_term_before",
        "buffered",
        "chunks",
        "claimed",
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
        "saved",
        "view",
    )

    def __init__(self, view: PartitionView, reset: int | None) -> None:
        self.view = view
        self.name = TopicPartition(view.topic, view.index)
        self.epoch = 0
        self.position: int | None = None
        """Offset of the next record to hand out; None until it is looked up."""
        self.reset = reset
        """What to look up while there is no position: OFFSET_EARLIEST, OFFSET_LATEST or COMMITTED."""
        self.limit: int | None = None
        """Hand out nothing from this offset on."""
        self.paused = False
        self.error: Exception | None = None
        """To be raised when everything before it was handed out."""
        self.saved: int | None = None
        """What the group has committed, as far as this consumer knows."""
        self.claimed = 0
        """Records below were committed before they were handed out (auto commit, record by record)."""
        # the fetcher's
        self.fetch_offset = 0
        self.last_term = UNKNOWN_TERM
        self.fetching = False
        self.resolving = False
        self.pause_until = 0.0
        self.failures = 0
        self.chunks: deque[tuple[memoryview, Aborted]] = deque()
        self.buffered = 0
        """Bytes fetched and not decoded."""
        # the consumer's
        self.frames: tuple[memoryview, Aborted, Iterator[tuple[FrameHeader, int]]] | None = None
        """The chunk that is being decoded, frame by frame."""
        self.decoded: list[Record] = []
        self.cursor = 0
        """Index in ``decoded`` of the next record to hand out."""
        self._decoded_term = UNKNOWN_TERM
        """Of ``decoded``."""
        self._term_before = UNKNOWN_TERM
        """Of what lies before it."""

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
        self.claimed = 0
        self._term_before = last_term

    @property
    def position_term(self) -> int:
        """Term of the record before the position; UNKNOWN_TERM where that was not read."""
        return self._decoded_term if self.cursor else self._term_before

    def available(self) -> int:
        """How many decoded records may be handed out."""
        if self.paused:
            return 0
        end = len(self.decoded)
        if self.limit is not None and end and self.decoded[-1].offset >= self.limit:
            end = bisect_left(self.decoded, self.limit, key=_offset)
        return max(end - self.cursor, 0)

    def decode_next(self, lock: Lock) -> bool:
        """Decode the next batch that holds anything to hand out from ``position`` on; False when no chunk is
        left. The position moves over batches that hold nothing.

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
                    chunk, aborted = self.chunks.popleft()
                    self.buffered -= len(chunk)
                self.frames = chunk, aborted, iter_frames(chunk)
            chunk, aborted, frames = self.frames
            for header, at in frames:
                if header.kind != _BATCH:
                    continue
                batch = chunk[at + FRAME_HEADER_BYTES : at + header.length]
                parsed = BatchHeader.parse(batch)
                position = self.position or 0
                if parsed.next_offset <= position:
                    continue
                if parsed.is_control or (aborted and is_hidden(parsed, aborted)):
                    self._move_to([], header.term)
                    self.position = parsed.next_offset
                    continue
                # the frame's crc has just covered the same bytes
                records = decode_batch(batch, self.name.topic, self.name.partition, check=False)
                if records[0].offset < position:
                    records = [record for record in records if record.offset >= position]
                if records:
                    self._move_to(records, header.term)
                    return True
            self.frames = None

    def _move_to(self, records: list[Record], term: int) -> None:
        """Go on with what follows the records decoded before, all of which were handed out; none: behind
        that."""
        self._term_before = self.position_term if records else term
        self._decoded_term = term
        self.decoded, self.cursor = records, 0


def is_hidden(batch: BatchHeader, aborted: Aborted) -> bool:
    """Whether an aborted transaction has written the batch."""
    return any(
        producer_id == batch.producer_id and first <= batch.base_offset < marker
        for producer_id, first, marker in aborted
    )


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
