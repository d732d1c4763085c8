"""Brokers coordinate groups: members and their sessions, the offsets they commit, and what the topic of it
all takes on disk."""

from __future__ import annotations

from typing import Any

import pytest
from broker_kit import RAW, TIMEOUT_S, TOPIC, World, batch, create_request, outcome
from coordination_kit import GROUP, CoordinatedWorld

from raftlog.broker.internal_topics import GROUPS_TOPIC, TRANSACTIONS_TOPIC
from raftlog.config import BrokerConfig
from raftlog.errors import (
    ConfigError,
    GroupNotEmpty,
    InvalidTopic,
    NotLeader,
    ProtocolError,
    RaftlogError,
    StaleMember,
    UnknownGroup,
    from_wire,
)
from raftlog.net.rpc import (
    DeleteGroupRequest,
    DeleteOffsetsRequest,
    DeleteTopicRequest,
    DescribeGroupsRequest,
    FetchPartition,
    FetchRequest,
    GroupHeartbeatResponse,
    GroupOffset,
    GroupRow,
    ListOffsetsRequest,
    MetadataRequest,
    OffsetCommitRequest,
    OffsetQuery,
    ProducePartition,
    ProduceRequest,
)
from raftlog.net.rpc_transactions import InitTransactionsRequest, WriteMarkersRequest
from raftlog.testing.disk import CrashMode
from raftlog.testing.sim_cluster import broker_name

ALL = (0, 1, 2, 3)


class Member:
    """A member that does what it is told, one heartbeat at a time."""

    def __init__(self, world: CoordinatedWorld, name: str, **options: Any) -> None:
        self.world = world
        self.name = name
        self.options = options
        self.epoch = self.revision = 0
        self.assigned: tuple[int, ...] = ()

    def beat(self) -> GroupHeartbeatResponse:
        answer = self.world.heartbeat(self.name, self.epoch, self.revision, **self.options)
        self.take(answer)
        return answer

    def take(self, answer: GroupHeartbeatResponse) -> None:
        if answer.assigned is not None:
            self.assigned = answer.assigned.get(self.world.topic_id, ())
        self.epoch, self.revision = answer.member_epoch, answer.revision


def settle(*members: Member) -> None:
    """Heartbeats until nothing moves any more; all the while no partition has two owners."""
    before = None
    while before != [(each.epoch, each.revision) for each in members]:
        before = [(each.epoch, each.revision) for each in members]
        for each in members:
            each.beat()
            owned = [partition for member in members for partition in member.assigned]
            assert len(owned) == len(set(owned)), "two owners"


def restart(world: World, broker_id: int) -> None:
    world.cluster.start_broker(broker_id)
    world.cluster.introduce()


def row_of(world: CoordinatedWorld) -> GroupRow:
    answer = world.seek(world.group_place, DescribeGroupsRequest(*world.group_place, [GROUP]))[0]
    row: GroupRow = answer.groups[0]
    return row


# -- members -------------------------------------------------------------------------------------------------


def test_members_share_the_partitions() -> None:
    with CoordinatedWorld(partitions=4) as world:
        one, two = Member(world, "one"), Member(world, "two")
        settle(one)
        assert one.assigned == ALL
        settle(one, two)
        assert sorted((*one.assigned, *two.assigned)) == [*ALL]
        assert len(one.assigned) == 2
        row = row_of(world)
        assert (row.state, sorted(each.member_id for each in row.members)) == ("stable", ["one", "two"])
        assert {each.client_id for each in row.members} == {RAW}
        world.heartbeat("two", -1)
        settle(one)
        assert one.assigned == ALL


def test_news_ends_the_wait_of_a_parked_heartbeat() -> None:
    with CoordinatedWorld(partitions=4) as world:
        one, two = Member(world, "one"), Member(world, "two")
        settle(one)
        waiting = world.heartbeat_request("one", one.epoch, one.revision, wait_ms=3_000)
        poll = world.ask_leader(world.group_place, waiting)
        world.loop.run_for(1.0)
        assert not poll.done(), "there is no news"
        before = world.loop.time()
        two.beat()
        one.take(world.answer(poll)[0])
        assert world.loop.time() - before < 0.2
        assert len(one.assigned) == 2, "it is told at once to give up what the other gets"
        waiting = world.heartbeat_request("two", two.epoch, two.revision, wait_ms=3_000)
        poll = world.ask_leader(world.group_place, waiting)
        one.beat()
        two.take(world.answer(poll)[0])
        assert len(two.assigned) == 2, "and the other, when it did"


