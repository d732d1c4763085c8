"""How a range of offsets is found, and cut into tasks."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from typing import Any

import pytest
from data_kit import abort, fill, positions, spans_of
from hypothesis import given
from hypothesis import strategies as st

import raftlog
from raftlog.data.spans import TASK_BYTES_MIN, Offsets, Span, cut
from raftlog.errors import ConfigError, OffsetOutOfRange, UnknownTopic
from raftlog.record.types import TopicPartition

MB = 1024 * 1024


def span(records: int, size: float, partition: int = 0) -> Span:
    return Span("t", b"id", partition, 5, 5 + records, memory_bytes=size)


@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from([0.0, 10.0, 1e4, 3e6])), max_size=8),
    st.integers(1, 50),
)
def test_every_offset_is_read_once_and_in_order(sizes: list[tuple[int, float]], parallelism: int) -> None:
    spans = [span(records, size, number) for number, (records, size) in enumerate(sizes)]
    tasks = cut(spans, parallelism)
    pieces = [piece for task in tasks for piece in task]
    assert all(task for task in tasks)
    assert all(piece.start < piece.end for piece in pieces)
    assert pieces == sorted(pieces, key=lambda each: (each.partition, each.start))
    covered = [(each.partition, offset) for each in pieces for offset in (each.start, each.end)]
    for each in spans:
        edges = [offset for partition, offset in covered if partition == each.partition]
        if each.start == each.end:
            assert edges == []
        else:
            assert (edges[0], edges[-1]) == (each.start, each.end)
            assert edges[1:-1:2] == edges[2:-1:2]
    assert cut(spans, parallelism) == tasks


def test_one_large_partition_is_shared_among_many_tasks() -> None:
    tasks = cut([span(1000, MB)], 10)
    assert [len(task) for task in tasks] == [1] * 10
    assert {each.end - each.start for task in tasks for each in task} == {100}


def test_many_small_partitions_share_a_task() -> None:
    spans = [span(100, 100.0, number) for number in range(64)]
    assert len(cut(spans, 64)) == 1
    assert len(cut([span(1000, 1000.0)], 100)) == 1, "no task for less than a MB"
    assert TASK_BYTES_MIN >= MB


def test_the_large_one_is_cut_and_the_small_ones_are_not() -> None:
    tasks = cut([span(10, 1.0), span(1000, MB / 10, 1), span(10, 1.0, 2)], 4)
    assert [len(task) for task in tasks] == [1, 1, 1, 1, 1, 1] or len(tasks) in (4, 5)
    assert sum(piece.partition == 1 for task in tasks for piece in task) == 4


def test_where_partitions_begin_and_end(log: raftlog.Log) -> None:
    fill(log, "plain", range(100))
    (found,) = spans_of(log, "plain")
    assert (found.start, found.end, found.name) == (0, 100, ("plain", 0))
    assert 1 < found.log_bytes < 100
    assert 20 < found.memory_bytes < 80
    (found,) = spans_of(log, "plain", start=10, end={("plain", 0): 20})
    assert (found.start, found.end) == (10, 20)
    (found,) = spans_of(log, "plain", start={})
    assert (found.start, found.end) == (0, 100)
    (found,) = spans_of(log, "plain", start="latest")
    assert (found.start, found.end) == (100, 100)


def test_times_are_offsets_too(log: raftlog.Log) -> None:
    log.create_topic("times")
    with log.producer() as producer:
        for second in range(10):
            producer.send("times", b"", timestamp_ms=1_600_000_000_000 + 1000 * second)
    moment = datetime.fromtimestamp(1_600_000_003, UTC)
    (found,) = spans_of(log, "times", start=moment, end=datetime.fromtimestamp(1_600_000_007, UTC))
    assert (found.start, found.end) == (3, 7)
    (found,) = spans_of(log, "times", start=datetime.fromtimestamp(1_700_000_000, UTC))
    assert (found.start, found.end) == (10, 10)
    (found,) = spans_of(log, "times", start=5, end=moment)
    assert (found.start, found.end) == (5, 5), "nothing lies between, and the position does not go back"


def test_a_group_begins_where_it_is(log: raftlog.Log) -> None:
    fill(log, "ours", range(100), partitions=2)
    log.commit_offsets("readers", {("ours", 1): 7})
    first, second = spans_of(log, "ours", group="readers", start="latest")
    assert first.start == first.end
    assert second.start == 7
    assert positions(log, "readers", [("ours", 0), ("ours", 1)]) == {("ours", 1): 7}
    log.commit_offsets("readers", {("ours", 1): 10_000})
    with pytest.raises(OffsetOutOfRange, match="not 10000"):
        spans_of(log, "ours", group="readers")


def test_committed_ends_where_a_transaction_is_open(log: raftlog.Log) -> None:
    fill(log, "open", range(10))
    with log.producer(transactional_id="open") as producer:
        txn = producer.transaction().begin()
        txn.send("open", b"11").result(timeout=30)
        (committed,) = spans_of(log, "open")
        (everything,) = spans_of(log, "open", isolation="read_uncommitted")
        txn.abort()
    assert (committed.end, everything.end) == (10, 11)
    abort(log, "open", range(3))
    assert spans_of(log, "open")[0].end == 16, "three records and the two markers"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"start": 101}, OffsetOutOfRange),
        ({"end": 101}, OffsetOutOfRange),
        ({"start": -1}, OffsetOutOfRange),
        ({"start": 5, "end": 4}, ConfigError),
        ({"start": "first"}, ConfigError),
        ({"end": True}, ConfigError),
        ({"end": {("refused", 1): 3}}, ConfigError),
        ({"start": datetime(2020, 1, 1)}, ConfigError),
    ],
)
def test_what_is_refused(log: raftlog.Log, arguments: dict[str, Any], error: type[Exception]) -> None:
    if "refused" not in log.topics():
        fill(log, "refused", range(10))
    with pytest.raises((error,)):
        spans_of(log, "refused", **arguments)


def test_no_topic(log: raftlog.Log) -> None:
    with pytest.raises(UnknownTopic):
        spans_of(log, "nowhere")
    with pytest.raises(ConfigError, match="no topic"):
        spans_of(log)


def test_offsets_are_a_dict_and_remember_where_they_begin() -> None:
    place = TopicPartition("t", 0)
    offsets = Offsets({place: 7}, {place: 3})
    assert offsets == {("t", 0): 7}
    again = pickle.loads(pickle.dumps(offsets))
    assert (again, again.starts) == (offsets, {("t", 0): 3})
