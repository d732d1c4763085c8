"""What the metadata consists of: brokers, topics, and who holds which partition, now and while replicas move.

A partition's members change in two places. The *image* says what is wanted; the partition's own log says
which configuration is in force. The leader of the group drives the second towards the first, and what the
image wants no more stays ``leaving`` until the log says so too: only then may a broker delete it. Everything
here is immutable.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

Member: TypeAlias = tuple[int, int]
"""(replica id, broker id). Replica ids are never used twice."""


class Broker(msgspec.Struct, frozen=True, array_like=True):
    """A registered broker. Its address is not here: that is soft state."""

    broker_id: int
    disk_id: bytes
    """Random, made with the data directory: a broker whose disk was wiped is a new broker."""
    node_id: str
    zone: str
    metadata_replica: int
    """Its replica of the metadata group."""
    level: int = 1
    """The newest feature level that its release can run at."""
    draining: bool = False
    """Its node is to go: it is given nothing any more, and what it has moves away."""


class Partition(msgspec.Struct, frozen=True, array_like=True):
    """Who holds a partition."""

    replicas: tuple[Member, ...]
    """Wanted, the preferred leader first."""
    leaving: tuple[Member, ...]
    """Not wanted any more, and perhaps still in the group's configuration."""
    founders: tuple[int, ...]
    """Replica ids of the group's first configuration. A replica that is added later begins with it too, and
    so in no configuration, until the log that it is sent says otherwise: it never votes empty."""
    version: int = 1
    """Raised with every change."""

    @classmethod
    def founded(cls, replicas: tuple[Member, ...]) -> Partition:
        """A new partition on these replicas."""
        return cls(replicas, (), tuple(replica_id for replica_id, _ in replicas))

    @property
    def members(self) -> tuple[Member, ...]:
        """Everyone who may be in the group's configuration, or is to be."""
        return self.replicas + self.leaving

    @property
    def wanted(self) -> tuple[int, ...]:
        """Replica ids that should be the group's voters, the preferred leader first."""
        return tuple(replica_id for replica_id, _ in self.replicas)

    @property
    def hosts(self) -> dict[int, int]:
        """Replica id -> broker id of all members."""
        return dict(self.members)

    def altered(self, replicas: tuple[Member, ...]) -> Partition:
        """The partition with these wanted; the others are to leave."""
        kept = {replica_id for replica_id, _ in replicas}
        leaving = tuple(member for member in self.members if member[0] not in kept)
        return Partition(replicas, leaving, self.founders, self.version + 1)

    def replaced(self, old: int, new: int) -> Partition:
        """The partition with a replica of a new id in the place of ``old``, on the same broker."""
        return self.altered(
            tuple(
                (new if replica_id == old else replica_id, broker_id)
                for replica_id, broker_id in self.replicas
            )
        )

    def completed(self) -> Partition:
        """The partition once its group's configuration is what is wanted."""
        return Partition(self.replicas, (), self.founders, self.version + 1)


class Topic(msgspec.Struct, frozen=True, array_like=True):
    name: str
    topic_id: bytes
    """16 random bytes: a topic deleted and made again under its name is another topic."""
    config: dict[str, Any]
    """What was set explicitly, by the names of ``raftlog.config.TopicConfig``."""
    internal: bool
    partitions: tuple[Partition, ...]
    replication: int = 0
    """Replicas that each partition should have; 0: three, or as many as there are brokers, and never fewer
    than it has."""

    def with_partition(self, index: int, partition: Partition) -> Topic:
        """The topic with one partition changed."""
        changed = (*self.partitions[:index], partition, *self.partitions[index + 1 :])
        return msgspec.structs.replace(self, partitions=changed)
