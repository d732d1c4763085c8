"""Stream frames: how messages are cut out of a byte stream, and nothing about what they mean.

Layout (big endian, a prefix of 16 bytes, then header and payload)::

    0        4      5     6         7       8             12              16
    | length | kind | api | version | flags | correlation | header length | header … | payload …

``length`` counts all that follows it. The header is the msgpack of an rpc struct; the payload is raw bytes
that are never decoded on the way. ``correlation`` ties a response to its request; one-way frames carry 0.

Ownership: a parsed frame is made of read-only views of a buffer that nothing writes to any more: the received
chunk itself for frames that lie within one (no copy; the frame keeps the whole chunk alive), else a buffer of
the frame's own into which its pieces were collected, or what is missing of a long frame was received at once.
"""

from __future__ import annotations

import struct
import threading
from enum import IntEnum
from typing import Final, TypeAlias

import msgspec

from raftlog.errors import ProtocolError

Buffer: TypeAlias = bytes | bytearray | memoryview

PREFIX: Final = struct.Struct(">IBBBBII")
PREFIX_BYTES: Final = PREFIX.size  # 16
LENGTH_BYTES: Final = 4
FRAME_BYTES_MAX: Final = 64 * 1024 * 1024 + 64 * 1024
"""The largest log frame (64 MiB) and room for its rpc header."""
HANDSHAKE_BYTES_MAX: Final = 4 * 1024
"""All that is read from a peer that has not proved yet who it is."""


