"""Frames that check and stand in the wrong place: what a disk that misdirects a write leaves."""

from __future__ import annotations

import asyncio

import pytest
from storage_kit import DISK_ID, SMALL, contents, grow, run, spec

from raftlog.errors import DamagedData
from raftlog.storage.replica_log import ReplicaLog
from raftlog.storage.segment import SEGMENT_HEADER_BYTES
from raftlog.storage.store import BrokerStore
from raftlog.testing.disk import SimDisk

ENTRIES = 100


async def two_alike(disk: SimDisk) -> tuple[BrokerStore, ReplicaLog, ReplicaLog]:
    """Two partitions whose frames have the same sizes, indexes and terms at the same positions."""
    store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
    logs = await store.create_many([spec(1), spec(2, partition=1)])
    for log in logs:
        for _ in range(ENTRIES):
            await grow(store, log, 1)
    await store.flush()
    return store, logs[0], logs[1]


def misdirect(disk: SimDisk, one: ReplicaLog, other: ReplicaLog, start: int, end: int) -> None:
    """Bytes of the other's first segment stand in the first one's."""
    data = disk.content(other.segments[0].path)[start:end]
    disk.overwrite(one.segments[0].path, start, data)


async def check_reads(log: ReplicaLog, frames: list[bytes]) -> int:
    """Whatever is read, in pieces of any size, is what was written. Returns how many reads failed."""
    failed = 0
    for size in (1, 500, 1 << 20):
        for index in range(1, len(frames) + 1):
            try:
                entries = await log.entries(index, len(frames) + 1, size)
            except DamagedData:
                failed += 1
                continue
            for entry in entries:
                assert bytes(entry.frame) == frames[entry.index - 1], entry.index
    return failed


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 512), (0, 4096), (SEGMENT_HEADER_BYTES, 512), (512, 1024), (512, 4096), (1024, 1536)],
)
def test_frames_of_another_log_are_not_handed_out(start: int, end: int) -> None:
    async def scenario() -> None:
        disk = SimDisk()
        store, one, other = await two_alike(disk)
        frames = [bytes(entry.frame) for entry in await one.entries(1, ENTRIES + 1, 1 << 20)]
        while len(frames) < ENTRIES:
            more = await one.entries(len(frames) + 1, ENTRIES + 1, 1 << 20)
            frames += [bytes(entry.frame) for entry in more]
        misdirect(disk, one, other, start, end)
        assert await check_reads(one, frames) > 0
        await store.close()

    run(scenario())


def test_logs_of_different_groups_never_follow_one_another() -> None:
    origins = {spec(replica, partition=part).origin_crc for replica in (1, 2) for part in (0, 1)}
    assert len(origins) == 2, "by group, not by replica"


@pytest.mark.parametrize("of_another_replica", [False, True])
def test_an_index_file_of_another_segment_is_not_believed(of_another_replica: bool) -> None:
    """Found by seed 20097: recovery followed it from segment to segment, for ever."""

    async def scenario() -> None:
        disk = SimDisk()
        store, one, other = await two_alike(disk)
        paths = [segment.index_path for segment in one.segments if segment.sealed]
        assert len(paths) > 1
        wrong = other.segments[1].index_path if of_another_replica else paths[0]
        disk.put(paths[1], disk.content(wrong))
        await store.close()
        again = await BrokerStore.open(disk.kill(), SMALL, disk_id=DISK_ID)
        assert again.logs[1].last_index == ENTRIES
        assert await check_reads(again.logs[1], await contents(again.logs[1])) == 0
        await again.close()

    run(asyncio.wait_for(scenario(), 20.0))
