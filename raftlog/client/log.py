"""The Log: a cluster as a program sees it. Makes producers and consumers, and manages topics."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import os
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar

import msgspec

from raftlog.client.admin import CALL_TIMEOUT_S, Admin
from raftlog.client.cluster import Bootstrap, ClusterClient
from raftlog.client.descriptions import (
    BrokerDescription,
    ClusterDescription,
    GroupDescription,
    PartitionDescription,
    TopicDescription,
)
from raftlog.client.group_admin import GroupAdmin, ResetTo
from raftlog.client.handle import process_client_id
from raftlog.client.identity_pool import process_pool
from raftlog.client.io_thread import IoThread, io_thread
from raftlog.client.offsets import Offset, Place
from raftlog.client.transaction_admin import OpenTransaction, TransactionAdmin, TransactionDescription
from raftlog.client.transports import network_for, transport_of
from raftlog.config import ConsumerConfig, ProducerConfig, TopicConfig
from raftlog.errors import Closed, NotRunning, RaftlogError
from raftlog.net.network import real_seams
from raftlog.record.types import TopicPartition

if TYPE_CHECKING:
    from raftlog.client.process import Work
    from raftlog.client.processing import Processing
    from raftlog.client.sync import Consumer
    from raftlog.client.sync_producer import Producer
    from raftlog.record.types import Record

__all__ = [
    "Bootstrap",
    "BrokerDescription",
    "ClusterDescription",
    "GroupDescription",
    "Log",
    "PartitionDescription",
    "TopicDescription",
    "refresh_through_ray",
]

T = TypeVar("T")

REFRESH_TIMEOUT_S: Final = 10.0

CLOSE_TIMEOUT_S: Final = 2.0

_runtimes: weakref.WeakSet[_Runtime] = weakref.WeakSet()
_inherited: list[Any] = []
"""What a fork left of the parent's handles: kept, never used nor freed (see ``io_thread``)."""


