"""A broker that starts: whoever comes too early is told to come again."""

from __future__ import annotations

import asyncio
from typing import Any

from broker_kit import RAW, World, batch

from raftlog.errors import Busy, ConnectionLost, RaftlogError
from raftlog.net.connection import RpcConnection
from raftlog.net.handshake import Local
from raftlog.net.rpc import (
    FetchPartition,
    FetchRequest,
    MetadataRequest,
    ProducePartition,
    ProduceRequest,
    Request,
)
from raftlog.testing.sim_cluster import PORT, broker_name


def test_who_comes_while_a_broker_starts_is_told_to_come_again() -> None:
    """Clients redial a broker's old port from the moment it was killed: nothing they ask for in between may
    fail for good, and all of it works in the end."""
    with World(brokers=1) as world:
        connection = world.dial(0)
        for number in range(30):
            world.written(connection, batch(b"%d" % number + b"v" * 2_000))
        topic_id = world.topic_id
        world.cluster.run(world.broker(0).store.flush(), node=broker_name(0))
        world.cluster.kill_broker(0)
        disk = world.cluster.disks[0]
        disk.read_latency, disk.cached = 0.05, False
        requests: list[tuple[Request[Any], tuple[bytes, ...]]] = [
            (ProduceRequest([ProducePartition(topic_id, 0)]), (batch(b"x"),)),
            (FetchRequest(0, 1_000, [FetchPartition(topic_id, 0, 0)]), ()),
            (MetadataRequest(None), ()),
        ]
        refusals: list[RaftlogError] = []
        works: set[str] = set()

        async def dial() -> RpcConnection:
            local = Local(world.cluster.plan.cluster_id, "client", client_id=RAW)
            seams, secret = world.cluster.seams(RAW, RAW), world.cluster.plan.secret
            return await RpcConnection.open(seams, broker_name(0), PORT, local, secret, timeout=1.0)

        async def try_all() -> None:
            connection = await dial()
            try:
                for request, payload in requests:
                    await connection.call(request, payload, timeout=5.0)
                    works.add(type(request).__name__)
            finally:
                connection.close()

        async def hammer() -> None:
            while len(works) < len(requests):
                try:
                    await try_all()
                except RaftlogError as error:
                    refusals.append(error)
                await asyncio.sleep(0.005)

        client = world.loop.run_as(RAW, hammer())
        world.cluster.start_broker(0)
        world.until(client.done)
        client.result()
        assert [error for error in refusals if not error.retriable] == []
        kinds = {type(error) for error in refusals}
        assert ConnectionLost in kinds, "before it listens"
        assert Busy in kinds, "while it reads its metadata"
        disk.cached = True
        assert world.fetched(world.dial(0), 30)[-1] == b"x"
