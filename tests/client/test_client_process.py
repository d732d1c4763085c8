"""``log.process`` against production brokers in virtual time: what comes out, whoever dies when."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from transaction_kit import OTHER, PARTITIONS, TOPIC, TransactionWorld

from raftlog.client.consumer import ConsumerCore
from raftlog.client.process import Output, ProcessStats
from raftlog.errors import ConfigError, InvalidTopic, RaftlogError, RequestTimeout, UnknownTopic
from raftlog.record.types import Record

GROUP = "workers"


def upper(record: Record) -> bytes:
    """What most of these tests make of a record."""
    return b"<%s>" % record.value


def expected(count: int) -> list[bytes]:
    return sorted(b"<%d>" % number for number in range(count))


class ProcessWorld(TransactionWorld):
    """A topic with numbers in all of its partitions, to be processed into another."""

    def fill(self, count: int) -> None:
        """Write 0 to count - 1."""

        async def fill() -> None:
            async with self.log() as log, log.producer() as producer:
                for number in range(count):
                    await producer.send(TOPIC, b"%d" % number, key=b"k", partition=number % PARTITIONS)

        self.run(fill())

    def process(self, function: Any = upper, **settings: Any) -> ProcessStats:
        """Process everything that is there."""

        async def work() -> ProcessStats:
            async with self.log() as log:
                return await log.process(TOPIC, OTHER, GROUP, function, until="end", **settings).wait()

        return self.run(work())

    def start(self, node: str, function: Any = upper, **settings: Any) -> None:
        """A process that does so for ever; its errors fail the test."""

        async def work() -> None:
            async with self.log(node) as log:
                await log.process(TOPIC, OTHER, GROUP, function, **settings).wait()

        self.loop.run_as(node, work())

    def records(self, topic: str) -> list[Record]:
        """Committed records of a topic."""

        async def work() -> list[Record]:
            async with self.log("reader") as log, log.consumer(topic) as consumer:
                return [record async for record in consumer.records(until="end")]

        return self.run(work(), node="reader")

    def lag(self) -> int:
        """How much the group has not committed."""

        async def work() -> int:
            async with self.log("reader") as log:
                group = await log.describe_group(GROUP)
                return sum(each.lag or 0 for each in group.offsets)

        return self.run(work(), node="reader")

    def until_done(self, count: int) -> None:
        """Wait until so many distinct values have come out."""
        for _ in range(200):
            if len(set(self.read(OTHER))) >= count:
                return
            self.loop.run_for(1.0)
        raise AssertionError(f"only {len(set(self.read(OTHER)))} of {count} came out")


@pytest.mark.parametrize("semantics", ["exactly-once", "at-least-once", "at-most-once"])
def test_everything_comes_out_once_where_nothing_fails(semantics: str) -> None:
    with ProcessWorld() as world:
        world.fill(100)
        stats = world.process(semantics=semantics, batch_records=7)
        assert sorted(world.read(OTHER)) == expected(100)
        assert (stats.records_in, stats.records_out, stats.rewinds) == (100, 100, 0)
        assert world.process(semantics=semantics).records_in == 0, "the group's positions were committed"


def test_what_a_function_may_return() -> None:
    def function(record: Record) -> Any:
        number = int(record.value or b"")
        return (
            None,
            b"bytes",
            Output(b"output", key=b"own", headers=(("h", b"v"),)),
            several(number),
            [b"list", Output(b"elsewhere", topic=TOPIC, partition=0)],
        )[number]

    def several(number: int) -> Iterator[Output | bytes]:
        yield b"first"
        yield Output(b"second")

    with ProcessWorld() as world:
        world.fill(5)
        assert world.process(function).records_out == 6
        came = {record.value: record for record in world.records(OTHER)}
        assert set(came) == {b"bytes", b"output", b"first", b"second", b"list"}
        assert (came[b"bytes"].key, came[b"output"].key, came[b"second"].key) == (b"k", b"own", None)
        assert came[b"output"].headers == (("h", b"v"),)
        assert b"elsewhere" in world.read(TOPIC)


def test_a_function_may_be_asynchronous() -> None:
    async def slowly(record: Record) -> bytes:
        await asyncio.sleep(0.01)
        return upper(record)

    with ProcessWorld() as world:
        world.fill(20)
        world.process(slowly)
        assert sorted(world.read(OTHER)) == expected(20)


def test_what_cannot_be_processed_is_refused_at_once() -> None:
    with ProcessWorld() as world:

        async def work() -> None:
            async with world.log() as log:
                with pytest.raises(ConfigError, match="did you mean 'retries'"):
                    log.process(TOPIC, OTHER, GROUP, upper, retry=1)
                with pytest.raises(ConfigError, match="contradicts"):
                    log.process(TOPIC, OTHER, GROUP, upper, producer={"acks": 0})
                with pytest.raises(ConfigError, match="not yours"):
                    log.process(TOPIC, OTHER, GROUP, upper, producer={"transactional.id": "x"})
                with pytest.raises(ConfigError, match="until"):
                    log.process(TOPIC, OTHER, GROUP, upper, until="then")  # type: ignore[arg-type]
                with pytest.raises(ConfigError, match="workers"):
                    log.process(TOPIC, OTHER, GROUP, upper, workers=2)
                with pytest.raises(InvalidTopic):
                    log.process("", OTHER, GROUP, upper)
                with pytest.raises(UnknownTopic):
                    await log.process(TOPIC, "nowhere", GROUP, upper).wait()

        world.run(work())


# -- functions that raise ------------------------------------------------------------------------------------


def test_a_function_that_raises_is_called_again() -> None:
    calls: Counter[bytes] = Counter()

    def moody(record: Record) -> bytes:
        calls[record.value or b""] += 1
        if record.value == b"13" and calls[b"13"] <= 3:
            raise ValueError("not now")
        return upper(record)

    with ProcessWorld() as world:
        world.fill(30)
        stats = world.process(moody)
        assert (stats.retries, stats.dead_letters, calls[b"13"]) == (3, 0, 4)
        assert max(count for value, count in calls.items() if value != b"13") == 1, "others are not"
        assert sorted(world.read(OTHER)) == expected(30)


@pytest.mark.parametrize("semantics", ["exactly-once", "at-least-once", "at-most-once"])
def test_what_always_raises_becomes_a_dead_letter(semantics: str) -> None:
    def fails(record: Record) -> Any:
        if record.value in (b"3", b"4"):
            raise ValueError("never") if record.value == b"3" else TypeError("neither")
        return "no bytes" if record.value == b"5" else upper(record)

    with ProcessWorld() as world:
        world.fill(30)
        stats = world.process(fails, retries=1, semantics=semantics)
        assert (stats.records_in, stats.records_out, stats.dead_letters, stats.retries) == (30, 27, 3, 3)
        dead = {record.value: record for record in world.records(f"{TOPIC}.dead")}
        assert set(dead) == {b"3", b"4", b"5"}
        why = dict(dead[b"3"].headers)
        assert why["dead.error"] == b"ValueError: never"
        assert (why["dead.topic"], why["dead.partition"], why["dead.offset"]) == (b"orders", b"0", b"1")
        assert (why["dead.group"], why["dead.attempts"], dead[b"3"].key) == (b"workers", b"2", b"k")
        assert sorted(world.read(OTHER)) == sorted({*expected(30)} - {b"<3>", b"<4>", b"<5>"})


def test_an_output_that_cannot_be_written_is_a_dead_letter_too() -> None:
    def bad(record: Record) -> Any:
        if record.value == b"7":
            return [b"half", Output(b"x", topic="nowhere")]
        return Output("text") if record.value == b"8" else upper(record)

    with ProcessWorld() as world:
        world.fill(20)
        stats = world.process(bad, dead_letters="graveyard")
        assert (stats.dead_letters, stats.records_out) == (2, 18)
        assert sorted(world.read("graveyard")) == [b"7", b"8"]
        assert b"half" not in world.read(OTHER), "all of what comes of a record or nothing"
        assert len(world.read(OTHER)) == 18


@pytest.mark.parametrize("text", ["\udcff", "x" * 20_000_000], ids=["not UTF-8", "long"])
def test_whatever_an_error_says_it_makes_a_dead_letter(text: str) -> None:
    def fails(record: Record) -> Any:
        if record.value == b"3":
            raise ValueError(text)
        return upper(record)

    with ProcessWorld() as world:
        world.fill(10)
        stats = world.process(fails, retries=0)
        assert (stats.dead_letters, stats.records_out) == (1, 9)
        assert world.read(f"{TOPIC}.dead") == [b"3"]


# -- who dies ------------------------------------------------------------------------------------------------


def dying_at(world: ProcessWorld, node: str, step: str, batch: int) -> Any:
    """Kills the process at a step of its n-th batch."""
    seen: Counter[str] = Counter()

    def on_step(name: str) -> None:
        seen[name] += 1
        if (name, seen[name]) == (step, batch):
            world.loop.kill(node)
            raise asyncio.CancelledError

    return on_step


STEPS = ("polled", "transformed", "sent", "committed")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("semantics", ["exactly-once", "at-least-once", "at-most-once"])
def test_losses_and_duplicates_are_exactly_what_the_mode_allows(semantics: str, step: str) -> None:
    """The process dies at a known point of its second batch; another one takes over."""
    with ProcessWorld() as world:
        world.fill(40)
        settings: dict[str, Any] = {"semantics": semantics, "batch_records": 10, "batch_ms": 0}
        settings["consumer"] = {"session_timeout_ms": 2000}
        world.start("mortal", on_step=dying_at(world, "mortal", step, 2), **settings)
        world.loop.run_until(lambda: not world.loop.is_alive("mortal"), 60.0)
        world.loop.run_for(5.0)
        world.process(**settings)
        came = Counter(world.read(OTHER))
        lost = set(expected(40)) - set(came)
        repeated = sum(came.values()) - len(came)
        assert set(came) <= set(expected(40))
        if semantics == "exactly-once":
            assert (len(lost), repeated) == (0, 0)
        elif semantics == "at-least-once":
            assert (len(lost), repeated) == (0, 10 if step == "sent" else 0)
        else:
            assert (len(lost), repeated) == (10 if step in ("polled", "transformed") else 0, 0)


@pytest.mark.parametrize("seed", range(6))
def test_exactly_once_while_workers_and_brokers_die(seed: int) -> None:
    with ProcessWorld(seed=seed) as world:
        settings: dict[str, Any] = {"batch_records": 5, "transaction_timeout_ms": 3000}
        settings["consumer"] = {"session_timeout_ms": 2000}
        world.fill(150)
        dice = world.cluster.random
        names = iter(f"worker-{number}" for number in range(100))
        alive = [next(names) for _ in range(2)]
        for node in alive:
            world.start(node, **settings)
        for _ in range(4):
            world.loop.run_for(dice.uniform(0.02, 1.5))
            victim = alive.pop(0)
            world.loop.kill(victim)
            alive.append(next(names))
            world.start(alive[-1], **settings)
            broker = dice.choice(sorted(world.cluster.brokers))
            world.cluster.kill_broker(broker)
            world.loop.run_for(dice.uniform(0.2, 1.5))
            world.cluster.start_broker(broker)
            world.cluster.introduce()
        world.until_done(150)
        assert sorted(world.read(OTHER)) == expected(150)


def test_a_worker_whose_partitions_move_repeats_nothing() -> None:
    """A second worker joins while the first gathers a batch: what goes to the other is left out."""
    with ProcessWorld() as world:
        world.fill(300)
        settings: dict[str, Any] = {"batch_records": 9, "batch_ms": 30}
        world.start("first", **settings)
        world.loop.run_for(0.4)
        world.start("second", **settings)
        world.loop.run_for(0.3)
        world.start("third", **settings)
        world.until_done(300)
        assert sorted(world.read(OTHER)) == expected(300)


def test_two_workers_of_one_name_fence_each_other() -> None:
    with ProcessWorld() as world:
        world.fill(10)

        async def work() -> None:
            async with world.log() as log:
                first = log.process(TOPIC, OTHER, GROUP, upper, transactional_id="one")
                await asyncio.sleep(3.0)
                second = log.process(TOPIC, OTHER, GROUP, upper, transactional_id="one")
                await asyncio.sleep(3.0)
                async with log.producer() as producer:
                    for number in range(10, 30):
                        await producer.send(TOPIC, b"%d" % number, partition=number % PARTITIONS)
                with pytest.raises(RaftlogError) as caught:
                    await first.wait(60.0)
                assert caught.value.fatal
                await asyncio.sleep(20.0)
                assert second.stats.records_in >= 20
                await second.stop()

        world.run(work())
        assert sorted(world.read(OTHER)) == expected(30)


def test_stopping_ends_after_the_batch() -> None:
    with ProcessWorld() as world:
        world.fill(50)

        async def work() -> ProcessStats:
            async with world.log() as log:
                begun = asyncio.Event()
                settings: dict[str, Any] = {"batch_records": 5, "on_step": lambda _: begun.set()}
                async with log.process(TOPIC, OTHER, GROUP, upper, **settings) as processing:
                    await begun.wait()
                assert processing.done()
                return processing.stats

        stats = world.run(work())
        assert 0 < stats.records_in < 50
        assert len(world.read(OTHER)) == stats.records_in
        world.process()
        assert sorted(world.read(OTHER)) == expected(50)


def test_where_the_end_of_a_partition_cannot_be_asked_at_first_the_loop_ends_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, failed = ConsumerCore.ends, []

    async def ends(self: ConsumerCore, places: Any = ()) -> Any:
        if places and not failed:
            failed.append(places)
            raise RequestTimeout("nobody answers", indeterminate=False)
        return await original(self, places)

    monkeypatch.setattr(ConsumerCore, "ends", ends)
    with ProcessWorld() as world:
        world.fill(30)
        assert world.process().records_in == 30
        assert failed


@pytest.mark.parametrize("large", ["error", "record"])
def test_a_dead_letter_fits_whatever_became_dead(large: str) -> None:
    """Otherwise every worker that comes to the record ends there, for ever."""

    def fails(record: Record) -> Any:
        raise ValueError("x" * (9 << 20) if large == "error" else "never")

    with ProcessWorld() as world:

        async def work() -> ProcessStats:
            async with world.log() as log:
                await log.create_topic("large", config={"max_message_bytes": 16 << 20})
                async with log.producer() as producer:
                    await producer.send("large", bytes(9 << 20) if large == "record" else b"small")
                work = log.process("large", OTHER, GROUP, fails, until="end", retries=0)
                return await work.wait()

        assert world.run(work()).dead_letters == 1
        assert len(world.records("large.dead")) == 1
