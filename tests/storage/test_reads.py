"""Reading a log: by record offset, by index, by time; from memory and from segments."""

from __future__ import annotations

import pytest
from storage_kit import DISK_ID, SMALL, Writer, append, batch, frames_in, reopen, run, spec

from raftlog.raft.types import Entry
from raftlog.record.frame import FrameKind, iter_frames
from raftlog.storage.replica_log import ReplicaLog
from raftlog.storage.store import BrokerStore
from raftlog.testing.disk import SimDisk


async def filled(disk: SimDisk, *, records: int = 3) -> tuple[BrokerStore, ReplicaLog, list[Entry]]:
    """60 batches of three records each, with no-ops between, most of them in segments and out of memory."""
    store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
    log = await store.create(spec(1))
    entries: list[Entry] = []
    for n in range(90):
        kind = FrameKind.NOOP if n % 3 == 0 else FrameKind.BATCH
        entry = Writer(log).entry(1, kind=kind, count=records, size=150)
        await append(store, log, [entry])
        entries.append(entry)
    log.set_committed(88)
    await store.flush()
    assert log.memory.first_index > 40
    return store, log, entries


def first_batch_with(entries: list[Entry], offset: int) -> int:
    end = 0
    for entry in entries:
        if entry.kind == FrameKind.BATCH:
            end += 3
            if end > offset:
                return entry.index
    raise AssertionError(offset)


@pytest.mark.parametrize("bytes_max", [1, 700, 10_000])
def test_read_by_offset(bytes_max: int) -> None:
    async def main() -> None:
        _, log, entries = await filled(SimDisk())
        for offset in range(log.end_offset):
            limit = 85
            wanted = first_batch_with(entries, offset)
            found = frames_in(await log.read(offset, limit, bytes_max))
            if wanted > limit:
                assert found == []
                continue
            assert found[0] == wanted
            assert found == list(range(wanted, wanted + len(found)))
            assert found[-1] <= limit
        assert await log.read(log.end_offset, 90, bytes_max) == []

    run(main())


def test_read_whole_log_in_steps() -> None:
    async def main() -> None:
        disk = SimDisk()
        store, log, entries = await filled(disk)
        reopened, _ = await reopen(store, disk)
        for log_ in (log, reopened.logs[1]):
            offset, seen = 0, []
            while buffers := await log_.read(offset, 90, 900):
                frames = iter_frames(b"".join(buffers))
                seen += [header.index for header, _ in frames if header.kind == FrameKind.BATCH]
                offset = len(seen) * 3
            assert seen == [e.index for e in entries if e.kind == FrameKind.BATCH]

    run(main())


def test_try_read_says_when_it_would_block() -> None:
    async def main() -> None:
        disk = SimDisk()
        _, log, _ = await filled(disk)
        assert await log.read(0, 90, 100)
        assert log.try_read(0, 90, 100)
        disk.cached = False
        assert log.try_read(0, 90, 100) is None
        assert await log.read(0, 90, 100)
        assert log.try_read(log.end_offset - 1, 90, 100), "the newest entries are in memory"

    run(main())


def test_entries_by_index() -> None:
    async def main() -> None:
        _, log, entries = await filled(SimDisk())
        for lo in range(1, 91, 7):
            found = await log.entries(lo, 91, 1)
            assert [e.index for e in found] == [lo]
            found = await log.entries(lo, min(lo + 9, 91), 1000)
            assert [bytes(e.frame) for e in found] == [
                bytes(e.frame) for e in entries[lo - 1 :][: len(found)]
            ]
            assert sum(e.size for e in found) <= 1000

    run(main())


def test_the_least_timestamp_there_is_finds_the_first_batch() -> None:
    async def main() -> None:
        store = await BrokerStore.open(SimDisk(), SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        assert await log.find_time(-(1 << 63), 1) is None
        await append(store, log, [Writer(log).entry(1, payload=b"", kind=FrameKind.NOOP)])
        assert await log.find_time(-(1 << 63), 1) is None
        await append(store, log, [Writer(log).entry(1, payload=batch(0, 1, 150, 5))])
        assert await log.find_time(-(1 << 63), 2) == 0

    run(main())


def test_find_time() -> None:
    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        times = [(n * 37) % 1000 + n * 5 for n in range(80)]  # producers' clocks do not agree
        for n, time in enumerate(times):
            payload = batch(n, 1, 150, time)
            await append(store, log, [Writer(log).entry(1, payload=payload)])
        log.set_committed(70)
        await store.flush()
        for timestamp in range(0, 1500, 11):
            for limit in (30, 60, 80):
                expected = next((n for n, t in enumerate(times[:limit]) if t >= timestamp), None)
                assert await log.find_time(timestamp, limit) == expected, (timestamp, limit)

    run(main())


def test_small_frames_are_handed_out_joined() -> None:
    async def main() -> None:
        store = await BrokerStore.open(SimDisk(), disk_id=DISK_ID)
        log = await store.create(spec(1, segment_bytes=1 << 20))
        sizes = [100, 100, 40_000, 100, 50_000, 50_000]
        for size in sizes:
            await append(store, log, [Writer(log).entry(1, size=size)])
        found = log.try_read(0, 6, 1 << 20)
        assert found is not None
        assert len(found) == 5
        assert frames_in(found) == [1, 2, 3, 4, 5, 6]

    run(main())
