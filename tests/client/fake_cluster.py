"""A cluster that does what a test tells it: brokers on the real RpcServer, partitions in memory, faults by
script.

Deduplication is the production state machine's, so a client that breaks the rules of sequences is found out.
It runs on any loop: the simulated one (:class:`SimWorld`) for everything with time in it, a real one for the
blocking handles.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from fake_partition import FakePartition

from raftlog import aio
from raftlog.broker.produce import BatchAnswer, split_batches
from raftlog.client.cluster import Bootstrap, ClusterClient
from raftlog.errors import (
    Busy,
    LeadershipLost,
    NotLeader,
    OffsetOutOfRange,
    RaftlogError,
    TopicExists,
    UnknownReplica,
    to_wire,
)
from raftlog.net import rpc
from raftlog.net.handshake import Local
from raftlog.net.network import Seams
from raftlog.net.server import Reply, RpcServer, ServerConnection
from raftlog.record.codec import decode_batch
from raftlog.record.frame import FRAME_HEADER_BYTES, FrameKind
from raftlog.testing.loop import SimLoop
from raftlog.testing.network import SimNetwork

T = TypeVar("T")

SECRET = b"the secret of the fake cluster.."
PORT = 9092
TOPIC = "orders"

Fault = Callable[["FakeBroker", "FakePartition", memoryview, "Answer"], None]
"""What a broker does with one batch instead of appending and answering."""


class BatchReply:
    """The answer to one batch of a request of several."""

    def __init__(self, answer: BatchAnswer, number: int) -> None:
        self._answer = answer
        self._number = number

    def ok(self, response: rpc.ProduceResponse) -> None:
        self._answer.settle(self._number, response.batches[0], None)

    def fail(self, error: RaftlogError) -> None:
        self._answer.settle(self._number, None, error)


Answer = Reply | BatchReply


class FakeCluster:
    """The brokers, and what they share."""

    def __init__(self, brokers: int = 3, cluster_id: str = "c1") -> None:
        self.cluster_id = cluster_id
        self.topics: dict[str, list[FakePartition]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.brokers = {broker_id: FakeBroker(self, broker_id) for broker_id in range(brokers)}
        self.version = 1
        self.metadata_leader: int | None = 0
        self.producer_ids = 1000
        self.refuse_identity: Callable[[int], RaftlogError | None] = lambda broker_id: None
        self.requests: list[tuple[int, rpc.Struct]] = []
        """(broker id, request) of everything that came."""
        self.faults: deque[Fault | None] = deque()
        """For the next batches, one each; None: nothing wrong."""
        self.every_fault: Fault | None = None
        """For all batches when ``faults`` is empty."""
        self.create_faults: deque[RaftlogError] = deque()
        """Raised after the next topics were created, one each."""
        self.fetch_errors: deque[RaftlogError] = deque()
        self.born_leaderless = False
        self._next_topic = 0

    def create(self, name: str, partitions: int = 1, **config: Any) -> list[FakePartition]:
        """Make a topic."""
        self._next_topic += 1
        topic_id = self._next_topic.to_bytes(16, "big")
        ids = sorted(self.brokers)
        made = [
            FakePartition(name, topic_id, index, [ids[(index + k) % len(ids)] for k in range(len(ids))])
            for index in range(partitions)
        ]
        if self.born_leaderless:
            for partition in made:
                partition.leader = None
        self.topics[name] = made
        self.configs[name] = config
        self.version += 1
        return made

    def delete(self, name: str) -> None:
        """Drop a topic."""
        del self.topics[name]
        self.version += 1

    def move(self, partition: FakePartition, leader: int | None) -> None:
        """Another leader, in a new term."""
        partition.leader = leader
        partition.term += 1
        if leader is not None:
            partition.append_noop()

    def elect_all(self) -> None:
        """Every partition gets its preferred leader."""
        for partitions in self.topics.values():
            for partition in partitions:
                self.move(partition, partition.replicas[0])

    def count(self, kind: type[rpc.Struct]) -> int:
        """How many requests of this kind came."""
        return sum(isinstance(request, kind) for _, request in self.requests)

    def batches(self) -> int:
        """How many batches came."""
        return sum(len(each.partitions) for _, each in self.requests if isinstance(each, rpc.ProduceRequest))

    def find(self, topic_id: bytes, index: int) -> FakePartition:
        for partitions in self.topics.values():
            if partitions[0].topic_id == topic_id:
                return partitions[index]
        raise UnknownReplica(f"no partition {index} of topic {topic_id.hex()}")

    async def start(self, seams: Callable[[int], Seams], host: Callable[[int], tuple[str, int]]) -> Bootstrap:
        """Start all brokers on this loop."""
        for broker_id, broker in self.brokers.items():
            await broker.start(seams(broker_id), *host(broker_id))
        return self.bootstrap

    @property
    def bootstrap(self) -> Bootstrap:
        """How to reach it."""
        addresses = tuple(broker.address for broker in self.brokers.values())
        return Bootstrap("fake", self.cluster_id, SECRET, addresses)


class FakeBroker:
    """One broker: the Handler of an RpcServer."""

    def __init__(self, cluster: FakeCluster, broker_id: int) -> None:
        self.cluster = cluster
        self.id = broker_id
        self.address = ("", 0)
        self.incarnation = 1
        self.rpc_versions = (rpc.RPC_VERSION_MIN, rpc.RPC_VERSION_MAX)
        self.server: RpcServer
        self.up = True
        self.silent = False
        """Take requests and answer nothing."""
        self.blind = False
        """Its metadata is from before every topic."""
        self.one_way: list[bytes] = []

    async def start(self, seams: Seams, host: str, port: int) -> None:
        self.seams = seams
        least, most = self.rpc_versions
        local = Local(
            self.cluster.cluster_id,
            "broker",
            broker_id=self.id,
            incarnation=self.incarnation,
            version_min=least,
            version_max=most,
        )
        self.server = RpcServer(seams, local, SECRET, self)
        self.address = await self.server.start(host, port)

    async def restart(self, seams: Seams, host: str) -> None:
        """Come back as a new process at another address."""
        self.incarnation += 1
        await self.start(seams, host, PORT)

    def drop_connections(self) -> None:
        """Break every connection."""
        for connection in list(self.server.connections):
            connection.close(RaftlogError("dropped by the test"))

    async def stop(self) -> None:
        """Go down: connections break, nobody listens."""
        self.up = False
        await self.server.close()

    # -- Handler ---------------------------------------------------------------------------------------------

    def on_open(self, connection: ServerConnection) -> None:
        pass

    def on_close(self, connection: ServerConnection, error: Exception | None) -> None:
        pass

    def on_one_way(self, connection: ServerConnection, message: rpc.Struct, payload: memoryview) -> None:
        self.cluster.requests.append((self.id, message))
        assert isinstance(message, rpc.ProduceRequest)
        for to, batch in zip(message.partitions, split_batches(message, payload), strict=True):
            self.one_way.append(bytes(batch))
            partition = self.cluster.find(to.topic_id, to.partition)
            if partition.leader == self.id:
                partition.append(batch, self.seams.wall_ms())

    def on_request(
        self, connection: ServerConnection, request: rpc.Request[Any], payload: memoryview, reply: Reply
    ) -> None:
        self.cluster.requests.append((self.id, request))
        if self.silent:
            return
        match request:
            case rpc.MetadataRequest():
                self._metadata(request, reply)
            case rpc.ProduceRequest():
                self._produce(request, payload, reply)
            case rpc.FetchRequest():
                _Fetch(self, request, reply).serve()
            case rpc.ListOffsetsRequest():
                reply.ok(rpc.ListOffsetsResponse([self._offset(query) for query in request.queries]))
            case rpc.InitProducerRequest():
                refusal = self.cluster.refuse_identity(self.id)
                if refusal is not None:
                    raise refusal
                self.cluster.producer_ids += 1
                reply.ok(rpc.InitProducerResponse(self.cluster.producer_ids, 0))
            case rpc.CreateTopicRequest():
                self._create(request, reply)
            case rpc.BrokerStatusRequest():
                reply.ok(self._status(request))
            case _:
                raise RaftlogError(f"the fake does not know {type(request).__name__}")

    def _metadata(self, request: rpc.MetadataRequest, reply: Reply) -> None:
        cluster = self.cluster
        rows = [
            rpc.BrokerRow(broker.id, *broker.address, broker.incarnation, f"node-{broker.id}", "alive")
            for broker in cluster.brokers.values()
        ]
        topics = {} if self.blind else cluster.topics
        wanted = list(topics) if request.topics is None else request.topics
        reply.ok(
            rpc.MetadataResponse(
                self.cluster.cluster_id,
                rows,
                [self._topic(name) for name in wanted if name in topics],
                [name for name in wanted if name not in topics],
                0 if self.blind else cluster.version,
                -1 if cluster.metadata_leader is None else cluster.metadata_leader,
                1,
            )
        )

    def _topic(self, name: str) -> rpc.TopicRow:
        partitions = self.cluster.topics[name]
        rows = [
            rpc.PartitionRow(each.replicas, -1 if each.leader is None else each.leader, each.term)
            for each in partitions
        ]
        return rpc.TopicRow(name, partitions[0].topic_id, rows, self.cluster.configs[name])

    def _led(self, topic_id: bytes, index: int) -> FakePartition:
        partition = self.cluster.find(topic_id, index)
        if partition.leader != self.id:
            raise NotLeader("not here", leader=partition.leader, term=partition.term)
        return partition

    def _produce(self, request: rpc.ProduceRequest, payload: memoryview, reply: Reply) -> None:
        batches = split_batches(request, payload)
        answer = BatchAnswer(reply, list(map(len, batches)), self)
        for number, (to, batch) in enumerate(zip(request.partitions, batches, strict=True)):
            one = BatchReply(answer, number) if len(batches) > 1 else reply
            try:
                partition = self._led(to.topic_id, to.partition)
                faults = self.cluster.faults
                fault = faults.popleft() if faults else self.cluster.every_fault
                if fault is None:
                    self.append_and_answer(partition, batch, one)
                else:
                    fault(self, partition, batch, one)
            except RaftlogError as error:
                one.fail(error)

    def settle(self, answer: BatchAnswer) -> None:
        """Parts of answers leave at the end of the turn."""
        asyncio.get_running_loop().call_soon(answer.send)

    def append_and_answer(self, partition: FakePartition, payload: memoryview, reply: Answer) -> None:
        reply.ok(rpc.ProduceResponse([rpc.Produced(*partition.append(payload, self.seams.wall_ms()))]))

    def _offset(self, query: rpc.OffsetQuery) -> rpc.OffsetAnswer:
        try:
            partition = self._led(query.topic_id, query.partition)
        except RaftlogError as error:
            return rpc.OffsetAnswer(rpc.WireError(*to_wire(error)), -1, -1)
        if query.timestamp_ms == rpc.OFFSET_LATEST:
            return rpc.OffsetAnswer(None, partition.state.next_offset, -1)
        if query.timestamp_ms == rpc.OFFSET_EARLIEST:
            return rpc.OffsetAnswer(None, partition.state.log_start, -1)
        # like a broker's index, this knows batches: the answer is the start of the one that may hold the
        # record
        for frame in partition.frames:
            if frame[12] == FrameKind.BATCH:
                records = decode_batch(frame[FRAME_HEADER_BYTES:], "", 0)
                if max(record.timestamp_ms for record in records) >= query.timestamp_ms:
                    return rpc.OffsetAnswer(None, records[0].offset, records[0].timestamp_ms)
        return rpc.OffsetAnswer(None, -1, -1)

    def _status(self, request: rpc.BrokerStatusRequest) -> rpc.BrokerStatusResponse:
        rows = [
            rpc.ReplicaRow(
                topic=each.topic,
                partition=each.index,
                replica_id=0,
                role="leader" if each.leader == self.id else "follower",
                term=each.term,
                leader=-1 if each.leader is None else each.leader,
                start_offset=each.state.log_start,
                end_offset=each.state.next_offset,
                committed_offset=each.state.next_offset,
                last_index=each.last_index,
                commit_index=each.last_index,
                applied_index=each.last_index,
                durable_index=each.last_index,
                voters=each.replicas,
            )
            for partitions in self.cluster.topics.values()
            for each in partitions
            if self.id in each.replicas and (request.topics is None or each.topic in request.topics)
        ]
        me = rpc.BrokerRow(self.id, *self.address, self.incarnation, f"node-{self.id}", "alive", os.getpid())
        return rpc.BrokerStatusResponse(me, rows, [], "0", 0)

    def _create(self, request: rpc.CreateTopicRequest, reply: Reply) -> None:
        cluster = self.cluster
        if cluster.metadata_leader != self.id:
            raise NotLeader("not here", leader=cluster.metadata_leader, term=1)
        created = request.name not in cluster.topics
        if not created and not request.exist_ok:
            raise TopicExists(f"topic {request.name!r} exists")
        if created:
            cluster.create(request.name, request.partitions, **request.config)
        if cluster.create_faults:
            raise cluster.create_faults.popleft()
        reply.ok(rpc.CreateTopicResponse(self._topic(request.name), cluster.version, created))


class _Fetch:
    """One long poll."""

    def __init__(self, broker: FakeBroker, request: rpc.FetchRequest, reply: Reply) -> None:
        self.broker = broker
        self.request = request
        self.reply = reply
        self.timer: asyncio.TimerHandle | None = None
        self.answered = False

    def serve(self) -> None:
        parts = self._parts()
        if any(part[0].error is not None or part[1] for part in parts) or self.request.wait_ms == 0:
            self._answer(parts)
            return
        loop = asyncio.get_running_loop()
        self.timer = loop.call_later(self.request.wait_ms / 1000, self._wake)
        for wanted in self.request.partitions:
            self.broker.cluster.find(wanted.topic_id, wanted.partition).waiting.append(self._wake)

    def _wake(self) -> None:
        if not self.answered:
            if self.timer is not None:
                self.timer.cancel()
            self._answer(self._parts())

    def _answer(self, parts: list[tuple[rpc.FetchedPartition, bytes]]) -> None:
        self.answered = True
        self.reply.ok(rpc.FetchResponse([row for row, _ in parts]), [data for _, data in parts if data])

    def _parts(self) -> list[tuple[rpc.FetchedPartition, bytes]]:
        return [self._part(wanted) for wanted in self.request.partitions]

    def _part(self, wanted: rpc.FetchPartition) -> tuple[rpc.FetchedPartition, bytes]:
        errors = self.broker.cluster.fetch_errors
        try:
            if errors:
                raise errors.popleft()
            partition = self.broker._led(wanted.topic_id, wanted.partition)
            state = partition.state
            if not state.log_start <= wanted.offset <= state.next_offset:
                raise OffsetOutOfRange(
                    f"offset {wanted.offset} is outside", start=state.log_start, end=state.next_offset
                )
        except RaftlogError as error:
            return rpc.FetchedPartition(rpc.WireError(*to_wire(error)), -1, -1, 0), b""
        data = b"".join(partition.read(wanted.offset, wanted.bytes_max))
        return rpc.FetchedPartition(None, state.next_offset, state.log_start, len(data)), data


def numbered(count: int) -> list[bytes]:
    """Values that sort."""
    return [b"%04d" % number for number in range(count)]


async def send_singly(producer: aio.Producer, values: list[bytes], partition: int | None = 0) -> list[Any]:
    """One batch each: a flush between closes it, without waiting."""
    deliveries = []
    for value in values:
        deliveries.append(await producer.send(TOPIC, value, partition=partition))
        producer._core.accumulator.close_open_batches()
    return deliveries


# -- faults --------------------------------------------------------------------------------------------------


def refuse(error: RaftlogError) -> Fault:
    """Answer with an error; nothing is appended."""

    def fault(broker: FakeBroker, partition: FakePartition, payload: memoryview, reply: Answer) -> None:
        reply.fail(error)

    return fault


def append_then(error: RaftlogError) -> Fault:
    """Append, and answer with an error nevertheless."""

    def fault(broker: FakeBroker, partition: FakePartition, payload: memoryview, reply: Answer) -> None:
        partition.append(payload, broker.seams.wall_ms())
        reply.fail(error)

    return fault


def lose_answer(broker: FakeBroker, partition: FakePartition, payload: memoryview, reply: Answer) -> None:
    """Append, and break the connection before the answer."""
    partition.append(payload, broker.seams.wall_ms())
    broker.drop_connections()


def lose_request(broker: FakeBroker, partition: FakePartition, payload: memoryview, reply: Answer) -> None:
    """Break the connection before appending."""
    broker.drop_connections()


def ignore(broker: FakeBroker, partition: FakePartition, payload: memoryview, reply: Answer) -> None:
    """Neither append nor answer."""


def append_silently(broker: FakeBroker, partition: FakePartition, payload: memoryview, reply: Answer) -> None:
    """Append and never answer."""
    partition.append(payload, broker.seams.wall_ms())


def move_to(leader: int) -> Fault:
    """Leadership moves before the request is looked at."""

    def fault(broker: FakeBroker, partition: FakePartition, payload: memoryview, reply: Answer) -> None:
        broker.cluster.move(partition, leader)
        reply.fail(NotLeader("not any more", leader=leader, term=partition.term))

    return fault


# -- the simulated world -------------------------------------------------------------------------------------


class SimWorld:
    """A fake cluster and clients in virtual time."""

    def __init__(self, brokers: int = 3, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.loop = SimLoop(seed)
        self.network = SimNetwork(self.loop, random.Random(self.random.random()))
        self.cluster = FakeCluster(brokers)
        for broker_id, broker in self.cluster.brokers.items():
            name = f"broker-{broker_id}"
            self.run(broker.start(self.seams(name), name, PORT), node=name)

    def seams(self, node: str) -> Seams:
        return Seams(
            self.network.for_node(node, node),
            random.Random(self.random.random()),
            partial(self.loop.wall_ms, node),
            self.loop.time,
        )

    def log(self, node: str = "client") -> aio.Log:
        """A Log; its handles are made and used within ``run``."""
        return aio.Log(self.cluster.bootstrap, lambda _: self.client(node))

    def client(self, node: str = "client") -> ClusterClient:
        """A client; to be made within ``run``."""
        return ClusterClient(self.seams(node), self.cluster.bootstrap, node)

    def run(self, work: Coroutine[Any, Any, T], *, node: str = "client", seconds: float = 300.0) -> T:
        """Run as a process of the simulation."""
        task = self.loop.run_as(node, work)
        self.loop.run_until(task.done, seconds)
        return task.result()

    def close(self) -> None:
        self.loop.close()


FAULTS: dict[str, Fault] = {
    "answer lost": lose_answer,
    "request lost": lose_request,
    "leader moved": move_to(1),
    "leadership lost, written": append_then(LeadershipLost("stepped down")),
    "leadership lost, not written": refuse(LeadershipLost("stepped down")),
    "busy": refuse(Busy("too much")),
    "no answer": ignore,
    "written, no answer": append_silently,
}
"""What may befall a batch, by name."""
