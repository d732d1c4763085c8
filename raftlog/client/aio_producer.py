"""The asynchronous producer: how a task waits for what ``producer`` does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Never, Self

from raftlog.client.cluster import ClusterClient
from raftlog.client.delivery import BatchDelivery, Delivery, not_picklable, when_all_done
from raftlog.client.handle import Deadline, Handle, wait_until
from raftlog.client.producer import Pending, ProducerCore
from raftlog.client.transaction import TransactionManager
from raftlog.config import ProducerConfig
from raftlog.errors import (
    CommitInDoubt,
    ConfigError,
    DeliveryFailed,
    InvalidTransaction,
    RaftlogError,
    RequestTimeout,
    StaleMember,
)

if TYPE_CHECKING:
    from raftlog.client.aio_consumer import Consumer
    from raftlog.record.arrow import Column

log = logging.getLogger("raftlog.client")


class Producer(Handle):
    """As :class:`raftlog.Producer`; made by :meth:`Log.producer`."""

    def __init__(self, cluster: ClusterClient, config: ProducerConfig) -> None:
        super().__init__("producer")
        loop = asyncio.get_running_loop()
        self._core = ProducerCore(cluster, config, loop, loop.call_soon)
        self._transaction: Transaction | None = None
        self._clock = loop.time

    async def send(
        self,
        topic: str,
        value: Any,
        key: Any = None,
        headers: Iterable[tuple[str, bytes | None]] = (),
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> Delivery:
        """As :meth:`raftlog.Producer.send`: waits for buffer room only. Await the Delivery for the
        acknowledgement."""
        if not self._usable:
            self._check_open()
        result = self._core.send(topic, value, key, headers, partition, timestamp_ms)
        if type(result) is Delivery:
            return result
        assert isinstance(result, Pending), "a record is buffered or pending"
        return await self._wait_and_send(result)

    async def _wait_and_send(self, pending: Pending) -> Delivery:
        core = self._core
        deadline = Deadline(core.max_block_s, self._clock)
        while True:
            if pending.needs_topic:
                await core.load_topic(pending.topic, deadline.left() or 0.0)
            elif not await wait_until(core.accumulator.when_room, deadline.left()) or deadline.over():
                raise core.buffer_full()
            result = core.resume(pending)
            if isinstance(result, Delivery):
                return result
            pending = result

    async def send_batch(
        self,
        topic: str,
        values: Sequence[Any] | Column,
        keys: Sequence[Any] | Column | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> BatchDelivery:
        """As :meth:`raftlog.Producer.send_batch`: waits for buffer room only."""
        self._check_open()
        core = self._core
        if not core.knows(topic):
            await core.load_topic(topic, core.max_block_s)
        batches = []
        for each in core.split(topic, values, keys, partition, timestamp_ms):
            deadline = Deadline(core.max_block_s, self._clock)
            while (batch := core.buffer_batch(each)) is None:
                if not await wait_until(core.accumulator.when_room, deadline.left()) or deadline.over():
                    raise core.buffer_full()
            batches.append(batch)
        return BatchDelivery(batches)

    def transaction(self) -> Transaction:
        """As :meth:`raftlog.Producer.transaction`; the transactional id is opened at the latest when the
        first one begins."""
        self._check_open()
        self._manager  # noqa: B018  it raises if there is none
        return Transaction(self)

    @property
    def _manager(self) -> TransactionManager:
        manager = self._core.transactions
        if manager is None:
            raise ConfigError("transactions need a name: log.producer(transactional_id=…)")
        return manager

    async def flush(self, timeout: float | None = None) -> None:
        """As :meth:`raftlog.Producer.flush`."""
        self._check_open()
        await self._flush(timeout)

    async def _flush(self, timeout: float | None) -> None:
        batches = self._core.accumulator.close_open_batches()
        if batches and not await wait_until(partial(when_all_done, batches), timeout):
            left = sum(batch.count for batch in batches if not batch.done)
            raise RequestTimeout(f"{left} records are still under way after {timeout:g} s")
        self._core.raise_failures()

    async def close(self, timeout: float | None = None) -> None:
        """As :meth:`raftlog.Producer.close`."""
        if not self._begin_close():
            return
        try:
            if self._transaction is not None:
                await self._transaction._abort_quietly()
            if self._core.transactions is not None:
                await self._core.transactions.leave()
            self._core.accumulator.close()
            if self._core.transactions is None:
                await self._flush(timeout)
        finally:
            self._core.sender.stop()

    async def __aenter__(self) -> Self:
        self._check_open()
        if self._core.transactions is not None:  # whoever had the id is fenced from now on
            await self._core.transactions.recover(self._core.max_block_s)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except (DeliveryFailed, RequestTimeout):
            if error is None:
                raise


class Transaction:
    """As :class:`raftlog.client.sync_producer.Transaction`; use it in an ``async with``."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer

    async def begin(self) -> Self:
        """As :meth:`raftlog.client.sync_producer.Transaction.begin`."""
        producer, manager = self._producer, self._producer._manager
        producer._check_open()
        while not manager.begin():
            await manager.recover(producer._core.max_block_s)
        producer._transaction = self
        return self

    async def send(
        self,
        topic: str,
        value: Any,
        key: Any = None,
        headers: Iterable[tuple[str, bytes | None]] = (),
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> Delivery:
        """As :meth:`raftlog.client.sync_producer.Transaction.send`: waits for buffer room only."""
        self._check_current()
        return await self._producer.send(topic, value, key, headers, partition, timestamp_ms)

    async def send_batch(
        self,
        topic: str,
        values: Sequence[Any] | Column,
        keys: Sequence[Any] | Column | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> BatchDelivery:
        """As :meth:`raftlog.client.sync_producer.Transaction.send_batch`: waits for buffer room only."""
        self._check_current()
        return await self._producer.send_batch(topic, values, keys, partition, timestamp_ms)

    async def send_offsets(self, consumer: Consumer) -> None:
        """As :meth:`raftlog.client.sync_producer.Transaction.send_offsets`."""
        self._check_current()
        try:
            seat, positions = consumer.member, consumer.positions_for_commit()
        except StaleMember as error:
            await self._producer._manager.fail(error)
            raise
        await self._producer._manager.send_offsets(seat, positions)

    async def commit(self, timeout: float | None = None) -> None:
        """As :meth:`raftlog.client.sync_producer.Transaction.commit`."""
        self._check_current()
        await self._producer._manager.commit(timeout)
        self._producer._transaction = None

    async def abort(self, timeout: float | None = None) -> None:
        """As :meth:`raftlog.client.sync_producer.Transaction.abort`."""
        self._check_current()
        await self._producer._manager.abort(timeout)
        self._producer._transaction = None

    def _check_current(self) -> None:
        if self._producer._transaction is not self:
            raise InvalidTransaction("this transaction has not begun, or is over")

    async def __aenter__(self) -> Self:
        return await self.begin()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._producer._transaction is not self:
            return  # it was ended inside
        if error is not None:
            await self._abort_quietly()
            return
        try:
            await self.commit()
        except CommitInDoubt:
            raise
        except RaftlogError:
            await self._abort_quietly()
            raise

    async def _abort_quietly(self) -> None:
        """What has gone wrong is known better by the error that is on its way."""
        try:
            await self.abort()
        except RaftlogError as failure:
            log.info("a transaction is left to its timeout, or to the next: %s", failure)

    def __reduce__(self) -> Never:
        raise not_picklable("a Transaction", "the Log, and make its producer where it is used")
