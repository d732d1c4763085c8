"""Produce at the broker: duplicates, fences, batches in flight, and what a lost leader says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from broker_kit import World, batch, outcome

from raftlog.config import BrokerConfig
from raftlog.errors import (
    Busy,
    DuplicateSequence,
    LeadershipLost,
    NotLeader,
    OutOfOrderSequence,
    ProducerFenced,
    RaftlogError,
    RecordTooLarge,
    UnknownProducer,
    UnknownReplica,
)
from raftlog.net.rpc import ProducePartition, ProduceRequest, ProduceResponse
from raftlog.raft.types import AppendRequest
from raftlog.testing.sim_cluster import broker_name


@pytest.fixture
def world() -> Iterator[World]:
    """Three brokers, a topic of one partition on all of them."""
    with World() as made:
        yield made


def numbered(sequence: int, *values: bytes, producer: int = 7, epoch: int = 1) -> bytes:
    """A batch of an idempotent producer."""
    return batch(*(values or (b"%d" % sequence,)), producer=producer, epoch=epoch, sequence=sequence)


def test_a_batch_is_answered_with_its_offset_once_it_is_committed(world: World) -> None:
    leader = world.leader()
    connection = world.dial(leader)
    assert world.written(connection, batch(b"a", b"b")) == 0
    assert world.written(connection, batch(b"c")) == 2
    assert world.replica(leader).committed_offset == 3
    assert world.fetched(connection) == [b"a", b"b", b"c"]


def test_a_follower_says_who_leads_and_writes_nothing(world: World) -> None:
    leader = world.leader()
    with pytest.raises(NotLeader) as caught:
        world.written(world.dial((leader + 1) % 3), batch(b"a"))
    assert caught.value.leader == leader
    assert not caught.value.indeterminate
    assert world.replica(leader).log.end_offset == 0
    assert world.written(world.dial(leader), batch(b"a")) == 0


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (numbered(9), OutOfOrderSequence),
        (numbered(6, b"x", b"y"), OutOfOrderSequence),
        (numbered(0), DuplicateSequence),
        (numbered(7, epoch=0), ProducerFenced),
        (numbered(1, epoch=2), OutOfOrderSequence),
        (numbered(1, producer=8), UnknownProducer),
    ],
    ids=["gap", "half written", "too old", "fenced", "new epoch not at 0", "unknown"],
)
def test_out_of_order_duplicate_or_fenced_producer(
    world: World, bad: bytes, error: type[RaftlogError]
) -> None:
    """Its own typed error, the log unchanged, and the producer's next batch is taken."""
    leader = world.leader()
    connection = world.dial(leader)
    for sequence in range(7):
        assert world.written(connection, numbered(sequence)) == sequence
    before = world.replica(leader).node.last_index
    with pytest.raises(error) as caught:
        world.written(connection, bad)
    assert type(caught.value) is error
    assert not caught.value.indeterminate
    assert world.replica(leader).node.last_index == before
    assert world.replica(leader).log.end_offset == 7
    assert world.written(connection, numbered(7)) == 7


def test_each_of_the_last_five_batches_sent_again_is_answered_with_its_first_offset(world: World) -> None:
    """Also by the next leader, and by a broker that read its log back from the disk."""
    leader = world.leader()
    connection = world.dial(leader)
    for sequence in range(7):
        world.written(connection, numbered(sequence))
    for sequence in range(2, 7):
        assert world.written(connection, numbered(sequence)) == sequence
    assert world.replica(leader).log.end_offset == 7
    world.cluster.cut_power(leader)
    following = world.leader(but=leader)
    connection = world.dial(following)
    for sequence in range(2, 7):
        assert world.written(connection, numbered(sequence)) == sequence
    assert world.written(connection, numbered(7)) == 7
    assert world.fetched(connection) == [b"%d" % sequence for sequence in range(8)]


