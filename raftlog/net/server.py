"""The accepting side: a server, its connections, and the reply that each request gets.

Everything is synchronous on the loop: a received chunk is cut into frames, each is decoded and handed to the
:class:`Handler`, and no task is made for any of them. Work that takes time keeps the :class:`Reply` and
answers later, in any order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec

from raftlog.errors import (
    ConnectionLost,
    IncompatibleVersion,
    ProtocolError,
    RaftlogError,
    StaleIncarnation,
)
from raftlog.net.catalogue import ONE_WAY, REQUESTS
from raftlog.net.frames import PREFIX_BYTES, Buffer, Frame, Kind, encode_head
from raftlog.net.handshake import HANDSHAKE_VERSION, Handshake, Hello, Local, encode_error
from raftlog.net.network import Listener, Seams
from raftlog.net.rpc import Request, Struct, WireError
from raftlog.net.stream import FrameStream, Limits, logger

_REQUEST_DECODERS: Final = {api: msgspec.msgpack.Decoder(cls) for api, cls in REQUESTS.items()}
_ONE_WAY_DECODERS: Final = {api: msgspec.msgpack.Decoder(cls) for api, cls in ONE_WAY.items()}
_REQUEST: Final = int(Kind.REQUEST)
_ONE_WAY: Final = int(Kind.ONE_WAY)
_RESPONSE: Final = int(Kind.RESPONSE)
_PART: Final = int(Kind.PART)
_ERROR: Final = int(Kind.ERROR)

# Why a connection is not read at the moment (flags).
_OVER_CONNECTION_BUDGET: Final = 1
_OVER_BROKER_BUDGET: Final = 2
_ANSWERS_UNREAD: Final = 4


class Handler(Protocol):
    """What the server serves. All methods are synchronous and called on the loop."""

    def on_open(self, connection: ServerConnection) -> None:
        """The handshake is complete. May raise RaftlogError to refuse the peer (``on_close`` then never
        comes)."""

    def on_request(
        self, connection: ServerConnection, request: Request[Any], payload: memoryview, reply: Reply
    ) -> None:
        """Serve ``request``; answer through ``reply`` now or later. A RaftlogError raised here is the
        answer."""

    def on_one_way(self, connection: ServerConnection, message: Struct, payload: memoryview) -> None:
        """Take a message that has no answer."""

    def on_close(self, connection: ServerConnection, error: Exception | None) -> None:
        """The connection is gone; None: the peer closed it in good order."""


class Reply:
    """The answer to one request: exactly one of ``ok`` and ``fail``, once, after any number of parts. An
    answer to a connection that has closed meanwhile is dropped."""

    __slots__ = ("_api", "_bytes", "_connection", "_correlation")

    def __init__(self, connection: ServerConnection, api: int, correlation: int, size: int) -> None:
        self._connection: ServerConnection | None = connection
        self._api = api
        self._correlation = correlation
        self._bytes = size

    @property
    def connection(self) -> ServerConnection | None:
        """What the request came on; None once it is answered."""
        return self._connection

    @property
    def is_done(self) -> bool:
        """Whether it was given."""
        return self._connection is None

    def ok(self, response: Struct, payload: Sequence[Buffer] = ()) -> None:
        """Answer with ``response`` and the bytes of ``payload``, whose buffers must not change afterwards."""
        self._send(_RESPONSE, response, payload)

    def part(self, response: Struct, size: int) -> None:
        """Give a part of the answer; :meth:`ok` has to follow. So many bytes of the request are done with."""
        connection = self._connection
        assert connection is not None, "a part after the whole"
        assert 0 <= size < self._bytes, "the rest of the request is still to be answered"
        connection._respond(_PART, self._api, self._correlation, response, ())
        self._bytes -= size
        connection._release(size)

    def fail(self, error: RaftlogError) -> None:
        """Answer with an error, which is raised on the other side as the same class."""
        self._send(_ERROR, self.refusal(error), ())

    def refusal(self, error: RaftlogError) -> WireError:
        """An error as it travels, counted among those that were answered."""
        connection = self._connection
        if connection is not None:
            errors, name = connection._server.errors, type(error).__name__
            errors[name] = errors.get(name, 0) + 1
        return encode_error(error)

    def _send(self, kind: int, header: Struct, payload: Sequence[Buffer]) -> None:
        connection = self._connection
        assert connection is not None, "a request was answered twice"
        is_lone = connection.in_flight_bytes == self._bytes
        connection._respond(kind, self._api, self._correlation, header, payload, is_lone=is_lone)
        self._connection = None  # only now: an answer that does not encode was not given
        connection._release(self._bytes)


class ServerConnection(FrameStream):
    """An accepted connection.

    Attributes:
        peer: who dialed; proved by the handshake.
        in_flight_bytes: of requests that have not been answered yet.
        remote: the address it comes from.
        rpc_version: agreed in the handshake.
    """

    __slots__ = (
        "_handler",
        "_handshake",
        "_is_open",
        "_pauses",
        "_serial",
        "_server",
        "in_flight_bytes",
        "peer",
        "remote",
        "rpc_version",
    )

    def __init__(self, server: RpcServer, serial: int) -> None:
        super().__init__(server.limits)
        self._server = server
        self._serial = serial
        self._handler = server.handler
        self._handshake = Handshake(server.local, server.secret, "client", server.seams.random)
        self._is_open = False
        self._pauses = 0
        self.remote = "?"
        self._on_frame = self._on_hello
        self.in_flight_bytes = 0
        self.rpc_version = 0
        self.peer: Hello

    def __hash__(self) -> int:
        return self._serial  # not the address: sets of connections iterate in the same order in every run

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"<ServerConnection {self._serial} {getattr(self, 'peer', None) or self.remote}>"

    @property
    def closed(self) -> bool:
        """Whether it is closed or closing."""
        return self._closing

    def close(self, error: Exception | None = None) -> None:
        """Close at once, dropping what was not sent yet; ``error`` is passed on to ``on_close``."""
        self._shut(error, flush=False)

    # -- handshake -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.remote = str(transport.get_extra_info("peername"))
        waiting = self._server._handshaking
        if len(waiting) >= self._limits.handshakes_max:
            logger.warning("refused %s: %d handshakes under way", self.remote, len(waiting))
            self.close()
            return
        waiting[self] = None
        self._start_timer(self._limits.handshake_seconds, self._on_handshake_timeout)

    def _on_handshake_timeout(self) -> None:
        logger.warning("closed %s: no handshake within %s s", self.remote, self._limits.handshake_seconds)
        self.close(ProtocolError("no handshake in time"))

    def _on_hello(self, frame: Frame) -> None:
        kind, _, version, _, header, _ = frame
        if kind != Kind.HELLO:
            raise ProtocolError(f"expected a hello, got a frame of kind {kind}")
        if version != HANDSHAKE_VERSION:
            self._refuse(
                IncompatibleVersion(f"handshake version {version}; this side speaks {HANDSHAKE_VERSION}")
            )
            return
        self._handshake.receive_hello(header)
        self._on_frame = self._on_proof
        self._write(encode_head(Kind.CHALLENGE, 0, HANDSHAKE_VERSION, 0, self._handshake.hello), (), 0)

    def _on_proof(self, frame: Frame) -> None:
        if frame[0] != Kind.PROOF:
            raise ProtocolError(f"expected a proof, got a frame of kind {frame[0]}")
        handshake = self._handshake
        peer = handshake.peer
        assert peer is not None, "a proof before a hello"
        try:
            handshake.verify(frame[4], dialer=True)
            handshake.agree()
            if peer.role == "broker":
                self._server.note_incarnation(peer.broker_id, peer.incarnation)
            self.peer = peer
            self.rpc_version = handshake.version
            self._handler.on_open(self)
        except ProtocolError:
            raise
        except RaftlogError as error:
            self._refuse(error)
            return
        self._server._opened(self)
        self._is_open = True
        self._on_frame = self._on_message
        self._handshake_done()
        self._write(encode_head(Kind.WELCOME, 0, HANDSHAKE_VERSION, 0, handshake.proof(dialer=False)), (), 0)

    def _refuse(self, error: RaftlogError) -> None:
        peer = self._handshake.peer
        logger.warning("refused %s from %s: %s", peer or "a peer", self.remote, error)
        self._write(encode_head(Kind.REFUSED, 0, HANDSHAKE_VERSION, 0, encode_error(error)), (), 0)
        self._shut(error, flush=True)

    # -- messages --------------------------------------------------------------------------------------------

    def _on_message(self, frame: Frame) -> None:
        kind, api, version, correlation, header, payload = frame
        if version != self.rpc_version:
            raise ProtocolError(f"frame of rpc version {version}; {self.rpc_version} was agreed")
        if kind == _REQUEST:
            self._on_request(api, correlation, header, payload)
        elif kind == _ONE_WAY:
            self._on_one_way(api, header, payload)
        else:
            raise ProtocolError(f"a frame of kind {kind} from the dialing side")

    def _on_request(self, api: int, correlation: int, header: memoryview, payload: memoryview) -> None:
        decoder = _REQUEST_DECODERS.get(api)
        if decoder is None:
            software = self._handshake.hello.software
            error = IncompatibleVersion(f"no rpc has number {api} in raftlog {software}")
            self._respond(_ERROR, api, correlation, encode_error(error), ())
            return
        try:
            request = decoder.decode(header)
        except (msgspec.DecodeError, ValueError) as cause:
            raise ProtocolError(f"request of rpc {api} that does not decode: {cause}") from cause
        size = PREFIX_BYTES + len(header) + len(payload)
        self.in_flight_bytes += size
        self._server.in_flight_bytes += size
        reply = Reply(self, api, correlation, size)
        try:
            self._handler.on_request(self, request, payload, reply)
        except RaftlogError as refusal:
            if reply.is_done:
                self._report("on_request", refusal)
            else:
                reply.fail(refusal)
        except Exception as bug:  # noqa: BLE001 - a bug must not take the connection down
            self._report("on_request", bug)
            if not reply.is_done:
                reply.fail(RaftlogError(f"internal error of the broker: {bug!r}"))

    def _on_one_way(self, api: int, header: memoryview, payload: memoryview) -> None:
        try:
            message = _ONE_WAY_DECODERS[api].decode(header)
        except (msgspec.DecodeError, KeyError, ValueError) as cause:
            raise ProtocolError(f"one-way message {api} that does not decode: {cause}") from cause
        try:
            self._handler.on_one_way(self, message, payload)
        except Exception as bug:  # noqa: BLE001 - one message must not take the connection down
            self._report("on_one_way", bug)

    def _report(self, where: str, error: Exception) -> None:
        """Log an error of the handler. Through the loop, so that a simulation sees it too."""
        message = f"error in the handler's {where} for {self!r}"
        self._loop.call_exception_handler({"message": message, "exception": error, "protocol": self})

    def _respond(
        self,
        kind: int,
        api: int,
        correlation: int,
        header: Struct,
        payload: Sequence[Buffer],
        *,
        is_lone: bool = False,
    ) -> None:
        if self._closing:
            return
        size = sum(map(len, payload)) if payload else 0
        head = encode_head(kind, api, self.rpc_version, correlation, header, size)
        self._write(head, payload, size, is_lone=is_lone)

    def _on_batch_end(self) -> None:
        if self._is_open:
            self._check_budgets()

    # -- budgets ---------------------------------------------------------------------------------------------

    def _check_budgets(self) -> None:
        if self.in_flight_bytes > self._limits.connection_bytes:
            self._pause(_OVER_CONNECTION_BUDGET)
        server = self._server
        if server.in_flight_bytes > self._limits.broker_bytes and self.in_flight_bytes:
            server._over_budget[self] = None
            self._pause(_OVER_BROKER_BUDGET)

    def _release(self, size: int) -> None:
        """A request was answered (also after the connection closed: until then its bytes were held)."""
        self.in_flight_bytes -= size
        server = self._server
        server.in_flight_bytes -= size
        if (
            self._pauses & _OVER_CONNECTION_BUDGET
            and 2 * self.in_flight_bytes <= self._limits.connection_bytes
        ):
            self._resume(_OVER_CONNECTION_BUDGET)
        if server._over_budget and 2 * server.in_flight_bytes <= self._limits.broker_bytes:
            server._resume_all()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._pause(_ANSWERS_UNREAD)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._resume(_ANSWERS_UNREAD)

    def _pause(self, why: int) -> None:
        if self._closing or not self._is_open or self.peer.role == "broker":
            return
        assert self._transport is not None
        if not self._pauses:
            self._transport.pause_reading()
        self._pauses |= why

    def _resume(self, why: int) -> None:
        if not self._pauses & why:
            return
        self._pauses &= ~why
        if not self._pauses and not self._closing:
            assert self._transport is not None
            self._transport.resume_reading()

    # -- the end ---------------------------------------------------------------------------------------------

    def _on_garbage(self, error: ProtocolError) -> None:
        logger.warning("closed %r from %s: %s", self, self.remote, error)
        self.close(error)

    def _on_lost(self, error: Exception | None) -> None:
        self._server._lost(self)
        if self._is_open:
            self._is_open = False
            self._handler.on_close(self, error)


class RpcServer:
    """Accepts connections, shakes hands and serves rpcs to a handler.

    Args:
        seams: network and randomness.
        local: who we are; ``address`` is filled in by ``start``.
        secret: the cluster's.
        handler: serves the requests.
        limits: on what peers can make us hold.

    Attributes:
        connections: those whose handshake is complete.
        in_flight_bytes: of unanswered requests on all connections.
        errors: how many requests were answered with an error, by the name of its class.
    """

    def __init__(
        self,
        seams: Seams,
        local: Local,
        secret: bytes,
        handler: Handler,
        limits: Limits = Limits(),  # noqa: B008 - frozen
    ) -> None:
        self.seams = seams
        self.local = local
        self.secret = secret
        self.handler = handler
        self.limits = limits
        self.connections: set[ServerConnection] = set()
        self.in_flight_bytes = 0
        self.errors: dict[str, int] = {}
        self._listener: Listener | None = None
        self._serial = 0
        self._handshaking: dict[ServerConnection, None] = {}
        self._over_budget: dict[ServerConnection, None] = {}
        self._incarnations: dict[int, int] = {}
        self._all_lost: asyncio.Future[None] | None = None

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen on (host, port), port 0 for a free one; returns the address and puts it into ``local``.

        Raises:
            OSError: the address is in use or not of this machine.
        """
        self._listener = await self.seams.network.listen(self.accept, host, port)
        address = self._listener.address
        self.local = msgspec.structs.replace(self.local, address=address)
        return address

    def accept(self) -> ServerConnection:
        """The protocol of a new connection, whatever brings its bytes."""
        self._serial += 1
        return ServerConnection(self, self._serial)

    def note_incarnation(self, broker_id: int, incarnation: int) -> None:
        """Learn that this incarnation of a broker exists: connections of older ones are closed, and refused
        from now on.

        Raises:
            StaleIncarnation: a newer one is known.
        """
        newest = self._incarnations.get(broker_id, incarnation)
        if incarnation < newest:
            raise StaleIncarnation(
                f"broker {broker_id} has a newer process (incarnation {newest}, this is {incarnation})",
                broker_id=broker_id,
                incarnation=incarnation,
                newest=newest,
            )
        if self._incarnations.get(broker_id) == incarnation:
            return
        self._incarnations[broker_id] = incarnation
        for connection in list(self.connections):
            peer = connection.peer
            if peer.role == "broker" and peer.broker_id == broker_id and peer.incarnation < incarnation:
                logger.warning("closed %s: incarnation %d has connected", peer, incarnation)
                connection.close(StaleIncarnation(f"{peer} was replaced by incarnation {incarnation}"))

    def _opened(self, connection: ServerConnection) -> None:
        self._handshaking.pop(connection, None)
        self.connections.add(connection)

    def _lost(self, connection: ServerConnection) -> None:
        self._handshaking.pop(connection, None)
        self._over_budget.pop(connection, None)
        self.connections.discard(connection)
        if self._all_lost is not None and not self.connections and not self._handshaking:
            self._all_lost.set_result(None)
            self._all_lost = None

    def _resume_all(self) -> None:
        paused, self._over_budget = self._over_budget, {}
        for connection in paused:
            connection._resume(_OVER_BROKER_BUDGET)

    async def close(self) -> None:
        """Stop listening and close all connections; returns when each ``on_close`` has been called."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for connection in (*self.connections, *self._handshaking):
            connection.close(ConnectionLost("the server closed"))
        if self.connections or self._handshaking:
            self._all_lost = asyncio.get_running_loop().create_future()
            await self._all_lost
