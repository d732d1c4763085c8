"""The rpcs that change a running cluster, and those of the controller that carries the changes out.

Numbers and rules as in ``rpc``.
"""

from __future__ import annotations

from typing import Final

from raftlog.net.rpc import BrokerRow, Request, Struct


class ImageResponse(Struct, frozen=True):
    """Payload: a snapshot of the metadata; empty if the asker's is as new."""

    version: int
    """Applied index of the metadata group at its leader."""
    heard: list[int]
    """Brokers whose heartbeats it hears, itself included."""


class ImageRequest(Request[ImageResponse], frozen=True):
    """From a controller to the leader of the metadata group: the metadata, if they are not of ``known``."""

    known: int

    api = 21
    response = ImageResponse


UNCHANGED: Final = -1


class AlterTopicResponse(Struct, frozen=True):
    version: int
    partitions: int
    """How many there are now."""


class AlterTopicRequest(Request[AlterTopicResponse], frozen=True):
    """To the leader of the metadata group: let a topic have more partitions, or another replication."""

    name: str
    partitions: int = UNCHANGED
    """How many in all. They are made on the spot."""
    replication_factor: int = UNCHANGED
    """0 means "auto". The controller sees to it in its own time."""
    allow_key_reorder: bool = False
    """Records of one key may be in two partitions from here on."""

    api = 22
    response = AlterTopicResponse


class DrainResponse(Struct, frozen=True):
    version: int


class DrainRequest(Request[DrainResponse], frozen=True):
    """To the leader of the metadata group: move everything away from these brokers, or let them stay."""

    brokers: list[int]
    draining: bool

    api = 23
    response = DrainResponse


class LedRow(Struct, frozen=True):
    """A partition that a broker leads."""

    replica_id: int
    """Of the leader."""
    voters: tuple[int, ...]
    """Replica ids of the configuration in force."""
    bytes: int
    """That a replica has on its disk, about."""
    changes: bool
    """The configuration is joint, or somebody learns."""


class ReportResponse(Struct, frozen=True):
    broker: BrokerRow
    leads: list[LedRow]


class ReportRequest(Request[ReportResponse], frozen=True):
    """From a controller to each broker: what do you lead?"""

    api = 24
    response = ReportResponse