def test_a_duplicate_of_a_batch_in_flight_waits_for_the_original(world: World) -> None:
    leader = world.leader()
    first, second = world.dial(leader), world.dial(leader)
    world.isolate(leader)
    original = world.produce(first, numbered(0, b"once"))
    world.until(lambda: world.replica(leader).log.end_offset == 1)
    again = world.produce(second, numbered(0, b"once"))
    follows = world.produce(second, numbered(1, b"twice"))
    world.until(lambda: world.replica(leader).log.end_offset == 2)
    assert not original.done()
    assert not again.done(), "nobody else has the original: it may yet be lost"
    world.cluster.network.heal()
    world.until(lambda: original.done() and again.done() and follows.done())
    found = [outcome(task) for task in (original, again, follows)]
    assert all(isinstance(each, ProduceResponse) for each in found), found
    assert [each.batches[0].base_offset for each in found if isinstance(each, ProduceResponse)] == [0, 0, 1]
    assert world.fetched(world.dial(world.leader())) == [b"once", b"twice"]


def test_a_leader_that_loses_office_calls_what_is_in_flight_indeterminate(world: World) -> None:
    """The original and the duplicate that waits on it; a batch that comes afterwards was certainly not
    written."""
    leader = world.leader()
    first, second = world.dial(leader), world.dial(leader)
    world.isolate(leader)
    original = world.produce(first, numbered(0, b"doubtful"))
    world.until(lambda: world.replica(leader).log.end_offset == 1)
    again = world.produce(second, numbered(0, b"doubtful"))
    world.until(lambda: original.done() and again.done())
    for task in (original, again):
        found = outcome(task)
        assert isinstance(found, LeadershipLost)
        assert found.indeterminate
        assert found.retriable
    with pytest.raises(NotLeader) as caught:
        world.written(first, numbered(1, b"refused"))
    assert not caught.value.indeterminate
    following = world.leader(but=leader)
    assert world.written(world.dial(following), numbered(0, b"doubtful")) == 0
    world.cluster.network.heal()
    world.until(lambda: world.replica(leader).committed_offset == 1)
    assert world.fetched(world.dial(following)) == [b"doubtful"]


def test_a_partition_of_nobody_here_is_refused(world: World) -> None:
    connection = world.dial(world.leader())
    for topic_id, partition in ((b"?" * 16, 0), (world.topic_id, 1), (world.topic_id, -1)):
        with pytest.raises(UnknownReplica):
            world.call(connection, ProduceRequest([ProducePartition(topic_id, partition)]), (batch(b"a"),))
    assert world.written(connection, batch(b"a")) == 0


def test_a_batch_above_the_topics_limit_is_refused() -> None:
    with World(topic_config={"max_message_bytes": 2_000}) as world:
        leader = world.leader()
        connection = world.dial(leader)
        with pytest.raises(RecordTooLarge) as caught:
            world.written(connection, batch(b"x" * 2_000))
        assert caught.value.limit == 2_000
        assert world.replica(leader).log.end_offset == 0
        assert world.written(connection, batch(b"x" * 1_900)) == 0


def test_what_a_later_leader_commits_is_not_taken_for_what_was_lost(world: World) -> None:
    """The first word that the old leader hears of the new one may be an entry that is committed, in the place
    of what was in flight."""
    old = world.leader()
    connection = world.dial(old)
    world.isolate(old)
    doubtful = world.produce(connection, numbered(0, b"lost"))
    world.until(lambda: world.replica(old).log.end_offset == 1)
    for other in {0, 1, 2} - {old}:
        world.cluster.network.break_connections(broker_name(old), broker_name(other))
    world.leader(but=old)
    assert world.replica(old).staged is not None, "it has not noticed"
    world.cluster.network.heal()
    world.until(doubtful.done)
    assert isinstance(outcome(doubtful), LeadershipLost)
    assert world.fetched(world.dial(world.leader(but=old))) == []


