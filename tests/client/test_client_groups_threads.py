"""Blocking consumers of a group against production brokers: threads, and closing from elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from raftlog.client.log import Log
from raftlog.client.sync import Consumer
from raftlog.errors import Closed, ConcurrentUse, GroupNotEmpty, UnknownGroup
from raftlog.record.types import TopicPartition
from raftlog.testing.local_cluster import LocalCluster

TOPIC = "orders"
GROUP = "readers"


@pytest.fixture
def log() -> Iterator[Log]:
    """A cluster with a topic of four partitions, a hundred records in all."""
    with LocalCluster(brokers=1) as cluster:
        cluster.log.create_topic(TOPIC, partitions=4)
        with cluster.log.producer() as producer:
            for number in range(100):
                producer.send(TOPIC, b"%d" % number, partition=number % 4)
        yield cluster.log


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Block until a condition of other threads holds."""
    event = threading.Event()
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        event.wait(0.005)


def test_two_threads_share_and_one_takes_over(log: Log) -> None:
    read: list[list[int]] = [[], []]
    calls: list[list[tuple[str, list[TopicPartition]]]] = [[], []]
    consumers: list[Consumer] = []

    def consume(me: int) -> None:
        def note(kind: str) -> Callable[[list[TopicPartition]], None]:
            def called(partitions: list[TopicPartition]) -> None:
                assert threading.current_thread() is threads[me], "in the thread that polls"
                calls[me].append((kind, partitions))

            return called

        with log.consumer(TOPIC, group=GROUP, on_assigned=note("+"), on_revoked=note("-")) as consumer:
            consumers.append(consumer)
            for record in consumer:
                read[me].append(int(record.value))
                consumer.commit()
                if read[me][-1] == -1 - me:
                    return

    threads = [threading.Thread(target=consume, args=(me,)) for me in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(read[0] + read[1]) >= 100)
    wait_until(lambda: sorted(len(consumer.assignment()) for consumer in consumers) == [2, 2])
    first = next(each for each in log.describe_group(GROUP).members)
    assert len(first.partitions) == 2
    with log.producer() as producer:
        for number in range(4):
            producer.send(TOPIC, b"-1", partition=number)
    wait_until(lambda: not threads[0].is_alive())
    with log.producer() as producer:
        for number in range(4):
            producer.send(TOPIC, b"-2", partition=number)
    threads[1].join(20)
    assert not threads[1].is_alive()
    everything = sorted(value for value in read[0] + read[1] if value >= 0)
    assert everything == [*range(100)]
    wait_until(lambda: log.describe_group(GROUP).state == "empty")


def test_closing_from_another_thread_leaves_the_group(log: Log) -> None:
    consumer = log.consumer(TOPIC, group=GROUP, on_revoked=lambda partitions: None)
    errors: list[Exception] = []

    def consume() -> None:
        try:
            while True:
                consumer.poll(timeout=30)
        except Closed as error:
            errors.append(error)

    thread = threading.Thread(target=consume)
    thread.start()
    wait_until(lambda: len(consumer.assignment()) == 4)
    wait_until(lambda: len(log.describe_group(GROUP).members) == 1)
    with pytest.raises(ConcurrentUse):
        consumer.commit()
    consumer.close()
    thread.join(10)
    assert errors
    assert log.describe_group(GROUP).state == "empty"


def test_groups_are_described_reset_and_deleted(log: Log) -> None:
    assert log.groups() == []
    with pytest.raises(UnknownGroup):
        log.describe_group(GROUP)
    log.commit_offsets(GROUP, {(TOPIC, 0): 5, (TOPIC, 1): (6, "text")})
    described = log.describe_group(GROUP)
    assert [(each.partition, each.committed, each.lag, each.metadata) for each in described.offsets] == [
        (0, 5, 20, ""),
        (1, 6, 19, "text"),
    ]
    with log.consumer(TOPIC, group=GROUP) as consumer:
        while len(consumer.assignment()) < 4:
            consumer.poll(timeout=1, max_records=1)
        for work in (
            lambda: log.reset_offsets(GROUP, TOPIC, "earliest"),
            lambda: log.commit_offsets(GROUP, {(TOPIC, 0): 1}),
            lambda: log.delete_group(GROUP),
        ):
            with pytest.raises(GroupNotEmpty):
                work()
        assert log.describe_group(GROUP).state == "stable"
    assert log.reset_offsets(GROUP, TOPIC, "latest") == {(TOPIC, n): 25 for n in range(4)}
    assert log.reset_offsets(GROUP, TOPIC, datetime.now(UTC) - timedelta(days=1)) == {
        (TOPIC, n): 0 for n in range(4)
    }
    assert log.reset_offsets(GROUP, TOPIC, {(TOPIC, 2): 25}) == {(TOPIC, 2): 25}
    with log.consumer(TOPIC, group=GROUP) as consumer:
        assert len(list(consumer.records(until="end"))) == 75
    assert log.groups() == [GROUP]
    log.delete_group(GROUP)
    assert log.groups() == []


def test_a_dropped_consumer_leaves(log: Log) -> None:
    consumer = log.consumer(TOPIC, group=GROUP)
    while not consumer.poll(timeout=1.0):
        pass
    del consumer
    wait_until(lambda: log.describe_group(GROUP).state == "empty")
