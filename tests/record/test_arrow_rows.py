"""Columns and arrays as batches: the same as lists of what is in them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftlog.errors import InvalidRecord
from raftlog.record.arrow_murmur2 import murmur2_of
from raftlog.record.arrow_rows import ArrowRows, as_column
from raftlog.record.batch import Compression
from raftlog.record.codec import decode_batch, encode_batch
from raftlog.record.partitioner import DefaultPartitioner, murmur2

Bytes = bytes | None
payloads = st.none() | st.binary(max_size=80)


def packed(values: Any, keys: Any = None, bytes_max: int = 1 << 20) -> list[tuple[Bytes, Bytes]]:
    """(key, value) of all records; each batch is the one that the codec makes of them."""
    rows = ArrowRows(values, keys, 17)
    found: list[tuple[Bytes, Bytes]] = []
    start = 0
    while start < len(rows):
        batch, end = rows.pack(start, bytes_max, Compression.NONE)
        assert batch.count == end - start
        assert batch.size <= bytes_max or batch.count == 1
        encoded = b"".join(batch.seal())
        records = [(each.key, each.value) for each in decode_batch(encoded, "t", 0)]
        its_values, its_keys = [value for _, value in records], [key for key, _ in records]
        assert encoded == encode_batch(its_values, its_keys, 17)
        found += records
        start = end
    return found


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.tuples(payloads, payloads), max_size=100),
    with_keys=st.booleans(),
    bytes_max=st.integers(61, 2_000),
    offset=st.integers(0, 5),
)
def test_columns_of_any_rows(
    rows: list[tuple[Bytes, Bytes]], with_keys: bool, bytes_max: int, offset: int
) -> None:
    keys = pa.array([key for key, _ in rows], pa.binary())[offset:]
    values = pa.array([value for _, value in rows], pa.large_binary())[offset:]
    expected = [(key if with_keys else None, value) for key, value in rows[offset:]]
    assert packed(values, keys if with_keys else None, bytes_max) == expected


@settings(deadline=None, max_examples=100)
@given(
    count=st.integers(1, 300),
    value_length=st.integers(0, 200) | st.just(9_000),
    key_length=st.none() | st.integers(0, 70),
    bytes_max=st.integers(61, 40_000),
)
def test_rows_of_one_shape(count: int, value_length: int, key_length: int | None, bytes_max: int) -> None:
    source = random.Random(count)
    values = [source.randbytes(value_length) for _ in range(count)]
    keys = [None] * count if key_length is None else [source.randbytes(key_length) for _ in range(count)]
    found = packed(
        pa.array(values, pa.binary()), None if key_length is None else pa.array(keys, pa.binary()), bytes_max
    )
    assert found == list(zip(keys, values, strict=True))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 8_191, 8_192, 8_193, 20_000])
def test_where_deltas_grow_by_a_byte(count: int) -> None:
    numbers = np.arange(count, dtype=">u4")
    expected = [(None, number.to_bytes(4, "big")) for number in range(count)]
    assert packed(numbers) == expected
    various = [(b"x" * (number % 3)) for number in range(count)]
    assert packed(pa.array(various, pa.binary())) == [(None, value) for value in various]


def test_an_array_is_a_record_for_each_row() -> None:
    for array in (
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.arange(24, dtype=np.int64).reshape(2, 3, 4),
        np.arange(5, dtype="<i2"),
        np.array([b"ab", b"c", b"d\0e"], dtype="S4"),
        np.arange(40, dtype=np.uint8).reshape(10, 4)[::2, 1:3],
        np.zeros((3, 0), np.uint8),
        np.zeros((0, 8), np.uint8),
    ):
        assert packed(array) == [(None, row.tobytes()) for row in array]
    assert packed(np.arange(3, dtype=np.uint8), np.arange(3, dtype=np.uint16)) == [
        (bytes((number, 0)), bytes((number,))) for number in range(3)
    ]


def test_every_kind_of_column_of_bytes_and_text() -> None:
    texts = ["a", "bc", None, ""]
    expected = [(None, None if text is None else text.encode()) for text in texts]
    for kind in (pa.binary(), pa.large_binary(), pa.string(), pa.large_string()):
        column = pa.array([value for _, value in expected], pa.binary()).cast(kind)
        assert packed(column) == expected
        assert packed(pa.chunked_array([column[:1], column[1:]])) == expected
        assert packed(pa.chunked_array([column])) == expected
        assert packed(pa.chunked_array([], kind)) == []
    assert packed(pa.array(texts).dictionary_encode()) == expected
    assert packed(pa.array([b"ab", b"cd"], pa.binary(2))) == [(None, b"ab"), (None, b"cd")]
    assert packed(pa.nulls(2)) == [(None, None)] * 2
    assert packed(pa.table({"v": texts})["v"], [b"k", None, b"", b"k"]) == list(
        zip([b"k", None, b"", b"k"], [value for _, value in expected], strict=True)
    )


def test_nothing_is_copied_of_what_is_contiguous() -> None:
    array = np.arange(64, dtype=np.float64)
    assert as_column(array, "value").buffers()[2].address == array.ctypes.data
    column = pa.array([b"abc", b"d"], pa.large_binary())
    assert as_column(column, "value").buffers()[2].address == column.buffers()[2].address


def test_keys_choose_partitions_as_those_of_lists_do() -> None:
    keys = [None if number % 5 == 0 else b"%d" % (number % 70) for number in range(300)]
    values = [b"%d" % number for number in range(300)]
    partitioner = DefaultPartitioner(random.Random(1))
    for column in (pa.array(keys, pa.binary()), pa.array([b"cut", *keys], pa.binary())[1:]):
        groups = ArrowRows(pa.array(values, pa.binary()), column, 17).by_partition(partitioner, 4)
        assert groups is not None
        for index, some in groups:
            batch, end = some.pack(0, 1 << 20, Compression.NONE)
            assert end == len(some)
            found = [(each.key, each.value) for each in decode_batch(b"".join(batch.seal()), "t", 0)]
            pairs = list(zip(keys, values, strict=True))
            assert found == [pair for pair in pairs if partitioner.partition(pair[0], 4) == index]
        assert sum(len(some) for _, some in groups) == 300
    assert ArrowRows(pa.array(values), None, 17).by_partition(partitioner, 4) is None
    ((index, some),) = ArrowRows(pa.nulls(3), pa.nulls(3), 17).by_partition(partitioner, 4) or ()
    assert (index, len(some)) == (partitioner.partition(None, 4), 3)


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), many=st.integers(1, 40))
def test_hashes_of_many_keys_are_those_of_each(lengths: list[int], many: int) -> None:
    source = random.Random(many)
    keys = [source.randbytes(length) for length in lengths for _ in range(many)]
    column = as_column(keys, "key")
    bounds = np.cumsum([0, *map(len, keys)])
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)
    found = murmur2_of(data, bounds[:-1], np.diff(bounds))
    assert found.tolist() == [murmur2(key) for key in keys]


def test_what_is_no_column_of_bytes_is_refused() -> None:
    for column, words in (
        (pa.array([1, 2]), "int64"),
        (pa.array([[b"a"]]), "list"),
        (pa.table({"v": [b"a"]}), "one Arrow column, not a Table"),
        (np.array([b"a", None], dtype=object), "object"),
        (np.array(5), "shape"),
        (np.array(["text"]), "U4"),
        (["text", 5], "bytes or None"),
        ({b"a"}, "not a set"),
    ):
        with pytest.raises(InvalidRecord, match=words):
            as_column(column, "value")
    with pytest.raises(InvalidRecord, match="2 values and 1 keys"):
        ArrowRows(pa.array([b"a", b"b"]), pa.array([b"k"]), 17)
    with pytest.raises(InvalidRecord, match="timestamp"):
        ArrowRows(pa.array([b"a"]), None, -1)


def test_the_longest_is_of_keys_and_values() -> None:
    assert ArrowRows(pa.array([b"abc", None]), None, 17).longest == 3
    assert ArrowRows(pa.array([b"abc", None]), pa.array([b"abcde", None]), 17).longest == 5
    assert ArrowRows(pa.array([], pa.binary()), None, 17).longest == 0
