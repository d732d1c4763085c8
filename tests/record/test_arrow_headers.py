"""Columns of headers and timestamps against the codec, which reads them record by record."""

from __future__ import annotations

from random import Random
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftlog.errors import InvalidRecord
from raftlog.record.arrow_headers import headers_of, timestamps_of
from raftlog.record.arrow_rows import ArrowRows, varints
from raftlog.record.batch import Compression
from raftlog.record.codec import TIMESTAMP_MS_MAX, decode_batch
from raftlog.record.columns import SCHEMA
from raftlog.record.layout import varint
from raftlog.record.partitioner import DefaultPartitioner
from raftlog.record.types import Record

HEADERS = SCHEMA.field("headers").type
LARGE = pa.large_list(pa.struct([("value", pa.large_binary()), ("key", pa.large_string())]))
MAP = pa.map_(pa.string(), pa.binary())

Pairs = list[tuple[str, bytes | None]]


def column(rows: list[Pairs | None], kind: Any, cut: int = 0) -> pa.ChunkedArray:
    """In two pieces, the second of which begins within its buffers."""
    if not pa.types.is_map(kind):
        given: Any = [
            None if row is None else [{"key": key, "value": value} for key, value in row] for row in rows
        ]
    else:
        given = rows
    whole = pa.array(given, kind)
    return pa.chunked_array([whole.slice(0, cut), whole.slice(cut)], kind)


def records_of(rows: ArrowRows, bytes_max: int = 1 << 20) -> list[Record]:
    found: list[Record] = []
    start = 0
    while start < len(rows):
        batch, end = rows.pack(start, bytes_max, Compression.NONE)
        encoded = b"".join(batch.seal())
        assert len(encoded) <= bytes_max or end == start + 1
        found += decode_batch(encoded, "t", 0)
        start = end
    return found


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50))
def test_varints_of_many_are_those_of_each(numbers: list[int]) -> None:
    assert varints(np.array(numbers, np.int64)).to_pylist() == [varint(each) for each in numbers]


PAIRS = st.lists(st.tuples(st.text(max_size=80), st.one_of(st.none(), st.binary(max_size=200))), max_size=4)


@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), PAIRS),
            st.integers(0, TIMESTAMP_MS_MAX),
            st.one_of(st.none(), st.binary(max_size=100)),
        ),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from([HEADERS, LARGE, MAP]),
    st.booleans(),
    st.sampled_from([300, 1 << 20]),
)
def test_what_is_encoded_is_decoded(
    rows: list[tuple[Any, int, bytes | None]], kind: Any, keyed: bool, bytes_max: int
) -> None:
    headers = headers_of(column([row[0] for row in rows], kind, len(rows) // 2), "h")
    moments = timestamps_of(pa.chunked_array([[row[1] for row in rows]], pa.int64()), "t", 0)
    values = [row[2] for row in rows]
    made = ArrowRows(values, values if keyed else None, moments, headers)
    expected = [(tuple(row[0] or ()), row[1], row[2], row[2] if keyed else None) for row in rows]
    found = records_of(made, bytes_max)
    assert [(each.headers, each.timestamp_ms, each.value, each.key) for each in found] == expected
    spread = [
        (each.headers, each.timestamp_ms, each.value, each.key)
        for _, some in made.by_partition(DefaultPartitioner(Random(1)), 3) or ()
        for each in records_of(cast(ArrowRows, some))
    ]
    assert not keyed or sorted(spread, key=repr) == sorted(expected, key=repr)


def test_nobody_has_headers() -> None:
    for empty in (
        column([[], None], HEADERS),
        pa.chunked_array([pa.nulls(2)]),
        pa.chunked_array([[[], None]]),
    ):
        assert headers_of(empty, "h") is None
    assert headers_of(pa.chunked_array([], HEADERS), "h") is None


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        (pa.array([1]), "column 'h' holds int64"),
        (pa.array([["a"]]), "column 'h' holds list<"),
        (pa.array([[{"key": 1, "value": b""}]]), "column 'h' holds list<"),
        (pa.array([[{"key": "a", "value": 1.5}]]), "column 'h' holds list<"),
        (pa.array([[{"key": "a", "value": b"", "more": 1}]]), "column 'h' holds list<"),
        (pa.array([[(1, b"")]], pa.map_(pa.int32(), pa.binary())), "column 'h' holds map<"),
        (pa.array([[{"key": None, "value": b""}]], HEADERS), "column 'h' has a header without a key"),
        (pa.array([[None]], HEADERS), "column 'h' has a header without a key"),
        (pa.array([[None]]), "column 'h' has a header that is null"),
    ],
)
def test_headers_that_are_none(given_: Any, text: str) -> None:
    with pytest.raises(InvalidRecord, match=text):
        headers_of(pa.chunked_array([given_]), "h")


def test_timestamps_of_any_unit_and_null() -> None:
    for unit, factor in (("s", 1 / 1000), ("ms", 1), ("us", 1000), ("ns", 1_000_000)):
        for zone in (None, "UTC", "Europe/Berlin"):
            given_ = pa.array([int(5000 * factor), None], pa.timestamp(unit, zone))
            assert timestamps_of(pa.chunked_array([given_]), "t", 17).tolist() == [5000, 17]
    assert timestamps_of(pa.chunked_array([pa.nulls(2)]), "t", 17).tolist() == [17, 17]
    assert timestamps_of(pa.chunked_array([pa.array([1_999_999], pa.timestamp("ns"))]), "t", 0).tolist() == [
        1
    ]
    assert timestamps_of(pa.chunked_array([pa.array([7], pa.uint32())]), "t", 0).tolist() == [7]


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        (pa.array([1.5]), "column 't' holds double"),
        (pa.array(["2026"]), "column 't' holds string"),
        (pa.array([0, -1]), "row 1 of column 't' says -1 ms"),
        (pa.array([TIMESTAMP_MS_MAX + 1]), "row 0 of column 't'"),
        (pa.array([2**64 - 1], pa.uint64()), "column 't' is not milliseconds"),
    ],
)
def test_timestamps_that_are_none(given_: Any, text: str) -> None:
    with pytest.raises(InvalidRecord, match=text):
        timestamps_of(pa.chunked_array([given_]), "t", 0)


def test_a_record_counts_its_headers_for_its_size() -> None:
    headers = headers_of(column([[("a", bytes(5000))]], HEADERS), "h")
    assert ArrowRows([b""], None, 1, headers).longest > 5000
