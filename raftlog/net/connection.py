"""The dialing side: one connection to a server, with any number of requests in flight on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import msgspec

from raftlog.errors import ConfigError, ConnectionLost, ProtocolError, RaftlogError, RequestTimeout
from raftlog.net.catalogue import REQUESTS
from raftlog.net.frames import Buffer, Frame, Kind, encode_head
from raftlog.net.handshake import HANDSHAKE_VERSION, Handshake, Hello, Local, decode_error
from raftlog.net.network import Seams
from raftlog.net.rpc import OneWay, Request
from raftlog.net.stream import FrameStream, Limits, logger

R = TypeVar("R", bound=msgspec.Struct)
Answered = Callable[[R | None, memoryview | None, RaftlogError | None], None]
"""Told the response and the payload that came with it, or the error."""

_RESPONSE_DECODERS: Final = {api: msgspec.msgpack.Decoder(cls.response) for api, cls in REQUESTS.items()}
_REQUEST: Final = int(Kind.REQUEST)
_RESPONSE: Final = int(Kind.RESPONSE)
_ONE_WAY: Final = int(Kind.ONE_WAY)
_PART: Final = int(Kind.PART)
_CORRELATION_MAX: Final = 2**32 - 1
_DEFAULT_LIMITS: Final = Limits()


class RpcConnection(FrameStream):
    """A connection that we dialed; made by :meth:`open`.

    Attributes:
        peer: the server, proved by the handshake.
        rpc_version: agreed in the handshake.
    """

    __slots__ = (
        "_address",
        "_correlation",
        "_handshake",
        "_is_open",
        "_on_close",
        "_pending",
        "_ready",
        "peer",
        "rpc_version",
    )

    def __init__(
        self,
        handshake: Handshake,
        address: str,
        on_close: Callable[[RpcConnection, Exception | None], None] | None,
        limits: Limits,
    ) -> None:
        super().__init__(limits)
        self._handshake = handshake
        self._address = address
        self._on_close = on_close
        self._on_frame = self._on_challenge
        self._is_open = False
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._pending: dict[int, Answered[Any]] = {}
        self._correlation = 0
        self.rpc_version = 0
        self.peer: Hello

    @classmethod
    async def open(
        cls,
        seams: Seams,
        host: str,
        port: int,
        local: Local,
        secret: bytes,
        *,
        purpose: str = "client",
        timeout: float = 5.0,
        on_close: Callable[[RpcConnection, Exception | None], None] | None = None,
        limits: Limits = _DEFAULT_LIMITS,
    ) -> RpcConnection:
        """Connect and shake hands.

        Args:
            seams: network and randomness. host: of the server. port: of the server. local: who we are.
            secret: the cluster's. purpose: "control", "bulk" or "client". timeout: seconds for connecting and
            the handshake together. on_close: called once when the open connection is gone, with the error, or
            None when either side closed
                it in good order.
            limits: on what the server can make us hold.

        Raises:
            ConnectionLost: refused, unreachable, broken, or no answer in time.
            AuthenticationFailed: one side does not know the secret, or belongs to another cluster.
            IncompatibleVersion: no common rpc version.
            StaleIncarnation: we are a broker that a newer process has replaced.
            RaftlogError: whatever else the server refused us with.
        """
        address = f"{host}:{port}"
        handshake = Handshake(local, secret, purpose, seams.random)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        _, connection = await seams.network.connect(
            lambda: cls(handshake, address, on_close, limits), host, port, timeout=timeout
        )
        assert isinstance(connection, cls)
        try:
            async with asyncio.timeout_at(deadline):
                await connection._ready
        except BaseException as error:  # also cancelled: nobody will close it
            # Also when the handshake ended just now: the caller will never see this connection.
            connection._on_close = None
            connection._shut(None, flush=False)
            if type(error) is TimeoutError:
                raise ConnectionLost(f"no handshake from {address} within {timeout} s") from None
            raise
        return connection

    @property
    def closed(self) -> bool:
        """Whether it is closed or closing."""
        return self._closing

    def __repr__(self) -> str:
        return f"<RpcConnection to {getattr(self, 'peer', None) or '?'} at {self._address}>"

    # -- handshake -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        head = encode_head(Kind.HELLO, 0, HANDSHAKE_VERSION, 0, self._handshake.hello)
        if 2 * len(head) > self._limits.handshake_bytes:
            self._fail_open(ConfigError(f"a hello of {len(head)} bytes is too long: shorten client_id"))
            return
        self._write(head, (), 0)

    def _on_challenge(self, frame: Frame) -> None:
        if not self._is_expected(frame, Kind.CHALLENGE):
            return
        self._handshake.receive_hello(frame[4])
        self._on_frame = self._on_welcome
        proof = self._handshake.proof(dialer=True)
        self._write(encode_head(Kind.PROOF, 0, HANDSHAKE_VERSION, 0, proof), (), 0)

    def _on_welcome(self, frame: Frame) -> None:
        if not self._is_expected(frame, Kind.WELCOME):
            return
        handshake = self._handshake
        try:
            handshake.verify(frame[4], dialer=False)
            handshake.agree()
        except ProtocolError:
            raise
        except RaftlogError as error:
            self._fail_open(error)
            return
        assert handshake.peer is not None, "a welcome before a challenge"
        self.peer = handshake.peer
        self.rpc_version = handshake.version
        self._is_open = True
        self._on_frame = self._on_message
        self._handshake_done()
        if not self._ready.done():
            self._ready.set_result(None)

    def _is_expected(self, frame: Frame, kind: Kind) -> bool:
        if frame[0] == Kind.REFUSED:
            self._fail_open(decode_error(frame[4]))
            return False
        if frame[0] != kind:
            raise ProtocolError(f"expected {kind.name}, got a frame of kind {frame[0]}")
        return True

    def _fail_open(self, error: RaftlogError) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)
        self._shut(error, flush=False)

    # -- requests --------------------------------------------------------------------------------------------

    def request(
        self, request: Request[R], payload: Sequence[Buffer] = ()
    ) -> asyncio.Future[tuple[R, memoryview]]:
        """Send a request; the future gives its response and the payload that came with it.

        The future fails with the typed error that the server answered, or with ConnectionLost:
        ``indeterminate`` when the request may have been carried out (it was sent and the connection broke
        before an answer).

        Args:
            request: the header.
            payload: raw bytes that follow it; the buffers must not change afterwards.
        """
        future: asyncio.Future[tuple[R, memoryview]] = self._loop.create_future()
        self.ask(request, payload, partial(_settle, future))
        return future

    def ask(self, request: Request[R], payload: Sequence[Buffer], answered: Answered[R]) -> None:
        """As :meth:`request`, without a future: ``answered`` is called as soon as the answer is read, or with
        why there will be none, but never before this returns. It is called for each
        part of an answer that comes in parts. It must not raise."""
        if self._closing:
            self._loop.call_soon(answered, None, None, self._lost_error(sent=False))
            return
        correlation = self._correlation = (self._correlation + 1) & _CORRELATION_MAX
        assert correlation not in self._pending, "more than 2^32 requests in flight"
        size = sum(map(len, payload)) if payload else 0
        head = encode_head(_REQUEST, request.api, self.rpc_version, correlation, request, size)
        is_lone = not self._pending
        self._pending[correlation] = answered
        self._write(head, payload, size, is_lone=is_lone)

    async def call(
        self, request: Request[R], payload: Sequence[Buffer] = (), *, timeout: float
    ) -> tuple[R, memoryview]:
        """:meth:`request`, waiting at most ``timeout`` seconds for the answer.

        Raises:
            RequestTimeout: no answer in time.
            ConnectionLost: see :meth:`request`.
            RaftlogError: what the server answered.
        """
        future = self.request(request, payload)
        timer = self._loop.call_later(timeout, self._expire, future, type(request).__name__, timeout)
        try:
            return await future
        finally:
            timer.cancel()

    def _expire(self, future: asyncio.Future[Any], what: str, timeout: float) -> None:
        if not future.done():
            future.set_exception(
                RequestTimeout(f"no answer to {what} from {self._address} within {timeout} s")
            )

    def send(self, message: OneWay, payload: Sequence[Buffer] = (), *, is_lone: bool = False) -> None:
        """Send a one-way message (one of ``catalogue.ONE_WAY``); ``is_lone``: no other is about to follow.

        Raises:
            ConnectionLost: the connection is closed; nothing was sent.
        """
        if self._closing:
            raise self._lost_error(sent=False)
        size = sum(map(len, payload)) if payload else 0
        head = encode_head(_ONE_WAY, message.api, self.rpc_version, 0, message, size)
        self._write(head, payload, size, is_lone=is_lone)

    def _on_message(self, frame: Frame) -> None:
        kind, api, _, correlation, header, payload = frame
        answered = self._pending.get(correlation)
        if answered is None:
            raise ProtocolError(f"answer to request {correlation}, which was not asked")
        if kind in (_RESPONSE, _PART):
            try:
                response = _RESPONSE_DECODERS[api].decode(header)
            except (msgspec.DecodeError, KeyError, ValueError) as cause:
                raise ProtocolError(f"response of rpc {api} that does not decode: {cause}") from cause
            if kind == _RESPONSE:
                del self._pending[correlation]
            answered(response, payload, None)
        elif kind == Kind.ERROR:
            error = decode_error(header)
            del self._pending[correlation]
            answered(None, None, error)
        else:
            raise ProtocolError(f"a frame of kind {kind} from the accepting side")

    # -- the end ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close after sending what was written. Requests in flight fail as ConnectionLost."""
        self._shut(None, flush=True)
        self._fail_pending()

    def _lost_error(self, *, sent: bool) -> ConnectionLost:
        reason = f": {self._reason}" if self._reason is not None else ""
        return ConnectionLost(f"connection to {self._address} is closed{reason}", indeterminate=sent)

    def _fail_pending(self) -> None:
        pending, self._pending = self._pending, {}
        for answered in pending.values():
            self._loop.call_soon(answered, None, None, self._lost_error(sent=True))

    def _on_garbage(self, error: ProtocolError) -> None:
        logger.warning("closed %r: %s", self, error)
        self._fail_open(error) if not self._is_open else self._shut(error, flush=False)

    def _on_lost(self, error: Exception | None) -> None:
        self._reason = error
        self._fail_pending()
        if not self._is_open:
            if not self._ready.done():
                self._ready.set_exception(
                    ConnectionLost(f"{self._address} closed the connection during the handshake")
                )
            return
        self._is_open = False
        if self._on_close is not None:
            self._on_close(self, error)


def _settle(
    future: asyncio.Future[Any], response: Any, payload: memoryview | None, error: RaftlogError | None
) -> None:
    if future.done():
        return
    if error is None:
        future.set_result((response, payload))
    else:
        future.set_exception(error)
