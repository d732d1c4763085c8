"""A client whose connections are inside calls that fail, before or after they were carried out: nothing lost,
doubled or reordered."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from fake_cluster import TOPIC, SimWorld, lose_answer, move_to, numbered, send_singly

from raftlog import aio
from raftlog.client.cluster import ClusterClient
from raftlog.net.network import StreamProtocol
from raftlog.net.tunnel_dial import dial
from raftlog.net.tunnel_serve import Tunnels


class FailingCalls:
    """A Network inside calls to the fake brokers.

    Args:
        world: whose brokers.
        failures: how many of a hundred calls fail.
    """

    def __init__(self, world: SimWorld, failures: int) -> None:
        self.random = random.Random(world.random.random())
        self.failures = failures
        self.failed = 0
        self.tunnels = {each.address: Tunnels(each.server.accept) for each in world.cluster.brokers.values()}
        self.tasks: set[asyncio.Task[None]] = set()

    async def connect(
        self, protocol_factory: Callable[[], StreamProtocol], host: str, port: int, *, timeout: float
    ) -> Any:
        return await dial(partial(self._call, (host, port)), protocol_factory, host, timeout=timeout)

    async def listen(self, *_: object) -> Any:
        raise AssertionError("clients do not listen")

    def _call(self, address: tuple[str, int], message: bytes) -> asyncio.Future[bytes]:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        task = asyncio.get_running_loop().create_task(self._carry(address, message, answer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return answer

    async def _carry(self, address: tuple[str, int], message: bytes, answer: asyncio.Future[bytes]) -> None:
        fate = self.random.randrange(200)
        await asyncio.sleep(self.random.uniform(0.0005, 0.003))
        said = None if fate < self.failures else await self.tunnels[address].exchange(message)
        await asyncio.sleep(self.random.uniform(0.0005, 0.003))
        if fate < 2 * self.failures:
            self.failed += 1
            answer.set_exception(ConnectionResetError("the call failed"))
        else:
            assert said is not None
            answer.set_result(said)


@pytest.mark.parametrize("seed", range(20))
def test_order_and_count_survive_calls_that_fail(seed: int) -> None:
    world = SimWorld(seed=seed)
    (stored,) = world.cluster.create(TOPIC)
    dice = random.Random(seed)
    world.cluster.faults.extend(
        dice.choice([None] * 5 + [lose_answer, move_to(dice.randrange(3))]) for _ in range(60)
    )
    calls = FailingCalls(world, 10)

    def client(_: object) -> ClusterClient:
        return ClusterClient(replace(world.seams("client"), network=calls), world.cluster.bootstrap, "client")

    async def work() -> tuple[list[int], list[Any]]:
        async with aio.Log(world.cluster.bootstrap, client) as log:
            async with log.producer(linger_ms=0, request_timeout_ms=300) as producer:
                sent = [await each for each in await send_singly(producer, numbered(60))]
            async with log.consumer(TOPIC) as consumer:
                read = [record.value async for record in consumer.records(until="end")]
        return [each.offset for each in sent], read

    offsets, read = world.run(work())
    assert stored.values() == numbered(60)
    assert read == numbered(60)
    assert offsets == sorted(set(offsets))
    assert calls.failed
    world.close()
