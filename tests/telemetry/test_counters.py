"""What hot paths count, how samples are folded, and that the catalogue is one."""

from __future__ import annotations

import re

from raftlog.telemetry import catalogue
from raftlog.telemetry.catalogue import BROKER_METRICS, CLUSTER_METRICS, MANY, Kind, Metric, Sample, folded
from raftlog.telemetry.counters import SAMPLES_PER_LOOK, Counters, Latency

LAG = Metric("lag", Kind.GAUGE, "", ("group", "topic", "partition"))


def measure(latency: Latency, times: int) -> int:
    """Let something happen so often; how often it was timed."""
    timed = 0
    for _ in range(times):
        latency.count += 1
        if latency.count >= latency.next:
            latency.add(0.5)
            timed += 1
    return timed


def test_few_are_all_timed() -> None:
    latency = Latency()
    assert measure(latency, 10) == 10
    assert latency.take() == [0.5] * 10
    assert latency.take() == []


def test_of_many_a_sample_is_timed_evenly_spread() -> None:
    latency = Latency()
    measure(latency, 100_000)
    assert len(latency.take()) <= 2 * SAMPLES_PER_LOOK, "whatever happens, memory is bounded"
    assert SAMPLES_PER_LOOK * 0.9 <= measure(latency, 100_000) <= SAMPLES_PER_LOOK * 1.1
    assert latency.count == 200_000, "all are counted"
    latency.take()
    measure(latency, 10)
    latency.take()
    assert measure(latency, 10) >= 9, "when it is quiet again, all are timed again"


def test_traffic_outlives_the_replicas_that_count() -> None:
    counters = Counters(lambda: 0.0)
    counters.traffic("orders").records_in += 3
    counters.traffic("orders").bytes_in += 300
    counters.traffic("bills").records_in += 1
    counters.elections_won += 2
    assert counters.totals() == {"records_in": 4, "bytes_in": 300, "bytes_out": 0, "elections_won": 2}


def test_few_series_stay_as_they_are() -> None:
    samples = [Sample(LAG, (each,), ("g", "t", str(each))) for each in range(5)]
    assert folded(samples, 5) == samples


def test_too_many_series_are_added_up_from_the_last_tag_on() -> None:
    samples = [
        Sample(LAG, (1,), (f"g{g}", f"t{t}", str(p))) for g in range(3) for t in range(4) for p in range(5)
    ]
    by_topic = folded(samples, 59)
    assert len(by_topic) == 12
    assert {sample.tags[2] for sample in by_topic} == {MANY}
    assert {sample.values for sample in by_topic} == {(5,)}
    by_group = folded(samples, 11)
    assert [(sample.tags, sample.values) for sample in by_group] == [
        ((f"g{each}", MANY, MANY), (20,)) for each in range(3)
    ]
    assert folded(samples, 2) == [Sample(LAG, (60,), (MANY, MANY, MANY))]


def test_the_catalogue_names_every_metric_once_by_the_conventions() -> None:
    listed = BROKER_METRICS + CLUSTER_METRICS
    defined = [each for each in vars(catalogue).values() if isinstance(each, Metric)]
    assert sorted(listed) == sorted(defined, key=lambda each: each.name)
    assert len({each.name for each in listed}) == len(listed)
    for each in listed:
        assert re.fullmatch(r"raftlog_[a-z_]+", each.name)
        assert each.name.endswith("_total") == (each.kind is Kind.COUNTER), each.name
        assert each.kind is not Kind.HISTOGRAM or each.name.endswith("_seconds")
        assert each.says.endswith(".") or each.says.endswith("does.") or ")" in each.says
        assert not {"cluster", "broker"} & set(each.tags)
