"""What tasks and driver do, without a Ray to run them: read tasks, encoding, one transaction."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from data_kit import fill, numbers, positions, settle, spans_of

import raftlog
from raftlog.data import groups, sink, source
from raftlog.data.encoding import Layout, encode_table
from raftlog.data.spans import offsets_of_spans
from raftlog.errors import StaleOffsets
from raftlog.record.columns import SCHEMA


def read_tables(log: raftlog.Log, topic: str, parallelism: int) -> list[pa.Table]:
    """What the read tasks of a topic give, each run twice."""
    datasource = source.TopicDatasource(log.bootstrap, spans_of(log, topic), SCHEMA.names, "read_committed")
    found = []
    for task in datasource.get_read_tasks(parallelism):
        first, again = (pa.concat_tables(task()) for _ in range(2))
        assert first.equals(again)
        found.append(first)
    return found


def send(log: raftlog.Log, blocks: list[pa.Table], target: str, commit: sink.Commit | None = None) -> None:
    """As the driver does, with blocks that Ray need not fetch."""
    layout = Layout(target, *sink._room_of(log, target), "value", "key", None)
    encoded = [encode_table(block, layout) for block in blocks]
    sink._send_all(log, layout, encoded, commit, 60_000)


@pytest.fixture(autouse=True)
def local_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "_fetched", iter)


def test_from_topic_to_topic(log: raftlog.Log) -> None:
    fill(log, "there", range(5000), partitions=3)
    log.create_topic("here", partitions=2)
    offsets = offsets_of_spans(spans_of(log, "there"))
    tables = read_tables(log, "there", 5)
    send(log, tables, "here", ("travellers", offsets))
    assert numbers(log, "here") == [*range(5000)], "and at once, without waiting"
    assert positions(log, "travellers", list(offsets)) == offsets
    with pytest.raises(StaleOffsets):
        send(log, tables, "here", ("travellers", offsets))
    assert numbers(log, "here") == [*range(5000)]


def test_a_topic_without_records_gives_one_empty_table(log: raftlog.Log) -> None:
    log.create_topic("bare", partitions=2)
    (table,) = read_tables(log, "bare", 4)
    assert table.schema == SCHEMA
    assert table.num_rows == 0


def test_blocks_without_rows_or_columns_are_passed_over(log: raftlog.Log) -> None:
    log.create_topic("gaps")
    layout = Layout("gaps", *sink._room_of(log, "gaps"), "value", None, None, "none")
    made = encode_table(pa.table({"value": [b"1"]}), layout)
    sink._send_all(log, layout, [pa.table({}), made, made.slice(0, 0)], None, 60_000)
    assert numbers(log, "gaps") == [1]


def test_who_died_with_its_offsets_staged_is_followed(
    log: raftlog.Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its group's position cannot be told until somebody ends its transaction: reading on does."""
    fill(log, "left", range(100))
    log.create_topic("left-out")
    offsets = offsets_of_spans(spans_of(log, "left"))
    tables = read_tables(log, "left", 1)
    producer = log.producer(transactional_id=groups.transactional_id("heirs"))
    txn = producer.transaction().begin()
    txn.send("left-out", b"0")
    producer.flush()
    sink._stage(log, producer, "heirs", offsets)
    monkeypatch.setattr(groups, "PATIENCE_S", 0.1)
    (span,) = spans_of(log, "left", group="heirs")
    assert (span.start, span.end) == (0, 100), "the transaction was aborted"
    send(log, tables, "left-out", ("heirs", offsets))
    settle(log, "left-out")
    assert numbers(log, "left-out") == [*range(100)]
    with pytest.raises(raftlog.RaftlogError) as raised:
        txn.commit()
    error: Any = raised.value
    assert error.fatal or error.abortable
    producer.close()
