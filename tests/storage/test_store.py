"""The store as a broker uses it: appends, group commit, reads, segments, snapshots, replicas that come and
go."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from storage_kit import (
    DISK_ID,
    SMALL,
    Writer,
    append,
    contents,
    frames_in,
    grow,
    reopen,
    run,
    snapshot_at,
    spec,
    submit,
)

from raftlog.errors import DataDirLocked, ForeignDataDir, RaftlogError
from raftlog.raft.types import Append, ConfState, Entry, HardState
from raftlog.record.frame import FrameKind
from raftlog.storage.journal import Journal
from raftlog.storage.manifest import Manifest, store_manifest
from raftlog.storage.spec import StorageConfig
from raftlog.storage.store import BrokerStore
from raftlog.storage.verify import verify
from raftlog.testing.disk import SimDisk


@pytest.mark.parametrize("clean", [True, False])
def test_round_trip(clean: bool) -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        small, large = await store.create_many([spec(1), spec(2)])
        expected = {
            1: [bytes(e.frame) for e in await grow(store, small, 120)],
            2: [bytes(e.frame) for e in await grow(store, large, 12, size=3000)],
        }
        ends = {1: small.end_offset, 2: large.end_offset}
        for _ in range(3):
            store, disk = await reopen(store, disk, clean=clean)
            for replica_id, log in store.logs.items():
                assert await contents(log) == expected[replica_id]
                assert log.end_offset == ends[replica_id]
                assert log.hard_state.term == 1
                assert (log.first_index, log.start_offset) == (1, 0)
                log.set_committed(log.last_index)
            more = await grow(store, store.logs[1], 5)
            expected[1] += [bytes(e.frame) for e in more]
            ends[1] += 5
        await store.close()
        assert not (await verify(disk)).problems

    run(main())


def test_appends_that_wait_share_one_sync() -> None:
    async def main() -> None:
        disk = SimDisk()
        config = StorageConfig(journal_bytes=1 << 20, idle_mark_seconds=60)
        store = await BrokerStore.open(disk, config, disk_id=DISK_ID)
        logs = await store.create_many([spec(n) for n in range(1, 9)])
        before = disk.commits
        futures = [submit(store, log, [Writer(log).entry(1)]) for log in logs]
        assert store.pending_bytes > 0
        assert store.oldest_pending_since is not None
        await asyncio.gather(*futures)
        assert disk.commits == before + 1
        assert store.pending_bytes == 0
        assert store.oldest_pending_since is None
        # While a sync is under way, all that comes goes into the next one.
        disk.latency = 0.01
        first = submit(store, logs[0], [Writer(logs[0]).entry(1)])
        await asyncio.sleep(0.002)
        later = [submit(store, log, [Writer(log).entry(1)]) for log in logs for _ in range(3)]
        await asyncio.gather(first, *later)
        assert disk.commits == before + 3

    run(main())


def test_many_replicas_are_created_at_the_price_of_one() -> None:
    async def main() -> None:
        disk = SimDisk()
        config = StorageConfig(idle_mark_seconds=60)
        store = await BrokerStore.open(disk, config, disk_id=DISK_ID)
        await store.create(spec(1))
        before = disk.syncs
        await store.create(spec(2))
        one = disk.syncs - before
        await store.create_many([spec(n) for n in range(3, 53)])
        assert disk.syncs - before - one == one == 2

    run(main())


def test_callbacks_come_in_order_and_only_after_the_sync() -> None:
    async def main() -> None:
        disk = SimDisk(latency=0.001)
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        order: list[int] = []
        for n in range(20):
            entry = Writer(log).entry(1)
            syncs = disk.syncs
            store.append(log, Append(n, None, (entry,)), lambda error, n=n: order.append(n))
            store.begin()
            assert log.last_index == n + 1, "readable at once"
            assert log.durable_index <= n
            if n % 7 == 0:
                await asyncio.sleep(0.0015)
                assert disk.syncs >= syncs
        await append(store, log)
        assert order == list(range(20))
        assert log.durable_index == 20

    run(main())


def test_who_waits_for_the_next_group_is_not_told_with_this_one() -> None:
    """The host begins the next group as soon as this one is settled: what waits for that is not durable."""

    async def main() -> None:
        disk = SimDisk(latency=0.01)
        store = await BrokerStore.open(disk, StorageConfig(idle_mark_seconds=60.0), disk_id=DISK_ID)
        log = await store.create(spec(1))
        settled: list[int] = []

        def go_on(_: BaseException | None) -> None:
            settled.append(disk.commits_done)
            store.begin()

        before = disk.commits
        store.append(log, Append(1, None, (Writer(log).entry(1),)), go_on)
        store.begin()
        submit(store, log, [Writer(log).entry(1)])
        await store._journal.checkpoint([log])
        assert settled[0] == before + 1
        assert disk.commits_done == before + 2
        await store.close()

    run(main())


def test_a_callback_that_raises_stops_nothing() -> None:
    async def main() -> None:
        raised: list[object] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: raised.append(context["exception"])
        )
        store = await BrokerStore.open(SimDisk(), SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))

        def bad(error: BaseException | None) -> None:
            raise ValueError("the host's bug")

        store.append(log, Append(1, None, (Writer(log).entry(1),)), bad)
        store.begin()
        await append(store, log, [Writer(log).entry(1)])
        assert [type(error) for error in raised] == [ValueError]

    run(main())


def test_idle_mark_covers_the_last_group() -> None:
    """Damage to an acknowledged group is told from a torn tail once a mark has been written behind it."""

    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        await append(store, log, [Writer(log).entry(1)])
        before = disk.commits
        await asyncio.sleep(SMALL.idle_mark_seconds * 6)
        assert disk.commits == before + 1, "one mark, not one per interval"

    run(main())


# -- segments and snapshots ----------------------------------------------------------------------------------


def test_segments_of_replicas_hold_equal_ranges() -> None:
    """Whatever the timing of flushes, large frames and restarts: the same frames give the same files."""

    async def main() -> None:
        contents_of = []
        for step in (1, 3, 50):
            disk = SimDisk()
            store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
            log = await store.create(spec(1))
            for n in range(50):
                entry = Writer(log).entry(1, size=(100, 700, 2600)[n % 3])
                await append(store, log, [entry])
                if n % step == 0:
                    log.set_committed(entry.index)
                    await store.flush()
            log.set_committed(50)
            await store.close()
            names = [p for p in disk.paths() if p.endswith(".seg")]
            contents_of.append([(name, disk.content(name)) for name in names])
        assert contents_of[0] == contents_of[1] == contents_of[2]
        assert len(contents_of[0]) > 5

    run(main())


def test_snapshot_at_each_segment_end_is_written_once_synced() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        ends = []
        for entry in [*range(100)]:
            made = (await grow(store, log, 1, commit=False))[0]
            if log.is_segment_end(made.index):
                ends.append(made.index)
                log.save_snapshot(snapshot_at(log, made.index))
                assert log.flushed_index <= made.index
            assert entry + 1 == made.index
        assert len(ends) >= 3
        assert [i for i in range(1, 101) if log.is_segment_end(i)] == ends
        await store.flush()
        assert log.snapshots == ends
        assert [i for i in range(1, 101) if log.is_segment_end(i)] == ends, "also once out of memory"
        store, disk = await reopen(store, disk, clean=False)
        found = store.logs[1].snapshot
        assert found is not None
        assert (found.index, found.data) == (ends[-1], b"state at %d" % ends[-1])

    run(main())


def test_a_damaged_snapshot_falls_back_to_an_older_one() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        for index in (5, 9):
            await grow(store, log, index - log.last_index)
            log.save_snapshot(snapshot_at(log, index))
            await store.flush()
        await store.close()
        disk.flip(next(p for p in disk.paths() if p.endswith("9.snap")), 40)
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        found = store.logs[1].snapshot
        assert found is not None
        assert found.index == 5
        await store.close()
        assert [p.path[-6:] for p in (await verify(disk)).problems] == ["9.snap"]

    run(main())


def test_truncate_prefix_drops_whole_segments_below_a_snapshot() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        entries = await grow(store, log, 35)
        await store.flush()
        await log.truncate_prefix(60)
        assert len(log.segments) > 1
        assert log.first_index == 1, "no snapshot covers it"
        while len(entries) < 100:
            entries += await grow(store, log, 1)
            if log.is_segment_end(len(entries)):
                log.save_snapshot(snapshot_at(log, len(entries)))
        await store.flush()
        await log.truncate_prefix(80)
        first = log.first_index
        assert 50 < first <= 81
        assert log.start_offset == first - 1
        assert log.prev_crc == entries[first - 2].crc
        expected = await contents(log)
        assert [bytes(e.frame) for e in entries[first - 1 :]] == expected
        for clean in (False, True):
            store, disk = await reopen(store, disk, clean=clean)
            log = store.logs[1]
            assert (log.first_index, log.prev_crc) == (first, entries[first - 2].crc)
            assert await contents(log) == expected
            assert log.terms == ((first, 1),)
            assert frames_in(await log.read(0, 100, 1))[0] == first
        await store.close()
        report = await verify(disk)
        assert not report.problems
        assert len([p for p in disk.paths() if p.endswith(".seg")]) == len(log.segments)

    run(main())


def test_truncate_prefix_keeps_a_segment_of_which_nothing_is_flushed_yet() -> None:
    """It ends, as far as it is flushed, where the one before it ends; its entries are in the journal, and the
    next segment has begun already (seed 4100579)."""

    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        entries = await grow(store, log, 1)
        while not log.is_segment_end(len(entries)):
            entries += await grow(store, log, 1)
        border = len(entries)
        log.save_snapshot(snapshot_at(log, border))
        await store.flush()
        while len(log.segments) < 3:
            entries += await grow(store, log, 1, commit=False)
        await log.truncate_prefix(border)
        assert log.first_index == border + 1
        assert [bytes(e.frame) for e in entries[border:]] == await contents(log)
        await store.close()

    run(main())


def test_configurations_are_recovered_and_rolled_back() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        first, second = ConfState((1, 2)), ConfState((1, 2, 3))

        def conf(state: ConfState, term: int = 1, index: int | None = None) -> Entry:
            payload = msgspec.msgpack.encode(state)
            return Writer(log).entry(term, index=index, kind=FrameKind.CONF, payload=payload)

        await append(store, log, [conf(first)])
        await grow(store, log, 60)
        await append(store, log, [conf(second)])
        expected = [(0, ConfState((1,))), (1, first), (62, second)]
        assert log.confs == expected
        store, disk = await reopen(store, disk, clean=False)
        log = store.logs[1]
        assert list(log.recovered.confs) == expected
        log.set_committed(61)
        await append(store, log, [Writer(log).entry(2, index=62)])
        assert log.confs == expected[:2]
        assert log.conf_at(62) == first
        assert log.conf_at(0) == ConfState((1,))

    run(main())


def test_terms_are_recovered() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        await grow(store, log, 40, term=1)
        await grow(store, log, 30, term=3)
        await grow(store, log, 5, term=4, commit=False)
        for clean in (False, True):
            store, disk = await reopen(store, disk, clean=clean)
            log = store.logs[1]
            assert log.terms == ((1, 1), (41, 3), (71, 4))
            assert log.last_index == 75
            assert log.last_leader_time_ms == 750
            assert log.hard_state.term == 4
            assert [e.index for e in log.tail] == list(range(log.flushed_index + 1, 76))

    run(main())


# -- the journal's files -------------------------------------------------------------------------------------


def journal_files(disk: SimDisk) -> list[str]:
    return [p for p in disk.paths() if p.startswith("journal/")]


def test_journal_files_are_released_and_used_again() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        renamed = 0
        for _ in range(40):
            before = set(journal_files(disk))
            await grow(store, log, 20)
            await store.flush()
            after = set(journal_files(disk))
            renamed += bool(after - before) and len(after) <= len(before)
            assert len(after) <= 3
        assert int(max(journal_files(disk))[8:24], 16) > 8
        assert renamed > 5
        assert len(await contents(log)) == 800

    run(main())


def test_a_quiet_uncommitted_group_does_not_hold_the_journal() -> None:
    """Entries that nobody commits are copied to the journal's head, so that old files can go."""

    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        quiet, busy = await store.create_many([spec(1), spec(2)])
        await grow(store, quiet, 3, commit=False)
        await append(store, quiet, [Writer(quiet).entry(1, size=5000)], HardState(7, 3, 0))
        expected = await contents(quiet)
        for _ in range(20):
            await grow(store, busy, 40)
            await store.flush()
        assert len(journal_files(disk)) <= SMALL.journal_files_max + 2
        for _ in range(2):
            store, disk = await reopen(store, disk, clean=False)
            assert await contents(store.logs[1]) == expected
            assert store.logs[1].hard_state == HardState(7, 3, 0)
        quiet = store.logs[1]
        quiet.set_committed(4)
        await store.flush()
        await store.close()
        assert not (await verify(disk)).problems

    run(main())


