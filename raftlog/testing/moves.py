"""Whoever moves replicas between the brokers of a simulated cluster, and where these moves stand."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

from raftlog.controller.replacing import carry_out
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
        self.replacements: dict[int, int] = {}
        """Broker that is lost -> the new one in its place, until the lost one is forgotten."""
        self._tasks: dict[int, asyncio.Task[None]] = {}

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

    # -- lost brokers ----------------------------------------------------------------------------------------

    def join(self) -> int | None:
        """A new broker on an empty disk; None: it cannot join now."""
        try:
            return self.cluster.join_broker()
        except RaftlogError as error:
            self.cluster.watch.note(f"no broker can join: {error}")
            return None

    @property
    def is_stuck(self) -> bool:
        """Whether a replacement is done, or whoever carried it out has died."""
        return any(not self._is_under_way(old) for old in self.replacements)

    def _is_under_way(self, old: int) -> bool:
        task = self._tasks.get(old)
        return task is not None and not task.done() and task.get_name() in self._drivers()

    def _drivers(self) -> set[str]:
        """Names of tasks whose broker still is the same process."""
        return {_driver(broker) for broker in self.cluster.brokers.values()}

    def replaced(self) -> list[int]:
        """Go on with replacing the lost. Returns those that are forgotten now."""
        done = []
        for old in sorted(self.replacements):
            image = self.image
            if image is not None and old not in image.brokers and self._has_left(old):
                del self.replacements[old]
                done.append(old)
            elif not self._is_under_way(old):
                self._carry_on(old)
        return done

    def _has_left(self, broker_id: int) -> bool:
        """Whether no configuration that may be in force has a replica of that broker."""
        return not any(
            member.broker_id == broker_id and any(member.replica_id in conf.members for conf in confs)
            for group in self.cluster.watch.groups.values()
            for confs in [group.confs_in_force()]
            for member in group.members.values()
        )

    def _carry_on(self, old: int) -> None:
        if self.cluster.brokers:
            broker_id, broker = next(iter(sorted(self.cluster.brokers.items())))
            work = self._carry_out(broker, old, self.replacements[old])
            self._tasks[old] = self.cluster.loop.run_as(broker_name(broker_id), work)
            self._tasks[old].set_name(_driver(broker))

    async def _carry_out(self, broker: Broker, old: int, new: int) -> None:
        try:
            await carry_out(broker.metadata.call, lambda: broker.metadata.image, old, new)
        except RaftlogError as error:  # another controller has taken over: go on after it
            self.cluster.watch.note(f"broker {old} is not replaced now: {error}")

    # -- where it all stands ---------------------------------------------------------------------------------

    def has_arrived(self) -> bool:
        """Whether nobody is being replaced, and all replicas that are wanted run and lead as wanted."""
        return not self.replacements and all(
            self._is_there(topic, index, partition)
            for topic in self.topics
            for index, partition in enumerate(topic.partitions)
        )

    def _is_there(self, topic: Topic, index: int, partition: Partition) -> bool:
        """Whether exactly those that are wanted run, and the preferred one leads."""
        running = {
            replica.replica_id: replica
            for broker in self.cluster.brokers.values()
            for replica in broker.replicas()
            if (replica.log.spec.topic_id, replica.log.spec.partition) == (topic.topic_id, index)
        }
        is_there = not partition.leaving and running.keys() == set(partition.wanted)
        return is_there and running[partition.wanted[0]].staged is not None

    def is_quorum(self, brokers: set[int]) -> bool:
        """Whether every group can go on with these brokers, in each configuration that may be in force."""
        for group in self.cluster.watch.groups.values():
            alive = [each.replica_id for each in group.members.values() if each.broker_id in brokers]
            if not all(is_quorum(conf, alive) for conf in group.confs_in_force()):
                return False
        return True


def _driver(broker: Broker) -> str:
    """Name of a task that this run of a broker carries out."""
    return f"replacing through {broker.broker_id}/{broker.identity.incarnation}"
