"""What a consumer keeps of one partition: where it is, what was fetched ahead, and what is decoded.

Two sides touch it. The fetcher, on the loop, adds chunks of frames; the consumer, on whichever thread polls,
takes them and decodes. What both touch is guarded by the consumer's lock; ``epoch`` grows with every jump (a
seek, a reset), so that an answer to a question from before the jump is recognised and dropped.

Control batches, and what aborted transactions wrote, are never decoded: the position moves over them.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Any, Final, TypeAlias

from raftlog.client.metadata import PartitionView
from raftlog.client.offsets import UNKNOWN_TERM
from raftlog.errors import CorruptFrame
from raftlog.record.batch import BatchHeader
from raftlog.record.frame import FRAME_HEADER_BYTES, FrameHeader, FrameKind, iter_frames
from raftlog.record.types import TopicPartition

_LENGTH_KIND_TERM: Final = struct.Struct(">I8xBxQ")
_BATCH: Final = int(FrameKind.BATCH)
COMMITTED: Final = -3
"""To look up: the offset that the consumer's group committed. (The other numbers are those of the rpc.)"""

Decoder: TypeAlias = Callable[..., Sequence[Any]]
"""(batch, topic, partition, check=False) -> its records, of any kind that has a length and can be sliced."""
Aborted = list[tuple[int, int, int]]
"""(producer id, first offset, offset of the marker): batches of that producer in between are hidden."""


class AssignedPartition:
    """One partition of a consumer's assignment."""

    __slots__ = (
        "_batch",
        "_decode",
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
        "first",
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
        self.decoded: Sequence[Any] = ()
        """What the decoder made of one batch: its records, in a list or as columns."""
        self.first = 0
        """Offset of the first of them; the others follow without gaps."""
        self.cursor = 0
        """Index in ``decoded`` of the next record to hand out."""
        self._batch: memoryview | None = None
        """What ``decoded`` was made of."""
        self._decode: Decoder | None = None
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
        self._batch = None
        self.decoded = ()
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
        if self.limit is not None:
            end = min(end, self.limit - self.first)
        return max(end - self.cursor, 0)

    def move(self, end: int) -> None:
        """What was decoded is handed out up to this index."""
        self.cursor = end
        self.position = self.first + end

    def present(self, decode: Decoder) -> bool:
        """Have what is left of ``decoded`` in the form of this decoder; False when nothing is left."""
        if self.cursor >= len(self.decoded):
            return False
        if decode is not self._decode:
            assert self._batch is not None, "what is decoded was a batch"
            base = BatchHeader.parse(self._batch).base_offset
            decoded = decode(self._batch, self.name.topic, self.name.partition, check=False)
            self.decoded, self._decode = decoded[self.first - base :], decode
        return True

    def decode_next(self, lock: Lock, decode: Decoder) -> bool:
        """Decode the next batch that holds anything to hand out from ``position`` on; False when no chunk is
        left. The position moves over batches that hold nothing.

        Args:
            lock: the consumer's; held only to take a chunk.
            decode: makes records of a batch.

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
                    self._move_to((), header.term)
                    self._batch = None
                    self.position = parsed.next_offset
                    continue
                # the frame's crc has just covered the same bytes
                decoded = decode(batch, self.name.topic, self.name.partition, check=False)
                skipped = max(position - parsed.base_offset, 0)
                self._move_to(decoded[skipped:] if skipped else decoded, header.term)
                self.first = parsed.base_offset + skipped
                self._batch, self._decode = batch, decode
                return True
            self.frames = None

    def _move_to(self, decoded: Sequence[Any], term: int) -> None:
        """Go on with what follows the records decoded before, all of which were handed out; none: behind
        that."""
        self._term_before = self.position_term if len(decoded) else term
        self._decoded_term = term
        self.decoded, self.cursor = decoded, 0


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
