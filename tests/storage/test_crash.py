"""Crashes at every point of a workload: what was acknowledged is there, and nothing that was never appended.

A workload runs on a recording disk. For every prefix of the recorded changes a disk is built as a crash at
that moment would leave it, a store is opened on it, and each log must be *some* state between "all that was
acknowledged" and "all that was submitted" of the sequence of states that its records describe.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from storage_kit import DISK_ID, SMALL, Writer, append, contents, grow, run, spec

from raftlog.raft.types import Append, Entry, HardState
from raftlog.storage.disk import Write
from raftlog.storage.journal_format import parse_journal_name
from raftlog.storage.store import BrokerStore
from raftlog.storage.verify import verify
from raftlog.testing.disk import CrashMode, Op, SimDisk, Step, replay

State = tuple[tuple[int, int], tuple[int, ...]]
"""((term, vote), crc of each entry)."""


class Recorder:
    """Submits appends, notes in the trace what was submitted and what was acknowledged."""

    def __init__(self, disk: SimDisk, store: BrokerStore) -> None:
        self.disk = disk
        self.store = store
        self.states: dict[int, list[State]] = {}
        """Of each replica: the state after each of its records, the initial one first."""
        self.after: dict[int, list[int]] = {}
        """Of each replica: how many records there are after each append."""

    def watch(self, replica_id: int) -> None:
        self.states[replica_id] = [((0, 0), ())]
        self.after[replica_id] = [0]
        self.disk.note(("created", replica_id))

    def submit(
        self, replica_id: int, entries: list[Entry], state: HardState | None = None
    ) -> asyncio.Future[None]:
        log = self.store.logs[replica_id]
        states = self.states[replica_id]
        if state is not None:
            states.append(((state.term, state.vote), states[-1][1]))
        for entry in entries:
            states.append((states[-1][0], (*states[-1][1][: entry.index - 1], entry.crc)))
        self.after[replica_id].append(len(states) - 1)
        number = len(self.after[replica_id]) - 1
        self.disk.note(("submitted", replica_id, number))
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: BaseException | None) -> None:
            assert error is None, error
            self.disk.note(("acknowledged", replica_id, number))
            future.set_result(None)

        self.store.append(log, Append(number, state, tuple(entries)), done)
        asyncio.get_running_loop().call_soon(self.store.begin)
        return future

    def allowed(self, trace: list[Step]) -> dict[int, tuple[int, int]]:
        """Replica -> (fewest, most) records that may have survived a crash after ``trace``."""
        fewest: dict[int, int] = {}
        most: dict[int, int] = {}
        for step in trace:
            if step.op is Op.NOTE and isinstance(step.note, tuple):
                what, replica_id, *number = step.note
                if what == "created":
                    fewest[replica_id] = most[replica_id] = 0
                elif what == "submitted":
                    most[replica_id] = self.after[replica_id][number[0]]
                elif what == "acknowledged":
                    fewest[replica_id] = self.after[replica_id][number[0]]
        return {replica_id: (fewest[replica_id], most[replica_id]) for replica_id in fewest}


async def workload(disk: SimDisk, seed: int, steps: int = 45) -> Recorder:
    """Two replicas: small and large entries, several appends at once, truncations, votes, commits,
    flushes."""
    rng = random.Random(seed)
    store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
    recorder = Recorder(disk, store)
    await store.create_many([spec(1), spec(2)])
    terms = {1: 1, 2: 1}
    for replica_id in terms:
        recorder.watch(replica_id)
    futures = [recorder.submit(replica_id, [], HardState(1, 0, 0)) for replica_id in terms]
    for _ in range(steps):
        replica_id = rng.choice((1, 2))
        log = store.logs[replica_id]
        state = None
        index = log.last_index + 1
        if rng.random() < 0.3:
            terms[replica_id] += 1
            state = HardState(terms[replica_id], rng.randint(0, 3), log.committed)
            if log.last_index > log.committed and rng.random() < 0.8:
                index = rng.randint(log.committed + 1, log.last_index)
        entries = _some_entries(rng, Writer(log), terms[replica_id], index)
        futures.append(recorder.submit(replica_id, entries, state))
        if rng.random() < 0.5:
            await futures[-1]
            if rng.random() < 0.7:
                log.set_committed(rng.randint(log.committed, min(log.last_index, log.durable_index)))
    await asyncio.gather(*futures)
    await store.close()
    return recorder


def _some_entries(rng: random.Random, writer: Writer, term: int, index: int) -> list[Entry]:
    entries: list[Entry] = []
    for _ in range(rng.randint(0, 3)):
        size = rng.choice((70, 200, 900, 2500, 4000))
        previous = entries[-1] if entries else None
        entries.append(writer.entry(term, index=index, size=size, previous=previous))
        index += 1
    return entries


async def check(disk: SimDisk, recorder: Recorder, trace: list[Step], *, deep: bool = True) -> None:
    """Open what the crash left and compare; when ``deep``, verify it, write more, stop, and compare again."""
    allowed = recorder.allowed(trace)
    report = await verify(disk.copy()) if deep else None
    store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
    assert not store.lost
    assert not store.damaged
    if allowed and report is not None:
        assert not report.problems, report.problems
    for replica_id, (fewest, most) in allowed.items():
        log = store.logs[replica_id]
        found = await contents(log)
        crcs = tuple(int.from_bytes(frame[4:8], "big") for frame in found)
        state = log.hard_state
        candidates = recorder.states[replica_id][fewest : most + 1]
        assert ((state.term, state.vote), crcs) in candidates, (replica_id, fewest, most)
        assert log.flushed_index <= state.commit <= log.last_index
        assert log.recovered.last_crc == (crcs[-1] if crcs else log.spec.origin_crc)
        if not deep:
            continue
        log.set_committed(state.commit)
        await grow(store, log, 2, term=state.term + 1, size=2100)
    if not deep:
        await store.abort()
        return
    before = {replica_id: await contents(log) for replica_id, log in store.logs.items()}
    await store.close()
    again = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
    assert {replica_id: await contents(log) for replica_id, log in again.logs.items()} == before
    await again.close()


@pytest.mark.parametrize("mode", list(CrashMode))
def test_crash_at_every_step(mode: CrashMode) -> None:
    async def main() -> None:
        disk = SimDisk(record=True)
        recorder = await workload(disk, seed=list(CrashMode).index(mode))
        trace = disk.trace
        assert trace is not None
        for end in range(len(trace) + 1):
            if end and trace[end - 1].op is Op.NOTE:
                continue
            survivor = replay(trace[:end], mode, random.Random(end))
            await check(survivor, recorder, trace[:end], deep=end % 6 == 0)

    run(main())


def test_crash_seeds() -> None:
    """Fewer points, more workloads."""

    async def main() -> None:
        for seed in range(100, 110):
            disk = SimDisk(record=True)
            recorder = await workload(disk, seed, steps=60)
            trace = disk.trace
            assert trace is not None
            rng = random.Random(seed)
            for end in rng.sample(range(len(trace)), 12):
                survivor = replay(trace[:end], CrashMode.RANDOM, rng)
                await check(survivor, recorder, trace[:end])

    run(main())


def _last_group(trace: list[Step]) -> int:
    """Number of the step that wrote the journal's last group with an entry of both replicas."""
    return max(n for n, s in enumerate(trace) if s.op is Op.WRITE and s.path.startswith("journal/"))