class Log:
    """A cluster: topics, producers and consumers.

    Thread-safe. It pickles (as name and addresses) and connects again where it is used, also after a fork; so
    hand it to Ray tasks and actors, and make producers and consumers there.

    Args:
        bootstrap: how to reach the cluster; found by :func:`raftlog.connect`.
    """

    def __init__(self, bootstrap: Bootstrap) -> None:
        self._bootstrap = bootstrap
        self._closed = False
        self._lock = threading.Lock()
        self._runtime: _Runtime | None = None

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
        """How it reaches the brokers: "streams" or "actor". (A Log that came out of a pickle, or was made
        before a fork, says "auto" until it has found out.)"""
        return transport_of(self._connected().cluster.seams.network)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def __repr__(self) -> str:
        return f"<raftlog.Log of cluster {self.name!r}{' (closed)' if self._closed else ''}>"

    def __reduce__(self) -> tuple[type[Log], tuple[Bootstrap]]:
        return Log, (self._bootstrap,)

    # -- handles ---------------------------------------------------------------------------------------------

    def producer(self, **settings: Any) -> Producer:
        """A new producer; use it in a ``with``, which flushes and closes it.

        Args:
            settings: see :class:`raftlog.config.ProducerConfig`; Kafka's dotted names work too, as in
                ``log.producer(**{"linger.ms": 0})``.

        Raises:
            ConfigError: unknown, out of range or contradictory settings.
        """
        # pulls in the record codec: not for who only lists topics
        from raftlog.client.sync_producer import Producer

        config = ProducerConfig(**settings)
        runtime = self._connected()
        producer = Producer(self, runtime.io, runtime.cluster, config)
        runtime.handles.add(producer)
        return producer

    def consumer(self, *topics: str, **settings: Any) -> Consumer:
        """A new consumer of all partitions of ``topics``, of its group's share of them (``group=``), or of
        those in ``assign=``.

        Args:
            topics: names.
            settings: see :class:`raftlog.config.ConsumerConfig`; ``assign`` is a list of (topic, partition).

        Raises:
            ConfigError: unknown, out of range or contradictory settings.
            UnknownTopic, UnknownPartition: there is nothing to read.
        """
        from raftlog.client.sync import Consumer

        config = ConsumerConfig(**settings)
        runtime = self._connected()
        consumer = Consumer(self, runtime.io, runtime.cluster, topics, config)
        runtime.handles.add(consumer)
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
        """Consume, transform, produce, commit, over and over; begins at once, in the background.

        ``fn(record)`` returns what comes of a record: None, bytes (a value; the key is the record's), an
        ``Output``, or several of these. If it raises it is called again, ``retries`` times; then the record
        goes to a topic of dead letters, with headers ``dead.*`` that say why.

        With ``semantics="exactly-once"``, the default, outputs, dead letters and the group's positions are
        committed together, in transactions: readers of committed records see what comes of each record once,
        whoever dies when. "at-least-once" and "at-most-once" commit positions after, or before.

        Args:
            source: a topic, or several.
            sink: topic of outputs that name none; None: all do.
            group: consumer group; all workers that name it share the source's partitions.
            fn: called with one :class:`raftlog.Record` at a time, on a thread of its own.
            workers: 1: in this process. More: as many Ray actors; ``fn`` is pickled.
            until: "end": end when all that is there now is done. None: go on until stopped.
            settings: see :class:`raftlog.config.ProcessConfig`.

        Returns:
            A handle: ``wait()``, ``stop()``, ``stats``; leaving its ``with`` stops it.

        Raises:
            ConfigError: unknown, out of range or contradictory settings.
        """
        from raftlog.client.process import describe_work

        work = describe_work(source, sink, group, until, settings)
        if workers > 1:
            from raftlog.actors.processors import process_in_actors

            return process_in_actors(self, work, fn, workers)
        return self._start_work(work, fn)

    def _start_work(self, work: Work, fn: Callable[[Record], Any]) -> Processing:
        """What :meth:`process` does with one worker."""
        from raftlog.client.processing import ThreadProcessing

        runtime = self._connected()
        processing = ThreadProcessing(self, runtime.io, runtime.cluster, work, fn)
        runtime.handles.add(processing)
        return processing

    # -- topics ----------------------------------------------------------------------------------------------

    def create_topic(
        self,
        name: str,
        partitions: int = 1,
        replication_factor: int | str = "auto",
        config: Mapping[str, Any] | TopicConfig | None = None,
        exist_ok: bool = False,
        timeout: float = CALL_TIMEOUT_S,
    ) -> None:
        """Create a topic; returns when all of its partitions have leaders.

        Args:
            name: 1 to 249 of a-z A-Z 0-9 . _ -
            partitions: how many, each with an order of its own.
            replication_factor: copies of each; "auto": 3, or as many as there are brokers if that is fewer.
            config: see :class:`raftlog.config.TopicConfig`.
            exist_ok: be content with a topic of that name, as it is.
            timeout: seconds.

        Raises:
            TopicExists, InvalidTopic, ConfigError, InvalidReplicationFactor: nothing was created.
            ConnectionLost, RequestTimeout: the cluster did not answer in time; it may have been created.
        """
        self._call(
            self._admin().create_topic(name, partitions, replication_factor, config, exist_ok, timeout)
        )

    def topics(self) -> list[str]:
        """Names of all topics, in order."""
        return self._call(self._admin().topics())

    def describe_topic(self, name: str) -> TopicDescription:
        """Partitions of a topic: leaders, replicas, offsets, and who is behind; asked of the brokers now.

        Raises:
            UnknownTopic, ConnectionLost.
        """
        return self._call(self._admin().describe_topic(name))

    def delete_topic(self, name: str, timeout: float = CALL_TIMEOUT_S) -> None:
        """Delete a topic and all of its records.

        Raises:
            UnknownTopic, ConnectionLost, RequestTimeout.
        """
        self._call(self._admin().delete_topic(name, timeout))

    def add_partitions(
        self, name: str, n: int, allow_key_reorder: bool = False, timeout: float = CALL_TIMEOUT_S
    ) -> int:
        """Let a topic have more partitions, while it is written to and read.

        The keys of most records map to other partitions afterwards: what was written with a key before stays
        where it is, and is in no order with what is written with it from then on. Producers take the new
        partitions into use within some seconds, each at its own time. Consumer groups share them out from
        their beginning; consumers without a group read the partitions that there were when they began.

        Args:
            name: of the topic.
            n: how many more.
            allow_key_reorder: that is all right, or no record has a key.
            timeout: seconds.

        Returns:
            How many partitions the topic has, all with leaders.

        Raises:
            UnknownTopic, InvalidTopic, ConfigError: nothing was changed.
            ConnectionLost, RequestTimeout: it may have been done.
        """
        return self._call(
            self._admin().alter_topic(name, timeout, more_partitions=n, allow_key_reorder=allow_key_reorder)
        )

    def set_replication(
        self, name: str, replication_factor: int | str, timeout: float = CALL_TIMEOUT_S
    ) -> None:
        """Say how many copies there should be of a topic; the controller makes or drops them in its own time.

        Args:
            name: of the topic.
            replication_factor: copies; "auto": 3 as soon as there are so many brokers, and never fewer than
                there are.
            timeout: seconds.

        Raises:
            UnknownTopic, InvalidTopic, ConfigError, InvalidReplicationFactor: nothing was changed.
            ConnectionLost, RequestTimeout: it may have been done.
        """
        self._call(self._admin().alter_topic(name, timeout, replication_factor=replication_factor))

    # -- groups ----------------------------------------------------------------------------------------------

    def groups(self) -> list[str]:
        """Names of all consumer groups, in order: those with members, and those with committed offsets."""
        return self._call(self._connected().groups.groups())

    def describe_group(self, group: str) -> GroupDescription:
        """Members of a group, and how far it has come with each partition; asked now.

        Raises:
            UnknownGroup, ConnectionLost, RequestTimeout.
        """
        return self._call(self._connected().groups.describe(group))

    def delete_group(self, group: str, timeout: float = CALL_TIMEOUT_S) -> None:
        """Forget a group and what it has committed.

        Raises:
            UnknownGroup, GroupNotEmpty, UnstableOffsets, ConnectionLost, RequestTimeout.
        """
        self._call(self._connected().groups.delete(group, timeout))

    def reset_offsets(
        self, group: str, topic: str, to: ResetTo, timeout: float = CALL_TIMEOUT_S
    ) -> dict[TopicPartition, int]:
        """Have a group without members read a topic from elsewhere.

        Args:
            group: need not exist yet.
            topic: all of its partitions, unless ``to`` names some.
            to: "earliest", "latest", a time (an aware datetime, or milliseconds since the epoch: the first
                record of that time or later), or offsets: {(topic, partition): offset}.
            timeout: seconds.

        Returns:
            The new offsets.

        Raises:
            GroupNotEmpty: close its consumers first.
            OffsetOutOfRange: there is no such offset in the partition. Nothing was changed.
            UnknownTopic, UnknownPartition, ConfigError, ConnectionLost, RequestTimeout.
        """
        return self._call(self._connected().groups.reset(group, topic, to, timeout))

    def commit_offsets(
        self, group: str, offsets: Mapping[Place, Offset], timeout: float = CALL_TIMEOUT_S
    ) -> None:
        """Commit offsets for a group without members: where partitions are assigned by the program itself.

        Args:
            group: need not exist yet.
            offsets: (topic, partition) -> offset of the next record to read, or (that, metadata).
            timeout: seconds.

        Raises:
            GroupNotEmpty: its members commit themselves.
            UnknownTopic, UnknownPartition, ConfigError, ConnectionLost, RequestTimeout.
        """
        self._call(self._connected().groups.commit(group, offsets, timeout))

    # -- cluster ---------------------------------------------------------------------------------------------

    def describe_cluster(self) -> ClusterDescription:
        """The brokers, each as it says it is; asked now. One that does not answer is "lost"."""
        return self._call(self._admin().describe_cluster())

    def drain(self, brokers: Sequence[int], undo: bool = False, timeout: float = CALL_TIMEOUT_S) -> None:
        """Have everything move away from brokers that are to go: first leaders, then replicas. It is done
        when they hold none (:meth:`describe_cluster`); nodes that Ray drains are drained by themselves.

        Args:
            brokers: ids.
            undo: let them stay, and be given their share again.
            timeout: seconds.

        Raises:
            ConfigError: there is no such broker.
            ConnectionLost, RequestTimeout.
        """
        self._call(self._admin().drain(brokers, not undo, timeout))

    def upgrade(self, level: int = 0, timeout: float = CALL_TIMEOUT_S) -> int:
        """Let the cluster use what a new release brings, once every broker runs it. There is no way back.

        Args:
            level: feature level; 0: the newest that every broker knows.
            timeout: seconds.

        Returns:
            The feature level that the cluster runs at.

        Raises:
            ConfigError: a broker does not know that level.
            ConnectionLost, RequestTimeout.
        """
        return self._call(self._admin().upgrade(level, timeout)).level

    # -- transactions ----------------------------------------------------------------------------------------

    def transactions(self) -> list[TransactionDescription]:
        """All transactional ids, in order, with what they have open; asked now."""
        return self._call(self._connected().transactions.transactions())

    def describe_transaction(self, transactional_id: str) -> TransactionDescription:
        """One transactional id.

        Raises:
            UnknownTransactionalId, ConnectionLost, RequestTimeout.
        """
        return self._call(self._connected().transactions.describe(transactional_id))

    def abort_transaction(self, transactional_id: str, timeout: float = CALL_TIMEOUT_S) -> None:
        """Abort what a transactional id has open, in place of its producer, which hears TransactionAborted.

        Raises:
            UnknownTransactionalId, ConcurrentTransactions, ConnectionLost, RequestTimeout.
        """
        self._call(self._connected().transactions.abort(transactional_id, timeout))

    def open_transactions(self, topic: str) -> list[OpenTransaction]:
        """What is open in the partitions of a topic, and holds up their readers; asked now.

        Raises:
            UnknownTopic, ConnectionLost, RequestTimeout.
        """
        return self._call(self._connected().transactions.open(topic))

    def abort_hanging_transaction(
        self, topic: str, partition: int, producer_id: int, epoch: int, timeout: float = CALL_TIMEOUT_S
    ) -> None:
        """Abort what is open in a partition though no coordinator knows of it (any more).

        Raises:
            InvalidTransaction: one does: abort the transaction of its id.
            UnknownTopic, UnknownPartition, ConnectionLost, RequestTimeout.
        """
        self._call(
            self._connected().transactions.abort_hanging(topic, partition, producer_id, epoch, timeout)
        )

    # -- life ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close its producers (after flushing them) and consumers, and the connections. Closing twice does
        nothing.

        Raises:
            DeliveryFailed: of a producer that was still open.
        """
        with self._lock:
            runtime, self._runtime = self._runtime, None
            self._closed = True
        if runtime is not None and runtime.pid == os.getpid():
            runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        runtime = getattr(self, "_runtime", None)
        if runtime is not None and runtime.pid == os.getpid():
            runtime.io.spawn(runtime.cluster.close())

    def _connected(self) -> _Runtime:
        with self._lock:
            if self._closed:
                raise Closed("the Log is closed")
            if self._runtime is not None and self._runtime.pid != os.getpid():
                _inherited.append(self._runtime)
                self._runtime = None
            if self._runtime is None:
                self._runtime = _Runtime(self._bootstrap)
            return self._runtime

    def _admin(self) -> Admin:
        return self._connected().admin

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return self._connected().io.call(work)


class _Runtime:
    """A Log's connection in this process, on its I/O thread."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        self.pid = os.getpid()
        self.io: IoThread = io_thread()
        self.cluster: ClusterClient = self.io.call(_make(bootstrap))
        self.admin = Admin(self.cluster)
        self.groups = GroupAdmin(self.cluster)
        self.transactions = TransactionAdmin(self.cluster)
        self.handles: weakref.WeakSet[Producer | Consumer | Processing] = weakref.WeakSet()
        _runtimes.add(self)

    def close(self) -> None:
        try:
            for handle in list(self.handles):
                handle.close()
        finally:
            self.io.call(self.cluster.close())


