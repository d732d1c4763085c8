"""Requests, replies and one-way messages between two simulated processes."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from net_world import RpcWorld, broker, produce, produced

from raftlog.errors import (
    Busy,
    ConnectionLost,
    IncompatibleVersion,
    NotLeader,
    ProtocolError,
    RaftlogError,
    RequestTimeout,
)
from raftlog.net.connection import RpcConnection, _settle
from raftlog.net.frames import PREFIX, Kind, encode_head
from raftlog.net.rpc import (
    Addresses,
    InitProducerRequest,
    ProducePartition,
    ProduceRequest,
    RaftMessages,
    Struct,
)
from raftlog.net.server import Reply
from raftlog.net.stream import Limits


@pytest.fixture(params=range(3))
def world(request: pytest.FixtureRequest) -> Iterator[RpcWorld]:
    with RpcWorld(request.param) as world:
        yield world


@pytest.fixture(scope="module", autouse=True)
def _collect() -> Iterator[None]:
    """What was dropped without being closed warns here, and warnings are errors."""
    yield
    gc.collect()


def call(world: RpcWorld, connection: RpcConnection, partition: int = 0, payload: bytes = b"") -> bytes:
    response, answer = world.run("c", connection.call(produce(partition), (payload,), timeout=30.0))
    assert response.batches[0].base_offset == partition
    return bytes(answer)


def test_a_request_is_answered_with_its_payload(world: RpcWorld) -> None:
    world.serve()
    connection = world.dial()
    for size in (0, 1, 100, 40_000, 3_000_000):
        payload = bytes(range(256)) * (size // 256 + 1)
        assert call(world, connection, size, payload[:size]) == payload[:size]


def test_payload_of_many_buffers_arrives_joined(world: RpcWorld) -> None:
    world.serve()
    connection = world.dial()
    buffers = (b"a" * 50_000, bytearray(b"b" * 50_000), memoryview(b"c" * 50_000), b"")
    _, payload = world.run("c", connection.call(produce(), buffers, timeout=5.0))
    assert payload == b"".join(buffers)


def test_hundreds_in_flight_come_back_each_to_its_own(world: RpcWorld) -> None:
    world.serve()
    connection = world.dial()

    async def main() -> None:
        futures = [connection.request(produce(i), (str(i).encode() * (i % 50),)) for i in range(500)]
        for i, future in enumerate(futures):
            response, payload = await future
            assert (response.batches[0].base_offset, bytes(payload)) == (i, str(i).encode() * (i % 50))

    world.run("c", main())
    assert [request.partitions[0].partition for request in world.handler.requests] == list(range(500))


def test_answers_may_come_in_any_order(world: RpcWorld) -> None:
    world.serve()
    world.handler.hold = True
    connection = world.dial()
    futures = [connection.request(produce(i)) for i in range(3)]
    world.until(lambda: len(world.handler.held) == 3)
    for i in (2, 0, 1):
        world.handler.held[i].ok(produced(i))
        world.until(lambda i=i: futures[i].done())
        assert futures[i].result()[0].batches[0].base_offset == i
    assert [future.done() for future in futures] == [True] * 3


def ask_and_hold(world: RpcWorld, connection: RpcConnection) -> tuple[list[tuple[Any, Any]], Reply]:
    """Ask with a kilobyte; what is told, and the reply that the server has to give."""
    world.handler.hold = True
    told: list[tuple[Any, Any]] = []

    async def ask() -> None:
        connection.ask(produce(), (bytes(1000),), lambda response, _, error: told.append((response, error)))

    world.run("c", ask())
    world.until(lambda: bool(world.handler.held))
    (reply,) = world.handler.held
    return told, reply


def test_an_answer_may_come_in_parts_each_of_which_frees_its_share(world: RpcWorld) -> None:
    server = world.serve()
    connection = world.dial()
    told, reply = ask_and_hold(world, connection)
    whole = server.in_flight_bytes
    for number in range(2):
        reply.part(produced(number), 300)
        assert server.in_flight_bytes == whole - 300 * (number + 1)
        world.until(lambda number=number: len(told) == number + 1)
    assert connection._pending
    assert not reply.is_done
    reply.ok(produced(2))
    world.until(lambda: len(told) == 3)
    assert told == [(produced(number), None) for number in range(3)]
    assert (server.in_flight_bytes, connection._pending) == (0, {})
    with pytest.raises(AssertionError, match="after the whole"):
        reply.part(produced(3), 0)


def test_what_is_left_of_an_answer_fails_with_the_connection(world: RpcWorld) -> None:
    server = world.serve()
    connection = world.dial()
    told, reply = ask_and_hold(world, connection)
    reply.part(produced(0), 300)
    world.until(lambda: len(told) == 1)
    connection.close()
    world.until(lambda: len(told) == 2)
    assert isinstance(told[1][1], ConnectionLost)
    assert told[1][1].indeterminate
    world.until(lambda: not server.connections)
    reply.part(produced(1), 300)
    reply.ok(produced(2))
    assert server.in_flight_bytes == 0


def test_one_way_messages_arrive_in_order_and_are_not_answered(world: RpcWorld) -> None:
    world.serve()
    connection = world.dial(broker(2))
    addresses = Addresses({1: (5, "h", 9092)})
    connection.send(addresses)
    connection.send(RaftMessages([1, "x"], [3]), (b"abc",))
    connection.send(ProduceRequest([ProducePartition(b"t" * 16, 0)], acks=0), (b"batch",))
    world.until(lambda: len(world.handler.one_way) == 3)
    assert world.handler.one_way == [
        (addresses, b""),
        (RaftMessages([1, "x"], [3]), b"abc"),
        (ProduceRequest([ProducePartition(b"t" * 16, 0)], acks=0), b"batch"),
    ]
    world.loop.run_for(1.0)
    assert not connection._pending


def test_frames_of_one_iteration_leave_together_and_a_lone_one_at_once(world: RpcWorld) -> None:
    world.serve()
    connection = world.dial()
    writes: list[int] = []
    assert connection._transport is not None
    write = connection._transport.write
    connection._transport.write = lambda data: (writes.append(len(data)), write(data))  # type: ignore[method-assign]

    async def burst() -> list[Any]:
        first = connection.request(produce())
        assert len(writes) == 1, "a lone frame does not wait"
        rest = [connection.request(produce()) for _ in range(99)]
        assert len(writes) == 2
        await asyncio.sleep(0)
        assert len(writes) == 3, "the rest leaves in one write at the end of the iteration"
        return await asyncio.gather(first, *rest)

    assert len(world.run("c", burst())) == 100


def test_replies_to_one_chunk_leave_together(world: RpcWorld) -> None:
    server = world.serve()
    connection = world.dial()
    world.loop.run_for(0.1)
    (accepted,) = server.connections
    writes: list[int] = []
    assert accepted._transport is not None
    write = accepted._transport.write
    accepted._transport.write = lambda data: (writes.append(len(data)), write(data))  # type: ignore[method-assign]
    futures = [connection.request(produce()) for _ in range(100)]
    world.until(lambda: all(future.done() for future in futures))
    assert len(writes) <= 20


def test_fields_of_a_newer_release_are_ignored_and_those_of_an_older_one_get_defaults(
    world: RpcWorld,
) -> None:
    world.serve()
    connection = world.dial()
    topic = b"t" * 16
    for correlation, fields in (
        (71, [[[topic, 5]]]),
        (72, [[[topic, 6, None, [1]]], [], -1, "from the future"]),
    ):
        future = world.loop.create_future()
        connection._pending[correlation] = partial(_settle, future)
        connection._write(encode_head(Kind.REQUEST, 10, 1, correlation, fields), (), 0)
        world.until(future.done)
        assert future.result()[0].batches[0].base_offset == fields[0][0][1]
    assert [request.acks for request in world.handler.requests] == [-1, -1]


# -- errors --------------------------------------------------------------------------------------------------


def test_a_typed_error_is_raised_as_itself_with_its_details(world: RpcWorld) -> None:
    world.serve()
    connection = world.dial()
    world.handler.raises = NotLeader("p0 is led by 3", leader=3, term=7)
    with pytest.raises(NotLeader, match="p0 is led by 3") as caught:
        call(world, connection)
    assert (caught.value.leader, caught.value.term) == (3, 7)
    assert caught.value.retriable
    world.handler.raises = None
    assert call(world, connection, 1, b"x") == b"x"


def test_a_bug_in_the_handler_is_logged_and_answered_and_harms_nobody(world: RpcWorld) -> None:
    reported: list[dict[str, Any]] = []
    world.loop.set_exception_handler(lambda _, context: reported.append(context))
    world.serve()
    connection = world.dial()
    world.handler.raises = ZeroDivisionError("bug")
    with pytest.raises(RaftlogError, match="internal error"):
        call(world, connection)
    connection.send(Addresses({}))
    world.until(lambda: len(reported) == 2)
    assert all(isinstance(context["exception"], ZeroDivisionError) for context in reported)
    world.handler.raises = None
    assert call(world, connection, 1, b"x") == b"x"


def test_a_late_refusal_through_the_reply(world: RpcWorld) -> None:
    world.serve()
    world.handler.hold = True
    connection = world.dial()
    future = connection.request(produce())
    world.until(lambda: bool(world.handler.held))
    world.handler.held[0].fail(Busy("later"))
    world.until(future.done)
    assert isinstance(future.exception(), Busy)
    with pytest.raises(AssertionError, match="twice"):
        world.handler.held[0].ok(produced(0))


def test_an_answer_that_does_not_encode_leaves_the_reply_open(world: RpcWorld) -> None:
    server = world.serve()
    world.handler.hold = True
    connection = world.dial()
    future = connection.request(produce())
    world.until(lambda: bool(world.handler.held))

    class Bad(Struct, frozen=True):
        value: Any

    with pytest.raises(TypeError):
        world.handler.held[0].ok(Bad(object()))
    assert server.in_flight_bytes > 0
    world.handler.release()
    world.until(future.done)
    assert future.result()[0] == produced(0)
    assert server.in_flight_bytes == 0


def test_an_rpc_that_the_server_does_not_know_is_refused_alone(world: RpcWorld) -> None:
    server = world.serve()
    connection = world.dial()
    connection._write(encode_head(Kind.REQUEST, 99, 1, 77, produce()), (), 0)
    future = world.loop.create_future()
    connection._pending[77] = partial(_settle, future)
    world.until(future.done)
    assert isinstance(future.exception(), IncompatibleVersion)
    assert server.in_flight_bytes == 0
    assert call(world, connection, 1, b"x") == b"x"


def test_timeout_and_the_late_answer(world: RpcWorld) -> None:
    world.serve()
    world.handler.hold = True
    connection = world.dial()
    start = world.loop.time()
    with pytest.raises(RequestTimeout, match="ProduceRequest") as caught:
        world.run("c", connection.call(produce(), timeout=2.0))
    assert caught.value.indeterminate
    assert world.loop.time() - start == pytest.approx(2.0, abs=0.1)
    world.handler.release()
    world.until(lambda: not connection._pending)
    world.handler.hold = False
    assert call(world, connection, 1, b"x") == b"x"


def test_a_cancelled_request_does_not_disturb_the_others(world: RpcWorld) -> None:
    world.serve()
    connection = world.dial()
    first, second = connection.request(produce(1)), connection.request(produce(2))
    first.cancel()
    world.until(second.done)
    assert second.result()[0].batches[0].base_offset == 2
    world.until(lambda: not connection._pending)


# -- the end of a connection ---------------------------------------------------------------------------------


def test_requests_in_flight_are_indeterminate_when_the_connection_breaks(world: RpcWorld) -> None:
    world.serve()
    world.handler.hold = True
    lost: list[Exception | None] = []
    connection = world.dial(on_close=lambda c, error: lost.append(error))
    future = connection.request(produce())
    world.until(lambda: bool(world.handler.held))
    world.network.break_connections("c", "s")
    world.until(lambda: bool(lost and world.handler.closed) and future.done())
    error = future.exception()
    assert isinstance(error, ConnectionLost)
    assert error.indeterminate
    after = connection.request(produce())
    world.until(after.done)
    refused = after.exception()
    assert isinstance(refused, ConnectionLost)
    assert not refused.indeterminate
    with pytest.raises(ConnectionLost):
        connection.send(Addresses({}))
    assert connection.closed
    assert len(lost) == len(world.handler.closed) == 1
    world.handler.release()  # dropped silently


@pytest.mark.parametrize("how", ["process killed", "server closed"])
def test_the_server_going_away_is_noticed(world: RpcWorld, how: str) -> None:
    server = world.serve()
    world.handler.hold = True
    lost: list[Exception | None] = []
    connection = world.dial(on_close=lambda c, error: lost.append(error))
    future = connection.request(produce())
    world.until(lambda: bool(world.handler.held))
    if how == "process killed":
        world.loop.kill("s")
    else:
        world.run("s", server.close())
        assert not server.connections
    world.until(lambda: bool(lost) and future.done())
    assert isinstance(future.exception(), ConnectionLost)


def test_close_sends_what_was_written(world: RpcWorld) -> None:
    world.serve()
    lost: list[Exception | None] = []
    connection = world.dial(on_close=lambda c, error: lost.append(error))
    for i in range(100):
        connection.send(RaftMessages([i], []), (bytes(10_000),))
    connection.close()
    world.until(lambda: bool(world.handler.closed) and bool(lost))
    assert len(world.handler.one_way) == 100
    assert lost == [None]
    assert world.handler.closed[0][1] is None


def test_close_does_not_linger_for_ever_on_a_peer_that_does_not_read(world: RpcWorld) -> None:
    world.serve()
    lost: list[Exception | None] = []
    connection = world.dial(on_close=lambda c, error: lost.append(error), limits=Limits(linger_seconds=3.0))
    world.network.cut("c", "s")
    connection.send(RaftMessages([], []), (bytes(1_000_000),))
    connection.close()
    world.loop.run_for(2.0)
    assert not lost
    world.loop.run_for(1.5)
    assert lost == [None]


def test_a_peer_that_has_closed_is_not_waited_for_with_what_is_still_to_be_written(world: RpcWorld) -> None:
    server = world.serve()
    world.handler.hold = True
    connection = world.dial()
    world.loop.run_for(0.1)
    (accepted,) = server.connections
    assert accepted._transport is not None
    accepted._transport.pause_reading()
    future = connection.request(produce(), (bytes(3_000_000),))
    world.network.cut("c", "s", both=False)
    accepted._transport.close()
    world.loop.run_for(0.1)
    assert future.done(), "at once, not when TCP gives up"
    assert isinstance(future.exception(), ConnectionLost)


def test_a_connection_cut_inside_a_frame_loses_that_frame_only(world: RpcWorld) -> None:
    world.serve()
    connection = world.dial()
    frame = encode_head(Kind.REQUEST, 10, 1, 1, produce(1)) + encode_head(
        Kind.REQUEST, 10, 1, 2, produce(2), 1000
    )
    assert connection._transport is not None
    connection._transport.write(frame)
    connection._transport.close()
    world.until(lambda: bool(world.handler.closed))
    assert [request.partitions[0].partition for request in world.handler.requests] == [1]
    assert "inside a frame" in str(world.handler.closed[0][1])


# -- bad input -----------------------------------------------------------------------------------------------

GARBAGE = {
    "oversized": PREFIX.pack(1 << 30, Kind.REQUEST, 10, 1, 0, 1, 0),
    "unknown kind": PREFIX.pack(12, 99, 10, 1, 0, 1, 0),
    "hello again": encode_head(Kind.HELLO, 0, 1, 0, produce()),
    "response from a client": encode_head(Kind.RESPONSE, 10, 1, 1, produced(0)),
    "other version": encode_head(Kind.REQUEST, 10, 9, 1, produce()),
    "header of another type": encode_head(Kind.REQUEST, 10, 1, 1, ["a", "b", "c"]),
    "header not msgpack": PREFIX.pack(13, Kind.REQUEST, 10, 1, 0, 1, 1) + b"\xc1",
    "bad utf-8": PREFIX.pack(16, Kind.REQUEST, 15, 1, 0, 1, 4) + b"\x91\xa2\xff\xfe",
    "unknown one-way": encode_head(Kind.ONE_WAY, 99, 1, 0, produce()),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_oversized_or_garbage_frames_close_that_connection_only(
    world: RpcWorld, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    world.serve()
    lost: list[Exception | None] = []
    bystander = world.dial(node="b")
    connection = world.dial(on_close=lambda c, error: lost.append(error))
    assert connection._transport is not None
    with caplog.at_level(logging.WARNING, "raftlog.net"):
        connection._transport.write(data)
        world.until(lambda: bool(lost))
    assert "client 'app'" in caplog.text
    assert isinstance(world.handler.closed[0][1], ProtocolError)
    response, _ = world.run("b", bystander.call(produce(4), timeout=5.0))
    assert response.batches[0].base_offset == 4
    call(world, world.dial(node="c"), 5)


BAD_ANSWERS = {
    "unasked": encode_head(Kind.RESPONSE, 10, 1, 4711, produced(0)),
    "undecodable": encode_head(Kind.RESPONSE, 10, 1, 1, ["x"]),
    "bad error": encode_head(Kind.ERROR, 10, 1, 1, [1]),
    "request": encode_head(Kind.REQUEST, 10, 1, 1, produce()),
    "garbage": b"\xff" * 64,
}


@pytest.mark.parametrize("data", BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_a_server_that_talks_nonsense_is_left_and_no_request_hangs(world: RpcWorld, data: bytes) -> None:
    server = world.serve()
    world.handler.hold = True
    connection = world.dial()
    future = connection.request(produce())
    world.until(lambda: bool(world.handler.held))
    (accepted,) = server.connections
    assert accepted._transport is not None
    accepted._transport.write(data)
    world.until(future.done)
    assert isinstance(future.exception(), ConnectionLost)
    assert connection.closed


def test_a_producer_id_request_has_its_own_types(world: RpcWorld) -> None:
    world.serve()
    world.handler.hold = True
    connection = world.dial()
    future = connection.request(InitProducerRequest())
    world.until(lambda: bool(world.handler.held))
    assert world.handler.requests == [InitProducerRequest(None)]
    future.cancel()
