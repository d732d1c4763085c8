"""The state machine of the metadata group: brokers, topics, who holds which partition, and the cluster's
counters.

Every broker holds the image, so that it can answer clients and find out what it hosts without asking
anybody. A command that cannot be carried out is *refused*: apply returns the error, the same on every
replica, and changes nothing. Names and settings are checked where a request comes in, not here: rules may
differ between releases, the state may not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Final, TypeAlias

import msgspec

from raftlog.errors import (
    ConfigError,
    ForeignDataDir,
    IncompatibleVersion,
    InvalidReplicationFactor,
    RaftlogError,
    StaleController,
    TopicExists,
    UnknownPartition,
    UnknownReplica,
    UnknownTopic,
)
from raftlog.raft.types import Entry
from raftlog.record.frame import Buffer, FrameKind
from raftlog.state.command import (
    ApplyMismatch,
    CommandCodec,
    CommandStruct,
    SnapshotStruct,
    UnknownCommand,
    decode_snapshot,
    needs_upgrade,
)
from raftlog.state.image import Broker, Member, Partition, Topic
from raftlog.state.metadata_commands import (
    CODEC,
    AddBroker,
    AddPartitions,
    AllocateProducerIds,
    AlterPartition,
    Command,
    CompletePartition,
    CreateTopic,
    DeleteTopic,
    FoundCluster,
    RegisterBroker,
    RemoveBroker,
    ReplaceReplica,
    SetDraining,
    SetFeatureLevel,
    SetReplication,
    TakeControl,
)

FIRST_REPLICA_ID: Final = 1000
"""Replica ids below belong to the metadata group's own replicas, which its founder numbers."""
FEATURE_LEVEL_MAX: Final = 1
"""The newest level this release can run at."""
PRODUCER_ID_BLOCK_MAX: Final = 1_000_000
_SNAPSHOT_VERSION: Final = 2


class _Snapshot(SnapshotStruct, frozen=True):
    applied_index: int
    cluster_id: str
    founders: tuple[tuple[int, int], ...]
    next_broker_id: int
    removed: dict[int, int]
    next_replica_id: int
    next_producer_id: int
    controller_epoch: int
    feature_level: int
    brokers: list[Broker]
    topics: list[Topic]


_Check: TypeAlias = Callable[..., RaftlogError | None]
_CarryOut: TypeAlias = Callable[..., object]


