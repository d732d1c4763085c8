"""The blocking producer. What it does is in ``producer``; here is how a thread waits for it.

Appending happens on the caller's thread; only I/O is the I/O thread's.
"""

from __future__ import annotations

import atexit
import logging
import time
import warnings
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Never, Self

from raftlog.client.accumulator import ProducerBatch
from raftlog.client.cluster import ClusterClient
from raftlog.client.delivery import BatchDelivery, Delivery, not_picklable, wait_for_all
from raftlog.client.handle import Deadline, Handle, block_until
from raftlog.client.io_thread import IoThread
from raftlog.client.producer import EncodedBatch, Pending, ProducerCore
from raftlog.client.transaction import TransactionManager
from raftlog.config import ProducerConfig
from raftlog.errors import (
    Closed,
    CommitInDoubt,
    ConfigError,
    DeliveryFailed,
    InvalidTransaction,
    RaftlogError,
    RequestTimeout,
    StaleMember,
)

if TYPE_CHECKING:
    from raftlog.client.sync import Consumer
    from raftlog.record.arrow import Column

log = logging.getLogger("raftlog.client")

EXIT_FLUSH_S: Final = 5.0

_producers: weakref.WeakSet[Producer] = weakref.WeakSet()


class Producer(Handle):
    """Sends records. Thread-safe; made by :meth:`raftlog.Log.producer`."""

    def __init__(self, owner: object, io: IoThread, cluster: ClusterClient, config: ProducerConfig) -> None:
        super().__init__("producer")
        self._owner = owner  # a Log that nobody holds closes its connections
        self._io = io
        self._core = ProducerCore(cluster, config, io.loop, io.loop.call_soon_threadsafe)
        self._transaction: Transaction | None = None
        _producers.add(self)
        if self._core.transactions is not None:  # whoever had the id is fenced from now on
            io.call(self._core.transactions.recover(self._core.max_block_s))

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
            InvalidTransaction: this producer has a transactional id, and no transaction open.
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
        values: Sequence[Any] | Column,
        keys: Sequence[Any] | Column | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> BatchDelivery:
        """Send many records at once: several times faster than one ``send`` each.

        Without keys whole batches go to one partition after another; with keys each record goes where its key
        belongs. All get the same timestamp, and no headers.

        Args:
            topic: must exist.
            values: a list, as of ``send``; or a column: an Arrow array or chunked array of binary or text
                (null is a tombstone), or a numpy array, of which ``values[i].tobytes()`` is a record's value.
                Columns need ``raftlog[data]``, are not serialised, and cost no Python call a row.
            keys: as many, in either form; None: no record has one.
            partition: of all of them.
            timestamp_ms: milliseconds since the epoch; default: now.

        Raises:
            As :meth:`send`. Where the buffer is full part of the batches may have been sent before
            BufferFull.
        """
        self._check_open()
        core = self._core
        deadline = Deadline(core.max_block_s)
        if not core.knows(topic):
            self._load_topic(topic, deadline)
        split = core.split(topic, values, keys, partition, timestamp_ms)
        return BatchDelivery([self._buffer(each) for each in split])

    def _buffer(self, encoded: EncodedBatch) -> ProducerBatch:
        """Blocks while there is no room."""
        core = self._core
        deadline = Deadline(core.max_block_s)
        while (batch := core.buffer_batch(encoded)) is None:
            if not block_until(core.accumulator.when_room, deadline.left()) or deadline.over():
                raise core.buffer_full()
        return batch

    def _send_encoded(self, topic: str, partition: int | None, encoded: bytes, records: int) -> BatchDelivery:
        """Send a batch that was encoded elsewhere; ``partition`` None: to any.

        Raises:
            As :meth:`send_batch`.
        """
        core = self._core
        if not core.knows(topic):
            self._load_topic(topic, Deadline(core.max_block_s))
        return BatchDelivery([self._buffer(core.encoded_elsewhere(topic, partition, encoded, records))])

    def transaction(self) -> Transaction:
        """A transaction: what is sent in it becomes readable all at once, or not at all::

            with producer.transaction() as txn:
                txn.send("orders", value)
                txn.send_offsets(consumer)

        Raises:
            ConfigError: this producer has no transactional id.
        """
        self._check_open()
        self._manager  # noqa: B018  it raises if there is none
        return Transaction(self)

    @property
    def _manager(self) -> TransactionManager:
        manager = self._core.transactions
        if manager is None:
            raise ConfigError("transactions need a name: log.producer(transactional_id=…)")
        return manager

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
        """Flush, and give up what is not done after ``timeout`` seconds. Closing twice does nothing. A
        transaction that is open is aborted.

        Raises:
            As :meth:`flush`.
        """
        if not self._begin_close():
            return
        _producers.discard(self)
        try:
            if self._transaction is not None:
                self._transaction._abort_quietly()
            if self._core.transactions is not None:
                self._io.call(self._core.transactions.leave())
            self._core.accumulator.close()
            if self._core.transactions is None:
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


