"""Whoever moves replicas between the brokers of a simulated cluster: production's controller as a process of
the simulation, others that interfere, and where it all stands."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

from raftlog.client.cluster import ClusterClient
from raftlog.client.connections import Bootstrap
from raftlog.controller.controller import IDLE_S, Controller, Surroundings
from raftlog.controller.reconcile import JoinBroker, Node, Policy, StartBroker
from raftlog.errors import RaftlogError
from raftlog.net.rpc_cluster import DrainRequest
from raftlog.state.image import Partition, Topic
from raftlog.state.metadata_commands import AlterPartition, TakeControl
from raftlog.testing.books import is_quorum
from raftlog.testing.sim_cluster import SimCluster, broker_name

if TYPE_CHECKING:
    from raftlog.broker.broker import Broker
    from raftlog.state.metadata import MetadataState

NO_TOPIC: Final = ()
CONTROLLER: Final = "controller"
RIVAL: Final = "rival"
_DRAIN_TIMEOUT_S: Final = 10.0


class Mover:
    """The controllers of a run, and those who interfere with them.

    Args:
        cluster: whose replicas move.
        policy: of the controllers.
        lost: brokers whose data are gone for good.
    """

    def __init__(self, cluster: SimCluster, policy: Policy, lost: set[int]) -> None:
        self.cluster = cluster
        self._policy = policy
        self._lost = lost
        self._governing: dict[str, asyncio.Task[None]] = {}
        self._controllers: dict[str, Controller] = {}
        self._draining: asyncio.Task[None] | None = None

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

    # -- controllers -----------------------------------------------------------------------------------------

    @property
    def is_governed(self) -> bool:
        """Whether a controller runs."""
        task = self._governing.get(CONTROLLER)
        return task is not None and not task.done()

    def govern(self, name: str = CONTROLLER) -> None:
        """Start a controller's process, unless that runs."""
        task = self._governing.get(name)
        if task is None or task.done():
            self._governing[name] = self.cluster.loop.run_as(name, self._govern(name))

    async def _govern(self, name: str) -> None:
        cluster = self.cluster
        seams = cluster.seams(name, name)
        client = ClusterClient(seams, cluster.bootstrap, name, self._refresh, role="controller")
        self._controllers[name] = controller = Controller(client, self, self._policy)
        await controller.run()

    async def _refresh(self) -> Bootstrap:
        return self.cluster.bootstrap

    def kill_controllers(self) -> None:
        """SIGKILL."""
        for name in list(self._governing):
            self.cluster.loop.kill(name)
            del self._governing[name]
            self._controllers.pop(name, None)

    @property
    def is_moving(self) -> bool:
        """Whether a move is under way."""
        return any(partition.leaving for topic in self.topics for partition in topic.partitions)

    # Their hands: the simulation looks after processes itself, as faults have it.

    async def look(self) -> Surroundings:
        """Every broker has a node of its own, which is down when the broker is."""
        names = {broker_name(broker_id): broker_id for broker_id in self.cluster.brokers}
        nodes = {name: Node(name, disks=frozenset({broker_id})) for name, broker_id in names.items()}
        return Surroundings(nodes, frozenset(names.values()), frozenset(self._lost))

    async def start(self, action: StartBroker) -> None:
        """No broker's process is down on a node that is up."""

    async def join(self, action: JoinBroker) -> None:
        """The nemesis decides when."""

    # -- interference ----------------------------------------------------------------------------------------

    def move(self, rng: random.Random, brokers: list[int], through: int) -> str:
        """Somebody takes control, wants a random partition on others of these brokers, as many as now, and is
        gone. Returns what is wanted.

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

    def drain(self, brokers: list[int], draining: bool) -> None:
        """Ask for brokers to be drained, or not to be; it may come to nothing."""
        if self._draining is None or self._draining.done():
            self._draining = self.cluster.loop.run_as("drainer", self._drain(brokers, draining))

    async def _drain(self, brokers: list[int], draining: bool) -> None:
        client = ClusterClient(self.cluster.seams("drainer", "drainer"), self.cluster.bootstrap, "drainer")
        try:
            request = DrainRequest(brokers, draining)
            await client.call_leader(client.metadata_view, request, timeout=_DRAIN_TIMEOUT_S)
        except RaftlogError as error:
            self.cluster.watch.note(f"nothing drains: {error}")
        await client.close()

    @property
    def drained(self) -> list[int]:
        """Brokers that drain."""
        image = self.image
        known = {} if image is None else image.brokers
        return sorted(broker.broker_id for broker in known.values() if broker.draining)

    def join_broker(self) -> int | None:
        """A new broker on an empty disk; None: it cannot join now."""
        try:
            return self.cluster.join_broker()
        except RaftlogError as error:
            self.cluster.watch.note(f"no broker can join: {error}")
            return None

    # -- where it all stands ---------------------------------------------------------------------------------

    def forgotten(self) -> list[int]:
        """Brokers that the metadata know no more, of those that had been in them."""
        image = self.image
        if image is None:
            return []
        return sorted(
            broker_id
            for broker_id in self.cluster.disks
            if broker_id in image.removed and broker_id not in image.brokers and self._has_left(broker_id)
        )

    def _has_left(self, broker_id: int) -> bool:
        """Whether no configuration that may be in force has a replica of that broker."""
        return not any(
            member.broker_id == broker_id and any(member.replica_id in conf.members for conf in confs)
            for group in self.cluster.watch.groups.values()
            for confs in [group.confs_in_force()]
            for member in group.members.values()
        )

    def has_arrived(self) -> bool:
        """Whether all replicas run and lead as wanted, and the controller has nothing to do."""
        if self.drained:
            self.drain(self.drained, False)
            return False
        controller = self._controllers.get(CONTROLLER)
        image = self.image
        if self._lost or image is None or controller is None or controller.rests_since is None:
            return False
        if controller.seen != image.applied_index:
            return False
        return self.cluster.loop.time() - controller.rests_since > IDLE_S and all(
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
