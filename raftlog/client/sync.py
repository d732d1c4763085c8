"""The blocking handles. What they do is in ``producer`` and ``consumer``; here is how a thread waits for it.

Appending, decoding and looking at what is there happen on the caller's thread; only I/O is the I/O thread's.
"""

from __future__ import annotations

import atexit
import logging
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Self

from raftlog.client.cluster import ClusterClient
from raftlog.client.consumer import ConsumerCore, Place
from raftlog.client.delivery import BatchDelivery, Delivery, wait_for_all
from raftlog.client.handle import Deadline, Handle, OneUser, block_until
from raftlog.client.io_thread import IoThread
from raftlog.client.producer import Pending, ProducerCore
from raftlog.config import ConsumerConfig, ProducerConfig
from raftlog.errors import Closed, DeliveryFailed, RequestTimeout
from raftlog.record.types import Record, TopicPartition

log = logging.getLogger("raftlog.client")

EXIT_FLUSH_S: Final = 5.0
FOREVER_S: Final = 3600.0
"""A poll without a deadline looks up this often, so that Ctrl-C is never held up for good."""

_producers: weakref.WeakSet[Producer] = weakref.WeakSet()


class Producer(Handle):
    """Sends records. Thread-safe; made by :meth:`raftlog.Log.producer`."""

    def __init__(self, owner: object, io: IoThread, cluster: ClusterClient, config: ProducerConfig) -> None:
        super().__init__("producer")
        self._owner = owner  # a Log that nobody holds closes its connections
        self._io = io
        self._core = ProducerCore(cluster, config, io.loop, io.loop.call_soon_threadsafe)
        _producers.add(self)

    def send(
        self,
        topic: str,
        value: Any,
        key: Any = None,
        headers: Iterable[tuple[str, bytes | None]] = (),
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> Delivery:
        """Buffer one record and return at once; blocks only while the buffer is full or the topic unknown
        yet.

        Args:
            topic: must exist.
            value: bytes, or what ``value_serializer`` takes; None is a tombstone.
            key: bytes, or what ``key_serializer`` takes. Equal keys go to equal partitions, in order.
            headers: pairs of (str, bytes or None).
            partition: overrides the choice by key.
            timestamp_ms: milliseconds since the epoch; default: now.

        Raises:
            InvalidRecord, SerializationError, RecordTooLarge: about this record; it was not buffered.
            UnknownTopic, InvalidTopic, UnknownPartition: there is nowhere to send it.
            BufferFull: no room within ``max_block_ms``.
            Closed, UseAfterFork: this producer cannot be used (any more).
        """
        if not self._usable:
            self._check_open()
        result = self._core.send(topic, value, key, headers, partition, timestamp_ms)
        if type(result) is Delivery:
            return result
        assert isinstance(result, Pending), "a record is buffered or pending"
        return self._wait_and_send(result)

    def _wait_and_send(self, pending: Pending) -> Delivery:
        core = self._core
        deadline = Deadline(core.max_block_s)
        while True:
            if pending.needs_topic:
                self._load_topic(pending.topic, deadline)
            elif not block_until(core.accumulator.when_room, deadline.left()) or deadline.over():
                raise core.buffer_full()
            result = core.resume(pending)
            if isinstance(result, Delivery):
                return result
            pending = result

    def _load_topic(self, topic: str, deadline: Deadline) -> None:
        left = deadline.left()
        assert left is not None, "max_block_ms is a limit"
        self._io.call(self._core.load_topic(topic, left))

    def send_batch(
        self,
        topic: str,
        values: Sequence[Any],
        keys: Sequence[Any] | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> BatchDelivery:
        """Send many records at once: several times faster than one ``send`` each.

        Without keys whole batches go to one partition after another; with keys each record goes where its key
        belongs. All get the same timestamp, and no headers.

        Raises:
            As :meth:`send`. Where the buffer is full part of the batches may have been sent before
            BufferFull.
        """
        self._check_open()
        core = self._core
        deadline = Deadline(core.max_block_s)
        if not core.knows(topic):
            self._load_topic(topic, deadline)
        batches = []
        for each in core.split(topic, values, keys, partition, timestamp_ms):
            deadline = Deadline(core.max_block_s)
            while (batch := core.buffer_batch(each)) is None:
                if not block_until(core.accumulator.when_room, deadline.left()) or deadline.over():
                    raise core.buffer_full()
            batches.append(batch)
        return BatchDelivery(batches)

    def flush(self, timeout: float | None = None) -> None:
        """Send everything now, and block until all sent so far is acknowledged or failed.

        Args:
            timeout: seconds; None waits as long as it takes, which ``delivery_timeout_ms`` bounds.

        Raises:
            DeliveryFailed: some failed that nobody has looked at; each is told of once.
            RequestTimeout: not all were done in time; nothing is lost by that.
        """
        self._check_open()
        self._flush(timeout)

    def _flush(self, timeout: float | None) -> None:
        batches = self._core.accumulator.close_open_batches()
        if not wait_for_all(batches, timeout):
            left = sum(batch.count for batch in batches if not batch.done)
            raise RequestTimeout(f"{left} records are still under way after {timeout:g} s")
        self._core.raise_failures()

    def close(self, timeout: float | None = None) -> None:
        """Flush, and give up what is not done after ``timeout`` seconds. Closing twice does nothing.

        Raises:
            As :meth:`flush`.
        """
        if not self._begin_close():
            return
        _producers.discard(self)
        self._core.accumulator.close()
        try:
            self._flush(timeout)
        finally:
            block_until(partial(self._io.call_soon, self._stop), EXIT_FLUSH_S)

    def _stop(self, done: Any) -> None:
        self._core.sender.stop()
        done()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except (DeliveryFailed, RequestTimeout) as failure:
            if error is None:
                raise
            log.warning("while leaving on %r: %s", error, failure)

    def __del__(self) -> None:
        if not getattr(self, "_usable", False):
            return
        core, io = self._core, self._io
        if core.accumulator.unsettled():
            warnings.warn(
                f"a producer was dropped with {core.accumulator.used} bytes of records not acknowledged: "
                "close it, or use it in a `with`",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )
        io.call_soon(core.sender.stop)


class Consumer(Handle):
    """Reads records. Belongs to one thread at a time; ``close`` may come from any. Made by
    :meth:`raftlog.Log.consumer`."""

    def __init__(
        self,
        owner: object,
        io: IoThread,
        cluster: ClusterClient,
        topics: Sequence[str],
        config: ConsumerConfig,
    ) -> None:
        super().__init__("consumer")
        self._owner = owner  # a Log that nobody holds closes its connections
        self._io = io
        self._core = ConsumerCore(cluster, config, topics, io.loop, io.loop.call_soon_threadsafe)
        self._use = OneUser()
        io.call(self._core.start())

    def poll(self, timeout: float = 1.0, max_records: int | None = None) -> list[Record]:
        """The next records: as soon as there are any, or none after ``timeout`` seconds.

        Args:
            timeout: seconds; 0 only looks.
            max_records: at most so many; default ``max_poll_records``.

        Raises:
            DeserializationError: of the record at the position; seek past it.
            OffsetOutOfRange, LogTruncated: the log no longer has what the position names.
            CorruptBatch, CorruptFrame, UnknownTopic: what was read is damaged, or its topic was deleted.
            ConcurrentUse: another thread is using this consumer.
            Closed: it was closed, perhaps by another thread just now.
        """
        records_max = self._core.config.max_poll_records if max_records is None else max_records
        deadline = Deadline(timeout)
        self._check_open()
        core = self._core
        with self._use:
            while True:
                seen = core.arrivals
                records = core.take(records_max)
                if records or deadline.over():
                    return records
                block_until(partial(core.when_arrived, seen), deadline.left())

    def __iter__(self) -> Iterator[Record]:
        """Record after record, for ever; ends when the consumer is closed."""
        return self.records()

    def records(
        self, until: Literal["end"] | None = None, idle_timeout: float | None = None
    ) -> Iterator[Record]:
        """Record after record.

        Args:
            until: "end": stop where the partitions end now (asked once, at the first record). None: go on for
                ever.
            idle_timeout: stop when nothing has come for so many seconds.

        Raises:
            As :meth:`poll`; when another thread closes the consumer, the iteration just ends.
        """
        self._check_open()
        with self._use:  # of this thread for as long as the iteration lasts
            yield from self._records(until, idle_timeout)

    def _records(self, until: Literal["end"] | None, idle_timeout: float | None) -> Iterator[Record]:
        core = self._core
        if until is not None:
            core.limit(self._io.call(core.ends()))
        try:
            while True:
                record = core.pop()
                if record is None:
                    record = self._wait_and_pop(until is not None, idle_timeout)
                    if record is None:
                        return
                yield record
        except Closed:
            return
        finally:
            if until is not None:
                core.limit(None)

    def _wait_and_pop(self, limited: bool, idle_timeout: float | None) -> Record | None:
        core = self._core
        deadline = Deadline(idle_timeout)
        while True:
            seen = core.arrivals
            record = core.pop()
            if record is not None or (limited and core.at_limits()) or deadline.over():
                return record
            left = deadline.left()
            block_until(partial(core.when_arrived, seen), FOREVER_S if left is None else left)

    def assignment(self) -> list[TopicPartition]:
        """The partitions that are read, in order."""
        return self._core.assignment()

    def position(self, partition: Place) -> int:
        """The offset of the next record to be handed out. What is fetched ahead does not count."""
        self._check_open()
        with self._use:
            return self._io.call(self._core.position(partition))

    def seek(self, partition: Place, offset: int) -> None:
        """Go to an offset; whether it exists shows at the next poll (see ``auto_offset_reset``)."""
        self._check_open()
        with self._use:
            self._core.seek(partition, offset)

    def seek_to_beginning(self, *partitions: Place) -> None:
        """Go to the first record there is, of these partitions or of all."""
        self._check_open()
        with self._use:
            self._core.seek_to_beginning(partitions)

    def seek_to_end(self, *partitions: Place) -> None:
        """Go behind the last record there is, of these partitions or of all: only new ones will come.

        Where that is, is looked up when it is needed; ``position`` does so.
        """
        self._check_open()
        with self._use:
            self._core.seek_to_end(partitions)

    def seek_to_time(self, timestamp: int | datetime, *partitions: Place) -> None:
        """Go to the first record of that time or later, of these partitions or of all; to the end if there is
        none.

        Args:
            timestamp: milliseconds since the epoch, or an aware datetime.
        """
        self._check_open()
        with self._use:
            self._io.call(self._core.seek_to_time(timestamp, partitions))

    def pause(self, *partitions: Place) -> None:
        """Hand out nothing of these partitions, or of all, until they are resumed."""
        self._check_open()
        with self._use:
            self._core.pause(partitions)

    def resume(self, *partitions: Place) -> None:
        """Go on with these partitions, or with all."""
        self._check_open()
        with self._use:
            self._core.resume(partitions)

    def lag(self) -> dict[TopicPartition, int]:
        """How many records each partition holds from the position on, asked now."""
        self._check_open()
        with self._use:
            return self._io.call(self._core.lag())

    def close(self) -> None:
        """Stop reading; from any thread. A poll that waits raises Closed, an iteration ends."""
        if not self._begin_close():
            return
        self._io.call(self._core.close())

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_usable", False) and hasattr(self, "_use"):
            self._io.spawn(self._core.close())


@atexit.register
def _at_exit() -> None:
    """Give what is buffered a last chance; registered after the I/O thread's own end, so it runs before
    it."""
    until = time.monotonic() + EXIT_FLUSH_S
    for producer in list(_producers):
        if producer.closed:
            continue
        try:
            producer.close(timeout=max(until - time.monotonic(), 0.0))
        except (DeliveryFailed, RequestTimeout, Closed) as error:
            log.warning("at exit, records were dropped: %s", error)
