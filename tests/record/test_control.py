"""Control batches: Kafka's layout, as Kafka's other readers see it, and nothing else is taken for one."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka_oracle import TheirBatch

from raftlog.errors import CorruptBatch
from raftlog.record.batch import BatchHeader, check_batch, check_crc, stamped
from raftlog.record.codec import decode_batch, encode_batch
from raftlog.record.control import CONTROL_BATCH_BYTES, Marker, decode_marker, encode_marker

markers = st.builds(
    Marker,
    producer_id=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 2**15 - 1),
    coordinator_epoch=st.integers(0, 2**31 - 1),
    commit=st.booleans(),
)


def decode(batch: bytes) -> Marker:
    return decode_marker(batch, BatchHeader.parse(batch))


@given(marker=markers, time_ms=st.integers(0, 2**45), offset=st.integers(0, 2**60))
def test_a_marker_comes_back_and_is_a_sound_batch(marker: Marker, time_ms: int, offset: int) -> None:
    batch = stamped(encode_marker(marker, time_ms), offset, 3)
    header = BatchHeader.parse(batch)
    assert decode_marker(memoryview(batch), header) == marker
    check_crc(batch, header)
    assert (header.size, len(batch)) == (CONTROL_BATCH_BYTES, 78)
    assert (header.next_offset, header.record_count, header.base_sequence) == (offset + 1, 1, -1)
    assert header.is_control
    assert header.is_transactional
    assert header.max_timestamp == time_ms


@pytest.mark.parametrize("commit", [True, False])
def test_kafkas_own_reader_finds_the_marker(commit: bool) -> None:
    batch = stamped(encode_marker(Marker(7, 3, 9, commit), 1000), 41, 2)
    theirs = TheirBatch(batch)
    assert theirs.validate_crc()
    assert theirs.is_control_batch
    assert theirs.is_transactional
    (record,) = theirs
    assert (record.offset, record.timestamp) == (41, 1000)
    assert record.key == struct.pack(">hh", 0, commit)
    assert record.value == struct.pack(">hi", 0, 9)
    assert (record.commit, record.abort) == (commit, not commit)
    (ours,) = decode_batch(batch, "t", 0)
    assert (ours.key, ours.value, ours.headers) == (record.key, record.value, ())


def test_a_producer_may_not_send_a_marker() -> None:
    with pytest.raises(CorruptBatch, match="control"):
        check_batch(encode_marker(Marker(7, 3, 9, True), 1000))


def test_a_transactional_batch_is_taken_with_a_producer_and_not_without() -> None:
    batch = encode_batch(
        [b"v"], None, 5, producer_id=1, producer_epoch=0, base_sequence=0, transactional=True
    )
    assert check_batch(batch).is_transactional
    with pytest.raises(CorruptBatch, match="no producer id"):
        check_batch(encode_batch([b"v"], None, 5, transactional=True))


def test_what_is_not_a_marker_is_not_taken_for_one() -> None:
    sound = encode_marker(Marker(7, 3, 9, True), 1000)
    for position, value in (
        (22, 0x10),  # no control bit
        (22, 0x20),  # not transactional
        (22, 0x31),  # compressed
        (60, 2),  # two records
        (26, 1),
        (61, 30),  # other lengths
        (65, 6),
        (70, 14),
        (67, 1),  # another version of the key
        (69, 2),  # neither abort nor commit
        (72, 1),  # another version of the value
        (77, 2),  # with headers
    ):
        changed = bytearray(sound)
        changed[position] = value
        with pytest.raises(CorruptBatch):
            decode(bytes(changed))
    with pytest.raises(CorruptBatch):
        decode(sound + b"x")
    with pytest.raises(CorruptBatch):
        decode(encode_batch([b"v"], None, 5))
    assert decode(sound).commit
