"""The links between brokers: they come up, break at any moment, and come up again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from raftlog.broker.peers import Address, Peers
from raftlog.errors import AuthenticationFailed
from raftlog.net.connection import RpcConnection
from raftlog.net.handshake import Local
from raftlog.net.network import Seams
from raftlog.net.rpc import Addresses, RaftMessages
from raftlog.net.server import Reply, RpcServer, ServerConnection
from raftlog.raft.types import AppendResponse, Heartbeat
from raftlog.testing.loop import SimLoop
from raftlog.testing.network import SimNetwork

PORT = 9000
SECRET = b"s" * 32


class Member:
    """A broker of nothing but links, on a simulated process of its own."""

    def __init__(self, world: Links, broker_id: int, incarnation: int = 1) -> None:
        self.name = f"b{broker_id}"
        self.heard: list[str] = []
        self.learned = 0
        self.received: list[tuple[str, Any]] = []
        network = world.network.for_node(self.name, self.name)
        seams = Seams(network, random.Random(broker_id), lambda: 0, world.loop.time)
        local = Local("c", "broker", broker_id, self.name, incarnation)
        self.server = RpcServer(seams, local, SECRET, self)
        world.run(self.server.start(self.name, PORT), self.name)
        self.peers = Peers(
            seams,
            self.server.local,
            SECRET,
            on_up=lambda other, _: self.heard.append(f"up {other}"),
            on_down=lambda other: self.heard.append(f"down {other}"),
            on_learned=self._on_learned,
            on_replaced=lambda error: self.heard.append(type(error).__name__),
        )

    def _on_learned(self) -> None:
        self.learned += 1

    def on_open(self, connection: ServerConnection) -> None:
        """Nothing to refuse."""

    def on_request(
        self, connection: ServerConnection, request: Any, payload: memoryview, reply: Reply
    ) -> None:
        raise AssertionError("peers send no requests here")

    def on_one_way(self, connection: ServerConnection, message: Any, payload: memoryview) -> None:
        self.received.append((connection.peer.purpose, message))
        if isinstance(message, Addresses):
            self.peers.learn(message.brokers)

    def on_close(self, connection: ServerConnection, error: Exception | None) -> None:
        """The dialling side finds out by itself."""


class Links:
    """A few members in virtual time."""

    def __init__(self, seed: int = 0) -> None:
        self.loop = SimLoop(seed, steps_max=2_000_000)
        self.network = SimNetwork(self.loop, random.Random(seed))
        self.members: dict[int, Member] = {}

    @classmethod
    @contextmanager
    def of_two(cls, seed: int = 0) -> Iterator[Links]:
        """Members 0 and 1; 0 has been told where 1 is."""
        made = cls(seed)
        try:
            made.add(0)
            made.add(1)
            made.learn(0, {1: (1, "b1", PORT)})
            yield made
        finally:
            made.loop.close()

    def run(self, work: Any, node: str) -> Any:
        return self.loop.run_until_complete(self.loop.run_as(node, work))

    def add(self, broker_id: int, incarnation: int = 1) -> Member:
        member = self.members[broker_id] = Member(self, broker_id, incarnation)
        self.learn(broker_id, {broker_id: (incarnation, member.name, PORT)})
        return member

    def learn(self, broker_id: int, addresses: dict[int, Address]) -> None:
        member = self.members[broker_id]

        async def learn() -> None:
            member.peers.learn(addresses)

        self.run(learn(), member.name)

    def both_up(self) -> bool:
        return self.members[0].peers.is_up(1) and self.members[1].peers.is_up(0)


@pytest.fixture
def links() -> Iterator[Links]:
    """Members 0 and 1; 0 has been told where 1 is."""
    with Links.of_two() as made:
        yield made


def heartbeat(to: int = 5) -> Heartbeat:
    return Heartbeat(to, 6, 1, 0)


async def send(member: Member, *messages: Any, to: int = 1) -> None:
    for message in messages:
        member.peers.send(to, message)
    member.peers.flush()


def test_one_that_is_told_introduces_itself_and_both_sides_connect(links: Links) -> None:
    zero, one = links.members[0], links.members[1]
    links.loop.run_until(links.both_up, 5.0)
    assert (zero.heard, one.heard) == (["up 1"], ["up 0"])
    assert one.peers.book == zero.peers.book == {0: (1, "b0", PORT), 1: (1, "b1", PORT)}
    assert zero.peers.is_up(0), "a broker always reaches itself"
    assert not zero.peers.is_up(7)


def test_what_is_learned_is_passed_on(links: Links) -> None:
    """A third broker that one of two knows is soon known to the other, and the newest incarnation wins."""
    links.loop.run_until(links.both_up, 5.0)
    links.add(2)
    links.learn(0, {2: (1, "b2", PORT)})
    links.loop.run_until(lambda: links.members[1].peers.is_up(2) and links.members[2].peers.is_up(1), 5.0)
    learned = links.members[1].learned
    links.learn(0, {2: (3, "elsewhere", PORT)})
    links.loop.run_until(lambda: links.members[1].peers.book[2] == (3, "elsewhere", PORT), 5.0)
    assert links.members[1].learned == learned + 1
    for older_or_the_same in (2, 3):
        links.learn(0, {2: (older_or_the_same, "b2", PORT)})
    assert links.members[0].peers.book[2] == (3, "elsewhere", PORT)


def test_nobody_tells_a_broker_where_it_is(links: Links) -> None:
    links.learn(0, {0: (99, "elsewhere", 1)})
    assert links.members[0].peers.book[0] == (1, "b0", PORT)


def test_the_urgent_and_the_bulky_take_different_connections_one_frame_each(links: Links) -> None:
    links.loop.run_until(links.both_up, 5.0)
    zero, one = links.members[0], links.members[1]
    one.received.clear()
    links.run(send(zero, heartbeat(1), AppendResponse(2, 6, 1, 9), heartbeat(3)), "b0")
    links.loop.run_until(lambda: len(one.received) == 2, 1.0)
    by_purpose = dict(one.received)
    assert [row[1] for row in by_purpose["control"].messages] == [1, 3]
    assert [row[1] for row in by_purpose["bulk"].messages] == [2]
    assert isinstance(by_purpose["bulk"], RaftMessages)


def test_messages_for_one_that_is_not_connected_are_dropped(links: Links) -> None:
    zero, one = links.members[0], links.members[1]
    links.run(send(zero, heartbeat(1)), "b0")
    links.run(send(zero, heartbeat(1), to=9), "b0")
    links.loop.run_until(links.both_up, 5.0)
    assert not [message for _, message in one.received if isinstance(message, RaftMessages)]


@pytest.mark.parametrize("seed", range(5))
def test_a_link_that_breaks_is_reported_once_and_made_again(seed: int) -> None:
    with Links.of_two(seed) as links:
        links.loop.run_until(links.both_up, 5.0)
        zero = links.members[0]
        for _ in range(3):
            zero.heard.clear()
            assert links.network.break_connections("b0", "b1")
            links.loop.run_until(lambda: zero.heard == ["down 1", "up 1"], 5.0)
            links.loop.run_until(links.both_up, 5.0)


def test_sending_into_a_connection_that_has_just_broken_is_dropped_like_any_other(links: Links) -> None:
    """Between the break and the moment at which the link hears of it; the other peers' messages leave."""
    links.add(2)
    links.learn(0, {2: (1, "b2", PORT)})
    zero = links.members[0]
    links.loop.run_until(lambda: links.both_up() and zero.peers.is_up(2), 5.0)
    links.members[2].received.clear()

    async def break_and_send() -> None:
        zero.peers.connection(1).close()
        for connection in (zero.peers._links[1].bulk, zero.peers._links[1].control):
            assert connection is not None
            connection.close()
        for to in (1, 2):
            zero.peers.send(to, heartbeat(to))
            zero.peers.send(to, AppendResponse(to, 6, 1, 9))
        zero.peers.flush()
        zero.peers.learn({3: (1, "nowhere", PORT)})

    links.run(break_and_send(), "b0")
    links.loop.run_until(
        lambda: sum(isinstance(each, RaftMessages) for _, each in links.members[2].received) == 2, 1.0
    )
    links.loop.run_until(lambda: zero.heard[-1] == "up 1" and "down 1" in zero.heard, 5.0)


