"""flush=interval: confirmed when written, synced within the interval; what a kill and a power cut leave."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from storage_kit import DISK_ID, SMALL, Writer, append, contents, grow, spec, submit

from raftlog.errors import StorageFailed
from raftlog.raft.types import ConfState, Entry, HardState
from raftlog.record.frame import FrameKind
from raftlog.storage.manifest import load_manifest
from raftlog.storage.real_disk import RealDisk
from raftlog.storage.replica_log import ReplicaLog
from raftlog.storage.spec import ReplicaSpec
from raftlog.storage.store import BrokerStore
from raftlog.testing.disk import CrashMode, Op, SimDisk, replay
from raftlog.testing.loop import SimLoop

INTERVAL_MS = 200
CALM = replace(SMALL, idle_mark_seconds=60.0, journal_bytes=1 << 20, flush_bytes=1 << 20)
"""No mark of an idle journal comes to the help of a sync that is forgotten."""
SIZES = pytest.mark.parametrize("size", [300, 5000], ids=["in the journal", "straight to the segment"])


def run(work: Coroutine[Any, Any, None]) -> None:
    """In virtual time."""
    loop = SimLoop(1)
    task = loop.run_as("test", work)
    gc.disable()  # stores on disks that crashed are never closed: they go when the loop does
    try:
        loop.run_until(task.done, 600.0)
        task.result()
        loop.kill("test")
        loop.close()
    finally:
        gc.enable()


def loose(replica_id: int = 1, interval_ms: int = INTERVAL_MS) -> ReplicaSpec:
    return msgspec.structs.replace(spec(replica_id), flush_interval_ms=interval_ms)


async def reopen(disk: SimDisk) -> tuple[BrokerStore, ReplicaLog]:
    store = await BrokerStore.open(disk, CALM, disk_id=DISK_ID)
    return store, store.logs[1]


async def three_entries(
    disk: SimDisk, wanted: ReplicaSpec | None = None
) -> tuple[BrokerStore, ReplicaLog, list[Entry]]:
    """A store whose replica 1 holds three synced entries of term 1."""
    store = await BrokerStore.open(disk, CALM, disk_id=DISK_ID)
    log = await store.create(wanted or loose())
    entries = await grow(store, log, 3)
    await store.flush()
    assert disk.unsynced_bytes == 0
    return store, log, entries


@SIZES
def test_it_is_confirmed_when_written_and_synced_within_the_interval(size: int) -> None:
    async def scenario() -> None:
        disk = SimDisk(latency=0.001)
        store, log, _ = await three_entries(disk)
        loop = asyncio.get_running_loop()
        began, syncs = loop.time(), disk.syncs
        await append(store, log, [Writer(log).entry(1, size=size)])
        assert disk.syncs == syncs, "confirmed before any sync"
        assert disk.unsynced_bytes >= size
        assert loop.time() == began
        assert log.durable_index == 3, "storage itself does not take it for durable"
        await asyncio.sleep(INTERVAL_MS / 1000 - 0.002)
        assert disk.syncs == syncs
        await asyncio.sleep(0.005)
        assert disk.unsynced_bytes == 0
        assert log.durable_index == 4
        syncs = disk.syncs
        await asyncio.sleep(10.0)
        assert disk.syncs == syncs, "nothing is left to sync"
        await store.close()

    run(scenario())


def test_load_does_not_put_the_sync_off() -> None:
    async def scenario() -> None:
        disk = SimDisk(latency=0.001)
        store, log, _ = await three_entries(disk)
        other = await store.create(loose(2, interval_ms=5000))
        loop = asyncio.get_running_loop()
        synced_at, syncs = loop.time(), disk.syncs
        gaps = []
        for number in range(2000):
            target = log if number % 2 else other
            await append(store, target, [Writer(target).entry(1)])
            await asyncio.sleep(0.001)
            if disk.syncs != syncs:
                gaps.append(loop.time() - synced_at)
                synced_at, syncs = loop.time(), disk.syncs
        assert len(gaps) >= 9
        assert max(gaps) <= INTERVAL_MS / 1000 + 0.005, "the least interval of what is unsynced counts"
        assert min(gaps) >= INTERVAL_MS / 1000 - 0.005, "and no more syncs than that"
        await store.close()

    run(scenario())


def test_a_long_interval_alone_is_kept() -> None:
    async def scenario() -> None:
        disk = SimDisk()
        store, log, _ = await three_entries(disk, loose(interval_ms=5000))
        await append(store, log, [Writer(log).entry(1)])
        await asyncio.sleep(4.9)
        assert disk.unsynced_bytes
        await asyncio.sleep(0.2)
        assert not disk.unsynced_bytes
        await store.close()

    run(scenario())


@pytest.mark.parametrize(
    "what", ["term", "vote", "a configuration", "another replica that syncs", "a new replica", "a snapshot"]
)
def test_what_must_be_synced_first_takes_all_with_it(what: str) -> None:
    async def scenario() -> None:
        disk = SimDisk(latency=0.01)
        store, log, _ = await three_entries(disk)
        strict = await store.create(spec(2))
        await append(store, log, [Writer(log).entry(1)])
        assert disk.unsynced_bytes
        if what == "term":
            await append(store, log, (), HardState(2, 0, 3))
        elif what == "vote":
            await append(store, log, (), HardState(1, 7, 3))
        elif what == "a configuration":
            payload = msgspec.msgpack.encode(ConfState((1, 2)))
            await append(store, log, [Writer(log).entry(1, kind=FrameKind.CONF, payload=payload)])
        elif what == "another replica that syncs":
            await append(store, strict, [Writer(strict).entry(1)])
        elif what == "a new replica":
            await store.create(spec(3))
        else:
            await store.flush()
        assert disk.unsynced_bytes == 0
        await append(store, log, [Writer(log).entry(max(1, log.hard_state.term))], log.hard_state)
        assert disk.unsynced_bytes, "the commit index alone, or nothing new, is not synced for its own sake"
        await store.close()

    run(scenario())


@SIZES
def test_a_killed_process_loses_nothing(size: int) -> None:
    async def scenario() -> None:
        disk = SimDisk()
        store, log, _ = await three_entries(disk)
        for _ in range(5):
            await append(store, log, [Writer(log).entry(1, size=size)])
        held = await contents(log)
        assert disk.unsynced_bytes
        disk = disk.kill()
        _, log = await reopen(disk)
        assert await contents(log) == held
        assert not log.amnesiac
        _, log = await reopen(disk.crash(CrashMode.NONE))
        assert await contents(log) == held, "recovery made durable what it read"

    run(scenario())


@SIZES
@pytest.mark.parametrize("mode", CrashMode)
@pytest.mark.parametrize("seed", range(5))
def test_a_power_cut_loses_the_last_interval_at_most(seed: int, mode: CrashMode, size: int) -> None:
    async def scenario() -> None:
        disk = SimDisk(Random(seed), latency=0.001)
        store, log, _ = await three_entries(disk)
        loop = asyncio.get_running_loop()
        confirmed: list[tuple[float, bytes]] = []
        while len(confirmed) < 50:
            entry = Writer(log).entry(1, size=size)
            await append(store, log, [entry])
            confirmed.append((loop.time(), bytes(entry.frame)))
            await asyncio.sleep(0.011)
        now = loop.time()
        store, log = await reopen(disk.crash(mode))
        found = (await contents(log))[3:]
        frames = [frame for _, frame in confirmed]
        assert found == frames[: len(found)]
        old = [frame for at, frame in confirmed if now - at > INTERVAL_MS / 1000 + 0.002]
        assert len(old) > 20
        assert len(found) >= len(old)
        assert log.amnesiac
        await store.close()

    run(scenario())


@pytest.mark.parametrize("mode", [CrashMode.NONE, CrashMode.RANDOM])
@pytest.mark.parametrize("seed", range(20))
def test_a_truncation_that_is_lost_brings_the_old_log_back_whole(seed: int, mode: CrashMode) -> None:
    """What is not synced may not overwrite, flush or release anything that recovery would then miss."""

    async def scenario() -> None:
        random = Random(seed)
        disk = SimDisk(random)
        store, log, _ = await three_entries(disk)
        await grow(store, log, 4, size=random.choice([300, 5000]), commit=False)
        await append(store, log, (), HardState(2, 0, 3))  # synced, and with it all before
        synced = await contents(log)
        fresh = Writer(log).entry(2, index=random.randint(4, 7), size=5000)
        await append(store, log, [fresh])
        for _ in range(3):
            await append(store, log, [Writer(log).entry(2, size=random.choice([300, 5000]))])
        log.set_committed(log.last_index)
        await store._flusher.flush_all()
        assert log.flushed_index == fresh.index - 1, "what is not synced stays out of the segments"
        written = await contents(log)
        _, log = await reopen(disk.crash(mode))
        found = await contents(log)
        assert found in (synced, written[: len(found)]), (len(found), len(synced))
        assert len(found) >= fresh.index - 1

    run(scenario())


def test_files_roll_and_go_while_little_is_synced() -> None:
    async def scenario() -> None:
        disk = SimDisk(Random(3))
        config = replace(CALM, journal_bytes=8 << 10)
        store = await BrokerStore.open(disk, config, disk_id=DISK_ID)
        log = await store.create(loose(interval_ms=60_000))
        await grow(store, log, 500, size=200)
        await store.flush()
        assert len(store._journal.files) <= 3
        held = await contents(log)
        store = await BrokerStore.open(disk.crash(CrashMode.NONE), config, disk_id=DISK_ID)
        found = await contents(store.logs[1])
        assert found == held
        await store.close()

    run(scenario())


@pytest.mark.parametrize("seed", range(10))
def test_a_file_begins_only_when_the_one_before_is_synced(seed: int) -> None:
    """Its header says so; were it not true, recovery would take a torn tail for damage."""

    async def scenario() -> None:
        disk = SimDisk(record=True)
        config = replace(CALM, journal_bytes=8 << 10)
        store = await BrokerStore.open(disk, config, disk_id=DISK_ID)
        log = await store.create(loose(interval_ms=60_000))
        await grow(store, log, 100, size=200)
        await store.close()
        trace = disk.trace or []
        seen: set[str] = set()
        for count, step in enumerate(trace, 1):
            if step.op is Op.WRITE and step.path.startswith("journal/") and step.path not in seen:
                seen.add(step.path)
                torn = replay(trace[:count], CrashMode.RANDOM, Random(seed))
                after = await BrokerStore.open(torn, config, disk_id=DISK_ID)
                assert not after.damaged
        assert len(seen) > 3

    run(scenario())


def test_a_segment_that_a_truncation_took_away_needs_no_sync(tmp_path: Path) -> None:
    async def scenario() -> None:
        disk = RealDisk(tmp_path)
        store = await BrokerStore.open(disk, CALM, disk_id=DISK_ID)
        log = await store.create(loose(interval_ms=60_000))
        await grow(store, log, 3)
        for _ in range(2):
            await append(store, log, [Writer(log).entry(1, size=5000)])
        assert len(log.segments) == 2
        fresh = Writer(log).entry(2, index=4)
        await append(store, log, [fresh], HardState(2, 0, 3))
        assert len(log.segments) == 1
        assert store.fault is None
        await store.close()
        assert store.fault is None

    asyncio.run(scenario())


def test_a_full_device_takes_all_again_that_no_sync_has_covered() -> None:
    """A sync that fails for want of room may have dropped what was written before."""

    async def scenario() -> None:
        disk = FullAtSync(Random(1))
        store, log, _ = await three_entries(disk)
        await append(store, log, [Writer(log).entry(1, size=300)])
        await append(store, log, [Writer(log).entry(1, size=5000)])
        disk.full = True
        await append(store, log, (), HardState(2, 1, 3))
        assert not disk.full
        held = await contents(log)
        _, log = await reopen(disk.crash(CrashMode.NONE))
        assert await contents(log) == held

    run(scenario())


class FullAtSync(SimDisk):
    """A device that finds out at a sync that it has no room, and drops what the sync covered."""

    full = False

    def _sync(self, path: str, node: Any) -> None:
        if self.full:
            from raftlog.errors import StorageFull

            self.full = False
            for each in self._nodes.values():
                each.pending.clear()
            raise StorageFull("no room")
        super()._sync(path, node)


def test_amnesia_lasts_until_it_is_cured() -> None:
    async def scenario() -> None:
        disk = SimDisk()
        store, log, _ = await three_entries(disk)
        await store.create(spec(2))
        disk = disk.crash()
        store, log = await reopen(disk)
        assert log.amnesiac
        assert not store.logs[2].amnesiac, "it syncs before it confirms"
        disk = disk.kill()
        store, log = await reopen(disk)
        assert log.amnesiac, "killed before it was cured, in the same boot"
        await store.close()
        store, log = await reopen(disk)
        assert log.amnesiac, "a clean stop cures nothing"
        await log.cured()
        assert not log.amnesiac
        disk = disk.kill()
        store, log = await reopen(disk)
        assert not log.amnesiac
        await store.close()
        _, log = await reopen(disk.crash())
        assert not log.amnesiac, "the power was cut after a clean stop"

    run(scenario())


def test_a_removed_replica_is_remembered_no_longer() -> None:
    async def scenario() -> None:
        disk = SimDisk()
        await three_entries(disk)
        disk = disk.crash()
        store, _ = await reopen(disk)
        await store.remove(1, 1)
        manifest = await load_manifest(disk)
        assert manifest is not None
        assert manifest.amnesiac == ()
        await store.close()

    run(scenario())


def test_a_failed_sync_makes_amnesiac() -> None:
    async def scenario() -> None:
        disk = SimDisk()
        store, log, _ = await three_entries(disk)
        await append(store, log, [Writer(log).entry(1)])
        disk.fail_sync()
        await asyncio.sleep(1.0)
        assert isinstance(store.fault, StorageFailed)
        with pytest.raises(StorageFailed):
            await submit(store, log, [Writer(log).entry(1)])
        await store.close()
        _, log = await reopen(disk.kill())
        assert log.amnesiac

    run(scenario())


@pytest.mark.parametrize("seed", range(12))
def test_a_torn_group_commits_nothing_that_was_about_to_be_replaced(seed: int) -> None:
    """A follower replaces entries by ones that its leader has committed already: term, vote and commit index
    stand before them in the journal, and the power may go between the two."""

    async def scenario() -> None:
        disk = SimDisk(Random(seed), latency=0.01)
        store, log, _ = await three_entries(disk, spec())
        old = await grow(store, log, 2, commit=False)
        fresh = Writer(log).entry(2, index=4, size=1500)
        submit(store, log, [fresh], HardState(2, 0, 4))
        log.set_committed(4)
        await asyncio.sleep(0.005)
        _, log = await reopen(disk.crash(CrashMode.PREFIX))
        commit = log.recovered.hard_state.commit
        assert commit <= 3 or log.memory.at(4).crc == fresh.crc
        assert log.memory.at(4).crc in (old[0].crc, fresh.crc)

    run(scenario())


@pytest.mark.parametrize("seed", range(12))
def test_nor_does_the_checkpoint_at_the_head_of_a_new_file(seed: int) -> None:
    async def scenario() -> None:
        disk = SimDisk(Random(seed), latency=0.01)
        config = replace(CALM, journal_bytes=4 << 10)
        store = await BrokerStore.open(disk, config, disk_id=DISK_ID)
        log = await store.create(spec())
        await grow(store, log, 3)
        await store.flush()
        old = await grow(store, log, 2, size=800, commit=False)
        await append(store, log, (), HardState(2, 0, 3))
        sequence = store._journal.sequence
        fresh = Writer(log).entry(2, index=4, size=1900)
        submit(store, log, [fresh])
        log.set_committed(4)
        await asyncio.sleep(0.005)
        after = await BrokerStore.open(disk.crash(CrashMode.PREFIX), config, disk_id=DISK_ID)
        assert sequence == 1, "the last append begins the second file"
        log = after.logs[1]
        commit = log.recovered.hard_state.commit
        assert commit <= 3 or log.memory.at(4).crc == fresh.crc
        assert log.memory.at(4).crc in (old[0].crc, fresh.crc)

    run(scenario())
