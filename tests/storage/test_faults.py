"""A device that is full, fails, or rots: nothing is acknowledged that is not safe, nothing wrong is ever
read."""

from __future__ import annotations

import asyncio
import random
from functools import partial

import pytest
from storage_kit import DISK_ID, SMALL, Writer, append, contents, grow, run, snapshot_at, spec, submit

from raftlog.errors import DamagedData, RaftlogError, StorageFailed, StorageFull
from raftlog.raft.types import HardState
from raftlog.storage.identity import Identity, store_identity
from raftlog.storage.journal_files import JournalFile, JournalFiles
from raftlog.storage.store import BrokerStore
from raftlog.storage.verify import verify
from raftlog.testing.disk import CrashMode, SimDisk

# -- a full device -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [200, 3000], ids=["through the journal", "straight to the segment"])
def test_full_then_room_again(size: int) -> None:
    """Writes wait with a typed fault, reads go on; once there is room all that waited is durable, in
    order."""

    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        expected = [bytes(e.frame) for e in await grow(store, log, 30, size=size)]
        faults: list[RaftlogError | None] = []
        cleared = asyncio.Event()

        def on_fault(fault: RaftlogError | None) -> None:
            faults.append(fault)
            if fault is None:
                cleared.set()

        store.on_fault = on_fault
        await store.flush()  # so that it is the journal that meets the limit
        disk.capacity = disk.used_bytes
        order: list[int] = []

        def note(n: int, _: object) -> None:
            order.append(n)

        futures = []
        while store.fault is None:
            entry = Writer(log).entry(1, size=size)
            expected.append(bytes(entry.frame))
            futures.append(submit(store, log, [entry], HardState(1, 0, 0)))
            futures[-1].add_done_callback(partial(note, len(futures)))
            await asyncio.sleep(0.0005)
        assert isinstance(store.fault, StorageFull)
        assert store.fault.retriable
        assert not futures[-1].done()
        assert store.oldest_pending_since is not None
        assert await contents(log) == expected, "reads go on"
        disk.capacity = None
        await asyncio.gather(*futures)
        assert order == list(range(1, len(futures) + 1))
        await cleared.wait()
        assert store.fault is None
        assert [type(fault) for fault in faults] == [StorageFull, type(None)]
        await grow(store, log, 5, size=size)
        disk = disk.crash(CrashMode.NONE)
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        assert (await contents(store.logs[1]))[: len(expected)] == expected

    run(main())


def test_lazy_flush_on_a_full_device_loses_nothing() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        await grow(store, log, 20, commit=False)
        disk.capacity = disk.used_bytes
        log.set_committed(20)
        with pytest.raises(StorageFull):
            await store.flush()
        assert log.flushed_index < 20
        assert len(await contents(log)) == 20
        disk.capacity = None
        await store.flush()
        assert log.flushed_index == 20
        await store.close()
        assert not (await verify(disk)).problems

    run(main())


def test_close_while_full_tells_those_who_wait() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        await grow(store, log, 3)
        await store.flush()
        disk.capacity = disk.used_bytes
        futures = []
        while store.fault is None:
            futures.append(submit(store, log, [Writer(log).entry(1, size=1000)]))
            await asyncio.sleep(0.0005)
        await store.close()
        with pytest.raises(StorageFailed):
            await futures[-1]
        disk.capacity = None
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        assert not store.was_clean
        assert store.logs[1].last_index >= 3

    run(main())


class FullAtTheIndex(SimDisk):
    """Has no room when the index of a segment is to be written."""

    full = False

    async def replace_file(self, path: str, data: bytes) -> None:
        if self.full and path.endswith(".idx"):
            raise StorageFull("no room")
        await super().replace_file(path, data)


def test_a_segment_whose_index_found_no_room_is_sealed_later_and_can_be_dropped() -> None:
    async def main() -> None:
        disk = FullAtTheIndex()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        disk.full = True
        for _ in range(100):
            (entry,) = await grow(store, log, 1)
            if log.is_segment_end(entry.index):
                log.save_snapshot(snapshot_at(log, entry.index))
        with pytest.raises(StorageFull):
            await store.flush()
        disk.full = False
        await store.flush()
        assert log.flushed_index == log.last_index
        assert len(log.segments) > 2
        await log.truncate_prefix(log.last_index)
        assert log.first_index > 1, "nothing can be dropped, for ever"
        assert all(segment.sealed for segment in log.segments[:-1])
        await store.close()

    run(main())