def test_a_parked_heartbeat_is_answered_when_its_time_is_up_or_the_next_one_comes() -> None:
    with CoordinatedWorld() as world:
        one = Member(world, "one")
        settle(one)
        request = world.heartbeat_request("one", one.epoch, one.revision, wait_ms=60_000)
        before = world.loop.time()
        poll = world.ask_leader(world.group_place, request)
        assert world.answer(poll)[0].assigned is None
        assert 3.0 < world.loop.time() - before < 4.0, "a third of its session, for it gives no signs of life"
        polls = [world.ask_leader(world.group_place, request) for _ in range(2)]
        world.loop.run_for(0.5)
        assert [poll.done() for poll in polls] == [True, False]


def test_topics_that_appear_are_news() -> None:
    with CoordinatedWorld(partitions=1) as world:
        options = {"topics": ("later", TOPIC)}
        one = Member(world, "one", **options)
        settle(one)
        assert one.assigned == (0,)
        request = world.heartbeat_request("one", one.epoch, one.revision, wait_ms=3_000, **options)
        poll = world.ask_leader(world.group_place, request)
        world.create("later", 2)
        answer: GroupHeartbeatResponse = world.answer(poll)[0]
        assert answer.assigned == {world.topic_id: (0,), world.topic_id_of("later"): (0, 1)}


def test_who_falls_silent_is_out() -> None:
    with CoordinatedWorld(partitions=4) as world:
        one, two = Member(world, "one"), Member(world, "two", session_timeout_ms=60_000)
        settle(one, two)
        world.pass_time(9.0)
        two.beat()
        assert len(row_of(world).members) == 2
        world.pass_time(1.5)
        assert [each.member_id for each in row_of(world).members] == ["two"]
        settle(two)
        assert two.assigned == ALL
        with pytest.raises(StaleMember):
            one.beat()
        with pytest.raises(StaleMember):
            world.commit(5, "one", one.epoch)


def test_a_broken_connection_shortens_the_session() -> None:
    with CoordinatedWorld(partitions=4) as world:
        one, two = Member(world, "one"), Member(world, "two")
        settle(one, two)
        leader = world.leader_at(world.group_place)
        other = world.dial(leader)
        one.take(world.call(other, world.heartbeat_request("one", one.epoch, one.revision))[0])
        other.close()
        world.pass_time(0.5)
        assert len(row_of(world).members) == 2
        world.pass_time(1.0)
        assert [each.member_id for each in row_of(world).members] == ["two"]


def test_who_comes_back_on_another_connection_stays() -> None:
    with CoordinatedWorld() as world:
        one = Member(world, "one")
        settle(one)
        leader = world.leader_at(world.group_place)
        other = world.dial(leader)
        world.call(other, world.heartbeat_request("one", one.epoch, one.revision))
        other.close()
        world.pass_time(0.2)
        one.beat()
        world.pass_time(5.0)
        assert len(row_of(world).members) == 1


def test_who_does_not_give_up_its_partitions_in_time_is_out() -> None:
    with CoordinatedWorld(partitions=4) as world:
        slow, two = Member(world, "slow", rebalance_timeout_ms=5_000), Member(world, "two")
        settle(slow)
        two.beat()
        slow.beat()
        assert len(slow.assigned) == 2
        held = slow.revision - 1
        for _ in range(4):
            world.pass_time(1.4)
            try:
                world.heartbeat("slow", slow.epoch, held)
            except StaleMember:
                break
        world.pass_time(1.0)
        two.beat()
        settle(two)
        assert two.assigned == ALL


@pytest.mark.parametrize("how", ["kill", "power", "cut off"])
def test_a_new_coordinator_expels_nobody(how: str) -> None:
    """Sessions begin anew with it, and nobody pauses."""
    with CoordinatedWorld(partitions=4) as world:
        one, two = Member(world, "one"), Member(world, "two")
        settle(one, two)
        owned = one.assigned, two.assigned
        world.pass_time(8.0)
        victim = world.leader_at(world.group_place)
        parked = world.ask_leader(
            world.group_place, world.heartbeat_request("one", one.epoch, one.revision, wait_ms=3_000)
        )
        if how == "kill":
            world.cluster.kill_broker(victim)
        elif how == "power":
            world.cluster.cut_power(victim, CrashMode.RANDOM)
        else:
            world.isolate(victim)
        world.leader_at(world.group_place, but=victim)
        if how == "cut off":
            world.until(lambda: world.group_replica(victim).staged is None)
            assert isinstance(outcome(parked), NotLeader | GroupHeartbeatResponse)
        else:
            parked.add_done_callback(outcome)  # nobody waits for it
        world.pass_time(7.0)
        one.beat()
        two.beat()
        settle(one, two)
        assert (one.assigned, two.assigned) == owned
        assert row_of(world).epoch == one.epoch


