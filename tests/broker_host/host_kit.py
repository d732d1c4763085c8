"""What the tests of the host side share: a simulated cluster with a topic, and ways to fill it and look into
it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from raftlog.broker.partition import PartitionReplica
from raftlog.client.admin import Admin
from raftlog.client.cluster import ClusterClient
from raftlog.client.consumer import ConsumerCore
from raftlog.client.producer import ProducerCore
from raftlog.config import BrokerConfig, ConsumerConfig, ProducerConfig
from raftlog.record.types import Record, TopicPartition
from raftlog.testing.sim_cluster import SimCluster, broker_name

TOPIC = "t"
SEGMENT_BYTES = 64 << 10
VALUE_BYTES = 4000


class Host:
    """A cluster with one topic of one partition whose segments are small."""

    def __init__(
        self, seed: int = 1, brokers: int = 3, *, topic: Mapping[str, Any] | None = None, **broker: Any
    ) -> None:
        self.cluster = SimCluster(seed, brokers, config=BrokerConfig(**broker))
        self.loop = self.cluster.loop
        self.cluster.start()
        self._settings = {"segment_bytes": SEGMENT_BYTES, **(topic or {})}
        self.cluster.run(self._create(), node="admin")
        self.count = 0
        self.wait(lambda: self.leader_id is not None)

    def client(self, name: str) -> ClusterClient:
        return ClusterClient(self.cluster.seams(name, name), self.cluster.bootstrap, name)

    async def _create(self) -> None:
        client = self.client("admin")
        replication = min(3, len(self.cluster.disks))
        await Admin(client).create_topic(TOPIC, 1, replication, self._settings, False, 60.0)
        await client.close()

    async def replace_topic(self) -> None:
        """Delete the topic and create it anew, empty."""
        client = self.client("admin")
        await Admin(client).delete_topic(TOPIC, 60.0)
        await client.close()
        await self._create()

    # -- looking ---------------------------------------------------------------------------------------------

    def replica(self, broker_id: int) -> PartitionReplica:
        """The topic's replica on a broker that runs."""
        found = self.find(broker_id)
        assert found is not None
        return found

    def find(self, broker_id: int) -> PartitionReplica | None:
        broker = self.cluster.brokers.get(broker_id)
        for replica in broker.replicas() if broker is not None else ():
            if isinstance(replica, PartitionReplica):
                return replica
        return None

    @property
    def leader_id(self) -> int | None:
        """The broker whose replica serves."""
        for broker_id in self.cluster.brokers:
            replica = self.find(broker_id)
            if replica is not None and replica.staged is not None and replica.node.serving:
                return broker_id
        return None

    @property
    def leader(self) -> PartitionReplica:
        assert self.leader_id is not None
        return self.replica(self.leader_id)

    def followers(self) -> list[int]:
        """Brokers that run and do not lead."""
        return [broker_id for broker_id in self.cluster.brokers if broker_id != self.leader_id]

    def wait(self, condition: Any, seconds: float = 60.0) -> None:
        self.loop.run_until(condition, seconds)

    def is_equal(self) -> bool:
        """All replicas run, and hold and have applied the same."""
        found = [self.find(broker_id) for broker_id in self.cluster.disks]
        replicas = [replica for replica in found if replica is not None and replica.fault is None]
        if len(replicas) < len(self.cluster.disks):
            return False
        first = replicas[0]
        return all(
            replica.node.applied == replica.node.last_index == first.node.last_index
            and replica.node.last_crc == first.node.last_crc
            and replica.machine == first.machine
            for replica in replicas
        )

    # -- doing -----------------------------------------------------------------------------------------------

    def produce(self, count: int, *, size: int = VALUE_BYTES) -> None:
        """Acknowledged records, a batch each; the value begins with its number, counted from 0."""
        self.count += self.cluster.run(
            self._produce(count, size), node=f"producer-{self.count}", seconds=300.0
        )

    async def _produce(self, count: int, size: int) -> int:
        client = self.client(f"producer-{self.count}")
        producer = ProducerCore(
            client, ProducerConfig(linger_ms=0, compression="none"), self.loop, self.loop.call_soon
        )
        await producer.load_topic(TOPIC, 60.0)
        for number in range(self.count, self.count + count):
            value = b"%d:" % number
            sent = producer.send(TOPIC, value + b"x" * (size - len(value)), None, (), 0, None)
            assert (await sent).offset == number
        producer.sender.stop()
        await client.close()
        return count

    def consume(self, reset: str = "earliest", *, start: int | None = None) -> list[Record]:
        """All that a fresh consumer gets until the end of the log, from the offset ``start`` if given."""
        return self.cluster.run(self._consume(reset, start), node="consumer")

    async def _consume(self, reset: str, start: int | None) -> list[Record]:
        client = self.client("consumer")
        config = ConsumerConfig(auto_offset_reset=reset)
        consumer = ConsumerCore(client, config, (TOPIC,), self.loop, self.loop.call_soon)
        await consumer.start()
        if start is not None:
            consumer.seek(TopicPartition(TOPIC, 0), start)
        consumer.limit(await consumer.ends())
        records: list[Record] = []
        while not consumer.at_limits():
            records += consumer.take(1000)
            await asyncio.sleep(0.01)
        await consumer.close()
        await client.close()
        return records

    def compact(self, broker_id: int, keep: int = 1) -> None:
        """Drop all but the newest ``keep`` complete segments of a replica's log."""
        replica = self.replica(broker_id)
        broker = self.cluster.brokers[broker_id]
        node = broker_name(broker_id)
        spec = replica.log.spec
        # Retention says nothing of this: the watch need not object.
        self.cluster.watch.groups[spec.topic_id, spec.partition].starts.append(1 << 62)
        self.cluster.run(broker.store.flush(), node=node)
        before = replica.log.first_index
        self.cluster.run(replica.compact(replica.log.segments[-1 - keep].base_index - 1), node=node)
        assert replica.log.first_index > before

    def close(self) -> None:
        self.cluster.close()
