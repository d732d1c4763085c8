"""The rpcs by which brokers lend each other what is damaged. Numbers and rules as in ``rpc``."""

from __future__ import annotations

from raftlog.net.rpc import Request, Struct


class LogFramesResponse(Struct, frozen=True):
    """Payload: contiguous log frames from the index asked for; empty if this broker has none."""

    first_index: int = 0
    """Where its log begins, if it has none and its log is whole."""


class LogFramesRequest(Request[LogFramesResponse], frozen=True):
    """Frames for a replica whose own are damaged: from any replica of the partition, whatever its state."""

    topic_id: bytes
    partition: int
    index: int
    """Of the first frame wanted."""
    prev_crc: int
    """Crc of the entry before: only what follows it is wanted."""
    bytes_max: int

    api = 50
    response = LogFramesResponse


class SnapshotBytesResponse(Struct, frozen=True):
    """Payload: bytes of the snapshot's file."""

    total: int
    """Of the whole file; 0: this broker has no such snapshot."""


class SnapshotBytesRequest(Request[SnapshotBytesResponse], frozen=True):
    """Part of a snapshot, for a replica whose own is damaged."""

    topic_id: bytes
    partition: int
    index: int
    position: int
    bytes_max: int

    api = 51
    response = SnapshotBytesResponse