def test_every_prefix_of_the_last_gathered_write() -> None:
    """Byte by byte: whatever part of the last group reached the disk, what came before it is complete."""

    async def main() -> None:
        disk = SimDisk(record=True)
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        recorder = Recorder(disk, store)
        await store.create_many([spec(1), spec(2)])
        for replica_id in (1, 2):
            recorder.watch(replica_id)
            await recorder.submit(replica_id, [Writer(store.logs[replica_id]).entry(1)], HardState(1, 1, 0))
        first, second = store.logs[1], store.logs[2]
        one = Writer(first).entry(2)
        futures = [
            recorder.submit(1, [one, Writer(first).entry(2, index=3, previous=one)], HardState(2, 1, 0)),
            recorder.submit(2, [Writer(second).entry(2, index=1)], HardState(2, 2, 0)),
        ]
        await asyncio.gather(*futures)
        trace = disk.trace
        assert trace is not None
        last = _last_group(trace)
        whole = trace[last]
        assert len(whole.data) > 500
        for size in range(len(whole.data) + 1):
            part = Step(Op.WRITE, whole.path, whole.position, whole.data[:size])
            cut = [*trace[:last], part]
            survivor = replay(cut, CrashMode.ALL, random.Random(0))
            await check(survivor, recorder, cut, deep=size % 50 == 0)

    run(main())