def durable_part(disk: SimDisk) -> SimDisk:
    """What a power cut would leave at least; the disk itself goes on."""
    made = SimDisk()
    for path, node in disk._nodes.items():
        made.put(path, bytes(node.durable))
    return made


def test_a_file_stays_until_what_was_copied_from_it_is_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        quiet, busy = await store.create_many([spec(1), spec(2)])
        await grow(store, quiet, 3, commit=False)
        expected = await contents(quiet)
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "free_oldest", lambda self: None)
            while len(store._journal.files) <= SMALL.journal_files_max:
                await grow(store, busy, 40)
                await store.flush()
        oldest = min(journal_files(disk))
        gate, commit = asyncio.Event(), disk.commit

        async def held_up(*args: Any, **options: Any) -> None:
            await gate.wait()
            await commit(*args, **options)

        monkeypatch.setattr(disk, "commit", held_up)
        store._journal.free_oldest()
        copied = asyncio.ensure_future(store._journal.checkpoint(()))
        await asyncio.sleep(0.01)
        await store._journal.files.release()
        found = durable_part(disk)
        gate.set()
        await copied
        await store._journal.files.release()
        assert oldest not in journal_files(disk)
        again = await BrokerStore.open(found, SMALL, disk_id=DISK_ID)
        assert await contents(again.logs[1]) == expected
        await again.close()

    run(main())


