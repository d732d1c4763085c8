"""The dialing end of a tunnel; see ``tunnel``."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

from raftlog.errors import ConnectionLost, ProtocolError
from raftlog.net.network import StreamProtocol, seen
from raftlog.net.tunnel import (
    ANSWER_S,
    CALLS_MAX,
    CHUNK_BYTES,
    GONE,
    HOLD_S,
    OPEN,
    Message,
    TunnelEnd,
    as_protocol,
)

Call: TypeAlias = Callable[[bytes], asyncio.Future[bytes]]
"""Makes a call; the future has its answer, or what became of it. It is never cancelled."""

_BUSY_BYTES: Final = CHUNK_BYTES // 2
"""After an answer as long as this, more are on their way: as many calls as allowed wait for them."""


async def dial(
    call: Call, protocol_factory: Callable[[], StreamProtocol], peer: str, *, timeout: float
) -> tuple[asyncio.Transport, StreamProtocol]:
    """Open a connection inside calls, as ``Network.connect`` does on TCP.

    Args:
        call: how messages reach the serving side.
        protocol_factory: makes the protocol.
        peer: who is called, for logs.
        timeout: seconds.

    Raises:
        ConnectionLost: the call failed, was not answered in time, or nobody serves there.
    """
    tunnel = DialedTunnel(call, peer)
    try:
        opened = call(tunnel.opening())
        opened.add_done_callback(seen)
        async with asyncio.timeout(timeout):
            first = Message.decode(await asyncio.shield(opened))
    except TimeoutError:
        raise ConnectionLost(f"{peer} does not answer within {timeout:g} s") from None
    except Exception as error:  # whatever a call fails with, there is no connection
        raise ConnectionLost(f"cannot call {peer}: {_brief(error)}") from error
    if first.flags & GONE:
        raise ConnectionLost(f"{peer} has no broker that serves")
    protocol = as_protocol(protocol_factory())
    tunnel.begin(protocol, first)
    return tunnel, protocol


def _brief(error: BaseException) -> str:
    """What happened, without the remote traceback that comes with it."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


class DialedTunnel(TunnelEnd):
    """The end that calls.

    Args:
        call: how.
        peer: who is called.
    """

    def __init__(self, call: Call, peer: str) -> None:
        super().__init__(uuid.uuid4().bytes, peer)
        self._call = call
        self._peer = peer
        self._under_way: dict[int, float] = {}
        """When each call was made, in that order."""
        self._wanted = 1
        """Calls that wait for what the server may have to say."""
        self._serial = 0
        self._is_gone = False
        self._patience: asyncio.TimerHandle | None = None

    def opening(self) -> bytes:
        """The first message."""
        return self._message(OPEN)

    def begin(self, protocol: StreamProtocol, first: Message) -> None:
        """The tunnel is open."""
        self._patience = self._loop.call_later(HOLD_S, self._look_at_oldest)
        self._begin(protocol)
        self._take_answer(first)

    def _pump(self) -> None:
        if self._is_gone:
            return
        while not self._ended and len(self._under_way) < CALLS_MAX and self._has_to_send():
            self._send()
        while not self._ended and len(self._under_way) < self._wanted:
            self._send()
        if not self._ended and self._closing and not self._unsent_bytes:
            self._send()

    def _send(self) -> None:
        self._serial += 1
        self._under_way[self._serial] = self._loop.time()
        message = self._message()
        try:
            self._call(message).add_done_callback(partial(self._answered, self._serial))
        except Exception as error:  # noqa: BLE001 - whatever a call fails with is the end of the connection
            self._lose(error)

    def _answered(self, serial: int, future: asyncio.Future[bytes]) -> None:
        del self._under_way[serial]
        error = ConnectionLost("cancelled") if future.cancelled() else future.exception()
        if self._ended:
            return
        if error is not None:
            self._lose(error)
            return
        try:
            self._take_answer(Message.decode(future.result()))
        except ProtocolError as wrong:
            self._lose(wrong)

    def _take_answer(self, answer: Message) -> None:
        if answer.flags & GONE or self._is_gone:
            self._is_gone = True
            if not answer.flags & GONE:
                self._receive(answer)
            if not self._under_way:  # the last words of the other end may have been overtaken
                self._lose(ConnectionLost(f"{self._peer} does not know the connection any more"))
            return
        self._wanted = CALLS_MAX if len(answer.data) > _BUSY_BYTES else 1
        self._receive(answer)
        self._pump_soon()

    def _look_at_oldest(self) -> None:
        oldest = next(iter(self._under_way.values()), None)
        if oldest is not None and self._loop.time() - oldest > HOLD_S + ANSWER_S:
            self._lose(ConnectionLost(f"{self._peer} does not answer"))
        else:
            self._patience = self._loop.call_later(ANSWER_S, self._look_at_oldest)

    def _lose(self, error: BaseException) -> None:
        lost = (
            error if isinstance(error, ConnectionLost) else ConnectionLost(f"{self._peer}: {_brief(error)}")
        )
        self._finish(lost)

    def _finish(self, error: Exception | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
        super()._finish(error)