def test_stale_bytes_behind_a_torn_tail_never_come_back() -> None:
    """A group whose first sector is lost leaves its other sectors on the disk. What is written over it by the
    next incarnation must not make them valid again."""

    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        await append(store, log, [Writer(log).entry(1)])
        path = next(p for p in disk.paths() if parse_journal_name(p.partition("/")[2]) is not None)
        size = len(disk.content(path))
        kept = disk.content(path)
        entries = [Writer(log).entry(1, size=100)]
        for index in range(3, 20):
            entries.append(Writer(log).entry(1, index=index, previous=entries[-1]))
        await append(store, log, entries)
        survivor = disk.kill()
        torn = bytearray(survivor.content(path))
        torn[size : size + 40] = bytes(40)
        survivor.put(path, bytes(torn))
        store = await BrokerStore.open(survivor, SMALL, disk_id=DISK_ID)
        assert store.logs[1].last_index == 1
        assert survivor.content(path) == kept
        # The same entries again: their records have the same sizes.
        await append(store, store.logs[1], [entries[0]])
        again = await BrokerStore.open(survivor.kill(), SMALL, disk_id=DISK_ID)
        assert again.logs[1].last_index == 2

    run(main())


def test_truncated_entries_stay_truncated() -> None:
    """etcd-io/etcd#22442: replay must not resurrect entries that a later leader replaced, flushed or not."""

    async def main(flush: Callable[[int], bool]) -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        await grow(store, log, 3)
        await grow(store, log, 5, commit=False)
        await append(store, log, [Writer(log).entry(2, index=5)], HardState(2, 0, 4))
        assert log.last_index == 5
        if flush(1):
            log.set_committed(5)
            await store.flush()
        expected = await contents(log)
        for round_ in range(3):
            disk = disk.crash(CrashMode.ALL)
            store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
            log = store.logs[1]
            assert await contents(log) == expected
            if flush(round_):
                log.set_committed(5)
                await store.flush()

    run(main(lambda _: False))
    run(main(lambda n: n == 1))


def test_large_frame_never_overwrites_one_that_a_crash_would_bring_back() -> None:
    """A truncating append goes through the journal: until it is durable, the replaced frame's bytes must
    survive."""

    async def main() -> None:
        disk = SimDisk()
        store = await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1, segment_bytes=1 << 20))
        await append(store, log, [Writer(log).entry(1, size=5000)])
        old = bytes(log.memory.at(1).frame)
        new = Writer(log).entry(2, index=1, size=5000)
        disk.stall(10.0)
        store.append(log, Append(0, HardState(2, 0, 0), (new,)), lambda error: None)
        store.append(log, Append(0, None, (Writer(log).entry(2, size=4000),)), lambda error: None)
        store.begin()
        for _ in range(50):
            await asyncio.sleep(0)
        segments = [p for p in disk.paths() if p.endswith(".seg")]
        assert [old in disk.content(p) for p in segments] == [True]
        store = await BrokerStore.open(disk.crash(CrashMode.RANDOM), SMALL, disk_id=DISK_ID)
        assert await contents(store.logs[1]) in ([old], [bytes(new.frame)], await contents(log))

    run(main())


def test_write_is_positional() -> None:
    """The simulated disk itself: what is not synced may be lost, what is synced is not."""

    async def main() -> None:
        disk = SimDisk()
        file = await disk.open("a", create=True)
        await disk.write([Write(file, 0, [b"x" * 600])])
        await disk.write([Write(file, 0, [b"y" * 1200])], sync=False)
        assert disk.crash(CrashMode.NONE).content("a") == b"x" * 600
        disk = SimDisk()
        file = await disk.open("a", create=True)
        await disk.write([Write(file, 0, [b"y" * 1200])], sync=False)
        assert disk.crash(CrashMode.ALL).content("a") == b"y" * 1200

    run(main())


@pytest.mark.parametrize("mode", [CrashMode.RANDOM, CrashMode.PREFIX])
def test_what_a_crash_keeps_is_torn_at_sectors_and_nowhere_else(mode: CrashMode) -> None:
    """The simulated disk itself: of a write across sectors any of them may be kept, never part of one."""

    async def kept(seed: int) -> bytes:
        disk = SimDisk(random.Random(seed))
        file = await disk.open("a", create=True)
        await disk.write([Write(file, 0, [b"x" * 4 * 512])])
        await disk.write([Write(file, 100, [b"y" * (3 * 512)])], sync=False)
        return disk.crash(mode).content("a")

    pieces = [(100, 512), (512, 1024), (1024, 1536), (1536, 1636)]
    seen = set()
    for seed in range(100):
        content = run(kept(seed))
        assert content[:100] == b"x" * 100
        assert content[1636:] == b"x" * (2048 - 1636)
        assert all(len(set(content[start:end])) == 1 for start, end in pieces)
        seen.add(tuple(content[start] == ord("y") for start, _ in pieces))
    assert len(seen) == (16 if mode is CrashMode.RANDOM else 5)
