"""The pipeline of groups and transactions: what it does when nothing is wrong, and that it finds what is."""

from __future__ import annotations

import pytest

from raftlog.state.groups import Key
from raftlog.state.partition import PartitionState
from raftlog.testing.books import Violation
from raftlog.testing.history import Outcome
from raftlog.testing.pipeline import GROUP, IN
from raftlog.testing.pipeline_profile import PipelineProfile, draw_pipeline
from raftlog.testing.swarm import Profile
from raftlog.testing.workload import Workload


def calm(**pipeline: int | bool) -> Workload:
    """No faults."""
    drawn = PipelineProfile(transactions=6, **pipeline)  # type: ignore[arg-type]
    return Workload(Profile(5, fault_count=0, values=5, partitions=1, pipeline=drawn))


def test_every_input_is_processed_once() -> None:
    workload = calm(workers=3, stall=0)
    try:
        history = workload.run()
    finally:
        workload.close()
    committed = {
        value
        for each in history.transactions.values()
        if each.outcome is Outcome.OK and each.group is None
        for value in each.sent
    }
    processed = [
        value
        for each in history.transactions.values()
        if each.outcome is Outcome.OK and each.group == GROUP
        for _, _, value in each.polled
    ]
    assert sorted(processed) == sorted(committed)
    assert len(committed) > 10
    assert {place for _, place in history.groups} == {"in/0", "in/1"}
    counts = workload.pipeline.counts if workload.pipeline is not None else {}
    assert counts["transactions committed"] > 10


def test_producers_of_one_id_fence_each_other() -> None:
    workload = calm(feeders=3, shares_ids=True)
    try:
        workload.run()
    finally:
        workload.close()
    assert workload.pipeline is not None
    assert workload.pipeline.counts["ProducerFenced"] > 0


def test_late_copies_do_no_harm() -> None:
    workload = calm(echoes=True)
    try:
        workload.run()
    finally:
        workload.close()
    assert workload.pipeline is not None
    counts = workload.pipeline.counts
    assert counts["EndTransactionRequest came late"] > 0
    assert counts["late ProducerFenced"] > 0


def test_a_reader_ahead_of_the_last_stable_offset_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartitionState, "last_stable_offset", property(lambda self: self.next_offset))
    workload = calm()
    try:
        with pytest.raises(Violation, match=r"(aborted|intermediate) read"):
            workload.run()
    finally:
        workload.close()


def test_what_is_released_while_it_is_held_is_found() -> None:
    workload = calm(workers=3)
    watch, pipeline = workload.cluster.watch, workload.pipeline
    assert pipeline is not None

    def holds(_: str) -> list[Key]:
        """As if no consumer ever let go of anything."""
        image = next(iter(workload.cluster.brokers.values())).metadata.image
        return [(image.topics[IN].topic_id, partition) for partition in range(2)]

    watch.ownership.holds = holds
    try:
        with pytest.raises(Violation, match="one owner: group workers takes partitions"):
            workload.run()
    finally:
        workload.close()


def test_seeds_draw_all_kinds_of_pipelines() -> None:
    drawn = [draw_pipeline(seed) for seed in range(100)]
    some = [each for each in drawn if each is not None]
    assert 40 < len(some) < 80
    assert {each.echoes for each in some} == {each.shares_ids for each in some} == {True, False}
    assert {each.workers for each in some} == {1, 2, 3, 4}
