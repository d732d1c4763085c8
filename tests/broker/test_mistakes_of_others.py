"""What went wrong in other systems, and must not here: a test for each, named after the report.

Number 4, replay that resurrects truncated entries (etcd-io/etcd#22442), is held where the journal is tested:
``tests/storage/test_crash.py::test_truncated_entries_stay_truncated``.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from broker_kit import World, batch, outcome

from raftlog.config import BrokerConfig
from raftlog.errors import (
    Busy,
    DuplicateSequence,
    LeadershipLost,
    NotLeader,
    OutOfOrderSequence,
    UnknownProducer,
)
from raftlog.raft.types import Role
from raftlog.testing.disk import CrashMode
from raftlog.testing.sim_cluster import broker_name

PRODUCER = 7


@pytest.fixture
def world() -> Iterator[World]:
    with World(3, config=BrokerConfig(election_timeout_ms=1000)) as made:
        yield made


def numbered(sequence: int, value: bytes = b"") -> bytes:
    return batch(value or b"%d" % sequence, producer=PRODUCER, sequence=sequence)


def restart_all(world: World) -> None:
    """Start every broker anew on what its disk kept."""
    for broker_id in world.cluster.disks:
        if broker_id not in world.cluster.brokers:
            world.cluster.start_broker(broker_id)
    world.cluster.introduce()


def serving(world: World) -> list[int]:
    """Brokers that take themselves for the partition's leader."""
    place = world.topic_id, 0
    found = {each: broker.hosting.by_place.get(place) for each, broker in world.cluster.brokers.items()}
    return [each for each, replica in found.items() if replica is not None and replica.staged is not None]


@pytest.mark.parametrize("kept", [CrashMode.NONE, CrashMode.RANDOM])
def test_1_acknowledged_before_it_was_synced(world: World, kept: CrashMode) -> None:
    """nats-io/nats-server#7564: after a power cut of all servers, acknowledged messages were gone.

    Here the power goes in the very event in which the client hears "yes", many times over.
    """
    acknowledged: list[bytes] = []
    for number in range(12):
        connection = world.dial(world.leader())
        for part in range(3):
            value = b"%d-%d" % (number, part)
            task = world.produce(connection, batch(value))
            world.until(task.done)
            assert task.result()[0].batches[0].base_offset == len(acknowledged)
            acknowledged.append(value)
        for broker_id in list(world.cluster.brokers):
            world.cluster.cut_power(broker_id, kept)
        restart_all(world)
        assert world.fetched(world.dial(world.leader())) == acknowledged


def test_2_a_late_sync_confirms_other_entries_in_a_higher_term(world: World) -> None:
    """rabbitmq/ra#516: the disk finished writing entry 5 of term 1 after entry 5 of term 2 had taken its
    place, and the follower took that for a sync of the new one.

    The watch of the simulated cluster compares every acknowledgement with what the disk has synced. Two
    things prevent it, what a sync proves being cut with the log, and a term that is not durable acknowledging
    nothing; each has its tests in ``tests/raft/test_durability.py``.
    """
    old = world.leader()
    connection = world.dial(old)
    world.written(connection, batch(b"both have this"))
    world.loop.call_soon(world.cluster.disks[old].stall, 6.0)
    stalls = world.loop.time()
    in_doubt = world.produce(connection, batch(b"on its way to a disk that stalls"))
    world.until(lambda: world.replica(old).log.end_offset == 2)
    world.isolate(old)
    new = world.leader(but=old)
    assert world.written(world.dial(new), batch(b"in its place")) == 1
    world.cluster.network.heal()
    replica = world.replica(old)
    world.until(lambda: replica.node.last_crc == world.replica(new).node.last_crc)
    assert world.loop.time() - stalls < 6.0, "the first write was still under way when it was replaced"
    assert replica.node.durable_index < replica.node.last_index
    world.until(lambda: replica.node.durable_index == replica.node.last_index)
    assert isinstance(outcome(in_doubt), LeadershipLost)
    assert world.fetched(world.dial(world.leader())) == [b"both have this", b"in its place"]


def written(world: World, value: bytes) -> int:
    """Write a record to whoever leads, again while that one is just handing over; returns its offset."""
    while True:
        try:
            return world.written(world.dial(world.leader()), batch(value))
        except (Busy, NotLeader):
            world.loop.run_for(0.1)


