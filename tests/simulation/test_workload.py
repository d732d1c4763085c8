"""Whole brokers and clients under faults, from seeds; and bugs planted one at a time, which must be found.

A tool that finds nothing proves nothing: each canary is a one-line bug of the kind that other systems had,
and the runs must catch it within a few seeds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from raftlog.broker.replica import Replica
from raftlog.raft import leader
from raftlog.raft.durability import Durability
from raftlog.raft.raw_node import RawNode
from raftlog.raft.types import Append, HardState, Role
from raftlog.state import producers
from raftlog.state.partition import PartitionState
from raftlog.storage import journal_scan
from raftlog.storage.journal_scan import JournalScan
from raftlog.storage.store import BrokerStore
from raftlog.testing.history import History
from raftlog.testing.run import Verdict, run_once
from raftlog.testing.simulate import Report
from raftlog.testing.swarm import Profile, draw
from raftlog.testing.workload import Workload

SEEDS = range(50)
SEEDS_TWICE = (3, 11, 16)
CANARY_SEEDS_MAX = 40


def run(profile: Profile) -> tuple[History, int]:
    workload = Workload(profile)
    try:
        history = workload.run()
        return history, workload.cluster.loop.trace
    finally:
        workload.close()


@pytest.fixture(scope="module")
def report() -> Report:
    return Report(trace=False, shrinks=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_promises_hold(seed: int, report: Report) -> None:
    result = run_once(draw(seed))
    report.add(result)
    assert result.verdict is Verdict.GOOD, f"{result.text}\n{result.events}\n{result.stack}"
    enough = result.profile.values // 2
    assert result.counts["sends ok"] >= enough, "the faults left next to nothing to check"
    assert result.counts["records polled"], "nobody consumed"


def test_there_is_no_blind_spot(report: Report) -> None:
    """What the runs above were to meet, they met."""
    if report.results < len(SEEDS):
        pytest.skip("only after all of them")
    assert report.blind_spots() == []
    assert report.exit_code == 0


@pytest.mark.parametrize("seed", SEEDS_TWICE)
def test_a_seed_repeats_its_run(seed: int) -> None:
    first, second = run(draw(seed)), run(draw(seed))
    assert first == second
    assert first[1] != run(draw(seed + 1))[1]


Patch = pytest.MonkeyPatch


def acknowledge_before_sync(patch: Patch) -> None:
    append_and_tell = BrokerStore.append

    def append(self: BrokerStore, log: Any, append: Append, done: Callable[[None], None]) -> None:
        append_and_tell(self, log, append, lambda _error: None)
        asyncio.get_running_loop().call_soon(done, None)

    patch.setattr(BrokerStore, "append", append)


def vote_not_written(patch: Patch) -> None:
    take = RawNode._take_append

    def take_append(self: RawNode) -> Append | None:
        append = take(self)
        if append is None or append.hard_state is None:
            return append
        forgetful = HardState(append.hard_state.term, 0, append.hard_state.commit)
        return msgspec.structs.replace(append, hard_state=forgetful)

    patch.setattr(RawNode, "_take_append", take_append)


def promises_not_held_back(patch: Patch) -> None:
    """Votes and the like leave before term and vote are synced."""

    def assign(self: Durability) -> list[Any]:
        messages, self.unassigned = self.unassigned, []
        return messages

    patch.setattr(Durability, "assign", assign)


def duplicates_not_recognised(patch: Patch) -> None:
    patch.setattr(producers, "find_duplicate", lambda _known, _header: None)


def producers_forgotten_by_a_new_leader(patch: Patch) -> None:
    begin = Replica._begin_serving

    def begin_serving(self: Replica[Any]) -> None:
        if isinstance(self.machine, PartitionState):
            self.machine.producers.clear()
        begin(self)

    patch.setattr(Replica, "_begin_serving", begin_serving)


def committed_by_one(patch: Patch) -> None:
    patch.setattr(leader, "quorum_index", lambda _conf, match: max(match.values()))


def served_before_the_no_op(patch: Patch) -> None:
    patch.setattr(RawNode, "serving", property(lambda self: self._node.role is Role.LEADER))


def recovered_bytes_not_synced(patch: Patch) -> None:
    async def nothing(self: BrokerStore, scan: object, found: object) -> None:
        pass

    patch.setattr(BrokerStore, "_write_again_what_was_read", nothing)


def recovery_cuts_below_the_floor(patch: Patch) -> None:
    """The last tenth of the journal is taken for torn, synced or not."""
    check = journal_scan._check_files

    def cut(scan: JournalScan, sequence_min: int) -> None:
        check(scan, sequence_min)
        if scan.files and scan.files[-1].header_valid:
            last = scan.files[-1]
            records = list(last.records())
            if len(records) > 10:
                last.end = records[-len(records) // 10].position

    patch.setattr(journal_scan, "_check_files", cut)


CANARIES = [
    acknowledge_before_sync,
    vote_not_written,
    promises_not_held_back,
    duplicates_not_recognised,
    producers_forgotten_by_a_new_leader,
    committed_by_one,
    served_before_the_no_op,
    recovered_bytes_not_synced,
    recovery_cuts_below_the_floor,
]


@pytest.mark.parametrize("plant", CANARIES, ids=[plant.__name__ for plant in CANARIES])
def test_a_planted_bug_is_found(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    plant(monkeypatch)
    for seed in range(CANARY_SEEDS_MAX):
        try:
            run(draw(seed))
        except Exception:  # noqa: BLE001 - any end but a good one will do
            return
    pytest.fail(f"{plant.__name__} was not found within {CANARY_SEEDS_MAX} seeds")
