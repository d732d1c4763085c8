"""Bugs that simulation found, each reduced to the fault that it takes."""

from __future__ import annotations

import os

import pytest

from raftlog.client import handle
from raftlog.testing.history import Outcome
from raftlog.testing.pipeline_profile import PipelineProfile
from raftlog.testing.run import Verdict, run_once
from raftlog.testing.swarm import Profile, draw
from raftlog.testing.workload import Workload


@pytest.mark.parametrize("seed", [5, 11])
def test_failed_disks_end_no_client(seed: int) -> None:
    """Found by seed 3 of the first swarm. A broker whose sync had failed answered with StorageFailed, which a
    client takes for final: consumers ended, and sends failed that another broker would have taken."""
    profile = Profile(seed, weights={"failed sync": 1.0}, fault_count=3, gap_seconds=(0.5, 1.0), values=120)
    workload = Workload(profile)
    try:
        history = workload.run()  # raises what ended the consumer
    finally:
        workload.close()
    assert workload.nemesis.fired["failed sync"] == 3
    assert any("Input/output error" in line for line in workload.nemesis.log), "nothing was written to it"
    assert history.count(Outcome.FAILED) == 0


def test_a_single_worker_that_takes_its_time_gets_to_the_end() -> None:
    """Found by seed 3103871: moments of ten seconds for so many records took longer than it was given."""
    pipeline = PipelineProfile(feeders=3, transactions=16, workers=1, stall=0.4, timeout_ms=(10_000,))
    assert run_once(Profile(3, fault_count=0, values=5, pipeline=pipeline)).verdict is Verdict.GOOD


def test_what_is_on_the_disks_is_the_same_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by seed 100184. Clients of pipelines had the name of the process that ran the simulation, which
    their groups write down: a longer or shorter one put what follows at another place."""

    def contents(pid: int) -> dict[tuple[int, str], bytes]:
        monkeypatch.setattr(os, "getpid", lambda: pid)
        monkeypatch.setattr(handle, "_client_ids", {})
        pipeline = PipelineProfile(partitions=1, feeders=1, transactions=2, workers=1)
        workload = Workload(Profile(7, fault_count=0, values=5, partitions=1, pipeline=pipeline))
        try:
            workload.run()
            disks = workload.cluster.disks
            return {(each, path): disks[each].content(path) for each in disks for path in disks[each].paths()}
        finally:
            workload.close()

    assert contents(7) == contents(1_234_567)


@pytest.mark.parametrize("seed", range(5))
def test_no_time_passes_between_the_choice_of_a_quorum_and_the_end_of_the_others(seed: int) -> None:
    """Found by seed 701. One that had been chosen of three was none of the four that there were when the last
    of the others had been killed."""
    workload = Workload(Profile(seed, fault_count=0, values=5))
    try:
        cluster, nemesis = workload.cluster, workload.nemesis
        cluster.start()
        nemesis._kill(seed % 3)
        looked = []
        is_quorum = nemesis.mover.is_quorum

        def look(brokers: set[int]) -> bool:
            looked.append(cluster.loop.time())
            return is_quorum(brokers)

        nemesis.mover.is_quorum = look  # type: ignore[method-assign]
        nemesis.heal_quorum()
        assert cluster.loop.time() == looked[-1]
    finally:
        workload.close()


def test_a_leader_that_gets_its_place_back_is_calm() -> None:
    """Found by seed 8000158: a clog that outlived the faults cost a leader its place, and the controller gave
    it back while elections were counted."""
    assert run_once(draw(8_000_158)).verdict is Verdict.GOOD
