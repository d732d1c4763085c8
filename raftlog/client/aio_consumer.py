"""The asynchronous consumer. What it does is in ``consumer``; here is how a task waits for it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence, Sized
from contextlib import closing
from datetime import datetime
from functools import partial
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from raftlog.client.cluster import ClusterClient
from raftlog.client.consumer import ARROW_RECORDS, ConsumerCore, begins_of
from raftlog.client.group import Seat
from raftlog.client.handle import Deadline, Handle, OneUser, wait_until
from raftlog.client.offsets import LOOKUP_TIMEOUT_S, Offset, Place
from raftlog.client.sharing import Callback, Step
from raftlog.config import ConsumerConfig
from raftlog.errors import Closed, ConcurrentUse
from raftlog.record.types import Record, TopicPartition

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T", bound=Sized)


class Consumer(Handle):
    """As :class:`raftlog.Consumer`; belongs to one task at a time. Made by
    :meth:`raftlog.aio.Log.consumer`."""

    def __init__(self, cluster: ClusterClient, topics: Sequence[str], config: ConsumerConfig) -> None:
        super().__init__("consumer")
        loop = asyncio.get_running_loop()
        self._core = ConsumerCore(cluster, config, topics, loop, loop.call_soon)
        self._use = OneUser(asyncio.current_task)
        self._clock = loop.time

    async def poll(self, timeout: float = 1.0, max_records: int | None = None) -> list[Record]:
        """As :meth:`raftlog.Consumer.poll`."""
        records_max = self._core.config.max_poll_records if max_records is None else max_records
        return await self._poll(timeout, records_max, self._core.take, begins_of)

    async def poll_arrow(self, timeout: float = 1.0, max_records: int = ARROW_RECORDS) -> pa.Table:
        """As :meth:`raftlog.Consumer.poll_arrow`."""
        pieces = await self._poll(timeout, max_records, self._core.take_columns, attrgetter("begins"))
        return pieces.table()

    async def _poll(
        self,
        timeout: float,
        records_max: int,
        take: Callable[[int], T],
        begins: Callable[[T], Mapping[TopicPartition, int]],
    ) -> T:
        deadline = Deadline(timeout, self._clock)
        core = await self._started()
        with self._use:
            while True:
                seen = core.arrivals
                await self._rebalance(core)
                taken = take(records_max)
                if taken and core.config.enable_auto_commit:
                    await core.in_group.save_before(partial(begins, taken))
                if taken:
                    return taken
                if deadline.over():
                    await asyncio.sleep(0)  # who polls in a loop must not keep everything else from running
                    return taken
                await wait_until(partial(core.when_arrived, seen), deadline.left())

    async def _rebalance(self, core: ConsumerCore) -> None:
        if core.sharing is not None and core.sharing.is_due:
            await self._go(core.sharing.rebalance())

    async def _go(self, steps: Generator[Step]) -> None:
        with closing(steps):
            for step in steps:
                if isinstance(step, Callback):
                    result = step()
                    if inspect.isawaitable(result):
                        await result
                else:
                    await step

    def __aiter__(self) -> AsyncIterator[Record]:
        """Record after record, for ever; ends when the consumer is closed."""
        return self.records()

    async def records(
        self, until: Literal["end"] | None = None, idle_timeout: float | None = None
    ) -> AsyncIterator[Record]:
        """As :meth:`raftlog.Consumer.records`."""
        core = await self._started()
        sharing = core.sharing
        member = None if sharing is None else sharing.member
        claims = sharing if core.config.enable_auto_commit else None
        if until is not None:
            core.limit(await core.ends())
        try:
            while True:
                record = core.pop() if member is None or not member.disturbed else None
                if record is None:
                    record = await self._wait_and_pop(until is not None, idle_timeout)
                    if record is None:
                        return
                if claims is not None and (claim := claims.claim(record)) is not None:
                    await claim
                yield record
        except Closed:
            return
        finally:
            if until is not None:
                core.limit(None)

    async def _wait_and_pop(self, limited: bool, idle_timeout: float | None) -> Record | None:
        core = self._core
        deadline = Deadline(idle_timeout, self._clock)
        with self._use:
            while True:
                seen = core.arrivals
                await self._rebalance(core)
                record = core.pop()
                if record is not None or (limited and core.at_limits()) or deadline.over():
                    return record
                await wait_until(partial(core.when_arrived, seen), deadline.left())

    async def assignment(self) -> list[TopicPartition]:
        """As :meth:`raftlog.Consumer.assignment`."""
        return (await self._started()).assignment()

    async def position(self, partition: Place) -> int:
        """As :meth:`raftlog.Consumer.position`."""
        core = await self._started()
        with self._use:
            return await core.position(partition)

    async def seek(self, partition: Place, offset: int) -> None:
        """As :meth:`raftlog.Consumer.seek`."""
        core = await self._started()
        with self._use:
            core.seek(partition, offset)

    async def seek_to_beginning(self, *partitions: Place) -> None:
        """As :meth:`raftlog.Consumer.seek_to_beginning`."""
        core = await self._started()
        with self._use:
            core.seek_to_beginning(partitions)

    async def seek_to_end(self, *partitions: Place) -> None:
        """As :meth:`raftlog.Consumer.seek_to_end`."""
        core = await self._started()
        with self._use:
            core.seek_to_end(partitions)

    async def seek_to_time(self, timestamp: int | datetime, *partitions: Place) -> None:
        """As :meth:`raftlog.Consumer.seek_to_time`."""
        core = await self._started()
        with self._use:
            await core.seek_to_time(timestamp, partitions)

    async def seek_to_committed(self, *partitions: Place) -> None:
        """As :meth:`raftlog.Consumer.seek_to_committed`."""
        core = await self._started()
        with self._use:
            core.in_group.seek_to_committed(partitions)

    async def commit(
        self, offsets: Mapping[Place, Offset] | None = None, timeout: float = LOOKUP_TIMEOUT_S
    ) -> None:
        """As :meth:`raftlog.Consumer.commit`."""
        core = await self._started()
        with self._use:
            await core.in_group.commit(offsets, timeout)
            if offsets is None:
                await self._rebalance(core)

    async def committed(self, partition: Place) -> int | None:
        """As :meth:`raftlog.Consumer.committed`."""
        core = await self._started()
        with self._use:
            found = await core.in_group.committed(partition)
            return None if found is None else found.offset

    async def committed_metadata(self, partition: Place) -> str | None:
        """As :meth:`raftlog.Consumer.committed_metadata`."""
        core = await self._started()
        with self._use:
            found = await core.in_group.committed(partition)
            return None if found is None else found.metadata

    @property
    def member(self) -> Seat:
        """As :attr:`raftlog.Consumer.member`."""
        return self._core.in_group.member.seat

    def positions_for_commit(self) -> dict[TopicPartition, tuple[int, int]]:
        """As :meth:`raftlog.Consumer.positions_for_commit`."""
        self._check_open()
        with self._use:
            return self._core.in_group.positions()

    async def pause(self, *partitions: Place) -> None:
        """As :meth:`raftlog.Consumer.pause`."""
        core = await self._started()
        with self._use:
            core.pause(partitions)

    async def resume(self, *partitions: Place) -> None:
        """As :meth:`raftlog.Consumer.resume`."""
        core = await self._started()
        with self._use:
            core.resume(partitions)

    async def lag(self) -> dict[TopicPartition, int]:
        """As :meth:`raftlog.Consumer.lag`."""
        core = await self._started()
        with self._use:
            return await core.lag()

    async def close(self) -> None:
        """As :meth:`raftlog.Consumer.close`; from any task."""
        try:
            if self._usable and self._core.sharing is not None:
                await self._part(self._core.sharing.part())
        finally:
            if self._begin_close():
                await self._core.close()

    async def _part(self, steps: Generator[Step]) -> None:
        try:
            with self._use:
                await self._go(steps)
        except ConcurrentUse:
            steps.close()

    async def _started(self) -> ConsumerCore:
        self._check_open()
        if not self._core.started:
            with self._use:
                await self._core.start()
        return self._core

    async def __aenter__(self) -> Self:
        await self._started()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
