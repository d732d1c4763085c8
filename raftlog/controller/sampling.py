"""The cluster's metrics, and the events worth a line in the log, from what its controller sees."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from raftlog.controller.reconcile import Observed, moving
from raftlog.state.metadata import MetadataState
from raftlog.telemetry import catalogue as c
from raftlog.telemetry.catalogue import Sample
from raftlog.telemetry.logs import log_event

ALIVE: Final = "alive"
DRAINING: Final = "draining"
LOST: Final = "lost"


@dataclass(frozen=True, slots=True)
class View:
    """What a controller saw when it looked.

    Args:
        image: the metadata.
        observed: brokers and leaders.
        at: the loop's time.
    """

    image: MetadataState
    observed: Observed
    at: float

    def broker_state(self, broker_id: int) -> str:
        """ALIVE, DRAINING or LOST."""
        if broker_id not in self.observed.running:
            return LOST
        return DRAINING if self.image.brokers[broker_id].draining else ALIVE

    def held(self) -> dict[int, int]:
        """Broker id -> partitions that it holds, or is to hold, or is not rid of."""
        found = dict.fromkeys(self.image.brokers, 0)
        for topic in self.image.topics.values():
            for partition in topic.partitions:
                for _, broker_id in partition.members:
                    found[broker_id] = found.get(broker_id, 0) + 1
        return found


def cluster_samples(view: View | None, now: float) -> Iterator[Sample]:
    """Of the whole cluster.

    Args:
        view: the newest; None: the controller has never seen all of it.
        now: the loop's time.
    """
    if view is None:
        return
    image, led = view.image, view.observed.led
    partitions = [partition for topic in image.topics.values() for partition in topic.partitions]
    states = [view.broker_state(broker_id) for broker_id in image.brokers]
    offline = sum(all(each not in led for each, _ in partition.members) for partition in partitions)
    yield Sample(c.OFFLINE, (offline,))
    yield Sample(c.PARTITIONS, (len(partitions),))
    yield Sample(c.MOVES, (sum(bool(moving(each, view.observed)) for each in partitions),))
    yield Sample(c.LOOK_AGE, (now - view.at,))
    for state in (ALIVE, DRAINING, LOST):
        yield Sample(c.BROKERS, (states.count(state),), (state,))


def log_news(logger: logging.Logger, before: View | None, now: View) -> None:
    """Log what has happened to brokers between two looks: lost, back, new, forgotten, drains begun and done;
    and the cluster's feature level."""
    if before is None or not logger.isEnabledFor(logging.INFO):
        return
    level = now.image.feature_level
    if level != before.image.feature_level:
        log_event(logger, logging.INFO, "feature_level", "feature level %d", level, feature_level=level)
    for broker_id in sorted(before.image.brokers.keys() | now.image.brokers.keys()):
        event = _broker_event(before, now, broker_id)
        if event is not None:
            severity = logging.WARNING if event == "broker_lost" else logging.INFO
            what = event.removeprefix("broker_").replace("_", " ")
            log_event(logger, severity, event, "broker %d: %s", broker_id, what, broker=broker_id)


def _broker_event(before: View, now: View, broker_id: int) -> str | None:
    """The name of what has happened to a broker."""
    if broker_id not in now.image.brokers:
        return "broker_forgotten"
    if broker_id not in before.image.brokers:
        return "broker_new"
    was, is_ = before.broker_state(broker_id), now.broker_state(broker_id)
    if (was == LOST) is not (is_ == LOST):
        return "broker_lost" if is_ == LOST else "broker_back"
    drained = now.image.brokers[broker_id].draining
    if drained is not before.image.brokers[broker_id].draining:
        return "broker_drain_begun" if drained else "broker_drain_undone"
    if drained and before.held()[broker_id] and not now.held()[broker_id]:
        return "broker_drain_done"
    return None
