"""Groups under everything that can happen to them: members that join, leave, stall, crash, subscribe to other
things, lose answers and come back with old epochs; requests that come late and twice; topics that grow; and
leaders that go before what they logged is committed."""

from __future__ import annotations

import random
from typing import Any

import pytest
from group_world import GROUP, SESSION_MS, Consumer, World
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from raftlog.broker import group_offsets
from raftlog.errors import RaftlogError, StaleMember
from raftlog.net.rpc import GroupHeartbeatRequest, GroupHeartbeatResponse, GroupOffset, OffsetCommitRequest
from raftlog.state.groups import GroupsState, keys_of

ROUNDS_MAX = 3
"""Everybody hears what to give up; everybody has given it up; everybody gets what became free."""
CONSUMERS_MAX = 6
LATE_MAX = 30
topics_wanted = st.sets(st.sampled_from("ttuv"), min_size=1).map(sorted).map(tuple)
some = st.integers(0, 59)
promptly = st.sampled_from([False, False, True])


class Groups(RuleBasedStateMachine):
    """Consumers of one group. A consumer that crashed or was told that it is out is replaced by a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(t=3, u=2)
        self.consumers: list[Consumer] = []
        self.crashed: list[Consumer] = []
        self.requests: list[tuple[Consumer, int, GroupHeartbeatRequest]] = []
        """(who, number of the request) of all that were sent: any of them may come, again, at any time."""
        self.answers: list[tuple[int, Consumer, int, GroupHeartbeatResponse]] = []
        """(index that must be committed first, who, number of the request)."""
        self.joined = 0

    @property
    def alive(self) -> list[Consumer]:
        return [consumer for consumer in self.consumers if not consumer.is_out]

    def pick(self, which: int, consumers: list[Consumer]) -> Consumer:
        return consumers[which % len(consumers)]

    # -- members ---------------------------------------------------------------------------------------------

    @initialize(topics=st.lists(topics_wanted, min_size=2, max_size=4))
    def some_are_there(self, topics: list[tuple[str, ...]]) -> None:
        for each in topics:
            self.joins(each)
            self.a_request_comes(0, True, False)
            self.an_answer_comes(0, True)

    @rule(topics=topics_wanted)
    @precondition(lambda self: len(self.alive) < CONSUMERS_MAX)
    def joins(self, topics: tuple[str, ...]) -> None:
        self.joined += 1
        consumer = Consumer(f"m{self.joined}", topics)
        self.consumers.append(consumer)
        self.requests.append((consumer, consumer.asked + 1, consumer.request()))

    @rule(which=some)
    @precondition(lambda self: self.alive)
    def asks(self, which: int) -> None:
        consumer = self.pick(which, self.alive)
        self.requests.append((consumer, consumer.asked + 1, consumer.request()))

    @rule(which=some)
    @precondition(lambda self: self.alive)
    def lets_go(self, which: int) -> None:
        self.pick(which, self.alive).let_go()

    @rule(which=some, topics=topics_wanted)
    @precondition(lambda self: self.alive)
    def subscribes_differently(self, which: int, topics: tuple[str, ...]) -> None:
        self.pick(which, self.alive).topics = topics

    @rule(which=some)
    @precondition(lambda self: len(self.alive) > 1)
    def leaves(self, which: int) -> None:
        consumer = self.pick(which, self.alive)
        consumer.reads.clear()
        consumer.told = None
        consumer.epoch = -1
        self.requests.append((consumer, consumer.asked + 1, consumer.request()))
        self.consumers.remove(consumer)

    @rule(which=some)
    @precondition(lambda self: len(self.alive) > 1)
    def crashes(self, which: int) -> None:
        consumer = self.pick(which, self.alive)
        consumer.reads.clear()
        self.consumers.remove(consumer)
        self.crashed.append(consumer)

    @rule(which=some)
    @precondition(lambda self: self.alive)
    def forgets_and_joins_again_under_its_id(self, which: int) -> None:
        consumer = self.pick(which, self.alive)
        again = Consumer(consumer.member_id, consumer.topics, asked=consumer.asked + 1)
        self.consumers[self.consumers.index(consumer)] = again
        self.requests.append((again, again.asked + 1, again.request()))

    @rule(which=some, lets_go=promptly)
    @precondition(lambda self: self.alive)
    def a_heartbeat_goes_well(self, which: int, lets_go: bool) -> None:
        consumer = self.pick(which, self.alive)
        self.requests.append((consumer, consumer.asked + 1, consumer.request()))
        self.a_request_comes(0, True, False)
        if self.answers and self.answers[-1][1] is consumer:
            self.an_answer_comes(len(self.answers) - 1, lets_go)

    @rule(lets_go=promptly)
    def everybody_heartbeats(self, lets_go: bool) -> None:
        for number, consumer in enumerate(self.consumers):
            if not consumer.is_out:
                self.a_heartbeat_goes_well(self.alive.index(consumer), lets_go or number % 2 == 0)

    # -- the network -----------------------------------------------------------------------------------------

    @rule(which=some, newest=st.booleans(), answer_lost=st.sampled_from([False, False, True]))
    @precondition(lambda self: self.requests)
    def a_request_comes(self, which: int, newest: bool, answer_lost: bool) -> None:
        number = -1 if newest else -1 - which % min(len(self.requests), LATE_MAX)
        consumer, asked, request = self.requests[number]
        try:
            decision = self.world.decide(request)
        except StaleMember:
            if asked == consumer.asked and not answer_lost:
                consumer.fenced()
            return
        if not answer_lost:
            self.answers.append((self.world.staged.applied_index, consumer, asked, decision.answer))

    @rule(which=some, lets_go=promptly)
    @precondition(lambda self: self.answers)
    def an_answer_comes(self, which: int, lets_go: bool) -> None:
        index, consumer, asked, answer = self.answers.pop(which % len(self.answers))
        self.world.commit(max(index, self.world.applied.applied_index))
        if asked == consumer.asked and consumer in self.consumers and not consumer.is_out:
            consumer.answered(answer, lets_go=lets_go)

    # -- the partition ---------------------------------------------------------------------------------------

    @rule(back=st.integers(0, 3))
    def commits(self, back: int) -> None:
        applied = self.world.applied.applied_index
        self.world.commit(max(applied, self.world.staged.applied_index - back))

    @rule(through_snapshot=st.booleans())
    def another_leads(self, through_snapshot: bool) -> None:
        committed = self.world.applied.applied_index
        self.answers = [each for each in self.answers if each[0] <= committed]
        self.world.lead(through_snapshot=through_snapshot)

    @rule(ms=st.integers(1, SESSION_MS // 2))
    def time_passes(self, ms: int) -> None:
        self.world.pass_time(ms)

    @rule(name=st.sampled_from("tuv"), more=st.integers(1, 2))
    def a_topic_grows(self, name: str, more: int) -> None:
        count = self.world.topics.get(name, (b"", 0))[1]
        if count < 6:
            self.world.grow(name, count + more)

    # -- what holds ------------------------------------------------------------------------------------------

    @invariant()
    def nobody_reads_what_another_member_reads(self) -> None:
        group = self.world.applied.groups.get(GROUP)
        members = group.members if group is not None else {}
        readers: dict[Any, str] = {}
        for consumer in self.alive:
            if consumer.member_id in members:
                for key in consumer.reads:
                    other = readers.setdefault(key, consumer.member_id)
                    assert other == consumer.member_id, f"{key} is read by {other} and {consumer.member_id}"

    @invariant()
    def commits_of_who_is_out_and_of_what_is_not_held_are_refused(self) -> None:
        group = self.world.staged.groups.get(GROUP)
        holders = {
            key: name
            for name, member in (group.members if group is not None else {}).items()
            for assignment in (member.assigned, member.revoking)
            for key in keys_of(assignment)
        }
        for consumer in (*self.alive, *self.crashed):
            for key in consumer.reads:
                request = OffsetCommitRequest(
                    b"", 0, GROUP, consumer.member_id, consumer.epoch, [GroupOffset(*key, 1)]
                )
                try:
                    group_offsets.commit(self.world.staged, request)
                except StaleMember:
                    continue
                assert holders.get(key) == consumer.member_id

    def teardown(self) -> None:
        """The network heals, nobody crashes any more: the group comes to rest, and soon."""
        if not self.consumers:
            return
        world = self.world
        world.commit()
        for name in "tuv":
            if name not in world.topics:
                world.grow(name, 2)
        present = {consumer.member_id for consumer in self.alive}
        consumers = self.alive or [Consumer("last", ("t",))]
        for consumer in consumers:
            consumer.let_go()
        # two thirds of a session and once more: who says nothing is gone then
        for _ in range(3):
            consumers = [
                consumer if world.heartbeat(consumer) else self.back_again(consumer) for consumer in consumers
            ]
            world.pass_time(SESSION_MS * 2 // 3)
        assert set(world.group.members) == {consumer.member_id for consumer in consumers}, present
        for consumer in consumers:
            assert world.heartbeat(consumer)
        assert world.settle(*consumers) <= ROUNDS_MAX
        world.check_reading(*consumers)
        replayed = GroupsState()
        for entry in world.entries:
            assert not isinstance(replayed.apply(entry), RaftlogError)
        assert replayed == world.staged == world.applied == GroupsState.restore(world.staged.snapshot())

    def back_again(self, consumer: Consumer) -> Consumer:
        assert consumer.is_out
        self.joined += 1
        return self.world.join(f"m{self.joined}", *consumer.topics)


TestGroups = Groups.TestCase
TestGroups.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


WEIGHTS = {
    "a_heartbeat_goes_well": 30,
    "a_request_comes": 20,
    "asks": 10,
    "an_answer_comes": 20,
    "lets_go": 6,
    "commits": 5,
    "joins": 6,
    "leaves": 2,
    "crashes": 2,
    "subscribes_differently": 3,
    "forgets_and_joins_again_under_its_id": 1,
    "another_leads": 2,
    "time_passes": 3,
    "a_topic_grows": 1,
}


@pytest.mark.parametrize("seed", range(30))
def test_long_histories(seed: int) -> None:
    """The same steps in proportions that keep a group busy, 400 of them."""
    rng = random.Random(seed)
    groups = Groups()

    def wanted() -> tuple[str, ...]:
        return tuple(sorted(rng.sample("tuv", rng.choice([1, 1, 2]))))

    def arguments(name: str) -> tuple[Any, ...] | None:
        """What to call it with; None: not now."""
        which, often, seldom = rng.randrange(60), rng.random() < 0.7, rng.random() < 0.3
        alive = len(groups.alive)
        choices: dict[str, tuple[bool, tuple[Any, ...]]] = {
            "a_heartbeat_goes_well": (alive > 0, (which, seldom)),
            "a_request_comes": (bool(groups.requests), (which, seldom, seldom)),
            "asks": (alive > 0, (which,)),
            "an_answer_comes": (bool(groups.answers), (which, seldom)),
            "lets_go": (alive > 0, (which,)),
            "commits": (True, (which % 4,)),
            "joins": (alive < CONSUMERS_MAX, (wanted(),)),
            "leaves": (alive > 2, (which,)),
            "crashes": (alive > 2, (which,)),
            "subscribes_differently": (alive > 0, (which, wanted())),
            "forgets_and_joins_again_under_its_id": (alive > 0, (which,)),
            "another_leads": (True, (often,)),
            "time_passes": (True, (1 + 5 * which,)),
            "a_topic_grows": (True, (rng.choice("tuv"), 1)),
        }
        is_possible, found = choices[name]
        return found if is_possible else None

    groups.some_are_there([wanted() for _ in range(3)])
    for name in rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=400):
        found = arguments(name)
        if found is not None:
            getattr(groups, name)(*found)
            groups.nobody_reads_what_another_member_reads()
            groups.commits_of_who_is_out_and_of_what_is_not_held_are_refused()
    groups.teardown()


# -- how many rounds, exactly --------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "joining"), [(1, 1), (1, 5), (5, 1), (10, 10)])
def test_rounds_from_join_to_rest(before: int, joining: int) -> None:
    world = World(t=60)
    consumers = [world.join(f"a{number}", "t") for number in range(before)]
    world.settle(*consumers)
    kept = [set(consumer.reads) for consumer in consumers]
    consumers = [world.join(f"b{number}", "t") for number in range(joining)] + consumers
    assert world.settle(*consumers) <= ROUNDS_MAX
    world.check_reading(*consumers)
    for had, consumer in zip(kept, consumers[joining:], strict=True):
        assert consumer.reads <= had, "who was there only gave up some"


def test_50_members_that_all_join_share_500_partitions() -> None:
    names = "abcdefghij"
    world = World(**dict.fromkeys(names, 50))
    consumers = [world.join(f"m{number:02}", *names) for number in range(50)]
    assert world.settle(*consumers) <= ROUNDS_MAX
    world.check_reading(*consumers)
    assert {len(consumer.reads) for consumer in consumers} == {10}
    paused: set[str] = set()
    held = {consumer.member_id: set(consumer.reads) for consumer in consumers}
    late = world.join("late", *names)
    for _ in range(ROUNDS_MAX):
        for consumer in (*consumers, late):
            world.heartbeat(consumer)
            if held.get(consumer.member_id, set()) - consumer.reads:
                paused.add(consumer.member_id)
    assert len(late.reads) == len(paused) == 9, "nine gave one each, the others did not notice"
    world.check_reading(*consumers, late)
