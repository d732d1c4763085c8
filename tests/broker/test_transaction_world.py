"""Transactions under delayed, doubled and reordered messages, and leaders that come and go: one outcome for
each, everywhere, and readers see what was committed."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from transaction_world import Producer, ReplicatedGroup, World

from raftlog.state.partition import PartitionState
from raftlog.state.transactions import TransactionsState

IDS = ("x", "x", "y")
"""Two producers that take the same id from each other, and one on its own."""


class Walk:
    """A world, its producers, and everything that may happen in it, each as a method that takes numbers to
    choose by."""

    def __init__(self) -> None:
        self.world = World()
        self.born = 0
        self.producers = [self._new(name) for name in IDS]

    def _new(self, transactional_id: str) -> Producer:
        self.born += 1
        return Producer(self.world, f"producer {self.born}", transactional_id)

    def act(self, which: int, what: int, partition: int) -> None:
        """A producer takes its next step, or asks again."""
        which %= len(self.producers)
        producer = self.producers[which]
        if producer.fenced:
            self.producers[which] = self._new(producer.transactional_id)
        elif producer.pending is not None:
            # an Init that comes twice fences its own producer: not too often
            if what == 0 and (producer.pending.what != "init" or partition % 4 == 0):
                producer.again(leader=partition % 3)
        elif producer.identity is None:
            producer.init()
        elif producer.failed:
            producer.init(recover=True) if what % 8 == 7 else producer.end(commit=False)
        elif what % 8 < 2 or not producer.enlisted:
            producer.enlist(partition % 3)
        elif what % 8 < 5:
            producer.produce(sorted(producer.enlisted)[partition % len(producer.enlisted)])
        elif what % 8 == 7 and partition % 4 == 0:
            producer.init(recover=True)
        else:
            producer.end(commit=what % 8 < 7, again=partition % 8 > 0)

    def reopen(self, which: int) -> None:
        """A producer dies, and its successor opens the id."""
        which %= len(self.producers)
        self.producers[which] = self._new(self.producers[which].transactional_id)

    def deliver(self, which: int, keep: bool) -> None:
        """A message arrives; with ``keep`` it will arrive again."""
        if self.world.messages:
            which %= len(self.world.messages)
            deliver = self.world.messages[which]
            if not keep:
                del self.world.messages[which]
            deliver()

    def group(self, which: int) -> ReplicatedGroup[Any]:
        groups: list[ReplicatedGroup[Any]] = [self.world.coordination, *self.world.partitions]
        return groups[which % 4]

    def commit(self, which: int) -> None:
        self.group(which).commit()

    def elect(self, which: int, kept: int) -> None:
        """A leader is replaced around a durable write; the old one goes on without knowing."""
        group = self.group(which)
        group.elect(kept % (len(group.leader.uncommitted) + 1))

    def restart(self, which: int) -> None:
        group = self.group(which)
        kind: Any = TransactionsState if which % 4 == 0 else PartitionState
        group.restart(kind.restore(group.machine.snapshot()))

    def send_markers(self, leader: int) -> None:
        leaders = self.world.coordination.leaders()
        self.world.send_markers(leaders[leader % len(leaders)])

    def pass_time(self, passed_ms: int) -> None:
        self.world.now_ms += passed_ms
        self.world.abort_overdue()


class Machine(RuleBasedStateMachine):
    """Hypothesis chooses what happens."""

    numbers = st.integers(0, 50)

    def __init__(self) -> None:
        super().__init__()
        self.walk = Walk()

    @rule(which=st.integers(0, 2), what=st.integers(0, 7), partition=numbers)
    def act(self, which: int, what: int, partition: int) -> None:
        self.walk.act(which, what, partition)

    @rule(which=st.integers(0, 2))
    def reopen(self, which: int) -> None:
        self.walk.reopen(which)

    @precondition(lambda self: self.walk.world.messages)
    @rule(which=numbers, keep=st.booleans())
    def deliver(self, which: int, keep: bool) -> None:
        self.walk.deliver(which, keep)

    @precondition(lambda self: self.walk.world.messages)
    @rule()
    def deliver_all(self) -> None:
        self.walk.world.drain()

    @rule(which=st.integers(0, 3))
    def commit(self, which: int) -> None:
        self.walk.commit(which)

    @rule(which=st.integers(0, 3), kept=st.integers(0, 3))
    def elect(self, which: int, kept: int) -> None:
        self.walk.elect(which, kept)

    @rule(which=st.integers(0, 3))
    def restart(self, which: int) -> None:
        self.walk.restart(which)

    @rule(leader=st.integers(0, 2))
    def send_markers(self, leader: int) -> None:
        self.walk.send_markers(leader)

    @rule(passed_ms=st.sampled_from([10, 600, 2000]))
    def pass_time(self, passed_ms: int) -> None:
        self.walk.pass_time(passed_ms)

    @invariant()
    def holds(self) -> None:
        self.walk.world.check()

    def teardown(self) -> None:
        self.walk.world.settle()
        self.walk.world.check_settled()


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestMachine = Machine.TestCase


@pytest.mark.parametrize("seed", range(12))
def test_long_walks(seed: int) -> None:
    """Thousands of steps that Hypothesis would not take: transactions in dozens, messages that are late by
    several of them."""
    random_ = random.Random(seed)
    walk = Walk()
    for step in range(8000):
        number, chance = random_.randrange(1 << 16), random_.random()
        if chance < 0.25:
            walk.act(number, random_.randrange(8), random_.randrange(100))
        elif chance < 0.6:
            # mostly the newest: what is old stays on its way for long
            newest = len(walk.world.messages) - 1 - int(random_.expovariate(0.3))
            walk.deliver(max(newest, 0), keep=random_.random() < 0.1)
        elif chance < 0.85:
            walk.commit(number)
        elif chance < 0.95:
            walk.send_markers(number if random_.random() < 0.2 else 0)
        elif chance < 0.97:
            walk.elect(number, random_.randrange(4))
        elif chance < 0.975:
            walk.restart(number)
        elif chance < 0.98:
            walk.reopen(number)
        else:
            walk.pass_time(random_.choice([10, 100, 400]))
        if step % 200 == 0:
            walk.world.check()
    walk.world.settle()
    walk.world.check_settled()
    decided = walk.world.decisions()
    assert sum(decided.values()) > 5
    assert len(decided) - sum(decided.values()) > 5
    assert walk.world.begun > 0
