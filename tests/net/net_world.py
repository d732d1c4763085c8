"""Two or more simulated processes that talk rpc, for the tests of raftlog.net."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any, TypeVar

from raftlog.errors import RaftlogError
from raftlog.net.connection import RpcConnection
from raftlog.net.handshake import Local
from raftlog.net.network import Seams
from raftlog.net.rpc import Produced, ProducePartition, ProduceRequest, ProduceResponse, Request, Struct
from raftlog.net.server import Reply, RpcServer, ServerConnection
from raftlog.net.stream import Limits
from raftlog.testing.loop import SimLoop
from raftlog.testing.network import SimNetwork

T = TypeVar("T")

SECRET = b"the secret of cluster c1........"
PORT = 9092


def produce(partition: int = 0) -> ProduceRequest:
    return ProduceRequest([ProducePartition(b"t" * 16, partition)])


def produced(offset: int) -> ProduceResponse:
    return ProduceResponse([Produced(offset, 0)])


def broker(broker_id: int, incarnation: int = 1) -> Local:
    return Local("c1", "broker", broker_id=broker_id, incarnation=incarnation)


def client(name: str = "app") -> Local:
    return Local("c1", "client", client_id=name)


class Recorder:
    """A handler that notes everything; it answers a request with its partition and its own payload.

    ``held``: replies that are kept back while ``hold`` is set. ``refuse``: raised from ``on_open``.
    """

    def __init__(self) -> None:
        self.opened: list[ServerConnection] = []
        self.closed: list[tuple[ServerConnection, Exception | None]] = []
        self.requests: list[Request[Any]] = []
        self.one_way: list[tuple[Struct, bytes]] = []
        self.hold = False
        self.held: list[Reply] = []
        self.refuse: RaftlogError | None = None
        self.raises: Exception | None = None

    def on_open(self, connection: ServerConnection) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.opened.append(connection)

    def on_request(
        self, connection: ServerConnection, request: Request[Any], payload: memoryview, reply: Reply
    ) -> None:
        self.requests.append(request)
        if self.raises is not None:
            raise self.raises
        if self.hold:
            self.held.append(reply)
        else:
            partition = request.partitions[0].partition if isinstance(request, ProduceRequest) else 0
            reply.ok(produced(partition), (payload,))

    def on_one_way(self, connection: ServerConnection, message: Struct, payload: memoryview) -> None:
        self.one_way.append((message, bytes(payload)))
        if self.raises is not None:
            raise self.raises

    def on_close(self, connection: ServerConnection, error: Exception | None) -> None:
        self.closed.append((connection, error))

    def release(self) -> None:
        held, self.held = self.held, []
        for reply in held:
            reply.ok(produced(0))


class RpcWorld:
    """A server on node "s" (host "hs"), and clients on nodes of any name."""

    def __init__(self, seed: int = 0) -> None:
        self.loop = SimLoop(seed, steps_max=2_000_000)
        self.network = SimNetwork(self.loop, random.Random(seed))
        self.handler = Recorder()

    def __enter__(self) -> RpcWorld:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.close()

    def seams(self, node: str) -> Seams:
        return Seams(
            self.network.for_node(node, f"h{node}"),
            random.Random(node),
            lambda: self.loop.wall_ms(node),
            self.loop.time,
        )

    def run(self, node: str, coro: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(self.loop.run_as(node, coro))

    def serve(
        self,
        *,
        local: Local | None = None,
        secret: bytes = SECRET,
        limits: Limits | None = None,
        node: str = "s",
    ) -> RpcServer:
        server = RpcServer(self.seams(node), local or broker(1), secret, self.handler, limits or Limits())
        self.run(node, server.start(f"h{node}", PORT))
        return server

    def dial(self, local: Local | None = None, node: str = "c", **options: Any) -> RpcConnection:
        secret = options.pop("secret", SECRET)
        to = options.pop("to", "hs")
        return self.run(
            node, RpcConnection.open(self.seams(node), to, PORT, local or client(), secret, **options)
        )

    def dial_raw(self, node: str = "c") -> RawPeer:
        async def connect() -> RawPeer:
            network = self.seams(node).network
            _, protocol = await network.connect(RawPeer, "hs", PORT, timeout=5.0)
            assert isinstance(protocol, RawPeer)
            return protocol

        return self.run(node, connect())

    def until(self, condition: Any, timeout: float = 60.0) -> None:
        self.loop.run_until(condition, timeout)


class RawPeer(asyncio.Protocol):
    """A peer that sends whatever bytes the test likes."""

    def __init__(self) -> None:
        self.received = b""
        self.lost = False
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
