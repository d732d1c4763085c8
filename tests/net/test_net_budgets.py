"""Back-pressure: what a peer can make us hold is bounded, and nobody waits for ever."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from net_world import RpcWorld, broker, produce, produced

from raftlog.net.rpc import RaftMessages
from raftlog.net.stream import Limits
from raftlog.testing.transport import SimTransport

KIB = 1024


@pytest.fixture(params=range(3))
def world(request: pytest.FixtureRequest) -> Iterator[RpcWorld]:
    with RpcWorld(request.param) as world:
        yield world


@pytest.fixture(scope="module", autouse=True)
def _collect() -> Iterator[None]:
    """What was dropped without being closed warns here, and warnings are errors."""
    yield
    gc.collect()


def is_reading(connection: object) -> bool:
    transport = connection._transport  # type: ignore[attr-defined]
    assert isinstance(transport, SimTransport)
    return transport.is_reading()


def test_a_connection_over_its_budget_is_not_read_until_half_is_answered(world: RpcWorld) -> None:
    limits = Limits(connection_bytes=1000 * KIB)
    server = world.serve(limits=limits)
    world.handler.hold = True
    connection = world.dial()
    futures = [connection.request(produce(i), (bytes(10 * KIB),)) for i in range(1000)]
    world.loop.run_for(30.0)
    (accepted,) = server.connections
    assert 1000 * KIB < accepted.in_flight_bytes < 1000 * KIB + 512 * KIB, (
        "one received chunk may come on top"
    )
    assert accepted.in_flight_bytes == server.in_flight_bytes
    assert not is_reading(accepted)
    held = len(world.handler.held)
    while 2 * accepted.in_flight_bytes > 1000 * KIB:
        assert not is_reading(accepted)
        world.handler.held.pop(0).ok(produced(0))
    assert is_reading(accepted)
    world.until(lambda: len(world.handler.requests) > held)
    world.handler.hold = False
    while not all(future.done() for future in futures):
        world.handler.release()
        world.loop.run_for(0.5)
    assert server.in_flight_bytes == 0


def test_the_budget_of_the_broker_pauses_those_who_use_it_and_spares_the_others(world: RpcWorld) -> None:
    server = world.serve(limits=Limits(connection_bytes=800 * KIB, broker_bytes=1000 * KIB))
    world.handler.hold = True
    heavy = [world.dial(node=f"heavy{i}") for i in range(2)]
    light = world.dial(node="light")
    futures = [c.request(produce(), (bytes(10 * KIB),)) for c in heavy for _ in range(75)]
    world.loop.run_for(10.0)
    assert server.in_flight_bytes > 1000 * KIB
    assert sum(not is_reading(connection) for connection in server.connections) >= 1
    world.handler.hold = False
    response, _ = world.run("light", light.call(produce(7), timeout=5.0))
    assert response.batches[0].base_offset == 7
    world.handler.release()
    world.until(lambda: all(future.done() for future in futures))
    assert all(is_reading(connection) for connection in server.connections)
    assert not server._over_budget


def test_a_client_that_closes_gives_the_budget_back_only_with_the_answers(world: RpcWorld) -> None:
    server = world.serve()
    world.handler.hold = True
    connection = world.dial()
    connection.request(produce(), (bytes(10 * KIB),)).add_done_callback(lambda future: future.exception())
    world.until(lambda: bool(world.handler.held))
    connection.close()
    world.until(lambda: bool(world.handler.closed))
    assert server.in_flight_bytes > 10 * KIB, "the payload is still held"
    world.handler.release()
    assert server.in_flight_bytes == 0


def test_a_client_that_does_not_read_its_answers_is_not_read_either(world: RpcWorld) -> None:
    server = world.serve(limits=Limits(write_buffer_bytes=100 * KIB))
    connection = world.dial()
    assert connection._transport is not None
    connection._transport.pause_reading()
    futures = [connection.request(produce(), (bytes(20 * KIB),)) for _ in range(500)]
    world.loop.run_for(30.0)
    (accepted,) = server.connections
    assert not is_reading(accepted)
    assert accepted.buffered_bytes < 2_000 * KIB, "of 10,000 KiB"
    assert len(world.handler.requests) < 150
    connection._transport.resume_reading()
    world.until(lambda: all(future.done() for future in futures))
    assert is_reading(accepted)


def test_brokers_are_always_read_because_their_acknowledgements_empty_the_budget(world: RpcWorld) -> None:
    server = world.serve(limits=Limits(connection_bytes=100 * KIB, broker_bytes=100 * KIB))
    world.handler.hold = True
    client, peer = world.dial(node="c"), world.dial(broker(2), node="b")
    futures = [c.request(produce(), (bytes(10 * KIB),)) for c in (client, peer) for _ in range(20)]
    world.loop.run_for(5.0)
    reading = {connection.peer.role: is_reading(connection) for connection in server.connections}
    assert reading == {"client": False, "broker": True}
    peer.send(RaftMessages(["ack"], []))
    world.until(lambda: bool(world.handler.one_way))
    while not all(future.done() for future in futures):
        world.handler.release()
        world.loop.run_for(0.5)


def test_drain_waits_while_the_buffer_is_high_and_ends_with_the_connection(world: RpcWorld) -> None:
    server = world.serve()
    connection = world.dial(limits=Limits(write_buffer_bytes=100 * KIB))
    world.run("c", connection.drain())
    world.loop.run_for(0.1)
    (accepted,) = server.connections
    assert accepted._transport is not None
    accepted._transport.pause_reading()
    connection.send(RaftMessages([], []), (bytes(3000 * KIB),))
    assert connection.buffered_bytes > 2000 * KIB
    first = world.loop.run_as("c", connection.drain())
    world.loop.run_for(5.0)
    assert not first.done()
    accepted._transport.resume_reading()
    world.until(first.done)
    assert connection.buffered_bytes <= 100 * KIB
    accepted._transport.pause_reading()
    connection.send(RaftMessages([], []), (bytes(3000 * KIB),))
    second = world.loop.run_as("c", connection.drain())
    world.loop.run_for(1.0)
    world.network.break_connections("c", "s")
    world.until(second.done)


def test_frames_above_the_limit_of_the_other_side_are_refused(world: RpcWorld) -> None:
    world.serve(limits=Limits(frame_bytes_max=100 * KIB))
    connection = world.dial()
    response, _ = world.run("c", connection.call(produce(1), (bytes(99 * KIB),), timeout=5.0))
    assert response.batches[0].base_offset == 1
    future = connection.request(produce(), (bytes(100 * KIB),))
    world.until(future.done)
    assert future.exception() is not None
    assert connection.closed
