"""The group coordinator: each transition of a member, who is let in and who is not, and the timers."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from group_world import GROUP, REBALANCE_MS, SESSION_MS, Consumer, World, topic_id

from raftlog.broker import groups as groups_module
from raftlog.broker.groups import BROKEN_SESSION_MS, RECONCILE_INTERVAL_MS, TopicView
from raftlog.errors import ConfigError, GroupNotEmpty, StaleMember, UnknownGroup
from raftlog.net.catalogue import REQUESTS
from raftlog.net.rpc import (
    LEAVE_EPOCH,
    DeleteGroupRequest,
    DescribeGroupsRequest,
    GroupHeartbeatRequest,
    GroupHeartbeatResponse,
)
from raftlog.state.groups import Assignment, DeleteGroup, MemberState, NewOffset, PutOffsets, keys_of

T, U = topic_id("t"), topic_id("u")


def parts(*partitions: int, topic: bytes = T) -> Assignment:
    return {topic: partitions} if partitions else {}


# -- the way of a member -------------------------------------------------------------------------------------


def test_the_first_member_gets_everything_at_once() -> None:
    world = World(t=3, u=1)
    a = world.join("a", "t", "u")
    assert (a.epoch, a.revision) == (1, 1)
    assert world.member("a").state == MemberState.STABLE
    world.check_reading(a)


def test_a_partition_changes_hands_as_the_chart_says() -> None:
    world = World(t=2)
    a = world.join("a", "t")
    b = world.join("b", "t")
    member = world.member("b")
    assert (member.epoch, member.state, member.assigned) == (2, MemberState.UNRELEASED, {})
    assert (member.target, world.member("a").target) == (parts(1), parts(0))
    assert b.reads == set()

    assert world.heartbeat(b), "asking again brings nothing as long as a holds it"
    assert b.reads == set()

    assert world.heartbeat(a, lets_go=False)
    member = world.member("a")
    assert (member.epoch, member.state) == (1, MemberState.UNREVOKED)
    assert (member.assigned, member.revoking) == (parts(0), parts(1))
    assert world.heartbeat(a, lets_go=False), "a sign of life while it lets go releases nothing"
    assert world.member("a") == member
    assert world.heartbeat(b)
    assert b.reads == set()

    a.let_go()
    assert world.heartbeat(a)
    member = world.member("a")
    assert (member.epoch, member.previous_epoch, member.state) == (2, 1, MemberState.STABLE)
    assert (member.assigned, member.revoking) == (parts(0), {})
    assert world.heartbeat(b)
    assert world.member("b").state == MemberState.STABLE
    world.check_reading(a, b)


def test_a_member_whose_partitions_do_not_change_only_moves_on_to_the_epoch() -> None:
    world = World(t=2, u=1)
    a, b = world.join("a", "t"), world.join("b", "u")
    held = a.reads
    before = world.member("a")
    assert before.epoch == 1
    assert world.heartbeat(a)
    after = world.member("a")
    assert (after.epoch, after.previous_epoch, after.revision) == (2, 1, before.revision)
    assert a.reads is held or a.reads == held
    world.check_reading(a, b)


def test_a_target_that_comes_back_while_its_partition_is_given_up() -> None:
    world = World(t=2)
    a, b = world.join("a", "t"), world.join("b", "t")
    assert world.heartbeat(a, lets_go=False)
    world.leave(b)
    assert world.member("a").state == MemberState.UNREVOKED, "what it was told holds until it has done it"
    a.let_go()
    assert world.heartbeat(a)
    world.check_reading(a)


def test_more_is_taken_from_a_member_that_still_gives_up_some() -> None:
    world = World(t=4)
    a, b = world.join("a", "t"), world.join("b", "t")
    assert world.heartbeat(a, lets_go=False)
    c, d = world.join("c", "t"), world.join("d", "t")
    a.let_go()
    assert world.heartbeat(a, lets_go=False)
    member = world.member("a")
    assert member.state == MemberState.UNREVOKED
    assert (len(list(keys_of(member.assigned))), len(list(keys_of(member.revoking)))) == (1, 1)
    assert member.epoch == 1, "it moves on when it has given up everything"
    a.let_go()
    assert world.settle(a, b, c, d) <= 3
    world.check_reading(a, b, c, d)


def test_subscribing_to_something_else() -> None:
    world = World(t=2, u=2)
    a, b = world.join("a", "t"), world.join("b", "t", "u")
    world.settle(a, b)
    b.topics = ("u",)
    world.settle(a, b)
    assert world.heartbeat(b)
    assert world.settle(a, b) <= 3
    assert a.reads == {(T, 0), (T, 1)}
    assert b.reads == {(U, 0), (U, 1)}
    b.topics = ()
    assert world.heartbeat(b)
    assert b.reads == set()


def test_topics_that_appear_grow_and_go() -> None:
    world = World(t=1)
    a = world.join("a", "t", "u")
    assert a.reads == {(T, 0)}, "what does not exist is waited for"
    for change, rounds in ((lambda: world.grow("u", 2), 1), (lambda: world.grow("t", 3), 1)):
        change()
        for _ in range(rounds):
            assert world.heartbeat(a)
        world.check_reading(a)
    world.drop("u")
    assert world.heartbeat(a)
    assert world.heartbeat(a)
    assert a.reads == {(T, 0), (T, 1), (T, 2)}
    assert world.settle(a) == 0


def test_a_broker_with_old_metadata_takes_nothing_away() -> None:
    world = World(t=1)
    old = TopicView(world.version, dict(world.topics).get)
    world.grow("t", 3)
    world.grow("u", 1)
    a = world.join("a", "t", "u")
    world.check_reading(a)
    epoch = world.group.epoch
    decision = world.coordinator.heartbeat(world.staged, a.request(), world.now_ms, old)
    assert decision.commands == ()
    b = Consumer("b", ("t",))
    decision = world.coordinator.heartbeat(world.staged, b.request(), world.now_ms, old)
    world.log(*decision.commands)
    assert world.group.epoch == epoch + 1
    assert world.group.topics == world.topics, "for the new member's sake, topics are not forgotten"
    assert world.group.topics_version == world.version


def test_a_topic_made_again_under_its_name_is_another_one() -> None:
    world = World(t=2)
    a = world.join("a", "t")
    world.version += 1
    world.topics["t"] = b"again".ljust(16), 2
    assert world.heartbeat(a)
    assert a.reads == set(), "first it gives up what is gone"
    assert world.heartbeat(a)
    world.check_reading(a)


def test_the_newest_member_decides_about_the_assignor() -> None:
    world = World(t=6)
    a, b = world.join("a", "t"), world.join("b", "t")
    world.settle(a, b)
    c = Consumer("c", ("t",))
    world.decide(msgspec.structs.replace(c.request(), assignor="sticky"))
    assert world.group.assignor == "sticky"
    assert [len(list(keys_of(member.target))) for member in world.group.members.values()] == [2, 3, 1]


# -- epochs and late messages --------------------------------------------------------------------------------

HEARTBEATS = [
    # a member at epoch 3 and revision 3, which was at epoch 1 and revision 2 before
    (3, 3, "moves on"),
    (3, 2, "is told"),
    (3, 1, "is told"),
    (1, 3, "is told"),
    (1, 2, "is told"),
    (0, 0, "is told"),
    (2, 2, "is out"),
    (2, 3, "is out"),
    (4, 3, "is out"),
    (3, 4, "is out"),
    (1, 4, "is out"),
]


@pytest.mark.parametrize(("epoch", "revision", "result"), HEARTBEATS)
def test_only_the_newest_epoch_and_revision_move_a_member_on(epoch: int, revision: int, result: str) -> None:
    world = World(t=4)
    a = world.join("a", "t")
    world.join("b", "t")
    world.join("c", "t")
    assert world.heartbeat(a)
    assert world.heartbeat(a)
    world.join("d", "t")
    assert world.heartbeat(a, lets_go=False)
    before = world.member("a")
    assert (before.epoch, before.previous_epoch, before.revision) == (3, 1, 3)
    assert before.state == MemberState.UNREVOKED
    request = msgspec.structs.replace(a.request(), member_epoch=epoch, revision=revision)
    if result == "is out":
        with pytest.raises(StaleMember) as raised:
            world.decide(request)
        assert raised.value.member_epoch == before.epoch
        assert world.member("a") == before
        return
    decision = world.decide(request)
    if result == "moves on":
        assert world.member("a").state == MemberState.STABLE
        assert decision.answer.member_epoch == 4
    else:
        assert decision.commands == ()
        assert decision.answer.assigned == before.assigned
        assert (decision.answer.member_epoch, decision.answer.revision) == (before.epoch, before.revision)
        assert decision.news


def test_a_late_copy_of_an_old_heartbeat_releases_nothing() -> None:
    """Two members owning one partition (https://github.com/apache/kafka/pull/10985), by a heartbeat from
    before the member had anything, of the same epoch, that comes while it has to give something up."""
    world = World(t=4)
    a, b = world.join("a", "t"), world.join("b", "t")
    late = b.request()
    world.settle(a, b)
    assert b.reads == {(T, 2), (T, 3)}
    c = world.join("c", "t")
    assert world.heartbeat(b, lets_go=False)
    assert (world.member("b").epoch, world.member("b").revoking) == (late.member_epoch, parts(3))
    world.decide(late)
    assert world.member("b").revoking == parts(3)
    assert world.heartbeat(c)
    assert c.reads == set()
    b.let_go()
    world.settle(a, b, c)
    world.check_reading(a, b, c)


def test_a_late_copy_does_not_bring_back_an_old_subscription() -> None:
    world = World(t=1, u=1)
    a = world.join("a", "t")
    late = a.request()
    a.topics = ("u",)
    assert world.settle(a) == 0
    assert world.heartbeat(a)
    assert world.settle(a) == 1
    assert a.reads == {(U, 0)}
    assert world.coordinator.heartbeat(world.staged, a.request(), world.now_ms, world.view).commands == ()
    with contextlib.suppress(StaleMember):
        world.decide(late)
    assert world.member("a").topics == ("u",)


def test_lost_answers_are_answered_again_and_cost_no_membership() -> None:
    world = World(t=2)
    a = Consumer("a", ("t",))
    for _ in range(4):
        world.decide(a.request())
    assert world.member("a").revision == 1, "joined once"
    b = Consumer("b", ("t",))
    world.decide(b.request())
    assert world.heartbeat(a)
    assert world.heartbeat(b)
    for _ in range(4):
        world.decide(a.request())
        world.decide(b.request())
    assert world.settle(a, b) <= 3
    world.check_reading(a, b)


def test_an_unknown_member_is_out_until_it_joins() -> None:
    world = World(t=1)
    a = Consumer("a", ("t",), epoch=1, revision=1)
    with pytest.raises(StaleMember) as raised:
        world.decide(a.request())
    assert raised.value.member_epoch == LEAVE_EPOCH
    assert world.staged.groups == {}


def test_a_member_that_joins_again_under_its_id_holds_what_it_held() -> None:
    world = World(t=2)
    a, b = world.join("a", "t"), world.join("b", "t")
    world.settle(a, b)
    again = world.join("a", "t")
    assert again.reads == a.reads
    assert world.settle(again, b) == 0


def test_a_group_that_comes_again_repeats_no_epochs() -> None:
    world = World(t=1)
    a = world.join("a", "t")
    world.leave(a)
    world.log(*world.coordinator.delete(world.staged, DeleteGroupRequest(b"", 0, GROUP)).commands)
    again = world.join("a", "t")
    assert again.epoch == 3
    with pytest.raises(StaleMember):
        world.decide(msgspec.structs.replace(again.request(), member_epoch=1, revision=1))


# -- leaving and being removed -------------------------------------------------------------------------------


def test_who_leaves_frees_its_partitions_at_once_and_may_say_so_twice() -> None:
    world = World(t=2)
    a, b = world.join("a", "t"), world.join("b", "t")
    world.settle(a, b)
    world.leave(b)
    assert b.is_out
    epoch = world.group.epoch
    world.leave(b)
    assert world.group.epoch == epoch
    assert world.heartbeat(a)
    world.check_reading(a)
    nobody = Consumer("x", (), epoch=LEAVE_EPOCH)
    request = msgspec.structs.replace(nobody.request(), group_id="nowhere")
    assert world.decide(request).answer.member_epoch == LEAVE_EPOCH
    assert "nowhere" not in world.staged.groups


def test_a_session_ends_when_nothing_was_heard_for_its_time() -> None:
    world = World(t=2)
    a, b = world.join("a", "t"), world.join("b", "t")
    world.settle(a, b)
    world.pass_time(SESSION_MS - 1)
    assert world.heartbeat(a)
    assert set(world.group.members) == {"a", "b"}
    world.pass_time(1)
    assert set(world.group.members) == {"a"}
    world.pass_time(SESSION_MS - 2)
    assert set(world.group.members) == {"a"}
    assert world.heartbeat(a)
    world.check_reading(a)
    assert not world.heartbeat(b), "it is out"
    world.pass_time(SESSION_MS)
    assert not world.group.members
    assert world.group.empty_since_ms == world.now_ms
    assert world.coordinator.due_ms is not None
    world.pass_time(SESSION_MS)
    assert world.coordinator.due_ms is None, "no timer is left over"


def test_all_that_end_together_make_one_change_per_group() -> None:
    world = World(t=2)
    world.join("a", "t")
    world.join("b", "t")
    commands = world.coordinator.expire(world.staged, world.now_ms + SESSION_MS, world.view)
    assert len(commands) == 1
    again = world.coordinator.expire(world.staged, world.now_ms + SESSION_MS + 1, world.view)
    assert again == commands, "what could not be logged comes again"


def test_a_member_that_does_not_let_go_in_time_is_removed() -> None:
    world = World(t=2)
    a, b = world.join("a", "t"), world.join("b", "t")
    assert world.heartbeat(a, lets_go=False)
    for _ in range(REBALANCE_MS // 500 - 1):
        world.pass_time(500)
        assert world.heartbeat(a, lets_go=False)
        assert world.heartbeat(b)
    world.pass_time(499)
    assert "a" in world.group.members
    world.pass_time(1)
    assert set(world.group.members) == {"b"}
    assert world.heartbeat(b)
    world.check_reading(b)


def test_less_time_to_let_go_than_a_session_has() -> None:
    world = World(t=2)
    a = Consumer("a", ("t",))

    def beat() -> None:
        request = msgspec.structs.replace(a.request(), rebalance_timeout_ms=SESSION_MS // 4)
        a.answered(world.decide(request).answer, lets_go=False)

    beat()
    world.join("b", "t")
    beat()
    assert world.coordinator.due_ms == world.now_ms + SESSION_MS // 4
    world.pass_time(SESSION_MS // 4)
    assert set(world.group.members) == {"b"}


def test_letting_go_in_time_ends_that_timer() -> None:
    world = World(t=2)
    a, b = world.join("a", "t"), world.join("b", "t")
    world.settle(a, b)
    for _ in range(REBALANCE_MS // 500 + 1):
        world.pass_time(500)
        assert world.heartbeat(a)
        assert world.heartbeat(b)
    assert set(world.group.members) == {"a", "b"}


def test_a_broken_connection_leaves_a_second_to_come_back() -> None:
    world = World(t=3)
    long = 60_000
    consumers = {name: Consumer(name, ("t",)) for name in "abc"}

    def beat(name: str, connection: str) -> None:
        request = msgspec.structs.replace(consumers[name].request(), session_timeout_ms=long)
        decision = world.decide(request, connection)
        world.commit()
        consumers[name].answered(decision.answer)

    beat("a", "first")
    beat("b", "first")
    beat("c", "other")
    world.coordinator.connection_lost("first", world.now_ms)
    world.pass_time(BROKEN_SESSION_MS - 1)
    beat("a", "second")
    world.pass_time(1)
    assert set(world.group.members) == {"a", "c"}, "b did not come back; c was elsewhere"
    world.pass_time(BROKEN_SESSION_MS)
    assert set(world.group.members) == {"a", "c"}, "a has its full session again"
    world.coordinator.connection_lost("first", world.now_ms)
    world.pass_time(BROKEN_SESSION_MS)
    assert set(world.group.members) == {"a", "c"}, "that connection is nobody's any more"


@pytest.mark.parametrize("through_snapshot", [True, False])
def test_a_new_coordinator_expels_nobody_and_gives_everyone_full_time(through_snapshot: bool) -> None:
    world = World(t=2)
    a, b = world.join("a", "t"), world.join("b", "t")
    assert world.heartbeat(a, lets_go=False)
    world.pass_time(SESSION_MS - 1)
    world.lead(through_snapshot=through_snapshot)
    world.pass_time(SESSION_MS - 1)
    assert set(world.group.members) == {"a", "b"}
    a.let_go()
    assert world.settle(a, b) <= 3
    world.check_reading(a, b)
    world.lead(through_snapshot=through_snapshot)
    world.pass_time(SESSION_MS)
    assert not world.group.members, "but it does time them"


def test_a_new_coordinator_times_a_revocation_anew() -> None:
    world = World(t=2)
    a = world.join("a", "t")
    world.join("b", "t")
    assert world.heartbeat(a, lets_go=False)
    world.lead()
    for _ in range(REBALANCE_MS // 500):
        assert "a" in world.group.members
        assert world.heartbeat(a, lets_go=False)
        world.pass_time(500)
    assert "a" not in world.group.members


# -- answers -------------------------------------------------------------------------------------------------


def test_an_answer_repeats_nothing_that_the_member_knows() -> None:
    world = World(t=1)
    a = world.join("a", "t")
    decision = world.decide(a.request())
    assert decision.commands == ()
    assert not decision.news
    assert decision.answer == GroupHeartbeatResponse(1, 1, None, SESSION_MS // 3)


def test_who_waits_for_a_partition_asks_more_often() -> None:
    world = World(t=2)
    a = world.join("a", "t")
    decision = world.decide(Consumer("b", ("t",)).request())
    assert decision.answer.heartbeat_ms == RECONCILE_INTERVAL_MS < SESSION_MS // 3
    assert decision.answer.assigned == {}
    decision = world.decide(a.request())
    assert decision.answer.heartbeat_ms == SESSION_MS // 3, "letting go is up to a, which says when it has"


def test_settled_tells_which_parked_heartbeats_to_decide_again() -> None:
    world = World(t=2)
    a = world.join("a", "t")

    def settled(name: str) -> bool:
        return world.coordinator.settled(world.staged, GROUP, name)

    assert settled("a")
    assert not settled("b"), "it is out, and has to hear that"
    b = world.join("b", "t")
    assert not settled("a")
    assert not settled("b")
    world.settle(a, b)
    assert settled("a")
    assert settled("b")


def test_heartbeats_survive_the_wire() -> None:
    world = World(t=2, u=1)
    request = Consumer("a", ("t", "u")).request()
    cls = REQUESTS[request.api]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=cls) == request
    answer = world.decide(request).answer
    assert answer.assigned == {T: (0, 1), U: (0,)}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=cls.response) == answer


BAD = {
    "no group": {"group_id": ""},
    "group id too long": {"group_id": "g" * 250},
    "no member": {"member_id": ""},
    "no session": {"session_timeout_ms": 0},
    "endless session": {"session_timeout_ms": 10**9},
    "no time to let go": {"rebalance_timeout_ms": 0},
    "unknown assignor": {"assignor": "best"},
    "topics out of order": {"topics": ("u", "t")},
    "topic twice": {"topics": ("t", "t")},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_bad_values_are_refused_and_the_next_request_succeeds(change: dict[str, object]) -> None:
    world = World(t=1)
    a = Consumer("a", ("t",))
    with pytest.raises(ConfigError):
        world.decide(msgspec.structs.replace(a.request(), **change))
    assert world.staged.groups == {}
    assert world.heartbeat(a)


def test_a_group_takes_a_limited_number_of_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "MEMBERS_MAX", 2)
    world = World(t=1)
    a = world.join("a", "t")
    world.join("b", "t")
    with pytest.raises(ConfigError):
        world.decide(Consumer("c", ("t",)).request())
    assert world.heartbeat(a)


# -- administration ------------------------------------------------------------------------------------------


def test_delete_is_for_groups_without_members() -> None:
    world = World(t=1)
    request = DeleteGroupRequest(b"", 0, GROUP)
    with pytest.raises(UnknownGroup):
        world.coordinator.delete(world.staged, request)
    a = world.join("a", "t")
    with pytest.raises(GroupNotEmpty):
        world.coordinator.delete(world.staged, request)
    world.leave(a)
    assert world.coordinator.delete(world.staged, request).commands == (DeleteGroup(GROUP),)


def test_describe_shows_members_offsets_and_how_it_stands() -> None:
    world = World(t=2)
    a, b = world.join("a", "t"), world.join("b", "t")
    world.log(PutOffsets("other", (NewOffset(T, 0, 5),)))
    listing = world.coordinator.describe(world.staged, DescribeGroupsRequest(b"", 0)).groups
    assert [(row.group_id, row.state, len(row.members)) for row in listing] == [
        (GROUP, "reconciling", 2),
        ("other", "empty", 0),
    ]
    request = DescribeGroupsRequest(b"", 0, [GROUP, "unknown"])
    (row,) = world.coordinator.describe(world.staged, request).groups
    assert [(each.member_id, each.state, each.assigned, each.target) for each in row.members] == [
        ("a", "stable", parts(0, 1), parts(0)),
        ("b", "unreleased", {}, parts(1)),
    ]
    world.settle(a, b)
    (row,) = world.coordinator.describe(world.staged, request).groups
    assert (row.state, row.assignor, row.epoch) == ("stable", "uniform", 2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(row), type=type(row)) == row


def test_a_request_has_the_number_of_the_catalogue() -> None:
    assert REQUESTS[40] is GroupHeartbeatRequest
