"""Batches as columns: the same as records one by one, and nothing that does not check is let through."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from raftlog.errors import CorruptBatch
from raftlog.record.batch import TIMESTAMP_TYPE, Compression, stamped
from raftlog.record.codec import TIMESTAMP_MS_MAX, BatchBuilder, decode_batch, encode_batch
from raftlog.record.columns import SCHEMA, columns_of, decode_columns, table_of
from raftlog.record.layout import varint

payloads = st.none() | st.binary(max_size=300)
pairs = st.lists(st.tuples(st.text(max_size=8), st.none() | st.binary(max_size=9)), max_size=3).map(tuple)
timestamps = st.integers(0, TIMESTAMP_MS_MAX)
KINDS = [Compression.NONE, Compression.LZ4, Compression.ZSTD]


def same(batch: bytes) -> pa.RecordBatch:
    """The batch as columns, which are those of its records."""
    stamp = stamped(batch, 2**40, 3)
    found = decode_columns(stamp, "topic", 7)
    found.validate(full=True)
    assert found.equals(columns_of(decode_batch(stamp, "topic", 7)))
    assert found.schema == SCHEMA
    return found


def batch_of(records: bytes, count: int, attributes: int = 0, first_timestamp: int = 0) -> bytes:
    """A batch around any bytes, crc valid."""
    after = struct.pack(">hiqqqhii", attributes, count - 1, first_timestamp, 99, -1, -1, -1, count)
    crc = crc32c(records, crc32c(after))
    return struct.pack(">qiibI", 0, 49 + len(records), -1, 2, crc) + after + records


@settings(deadline=None)
@given(
    records=st.lists(st.tuples(timestamps, payloads, payloads, pairs), min_size=1, max_size=40),
    compression=st.sampled_from(KINDS),
)
def test_records_of_any_kind(
    records: list[tuple[int, bytes | None, bytes | None, tuple[tuple[str, bytes | None], ...]]],
    compression: Compression,
) -> None:
    builder = BatchBuilder(1 << 20)
    for record in records:
        builder.append(*record)
    found = same(builder.build(compression))
    assert found.column("value").to_pylist() == [value for _, _, value, _ in records]
    assert [
        [(pair["key"], pair["value"]) for pair in each] for each in found.column("headers").to_pylist()
    ] == [list(headers) for _, _, _, headers in records]


@settings(deadline=None, max_examples=150)
@given(
    shapes=st.lists(
        st.tuples(
            st.integers(1, 200),
            st.none() | st.integers(0, 70),
            st.none() | st.integers(0, 200) | st.just(9_000),
            st.integers(0, 300),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_runs_of_records_that_look_alike(
    shapes: list[tuple[int, int | None, int | None, int]],
) -> None:
    source = random.Random(1)
    builder = BatchBuilder(1 << 24)
    at = 1_700_000_000_000
    for count, key_length, value_length, step in shapes:
        for _ in range(count):
            key = None if key_length is None else source.randbytes(key_length)
            value = None if value_length is None else source.randbytes(value_length)
            builder.append(at, key, value)
            at += step // 100
    same(builder.build())


@pytest.mark.parametrize("count", [1, 15, 16, 17, 63, 64, 65, 80, 8_192, 8_193, 20_000])
def test_where_deltas_grow_by_a_byte(count: int) -> None:
    found = same(encode_batch([b"%05d" % number for number in range(count)], None, 5))
    assert found.column("offset").to_pylist() == list(range(2**40, 2**40 + count))


def test_a_record_that_only_looks_alike_is_told_apart() -> None:
    builder = BatchBuilder(1 << 20)
    for _ in range(20):
        builder.append(0, b"k" * 20, b"v" * 6)
    # as long; where their key's length is it has its offset delta, which says the same, and so on: but its
    # timestamp takes a byte more
    builder.append(100, None, b"w" * 18 + varint(6) + b"w" * 6)
    for _ in range(20):
        builder.append(0, b"k" * 20, b"v" * 6)
    assert same(builder.build()).column("key")[20].as_py() is None


def test_attributes_that_mean_nothing_yet_do_not_matter() -> None:
    records = bytearray(encode_batch([b"value"] * 20, None, 5)[61:])
    records[1 + 12 * 7] = 1
    found = decode_columns(batch_of(bytes(records), 20), "t", 0)
    assert found.column("value").to_pylist() == [b"value"] * 20


def test_columns_are_what_the_names_say() -> None:
    found = same(encode_batch([b"v", None], [None, b"k"], 1_700_000_000_123)).to_pylist()
    when = datetime.fromtimestamp(1_700_000_000, UTC).replace(microsecond=123_000)
    row = {"topic": "topic", "partition": 7, "timestamp": when, "headers": []}
    assert found == [
        {"key": None, "value": b"v", "offset": 2**40, **row},
        {"key": b"k", "value": None, "offset": 2**40 + 1, **row},
    ]
    assert table_of([]).schema == SCHEMA


def test_times_that_are_not_the_records_own() -> None:
    records = encode_batch([b"v"] * 20, None, 0)[61:]
    appended = decode_columns(batch_of(records, 20, TIMESTAMP_TYPE), "t", 0)
    assert set(appended.column("timestamp").cast(pa.int64()).to_pylist()) == {99}
    without = decode_columns(batch_of(records, 20, first_timestamp=-1), "t", 0)
    assert without.column("timestamp").null_count == 20


@settings(deadline=None, max_examples=400)
@given(
    count=st.integers(1, 40),
    uniform=st.booleans(),
    cuts=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_what_is_damaged_is_refused_or_what_the_codec_reads(
    count: int, uniform: bool, cuts: list[tuple[int, int]], cut: int, seed: int
) -> None:
    source = random.Random(seed)
    values = [source.randbytes(30 if uniform else source.randrange(90)) for _ in range(count)]
    records = bytearray(encode_batch(values, values if seed % 2 else None, 5)[61:])
    for position, value in cuts:
        records[position % len(records)] = value
    batch = batch_of(bytes(records[: len(records) - cut]), count)
    try:
        found = decode_columns(batch, "t", 0)
    except CorruptBatch:
        return
    found.validate(full=True)
    try:
        expected = columns_of(decode_batch(batch, "t", 0))
    except CorruptBatch:  # a key or a header that is no text, a time that is none: what columns can hold
        return
    assert found.equals(expected)


def test_lengths_that_lead_astray_are_refused() -> None:
    def record(body: bytes) -> bytes:
        return varint(len(body)) + body

    good = record(b"\0\0\0" + varint(-1) + varint(1) + b"v" + b"\0")
    assert decode_columns(batch_of(good * 30, 30), "t", 0).num_rows == 30
    for bad in (
        record(b"\0\0\0" + varint(-2) + varint(1) + b"v" + b"\0"),
        record(b"\0\0\0" + varint(-1) + varint(-2) + b"v" + b"\0"),
        record(b"\0\0\0" + varint(-1) + varint(2**62) + b"v" + b"\0"),
        record(b"\0\0\0" + varint(-1) + varint(-(2**62)) + b"v" + b"\0"),
        record(b"\0\0\0" + varint(-1) + varint(0) + b"v" + b"\0"),
        record(b"\0\0\0" + b"\xff" * 11 + b"v" + b"\0"),
        varint(-1) + b"v",
        b"\xff" * 12,
        b"",
    ):
        for records, count in ((bad, 1), (bad * 30, 30), (good * 20 + bad, 21), (bad + good * 20, 21)):
            with pytest.raises(CorruptBatch):
                decode_columns(batch_of(records, count), "t", 0)
    for records, count in ((good * 30, 29), (good * 30, 31), (good * 30 + b"x", 30), (good * 30, 0)):
        with pytest.raises(CorruptBatch):
            decode_columns(batch_of(records, count), "t", 0)


def test_the_crc_is_looked_at() -> None:
    batch = bytearray(encode_batch([b"value"] * 20, None, 5))
    batch[-3] ^= 1
    with pytest.raises(CorruptBatch, match="crc"):
        decode_columns(batch, "t", 0)
    assert decode_columns(batch, "t", 0, check=False).num_rows == 20
    with pytest.raises(CorruptBatch, match="magic"):
        decode_columns(batch[:-1], "t", 0)


def test_without_pyarrow_the_error_says_what_to_install() -> None:
    program = """
import sys
sys.modules["pyarrow"] = None
from raftlog.errors import ConfigError
try:
    import raftlog.record.columns
except ConfigError as error:
    assert "pip install 'raftlog[data]'" in str(error), error
else:
    raise AssertionError("imported")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
