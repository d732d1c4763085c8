"""A producer against brokers that lose answers, move, refuse and fall silent: nothing lost, doubled or
reordered."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from fake_cluster import (
    FAULTS,
    TOPIC,
    SimWorld,
    append_silently,
    ignore,
    lose_answer,
    move_to,
    numbered,
    refuse,
    send_singly,
)

from raftlog.errors import (
    CorruptBatch,
    DeliveryTimeout,
    LeadershipLost,
    OutOfOrderSequence,
    ProducerFenced,
    RaftlogError,
    StorageFull,
    UnknownProducer,
    UnknownTopic,
)
from raftlog.net.rpc import InitProducerRequest


def produce(world: SimWorld, values: list[bytes], **settings: Any) -> list[Any]:
    """Send each value in a batch of its own and wait for all; what each came to."""

    async def work() -> list[Any]:
        async with world.log() as log, log.producer(**settings) as producer:
            outcomes: list[Any] = []
            for delivery in await send_singly(producer, values):
                try:
                    outcomes.append((await delivery).offset)
                except RaftlogError as error:
                    outcomes.append(error)
            return outcomes

    return world.run(work())


# -- faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_failure_anywhere_in_the_window_neither_loses_nor_doubles_nor_reorders(
    world: SimWorld, name: str, position: int
) -> None:
    (partition,) = world.cluster.create(TOPIC)
    world.cluster.faults.extend([None] * position + [FAULTS[name]])
    offsets = produce(world, numbered(12), linger_ms=0, request_timeout_ms=1000)
    assert not world.cluster.faults, "the fault was met"
    assert partition.values() == numbered(12)
    assert offsets == list(range(12)), "each delivery knows its own offset, also of what was written before"


@pytest.mark.parametrize("seed", range(40))
def test_order_and_count_survive_random_faults(seed: int) -> None:
    world = SimWorld(seed=seed)
    dice = random.Random(seed)
    (partition,) = world.cluster.create(TOPIC)
    world.cluster.faults.extend(
        dice.choice([None, None, None, *FAULTS.values(), move_to(dice.randrange(3))]) for _ in range(60)
    )
    offsets = produce(world, numbered(60), linger_ms=0, request_timeout_ms=300)
    assert partition.values() == numbered(60)
    assert offsets == list(range(60))
    world.close()


def test_five_batches_are_in_flight_and_not_more(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    held: list[Any] = []

    def hold(broker: Any, at: Any, payload: memoryview, reply: Any) -> None:
        held.append((broker, at, payload, reply))

    world.cluster.every_fault = hold

    async def work() -> None:
        async with world.log() as log, log.producer() as producer:
            await send_singly(producer, numbered(9))
            await asyncio.sleep(0.2)
            assert len(held) == 5
            broker, at, payload, reply = held[0]
            broker.append_and_answer(at, payload, reply)
            await asyncio.sleep(0.1)
            assert len(held) == 6
            world.cluster.every_fault = None
            for broker, at, payload, reply in held[1:]:
                broker.append_and_answer(at, payload, reply)

    world.run(work())
    assert partition.values() == numbered(9)


def test_max_in_flight_bounds_the_window(world: SimWorld) -> None:
    world.cluster.create(TOPIC)
    world.cluster.every_fault = ignore

    async def work() -> None:
        log = world.log()
        producer = log.producer(max_in_flight=2)
        await send_singly(producer, numbered(5))
        await asyncio.sleep(0.2)
        assert world.cluster.batches() == 2
        producer._core.sender.stop()
        await log._connected().close()

    world.run(work())


def test_a_dead_leader_is_replaced_as_soon_as_another_is_elected(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work() -> float:
        async with world.log() as log, log.producer(linger_ms=0) as producer:
            await (await producer.send(TOPIC, b"0000"))
            world.loop.kill("broker-0")
            partition.leader = None
            world.loop.call_later(0.15, world.cluster.move, partition, 2)
            killed = world.loop.time()
            await (await producer.send(TOPIC, b"0001"))
            return world.loop.time() - killed

    assert world.run(work()) < 0.25, "elected after 150 ms; the rest is looking for it"
    assert partition.values() == numbered(2)


def test_a_leader_behind_a_partition_is_left_when_another_is_elected(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work() -> float:
        async with world.log() as log, log.producer(linger_ms=0) as producer:
            await (await producer.send(TOPIC, b"0000"))
            world.network.cut("client", "broker-0")
            world.cluster.move(partition, 2)
            began = world.loop.time()
            await (await producer.send(TOPIC, b"0001"))
            return world.loop.time() - began

    assert world.run(work()) < 3, "long before the request timeout of ten seconds"
    assert partition.values() == numbered(2)


def test_a_late_answer_of_a_leader_that_was_left_is_stale(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    held: list[Any] = []

    def hold(broker: Any, at: Any, payload: memoryview, reply: Any) -> None:
        held.append((broker, at, payload, reply))

    world.cluster.faults.extend([hold, hold])

    async def work() -> None:
        async with world.log() as log, log.producer(linger_ms=0) as producer:
            delivery = await producer.send(TOPIC, b"0000")
            await asyncio.sleep(0.1)
            world.cluster.move(partition, 1)
            await asyncio.sleep(2)
            assert [broker.id for broker, *_ in held] == [0, 1], "sent again to the new leader"
            held[0][3].fail(LeadershipLost("at last"))
            await asyncio.sleep(0.1)
            assert world.cluster.batches() == 2, "that was about the first attempt"
            broker, at, payload, reply = held[1]
            broker.append_and_answer(at, payload, reply)
            assert (await delivery).offset == 0

    world.run(work())
    assert partition.values() == numbered(1)


def test_all_brokers_gone_and_back_costs_nothing_but_time(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work() -> list[Any]:
        async with world.log() as log, log.producer(linger_ms=0) as producer:
            await (await producer.send(TOPIC, b"0000"))
            for broker in world.cluster.brokers:
                world.network.cut("client", f"broker-{broker}")
            deliveries = await send_singly(producer, numbered(8)[1:])
            await asyncio.sleep(40)
            assert not any(delivery.done() for delivery in deliveries)
            world.network.heal()
            return [(await delivery).offset for delivery in deliveries]

    assert world.run(work()) == list(range(1, 8))
    assert partition.values() == numbered(8)


# -- giving up -----------------------------------------------------------------------------------------------


def test_delivery_timeout_says_whether_it_may_have_been_written(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    world.cluster.every_fault = append_silently

    async def work() -> tuple[list[Any], float]:
        log = world.log()
        producer = log.producer(delivery_timeout_ms=2000, linger_ms=0)
        deliveries = await send_singly(producer, numbered(7))
        began = world.loop.time()
        errors = []
        for delivery in deliveries:
            with pytest.raises(RaftlogError) as caught:
                await delivery
            errors.append(caught.value)
        took = world.loop.time() - began
        world.cluster.every_fault = None
        assert (await (await producer.send(TOPIC, b"after"))).offset >= 0
        await log.close()
        return errors, took

    errors, took = world.run(work())
    assert [type(error) for error in errors] == [DeliveryTimeout] * 7
    assert [error.indeterminate for error in errors] == [True] * 5 + [False] * 2, "two never left"
    assert took <= 2.001
    assert partition.values().count(b"after") == 1
    assert partition.values()[:-1] == numbered(7)[: len(partition.values()) - 1]


def test_a_delivery_that_waited_for_a_producer_id_says_why_there_was_none(world: SimWorld) -> None:
    world.cluster.create(TOPIC)
    world.cluster.refuse_identity = lambda broker_id: StorageFull("no room on the device")
    (error,) = produce(world, [b"x"], delivery_timeout_ms=500, linger_ms=0)
    assert isinstance(error, DeliveryTimeout)
    assert isinstance(error.__cause__, StorageFull)
    assert not error.indeterminate
    assert "no room" in str(error)


def test_what_is_in_doubt_is_never_sent_under_another_identity(world: SimWorld) -> None:
    """0000 is appended silently; when its time is up, 0001 to 0004 are in doubt too and must not be sent
    anew, yet what was never sent goes on under a new epoch."""
    (partition,) = world.cluster.create(TOPIC)
    world.cluster.faults.extend([append_silently] * 5)

    async def work() -> list[Any]:
        log = world.log()
        producer = log.producer(delivery_timeout_ms=1000, linger_ms=0)
        early = await send_singly(producer, numbered(5))
        await asyncio.sleep(0.9)
        late = await send_singly(producer, numbered(8)[5:])
        outcomes: list[Any] = []
        for delivery in [*early, *late]:
            try:
                outcomes.append((await delivery).offset)
            except RaftlogError as error:
                outcomes.append(error)
        await log.close()
        return outcomes

    outcomes = world.run(work())
    assert all(isinstance(each, RaftlogError) and each.indeterminate for each in outcomes[:5])
    assert outcomes[5:] == [5, 6, 7]
    assert partition.values() == numbered(8)
    assert [state.epoch for state in partition.state.producers.values()] == [1]
    assert world.cluster.count(InitProducerRequest) == 1


def test_what_was_given_up_and_comes_late_is_fenced_by_what_followed(world: SimWorld) -> None:
    """Found by simulation (a receiver so slow that a batch arrived after later ones of its producer)."""
    (partition,) = world.cluster.create(TOPIC)
    late: list[bytes] = []
    world.cluster.faults.extend([lambda broker, at, payload, reply: late.append(bytes(payload))])

    async def work() -> RaftlogError:
        log = world.log()
        producer = log.producer(delivery_timeout_ms=1000, linger_ms=0)
        with pytest.raises(RaftlogError) as caught:
            await (await producer.send(TOPIC, b"early"))
        assert (await (await producer.send(TOPIC, b"later"))).offset == 0
        await log.close()
        return caught.value

    assert world.run(work()).indeterminate
    with pytest.raises(ProducerFenced):
        partition.append(memoryview(late[0]), 0)
    assert partition.values() == [b"later"]


def test_a_batch_refused_for_good_fails_alone_and_the_rest_goes_on_in_order(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    world.cluster.faults.extend([None, refuse(CorruptBatch("no"))])

    async def work() -> list[Any]:
        log = world.log()
        producer = log.producer(linger_ms=0)
        outcomes: list[Any] = []
        for delivery in await send_singly(producer, numbered(8)):
            try:
                outcomes.append((await delivery).offset)
            except RaftlogError as error:
                outcomes.append(error)
        await log.close()
        return outcomes

    outcomes = world.run(work())
    assert isinstance(outcomes[1], CorruptBatch)
    assert not outcomes[1].indeterminate
    assert [each for each in outcomes if isinstance(each, int)] == list(range(7))
    values = numbered(8)
    del values[1]
    assert partition.values() == values, "in order, under a new identity"


def test_a_producer_that_the_partition_forgot_goes_on_under_a_new_identity(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work() -> list[int]:
        async with world.log() as log, log.producer(linger_ms=0) as producer:
            first = await (await producer.send(TOPIC, b"0000"))
            partition.state.producers.clear()
            deliveries = await send_singly(producer, numbered(4)[1:])
            return [first.offset, *[(await delivery).offset for delivery in deliveries]]

    assert world.run(work()) == [0, 1, 2, 3]
    assert partition.values() == numbered(4)


def test_in_doubt_and_forgotten_is_told_and_not_doubled(world: SimWorld) -> None:
    """A lost acknowledgement, then the partition loses its memory of the producer: sent again it would be
    doubled."""
    (partition,) = world.cluster.create(TOPIC)

    def lose_answer_and_memory(broker: Any, at: Any, payload: memoryview, reply: Any) -> None:
        lose_answer(broker, at, payload, reply)
        at.state.producers.clear()

    world.cluster.faults.extend([None, lose_answer_and_memory])

    async def work() -> list[Any]:
        log = world.log()
        producer = log.producer(linger_ms=0)
        await (await producer.send(TOPIC, b"0000", partition=0))
        with pytest.raises(UnknownProducer) as caught:
            await (await producer.send(TOPIC, b"0001", partition=0))
        assert caught.value.indeterminate
        await (await producer.send(TOPIC, b"0002", partition=0))
        await log.close()
        return [caught.value]

    world.run(work())
    assert partition.values() == numbered(3)


def test_a_log_that_lost_what_it_acknowledged_is_not_papered_over(world: SimWorld) -> None:
    world.cluster.create(TOPIC)
    world.cluster.faults.extend([None, refuse(OutOfOrderSequence("gap"))])
    outcomes = produce_quietly(world, numbered(3))
    assert outcomes[0] == 0
    assert isinstance(outcomes[1], OutOfOrderSequence)


def produce_quietly(world: SimWorld, values: list[bytes]) -> list[Any]:
    async def work() -> list[Any]:
        log = world.log()
        producer = log.producer(linger_ms=0)
        outcomes: list[Any] = []
        for value in values:
            try:
                outcomes.append((await (await producer.send(TOPIC, value))).offset)
            except RaftlogError as error:
                outcomes.append(error)
        await log.close()
        return outcomes

    return world.run(work())


def test_a_topic_deleted_under_way_fails_what_is_buffered(world: SimWorld) -> None:
    world.cluster.create(TOPIC)

    async def work() -> None:
        log = world.log()
        producer = log.producer(linger_ms=0)
        await (await producer.send(TOPIC, b"before"))
        world.cluster.delete(TOPIC)
        with pytest.raises(UnknownTopic):
            await (await producer.send(TOPIC, b"after"))
        with pytest.raises(UnknownTopic):
            await producer.send(TOPIC, b"later")
        world.cluster.create(TOPIC)
        assert (await (await producer.send(TOPIC, b"again"))).offset == 0
        await log.close()

    world.run(work())


@pytest.mark.parametrize("more", [0, 2])
def test_what_a_silent_leader_never_answered_goes_to_one_that_another_handle_heard_of_first(
    world: SimWorld, more: int
) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work() -> float:
        async with (
            world.log() as log,
            log.producer(linger_ms=0, delivery_timeout_ms=20_000) as producer,
            log.consumer(TOPIC, auto_offset_reset="earliest") as consumer,
        ):
            await (await producer.send(TOPIC, b"0000"))
            assert len(await consumer.poll(timeout=1)) == 1
            polling = asyncio.ensure_future(consumer.poll(timeout=60))
            await asyncio.sleep(0.1)
            world.cluster.faults.append(ignore)
            deliveries = await send_singly(producer, [b"0001"])
            await asyncio.sleep(0.1)
            world.cluster.move(partition, 1)  # which the consumer is told, whose request is answered
            await asyncio.sleep(0.1)
            assert log._connected().cache.topics[TOPIC].partitions[0].leader == 1
            began = world.loop.time()
            deliveries += await send_singly(producer, numbered(2 + more)[2:])
            await asyncio.gather(*deliveries)
            took = world.loop.time() - began
            await polling
            return took

    assert world.run(work()) < 3, "long before the request timeout of ten seconds"
    assert partition.values() == numbered(2 + more)
