"""The same over real loopback sockets under uvloop, as in production."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvloop
from net_world import SECRET, Recorder, broker, client, produce

from raftlog.errors import AuthenticationFailed, ConnectionLost
from raftlog.net.connection import RpcConnection
from raftlog.net.network import real_seams
from raftlog.net.rpc import RaftMessages
from raftlog.net.server import RpcServer
from raftlog.net.stream import Limits

Check = Callable[[], bool]


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await main()

    uvloop.run(bounded())


async def until(condition: Check) -> None:
    """Let the loop turn until ``condition`` holds (the test's timeout bounds it)."""
    while not condition():  # noqa: ASYNC110 - conditions are of the outside, there is no event to wait for
        await asyncio.sleep(0)


@asynccontextmanager
async def served(handler: Recorder, limits: Limits | None = None) -> AsyncIterator[RpcServer]:
    server = RpcServer(real_seams(1), broker(1), SECRET, handler, limits or Limits())
    await server.start("127.0.0.1", 0)
    try:
        yield server
    finally:
        await server.close()
        assert not server.connections


async def dial(server: RpcServer, **options: object) -> RpcConnection:
    assert server.local.address is not None
    return await RpcConnection.open(real_seams(2), *server.local.address, client(), SECRET, **options)  # type: ignore[arg-type]


def test_echo_of_all_sizes_pipelined() -> None:
    async def main() -> None:
        handler = Recorder()
        async with served(handler) as server:
            connection = await dial(server)
            payloads = [bytes([i]) * size for i, size in enumerate((0, 1, 500, 70_000, 5_000_000) * 20)]
            futures = [connection.request(produce(i), (payload,)) for i, payload in enumerate(payloads)]
            for i, future in enumerate(futures):
                response, payload = await future
                assert response.batches[0].base_offset == i
                assert payload == payloads[i]
            connection.close()
            await until(lambda: bool(handler.closed))
            assert handler.closed[0][1] is None

    run(main)


def test_a_closed_connection_may_still_be_asked() -> None:
    async def main() -> None:
        handler = Recorder()
        async with served(handler) as server:
            connection = await dial(server)
            await until(lambda: bool(server.connections))
            (accepted,) = server.connections
            handler.hold = True
            future = connection.request(produce(), (b"x",))
            await until(lambda: bool(handler.held))
            connection.close()
            await until(lambda: bool(handler.closed))
            for end in (connection, accepted):
                assert end.closed
                assert end.buffered_bytes == 0
                assert "1" in repr(end)
                await end.drain()
            handler.release()
            accepted.close()
            connection.close()
            assert isinstance(future.exception(), ConnectionLost)

    run(main)


def test_nagle_is_off_on_both_sides() -> None:
    async def main() -> None:
        async with served(Recorder()) as server:
            connection = await dial(server)
            await until(lambda: bool(server.connections))
            (accepted,) = server.connections
            for end in (connection, accepted):
                assert end._transport is not None
                real = end._transport.get_extra_info("socket")
                assert real.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            connection.close()

    run(main)


def test_budget_and_slow_reader_hold_real_sockets_back() -> None:
    async def main() -> None:
        handler = Recorder()
        async with served(handler, Limits(connection_bytes=200_000, write_buffer_bytes=200_000)) as server:
            connection = await dial(server, limits=Limits(write_buffer_bytes=100_000))
            handler.hold = True
            futures = [connection.request(produce(), (bytes(100_000),)) for _ in range(300)]
            await until(lambda: len(handler.held) >= 2)
            for _ in range(200):
                await asyncio.sleep(0)
            assert len(handler.held) < 50, "the budget is two requests, and what one chunk brings"
            assert connection.buffered_bytes > 5_000_000
            draining = asyncio.ensure_future(connection.drain())
            await asyncio.sleep(0)
            assert not draining.done()
            handler.hold = False
            handler.release()
            await asyncio.gather(*futures)
            await draining
            assert server.in_flight_bytes == 0
            connection.close()

    run(main)


def test_wrong_secret_garbage_and_refused_connections() -> None:
    async def main() -> None:
        handler = Recorder()
        async with served(handler) as server:
            assert server.local.address is not None
            with pytest.raises(AuthenticationFailed):
                await RpcConnection.open(real_seams(2), *server.local.address, client(), b"guess")
            reader, writer = await asyncio.open_connection(*server.local.address)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
            connection = await dial(server)
            response, _ = await connection.call(produce(4), (b"x",), timeout=5.0)
            assert response.batches[0].base_offset == 4
            connection.close()
            address = server.local.address
        with pytest.raises(ConnectionLost, match="cannot connect"):
            await RpcConnection.open(real_seams(2), *address, client(), SECRET)

    run(main)


def test_a_server_that_closes_leaves_nothing_in_flight_hanging() -> None:
    async def main() -> None:
        handler = Recorder()
        lost: list[Exception | None] = []
        async with served(handler) as server:
            connection = await dial(server, on_close=lambda c, error: lost.append(error))
            handler.hold = True
            future = connection.request(produce())
            await until(lambda: bool(handler.held))
        with pytest.raises(ConnectionLost) as caught:
            await future
        assert caught.value.indeterminate
        assert len(lost) == 1

    run(main)


def test_one_way_messages_before_close_arrive() -> None:
    async def main() -> None:
        handler = Recorder()
        async with served(handler) as server:
            connection = await dial(server)
            for i in range(100):
                connection.send(RaftMessages([i], []), (bytes(50_000),))
            connection.close()
            await until(lambda: bool(handler.closed))
            assert [message.messages for message, _ in handler.one_way] == [[i] for i in range(100)]  # type: ignore[attr-defined]

    run(main)


def test_silence_is_bounded_by_the_timeout() -> None:
    async def main() -> None:
        listener = await real_seams(1).network.listen(asyncio.Protocol, "127.0.0.1", 0)
        with pytest.raises(ConnectionLost, match="no handshake"):
            await RpcConnection.open(real_seams(2), *listener.address, client(), SECRET, timeout=0.05)
        listener.close()

    run(main)