# -- a failing device ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["sync", "write"])
def test_a_failed_write_or_sync_fails_the_store_for_good(fault: str) -> None:
    """Never retried: after a failed sync the kernel has dropped the pages, and the next sync would claim
    success."""

    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        expected = [bytes(e.frame) for e in await grow(store, log, 5)]
        faults: list[RaftlogError | None] = []
        store.on_fault = faults.append
        if fault == "sync":
            disk.fail_sync()
        else:
            disk.fail_write()
        futures = [submit(store, log, [Writer(log).entry(1)]) for _ in range(3)]
        for result in await asyncio.gather(*futures, return_exceptions=True):
            assert isinstance(result, StorageFailed)
        assert isinstance(store.fault, StorageFailed)
        assert faults == [store.fault]
        with pytest.raises(StorageFailed):  # the device works again, the store does not
            await append(store, log, [Writer(log).entry(1)])
        with pytest.raises(StorageFailed):
            await store.create(spec(2))
        assert (await contents(log))[:5] == expected, "reads go on"
        await store.close()
        store = await BrokerStore.open(disk.crash(CrashMode.NONE), SMALL, disk_id=DISK_ID)
        assert (await contents(store.logs[1]))[:5] == expected
        assert set(store.logs) == {1}

    run(main())


def test_a_failed_lazy_flush_fails_the_store() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        failed = asyncio.Event()
        store.on_fault = lambda fault: failed.set()
        await grow(store, log, 20)
        disk.fail_write()
        log.save_snapshot(snapshot_at(log, 20))
        await failed.wait()
        assert isinstance(store.fault, StorageFailed)
        with pytest.raises(StorageFailed):
            await append(store, log, [Writer(log).entry(1)])

    run(main())


