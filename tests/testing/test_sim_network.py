"""The simulated network against what TCP does."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Iterator

import pytest

from raftlog.errors import ConnectionLost
from raftlog.testing.loop import SimLoop, UnhandledError
from raftlog.testing.network import NodeNetwork, SimNetwork
from raftlog.testing.transport import SimTransport


class Peer(asyncio.Protocol):
    """Notes what it hears."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.chunks: list[int] = []
        self.times: list[float] = []
        self.lost: list[Exception | None] = []
        self.write_paused = 0
        self.write_resumed = 0
        self.ended = False
        self.transport: SimTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, SimTransport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert not self.lost, "data after the connection was lost"
        self.received += data
        self.chunks.append(len(data))
        self.times.append(asyncio.get_running_loop().time())

    def eof_received(self) -> None:
        self.ended = True

    def connection_lost(self, exc: Exception | None) -> None:
        assert not self.lost, "connection_lost twice"
        self.lost.append(exc)

    def pause_writing(self) -> None:
        self.write_paused += 1

    def resume_writing(self) -> None:
        self.write_resumed += 1


class World:
    def __init__(self, seed: int) -> None:
        self.loop = SimLoop(seed, steps_max=2_000_000)
        self.network = SimNetwork(self.loop, random.Random(seed))
        self.accepted: list[Peer] = []

    def node(self, name: str) -> NodeNetwork:
        return self.network.for_node(name, f"host-{name}")

    def accept(self) -> Peer:
        self.accepted.append(Peer())
        return self.accepted[-1]

    def listen(self, name: str, port: int = 80) -> None:
        listening = self.node(name).listen(self.accept, f"host-{name}", port)
        self.loop.run_until_complete(self.loop.run_as(name, listening))

    def connect(self, name: str, to: str, port: int = 80, timeout: float = 5.0) -> Peer:
        connecting = self.node(name).connect(Peer, f"host-{to}", port, timeout=timeout)
        _, peer = self.loop.run_until_complete(self.loop.run_as(name, connecting))
        assert isinstance(peer, Peer)
        return peer

    def pair(self, a: str = "a", b: str = "b") -> tuple[Peer, Peer]:
        if (f"host-{b}", 80) not in self.network._listeners:
            self.listen(b)
        count = len(self.accepted)
        here = self.connect(a, b)
        self.loop.run_until(lambda: len(self.accepted) > count, 5.0)
        return here, self.accepted[-1]

    def until(self, condition: object, timeout: float = 60.0) -> None:
        assert callable(condition)
        self.loop.run_until(condition, timeout)


@pytest.fixture(params=range(4))
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    world.loop.close()


@pytest.fixture(scope="module", autouse=True)
def _collect() -> Iterator[None]:
    """What was dropped without being closed warns here, and warnings are errors."""
    yield
    gc.collect()


def test_bytes_arrive_in_order_in_odd_chunks_after_a_delay(world: World) -> None:
    here, there = world.pair()
    data = random.Random(1).randbytes(300_000)
    start = world.loop.time()
    for i in range(0, len(data), 1000):
        here.transport.write(data[i : i + 1000])
    world.until(lambda: len(there.received) == len(data))
    assert there.received == data
    assert there.times[0] >= start + 0.0001
    assert len(set(there.chunks)) > 3, "chunks differ in size"


def test_both_directions_at_once(world: World) -> None:
    here, there = world.pair()
    here.transport.writelines([b"ping", memoryview(b"pong"), bytearray(b"!")])
    there.transport.write(b"hello")
    world.until(lambda: len(there.received) == 9 and len(here.received) == 5)


def test_close_flushes_then_ends(world: World) -> None:
    here, there = world.pair()
    here.transport.write(bytes(1_000_000))
    here.transport.close()
    here.transport.write(b"too late")
    world.until(lambda: bool(there.lost and here.lost))
    assert len(there.received) == 1_000_000
    assert there.ended
    assert there.lost == here.lost == [None]


def test_abort_drops_what_is_buffered_and_resets_the_peer(world: World) -> None:
    here, there = world.pair()
    there.transport.pause_reading()
    here.transport.write(bytes(1_000_000))
    here.transport.abort()
    world.until(lambda: bool(there.lost and here.lost))
    assert len(there.received) < 1_000_000
    assert isinstance(there.lost[0], ConnectionResetError)
    assert here.lost == [None]