class Kind(IntEnum):
    """What a frame is. The first five belong to the handshake."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REFUSED = 5
    REQUEST = 16
    RESPONSE = 17
    ERROR = 18
    """Answer to a request that failed; its header is a WireError."""
    ONE_WAY = 19
    PART = 20
    """A part of the answer to a request: its RESPONSE follows."""


INBOX_BYTES: Final = 64 * 1024
"""Received at once, unless more than that is missing of a frame."""
GROWTH_BYTES: Final = 1024 * 1024
"""Memory taken for what is missing of a frame, beyond as much as has come of it."""

_KINDS: Final = frozenset(int(kind) for kind in Kind)

Frame: TypeAlias = tuple[int, int, int, int, memoryview, memoryview]
"""(kind, api, version, correlation, header, payload). A plain tuple: one is made for every message."""

_encode = msgspec.msgpack.Encoder().encode


def encode_head(
    kind: int, api: int, version: int, correlation: int, header: object, payload_bytes: int = 0
) -> bytes:
    """Everything of a frame up to its payload, which the caller writes right after it.

    Raises:
        TypeError: ``header`` holds values that msgpack cannot carry.
    """
    encoded = _encode(header)
    size = len(encoded)
    length = PREFIX_BYTES - LENGTH_BYTES + size + payload_bytes
    return PREFIX.pack(length, kind, api, version, 0, correlation, size) + encoded


class _Thread(threading.local):
    """What the parsers of one thread share: a loop fills one buffer at a time, and says so at once."""

    def __init__(self) -> None:
        self.inbox = memoryview(bytearray(INBOX_BYTES))


_thread = _Thread()


class FrameParser:
    """Cuts a stream into frames.

    Receive into ``buffer()`` and say how much came to ``filled``, or ``feed`` a chunk that is there already;
    then call ``next`` until it returns None. Memory held is at most the chunk and one frame, and grows with
    bytes that really arrived, whatever a length field claims: at most to twice as many, or by GROWTH_BYTES.
    Belongs to the thread that made it.

    Attributes:
        frame_bytes_max: longest frame accepted, its length field included; may be changed between frames.
    """

    __slots__ = (
        "_chunk",
        "_have",
        "_inbox",
        "_is_direct",
        "_needed",
        "_partial",
        "_position",
        "frame_bytes_max",
    )

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self.frame_bytes_max = frame_bytes_max
        self._chunk = b""
        self._position = 0
        self._inbox = _thread.inbox
        self._is_direct = False  # whether what is received now goes to the frame itself
        self._partial: bytearray | None = None  # the beginning of a frame whose end has not come
        self._have = 0  # how much of it
        self._needed = 0  # length of that frame, or PREFIX_BYTES while that is unknown

    @property
    def is_between_frames(self) -> bool:
        """Whether all that was fed has been returned: the stream may end here."""
        return self._partial is None and self._position == len(self._chunk)

    def buffer(self) -> memoryview:
        """Where the next bytes of the stream are to be put: used up before anything else is received in this
        thread, and given up before it is asked for again."""
        partial, have = self._partial, self._have
        self._is_direct = partial is not None and self._needed - have > INBOX_BYTES
        if partial is None or not self._is_direct:
            return self._inbox
        if have == len(partial):
            self._partial = bytearray(min(self._needed, have + max(have, GROWTH_BYTES)))
            self._partial[:have] = partial
            partial = self._partial
        return memoryview(partial)[have:]

    def filled(self, count: int) -> None:
        """So many bytes have been put there. The caller must have drained ``next`` before."""
        if self._is_direct:
            self._have += count
        else:
            self.feed(bytes(self._inbox[:count]))

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the stream. The caller must have drained ``next`` before."""
        assert self._position == len(self._chunk), "frames of the chunk before were not taken"
        self._chunk = chunk
        self._position = 0

    def next(self) -> Frame | None:
        """The next complete frame; None when more bytes are needed.

        Raises:
            ProtocolError: the bytes are not a frame. The parser must not be used any more.
        """
        if self._partial is not None:
            return self._next_partial(self._partial)
        chunk, position = self._chunk, self._position
        available = len(chunk) - position
        if available < PREFIX_BYTES:
            if available:
                self._keep(PREFIX_BYTES)
            return None
        length, kind, api, version, flags, correlation, header_size = PREFIX.unpack_from(chunk, position)
        end = position + LENGTH_BYTES + length
        header_end = position + PREFIX_BYTES + header_size
        if (
            end - position > self.frame_bytes_max
            or header_end > end
            or kind not in _KINDS
            or flags  # none are defined in this version
        ):
            raise self._garbage(length, kind, flags, header_size)
        if end > len(chunk):
            self._keep(LENGTH_BYTES + length)
            return None
        self._position = end
        view = memoryview(chunk)
        return (
            kind,
            api,
            version,
            correlation,
            view[position + PREFIX_BYTES : header_end],
            view[header_end:end],
        )

    def _keep(self, needed: int) -> None:
        """Start collecting a frame with the rest of the chunk."""
        self._partial = bytearray(memoryview(self._chunk)[self._position :])
        self._have = len(self._partial)
        self._needed = needed
        self._release_chunk()

    def _release_chunk(self) -> None:
        self._chunk = b""
        self._position = 0

    def _next_partial(self, partial: bytearray) -> Frame | None:
        if not self._fill(partial):
            return None
        if self._needed == PREFIX_BYTES:
            length, kind, _, _, flags, _, header_size = PREFIX.unpack_from(partial)
            self._check(length, kind, flags, header_size)
            self._needed = LENGTH_BYTES + length
            if not self._fill(partial):
                return None
        self._partial = None
        _, kind, api, version, _, correlation, header_size = PREFIX.unpack_from(partial)
        view = memoryview(partial).toreadonly()
        header_end = PREFIX_BYTES + header_size
        return kind, api, version, correlation, view[PREFIX_BYTES:header_end], view[header_end:]

    def _fill(self, partial: bytearray) -> bool:
        """Move bytes from the chunk until ``partial`` holds what is needed. It grows in proportion to its
        size, so collecting a frame costs one copy of it however small the chunks are."""
        missing = self._needed - self._have
        available = len(self._chunk) - self._position
        taken = min(missing, available)
        if taken:
            end = self._position + taken
            partial[self._have : self._have + taken] = memoryview(self._chunk)[self._position : end]
            self._have += taken
            self._position = end
        if taken == available:
            self._release_chunk()
        return taken == missing

    def _check(self, length: int, kind: int, flags: int, header_size: int) -> None:
        size = LENGTH_BYTES + length
        if size > self.frame_bytes_max or PREFIX_BYTES + header_size > size or kind not in _KINDS or flags:
            raise self._garbage(length, kind, flags, header_size)

    def _garbage(self, length: int, kind: int, flags: int, header_size: int) -> ProtocolError:
        if LENGTH_BYTES + length > self.frame_bytes_max:
            what = f"a frame of {LENGTH_BYTES + length} bytes, above the limit of {self.frame_bytes_max}"
        else:
            what = f"garbage (length {length}, kind {kind}, flags {flags}, header length {header_size})"
        return ProtocolError(f"received {what}")
