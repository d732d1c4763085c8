"""Which replicas run on a broker: it makes and drops them until they are those that the metadata names.

The image is followed, never anticipated: what it wants here is created (in one synced step for all), what is
on the disk is opened, and what it neither wants nor has leaving is deleted. A replica of which the disk has
nothing left cannot come back under its id, for it has forgotten its vote: another one is asked for in its
place.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from raftlog.broker.assigned import AssignedReplica
from raftlog.broker.coordinator_replica import CoordinatorReplica
from raftlog.broker.group_replica import GroupReplica
from raftlog.broker.internal_topics import GROUPS_TOPIC, TRANSACTIONS_TOPIC
from raftlog.broker.partition import PartitionReplica
from raftlog.broker.replica import Replica
from raftlog.broker.retention import Retention
from raftlog.broker.transaction_replica import TransactionReplica
from raftlog.config import TopicConfig
from raftlog.errors import ConfigError, DamagedData, IncompatibleVersion, RaftlogError, UnknownReplica
from raftlog.raft.types import ConfState
from raftlog.state.command import UnknownToRelease
from raftlog.state.image import Partition, Topic
from raftlog.state.metadata_commands import Command, CompletePartition, ReplaceReplica
from raftlog.storage.replica_log import ReplicaLog
from raftlog.storage.spec import ReplicaSpec

if TYPE_CHECKING:
    from raftlog.broker.broker import Broker

logger = logging.getLogger("raftlog.broker")

COORDINATORS: Final[dict[str, type[CoordinatorReplica[Any]]]] = {
    GROUPS_TOPIC: GroupReplica,
    TRANSACTIONS_TOPIC: TransactionReplica,
}
"""Internal topic -> what its replicas are."""
_AGAIN_S: Final = 1.0

Assigned: TypeAlias = dict[int, tuple[Topic, int]]
"""Replica id -> (topic, partition)."""


def replica_spec(topic: Topic, index: int, replica_id: int, settings: TopicConfig) -> ReplicaSpec:
    """What a replica of a partition is, wherever it is made."""
    return ReplicaSpec(
        replica_id=replica_id,
        topic=topic.name,
        topic_id=topic.topic_id,
        partition=index,
        conf=ConfState(voters=topic.partitions[index].founders),
        segment_bytes=settings.segment_bytes,
        internal=topic.internal,
        flush_interval_ms=settings.flush_interval_ms if settings.flush == "interval" else 0,
    )


class Hosting:
    """The replicas of one broker.

    Args:
        broker: whose.

    Attributes:
        by_id: every replica that runs here, the metadata group's included.
        by_place: those of partitions by (topic id, partition).
        halted: replicas that do not run, for their logs hold what only a newer release knows.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._changed = asyncio.Event()
        self._asked: set[Command] = set()
        self.by_id: dict[int, Replica[Any]] = {}
        self.halted: dict[int, IncompatibleVersion] = {}
        self.by_place: dict[tuple[bytes, int], AssignedReplica[Any]] = {}

    def image_changed(self) -> None:
        """The metadata has changed: look at it soon."""
        self._changed.set()

    async def follow(self) -> None:
        """Follow the metadata, for ever."""
        broker = self._broker
        while True:
            await self._changed.wait()
            self._changed.clear()
            if broker.metadata.image.applied_index < broker.store.metadata_index:
                continue  # it is read again after a start, and may name replicas that were removed by its end
            broker.follow_removals()
            assigned = self._assigned()
            try:
                await self._drop(assigned)
                await self._create(assigned)
                await self._open_all(assigned)
            except RaftlogError as error:
                logger.warning("broker %d: cannot follow the metadata now: %s", broker.broker_id, error)
                await asyncio.sleep(_AGAIN_S)
                self._changed.set()
            self._tell(assigned)
            for replica in self.by_place.values():
                replica.metadata_changed()

    def _assigned(self) -> Assigned:
        """Replica id -> (topic, partition) of what should be here."""
        broker = self._broker
        return {
            replica_id: (topic, partition)
            for topic, partition, replica_id in broker.metadata.image.replicas_on(broker.broker_id)
        }

    async def _drop(self, assigned: Assigned) -> None:
        """Remove replicas whose creation this image knows of and that it does not assign here (any more)."""
        store = self._broker.store
        known_below = self._broker.metadata.image.next_replica_id
        own = self._broker.metadata.replica.replica_id
        for replica_id in [*store.logs, *store.out_of_service]:
            if replica_id in assigned or replica_id == own or replica_id >= known_below:
                continue
            replica = self.by_id.pop(replica_id, None)
            if isinstance(replica, AssignedReplica):
                spec = replica.log.spec
                if self.by_place.get((spec.topic_id, spec.partition)) is replica:
                    del self.by_place[spec.topic_id, spec.partition]
                replica.retire(UnknownReplica(f"{replica.name} is not on this broker any more"))
            self.halted.pop(replica_id, None)
            await store.remove(replica_id, self._broker.metadata.image.applied_index)

    async def _create(self, assigned: Assigned) -> None:
        store = self._broker.store
        specs = []
        for replica_id, (topic, index) in assigned.items():
            if replica_id in store.logs or replica_id in store.out_of_service:
                continue
            try:
                settings = TopicConfig.model_validate(topic.config)
            except ConfigError as error:
                self._complain(replica_id, error)
                continue
            specs.append(replica_spec(topic, index, replica_id, settings))
        if specs:
            await store.create_many(specs)

    async def open(self) -> None:
        """Bring to life what is on the disk and in the image."""
        await self._open_all(self._assigned())

    async def _open_all(self, assigned: Assigned) -> None:
        """The same, and tell those that run who belongs to their groups."""
        broker = self._broker
        for replica_id, (topic, index) in assigned.items():
            partition = topic.partitions[index]
            known = self.by_id.get(replica_id)
            if isinstance(known, AssignedReplica):
                if known.assignment is not partition and known.assign(partition):
                    broker.pulse.rouse(known)
            elif replica_id in broker.store.logs and replica_id not in self.halted:
                try:
                    await self._open(replica_id, topic, index, partition)
                except UnknownToRelease as error:
                    logger.error(
                        "broker %d: replica %d needs a newer release: %s", broker.broker_id, replica_id, error
                    )
                    self.halted[replica_id] = IncompatibleVersion(f"needs a newer release: {error}")
                except (DamagedData, ConfigError) as error:
                    self._complain(replica_id, error)

    def _complain(self, replica_id: int, error: RaftlogError) -> None:
        """One replica has to wait: until it is repaired, or this broker runs a release that knows the topic's
        settings."""
        logger.warning("broker %d: cannot have replica %d: %s", self._broker.broker_id, replica_id, error)

    async def _open(self, replica_id: int, topic: Topic, index: int, partition: Partition) -> None:
        broker = self._broker
        log = broker.store.logs[replica_id]
        replica: AssignedReplica[Any]
        coordinator = COORDINATORS.get(topic.name) if topic.internal else None
        if coordinator is not None:
            replica = await coordinator.open(broker, log, partition, self._complete)
        else:
            replica = await self._open_partition(log, topic, index, partition)
        self.by_id[replica_id] = replica
        if replica_id in partition.wanted or (topic.topic_id, index) not in self.by_place:
            self.by_place[topic.topic_id, index] = replica
        replica.tick(broker.now_ms())
        broker.pulse.watch(replica)

    async def _open_partition(
        self, log: ReplicaLog, topic: Topic, index: int, partition: Partition
    ) -> PartitionReplica:
        broker = self._broker
        settings = TopicConfig.model_validate(topic.config)
        if log.amnesiac and settings.unclean_leader_election:
            logger.warning(
                "broker %d: %s/%d may lack its last acknowledged records, and goes on all the same "
                "(unclean_leader_election)",
                broker.broker_id,
                topic.name,
                index,
            )
            await log.cured()
        return await PartitionReplica.open(
            broker,
            log,
            partition,
            batch_bytes_max=settings.max_message_bytes,
            retention=Retention.of(settings),
            complete=self._complete,
        )

    # -- what the metadata is told ---------------------------------------------------------------------------

    def _complete(self, replica: AssignedReplica[Any]) -> None:
        """The group's configuration is what this version of the assignment wants."""
        spec = replica.log.spec
        self._ask(CompletePartition(spec.topic_id, spec.partition, replica.assignment.version))

    def _tell(self, assigned: Assigned) -> None:
        """Ask for other replicas in the place of those that are lost here, or damaged beyond repair."""
        lost = self._broker.store.lost.keys() | self._broker.repairs.beyond_help
        for replica_id in sorted(assigned.keys() & lost):
            topic, index = assigned[replica_id]
            partition = topic.partitions[index]
            if replica_id in partition.wanted:
                self.replace(topic.topic_id, index, replica_id)

    def replace(self, topic_id: bytes, partition: int, replica_id: int) -> None:
        """Ask for another replica on this broker in the place of one that is lost for good."""
        self._ask(ReplaceReplica(topic_id, partition, replica_id))

    def _ask(self, command: Command) -> None:
        """Have a command applied, in the background, once at a time; who wants it asks again."""
        if command not in self._asked:
            self._asked.add(command)
            self._broker.spawn(self._call(command))

    async def _call(self, command: Command) -> None:
        try:
            await self._broker.metadata.call(command)
        except RaftlogError as error:
            logger.debug("broker %d: %s: %s", self._broker.broker_id, type(command).__name__, error)
            if isinstance(command, ReplaceReplica) and error.retriable:
                await asyncio.sleep(_AGAIN_S)
                self._changed.set()
        finally:
            self._asked.discard(command)
