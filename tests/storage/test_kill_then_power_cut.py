"""A process is killed in the middle of a write; its successor reads what the operating system still holds,
and then the power goes. Found by the simulator: the successor vouched for bytes that no sync had covered."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from storage_kit import DISK_ID, SMALL, Writer, append, contents, grow, run, spec, submit

from raftlog.errors import StorageFailed
from raftlog.storage.store import BrokerStore
from raftlog.testing.disk import CrashMode, SimDisk


@pytest.mark.parametrize("size", [300, 5000], ids=["in the journal", "straight to the segment"])
def test_what_a_failed_sync_left_is_written_again(size: int) -> None:
    """After a failed sync the system shows pages as written that the device never got, and syncing them again
    does nothing: what recovery believes must be written anew."""

    async def scenario() -> None:
        disk = SimDisk(Random(1))
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec())
        await grow(store, log, 3, commit=False)
        disk.fail_sync()
        with pytest.raises(StorageFailed):
            await append(store, log, [Writer(log).entry(1, size=size)])

        disk = disk.kill()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = store.logs[1]
        assert log.last_index == 4, "the operating system shows what was written"
        await append(store, log, [Writer(log).entry(2)])  # its mark says: all before is synced
        read = await contents(log)

        store = await BrokerStore.open(disk.crash(CrashMode.NONE), SMALL, disk_id=DISK_ID)
        assert await contents(store.logs[1]) == read

    run(scenario())


@pytest.mark.parametrize("size", [300, 5000], ids=["in the journal", "straight to the segment"])
@pytest.mark.parametrize("mode", [CrashMode.NONE, CrashMode.RANDOM])
def test_what_recovery_read_is_durable_before_it_counts(size: int, mode: CrashMode) -> None:
    async def scenario() -> None:
        disk = SimDisk(Random(1))
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec())
        await grow(store, log, 3, commit=False)
        disk.latency = 1.0  # the write is there at once, its sync comes later
        entry = Writer(log).entry(1, size=size)
        doomed = submit(store, log, [entry])
        for _ in range(100):
            await asyncio.sleep(0)
        assert any(bytes(entry.frame) in disk.content(path) for path in disk.paths())
        disk = disk.kill()
        assert not doomed.done(), "killed before the sync"

        disk.latency = 0.0
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = store.logs[1]
        assert log.last_index == 4, "the operating system holds what was written"
        read = await contents(log)
        await append(store, log, [Writer(log).entry(2)])  # its mark says: all before is synced
        read = await contents(log)

        store = await BrokerStore.open(disk.crash(mode), SMALL, disk_id=DISK_ID)
        assert await contents(store.logs[1]) == read

    run(scenario())
