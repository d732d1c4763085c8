"""The table of bad input, a full disk: writes fail with a typed error, reads go on, and it recovers when
there is room."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from broker_kit import TOPIC, World, batch, create_request, outcome

from raftlog.client.cluster import ClusterClient
from raftlog.client.delivery import Delivery
from raftlog.client.producer import ProducerCore
from raftlog.config import ProducerConfig
from raftlog.errors import DeliveryTimeout, NotLeader, RaftlogError, StorageFailed, StorageFull
from raftlog.net.rpc import BrokerStatusRequest, ProduceResponse

BIG = b"b" * 3_000


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


def fill(world: World, *brokers: int) -> None:
    """From now on nothing more fits on these disks than the files there have room for."""
    for broker in brokers:
        disk = world.cluster.disks[broker]
        disk.capacity = disk.used_bytes


def make_room(world: World) -> None:
    for disk in world.cluster.disks.values():
        disk.capacity = None


def write_until_full(world: World, connection: Any, leader: int) -> list[Any]:
    """Batches, one after another, until the broker has no room; their tasks."""
    tasks: list[Any] = []
    while world.broker(leader).store.fault is None:
        tasks.append(world.produce(connection, batch(b"%d" % len(tasks) + BIG)))
        world.loop.run_for(0.02)
        assert len(tasks) < 2_000
    return tasks


def test_disk_full(world: World) -> None:
    """On all brokers at once: refused in a moment, readable all the time, nothing acknowledged is lost."""
    leader = world.leader()
    writer, reader = world.dial(leader), world.dial(leader)
    assert world.written(writer, batch(b"before")) == 0
    fill(world, 0, 1, 2)
    tasks = write_until_full(world, writer, leader)
    before = world.loop.time()
    with pytest.raises(StorageFull) as caught:
        world.written(writer, batch(b"no room"))
    assert caught.value.retriable
    assert not caught.value.indeterminate
    assert world.loop.time() - before < 0.1
    with pytest.raises(StorageFull):
        world.call(world.dial(world.metadata_leader()), create_request("new"))
    committed = world.replica(leader).committed_offset
    assert world.fetched(reader)[0] == b"before"
    assert world.fetched(reader, committed - 1) == [b"%d" % (committed - 2) + BIG]
    assert world.call(reader, BrokerStatusRequest([TOPIC]))[0].replicas[0].committed_offset == committed
    make_room(world)
    world.until(lambda: all(task.done() for task in tasks))
    world.until(lambda: all(broker.store.fault is None for broker in world.cluster.brokers.values()))
    leader = world.leader()
    connection = world.dial(leader)
    assert world.written(connection, batch(b"after")) >= committed
    values: list[bytes] = []
    while len(values) < world.replica(leader).committed_offset:
        values += world.fetched(connection, len(values))
    for number, task in enumerate(tasks):
        found = outcome(task)
        if isinstance(found, ProduceResponse):
            assert values[found.batches[0].base_offset] == b"%d" % number + BIG
        elif isinstance(found, StorageFull):
            assert b"%d" % number + BIG not in values, "a refusal means that nothing happened"
    assert (values[0], values[-1]) == (b"before", b"after")
    assert world.call(world.dial(world.metadata_leader()), create_request("new"))[0].created


def test_disk_full_for_longer_than_a_delivery_may_take(world: World) -> None:
    """A producer hears of it within its delivery timeout; the same producer goes on when there is room."""
    leader = world.leader()
    told: list[RaftlogError] = []
    written: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        client = ClusterClient(world.cluster.seams("app", "app"), world.cluster.bootstrap, "app")
        config = ProducerConfig(delivery_timeout_ms=4_000, linger_ms=0)
        producer = ProducerCore(client, config, loop, loop.call_soon)
        await producer.load_topic(TOPIC, 10.0)

        async def send(value: bytes) -> int:
            delivery = producer.send(TOPIC, value, None, (), None, None)
            assert isinstance(delivery, Delivery)
            return (await delivery).offset

        written.append(await send(b"before"))
        fill(world, 0, 1, 2)
        while world.broker(leader).store.fault is None:
            producer.send(TOPIC, BIG, None, (), None, None)
            await asyncio.sleep(0.02)
        start = loop.time()
        try:
            await send(b"no room")
        except RaftlogError as error:
            told.append(error)
        assert 3.9 <= loop.time() - start <= 4.5
        make_room(world)
        written.append(await send(b"room"))
        producer.sender.stop()
        await client.close()

    world.cluster.run(main(), node="app")
    assert [type(error) for error in told] == [DeliveryTimeout]
    reader = world.dial(world.leader())
    assert world.fetched(reader, written[0], bytes_max=1) == [b"before"]
    assert world.fetched(reader, written[1]) == [b"room"]


@pytest.mark.parametrize("which", ["leader", "follower"])
def test_one_full_disk_of_three_is_no_obstacle_to_the_others(world: World, which: str) -> None:
    leader = world.leader()
    victim = leader if which == "leader" else (leader + 1) % 3
    fill(world, victim)
    written = 0
    while world.broker(victim).store.fault is None:
        now = world.leader()
        task = world.produce(world.dial(now), batch(BIG))
        world.until(task.done)
        written += isinstance(outcome(task), ProduceResponse)
        assert written < 2_000
    healthy = [broker for broker in range(3) if broker != victim]
    assert all(world.broker(broker).store.fault is None for broker in healthy)
    if which == "follower":
        for _ in range(20):
            assert world.written(world.dial(leader), batch(b"goes on")) >= written
    make_room(world)
    world.until(lambda: world.broker(victim).store.fault is None)
    end = world.written(world.dial(world.leader()), batch(b"together again"))
    world.until(lambda: all(world.committed(broker) == end + 1 for broker in range(3)))


def test_a_broker_that_starts_on_a_full_disk_says_so() -> None:
    """It cannot even note its new incarnation; nothing of what it has is harmed."""
    with World(brokers=1) as world:
        assert world.written(world.dial(0), batch(b"kept")) == 0
        world.cluster.kill_broker(0)
        fill(world, 0)
        with pytest.raises(StorageFull):
            world.cluster.start_broker(0)
        make_room(world)
        world.cluster.disks[0] = world.cluster.disks[0].kill()
        world.cluster.start_broker(0)
        connection = world.dial(world.leader())
        assert world.fetched(connection) == [b"kept"]
        assert world.written(connection, batch(b"more")) == 1


# -- a disk that fails --------------------------------------------------------------------------------------


def test_a_failed_sync_retires_the_broker_and_the_others_go_on(world: World) -> None:
    """Its files are not trusted again: it says so to whoever hosts it, and restarts on what it synced."""
    leader = world.leader()
    connection = world.dial(leader)
    assert world.written(connection, batch(b"kept")) == 0
    world.cluster.disks[leader].fail_sync()
    task = world.produce(connection, batch(b"doubtful"))
    world.until(task.done)
    found = outcome(task)
    assert not isinstance(found, ProduceResponse) or found.batches[0].base_offset == 1
    world.until(world.broker(leader).failed.done)
    assert isinstance(world.broker(leader).failed.result(), StorageFailed)
    with pytest.raises(NotLeader, match="out of service"):
        world.written(connection, batch(b"refused"))
    world.cluster.kill_broker(leader)
    following = world.leader(but=leader)
    assert world.written(world.dial(following), batch(b"goes on")) >= 1
    world.cluster.start_broker(leader)
    world.until(lambda: world.committed(leader) == world.committed(following) > 1)