def test_a_reader_that_pauses_holds_the_writer_back(world: World) -> None:
    here, there = world.pair()
    here.transport.set_write_buffer_limits(high=10_000)
    there.transport.pause_reading()
    here.transport.write(bytes(1_000_000))
    assert here.write_paused == 1
    world.loop.run_for(10.0)
    assert not there.received
    assert here.write_resumed == 0
    assert here.transport.get_write_buffer_size() >= 1_000_000 - 256 * 1024
    there.transport.resume_reading()
    world.until(lambda: len(there.received) == 1_000_000)
    world.until(lambda: here.write_resumed == 1)


def test_nothing_is_received_while_paused_even_when_it_has_arrived(world: World) -> None:
    here, there = world.pair()
    here.transport.write(b"x")
    there.transport.pause_reading()
    world.loop.run_for(1.0)
    assert not there.received
    there.transport.resume_reading()
    world.until(lambda: there.received == b"x")


def test_connecting_where_nobody_listens_is_refused_at_once(world: World) -> None:
    world.listen("b", 80)
    start = world.loop.time()
    with pytest.raises(ConnectionLost, match="refused"):
        world.connect("a", "b", 81)
    assert world.loop.time() - start < 0.1


def test_connecting_to_no_host_or_through_a_cut_takes_the_whole_timeout(world: World) -> None:
    world.listen("b")
    for to in ("nowhere", "b"):
        world.network.cut("b", "a", both=False)
        start = world.loop.time()
        with pytest.raises(ConnectionLost, match="no answer in time"):
            world.connect("a", to, timeout=3.0)
        assert world.loop.time() - start == pytest.approx(3.0)
    assert not world.accepted


def test_connecting_succeeds_when_the_cut_heals_in_time(world: World) -> None:
    world.listen("b")
    world.network.cut("a", "b")
    world.loop.call_later(2.0, world.network.heal)
    world.connect("a", "b", timeout=10.0)


def test_an_address_is_used_once_and_free_again_after_close(world: World) -> None:
    async def main() -> None:
        network = world.node("a")
        listener = await network.listen(Peer, "host-a", 0)
        host, port = listener.address
        with pytest.raises(OSError, match="in use"):
            await network.listen(Peer, host, port)
        listener.close()
        (await network.listen(Peer, host, port)).close()
        with pytest.raises(OSError, match="cannot assign"):
            await network.listen(Peer, "host-b", 0)

    world.loop.run_until_complete(world.loop.run_as("a", main()))


def test_one_way_cut_swallows_one_direction_without_a_word(world: World) -> None:
    here, there = world.pair()
    world.network.cut("a", "b", both=False)
    here.transport.write(b"into the void")
    there.transport.write(b"still here")
    world.loop.run_for(100.0)
    assert not there.received
    assert here.received == b"still here"
    assert not here.lost
    assert not there.lost


def test_a_healed_cut_delivers_late_or_breaks_both_ends() -> None:
    outcomes = set()
    for seed in range(20):
        world = World(seed)
        here, there = world.pair()
        world.network.cut("a", "b")
        here.transport.write(b"late")
        world.loop.run_for(30.0)
        world.network.heal("a", "b")
        world.until(lambda here=here, there=there: there.received == b"late" or (here.lost and there.lost))
        outcomes.add(bool(here.lost))
        world.loop.close()
    assert outcomes == {True, False}


def test_partition_splits_groups_and_spares_their_inside(world: World) -> None:
    world.listen("a")
    world.listen("b")
    world.network.partition(["a", "c"], ["b", "d"])
    world.connect("c", "a")
    with pytest.raises(ConnectionLost):
        world.connect("c", "b", timeout=1.0)
    world.connect("d", "b")
    world.network.heal()
    world.connect("c", "b")


def test_clog_delays_and_keeps_order(world: World) -> None:
    here, there = world.pair()
    start = world.loop.time()
    here.transport.write(b"first ")
    world.network.clog("a", "b", 7.0)
    here.transport.write(b"second ")
    here.transport.write(b"third")
    world.until(lambda: there.received == b"first second third")
    assert world.loop.time() - start >= 7.0


