"""Identity, manifest, snapshots: written whole, checked whole."""

from __future__ import annotations

import msgspec
import pytest
from storage_kit import DISK_ID, run, spec

from raftlog.errors import DamagedData, DataDirError, ForeignDataDir, IncompatibleVersion
from raftlog.raft.types import ConfState
from raftlog.storage.checked_file import CHECKED_HEADER_BYTES, seal, unseal
from raftlog.storage.identity import Identity, find_identity, load_identity, store_identity
from raftlog.storage.manifest import Manifest, load_manifest, store_manifest
from raftlog.storage.snapshot_file import LogSnapshot, read_snapshot, write_snapshot
from raftlog.testing.disk import SimDisk

IDENTITY = Identity(
    "c-1",
    "default",
    3,
    DISK_ID,
    7,
    b"secret",
    13,
    ((1, 11), (3, 13)),
    {1: (4, "10.0.0.1", 9000), 3: (7, "::1", 9001)},
)


def test_every_flip_and_every_cut_of_a_checked_file_is_noticed() -> None:
    data = seal(b"RLOGTEST", 1, b"some body")
    assert bytes(unseal(b"RLOGTEST", 1, data, "f")) == b"some body"
    assert len(data) == CHECKED_HEADER_BYTES + 9
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(DamagedData):
                unseal(b"RLOGTEST", 1, flipped, "f")
    for size in range(len(data)):
        with pytest.raises(DamagedData):
            unseal(b"RLOGTEST", 1, data[:size], "f")
    with pytest.raises(DamagedData):
        unseal(b"RLOGTEST", 1, data + b"x", "f")
    with pytest.raises(DamagedData):
        unseal(b"RLOGELSE", 1, data, "f")


def test_a_later_version_is_refused_by_name() -> None:
    with pytest.raises(IncompatibleVersion, match="version 2"):
        unseal(b"RLOGTEST", 1, seal(b"RLOGTEST", 2, b""), "f")


def test_identity() -> None:
    async def main() -> None:
        disk = SimDisk()
        assert await find_identity(disk) is None
        with pytest.raises(DataDirError, match="founded"):
            await load_identity(disk)
        await store_identity(disk, IDENTITY)
        assert await load_identity(disk) == IDENTITY
        following = IDENTITY.next_incarnation()
        assert following.incarnation == 8
        await store_identity(disk, following)
        assert await find_identity(disk) == following

    run(main())


@pytest.mark.parametrize("field", ["cluster_id", "broker_id", "disk_id"])
def test_a_foreign_directory_is_never_taken_over(field: str) -> None:
    async def main() -> None:
        disk = SimDisk()
        await store_identity(disk, IDENTITY)
        other = {"cluster_id": "c-2", "broker_id": 4, "disk_id": b"e" * 16}[field]
        with pytest.raises(ForeignDataDir):
            await store_identity(disk, msgspec.structs.replace(IDENTITY, **{field: other}))
        assert await load_identity(disk) == IDENTITY
        with pytest.raises(ForeignDataDir):
            IDENTITY.check(**{field: other})  # type: ignore[arg-type]
        IDENTITY.check(cluster_id="c-1", broker_id=3, disk_id=DISK_ID)

    run(main())


def test_manifest() -> None:
    async def main() -> None:
        disk = SimDisk()
        assert await load_manifest(disk) is None
        manifest = Manifest(DISK_ID, (spec(1), spec(2, partition=4)), 9, True, "boot")
        await store_manifest(disk, manifest)
        assert await load_manifest(disk) == manifest
        disk.flip("MANIFEST", 30)
        with pytest.raises(DamagedData):
            await load_manifest(disk)

    run(main())


def test_snapshot_under_a_wrong_name_is_damage() -> None:
    async def main() -> None:
        disk = SimDisk()
        snapshot = LogSnapshot(10, 2, 0xABCD, ConfState((1, 2, 3)), b"state", 77, 1234)
        await write_snapshot(disk, 1, snapshot)
        assert await read_snapshot(disk, 1, 10) == snapshot
        kept = await read_snapshot(disk, 1, 10)
        assert (kept.next_offset, kept.leader_time_ms) == (77, 1234)
        await disk.rename("replicas/1/000000000000000a.snap", "replicas/1/000000000000000b.snap")
        with pytest.raises(DamagedData, match="index 10"):
            await read_snapshot(disk, 1, 11)

    run(main())
