"""One run of a simulated cluster: producers with unique values, consumers, a nemesis, and the accounts.

The invariants are held after every event (:mod:`raftlog.testing.invariants`). In the end everything heals,
all is read from every replica, and the checker holds what clients were told against it.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

from raftlog.broker.assigned import AssignedReplica
from raftlog.broker.partition import PartitionReplica
from raftlog.client.admin import Admin
from raftlog.client.consumer import ConsumerCore
from raftlog.client.delivery import Delivery
from raftlog.client.producer import ProducerCore
from raftlog.config import ConsumerConfig, ProducerConfig
from raftlog.errors import CorruptFrame, DamagedData, OffsetOutOfRange, RaftlogError, RecordTooLarge
from raftlog.record.batch import BatchHeader
from raftlog.record.codec import decode_batch
from raftlog.record.frame import FrameKind
from raftlog.testing.books import Violation
from raftlog.testing.checker import check
from raftlog.testing.faults import Nemesis
from raftlog.testing.history import History, Outcome, Place, Read, Send
from raftlog.testing.loop import NoProgress
from raftlog.testing.pipeline import Pipeline
from raftlog.testing.sim_cluster import SimCluster, broker_name
from raftlog.testing.swarm import Profile

TOPIC: Final = "work"
QUIET_SECONDS: Final = 120.0
PROGRESS_SECONDS: Final = 30.0
"""A healed quorum must have acknowledged a write to every partition within this time."""
SETTLE_SECONDS: Final = 4.0
"""Until what faults have begun is over: stalls, clogs, campaigns."""
HAND_SECONDS: Final = 0.1
"""How soon a broker that has ended is started anew."""
LOOK_SECONDS: Final = 0.01
"""How often is looked whether all has come to rest; after every callback would take longer than the run."""
CALM_SECONDS: Final = 3.0
_READ_BYTES: Final = 1 << 20


class Workload:
    """One run.

    Args:
        profile: what kind of run.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.cluster = SimCluster(
            profile.seed,
            profile.brokers,
            config=profile.config,
            storage=profile.storage,
            sync_seconds=profile.sync_seconds,
            latency=profile.latency,
        )
        self.history = History()
        self.random = random.Random(self.cluster.random.getrandbits(64))
        self.nemesis = Nemesis(self.cluster, profile, self._crash_client, self._a_client, self._committing)
        self.pipeline: Pipeline | None = None
        """Groups and transactions, if this run has any."""
        if profile.pipeline is not None:
            rng = random.Random(f"pipeline of {profile.seed}")
            self.pipeline = Pipeline(self.cluster, profile.pipeline, self.history, rng)
        self._clients: dict[str, asyncio.Task[None]] = {}
        self._incarnations: Counter[str] = Counter()

    # -- the run ---------------------------------------------------------------------------------------------

    def run(self) -> History:
        """Start, create the topic, work under faults, heal, and hold the accounts.

        Raises:
            Violation: a promise was broken.
            NoProgress: of a healed quorum.
            SimulationError: it did not come to an end.
        """
        profile, cluster = self.profile, self.cluster
        cluster.start()
        cluster.run(self._create(), node="admin")
        for number in range(profile.producers):
            self._start_client(f"client-{number}")
        self._start_client("reader")
        if self.pipeline is not None:
            self.pipeline.start()
        for number in range(profile.fault_count):
            self.nemesis.step(number)
        if profile.liveness:
            self._check_liveness()
        self.nemesis.heal()
        self._finish()
        for group in cluster.watch.groups.values():
            if not group.internal:
                self.history.starts[group.name] = group.starts
        anomalies = check(self.history)
        if anomalies:
            raise Violation("; ".join(str(anomaly) for anomaly in anomalies[:5]))
        return self.history

    def close(self) -> None:
        """End the simulation."""
        if self.pipeline is not None:
            self.pipeline.close()
        self.cluster.close()

    def _finish(self) -> None:
        """Let everything come to rest, and read it all."""
        loop = self.cluster.loop
        producers = [task for name, task in self._clients.items() if name.startswith("client")]
        self._wait_until(lambda: all(task.done() for task in producers))
        for task in producers:
            task.result()
        if self.pipeline is not None:
            self.pipeline.finish(self._wait_until)
        self._wait_until(self._all_equal)
        self._check_calm()
        self.cluster.run(self._audit(), node="auditor", seconds=QUIET_SECONDS)
        for broker_id in sorted(self.cluster.brokers):
            self.cluster.run(self._audit_broker(broker_id), node=broker_name(broker_id))
        reader = self._clients["reader"]
        assert not reader.done() or reader.exception() is None, reader.exception()
        loop.kill("reader")
        self._wait_until(self._all_equal)  # again: an election may have come in between
        self._check_replicas()

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Run until then; brokers that end by themselves are started anew meanwhile."""
        loop, nemesis = self.cluster.loop, self.nemesis
        until = loop.time() + QUIET_SECONDS
        while not condition():
            if loop.time() > until:
                raise NoProgress(f"not within {QUIET_SECONDS:.0f} s: {condition.__qualname__}")
            if nemesis.needs_a_hand:
                nemesis.revive()
                loop.run_for(HAND_SECONDS)
            else:
                loop.run_for(LOOK_SECONDS)

    def _check_calm(self) -> None:
        """Nothing is broken and nothing to do: then nobody campaigns."""
        loop = self.cluster.loop
        loop.run_for(SETTLE_SECONDS)
        self._wait_until(self._all_equal)  # a clog may have cost a leader its place, which it gets back
        before = self.cluster.watch.counts["elections"]
        loop.run_for(CALM_SECONDS)
        elections = self.cluster.watch.counts["elections"] - before
        if elections:
            raise NoProgress(f"{elections} elections in a calm cluster in {CALM_SECONDS:.0f} s")

    def _check_liveness(self) -> None:
        """Heal a random quorum, keep the rest broken: it must go on by itself."""
        self.nemesis.heal_quorum()
        loop = self.cluster.loop
        work = loop.run_as("prober", self._probe())
        until = loop.time() + PROGRESS_SECONDS
        while not work.done():
            loop.run_for(0.5)
            self.nemesis.revive()
            if loop.time() > until:
                up = sorted(set(self.cluster.brokers) - self.nemesis.cut)
                raise NoProgress(
                    f"brokers {up} are a quorum and acknowledged nothing in {PROGRESS_SECONDS:.0f} s"
                )
        work.result()

    # -- clients ---------------------------------------------------------------------------------------------

    def _start_client(self, node: str) -> None:
        self._incarnations[node] += 1
        name = f"{node}.{self._incarnations[node]}"
        work = self._consume(name, node) if node == "reader" else self._produce(name, node)
        self._clients[node] = self.cluster.loop.run_as(node, work)

    def _a_client(self) -> str:
        """The node of a random client."""
        others = {} if self.pipeline is None else self.pipeline.clients
        return self.random.choice(sorted([*self._clients, *others]))

    def _committing(self) -> list[str]:
        """Nodes of clients that wait for the answer to a commit."""
        return [] if self.pipeline is None else sorted(self.pipeline.committing)

    def _crash_client(self) -> None:
        """SIGKILL a client; another one takes its place."""
        node = self._a_client()
        if self.pipeline is not None and node in self.pipeline.clients:
            self.pipeline.restart(node)
        else:
            self.cluster.loop.kill(node)
            self._start_client(node)

    async def _create(self) -> None:
        client = self.cluster.client("admin")
        profile = self.profile
        await Admin(client).create_topic(
            TOPIC, profile.partitions, profile.replication, profile.topic, False, 60.0
        )
        await client.close()

    async def _produce(self, name: str, node: str) -> None:
        loop = asyncio.get_running_loop()
        rng = self.random
        client = self.cluster.client(node)
        config = ProducerConfig(
            linger_ms=rng.choice([0, 1, 20]),
            batch_bytes=rng.choice([1 << 10, 256 << 10]),
            delivery_timeout_ms=rng.choice([3_000, 30_000]),
            request_timeout_ms=rng.choice([300, 2_000]),
            compression=rng.choice(["none", "lz4", "zstd"]),
            max_in_flight=rng.choice([1, 5]),
        )
        producer = ProducerCore(client, config, loop, loop.call_soon)
        await producer.load_topic(TOPIC, 60.0)
        pending = []
        for number in range(self.profile.values):
            for partition in range(self.profile.partitions):
                value = self._value(name, partition, number)
                send = self.history.sends[value] = Send(name, _place(partition), value)
                try:
                    delivery = producer.send(TOPIC, value, None, (), partition, None)
                except RecordTooLarge:
                    send.outcome, send.ended = Outcome.FAILED, loop.time()
                    continue
                assert isinstance(delivery, Delivery), delivery
                pending.append(loop.create_task(self._note(send, delivery)))
            if rng.random() < 0.5:
                await asyncio.sleep(rng.uniform(0, 0.3))
        await asyncio.gather(*pending)
        producer.sender.stop()
        await client.close()

    def _value(self, name: str, partition: int, number: int) -> bytes:
        value = b"%s/%d/%d" % (name.encode(), partition, number)
        if self.random.random() < self.profile.large_values:
            value += self.random.randbytes(self.random.randrange(self.profile.value_bytes_max))
        return value

    async def _note(self, send: Send, delivery: Awaitable[Any]) -> None:
        try:
            metadata = await delivery
        except RaftlogError as error:
            send.outcome = Outcome.UNKNOWN if error.indeterminate else Outcome.FAILED
        else:
            send.outcome, send.offset = Outcome.OK, metadata.offset
            assert _place(metadata.partition) == send.place
        send.ended = asyncio.get_running_loop().time()

    async def _consume(self, name: str, node: str) -> None:
        """Read along for ever."""
        loop = asyncio.get_running_loop()
        history, rng = self.history, self.random
        client = self.cluster.client(node)
        config = ConsumerConfig(prefetch_bytes=rng.choice([64 << 10, 32 << 20]))
        consumer = ConsumerCore(client, config, (TOPIC,), loop, loop.call_soon)
        await consumer.start()
        limit, pause = rng.choice([5, 100]), rng.choice([0.02, 0.1, 0.5])
        while True:
            for record in consumer.take(limit):
                value = bytes(record.value or b"")
                history.polled((name, _place(record.partition)), [(record.offset, value)], loop.time())
            await asyncio.sleep(pause)

    async def _probe(self) -> None:
        """Write once to every partition, trying for ever."""
        loop = asyncio.get_running_loop()
        client = self.cluster.client("prober")
        config = ProducerConfig(linger_ms=0, request_timeout_ms=2_000, delivery_timeout_ms=120_000)
        producer = ProducerCore(client, config, loop, loop.call_soon)
        await producer.load_topic(TOPIC, 60.0)
        for partition in range(self.profile.partitions):
            value = b"prober/%d" % partition
            send = self.history.sends[value] = Send("prober", _place(partition), value)
            delivery = producer.send(TOPIC, value, None, (), partition, None)
            assert isinstance(delivery, Delivery), delivery
            await self._note(send, delivery)
        producer.sender.stop()
        await client.close()

    # -- the accounts ----------------------------------------------------------------------------------------

    async def _audit(self) -> None:
        """Read everything from the beginning, with a fresh client."""
        loop = asyncio.get_running_loop()
        client = self.cluster.client("auditor")
        consumer = ConsumerCore(client, ConsumerConfig(), (TOPIC,), loop, loop.call_soon)
        await consumer.start()
        consumer.limit(await consumer.ends())
        rows: dict[int, list[Read]] = {partition: [] for partition in range(self.profile.partitions)}
        while not consumer.at_limits():
            for record in consumer.take(1000):
                rows[record.partition].append((record.offset, bytes(record.value or b"")))
            await asyncio.sleep(0.01)
        await consumer.close()
        await client.close()
        for partition, row in rows.items():
            self.history.finals["auditor", _place(partition)] = row

    async def _audit_broker(self, broker_id: int) -> None:
        """Read everything that the replicas of a broker hold."""
        for replica in self._replicas(broker_id):
            if not isinstance(replica, PartitionReplica):
                continue
            while True:
                first = replica.log.first_index
                try:
                    row = await self._read(replica, first)
                except (DamagedData, CorruptFrame):
                    await asyncio.sleep(HAND_SECONDS)  # nobody had noticed yet; now it is repaired
                except OffsetOutOfRange:
                    pass  # retention was quicker
                else:
                    if replica.log.first_index == first:
                        break
            self.history.finals[f"broker {broker_id}", _name(replica)] = row

    async def _read(self, replica: PartitionReplica, index: int) -> list[Read]:
        row: list[Read] = []
        while index <= replica.node.applied:
            if index < replica.log.first_index:
                raise OffsetOutOfRange(f"retention has dropped entry {index}")
            for entry in await replica.log.entries(index, replica.node.applied + 1, _READ_BYTES):
                index = entry.index + 1
                if entry.kind != FrameKind.BATCH:
                    continue
                header = BatchHeader.parse(entry.payload)
                if header.is_control:
                    self.history.markers.setdefault(_name(replica), set()).add(header.base_offset)
                    continue
                records = decode_batch(entry.payload, TOPIC, replica.log.spec.partition)
                row += [(record.offset, bytes(record.value or b"")) for record in records]
        return row

    def _replicas(self, broker_id: int) -> list[AssignedReplica[Any]]:
        return [
            replica
            for replica in self.cluster.brokers[broker_id].replicas()
            if isinstance(replica, AssignedReplica)
            and replica.fault is None
            and replica.replica_id in replica.assignment.wanted
        ]

    def _by_partition(self) -> dict[Place, list[AssignedReplica[Any]]]:
        found: dict[Place, list[AssignedReplica[Any]]] = {}
        for broker_id in sorted(self.cluster.brokers):
            for replica in self._replicas(broker_id):
                found.setdefault(_name(replica), []).append(replica)
        return found

    def _all_equal(self) -> bool:
        """No replica is on its way, and each has applied as much as every other, and all that it has."""
        return self.nemesis.mover.has_arrived() and all(
            len({replica.node.applied for replica in replicas}) == 1
            and all(replica.node.applied == replica.node.last_index for replica in replicas)
            for replicas in self._by_partition().values()
        )

    def _check_replicas(self) -> None:
        for place, replicas in self._by_partition().items():
            first = replicas[0]
            for other in replicas[1:]:
                if other.node.last_crc != first.node.last_crc:
                    raise Violation(f"replicas of {place} hold different bytes")
                if other.machine != first.machine:
                    raise Violation(f"replicas of {place} are in different states")


def _place(partition: int) -> Place:
    return f"{TOPIC}/{partition}"


def _name(replica: AssignedReplica[Any]) -> Place:
    return f"{replica.log.spec.topic}/{replica.log.spec.partition}"