class Transaction:
    """One transaction of a producer; made by :meth:`Producer.transaction`. Leaving its ``with`` commits it,
    an exception aborts it and goes on."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer

    def begin(self) -> Self:
        """Begin it; what ``with`` does. If the one before has failed and is not aborted yet, that comes
        first.

        Raises:
            InvalidTransaction: the producer has a transaction open: one after another.
            ProducerFenced: another producer has taken over the transactional id.
            ConnectionLost, RequestTimeout, ConcurrentTransactions: not within ``max_block_ms``.
        """
        producer, manager = self._producer, self._producer._manager
        producer._check_open()
        while not manager.begin():
            producer._io.call(manager.recover(producer._core.max_block_s))
        producer._transaction = self
        return self

    def send(
        self,
        topic: str,
        value: Any,
        key: Any = None,
        headers: Iterable[tuple[str, bytes | None]] = (),
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> Delivery:
        """As :meth:`Producer.send`. Readers of committed records see it when the transaction has committed.

        Raises:
            As :meth:`Producer.send`; TransactionAborted, TransactionTimedOut, ProducerFenced,
            InvalidTransaction: the transaction takes no more.
        """
        self._check_current()
        return self._producer.send(topic, value, key, headers, partition, timestamp_ms)

    def send_batch(
        self,
        topic: str,
        values: Sequence[Any] | Column,
        keys: Sequence[Any] | Column | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> BatchDelivery:
        """As :meth:`Producer.send_batch`."""
        self._check_current()
        return self._producer.send_batch(topic, values, keys, partition, timestamp_ms)

    def send_offsets(self, consumer: Consumer) -> None:
        """Commit the consumer's positions with the transaction: what it has handed out so far counts as read
        if, and only if, the transaction commits.

        Args:
            consumer: a member of a group.

        Raises:
            StaleMember: it is out of the group, or has lost a partition: abort.
            TransactionAborted: the same, found out by the coordinator, or another failure; its cause tells.
            ConfigError: the consumer has no group.
            InvalidTransaction: the transaction is not open.
        """
        self._check_current()
        try:
            seat, positions = consumer.member, consumer.positions_for_commit()
        except StaleMember as error:
            self._producer._io.call(self._producer._manager.fail(error))
            raise
        self._producer._io.call(self._producer._manager.send_offsets(seat, positions))

    def commit(self, timeout: float | None = None) -> None:
        """Deliver everything and commit. When this returns the commit is decided and durable; readers of
        committed records see it a moment later, when every partition has been told.

        Args:
            timeout: seconds for the coordinator's answer; default: ``delivery_timeout_ms``.

        Raises:
            TransactionAborted: (TransactionTimedOut) nothing of it will be read. Abort it, or just begin the
                next one; its cause tells why.
            CommitInDoubt: nobody has answered; commit again to learn the outcome.
            ProducerFenced: another producer has taken over, and this transaction was aborted.
        """
        self._check_current()
        self._producer._io.call(self._producer._manager.commit(timeout))
        self._producer._transaction = None

    def abort(self, timeout: float | None = None) -> None:
        """Give it up: nothing of it will be read.

        Args:
            timeout: seconds for the coordinator's answer; default: 10.

        Raises:
            ConnectionLost, RequestTimeout: no answer; try again, or leave it to the next ``begin``, or to the
                transaction's timeout.
            ProducerFenced: another producer has taken over, and this transaction was aborted.
        """
        self._check_current()
        self._producer._io.call(self._producer._manager.abort(timeout))
        self._producer._transaction = None

    def _check_current(self) -> None:
        if self._producer._transaction is not self:
            raise InvalidTransaction("this transaction has not begun, or is over")

    def __enter__(self) -> Self:
        return self.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._producer._transaction is not self:
            return  # it was ended inside
        if error is not None:
            self._abort_quietly()
            return
        try:
            self.commit()
        except CommitInDoubt:
            raise
        except RaftlogError:
            self._abort_quietly()
            raise

    def _abort_quietly(self) -> None:
        """What has gone wrong is known better by the error that is on its way."""
        try:
            self.abort()
        except RaftlogError as failure:
            log.info("a transaction is left to its timeout, or to the next: %s", failure)

    def __reduce__(self) -> Never:
        raise not_picklable("a Transaction", "the Log, and make its producer where it is used")


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
