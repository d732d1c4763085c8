"""A simulated cluster of production brokers, with producers in transactions, for the client's tests."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from raftlog import aio
from raftlog.broker.internal_topics import TRANSACTIONS_TOPIC, partition_of
from raftlog.broker.transaction_replica import TransactionReplica
from raftlog.testing.sim_cluster import SimCluster

T = TypeVar("T")

TOPIC = "orders"
OTHER = "payments"
TXN = "transfer"
TIMEOUT_S = 120.0


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
                await log.create_topic(TOPIC, partitions=3)
                await log.create_topic(OTHER)

        self.run(create())

    def __enter__(self) -> TransactionWorld:
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.close()

    def log(self, node: str = "app") -> aio.Log:
        """A Log of a simulated process."""
        return aio.Log(self.cluster.bootstrap, self.cluster.seams(node, node))

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

    # -- the coordinator -------------------------------------------------------------------------------------

    def coordinator(self, name: str = TXN) -> int:
        """Wait until a broker coordinates that transactional id; returns its id."""

        def serving() -> list[int]:
            return [
                broker_id
                for broker_id, broker in self.cluster.brokers.items()
                for replica in broker.hosting.by_place.values()
                if isinstance(replica, TransactionReplica)
                and replica.log.spec.partition == partition_of(name, self.cluster.config.internal_partitions)
                and replica.staged is not None
            ]

        assert TRANSACTIONS_TOPIC
        self.loop.run_until(lambda: bool(serving()), TIMEOUT_S)
        return serving()[0]
