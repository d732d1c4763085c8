"""Metrics for Ray: samples go to ``ray.util.metrics``, which every node's agent shows to Prometheus.

Ray adds ``ray_`` to the names. Without Ray's own agent (``pip install "ray[default]"``) they go nowhere, and
nothing else changes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final, TypeAlias

from ray.util.metrics import Counter, Gauge, Histogram

from raftlog.telemetry.catalogue import LATENCY_BOUNDARIES_S, MANY, Kind, Metric, Sample

logger = logging.getLogger("raftlog.actors")

SURVEY_EVERY: Final = 3
"""What takes longer is looked at with every third sample."""

_Instrument: TypeAlias = Counter | Gauge | Histogram


class RayMetrics:
    """Hands samples to Ray.

    Args:
        tags: that all of them carry.
    """

    def __init__(self, **tags: str) -> None:
        self._tags = tags
        self._instruments: dict[Metric, _Instrument] = {}
        self._totals: dict[tuple[Metric, tuple[str, ...]], float] = {}
        """Of counters, what Ray has been told so far."""
        self._shown: set[tuple[Metric, tuple[str, ...]]] = set()
        """Gauges that are not 0 as far as Ray knows."""

    def show(self, samples: Iterable[Sample]) -> None:
        """Tell Ray. A gauge that is not among them any more (its group has another coordinator now) is set
        to 0, for Ray goes on showing what it heard last."""
        shown: set[tuple[Metric, tuple[str, ...]]] = set()
        for metric, values, tags in samples:
            instrument, named = self._instrument(metric), self._named(metric, tags)
            if isinstance(instrument, Gauge):
                instrument.set(values[0], named)
                shown.add((metric, tags))
            elif isinstance(instrument, Counter):
                self._add(instrument, metric, values[0], tags)
            else:
                for value in values:
                    instrument.observe(value, named)
        for metric, tags in self._shown - shown:
            instrument = self._instrument(metric)
            assert isinstance(instrument, Gauge)
            instrument.set(0, self._named(metric, tags))
        self._shown = shown

    def _add(self, counter: Counter, metric: Metric, total: float, tags: tuple[str, ...]) -> None:
        before = self._totals.get((metric, tags))
        # What was added up only now has been told one by one until now.
        grown = 0.0 if before is None and MANY in tags else total - (before or 0)
        if grown > 0:
            counter.inc(grown, self._named(metric, tags))
        elif before is None:
            # Else the first of its kind would be a series that begins with 1, which is no increase to
            # Prometheus. inc() refuses 0.
            begin: Callable[..., None] | None = getattr(counter, "_record", None)
            if begin is not None:
                begin(0, self._named(metric, tags))
        if grown > 0 or before is None:
            self._totals[metric, tags] = total

    def _named(self, metric: Metric, tags: tuple[str, ...]) -> dict[str, str]:
        return {**self._tags, **dict(zip(metric.tags, tags, strict=True))}

    def _instrument(self, metric: Metric) -> _Instrument:
        found = self._instruments.get(metric)
        if found is None:
            keys = (*self._tags, *metric.tags)
            if metric.kind is Kind.COUNTER:
                found = Counter(metric.name, metric.says, keys)
            elif metric.kind is Kind.GAUGE:
                found = Gauge(metric.name, metric.says, keys)
            else:
                found = Histogram(metric.name, metric.says, list(LATENCY_BOUNDARIES_S), keys)
            self._instruments[metric] = found
        return found


async def export(
    metrics: RayMetrics,
    interval_s: float,
    sample: Callable[[float], list[Sample]],
    survey: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Sample and show, for ever. What fails is logged: whatever it is, a broker goes on without metrics.

    Args:
        metrics: where to.
        interval_s: between samples.
        sample: everything as it stands; is told by how many seconds it is called too late.
        survey: what takes longer, to be looked at now and then, before a sample.
    """
    loop = asyncio.get_running_loop()
    turn, due = 0, loop.time() + min(interval_s, 1.0)
    while True:
        await asyncio.sleep(max(due - loop.time(), 0))
        late = loop.time() - due
        due = loop.time() + interval_s
        try:
            if survey is not None and turn % SURVEY_EVERY == 0:
                await survey()
            metrics.show(sample(max(late, 0.0)))
        except Exception:  # whatever Ray or a sampler raises: only metrics are missing
            logger.exception("no metrics this time")
        turn += 1
