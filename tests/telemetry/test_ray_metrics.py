"""How samples become Ray's metrics, with instruments that only remember what they are told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from raftlog.telemetry.catalogue import MANY, Kind, Metric, Sample

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray warns about itself while it is imported

SENT = Metric("raftlog_sent_total", Kind.COUNTER, "Sent.", ("topic",))
LAG = Metric("raftlog_lag_records", Kind.GAUGE, "Lag.", ("group",))
WAIT = Metric("raftlog_wait_seconds", Kind.HISTOGRAM, "Waiting.")


class Instrument:
    """Stands for any of Ray's."""

    told: list[tuple[str, float, dict[str, str]]]

    def __init__(self, name: str, says: str, *rest: Any) -> None:
        self.name = name
        self.keys = rest[-1]

    def _record(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.keys)
        self.told.append((self.name, value, tags))


class FakeCounter(Instrument):
    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "Ray refuses it"
        self._record(value, tags)


class FakeGauge(Instrument):
    def set(self, value: float, tags: dict[str, str]) -> None:
        self._record(value, tags)


class FakeHistogram(Instrument):
    def observe(self, value: float, tags: dict[str, str]) -> None:
        self._record(value, tags)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, float, dict[str, str]]]]:
    """All that Ray is told."""
    from raftlog.actors import metrics

    Instrument.told = []
    monkeypatch.setattr(metrics, "Counter", FakeCounter)
    monkeypatch.setattr(metrics, "Gauge", FakeGauge)
    monkeypatch.setattr(metrics, "Histogram", FakeHistogram)
    return iter_told()


def iter_told() -> Any:
    return Instrument.told


def make() -> Any:
    from raftlog.actors.metrics import RayMetrics

    return RayMetrics(cluster="default", broker="2")


def tags(**others: str) -> dict[str, str]:
    return {"cluster": "default", "broker": "2", **others}


def test_of_totals_ray_is_told_by_how_much_they_have_grown(told: list[Any]) -> None:
    metrics = make()
    for total in (0, 5, 5, 12):
        metrics.show([Sample(SENT, (total,), ("orders",))])
    named = tags(topic="orders")
    assert told == [
        ("raftlog_sent_total", 0, named),
        ("raftlog_sent_total", 5, named),
        ("raftlog_sent_total", 7, named),
    ]


def test_topics_that_became_too_many_are_not_told_twice(told: list[Any]) -> None:
    metrics = make()
    metrics.show([Sample(SENT, (40,), ("orders",)), Sample(SENT, (2,), ("bills",))])
    told.clear()
    metrics.show([Sample(SENT, (50,), (MANY,))])
    metrics.show([Sample(SENT, (53,), (MANY,))])
    assert [value for _, value, _ in told] == [0, 3]


def test_a_gauge_that_is_gone_is_0_once(told: list[Any]) -> None:
    metrics = make()
    metrics.show([Sample(LAG, (7,), ("billing",)), Sample(LAG, (1,), ("other",))])
    told.clear()
    metrics.show([Sample(LAG, (2,), ("other",))])
    assert told == [
        ("raftlog_lag_records", 2, tags(group="other")),
        ("raftlog_lag_records", 0, tags(group="billing")),
    ]
    told.clear()
    metrics.show([Sample(LAG, (3,), ("other",))])
    assert told == [("raftlog_lag_records", 3, tags(group="other"))]


def test_every_observation_is_told(told: list[Any]) -> None:
    make().show([Sample(WAIT, [0.1, 0.2]), Sample(WAIT, [])])
    assert told == [("raftlog_wait_seconds", value, tags()) for value in (0.1, 0.2)]


def test_a_broker_goes_on_when_its_metrics_do_not(told: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    from raftlog.actors.metrics import export

    turns: list[str] = []

    def sample(late: float) -> list[Sample]:
        turns.append("sample")
        if turns.count("sample") == 2:
            raise ValueError("bang")
        if turns.count("sample") == 5:
            raise asyncio.CancelledError
        return [Sample(LAG, (late,), ("g",))]

    async def survey() -> None:
        turns.append("survey")

    with pytest.raises(asyncio.CancelledError), caplog.at_level(logging.ERROR, "raftlog.actors"):
        asyncio.run(export(make(), 0.001, sample, survey))
    assert turns == ["survey", "sample", "sample", "sample", "survey", "sample", "sample"]
    assert len(told) == 3
    assert all(value >= 0 for _, value, _ in told)
    assert "bang" in caplog.text
