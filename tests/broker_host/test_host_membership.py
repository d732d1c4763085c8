"""Replicas of a partition move while it is written to and read: the steps, and whole clusters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from host_kit import TOPIC, Host

from raftlog.broker import snapshots
from raftlog.broker.membership import LEARNERS_AT_ONCE, Change, Step, Transfer, Wanted, next_step
from raftlog.broker.partition import PartitionReplica
from raftlog.broker.snapshots import SnapshotExchange, SnapshotSlots
from raftlog.client.producer import ProducerCore
from raftlog.config import ProducerConfig
from raftlog.raft.types import ConfState, InstallSnapshot
from raftlog.state.image import Partition
from raftlog.state.metadata_commands import AlterPartition, Command, TakeControl
from raftlog.testing.disk import CrashMode
from raftlog.testing.sim_cluster import broker_name

# -- the steps -----------------------------------------------------------------------------------------------

STEPS: dict[str, tuple[ConfState, Wanted, set[int], set[int], Step | None]] = {
    "nothing to do": (ConfState((1, 2, 3)), Wanted((3, 2, 1)), {1, 2, 3}, set(), None),
    "a newcomer learns": (
        ConfState((1, 2, 3)),
        Wanted((1, 2, 4)),
        {1, 2, 3},
        set(),
        Change((1, 2, 3), (4,)),
    ),
    "not too many at once": (
        ConfState((1,)),
        Wanted((1, 2, 3, 4)),
        {1},
        set(),
        Change((1,), (2, 3)),
    ),
    "others wait for those that learn": (
        ConfState((1,), (2, 3)),
        Wanted((1, 2, 3, 4)),
        {1},
        {2, 3},
        None,
    ),
    "who does not answer keeps nobody waiting": (
        ConfState((1,), (2, 3)),
        Wanted((1, 2, 3, 4)),
        {1},
        {3},
        Change((1,), (2, 3, 4)),
    ),
    "a voter that is behind is no learner": (
        ConfState((1, 2, 3)),
        Wanted((1, 2, 3, 4, 5)),
        {1},
        {2, 3},
        Change((1, 2, 3), (4, 5)),
    ),
    "a learner that is behind is waited for": (
        ConfState((1, 2, 3), (4,)),
        Wanted((1, 2, 4)),
        {1, 2, 3},
        {4},
        None,
    ),
    "one joint change for all": (
        ConfState((1, 2, 3), (4, 5)),
        Wanted((1, 4, 5)),
        {1, 4, 5},
        set(),
        Change((1, 4, 5), ()),
    ),
    "a learner that is wanted no more goes first": (
        ConfState((1, 2, 3), (4,)),
        Wanted((1, 2, 5)),
        {1, 2, 3},
        set(),
        Change((1, 2, 3), (5,)),
    ),
    "a leader that leaves hands over": (
        ConfState((1, 2, 3), (4,)),
        Wanted((4, 3, 2)),
        {1, 2, 3, 4},
        set(),
        Transfer(3),
    ),
    "to one that is up to date": (
        ConfState((1, 2, 3), (4,)),
        Wanted((4, 3, 2)),
        {1, 2, 4},
        set(),
        Transfer(2),
    ),
    "where nobody stays it manages the change": (
        ConfState((1,), (4,)),
        Wanted((4,)),
        {1, 4},
        set(),
        Change((4,), ()),
    ),
    "fewer replicas": (ConfState((1, 2, 3)), Wanted((1, 2)), {1, 2}, set(), Change((1, 2), ())),
    "not to voters of which no majority answers": (
        ConfState((1, 2, 3)),
        Wanted((1, 2)),
        {1, 3},
        set(),
        None,
    ),
    "a voter becomes a learner": (
        ConfState((1, 2, 3)),
        Wanted((1, 2), frozenset({3})),
        {1, 2, 3},
        set(),
        Change((1, 2), (3,)),
    ),
    "learners that stay learners": (
        ConfState((1, 2), (7,)),
        Wanted((1, 2), frozenset({7, 8})),
        {1, 2},
        set(),
        Change((1, 2), (7, 8)),
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_the_next_step(case: str) -> None:
    conf, wanted, able, behind, expected = STEPS[case]
    assert next_step(1, conf, wanted, able, behind) == expected


def test_the_steps_lead_there() -> None:
    """From any of these to any other, if everybody answers; every step is one that the core takes."""
    confs = [(1,), (1, 2), (1, 2, 3), (4, 5, 6), (1, 4, 5), (7,), (2, 3, 4, 5, 6)]
    for start in confs:
        for end in confs:
            me, conf, wanted = start[0], ConfState(start), Wanted(end)
            for _ in range(10):
                able = set(conf.members)
                step = next_step(me, conf, wanted, able, set())
                if step is None:
                    break
                if isinstance(step, Transfer):
                    me = step.to
                    continue
                joining = set(step.voters) - set(conf.voters)
                assert joining <= set(conf.learners)
                assert len(set(step.learners) - conf.members) <= LEARNERS_AT_ONCE
                conf = ConfState(step.voters, step.learners)
                me = me if me in conf.voters else conf.voters[0]
            assert wanted.is_reached(conf), (start, end, conf)


# -- clusters ------------------------------------------------------------------------------------------------


class Moving(Host):
    """A host with a controller."""

    def __init__(self, seed: int = 1, brokers: int = 5, **settings: Any) -> None:
        super().__init__(seed, brokers, **settings)
        self.epoch = int(self.command(TakeControl()))  # type: ignore[call-overload]

    def command(self, command: Command) -> object:
        """Have a metadata command applied, through whichever broker runs."""
        broker_id, broker = next(iter(self.cluster.brokers.items()))
        return self.cluster.run(broker.metadata.call(command), node=broker_name(broker_id))

    @property
    def assignment(self) -> Partition:
        """What the newest image says."""
        images = [broker.metadata.image for broker in self.cluster.brokers.values()]
        newest = max(images, key=lambda image: image.applied_index)
        return newest.topic(TOPIC).partitions[0]

    @property
    def holders(self) -> list[int]:
        return sorted(broker_id for _, broker_id in self.assignment.replicas)

    def alter(self, *holders: int) -> Partition:
        """Want the partition on these brokers."""
        here = {broker_id: replica_id for replica_id, broker_id in self.assignment.members}
        topic_id = next(iter(self.cluster.brokers.values())).metadata.image.topic(TOPIC).topic_id
        replicas = [(broker_id, here.get(broker_id, 0)) for broker_id in holders]
        result = self.command(AlterPartition(self.epoch, topic_id, 0, replicas))
        assert isinstance(result, Partition)
        return result

    def followers_of(self) -> list[int]:
        """Brokers that hold it and do not lead."""
        return [broker_id for broker_id in self.holders if broker_id != self.leader_id]

    def others(self) -> list[int]:
        """Brokers without a replica of it."""
        taken = [broker_id for _, broker_id in self.assignment.members]
        return [broker_id for broker_id in self.cluster.brokers if broker_id not in taken]

    def has_settled(self) -> bool:
        """Those that are wanted are the voters, level, and nobody else has anything of it."""
        partition = self.assignment
        if partition.leaving or self.leader_id is None:
            return False
        leader = self.leader
        for broker_id, broker in self.cluster.brokers.items():
            found = [each for each in broker.replicas() if isinstance(each, PartitionReplica)]
            wanted = [replica_id for replica_id, holder in partition.replicas if holder == broker_id]
            if [each.replica_id for each in found] != wanted:
                return False
            if any(
                each.node.applied != leader.node.last_index or each.machine != leader.machine
                for each in found
            ):
                return False
        return sorted(leader.node.conf.members) == sorted(partition.wanted)


class Writer:
    """A producer that sends one record after the other while the cluster is busy with something else."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.sent = 0
        self.worst_s = 0.0
        self._stop = False
        self._task = host.loop.run_as("writer", self._run())

    async def _run(self) -> None:
        loop = self.host.loop
        client = self.host.client("writer")
        config = ProducerConfig(linger_ms=0, compression="none")
        producer = ProducerCore(client, config, loop, loop.call_soon)
        await producer.load_topic(TOPIC, 60.0)
        while not self._stop:
            began = loop.time()
            meta = await producer.send(TOPIC, b"%d:" % self.sent + b"x" * 500, None, (), 0, None)
            assert meta.offset == self.sent
            self.sent += 1
            self.worst_s = max(self.worst_s, loop.time() - began)
        producer.sender.stop()
        await client.close()

    def stop(self) -> int:
        """End it; returns how many were acknowledged. What failed is raised here."""
        self._stop = True
        self.host.wait(self._task.done)
        self._task.result()
        return self.sent


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[Moving]:
    made = Moving(getattr(request, "param", 1))
    yield made
    made.close()


