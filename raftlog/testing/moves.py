"""Whoever moves replicas between the brokers of a simulated cluster, and where these moves stand."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from raftlog.errors import RaftlogError
from raftlog.state.image import Partition, Topic
from raftlog.state.metadata_commands import AlterPartition, TakeControl
from raftlog.testing.books import is_quorum
from raftlog.testing.sim_cluster import SimCluster, broker_name

if TYPE_CHECKING:
    from raftlog.broker.broker import Broker
    from raftlog.state.metadata import MetadataState

NO_TOPIC: Final = ()


class Mover:
    """Asks the metadata group for other holders, as a controller does.

    Args:
        cluster: whose replicas move.
    """

    def __init__(self, cluster: SimCluster) -> None:
        self.cluster = cluster

    @property
    def image(self) -> MetadataState | None:
        """The newest metadata that a running broker has."""
        images = [broker.metadata.image for broker in self.cluster.brokers.values()]
        return max(images, key=lambda image: image.applied_index, default=None)

    @property
    def topics(self) -> tuple[Topic, ...]:
        """What there is to move."""
        image = self.image
        return NO_TOPIC if image is None else tuple(image.topics.values())

    def move(self, rng: random.Random, brokers: list[int], through: int) -> str:
        """Want a random partition on others of these brokers, as many as now. Returns what is wanted.

        Args:
            rng: decides.
            brokers: that may hold it.
            through: the broker that is asked; it may not be able to.
        """
        topic = rng.choice(self.topics)
        index = rng.randrange(len(topic.partitions))
        partition = topic.partitions[index]
        holders = rng.sample(brokers, min(len(partition.replicas), len(brokers)))
        here = {broker_id: replica_id for replica_id, broker_id in partition.members}
        replicas = [(broker_id, here.get(broker_id, 0)) for broker_id in holders]
        broker = self.cluster.brokers[through]
        self.cluster.loop.run_as(broker_name(through), self._alter(broker, topic.topic_id, index, replicas))
        return f"{topic.name}/{index} shall be on brokers {sorted(holders)}"

    async def _alter(
        self, broker: Broker, topic_id: bytes, index: int, replicas: list[tuple[int, int]]
    ) -> None:
        try:
            epoch = await broker.metadata.call(TakeControl())
            await broker.metadata.call(AlterPartition(epoch, topic_id, index, replicas))
        except RaftlogError as error:  # no quorum, or somebody else has moved it meanwhile
            self.cluster.watch.note(f"nothing moves: {error}")

    def has_arrived(self, away: set[int]) -> bool:
        """Whether nothing is on its way, but for partitions that brokers ``away`` hold or should hold."""
        for topic in self.topics:
            for index, partition in enumerate(topic.partitions):
                hosts = {broker_id for _, broker_id in partition.members}
                if not hosts & away and not self._is_there(topic, index, partition):
                    return False
        return True

    def _is_there(self, topic: Topic, index: int, partition: Partition) -> bool:
        """Whether exactly those that are wanted run."""
        running = {
            replica.replica_id
            for broker in self.cluster.brokers.values()
            for replica in broker.replicas()
            if (replica.log.spec.topic_id, replica.log.spec.partition) == (topic.topic_id, index)
        }
        return not partition.leaving and running == set(partition.wanted)

    def is_quorum(self, brokers: set[int]) -> bool:
        """Whether every group can go on with these brokers, in each configuration that may be in force."""
        for group in self.cluster.watch.groups.values():
            alive = [each.replica_id for each in group.members.values() if each.broker_id in brokers]
            if not all(is_quorum(conf, alive) for conf in group.confs_in_force()):
                return False
        return True
