"""Consumer groups from the outside: sharing, moving, committing, and what faults do to it."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from group_kit import GROUP, TOPIC, GroupWorld, Reader

from raftlog import aio
from raftlog.client.cluster import ClusterClient
from raftlog.client.group import Membership
from raftlog.errors import ConfigError, OffsetOutOfRange, RequestTimeout, StaleMember, UnknownPartition
from raftlog.net.rpc import GroupOffset
from raftlog.record.types import Record, TopicPartition

ALL = [TopicPartition(TOPIC, index) for index in range(4)]


async def poll_all(consumer: aio.Consumer, count: int) -> list[Record]:
    """Poll until there are ``count`` records."""
    found: list[Record] = []
    while len(found) < count:
        polled = await consumer.poll(timeout=30)
        assert polled, f"only {len(found)} of {count} came"
        found += polled
    return found


def numbers(records: list[Record]) -> list[int]:
    return sorted(int(record.value) for record in records)


def shared(*readers: Reader) -> list[int]:
    """Everything that these have read."""
    return sorted(value for reader in readers for value in reader.values)


# -- sharing -------------------------------------------------------------------------------------------------


def test_members_share_the_partitions_and_read_everything_once() -> None:
    with GroupWorld() as world:
        world.produce(0, 100)
        one = world.reader("one")
        world.until(lambda: len(one.records) == 100)
        two = world.reader("two")
        world.until(world.is_shared)
        world.produce(100, 200)
        world.until(lambda: len(one.records) + len(two.records) == 200)
        assert shared(one, two) == [*range(200)]
        assert two.values
        assert len(one.called("on_revoked")) == 2
        assert one.called("on_lost") == []
        two.stop()
        world.readers.remove(two)
        assert world.until(world.is_shared) < 0.5, "who leaves says so"
        assert two.calls[-1][0] == "on_revoked", "closing gives up"
        assert not one.errors
        assert not two.errors


def test_a_killed_members_partitions_are_taken_over_after_a_second() -> None:
    with GroupWorld() as world:
        one, two = world.reader("one"), world.reader("two")
        world.until(world.is_shared)
        two.kill()
        assert world.until(world.is_shared) < 2.0, "its connection broke: that is a second"
        world.produce(0, 40)
        world.until(lambda: len(one.records) == 40)


def test_a_broken_connection_costs_nothing() -> None:
    with GroupWorld() as world:
        one, two = world.reader("one"), world.reader("two")
        world.until(world.is_shared)
        before = world.members()
        for _ in range(3):
            for broker in world.cluster.brokers:
                world.cluster.network.break_connections("one", f"broker-{broker}")
            world.loop.run_for(1.5)
        assert world.members() == before
        assert one.called("on_lost") == two.called("on_lost") == []
        assert one.called("on_revoked") == [] or two.called("on_revoked") == []


def test_a_coordinators_end_is_not_noticed() -> None:
    with GroupWorld() as world:
        readers = [world.reader(name) for name in ("one", "two", "three")]
        world.until(world.is_shared)
        calls = [list(reader.calls) for reader in readers]
        before = world.members()
        for _ in range(2):
            victim = world.coordinator()
            world.cluster.kill_broker(victim)
            world.coordinator()
            world.produce(0, 60)
            world.cluster.start_broker(victim)
            world.cluster.introduce()
            world.loop.run_for(15.0)
        assert world.members() == before
        assert [reader.calls for reader in readers] == calls
        assert Counter(shared(*readers)) == Counter([*range(60)] * 2)
        assert not any(reader.errors for reader in readers)


def test_several_topics_and_one_that_is_made_anew() -> None:
    with GroupWorld() as world:
        world.run(world.admin.create_topic("other", 2))
        got: list[TopicPartition] = []
        gone: list[TopicPartition] = []

        async def read(consumer: aio.Consumer) -> None:
            async with world.log("m") as log:
                while len(got) < 6:
                    await consumer.poll(timeout=0.1)
                await log.delete_topic("other")
                while len(gone) < 2:
                    await consumer.poll(timeout=0.1)
                await log.create_topic("other", 3)
                while len(got) < 9:
                    await consumer.poll(timeout=0.1)
                async with log.producer() as producer:
                    await (await producer.send("other", b"7", partition=2))
                assert numbers(await poll_all(consumer, 1)) == [7]

        member(world, read, "m", TOPIC, "other", on_assigned=got.extend, on_revoked=gone.extend)
        assert sorted(gone[:2]) == [("other", 0), ("other", 1)]
        assert sorted(got[6:]) == [("other", 0), ("other", 1), ("other", 2)]


# -- where reading begins ------------------------------------------------------------------------------------


def member(world: GroupWorld, work: Any, node: str = "m", *topics: str, **settings: Any) -> Any:
    """Run ``work`` with a member of the group."""

    async def run() -> Any:
        async with (
            world.log(node) as log,
            log.consumer(*(topics or (TOPIC,)), **{"group": GROUP, **settings}) as consumer,
        ):
            return await work(consumer)

    return world.run(run(), node=node)


def test_commit_is_what_was_handed_out_and_not_what_was_fetched() -> None:
    with GroupWorld(1) as world:
        world.produce(0, 100)

        async def first(consumer: aio.Consumer) -> None:
            records = await consumer.poll(timeout=10, max_records=7)
            assert numbers(records) == [*range(7)]
            await asyncio.sleep(1)
            assert await consumer.committed((TOPIC, 0)) is None
            await consumer.commit()
            assert await consumer.committed((TOPIC, 0)) == 7
            await consumer.poll(timeout=10, max_records=5)
            assert await consumer.committed((TOPIC, 0)) == 7, "nothing commits by itself"

        async def second(consumer: aio.Consumer) -> None:
            assert numbers(await consumer.poll(timeout=10, max_records=3)) == [7, 8, 9]
            assert await consumer.lag() == {(TOPIC, 0): 90}
            await consumer.commit({(TOPIC, 0): 50})
            await consumer.seek_to_committed()
            assert await consumer.position((TOPIC, 0)) == 50
            await consumer.commit({(TOPIC, 0): (20, "see you")})
            assert await consumer.committed_metadata((TOPIC, 0)) == "see you"

        async def third(consumer: aio.Consumer) -> None:
            await consumer.poll(timeout=10, max_records=1)
            assert await consumer.position((TOPIC, 0)) == 21
            with pytest.raises(UnknownPartition):
                await consumer.commit({(TOPIC, 1): 0})
            with pytest.raises(ConfigError):
                await consumer.commit({(TOPIC, 0): -1})

        member(world, first)
        member(world, second)
        member(world, third)


@pytest.mark.parametrize("reset", ["earliest", "latest", "none"])
def test_without_a_committed_offset_the_reset_decides(reset: str) -> None:
    with GroupWorld(2) as world:
        world.produce(0, 10)
        world.run(world.admin.commit_offsets(GROUP, {(TOPIC, 1): 3}))

        async def work(consumer: aio.Consumer) -> None:
            while len(await consumer.assignment()) < 2:
                await consumer.poll(timeout=0.1, max_records=0)
            assert await consumer.position((TOPIC, 1)) == 3
            if reset == "none":
                with pytest.raises(OffsetOutOfRange):
                    await consumer.position((TOPIC, 0))
            else:
                assert await consumer.position((TOPIC, 0)) == (0 if reset == "earliest" else 5)

        member(world, work, auto_offset_reset=reset)


def test_records_until_the_end_of_the_members_share() -> None:
    with GroupWorld() as world:
        world.produce(0, 100)

        async def work(consumer: aio.Consumer) -> list[int]:
            found = [int(record.value) async for record in consumer.records(until="end")]
            await consumer.commit()
            return found

        assert sorted(member(world, work)) == [*range(100)]
        assert member(world, work) == [], "there is nothing more, and that ends it too"
        world.produce(100, 110)
        assert sorted(member(world, work)) == [*range(100, 110)]


# -- callbacks -----------------------------------------------------------------------------------------------


def test_callbacks_may_seek_and_commit_and_wait() -> None:
    with GroupWorld(2) as world:
        world.produce(0, 20)
        seen: list[tuple[str, list[TopicPartition]]] = []

        async def run() -> None:
            async def assigned(partitions: list[TopicPartition]) -> None:
                seen.append(("assigned", partitions))
                for each in partitions:
                    assert await consumer.position(each) == 0
                    await consumer.seek(each, 6)

            async def revoked(partitions: list[TopicPartition]) -> None:
                seen.append(("revoked", partitions))
                assert await consumer.position(partitions[0]) == 10
                await consumer.commit(dict.fromkeys(partitions, (9, "revoked")))

            consumer = world.admin.consumer(TOPIC, group=GROUP, on_assigned=assigned, on_revoked=revoked)
            async with consumer:
                assert numbers(await poll_all(consumer, 8)) == [*range(12, 20)]
                await consumer.commit()

        world.run(run())
        both = [(TOPIC, 0), (TOPIC, 1)]
        assert seen == [("assigned", both), ("revoked", both)]
        assert world.offsets() == {0: 9, 1: 9}


def test_what_a_callback_raises_comes_out_and_the_partitions_have_moved_all_the_same() -> None:
    with GroupWorld(2) as world:
        world.produce(0, 20)

        def refuse(partitions: list[TopicPartition]) -> None:
            raise ZeroDivisionError(partitions)

        async def run() -> None:
            consumer = world.admin.consumer(TOPIC, group=GROUP, on_assigned=refuse, on_revoked=refuse)
            with pytest.raises(ZeroDivisionError):
                await consumer.poll(timeout=10)
            assert len(await poll_all(consumer, 20)) == 20
            with pytest.raises(ZeroDivisionError):
                await consumer.close()
            assert consumer.closed

        world.run(run())
        world.loop.run_for(0.1)
        assert world.members() == []


# -- user code in the way ------------------------------------------------------------------------------------


def test_user_code_takes_its_time_and_what_it_works_on_does_not_move() -> None:
    with GroupWorld() as world:
        one = world.reader("one", session_timeout_ms=6_000)
        world.until(lambda: len(one.assigned) == 4)
        one.gate.clear()
        world.produce(0, 40)
        two = world.reader("two")
        world.loop.run_for(60.0)
        assert len(world.members()) == 2, "heartbeats go on"
        assert not two.records, "it works on that still"
        one.gate.set()
        assert world.until(world.is_shared) < 1.0
        world.until(lambda: len(one.records) + len(two.records) >= 40)
        assert shared(one, two) == [*range(40)], "it has committed before it gave up"
        assert not one.errors


def test_who_is_not_used_within_the_rebalance_timeout_loses_what_others_want_and_nothing_else() -> None:
    with GroupWorld() as world:
        world.produce(0, 40)
        one = world.reader("one", rebalance_timeout_ms=10_000)
        world.until(lambda: len(one.records) == 40)
        world.loop.run_for(1.0)
        one.gate.clear()
        world.produce(40, 80)
        world.loop.run_for(1.0)
        two = world.reader("two")
        began = world.loop.time()
        world.until(lambda: len(two.assigned) == 2)
        assert 7.0 < world.loop.time() - began < 10.0
        one.gate.set()
        world.until(world.is_shared)
        assert len(world.members()) == 2
        assert len(one.called("on_lost")) == 2
        assert {type(error) for error in one.errors} <= {StaleMember}
        world.until(lambda: set(shared(one, two)) == set(range(80)))
        kept = set(one.assigned)
        again = Counter(
            (record.topic, record.partition, record.offset) for record in one.records + two.records
        )
        assert all(count == 1 for place, count in again.items() if TopicPartition(*place[:2]) in kept)


def test_a_commit_that_is_too_late_for_some_partitions_is_one_for_the_others() -> None:
    with GroupWorld() as world:
        world.produce(0, 40)
        one = world.reader("one", rebalance_timeout_ms=5_000, commit=False)
        world.until(lambda: len(one.records) == 40)
        one.gate.clear()
        world.loop.run_for(1.0)
        two = world.reader("two", commit=False)
        world.until(lambda: len(two.assigned) == 2)

        async def commit() -> None:
            await one.consumer.commit()

        with pytest.raises(StaleMember):
            world.run(commit(), node="one")
        assert world.offsets() == {each.partition: 10 for each in ALL if each not in two.assigned}


def test_a_zombies_commit_is_refused_and_it_joins_again() -> None:
    with GroupWorld() as world:
        world.produce(0, 40)
        one = world.reader("one", session_timeout_ms=5_000, commit=False)
        world.until(lambda: len(one.records) == 40)
        one.gate.clear()
        world.loop.run_for(1.0)
        world.loop.pause("one")
        two = world.reader("two")
        world.until(lambda: len(two.records) == 40, 20.0)
        world.loop.run_for(1.0)
        assert world.offsets() == dict.fromkeys(range(4), 10)
        world.loop.resume("one")

        async def commit() -> None:
            await one.consumer.commit({(TOPIC, 0): 1})

        with pytest.raises(StaleMember) as caught:
            world.run(commit(), node="one")
        assert not caught.value.retriable
        assert caught.value.hint
        one.gate.set()
        world.until(world.is_shared)
        assert sorted(one.called("on_lost")) == ALL
        assert world.offsets() == dict.fromkeys(range(4), 10)
        world.produce(40, 60)
        world.until(lambda: len(one.records) + len(two.records) == 100)
        assert Counter(shared(one, two)) == Counter([*range(40), *range(60)])


# -- auto commit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_with_auto_commit_members_that_come_and_go_read_everything_exactly_once(seed: int) -> None:
    with GroupWorld(8, seed=seed) as world:
        everybody = [world.reader("r0", enable_auto_commit=True, commit=False, max_poll_records=3)]
        for step in range(6):
            world.produce(step * 50, step * 50 + 50)
            reader = world.reader(f"r{step + 1}", enable_auto_commit=True, commit=False, max_poll_records=3)
            everybody.append(reader)
            world.loop.run_for(world.cluster.random.uniform(0.0, 0.3))
            if step % 2:
                leaver = world.readers.pop(0)
                leaver.stop()
        world.until(lambda: sum(len(each.records) for each in everybody) >= 300)
        world.loop.run_for(1.0)
        assert shared(*everybody) == [*range(300)]
        assert not any(each.errors for each in everybody)


def test_with_auto_commit_a_crash_loses_and_never_repeats() -> None:
    with GroupWorld(1) as world:
        world.produce(0, 100)
        one = world.reader("one", enable_auto_commit=True, commit=False, max_poll_records=10)
        world.until(lambda: len(one.records) >= 30)
        got = len(one.records)
        one.kill()
        two = world.reader("two", enable_auto_commit=True, commit=False)
        world.until(lambda: bool(two.records) and two.values[-1] == 99)
        lost = set(range(100)) - {*one.values, *two.values}
        assert not {*one.values} & {*two.values}
        assert lost <= set(range(got, got + 10)), "at most what one poll was about to return"


def test_records_one_by_one_are_committed_before_and_what_is_left_over_is_not() -> None:
    with GroupWorld(1) as world:
        world.produce(0, 50)

        async def some(consumer: aio.Consumer) -> list[int]:
            found: list[int] = []
            async for record in consumer:
                assert (await consumer.committed((TOPIC, 0)) or 0) > record.offset
                found.append(int(record.value))
                if len(found) == 20:
                    break
            return found

        async def more(consumer: aio.Consumer) -> list[int]:
            return await some(consumer) + numbers(await consumer.poll(timeout=1, max_records=5))

        assert member(world, some, semantics="at-most-once") == [*range(20)]
        assert world.offsets() == {0: 20}, "closing gives back what was not handed out"
        assert member(world, more, semantics="at-most-once") == [*range(20, 45)]
        assert world.offsets() == {0: 45}


def test_what_cannot_be_committed_before_is_not_handed_out() -> None:
    with GroupWorld(1) as world:
        world.produce(0, 10)
        one = world.reader("one", session_timeout_ms=3_000, enable_auto_commit=True, commit=False)
        world.until(lambda: len(one.records) == 10)
        one.gate.clear()
        world.loop.run_for(1.0)
        world.produce(10, 20)
        world.loop.run_for(1.0)
        world.loop.pause("one")
        two = world.reader("two", enable_auto_commit=True, commit=False)
        world.until(lambda: len(two.records) == 10, 10.0)
        world.loop.resume("one")
        one.gate.set()
        world.loop.run_for(5.0)
        assert one.values == [*range(10)]
        assert two.values == [*range(10, 20)]


def test_records_come_again_when_they_could_not_be_committed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with GroupWorld(1) as world:
        world.produce(0, 10)
        failures = [RequestTimeout("lost"), RequestTimeout("lost")]
        commit = Membership.commit

        async def flaky(self: Membership, offsets: list[GroupOffset], *, timeout: float) -> None:
            if failures:
                raise failures.pop()
            await commit(self, offsets, timeout=timeout)

        monkeypatch.setattr(Membership, "commit", flaky)

        async def work(consumer: aio.Consumer) -> None:
            with pytest.raises(RequestTimeout):
                await consumer.poll(timeout=5)
            with pytest.raises(RequestTimeout):
                await anext(aiter(consumer))
            assert numbers(await poll_all(consumer, 10)) == [*range(10)]

        member(world, work, enable_auto_commit=True)


# -- settings ------------------------------------------------------------------------------------------------


def test_what_needs_a_group_says_so() -> None:
    with GroupWorld(1) as world:

        async def work() -> None:
            consumer = world.admin.consumer(TOPIC)
            for call in (
                consumer.commit(),
                consumer.committed((TOPIC, 0)),
                consumer.seek_to_committed(),
            ):
                with pytest.raises(ConfigError, match="group="):
                    await call
            for settings in (
                {"on_assigned": print},
                {"enable_auto_commit": True},
                {"semantics": "at-most-once"},
                {"group": GROUP, "semantics": "at-most-once", "enable_auto_commit": False},
                {"group": GROUP, "semantics": "exactly-once", "isolation": "read_uncommitted"},
                {"group": GROUP, "semantics": "at-least-once", "enable_auto_commit": True},
                {"group": GROUP, "assign": [(TOPIC, 0)]},
                {"group": GROUP, "session_timeout_ms": 2_000_000},
                {"group": GROUP, "assignor": "range"},
            ):
                with pytest.raises(ConfigError):
                    world.admin.consumer(TOPIC, **settings)

        world.run(work())


def test_a_group_that_is_full_refuses_in_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raftlog.broker.groups.MEMBERS_MAX", 1)
    with GroupWorld(1) as world:
        world.reader("one")
        world.until(world.is_shared_by_one)

        async def work(consumer: aio.Consumer) -> None:
            with pytest.raises(ConfigError, match="members"):
                await consumer.poll(timeout=10)

        member(world, work)


def test_an_answer_to_who_falls_out_while_it_is_taken_in_is_of_no_concern(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A commit learns that the member is out while the new assignment's topics are looked up."""
    with GroupWorld(2) as world:
        reader = world.reader("a")
        world.until(world.is_shared_by_one)
        member = reader.consumer._core.in_group.member
        fallen: list[str] = []
        original = ClusterClient.metadata

        async def metadata(self: ClusterClient, *args: Any, **options: Any) -> Any:
            unknown = self is member._cluster and None in map(member._view, member._keys)
            found = await original(self, *args, **options)
            if unknown and not fallen:
                fallen.append(member._member_id)
                member._fall_out(member._member_id, StaleMember("told of by a commit", member_epoch=-1))
            return found

        async def add() -> None:
            await world.admin.add_partitions(TOPIC, 4, allow_key_reorder=True)

        monkeypatch.setattr(ClusterClient, "metadata", metadata)
        world.run(add())
        world.until(lambda: len(reader.assigned) >= 4)
        world.loop.run_for(5.0)
        assert fallen
        fell = [each for each in caplog.messages if "this consumer fell out" in each]
        assert len(fell) == 1, "it has joined anew at once"
