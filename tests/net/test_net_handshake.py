"""Who may talk: secret, cluster, versions, incarnations, time limits."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator

import msgspec
import pytest
from net_world import PORT, SECRET, RpcWorld, broker, client, produce

from raftlog.errors import (
    AuthenticationFailed,
    Busy,
    ConfigError,
    ConnectionLost,
    IncompatibleVersion,
    StaleIncarnation,
)
from raftlog.net.connection import RpcConnection
from raftlog.net.frames import Buffer, Kind, encode_head
from raftlog.net.handshake import HANDSHAKE_VERSION, Handshake, Local, Proof
from raftlog.net.rpc import Empty
from raftlog.net.server import ServerConnection
from raftlog.net.stream import Limits


@pytest.fixture
def world() -> Iterator[RpcWorld]:
    with RpcWorld() as world:
        yield world


def next_valid_request_succeeds(world: RpcWorld) -> None:
    connection = world.dial(node="valid")
    response, payload = world.run("valid", connection.call(produce(3), (b"x",), timeout=5.0))
    assert (response.batches[0].base_offset, bytes(payload)) == (3, b"x")
    connection.close()


def test_both_sides_learn_who_the_other_is(world: RpcWorld) -> None:
    server = world.serve()
    connection = world.dial(broker(2, incarnation=9), purpose="control")
    assert (connection.peer.role, connection.peer.broker_id) == ("broker", 1)
    assert connection.peer.address == ("hs", PORT) == server.local.address
    (accepted,) = server.connections
    assert world.handler.opened == [accepted]
    peer = accepted.peer
    assert (peer.role, peer.broker_id, peer.incarnation, peer.purpose) == ("broker", 2, 9, "control")
    assert connection.rpc_version == accepted.rpc_version == 1


def test_wrong_secret_is_refused_and_logged(world: RpcWorld, caplog: pytest.LogCaptureFixture) -> None:
    world.serve()
    with caplog.at_level(logging.WARNING, "raftlog.net"), pytest.raises(AuthenticationFailed):
        world.dial(secret=b"a guess")
    assert "does not know the secret" in caplog.text
    assert not world.handler.opened
    next_valid_request_succeeds(world)


def test_a_server_that_does_not_know_the_secret_is_found_out(world: RpcWorld) -> None:
    """It accepts every proof; the client still refuses it."""
    server = world.serve(secret=b"not the secret")

    class Impostor(Handshake):
        def verify(self, header: Buffer, *, dialer: bool) -> None:
            """Whatever."""

    def accept() -> ServerConnection:
        connection = server.accept()
        connection._handshake = Impostor(server.local, server.secret, "client", server.seams.random)
        return connection

    world.network._listeners["hs", PORT].factory = accept
    with pytest.raises(AuthenticationFailed):
        world.dial()


def test_the_secret_never_travels(world: RpcWorld) -> None:
    sent: list[bytes] = []
    world.loop.note = lambda data: sent.append(bytes(data))  # type: ignore[method-assign]
    world.serve()
    world.dial()
    assert sent
    assert SECRET not in b"".join(sent)


def test_other_cluster_is_refused(world: RpcWorld) -> None:
    world.serve()
    with pytest.raises(AuthenticationFailed, match="cluster 'c2'"):
        world.dial(Local("c2", "client", client_id="x"))
    next_valid_request_succeeds(world)


@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"),
    [((1, 3), (2, 5), 3), ((2, 2), (1, 2), 2), ((1, 1), (2, 3), None), ((4, 9), (1, 3), None)],
)
def test_the_highest_common_version_is_taken(
    world: RpcWorld, ours: tuple[int, int], theirs: tuple[int, int], agreed: int | None
) -> None:
    def ranged(local: Local, versions: tuple[int, int]) -> Local:
        return msgspec.structs.replace(local, version_min=versions[0], version_max=versions[1])

    server = world.serve(local=ranged(broker(1), theirs))
    if agreed is None:
        with pytest.raises(IncompatibleVersion, match="speaks rpc versions"):
            world.dial(ranged(client(), ours))
        assert not server.connections
    else:
        connection = world.dial(ranged(client(), ours))
        assert connection.rpc_version == agreed
        world.run("c", connection.call(produce(), timeout=5.0))


def test_unknown_handshake_version_is_answered_so_that_the_peer_can_read_it(world: RpcWorld) -> None:
    world.serve()
    raw = world.dial_raw()
    raw.transport.write(encode_head(Kind.HELLO, 0, HANDSHAKE_VERSION + 1, 0, Empty()))
    world.until(lambda: raw.lost)
    assert b"IncompatibleVersion" in raw.received
    next_valid_request_succeeds(world)


def test_old_incarnation_is_refused(world: RpcWorld, caplog: pytest.LogCaptureFixture) -> None:
    server = world.serve()
    world.dial(broker(2, incarnation=5), node="new")
    with caplog.at_level(logging.WARNING, "raftlog.net"), pytest.raises(StaleIncarnation) as caught:
        world.dial(broker(2, incarnation=4), node="old")
    assert caught.value.newest == 5
    assert "newer process" in caplog.text
    world.dial(broker(3, incarnation=1), node="other")
    world.dial(broker(2, incarnation=5), node="new", purpose="bulk")
    assert len(server.connections) == 3
    next_valid_request_succeeds(world)


def test_newer_incarnation_closes_what_the_older_one_has_open(world: RpcWorld) -> None:
    server = world.serve()
    lost: list[object] = []
    old = [
        world.dial(
            broker(2, incarnation=1), node="old", purpose=purpose, on_close=lambda c, e: lost.append(c)
        )
        for purpose in ("control", "bulk")
    ]
    other = world.dial(broker(3, incarnation=1), node="other")
    new = world.dial(broker(2, incarnation=2), node="new")
    world.until(lambda: len(lost) == 2)
    assert all(connection.closed for connection in old)
    assert not other.closed
    assert not new.closed
    assert {str(connection.peer) for connection in server.connections} == {
        "broker 3.1 (client)",
        "broker 2.2 (client)",
    }
    assert [type(error) for _, error in world.handler.closed] == [StaleIncarnation] * 2


def test_an_incarnation_learned_elsewhere_counts_too(world: RpcWorld) -> None:
    server = world.serve()
    world.dial(broker(2, incarnation=1), node="old")
    server.note_incarnation(2, 7)
    world.until(lambda: not server.connections)
    with pytest.raises(StaleIncarnation):
        world.dial(broker(2, incarnation=6), node="old")


def test_an_unproved_hello_closes_nothing(world: RpcWorld) -> None:
    """A stranger must not be able to fence a broker by claiming a newer incarnation."""
    server = world.serve()
    world.dial(broker(2, incarnation=1), node="real")
    with pytest.raises(AuthenticationFailed):
        world.dial(broker(2, incarnation=99), node="stranger", secret=b"guess")
    assert len(server.connections) == 1
    world.dial(broker(2, incarnation=1), node="real")


def test_the_handler_may_refuse_with_a_typed_error(world: RpcWorld) -> None:
    server = world.serve()
    world.handler.refuse = Busy("too many clients", limit=3)
    with pytest.raises(Busy, match="too many clients") as caught:
        world.dial()
    assert caught.value.limit == 3
    world.loop.run_for(1.0)
    assert not server.connections
    assert not world.handler.closed, "what was never opened is not closed"
    world.handler.refuse = None
    next_valid_request_succeeds(world)


def test_half_open_handshake_is_closed_after_its_time(
    world: RpcWorld, caplog: pytest.LogCaptureFixture
) -> None:
    server = world.serve(limits=Limits(handshake_seconds=2.0))
    raw = world.dial_raw()
    start = world.loop.time()
    with caplog.at_level(logging.WARNING, "raftlog.net"):
        world.until(lambda: raw.lost)
    assert 1.9 < world.loop.time() - start < 2.1
    assert "no handshake within" in caplog.text
    assert not server._handshaking
    next_valid_request_succeeds(world)


def test_a_server_that_says_nothing_is_given_up(world: RpcWorld) -> None:
    async def listen() -> None:
        await world.seams("s").network.listen(asyncio.Protocol, "hs", PORT)

    world.run("s", listen())
    with pytest.raises(ConnectionLost, match="no handshake"):
        world.dial(timeout=3.0)


def test_giving_up_at_any_moment_leaves_no_connection_behind(world: RpcWorld) -> None:
    server = world.serve()
    closed: list[object] = []
    finished = 0
    for steps in range(1, 60):
        opening = RpcConnection.open(
            world.seams("c"), "hs", PORT, client(), SECRET, on_close=lambda c, e: closed.append(c)
        )
        task = world.loop.run_as("c", opening)
        until = world.loop.steps + steps
        world.until(lambda until=until, task=task: world.loop.steps >= until or task.done())
        finished += task.done()
        if task.done():
            task.result().close()
        else:
            task.cancel()
        world.loop.run_for(1.0)
        assert not server.connections, f"given up after {steps} steps"
        assert not server._handshaking
    assert 0 < finished < 59
    assert len(closed) == finished, "only connections that the caller saw are reported as closed"


def test_too_many_half_open_handshakes(world: RpcWorld) -> None:
    world.serve(limits=Limits(handshakes_max=3))
    raws = [world.dial_raw(f"n{i}") for i in range(4)]
    world.until(lambda: raws[3].lost, 1.0)
    assert not any(raw.lost for raw in raws[:3])
    world.until(lambda: all(raw.lost for raw in raws))
    next_valid_request_succeeds(world)


@pytest.mark.parametrize(
    "data",
    [
        encode_head(Kind.REQUEST, 10, 1, 1, produce()),
        encode_head(Kind.PROOF, 0, HANDSHAKE_VERSION, 0, Proof(b"")),
        encode_head(Kind.HELLO, 0, HANDSHAKE_VERSION, 0, Proof(b"not a hello")),
        encode_head(Kind.HELLO, 0, HANDSHAKE_VERSION, 0, Empty(), 5000) + bytes(5000),
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(100),
    ],
    ids=["request first", "proof first", "bad hello", "5000 bytes", "http", "zeros"],
)
def test_garbage_before_the_handshake_closes_the_connection(
    world: RpcWorld, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    world.serve()
    raw = world.dial_raw()
    with caplog.at_level(logging.WARNING, "raftlog.net"):
        raw.transport.write(data)
        world.until(lambda: raw.lost, 1.0)
    assert "closed" in caplog.text
    assert not world.handler.opened
    next_valid_request_succeeds(world)


def test_all_that_is_read_before_the_handshake_ends_is_4_kib(world: RpcWorld) -> None:
    """Frames that are each within the limit do not get around it together."""
    world.serve()
    raw = world.dial_raw()
    hello = Handshake(client("x" * 200), SECRET, "client", world.seams("c").random).hello
    raw.transport.write(encode_head(Kind.HELLO, 0, HANDSHAKE_VERSION, 0, hello))
    world.until(lambda: bool(raw.received))
    raw.transport.write(encode_head(Kind.PROOF, 0, HANDSHAKE_VERSION, 0, Proof(bytes(4000)))[:-1])
    world.until(lambda: raw.lost, 1.0)


def test_a_client_id_too_long_for_a_hello_is_a_config_error(world: RpcWorld) -> None:
    world.serve()
    with pytest.raises(ConfigError, match="client_id"):
        world.dial(client("x" * 4000))


def test_a_replayed_handshake_is_worth_nothing(world: RpcWorld) -> None:
    """What a client said to the server, word for word on another connection, does not get in."""
    world.serve()
    world.dial()
    overheard = world.handler.opened[0]._handshake
    hello = msgspec.Raw(overheard._theirs)
    proof = Proof(overheard._mac(dialer=True, ours=False))
    raw = world.dial_raw("eve")
    raw.transport.write(encode_head(Kind.HELLO, 0, HANDSHAKE_VERSION, 0, hello))
    world.until(lambda: bool(raw.received))
    raw.transport.write(encode_head(Kind.PROOF, 0, HANDSHAKE_VERSION, 0, proof))
    world.until(lambda: raw.lost)
    assert b"AuthenticationFailed" in raw.received
    assert len(world.handler.opened) == 1


def test_a_proof_of_one_direction_is_worth_nothing_in_the_other() -> None:
    rng = random.Random(0)
    dialer = Handshake(client(), SECRET, "client", rng)
    acceptor = Handshake(broker(1), SECRET, "client", rng)
    encode = msgspec.msgpack.encode
    dialer.receive_hello(encode(acceptor.hello))
    acceptor.receive_hello(encode(dialer.hello))
    acceptor.verify(encode(dialer.proof(dialer=True)), dialer=True)
    dialer.verify(encode(acceptor.proof(dialer=False)), dialer=False)
    with pytest.raises(AuthenticationFailed):
        dialer.verify(encode(dialer.proof(dialer=True)), dialer=False)
    with pytest.raises(AuthenticationFailed):
        acceptor.verify(encode(acceptor.proof(dialer=False)), dialer=True)


def test_details_that_cannot_travel_do_not_stop_the_error(world: RpcWorld) -> None:
    world.serve()
    world.handler.refuse = Busy("x", unspeakable=object(), limit=3)
    with pytest.raises(Busy, match="x") as caught:
        world.dial()
    assert "object" in caught.value.unspeakable
