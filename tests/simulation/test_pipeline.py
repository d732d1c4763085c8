"""The pipeline of groups and transactions: what it does when nothing is wrong, and that it finds what is."""

from __future__ import annotations

import pytest

from raftlog.broker import transactions
from raftlog.client.aio_consumer import Consumer
from raftlog.config import BrokerConfig
from raftlog.state.groups import Key
from raftlog.state.partition import PartitionState
from raftlog.testing.books import Violation
from raftlog.testing.checker_delivery import AT_LEAST_ONCE, AT_MOST_ONCE
from raftlog.testing.history import Outcome
from raftlog.testing.pipeline import GROUP, IN
from raftlog.testing.pipeline_profile import PipelineProfile, draw_pipeline
from raftlog.testing.swarm import Profile
from raftlog.testing.takers import Taker
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


def test_nobody_can_tell_what_is_open_where_nobody_leads() -> None:
    """A coordinator that had just lost its term was taken for one without transactions (seed 49)."""
    workload = calm(workers=1, stall=0)
    try:
        workload.run()
        pipeline, cluster = workload.pipeline, workload.cluster
        assert pipeline is not None
        assert pipeline._nothing_is_open()
        cluster.kill_broker(min(cluster.brokers))
        assert not pipeline._nothing_is_open()
    finally:
        workload.close()


def test_groups_without_transactions_take_everything() -> None:
    workload = calm(takers=2, stall=0)
    try:
        history = workload.run()
    finally:
        workload.close()
    assert set(history.promises) == {AT_LEAST_ONCE, AT_MOST_ONCE}
    there = {
        (place, *read) for (_, place), row in history.finals.items() if place.startswith(IN) for read in row
    }
    assert len(there) > 10
    for group in history.promises:
        taken = [each[1:] for each in history.processed if each[0] == group]
        assert len(taken) == len(set(taken)), "nothing goes wrong, so nobody has to repeat anything"
        assert {place for who, place in history.groups if who == group} == {"in/0", "in/1"}


@pytest.mark.parametrize(
    ("group", "broken"),
    [(AT_LEAST_ONCE, "never processed .* at least once"), (AT_MOST_ONCE, "twice, at most once")],
)
def test_a_group_that_breaks_its_promise_is_found(
    group: str, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose_or_repeat(self: Taker, consumer: Consumer) -> None:
        records = await consumer.poll(0.5, 8)
        for record in records:
            read = group, f"{record.topic}/{record.partition}", record.offset, bytes(record.value)
            self._history.processed += [read] * (0 if group == AT_LEAST_ONCE else 2)
        await consumer.commit()

    monkeypatch.setattr(Taker, "_take", lose_or_repeat)
    workload = calm(takers=1)
    try:
        with pytest.raises(Violation, match=broken):
            workload.run()
    finally:
        workload.close()


def test_epochs_are_used_up() -> None:
    before = transactions.EPOCH_MAX
    workload = calm(epoch_max=4)
    try:
        workload.run()
    finally:
        workload.close()
    assert workload.pipeline is not None
    assert workload.pipeline.counts["epochs used up"] > 0
    assert before == transactions.EPOCH_MAX


def test_a_group_that_nobody_is_in_is_forgotten() -> None:
    drawn = PipelineProfile(transactions=6, offsets_retention_ms=5_000)
    config = BrokerConfig(offsets_retention_ms=5_000)
    profile = Profile(5, fault_count=0, values=5, partitions=1, pipeline=drawn, config=config)
    workload = Workload(profile)
    try:
        history = workload.run()
    finally:
        workload.close()
    assert workload.pipeline is not None
    assert workload.pipeline.counts["groups forgotten"] == 1
    assert min(history.groups.values()) > 0, "workers has members, and was not forgotten"


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
    assert counts["ProduceRequest came late"] > 0
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
