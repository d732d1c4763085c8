"""A producer where nothing fails but what it is given: batching, routing, refusals, the buffer, acks=0."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_cluster import (
    TOPIC,
    SimWorld,
    ignore,
    numbered,
    refuse,
    send_singly,
)

from raftlog.errors import (
    BufferFull,
    Closed,
    ConfigError,
    CorruptBatch,
    DeliveryFailed,
    InvalidRecord,
    InvalidTopic,
    OutOfOrderSequence,
    RaftlogError,
    RecordTooLarge,
    RequestTimeout,
    SerializationError,
    UnknownPartition,
    UnknownTopic,
)
from raftlog.net.rpc import InitProducerRequest, ProduceRequest

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


def test_settings_that_make_no_sense_are_refused(world: SimWorld) -> None:
    async def work() -> None:
        log = world.log()
        with pytest.raises(ConfigError, match="acks=0 contradicts transactional_id"):
            log.producer(transactional_id="t", acks=0)
        with pytest.raises(ConfigError, match="transactions need a name"):
            log.producer().transaction()
        with pytest.raises(ConfigError, match="did you mean 'linger_ms'"):
            log.producer(lingerms=5)

    world.run(work())


# -- identities ----------------------------------------------------------------------------------------------


def test_a_thousand_producers_one_after_another_take_one_producer_id(world: SimWorld) -> None:
    partitions = world.cluster.create(TOPIC, 2)

    async def work() -> None:
        async with world.log() as log:
            for number in range(1000):
                async with log.producer(linger_ms=0) as producer:
                    await producer.send(TOPIC, b"%d" % number, partition=number % 2)

    world.run(work())
    assert world.cluster.producer_ids == 1001, "the fake one counts from 1000"
    for index, partition in enumerate(partitions):
        assert partition.values() == [b"%d" % number for number in range(index, 1000, 2)]
        assert len(partition.state.producers) == 1


def test_producers_at_the_same_time_have_identities_of_their_own(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work() -> None:
        async with world.log() as log:
            for _ in range(3):
                async with log.producer() as one, log.producer() as other:
                    await (await one.send(TOPIC, b"one"))
                    await (await other.send(TOPIC, b"other"))

    world.run(work())
    assert world.cluster.producer_ids == 1002
    assert partition.values() == [b"one", b"other"] * 3


def test_a_producer_with_something_in_doubt_leaves_nothing_to_the_next(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work() -> None:
        async with world.log() as log:
            async with log.producer() as producer:
                await (await producer.send(TOPIC, b"a"))
                world.cluster.every_fault = ignore
                delivery = await producer.send(TOPIC, b"in doubt")
                with pytest.raises(RaftlogError):
                    await producer.close(timeout=0.5)
                assert delivery.done()
            world.cluster.every_fault = None
            async with log.producer() as producer:
                await (await producer.send(TOPIC, b"b"))

    world.run(work())
    assert world.cluster.producer_ids == 1002
    assert partition.values()[-1] == b"b"


@pytest.mark.parametrize("kept", [0, 1])
def test_what_a_partition_lost_of_an_earlier_producer_does_not_concern_the_next(
    world: SimWorld, kept: int
) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work() -> None:
        async with world.log() as log:
            async with log.producer(linger_ms=0) as producer:
                for value in [*[b"kept"] * kept, b"lost"]:
                    await (await producer.send(TOPIC, value))
            partition.lose_last()
            async with log.producer(linger_ms=0) as producer:
                for value in (b"a", b"b"):
                    await (await producer.send(TOPIC, value))

    world.run(work())
    assert partition.values() == [b"kept"] * kept + [b"a", b"b"]
    assert world.cluster.producer_ids == 1001, "the same one, in its next epoch"


def test_a_producer_hears_of_its_own_record_that_was_lost(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work() -> None:
        async with world.log() as log, log.producer(linger_ms=0) as producer:
            for value in (b"kept", b"lost"):
                await (await producer.send(TOPIC, value))
            partition.lose_last()
            with pytest.raises(OutOfOrderSequence):
                await (await producer.send(TOPIC, b"a"))
            await (await producer.send(TOPIC, b"b"))

    world.run(work())
    assert partition.values() == [b"kept", b"b"]


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
