"""Consumers of a group on a simulated cluster of production brokers, each a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from raftlog import aio
from raftlog.broker.group_replica import GroupReplica
from raftlog.client.coordinators import GROUPS_TOPIC
from raftlog.errors import RaftlogError
from raftlog.record.partitioner import murmur2
from raftlog.record.types import Record, TopicPartition
from raftlog.testing.sim_cluster import SimCluster

T = TypeVar("T")

TOPIC = "orders"
GROUP = "readers"
SECONDS_MAX = 120.0


class GroupWorld:
    """A cluster with a topic, a client of its own for the test, and readers.

    Args:
        partitions: of the topic.
        seed: of everything.
        brokers: how many.
    """

    def __init__(self, partitions: int = 4, *, seed: int = 1, brokers: int = 3, **options: Any) -> None:
        self.cluster = SimCluster(seed, brokers, **options)
        self.loop = self.cluster.loop
        self.cluster.start()
        self.readers: list[Reader] = []
        self.admin = self.log("admin")
        self.run(self.admin.create_topic(TOPIC, partitions))

    def __enter__(self) -> GroupWorld:
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.close()

    def log(self, node: str) -> aio.Log:
        """A client in a process of its own."""
        return aio.Log(self.cluster.bootstrap, lambda _: self.cluster.client(node))

    def run(self, work: Coroutine[Any, Any, T], node: str = "admin") -> T:
        """Run a coroutine in a process and return its result."""
        return self.cluster.run(work, node=node, seconds=SECONDS_MAX)

    def until(self, condition: Callable[[], bool], seconds: float = SECONDS_MAX) -> float:
        """Let time pass until something is so; returns how much that took."""
        began = self.loop.time()
        self.loop.run_until(condition, seconds)
        return self.loop.time() - began

    def produce(self, start: int, end: int, *, partitions: Sequence[int] | None = None) -> None:
        """Write values start to end - 1, in turn to all partitions."""

        async def produce() -> None:
            count = len((await self.admin.describe_topic(TOPIC)).partitions)
            targets = range(count) if partitions is None else partitions
            async with self.admin.producer(linger_ms=1) as producer:
                for number in range(start, end):
                    await producer.send(TOPIC, b"%d" % number, partition=targets[number % len(targets)])

        self.run(produce())

    def reader(self, name: str, **settings: Any) -> Reader:
        """A member that polls all the time."""
        reader = Reader(self, name, **settings)
        self.readers.append(reader)
        return reader

    def owners(self) -> dict[TopicPartition, list[str]]:
        """Who reads what, of those that live."""
        found: dict[TopicPartition, list[str]] = {}
        for reader in self.readers:
            for name in reader.assigned:
                found.setdefault(name, []).append(reader.name)
        return found

    def is_shared(self, partitions: int = 4) -> bool:
        """Whether every partition has one reader, all about equally many."""
        owners = self.owners()
        sizes = [len(each.assigned) for each in self.readers]
        return (
            len(owners) == partitions
            and all(len(each) == 1 for each in owners.values())
            and max(sizes) - min(sizes) <= 1
        )

    def is_shared_by_one(self) -> bool:
        """Whether the first reader has something."""
        return bool(self.readers[0].assigned)

    # -- the coordinator -------------------------------------------------------------------------------------

    def replicas(self, group: str = GROUP) -> dict[int, GroupReplica]:
        """Broker id -> its replica of the group's partition."""
        found: dict[int, GroupReplica] = {}
        for broker_id, broker in self.cluster.brokers.items():
            topic = broker.metadata.image.topics.get(GROUPS_TOPIC)
            if topic is None:
                continue
            index = (murmur2(group.encode()) & 0x7FFFFFFF) % len(topic.partitions)
            replica = broker.hosting.by_place.get((topic.topic_id, index))
            if isinstance(replica, GroupReplica):
                found[broker_id] = replica
        return found

    def coordinator(self, group: str = GROUP) -> int:
        """The broker that coordinates the group."""
        self.until(lambda: any(each.staged is not None for each in self.replicas(group).values()))
        return next(key for key, each in self.replicas(group).items() if each.staged is not None)

    def members(self, group: str = GROUP) -> list[str]:
        """Ids of the group's members, as its coordinator has them."""
        machine = self.replicas(group)[self.coordinator(group)].machine
        return sorted(machine.groups[group].members) if group in machine.groups else []

    def offsets(self, group: str = GROUP) -> dict[int, int]:
        """Partition -> committed offset, as the coordinator has them."""
        machine = self.replicas(group)[self.coordinator(group)].machine
        return {index: each.offset for (_, index), each in machine.offsets.get(group, {}).items()}


class Reader:
    """A process with a consumer that polls, until it is told otherwise.

    Args:
        commit: after every poll that brought something.
    """

    def __init__(self, world: GroupWorld, name: str, *, commit: bool = True, **settings: Any) -> None:
        self.world = world
        self.name = name
        self.records: list[Record] = []
        self.calls: list[tuple[str, list[TopicPartition]]] = []
        self.errors: list[Exception] = []
        self.assigned: set[TopicPartition] = set()
        self.work: Callable[[Reader, list[Record]], Coroutine[Any, Any, None]] | None = None
        """What is done with what a poll brings, before the commit."""
        self.gate = asyncio.Event()
        """Closed, the user's code stands still."""
        self.gate.set()
        self.consumer: aio.Consumer
        self._commit = commit
        self._log = world.log(name)
        callbacks = {each: self._note(each) for each in ("on_assigned", "on_revoked", "on_lost")}
        self._settings = {"group": GROUP, **callbacks, **settings}
        self._stopping = False
        self.task = world.loop.run_as(name, self._run())

    def _note(self, name: str) -> Callable[[list[TopicPartition]], None]:
        def note(partitions: list[TopicPartition]) -> None:
            self.calls.append((name, partitions))
            if name == "on_assigned":
                self.assigned.update(partitions)
            else:
                self.assigned.difference_update(partitions)

        return note

    async def _run(self) -> None:
        async with self._log.consumer(TOPIC, **self._settings) as self.consumer:
            while not self._stopping:
                await self.gate.wait()
                try:
                    records = await self.consumer.poll(timeout=0.5)
                    self.records += records
                    await self.gate.wait()
                    if records and self._commit:
                        await self.consumer.commit()
                except RaftlogError as error:
                    self.errors.append(error)

    def stop(self) -> None:
        """Close in good order, after the poll that is under way."""
        self._stopping = True
        self.world.until(self.task.done)
        self.task.result()

    def kill(self) -> None:
        """SIGKILL."""
        self.world.loop.kill(self.name)
        self.world.readers.remove(self)

    @property
    def values(self) -> list[int]:
        """What was read, in order."""
        return [int(each.value) for each in self.records]

    def called(self, name: str) -> list[TopicPartition]:
        """The partitions that a callback was called with, all calls together."""
        return [each for kind, partitions in self.calls if kind == name for each in partitions]