def test_a_store_that_fails_while_the_journal_begins_a_file_writes_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The new file would begin with checkpoints that speak of appends that were given up (seed 67)."""

    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        begun, go_on = asyncio.Event(), asyncio.Event()
        create = JournalFiles.create

        async def slow(self: JournalFiles, base: int) -> JournalFile:
            begun.set()
            await go_on.wait()
            return await create(self, base)

        monkeypatch.setattr(JournalFiles, "create", slow)
        while not begun.is_set():
            submit(store, log, [Writer(log).entry(1, size=500)], HardState(1, 0, 0))
            await asyncio.sleep(0)
        commits = disk.commits
        store._journal.fail(StorageFailed("a segment"))
        go_on.set()
        for _ in range(20):
            await asyncio.sleep(0)
        assert disk.commits == commits
        await store.abort()

    run(main())


@pytest.mark.parametrize("name", ["rename", "file_size"], ids=["the journal's next file", "a full segment"])
def test_a_file_that_is_gone_fails_the_store_and_does_not_stop_it_in_silence(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async def missing(*_: object) -> int:
        raise FileNotFoundError(2, "No such file or directory")

    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        monkeypatch.setattr(disk, name, missing)

        async def work() -> None:
            while True:
                await grow(store, log, 5)
                log.save_snapshot(snapshot_at(log, log.last_index))

        with pytest.raises(StorageFailed):
            await asyncio.wait_for(work(), 3)
        assert isinstance(store.fault, StorageFailed)
        await store.abort()

    run(main())


# -- bit rot -------------------------------------------------------------------------------------------------


async def _filled() -> tuple[SimDisk, dict[int, list[bytes]]]:
    """A stopped broker with something of everything, and a journal with entries that are in no segment."""
    disk = SimDisk()
    await store_identity(disk, Identity("cluster", "name", 1, DISK_ID, 1, b"secret", 1))
    store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
    first, second = await store.create_many([spec(1), spec(2)])
    await grow(store, first, 33)
    first.save_snapshot(snapshot_at(first, 33))
    await grow(store, first, 7)
    await grow(store, second, 4, size=2500)
    await store.flush()
    await grow(store, first, 12, commit=False, term=2)
    await grow(store, second, 3, size=2500, commit=False, term=2)
    expected = {1: await contents(first), 2: await contents(second)}
    await asyncio.sleep(SMALL.idle_mark_seconds * 3)  # the mark behind the last group
    return disk.crash(CrashMode.NONE), expected


def test_flips_everywhere_are_noticed_or_harmless() -> None:
    """One flipped bit at a time, in every file: the store refuses, calls the replica damaged, fails the read,
    or what it reads is right. All of it is there, or the loss was announced."""

    async def main() -> None:
        pristine, expected = await _filled()
        assert not (await verify(pristine.copy())).problems
        rng = random.Random(7)
        outcomes: dict[str, int] = {}
        for path in pristine.paths():
            size = len(pristine.content(path))
            places = {*range(0, min(size, 30), 3), *(rng.randrange(size) for _ in range(8))}
            for position in sorted(places):
                disk = pristine.copy()
                disk.flip(path, position, 1 << rng.randrange(8))
                reported = (await verify(disk.copy())).problems
                outcome = await _try(disk, expected)
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
                suffix = path.rpartition(".")[2]
                if outcome != "right":
                    assert reported, (path, position, outcome)
                elif suffix in ("seg", "idx", "snap") or path in ("MANIFEST", "IDENTITY"):
                    # Read correctly all the same (a sealed segment's index, an old snapshot): verify still
                    # tells.
                    assert reported or suffix == "seg", (path, position)
        assert outcomes["right"] > 20
        assert outcomes["refused"] > 20
        assert outcomes["damaged"] + outcomes["read failed"] > 20

    run(main())


async def _try(disk: SimDisk, expected: dict[int, list[bytes]]) -> str:
    try:
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
    except RaftlogError:
        return "refused"
    outcome = "damaged" if store.damaged else "right"
    assert not store.lost
    for replica_id, log in store.logs.items():
        try:
            found = await contents(log)
        except DamagedData:
            outcome = "read failed"
            continue
        assert found == expected[replica_id], "neither wrong data nor a silent loss"
    await store.close()
    return outcome


def test_flip_in_the_last_group_is_a_torn_tail_until_a_mark_covers_it() -> None:
    async def main() -> None:
        for marked in (False, True):
            disk = SimDisk()
            store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
            log = await store.create(spec(1))
            expected = [bytes(e.frame) for e in await grow(store, log, 3, commit=False)]
            path = next(p for p in disk.paths() if p.startswith("journal/"))
            last = len(disk.content(path)) - 20
            if marked:
                await asyncio.sleep(SMALL.idle_mark_seconds * 3)
            disk = disk.crash(CrashMode.NONE)
            disk.flip(path, last)
            before = disk.content(path)
            if not marked:
                store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
                assert await contents(store.logs[1]) == expected[:2]
                continue
            with pytest.raises(DamagedData) as caught:
                await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
            assert caught.value.path == path
            assert 0 < caught.value.position <= last
            assert disk.content(path) == before, "never truncated below a floor"

    run(main())


def test_a_missing_journal_file_is_noticed() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        quiet, busy = await store.create_many([spec(1), spec(2)])
        await grow(store, quiet, 1, commit=False)
        files: list[str] = []
        while len(files) < 3:
            await grow(store, busy, 1)
            files = [p for p in disk.paths() if p.startswith("journal/")]
        await store.create(spec(3))
        disk = disk.crash(CrashMode.NONE)
        for missing in (files[1], files[-1]):
            copy = disk.copy()
            await copy.remove(missing)
            with pytest.raises(DamagedData, match="missing"):
                await BrokerStore.open(copy, SMALL, disk_id=DISK_ID)

    run(main())


def test_a_missing_or_cut_segment_damages_its_replica_only() -> None:
    async def main() -> None:
        pristine, expected = await _filled()
        segments = [p for p in pristine.paths() if p.startswith("replicas/1/") and p.endswith(".seg")]
        for n, path in enumerate(segments):
            for change in ("remove", "cut"):
                disk = pristine.copy()
                if change == "remove":
                    await disk.remove(path)
                else:
                    disk.put(
                        path, disk.content(path)[:-1] if n < len(segments) - 1 else disk.content(path)[:100]
                    )
                store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
                assert set(store.damaged) == {1}, (path, change)
                assert set(store.logs) == {2}
                assert await contents(store.logs[2]) == expected[2]
                await grow(store, store.logs[2], 2, term=3)
                await store.close()
                assert any("replicas/1" in problem.path for problem in (await verify(disk)).problems)

    run(main())


def test_a_missing_index_is_made_again() -> None:
    async def main() -> None:
        disk, expected = await _filled()
        for path in [p for p in disk.paths() if p.endswith(".idx")]:
            await disk.remove(path)
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        assert await contents(store.logs[1]) == expected[1]
        assert (await store.logs[1].read(0, 10, 1))[0]
        assert [p for p in disk.paths() if p.endswith(".idx")]

    run(main())


def test_a_damaged_index_is_read_around() -> None:
    """The arrays are looked at when a read first needs them: the frames say the same."""

    async def main() -> None:
        disk, expected = await _filled()
        indexes = [p for p in disk.paths() if p.startswith("replicas/1/") and p.endswith(".idx")]
        for path in indexes:
            disk.flip(path, len(disk.content(path)) - 5)
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        assert await contents(store.logs[1]) == expected[1]
        assert b"".join(await store.logs[1].read(0, 1, 1)) == expected[1][0]
        await store.close()
        assert {p.path for p in (await verify(disk)).problems} >= set(indexes[:1])

    run(main())