def test_who_is_gone_with_the_old_coordinator_is_out_of_the_new_one_in_time() -> None:
    with CoordinatedWorld(partitions=4) as world:
        one, two = Member(world, "one"), Member(world, "two")
        settle(one, two)
        victim = world.leader_at(world.group_place)
        world.cluster.kill_broker(victim)
        world.leader_at(world.group_place, but=victim)
        world.pass_time(8.0)
        two.beat()
        world.pass_time(3.0)
        settle(two)
        assert two.assigned == ALL


@pytest.mark.parametrize("delay_ms", [0.0, 1.0, 2.0, 4.0, 8.0])
def test_the_coordinator_dies_while_a_member_joins(delay_ms: float) -> None:
    with CoordinatedWorld(partitions=4, seed=int(delay_ms) + 3) as world:
        one, two = Member(world, "one"), Member(world, "two")
        settle(one)
        victim = world.leader_at(world.group_place)
        joining = world.ask(world.connection(victim), world.heartbeat_request("two"))
        joining.add_done_callback(outcome)
        world.loop.run_for(delay_ms / 1000)
        world.cluster.kill_broker(victim)
        world.leader_at(world.group_place, but=victim)
        settle(one, two)
        assert len(one.assigned) == len(two.assigned) == 2
        assert row_of(world).state == "stable"
        restart(world, victim)
        settle(one, two)
        for broker in range(3):
            world.group_replica(broker).machine.check_invariants()


def test_a_coordinator_that_was_held_up_expels_nobody() -> None:
    """Its members were there all the while: what they sent lies unread before it."""
    with CoordinatedWorld(brokers=1, partitions=4) as world:
        one = Member(world, "one")
        settle(one)
        world.loop.pause(broker_name(0))
        world.loop.run_for(60.0)
        world.loop.resume(broker_name(0))
        world.pass_time(1.0)
        one.beat()
        assert one.assigned == ALL
        world.pass_time(11.0)
        with pytest.raises(StaleMember):
            one.beat()


def test_a_full_disk_expels_nobody() -> None:
    with CoordinatedWorld(brokers=1, partitions=4) as world:
        one = Member(world, "one")
        settle(one)
        disk = world.cluster.disks[0]
        disk.capacity = disk.used_bytes
        leader = world.connection(0)
        while world.broker(0).store.fault is None:
            world.produce(leader, batch(bytes(100_000))).add_done_callback(outcome)
            world.loop.run_for(0.1)
        world.pass_time(30.0)
        disk.capacity = None
        world.until(lambda: world.broker(0).store.fault is None)
        world.pass_time(5.0)
        one.beat()
        assert one.assigned == ALL


def test_fifty_members_over_five_hundred_partitions() -> None:
    with CoordinatedWorld(partitions=500, config=BrokerConfig(internal_partitions=1)) as world:
        members = [Member(world, f"member-{number:02}") for number in range(50)]

        async def run(member: Member) -> None:
            while any(len(each.assigned) != 10 for each in members):
                request = world.heartbeat_request(member.name, member.epoch, member.revision, wait_ms=1_000)
                answer, _ = await connection.call(request, timeout=TIMEOUT_S)
                member.take(answer)
                beats.append(member.name)

        beats: list[str] = []
        connection = world.connection(world.leader_at(world.group_place))
        before = world.loop.time()
        tasks = [world.loop.run_as(RAW, run(member)) for member in members]
        world.until(lambda: all(task.done() for task in tasks))
        for task in tasks:
            task.result()
        owned = [partition for member in members for partition in member.assigned]
        assert sorted(owned) == [*range(500)]
        assert world.loop.time() - before < 5.0
        assert len(beats) <= 5 * 50, "five heartbeats, on average, take a member from joining to all it gets"


# -- offsets -------------------------------------------------------------------------------------------------


def test_offsets_are_committed_by_whoever_holds_the_partition() -> None:
    with CoordinatedWorld(partitions=2) as world:
        world.commit(3, partition=1)
        assert world.offsets() == {1: 3}
        one, two = Member(world, "one"), Member(world, "two")
        settle(one, two)
        with pytest.raises(GroupNotEmpty):
            world.commit(4)
        mine, others = one.assigned[0], two.assigned[0]
        world.commit(7, "one", one.epoch, mine)
        with pytest.raises(StaleMember):
            world.commit(8, "one", one.epoch, others)
        with pytest.raises(StaleMember):
            world.commit(8, "one", one.epoch - 1, mine)
        assert world.offsets()[mine] == 7