@pytest.mark.parametrize("what", [".seg", ".snap"])
def test_3_damage_on_a_minority_loses_nothing(what: str) -> None:
    """nats-io/nats-server#7549 and #7556: one damaged file on one of three servers, and acknowledged
    messages, or the whole stream, were deleted on all of them."""
    with World(3, topic_config={"segment_bytes": 64 << 10}) as world:
        connection = world.dial(world.leader())
        acknowledged = [b"%d" % number * 10_000 for number in range(30)]
        for value in acknowledged:
            world.written(connection, batch(value))
        brokers = world.cluster.brokers
        world.until(lambda: all(world.committed(broker_id) == 30 for broker_id in brokers))
        for broker_id, broker in brokers.items():
            world.cluster.run(broker.store.flush(), node=broker_name(broker_id))
        victim = world.leader()
        replica_id = world.replica(victim).replica_id
        for broker_id in list(brokers):
            world.cluster.kill_broker(broker_id)
        disk = world.cluster.disks[victim]
        paths = [path for path in disk.paths() if f"/{replica_id}/" in path and path.endswith(what)]
        assert paths, disk.paths()
        for path in paths:
            disk.flip(path, len(disk.content(path)) // 2)
        restart_all(world)
        world.until(lambda: all(world.committed(broker_id) == 30 for broker_id in brokers))
        connection = world.dial(world.leader())
        assert [value for at in range(30) for value in world.fetched(connection, at)[:1]] == acknowledged
        assert world.written(connection, batch(b"next")) == 30


def written_at_last(world: World, encoded: bytes) -> int:
    """Write through whoever leads; a leader that is handing over, as a move has it do, takes nothing for a
    moment."""
    while True:
        try:
            return world.written(world.dial(world.leader()), encoded)
        except (Busy, NotLeader):
            world.loop.run_for(0.02)


@pytest.mark.parametrize("seed", range(6))
def test_5_membership_changes_while_the_network_is_cut(seed: int) -> None:
    """nats-io/nats-server#7545: with members changing while the network was partitioned, acknowledged
    messages were lost. Replicas move between brokers here while cuts come and go."""
    with World(5, replication=3, seed=seed, config=BrokerConfig(election_timeout_ms=500)) as world:
        random = Random(seed)
        acknowledged: dict[int, bytes] = {}
        for number in range(8):
            value = b"%d" % number
            acknowledged[written_at_last(world, batch(value))] = value
            wanted = random.sample(sorted(world.cluster.brokers), 3)
            world.move(*wanted)
            world.loop.run_for(random.uniform(0.0, 0.3))
            sides = random.sample(sorted(world.cluster.brokers), 5)
            left, right = sides[:2], sides[2:]
            world.cluster.network.partition(
                [broker_name(each) for each in left], [broker_name(each) for each in right]
            )
            value = b"%d cut" % number
            tasks = [world.produce(world.dial(each), batch(value)) for each in serving(world)]
            world.loop.run_for(random.uniform(0.0, 3.0))
            for task in tasks:
                if task.done() and task.exception() is None:
                    offset = task.result()[0].batches[0].base_offset
                    assert acknowledged.setdefault(offset, value) == value
            world.cluster.network.heal()
            for task in tasks:
                world.until(task.done)
                if task.exception() is None:
                    offset = task.result()[0].batches[0].base_offset
                    assert acknowledged.setdefault(offset, value) == value
        world.until(lambda: not world.assignment.leaving, 60.0)
        connection = world.dial(world.leader())
        found = dict(enumerate(world.fetched(connection)))
        assert acknowledged.items() <= found.items()


def test_9_dedup_advanced_before_persisting(world: World) -> None:
    """apache/pulsar#5218: the sequence counted as seen although storing it had failed; the retry was dropped
    as a duplicate, and acknowledged.

    Twice here: an append that was refused, and one that was undone by the next leader.
    """
    with World(3, config=BrokerConfig(uncommitted_bytes_max=1 << 20)) as small:
        leader = small.leader()
        connection = small.dial(leader)
        small.isolate(leader)
        tasks = [small.produce(connection, numbered(n, b"%d" % n * 400_000)) for n in range(3)]
        small.until(lambda: any(task.done() for task in tasks))
        refused = next(number for number, task in enumerate(tasks) if task.done())
        assert isinstance(outcome(tasks[refused]), Busy)
        small.cluster.network.heal()
        small.until(lambda: all(task.done() for task in tasks))
        connection = small.dial(small.leader())
        for number in range(refused, 3):
            assert small.written(connection, numbered(number, b"%d" % number * 400_000)) == number
        found = [value[:1] for offset in range(3) for value in small.fetched(connection, offset)[:1]]
        assert found == [b"0", b"1", b"2"]

    old = world.leader()
    world.isolate(old)
    undone = world.produce(world.dial(old), numbered(0))
    world.until(undone.done)
    assert isinstance(outcome(undone), LeadershipLost)
    new = world.leader(but=old)
    world.written(world.dial(new), batch(b"of another"))
    world.cluster.network.heal()
    world.until(lambda: world.committed(old) == 1)
    # the one that saw it leads again: all that it knew of the sequence is gone with the entry
    world.replica(new).node.transfer_leadership(world.replica(old).replica_id, world.broker(new).now_ms())
    world.broker(new).mark(world.replica(new))
    assert world.leader(but=new) == old
    connection = world.dial(old)
    assert world.written(connection, numbered(0)) == 1
    assert world.fetched(connection) == [b"of another", b"0"]


def test_10_state_changed_before_append_poisons_a_snapshot() -> None:
    """apache/kafka PR 4755: a producer's sequence went into the state before the append, which failed; a
    snapshot in between kept it for ever.

    A leader that is cut off has a producer's batches in its log and nowhere else, and a snapshot is made of
    its state: what comes of that producer later is judged by what is committed.
    """
    settings = {"segment_bytes": 64 << 10}
    with World(3, topic_config=settings, config=BrokerConfig(election_timeout_ms=1000)) as world:
        old = world.leader()
        connection = world.dial(old)
        world.written(connection, batch(b"x" * 100))
        # the segment ends inside what nobody else will ever have
        world.isolate(old)
        lost = [world.produce(connection, numbered(n, b"%d" % n * 40_000)) for n in range(3)]
        world.until(lambda: world.replica(old).log.end_offset == 4)
        replica = world.replica(old)
        assert PRODUCER in replica.staged.producers if replica.staged is not None else False
        assert PRODUCER not in replica.machine.producers
        world.until(lambda: all(task.done() for task in lost))
        new = world.leader(but=old)
        survivor = world.dial(new)
        for number in range(4):
            world.written(survivor, batch(b"%d" % number * 40_000))
        world.cluster.network.heal()
        world.until(lambda: world.committed(old) == 5)
        world.until(lambda: bool(replica.log.snapshots))  # segments have ended, each with one
        world.cluster.kill_broker(old)
        world.cluster.start_broker(old)
        world.cluster.introduce()
        world.until(lambda: world.committed(old) == 5)
        assert PRODUCER not in world.replica(old).machine.producers
        assert world.replica(old).machine == world.replica(new).machine
        world.until(lambda: world.replica(new).node.role is Role.LEADER)
        connection = world.dial(world.leader())
        with pytest.raises((UnknownProducer, OutOfOrderSequence)):
            world.written(connection, numbered(3))
        assert world.written(connection, numbered(0)) == 5


def test_19_duplicates_when_a_partition_moves() -> None:
    """AutoMQ/automq#437: the state of producers did not move with the partition; what was sent again was
    appended again."""
    with World(6, replication=3) as world:
        old = world.leader()
        connection = world.dial(old)
        for sequence in range(7):
            assert world.written(connection, numbered(sequence)) == sequence
        before = {broker_id for _, broker_id in world.assignment.members}
        world.move(*(set(world.cluster.brokers) - before))
        in_flight = world.produce(connection, numbered(7))
        world.until(lambda: not world.assignment.leaving)
        assert not before & {broker_id for _, broker_id in world.assignment.replicas}
        world.until(in_flight.done)
        new = world.leader()
        assert new not in before
        connection = world.dial(new)
        for sequence in (*range(3, 7), 7, 7):
            assert world.written(connection, numbered(sequence)) == sequence
        with pytest.raises(DuplicateSequence):
            world.written(connection, numbered(1))
        assert world.written(connection, numbered(8)) == 8
        assert world.fetched(connection) == [b"%d" % sequence for sequence in range(9)]


def test_20_heartbeats_that_do_not_put_off_elections() -> None:
    """redpanda-data/redpanda#30817: heartbeats were made cheaper and no longer restarted the timers of
    followers, which campaigned for no reason.

    Groups at rest send none at all here: over minutes no term changes; yet a leader that goes without a word
    is missed in time.
    """
    with World(3, partitions=20, config=BrokerConfig(election_timeout_ms=1000)) as world:
        world.until(lambda: all(world.leader(number) >= 0 for number in range(20)))
        world.until(lambda: all(each.node.quiet for each in world.broker(0).replicas()))
        before = {each.name: each.node.term for each in world.broker(0).replicas()}
        elections = world.cluster.watch.counts["elections"]
        world.loop.run_for(300.0)
        assert {each.name: each.node.term for each in world.broker(0).replicas()} == before
        assert world.cluster.watch.counts["elections"] == elections
        gone = world.leader(0)
        world.cluster.cut_power(gone)
        since = world.loop.time()
        world.leader(0, but=gone)
        assert world.loop.time() - since < 2.5