@atexit.register
def _at_exit() -> None:
    """Close connections in good order. Runs after ``sync``'s last flush and before the I/O thread ends: these
    functions run in the reverse order of their registration, that is of the modules' imports."""
    for runtime in list(_runtimes):
        if runtime.pid == os.getpid():
            with contextlib.suppress(RaftlogError, TimeoutError):
                runtime.io.call(runtime.cluster.close(), CLOSE_TIMEOUT_S)


async def _make(bootstrap: Bootstrap) -> ClusterClient:
    return process_client(bootstrap)  # on the I/O thread's loop


def process_client(bootstrap: Bootstrap) -> ClusterClient:
    """A client of this process, on the loop that runs it."""
    return ClusterClient(
        dataclasses.replace(real_seams(), network=network_for(bootstrap)),
        bootstrap,
        process_client_id(),
        refresh_through_ray(bootstrap),
        process_pool(bootstrap.cluster_id),
    )


def refresh_through_ray(bootstrap: Bootstrap) -> Callable[[], Awaitable[Bootstrap]]:
    """Finds the cluster's addresses again through Ray, where this process uses Ray and the cluster is the
    same."""

    def find() -> Bootstrap:
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return bootstrap
        from raftlog.actors import launch

        try:
            found = launch.find(bootstrap.name, REFRESH_TIMEOUT_S)
        except NotRunning:
            return bootstrap
        if found.cluster_id != bootstrap.cluster_id:
            return bootstrap
        return msgspec.structs.replace(found, transport=bootstrap.transport)

    async def refresh() -> Bootstrap:
        return await asyncio.get_running_loop().run_in_executor(None, find)

    return refresh
