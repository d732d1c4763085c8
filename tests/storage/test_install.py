"""A snapshot from the leader replaces a log: what it takes, and a crash at every step of it."""

from __future__ import annotations

import random

import msgspec
import pytest
from storage_kit import DISK_ID, SMALL, Writer, append, contents, grow, reopen, run, snapshot_at, spec, submit

from raftlog.errors import DamagedData, StorageFailed
from raftlog.raft.types import ConfState, HardState
from raftlog.record.frame import FrameKind
from raftlog.storage.replica_log import ReplicaLog
from raftlog.storage.snapshot_file import LogSnapshot
from raftlog.storage.store import BrokerStore
from raftlog.storage.verify import verify
from raftlog.testing.disk import CrashMode, SimDisk, replay

CHUNK = 700


async def leader(entries: int = 120) -> tuple[BrokerStore, ReplicaLog]:
    """A log of term 2 with a snapshot at each segment's end, and its first segments dropped."""
    store = await BrokerStore.open(SimDisk(), SMALL, disk_id=DISK_ID)
    log = await store.create(spec(1))
    for _ in range(entries):
        (entry,) = await grow(
            store, log, 1, term=2, size=random.Random(log.last_index).choice((80, 300, 2500))
        )
        if log.is_segment_end(entry.index):
            log.save_snapshot(snapshot_at(log, entry.index))
    await store.flush()
    await log.truncate_prefix(log.segments[3].base_index)
    assert log.first_index > 20
    assert log.first_index - 1 in log.snapshots
    return store, log


async def image(log: ReplicaLog) -> bytes:
    """The bytes of the snapshot at the oldest kept segment's base, read in chunks."""
    data = b""
    total = 1
    while len(data) < total:
        part, total = await log.snapshot_chunk(log.first_index - 1, len(data), CHUNK)
        data += part
    return data


async def follower(disk: SimDisk) -> tuple[BrokerStore, ReplicaLog]:
    """A log of term 1 that parted from the leader's: 8 entries committed and flushed, some large ones
    above."""
    store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
    other, log = await store.create_many([spec(7), spec(1)])
    await grow(store, other, 3)
    await grow(store, log, 8, size=600)
    await store.flush()
    await grow(store, log, 120, size=400, commit=False)
    await grow(store, log, 2, size=3000, commit=False)
    return store, log


async def take_over(log: ReplicaLog, source: ReplicaLog) -> LogSnapshot:
    snapshot = await log.keep_snapshot(source.first_index - 1, await image(source))
    assert await log.begin_behind(snapshot, lambda: True)
    return snapshot


async def copy_rest(store: BrokerStore, log: ReplicaLog, source: ReplicaLog) -> None:
    """The entries behind the snapshot, as append messages bring them."""
    while log.last_index < source.last_index:
        entries = await source.entries(log.last_index + 1, source.last_index + 1, 2000)
        await append(store, log, entries, HardState(2, 0, log.committed))
        log.set_committed(log.last_index)


def test_the_log_goes_on_behind_the_snapshot() -> None:
    async def main() -> None:
        _, source = await leader()
        disk = SimDisk()
        store, log = await follower(disk)
        first = source.first_index
        snapshot = await take_over(log, source)
        assert (snapshot.index, snapshot.data) == (first - 1, b"state at %d" % (first - 1))
        assert (log.first_index, log.last_index, log.flushed_index, log.durable_index) == (
            first,
            first - 1,
            first - 1,
            first - 1,
        )
        assert (log.start_offset, log.end_offset) == (source.start_offset, source.start_offset)
        assert log.hard_state.term == 1, "what earlier appends said of term and vote stays"
        await copy_rest(store, log, source)
        expected = await contents(source)
        assert await contents(log) == expected
        await store.flush()
        assert [s.path for s in log.segments] == [s.path for s in source.segments], "segments align"
        names = await disk.list("replicas/1")
        assert not [
            name for name in names if name.endswith((".seg", ".snap")) and int(name[:16], 16) < first - 1
        ]
        for clean in (True, False):
            store, disk = await reopen(store, disk, clean=clean)
            log = store.logs[1]
            assert log.snapshot is not None
            assert log.recovered.confs == ((first - 1, snapshot.conf),)
            assert await contents(log) == expected
            assert len(await contents(store.logs[7])) == 3
        await store.close()
        report = await verify(disk)
        assert not report.problems
        assert next(row for row in report.replicas if row.replica_id == 1).first_index == first

    run(main())


def test_an_empty_replica_takes_over_a_snapshot_and_serves_one_itself() -> None:
    async def main() -> None:
        _, source = await leader()
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        await take_over(log, source)
        assert await image(log) == await image(source), "the same bytes: it can be handed on"
        store, disk = await reopen(store, disk, clean=False)
        log = store.logs[1]
        assert (log.recovered.first_index, log.recovered.last_index) == (
            source.first_index,
            log.first_index - 1,
        )
        assert log.recovered.prev_crc == source.prev_crc
        assert log.recovered.last_leader_time_ms == (source.first_index - 1) * 10
        await copy_rest(store, log, source)
        assert await contents(log) == await contents(source)

    run(main())