def check_records(host: Host, count: int) -> None:
    records = host.consume()
    assert [record.offset for record in records] == list(range(count))
    assert [record.value.split(b":")[0] for record in records] == [b"%d" % number for number in range(count)]


def test_a_follower_moves_under_a_producer(host: Moving) -> None:
    writer = Writer(host)
    host.wait(lambda: writer.sent > 50)
    leaves, comes = host.followers_of()[0], host.others()[0]
    stay = [broker_id for broker_id in host.holders if broker_id != leaves]
    old = host.replica(leaves).replica_id
    host.alter(*stay, comes)
    host.wait(lambda: not host.assignment.leaving)
    count = writer.stop()
    host.wait(host.has_settled)
    assert host.holders == sorted([*stay, comes])
    assert old not in host.cluster.brokers[leaves].store.logs
    assert writer.worst_s < 0.5, "nobody was kept waiting"
    check_records(host, count)


def test_the_leader_moves_and_leadership_with_it(host: Moving) -> None:
    writer = Writer(host)
    host.wait(lambda: writer.sent > 50)
    leaves = host.leader_id
    stay = [broker_id for broker_id in host.holders if broker_id != leaves]
    host.alter(*stay, host.others()[0])
    host.wait(lambda: not host.assignment.leaving)
    count = writer.stop()
    host.wait(host.has_settled)
    assert host.leader_id in stay
    assert writer.worst_s < 1.0, "no gap beyond an election that is asked for"
    check_records(host, count)


