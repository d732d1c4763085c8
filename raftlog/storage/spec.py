"""What a broker is told about a replica, and the knobs of its storage."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from crc32c import crc32c

from raftlog.raft.types import ConfState


class ReplicaSpec(msgspec.Struct, frozen=True, array_like=True):
    """A row of the manifest: what a replica is. It never changes after creation."""

    replica_id: int
    topic: str
    topic_id: bytes
    partition: int
    conf: ConfState
    """The group's first configuration (of index 0)."""
    segment_bytes: int = 128 << 20
    """A segment ends with the frame that reaches this size. The same on all replicas, so their segments
    align."""
    internal: bool = False
    """Metadata and the like: its log may be cut below its newest snapshot."""
    flush_interval_ms: int = 0
    """An append is confirmed once it is written, and a sync follows within this; 0: it is synced first."""

    @property
    def origin_crc(self) -> int:
        """What the first entry of the group's log names as the crc before it: so frames of another group,
        put here by a disk that errs, never follow from anything in this log, not even at its beginning."""
        return int(crc32c(self.topic_id + self.partition.to_bytes(4, "big")))


@dataclass(frozen=True, slots=True)
class StorageConfig:
    """Sizes are in bytes, times in seconds."""

    journal_bytes: int = 64 << 20
    """A journal file is left for the next one when a group would pass this size."""
    journal_files_max: int = 4
    """Above this many files, entries that cannot be flushed are copied to the journal's head to free the
    oldest."""
    direct_bytes: int = 64 << 10
    """Frames of at least this size go straight to their segment."""
    cache_bytes: int = 64 << 20
    """Recent frames of all replicas kept in memory after they were flushed."""
    flush_bytes: int = 16 << 20
    """Unflushed bytes that start a lazy flush."""
    flush_write_bytes: int = 4 << 20
    """Limit of one lazy write."""
    index_interval_bytes: int = 4096
    """Distance between entries of the sparse index."""
    index_checkpoint_bytes: int = 16 << 20
    """The index of a growing segment is saved each time this much was added: the limit of what recovery
    rescans."""
    index_cache_entries: int = 64
    """Indexes of sealed segments kept in memory."""
    open_files_max: int = 512
    """Sealed segments kept open for reading."""
    idle_mark_seconds: float = 0.5
    """After this long without a write, a mark covers the last group."""
    retry_seconds: float = 0.1
    retry_seconds_max: float = 5.0
    """Backoff while the device is full."""
