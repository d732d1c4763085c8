"""A consumer: positions, seeking, resets, faults, and what it hands out when."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from fake_cluster import SimWorld
from fake_partition import FakePartition

from raftlog import aio
from raftlog.errors import (
    Busy,
    Closed,
    ConcurrentUse,
    ConfigError,
    CorruptBatch,
    CorruptFrame,
    DeserializationError,
    LogTruncated,
    NotLeader,
    OffsetOutOfRange,
    RaftlogError,
    UnknownPartition,
    UnknownTopic,
)
from raftlog.net.rpc import FetchRequest
from raftlog.record.codec import encode_batch
from raftlog.record.types import Record, TopicPartition

TOPIC = "orders"


def fill(partition: FakePartition, start: int, end: int, *, per_batch: int = 10) -> None:
    """Append records of values start to end - 1, their timestamps a hundred times that."""
    for first in range(start, end, per_batch):
        values = [b"%04d" % number for number in range(first, min(first + per_batch, end))]
        partition.append(memoryview(encode_batch(values, None, first * 100)), 0)


def numbered(start: int, end: int) -> list[bytes]:
    return [b"%04d" % number for number in range(start, end)]


def values(records: list[Record]) -> list[Any]:
    return [record.value for record in records]


def consume(
    world: SimWorld, work: Callable[[aio.Consumer], Awaitable[Any]], *topics: str, **settings: Any
) -> Any:
    """Run ``work`` with a consumer of the topic."""

    async def run() -> Any:
        async with (
            world.log() as log,
            log.consumer(*(topics or (() if "assign" in settings else (TOPIC,))), **settings) as consumer,
        ):
            return await work(consumer)

    return world.run(run())


async def poll_all(consumer: aio.Consumer, count: int) -> list[Record]:
    """Poll until there are ``count`` records."""
    found: list[Record] = []
    while len(found) < count:
        polled = await consumer.poll(timeout=60)
        assert polled, f"only {len(found)} of {count} came"
        found += polled
    return found


def test_all_records_of_all_partitions_in_the_order_of_each(world: SimWorld) -> None:
    partitions = world.cluster.create(TOPIC, 5)
    for index, partition in enumerate(partitions):
        fill(partition, index * 1000, index * 1000 + 500)

    async def work(consumer: aio.Consumer) -> None:
        assert await consumer.assignment() == [TopicPartition(TOPIC, index) for index in range(5)]
        records = await poll_all(consumer, 2500)
        for index in range(5):
            mine = [record for record in records if record.partition == index]
            assert values(mine) == numbered(index * 1000, index * 1000 + 500)
            assert [record.offset for record in mine] == list(range(500))
            assert await consumer.position((TOPIC, index)) == 500
        assert await consumer.poll(timeout=0.5) == []

    consume(world, work)


def test_poll_returns_as_soon_as_a_record_is_there_and_nothing_only_after_the_timeout(
    world: SimWorld,
) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work(consumer: aio.Consumer) -> None:
        began = world.loop.time()
        assert await consumer.poll(timeout=3) == []
        assert 3 <= world.loop.time() - began < 3.01
        world.loop.call_later(2, fill, partition, 0, 3)
        began = world.loop.time()
        assert values(await consumer.poll(timeout=60)) == numbered(0, 3)
        assert 2 <= world.loop.time() - began < 2.1
        assert await consumer.poll(timeout=0) == []

    consume(world, work)


def test_max_records_bounds_a_poll_and_nothing_is_skipped(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 95)

    async def work(consumer: aio.Consumer) -> None:
        found: list[Record] = []
        while len(found) < 95:
            polled = await consumer.poll(timeout=10, max_records=7)
            assert len(polled) <= 7
            found += polled
            assert await consumer.position((TOPIC, 0)) == len(found), "what is fetched ahead does not count"
        assert values(found) == numbered(0, 95)

    consume(world, work)


def test_seek_to_the_middle_of_a_batch(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 100)

    async def work(consumer: aio.Consumer) -> None:
        await consumer.poll(timeout=1, max_records=3)
        for offset in (57, 0, 99, 10, 9):
            await consumer.seek((TOPIC, 0), offset)
            assert await consumer.position((TOPIC, 0)) == offset
            assert values(await consumer.poll(timeout=10, max_records=1)) == numbered(offset, offset + 1)
        await consumer.seek_to_beginning()
        assert (await consumer.poll(timeout=10, max_records=1))[0].offset == 0
        await consumer.seek_to_end((TOPIC, 0))
        assert await consumer.position((TOPIC, 0)) == 100
        assert await consumer.poll(timeout=1) == []
        fill(partition, 100, 101)
        assert values(await consumer.poll(timeout=10)) == numbered(100, 101)

    consume(world, work)


def test_a_seek_while_a_fetch_is_waiting_does_not_wait_for_it(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 10)

    async def work(consumer: aio.Consumer) -> None:
        await poll_all(consumer, 10)
        await asyncio.sleep(1)
        began = world.loop.time()
        await consumer.seek((TOPIC, 0), 4)
        assert (await consumer.poll(timeout=60))[0].offset == 4
        assert world.loop.time() - began < 0.1, "the long poll waits ten seconds"

    consume(world, work, fetch_wait_ms=10_000)


def test_an_answer_from_before_a_seek_is_dropped(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 10)

    async def work(consumer: aio.Consumer) -> None:
        await poll_all(consumer, 10)
        await asyncio.sleep(1)
        fill(partition, 10, 20)  # the answer to the long poll at 10 is on its way
        await consumer.seek((TOPIC, 0), 3)
        assert values(await poll_all(consumer, 17)) == numbered(3, 20)

    consume(world, work, fetch_wait_ms=10_000)


@pytest.mark.parametrize(
    ("when", "offset"),
    [(0, 0), (1, 10), (1000, 10), (1001, 20), (2999, 30), (9000, 90), (9001, 100), (10**12, 100)],
)
def test_seek_to_time(world: SimWorld, when: int, offset: int) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 100)  # batches of ten, all of a batch at the time of its first: 0, 1000, 2000 …

    async def work(consumer: aio.Consumer) -> None:
        await consumer.seek_to_time(when)
        assert await consumer.position((TOPIC, 0)) == offset
        await consumer.seek_to_beginning()
        await consumer.seek_to_time(datetime.fromtimestamp(when / 1000, UTC), (TOPIC, 0))
        assert await consumer.position((TOPIC, 0)) == offset

    consume(world, work)


def test_seek_to_time_looks_inside_the_batch(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work() -> None:
        async with world.log() as log:
            async with log.producer(linger_ms=50) as producer:
                for number, stamp in enumerate([5, 3, 20, 10, 30]):
                    await producer.send(TOPIC, b"%d" % number, timestamp_ms=stamp)
            async with log.consumer(TOPIC) as consumer:
                for when, offset in [(0, 0), (4, 0), (6, 2), (21, 4), (31, 5)]:
                    await consumer.seek_to_time(when)
                    assert await consumer.position((TOPIC, 0)) == offset
                with pytest.raises(ConfigError, match="timezone"):
                    await consumer.seek_to_time(datetime(2020, 1, 1))

    world.run(work())
    assert len(partition.frames) == 1


# -- where to begin ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reset", "first"), [("earliest", b"0020"), ("latest", b"0050")])
def test_where_there_is_no_position_the_settings_say_where_to_begin(
    world: SimWorld, reset: str, first: bytes
) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 50)
    partition.state.log_start = 20

    async def work(consumer: aio.Consumer) -> None:
        await consumer.position((TOPIC, 0))
        fill(partition, 50, 60)
        assert (await consumer.poll(timeout=10))[0].value == first

    consume(world, work, auto_offset_reset=reset)


def test_with_no_reset_a_consumer_has_to_seek(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 50)
    partition.state.log_start = 20

    async def work(consumer: aio.Consumer) -> None:
        with pytest.raises(OffsetOutOfRange, match="seek first"):
            await consumer.poll(timeout=10)
        with pytest.raises(OffsetOutOfRange):
            await consumer.position((TOPIC, 0))
        await consumer.seek((TOPIC, 0), 30)
        assert (await consumer.poll(timeout=10))[0].offset == 30
        await consumer.seek((TOPIC, 0), 3)
        for _ in range(2):
            with pytest.raises(OffsetOutOfRange) as caught:
                await consumer.poll(timeout=10)
            assert (caught.value.start, caught.value.end) == (20, 50)
            assert await consumer.position((TOPIC, 0)) == 3
        await consumer.seek((TOPIC, 0), 20)
        assert (await consumer.poll(timeout=10))[0].offset == 20

    consume(world, work, auto_offset_reset="none")


@pytest.mark.parametrize("away", [3, 77])
def test_out_of_range_goes_where_the_settings_say(
    world: SimWorld, away: int, caplog: pytest.LogCaptureFixture
) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 50)
    partition.state.log_start = 20

    async def work(consumer: aio.Consumer) -> None:
        await consumer.seek((TOPIC, 0), away)
        assert (await consumer.poll(timeout=10))[0].offset == 20

    consume(world, work)
    assert "going on at the earliest record" in caplog.text


def test_retention_that_overtakes_a_consumer_comes_after_what_was_fetched(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 10)

    async def work(consumer: aio.Consumer) -> None:
        assert values(await consumer.poll(timeout=10, max_records=4)) == numbered(0, 4)
        fill(partition, 10, 50)
        partition.state.log_start = 40
        partition.frames = partition.frames[4:]
        await consumer.pause()
        await asyncio.sleep(2)
        await consumer.resume()
        got = values(await poll_all(consumer, 16))
        assert got[:6] == numbered(4, 10)
        assert got[-10:] == numbered(40, 50)

    consume(world, work)


# -- pause, assign, until ------------------------------------------------------------------------------------


def test_a_paused_partition_is_silent_and_keeps_its_place(world: SimWorld) -> None:
    first, second = world.cluster.create(TOPIC, 2)
    fill(first, 0, 30)
    fill(second, 1000, 1030)

    async def work(consumer: aio.Consumer) -> None:
        seen = await consumer.poll(timeout=10, max_records=1)
        await consumer.pause((TOPIC, 0))
        got: list[Record] = []
        while polled := await consumer.poll(timeout=1, max_records=4):
            got += polled
        assert {record.partition for record in got} == {1}
        await consumer.resume((TOPIC, 0))
        got += await poll_all(consumer, 60 - len(seen) - len(got))
        assert values([r for r in [*seen, *got] if r.partition == 0]) == numbered(0, 30)
        await consumer.pause()
        await consumer.seek_to_end()
        assert await consumer.position((TOPIC, 0)) == 30, "of a paused one, too"

    consume(world, work)


def test_assign_reads_these_partitions_and_no_others(world: SimWorld) -> None:
    for partition in world.cluster.create(TOPIC, 3):
        fill(partition, 0, 10)
    for partition in world.cluster.create("other", 2):
        fill(partition, 0, 10)

    async def work(consumer: aio.Consumer) -> None:
        records = await poll_all(consumer, 20)
        assert {(r.topic, r.partition) for r in records} == {(TOPIC, 1), ("other", 0)}
        assert await consumer.lag() == {(TOPIC, 1): 0, ("other", 0): 0}
        with pytest.raises(UnknownPartition):
            await consumer.seek((TOPIC, 0), 0)

    consume(world, work, assign=[(TOPIC, 1), ("other", 0)])


@pytest.mark.parametrize(
    ("topics", "settings", "error"),
    [
        (("nosuch",), {}, UnknownTopic),
        ((), {"assign": [(TOPIC, 9)]}, UnknownPartition),
        ((), {}, ConfigError),
        ((TOPIC,), {"assign": [(TOPIC, 0)]}, ConfigError),
        ((TOPIC,), {"auto_offset_reset": "first"}, ConfigError),
    ],
)
def test_what_cannot_be_read_is_told_at_once(
    world: SimWorld, topics: tuple[str, ...], settings: dict[str, Any], error: type[RaftlogError]
) -> None:
    world.cluster.create(TOPIC)

    async def work() -> None:
        async with world.log() as log:
            with pytest.raises(error):
                async with log.consumer(*topics, **settings):
                    raise AssertionError("it was opened")

    began = world.loop.time()
    world.run(work())
    assert world.loop.time() - began < 2


def test_records_until_the_end_stop_there(world: SimWorld) -> None:
    partitions = world.cluster.create(TOPIC, 3)
    for partition in partitions[:2]:
        fill(partition, 0, 25)

    async def work(consumer: aio.Consumer) -> None:
        got: list[Record] = []
        async for record in consumer.records(until="end"):
            if not got:
                for partition in partitions:
                    fill(partition, 25, 95)
            got.append(record)
        assert len(got) == 50
        assert all(record.value < b"0025" for record in got), "what came later is not read"
        later = await poll_all(consumer, 210)
        assert all(record.value >= b"0025" for record in later)

    consume(world, work)


def test_iteration_with_an_idle_timeout_ends(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 5)

    async def work(consumer: aio.Consumer) -> None:
        world.loop.call_later(1, fill, partition, 5, 7)
        world.loop.call_later(4, fill, partition, 7, 9)
        got = [record async for record in consumer.records(idle_timeout=2)]
        assert values(got) == numbered(0, 7)

    consume(world, work)


def test_leaving_an_iteration_loses_nothing(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 30)

    async def work(consumer: aio.Consumer) -> None:
        async for record in consumer:
            if record.offset == 13:
                break
        assert await consumer.position((TOPIC, 0)) == 14
        assert values(await poll_all(consumer, 16)) == numbered(14, 30)

    consume(world, work)


def test_close_ends_an_iteration_and_wakes_a_poll(world: SimWorld) -> None:
    world.cluster.create(TOPIC)

    async def work() -> None:
        async with world.log() as log:
            iterating, polling = log.consumer(TOPIC), log.consumer(TOPIC)

            async def iterate() -> int:
                return len([record async for record in iterating])

            tasks = [asyncio.ensure_future(iterate()), asyncio.ensure_future(polling.poll(timeout=1000))]
            await asyncio.sleep(1)
            with pytest.raises(ConcurrentUse):
                await polling.poll(timeout=0)
            await iterating.close()
            await polling.close()
            assert await tasks[0] == 0
            with pytest.raises(Closed):
                await tasks[1]
            with pytest.raises(Closed):
                await polling.poll()

    world.run(work())


# -- bad records ---------------------------------------------------------------------------------------------


def test_a_record_that_does_not_deserialise_can_be_sought_past(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    partition.append(memoryview(encode_batch([b"1", b"2", b"x", None, b"5"], None, 0)), 0)

    async def work(consumer: aio.Consumer) -> None:
        assert values(await consumer.poll(timeout=10)) == [1, 2], "what comes before is handed out first"
        for _ in range(2):
            with pytest.raises(DeserializationError) as caught:
                await consumer.poll(timeout=10)
            assert (caught.value.topic, caught.value.partition, caught.value.offset) == (TOPIC, 0, 2)
            assert await consumer.position((TOPIC, 0)) == 2
        with pytest.raises(DeserializationError):
            await anext(consumer.records())
        await consumer.seek((TOPIC, 0), 3)
        assert values(await consumer.poll(timeout=10)) == [None, 5], "a null passes by the deserializer"

    consume(world, work, value_deserializer=int)


@pytest.mark.parametrize("where", [5, 20, 45, 120])
def test_damage_is_told_after_what_comes_before_it_and_for_as_long_as_it_is_there(
    world: SimWorld, where: int
) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 30)
    good = partition.frames[1]
    partition.frames[1] = good[:where] + bytes([good[where] ^ 0x40]) + good[where + 1 :]
    if where == 5:  # a length that does not add up would stop the fake itself: damage the crc
        assert partition.frames[1][:4] == good[:4]

    async def work(consumer: aio.Consumer) -> None:
        assert values(await consumer.poll(timeout=10)) == numbered(0, 10)
        for _ in range(2):
            with pytest.raises((CorruptFrame, CorruptBatch)):
                await consumer.poll(timeout=10)
        partition.frames[1] = good
        assert values(await poll_all(consumer, 20)) == numbered(10, 30)

    consume(world, work, auto_offset_reset="earliest")


def test_a_truncated_log_is_told(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 10)

    async def work(consumer: aio.Consumer) -> None:
        await consumer.seek((TOPIC, 0), 0)
        await poll_all(consumer, 10)
        world.cluster.fetch_errors.append(LogTruncated("the log was cut at 7", offset=7))
        await asyncio.sleep(1)
        with pytest.raises(LogTruncated):
            await consumer.poll(timeout=10)

    consume(world, work, auto_offset_reset="none")


# -- faults --------------------------------------------------------------------------------------------------


def test_consuming_goes_on_through_moves_lost_connections_and_refusals(world: SimWorld) -> None:
    partitions = world.cluster.create(TOPIC, 2)

    def disturb(step: int) -> None:
        for partition in partitions:
            fill(partition, step * 10, step * 10 + 10)
        match step % 5:
            case 0:
                world.cluster.move(partitions[0], step % 3)
            case 1:
                world.cluster.brokers[step % 3].drop_connections()
            case 2:
                world.cluster.fetch_errors.extend([Busy("later"), NotLeader("not me", leader=None, term=0)])
            case 3:
                partitions[1].append_noop()
            case 4:
                world.cluster.move(partitions[1], None)
                world.loop.call_later(0.2, world.cluster.move, partitions[1], (step + 1) % 3)

    for step in range(40):
        world.loop.call_later(1 + step * 0.3, disturb, step)

    async def work(consumer: aio.Consumer) -> None:
        records = await poll_all(consumer, 800)
        for index in range(2):
            mine = [record for record in records if record.partition == index]
            assert values(mine) == numbered(0, 400)
            assert [record.offset for record in mine] == list(range(400))

    consume(world, work)


def test_a_silent_leader_is_left(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 10)

    async def work(consumer: aio.Consumer) -> None:
        await poll_all(consumer, 10)
        world.network.cut("client", "broker-0")
        world.cluster.move(partition, 1)
        fill(partition, 10, 20)
        began = world.loop.time()
        assert values(await poll_all(consumer, 10)) == numbered(10, 20)
        assert world.loop.time() - began < 5

    consume(world, work, fetch_wait_ms=500, request_timeout_ms=2000)


def test_frames_that_are_no_batches_do_not_make_a_consumer_spin(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 10)

    async def work(consumer: aio.Consumer) -> None:
        await poll_all(consumer, 10)
        partition.read = lambda offset, bytes_max: [noop]  # type: ignore[method-assign]
        before = world.cluster.count(FetchRequest)
        await asyncio.sleep(10)
        assert world.cluster.count(FetchRequest) - before < 60

    partition.append_noop()
    noop = partition.frames[-1]
    consume(world, work)


def test_prefetching_stops_at_its_bound(world: SimWorld) -> None:
    partitions = world.cluster.create(TOPIC, 2)
    for partition in partitions:
        for _ in range(100):
            partition.append(memoryview(encode_batch([b"x" * 10_000], None, 0)), 0)

    async def work(consumer: aio.Consumer) -> None:
        await consumer.poll(timeout=10, max_records=1)
        await asyncio.sleep(30)
        buffered = sum(each.buffered for each in consumer._core.partitions.values())
        assert buffered < 64 * 1024 + 2 * 32 * 1024
        assert len(await poll_all(consumer, 199)) == 199

    settings = {"prefetch_bytes": 64 * 1024, "partition_fetch_bytes": 16 * 1024, "fetch_bytes_max": 32 * 1024}
    consume(world, work, **settings)


def test_lag_counts_from_the_position(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 40)

    async def work(consumer: aio.Consumer) -> None:
        assert await consumer.lag() == {(TOPIC, 0): 40}
        await consumer.poll(timeout=10, max_records=15)
        assert await consumer.lag() == {(TOPIC, 0): 25}
        fill(partition, 40, 45)
        assert await consumer.lag() == {(TOPIC, 0): 30}

    consume(world, work)


def test_a_topic_that_is_deleted_ends_in_an_error(world: SimWorld) -> None:
    world.cluster.create(TOPIC)

    async def work(consumer: aio.Consumer) -> None:
        assert await consumer.poll(timeout=1) == []
        world.cluster.delete(TOPIC)
        with pytest.raises(UnknownTopic):
            await consumer.poll(timeout=60)

    consume(world, work)