def test_all_replicas_move_at_once(host: Moving) -> None:
    """Nobody of those that stay could take over: the leader manages the change and goes with it."""
    host.alter(*host.holders[:2])
    host.wait(host.has_settled)
    writer = Writer(host)
    host.wait(lambda: writer.sent > 50)
    host.alter(*host.others()[:2])
    host.wait(lambda: not host.assignment.leaving)
    count = writer.stop()
    host.wait(host.has_settled)
    check_records(host, count)


def test_a_replication_factor_is_raised_and_lowered(host: Moving) -> None:
    host.produce(20)
    for holders in ([0, 1, 2, 3, 4], [1], [1, 3, 4], [4, 0]):
        host.alter(*holders)
        host.wait(host.has_settled)
        assert host.holders == sorted(holders)
        host.produce(5)
    check_records(host, host.count)


def test_a_quiet_group_wakes_for_a_change_and_rests_again(host: Moving) -> None:
    host.produce(5)
    host.wait(lambda: all(host.replica(each).node.quiet for each in host.holders))
    comes = host.others()[0]
    host.alter(*host.holders[1:], comes)
    host.wait(host.has_settled)
    host.wait(lambda: all(host.replica(each).node.quiet for each in host.holders))
    assert comes in host.holders


@pytest.mark.parametrize("power", [False, True])
def test_any_later_leader_goes_on_with_a_move(host: Moving, power: bool) -> None:
    """Its leader is killed at each of the moments that a move has."""
    host.produce(30)
    for moment in range(8):
        holders = host.holders
        host.alter(*holders[1:], host.others()[0])
        host.loop.run_for(0.03 * moment)
        victim = host.leader_id if host.leader_id is not None else holders[-1]
        if power:
            host.cluster.cut_power(victim, CrashMode.NONE)
        else:
            host.cluster.kill_broker(victim)
        host.loop.run_for(0.5)
        host.cluster.start_broker(victim)
        host.wait(host.has_settled)
        host.produce(3)
    check_records(host, host.count)


