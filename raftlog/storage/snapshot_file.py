"""State snapshots on disk: one file per snapshot, named after its index, beside the replica's segments."""

from __future__ import annotations

from typing import Final

import msgspec

from raftlog.errors import DamagedData
from raftlog.raft.types import Snapshot
from raftlog.storage.checked_file import seal, unseal_as
from raftlog.storage.disk import Disk
from raftlog.storage.segment import replica_folder

_MAGIC: Final = b"RLOGSNAP"
_VERSION: Final = 1


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


async def write_snapshot(disk: Disk, replica_id: int, snapshot: Snapshot) -> None:
    """Write it atomically and durably."""
    data = seal(_MAGIC, _VERSION, msgspec.msgpack.encode(snapshot))
    await disk.replace_file(snapshot_path(replica_id, snapshot.index), data)


async def read_snapshot(disk: Disk, replica_id: int, index: int) -> Snapshot:
    """Read the snapshot at that index.

    Raises:
        DamagedData: the file does not check.
    """
    path = snapshot_path(replica_id, index)
    snapshot = unseal_as(Snapshot, _MAGIC, _VERSION, await disk.read_file(path), path)
    if snapshot.index != index:
        raise DamagedData(f"{path} holds the snapshot at index {snapshot.index}", path=path, position=0)
    return snapshot
