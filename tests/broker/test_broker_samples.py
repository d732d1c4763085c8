"""What brokers count and say of themselves: every figure against what was done."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from broker_kit import TOPIC, World, batch
from coordination_kit import GROUP, CoordinatedWorld, begun

from raftlog.broker.sampling import BrokerSampler
from raftlog.net.rpc import BrokerStatusRequest, MetadataRequest, ProducePartition, ProduceRequest
from raftlog.telemetry import catalogue as c
from raftlog.telemetry.catalogue import BROKER_METRICS, Metric, Sample
from raftlog.telemetry.counters import Latency
from raftlog.testing.sim_cluster import broker_name


class Watched:
    """The sampler of one broker of a world."""

    def __init__(self, world: World, broker_id: int, series_max: int = 1000) -> None:
        self._world = world
        self._name = broker_name(broker_id)
        self._sampler = BrokerSampler(world.broker(broker_id), Latency(), series_max)

    def samples(self, *, survey: bool = False) -> list[Sample]:
        """All of them, now."""

        async def look() -> list[Sample]:
            if survey:
                await self._sampler.survey()
            return self._sampler.sample(0.25)

        return self._world.cluster.run(look(), node=self._name)

    def values(self, metric: Metric, *, survey: bool = False) -> dict[tuple[str, ...], float]:
        """Of one metric, by its tags."""
        return {
            tags: values[0]
            for found, values, tags in self.samples(survey=survey)
            if found is metric and len(values) == 1
        }

    def value(self, metric: Metric, *tags: str) -> float:
        """Of one series."""
        return self.values(metric)[tags]


def wait(world: World, condition: Callable[[], bool]) -> None:
    """Let time pass until it holds, looking every 100 ms."""
    for _ in range(600):
        if condition():
            return
        world.loop.run_for(0.1)
    raise AssertionError("it never came")


def stall(world: World, broker_id: int, seconds: float) -> None:
    """Let a broker's disk stand still for so long."""

    async def begin() -> None:
        world.cluster.disks[broker_id].stall(seconds)

    world.cluster.run(begin(), node=broker_name(broker_id))


def test_what_goes_in_and_out_is_counted_by_topic() -> None:
    with World(3) as world:
        leader = world.leader()
        watched = Watched(world, leader)
        connection = world.dial(leader)
        encoded = batch(b"a", b"b", b"c")
        world.written(connection, encoded)
        world.written(connection, batch(b"d"))
        assert world.fetched(connection) == [b"a", b"b", b"c", b"d"]
        samples = {(each.metric, each.tags): each.values for each in watched.samples(survey=True)}
        assert samples[c.PRODUCED_RECORDS, (TOPIC,)] == (4,)
        assert samples[c.PRODUCED_BYTES, (TOPIC,)] == (len(encoded) + len(batch(b"d")),)
        assert samples[c.FETCHED_BYTES, (TOPIC,)][0] > len(encoded), "frames are larger than batches"
        assert samples[c.PRODUCED_BATCHES, ()] == (2,)
        assert samples[c.FETCHES, ()] == (1,)
        assert len(samples[c.FETCH_SECONDS, ()]) == 1
        assert samples[c.LOOP_DELAY, ()] == (0.25,)
        assert samples[c.DISK_FREE, ()][0] > 0
        follower = Watched(world, (leader + 1) % 3)
        assert follower.value(c.PRODUCED_RECORDS, TOPIC) == 0


def test_a_duplicate_and_a_refused_batch_are_not_counted() -> None:
    with World(1) as world:
        watched, connection = Watched(world, 0), world.dial(0)
        encoded = batch(b"a", producer=7, sequence=0)
        assert world.written(connection, encoded) == world.written(connection, encoded)
        task = world.ask(connection, ProduceRequest([ProducePartition(world.topic_id, 0)]), (b"x" * 100,))
        world.until(task.done)
        assert task.exception() is not None
        assert watched.value(c.PRODUCED_RECORDS, TOPIC) == 1
        assert watched.value(c.REQUEST_ERRORS, "CorruptBatch") == 1
        assert watched.value(c.REQUEST_ERRORS, "Busy") == 0, "a series that is there before its first"


def test_latency_is_from_append_to_commit() -> None:
    with World(3) as world:
        leader = world.leader()
        watched, connection = Watched(world, leader), world.dial(leader)
        watched.samples()
        stall(world, leader, 0.3)
        stall(world, (leader + 1) % 3, 0.3)
        world.written(connection, batch(b"a"))
        (seconds,) = (each.values for each in watched.samples() if each.metric is c.PRODUCE_SECONDS)
        assert len(seconds) == 1
        assert 0.2 < seconds[0] < 1.0
        assert [each.values for each in watched.samples() if each.metric is c.PRODUCE_SECONDS] == [[]]


