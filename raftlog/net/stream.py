"""What both ends of a connection share: frames in, frames out, back-pressure on writing.

Writing is adaptive, because a write on uvloop is a system call of about 5 us. A lone frame goes out at once.
Frames that follow within the same iteration of the loop are collected and leave in one write when the
iteration ends; frames written while received ones are being dispatched leave together after the last of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final, cast

import msgspec

from raftlog.errors import ConnectionLost, ProtocolError
from raftlog.net.frames import FRAME_BYTES_MAX, HANDSHAKE_BYTES_MAX, Buffer, Frame, FrameParser

logger = logging.getLogger("raftlog.net")

JOIN_BYTES_MAX: Final = 32 * 1024
"""Collected frames up to this leave as one joined buffer (a copy is cheaper than many iovecs); above it the
buffers are handed over as they are."""
COLLECT_BYTES_MAX: Final = 1024 * 1024
"""Collected frames above this leave without waiting for the end of the iteration."""


class Limits(msgspec.Struct, frozen=True):
    """A limit on everything a peer can make us hold.

    A connection's reading pauses when it has more than ``connection_bytes`` of requests unanswered, or when
    the whole broker has more than ``broker_bytes`` and this connection is part of it, or when it leaves more
    than ``write_buffer_bytes`` of answers unread; it resumes below half of each. One frame (of at most
    ``frame_bytes_max``) per connection may come on top. Connections between brokers are never paused: their
    acknowledgements are what the requests in flight wait for (Raft bounds them by its windows).
    """

    frame_bytes_max: int = FRAME_BYTES_MAX
    connection_bytes: int = 32 * 1024 * 1024
    broker_bytes: int = 256 * 1024 * 1024
    write_buffer_bytes: int = 1024 * 1024
    handshake_bytes: int = HANDSHAKE_BYTES_MAX
    handshake_seconds: float = 5.0
    handshakes_max: int = 256
    """Connections that have not finished their handshake, at one time."""
    linger_seconds: float = 5.0
    """How long a closing connection may take to flush what was written."""


class FrameStream(asyncio.BufferedProtocol):
    """An asyncio protocol that reads and writes frames. Subclasses give it a meaning through ``_on_frame``,
    ``_on_batch_end``, ``_on_garbage`` and ``_on_lost``."""

    __slots__ = (
        "_closing",
        "_collected",
        "_collected_bytes",
        "_corked",
        "_drain_waiters",
        "_handshake_left",
        "_limits",
        "_loop",
        "_on_frame",
        "_parser",
        "_reason",
        "_timer",
        "_transport",
        "_write_paused",
    )

    def __init__(self, limits: Limits) -> None:
        self._loop = asyncio.get_running_loop()
        self._limits = limits
        self._parser = FrameParser(limits.handshake_bytes)
        self._handshake_left = limits.handshake_bytes
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._reason: Exception | None = None
        self._corked = False
        self._collected: list[Buffer] = []
        self._collected_bytes = 0
        self._write_paused = False
        self._drain_waiters: list[asyncio.Future[None]] = []
        self._on_frame: Callable[[Frame], None]

    # -- what subclasses add ---------------------------------------------------------------------------------

    def _on_batch_end(self) -> None:
        """All frames of one received chunk were dispatched."""

    def _on_garbage(self, error: ProtocolError) -> None:
        """The peer broke the protocol; the connection must be closed."""

    def _on_lost(self, error: Exception | None) -> None:
        """The connection is gone."""

    # -- reading ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=self._limits.write_buffer_bytes)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._parser.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self._closing:
            return
        was_corked, self._corked = self._corked, True
        try:
            if self._handshake_left >= 0:
                self._count_handshake(nbytes)
            parser = self._parser
            parser.filled(nbytes)
            while not self._closing and (frame := parser.next()) is not None:
                self._on_frame(frame)
        except ProtocolError as error:
            self._on_garbage(error)
        finally:
            self._on_batch_end()
        self._corked = was_corked
        self._flush()

    def _count_handshake(self, size: int) -> None:
        self._handshake_left -= size
        if self._handshake_left < 0:
            raise ProtocolError(
                f"received more than {self._limits.handshake_bytes} bytes before the handshake ended"
            )

    def _handshake_done(self) -> None:
        """From now on frames of the full size are accepted."""
        self._handshake_left = -1
        self._parser.frame_bytes_max = self._limits.frame_bytes_max
        self._cancel_timer()

    # -- writing ---------------------------------------------------------------------------------------------

    @property
    def buffered_bytes(self) -> int:
        """Bytes written that have not left this process; 0 once the connection is closing."""
        transport = self._transport
        if transport is None or self._closing:  # uvloop refuses the question once a transport is closed
            return 0
        return self._collected_bytes + transport.get_write_buffer_size()

    def _write(self, head: bytes, payload: Sequence[Buffer], size: int, *, is_lone: bool = False) -> None:
        """Write one frame; ``size`` is that of ``payload``. Buffers must not be changed afterwards.

        ``is_lone``: the caller expects no other frame within this iteration, so none is waited for."""
        if self._corked:
            collected = self._collected
            collected.append(head)
            if size:
                collected.extend(payload)
            self._collected_bytes += len(head) + size
            if self._collected_bytes > COLLECT_BYTES_MAX:
                self._flush()
            return
        transport = self._transport
        assert transport is not None, "write before the connection was made"
        if not size:
            transport.write(head)
        elif size > JOIN_BYTES_MAX:
            transport.writelines((head, *payload))
        else:
            transport.write(b"".join((head, *payload)))
        if not is_lone:
            self._corked = True
            self._loop.call_soon(self._uncork)

    def _uncork(self) -> None:
        self._corked = False
        self._flush()

    def _flush(self) -> None:
        collected = self._collected
        if not collected:
            return
        transport = self._transport
        size, self._collected_bytes = self._collected_bytes, 0
        self._collected = []
        if transport is None or transport.is_closing():
            return
        if size > JOIN_BYTES_MAX:
            transport.writelines(collected)
        else:
            transport.write(b"".join(collected))

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._wake_drainers()

    async def drain(self) -> None:
        """Wait while more than the high-water mark is buffered. Returns at once on a closed connection."""
        if self._write_paused and not self._closing:
            waiter = self._loop.create_future()
            self._drain_waiters.append(waiter)
            await waiter

    def _wake_drainers(self) -> None:
        waiters, self._drain_waiters = self._drain_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # -- the end ---------------------------------------------------------------------------------------------

    def _start_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self._loop.call_later(seconds, callback)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _shut(self, reason: Exception | None, *, flush: bool) -> None:
        """Begin to close; ``_on_lost`` follows. Without ``flush``, what was not sent yet is dropped."""
        if self._closing:
            return
        self._closing = True
        self._reason = reason
        transport = self._transport
        if transport is None:
            return
        if flush:
            self._flush()
            self._start_timer(self._limits.linger_seconds, transport.abort)
            transport.close()
        else:
            transport.abort()

    def eof_received(self) -> None:
        """The peer has closed. Nobody half-closes here, so what is still to be written has no reader."""
        is_whole = self._parser.is_between_frames
        self._shut(None if is_whole else ConnectionLost("the stream ended inside a frame"), flush=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._cancel_timer()
        self._collected.clear()
        self._collected_bytes = 0
        self._wake_drainers()
        self._on_lost(self._reason or exc)