def test_a_zombie_commits_nothing_after_a_rebalance() -> None:
    with CoordinatedWorld(partitions=2) as world:
        zombie = Member(world, "zombie")
        settle(zombie)
        world.commit(5, "zombie", zombie.epoch, 0)
        world.pass_time(11.0)
        successor = Member(world, "successor")
        settle(successor)
        world.commit(6, "successor", successor.epoch, 0)
        with pytest.raises(StaleMember):
            world.commit(4, "zombie", zombie.epoch, 0)
        assert world.offsets() == {0: 6}


@pytest.mark.parametrize("how", ["kill", "power"])
def test_what_was_committed_survives(how: str) -> None:
    with CoordinatedWorld(partitions=2) as world:
        for number in range(20):
            world.commit(number)
            if number % 7 == 3:
                victim = world.leader_at(world.group_place)
                if how == "kill":
                    world.cluster.kill_broker(victim)
                else:
                    world.cluster.cut_power(victim, CrashMode.RANDOM)
                world.leader_at(world.group_place, but=victim)
                assert world.offsets() == {0: number}
                restart(world, victim)
        assert world.offsets() == {0: 19}


def test_a_leader_that_was_replaced_tells_no_stale_offsets() -> None:
    with CoordinatedWorld() as world:
        world.commit(1)
        old = world.leader_at(world.group_place)
        world.isolate(old)
        stale = world.ask(world.connection(old), world.fetch_offsets_request())
        world.leader_at(world.group_place, but=old)
        world.commit(2)
        world.until(stale.done, 2 * TIMEOUT_S)
        assert isinstance(outcome(stale), RaftlogError)


def test_offsets_and_groups_that_nobody_needs_are_forgotten() -> None:
    with CoordinatedWorld(config=BrokerConfig(offsets_retention_ms=60_000)) as world:
        world.commit(5)
        world.pass_time(40.0)
        assert world.offsets() == {0: 5}
        world.pass_time(40.0)
        replica = world.group_replica(world.leader_at(world.group_place))
        assert not replica.machine.groups
        assert not replica.machine.offsets


def test_groups_are_listed_and_deleted() -> None:
    with CoordinatedWorld(partitions=2) as world:
        one = Member(world, "one")
        settle(one)
        world.commit(5, "one", one.epoch)
        place = world.group_place
        listed = world.seek(place, DescribeGroupsRequest(*place))[0].groups
        assert [(row.group_id, row.offsets) for row in listed] == [(GROUP, [])]
        assert row_of(world).offsets == [GroupOffset(world.topic_id, 0, 5)]
        with pytest.raises(GroupNotEmpty):
            world.seek(place, DeleteGroupRequest(*place, GROUP))
        with pytest.raises(GroupNotEmpty):
            world.seek(place, DeleteOffsetsRequest(*place, GROUP, [(world.topic_id, 0)]))
        world.heartbeat("one", -1)
        world.seek(place, DeleteOffsetsRequest(*place, GROUP, [(world.topic_id, 0)]))
        assert world.offsets() == {}
        world.seek(place, DeleteGroupRequest(*place, GROUP))
        with pytest.raises(UnknownGroup):
            world.seek(place, DeleteGroupRequest(*place, GROUP))


# -- the internal topics -------------------------------------------------------------------------------------


def test_they_are_made_once_whoever_asks_first() -> None:
    with World(brokers=3) as world:
        connections = [world.dial(broker_id) for broker_id in (0, 1, 2, 0, 1, 2)]
        request = MetadataRequest([GROUPS_TOPIC, TRANSACTIONS_TOPIC])
        tasks = [world.ask(connection, request) for connection in connections]
        ids = set()
        for task in tasks:
            answer = world.answer(task)[0]
            assert not answer.unknown_topics
            assert all(row.internal and len(row.partitions) == 8 for row in answer.topics)
            assert all(len(each.replicas) == 3 for row in answer.topics for each in row.partitions)
            ids.add(tuple(row.topic_id for row in answer.topics))
        assert len(ids) == 1


def test_they_are_made_while_the_metadata_has_no_leader() -> None:
    with World(brokers=3) as world:
        victim = world.metadata_leader()
        other = (victim + 1) % 3
        world.cluster.kill_broker(victim)
        answer = world.call(world.dial(other), MetadataRequest([GROUPS_TOPIC]))[0]
        (row,) = answer.topics
        assert all(len(each.replicas) == 3 for each in row.partitions), "the one that is away catches up"
        world.cluster.start_broker(victim)
        world.cluster.introduce()
        assert len(world.call(world.dial(victim), MetadataRequest([GROUPS_TOPIC]))[0].topics) == 1