def test_a_batch_that_is_timed_when_the_leader_goes_is_forgotten() -> None:
    with World(3) as world:
        leader = world.leader()
        world.isolate(leader)
        task = world.produce(world.dial(leader), batch(b"a"))
        world.leader(but=leader)
        world.until(task.done)
        task.exception()
        replica = world.replica(leader)
        assert replica._timed == (0, 0.0)
        world.cluster.network.heal()
        world.until(lambda: world.committed(leader) == world.committed((leader + 1) % 3))


def test_replicas_and_leaders_and_those_that_change() -> None:
    with World(3, partitions=4) as world:
        for partition in range(4):
            world.leader(partition)
        watched = [Watched(world, each) for each in range(3)]
        assert [each.value(c.REPLICAS) for each in watched] == [5, 5, 5], "the metadata's is one"
        assert sum(each.value(c.LEADERS) for each in watched) == 5
        assert sum(each.value(c.ELECTIONS) for each in watched) == 5
        assert sum(each.value(c.LEADERSHIPS_LOST) for each in watched) == 0
        leader = world.leader()
        world.isolate(leader)
        world.leader(but=leader)
        wait(world, lambda: watched[leader].value(c.LEADERS) == 0)
        lost = watched[leader].value(c.LEADERSHIPS_LOST)
        assert lost >= 1
        others = [each for number, each in enumerate(watched) if number != leader]
        wait(world, lambda: sum(each.value(c.LEADERS) for each in others) == 5)
        assert sum(each.value(c.ELECTIONS) for each in watched) == 5 + lost


def test_under_replicated_and_without_a_leader() -> None:
    with World(3) as world:
        leader = world.leader()
        connection = world.dial(leader)
        watched = Watched(world, leader)
        led = watched.value(c.LEADERS)
        assert watched.value(c.UNDER_REPLICATED) == 0
        for _ in range(5):  # whoever is a moment behind is up to date
            world.loop.run_for(0.1)
            world.written(connection, batch(b"a"))  # a majority has it, and the third perhaps not yet
            assert watched.value(c.UNDER_REPLICATED) == 0
        away, other = ((leader + each) % 3 for each in (1, 2))
        world.cluster.kill_broker(away)
        world.until(lambda: not world.broker(leader).peers.is_up(away))
        wait(world, lambda: watched.value(c.LEADERS) >= led)
        assert watched.value(c.UNDER_REPLICATED) == watched.value(c.LEADERS)
        survivor = Watched(world, other)
        world.cluster.kill_broker(leader)
        wait(world, lambda: survivor.value(c.LEADERLESS) == 2)
        assert survivor.value(c.OUT_OF_SERVICE) == 0


def test_a_follower_that_does_not_get_on_is_missing_though_it_is_up() -> None:
    with World(3) as world:
        leader = world.leader()
        connection, watched = world.dial(leader), Watched(world, leader)
        stall(world, (leader + 1) % 3, 3.0)
        world.written(connection, batch(b"a"))
        watched.samples()
        assert watched.value(c.UNDER_REPLICATED) >= 1, "it lacks what was committed a sample ago"
        world.loop.run_for(5.0)
        assert watched.value(c.UNDER_REPLICATED) == 0


def test_what_waits_is_seen_while_it_waits() -> None:
    with World(1) as world:
        watched, connection = Watched(world, 0), world.dial(0)
        assert watched.value(c.JOURNAL_AGE) == 0
        reading = world.ask(connection, world.fetch_request(0, wait_ms=30_000))
        world.loop.run_for(0.1)
        assert watched.value(c.WAITING_FETCHES) == 1
        stall(world, 0, 0.5)
        writing = world.produce(connection, batch(b"a"))
        world.loop.run_for(0.3)
        assert watched.value(c.JOURNAL_BYTES) > 0
        assert 0.2 < watched.value(c.JOURNAL_AGE) < 0.5
        assert watched.value(c.UNCOMMITTED) == 1
        assert watched.value(c.REQUEST_BYTES) > 0
        assert watched.value(c.CONNECTIONS, "client") >= 1
        world.answer(writing)
        world.answer(reading)
        assert watched.value(c.WAITING_FETCHES) == watched.value(c.UNCOMMITTED) == 0
        assert watched.value(c.JOURNAL_BYTES) == watched.value(c.REQUEST_BYTES) == 0


def test_transactions_are_counted_by_their_coordinator() -> None:
    with CoordinatedWorld(partitions=2) as world:
        me = begun(world)
        coordinator = world.leader_at(world.transaction_place)
        watched = Watched(world, coordinator)
        assert watched.value(c.OPEN_TRANSACTIONS) == 1
        after = world.end(me)
        world.until_state("complete_commit")
        world.enlist(after)
        world.enlist(after, partitions=(1,))
        world.end(after, commit=False)
        world.until_state("complete_abort")
        counted = {
            outcome: watched.value(c.TRANSACTIONS, outcome) for outcome in ("begun", "committed", "aborted")
        }
        assert counted == {"begun": 2, "committed": 1, "aborted": 1}
        assert watched.value(c.OPEN_TRANSACTIONS) == 0


