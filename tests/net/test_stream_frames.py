"""Frames: any chunking gives the same frames back; garbage is refused; nothing is quadratic."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftlog.errors import ProtocolError
from raftlog.net.frames import (
    GROWTH_BYTES,
    INBOX_BYTES,
    PREFIX,
    PREFIX_BYTES,
    Frame,
    FrameParser,
    Kind,
    encode_head,
)
from raftlog.net.rpc import FetchPartition


def encode(kind: int, header: object, payload: bytes, api: int = 10, correlation: int = 5) -> bytes:
    return encode_head(kind, api, 1, correlation, header, len(payload)) + payload


def parse(parser: FrameParser, chunks: list[bytes]) -> list[Frame]:
    frames = []
    for chunk in chunks:
        parser.feed(chunk)
        while (frame := parser.next()) is not None:
            frames.append(frame)
    return frames


def receive(parser: FrameParser, chunks: list[bytes]) -> list[Frame]:
    """As ``parse``, into the buffers that the parser gives, as many bytes at a time as they hold."""
    frames = []
    for chunk in chunks:
        while chunk:
            buffer = parser.buffer()
            count = min(len(buffer), len(chunk))
            buffer[:count] = chunk[:count]
            parser.filled(count)
            del buffer
            chunk = chunk[count:]
            while (frame := parser.next()) is not None:
                frames.append(frame)
    return frames


MESSAGES = st.lists(
    st.tuples(
        st.sampled_from(list(Kind)), st.lists(st.integers(0, 2**32), max_size=4), st.binary(max_size=300)
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=300)
@given(messages=MESSAGES, cuts=st.lists(st.integers(0, 4000), max_size=40))
def test_any_chunking_gives_the_same_frames(
    messages: list[tuple[Kind, list[int], bytes]], cuts: list[int]
) -> None:
    stream = b"".join(encode(kind, header, payload) for kind, header, payload in messages)
    edges = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    chunks = [stream[a:b] for a, b in pairwise(edges)]
    for take in parse, receive:
        parser = FrameParser()
        frames = take(parser, chunks)
        assert parser.is_between_frames
        assert [(f[0], msgspec.msgpack.decode(f[4]), bytes(f[5])) for f in frames] == messages
        assert all(frame[1:4] == (10, 1, 5) for frame in frames)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(
        st.sampled_from([0, 100, INBOX_BYTES, INBOX_BYTES + 1, 200_000, 1_000_000, 2_500_000]), max_size=5
    ),
    cuts=st.lists(st.integers(1, 900_000), max_size=12),
    feeds=st.booleans(),
)
def test_long_frames_are_received_where_they_stay(sizes: list[int], cuts: list[int], feeds: bool) -> None:
    payloads = [bytes([index + 1]) * size for index, size in enumerate(sizes)]
    left = b"".join(encode(Kind.REQUEST, [], payload) for payload in payloads)
    parser, frames = FrameParser(), []
    for index, cut in enumerate([*cuts, len(left)]):
        chunk, left = left[:cut], left[cut:]
        take = parse if feeds and index % 2 else receive
        frames += take(parser, [chunk])
    assert parser.is_between_frames
    assert [bytes(frame[5]) for frame in frames] == payloads
    assert all(frame[5].readonly for frame in frames)


def test_what_is_missing_of_a_long_frame_is_received_into_it() -> None:
    parser = FrameParser()
    frame = encode(Kind.REQUEST, [], bytes(GROWTH_BYTES))
    assert receive(parser, [frame[:100]]) == []
    assert len(parser.buffer()) == len(frame) - 100


@settings(deadline=None, max_examples=300)
@given(chunks=st.lists(st.binary(min_size=1, max_size=60), max_size=20))
def test_garbage_is_refused_or_waited_for_but_never_anything_else(chunks: list[bytes]) -> None:
    parser = FrameParser(1000)
    try:
        parse(parser, chunks)
    except ProtocolError:
        return
    assert parser._partial is None or len(parser._partial) <= 1000


def test_a_frame_is_byte_for_byte_as_documented() -> None:
    head = encode_head(Kind.REQUEST, 11, 1, 0x01020304, FetchPartition(b"T", 2, 3, -1, 4), 2)
    header = bytes.fromhex("95c401540203ff04")
    prefix = bytes.fromhex("00000016100b01000102030400000008")
    assert head == prefix + header


def test_frames_within_a_chunk_are_views_of_it_and_read_only() -> None:
    chunk = encode(Kind.REQUEST, [], b"abc")
    (frame,) = parse(FrameParser(), [chunk])
    assert frame[5].obj is chunk
    assert frame[5].readonly


def test_a_frame_over_chunks_owns_a_buffer_that_nothing_writes_to() -> None:
    first, second = encode(Kind.REQUEST, [], b"a" * 1000), encode(Kind.REQUEST, [], b"b" * 1000)
    stream = first + second
    parser = FrameParser()
    frames = parse(parser, [stream[:500], stream[500:1100], stream[1100:]])
    assert [bytes(frame[5]) for frame in frames] == [b"a" * 1000, b"b" * 1000]
    assert frames[0][5].obj is not frames[1][5].obj
    assert frames[0][5].readonly


@pytest.mark.parametrize(
    "prefix",
    [
        PREFIX.pack(1 << 30, Kind.REQUEST, 1, 1, 0, 0, 0),
        PREFIX.pack(11, Kind.REQUEST, 1, 1, 0, 0, 0),
        PREFIX.pack(12, Kind.REQUEST, 1, 1, 0, 0, 1),
        PREFIX.pack(12, 0, 1, 1, 0, 0, 0),
        PREFIX.pack(12, 200, 1, 1, 0, 0, 0),
        PREFIX.pack(12, Kind.REQUEST, 1, 1, 1, 0, 0),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["too long", "too short", "header beyond end", "kind 0", "kind 200", "flags", "http"],
)
@pytest.mark.parametrize("split", [False, True])
def test_impossible_prefixes_are_refused_as_soon_as_they_are_there(prefix: bytes, split: bool) -> None:
    parser = FrameParser(1000)
    chunks = [prefix[:3], prefix[3:]] if split else [prefix]
    with pytest.raises(ProtocolError):
        parse(parser, chunks)


def test_the_limit_is_exact() -> None:
    frame = encode(Kind.REQUEST, [], bytes(100))
    assert len(parse(FrameParser(len(frame)), [frame])) == 1
    with pytest.raises(ProtocolError, match="above the limit"):
        parse(FrameParser(len(frame) - 1), [frame])


def test_memory_follows_what_arrived_not_what_was_announced() -> None:
    parser = FrameParser()
    parse(parser, [PREFIX.pack(60 << 20, Kind.REQUEST, 1, 1, 0, 0, 0) + b"x"])
    assert parser._partial is not None
    assert len(parser._partial) == PREFIX_BYTES + 1
    assert len(parser.buffer()) == GROWTH_BYTES, "and then a step of limited size"


@pytest.mark.parametrize("take", [parse, receive])
def test_collecting_a_big_frame_is_not_quadratic(
    take: Callable[[FrameParser, list[bytes]], list[Frame]],
) -> None:
    def seconds(size: int) -> float:
        frame = encode(Kind.REQUEST, [], bytes(size))
        chunks = [frame[i : i + 1024] for i in range(0, len(frame), 1024)]
        start = time.process_time()
        assert len(take(FrameParser(), chunks)) == 1
        return time.process_time() - start

    small = min(seconds(1 << 20) for _ in range(3))
    large = min(seconds(16 << 20) for _ in range(3))
    assert large < 16 * 8 * small, "16 times the bytes would take 256 times as long"
