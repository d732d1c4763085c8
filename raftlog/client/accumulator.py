"""Where records gather into batches: one open batch per partition, filled by any thread, drained by the I/O
loop.

::

    send()  ->  open batch  ->  ready (full, or closed by a flush)  ->  window (sent, see ``window``)  ->
    settled
                    \\_________ its linger is over, or somebody waits for it ________/

One lock guards all of it; nothing under it takes longer than encoding one record. Times are read on the loop
only: uvloop's clock is as old as the loop's last turn, which another thread would find seconds late.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Final

from raftlog.client.delivery import Completion, Delivery
from raftlog.client.metadata import PartitionView, TopicView
from raftlog.client.window import Identity, Window
from raftlog.errors import Closed, RaftlogError
from raftlog.net.connection import RpcConnection
from raftlog.net.rpc import ProducePartition
from raftlog.record.batch import SEQUENCE_MODULUS, Compression, Unsealed
from raftlog.record.codec import BatchBuilder
from raftlog.record.frame import Buffer
from raftlog.record.partitioner import DefaultPartitioner
from raftlog.record.types import Headers

RECORD_OVERHEAD: Final = 24
"""Bytes a record takes in a batch beside key, value and headers, at most as far as it matters here."""
NO_SEQUENCE: Final = -1


class ProducerBatch(Completion):
    """One batch of one partition, from its first record until it is acknowledged or failed."""

    __slots__ = (
        "attempt",
        "builder",
        "bytes",
        "closed",
        "deadline",
        "doubt_before",
        "encoded",
        "hurried",
        "identity",
        "in_doubt",
        "last_error",
        "linger_until",
        "order",
        "queue",
        "sent_at",
        "sequence",
        "unsealed",
    )

    def __init__(self, queue: PartitionQueue, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(queue.view.topic, queue.view.index, loop)
        self.queue = queue
        self.builder: BatchBuilder | None = None
        """Its records, while it is open."""
        self.unsealed: Unsealed | None = None
        self.encoded: tuple[Buffer, ...] = ()
        """What was sent, in pieces."""
        self.bytes = 0
        """What it takes of the producer's buffer."""
        self.closed = False
        """No record is added any more."""
        self.hurried = False
        self.linger_until = inf
        self.deadline = inf
        self.identity: Identity | None = None
        self.sequence = NO_SEQUENCE
        self.order = 0
        """Place among the partition's batches that were sent."""
        self.attempt = 0
        """How often it was sent; an answer to another attempt than the last is stale."""
        self.sent_at = 0.0
        self.in_doubt = False
        """Some attempt may have been written: it went out, and no answer said that nothing happened."""
        self.doubt_before = False
        self.last_error: BaseException | None = None

    def encode(
        self,
        compression: Compression,
        identity: Identity | None,
        sequence: int,
        transactional: bool = False,
    ) -> None:
        """Make what is to be sent, under this identity and sequence; it is kept for retries."""
        self.identity, self.sequence = identity, sequence
        if self.unsealed is None:
            assert self.builder is not None, "a batch has its records or their bytes"
            self.unsealed = self.builder.finish(compression)
            self.builder = None
        if identity is None:
            self.encoded = self.unsealed.seal()
        else:
            self.encoded = self.unsealed.seal(*identity, sequence, transactional)

    def sequence_after(self) -> int:
        """The sequence that the partition's next batch has to have."""
        return (self.sequence + self.count) % SEQUENCE_MODULUS


class PartitionQueue:
    """All batches of one partition that are not settled."""

    __slots__ = (
        "batch_bytes",
        "bulk_bytes",
        "connection",
        "dirty",
        "failures",
        "open",
        "partitioner",
        "pause_until",
        "ready",
        "target",
        "topic",
        "view",
        "waiting",
        "window",
    )

    def __init__(
        self,
        view: PartitionView,
        topic: TopicView,
        partitioner: DefaultPartitioner,
        batch_bytes: int,
        bulk_bytes: int,
        window_size: int,
    ) -> None:
        self.view = view
        self.topic = topic
        self.partitioner = partitioner
        self.batch_bytes = batch_bytes
        """Of batches that records are gathered in."""
        self.bulk_bytes = bulk_bytes
        """Of batches that come as such."""
        # what follows is the sender's, touched on the loop only
        self.target: ProducePartition | None = None
        self.connection: RpcConnection | None = None
        """Where everything in flight went."""
        self.waiting = False
        """For a leader, an identity or a pause: nothing is sent until that is over."""
        self.pause_until = 0.0
        self.failures = 0
        """Rounds that failed since something was acknowledged."""
        self.open: ProducerBatch | None = None
        self.ready: deque[ProducerBatch] = deque()
        self.window: Window[ProducerBatch] = Window(window_size)
        """Touched on the loop only."""
        self.dirty = False

    def is_empty(self) -> bool:
        """Whether every record is settled."""
        window = self.window
        return not (window.in_flight or window.retry or self.ready or self.open is not None)


