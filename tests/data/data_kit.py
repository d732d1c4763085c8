"""What the tests of Ray Data share."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import raftlog
from raftlog.data.spans import Span, find_spans, weigh


def fill(log: raftlog.Log, topic: str, values: Iterable[int], partitions: int = 1) -> None:
    """Write numbers, each keyed by its last digit; the topic is made if it is not there."""
    log.create_topic(topic, partitions=partitions, exist_ok=True)
    with log.producer() as producer:
        for value in values:
            producer.send(topic, b"%d" % value, key=b"%d" % (value % 10))


def abort(log: raftlog.Log, topic: str, values: Iterable[int]) -> None:
    """Write numbers in a transaction that is aborted."""
    with log.producer(transactional_id=f"abort-{topic}") as producer:
        txn = producer.transaction().begin()
        for value in values:
            txn.send(topic, b"%d" % value, key=b"%d" % (value % 10)).result(timeout=30)
        txn.abort()
    settle(log, topic)


def settle(log: raftlog.Log, topic: str) -> None:
    """Wait until the markers of what has ended are written."""
    deadline = time.monotonic() + 30
    while log.open_transactions(topic):
        assert time.monotonic() < deadline, "a transaction stays open"


def numbers(log: raftlog.Log, topic: str, **settings: Any) -> list[int]:
    """What a reader finds, in order of value."""
    with log.consumer(topic, **settings) as consumer:
        return sorted(int(record.value) for record in consumer.records(until="end"))


def rows(ds: Any) -> list[int]:
    """The values that a Dataset gives, in order of value."""
    return sorted(int(row["value"]) for row in ds.take_all())


def spans_of(log: raftlog.Log, *topics: str, **options: Any) -> list[Span]:
    """Resolved as read_topic does."""
    wanted: dict[str, Any] = {
        "start": "earliest",
        "end": "latest",
        "group": None,
        "isolation": "read_committed",
    } | options
    runtime = log._connected()
    found = find_spans(log, topics, **wanted)
    return runtime.io.call(weigh(runtime.cluster, found, wanted["isolation"]))


def dies_once(marker: Path, row: bytes) -> Callable[[Any], Any]:
    """For map_batches: gives what it gets, but kills its worker when it sees a row for the first time."""

    def pass_on(table: Any) -> Any:
        if row in table["value"].to_pylist() and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return table

    return pass_on


def positions(log: raftlog.Log, group: str, places: Sequence[tuple[str, int]]) -> dict[Any, int]:
    """What a group has committed."""
    runtime = log._connected()
    return runtime.io.call(runtime.groups.committed(group, list(places), 30.0))
