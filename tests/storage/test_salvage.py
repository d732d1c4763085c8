"""Repair of a damaged replica with bytes from others: what is taken, what is refused, what a crash leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from salvage_kit import (
    ENTRIES,
    crashed,
    cut,
    filled,
    flip,
    flip_in,
    forget_indexes,
    open_store,
    remove,
    repaired,
    segments,
)
from storage_kit import DISK_ID, SMALL, Writer, append, contents, grow, run, spec, submit

from raftlog.errors import CorruptFrame, DamagedData
from raftlog.raft.types import Entry, HardState
from raftlog.record.frame import FrameKind
from raftlog.storage.damage import BrokenLog
from raftlog.storage.real_disk import RealDisk
from raftlog.storage.segment import SEGMENT_HEADER_BYTES, replica_folder, segment_path
from raftlog.storage.store import BrokerStore
from raftlog.storage.verify import verify
from raftlog.testing.disk import CrashMode, SimDisk

Damage = Callable[[SimDisk, list[str]], None]
DAMAGES: dict[str, Damage] = {
    "the first segment is missing": lambda disk, paths: remove(disk, paths[0]),
    "a segment in the middle is missing": lambda disk, paths: remove(disk, paths[2]),
    "two neighbours are missing": lambda disk, paths: remove(disk, *paths[1:3]),
    "the last segment is missing": lambda disk, paths: remove(disk, paths[-1]),
    "all segments are missing": lambda disk, paths: remove(disk, *paths),
    "the header is damaged": lambda disk, paths: flip(disk, paths[1], 30),
    "the first header is damaged": lambda disk, paths: flip(disk, paths[0], 3),
    "header and frames are damaged": lambda disk, paths: flip(disk, paths[1], 30, 90),
    "it is cut short": lambda disk, paths: cut(disk, paths[1], 0.5),
    "it is cut to nothing": lambda disk, paths: cut(disk, paths[1], 0),
    "the last one is cut short": lambda disk, paths: cut(disk, paths[-1], 0.5),
    "a sealed segment rots": lambda disk, paths: flip_in(disk, paths[1:2], 0.5),
    "it rots at several places": lambda disk, paths: flip_in(disk, paths[1:2], 0.1, 0.5, 0.9),
    "the growing segment rots": lambda disk, paths: flip_in(disk, paths[-1:], 0.0, 0.5),
    "several segments rot": lambda disk, paths: flip_in(disk, paths, 0.3),
}


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_repaired_to_the_same_bytes(name: str, indexed: bool) -> None:
    async def main() -> None:
        disk, other = SimDisk(), SimDisk()
        peer = await filled(other)
        store = await filled(disk)
        frames = await contents(store.logs[1])
        await store.close()
        whole = segments(disk)
        DAMAGES[name](disk, list(whole))
        if not indexed:
            forget_indexes(disk)
        store = await open_store(disk)
        if 1 in store.logs:  # recovery trusts index files: reading finds it
            assert indexed
            with pytest.raises(DamagedData):
                await contents(store.logs[1])
        else:
            assert list(store.damaged) == [1]
        # What one look finds is repaired; reading may find more.
        while True:
            assert await repaired(store, peer) > 0
            try:
                assert await contents(store.logs[1]) == frames
            except DamagedData:
                continue
            break
        assert not store.ward.patients
        assert segments(disk) == whole
        await grow(store, store.logs[1], 5, term=9)
        await store.close()
        report = await verify(disk)
        assert not report.problems
        await peer.close()

    run(main())


def test_two_replicas_damaged_at_different_places_repair_each_other() -> None:
    async def main() -> None:
        disks = [SimDisk(), SimDisk()]
        for disk in disks:
            await (await filled(disk)).close()
            forget_indexes(disk)
        whole = segments(disks[0])
        for disk, place in zip(disks, (0.3, 0.7), strict=True):
            flip_in(disk, list(whole), place)
        stores = [await open_store(disk) for disk in disks]
        for store, peer in (stores, stores[::-1]):
            assert list(store.damaged) == [1]
            await repaired(store, peer)
        for store, disk in zip(stores, disks, strict=True):
            assert segments(disk) == whole
            assert not store.damaged
            await store.close()

    run(main())


def test_running_replicas_repair_each_other_frame_by_frame() -> None:
    """Damaged side by side, they are all in the way of each other's reads."""

    async def main() -> None:
        disks = [SimDisk(), SimDisk()]
        stores = [await filled(disk) for disk in disks]
        whole = segments(disks[0])
        path = next(iter(whole))
        frames = await contents(stores[0].logs[1])
        position = SEGMENT_HEADER_BYTES
        for number, frame in enumerate(frames[:12]):
            flip(disks[number % 2], path, position + 60)
            position += len(frame)
        for store in stores:
            log = store.logs[1]
            log.memory_starts_at(log.flushed_index + 1)
            with pytest.raises(DamagedData):
                await contents(log)
        for store, peer in (stores[::-1], stores):
            assert await repaired(store, peer) == 6
        for store, disk in zip(stores, disks, strict=True):
            assert await contents(store.logs[1]) == frames
            assert segments(disk) == whole
            await store.close()

    run(main())


