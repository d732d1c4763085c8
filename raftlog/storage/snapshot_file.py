"""State snapshots on disk: one file per snapshot, named after its index, beside the replica's segments.

The file holds all from which a log can begin behind the snapshot, so its bytes, unchanged, are also what a
follower gets that is too far behind.
"""

from __future__ import annotations

from typing import Final

import msgspec

from raftlog.errors import DamagedData
from raftlog.raft.types import Snapshot
from raftlog.record.frame import Buffer
from raftlog.storage.checked_file import seal, unseal_as
from raftlog.storage.disk import Disk
from raftlog.storage.segment import replica_folder

_MAGIC: Final = b"RLOGSNAP"
_VERSION: Final = 1


class LogSnapshot(Snapshot, frozen=True, array_like=True):
    """A snapshot, and where the log goes on behind it."""

    next_offset: int = 0
    """Record offset after the entry at ``index``."""
    leader_time_ms: int = 0
    """Of the entry at ``index``."""


def snapshot_path(replica_id: int, index: int) -> str:
    """Path of the snapshot at that index."""
    return f"{replica_folder(replica_id)}/{index:016x}.snap"


def parse_snapshot_name(name: str) -> int | None:
    """Index of a snapshot file's name; None for another name."""
    stem, _, suffix = name.partition(".")
    if suffix != "snap" or len(stem) != 16:
        return None
    try:
        return int(stem, 16)
    except ValueError:
        return None


async def write_snapshot(disk: Disk, replica_id: int, snapshot: LogSnapshot) -> None:
    """Write it atomically and durably."""
    data = seal(_MAGIC, _VERSION, msgspec.msgpack.encode(snapshot))
    await disk.replace_file(snapshot_path(replica_id, snapshot.index), data)


async def read_snapshot(disk: Disk, replica_id: int, index: int) -> LogSnapshot:
    """Read the snapshot at that index.

    Raises:
        DamagedData: the file does not check.
    """
    path = snapshot_path(replica_id, index)
    return parse_snapshot(await disk.read_file(path), index, path)


def parse_snapshot(data: Buffer, index: int, path: str) -> LogSnapshot:
    """The snapshot in the bytes of a file.

    Raises:
        DamagedData: they do not check, or are of another index.
    """
    snapshot = unseal_as(LogSnapshot, _MAGIC, _VERSION, data, path)
    if snapshot.index != index:
        raise DamagedData(f"{path} holds the snapshot at index {snapshot.index}", path=path, position=0)
    return snapshot
