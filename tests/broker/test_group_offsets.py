"""Offsets of groups: who may commit them, what a transaction holds back, and what expires."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from group_world import GROUP, SESSION_MS, Consumer, World, topic_id

from raftlog.broker import group_offsets
from raftlog.broker.group_offsets import NAME_MAX, OFFSET_METADATA_MAX
from raftlog.errors import (
    ConfigError,
    GroupNotEmpty,
    InvalidTransaction,
    ProducerFenced,
    RaftlogError,
    StaleCoordinator,
    StaleMember,
    UnknownGroup,
    UnstableOffsets,
)
from raftlog.net.rpc import (
    LEAVE_EPOCH,
    NO_MEMBER,
    DeleteOffsetsRequest,
    GroupOffset,
    OffsetCommitRequest,
    OffsetFetchRequest,
    StageOffsetsRequest,
)
from raftlog.state.groups import Command, DeleteGroup, ExpireProducers, Key, RemoveOffsets

T, U = topic_id("t"), topic_id("u")
PRODUCER = 7
DAY_MS = 86_400_000
RETENTION_MS = 7 * DAY_MS


def offsets(*partitions: int, at: int = 5, topic: bytes = T) -> list[GroupOffset]:
    return [GroupOffset(topic, partition, at) for partition in partitions]


def commit(world: World, member: str, epoch: int, rows: list[GroupOffset], group: str = GROUP) -> None:
    request = OffsetCommitRequest(b"", 0, group, member, epoch, rows)
    world.log(*group_offsets.commit(world.staged, request).commands)
    world.commit()


def commit_as_nobody(world: World, rows: list[GroupOffset], group: str = GROUP) -> None:
    commit(world, NO_MEMBER, LEAVE_EPOCH, rows, group)


def stage(world: World, member: str, epoch: int, rows: list[GroupOffset], producer_epoch: int = 0) -> None:
    request = StageOffsetsRequest(b"", 0, GROUP, member, epoch, PRODUCER, producer_epoch, rows)
    world.log(*group_offsets.stage(world.staged, request).commands)
    world.commit()


def end(world: World, *, commit: bool, epoch: int = 0, coordinator_epoch: int = 1) -> tuple[Command, ...]:
    commands = group_offsets.end(world.staged, PRODUCER, epoch, coordinator_epoch, commit).commands
    world.log(*commands)
    world.commit()
    return commands


def fetched(world: World, keys: Iterable[Key] | None = None, group: str = GROUP) -> dict[Key, int]:
    request = OffsetFetchRequest(b"", 0, group, None if keys is None else list(keys))
    found = group_offsets.fetch(world.applied, request).offsets
    return {(each.topic_id, each.partition): each.offset for each in found}


def expire(world: World) -> tuple[Command, ...]:
    commands = group_offsets.expire(world.staged, world.now_ms, RETENTION_MS, RETENTION_MS)
    world.log(*commands)
    world.commit()
    return commands


# -- who may commit ------------------------------------------------------------------------------------------


def test_a_member_commits_what_it_holds_and_anybody_may_fetch_it() -> None:
    world = World(t=3)
    a = world.join("a", "t")
    row = GroupOffset(T, 0, 17, 4, "note")
    commit(world, "a", a.epoch, [row, *offsets(1)])
    assert fetched(world) == {(T, 0): 17, (T, 1): 5}
    assert fetched(world, [(T, 1), (T, 2), (U, 0)]) == {(T, 1): 5}, (
        "nothing is left out but what is not there"
    )
    assert group_offsets.fetch(world.applied, OffsetFetchRequest(b"", 0, GROUP, [(T, 0)])).offsets == [row]
    assert fetched(world, group="unknown") == {}


def test_while_it_lets_go_a_member_still_commits_and_not_after() -> None:
    world = World(t=2)
    a, b = world.join("a", "t"), world.join("b", "t")
    assert world.heartbeat(a, lets_go=False)
    commit(world, "a", a.epoch, offsets(1, at=40))
    epoch = a.epoch
    a.let_go()
    assert world.heartbeat(a)
    for named in (epoch, a.epoch):
        with pytest.raises(StaleMember) as raised:
            commit(world, "a", named, offsets(1, at=99))
        assert raised.value.member_epoch == a.epoch
    commit(world, "a", a.epoch, offsets(0, at=7))
    assert world.heartbeat(b)
    commit(world, "b", b.epoch, offsets(1, at=41))
    assert fetched(world) == {(T, 0): 7, (T, 1): 41}


def zombie_expelled(world: World, a: Consumer) -> None:
    world.pass_time(SESSION_MS)


def zombie_left(world: World, a: Consumer) -> None:
    world.leave(Consumer("a", ("t",)))


def zombie_of_a_deleted_group(world: World, a: Consumer) -> None:
    zombie_left(world, a)
    world.log(DeleteGroup(GROUP))


def zombie_joined_again(world: World, a: Consumer) -> None:
    zombie_left(world, a)
    world.join("a", "t")


@pytest.mark.parametrize(
    "happens", [zombie_expelled, zombie_left, zombie_of_a_deleted_group, zombie_joined_again]
)
@pytest.mark.parametrize("write", [commit, stage], ids=["commit", "stage"])
def test_zombie_commits_after_a_rebalance_are_refused(
    happens: Callable[[World, Consumer], None], write: Callable[..., None]
) -> None:
    world = World(t=2)
    a = world.join("a", "t")
    happens(world, a)
    if happens is not zombie_of_a_deleted_group:
        world.join("b", "t")
    before = world.staged.snapshot()
    with pytest.raises(StaleMember):
        write(world, "a", a.epoch, offsets(0))
    assert world.staged.snapshot() == before


@pytest.mark.parametrize("write", [commit, stage], ids=["commit", "stage"])
def test_one_partition_that_is_not_held_refuses_all(write: Callable[..., None]) -> None:
    world = World(t=2, u=1)
    a, b = world.join("a", "t"), world.join("b", "t")
    world.settle(a, b)
    for bad in (offsets(0, 1), offsets(0, topic=U), offsets(0) + offsets(9)):
        with pytest.raises(StaleMember):
            write(world, "a", a.epoch, bad)
    assert world.staged.offsets == {}
    assert world.staged.pending == {}
    write(world, "a", a.epoch, offsets(0))


@pytest.mark.parametrize("named", [-1, +1])
def test_another_epoch_is_refused(named: int) -> None:
    world = World(t=2)
    world.join("b", "t")
    a = world.join("a", "t")
    with pytest.raises(StaleMember):
        commit(world, "a", a.epoch + named, [])


def test_offsets_of_a_group_without_members_are_anybodys() -> None:
    world = World(t=2)
    commit_as_nobody(world, offsets(0, 1, at=3))
    assert fetched(world) == {(T, 0): 3, (T, 1): 3}
    a = world.join("a", "t")
    with pytest.raises(GroupNotEmpty) as raised:
        commit_as_nobody(world, offsets(0, at=4))
    assert raised.value.members == ["a"]
    for epoch in (0, 1):
        with pytest.raises(StaleMember):
            commit(world, NO_MEMBER, epoch, offsets(0, at=4))
    world.leave(a)
    commit_as_nobody(world, offsets(0, at=1))
    assert fetched(world) == {(T, 0): 1, (T, 1): 3}


BAD = {
    "offset below 0": (GROUP, [GroupOffset(T, 0, -1)]),
    "partition below 0": (GROUP, [GroupOffset(T, -1, 0)]),
    "metadata too long": (GROUP, [GroupOffset(T, 0, 0, -1, "m" * (OFFSET_METADATA_MAX + 1))]),
    "no group": ("", offsets(0)),
    "group too long": ("g" * (NAME_MAX + 1), offsets(0)),
}


@pytest.mark.parametrize(("group", "rows"), BAD.values(), ids=BAD.keys())
def test_bad_values_are_refused_and_the_next_commit_succeeds(group: str, rows: list[GroupOffset]) -> None:
    world = World(t=1)
    with pytest.raises(ConfigError):
        commit_as_nobody(world, rows, group)
    assert world.staged.groups == {}
    commit_as_nobody(world, offsets(0))


def test_nothing_to_commit_is_not_logged() -> None:
    world = World(t=1)
    commit_as_nobody(world, [])
    stage(world, NO_MEMBER, LEAVE_EPOCH, [])
    assert world.entries == []


# -- transactions --------------------------------------------------------------------------------------------


def test_a_fetch_waits_out_a_pending_commit() -> None:
    """A rebalance between prepare and marker: who takes over must not begin where the transaction began."""
    world = World(t=2)
    a = world.join("a", "t")
    commit(world, "a", a.epoch, offsets(0, 1, at=3))
    stage(world, "a", a.epoch, offsets(0, at=10))
    world.leave(a)
    world.join("b", "t")
    for keys in (None, [(T, 0)], [(T, 1), (T, 0)]):
        with pytest.raises(UnstableOffsets) as raised:
            fetched(world, keys)
        assert raised.value.retriable
    assert fetched(world, [(T, 1)]) == {(T, 1): 3}, "the others are known"
    end(world, commit=True)
    assert fetched(world) == {(T, 0): 10, (T, 1): 3}


def test_after_an_abort_the_offsets_before_it_hold() -> None:
    world = World(t=1)
    a = world.join("a", "t")
    commit(world, "a", a.epoch, offsets(0, at=3))
    stage(world, "a", a.epoch, offsets(0, at=10))
    end(world, commit=False)
    assert fetched(world) == {(T, 0): 3}


def test_the_retry_of_a_marker_logs_nothing() -> None:
    world = World(t=1)
    a = world.join("a", "t")
    stage(world, "a", a.epoch, offsets(0, at=10))
    assert len(end(world, commit=True)) == 1
    assert end(world, commit=True) == ()
    with pytest.raises(InvalidTransaction):
        end(world, commit=False)
    with pytest.raises(StaleCoordinator):
        end(world, commit=True, epoch=1, coordinator_epoch=0)


def test_late_offsets_of_an_ended_transaction_do_not_hang() -> None:
    world = World(t=1)
    a = world.join("a", "t")
    end(world, commit=False, epoch=1)
    for epoch, error in ((0, ProducerFenced), (1, InvalidTransaction)):
        with pytest.raises(error):
            stage(world, "a", a.epoch, offsets(0), producer_epoch=epoch)
    assert fetched(world) == {}
    stage(world, "a", a.epoch, offsets(0, at=10), producer_epoch=2)
    end(world, commit=True, epoch=2)
    assert fetched(world) == {(T, 0): 10}


@pytest.mark.parametrize("commits", [True, False])
def test_pending_offsets_come_through_a_change_of_leader(commits: bool) -> None:
    world = World(t=1)
    a = world.join("a", "t")
    stage(world, "a", a.epoch, offsets(0, at=10))
    world.lead(through_snapshot=True)
    with pytest.raises(UnstableOffsets):
        fetched(world)
    end(world, commit=commits)
    assert fetched(world) == ({(T, 0): 10} if commits else {})


# -- deleting ------------------------------------------------------------------------------------------------


def delete(world: World, *keys: Key) -> tuple[Command, ...]:
    request = DeleteOffsetsRequest(b"", 0, GROUP, list(keys))
    return group_offsets.delete(world.staged, request).commands


def test_offsets_are_deleted_unless_somebody_needs_them() -> None:
    world = World(t=1, u=1)
    with pytest.raises(UnknownGroup):
        delete(world, (T, 0))
    commit_as_nobody(world, offsets(0) + offsets(0, topic=U))
    a = world.join("a", "t")
    with pytest.raises(GroupNotEmpty):
        delete(world, (U, 0), (T, 0))
    assert delete(world, (U, 0)) == (RemoveOffsets(GROUP, ((U, 0),)),)
    assert delete(world) == ()
    world.leave(a)
    assert delete(world, (T, 0)) == (RemoveOffsets(GROUP, ((T, 0),)),)
    stage(world, NO_MEMBER, LEAVE_EPOCH, offsets(0))
    with pytest.raises(UnstableOffsets):
        delete(world, (T, 0))


# -- expiry --------------------------------------------------------------------------------------------------


def test_offsets_expire_when_the_group_has_been_empty_for_their_time() -> None:
    world = World(t=1)
    a = world.join("a", "t")
    commit(world, "a", a.epoch, offsets(0))
    world.now_ms += 2 * RETENTION_MS
    assert expire(world) == (), "a member reads the topic, however long ago it committed"
    world.leave(a)
    world.now_ms += RETENTION_MS - 1
    assert expire(world) == ()
    world.now_ms += 1
    assert expire(world) == (DeleteGroup(GROUP),)
    assert world.staged.groups == {}


def test_a_late_commit_keeps_a_group_without_members() -> None:
    world = World(t=2)
    commit_as_nobody(world, offsets(0, 1))
    world.now_ms += RETENTION_MS - 1
    commit_as_nobody(world, offsets(1))
    world.now_ms += 1
    assert expire(world) == (RemoveOffsets(GROUP, ((T, 0),)),)
    world.now_ms += RETENTION_MS - 2
    assert expire(world) == ()
    world.now_ms += 1
    assert expire(world) == (DeleteGroup(GROUP),)


def test_offsets_of_topics_that_no_member_reads_expire_by_themselves() -> None:
    world = World(t=1, u=1)
    commit_as_nobody(world, offsets(0) + offsets(0, topic=U))
    world.join("a", "t")
    world.now_ms += RETENTION_MS - 1
    assert expire(world) == ()
    world.now_ms += 1
    assert expire(world) == (RemoveOffsets(GROUP, ((U, 0),)),)


@pytest.mark.parametrize("commits", [True, False])
def test_expiry_does_not_race_staged_offsets(commits: bool) -> None:
    """https://github.com/redpanda-data/redpanda/issues/31483"""
    world = World(t=2)
    commit_as_nobody(world, offsets(0, 1, at=3))
    world.now_ms += RETENTION_MS
    stage(world, NO_MEMBER, LEAVE_EPOCH, offsets(0, at=10))
    assert expire(world) == (RemoveOffsets(GROUP, ((T, 1),)),), "what it does not hold may go"
    world.now_ms += RETENTION_MS
    assert expire(world) == ()
    end(world, commit=commits)
    assert fetched(world) == {(T, 0): 10 if commits else 3}
    assert expire(world) == (() if commits else (DeleteGroup(GROUP), *()))
    world.now_ms += RETENTION_MS
    if commits:
        assert DeleteGroup(GROUP) in expire(world)
    assert world.staged.groups == {}


def test_a_group_that_only_has_staged_offsets_does_not_expire() -> None:
    world = World(t=1)
    stage(world, NO_MEMBER, LEAVE_EPOCH, offsets(0, at=10))
    world.now_ms += 2 * RETENTION_MS
    assert expire(world) == ()
    end(world, commit=True)
    assert fetched(world) == {(T, 0): 10}


def test_ends_of_transactions_are_forgotten_in_time() -> None:
    world = World()
    end(world, commit=True)
    world.now_ms += RETENTION_MS
    assert expire(world) == ()
    world.now_ms += 1
    assert expire(world) == (ExpireProducers(world.now_ms - RETENTION_MS),)
    assert world.staged.ended == {}
    assert expire(world) == ()


def test_refusals_survive_as_what_they_are() -> None:
    world = World(t=1)
    with pytest.raises(RaftlogError) as raised:
        commit(world, "a", 1, offsets(0))
    assert raised.value.abortable, "a transaction whose member is out is aborted, its work is another's"
    assert not raised.value.retriable
