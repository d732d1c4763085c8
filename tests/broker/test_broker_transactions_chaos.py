"""Transactions while brokers die, lose power and are cut off: each one is in all of its partitions or in
none, its offsets with it, once."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from broker_kit import RAW, batch
from coordination_kit import CoordinatedWorld

from raftlog.broker.internal_topics import GROUPS_TOPIC, TRANSACTIONS_TOPIC
from raftlog.errors import RaftlogError
from raftlog.net.connection import RpcConnection
from raftlog.net.handshake import Local
from raftlog.net.rpc import (
    GroupOffset,
    OffsetFetchRequest,
    ProducePartition,
    ProduceRequest,
    Request,
    StageOffsetsRequest,
)
from raftlog.net.rpc_transactions import (
    EndTransactionRequest,
    EnlistRequest,
    InitTransactionsRequest,
    ProducerIdentity,
)
from raftlog.testing.disk import CrashMode
from raftlog.testing.sim_cluster import PORT, broker_name

Place = tuple[bytes, int]
CALL_S = 2.0


class Caller:
    """Finds the leader of a partition as a client does: by what it was told, or one broker after another."""

    def __init__(self, world: CoordinatedWorld) -> None:
        self.world = world
        self.connections: dict[int, RpcConnection] = {}
        self.leaders: dict[Place, int] = {}

    async def connection(self, broker_id: int) -> RpcConnection:
        known = self.connections.get(broker_id)
        if known is None or known.closed:
            plan = self.world.cluster.plan
            local = Local(plan.cluster_id, "client", -1, RAW)
            known = self.connections[broker_id] = await RpcConnection.open(
                self.world.cluster.seams(RAW, RAW),
                broker_name(broker_id),
                PORT,
                local,
                plan.secret,
                timeout=1.0,
            )
        return known

    async def call(self, place: Place, request: Request[Any], payload: tuple[bytes, ...] = ()) -> Any:
        """Until an answer comes that is not one to ask again."""
        broker_id = self.leaders.get(place, 0)
        while True:
            try:
                connection = await self.connection(broker_id)
                answer, _ = await connection.call(request, payload, timeout=CALL_S)
            except RaftlogError as error:
                if not error.retriable:
                    raise
                leader = error.details.get("leader")
                broker_id = (broker_id + 1) % 3 if leader is None or leader == broker_id else leader
                await asyncio.sleep(0.03)
            else:
                self.leaders[place] = broker_id
                return answer


class Producer:
    """One transactional id: transactions over two partitions and a group of its own."""

    def __init__(self, world: CoordinatedWorld, name: str, timeout_ms: int) -> None:
        self.world = world
        self.name = name
        self.timeout_ms = timeout_ms
        self.caller = Caller(world)
        self.place = world.place(TRANSACTIONS_TOPIC, name)
        self.group_place = world.place(GROUPS_TOPIC, name)
        self.topic_id = world.topic_id
        self.outcomes: dict[int, bool | None] = {}
        """Number of the transaction -> committed, aborted, or not known."""
        self.who = ProducerIdentity(-1, -1)

    async def run(self, count: int) -> None:
        await self.init()
        for number in range(count):
            self.outcomes[number] = None
            try:
                await self.transact(number)
            except RaftlogError as error:
                if error.fatal:
                    await self.init()
                else:
                    await self.give_up(number)

    async def init(self) -> None:
        request = InitTransactionsRequest(*self.place, self.name, self.timeout_ms)
        self.who = await self.caller.call(self.place, request)

    async def transact(self, number: int) -> None:
        producer_id, epoch = self.who.producer_id, self.who.epoch
        targets = [(self.topic_id, partition) for partition in (0, 1)]
        await self.caller.call(
            self.place, EnlistRequest(*self.place, self.name, producer_id, epoch, targets, [self.name])
        )
        value = f"{self.name} {number}".encode()
        encoded = batch(value, producer=producer_id, epoch=epoch, sequence=0, transactional=True)
        for target in targets:
            await self.caller.call(target, ProduceRequest([ProducePartition(*target)]), (encoded,))
        offsets = [GroupOffset(self.topic_id, 0, number + 1)]
        await self.caller.call(
            self.group_place,
            StageOffsetsRequest(*self.group_place, self.name, "", -1, producer_id, epoch, offsets),
        )
        await self.end(number, number % 4 != 3)

    async def end(self, number: int, commit: bool) -> None:
        request = EndTransactionRequest(*self.place, self.name, self.who.producer_id, self.who.epoch, commit)
        self.who = await self.caller.call(self.place, request)
        self.outcomes[number] = commit

    async def give_up(self, number: int) -> None:
        try:
            await self.end(number, False)
        except RaftlogError:
            await self.init()


def hurt(world: CoordinatedWorld, rng: random.Random) -> None:
    """One broker dies or is cut off, for a while."""
    victim = rng.randrange(3)
    how = rng.choice(["kill", "power", "cut off"])
    if how == "kill":
        world.cluster.kill_broker(victim)
    elif how == "power":
        world.cluster.cut_power(victim, CrashMode.RANDOM)
    else:
        world.isolate(victim)
    world.loop.run_for(rng.uniform(0.05, 2.5))
    if how == "cut off":
        world.cluster.network.heal()
    else:
        world.cluster.start_broker(victim)
        world.cluster.introduce()


def check(world: CoordinatedWorld, producers: list[Producer]) -> int:
    """Every promise; returns how many transactions were committed."""
    read = [world.read(partition) for partition in (0, 1)]
    for found in read:
        assert len(set(found)) == len(found), "written twice"
    assert sorted(read[0]) == sorted(read[1]), "half of a transaction"
    for producer in producers:
        there = {number for number in producer.outcomes if f"{producer.name} {number}".encode() in read[0]}
        for number, committed in producer.outcomes.items():
            if committed is not None:
                assert committed == (number in there), (producer.name, number, committed)
        request = OffsetFetchRequest(*producer.group_place, producer.name)
        offsets = world.seek(producer.group_place, request)[0].offsets
        assert [each.offset for each in offsets] == ([max(there) + 1] if there else []), producer.name
    return len(read[0])


@pytest.mark.parametrize("seed", [0, 1, 2, 24])
def test_all_or_nothing(seed: int) -> None:
    rng = random.Random(seed)
    with CoordinatedWorld(partitions=2, seed=seed) as world:
        producers = [Producer(world, f"p{number}", (60_000, 3_000)[number % 2]) for number in range(4)]
        tasks = [world.loop.run_as(RAW, producer.run(60)) for producer in producers]
        for _ in range(6):
            world.loop.run_for(rng.uniform(0.05, 1.0))
            hurt(world, rng)
        world.until(lambda: all(task.done() for task in tasks), 240.0)
        for task in tasks:
            task.result()
        world.until_true(lambda: not any(world.open_transactions(partition).open for partition in (0, 1)))
        assert check(world, producers) > 60
        for broker in world.cluster.brokers.values():
            assert not [replica.fault for replica in broker.replicas() if replica.fault is not None]
