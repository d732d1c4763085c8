"""``log.process`` with worker actors on a real Ray."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from ray_nodes import until

import raftlog
from raftlog.errors import RaftlogError, UnknownTopic
from raftlog.record.types import Record

COUNT = 400
PATIENCE_S = 60.0


def make_function() -> Callable[[Record], bytes]:
    """A function inside of a function travels whole: workers do not have this module."""

    def enclose(record: Record) -> bytes:
        return b"<%s>" % record.value

    return enclose


def came_out(log: raftlog.Log, topic: str) -> Counter[bytes]:
    with log.consumer(topic) as consumer:
        return Counter(record.value for record in consumer.records(until="end"))


def fill(log: raftlog.Log, topic: str, start: int, end: int) -> None:
    with log.producer() as producer:
        for number in range(start, end):
            producer.send(topic, b"%d" % number, partition=number % 4)


def test_workers_that_are_killed_come_back_and_every_record_comes_out_once(log: raftlog.Log) -> None:
    for name in ("in", "out"):
        log.create_topic(name, partitions=4)
    fill(log, "in", 0, COUNT)
    settings: dict[str, Any] = {"batch_records": 10, "transaction_timeout_ms": 5000}
    with log.process("in", "out", "g", make_function(), workers=2, **settings) as processing:
        until("it has begun", lambda: len(came_out(log, "out")) > COUNT // 8)
        pids = {int(each.client_id.split(":")[1]) for each in log.describe_group("g").members}
        os.kill(min(pids), signal.SIGKILL)
        fill(log, "in", COUNT, 2 * COUNT)
        until("everything comes out", lambda: len(came_out(log, "out")) == 2 * COUNT)
        assert not processing.done()
    assert processing.done()
    assert came_out(log, "out") == Counter(b"<%d>" % number for number in range(2 * COUNT))


def test_in_this_process_and_until_the_end(log: raftlog.Log) -> None:
    for name in ("few", "fewer"):
        log.create_topic(name, partitions=4)
    fill(log, "few", 0, 50)
    stats = log.process("few", "fewer", "h", make_function(), until="end").wait(PATIENCE_S)
    assert (stats.records_in, stats.records_out) == (50, 50)
    stats = log.process("few", "fewer", "actors", make_function(), workers=2, until="end").wait(PATIENCE_S)
    assert stats.records_in == 50
    until("each group's own", lambda: came_out(log, "fewer").total() == 100)


def test_what_a_worker_ends_with_is_raised(log: raftlog.Log) -> None:
    log.create_topic("some", exist_ok=True)
    processing = log.process("some", "nowhere", "i", make_function(), workers=2)
    with pytest.raises(UnknownTopic) as caught:
        processing.wait(PATIENCE_S)
    assert isinstance(caught.value, RaftlogError)
    with pytest.raises(UnknownTopic):
        processing.stop()
