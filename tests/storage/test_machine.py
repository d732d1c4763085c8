"""A Hypothesis state machine: append, truncate, commit, flush, snapshot, drop a prefix, crash, stop, against
a list."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from storage_kit import DISK_ID, SMALL, Writer, append, contents, snapshot_at, spec

from raftlog.raft.types import Entry, HardState
from raftlog.record.frame import FrameKind, iter_frames
from raftlog.storage.store import BrokerStore
from raftlog.storage.verify import verify
from raftlog.testing.disk import CrashMode, SimDisk

SIZES = st.lists(st.sampled_from([70, 300, 1500, 2100, 5000]), min_size=1, max_size=4)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.disk = SimDisk(random.Random(1))
        self.model: list[bytes] = []
        """Frames; element i is index i + 1. Prefixes that were dropped stay here."""
        self.committed = 0
        self.term = 1
        self.run(self.open(create=True))

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    async def open(self, *, create: bool = False) -> None:
        self.store = await BrokerStore.open(self.disk, SMALL, disk_id=DISK_ID)
        if create:
            await self.store.create(spec(1))
        assert not self.store.lost
        assert not self.store.damaged
        self.log = self.store.logs[1]
        assert self.log.last_index == len(self.model)
        assert self.log.hard_state.term in (self.term, 0)
        self.log.set_committed(self.committed)

    @rule(sizes=SIZES, back=st.integers(0, 4), batches=st.booleans())
    def append(self, sizes: list[int], back: int, batches: bool) -> None:
        """The next entries; sometimes those of a new leader, which replace uncommitted ones."""
        index = max(self.committed + 1, self.log.last_index + 1 - back)
        if index <= self.log.last_index:
            self.term += 1
        entries: list[Entry] = []
        for size in sizes:
            kind = FrameKind.BATCH if batches or entries else FrameKind.NOOP
            previous = entries[-1] if entries and entries[-1].kind == FrameKind.BATCH else None
            if entries and previous is None:
                break
            entry = Writer(self.log).entry(self.term, index=index, size=size, kind=kind, previous=previous)
            entries.append(entry)
            index += 1
        self.run(append(self.store, self.log, entries, HardState(self.term, 0, self.committed)))
        self.model[entries[0].index - 1 :] = [bytes(e.frame) for e in entries]

    @rule(part=st.floats(0, 1))
    def commit(self, part: float) -> None:
        self.committed += int((self.log.last_index - self.committed) * part)
        self.log.set_committed(self.committed)

    @rule()
    def flush(self) -> None:
        self.run(self.store.flush())
        assert self.log.flushed_index == self.committed

    @precondition(lambda self: self.committed >= self.log.memory.first_index)
    @rule()
    def snapshot(self) -> None:
        self.log.save_snapshot(snapshot_at(self.log, self.committed))

    @precondition(lambda self: bool(self.log.snapshots))
    @rule(part=st.floats(0, 1))
    def drop_prefix(self, part: float) -> None:
        self.run(self.log.truncate_prefix(int(self.log.last_index * part)))

    @rule(mode=st.sampled_from(CrashMode))
    def crash(self, mode: CrashMode) -> None:
        self.disk = self.disk.crash(mode)
        self.run(self.open())

    @rule()
    def stop_and_start(self) -> None:
        self.run(self.store.close())
        report = self.run(verify(self.disk.copy()))
        assert not report.problems, report.problems
        self.run(self.open())

    @rule(part=st.floats(0, 1), bytes_max=st.sampled_from([1, 500, 5000]))
    def read(self, part: float, bytes_max: int) -> None:
        log = self.log
        offset = log.start_offset + int((log.end_offset - log.start_offset) * part)
        found = b"".join(self.run(log.read(offset, log.last_index, bytes_max)))
        indexes = [header.index for header, _ in iter_frames(found)]
        if indexes:
            assert found == b"".join(self.model[indexes[0] - 1 : indexes[-1]])
        else:
            assert offset == log.end_offset

    @invariant()
    def agrees(self) -> None:
        log = self.log
        assert self.run(contents(log)) == self.model[log.first_index - 1 :]
        assert log.first_index - 1 <= log.flushed_index <= self.committed

    def teardown(self) -> None:
        self.run(self.store.close())
        self.runner.close()


Machine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_machine = Machine.TestCase