def test_a_first_connection_that_breaks_while_the_second_is_made_is_no_link(
    links: Links, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not count as up, nor end the dialling for good."""
    opened: list[RpcConnection] = []
    real = RpcConnection.open.__func__

    async def open_and_break(cls: Any, *args: Any, **options: Any) -> RpcConnection:
        connection: RpcConnection = await real(cls, *args, **options)
        if args[3].broker_id == 0:
            opened.append(connection)
            if len(opened) == 2:
                opened[0].close()
                while not opened[0].closed or opened[0]._is_open:
                    await links.loop.create_task(_turn())
        return connection

    monkeypatch.setattr(RpcConnection, "open", classmethod(open_and_break))
    links.loop.run_until(links.both_up, 5.0)
    assert len(opened) == 4
    assert opened[1].closed, "the second of the first pair is not left behind"
    assert links.members[0].heard == ["up 1"]


async def _turn() -> None:
    """One turn of the loop."""


@pytest.mark.parametrize(
    "address", [(5, "b1", 70_000), (5, "b1", -1), (5, "x" * 300, PORT), (5, "a\0b", PORT)]
)
def test_an_address_that_cannot_be_is_survived(
    links: Links, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real network raises other errors for those than for one that does not answer."""
    zero = links.members[0]
    links.loop.run_until(links.both_up, 5.0)
    real = RpcConnection.open.__func__

    async def as_real(cls: Any, seams: Seams, host: str, port: int, *args: Any, **options: Any) -> Any:
        if not 0 <= port <= 65_535:
            raise OverflowError("connect_ex(): port must be 0-65535.")
        if len(host) > 63 or "\0" in host:
            raise UnicodeError("label too long") if len(host) > 63 else ValueError("embedded null")
        return await real(cls, seams, host, port, *args, **options)

    monkeypatch.setattr(RpcConnection, "open", classmethod(as_real))
    links.learn(0, {1: address})
    links.network.break_connections("b0", "b1")
    links.loop.run_until(lambda: "down 1" in zero.heard, 5.0)
    links.loop.run_for(2.0)
    links.learn(0, {1: (6, "b1", PORT)})
    links.loop.run_until(lambda: zero.peers.is_up(1), 5.0)


def test_an_address_at_which_another_broker_is_now_is_not_taken_for_the_right_one(links: Links) -> None:
    links.loop.run_until(links.both_up, 5.0)
    links.learn(0, {7: (1, "b1", PORT)})
    links.loop.run_for(3.0)
    assert not links.members[0].peers.is_up(7)
    links.add(7)
    links.learn(0, {7: (2, "b7", PORT)})
    links.loop.run_until(lambda: links.members[0].peers.is_up(7), 5.0)


def test_hurry_cuts_the_wait_for_the_next_attempt_short(links: Links) -> None:
    zero = links.members[0]
    links.network.for_node("b2", "b2")  # a host on which nobody listens yet
    links.learn(0, {2: (1, "b2", PORT)})
    links.loop.run_for(20.0)
    links.add(2)

    async def hurry() -> None:
        zero.peers.hurry(2)

    start = links.loop.time()
    links.run(hurry(), "b0")
    links.loop.run_until(lambda: zero.peers.is_up(2), 5.0)
    assert links.loop.time() - start < 0.1


@pytest.mark.parametrize("steps", range(0, 80, 4))
def test_closing_at_any_moment_leaves_no_connection_behind(steps: int) -> None:
    with Links.of_two(steps) as links:
        target = links.loop.steps + steps
        links.loop.run_until(lambda: links.loop.steps >= target or links.both_up(), 5.0)
        links.run(links.members[0].peers.close(), "b0")
        links.loop.run_for(2.0)
        mine = [each for each in links.members[1].server.connections if each.peer.broker_id == 0]
        assert not mine, "the other side still sees it"


def test_a_broker_of_another_secret_is_never_up(links: Links) -> None:
    zero = links.members[0]
    stranger = links.add(2)
    stranger.server.secret = b"other" * 6
    links.learn(0, {2: (1, "b2", PORT)})
    links.loop.run_for(3.0)
    assert not zero.peers.is_up(2)
    stranger.server.secret = SECRET
    links.loop.run_until(lambda: zero.peers.is_up(2), 5.0)
    assert AuthenticationFailed.retriable is False


def test_one_whose_successor_is_known_is_told_and_gives_up(links: Links) -> None:
    """Two processes run as one broker: the older hears of it from its peers and dials no more."""
    links.loop.run_until(links.both_up, 5)
    links.members[1].server.note_incarnation(0, 2)
    links.loop.run_until(lambda: "StaleIncarnation" in links.members[0].heard, 5)
    links.loop.run_for(5)
    assert links.members[0].heard.count("StaleIncarnation") == 1
    assert not links.members[0].peers.is_up(1)
