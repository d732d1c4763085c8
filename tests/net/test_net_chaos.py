"""Rpc through random faults: answers are right, calls end, and all is well after the last fault."""

from __future__ import annotations

import asyncio
import random

import pytest
from net_world import PORT, SECRET, RpcWorld, broker, client, produce

from raftlog.errors import ConnectionLost, RaftlogError
from raftlog.net.connection import RpcConnection
from raftlog.net.rpc import RaftMessages
from raftlog.net.server import RpcServer
from raftlog.net.stream import Limits

CLIENTS = ("c0", "c1", "c2")
LIMITS = Limits(connection_bytes=200_000, broker_bytes=300_000, write_buffer_bytes=50_000)


class Caller:
    """Calls again and again, over a new connection after each one that broke."""

    def __init__(self, world: RpcWorld, name: str) -> None:
        self.world = world
        self.name = name
        self.random = random.Random(f"{name} {world.loop.trace}")
        self.answered = 0
        self.failed = 0
        self.sent: list[int] = []

    async def run(self) -> None:
        connection: RpcConnection | None = None
        while True:
            try:
                if connection is None or connection.closed:
                    connection = await RpcConnection.open(
                        self.world.seams(self.name), "hs", PORT, client(self.name), SECRET, timeout=2.0
                    )
                await asyncio.gather(*(self.call(connection) for _ in range(self.random.randint(1, 20))))
                connection.send(RaftMessages([self.name, len(self.sent)], []))
                self.sent.append(len(self.sent))
                await asyncio.sleep(self.random.uniform(0, 0.1))
            except ConnectionLost:
                self.failed += 1
                await asyncio.sleep(self.random.random())

    async def call(self, connection: RpcConnection) -> None:
        number, size = self.random.getrandbits(31), self.random.choice((0, 100, 5_000, 60_000))
        data = number.to_bytes(4, "big") * (size // 4)
        try:
            response, payload = await connection.call(produce(number), (data,), timeout=3.0)
        except RaftlogError:
            self.failed += 1
            return
        assert (response.batches[0].base_offset, payload) == (number, data), "the answer to another request"
        self.answered += 1


async def serve(world: RpcWorld, incarnation: int) -> None:
    server = RpcServer(world.seams("s"), broker(1, incarnation), SECRET, world.handler, LIMITS)
    await server.start("hs", PORT)


async def inject(world: RpcWorld, rng: random.Random, seconds: float) -> None:
    end = world.loop.time() + seconds
    incarnation = 1
    while world.loop.time() < end:
        await asyncio.sleep(rng.uniform(0, 2.0))
        a, b = rng.sample(("s", rng.choice(CLIENTS)), 2)
        fault = rng.randrange(7)
        if fault == 0:
            world.network.cut(a, b, both=rng.random() < 0.5)
        elif fault == 1:
            world.network.heal()
        elif fault == 2:
            world.network.clog(a, b, rng.uniform(0, 3.0))
        elif fault == 3:
            world.network.break_connections(a, b)
        elif fault == 4:
            world.loop.pause("s")
            world.loop.call_later(rng.random(), world.loop.resume, "s")
        else:
            if rng.random() < 0.5:
                world.loop.kill("s")
            else:
                world.network.power_cut("s")
            await asyncio.sleep(rng.random())
            incarnation += 1
            world.loop.run_as("s", serve(world, incarnation))
    world.network.heal()


def run(seed: int, seconds: float) -> tuple[int, list[int], list[int]]:
    with RpcWorld(seed) as world:
        world.loop.run_as("s", serve(world, 1))
        callers = [Caller(world, name) for name in CLIENTS]
        for caller in callers:
            world.loop.run_as(caller.name, caller.run())
        world.loop.run_until_complete(inject(world, random.Random(seed), seconds))
        world.loop.resume("s")
        world.loop.run_for(5.0)
        before = [caller.answered for caller in callers]
        world.loop.run_for(1.0)
        after = [caller.answered for caller in callers]
        assert all(b > a for a, b in zip(before, after, strict=True)), "no progress after the last fault"
        for caller in callers:
            got = [
                message.messages[1]
                for message, _ in world.handler.one_way
                if message.messages[0] == caller.name
            ]
            assert got == sorted(set(got)), "one-way messages doubled or out of order"
        return world.loop.trace, after, [caller.failed for caller in callers]


@pytest.mark.parametrize("seed", range(3))
def test_chaos(seed: int) -> None:
    _, answered, failed = run(seed, 12.0)
    assert min(answered) > 50
    assert sum(failed) > 5, "the faults were felt"


def test_chaos_is_repeatable() -> None:
    assert run(100, 2.0) == run(100, 2.0)
