"""Reading a range into columns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from data_kit import abort, fill, spans_of

import raftlog
from raftlog.data import reading
from raftlog.data.reading import read_span
from raftlog.errors import OffsetOutOfRange, UnknownTopic
from raftlog.record.columns import SCHEMA


def read(
    log: raftlog.Log, span: Any, columns: Any = SCHEMA.names, isolation: str = "read_committed"
) -> pa.Table:
    tables = list(read_span(log, span, columns, isolation))
    return pa.concat_tables(tables) if tables else reading.schema_of(columns).empty_table()


def values(table: pa.Table) -> list[int]:
    return [int(each) for each in table["value"].to_pylist()]


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_every_column_is_as_it_was_written(log: raftlog.Log, compression: str) -> None:
    topic = f"columns-{compression}"
    log.create_topic(topic)
    headers = [("a", b"1"), ("b", None), ("a", b"2")]
    with log.producer(compression=compression) as producer:
        producer.send(topic, b"x" * 1000, key=b"k", headers=headers, timestamp_ms=1_600_000_000_123)
        producer.send(topic, None, key=None, timestamp_ms=5)
        producer.send(topic, b"", key=b"", headers=[("c", b"")], timestamp_ms=0)
    table = read(log, spans_of(log, topic)[0])
    assert table.schema == SCHEMA
    assert table["key"].to_pylist() == [b"k", None, b""]
    assert table["value"].to_pylist() == [b"x" * 1000, None, b""]
    assert table["topic"].to_pylist() == [topic] * 3
    assert table["partition"].to_pylist() == [0] * 3
    assert table["offset"].to_pylist() == [0, 1, 2]
    assert table["timestamp"].cast(pa.int64()).to_pylist() == [1_600_000_000_123, 5, 0]
    pairs = [[(each["key"], each["value"]) for each in row] for row in table["headers"].to_pylist()]
    assert pairs == [headers, [], [("c", b"")]]


def test_only_the_columns_that_are_wanted(log: raftlog.Log) -> None:
    fill(log, "some", range(10))
    table = read(log, spans_of(log, "some")[0], ["offset", "value"])
    assert table.column_names == ["offset", "value"]
    assert values(table) == [*range(10)]


def test_a_range_may_begin_and_end_within_a_batch(log: raftlog.Log) -> None:
    log.create_topic("batches")
    with log.producer() as producer:
        for start in range(0, 100, 25):
            producer.send_batch("batches", [b"%d" % each for each in range(start, start + 25)]).result()
    span = spans_of(log, "batches")[0]
    for start, end in [(0, 100), (3, 7), (24, 26), (25, 50), (30, 99), (99, 100)]:
        assert values(read(log, replace(span, start=start, end=end))) == [*range(start, end)]


def test_a_range_of_many_fetches(log: raftlog.Log, monkeypatch: pytest.MonkeyPatch) -> None:
    log.create_topic("long")
    with log.producer(compression="none", batch_bytes=16_384) as producer:
        for number in range(200):
            producer.send("long", b"%d" % number + b" " * 4000)
    monkeypatch.setattr(reading, "FETCH_BYTES", 65_536)
    span = spans_of(log, "long")[0]
    tables = list(read_span(log, span, ["value"], "read_committed"))
    assert len(tables) > 10
    assert values(pa.concat_tables(tables)) == [*range(200)]


def test_aborted_records_and_markers_are_left_out(log: raftlog.Log) -> None:
    fill(log, "aborts", range(10))
    abort(log, "aborts", range(100, 110))
    fill(log, "aborts", range(10, 20))
    abort(log, "aborts", range(200, 210))
    span = spans_of(log, "aborts")[0]
    assert (span.start, span.end) == (0, 42)
    assert values(read(log, span)) == [*range(20)]
    assert values(read(log, replace(span, start=12, end=18))) == []
    everything = values(read(log, span, isolation="read_uncommitted"))
    assert everything == [*range(10), *range(100, 110), *range(10, 20), *range(200, 210)]


def test_a_topic_that_was_made_anew_is_another(log: raftlog.Log) -> None:
    fill(log, "anew", range(10))
    span = spans_of(log, "anew")[0]
    with pytest.raises(UnknownTopic, match="made anew"):
        read(log, replace(span, topic_id=b"\0" * 16))


def test_what_is_gone_is_an_error(log: raftlog.Log, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(log, "gone", range(10))
    span = spans_of(log, "gone")[0]
    with pytest.raises(OffsetOutOfRange):
        read(log, replace(span, start=50, end=60))
