"""The log frame: its bytes, its chain of checksums, and that damage anywhere in it is seen."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from raftlog.errors import CorruptFrame
from raftlog.raft.types import Entry
from raftlog.record import frame
from raftlog.record.frame import (
    FIRST_PREV_CRC,
    FRAME_BYTES_MAX,
    FRAME_HEADER_BYTES,
    FrameKind,
    encode_frame,
    frame_length,
    iter_frames,
    parse_frame,
)


def chain(payloads: list[bytes], term: int = 3) -> list[bytes]:
    """Frames of a log that begins at index 1."""
    frames: list[bytes] = []
    prev_crc = FIRST_PREV_CRC
    for index, payload in enumerate(payloads, 1):
        frames.append(encode_frame(prev_crc, FrameKind.BATCH, term, index, 1000 + index, payload))
        prev_crc = parse_frame(frames[-1]).crc
    return frames


def test_the_bytes_of_a_frame_are_what_the_format_says() -> None:
    made = encode_frame(0xAABBCCDD, FrameKind.COMMAND, 5, 7, 1_700_000_000_000, b"payload")
    after = bytes.fromhex("aabbccdd0201") + struct.pack(">QQQ", 5, 7, 1_700_000_000_000) + b"payload"
    assert made == struct.pack(">II", 38 + 7, crc32c(after)) + after
    assert FRAME_HEADER_BYTES == 38


@given(
    payload=st.binary(max_size=200),
    prev_crc=st.integers(0, 2**32 - 1),
    term=st.integers(0, 2**64 - 1),
    index=st.integers(0, 2**64 - 1),
    time_ms=st.integers(0, 2**64 - 1),
    kind=st.sampled_from(FrameKind),
    before=st.binary(max_size=20),
)
def test_a_frame_reads_as_it_was_written_wherever_it_stands(
    payload: bytes, prev_crc: int, term: int, index: int, time_ms: int, kind: FrameKind, before: bytes
) -> None:
    made = encode_frame(prev_crc, kind, term, index, time_ms, payload)
    buffer = memoryview(before + made + b"after")
    header = parse_frame(buffer, len(before))
    assert (header.prev_crc, header.kind, header.term, header.index) == (prev_crc, kind, term, index)
    assert (header.leader_time_ms, header.length) == (time_ms, len(made))
    assert frame_length(buffer, len(before)) == len(made)
    entry = Entry.parse(buffer, len(before))
    assert entry.payload == payload
    assert entry == Entry.create(prev_crc, kind, term, index, time_ms, payload)


@given(payloads=st.lists(st.binary(max_size=50), max_size=8))
def test_a_range_of_frames_is_read_in_order_and_its_crcs_chain(payloads: list[bytes]) -> None:
    joined = b"".join(chain(payloads))
    headers = [header for header, _ in iter_frames(joined)]
    assert [header.index for header in headers] == list(range(1, len(payloads) + 1))
    assert [bytes(Entry.parse(joined, position).payload) for _, position in iter_frames(joined)] == payloads
    for before, after in pairwise(headers):
        assert after.prev_crc == before.crc


def test_equal_crcs_mean_equal_histories() -> None:
    """One changed byte in the first payload changes the crc of every frame after it."""
    ours, theirs = chain([b"a", b"same", b"same"]), chain([b"b", b"same", b"same"])
    assert all(
        parse_frame(one).crc != parse_frame(other).crc for one, other in zip(ours, theirs, strict=True)
    )


def test_every_flipped_bit_is_seen() -> None:
    good = encode_frame(7, FrameKind.BATCH, 1, 2, 3, b"some payload")
    for position in range(len(good)):
        for bit in range(8):
            flipped = bytearray(good)
            flipped[position] ^= 1 << bit
            with pytest.raises(CorruptFrame):
                parse_frame(flipped)
    parse_frame(good)


def test_every_cut_is_seen() -> None:
    good = encode_frame(7, FrameKind.BATCH, 1, 2, 3, b"some payload")
    for size in range(len(good)):
        with pytest.raises(CorruptFrame):
            parse_frame(good[:size])
    joined = good + good
    for size in range(len(good) + 1, len(joined)):
        frames = iter_frames(joined[:size])
        assert next(frames)[1] == 0
        with pytest.raises(CorruptFrame):
            next(frames)


@pytest.mark.parametrize("length", [0, 37, FRAME_BYTES_MAX + 1, 2**32 - 1])
def test_an_impossible_length_asks_for_no_memory(length: int) -> None:
    wrong = bytearray(encode_frame(7, FrameKind.BATCH, 1, 2, 3, b"payload"))
    wrong[:4] = length.to_bytes(4, "big")
    for check in (True, False):
        with pytest.raises(CorruptFrame, match=f"length {length}"):
            parse_frame(wrong, check=check)


def test_a_frame_of_another_version_is_not_guessed_at() -> None:
    wrong = bytearray(encode_frame(7, FrameKind.BATCH, 1, 2, 3, b""))
    wrong[13] = 2
    wrong[4:8] = crc32c(bytes(wrong[8:])).to_bytes(4, "big")
    with pytest.raises(CorruptFrame, match="version 2; this release reads 1"):
        parse_frame(wrong)


def test_without_the_check_only_the_crc_is_believed() -> None:
    wrong = bytearray(encode_frame(7, FrameKind.BATCH, 1, 2, 3, b"payload"))
    wrong[-1] ^= 1
    assert parse_frame(wrong, check=False).index == 2
    assert [header.index for header, _ in iter_frames(wrong, check=False)] == [2]
    with pytest.raises(CorruptFrame, match=r"crc .* at index 2"):
        list(iter_frames(wrong))


def test_a_frame_above_the_limit_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "FRAME_BYTES_MAX", 100)
    assert len(encode_frame(0, FrameKind.BATCH, 1, 1, 0, bytes(62))) == 100
    with pytest.raises(ValueError, match="101 bytes is above the limit of 100"):
        encode_frame(0, FrameKind.BATCH, 1, 1, 0, bytes(63))


def test_headers_show_themselves_in_logs() -> None:
    header = parse_frame(encode_frame(0, FrameKind.BATCH, 4, 9, 0, b""))
    assert repr(header) == (
        f"FrameHeader(index=9, term=4, kind=1, length=38, crc={header.crc:08x}, prev_crc=00000000)"
    )
