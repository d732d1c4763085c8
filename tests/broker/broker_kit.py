"""Simulated brokers that are spoken to in bare rpcs, for the tests of raftlog.broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from raftlog.broker.broker import Broker
from raftlog.broker.partition import PartitionReplica
from raftlog.client.admin import Admin
from raftlog.client.cluster import ClusterClient
from raftlog.errors import RaftlogError
from raftlog.net.connection import RpcConnection
from raftlog.net.handshake import Local
from raftlog.net.rpc import (
    CreateTopicRequest,
    FetchPartition,
    FetchRequest,
    FetchResponse,
    ProducePartition,
    ProduceRequest,
    ProduceResponse,
    Request,
    Struct,
)
from raftlog.record.codec import decode_batch, encode_batch
from raftlog.record.frame import FRAME_HEADER_BYTES, FrameKind, iter_frames
from raftlog.state.image import Partition
from raftlog.state.metadata_commands import AlterPartition, TakeControl
from raftlog.testing.sim_cluster import PORT, SimCluster, broker_name

TOPIC = "orders"
RAW = "raw"
"""The simulated process of the test."""
TIMEOUT_S = 30.0


def batch(
    *values: bytes,
    producer: int = -1,
    epoch: int = -1,
    sequence: int = -1,
    timestamp_ms: int = 1_000,
    transactional: bool = False,
) -> bytes:
    """A record batch as a producer would send it."""
    return encode_batch(
        values,
        None,
        timestamp_ms,
        producer_id=producer,
        producer_epoch=0 if producer >= 0 and epoch < 0 else epoch,
        base_sequence=sequence,
        transactional=transactional,
    )


def values_of(payload: Any) -> list[bytes]:
    """The record values in what a fetch returned."""
    found: list[bytes] = []
    for header, position in iter_frames(payload):
        if header.kind == FrameKind.BATCH:
            frame = bytes(payload[position + FRAME_HEADER_BYTES : position + header.length])
            found += [bytes(record.value or b"") for record in decode_batch(frame, TOPIC, 0)]
    return found


class World:
    """A simulated cluster with a topic, and a process "raw" that says what the test likes.

    Args:
        brokers: how many; ``replication`` and ``partitions``: of the topic.
        topic_config: of the topic.
    """

    def __init__(
        self,
        brokers: int = 3,
        *,
        replication: int | str = "auto",
        partitions: int = 1,
        topic_config: dict[str, Any] | None = None,
        seed: int = 1,
        **options: Any,
    ) -> None:
        self.cluster = SimCluster(seed, brokers, **options)
        self.loop = self.cluster.loop
        self.cluster.start()
        self.create(TOPIC, partitions, replication, topic_config)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.close()

    def create(
        self,
        name: str,
        partitions: int = 1,
        replication: int | str = "auto",
        config: dict[str, Any] | None = None,
    ) -> None:
        """Create a topic and wait for its leaders."""

        async def create() -> None:
            client = ClusterClient(self.cluster.seams("admin", "admin"), self.cluster.bootstrap, "admin")
            await Admin(client).create_topic(name, partitions, replication, config, False, TIMEOUT_S)
            await client.close()

        self.cluster.run(create(), node="admin")

    # -- looking inside --------------------------------------------------------------------------------------

    def broker(self, broker_id: int) -> Broker:
        """A running broker."""
        return self.cluster.brokers[broker_id]

    @property
    def topic_id(self) -> bytes:
        """Of the topic, as the broker that knows most has it."""
        images = [broker.metadata.image for broker in self.cluster.brokers.values()]
        return max(images, key=lambda image: image.applied_index).topics[TOPIC].topic_id

    @property
    def assignment(self) -> Partition:
        """Where the topic's partition 0 is wanted, and where it is still."""
        images = [broker.metadata.image for broker in self.cluster.brokers.values()]
        return max(images, key=lambda image: image.applied_index).topics[TOPIC].partitions[0]

    def move(self, *holders: int) -> None:
        """Want the topic's partition 0 on these brokers, as a controller that has just taken over."""
        broker_id = self.metadata_leader()
        metadata = self.broker(broker_id).metadata

        async def move() -> None:
            epoch = await metadata.call(TakeControl())
            # as the leader stages it: a replica that leaves may be gone by what is not applied yet
            staged = metadata.replica.check_serving()
            members = staged.topics[TOPIC].partitions[0].members
            here = {broker_id: replica_id for replica_id, broker_id in members}
            replicas = [(each, here.get(each, 0)) for each in holders]
            await metadata.call(AlterPartition(epoch, self.topic_id, 0, replicas))

        self.cluster.run(move(), node=broker_name(broker_id))

    def committed(self, broker_id: int) -> int:
        """Where a broker's replica of the topic's partition 0 ends; -1 while it has not opened it."""
        found = self.broker(broker_id).hosting.by_place.get((self.topic_id, 0))
        return -1 if found is None else found.committed_offset

    def replica(self, broker_id: int, partition: int = 0) -> PartitionReplica:
        """A broker's replica of the topic's partition."""
        return self.broker(broker_id).partition(self.topic_id, partition)

    def leader(self, partition: int = 0, *, but: int | None = None) -> int:
        """Wait until a broker (other than ``but``) serves the partition; returns its id."""

        def serving() -> list[int]:
            found = []
            for broker_id, broker in self.cluster.brokers.items():
                for replica in broker.replicas():
                    spec = replica.log.spec
                    if (spec.topic, spec.partition) == (TOPIC, partition) and replica.staged is not None:
                        found.append(broker_id)
            return [broker_id for broker_id in found if broker_id != but]

        self.until(lambda: bool(serving()))
        return serving()[0]

    def metadata_leader(self) -> int:
        """Wait until a broker serves the metadata group; returns its id."""

        def serving() -> list[int]:
            brokers = self.cluster.brokers.items()
            return [broker_id for broker_id, each in brokers if each.metadata.replica.staged is not None]

        self.until(lambda: bool(serving()))
        return serving()[0]

    def until(self, condition: Callable[[], bool], seconds: float = TIMEOUT_S) -> None:
        """Run until it holds, in virtual time."""
        self.loop.run_until(condition, seconds)

    def isolate(self, broker_id: int) -> None:
        """Cut a broker off from all others; the test still reaches it."""
        for other in self.cluster.disks:
            if other != broker_id:
                self.cluster.network.cut(broker_name(broker_id), broker_name(other))

    # -- speaking --------------------------------------------------------------------------------------------

    def dial(
        self,
        broker_id: int,
        role: str = "client",
        *,
        as_broker: int = -1,
        incarnation: int = 0,
        purpose: str = "client",
    ) -> RpcConnection:
        """A connection to a broker."""
        local = Local(self.cluster.plan.cluster_id, role, as_broker, RAW, incarnation)
        return self.cluster.run(
            RpcConnection.open(
                self.cluster.seams(RAW, RAW),
                broker_name(broker_id),
                PORT,
                local,
                self.cluster.plan.secret,
                purpose=purpose,
            ),
            node=RAW,
        )

    def ask(
        self, connection: RpcConnection, request: Request[Any], payload: Sequence[bytes] = ()
    ) -> asyncio.Task[tuple[Any, memoryview]]:
        """Send a request; the task has its answer."""
        return self.loop.run_as(RAW, connection.call(request, payload, timeout=TIMEOUT_S))

    def call(
        self, connection: RpcConnection, request: Request[Any], payload: Sequence[bytes] = ()
    ) -> tuple[Any, memoryview]:
        """Send a request and wait for its answer."""
        return self.answer(self.ask(connection, request, payload))

    def answer(self, task: asyncio.Task[tuple[Any, memoryview]]) -> tuple[Any, memoryview]:
        """Wait for an answer."""
        self.until(task.done, 2 * TIMEOUT_S)
        return task.result()

    def tell(self, connection: RpcConnection, message: Any, payload: Sequence[bytes] = ()) -> None:
        """Send a one-way message."""

        async def send() -> None:
            connection.send(message, payload)

        self.cluster.run(send(), node=RAW)

    def produce(
        self, connection: RpcConnection, encoded: bytes, partition: int = 0
    ) -> asyncio.Task[tuple[ProduceResponse, memoryview]]:
        """Send a batch."""
        return self.ask(connection, ProduceRequest([ProducePartition(self.topic_id, partition)]), (encoded,))

    def written(self, connection: RpcConnection, encoded: bytes, partition: int = 0) -> int:
        """Send a batch and wait; returns its base offset."""
        response: ProduceResponse = self.answer(self.produce(connection, encoded, partition))[0]
        return response.batches[0].base_offset

    def fetch_request(
        self,
        offset: int = 0,
        *,
        partition: int = 0,
        wait_ms: int = 0,
        bytes_max: int = 1 << 20,
        partition_bytes_max: int = 1 << 20,
    ) -> FetchRequest:
        """A fetch of one partition."""
        wanted = FetchPartition(self.topic_id, partition, offset, bytes_max=partition_bytes_max)
        return FetchRequest(wait_ms, bytes_max, [wanted])

    def fetched(self, connection: RpcConnection, offset: int = 0, **options: Any) -> list[bytes]:
        """The values from an offset on, of one answer."""
        response: FetchResponse
        response, payload = self.call(connection, self.fetch_request(offset, **options))
        assert response.partitions[0].error is None, response
        return values_of(payload)


def create_request(
    name: str, partitions: int = 1, replication: int = 1, config: dict[str, Any] | None = None
) -> CreateTopicRequest:
    """A request to create a topic."""
    return CreateTopicRequest(name, partitions, replication, config or {})


def outcome(task: asyncio.Task[tuple[Any, Any]]) -> Struct | RaftlogError:
    """What a finished request came to."""
    error = task.exception()
    assert error is None or isinstance(error, RaftlogError), error
    return error if error is not None else task.result()[0]
