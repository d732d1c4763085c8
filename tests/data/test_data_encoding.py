"""From rows to batches."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from raftlog.data.encoding import ANY_PARTITION, Layout, encode, encode_table
from raftlog.errors import ConfigError, InvalidRecord, RecordTooLarge, UnknownPartition
from raftlog.record.codec import decode_batch
from raftlog.record.partitioner import murmur2

PARTITIONS = 4


def layout(**settings: Any) -> Layout:
    wanted: dict[str, Any] = {"value": "v", "key": None, "partition": None} | settings
    return Layout("t", PARTITIONS, wanted.pop("bytes_max", 8 << 20), **wanted)


def encoded(table: pa.Table, **settings: Any) -> dict[int, list[tuple[bytes | None, bytes | None]]]:
    """(key, value) by partition."""
    found: dict[int, list[tuple[bytes | None, bytes | None]]] = {}
    for partition, count, batch in encode(table, layout(**settings)):
        records = decode_batch(batch, "t", 0)
        assert len(records) == count
        found.setdefault(partition, []).extend((each.key, each.value) for each in records)
    return found


def test_without_keys_any_partition_will_do() -> None:
    table = pa.table({"v": pa.array([b"a", None, b"c"], pa.binary())})
    assert encoded(table) == {ANY_PARTITION: [(None, b"a"), (None, None), (None, b"c")]}


def test_keys_decide_and_keep_their_order() -> None:
    keys = [b"%d" % (number % 7) for number in range(100)]
    values = [b"%d" % number for number in range(100)]
    expected: dict[int, list[tuple[bytes, bytes]]] = {}
    for key, value in zip(keys, values, strict=True):
        expected.setdefault((murmur2(key) & 0x7FFFFFFF) % PARTITIONS, []).append((key, value))
    assert encoded(pa.table({"v": values, "k": keys}), key="k") == expected


def test_rows_without_a_key_among_others() -> None:
    table = pa.table({"v": [b"a", b"b", b"c"], "k": pa.array([None, b"x", None], pa.binary())})
    found = encoded(table, key="k")
    assert (b"x", b"b") in found[(murmur2(b"x") & 0x7FFFFFFF) % PARTITIONS]
    assert [each for some in found.values() for each in some if each[0] is None] == [
        (None, b"a"),
        (None, b"c"),
    ]


def test_a_column_may_choose_the_partition() -> None:
    table = pa.table({"v": [b"a", b"b", b"c"], "k": [b"x", b"x", b"y"], "p": [2, 0, 2]})
    assert encoded(table, key="k", partition="p") == {2: [(b"x", b"a"), (b"y", b"c")], 0: [(b"x", b"b")]}
    assert encoded(table, partition="p") == {2: [(None, b"a"), (None, b"c")], 0: [(None, b"b")]}


def test_headers_and_timestamps_follow_their_rows() -> None:
    kind = pa.list_(pa.struct([("key", pa.string()), ("value", pa.binary())]))
    table = pa.table(
        {
            "v": [b"a", b"b", b"c"],
            "k": [b"x", b"y", b"x"],
            "p": [1, 2, 1],
            "t": pa.array([3000, 1000, 2000], pa.timestamp("ms", "UTC")),
            "h": pa.array([[{"key": "n", "value": b"1"}] * 2, None, [{"key": "m", "value": None}]], kind),
        }
    )
    expected = {
        (b"a", 3000, (("n", b"1"), ("n", b"1"))),
        (b"b", 1000, ()),
        (b"c", 2000, (("m", None),)),
    }
    for settings in ({}, {"key": "k"}, {"key": "k", "partition": "p"}, {"partition": "p"}):
        found = [
            (each.value, each.timestamp_ms, each.headers)
            for _, _, batch in encode(table, layout(headers="h", timestamp="t", **settings))
            for each in decode_batch(batch, "t", 0)
        ]
        assert len(found) == 3
        assert set(found) == expected


def test_text_is_utf8_and_large_types_do() -> None:
    for kind in (pa.string(), pa.large_string()):
        assert encoded(pa.table({"v": pa.array(["ü", None], kind)})) == {
            ANY_PARTITION: [(None, "ü".encode()), (None, None)]
        }
    assert encoded(pa.table({"v": pa.array([b"ab"], pa.binary(2))})) == {ANY_PARTITION: [(None, b"ab")]}
    assert encoded(pa.table({"v": pa.nulls(2)})) == {ANY_PARTITION: [(None, None)] * 2}


def test_large_values_make_several_batches() -> None:
    values = [bytes([number]) * 300_000 for number in range(10)]
    table = pa.table({"v": values})
    batches = list(encode(table, layout(compression="none")))
    assert [batch.records for batch in batches] == [3, 3, 3, 1]
    made = encode_table(table, layout(compression="none"))
    assert made["records"].to_pylist() == [3, 3, 3, 1]
    assert encode_table(table.slice(0, 0), layout()).num_rows == 0


@pytest.mark.parametrize(
    ("table", "settings", "error", "text"),
    [
        ({"v": [1]}, {}, InvalidRecord, "column 'v': a record's value is bytes, and this column holds int64"),
        ({"v": [b""], "k": [1]}, {"key": "k"}, InvalidRecord, "column 'k': a record's key is bytes"),
        ({"v": [b""], "h": [b"x"]}, {"headers": "h"}, InvalidRecord, "column 'h' holds binary, and headers"),
        ({"v": [b""], "t": ["now"]}, {"timestamp": "t"}, InvalidRecord, "column 't' holds string"),
        ({"v": [b""]}, {"headers": "h"}, ConfigError, "headers='h': there are the columns v"),
        ({"v": [b""]}, {"timestamp": "t"}, ConfigError, "timestamp='t': there are the columns v"),
        ({"x": [b""]}, {}, ConfigError, "there are the columns x"),
        ({"v": [b""], "p": [4]}, {"partition": "p"}, UnknownPartition, "0 to 3"),
        ({"v": [b""], "p": pa.array([None], pa.int32())}, {"partition": "p"}, UnknownPartition, "None"),
        ({"v": [b""], "p": ["0"]}, {"partition": "p"}, InvalidRecord, "a partition is an integer"),
        ({"v": [b"x" * 5000]}, {"bytes_max": 4096}, RecordTooLarge, "4096"),
    ],
)
def test_what_is_refused(
    table: dict[str, Any], settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises((error,), match=text):
        list(encode(pa.table(table), layout(**settings)))