@pytest.mark.parametrize("name", [GROUPS_TOPIC, TRANSACTIONS_TOPIC, "__metadata"])
def test_users_do_not_make_or_delete_them(name: str) -> None:
    with World(brokers=1) as world:
        connection = world.dial(0)
        with pytest.raises(InvalidTopic):
            world.call(connection, create_request(name))
        with pytest.raises(InvalidTopic):
            world.call(connection, DeleteTopicRequest(name))


def test_users_do_not_write_or_read_them() -> None:
    with CoordinatedWorld() as world:
        place = world.group_place
        connection = world.connection(world.leader_at(place))
        with pytest.raises(InvalidTopic):
            world.call(connection, ProduceRequest([ProducePartition(*place)]), (batch(b"mine"),))
        fetched = world.call(connection, FetchRequest(0, 1 << 20, [FetchPartition(*place, 0)]))[0]
        listed = world.call(connection, ListOffsetsRequest([OffsetQuery(*place, -1)]))[0]
        for error in (fetched.partitions[0].error, listed.answers[0].error):
            assert isinstance(from_wire(error.name, error.message, error.details), InvalidTopic)
        with pytest.raises(InvalidTopic):
            world.call(connection, InitTransactionsRequest(*place, "id", 1_000))
        with pytest.raises(ProtocolError):
            world.call(connection, WriteMarkersRequest([]))


def test_a_group_has_one_coordinator() -> None:
    """A request that comes to another partition than that of the group's name is refused."""
    with CoordinatedWorld() as world:
        topic_id, partition = world.group_place
        wrong = topic_id, (partition + 1) % 8
        connection = world.connection(world.leader_at(wrong))
        offsets = [GroupOffset(world.topic_id, 0, 1)]
        with pytest.raises(ConfigError):
            world.call(connection, OffsetCommitRequest(*wrong, GROUP, "", -1, offsets))


def test_their_size_stays_bounded_under_endless_commits() -> None:
    segment = 64 << 10
    config = BrokerConfig(internal_partitions=1, internal_segment_bytes=segment)
    with CoordinatedWorld(config=config) as world:
        place = world.group_place
        connection = world.connection(world.leader_at(place))

        async def commit_many(first: int) -> None:
            for number in range(first, first + 100):
                offsets = [GroupOffset(world.topic_id, 0, number, metadata="m" * 3_000)]
                request = OffsetCommitRequest(*place, GROUP, "", -1, offsets)
                await connection.call(request, timeout=TIMEOUT_S)

        def sizes() -> list[int]:
            found = []
            for broker_id in range(3):
                log = world.group_replica(broker_id).log
                found.append(sum(each.append_position for each in log.segments))
            return found

        for round_number in range(8):
            task = world.loop.run_as(RAW, commit_many(100 * round_number))
            world.until(task.done)
            task.result()
            world.pass_time(12.0)  # the housekeepers come by
            assert max(sizes()) <= 3 * segment, sizes()
        written = 800 * 3_000
        assert written > 30 * segment
        victim = world.leader_at(place)
        for broker_id in range(3):
            log = world.group_replica(broker_id).log
            assert len(log.snapshots) <= 3
            assert log.first_index > 500
        world.cluster.kill_broker(victim)
        world.leader_at(place, but=victim)
        assert world.offsets() == {0: 799}
        restart(world, victim)
        world.until(lambda: place in world.broker(victim).hosting.by_place)
        world.until(lambda: world.group_replica(victim).machine.offsets != {})


def test_a_broker_that_missed_most_of_it_gets_a_snapshot() -> None:
    config = BrokerConfig(internal_partitions=1, internal_segment_bytes=64 << 10)
    with CoordinatedWorld(config=config) as world:
        away = next(broker for broker in range(3) if broker != world.leader_at(world.group_place))
        world.cluster.kill_broker(away)
        for number in range(60):
            offsets = [GroupOffset(world.topic_id, 0, number, metadata="m" * 4_000)]
            world.seek(world.group_place, OffsetCommitRequest(*world.group_place, GROUP, "", -1, offsets))
        world.pass_time(12.0)
        assert world.group_replica(world.leader_at(world.group_place)).log.first_index > 10
        restart(world, away)
        world.until(lambda: world.group_place in world.broker(away).hosting.by_place)
        world.until(lambda: world.group_replica(away).snapshots_installed == 1)
        assert world.group_replica(away).machine.offsets
