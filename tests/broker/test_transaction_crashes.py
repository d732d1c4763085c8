"""The coordinator or a partition's leader dies around each durable write: what was decided is carried
through, and the producer only has to ask again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from transaction_world import TOPIC, Producer, Request, World

from raftlog.errors import RaftlogError, StaleCoordinator
from raftlog.record.control import Marker
from raftlog.state.transactions import Identity, Phase, TransactionsState

Step = Callable[[], object]


class Story:
    """One producer writes three transactions: commits, aborts, commits. It asks again until it hears."""

    def __init__(self) -> None:
        self.world = World()
        self.producer = Producer(self.world, "producer", "x")
        self.committed: list[Identity] = []
        self.gave_up = 0
        """Transactions that had to be aborted and were begun anew."""

    def steps(self) -> Iterator[Step]:
        producer = self.producer
        yield producer.init
        for commit in (True, False, True):
            done = False
            while not done:
                for step in self._work():
                    if not producer.failed:
                        yield step
                done = not producer.failed
                if done:
                    identity = producer.identity
                    assert identity is not None
                    yield lambda: producer.end(commit)  # noqa: B023
                    done = not producer.failed
                    if done and commit:
                        self.committed.append(identity)
                if producer.failed:
                    self.gave_up += 1
                    yield lambda: producer.end(False)

    def _work(self) -> Iterator[Step]:
        yield lambda: self.producer.enlist(0, 1)
        yield lambda: self.producer.produce(0)
        yield lambda: self.producer.produce(1)
        yield lambda: self.producer.enlist(2)
        yield lambda: self.producer.produce(0)
        yield lambda: self.producer.produce(2)

    def run(self, crash: Callable[[int], int | None]) -> int:
        """To the end; ``crash`` is asked before each durable write of anybody: None, or how many of what the
        leader has not committed survives it. Returns the number of writes."""
        world, writes = self.world, 0
        for step in self.steps():
            step()
            for _ in range(20):
                if self.producer.pending is None:
                    break
                writes = self._round(writes, crash)
                self.producer.again()
            assert self.producer.pending is None, "no answer"
            assert not self.producer.fenced
        for _ in range(4):
            writes = self._round(writes, crash)
        world.settle()
        world.check_settled()
        return writes

    def _round(self, writes: int, crash: Callable[[int], int | None]) -> int:
        """Everything that is under way arrives; each write is committed or crashes its leader."""
        world = self.world
        world.send_markers(world.coordination.leader)
        for _ in range(20):
            pending, world.messages = world.messages, []
            for deliver in pending:
                deliver()
            for group in (world.coordination, *world.partitions):
                while group.leader.uncommitted:
                    kept = crash(writes)
                    writes += 1
                    if kept is not None:
                        group.elect(kept)
                    group.commit()
            world.check()
            if not world.messages:
                break
        return writes


def test_the_story_without_a_crash() -> None:
    story = Story()
    writes = story.run(lambda _: None)
    assert writes > 30
    assert story.gave_up == 0
    assert len(story.committed) == 2
    for identity in story.committed:
        assert len(story.world.read(identity)) == 4


@pytest.mark.parametrize("kept", [0, 1], ids=["the write is lost", "the write survives"])
@pytest.mark.parametrize("twice", [False, True], ids=["", "and again at the next write"])
def test_a_crash_at_every_step_converges(kept: int, twice: bool) -> None:
    at = 0
    while True:
        story = Story()
        writes = story.run(lambda number: kept if number in (at, at + twice) else None)  # noqa: B023
        assert story.gave_up == 0, f"asking again is enough (crash at write {at})"
        assert len(story.committed) == 2
        for identity in story.committed:
            assert story.world.decisions()[identity]
            assert len(story.world.read(identity)) == 4, "all of it, once"
        at += 1
        if at >= writes:
            break
    assert at > 30


def test_a_snapshot_at_every_step_converges() -> None:
    """The coordinator comes back from a snapshot of what is committed, with nothing in memory."""
    for at in range(35):
        story = Story()
        coordination = story.world.coordination

        def restart(number: int) -> int | None:
            if number == at:  # noqa: B023
                coordination.restart(TransactionsState.restore(coordination.machine.snapshot()))  # noqa: B023
            return None

        story.run(restart)
        assert len(story.committed) == 2


def two_partitions_prepared() -> tuple[World, Producer]:
    """A transaction over partitions 0 and 1 whose commit is decided, and no marker sent."""
    world = World()
    producer = Producer(world, "producer", "x")
    for step in (
        producer.init,
        lambda: producer.enlist(0, 1),
        lambda: producer.produce(0),
        lambda: producer.produce(1),
        lambda: producer.end(True),
    ):
        step()
        world.drain()
    assert world.coordination.machine.transaction("x").phase is Phase.PREPARE_COMMIT
    return world, producer


def test_partial_markers_are_completed_by_the_next_coordinator() -> None:
    world, producer = two_partitions_prepared()
    world.send_markers(world.coordination.leader)
    world.messages = world.messages[:1]  # the other is lost with the coordinator
    world.drain()
    assert sorted(len(each.machine.open) for each in world.partitions) == [0, 0, 1]
    world.coordination.elect(0)
    producer.enlist(0)
    world.drain()
    assert producer.pending is not None, "the next transaction waits"
    world.settle()
    assert [len(each.machine.open) for each in world.partitions] == [0, 0, 0]
    assert world.coordination.machine.transaction("x").phase is Phase.COMPLETE_COMMIT
    producer.again()
    world.drain()
    assert producer.enlisted == {0}


def test_a_stale_coordinators_marker_is_refused_by_a_partition() -> None:
    """Pause the old one, elect, resume."""
    world, producer = two_partitions_prepared()
    world.send_markers(world.coordination.leader)
    paused, world.messages = world.messages, []
    world.coordination.elect(0)
    world.settle()
    assert world.coordination.machine.transaction("x").phase is Phase.COMPLETE_COMMIT
    producer.enlist(0, 1)
    world.drain()
    producer.produce(0)
    world.drain()
    answers: list[RaftlogError | None] = []
    assert producer.identity is not None
    for epoch in range(3):
        marker = Marker(producer.identity.producer_id, epoch, 1, epoch != 0)
        world.send(Request("marker", (marker,), 0, lambda _, error: answers.append(error)))
    world.messages += paused
    world.drain()
    assert [type(error) for error in answers] == [StaleCoordinator] * 3
    assert world.partitions[0].machine.open[producer.identity.producer_id].epoch == 1
    world.check()


def test_late_appends_and_ends_touch_no_other_transaction() -> None:
    """Every message of a transaction comes again, in every later state, across two transactions."""
    world = World()
    producer = Producer(world, "producer", "x")
    sent: list[Request] = []
    steps: list[Step] = [producer.init]
    for commit in (True, False, True):
        steps += [
            lambda: producer.enlist(0, 1),
            lambda: producer.produce(0),
            lambda: producer.produce(1),
            lambda: producer.produce(0),
            lambda commit=commit: producer.end(commit),  # type: ignore[misc]
        ]
    for step in steps:
        step()
        assert producer.pending is not None
        if producer.pending.what != "init":  # that one fences its own producer
            sent.append(producer.pending)
        world.drain()
        for _ in range(4):
            producer.again()
            world.drain()
            world.send_markers(world.coordination.leader)
            world.drain()
        for request in reversed(sent):
            before = [each.machine.next_offset for each in world.partitions]
            world.send(Request(request.what, request.fields, request.to, lambda *_: None))
            world.drain()
            assert [each.machine.next_offset for each in world.partitions] == before
        world.check()
    world.settle()
    world.check_settled()
    assert sorted(world.decisions().values()) == [False, True, True]


def test_a_hanging_transaction_is_visible_and_can_be_aborted_by_an_operator() -> None:
    """Orphan it, list it, abort it: the last stable offset moves."""
    world, producer = two_partitions_prepared()
    world.settle()
    assert producer.identity is not None
    # a producer that never enlisted what it writes to
    producer.enlisted.add(2)
    producer.produce(2)
    world.drain()
    producer.end(False)
    world.drain()
    partition = world.partitions[2]
    assert partition.machine.last_stable_offset == 0
    ((producer_id, hanging),) = partition.machine.open_transactions()
    coordinator, state = world.coordinator(world.coordination.leader), world.coordination.leader.staged
    identity = Identity(producer_id, hanging.epoch)
    marker = coordinator.abort_hanging(state, "x", identity, (TOPIC, 2))
    world.send(Request("marker", (marker,), 2, lambda *_: None))
    world.drain()
    assert partition.machine.open_transactions() == []
    assert partition.machine.last_stable_offset == partition.machine.next_offset == 2
    assert partition.machine.aborted_in(0, 2) == [(producer_id, 0, 1)]
