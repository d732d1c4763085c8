"""The log frame: one Raft entry as the same bytes in journal, segment and on the wire.

Layout (big endian, 38 bytes of header, then the payload)::

    0        4     8          12    13       14     22      30              38
    | length | crc | prev_crc | kind | version | term | index | leader_time_ms | payload …

``length`` counts every byte of the frame, itself included. ``crc`` is CRC-32C over all that follows it, so it
covers ``prev_crc``: the crc of the frame before. The crcs therefore chain: two logs whose frames at one index
carry the same crc hold, with overwhelming likelihood, the same bytes at every index up to it, and a damaged
range can be repaired from any peer because the frame after it proves what stood there.

This module is pure: it is imported by the Raft core, by storage, by brokers and by clients.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, TypeAlias

from crc32c import crc32c

from raftlog.errors import CorruptFrame

Buffer: TypeAlias = bytes | bytearray | memoryview

_HEADER = struct.Struct(">IIIBBQQQ")
_LENGTH_CRC = struct.Struct(">II")
_AFTER_CRC = struct.Struct(">IBBQQQ")

FRAME_HEADER_BYTES: Final = _HEADER.size  # 38
FRAME_VERSION: Final = 1
FRAME_BYTES_MAX: Final = 64 * 1024 * 1024
"""A frame above this is refused everywhere: no length field read from a disk or a peer asks for more
memory."""
FIRST_PREV_CRC: Final = 0
"""``prev_crc`` of the frame at index 1."""


class FrameKind(IntEnum):
    """What a frame's payload is. Clients skip every kind but BATCH."""

    NOOP = 0
    """Empty: what a new leader commits first (Raft section 8)."""
    BATCH = 1
    """One Kafka RecordBatch v2, base offset and leader epoch stamped."""
    COMMAND = 2
    """One command of the group's state machine (msgpack array: type, version, fields…)."""
    CONF = 3
    """A Raft configuration (encoded ConfState)."""


NOOP: Final = int(FrameKind.NOOP)
BATCH: Final = int(FrameKind.BATCH)
COMMAND: Final = int(FrameKind.COMMAND)
CONF: Final = int(FrameKind.CONF)
# for what runs with every batch: to look up a member of an enum takes longer than to use it


def encode_frame(
    prev_crc: int, kind: int, term: int, index: int, leader_time_ms: int, payload: Buffer
) -> bytes:
    """Return the frame as one bytes object (a single copy of the payload)."""
    after = _AFTER_CRC.pack(prev_crc, kind, FRAME_VERSION, term, index, leader_time_ms)
    length = FRAME_HEADER_BYTES + len(payload)
    if length > FRAME_BYTES_MAX:
        raise ValueError(f"frame of {length} bytes is above the limit of {FRAME_BYTES_MAX}")
    crc = crc32c(payload, crc32c(after))
    return b"".join((_LENGTH_CRC.pack(length, crc), after, payload))


def frame_length(buffer: Buffer, position: int = 0) -> int:
    """Length in bytes of the frame that starts at ``position`` (unchecked)."""
    length: int = int.from_bytes(buffer[position : position + 4], "big")
    return length


class FrameHeader:
    """A parsed frame header. ``crc`` is what the header claims; :func:`parse_frame` checks it."""

    __slots__ = ("crc", "index", "kind", "leader_time_ms", "length", "prev_crc", "term", "version")

    def __init__(self, buffer: Buffer, position: int = 0) -> None:
        (
            self.length,
            self.crc,
            self.prev_crc,
            self.kind,
            self.version,
            self.term,
            self.index,
            self.leader_time_ms,
        ) = _HEADER.unpack_from(buffer, position)

    def encode(self) -> bytes:
        """The bytes it was parsed from."""
        return _HEADER.pack(
            self.length,
            self.crc,
            self.prev_crc,
            self.kind,
            self.version,
            self.term,
            self.index,
            self.leader_time_ms,
        )

    def __repr__(self) -> str:
        return (
            f"FrameHeader(index={self.index}, term={self.term}, kind={self.kind}, length={self.length}, "
            f"crc={self.crc:08x}, prev_crc={self.prev_crc:08x})"
        )


def parse_frame(buffer: Buffer, position: int = 0, *, check: bool = True) -> FrameHeader:
    """Parse the frame at ``position``; with ``check``, verify its crc.

    Raises:
        CorruptFrame: too short, an impossible length, an unknown version, or a crc that does not match.
    """
    left = len(buffer) - position
    if left < FRAME_HEADER_BYTES:
        raise CorruptFrame(f"{left} bytes are too few for a frame header")
    header = FrameHeader(buffer, position)
    if not FRAME_HEADER_BYTES <= header.length <= FRAME_BYTES_MAX:
        raise CorruptFrame(f"impossible frame length {header.length}")
    if header.length > left:
        raise CorruptFrame(f"frame of {header.length} bytes cut at {left}")
    if header.version != FRAME_VERSION:
        raise CorruptFrame(f"frame version {header.version}; this release reads {FRAME_VERSION}")
    if check:
        body = memoryview(buffer)[position + 8 : position + header.length]
        found = crc32c(body)
        if found != header.crc:
            raise CorruptFrame(f"crc {found:08x} at index {header.index}, header says {header.crc:08x}")
    return header


def iter_frames(buffer: Buffer, *, check: bool = True) -> Iterator[tuple[FrameHeader, int]]:
    """Yield (header, position) for each frame of a contiguous range.

    Raises:
        CorruptFrame: at the first frame that is cut short or does not check.
    """
    position, end = 0, len(buffer)
    while position < end:
        header = parse_frame(buffer, position, check=check)
        yield header, position
        position += header.length


def split_frames(buffer: memoryview) -> list[tuple[int, int, int, int, int, int, memoryview]]:
    """As :func:`iter_frames`, without an object in between, for what comes from peers with every batch.

    Returns:
        (index, term, kind, leader_time_ms, prev_crc, crc, the whole frame) of each.

    Raises:
        CorruptFrame: one that is cut short or does not check.
    """
    found: list[tuple[int, int, int, int, int, int, memoryview]] = []
    position, end = 0, len(buffer)
    while position < end:
        if end - position >= FRAME_HEADER_BYTES:
            length, crc, prev_crc, kind, version, term, index, time_ms = _HEADER.unpack_from(buffer, position)
            after = position + length
            if FRAME_HEADER_BYTES <= length <= FRAME_BYTES_MAX and after <= end and version == FRAME_VERSION:
                frame = buffer[position:after]
                if crc32c(frame[8:]) == crc:
                    found.append((index, term, kind, time_ms, prev_crc, crc, frame))
                    position = after
                    continue
        parse_frame(buffer, position)  # which says what is wrong
        raise AssertionError(f"the frame at {position} was wrong a moment ago")
    return found
