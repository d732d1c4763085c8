"""The commands of the metadata group: what may be asked of it, and what each gives back.

Numbers and layouts are on disk for ever (see ``raftlog.state.command``).
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from raftlog.state.command import CommandCodec, CommandStruct
from raftlog.state.image import Broker, Partition, Topic


class FoundCluster(CommandStruct, frozen=True):
    """Give the cluster its id and the feature level of the release that founds it, once.

    ``members``: (broker id, replica id) of the metadata group's first configuration, in order."""

    type = 1
    result = str
    cluster_id: str
    members: tuple[tuple[int, int], ...]
    level: int


class RegisterBroker(CommandStruct, frozen=True):
    """Make a founding broker known, or tell that one moved to another node or runs another release."""

    type = 2
    broker_id: int
    disk_id: bytes
    node_id: str
    zone: str
    metadata_replica: int
    level: int


class CreateTopic(CommandStruct, frozen=True):
    """``assignment``: for each partition the broker ids, the preferred leader first. Replica ids are
    allotted by apply. ``replication``: see Topic. Result: the Topic."""

    type = 3
    result = Topic
    name: str
    topic_id: bytes
    config: dict[str, Any]
    internal: bool
    assignment: list[list[int]]
    replication: int = 0


class DeleteTopic(CommandStruct, frozen=True):
    type = 4
    name: str
    topic_id: bytes


class AllocateProducerIds(CommandStruct, frozen=True):
    """Result: the first of ``count`` ids that nobody had before."""

    type = 5
    result = int
    count: int


class TakeControl(CommandStruct, frozen=True):
    """Result: the new controller's epoch. Commands of earlier controllers are refused from here on."""

    type = 6
    result = int


class RemoveBroker(CommandStruct, frozen=True):
    """Forget a broker that holds no replica any more. From a controller."""

    type = 7
    controller_epoch: int
    broker_id: int


class SetFeatureLevel(CommandStruct, frozen=True):
    """Let leaders propose commands of this level: every broker runs a release that knows them. It never goes
    down. From a controller."""

    type = 8
    result = int
    controller_epoch: int
    level: int


class AlterPartition(CommandStruct, frozen=True):
    """Say who should hold a partition. From a controller. Result: the Partition.

    ``replicas``: (broker id, replica id) each, the preferred leader first; replica id 0 for a new one."""

    type = 9
    result = Partition
    controller_epoch: int
    topic_id: bytes
    partition: int
    replicas: list[tuple[int, int]]


class ReplaceReplica(CommandStruct, frozen=True):
    """From the broker that has lost a replica for good: it will hold another one in its place. Needs no
    controller: nothing is decided but the id. Result: that id."""

    type = 10
    result = int
    topic_id: bytes
    partition: int
    replica_id: int


class CompletePartition(CommandStruct, frozen=True):
    """From the group's leader: the configuration in force, and committed, is what the image of this version
    wants. Result: the Partition, which nobody is leaving any more."""

    type = 11
    result = Partition
    topic_id: bytes
    partition: int
    assignment: int
    """The version of the Partition."""


class AddBroker(CommandStruct, frozen=True):
    """Let a new data directory become a broker. Repeated with the same disk id it gives the same broker.
    Result: (the Broker, the members of the metadata group's first configuration)."""

    type = 12
    result = tuple[Broker, tuple[tuple[int, int], ...]]
    disk_id: bytes
    node_id: str
    zone: str
    level: int


class AddPartitions(CommandStruct, frozen=True):
    """Let a topic have more partitions. ``first``: the number of the first new one, which is how many there
    are: a repeated command is refused. ``assignment``: as in CreateTopic. Result: the Topic."""

    type = 13
    result = Topic
    topic_id: bytes
    first: int
    assignment: list[list[int]]


class SetReplication(CommandStruct, frozen=True):
    """Say how many replicas each partition of a topic should have; the controller sees to it. Result: the
    Topic."""

    type = 14
    result = Topic
    topic_id: bytes
    replication: int


class SetDraining(CommandStruct, frozen=True):
    """A broker's node is to go, or is to stay after all. Result: the Broker."""

    type = 15
    result = Broker
    broker_id: int
    draining: bool


Command: TypeAlias = (
    FoundCluster
    | RegisterBroker
    | CreateTopic
    | DeleteTopic
    | AllocateProducerIds
    | TakeControl
    | RemoveBroker
    | SetFeatureLevel
    | AlterPartition
    | ReplaceReplica
    | CompletePartition
    | AddBroker
    | AddPartitions
    | SetReplication
    | SetDraining
)

COMMANDS: Final[tuple[type[Command], ...]] = (
    FoundCluster,
    RegisterBroker,
    CreateTopic,
    DeleteTopic,
    AllocateProducerIds,
    TakeControl,
    RemoveBroker,
    SetFeatureLevel,
    AlterPartition,
    ReplaceReplica,
    CompletePartition,
    AddBroker,
    AddPartitions,
    SetReplication,
    SetDraining,
)

CODEC: Final[CommandCodec[Command]] = CommandCodec("metadata", *COMMANDS)
"""A command as the payload of an entry of kind COMMAND, or of a MetadataCommandRequest."""
