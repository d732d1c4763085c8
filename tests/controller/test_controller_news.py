"""What the controller says of a cluster: its metrics, and the lines in its log."""

from __future__ import annotations

import logging

import pytest
from msgspec.structs import replace

from raftlog.client.admin import Admin
from raftlog.config import BrokerConfig
from raftlog.controller.reconcile import Observed, Policy
from raftlog.controller.sampling import View, cluster_samples, log_news
from raftlog.net.rpc_cluster import LedRow
from raftlog.state.image import Broker, Partition, Topic
from raftlog.state.metadata import MetadataState
from raftlog.telemetry import catalogue as c
from raftlog.telemetry.catalogue import CLUSTER_METRICS, Metric
from raftlog.testing.moves import Mover
from raftlog.testing.sim_cluster import SimCluster

TOPIC_ID = b"t" * 16
logger = logging.getLogger("raftlog.controller")


def image(brokers: int, *, draining: int = -1, partitions: int = 2, level: int = 1) -> MetadataState:
    """Brokers, and a topic with all of its partitions on the first three (or fewer) of them."""
    made = MetadataState()
    made.feature_level = level
    for broker_id in range(brokers):
        made.brokers[broker_id] = Broker(
            broker_id, b"%d" % broker_id, f"n{broker_id}", "", broker_id + 1, draining=broker_id == draining
        )
    founded = tuple(
        Partition.founded(tuple((10 * index + each, each) for each in range(min(brokers, 3))))
        for index in range(partitions)
    )
    made._set_topic(Topic("t", TOPIC_ID, {}, False, founded))
    return made


def view(state: MetadataState, *running: int, led: tuple[int, ...] = (0, 10), changes: bool = False) -> View:
    """What a controller saw: these brokers answer, and these replicas lead."""
    rows = {
        each: LedRow(each, tuple(range(each - each % 10, each - each % 10 + 3)), 0, changes) for each in led
    }
    return View(state, Observed({}, frozenset(), frozenset(running), led=rows), 100.0)


def value(found: View, metric: Metric, *tags: str) -> float:
    """Of one series."""
    return next(
        each.values[0] for each in cluster_samples(found, 103.5) if (each.metric, each.tags) == (metric, tags)
    )


def news(caplog: pytest.LogCaptureFixture, before: View | None, now: View) -> list[tuple[str, int | None]]:
    """(event, broker) of every line."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "raftlog"):
        log_news(logger, before, now)
    return [(each.__dict__["event"], each.__dict__["fields"].get("broker")) for each in caplog.records]


def test_before_it_has_seen_anything_it_says_nothing() -> None:
    assert list(cluster_samples(None, 0.0)) == []


def test_every_metric_of_the_cluster_is_sampled() -> None:
    assert {each.metric for each in cluster_samples(view(image(3), 0, 1, 2), 0.0)} == set(CLUSTER_METRICS)


def test_a_partition_that_nobody_leads_is_offline() -> None:
    assert value(view(image(3), 0, 1, 2), c.OFFLINE) == 0
    assert value(view(image(3), 0, 1, 2, led=(12,)), c.OFFLINE) == 1
    assert value(view(image(3), led=()), c.OFFLINE) == value(view(image(3)), c.PARTITIONS) == 2


def test_brokers_by_state() -> None:
    found = view(image(4, draining=1), 0, 1, 2)
    assert [value(found, c.BROKERS, state) for state in ("alive", "draining", "lost")] == [2, 1, 1]


def test_moves_and_the_age_of_the_look() -> None:
    assert value(view(image(3), 0, 1, 2), c.MOVES) == 0
    assert value(view(image(3), 0, 1, 2, changes=True), c.MOVES) == 2
    assert value(view(image(3), 0), c.LOOK_AGE) == 3.5


def test_nothing_new_is_no_line(caplog: pytest.LogCaptureFixture) -> None:
    assert news(caplog, None, view(image(3), 0)) == []
    assert news(caplog, view(image(3), 0, 1, 2), view(image(3), 0, 1, 2)) == []
    assert news(caplog, view(image(3), 0, 1), view(image(3), 0, 1)) == [], "lost is said once"


def test_brokers_that_come_and_go(caplog: pytest.LogCaptureFixture) -> None:
    three, two = view(image(3), 0, 1, 2), view(image(3), 0, 2)
    assert news(caplog, three, two) == [("broker_lost", 1)]
    assert caplog.records[0].levelno == logging.WARNING, "somebody should look"
    assert news(caplog, two, three) == [("broker_back", 1)]
    assert news(caplog, three, view(image(4), 0, 1, 2, 3)) == [("broker_new", 3)]
    assert news(caplog, view(image(4), 0, 1, 2, 3), three) == [("broker_forgotten", 3)]


def test_a_drain_from_begin_to_end(caplog: pytest.LogCaptureFixture) -> None:
    steady, begun = view(image(3), 0, 1, 2), view(image(3, draining=2), 0, 1, 2)
    assert news(caplog, steady, begun) == [("broker_drain_begun", 2)]
    assert news(caplog, begun, steady) == [("broker_drain_undone", 2)]
    emptied = image(3, draining=2)
    topic = emptied.topics["t"]
    moved = tuple(replace(each, replicas=each.replicas[:2]) for each in topic.partitions)
    emptied._set_topic(replace(topic, partitions=moved))
    done = view(emptied, 0, 1, 2)
    assert news(caplog, begun, done) == [("broker_drain_done", 2)]
    assert news(caplog, done, done) == []


def test_the_feature_level(caplog: pytest.LogCaptureFixture) -> None:
    assert news(caplog, view(image(3), 0, 1, 2), view(image(3, level=2), 0, 1, 2)) == [
        ("feature_level", None)
    ]


def test_a_drain_in_a_cluster_that_is_governed(caplog: pytest.LogCaptureFixture) -> None:
    cluster = SimCluster(7, 4, config=BrokerConfig(preferred_leader_after_ms=200))
    cluster.start()
    mover = Mover(cluster, Policy(replace_after_ms=3_000, brokers=0), set())

    async def ask(what: str) -> None:
        client = cluster.client("admin")
        if what == "topic":
            await Admin(client).create_topic("t", 4, 3, None, False, 60.0)
        else:
            await Admin(client).drain([1], True, 10.0)
        await client.close()

    def logged() -> list[tuple[str, object]]:
        return [
            (each.__dict__["event"], each.__dict__["fields"].get("broker"))
            for each in caplog.records
            if each.name == "raftlog.controller" and hasattr(each, "event")
        ]

    try:
        with caplog.at_level(logging.INFO, "raftlog.controller"):
            cluster.run(ask("topic"), node="admin")
            mover.govern()
            cluster.loop.run_until(mover.has_arrived, 120.0)
            cluster.run(ask("drain"), node="admin")
            cluster.loop.run_until(lambda: ("broker_drain_done", 1) in logged(), 120.0)
    finally:
        mover.kill_controllers()
        cluster.close()
    assert logged().index(("broker_drain_begun", 1)) < logged().index(("broker_drain_done", 1))
    assert ("partition_assigned", None) in logged()
