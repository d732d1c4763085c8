"""A connection inside calls: the same byte stream where a client reaches a process, but none of its ports.

::

    dialing side                                                  serving side

    connection  bytes     call 7: these bytes, read so far        bytes   connection
    as ever     ------->  -------------------------------------->  -----> as ever
                <-------  <--------------------------------------  <-----
                          its answer, when there are bytes to say,
                          or another call has come, or after HOLD_S

A call is bytes in, bytes out, to one method of whatever can be called; here that is a broker's actor. An end
of a tunnel is an asyncio transport, so what is above it (handshake, frames, budgets) is what it is on TCP.

- *Waiting.* A call without anything to answer is held, so that what the server has to say need not be asked
  for: a round trip costs one call. Of each tunnel at most HELD_MAX are held, for HOLD_S at most, and there
  are at most TUNNELS_MAX of them: Ray runs 1,000 calls of an actor at once, and all others wait.
- *Order.* Calls overtake each other. Each message has a number, and is taken in its turn.
- *Windows.* Each side says how much it has read of the other's stream; at most WINDOW_BYTES are on their
  way. A message has CHUNK_BYTES at most, what Ray passes on inside of a call, without its object store.
- *The end.* A call that fails, or has no answer, is a broken connection, as is a client that does not call
  any more. Nothing is sent twice.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from raftlog.errors import ProtocolError
from raftlog.net.frames import Buffer
from raftlog.net.network import StreamProtocol, deliver

CHUNK_BYTES: Final = 96 * 1024
WINDOW_BYTES: Final = 4 * 1024 * 1024
CALLS_MAX: Final = 4
"""Of one tunnel, at one time."""
HELD_MAX: Final = 2
HOLD_S: Final = 10.0
ANSWER_S: Final = 5.0
"""A call that is not answered so long after it should be will not be."""
TUNNELS_MAX: Final = 128

OPEN: Final = 1
"""The first message of a tunnel."""
END: Final = 2
"""The last one of its side."""
GONE: Final = 4
"""There is no such tunnel (any more)."""

_HEAD: Final = struct.Struct(">16sQQB")
_HIGH_WATER: Final = 64 * 1024


class Message(NamedTuple):
    """What a call, or its answer, carries."""

    tunnel: bytes
    """16 bytes, the dialing side's choice."""
    number: int
    """0 is the first of each side."""
    read: int
    """Bytes of the other side's stream."""
    flags: int
    data: bytes

    def encode(self) -> bytes:
        """As it travels."""
        return _HEAD.pack(self.tunnel, self.number, self.read, self.flags) + self.data

    @classmethod
    def decode(cls, encoded: bytes) -> Message:
        """Undo :meth:`encode`.

        Raises:
            ProtocolError: it is none.
        """
        if len(encoded) < _HEAD.size:
            raise ProtocolError(f"a message of {len(encoded)} bytes in a tunnel")
        tunnel, number, read, flags = _HEAD.unpack_from(encoded)
        return cls(tunnel, number, read, flags, encoded[_HEAD.size :])


