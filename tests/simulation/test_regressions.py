"""Bugs that simulation found, each reduced to the fault that it takes."""

from __future__ import annotations

import pytest

from raftlog.testing.history import Outcome
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
