"""What a producer has for one broker leaves in one request, and is settled batch by batch."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_cluster import (
    FAULTS,
    TOPIC,
    Answer,
    FakeBroker,
    SimWorld,
    ignore,
)
from fake_partition import FakePartition

from raftlog.client import outbox
from raftlog.errors import Closed, DeliveryTimeout
from raftlog.net.rpc import Produced, ProduceRequest, ProduceResponse
from raftlog.net.server import Reply

PARTITIONS = 6


@pytest.fixture(autouse=True)
def topic(world: SimWorld) -> list[FakePartition]:
    return world.cluster.create(TOPIC, PARTITIONS)


def requests(world: SimWorld) -> list[list[int]]:
    """Partitions of each produce request that came."""
    return [
        sorted(to.partition for to in request.partitions)
        for _, request in world.cluster.requests
        if isinstance(request, ProduceRequest)
    ]


async def everywhere(producer: Any, round_: int = 0) -> list[Any]:
    """A record to each partition, at once."""
    return [await producer.send(TOPIC, b"%d" % round_, partition=n) for n in range(PARTITIONS)]


def test_one_request_for_each_broker(world: SimWorld) -> None:
    async def work() -> None:
        async with world.log() as log, log.producer(linger_ms=0) as producer:
            await asyncio.gather(*await everywhere(producer))  # identity and leaders are known from here on
            world.cluster.requests.clear()
            found = await asyncio.gather(*await everywhere(producer, 1))
            assert [each.offset for each in found] == [1] * PARTITIONS
            assert sorted(requests(world)) == [[0, 3], [1, 4], [2, 5]]

    world.run(work())


def test_unacknowledged_ones_too(world: SimWorld, topic: list[FakePartition]) -> None:
    async def work() -> None:
        async with world.log() as log, log.producer(linger_ms=0, acks=0) as producer:
            await everywhere(producer)
            await asyncio.sleep(1)
            world.cluster.requests.clear()
            await everywhere(producer, 1)
            await asyncio.sleep(1)
            assert sorted(requests(world)) == [[0, 3], [1, 4], [2, 5]]
            assert [partition.state.next_offset for partition in topic] == [2] * PARTITIONS

    world.run(work())


def test_a_batch_that_is_not_settled_holds_no_other(world: SimWorld) -> None:
    held: list[tuple[FakeBroker, FakePartition, memoryview, Answer]] = []

    def hold(broker: FakeBroker, at: FakePartition, payload: memoryview, reply: Answer) -> None:
        held.append((broker, at, payload, reply))

    async def work() -> None:
        async with world.log() as log, log.producer(linger_ms=0) as producer:
            await asyncio.gather(*await everywhere(producer))
            world.cluster.faults.append(hold)
            deliveries = await everywhere(producer, 1)
            await asyncio.sleep(0.1)
            assert [delivery.done() for delivery in deliveries].count(False) == 1
            others = [n for n in range(PARTITIONS) if n != held[0][1].index]
            more = [await producer.send(TOPIC, b"2", partition=n) for n in others]
            more = await asyncio.gather(*more)
            assert [each.offset for each in more] == [2] * (PARTITIONS - 1), "the others go on meanwhile"
            broker, at, payload, reply = held[0]
            broker.append_and_answer(at, payload, reply)
            assert (await deliveries[at.index]).offset == 1

    world.run(work())


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("position", range(4))
def test_what_befalls_one_batch_of_a_request_neither_loses_nor_doubles_any(
    world: SimWorld, topic: list[FakePartition], name: str, position: int
) -> None:
    async def work() -> None:
        async with world.log() as log, log.producer(linger_ms=0, request_timeout_ms=2_000) as producer:
            await asyncio.gather(*await everywhere(producer))
            world.cluster.faults.extend([None] * position + [FAULTS[name]])
            rounds = [await everywhere(producer, 1), await everywhere(producer, 2)]
            for number, deliveries in enumerate(rounds, 1):
                assert [(await each).offset for each in deliveries] == [number] * PARTITIONS

    world.run(work())
    assert [partition.state.next_offset for partition in topic] == [3] * PARTITIONS


def test_one_that_expires_fails_alone(world: SimWorld) -> None:
    async def work() -> None:
        async with (
            world.log() as log,
            log.producer(linger_ms=0, delivery_timeout_ms=3_000, request_timeout_ms=1_000) as producer,
        ):
            await asyncio.gather(*await everywhere(producer))
            world.cluster.faults.append(ignore)
            found = await asyncio.gather(*await everywhere(producer, 1), return_exceptions=True)
            assert sum(isinstance(each, DeliveryTimeout) for each in found) <= 1
            assert sum(not isinstance(each, BaseException) for each in found) >= PARTITIONS - 1

    world.run(work())


def test_large_batches_go_in_requests_of_their_own(world: SimWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "REQUEST_BYTES_MAX", 1_500)

    async def work() -> None:
        async with world.log() as log, log.producer(linger_ms=0, compression="none") as producer:
            await asyncio.gather(*await everywhere(producer))
            world.cluster.requests.clear()
            sent = [await producer.send(TOPIC, bytes(1_000), partition=n) for n in range(PARTITIONS)]
            await asyncio.gather(*sent)
            assert sorted(requests(world)) == [[n] for n in range(PARTITIONS)]

    world.run(work())


NONSENSE = {
    "too few answers": ProduceResponse([Produced(0, 0)]),
    "too many answers": ProduceResponse([Produced(0, 0)] * 3),
    "of a batch that was not sent": ProduceResponse([Produced(0, 0)], [7]),
    "as many numbers as there are answers": ProduceResponse([Produced(0, 0)], [0, 1]),
    "twice": ProduceResponse([Produced(0, 0)] * 2, [1, 1]),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_an_answer_that_makes_no_sense_ends_the_connection_and_the_batches_go_again(
    world: SimWorld, topic: list[FakePartition], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    produce = FakeBroker._produce
    lies = [NONSENSE[name]]

    def lying(broker: FakeBroker, request: ProduceRequest, payload: memoryview, reply: Reply) -> None:
        if lies and len(request.partitions) == 2:
            reply.ok(lies.pop())
        else:
            produce(broker, request, payload, reply)

    async def work() -> None:
        async with world.log() as log, log.producer(linger_ms=0) as producer:
            await asyncio.gather(*await everywhere(producer))
            monkeypatch.setattr(FakeBroker, "_produce", lying)
            found = await asyncio.gather(*await everywhere(producer, 1))
            assert not lies
            # of "twice" and the like nothing may be believed, or an offset would be another's
            assert [each.offset for each in found] == [1] * PARTITIONS

    world.run(work())
    assert [partition.state.next_offset for partition in topic] == [2] * PARTITIONS


def test_whoever_closes_the_producer_at_one_answer_does_not_break_the_others(
    world: SimWorld, topic: list[FakePartition]
) -> None:
    async def work() -> None:
        async with world.log() as log:
            producer = log.producer(linger_ms=0)
            await asyncio.gather(*await everywhere(producer))
            sender = producer._core.sender
            deliveries = await everywhere(producer, 1)
            deliveries[0]._batch.add_callback(sender.stop)  # 3 is answered with it
            found = await asyncio.gather(*deliveries, return_exceptions=True)
            assert found[0].offset == 1
            assert type(found[3]) is Closed
            assert found[3].indeterminate, "it was sent"

    world.run(work())
    assert [partition.state.next_offset for partition in topic] == [2] * PARTITIONS