def test_what_only_the_journal_of_a_damaged_replica_has_helps_others() -> None:
    async def main() -> None:
        disk, other = SimDisk(), SimDisk()
        store = await filled(disk, count=60)
        peer = await filled(other, count=30)
        await grow(peer, peer.logs[1], 30)  # in its journal only
        assert [bytes(a) for a in await contents(peer.logs[1])] == await contents(store.logs[1])
        await store.close()
        other = await crashed(peer, other)
        for each in (disk, other):
            forget_indexes(each)
        flip_in(other, list(segments(other))[:1], 0.5)
        remove(disk, *list(segments(disk))[1:])
        peer, store = await open_store(other), await open_store(disk)
        assert list(peer.damaged) == list(store.damaged) == [1]
        await repaired(store, peer)
        await repaired(peer, store)
        assert await contents(peer.logs[1]) == await contents(store.logs[1])
        await store.close()
        await peer.close()

    run(main())


def test_large_frames_that_the_journal_refers_to_are_repaired() -> None:
    async def main() -> None:
        disk, other = SimDisk(), SimDisk()
        peer = await filled(other, count=30, large=(20, 25))
        store = await open_store(disk)
        log = await store.create(spec())
        for number in range(30):
            await grow(store, log, 1, size=3000 if number in (20, 25) else 100, commit=number < 10)
        frames = await contents(log)
        await grow(store, log, 1, commit=False)  # a mark says that what came before it was synced
        disk = await crashed(store, disk)
        for path in segments(disk):
            size = len(disk.content(path))
            for at in range(size - 2000, size - 1000, 50):
                disk.flip(path, at)
        store = await open_store(disk)
        assert list(store.damaged) == [1]
        assert await repaired(store, peer) > 0
        assert (await contents(store.logs[1]))[:30] == frames
        await store.close()
        await peer.close()

    run(main())


