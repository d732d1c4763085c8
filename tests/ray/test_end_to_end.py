"""raftlog on a real Ray: produced and consumed from the driver, from tasks and from actors."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray

import raftlog
from raftlog.client.identity_pool import process_pool
from raftlog.errors import NotRunning, TopicExists


def test_a_cluster_that_runs_keeps_what_it_was_started_with(
    log: raftlog.Log, cluster_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for settings in ({}, {"brokers": 3}):
        assert raftlog.start(cluster_name, **settings).cluster_id == log.cluster_id
    assert caplog.text == ""
    raftlog.start(cluster_name, brokers=3, replace_after=600)
    assert "with replace_after_s=30.0: stop and start it to change that" in caplog.text


def test_the_driver_produces_and_consumes(log: raftlog.Log) -> None:
    log.create_topic("driver", partitions=3)
    with log.producer() as producer:
        deliveries = [producer.send("driver", b"value-%d" % n, key=b"key-%d" % (n % 7)) for n in range(300)]
    offsets = {(d.result().partition, d.result().offset) for d in deliveries}
    assert len(offsets) == 300
    with log.consumer("driver") as consumer:
        records = list(consumer.records(until="end"))
    assert sorted(record.value for record in records) == sorted(b"value-%d" % n for n in range(300))
    assert {(record.partition, record.offset) for record in records} == offsets
    for key in {record.key for record in records}:
        mine = [record for record in records if record.key == key]
        assert len({record.partition for record in mine}) == 1, "one key, one partition"
        numbers = [int(record.value.split(b"-")[1]) for record in mine]
        assert numbers == sorted(numbers), "in the order sent"


def test_tasks_and_actors_find_the_cluster_by_its_name(log: raftlog.Log, cluster_name: str) -> None:
    log.create_topic("tasks", partitions=2)

    @ray.remote(num_cpus=0)
    def produce(name: str, worker: int) -> list[int]:
        with raftlog.connect(name).producer() as producer:
            return [
                producer.send("tasks", b"%d:%d" % (worker, n), partition=worker % 2).result(30).offset
                for n in range(20)
            ]

    @ray.remote(num_cpus=0)
    class Reader:
        def __init__(self, log: raftlog.Log) -> None:
            self._log = log  # a Log pickles

        def read(self) -> list[bytes]:
            with self._log.consumer("tasks") as consumer:
                return [record.value for record in consumer.records(until="end")]

    offsets = ray.get([produce.remote(cluster_name, worker) for worker in range(2)], timeout=120)
    assert [sorted(one) for one in offsets] == [list(range(20)), list(range(20))]
    values = ray.get(Reader.remote(log).read.remote(), timeout=120)
    assert sorted(values) == sorted(b"%d:%d" % (worker, n) for worker in range(2) for n in range(20))


def test_short_tasks_take_a_producer_id_for_each_worker_process(log: raftlog.Log) -> None:
    log.create_topic("short-tasks", partitions=1)

    @ray.remote(num_cpus=0.5)
    def produce(log: raftlog.Log, number: int) -> tuple[int, list[int]]:
        with log.producer() as producer:
            producer.send("short-tasks", b"%d" % number).result(30)
        left = process_pool(log.describe_cluster().cluster_id)._free
        return os.getpid(), [lease.identity[0] for lease in left]

    taken: dict[int, set[int]] = {}
    for process, ids in ray.get([produce.remote(log, number) for number in range(60)], timeout=120):
        taken.setdefault(process, set()).update(ids)
    assert len(taken) < 20, "a few workers carry out all tasks"
    assert {len(ids) for ids in taken.values()} == {1}
    assert len(set.union(*taken.values())) == len(taken), "no two processes share one"
    with log.consumer("short-tasks") as consumer:
        values = [record.value for record in consumer.records(until="end")]
    assert sorted(values) == sorted(b"%d" % number for number in range(60))


def test_start_attaches_to_what_runs(log: raftlog.Log, cluster_name: str) -> None:
    again = raftlog.start(cluster_name)
    assert again.describe_cluster().cluster_id == log.describe_cluster().cluster_id
    assert len(again.describe_cluster().brokers) == 3


def test_a_cluster_that_does_not_run_is_named(ray_session: None) -> None:
    with pytest.raises(NotRunning, match="nobody"):
        raftlog.connect("nobody", timeout=1.0)


def test_a_topic_is_created_once(log: raftlog.Log) -> None:
    log.create_topic("once", partitions=2)
    with pytest.raises(TopicExists, match="once"):
        log.create_topic("once")
    log.create_topic("once", exist_ok=True)
    description = log.describe_topic("once")
    assert [len(partition.replicas) for partition in description.partitions] == [3, 3]


def test_five_thousand_pending_refs_keep_nobody_waiting(log: raftlog.Log) -> None:
    """Brokers answer at once meanwhile, and every ref resolves to the offset acknowledged."""
    log.create_topic("refs", partitions=3)
    with log.producer(linger_ms=2000) as producer:
        deliveries = [producer.send("refs", b"%d" % n) for n in range(5000)]
        refs: list[Any] = [delivery.ref for delivery in deliveries]
        with log.producer(linger_ms=0) as other:
            other.send("refs", b"meanwhile").result(timeout=1.0)
        producer.flush()
        resolved = ray.get(refs, timeout=60)
    assert resolved == [delivery.result() for delivery in deliveries]
    assert len({(one.partition, one.offset) for one in resolved}) == 5000


def test_a_ref_goes_into_a_task(log: raftlog.Log) -> None:
    log.create_topic("ref-task")

    @ray.remote(num_cpus=0)
    def offset_of(metadata: raftlog.RecordMetadata) -> int:
        return metadata.offset

    with log.producer() as producer:
        assert ray.get(offset_of.remote(producer.send("ref-task", b"x").ref), timeout=60) == 0