def test_a_leader_that_has_just_lost_office_takes_no_step(
    host: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by seed 20075: it gave up in the tick in which a step was due, and its broker's pulse ended."""
    assert host.leader_id is not None
    broker, replica = host.cluster.brokers[host.leader_id], host.leader
    monkeypatch.setattr(replica, "wanted_members", lambda able: Wanted((replica.replica_id,)))
    replica.membership.due = True
    with host.loop.node(broker_name(host.leader_id)):
        replica.node.step_down(broker.now_ms())
        assert replica.staged is not None
        replica.tick(broker.now_ms())


def test_a_move_waits_for_a_broker_that_is_down_and_may_be_called_off(host: Moving) -> None:
    host.produce(10)
    comes = host.others()[0]
    before = host.holders
    host.cluster.kill_broker(comes)
    host.alter(*before[1:], comes)
    host.loop.run_for(5.0)
    assert set(before) <= {broker_id for _, broker_id in host.assignment.members}
    assert len(host.leader.node.conf.voters) == 3, "nobody counts that has nothing"
    host.produce(5)
    host.alter(*before)
    host.wait(lambda: not host.assignment.leaving)
    host.cluster.start_broker(comes)
    host.wait(host.has_settled)
    assert host.holders == before


def test_a_newcomer_gets_a_snapshot_where_the_log_begins_later(host: Moving) -> None:
    host.produce(90)
    for broker_id in host.holders:
        host.compact(broker_id)
    first = host.leader.log.first_index
    assert first > 40
    comes = host.others()[0]
    host.alter(*host.followers_of(), comes)
    host.wait(host.has_settled)
    assert host.replica(comes).snapshots_installed == 1
    assert host.replica(comes).log.first_index == first
    host.produce(5)
    host.wait(host.has_settled)


def test_a_replica_that_was_removed_does_not_come_back_by_older_metadata(host: Moving) -> None:
    """A broker that was started anew reads its metadata up to an older commit index. There it still has the
    replica, one of the first voters even, which would vote again, having forgotten all (simulator, seed
    9025)."""
    leaves, comes = host.followers_of()[0], host.others()[0]
    old = host.replica(leaves).replica_id
    assert old in host.assignment.founders
    host.alter(*(broker_id for broker_id in host.holders if broker_id != leaves), comes)
    host.wait(host.has_settled)
    removed_by = host.cluster.brokers[leaves].store.metadata_index
    host.cluster.kill_broker(leaves)
    for other in host.cluster.brokers:
        host.cluster.network.cut(broker_name(leaves), broker_name(other))
    host.cluster.start_broker(leaves)
    broker = host.cluster.brokers[leaves]
    assert broker.metadata.image.applied_index < removed_by, "nobody has told it of the newest commit yet"
    broker.hosting.image_changed()  # as when it hears of some of what it missed
    host.loop.run_for(5.0)
    assert old not in broker.store.logs
    host.cluster.network.heal()
    host.cluster.introduce()
    host.wait(lambda: broker.metadata.image.applied_index >= removed_by)
    host.alter(*host.followers_of(), leaves)
    host.wait(host.has_settled)


def test_replicas_go_round_and_round(host: Moving) -> None:
    """Every broker in turn, some of them more than once, under new ids each time."""
    writer = Writer(host)
    host.wait(lambda: writer.sent > 20)
    ids = set(host.assignment.wanted)
    for turn in range(10):
        holders = [(turn + each) % 5 for each in range(3)]
        host.alter(*holders)
        if turn % 3:
            host.wait(lambda: not host.assignment.leaving)
        ids |= set(host.assignment.wanted)
    host.wait(lambda: not host.assignment.leaving)
    count = writer.stop()
    host.wait(host.has_settled)
    assert len(ids) > 10
    check_records(host, count)


@pytest.mark.parametrize("host", [3], indirect=True)
def test_snapshots_are_sent_a_few_at_a_time(host: Moving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "CHUNK_BYTES", 20)
    host.alter(host.holders[0])
    host.wait(host.has_settled)
    host.produce(90)
    host.compact(host.holders[0])
    slots = SnapshotSlots(1)
    for broker in host.cluster.brokers.values():
        broker.snapshot_slots = slots
    sending = host.leader._exchange._outgoing
    most: list[int] = []
    host.alter(*host.holders, *host.others()[:2])

    def is_done() -> bool:
        most.append(sum(out.begun for out in sending.values()))
        return host.has_settled() and len(host.holders) == 3

    host.wait(is_done)
    assert max(most) == 1
    assert host.leader.snapshots_sent == 2
    assert slots.free == 1


def test_a_follower_that_takes_nothing_makes_room_for_others(
    host: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its broker answers heartbeats and no chunk."""
    host.alter(host.holders[0])
    host.wait(host.has_settled)
    host.produce(90)
    host.compact(host.holders[0])
    stuck, well = host.others()[:2]
    for broker in host.cluster.brokers.values():
        broker.snapshot_slots = SnapshotSlots(1)
    deaf = SnapshotExchange.chunk

    def chunk(exchange: SnapshotExchange, message: InstallSnapshot) -> None:
        if exchange._replica.host.broker_id != stuck:
            deaf(exchange, message)

    monkeypatch.setattr(SnapshotExchange, "chunk", chunk)
    host.alter(*host.holders, stuck, well)
    host.wait(lambda: (found := host.find(well)) is not None and found.snapshots_installed == 1)
    assert host.replica(stuck).snapshots_installed == 0
    monkeypatch.undo()
    host.wait(host.has_settled)


def test_slots_come_back_whatever_ends_a_transfer(host: Moving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "CHUNK_BYTES", 10)
    host.produce(90)
    for broker_id in host.holders:
        host.compact(broker_id)
    comes = host.others()[0]
    host.alter(*host.holders, comes)
    leader = host.leader
    slots = host.cluster.brokers[leader.host.broker_id].snapshot_slots
    host.wait(lambda: any(out.begun for out in leader._exchange._outgoing.values()))
    assert slots.free == 1
    leader.node.step_down(leader.host.now_ms())
    leader.host.mark(leader)
    host.wait(lambda: leader.staged is None)
    host.loop.run_for(0.1)
    assert slots.free == 2 or leader.staged is not None
    host.wait(host.has_settled)
    assert all(broker.snapshot_slots.free == 2 for broker in host.cluster.brokers.values())