def test_repair_on_a_real_disk(tmp_path: Path) -> None:
    async def main() -> None:
        peer = await filled(SimDisk())
        store = await filled(RealDisk(tmp_path))
        frames = await contents(store.logs[1])
        await store.close()
        paths = sorted((tmp_path / replica_folder(1)).glob("*.seg"))
        whole = {path: path.read_bytes() for path in paths}
        for index in (tmp_path / replica_folder(1)).glob("*.idx"):
            index.unlink()
        paths[0].write_bytes(whole[paths[0]][:-300])
        paths[1].unlink()
        spoiled = bytearray(whole[paths[2]])
        spoiled[len(spoiled) // 2] ^= 8
        paths[2].write_bytes(spoiled)
        store = await open_store(RealDisk(tmp_path))
        assert await repaired(store, peer) == 2
        assert {path: path.read_bytes() for path in paths} == whole
        assert await contents(store.logs[1]) == frames
        assert not (tmp_path / replica_folder(1) / "repair").exists()
        await store.close()
        await peer.close()

    run(main())


def test_what_a_killed_process_had_written_outlives_the_sleep_of_its_replica() -> None:
    """A large frame was written and not synced. Its replica is damaged elsewhere, so it sleeps when the
    journal's mark next says that all is synced; then the power goes. Nobody else has that entry."""

    async def main() -> None:
        disk, other = SimDisk(), SimDisk()
        peer, store = await filled(other, count=60), await filled(disk, count=60)
        await store.create(spec(2, partition=1))
        disk.latency = 1.0  # the write is there at once, its sync comes later
        entry = Writer(store.logs[1]).entry(2, size=5000)
        doomed = submit(store, store.logs[1], [entry])
        for _ in range(100):
            await asyncio.sleep(0)
        assert any(bytes(entry.frame) in disk.content(path) for path in disk.paths())
        disk, killed = disk.kill(), store
        assert not doomed.done(), "killed before the sync"
        await killed.abort()
        disk.latency = 0.0
        forget_indexes(disk)
        flip_in(disk, list(segments(disk))[:1], 0.5)
        store = await open_store(disk)
        assert list(store.damaged) == [1]
        await grow(store, store.logs[2], 3)
        store = await open_store(await crashed(store, disk))
        await repaired(store, peer)
        assert (await contents(store.logs[1]))[60] == bytes(entry.frame)
        await store.close()
        await peer.close()

    run(main())


# -- what is refused -----------------------------------------------------------------------------------------


async def diverged(disk: SimDisk, upto: int) -> BrokerStore:
    """A store that holds the same up to ``upto`` and then a branch that was never committed."""
    store = await filled(disk, count=upto)
    log = store.logs[1]
    for _ in range(ENTRIES - upto + 5):
        entry = Writer(log).entry(3, size=100)
        await append(store, log, [entry], HardState(3, 0, upto))
    return store


def test_a_branch_that_was_never_committed_is_refused() -> None:
    async def main() -> None:
        disk, other, good = SimDisk(), SimDisk(), SimDisk()
        store = await filled(disk)
        wrong, peer = await diverged(other, 40), await filled(good)
        frames = await contents(store.logs[1])
        await store.close()
        whole = segments(disk)
        remove(disk, *list(whole)[1:])
        damaged = segments(disk)
        store = await open_store(disk)
        with pytest.raises(BrokenLog):
            await repaired(store, wrong)
        assert segments(disk) == damaged, "nothing of it came in"
        await repaired(store, peer)
        assert segments(disk) == whole
        assert await contents(store.logs[1]) == frames
        for each in (store, wrong, peer):
            await each.close()

    run(main())


def test_a_frame_inside_of_a_record_is_no_anchor_that_blocks() -> None:
    """Somebody keeps frames as values: one that checks, with a plausible index, stands in the middle of a
    damaged range."""

    async def main() -> None:
        disks = [SimDisk(), SimDisk()]
        stores = []
        for disk in disks:
            store = await open_store(disk)
            log = await store.create(spec())
            await grow(store, log, 3)
            fake = Entry.create(7, FrameKind.NOOP, 1, 8, 0, b"fake")
            payload = bytes(Writer(log).entry(1, size=200).payload)
            entry = Writer(log).entry(1, payload=payload[:100] + bytes(fake.frame) + payload[100:])
            await append(store, log, [entry])
            log.set_committed(entry.index)
            await grow(store, log, 10)
            await store.flush()
            stores.append(store)
        await stores[0].close()
        forget_indexes(disks[0])
        (path,) = segments(disks[0])
        whole = segments(disks[0])
        at = disks[0].content(path).index(b"fake") - 100
        disks[0].flip(path, at)
        store = await open_store(disks[0])
        assert await repaired(store, stores[1]) == 1
        assert segments(disks[0]) == whole
        await store.close()
        await stores[1].close()

    run(main())


def test_frames_of_another_log_that_a_misdirected_write_put_here_block_nothing() -> None:
    """The peer has what they stand upon, and not the last entries: these are behind them in our own file."""

    async def main() -> None:
        disk, foreign, good = SimDisk(), SimDisk(), SimDisk()
        await (await filled(disk, count=20)).close()
        peer = await filled(good, count=14)
        other = await open_store(foreign)
        log = await other.create(spec(2, partition=1))
        await grow(other, log, 10)
        await other.flush()
        await other.close()
        forget_indexes(disk)
        (path,) = whole = segments(disk)
        (theirs,) = segments(foreign)
        disk.overwrite(path, 0, disk_sectors(foreign, theirs, 2))
        store = await open_store(disk)
        assert await repaired(store, peer) >= 1
        assert segments(disk) == whole
        await store.close()
        await peer.close()

    run(main())


def disk_sectors(disk: SimDisk, path: str, count: int) -> bytes:
    return bytes(disk.content(path)[: count * 512])


def test_what_does_not_follow_is_refused() -> None:
    async def main() -> None:
        disk, other = SimDisk(), SimDisk()
        peer, store = await filled(other), await filled(disk)
        await store.close()
        remove(disk, list(segments(disk))[1])
        store = await open_store(disk)
        damage = await store.ward.next_damage(1)
        assert isinstance(damage, BrokenLog)
        patch = await store.ward.patch(damage)
        good = await peer.ward.frames(1, patch.index, patch.prev_crc, 700)
        assert not await peer.ward.frames(1, patch.index, patch.prev_crc ^ 1, 700)
        assert not await peer.ward.frames(1, ENTRIES + 50, patch.prev_crc, 700)
        spoiled = bytearray(good)
        spoiled[60] ^= 4
        first = int.from_bytes(good[:4], "big")
        for bad in (b"", b"x", bytes(spoiled), good[first:]):
            with pytest.raises(CorruptFrame, match="no frame that follows"):
                await patch.add(bad)
        assert not patch.is_proved
        await patch.close()
        await store.close()
        await peer.close()

    run(main())


# -- a crash -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a segment in the middle is missing", "it rots at several places", "it is cut short"]
)
def test_a_crash_in_the_middle_of_a_repair_is_harmless(name: str) -> None:
    async def main() -> None:
        good = SimDisk()
        peer = await filled(good)
        base = SimDisk()
        await (await filled(base)).close()
        whole = segments(base)
        DAMAGES[name](base, list(whole))
        forget_indexes(base)
        for seed in range(12):
            random = Random(seed)
            disk = base.copy()
            disk.random = random
            store = await open_store(disk)
            damage = await store.ward.next_damage(1)
            assert isinstance(damage, BrokenLog)
            patch = await store.ward.patch(damage)
            while not patch.is_proved:
                await patch.add(await peer.ward.frames(1, patch.index, patch.prev_crc, 700))
            if seed % 3:
                disk.fail_sync() if seed % 3 == 1 else disk.fail_write()
                with pytest.raises(Exception, match="Input/output"):
                    await patch.apply()
            disk = await crashed(store, disk, CrashMode.RANDOM)
            store = await open_store(disk)
            await repaired(store, peer)
            assert segments(disk) == whole
            assert not any(path.endswith("repair") for path in disk.paths()), "nothing is left aside"
            await store.close()
            assert not (await verify(disk)).problems
        await peer.close()

    run(main())


