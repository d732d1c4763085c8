"""What dies and what goes on: SIGKILL of each kind of actor, on a real Ray."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import ray
from ray_nodes import until

import raftlog
from raftlog.actors.launch import broker_actor, metadata_actor
from raftlog.errors import RaftlogError


def all_caught_up(log: raftlog.Log, topic: str) -> bool:
    try:
        partitions = log.describe_topic(topic).partitions
        brokers = log.describe_cluster().brokers
    except RaftlogError:
        return False
    return all(one.leader is not None and not one.lagging for one in partitions) and all(
        broker.state == "alive" for broker in brokers
    )


def values_of(log: raftlog.Log, topic: str) -> list[bytes]:
    with log.consumer(topic) as consumer:
        return [record.value for record in consumer.records(until="end")]


@pytest.mark.parametrize("how", ["ray.kill", "SIGKILL"])
def test_a_killed_leader_costs_no_record(log: raftlog.Log, cluster_name: str, how: str) -> None:
    topic = f"killed-{how.lower().replace('.', '-')}"
    log.create_topic(topic, partitions=1)
    with log.producer(linger_ms=1) as producer:
        before = [producer.send(topic, b"%d" % n) for n in range(500)]
        producer.flush()
        leader = log.describe_topic(topic).partitions[0].leader
        during = [producer.send(topic, b"%d" % n) for n in range(500, 1000)]
        if how == "ray.kill":
            ray.kill(broker_actor(cluster_name, leader))
        else:
            pid = next(one.pid for one in log.describe_cluster().brokers if one.id == leader)
            os.kill(pid, signal.SIGKILL)
        after = [producer.send(topic, b"%d" % n) for n in range(1000, 1500)]
        producer.flush(timeout=60)
    offsets = [delivery.result().offset for delivery in before + during + after]
    assert offsets == list(range(1500)), "in order, nothing lost, nothing doubled"
    assert values_of(log, topic) == [b"%d" % n for n in range(1500)]
    until("all have caught up", lambda: all_caught_up(log, topic))


def test_pending_refs_of_a_killed_leader_resolve(log: raftlog.Log, cluster_name: str) -> None:
    log.create_topic("killed-refs", partitions=1)
    leader = log.describe_topic("killed-refs").partitions[0].leader
    with log.producer(linger_ms=500) as producer:
        deliveries = [producer.send("killed-refs", b"%d" % n) for n in range(5000)]
        refs: list[Any] = [delivery.ref for delivery in deliveries]
        ray.kill(broker_actor(cluster_name, leader))
        resolved = ray.get(refs, timeout=60)
    assert [one.offset for one in resolved] == list(range(5000))
    assert [one.offset for one in resolved] == [delivery.result().offset for delivery in deliveries]
    until("all have caught up", lambda: all_caught_up(log, "killed-refs"))


def test_refs_of_a_killed_producer_raise(log: raftlog.Log, cluster_name: str) -> None:
    """Whoever holds refs of a producing process that is killed hears of it, long before any timeout."""
    log.create_topic("orphans", partitions=1)

    @ray.remote(num_cpus=0)
    class Producing:
        def __init__(self, name: str) -> None:
            self._log = raftlog.connect(name)
            self._producer = self._log.producer(linger_ms=60_000, delivery_timeout_ms=120_000)

        def pid(self) -> int:
            return os.getpid()

        def send(self, count: int) -> list[Any]:
            return [self._producer.send("orphans", b"%d" % n).ref for n in range(count)]

    producing = Producing.remote(cluster_name)
    pid = ray.get(producing.pid.remote(), timeout=60)
    refs = ray.get(producing.send.remote(100), timeout=60)
    os.kill(pid, signal.SIGKILL)
    for ref in refs:
        with pytest.raises((RaftlogError, ray.exceptions.RayError)):
            ray.get(ref, timeout=30)


def test_a_killed_promises_actor_leaves_the_deliveries_alone(log: raftlog.Log) -> None:
    log.create_topic("promises", partitions=1)
    with log.producer(linger_ms=300) as producer:
        first = producer.send("promises", b"a")
        lost = first.ref
        from raftlog.actors import promises

        ray.kill(promises.actor_of_this_process())
        assert first.result(timeout=30).offset == 0
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(lost, timeout=30)
        assert ray.get(producer.send("promises", b"b").ref, timeout=60).offset == 1, "a new actor takes over"


def test_produce_and_consume_go_on_without_the_metadata_actor(log: raftlog.Log, cluster_name: str) -> None:
    log.create_topic("headless", partitions=3)
    old = metadata_actor(cluster_name)
    ray.kill(old, no_restart=True)
    sent = 0
    deadline = time.monotonic() + 10.0
    with log.producer(linger_ms=1) as producer, log.consumer("headless") as consumer:
        seen: list[bytes] = []
        while time.monotonic() < deadline:
            for _ in range(20):
                producer.send("headless", b"%d" % sent)
                sent += 1
            producer.flush(timeout=5)
            seen += [record.value for record in consumer.poll(timeout=0.2, max_records=1000)]
        seen += [record.value for record in consumer.records(until="end")]
    assert sent > 100
    assert sorted(seen, key=int) == [b"%d" % n for n in range(sent)]

    again = raftlog.start(cluster_name)
    assert again.describe_cluster().cluster_id == log.describe_cluster().cluster_id
    leader = log.describe_topic("headless").partitions[0].leader
    ray.kill(broker_actor(cluster_name, leader))
    until("all have caught up", lambda: all_caught_up(log, "headless"))


def test_the_metadata_actor_comes_back_by_itself(log: raftlog.Log, cluster_name: str) -> None:
    """Killed as a process: Ray restarts it, and it still brings brokers back."""
    actor = metadata_actor(cluster_name)
    pid = ray.get(actor.pid.remote(), timeout=30)
    os.kill(pid, signal.SIGKILL)
    log.create_topic("came-back", partitions=1)
    leader = log.describe_topic("came-back").partitions[0].leader
    ray.kill(broker_actor(cluster_name, leader))
    until("all have caught up", lambda: all_caught_up(log, "came-back"))
    assert raftlog.connect(cluster_name, timeout=60) is not None
