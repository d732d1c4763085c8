"""The serving ends of tunnels; see ``tunnel``."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from raftlog.errors import Busy, ProtocolError
from raftlog.net.frames import Kind, encode_head
from raftlog.net.handshake import HANDSHAKE_VERSION, encode_error
from raftlog.net.network import StreamProtocol
from raftlog.net.stream import logger
from raftlog.net.tunnel import (
    ANSWER_S,
    END,
    GONE,
    HELD_MAX,
    HOLD_S,
    OPEN,
    TUNNELS_MAX,
    Message,
    TunnelEnd,
    as_protocol,
)

SILENT_S: Final = HOLD_S + ANSWER_S
"""A client always has a call under way: one that has none for so long is gone."""


class Tunnels:
    """All tunnels that lead to one server.

    Args:
        accept: makes the protocol of a new connection.
    """

    def __init__(self, accept: Callable[[], StreamProtocol]) -> None:
        self._accept = accept
        self._open: dict[bytes, ServedTunnel] = {}

    def __len__(self) -> int:
        return len(self._open)

    def exchange(self, encoded: bytes) -> asyncio.Future[bytes]:
        """What comes of a call: its answer, at once or within HOLD_S.

        Raises:
            ProtocolError: that is no message of a tunnel.
        """
        message = Message.decode(encoded)
        tunnel = self._open.get(message.tunnel)
        if tunnel is not None:
            return tunnel.exchange(message)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if not message.flags & OPEN:
            answer.set_result(Message(message.tunnel, 0, 0, GONE, b"").encode())
        elif len(self._open) >= TUNNELS_MAX:
            answer.set_result(_refusal(message.tunnel))
        else:
            tunnel = self._open[message.tunnel] = ServedTunnel(message.tunnel, self._gone)
            return tunnel.open(as_protocol(self._accept()), message)
        return answer

    def _gone(self, tunnel: bytes) -> None:
        self._open.pop(tunnel, None)


def _refusal(tunnel: bytes) -> bytes:
    """To the client it is what its handshake came to."""
    logger.warning("refused a connection: %d tunnels are open", TUNNELS_MAX)
    error = Busy(f"the broker has {TUNNELS_MAX} clients that call its actor already")
    head = encode_head(Kind.REFUSED, 0, HANDSHAKE_VERSION, 0, encode_error(error))
    return Message(tunnel, 0, 0, END, head).encode()


class ServedTunnel(TunnelEnd):
    """The end that is called.

    Args:
        tunnel: its id.
        gone: told of its end.
    """

    def __init__(self, tunnel: bytes, gone: Callable[[bytes], None]) -> None:
        super().__init__(tunnel, "a call of the actor")
        self._gone = gone
        self._held: deque[tuple[asyncio.Future[bytes], asyncio.TimerHandle]] = deque()
        self._called_at = self._loop.time()
        self._aborted = False
        self._silence = self._loop.call_later(SILENT_S, self._look_for_calls)

    def open(self, protocol: StreamProtocol, message: Message) -> asyncio.Future[bytes]:
        """Begin; the answer is given at once."""
        self._begin(protocol)
        answer = self.exchange(message)
        if self._held:
            self._answer()
        return answer

    def exchange(self, message: Message) -> asyncio.Future[bytes]:
        """Take a message, and hold the call until there is an answer."""
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._called_at = self._loop.time()
        timer = self._loop.call_later(HOLD_S, self._held_long_enough, answer)
        self._held.append((answer, timer))
        try:
            self._receive(message)
        except ProtocolError as error:
            logger.warning("closed a tunnel: %s", error)
            self._finish(error)
        self._pump_soon()
        return answer

    def abort(self) -> None:
        self._aborted = True
        super().abort()

    def _pump(self) -> None:
        while self._held and not self._ended and (self._has_to_send() or len(self._held) > HELD_MAX):
            self._answer()
        if self._aborted:
            self._finish(None)

    def _answer(self) -> None:
        answer, timer = self._held.popleft()
        timer.cancel()
        encoded = self._message()
        if not answer.done():  # its caller may be gone
            answer.set_result(encoded)

    def _held_long_enough(self, answer: asyncio.Future[bytes]) -> None:
        """The oldest one, as all are held as long."""
        if self._held and self._held[0][0] is answer:
            self._answer()

    def _look_for_calls(self) -> None:
        if not self._held and self._loop.time() - self._called_at >= SILENT_S:
            self.abort()
        else:
            self._silence = self._loop.call_later(SILENT_S, self._look_for_calls)

    def _finish(self, error: Exception | None) -> None:
        if self._ended:
            return
        super()._finish(error)
        self._silence.cancel()
        self._gone(self._tunnel)
        while self._held:
            answer, timer = self._held.popleft()
            timer.cancel()
            if not answer.done():
                answer.set_result(Message(self._tunnel, 0, 0, GONE, b"").encode())