# -- a sleeping replica in the journal -----------------------------------------------------------------------


def test_the_journal_carries_a_damaged_replica_along() -> None:
    """Other replicas write on for many journal files; its term, vote and entries are still there, and no old
    file is held back for it."""

    async def main() -> None:
        disk, other = SimDisk(), SimDisk()
        store = await filled(disk, count=60)
        log = store.logs[1]
        await grow(store, log, 7, term=7, commit=False)
        await append(store, log, (), HardState(7, 3, log.committed))
        frames = await contents(log)
        neighbour = await store.create(spec(2, partition=1))
        peer = await filled(other, count=60)
        await store.close()
        path = next(iter(segments(disk)))
        forget_indexes(disk)
        disk.flip(path, 200)
        for _ in range(2):
            store = await open_store(disk)
            assert list(store.damaged) == [1]
            neighbour = store.logs[2]
            await grow(store, neighbour, 400, size=200)
            await store.flush()
            journals = [name for name in disk.paths() if name.startswith("journal/")]
            assert len(journals) <= 4, journals
            disk = await crashed(store, disk)
        store = await open_store(disk)
        await repaired(store, peer)
        log = store.logs[1]
        assert await contents(log) == frames
        assert (log.hard_state.term, log.hard_state.vote) == (7, 3)
        await grow(store, store.logs[2], 400, size=200)
        disk = await crashed(store, disk)
        store = await open_store(disk)
        assert await contents(store.logs[1]) == frames
        await store.close()
        await peer.close()

    run(main())


@pytest.mark.parametrize("damaged", ["first", "last"])
def test_a_large_frame_that_was_synced_is_not_torn_in_a_journal_that_only_repeats_it(damaged: str) -> None:
    """Found by seed 3000026: the journal file that a start begins has all entries of a damaged replica once
    more, above the floor. Killed before the next mark, a broker cut them off at the next start."""

    async def main() -> None:
        disk, other = SimDisk(), SimDisk()
        stores = [await filled(each, count=20) for each in (disk, other)]
        for store in stores:
            await grow(store, store.logs[1], 3, size=3000, commit=False)
            await store.create(spec(2, partition=1))  # its mark says that all before is synced
        (store, peer), log = stores, stores[0].logs[1]
        frames = await contents(log)
        place = log.place_of(21 if damaged == "first" else 23)
        assert place is not None, "it stands in the segment, and nothing of it is flushed"
        path = segment_path(1, place.base_index, place.base_offset)
        disk = await crashed(store, disk)
        disk.flip(path, place.position + 1000)
        unmarked = replace(SMALL, idle_mark_seconds=60)
        for _ in range(3):
            store = await BrokerStore.open(disk, unmarked, disk_id=DISK_ID)
            assert list(store.damaged) == [1]
            for _ in range(100):
                await asyncio.sleep(0)
            assert disk.commits_done == 1, "the file has begun, and no later mark tells of that"
            disk = await crashed(store, disk)
        store = await open_store(disk)
        await repaired(store, peer)
        assert await contents(store.logs[1]) == frames
        await store.close()
        await peer.close()

    run(main())


def test_a_sleeper_can_be_removed() -> None:
    async def main() -> None:
        disk = SimDisk()
        await (await filled(disk)).close()
        remove(disk, next(iter(segments(disk))))
        store = await open_store(disk)
        await store.remove(1, 1)
        assert not store.ward.patients
        assert not store.out_of_service
        assert await store.ward.next_damage(1) is None
        assert not any(path.startswith(replica_folder(1)) for path in disk.paths())
        await store.close()
        assert not (await open_store(disk)).damaged

    run(main())
