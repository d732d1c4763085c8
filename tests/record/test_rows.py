"""Many records at once: the same batches as one by one, whatever their lengths."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka_oracle import TheirBatch

from raftlog.errors import InvalidRecord
from raftlog.record.batch import BATCH_HEADER_BYTES, Compression, check_batch
from raftlog.record.codec import decode_batch, encode_batch
from raftlog.record.layout import varint
from raftlog.record.partitioner import DefaultPartitioner
from raftlog.record.rows import ListRows

Bytes = bytes | None


def packed(values: list[Bytes], keys: list[Bytes] | None, bytes_max: int) -> list[bytes]:
    """The batches, each as the codec makes it of the same records."""
    rows = ListRows(values, keys, 17)
    batches, start = [], 0
    while start < len(rows):
        batch, end = rows.pack(start, bytes_max, Compression.NONE)
        assert batch.count == end - start
        assert batch.size <= bytes_max or batch.count == 1
        encoded = b"".join(batch.seal())
        assert encoded == encode_batch(values[start:end], None if keys is None else keys[start:end], 17)
        batches.append(encoded)
        start = end
    return batches


@settings(deadline=None, max_examples=200)
@given(
    count=st.integers(1, 400),
    value_length=st.integers(0, 200) | st.sampled_from([8_190, 20_000]),
    key_length=st.none() | st.integers(0, 70),
    bytes_max=st.integers(61, 40_000),
)
def test_records_of_one_shape_are_the_codecs_batches(
    count: int, value_length: int, key_length: int | None, bytes_max: int
) -> None:
    random_bytes = random.Random(count).randbytes
    values: list[Bytes] = [random_bytes(value_length) for _ in range(count)]
    keys: list[Bytes] | None = None if key_length is None else [random_bytes(key_length) for _ in values]
    assert packed(values, keys, bytes_max)


@pytest.mark.parametrize("count", [63, 64, 65, 8_191, 8_192, 8_193, 16_384])
@pytest.mark.parametrize("keys", [False, True])
def test_offset_deltas_grow_by_a_byte(count: int, keys: bool) -> None:
    values: list[Bytes] = [b"%05d" % number for number in range(count)]
    (batch,) = packed(values, values if keys else None, 1 << 20)
    assert check_batch(batch).record_count == count
    assert [each.value for each in TheirBatch(batch)] == values


def test_a_batch_of_small_records_ends_where_the_table_does() -> None:
    batches = packed([b"x"] * 20_000, None, 1 << 20)
    assert [check_batch(each).record_count for each in batches] == [16_384, 3_616]
    decoded = [each.value for batch in batches for each in decode_batch(batch, "t", 0)]
    assert decoded == [b"x"] * 20_000


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.none() | st.binary(max_size=30), st.none() | st.binary(max_size=90)), min_size=1
    ),
    with_keys=st.booleans(),
    bytes_max=st.integers(61, 2_000),
)
def test_records_of_any_shape_are_the_codecs_batches(
    rows: list[tuple[Bytes, Bytes]], with_keys: bool, bytes_max: int
) -> None:
    keys, values = map(list, zip(*rows, strict=True))
    assert packed(values, keys if with_keys else None, bytes_max)


def test_a_batch_stays_within_its_limit_and_takes_one_record_whatever_it_is() -> None:
    (size,) = {len(each) for each in packed([b"v" * 100] * 2, None, BATCH_HEADER_BYTES)}
    assert size == BATCH_HEADER_BYTES + 109
    assert [len(each) for each in packed([b"v" * 100] * 4, None, BATCH_HEADER_BYTES + 2 * 109)] == [279, 279]
    assert [len(each) for each in packed([b"v" * 100] * 4, None, BATCH_HEADER_BYTES + 2 * 109 - 1)] == [
        170
    ] * 4


def test_keys_choose_partitions_and_keep_their_order() -> None:
    values: list[Bytes] = [b"%d" % number for number in range(30)]
    keys: list[Bytes] = [None if number % 5 == 0 else b"%d" % (number % 7) for number in range(30)]
    partitioner = DefaultPartitioner(random.Random(1))
    groups = ListRows(values, keys, 17).by_partition(partitioner, 4)
    assert groups is not None
    for index, rows in groups:
        batch, end = rows.pack(0, 1 << 20, Compression.NONE)
        assert end == len(rows)
        found = [(each.key, each.value) for each in decode_batch(b"".join(batch.seal()), "t", 0)]
        pairs = list(zip(keys, values, strict=True))
        assert found == [pair for pair in pairs if partitioner.partition(pair[0], 4) == index]
    assert sum(len(rows) for _, rows in groups) == 30
    assert ListRows(values, None, 17).by_partition(partitioner, 4) is None


def test_what_is_no_record_is_refused() -> None:
    with pytest.raises(InvalidRecord, match="value is bytes or None, not str"):
        ListRows(["text"], None, 17)  # type: ignore[list-item]
    with pytest.raises(InvalidRecord, match="key is bytes or None, not int"):
        ListRows([b"v"], [5], 17)  # type: ignore[list-item]
    with pytest.raises(InvalidRecord, match="2 values and 1 keys"):
        ListRows([b"v", b"v"], [b"k"], 17)
    for timestamp in (-1, 2**60, 1.5, None):
        with pytest.raises(InvalidRecord, match="timestamp"):
            ListRows([b"v"], None, timestamp)  # type: ignore[arg-type]
    assert ListRows([], None, 17).longest == 0
    assert ListRows([bytearray(b"abc"), None], [None, memoryview(b"abcd")], 17).longest == 4


@given(number=st.integers(-(2**63), 2**63 - 1))
def test_varints(number: int) -> None:
    from kafka.record.util import decode_varint

    encoded = varint(number)
    assert decode_varint(encoded) == (number, len(encoded))
