"""A workload for simulated clusters: producers with unique values, a nemesis, and the accounts at the end.

The accounts hold every promise of ``acks="all"`` against what is in the log in the end: an acknowledged value stands
exactly once, at its offset; a value whose send certainly failed stands nowhere; none stands twice; each producer's
values stand in the order sent; and all replicas hold the same bytes.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from raftlog.broker.partition import PartitionReplica
from raftlog.client.admin import Admin
from raftlog.client.cluster import ClusterClient
from raftlog.client.consumer import ConsumerCore
from raftlog.client.delivery import Delivery
from raftlog.client.producer import ProducerCore
from raftlog.config import ConsumerConfig, ProducerConfig
from raftlog.errors import RaftlogError
from raftlog.record.types import Record
from raftlog.testing.sim_cluster import SimCluster, broker_name

TOPIC: Final = "work"
QUIET_SECONDS: Final = 120.0


@dataclass
class History:
    """What clients were told."""

    acknowledged: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    """value -> (partition, offset)."""
    failed: set[bytes] = field(default_factory=set)
    unknown: set[bytes] = field(default_factory=set)
    sent: dict[tuple[str, int], list[bytes]] = field(default_factory=dict)
    """(producer, partition) -> values in the order sent."""
    polled: dict[tuple[str, int], list[tuple[int, bytes]]] = field(default_factory=dict)
    """(consumer, partition) -> (offset, value) in the order polled."""
    faults: Counter[str] = field(default_factory=Counter)


class Violation(AssertionError):
    """A promise was broken."""


class Workload:
    """One run.

    Args:
        seed: of everything.
        brokers: of the cluster.
        partitions: of the topic.
        producers: how many.
        values: each producer sends this many to each partition.
    """

    def __init__(
        self, seed: int, *, brokers: int = 3, partitions: int = 2, producers: int = 2, values: int = 250
    ) -> None:
        self.cluster = SimCluster(seed, brokers)
        self.history = History()
        self.random = random.Random(self.cluster.random.getrandbits(64))
        self._partitions = partitions
        self._producers = producers
        self._values = values
        self._down: set[int] = set()
        self._cut: set[int] = set()

    # -- the run ---------------------------------------------------------------------------------------------

    def run(self, faults: int = 12) -> History:
        """Start, create the topic, work under ``faults`` faults, heal, and hold the accounts.

        Raises:
            Violation: a promise was broken.
            SimulationError: it did not come to an end.
        """
        cluster, loop = self.cluster, self.cluster.loop
        cluster.start()
        replication = min(3, len(cluster.disks))
        cluster.run(self._create(replication), node="admin")
        tasks = [
            loop.run_as(f"client-{number}", self._produce(f"client-{number}"))
            for number in range(self._producers)
        ]
        reader = loop.run_as("reader", self._consume("reader"))
        for _ in range(faults):
            loop.run_for(self.random.uniform(0.05, 2.5))
            self._fault()
        self._heal()
        loop.run_until(lambda: all(task.done() for task in tasks), QUIET_SECONDS)
        for task in tasks:
            task.result()
        final = cluster.run(self._read_all(), node="auditor", seconds=QUIET_SECONDS)
        loop.run_until(self._all_equal, QUIET_SECONDS)
        loop.kill("reader")
        assert not reader.done() or reader.exception() is None, reader.exception()
        self._check(final)
        self.cluster.close()
        return self.history

    def _client(self, name: str) -> ClusterClient:
        return ClusterClient(self.cluster.seams(name, name), self.cluster.bootstrap, name)

    async def _create(self, replication: int) -> None:
        client = self._client("admin")
        await Admin(client).create_topic(TOPIC, self._partitions, replication, None, False, 60.0)
        await client.close()

    # -- clients ---------------------------------------------------------------------------------------------

    async def _produce(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        client = self._client(name)
        config = ProducerConfig(
            linger_ms=self.random.choice([0, 1, 20]),
            delivery_timeout_ms=self.random.choice([3_000, 30_000]),
            request_timeout_ms=2_000,
            compression=self.random.choice(["none", "lz4"]),
        )
        producer = ProducerCore(client, config, loop, loop.call_soon)
        await producer.load_topic(TOPIC, 60.0)
        pending = []
        for number in range(self._values):
            for partition in range(self._partitions):
                value = b"%s/%d/%d" % (name.encode(), partition, number)
                if self.random.random() < 0.03:
                    value += b"x" * self.random.choice([100, 5_000, 20_000])
                delivery = producer.send(TOPIC, value, None, (), partition, None)
                assert isinstance(delivery, Delivery), delivery
                self.history.sent.setdefault((name, partition), []).append(value)
                pending.append(loop.create_task(self._note(value, delivery)))
            if self.random.random() < 0.4:
                await asyncio.sleep(self.random.uniform(0, 0.2))
        await asyncio.gather(*pending)
        producer.sender.stop()
        await client.close()

    async def _note(self, value: bytes, delivery: Awaitable[Any]) -> None:
        history = self.history
        try:
            metadata = await delivery
        except RaftlogError as error:
            (history.unknown if error.indeterminate else history.failed).add(value)
        else:
            history.acknowledged[value] = metadata.partition, metadata.offset

    async def _consume(self, name: str) -> None:
        """Read along for ever."""
        loop = asyncio.get_running_loop()
        client = self._client(name)
        consumer = ConsumerCore(client, ConsumerConfig(), (TOPIC,), loop, loop.call_soon)
        await consumer.start()
        while True:
            for record in consumer.take(100):
                row = self.history.polled.setdefault((name, record.partition), [])
                row.append((record.offset, bytes(record.value or b"")))
            await asyncio.sleep(0.05)

    async def _read_all(self) -> list[Record]:
        """Everything, from the beginning, with a fresh client."""
        loop = asyncio.get_running_loop()
        client = self._client("auditor")
        consumer = ConsumerCore(client, ConsumerConfig(), (TOPIC,), loop, loop.call_soon)
        await consumer.start()
        consumer.limit(await consumer.ends())
        records: list[Record] = []
        while not consumer.at_limits():
            records += consumer.take(1000)
            await asyncio.sleep(0.01)
        await consumer.close()
        await client.close()
        return records

    # -- the nemesis -----------------------------------------------------------------------------------------

    def _fault(self) -> None:
        """One fault, or the end of one. A majority is always left alive and connected in the end."""
        cluster = self.cluster
        up = [broker for broker in cluster.brokers if broker not in self._cut]
        minority = (len(cluster.disks) - 1) // 2
        spare = minority - len(self._down) - len(self._cut)
        choices: list[tuple[str, Callable[[], None]]] = [("break", self._break)]
        if spare > 0 and up:
            victim = self.random.choice(up)
            choices += [
                ("kill", lambda: self._stop(victim, power=False)),
                ("power cut", lambda: self._stop(victim, power=True)),
                ("isolate", lambda: self._isolate(victim, both=True)),
                ("one way", lambda: self._isolate(victim, both=False)),
                ("stall", lambda: self._stall(victim)),
                ("pause", lambda: self._pause(victim)),
            ]
        if self._down or self._cut:
            choices += [("recover", self._recover)] * 3
        if spare == minority and self.random.random() < 0.15:
            choices = [("blackout", self._blackout)]
        name, fault = self.random.choice(choices)
        self.history.faults[name] += 1
        fault()

    def _break(self) -> None:
        names = [broker_name(broker) for broker in self.cluster.disks]
        a, b = self.random.sample(names, 2)
        self.cluster.network.break_connections(a, b)

    def _stop(self, broker: int, *, power: bool) -> None:
        self._down.add(broker)
        if power:
            self.cluster.cut_power(broker)
        else:
            self.cluster.kill_broker(broker)

    def _isolate(self, broker: int, *, both: bool) -> None:
        self._cut.add(broker)
        for other in self.cluster.disks:
            if other != broker:
                self.cluster.network.cut(broker_name(broker), broker_name(other), both=both)

    def _stall(self, broker: int) -> None:
        disk, seconds = self.cluster.disks[broker], self.random.uniform(0.1, 3.0)
        self.cluster.loop.call_soon(disk.stall, seconds)

    def _pause(self, broker: int) -> None:
        name = broker_name(broker)
        self.cluster.loop.pause(name)
        self.cluster.loop.run_for(self.random.uniform(0.1, 4.0))
        self.cluster.loop.resume(name)

    def _blackout(self) -> None:
        """All brokers lose power at once: only what was synced is left."""
        for broker in list(self.cluster.brokers):
            self._stop(broker, power=True)
        self.cluster.loop.run_for(0.1)
        for broker in list(self._down):
            self._start(broker)

    def _start(self, broker: int) -> None:
        self._down.discard(broker)
        self.cluster.start_broker(broker)

    def _recover(self) -> None:
        for broker in list(self._down):
            self._start(broker)
        for broker in list(self._cut):
            self._cut.discard(broker)
            self.cluster.network.heal(broker_name(broker))

    def _heal(self) -> None:
        self._recover()
        self.cluster.network.heal()

    # -- the accounts ----------------------------------------------------------------------------------------

    def _replicas(self) -> dict[int, list[PartitionReplica]]:
        found: dict[int, list[PartitionReplica]] = {}
        for broker in self.cluster.brokers.values():
            for replica in broker.replicas():
                if isinstance(replica, PartitionReplica):
                    found.setdefault(replica.log.spec.partition, []).append(replica)
        return found

    def _all_equal(self) -> bool:
        """Every replica has applied as much as every other, and their states are equal."""
        by_partition = self._replicas()
        return all(
            len({replica.node.applied for replica in replicas}) == 1
            and all(replica.node.applied == replica.node.last_index for replica in replicas)
            for replicas in by_partition.values()
        )

    def _check(self, final: list[Record]) -> None:
        history = self.history
        where: dict[bytes, tuple[int, int]] = {}
        for record in final:
            value = bytes(record.value or b"")
            if value in where:
                raise Violation(f"{value[:40]!r} stands at {where[value]} and at offset {record.offset}")
            where[value] = record.partition, record.offset
        for value, place in history.acknowledged.items():
            if where.get(value) != place:
                raise Violation(f"{value[:40]!r} was acknowledged at {place}, stands at {where.get(value)}")
        for value in history.failed & where.keys():
            raise Violation(f"{value[:40]!r} certainly failed and stands at {where[value]}")
        for (producer, partition), values in history.sent.items():
            offsets = [where[value][1] for value in values if value in where]
            if offsets != sorted(offsets):
                raise Violation(f"values of {producer} in partition {partition} are out of order")
        for (consumer, partition), row in history.polled.items():
            if [offset for offset, _ in row] != list(range(len(row))):
                raise Violation(f"{consumer} skipped or repeated offsets of partition {partition}")
            for offset, value in row:
                if where.get(value) != (partition, offset):
                    raise Violation(f"{consumer} polled {value[:40]!r} at {offset}: it is not there")
        self._check_replicas()

    def _check_replicas(self) -> None:
        for partition, replicas in self._replicas().items():
            first = replicas[0]
            for other in replicas[1:]:
                if other.node.last_crc != first.node.last_crc:
                    raise Violation(f"replicas of partition {partition} hold different bytes")
                if other.machine != first.machine:
                    raise Violation(f"replicas of partition {partition} are in different states")