def test_a_new_coordinator_counts_nothing_twice() -> None:
    with CoordinatedWorld(partitions=2) as world:
        me = begun(world)
        first = world.leader_at(world.transaction_place)
        world.isolate(first)
        second = world.leader_at(world.transaction_place, but=first)
        watched = Watched(world, second)
        before = watched.value(c.TRANSACTIONS, "begun")
        assert watched.value(c.OPEN_TRANSACTIONS) == 1
        world.cluster.network.heal()
        world.end(me)
        world.until_state("complete_commit")
        assert watched.value(c.TRANSACTIONS, "begun") == before
        assert watched.value(c.TRANSACTIONS, "committed") == 1


def test_lag_is_the_end_less_what_is_committed() -> None:
    with CoordinatedWorld(partitions=2) as world:
        for partition in range(2):
            leader = world.dial(world.leader(partition))
            world.written(leader, batch(*[b"x"] * 10), partition)
        world.commit(3)
        world.commit(10, partition=1)
        watched = Watched(world, world.leader_at(world.group_place))
        assert watched.values(c.GROUP_LAG, survey=True) == {(GROUP, TOPIC, "0"): 7, (GROUP, TOPIC, "1"): 0}
        world.commit(9)
        samples = watched.samples(survey=True)
        assert Sample(c.GROUP_LAG, (1,), (GROUP, TOPIC, "0")) in samples
        assert Sample(c.CONSUMED_RECORDS, (6,), (GROUP, TOPIC)) in samples
        other = Watched(world, (world.leader_at(world.group_place) + 1) % 3)
        assert other.values(c.GROUP_LAG, survey=True) == {}, "only the coordinator says so"


def test_lag_of_partitions_that_are_elsewhere_is_asked_for() -> None:
    """Five brokers, partitions on one of them: the group's coordinator has no replica of some."""
    with CoordinatedWorld(5, partitions=5, replication=1) as world:
        for partition in range(5):
            leader = world.dial(world.leader(partition))
            world.written(leader, batch(*[b"x"] * (partition + 1)), partition)
            world.commit(1, partition=partition)
        coordinator = world.leader_at(world.group_place)
        watched = Watched(world, coordinator)
        lag = watched.values(c.GROUP_LAG, survey=True)
        assert lag == {(GROUP, TOPIC, str(partition)): partition for partition in range(5)}
        away = next(each for each in range(5) if world.leader(each) != coordinator)
        gone = {each for each in range(5) if world.leader(each) == world.leader(away)}
        world.isolate(world.leader(away))
        wait(world, lambda: len(watched.values(c.GROUP_LAG, survey=True)) == 5 - len(gone))


def test_too_many_series_are_added_up() -> None:
    with CoordinatedWorld(partitions=4) as world:
        for partition in range(4):
            world.written(world.dial(world.leader(partition)), batch(b"x", b"y"), partition)
            world.commit(0, partition=partition)
        world.pass_time(1.0)  # until followers know the ends, too
        watched = Watched(world, world.leader_at(world.group_place), series_max=3)
        assert watched.values(c.GROUP_LAG, survey=True) == {(GROUP, TOPIC, "*"): 8}


def test_every_metric_of_the_catalogue_is_sampled_and_no_other() -> None:
    with CoordinatedWorld(partitions=1) as world:
        leader = world.leader_at(world.group_place)
        connection = world.dial(world.leader())
        world.written(connection, batch(b"a"))
        world.commit(0)
        found = {each.metric for each in Watched(world, leader).samples(survey=True)}
        assert found == set(BROKER_METRICS)


def test_a_broker_tells_its_totals_with_its_status() -> None:
    with World(1) as world:
        connection = world.dial(0)
        world.written(connection, batch(b"a", b"b"))
        answer, _ = world.call(connection, BrokerStatusRequest([]))
        assert answer.totals["records_in"] == 2
        assert answer.totals["elections_won"] == 2
        world.call(connection, MetadataRequest())


def test_what_is_worth_waking_for_is_logged_with_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "raftlog"), World(3) as world:
        leader = world.leader()
        world.isolate(leader)
        world.leader(but=leader)
        world.until(lambda: bool(events(caplog, "leader_lost", TOPIC)))
        won = events(caplog, "leader_won", TOPIC)
        assert len(won) == 2
        assert won[0]["broker"] == leader
        assert won[1]["term"] > won[0]["term"]
        (lost,) = events(caplog, "leader_lost", TOPIC)
        assert (lost["broker"], lost["partition"], lost["led_term"]) == (leader, 0, won[0]["term"])
        assert len(events(caplog, "broker_started")) == 3


def events(caplog: pytest.LogCaptureFixture, name: str, topic: str | None = None) -> list[dict[str, Any]]:
    """The fields of every event of that name."""
    return [
        record.__dict__["fields"]
        for record in caplog.records
        if getattr(record, "event", None) == name
        and (topic is None or record.__dict__["fields"].get("topic") == topic)
    ]
