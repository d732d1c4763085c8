"""A producer against brokers that lose answers, move, refuse and fall silent: nothing lost, doubled or
reordered."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from fake_cluster import (
    Fault,
    SimWorld,
    append_silently,
    append_then,
    ignore,
    lose_answer,
    lose_request,
    move_to,
    refuse,
)

from raftlog import aio
from raftlog.errors import (
    BufferFull,
    Busy,
    Closed,
    ConfigError,
    CorruptBatch,
    DeliveryFailed,
    DeliveryTimeout,
    InvalidRecord,
    InvalidTopic,
    LeadershipLost,
    OutOfOrderSequence,
    RaftlogError,
    RecordTooLarge,
    RequestTimeout,
    SerializationError,
    UnknownPartition,
    UnknownProducer,
    UnknownTopic,
)
from raftlog.net.rpc import InitProducerRequest, ProduceRequest

TOPIC = "orders"


def numbered(count: int) -> list[bytes]:
    return [b"%04d" % number for number in range(count)]


async def send_singly(producer: aio.Producer, values: list[bytes], partition: int | None = 0) -> list[Any]:
    """One batch each: a flush between closes it, without waiting."""
    deliveries = []
    for value in values:
        deliveries.append(await producer.send(TOPIC, value, partition=partition))
        producer._core.accumulator.close_open_batches()
    return deliveries


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


# -- the way of a record -------------------------------------------------------------------------------------


def test_what_is_acknowledged_is_where_the_metadata_says(world: SimWorld) -> None:
    partitions = world.cluster.create(TOPIC, 4)

    async def work() -> list[Any]:
        async with world.log() as log, log.producer() as producer:
            deliveries = [
                await producer.send(
                    TOPIC, b"v%d" % n, key=b"k%d" % (n % 7), headers=[("n", b"%d" % n)], timestamp_ms=n
                )
                for n in range(200)
            ]
            return [await delivery for delivery in deliveries]

    placed = world.run(work())
    for number, meta in enumerate(placed):
        record = next(r for r in partitions[meta.partition].records() if r.offset == meta.offset)
        assert record.value == b"v%d" % number
        assert record.headers == (("n", b"%d" % number),)
        assert (meta.topic, meta.timestamp_ms) == (TOPIC, number) == (record.topic, record.timestamp_ms)
    assert len({meta.partition for meta in placed}) > 1
    by_key = {n % 7: {m.partition for k, m in enumerate(placed) if k % 7 == n % 7} for n in range(7)}
    assert all(len(used) == 1 for used in by_key.values()), "equal keys go to equal partitions"


def test_records_that_linger_travel_together_and_one_that_is_waited_for_does_not_linger(
    world: SimWorld,
) -> None:
    world.cluster.create(TOPIC)

    async def work() -> tuple[float, float]:
        async with world.log() as log, log.producer(linger_ms=1000) as producer:
            await (await producer.send(TOPIC, b"warm up"))
            before = world.cluster.count(ProduceRequest)
            deliveries = [await producer.send(TOPIC, value) for value in numbered(50)]
            assert not deliveries[0].done()
            started = world.loop.time()
            await deliveries[-1]
            waited = world.loop.time() - started
            assert world.cluster.count(ProduceRequest) == before + 1, "fifty records, one request"
            await producer.send(TOPIC, b"nobody waits for this one")
            started = world.loop.time()
            count = world.cluster.count(ProduceRequest)
            while world.cluster.count(ProduceRequest) == count:
                await producer.flush() if world.loop.time() - started > 2 else await asyncio.sleep(0.01)
            return waited, world.loop.time() - started

    waited, lingered = world.run(work())
    assert waited < 0.1
    assert 0.9 < lingered < 1.1


def test_a_full_batch_goes_without_lingering(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work() -> None:
        async with world.log() as log, log.producer(linger_ms=60_000, batch_bytes=2048) as producer:
            for _ in range(30):
                await producer.send(TOPIC, b"x" * 200, partition=0)
            await asyncio.sleep(1)
            assert 18 <= len(partition.values()) < 30, "all but the last, open batch"

    world.run(work())
    assert len(partition.values()) == 30


def test_without_a_key_partitions_take_turns_batch_by_batch(world: SimWorld) -> None:
    partitions = world.cluster.create(TOPIC, 3)

    async def work() -> None:
        async with world.log() as log, log.producer(batch_bytes=2048, compression="none") as producer:
            for _ in range(400):
                await producer.send(TOPIC, b"x" * 100)

    world.run(work())
    counts = [len(partition.values()) for partition in partitions]
    assert sum(counts) == 400
    assert min(counts) > 60
    assert sum(len(partition.frames) for partition in partitions) < 40, "batches are full"


@pytest.mark.parametrize("with_keys", [False, True])
def test_send_batch_says_where_each_value_is(world: SimWorld, with_keys: bool) -> None:
    partitions = world.cluster.create(TOPIC, 3)
    values = numbered(2000)
    keys = [b"k%d" % (n % 50) for n in range(2000)] if with_keys else None

    async def work() -> Any:
        async with world.log() as log, log.producer(batch_bytes=4096) as producer:
            return await (await producer.send_batch(TOPIC, values, keys, timestamp_ms=5))

    ranges = world.run(work())
    assert sum(each.count for each in ranges) == 2000
    found: list[bytes] = []
    for each in ranges:
        records = partitions[each.partition].records()
        chosen = [r for r in records if each.base_offset <= r.offset < each.base_offset + each.count]
        assert len(chosen) == each.count
        assert {record.timestamp_ms for record in chosen} == {5}
        found += [record.value for record in chosen]
    assert sorted(found) == values
    if not with_keys:
        assert found == values, "ranges come in the order of the values"
    else:
        homes: dict[bytes | None, set[int]] = {}
        for partition in partitions:
            for record in partition.records():
                homes.setdefault(record.key, set()).add(record.partition)
        assert len(homes) == 50
        assert all(len(home) == 1 for home in homes.values())


def test_send_batch_and_send_keep_their_order(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work() -> None:
        async with world.log() as log, log.producer() as producer:
            for number in range(0, 60, 6):
                for k in range(3):
                    await producer.send(TOPIC, b"%04d" % (number + k))
                await producer.send_batch(TOPIC, [b"%04d" % (number + k) for k in range(3, 6)])

    world.run(work())
    assert partition.values() == numbered(60)


# -- faults --------------------------------------------------------------------------------------------------

FAULTS: dict[str, Fault] = {
    "answer lost": lose_answer,
    "request lost": lose_request,
    "leader moved": move_to(1),
    "leadership lost, written": append_then(LeadershipLost("stepped down")),
    "leadership lost, not written": refuse(LeadershipLost("stepped down")),
    "busy": refuse(Busy("too much")),
    "no answer": ignore,
    "written, no answer": append_silently,
}


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
        assert world.cluster.count(ProduceRequest) == 2
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


def test_what_is_in_doubt_is_never_sent_under_another_identity(world: SimWorld) -> None:
    """0000 is appended silently; when its time is up, 0001 to 0004 are in doubt too and must not be sent
    anew, yet what was never sent goes on under a new producer id."""
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
    assert len(partition.state.producers) == 2
    assert world.cluster.count(InitProducerRequest) == 2


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


# -- refused by send -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"value": "text"}, InvalidRecord),
        ({"value": b"", "key": 5}, InvalidRecord),
        ({"value": b"", "headers": [("a", "text")]}, InvalidRecord),
        ({"value": b"", "headers": [(b"a", b"")]}, InvalidRecord),
        ({"value": b"", "headers": ["ab"]}, InvalidRecord),
        ({"value": b"", "partition": 2}, UnknownPartition),
        ({"value": b"", "partition": -1}, UnknownPartition),
        ({"value": b"x" * 20_000}, RecordTooLarge),
        ({"topic": "no such", "value": b""}, InvalidTopic),
        ({"topic": "nosuch", "value": b""}, UnknownTopic),
        ({"value": b"", "timestamp_ms": 2**70}, InvalidRecord),
    ],
)
def test_what_send_refuses_is_not_buffered_and_the_next_record_goes(
    world: SimWorld, arguments: dict[str, Any], error: type[RaftlogError]
) -> None:
    (partition, _) = world.cluster.create(TOPIC, 2, max_message_bytes=10_000)

    async def work() -> None:
        async with world.log() as log, log.producer() as producer:
            began = world.loop.time()
            with pytest.raises(error):
                await producer.send(**{"topic": TOPIC, **arguments})
            assert world.loop.time() - began < 1, "told at once"
            assert producer._core.accumulator.used == 0
            await (await producer.send(TOPIC, b"good", partition=0))

    world.run(work())
    assert partition.values() == [b"good"]


def test_send_batch_refuses_before_anything_is_sent(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC, max_message_bytes=10_000)

    async def work() -> None:
        async with world.log() as log, log.producer(batch_bytes=1024) as producer:
            for values, keys, error in [
                ([b"a", "b"], None, InvalidRecord),
                ([b"a", b"b"], [b"k"], InvalidRecord),
                ([b"a"] * 500 + [b"x" * 20_000], None, RecordTooLarge),
            ]:
                with pytest.raises(error):
                    await producer.send_batch(TOPIC, values, keys)
            with pytest.raises(UnknownPartition):
                await producer.send_batch(TOPIC, [b"a"], partition=7)
            assert await (await producer.send_batch(TOPIC, [])) == []
            await (await producer.send_batch(TOPIC, [bytearray(b"good"), None]))

    world.run(work())
    assert partition.values() == [b"good", None]


def test_a_serializer_that_raises_is_about_that_record(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)

    def encode(value: int) -> bytes:
        return b"%d" % (10 // value)

    async def work() -> None:
        settings = {"value_serializer": encode, "key_serializer": str.encode}
        async with world.log() as log, log.producer(**settings) as producer:
            with pytest.raises(SerializationError) as caught:
                await producer.send(TOPIC, 0)
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
            await producer.send(TOPIC, 5, key="k")
            await producer.send(TOPIC, None)

    world.run(work())
    assert [(record.key, record.value) for record in partition.records()] == [(b"k", b"2"), (None, None)]


def test_settings_of_later_releases_are_refused(world: SimWorld) -> None:
    async def work() -> None:
        log = world.log()
        with pytest.raises(ConfigError, match="transactional_id"):
            log.producer(transactional_id="t")
        with pytest.raises(ConfigError, match="group"):
            log.consumer(TOPIC, group="g")
        with pytest.raises(ConfigError, match="did you mean 'linger_ms'"):
            log.producer(lingerms=5)

    world.run(work())


# -- the buffer ----------------------------------------------------------------------------------------------


def test_a_full_buffer_blocks_and_then_raises(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    world.cluster.every_fault = ignore

    async def work() -> None:
        async with world.log() as log:
            settings = {
                "buffer_bytes": 64 * 1024,
                "max_block_ms": 500,
                "request_timeout_ms": 3000,
                "linger_ms": 0,
            }
            async with log.producer(**settings) as producer:
                sent = 0
                while producer._core.accumulator.used + 1024 <= 64 * 1024:
                    await producer.send(TOPIC, b"x" * 1000)
                    sent += 1
                assert sent == 64
                began = world.loop.time()
                with pytest.raises(BufferFull):
                    await producer.send(TOPIC, b"x" * 1000)
                assert 0.49 < world.loop.time() - began < 0.6
                world.cluster.every_fault = None
                world.loop.call_later(0.3, world.cluster.brokers[0].drop_connections)
                await producer.send(TOPIC, b"there is room again")
            assert producer._core.accumulator.used == 0

    world.run(work())
    assert partition.values()[-1] == b"there is room again"


def test_flush_tells_of_failures_that_nobody_looked_at_once(world: SimWorld) -> None:
    world.cluster.create(TOPIC)
    world.cluster.faults.extend([refuse(CorruptBatch("bad luck"))])

    async def work() -> None:
        async with world.log() as log, log.producer(linger_ms=50) as producer:
            deliveries = [await producer.send(TOPIC, value) for value in numbered(10)]
            with pytest.raises(CorruptBatch):
                await deliveries[0]
            assert isinstance(deliveries[1].exception(), CorruptBatch)
            with pytest.raises(DeliveryFailed) as caught:
                await producer.flush()
            assert caught.value.details["count"] == 8
            assert len(caught.value.failures) == 8
            assert "orders[0]" in caught.value.failures[0]
            assert "bad luck" in str(caught.value)
            await producer.flush()
            await producer.send(TOPIC, b"good")

    world.run(work())


def test_flush_in_time_or_not(world: SimWorld) -> None:
    world.cluster.create(TOPIC)
    world.cluster.faults.extend([ignore])

    async def work() -> None:
        async with world.log() as log, log.producer(request_timeout_ms=2000) as producer:
            await producer.send(TOPIC, b"slow")
            with pytest.raises(RequestTimeout):
                await producer.flush(timeout=0.5)
            await producer.flush()
        with pytest.raises(Closed):
            await producer.send(TOPIC, b"late")

    world.run(work())


def test_close_gives_up_what_does_not_get_through_in_time(world: SimWorld) -> None:
    world.cluster.create(TOPIC)
    world.cluster.every_fault = ignore

    async def work() -> None:
        async with world.log() as log:
            producer = log.producer()
            delivery = await producer.send(TOPIC, b"v")
            with pytest.raises(RequestTimeout):
                await producer.close(timeout=1)
            with pytest.raises(Closed) as caught:
                await delivery
            assert caught.value.indeterminate

    world.run(work())


def test_callbacks_run_once_and_their_errors_stay_theirs(
    world: SimWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world.cluster.create(TOPIC)
    heard: list[int] = []

    def raises(_: Any) -> None:
        raise RuntimeError("not your business")

    async def work() -> None:
        async with world.log() as log, log.producer() as producer:
            delivery = await producer.send(TOPIC, b"v")
            delivery.add_done_callback(raises)
            delivery.add_done_callback(lambda each: heard.append(each.result().offset))
            await delivery
            delivery.add_done_callback(lambda each: heard.append(each.result().offset))
            batch = await producer.send_batch(TOPIC, numbered(3))
            batch.add_done_callback(lambda each: heard.append(each.result()[0].count))

    world.run(work())
    assert heard == [0, 0, 3]
    assert "not your business" in caplog.text


def test_blocking_on_the_loop_that_has_to_deliver_is_refused(world: SimWorld) -> None:
    world.cluster.create(TOPIC)

    async def work() -> None:
        async with world.log() as log, log.producer() as producer:
            delivery = await producer.send(TOPIC, b"v")
            with pytest.raises(RuntimeError, match="await it"):
                delivery.result()
            await delivery
            assert delivery.result().offset == 0

    world.run(work())


# -- at most once --------------------------------------------------------------------------------------------


def test_acks_0_is_written_once_and_never_again(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work() -> list[int]:
        async with world.log() as log, log.producer(acks=0, linger_ms=0) as producer:
            deliveries = await send_singly(producer, numbered(10))
            offsets = [(await delivery).offset for delivery in deliveries]
            await asyncio.sleep(0.1)
            return offsets

    assert world.run(work()) == [-1] * 10
    assert partition.values() == numbered(10)
    assert world.cluster.count(InitProducerRequest) == 0
    assert not partition.state.producers


def test_acks_0_finds_the_new_leader_by_asking_now_and_then(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work() -> None:
        async with world.log() as log, log.producer(semantics="at-most-once", linger_ms=0) as producer:
            await (await producer.send(TOPIC, b"0000"))
            await asyncio.sleep(0.1)
            world.cluster.move(partition, 1)
            await (await producer.send(TOPIC, b"lost"))
            await asyncio.sleep(2)
            await (await producer.send(TOPIC, b"0001"))
            await asyncio.sleep(0.1)

    world.run(work())
    assert partition.values() == numbered(2)