def test_a_slow_reader_holds_the_writer_back(world: World) -> None:
    here, there = world.pair()
    world.network.read_slowly("b", 100_000.0)
    start, data = world.loop.time(), random.Random(2).randbytes(1_000_000)
    here.transport.write(data)
    assert here.write_paused == 1
    world.loop.run_for(1.0)
    assert 50_000 < len(there.received) <= 110_000
    world.until(lambda: len(there.received) == len(data))
    assert there.received == data
    assert world.loop.time() - start == pytest.approx(10.0, rel=0.1)
    assert here.write_resumed == 1
    world.network.read_slowly("b", None)
    here.transport.write(data)
    before = world.loop.time()
    world.until(lambda: len(there.received) == 2 * len(data))
    assert world.loop.time() - before < 1.0


def test_broken_connections_reset_both_ends_and_new_ones_work(world: World) -> None:
    here, there = world.pair()
    assert world.network.break_connections("a", "b") == 1
    world.until(lambda: bool(here.lost and there.lost))
    assert isinstance(here.lost[0], ConnectionResetError)
    world.pair()


def test_kill_of_a_process_tells_its_peers_and_frees_its_port(world: World) -> None:
    here, there = world.pair()
    there.transport.write(b"last words")
    world.loop.kill("b")
    world.until(lambda: bool(here.lost), 1.0)
    assert here.received == b"last words"
    with pytest.raises(ConnectionLost, match="refused"):
        world.connect("a", "b")
    world.listen("b")
    world.pair()
    assert not there.lost, "nobody told the dead"


def test_kill_of_the_dialing_side(world: World) -> None:
    _, there = world.pair()
    world.loop.kill("a")
    world.until(lambda: bool(there.lost), 1.0)


def test_power_cut_is_silent_until_the_host_is_back(world: World) -> None:
    here, _ = world.pair()
    world.network.power_cut("b")
    here.transport.write(b"hello?")
    world.loop.run_for(100.0)
    assert not here.lost
    with pytest.raises(ConnectionLost, match="no answer"):
        world.connect("a", "b", timeout=2.0)
    world.listen("b")
    here.transport.write(b"hello?")
    world.until(lambda: bool(here.lost), 5.0)
    assert isinstance(here.lost[0], ConnectionResetError)


def test_a_writer_whose_whole_window_was_lost_still_learns_of_it(world: World) -> None:
    here, _ = world.pair()
    world.network.power_cut("b")
    here.transport.write(bytes(1_000_000))
    world.loop.run_for(100.0)
    assert not here.lost
    world.listen("b")
    world.until(lambda: bool(here.lost), 5.0)
    assert isinstance(here.lost[0], ConnectionResetError)


def test_a_host_that_never_answers_again_is_given_up_after_a_quarter_of_an_hour(world: World) -> None:
    here, _ = world.pair()
    start = world.loop.time()
    world.network.power_cut("b")
    here.transport.write(b"hello?")
    world.until(lambda: bool(here.lost), 2000.0)
    assert world.loop.time() - start == pytest.approx(900.0, abs=5.0)


def test_closing_with_bytes_unread_is_a_reset(world: World) -> None:
    here, there = world.pair()
    there.transport.pause_reading()
    here.transport.write(b"unread")
    world.loop.run_for(1.0)
    there.transport.close()
    world.until(lambda: bool(here.lost))
    assert isinstance(here.lost[0], ConnectionResetError)


def test_giving_up_while_the_answer_is_under_way_leaves_nothing_open(world: World) -> None:
    world.listen("b")
    world.network.set_latency("b", "a", 4.0, 4.0)
    with pytest.raises(ConnectionLost):
        world.connect("a", "b", timeout=2.0)
    world.until(lambda: bool(world.accepted and world.accepted[0].lost), 20.0)


def test_a_buffer_changed_after_write_fails_the_simulation(world: World) -> None:
    here, there = world.pair()
    there.transport.pause_reading()
    buffer = bytearray(1_000_000)
    here.transport.write(buffer)
    buffer[-1] = 1
    there.transport.resume_reading()
    with pytest.raises(UnhandledError) as caught:
        world.until(lambda: len(there.received) == 1_000_000)
    assert "was changed" in str(caught.value.__cause__)


def test_same_seed_same_run() -> None:
    def run(seed: int) -> tuple[int, list[int]]:
        world = World(seed)
        here, there = world.pair()
        rng = random.Random(0)
        for _ in range(200):
            here.transport.write(rng.randbytes(rng.randint(1, 3000)))
            world.loop.run_for(0.001)
        world.loop.run_for(1.0)
        world.loop.close()
        return world.loop.trace, there.chunks

    assert run(5) == run(5)
    assert run(5) != run(6)
