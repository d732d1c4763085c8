"""Readers of committed records: what aborted transactions wrote is hidden, and positions move over it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from group_kit import GROUP, TOPIC, GroupWorld

from raftlog import aio
from raftlog.record.types import Record

PLACE = (TOPIC, 0)


async def transact(log: aio.Log, values: range, *, commit: bool, name: str = "t") -> None:
    """One transaction that writes these."""
    async with log.producer(transactional_id=name, linger_ms=0) as producer:
        await write(producer, values, commit=commit)


async def write(producer: aio.Producer, values: range, *, commit: bool) -> None:
    txn = await producer.transaction().__aenter__()
    for value in values:
        await (await txn.send(TOPIC, b"%d" % value, partition=0))
    await (txn.commit() if commit else txn.abort())


def values(records: list[Record]) -> list[int]:
    return [int(record.value) for record in records]


async def read(log: aio.Log, **settings: Any) -> list[int]:
    async with log.consumer(TOPIC, **settings) as consumer:
        return [int(record.value) async for record in consumer.records(until="end")]


def test_aborted_records_and_markers_are_never_seen_and_positions_move_over_them() -> None:
    with GroupWorld(1) as world:

        async def work() -> None:
            log = world.admin
            await transact(log, range(5), commit=True)
            await transact(log, range(5, 10), commit=False)
            await transact(log, range(10, 12), commit=True)
            await transact(log, range(12, 20), commit=False)
            async with log.consumer(TOPIC, group=GROUP) as consumer:
                found = [record async for record in consumer.records(until="end")]
                assert values(found) == [0, 1, 2, 3, 4, 10, 11]
                assert await consumer.position(PLACE) == 24
                assert await consumer.lag() == {PLACE: 0}
                await consumer.commit()
                assert await consumer.poll(timeout=0.2) == []
                await consumer.seek(PLACE, 7)
                assert values(await consumer.poll(timeout=1)) == [10, 11]
                await consumer.seek_to_time(0)
                assert values(await consumer.poll(timeout=1)) == [0, 1, 2, 3, 4, 10, 11]
            assert await read(log, isolation="read_uncommitted") == [*range(20)]
            assert await read(log, group=GROUP) == []
            described = await log.describe_group(GROUP)
            assert [(each.committed, each.lag) for each in described.offsets] == [(24, 0)]

        world.run(work())


def test_what_is_open_holds_back_what_comes_after_it() -> None:
    with GroupWorld(1) as world:

        async def work() -> None:
            log = world.admin
            async with (
                log.producer(transactional_id="slow", linger_ms=0) as slow,
                log.producer(transactional_id="quick", linger_ms=0) as quick,
                log.consumer(TOPIC) as consumer,
            ):
                txn = await slow.transaction().__aenter__()
                await (await txn.send(TOPIC, b"100", partition=0))
                await write(quick, range(3), commit=True)
                assert await consumer.poll(timeout=1.0) == []
                assert await consumer.lag() == {PLACE: 0}
                assert await read(log) == []
                assert await read(log, isolation="read_uncommitted") == [100, 0, 1, 2]
                asyncio.get_running_loop().call_later(0.5, asyncio.ensure_future, txn.abort())
                assert values(await consumer.poll(timeout=5.0)) == [0, 1, 2]

        world.run(work())


def test_of_one_producer_the_aborted_is_hidden_and_the_committed_is_not() -> None:
    with GroupWorld(1) as world:

        async def work() -> None:
            log = world.admin
            async with (
                log.producer(transactional_id="a", linger_ms=0) as one,
                log.producer(transactional_id="b", linger_ms=0) as two,
            ):
                first = await one.transaction().__aenter__()
                second = await two.transaction().__aenter__()
                for value in range(0, 40, 2):
                    await (await first.send(TOPIC, b"%d" % value, partition=0))
                    await (await second.send(TOPIC, b"%d" % (value + 1), partition=0))
                await first.abort()
                await second.commit()
                await write(one, range(40, 43), commit=True)
                await write(two, range(43, 46), commit=False)
            assert await read(log) == [*range(1, 40, 2), 40, 41, 42]

        world.run(work())


@pytest.mark.parametrize("bytes_max", [1 << 10, 1 << 20])
def test_a_long_run_of_hidden_batches_holds_nobody_up(bytes_max: int) -> None:
    with GroupWorld(1) as world:

        async def work() -> None:
            log = world.admin
            async with log.producer(transactional_id="t", linger_ms=0) as producer:
                for start in range(0, 300, 30):
                    await write(producer, range(start, start + 30), commit=False)
            loop = asyncio.get_running_loop()
            async with log.consumer(
                TOPIC, group=GROUP, partition_fetch_bytes=bytes_max, prefetch_bytes=64 << 10
            ) as consumer:
                began = loop.time()
                assert await consumer.poll(timeout=2.0) == []
                assert loop.time() - began == pytest.approx(2.0, abs=0.05)
                assert await consumer.position(PLACE) == 310
                await consumer.commit()
                await transact(log, range(300, 303), commit=True)
                assert values(await consumer.poll(timeout=5.0)) == [300, 301, 302]
            assert await read(log, group=GROUP) == [300, 301, 302]

        world.run(work())


def test_offsets_that_a_transaction_commits_are_awaited() -> None:
    """Whoever takes a partition over waits for the end of a transaction with its offsets (KIP-447)."""
    with GroupWorld(1) as world:
        world.produce(0, 10)

        async def work() -> None:
            log = world.admin
            async with log.producer(transactional_id="t", linger_ms=0) as producer:
                async with log.consumer(TOPIC, group=GROUP) as consumer:
                    while len(await consumer.poll(timeout=1, max_records=10)) < 10:
                        pass
                    txn = await producer.transaction().__aenter__()
                    await txn.send_offsets(consumer)
                    await (await txn.send(TOPIC, b"10", partition=0))
                    await asyncio.sleep(0.5)
                async with log.consumer(TOPIC, group=GROUP) as consumer:
                    assert await consumer.poll(timeout=2) == []
                    await txn.commit()
                    assert values(await consumer.poll(timeout=5)) == [10]

        world.run(work())