def test_one_append_larger_than_a_journal_file() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        entries: list[Entry] = []
        for index in range(1, 40):
            previous = entries[-1] if entries else None
            entries.append(Writer(log).entry(1, index=index, size=1500, previous=previous))
        await append(store, log, entries)
        await grow(store, log, 3)
        store, disk = await reopen(store, disk, clean=False)
        assert len(await contents(store.logs[1])) == 42

    run(main())


# -- replicas and the directory ------------------------------------------------------------------------------


def test_remove() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        gone, kept = await store.create_many([spec(1), spec(2)])
        await grow(store, gone, 60)
        await grow(store, kept, 60)
        late = submit(store, gone, [Writer(gone).entry(1, size=4000)])
        await store.remove(1, 70)
        await late
        await store.remove(99, 12)
        assert not [p for p in disk.paths() if p.startswith("replicas/1/")]
        for clean in (False, True):
            store, disk = await reopen(store, disk, clean=clean)
            assert list(store.logs) == [2]
            assert store.metadata_index == 70, "by older metadata it would come back"
            assert not store.lost
            assert len(await contents(store.logs[2])) == 60
        assert not [p for p in disk.paths() if p.startswith("replicas/1/")]

    run(main())


def test_a_replica_without_data_is_lost_and_never_empty() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        await store.create(spec(1))
        await store.close()
        other = SimDisk()
        await store_manifest(other, Manifest(DISK_ID, (spec(1), spec(2))))
        store = await BrokerStore.open(other, SMALL, disk_id=DISK_ID)
        assert store.logs == {}
        assert set(store.lost) == {1, 2}
        await store.remove(2, 1)
        store, other = await reopen(store, other)
        assert set(store.lost) == {1}

    run(main())