class Accumulator:
    """The producer's buffer.

    Args:
        loop: where batches are drained and completed.
        buffer_bytes: of all records not settled.
        wake: makes the loop call :meth:`take_changes`; called from any thread, once per change.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        buffer_bytes: int,
        wake: Callable[[], None],
    ) -> None:
        self._loop = loop
        self.buffer_bytes = buffer_bytes
        self._wake = wake
        self._lock = threading.Lock()
        self._used = 0
        self._changed: list[PartitionQueue] = []
        self._arrived: list[ProducerBatch] = []
        self._unsettled: dict[ProducerBatch, None] = {}
        self._room_wanted: deque[Callable[[], None]] = deque()
        self._refusal: Callable[[], RaftlogError] | None = None
        """Why no record is taken; there is no open batch then."""

    @property
    def used(self) -> int:
        """Bytes of records not settled."""
        return self._used

    # -- any thread ------------------------------------------------------------------------------------------

    def append(
        self,
        queue: PartitionQueue,
        timestamp_ms: int,
        key: bytes | None,
        value: bytes | None,
        headers: Headers,
        size: int,
        may_move: bool = False,
    ) -> Delivery | None:
        """Add one record to the partition's open batch.

        Args:
            size: bytes to account for it.
            may_move: the record has neither key nor a partition of its own: when the open batch is full,
                close it and buffer nothing, so that the caller asks the partitioner again.

        Returns:
            None if nothing was buffered: there is no room, or (``may_move``) the batch was full.

        Raises:
            InvalidRecord: a type that cannot be encoded; nothing was buffered.
            RaftlogError: why no records are taken: the producer was closed, it has no transaction open.
        """
        with self._lock:
            batch = queue.open
            used = self._used + size
            if batch is not None and used <= self.buffer_bytes:
                builder = batch.builder
                assert builder is not None, "an open batch is not encoded"
                index = builder.append(timestamp_ms, key, value, headers)
                if index is not None:
                    batch.count = index + 1
                    batch.bytes += size
                    self._used = used
                    return Delivery(batch, index, timestamp_ms)
            if not self._has_room(size):
                return None
            if batch is not None:
                self._close_open(queue)
                if may_move:
                    self._change(queue)
                    return None
            builder = BatchBuilder(queue.batch_bytes)
            index = builder.append(timestamp_ms, key, value, headers)
            assert index == 0, "an empty batch takes its first record whatever its size"
            batch = self._open(queue, builder)
            batch.count = 1
            batch.bytes = size
            self._used += size
            return Delivery(batch, 0, timestamp_ms)

    def add_batch(self, queue: PartitionQueue, unsealed: Unsealed) -> ProducerBatch | None:
        """Add a whole batch, behind what is buffered; None if there is no room."""
        size = unsealed.size
        with self._lock:
            if not self._has_room(size):
                return None
            if queue.open is not None:
                self._close_open(queue)
            batch = ProducerBatch(queue, self._loop)
            batch.unsealed, batch.count, batch.bytes = unsealed, unsealed.count, size
            batch.closed = True
            self._used += size
            queue.ready.append(batch)
            self._arrived.append(batch)
            self._unsettled[batch] = None
            self._change(queue)
        return batch

    def when_room(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, when buffer was freed or may have been (on the loop, or now)."""
        self._room_wanted.append(callback)
        if self._used == 0:
            self._tell_room()

    def hurry(self, batch: ProducerBatch) -> None:
        """Somebody waits for this batch: send it as soon as nothing of its partition is under way."""
        with self._lock:
            if not batch.closed and not batch.hurried:
                batch.hurried = True
                self._change(batch.queue)

    def close_open_batches(self) -> list[ProducerBatch]:
        """Let everything buffered go out now; returns all batches that are not settled."""
        with self._lock:
            return self._close_all()

    def unsettled(self) -> list[ProducerBatch]:
        """All batches that are not settled, the oldest first."""
        with self._lock:
            return list(self._unsettled)

    def shut(self, refusal: Callable[[], RaftlogError]) -> list[ProducerBatch]:
        """Take no more records, and let everything buffered go out now.

        Args:
            refusal: makes the error that is raised for records.

        Returns:
            All batches that are not settled.
        """
        with self._lock:
            self._refusal = refusal
            batches = self._close_all()
        self._tell_room()
        return batches

    def reopen(self) -> None:
        """Take records again."""
        with self._lock:
            self._refusal = None

    def close(self) -> None:
        """Take no more records, for good."""
        self.shut(_closed)

    # -- the loop --------------------------------------------------------------------------------------------

    def take_changes(self) -> tuple[list[ProducerBatch], list[PartitionQueue]]:
        """Batches that are new since the last call, and the queues to look at."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
            changed, self._changed = self._changed, []
            for queue in changed:
                queue.dirty = False
        return arrived, changed

    def take(self, queue: PartitionQueue, now: float) -> ProducerBatch | None:
        """The next batch to send for the first time: a ready one, or the open one when its time has come."""
        with self._lock:
            if queue.ready:
                return queue.ready.popleft()
            batch = queue.open
            if batch is None:
                return None
            if now < batch.linger_until and not (batch.hurried and not queue.window.in_flight):
                return None
            self._close_open(queue)
            return queue.ready.popleft()

    def put_back(self, queue: PartitionQueue, batches: Sequence[ProducerBatch]) -> None:
        """Batches to be sent as if for the first time, before all others."""
        with self._lock:
            queue.ready.extendleft(reversed(batches))

    def remove_expired(self, queue: PartitionQueue, now: float) -> list[ProducerBatch]:
        """Take out what was never sent and is past its deadline."""
        expired = []
        with self._lock:
            if queue.open is not None and queue.open.deadline <= now:
                self._close_open(queue)
            while queue.ready and queue.ready[0].deadline <= now:
                expired.append(queue.ready.popleft())
        return expired

    def remove_all(self, queue: PartitionQueue) -> list[ProducerBatch]:
        """Take out everything that was never sent."""
        with self._lock:
            if queue.open is not None:
                self._close_open(queue)
            removed = list(queue.ready)
            queue.ready.clear()
        return removed

    def release(self, batch: ProducerBatch) -> None:
        """A batch is settled: its bytes are free."""
        batch.builder = batch.unsealed = None
        batch.encoded = ()
        with self._lock:
            self._used -= batch.bytes
            del self._unsettled[batch]
        assert self._used >= 0, "more was released than was buffered"
        if self._room_wanted:
            self._tell_room()

    # -- within the lock -------------------------------------------------------------------------------------

    def _has_room(self, size: int) -> bool:
        if self._refusal is not None:
            raise self._refusal()
        # into an empty buffer goes anything, or what is larger than the buffer would wait for ever
        return not self._used or self._used + size <= self.buffer_bytes

    def _open(self, queue: PartitionQueue, builder: BatchBuilder) -> ProducerBatch:
        batch = queue.open = ProducerBatch(queue, self._loop)
        batch.builder = builder
        batch.hurry = partial(self.hurry, batch)
        self._arrived.append(batch)
        self._unsettled[batch] = None
        self._change(queue)
        return batch

    def _close_all(self) -> list[ProducerBatch]:
        for batch in self._unsettled:
            if not batch.closed:
                self._close_open(batch.queue)
                self._change(batch.queue)
        return list(self._unsettled)

    def _close_open(self, queue: PartitionQueue) -> None:
        batch = queue.open
        assert batch is not None, "there is an open batch to close"
        batch.closed = True
        batch.hurry = None
        queue.open = None
        queue.ready.append(batch)
        queue.partitioner.on_new_batch(queue.view.index, len(queue.topic.partitions))

    def _change(self, queue: PartitionQueue) -> None:
        if not queue.dirty:
            queue.dirty = True
            self._changed.append(queue)
            if len(self._changed) == 1:
                self._wake()

    def _tell_room(self) -> None:
        for _ in range(len(self._room_wanted)):
            try:
                callback = self._room_wanted.popleft()
            except IndexError:
                return
            callback()


def _closed() -> RaftlogError:
    return Closed("the producer is closed")


def size_of(headers: Headers) -> int:
    """About how many bytes headers take in a batch, never less than they do."""
    return sum(len(name) * 3 + 10 + (0 if value is None else len(value)) for name, value in headers)