def test_a_leader_may_hear_of_its_successor_and_of_its_entries_at_once(world: World) -> None:
    """Nothing comes in between, so it still has the state of a leader when it takes over the entries."""
    old = world.leader()
    connection = world.dial(old)
    world.written(connection, batch(b"both have this"))
    world.isolate(old)
    in_doubt = world.produce(connection, batch(b"only the old leader has this"))
    replica = world.replica(old)
    world.until(lambda: replica.log.end_offset == 2)
    for other in {0, 1, 2} - {old}:
        world.cluster.network.break_connections(broker_name(old), broker_name(other))
    new = world.leader(but=old)
    for value in (b"in its place", b"and after"):
        world.written(world.dial(new), batch(value))
    successor = world.replica(new)
    prev = successor.node.entries_in_memory(2, 3)
    entries = successor.node.entries_in_memory(3, successor.node.last_index + 1)
    assert prev is not None
    assert entries is not None
    assert replica.staged is not None, "it has not noticed"
    request = AppendRequest(
        replica.replica_id,
        successor.replica_id,
        successor.node.term,
        2,
        prev[0].term,
        prev[0].crc,
        successor.node.commit,
        tuple(entries),
    )

    async def hear() -> None:
        replica.step(request, replica.host.now_ms())

    world.cluster.run(hear(), node=broker_name(old))
    world.until(lambda: replica.node.applied == successor.node.commit)
    assert replica.staged is None
    world.until(in_doubt.done)
    assert isinstance(outcome(in_doubt), LeadershipLost)
    world.cluster.network.heal()
    assert world.fetched(world.dial(world.leader())) == [b"both have this", b"in its place", b"and after"]


def test_too_much_in_flight_is_busy_and_over_when_it_is_committed() -> None:
    with World(config=BrokerConfig(uncommitted_bytes_max=1 << 20)) as world:
        leader = world.leader()
        connection = world.dial(leader)
        world.isolate(leader)
        size = 300_000
        tasks = [world.produce(connection, batch(b"%d" % n * size)) for n in range(5)]
        world.until(lambda: sum(task.done() for task in tasks) == 2)
        assert [type(outcome(task)) for task in tasks if task.done()] == [Busy, Busy]
        assert world.replica(leader).log.end_offset == 3
        world.cluster.network.heal()
        world.until(lambda: all(task.done() for task in tasks))
        assert world.written(world.dial(world.leader()), batch(b"room again")) == 3


def test_a_batch_without_acknowledgement_is_written_or_dropped_in_silence(world: World) -> None:
    leader = world.leader()
    connection = world.dial(leader)
    request = ProduceRequest([ProducePartition(world.topic_id, 0)], acks=0)
    world.tell(connection, request, (batch(b"kept"),))
    world.tell(connection, request, (b"rubbish",))
    world.tell(connection, ProduceRequest([ProducePartition(b"?" * 16, 0)], acks=0), (batch(b"lost"),))
    world.until(lambda: world.replica(leader).committed_offset == 1)
    assert world.written(connection, batch(b"after")) == 1
    assert world.fetched(connection) == [b"kept", b"after"]


def test_a_killed_leader_breaks_the_connection_and_the_outcome_is_open(world: World) -> None:
    leader = world.leader()
    connection = world.dial(leader)
    world.isolate(leader)
    task = world.produce(connection, numbered(0))
    world.until(lambda: world.replica(leader).log.end_offset == 1)
    world.cluster.kill_broker(leader)
    world.until(task.done)
    found = outcome(task)
    assert isinstance(found, RaftlogError)
    assert found.indeterminate
    assert not world.loop.is_alive(broker_name(leader))


def test_a_clock_that_is_set_back_does_not_stop_time(world: World) -> None:
    """Timeouts are decided by the leader's time (simulator, seed 600376: a transaction was open for an hour).
    It goes on at half its pace until the clock has caught up, and never back."""
    leader = world.leader()
    connection = world.dial(leader)
    world.written(connection, batch(b"an hour ahead"))
    replica, loop = world.replica(leader), world.loop
    loop.adjust_clock(broker_name(leader), jump_ms=-4_000)
    times = []
    for _ in range(6):
        times.append(replica.leader_time_ms())
        loop.run_for(1.0)
    assert times[0] >= replica.node.last_leader_time_ms
    assert [later - earlier for earlier, later in pairwise(times)] == [500] * 5
    loop.run_for(4.0)
    assert replica.leader_time_ms() == replica.host.wall_ms(), "it has caught up"