class TunnelEnd(asyncio.Transport):
    """What both ends have in common. Subclasses say in ``_pump`` when a message leaves.

    Args:
        tunnel: its id.
        peer: where it leads, for logs.
    """

    def __init__(self, tunnel: bytes, peer: str) -> None:
        super().__init__({"peername": peer})
        self._loop = asyncio.get_running_loop()
        self._tunnel = tunnel
        self._protocol: StreamProtocol
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._sent = 0
        self._sent_and_read = 0
        self._numbered = 0
        self._early: dict[int, Message] = {}
        self._expected = 0
        self._unread: deque[bytes] = deque()
        self._unread_bytes = 0
        self._read = 0
        self._told = 0
        """How much the peer was told that we have read."""
        self._is_reading = True
        self._high, self._low = _HIGH_WATER, _HIGH_WATER // 4
        self._write_paused = False
        self._pump_scheduled = False
        self._closing = False
        self._ended = False
        """Our last message has left, or nobody would read it."""

    # -- the transport's interface ---------------------------------------------------------------------------

    def write(self, data: Buffer) -> None:
        if self._closing or not data:
            return
        self._unsent.append(memoryview(data))
        self._unsent_bytes += len(data)
        if self._unsent_bytes > self._high and not self._write_paused:
            self._write_paused = True
            self._protocol.pause_writing()
        self._pump_soon()

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        for data in list_of_data:
            self.write(data)

    def get_write_buffer_size(self) -> int:
        return self._unsent_bytes

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high if high is not None else 4 * low if low is not None else _HIGH_WATER
        self._low = low if low is not None else self._high // 4

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._is_reading = False

    def resume_reading(self) -> None:
        self._is_reading = True
        self._loop.call_soon(self._deliver_and_tell)

    def close(self) -> None:
        """Close when all that was written has left."""
        if not self._closing:
            self._closing = True
            self._pump_soon()

    def abort(self) -> None:
        """Close now; what was not sent is dropped."""
        self._closing = True
        self._drop()
        self._pump_soon()

    # -- for subclasses --------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Send what there is to send, if it can be sent now."""
        raise AssertionError("an end of a tunnel is a dialed or a served one")

    def _begin(self, protocol: StreamProtocol) -> None:
        self._protocol = protocol
        protocol.connection_made(self)

    def _pump_soon(self) -> None:
        """At the end of this turn of the loop: what is written until then leaves together."""
        if not self._pump_scheduled and not self._ended:
            self._pump_scheduled = True
            self._loop.call_soon(self._pump_now)

    def _pump_now(self) -> None:
        self._pump_scheduled = False
        if not self._ended:
            self._pump()

    def _has_to_send(self) -> bool:
        """Whether a message would carry more than the news that all is well."""
        if self._read - self._told > WINDOW_BYTES // 2:
            return True
        if not self._unsent_bytes:
            return self._closing
        return self._sent - self._sent_and_read < WINDOW_BYTES

    def _message(self, flags: int = 0) -> bytes:
        """The next message, with as many of the unsent bytes as it may have."""
        data = self._take()
        if self._closing and not self._unsent_bytes:
            flags |= END
            self._finish(None)
        number = self._numbered
        self._numbered += 1
        self._told = self._read
        return Message(self._tunnel, number, self._read, flags, data).encode()

    def _take(self) -> bytes:
        room = min(CHUNK_BYTES, WINDOW_BYTES - (self._sent - self._sent_and_read))
        pieces = []
        while room > 0 and self._unsent:
            piece = self._unsent.popleft()
            if len(piece) > room:
                self._unsent.appendleft(piece[room:])
                piece = piece[:room]
            pieces.append(piece)
            room -= len(piece)
        data = b"".join(pieces)
        self._sent += len(data)
        self._unsent_bytes -= len(data)
        if self._write_paused and self._unsent_bytes <= self._low:
            self._write_paused = False
            self._loop.call_soon(self._resume_writing)
        return data

    def _resume_writing(self) -> None:
        if not self._ended:
            self._protocol.resume_writing()

    # -- what arrives ----------------------------------------------------------------------------------------

    def _receive(self, message: Message) -> None:
        """Take a message, in its turn.

        Raises:
            ProtocolError: the peer does not keep to the rules.
        """
        number = message.number
        if not self._expected <= number < self._expected + 2 * CALLS_MAX or number in self._early:
            raise ProtocolError(f"message {number} in a tunnel, where {self._expected} was to come")
        self._early[number] = message
        while not self._ended and (following := self._early.pop(self._expected, None)) is not None:
            self._expected += 1
            self._accept(following)

    def _accept(self, message: Message) -> None:
        if not self._sent_and_read <= message.read <= self._sent:
            raise ProtocolError(f"{message.read} bytes read in a tunnel, of {self._sent}")
        self._sent_and_read = message.read
        if message.data:
            self._unread.append(message.data)
            self._unread_bytes += len(message.data)
            if self._unread_bytes > WINDOW_BYTES:
                raise ProtocolError("more bytes in a tunnel than its window holds")
            self._deliver()
        if message.flags & END:
            self._deliver(even_if_paused=True)  # nobody will be able to read the answers that it waits for
            if not self._closing:
                self._protocol.eof_received()
            self._finish(None)

    def _deliver(self, *, even_if_paused: bool = False) -> None:
        while self._unread and (self._is_reading or self._closing or even_if_paused):
            data = self._unread.popleft()
            self._unread_bytes -= len(data)
            self._read += len(data)
            if not self._closing:
                deliver(self._protocol, data)

    def _deliver_and_tell(self) -> None:
        self._deliver()
        self._pump_soon()

    # -- the end ---------------------------------------------------------------------------------------------

    def _drop(self) -> None:
        self._unsent.clear()
        self._unsent_bytes = 0

    def _finish(self, error: Exception | None) -> None:
        """Nothing more will be sent; the protocol hears of it."""
        if self._ended:
            return
        self._ended = self._closing = True
        self._drop()
        self._early.clear()
        self._unread.clear()
        self._loop.call_soon(self._protocol.connection_lost, error)


def as_protocol(made: Any) -> StreamProtocol:
    """What a protocol factory made."""
    assert isinstance(made, asyncio.Protocol | asyncio.BufferedProtocol), "a tunnel carries a stream of bytes"
    return made