class MetadataState:
    """The metadata after the entry at ``applied_index``.

    ``brokers`` maps broker id to Broker and ``topics`` name to Topic, both in order of creation. What the
    dicts hold is immutable.
    """

    codec: ClassVar[CommandCodec[Command]] = CODEC
    level_max: ClassVar[int] = FEATURE_LEVEL_MAX

    __slots__ = (
        "_topics_by_id",
        "applied_index",
        "brokers",
        "cluster_id",
        "controller_epoch",
        "feature_level",
        "founders",
        "next_broker_id",
        "next_producer_id",
        "next_replica_id",
        "removed",
        "topics",
    )

    def __init__(self) -> None:
        self.applied_index = 0
        self.cluster_id = ""
        self.founders: tuple[tuple[int, int], ...] = ()
        """(broker id, replica id) of the metadata group's first configuration."""
        self.next_broker_id = 0
        self.removed: dict[int, int] = {}
        """Brokers that belong to the cluster no more -> their replicas of the metadata group. Their ids are
        not used again."""
        self.next_replica_id = FIRST_REPLICA_ID
        self.next_producer_id = 0
        self.controller_epoch = 0
        self.feature_level = 1
        self.brokers: dict[int, Broker] = {}
        self.topics: dict[str, Topic] = {}
        self._topics_by_id: dict[bytes, Topic] = {}

    # -- look up ---------------------------------------------------------------------------------------------

    def topic(self, name: str) -> Topic:
        """The topic of that name; UnknownTopic if there is none."""
        found = self.topics.get(name)
        if found is None:
            raise UnknownTopic(f"no topic {name!r}", topic=name)
        return found

    def topic_by_id(self, topic_id: bytes) -> Topic | None:
        """The topic of that id, or None: never created, or deleted."""
        return self._topics_by_id.get(topic_id)

    def partition(self, topic_id: bytes, index: int) -> Partition:
        """The replicas of a partition.

        Raises:
            UnknownTopic, UnknownPartition.
        """
        topic = self._topics_by_id.get(topic_id)
        if topic is None:
            raise UnknownTopic(f"no topic of id {topic_id.hex()}")
        if not 0 <= index < len(topic.partitions):
            raise UnknownPartition(
                f"topic {topic.name!r} has partitions 0 to {len(topic.partitions) - 1}, not {index}",
                topic=topic.name,
                partition=index,
            )
        return topic.partitions[index]

    def replicas_on(self, broker_id: int) -> Iterator[tuple[Topic, int, int]]:
        """(topic, partition, replica id) of everything that a broker should hold, or hold until it has left
        its group."""
        for topic in self.topics.values():
            for index, partition in enumerate(topic.partitions):
                for replica_id, holder in partition.members:
                    if holder == broker_id:
                        yield topic, index, replica_id

    # -- decide (leader, on its staged state) ----------------------------------------------------------------

    def check(self, command: Command) -> RaftlogError | None:
        """Why the command would be refused in this state, or None. The leader asks before it proposes."""
        refusal = self._refusal(command)
        if refusal is None and isinstance(command, SetFeatureLevel) and command.level > self.level_max:
            # not in _refusal: a newer release would carry it out, so replicas of this one must halt at it
            return ConfigError(f"feature level {command.level}; this release has {self.level_max}")
        return refusal

    def _refusal(self, command: Command) -> RaftlogError | None:
        upgrade = needs_upgrade(command, self.feature_level)
        if upgrade is not None:
            return upgrade
        epoch = getattr(command, "controller_epoch", None)
        if epoch is not None and epoch != self.controller_epoch:
            return StaleController(
                f"controller of epoch {epoch}; epoch {self.controller_epoch} has taken over",
                epoch=self.controller_epoch,
            )
        check, _ = self._handlers[type(command)]
        return check(self, command) if check is not None else None

    # -- apply (every replica) -------------------------------------------------------------------------------

    def apply(self, entry: Entry) -> object:
        """Apply the entry after ``applied_index``.

        Returns:
            A command's result (see the commands), or the RaftlogError with which it was refused (state
            unchanged); None for other entries.

        Raises:
            ApplyMismatch, UnknownCommand: the replica must halt; the state is as before.
        """
        if entry.index != self.applied_index + 1:
            raise ApplyMismatch(f"entry {entry.index} does not follow {self.applied_index}")
        result: object = None
        if entry.kind == FrameKind.COMMAND:
            result = self._apply_command(self.codec.decode(entry.payload))
        elif entry.kind not in (FrameKind.NOOP, FrameKind.CONF):
            raise UnknownCommand(f"metadata entry {entry.index} is of kind {entry.kind}")
        self.applied_index = entry.index
        return result

    def _apply_command(self, command: Command) -> object:
        refusal = self._refusal(command)
        if refusal is not None:
            return refusal
        _, carry_out = self._handlers[type(command)]
        return carry_out(self, command)

    def _check_found(self, command: FoundCluster) -> RaftlogError | None:
        if self.cluster_id in ("", command.cluster_id):
            return None
        return ForeignDataDir(f"this is cluster {self.cluster_id}, not {command.cluster_id}")

    def _found(self, command: FoundCluster) -> str:
        self._check_known(command.level)
        self.cluster_id = command.cluster_id
        self.feature_level = max(self.feature_level, command.level)
        self.founders = command.members
        self.next_broker_id = max((broker_id for broker_id, _ in command.members), default=-1) + 1
        return self.cluster_id

    def _check_register(self, command: RegisterBroker) -> RaftlogError | None:
        known = self.brokers.get(command.broker_id)
        if known is not None and known.disk_id != command.disk_id:
            return ForeignDataDir(
                f"broker {known.broker_id} has disk {known.disk_id.hex()}, not {command.disk_id.hex()}: "
                "a new data directory needs a new broker id"
            )
        for broker in self.brokers.values():
            if broker.disk_id == command.disk_id and broker.broker_id != command.broker_id:
                return ForeignDataDir(f"disk {broker.disk_id.hex()} is that of broker {broker.broker_id}")
        if command.broker_id in self.removed:
            return ForeignDataDir(
                f"broker {command.broker_id} was removed from the cluster: move its data directory away, an "
                "empty one joins as a new broker"
            )
        replica_id = dict(self.founders).get(command.broker_id) if known is None else known.metadata_replica
        if command.metadata_replica != replica_id:
            return ForeignDataDir(
                f"no broker {command.broker_id} with metadata replica {command.metadata_replica} was founded "
                "or added"
            )
        return self._too_old(command.level)

    def _too_old(self, level: int) -> RaftlogError | None:
        if level >= self.feature_level:
            return None
        return IncompatibleVersion(
            f"the cluster runs at feature level {self.feature_level}, and the release of this broker knows "
            f"levels up to {level}"
        )

    def _register(self, command: RegisterBroker) -> None:
        known = self.brokers.get(command.broker_id)
        self.brokers[command.broker_id] = Broker(
            command.broker_id,
            command.disk_id,
            command.node_id,
            command.zone,
            command.metadata_replica,
            command.level,
            known is not None and known.draining and known.node_id == command.node_id,
        )

    def _check_add(self, command: AddBroker) -> RaftlogError | None:
        if not self.cluster_id:
            return ConfigError("the cluster is not founded yet")
        return self._too_old(command.level)

    def _add(self, command: AddBroker) -> tuple[Broker, tuple[tuple[int, int], ...]]:
        for broker in self.brokers.values():
            if broker.disk_id == command.disk_id:
                return broker, self.founders
        added = Broker(
            self.next_broker_id,
            command.disk_id,
            command.node_id,
            command.zone,
            self.next_replica_id,
            command.level,
        )
        self.next_broker_id += 1
        self.next_replica_id += 1
        self.brokers[added.broker_id] = added
        return added, self.founders

    def _check_create(self, command: CreateTopic) -> RaftlogError | None:
        if command.name in self.topics:
            return TopicExists(f"topic {command.name!r} exists", topic=command.name)
        if command.topic_id in self._topics_by_id:
            return TopicExists(f"topic id {command.topic_id.hex()} is taken")
        return self._check_assignment(command.name, command.assignment)

    def _check_assignment(self, name: str, assignment: list[list[int]]) -> RaftlogError | None:
        if not assignment or not all(assignment):
            return ConfigError(f"topic {name!r} needs a partition, and each of them a replica")
        for index, holders in enumerate(assignment):
            unknown = [each for each in holders if each not in self.brokers]
            if unknown:
                return ConfigError(f"partition {index} of {name!r} has unknown brokers {unknown}")
            if len(set(holders)) != len(holders):
                return ConfigError(f"partition {index} of {name!r} has a broker twice: {holders}")
        return None

    def _create(self, command: CreateTopic) -> Topic:
        partitions = self._founded(command.assignment)
        return self._set_topic(
            Topic(
                command.name,
                command.topic_id,
                command.config,
                command.internal,
                partitions,
                command.replication,
            )
        )

    def _founded(self, assignment: list[list[int]]) -> tuple[Partition, ...]:
        partitions: list[Partition] = []
        for holders in assignment:
            first = self.next_replica_id
            self.next_replica_id = first + len(holders)
            partitions.append(Partition.founded(tuple(enumerate(holders, first))))
        return tuple(partitions)

    def _set_topic(self, topic: Topic) -> Topic:
        self.topics[topic.name] = self._topics_by_id[topic.topic_id] = topic
        return topic

    def _check_add_partitions(self, command: AddPartitions) -> RaftlogError | None:
        topic = self._topics_by_id.get(command.topic_id)
        if topic is None:
            return UnknownTopic(f"no topic of id {command.topic_id.hex()}")
        if topic.internal:
            return ConfigError(f"topic {topic.name!r} is internal: names belong to its partitions")
        if len(topic.partitions) != command.first:
            return ConfigError(
                f"topic {topic.name!r} has {len(topic.partitions)} partitions, not {command.first}"
            )
        return self._check_assignment(topic.name, command.assignment)

    def _add_partitions(self, command: AddPartitions) -> Topic:
        topic = self._topics_by_id[command.topic_id]
        partitions = topic.partitions + self._founded(command.assignment)
        return self._set_topic(msgspec.structs.replace(topic, partitions=partitions))

    def _check_replication(self, command: SetReplication) -> RaftlogError | None:
        if command.topic_id not in self._topics_by_id:
            return UnknownTopic(f"no topic of id {command.topic_id.hex()}")
        if not 0 <= command.replication <= len(self.brokers):
            return InvalidReplicationFactor(
                f"replication factor {command.replication} is not in 1 to {len(self.brokers)}, the number of "
                "brokers",
                replication_factor=command.replication,
                brokers=len(self.brokers),
            )
        return None

    def _set_replication(self, command: SetReplication) -> Topic:
        topic = self._topics_by_id[command.topic_id]
        return self._set_topic(msgspec.structs.replace(topic, replication=command.replication))

    def _check_draining(self, command: SetDraining) -> RaftlogError | None:
        if command.broker_id not in self.brokers:
            return ConfigError(f"no broker {command.broker_id}")
        return None

    def _set_draining(self, command: SetDraining) -> Broker:
        broker = self.brokers[command.broker_id]
        broker = msgspec.structs.replace(broker, draining=command.draining)
        self.brokers[broker.broker_id] = broker
        return broker

    def _check_delete(self, command: DeleteTopic) -> RaftlogError | None:
        known = self.topics.get(command.name)
        if known is None or known.topic_id != command.topic_id:
            return UnknownTopic(
                f"no topic {command.name!r} of id {command.topic_id.hex()}", topic=command.name
            )
        return None

    def _delete(self, command: DeleteTopic) -> None:
        del self.topics[command.name]
        del self._topics_by_id[command.topic_id]

    def _check_alter(self, command: AlterPartition) -> RaftlogError | None:
        partition = self._find_partition(command.topic_id, command.partition)
        if isinstance(partition, RaftlogError):
            return partition
        holders = [broker_id for broker_id, _ in command.replicas]
        unknown = [each for each in holders if each not in self.brokers]
        if not holders or unknown or len(set(holders)) != len(holders):
            return ConfigError(
                f"replicas on brokers {holders}: a partition needs at least one, each known and none twice"
            )
        for broker_id, replica_id in command.replicas:
            here = [member for member, holder in partition.members if holder == broker_id]
            if replica_id not in here and (replica_id or here):
                return ConfigError(
                    f"broker {broker_id} has replicas {here} of this partition, not {replica_id}"
                )
        return None

    def _alter(self, command: AlterPartition) -> Partition:
        replicas: list[Member] = []
        for broker_id, replica_id in command.replicas:
            replicas.append((replica_id or self.next_replica_id, broker_id))
            self.next_replica_id += not replica_id
        partition = self.partition(command.topic_id, command.partition)
        if partition.replicas == tuple(replicas):
            return partition
        return self._set_partition(command.topic_id, command.partition, partition.altered(tuple(replicas)))

    def _check_replace(self, command: ReplaceReplica) -> RaftlogError | None:
        partition = self._find_partition(command.topic_id, command.partition)
        if isinstance(partition, RaftlogError):
            return partition
        if command.replica_id not in partition.wanted:
            return UnknownReplica(f"replica {command.replica_id} is not wanted any more")
        return None

    def _replace(self, command: ReplaceReplica) -> int:
        new = self.next_replica_id
        self.next_replica_id += 1
        partition = self.partition(command.topic_id, command.partition)
        self._set_partition(command.topic_id, command.partition, partition.replaced(command.replica_id, new))
        return new

    def _check_complete(self, command: CompletePartition) -> RaftlogError | None:
        partition = self._find_partition(command.topic_id, command.partition)
        if isinstance(partition, RaftlogError):
            return partition
        if partition.version != command.assignment:
            return UnknownReplica(
                f"the assignment has version {partition.version} by now, not {command.assignment}"
            )
        return None

    def _complete(self, command: CompletePartition) -> Partition:
        partition = self.partition(command.topic_id, command.partition)
        return self._set_partition(command.topic_id, command.partition, partition.completed())

    def _find_partition(self, topic_id: bytes, index: int) -> Partition | RaftlogError:
        try:
            return self.partition(topic_id, index)
        except (UnknownTopic, UnknownPartition) as error:
            return error

    def _set_partition(self, topic_id: bytes, index: int, partition: Partition) -> Partition:
        self._set_topic(self._topics_by_id[topic_id].with_partition(index, partition))
        return partition

    def _check_allocate(self, command: AllocateProducerIds) -> RaftlogError | None:
        if 1 <= command.count <= PRODUCER_ID_BLOCK_MAX:
            return None
        return ConfigError(f"a block of producer ids has 1 to {PRODUCER_ID_BLOCK_MAX}, not {command.count}")

    def _allocate(self, command: AllocateProducerIds) -> int:
        start = self.next_producer_id
        self.next_producer_id = start + command.count
        return start

    def _take_control(self, _command: TakeControl) -> int:
        self.controller_epoch += 1
        return self.controller_epoch

    def _check_remove(self, command: RemoveBroker) -> RaftlogError | None:
        if command.broker_id not in self.brokers:
            return ConfigError(f"no broker {command.broker_id}")
        if len(self.brokers) == 1:
            return ConfigError(f"broker {command.broker_id} is the last one")
        held = next(self.replicas_on(command.broker_id), None)
        if held is not None:
            topic, index, _ = held
            return ConfigError(f"broker {command.broker_id} still holds partition {index} of {topic.name!r}")
        return None

    def _remove(self, command: RemoveBroker) -> None:
        self.removed[command.broker_id] = self.brokers.pop(command.broker_id).metadata_replica

    def _check_level(self, command: SetFeatureLevel) -> RaftlogError | None:
        if command.level < self.feature_level:
            return ConfigError(f"feature level {command.level} is below the present {self.feature_level}")
        behind = [broker.broker_id for broker in self.brokers.values() if broker.level < command.level]
        if behind:
            return ConfigError(f"brokers {behind} run a release that does not know level {command.level}")
        return None

    def _set_level(self, command: SetFeatureLevel) -> int:
        self._check_known(command.level)
        self.feature_level = command.level
        return self.feature_level

    def _check_known(self, level: int) -> None:
        if level > self.level_max:
            raise UnknownCommand(f"feature level {level}; this release has {self.level_max}")

    _handlers: ClassVar[dict[type[CommandStruct], tuple[_Check | None, _CarryOut]]] = {
        FoundCluster: (_check_found, _found),
        RegisterBroker: (_check_register, _register),
        CreateTopic: (_check_create, _create),
        DeleteTopic: (_check_delete, _delete),
        AllocateProducerIds: (_check_allocate, _allocate),
        TakeControl: (None, _take_control),
        RemoveBroker: (_check_remove, _remove),
        SetFeatureLevel: (_check_level, _set_level),
        AlterPartition: (_check_alter, _alter),
        ReplaceReplica: (_check_replace, _replace),
        CompletePartition: (_check_complete, _complete),
        AddBroker: (_check_add, _add),
        AddPartitions: (_check_add_partitions, _add_partitions),
        SetReplication: (_check_replication, _set_replication),
        SetDraining: (_check_draining, _set_draining),
    }

    # -- copies ----------------------------------------------------------------------------------------------

    def copy(self) -> MetadataState:
        """An independent copy; cheap, since what the dicts hold is immutable."""
        copied = type(self)()
        for name in self.__slots__:
            value = getattr(self, name)
            setattr(copied, name, value.copy() if isinstance(value, dict) else value)
        return copied

    def snapshot(self) -> bytes:
        """The whole state, for :meth:`restore`."""
        return msgspec.msgpack.encode(
            _Snapshot(
                version=_SNAPSHOT_VERSION,
                applied_index=self.applied_index,
                cluster_id=self.cluster_id,
                founders=self.founders,
                next_broker_id=self.next_broker_id,
                removed=self.removed,
                next_replica_id=self.next_replica_id,
                next_producer_id=self.next_producer_id,
                controller_epoch=self.controller_epoch,
                feature_level=self.feature_level,
                brokers=list(self.brokers.values()),
                topics=list(self.topics.values()),
            )
        )

    @classmethod
    def restore(cls, data: Buffer) -> MetadataState:
        """The state that :meth:`snapshot` encoded.

        Raises:
            UnknownSnapshot: of another version, or not a snapshot.
        """
        state = decode_snapshot(data, _Snapshot, _SNAPSHOT_VERSION)
        restored = cls()
        restored.applied_index = state.applied_index
        restored.cluster_id = state.cluster_id
        restored.founders = state.founders
        restored.next_broker_id = state.next_broker_id
        restored.removed = state.removed
        restored.next_replica_id = state.next_replica_id
        restored.next_producer_id = state.next_producer_id
        restored.controller_epoch = state.controller_epoch
        restored.feature_level = state.feature_level
        restored.brokers = {broker.broker_id: broker for broker in state.brokers}
        restored.topics = {topic.name: topic for topic in state.topics}
        restored._topics_by_id = {topic.topic_id: topic for topic in state.topics}
        return restored

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MetadataState) and self.snapshot() == other.snapshot()
