"""More partitions, other replication, draining and the plan, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from raftlog.testing.local_cluster import LocalCluster

Run = Callable[..., Any]


def ok(result: Any) -> str:
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def test_a_topic_is_altered_while_it_is_written_to(run: Run, cluster: LocalCluster) -> None:
    ok(run("topics", "create", "grows", "-p", "1", "-r", "1"))
    with cluster.log.producer(linger_ms=0) as producer:
        producer.send("grows", b"before", key=b"k").result(30)
        refused = run("topics", "alter", "grows", "--partitions", "4")
        assert refused.exit_code == 1
        assert "allow_key_reorder" in refused.stderr
        assert "4 partitions" in ok(
            run("topics", "alter", "grows", "--partitions", "4", "--allow-key-reorder", "-r", "2")
        )
        assert run("topics", "alter", "grows", "--partitions", "3").exit_code == 1
        ok(run("topics", "alter", "grows", "--partitions", "4"))
        used = set()
        while used != {0, 1, 2, 3}:  # it hears of them within some seconds
            used.add(producer.send("grows", b"after", key=b"%d" % len(used)).result(30).partition)
            used.add(producer.send("grows", b"after").result(30).partition)
    while {len(each.replicas) for each in cluster.log.describe_topic("grows").partitions} != {2}:
        pass
    with cluster.log.consumer("grows") as consumer:
        assert {record.partition for record in consumer.records(until="end")} == {0, 1, 2, 3}


def test_brokers_drain_and_stay(run: Run, cluster: LocalCluster) -> None:
    assert "drain" in ok(run("drain", "1"))
    states = {each.id: each.state for each in cluster.log.describe_cluster().brokers}
    assert states == {0: "alive", 1: "draining", 2: "alive"}
    assert "stay" in ok(run("drain", "1", "--undo"))
    assert {each.state for each in cluster.log.describe_cluster().brokers} == {"alive"}
    unknown = run("drain", "77")
    assert unknown.exit_code == 1
    assert "77" in unknown.stderr


def test_a_drained_broker_holds_nothing() -> None:
    with LocalCluster(brokers=2) as cluster:

        def held(broker: int) -> tuple[int, int]:
            found = cluster.log.describe_cluster().brokers[broker]
            return found.replicas, found.leaders

        assert held(1) == (0, 0)
        cluster.log.create_topic("moves", partitions=4, replication_factor=1)
        while sum(held(0)) + sum(held(1)) != 2 * 4:
            pass
        cluster.log.drain([1])
        while held(1) != (0, 0):
            pass
        assert held(0) == (4, 4)


def test_the_plan_is_a_table(run: Run) -> None:
    shown = ok(run("rebalance", "--dry-run"))
    (row,) = [line.split() for line in shown.splitlines() if line.startswith("orders ")]
    assert row == ["orders", "2", "0", "1", "2", "0", "1", "3", "5.0", "balance"]
    assert "1 partitions would change, 5.0 MB" in shown
    assert json.loads(ok(run("rebalance", "--dry-run", "--json")))[0]["to"] == [0, 1, 3]
    assert "nothing to move" in ok(run("rebalance"))
