"""A simulated cluster of production brokers, with producers in transactions, for the client's tests."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Self, TypeVar

import pytest

from raftlog import aio
from raftlog.broker.internal_topics import partition_of
from raftlog.broker.transaction_replica import TransactionReplica
from raftlog.client.cluster import ClusterClient
from raftlog.state.transactions import Phase
from raftlog.testing.sim_cluster import SimCluster

T = TypeVar("T")

TOPIC = "orders"
OTHER = "payments"
TXN = "transfer"
PARTITIONS = 3
TIMEOUT_S = 120.0


async def transact(producer: aio.Producer, number: int) -> None:
    """A transaction that writes the number to every partition of the topic."""
    async with producer.transaction() as txn:
        for partition in range(PARTITIONS):
            await txn.send(TOPIC, b"%d" % number, partition=partition)


class TransactionWorld:
    """Three simulated brokers with a topic of three partitions and one of one.

    Args:
        seed: of the simulation; ``options``: of SimCluster.
    """

    def __init__(self, seed: int = 1, brokers: int = 3, **options: Any) -> None:
        self.cluster = SimCluster(seed, brokers, **options)
        self.loop = self.cluster.loop
        self.cluster.start()
        self._logs = 0

        async def create() -> None:
            async with self.log() as log:
                await log.create_topic(TOPIC, partitions=PARTITIONS)
                await log.create_topic(OTHER)

        self.run(create())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.close()

    def log(self, node: str = "app") -> aio.Log:
        """A Log of a simulated process."""
        return aio.Log(self.cluster.bootstrap, lambda _: self.cluster.client(node))

    def run(self, work: Coroutine[Any, Any, T], node: str = "app", seconds: float = TIMEOUT_S) -> T:
        """Run a coroutine as a process of the simulation."""
        return self.cluster.run(work, node=node, seconds=seconds)

    def read(self, topic: str = TOPIC, isolation: str = "read_committed") -> list[bytes]:
        """Every value of a topic, partition after partition."""

        async def work() -> list[bytes]:
            async with self.log("reader") as log, log.consumer(topic, isolation=isolation) as consumer:
                records = [record async for record in consumer.records(until="end")]
            return [
                record.value or b""
                for record in sorted(records, key=lambda each: (each.partition, each.offset))
            ]

        return self.run(work(), node="reader")

    async def commit_once(self) -> None:
        """Transaction 0: afterwards all that is made on first use is there."""
        async with self.log() as log, log.producer(transactional_id=TXN) as producer:
            await transact(producer, 0)

    async def produce(self, topic: str, count: int) -> None:
        """Values 0 to count - 1, without a transaction."""
        async with self.log() as log, log.producer() as producer:
            for number in range(count):
                await producer.send(topic, b"%d" % number, partition=0)

    # -- the coordinator -------------------------------------------------------------------------------------

    def coordinator(self, name: str = TXN) -> int:
        """Wait until a broker coordinates that transactional id; returns its id."""
        self.loop.run_until(lambda: self._replica(name) is not None, TIMEOUT_S)
        return self._found(name)[0]

    def phase(self, name: str = TXN) -> Phase:
        """Of its transaction, as its coordinator has it."""
        return self._found(name)[1].machine.transactions[name].phase

    def until_scan(self, name: str = TXN) -> float:
        """Seconds until the coordinator aborts what is overdue in 5 seconds from now."""
        left = self._found(name)[1].timers["scan"].when() - self.loop.time()
        return left if left > 5.0 else left + 10.0

    def _found(self, name: str) -> tuple[int, TransactionReplica]:
        found = self._replica(name)
        assert found is not None, f"nobody coordinates {name}"
        return found

    def _replica(self, name: str) -> tuple[int, TransactionReplica] | None:
        index = partition_of(name, self.cluster.config.internal_partitions)
        for broker_id, broker in self.cluster.brokers.items():
            for replica in broker.hosting.by_place.values():
                if not isinstance(replica, TransactionReplica) or replica.staged is None:
                    continue
                if replica.log.spec.partition == index:
                    return broker_id, replica
        return None


def spy_on_calls(world: TransactionWorld, patch: pytest.MonkeyPatch) -> list[Any]:
    """Everything that clients ask leaders, in order."""
    asked: list[Any] = []
    original = ClusterClient.call_leader

    async def call_leader(self: ClusterClient, view: Any, request: Any, *args: Any, **options: Any) -> Any:
        asked.append(request)
        return await original(self, view, request, *args, **options)

    patch.setattr(ClusterClient, "call_leader", call_leader)
    return asked