def test_locked_and_foreign_directories_are_refused() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        await grow(store, log, 3)
        with pytest.raises(DataDirLocked):
            await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        await store.close()
        with pytest.raises(ForeignDataDir):
            await BrokerStore.open(disk, SMALL, disk_id=b"e" * 16)
        await disk.remove("MANIFEST")
        with pytest.raises(ForeignDataDir):
            await BrokerStore.open(disk, SMALL, disk_id=b"e" * 16)
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        assert store.fault is None

    run(main())


def test_a_reboot_without_a_clean_stop_is_noticed() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, disk_id=DISK_ID)
        assert not store.rebooted
        disk = disk.kill()
        store = await BrokerStore.open(disk, disk_id=DISK_ID)
        assert not store.rebooted, "only the process was killed"
        disk = disk.crash()
        store = await BrokerStore.open(disk, disk_id=DISK_ID)
        assert store.rebooted
        await store.close()
        disk = disk.crash()
        store = await BrokerStore.open(disk, disk_id=DISK_ID)
        assert not store.rebooted, "it had stopped in good order"

    run(main())


def test_append_after_close_is_refused() -> None:
    async def main() -> None:
        store = await BrokerStore.open(SimDisk(), SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        entry = Writer(log).entry(1)
        await store.close()
        with pytest.raises(RaftlogError):
            await append(store, log, [entry])
        await store.close()

    run(main())


def test_recovery_after_a_clean_stop_reads_no_entries_again() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        await grow(store, log, 100)
        store, disk = await reopen(store, disk)
        log = store.logs[1]
        assert log.tail == ()
        assert log.flushed_index == log.hard_state.commit == 100
        await grow(store, log, 1)
        assert len(await contents(log)) == 101

    run(main())
