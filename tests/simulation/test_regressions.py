"""Bugs that simulation found, each reduced to the fault that it takes."""

from __future__ import annotations

import os

import pytest

from raftlog.client import handle
from raftlog.testing.history import Outcome
from raftlog.testing.pipeline_profile import PipelineProfile
from raftlog.testing.run import Verdict, run_once
from raftlog.testing.swarm import Profile
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