def test_what_does_not_check_or_is_not_wanted_changes_nothing() -> None:
    async def main() -> None:
        _, source = await leader()
        disk = SimDisk()
        store, log = await follower(disk)
        before = await contents(log)
        data = await image(source)
        for damaged in (data[:-1], data[:50] + b"?" + data[51:], b""):
            with pytest.raises(DamagedData):
                await log.keep_snapshot(source.first_index - 1, damaged)
        with pytest.raises(DamagedData, match="index"):
            await log.keep_snapshot(source.first_index, data)
        snapshot = await log.keep_snapshot(source.first_index - 1, data)
        assert not await log.begin_behind(snapshot, lambda: False)
        with pytest.raises(StorageFailed, match="no such snapshot"):
            await log.snapshot_chunk(3, 0, 100)
        assert await contents(log) == before
        store, disk = await reopen(store, disk, clean=False)
        assert await contents(store.logs[1]) == before

    run(main())


def test_appends_before_it_are_durable_first() -> None:
    """``accept`` is asked when nothing is on its way, so no late sync can speak of the log that was."""

    async def main() -> None:
        _, source = await leader()
        store, log = await follower(SimDisk(latency=0.001))
        data = await image(source)
        last = submit(store, log, [Writer(log).entry(1)])

        def accept() -> bool:
            assert last.done()
            return True

        snapshot = await log.keep_snapshot(source.first_index - 1, data)
        assert not last.done()
        assert await log.begin_behind(snapshot, accept)

    run(main())


@pytest.mark.parametrize("mode", [CrashMode.NONE, CrashMode.ALL, CrashMode.RANDOM])
def test_a_crash_at_every_step_leaves_the_old_log_or_the_new_one(mode: CrashMode) -> None:
    async def record() -> tuple[SimDisk, list[bytes], list[bytes], int]:
        _, source = await leader()
        disk = SimDisk(record=True)
        store, log = await follower(disk)
        old = await contents(log)
        disk.note("begin")
        await take_over(log, source)
        disk.note("installed")
        await copy_rest(store, log, source)
        await store.flush()
        new = await contents(source)
        assert await contents(log) == new
        return disk, old, new, source.first_index

    async def check(disk: SimDisk, old: list[bytes], new: list[bytes], first: int, installed: bool) -> bool:
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        assert not store.damaged
        assert not store.lost
        log = store.logs[1]
        found = await contents(log)
        if log.first_index == 1:
            assert not installed
            assert found == old
        else:
            assert (log.first_index, found) == (first, new[: len(found)])
            assert log.snapshot is not None
            assert first - 1 <= log.snapshot.index <= log.flushed_index
        assert len(await contents(store.logs[7])) == 3
        log.set_committed(log.recovered.hard_state.commit)
        await grow(store, log, 12, term=3, size=900)
        await store.close()
        assert not (await verify(disk.copy())).problems
        return log.first_index != 1

    async def main() -> None:
        disk, old, new, first = await record()
        assert disk.trace is not None
        trace = disk.trace
        begin = next(at for at, step in enumerate(trace) if step.note == "begin")
        done = next(at for at, step in enumerate(trace) if step.note == "installed")
        seen = set()
        ends = [*range(begin, done + 12), *range(done + 12, len(trace) + 1, 9)]
        for end in ends:
            crashed = replay(trace[:end], mode, random.Random(end))
            seen.add(await check(crashed, old, new, first, installed=end > done))
        assert seen == {False, True}

    run(main())


def test_old_journal_files_are_not_needed_any_more() -> None:
    """Entries that were never committed hold on to journal files; the snapshot that replaces them lets go."""

    async def main() -> None:
        _, source = await leader()
        store, log = await follower(SimDisk())
        assert len(store._journal.files) > 2
        await take_over(log, source)
        await store.flush()
        assert len(store._journal.files) <= 2

    run(main())


def test_a_prefix_is_dropped_only_below_a_snapshot_that_checks() -> None:
    async def main() -> None:
        store = await BrokerStore.open(disk := SimDisk(), SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        while len(log.segments) < 6:
            (entry,) = await grow(store, log, 1, size=500)
            if log.is_segment_end(entry.index):
                log.save_snapshot(snapshot_at(log, entry.index))
        await store.flush()
        ends = [segment.last_index for segment in log.segments[:-1]]
        disk.flip(f"replicas/1/{ends[3]:016x}.snap", 30)
        await log.truncate_prefix(ends[3])
        assert log.first_index == ends[2] + 1, "the one at the fourth border is damaged"
        await log.truncate_prefix(ends[4] - 1)
        assert log.first_index == ends[2] + 1
        await log.truncate_prefix(ends[4])
        assert log.first_index == ends[4] + 1
        expected = await contents(log)
        store, disk = await reopen(store, disk, clean=False)
        assert await contents(store.logs[1]) == expected

    run(main())


def test_the_configuration_before_the_first_entry_is_known_after_recovery() -> None:
    """Though the newest snapshot, from which the state is restored, stands further up."""

    async def main() -> None:
        store, log = await leader()
        first = log.first_index
        newer = ConfState((1, 2, 3))
        payload = msgspec.msgpack.encode(newer)
        (changed,) = [Writer(log).entry(2, kind=FrameKind.CONF, payload=payload)]
        await append(store, log, [changed])
        while True:
            (entry,) = await grow(store, log, 1, term=2, size=900)
            if log.is_segment_end(entry.index):
                log.save_snapshot(snapshot_at(log, entry.index))
                break
        disk = store._disk
        assert isinstance(disk, SimDisk)
        for damaged in (False, True):
            store, disk = await reopen(store, disk)
            log = store.logs[1]
            assert log.snapshot is not None
            assert log.snapshot.index > changed.index > first
            if damaged:
                assert log.recovered.confs == ((log.snapshot.index, newer),)
            else:
                assert log.recovered.confs == ((first - 1, ConfState((1,))), (changed.index, newer))
                disk.flip(f"replicas/1/{first - 1:016x}.snap", 30)
        await store.close()

    run(main())
