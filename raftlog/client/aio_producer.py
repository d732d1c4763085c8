"""The asynchronous producer: how a task waits for what ``producer`` does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from raftlog.client.cluster import ClusterClient
from raftlog.client.delivery import BatchDelivery, Delivery, when_all_done
from raftlog.client.handle import Deadline, Handle, wait_until
from raftlog.client.producer import Pending, ProducerCore
from raftlog.config import ProducerConfig
from raftlog.errors import DeliveryFailed, RequestTimeout


class Producer(Handle):
    """As :class:`raftlog.Producer`; made by :meth:`Log.producer`."""

    def __init__(self, cluster: ClusterClient, config: ProducerConfig) -> None:
        super().__init__("producer")
        loop = asyncio.get_running_loop()
        self._core = ProducerCore(cluster, config, loop, loop.call_soon)
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
        values: Sequence[Any],
        keys: Sequence[Any] | None = None,
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
        self._core.accumulator.close()
        try:
            await self._flush(timeout)
        finally:
            self._core.sender.stop()

    async def __aenter__(self) -> Self:
        self._check_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except (DeliveryFailed, RequestTimeout):
            if error is None:
                raise
