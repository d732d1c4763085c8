"""The batch header: what a broker accepts, what it refuses, and what stamping leaves alone."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from crc32c import crc32c
from kafka_oracle import TheirBatch

from raftlog.errors import ConfigError, CorruptBatch, RecordTooLarge
from raftlog.record.batch import (
    ATTRIBUTES_AT,
    BATCH_HEADER_BYTES,
    CONTROL,
    TIMESTAMP_TYPE,
    TRANSACTIONAL,
    BatchHeader,
    Compression,
    Unsealed,
    check_batch,
    compression_named,
    stamped,
)
from raftlog.record.codec import decode_batch, encode_batch

VALUES = [b"one", b"two", b"three"]


def good(**fields: Any) -> bytes:
    return encode_batch(VALUES, [b"k", None, b""], 1_700_000_000_000, **fields)


def forged(batch: bytes, position: int, layout: str, value: int) -> bytes:
    """The batch with one header field overwritten and a crc that matches."""
    changed = bytearray(batch)
    struct.pack_into(layout, changed, position, value)
    struct.pack_into(">I", changed, 17, crc32c(bytes(changed[ATTRIBUTES_AT:])))
    return bytes(changed)


def test_the_header_reads_as_kafka_python_reads_it() -> None:
    batch = stamped(good(producer_id=2**40, producer_epoch=7, base_sequence=12), 99, 5)
    ours, theirs = BatchHeader.parse(batch), TheirBatch(batch)
    assert ours.base_offset == theirs.base_offset == 99
    assert ours.leader_epoch == theirs.leader_epoch == 5
    assert ours.size == theirs.size_in_bytes == len(batch)
    for name in (
        *("magic", "crc", "attributes", "last_offset_delta", "first_timestamp", "max_timestamp"),
        *("producer_id", "producer_epoch", "base_sequence", "last_offset", "next_offset", "last_sequence"),
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.record_count == theirs.records_count == 3
    assert theirs.validate_crc()


def test_a_header_is_parsed_at_a_position_inside_a_larger_buffer() -> None:
    batch = good()
    assert BatchHeader.parse(memoryview(b"x" * 38 + batch), 38) == BatchHeader.parse(batch)


@pytest.mark.parametrize("size", [0, 1, BATCH_HEADER_BYTES - 1])
def test_too_few_bytes_for_a_header(size: int) -> None:
    with pytest.raises(CorruptBatch, match=f"^{size} bytes are too few"):
        BatchHeader.parse(good()[:size])
    with pytest.raises(CorruptBatch):
        BatchHeader.parse(good(), position=10_000)


def test_last_sequence_wraps_after_the_largest_int32() -> None:
    header = check_batch(good(producer_id=1, producer_epoch=0, base_sequence=2**31 - 2))
    assert header.last_sequence == 0
    assert (
        check_batch(good(producer_id=1, producer_epoch=0, base_sequence=2**31 - 3)).last_sequence == 2**31 - 1
    )
    assert check_batch(good()).last_sequence == -1


def test_every_single_bit_flip_is_refused_or_lies_in_the_stamped_fields() -> None:
    batch = good(compression=Compression.LZ4)
    check_batch(batch)
    unprotected = {*range(8), *range(12, 16)}  # base offset and leader epoch: the leader overwrites them
    for position in range(len(batch)):
        for bit in range(8):
            flipped = bytearray(batch)
            flipped[position] ^= 1 << bit
            if position in unprotected:
                assert check_batch(flipped).crc == check_batch(batch).crc
                assert stamped(flipped, 4, 2) == stamped(batch, 4, 2)
            else:
                with pytest.raises(CorruptBatch):
                    check_batch(flipped)


def test_a_batch_must_fill_its_buffer_exactly() -> None:
    batch = good()
    for wrong in (batch + b"\0", batch[:-1], batch + batch):
        with pytest.raises(CorruptBatch, match="bytes"):
            check_batch(wrong)


def test_the_size_limit_is_inclusive_and_comes_before_everything_else() -> None:
    batch = good()
    assert check_batch(batch, len(batch)).record_count == 3
    with pytest.raises(RecordTooLarge, match=str(len(batch))) as caught:
        check_batch(batch, len(batch) - 1)
    assert caught.value.limit == len(batch) - 1
    with pytest.raises(RecordTooLarge):
        check_batch(b"garbage" * 100, 100)


@pytest.mark.parametrize(
    ("position", "layout", "value", "complaint"),
    [
        (16, ">b", 1, "magic 1"),
        (21, ">h", CONTROL, "control"),
        (21, ">h", TRANSACTIONAL, "transactional"),
        (21, ">h", TIMESTAMP_TYPE, "log append time"),
        (21, ">h", 0x40, "unknown bits"),
        (21, ">h", -32768, "0x8000 .*unknown bits"),
        (21, ">h", Compression.GZIP, "compression 1 is not supported"),
        (21, ">h", Compression.SNAPPY, "compression 2 is not supported"),
        (21, ">h", 5, "compression 5 is not supported"),
        (23, ">i", 1, "last offset delta 1"),
        (23, ">i", 3, "last offset delta 3"),
        (57, ">i", 2, "2 records"),
        (43, ">q", -2, "producer id -2"),
        (43, ">q", 5, "producer id 5, epoch -1"),
        (53, ">i", 5, "sequence 5 but no producer id"),
    ],
)
def test_fields_that_a_producer_may_not_send(position: int, layout: str, value: int, complaint: str) -> None:
    batch = good()
    with pytest.raises(CorruptBatch, match=complaint):
        check_batch(forged(batch, position, layout, value))
    check_batch(batch)


def test_no_batch_is_empty() -> None:
    empty = forged(forged(good(), 57, ">i", 0), 23, ">i", -1)
    with pytest.raises(CorruptBatch, match="0 records"):
        check_batch(empty)


@pytest.mark.parametrize("missing", ["producer_epoch", "base_sequence"])
def test_producer_id_epoch_and_sequence_come_together(missing: str) -> None:
    fields = {"producer_id": 3, "producer_epoch": 0, "base_sequence": 0}
    check_batch(good(**fields))
    with pytest.raises(CorruptBatch, match="producer id 3"):
        check_batch(good(**(fields | {missing: -1})))


def test_stamping_copies_and_leaves_the_crc_valid() -> None:
    batch = good()
    result = stamped(memoryview(batch), 2**40, 2**31 - 1)
    header = check_batch(result)
    assert (header.base_offset, header.leader_epoch) == (2**40, 2**31 - 1)
    assert batch == good(), "the received buffer is not ours to change"
    assert result[16:] == batch[16:]
    assert [each.offset for each in decode_batch(result, "t", 0)] == [2**40, 2**40 + 1, 2**40 + 2]


def test_a_batch_may_be_sealed_under_one_identity_after_another() -> None:
    batch = good(compression=Compression.NONE, producer_id=1, producer_epoch=2, base_sequence=3)
    unsealed = Unsealed.parse(batch)
    assert unsealed.size == len(batch)
    first = unsealed.seal(1, 2, 3)
    assert b"".join(first) == batch
    moved = b"".join(unsealed.seal(9, 0, 44, transactional=True))
    assert moved == good(producer_id=9, producer_epoch=0, base_sequence=44, transactional=True)
    assert check_batch(moved).base_sequence == 44
    assert b"".join(first) == batch, "what was sent stays as it was"
    assert b"".join(unsealed.seal()) == good()


def test_what_no_release_has_compressed_is_not_taken_apart() -> None:
    with pytest.raises(CorruptBatch, match="compression 2"):
        Unsealed.parse(forged(good(), ATTRIBUTES_AT, ">h", 2))
    with pytest.raises(CorruptBatch, match="too few"):
        Unsealed.parse(good()[:60])


def test_compression_by_name() -> None:
    assert [compression_named(name) for name in (None, "none", "lz4", "zstd")] == [0, 0, 3, 4]
    for unknown in ("gzip", "snappy", "LZ4", ""):
        with pytest.raises(ConfigError, match="none, lz4, zstd"):
            compression_named(unknown)
