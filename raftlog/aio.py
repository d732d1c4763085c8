"""The asynchronous face: the same handles with ``await``, on the loop they are used on.

::

    log = await raftlog.aio.connect()
    async with log.producer() as producer:
        delivery = await producer.send("orders", b"value")     # waits for buffer room only
        meta = await delivery                                  # waits for the acknowledgement
    async with log.consumer("orders") as consumer:
        async for record in consumer:
            ...

No thread is involved, except in ``connect``, ``start`` and ``shutdown``, which talk to Ray. A handle belongs
to the loop on which it was first used.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from raftlog.client import attach
from raftlog.client.admin import CALL_TIMEOUT_S, Admin
from raftlog.client.aio_consumer import Consumer
from raftlog.client.aio_producer import Producer, Transaction
from raftlog.client.cluster import Bootstrap, ClusterClient
from raftlog.client.descriptions import ClusterDescription, GroupDescription, TopicDescription
from raftlog.client.group_admin import GroupAdmin, ResetTo
from raftlog.client.log import process_client
from raftlog.client.offsets import Offset, Place
from raftlog.client.process import describe_work
from raftlog.client.processing import AioProcessing as Processing
from raftlog.client.transaction_admin import OpenTransaction, TransactionAdmin, TransactionDescription
from raftlog.client.transports import transport_of
from raftlog.config import ConsumerConfig, Environment, ProducerConfig, TopicConfig, Transport
from raftlog.errors import Closed, ConfigError
from raftlog.record.types import Record, TopicPartition

__all__ = ["Consumer", "Log", "Producer", "Transaction", "connect", "shutdown", "start"]


async def start(
    name: str = "default",
    brokers: int | None = None,
    data_dir: str | Path | None = None,
    ephemeral: bool = False,
    brokers_per_node: int = 1,
    replace_after: float = 30.0,
) -> Log:
    """As :func:`raftlog.start`."""
    log = await asyncio.to_thread(
        attach.start, name, brokers, data_dir, ephemeral, brokers_per_node, replace_after
    )
    return Log(log.bootstrap)


async def connect(name: str | None = None, timeout: float = 30.0, transport: Transport | None = None) -> Log:
    """As :func:`raftlog.connect`; each call makes a Log of its own."""
    name = name or Environment.read().cluster
    log = Log(await asyncio.to_thread(attach.find, name, timeout, transport))
    try:
        await attach.settle(log._connected(), timeout)
    except BaseException:  # raised again; nobody else will close it
        await log.close()
        raise
    return log


async def shutdown(name: str = "default", force: bool = False) -> None:
    """As :func:`raftlog.shutdown`."""
    await asyncio.to_thread(attach.shutdown, name, force)


class Log:
    """As :class:`raftlog.Log`, for one event loop.

    Args:
        bootstrap: how to reach the cluster.
        client: makes its client, on the loop that runs; tests give simulated ones.
    """

    def __init__(
        self, bootstrap: Bootstrap, client: Callable[[Bootstrap], ClusterClient] = process_client
    ) -> None:
        self._bootstrap = bootstrap
        self._client = client
        self._closed = False
        self._pid = os.getpid()
        self._cluster: ClusterClient | None = None
        self._handles: list[Producer | Consumer | Processing] = []

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self._bootstrap.name

    @property
    def cluster_id(self) -> str:
        """The cluster's id, the same for as long as its data lives."""
        return self._bootstrap.cluster_id

    @property
    def bootstrap(self) -> Bootstrap:
        """How to reach the cluster."""
        return self._bootstrap

    @property
    def transport(self) -> str:
        """As :attr:`raftlog.Log.transport`."""
        return transport_of(self._connected().seams.network)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def __repr__(self) -> str:
        return f"<raftlog.aio.Log of cluster {self.name!r}{' (closed)' if self._closed else ''}>"

    def __reduce__(self) -> tuple[type[Log], tuple[Bootstrap]]:
        return Log, (self._bootstrap,)

    def producer(self, **settings: Any) -> Producer:
        """As :meth:`raftlog.Log.producer`; use it in an ``async with``."""
        producer = Producer(self._connected(), ProducerConfig(**settings))
        self._handles.append(producer)
        return producer

    def consumer(self, *topics: str, **settings: Any) -> Consumer:
        """As :meth:`raftlog.Log.consumer`, but topics are looked up at the first use."""
        consumer = Consumer(self._connected(), topics, ConsumerConfig(**settings))
        self._handles.append(consumer)
        return consumer

    def process(
        self,
        source: str | Sequence[str],
        sink: str | None,
        group: str,
        fn: Callable[[Record], Any],
        workers: int = 1,
        until: Literal["end"] | None = None,
        **settings: Any,
    ) -> Processing:
        """As :meth:`raftlog.Log.process`, on this loop: ``fn`` may be asynchronous; if it is not, it is
        called in place and should be short. Actors are started by the blocking Log only."""
        if workers != 1:
            raise ConfigError("raftlog.aio processes on its own loop: use raftlog.Log for workers > 1")
        work = describe_work(source, sink, group, until, settings)
        processing = Processing(self._connected(), work, fn)
        self._handles.append(processing)
        return processing

    async def create_topic(
        self,
        name: str,
        partitions: int = 1,
        replication_factor: int | str = "auto",
        config: Mapping[str, Any] | TopicConfig | None = None,
        exist_ok: bool = False,
        timeout: float = CALL_TIMEOUT_S,
    ) -> None:
        """As :meth:`raftlog.Log.create_topic`."""
        await self._admin().create_topic(name, partitions, replication_factor, config, exist_ok, timeout)

    async def topics(self) -> list[str]:
        """As :meth:`raftlog.Log.topics`."""
        return await self._admin().topics()

    async def describe_topic(self, name: str) -> TopicDescription:
        """As :meth:`raftlog.Log.describe_topic`."""
        return await self._admin().describe_topic(name)

    async def delete_topic(self, name: str, timeout: float = CALL_TIMEOUT_S) -> None:
        """As :meth:`raftlog.Log.delete_topic`."""
        await self._admin().delete_topic(name, timeout)

    async def groups(self) -> list[str]:
        """As :meth:`raftlog.Log.groups`."""
        return await self._groups().groups()

    async def describe_group(self, group: str) -> GroupDescription:
        """As :meth:`raftlog.Log.describe_group`."""
        return await self._groups().describe(group)

    async def delete_group(self, group: str, timeout: float = CALL_TIMEOUT_S) -> None:
        """As :meth:`raftlog.Log.delete_group`."""
        await self._groups().delete(group, timeout)

    async def reset_offsets(
        self, group: str, topic: str, to: ResetTo, timeout: float = CALL_TIMEOUT_S
    ) -> dict[TopicPartition, int]:
        """As :meth:`raftlog.Log.reset_offsets`."""
        return await self._groups().reset(group, topic, to, timeout)

    async def commit_offsets(
        self, group: str, offsets: Mapping[Place, Offset], timeout: float = CALL_TIMEOUT_S
    ) -> None:
        """As :meth:`raftlog.Log.commit_offsets`."""
        await self._groups().commit(group, offsets, timeout)

    async def transactions(self) -> list[TransactionDescription]:
        """As :meth:`raftlog.Log.transactions`."""
        return await self._transactions().transactions()

    async def describe_transaction(self, transactional_id: str) -> TransactionDescription:
        """As :meth:`raftlog.Log.describe_transaction`."""
        return await self._transactions().describe(transactional_id)

    async def abort_transaction(self, transactional_id: str, timeout: float = CALL_TIMEOUT_S) -> None:
        """As :meth:`raftlog.Log.abort_transaction`."""
        await self._transactions().abort(transactional_id, timeout)

    async def open_transactions(self, topic: str) -> list[OpenTransaction]:
        """As :meth:`raftlog.Log.open_transactions`."""
        return await self._transactions().open(topic)

    async def abort_hanging_transaction(
        self, topic: str, partition: int, producer_id: int, epoch: int, timeout: float = CALL_TIMEOUT_S
    ) -> None:
        """As :meth:`raftlog.Log.abort_hanging_transaction`."""
        await self._transactions().abort_hanging(topic, partition, producer_id, epoch, timeout)

    async def add_partitions(
        self, name: str, n: int, allow_key_reorder: bool = False, timeout: float = CALL_TIMEOUT_S
    ) -> int:
        """As :meth:`raftlog.Log.add_partitions`."""
        return await self._admin().alter_topic(
            name, timeout, more_partitions=n, allow_key_reorder=allow_key_reorder
        )

    async def set_replication(
        self, name: str, replication_factor: int | str, timeout: float = CALL_TIMEOUT_S
    ) -> None:
        """As :meth:`raftlog.Log.set_replication`."""
        await self._admin().alter_topic(name, timeout, replication_factor=replication_factor)

    async def drain(
        self, brokers: Sequence[int], undo: bool = False, timeout: float = CALL_TIMEOUT_S
    ) -> None:
        """As :meth:`raftlog.Log.drain`."""
        await self._admin().drain(brokers, not undo, timeout)

    async def upgrade(self, level: int = 0, timeout: float = CALL_TIMEOUT_S) -> int:
        """As :meth:`raftlog.Log.upgrade`."""
        return (await self._admin().upgrade(level, timeout)).level

    async def describe_cluster(self) -> ClusterDescription:
        """As :meth:`raftlog.Log.describe_cluster`."""
        return await self._admin().describe_cluster()

    async def close(self) -> None:
        """As :meth:`raftlog.Log.close`."""
        if self._closed:
            return
        self._closed = True
        try:
            for handle in self._handles:
                await handle.close()
        finally:
            if self._cluster is not None:
                await self._cluster.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _connected(self) -> ClusterClient:
        if self._closed:
            raise Closed("the Log is closed")
        if self._cluster is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._handles = []
            self._cluster = self._client(self._bootstrap)
        self._handles = [handle for handle in self._handles if not handle.closed]
        return self._cluster

    def _transactions(self) -> TransactionAdmin:
        return TransactionAdmin(self._connected())

    def _groups(self) -> GroupAdmin:
        return GroupAdmin(self._connected())

    def _admin(self) -> Admin:
        return Admin(self._connected())
