"""Connections inside calls: what is above them cannot tell them from streams."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from net_world import SECRET, RpcWorld, broker, client, produce

from raftlog.client.transports import ChosenNetwork
from raftlog.errors import AuthenticationFailed, Busy, ConnectionLost, ProtocolError
from raftlog.net import tunnel_serve
from raftlog.net.connection import RpcConnection
from raftlog.net.network import Network, StreamProtocol
from raftlog.net.server import RpcServer
from raftlog.net.stream import Limits
from raftlog.net.tunnel import CALLS_MAX, CHUNK_BYTES, HELD_MAX, HOLD_S, WINDOW_BYTES, Message
from raftlog.net.tunnel_dial import dial
from raftlog.net.tunnel_serve import SILENT_S, Tunnels


class Calls:
    """Carries calls to a server: late, in any order, never twice. A Network for who dials."""

    def __init__(self, tunnels: Tunnels, rng: random.Random) -> None:
        self.tunnels = tunnels
        self.rng = rng
        self.made = 0
        self.under_way = 0
        self.most = 0
        self.down = False
        self.silent = False
        self.tasks: set[asyncio.Task[None]] = set()

    def call(self, message: bytes) -> asyncio.Future[bytes]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()
        task = loop.create_task(self._carry(message, answer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return answer

    async def _carry(self, message: bytes, answer: asyncio.Future[bytes]) -> None:
        self.made += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(self.rng.uniform(0.0005, 0.003))
        try:
            if self.down:
                raise ConnectionRefusedError("the actor died")
            said = await self.tunnels.exchange(message)
            await asyncio.sleep(self.rng.uniform(0.0005, 0.003))
        except ConnectionError as error:
            answer.set_exception(error)
        else:
            if not self.silent:
                answer.set_result(said)
        self.under_way -= 1

    async def connect(
        self, protocol_factory: Callable[[], StreamProtocol], host: str, port: int, *, timeout: float
    ) -> Any:
        return await dial(self.call, protocol_factory, "the server", timeout=timeout)

    async def addresses(self) -> list[tuple[str, int]]:
        return [] if self.down else [("hs", 1), ("hs", 2)]

    async def listen(self, *_: object) -> Any:
        raise AssertionError("clients do not listen")


class TunnelWorld(RpcWorld):
    """A server and those who call it."""

    def __init__(self, seed: int = 0, limits: Limits | None = None) -> None:
        super().__init__(seed)
        self.server = RpcServer(self.seams("s"), broker(1), SECRET, self.handler, limits or Limits())
        self.tunnels = Tunnels(self.server.accept)
        self.calls = Calls(self.tunnels, random.Random(seed))

    def open(self, **options: Any) -> RpcConnection:
        return self.run("s", self.opening(**options))

    async def opening(self, network: Network | None = None, **options: Any) -> RpcConnection:
        seams = replace(self.seams("s"), network=network or self.calls)
        secret = options.pop("secret", SECRET)
        return await RpcConnection.open(seams, "hs", 1, client(), secret, **options)

    def sleep(self, seconds: float) -> None:
        self.run("s", asyncio.sleep(seconds))


@pytest.fixture
def world() -> Iterator[TunnelWorld]:
    with TunnelWorld() as world:
        yield world


def test_a_request_and_its_answer_cost_one_call(world: TunnelWorld) -> None:
    connection = world.open()
    assert connection.peer.broker_id == 1
    assert world.handler.opened[0].peer.client_id == "app"
    before = world.calls.made
    for number in range(50):
        response, payload = world.run("s", connection.call(produce(number), (b"data",), timeout=5.0))
        assert (response.batches[0].base_offset, payload) == (number, b"data")
    assert world.calls.made - before <= 51


def test_idle_costs_one_call_per_hold(world: TunnelWorld) -> None:
    connection = world.open()
    before = world.calls.made
    world.sleep(20 * HOLD_S)
    assert 19 <= world.calls.made - before <= 21
    assert not connection.closed
    assert world.calls.under_way == 1


@pytest.mark.parametrize("seed", range(10))
def test_everything_arrives_once_and_in_order(seed: int) -> None:
    with TunnelWorld(seed, Limits(connection_bytes=200_000, write_buffer_bytes=50_000)) as world:
        rng = random.Random(seed)

        async def call(number: int) -> None:
            size = rng.choice((0, 4, 4_000, 400_000))
            data = number.to_bytes(4, "big") * (size // 4)
            response, payload = await connection.call(produce(number), (data,), timeout=60.0)
            assert (response.batches[0].base_offset, payload) == (number, data)

        async def work() -> None:
            for _ in range(10):
                await asyncio.gather(*(call(rng.getrandbits(31)) for _ in range(rng.randint(1, 20))))
                await asyncio.sleep(rng.choice((0.0, 0.01, 30.0)))

        connection = world.open()
        world.run("s", work())
        assert world.calls.most <= CALLS_MAX


def test_large_payloads_pass_both_ways(world: TunnelWorld) -> None:
    connection = world.open()
    data = random.Random(1).randbytes(30_000_000)
    _, payload = world.run("s", connection.call(produce(), (data,), timeout=60.0))
    assert payload == data


def test_a_long_poll_holds_two_calls_at_most(world: TunnelWorld) -> None:
    connection = world.open()
    world.handler.hold = True
    waiting = [world.run("s", _asked(connection, number)) for number in range(20)]
    world.sleep(3 * HOLD_S)
    assert world.calls.under_way <= HELD_MAX
    world.handler.release()
    world.until(lambda: all(one.done() for one in waiting))
    assert world.calls.most <= CALLS_MAX


async def _asked(connection: RpcConnection, number: int) -> asyncio.Future[Any]:
    future: asyncio.Future[Any] = connection.request(produce(number))
    future.add_done_callback(asyncio.Future.exception)  # some of them, nobody looks at
    return future


def test_who_does_not_know_the_secret_is_refused(world: TunnelWorld) -> None:
    with pytest.raises(AuthenticationFailed):
        world.open(secret=b"guess")
    world.sleep(1.0)
    assert not world.tunnels._open
    assert world.open()


def test_a_call_that_fails_is_a_broken_connection(world: TunnelWorld) -> None:
    lost: list[Exception | None] = []
    connection = world.open(on_close=lambda _, error: lost.append(error))
    world.handler.hold = True
    waiting = world.run("s", _asked(connection, 1))
    world.until(lambda: world.handler.requests)
    world.calls.down = True
    world.run("s", _asked(connection, 2))
    world.until(waiting.done)
    error: Any = waiting.exception()
    assert isinstance(error, ConnectionLost)
    assert error.indeterminate, "it was sent"
    assert len(lost) == 1
    assert connection.closed
    with pytest.raises(ConnectionLost, match="the actor died"):
        world.open()
    world.calls.down = False
    assert world.open()


def test_a_server_that_answers_no_call_is_lost(world: TunnelWorld) -> None:
    connection = world.open()
    world.calls.silent = True
    world.sleep(HOLD_S * 3)
    assert connection.closed
    with pytest.raises(ConnectionLost, match="within 1 s"):
        world.open(timeout=1.0)


def test_a_client_that_does_not_call_any_more_is_lost(world: TunnelWorld) -> None:
    world.open()
    world.calls.down = True
    world.sleep(HOLD_S + 3 * SILENT_S)
    assert len(world.handler.closed) == 1
    assert not world.tunnels._open


def test_a_restarted_server_does_not_know_the_connection(world: TunnelWorld) -> None:
    connection = world.open()
    world.calls.tunnels = Tunnels(world.server.accept)
    world.run("s", _asked(connection, 1))
    world.until(lambda: connection.closed)
    with pytest.raises(ConnectionLost, match="does not know the connection"):
        world.run("s", connection.call(produce(), timeout=1.0))


def test_both_sides_may_close(world: TunnelWorld) -> None:
    connection = world.open()
    connection.send(_one_way())
    connection.close()
    world.sleep(1.0)
    assert world.handler.one_way, "what was written goes first"
    assert world.handler.closed[0][1] is None
    assert world.calls.under_way == 0
    lost: list[Exception | None] = []
    world.open(on_close=lambda _, error: lost.append(error))
    world.run("s", world.server.close())
    world.sleep(1.0)
    assert len(lost) == 1
    assert world.calls.under_way == 0
    assert not world.tunnels._open


def _one_way() -> Any:
    from raftlog.net.rpc import RaftMessages

    return RaftMessages([1], [])


def test_beyond_the_limit_of_clients_is_busy(world: TunnelWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel_serve, "TUNNELS_MAX", 3)
    connections = [world.open() for _ in range(3)]
    with pytest.raises(Busy, match="3 clients"):
        world.open()
    connections[0].close()
    world.sleep(1.0)
    assert world.open()


@pytest.mark.parametrize("kind", ["short", "number", "read", "window"])
def test_who_breaks_the_rules_is_cut_off(world: TunnelWorld, kind: str) -> None:
    connection = world.open()
    (name,) = world.tunnels._open
    if kind == "short":
        with pytest.raises(ProtocolError):
            world.run("s", _exchange(world, b"x"))
        return
    good = world.run("s", _number(world, name))
    if kind == "window":
        world.handler.opened[0]._transport.pause_reading()  # type: ignore[union-attr]
        for step in range(WINDOW_BYTES // CHUNK_BYTES + 2):
            world.run("s", _send(world, Message(name, good + step, 0, 0, bytes(CHUNK_BYTES))))
    else:
        number, read = {"number": (good + 99, 0), "read": (good, 2**40)}[kind]
        world.run("s", _send(world, Message(name, number, read, 0, b"")))
    world.sleep(1.0)
    assert not world.tunnels._open
    assert len(world.handler.closed) == 1
    world.until(lambda: connection.closed)
    assert world.open()


async def _number(world: TunnelWorld, name: bytes) -> int:
    return world.tunnels._open[name]._expected


async def _send(world: TunnelWorld, message: Message) -> None:
    world.tunnels.exchange(message.encode())


async def _exchange(world: TunnelWorld, encoded: bytes) -> bytes:
    return await world.tunnels.exchange(encoded)


# -- which way -----------------------------------------------------------------------------------------------


class Streams:
    """Ports that answer, or not."""

    def __init__(self, calls: Calls, open_ports: set[int]) -> None:
        self.calls = calls
        self.open_ports = open_ports
        self.dialed: list[int] = []

    async def connect(
        self, protocol_factory: Callable[[], StreamProtocol], host: str, port: int, *, timeout: float
    ) -> Any:
        self.dialed.append(port)
        if port in self.open_ports:
            return await self.calls.connect(protocol_factory, host, port, timeout=timeout)
        await asyncio.sleep(timeout)
        raise ConnectionLost(f"cannot connect to {host}:{port}")

    async def listen(self, *_: object) -> Any:
        raise AssertionError("clients do not listen")


def chosen(world: TunnelWorld, wanted: str, *open_ports: int) -> tuple[ChosenNetwork, Streams]:
    streams = Streams(world.calls, set(open_ports))
    return ChosenNetwork(wanted, "c1", streams, world.calls), streams


def test_auto_takes_streams_where_a_port_answers(
    world: TunnelWorld, caplog: pytest.LogCaptureFixture
) -> None:
    network, streams = chosen(world, "auto", 1)
    with caplog.at_level("INFO"):
        world.run("s", world.opening(network))
    assert network.transport == "streams"
    assert "reached over transport='streams'" in caplog.text
    streams.open_ports.clear()
    with pytest.raises(ConnectionLost):
        world.run("s", world.opening(network))
    assert network.transport == "streams", "a broker that died is no reason"


def test_auto_stays_with_streams_where_another_port_answers(world: TunnelWorld) -> None:
    network, _ = chosen(world, "auto", 2)
    with pytest.raises(ConnectionLost):
        world.run("s", world.opening(network))
    assert network.transport == "streams"


def test_auto_takes_actors_where_no_port_answers(
    world: TunnelWorld, caplog: pytest.LogCaptureFixture
) -> None:
    network, streams = chosen(world, "auto")
    with caplog.at_level("INFO"):
        world.run("s", world.opening(network))
    assert network.transport == "actor"
    assert "reached over transport='actor'" in caplog.text
    tried = len(streams.dialed)
    world.run("s", world.opening(network))
    assert len(streams.dialed) == tried, "and tries no port any more"


def test_auto_stays_open_while_nobody_answers(world: TunnelWorld) -> None:
    network, _ = chosen(world, "auto")
    world.calls.down = True
    with pytest.raises(ConnectionLost, match="neither ports nor actors"):
        world.run("s", world.opening(network))
    assert network.transport == "auto"
    world.calls.down = False
    world.run("s", world.opening(network))
    assert network.transport == "actor"


def test_actor_tries_no_port(world: TunnelWorld) -> None:
    network, streams = chosen(world, "actor", 1)
    world.run("s", world.opening(network))
    assert not streams.dialed
