"""Columns: polling them gives the same records, sending them writes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fake_cluster import SimWorld
from fake_partition import FakePartition
from group_kit import GROUP, GroupWorld
from group_kit import TOPIC as GROUP_TOPIC

from raftlog import aio
from raftlog.errors import ConfigError, CorruptFrame, InvalidRecord, RecordTooLarge, StaleMember
from raftlog.record.codec import encode_batch
from raftlog.record.types import TopicPartition

TOPIC = "orders"


def fill(partition: FakePartition, start: int, end: int, per_batch: int = 100) -> None:
    for first in range(start, end, per_batch):
        values = [b"%04d" % number for number in range(first, min(first + per_batch, end))]
        partition.append(memoryview(encode_batch(values, None, first)), 0)


def numbered(start: int, end: int) -> list[bytes]:
    return [b"%04d" % number for number in range(start, end)]


def run(world: SimWorld, work: Any, *topics: str, **settings: Any) -> None:
    async def inside() -> None:
        async with world.log() as log, log.consumer(*(topics or (TOPIC,)), **settings) as consumer:
            await work(consumer)

    world.run(inside())


async def rows(consumer: aio.Consumer, count: int, **arguments: Any) -> list[dict[str, Any]]:
    """Poll columns until there are ``count`` rows."""
    found: list[dict[str, Any]] = []
    while len(found) < count:
        table = await consumer.poll_arrow(timeout=60, **arguments)
        assert table.num_rows, f"only {len(found)} of {count} came"
        table.validate(full=True)
        found += table.to_pylist()
    return found


@pytest.mark.parametrize("per_batch", [1, 10, 63, 64, 500])
def test_all_rows_of_all_partitions_in_the_order_of_each(world: SimWorld, per_batch: int) -> None:
    partitions = world.cluster.create(TOPIC, 3)
    for index, partition in enumerate(partitions):
        fill(partition, index * 1000, index * 1000 + 500, per_batch)

    async def work(consumer: aio.Consumer) -> None:
        found = await rows(consumer, 1500)
        for index in range(3):
            mine = [row for row in found if row["partition"] == index]
            assert [row["value"] for row in mine] == numbered(index * 1000, index * 1000 + 500)
            assert [row["offset"] for row in mine] == list(range(500))
            assert await consumer.position((TOPIC, index)) == 500
        assert {row["topic"] for row in found} == {TOPIC}
        empty = await consumer.poll_arrow(timeout=0.5)
        assert (empty.num_rows, empty.schema.names[:2]) == (0, ["key", "value"])

    run(world, work)


def test_small_batches_between_large_ones_keep_their_place(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    for start, end in ((0, 100), (100, 110), (110, 120), (120, 220), (220, 221)):
        fill(partition, start, end)

    async def work(consumer: aio.Consumer) -> None:
        table = await consumer.poll_arrow(timeout=60)
        assert table.column("value").to_pylist() == numbered(0, 221)
        assert table.column("value").num_chunks == 4

    run(world, work)


@pytest.mark.parametrize("per_batch", [7, 100])
def test_records_and_columns_in_turns_miss_and_repeat_nothing(world: SimWorld, per_batch: int) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 1000, per_batch)

    async def work(consumer: aio.Consumer) -> None:
        found: list[bytes] = []
        step = 0
        while len(found) < 1000:
            step += 1
            most = step % 9 + 1
            if step % 3 == 0:
                taken = [record.value for record in await consumer.poll(timeout=60, max_records=most)]
            elif step % 3 == 1:
                table = await consumer.poll_arrow(timeout=60, max_records=most)
                taken = table.column("value").to_pylist()
            else:
                async for record in consumer:
                    taken = [record.value]
                    break
            assert 0 < len(taken) <= most
            found += taken
            assert await consumer.position((TOPIC, 0)) == len(found)
        assert found == numbered(0, 1000)

    run(world, work)


def test_seeking_into_a_batch_begins_there(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 300)

    async def work(consumer: aio.Consumer) -> None:
        await consumer.seek((TOPIC, 0), 150)
        first = await rows(consumer, 1, max_records=1)
        assert (first[0]["value"], first[0]["offset"]) == (b"0150", 150)
        polled = await consumer.poll(timeout=60, max_records=2)
        assert [(record.value, record.offset) for record in polled] == [(b"0151", 151), (b"0152", 152)]
        assert [row["value"] for row in await rows(consumer, 147)] == numbered(153, 300)

    run(world, work)


def test_damage_is_told_after_everything_before_it(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    fill(partition, 0, 200)

    async def work(consumer: aio.Consumer) -> None:
        damaged = bytearray(partition.frames[1])
        damaged[-1] ^= 1
        partition.frames[1] = bytes(damaged)
        assert [row["value"] for row in await rows(consumer, 100)] == numbered(0, 100)
        with pytest.raises(CorruptFrame):
            await consumer.poll_arrow(timeout=60)
        assert await consumer.position((TOPIC, 0)) == 100

    run(world, work)


def test_columns_do_not_go_through_a_deserializer(world: SimWorld) -> None:
    world.cluster.create(TOPIC)

    async def work(consumer: aio.Consumer) -> None:
        with pytest.raises(ConfigError, match="value_deserializer"):
            await consumer.poll_arrow(timeout=0)

    run(world, work, value_deserializer=bytes.decode)


def test_with_auto_commit_rows_are_committed_before_they_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with GroupWorld(1) as world:

        async def work() -> None:
            log = world.admin
            async with log.producer() as producer:
                await (await producer.send_batch(GROUP_TOPIC, numbered(0, 200), partition=0))
            place = TopicPartition(GROUP_TOPIC, 0)
            async with log.consumer(GROUP_TOPIC, group=GROUP, enable_auto_commit=True) as consumer:
                assert (await consumer.poll_arrow(timeout=60, max_records=150)).num_rows == 150
                assert await consumer.committed(place) == 150

                async def refused(*_: Any) -> None:
                    raise StaleMember("it went to another member")

                with monkeypatch.context() as patch:
                    patch.setattr(consumer._core.sharing, "save", refused)
                    with pytest.raises(StaleMember):
                        await consumer.poll_arrow(timeout=60)
                assert await consumer.position(place) == 150
                assert [row["offset"] for row in await rows(consumer, 50)] == [*range(150, 200)]

        world.run(work())


# -- the other way -------------------------------------------------------------------------------------------


def produce(world: SimWorld, work: Any, **settings: Any) -> None:
    async def inside() -> None:
        async with world.log() as log, log.producer(**settings) as producer:
            await work(producer)

    world.run(inside())


def test_columns_go_where_lists_go(world: SimWorld) -> None:
    partitions = world.cluster.create(TOPIC, 4)
    keys = [b"%d" % (number % 7) if number % 5 else None for number in range(200)]
    values = [b"%d" % number if number % 9 else None for number in range(200)]

    async def work(producer: aio.Producer) -> None:
        ranges = await (await producer.send_batch(TOPIC, values, keys, timestamp_ms=5))
        columns = pa.array(values, pa.binary()), pa.chunked_array([keys[:50], keys[50:]], pa.binary())
        again = await (await producer.send_batch(TOPIC, *columns, timestamp_ms=5))
        assert {each.partition: each.count for each in again} == {
            each.partition: each.count for each in ranges
        }

    produce(world, work)
    for partition in partitions:
        found = [(record.key, record.value) for record in partition.records()]
        assert found[: len(found) // 2] == found[len(found) // 2 :]
    assert sum(len(partition.records()) for partition in partitions) == 400


def test_arrays_are_sent_row_by_row_in_batches_of_a_megabyte(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    rows = np.arange(300_000, dtype=np.float32).reshape(3_000, 100)

    async def work(producer: aio.Producer) -> None:
        ranges = await (await producer.send_batch(TOPIC, rows, partition=0))
        assert [each.count for each in ranges] == [2_557, 443]

    produce(world, work)
    assert [record.value for record in partition.records()] == [row.tobytes() for row in rows]


@pytest.mark.parametrize("as_column", [list, pa.array])
def test_who_sets_the_size_of_batches_gets_it(world: SimWorld, as_column: Any) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work(producer: aio.Producer) -> None:
        ranges = await (await producer.send_batch(TOPIC, as_column([b"v" * 1_000] * 40)))
        assert len(ranges) == 3

    produce(world, work, batch_bytes=16_384)
    assert len(partition.records()) == 40


def test_columns_are_refused_before_anything_is_sent(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC, max_message_bytes=100_000)

    async def work(producer: aio.Producer) -> None:
        for values, keys, kind in (
            (pa.array([b"a", b"x" * 100_000]), None, RecordTooLarge),
            (np.zeros((2, 100_000), np.uint8), None, RecordTooLarge),
            (pa.array([b"a"]), pa.array([b"k" * 100_000]), RecordTooLarge),
            (pa.array([1]), None, InvalidRecord),
            (np.array(["text"]), None, InvalidRecord),
            (pa.array([b"a"]), [b"k", b"k"], InvalidRecord),
        ):
            with pytest.raises(kind):
                await producer.send_batch(TOPIC, values, keys)
        assert await (await producer.send_batch(TOPIC, pa.array([], pa.binary()))) == []

    produce(world, work)

    async def with_serializer(producer: aio.Producer) -> None:
        with pytest.raises(InvalidRecord, match="serializer"):
            await producer.send_batch(TOPIC, pa.array([b"a"]))

    produce(world, with_serializer, value_serializer=str.encode)
    assert partition.records() == []
