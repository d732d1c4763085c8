"""A commit that begins the next transaction: what the coordinator decides, and what becomes of it when its
answer is lost, the next one is not wanted, or somebody is in the way."""

from __future__ import annotations

from typing import Any

import pytest
from broker_kit import batch
from coordinated import P0, P1, P2, Coordinated
from coordination_kit import GROUP, CoordinatedWorld, restart
from msgspec.structs import replace
from transaction_world import TOPIC

from raftlog.broker.markers import Markers
from raftlog.broker.transactions import EPOCH_MAX, Enlisted, NeedsProducerId
from raftlog.errors import ConcurrentTransactions, InvalidTransaction, ProducerFenced, TransactionTimedOut
from raftlog.net.rpc import (
    CommittedBefore,
    GroupOffset,
    ProducePartition,
    ProduceRequest,
    StageOffsetsRequest,
)
from raftlog.net.rpc_transactions import ProducerIdentity
from raftlog.record.control import Marker
from raftlog.state.transactions import Cause, Identity, Phase, PutTransaction, TransactionsState

AGAIN = Enlisted((P0, P1), ("g",))


@pytest.fixture
def at() -> Coordinated:
    return Coordinated()


def commit(
    at: Coordinated, identity: Identity, again: Enlisted | None = AGAIN, settled: bool = False
) -> Identity:
    decision = at.coordinator.end(
        at.state, at.now_ms, "x", identity, True, settled=settled, again=again, topics_version=7
    )
    following = at.carry_out(decision)
    assert following is not None
    return following


def in_a_row(at: Coordinated) -> tuple[Identity, Identity]:
    """One that has committed, and the next, which has begun with that."""
    first = at.init()
    at.enlist(first, P0, P2)
    at.now_ms += 100
    return first, commit(at, first)


# -- decisions -----------------------------------------------------------------------------------------------


def test_one_command_commits_and_begins(at: Coordinated) -> None:
    first, second = in_a_row(at)
    transaction = at.transaction
    assert (second, transaction.phase) == (Identity(7, 1), Phase.ONGOING)
    assert (transaction.partitions, transaction.groups) == AGAIN
    assert (transaction.start_ms, transaction.topics_version) == (at.now_ms, 7)
    assert transaction.ended is not None
    assert (transaction.ended.identity, transaction.ended.commit) == (first, True)
    assert transaction.ended.partitions == (P0, P2), "also who gets nothing of the next one has to be told"
    assert at.coordinator.marker(transaction) == Marker(*first, 1, True)
    assert at.state.ending() == [transaction], "a later leader tells them, too"


def test_more_is_enlisted_while_others_have_yet_to_be_told(at: Coordinated) -> None:
    _, second = in_a_row(at)
    at.enlist(second, P2)
    assert at.transaction.partitions == (P0, P1, P2)
    at.complete()
    assert at.transaction.partitions == (P0, P1, P2), "what is enlisted is not what was told"
    assert at.transaction.phase is Phase.ONGOING
    assert at.state.ending() == []


@pytest.mark.parametrize("by", ["commit", "abort", "init", "timeout", "operator"])
def test_the_next_one_cannot_end_before_all_have_been_told(at: Coordinated, by: str) -> None:
    _, second = in_a_row(at)
    before = at.transaction

    def end() -> None:
        if by == "init":
            at.init()
        elif by in ("timeout", "operator"):
            at.abort(Cause[by.upper()])
        else:
            at.end(second, by == "commit")

    with pytest.raises(ConcurrentTransactions):
        end()
    assert at.transaction == before
    at.complete()
    if by == "init":
        with pytest.raises(ConcurrentTransactions):
            end()
    else:
        end()
    assert at.transaction.phase is (Phase.PREPARE_COMMIT if by == "commit" else Phase.PREPARE_ABORT)


def test_where_all_have_been_told_the_next_end_needs_no_command_before_it(at: Coordinated) -> None:
    first, second = in_a_row(at)
    third = commit(at, second, settled=True)
    assert third == Identity(7, 2)
    assert at.transaction.ended is not None
    assert at.transaction.ended.identity == second
    assert at.transaction.before is not None
    assert (at.transaction.before.identity, at.transaction.before.is_complete) == (first, True)


def test_told_or_not_a_transaction_that_has_not_begun_cannot_be_skipped(at: Coordinated) -> None:
    first = at.init()
    at.enlist(first, P0)
    second = at.end(first, commit=True)
    with pytest.raises(ConcurrentTransactions):
        at.carry_out(at.coordinator.end(at.state, at.now_ms, "x", second, False, settled=True))


def test_a_lost_answer_is_given_again_until_two_more_have_ended(at: Coordinated) -> None:
    first, second = in_a_row(at)
    decision = at.coordinator.end(at.state, at.now_ms, "x", first, True)
    assert (decision.command, decision.answer, decision.begun) == (None, second, True)
    with pytest.raises(InvalidTransaction):
        at.end(first, commit=False)
    at.complete()
    at.now_ms += 60_000
    at.abort(Cause.TIMEOUT)  # nobody has heard of it
    for _ in range(2):
        decision = at.coordinator.end(at.state, at.now_ms, "x", first, True)
        assert (decision.command, decision.answer, decision.begun) == (None, Identity(7, 2), False)
        if at.transaction.is_ending:
            at.complete()
    with pytest.raises(TransactionTimedOut):
        at.end(second, commit=True)


def test_a_lost_answer_is_of_no_use_to_who_is_fenced(at: Coordinated) -> None:
    first, second = in_a_row(at)
    at.complete()
    with pytest.raises(ConcurrentTransactions):
        at.init()
    for identity in (first, second):
        with pytest.raises(ProducerFenced):
            at.end(identity, commit=True)
    at.complete()
    at.init()
    with pytest.raises(ProducerFenced):
        at.end(first, commit=True)


def test_what_ends_a_producer_id_begins_nothing(at: Coordinated) -> None:
    first = at.init()
    at.put(PutTransaction(replace(at.transaction, identity=Identity(7, EPOCH_MAX))))
    last = Identity(first.producer_id, EPOCH_MAX)
    at.enlist(last, P0)
    with pytest.raises(NeedsProducerId):
        commit(at, last)
    decision = at.coordinator.end(at.state, at.now_ms, "x", last, True, 99, again=AGAIN)
    assert (decision.answer, decision.begun) == (Identity(99, 0), False)


def test_only_a_commit_begins_another(at: Coordinated) -> None:
    first = at.init()
    at.enlist(first, P0)
    decision = at.coordinator.end(at.state, at.now_ms, "x", first, False, again=AGAIN)
    at.carry_out(decision)
    assert (decision.begun, at.transaction.phase) == (False, Phase.PREPARE_ABORT)


def test_a_later_leader_has_both(at: Coordinated) -> None:
    _, second = in_a_row(at)
    kept = at.transaction
    at.move(term=4)
    assert TransactionsState.restore(at.state.snapshot()) == at.state
    assert at.transaction == kept
    assert at.coordinator.marker(at.transaction) == Marker(7, 0, 4, True)
    assert commit(at, second, settled=True) == Identity(7, 2)
    assert at.transaction.partitions[0] == (TOPIC, 0)


# -- brokers -------------------------------------------------------------------------------------------------


def end(
    world: CoordinatedWorld,
    who: ProducerIdentity,
    written: tuple[int, ...] = (0,),
    groups: tuple[str, ...] = (),
    again: bool = True,
) -> ProducerIdentity:
    request = replace(
        world.end_request(who),
        partitions=[(world.topic_id, each) for each in written],
        groups=groups,
        again=again,
    )
    answer: ProducerIdentity = world.seek((request.topic_id, request.partition), request)[0]
    return answer


def first_of(world: CoordinatedWorld) -> ProducerIdentity:
    """A transaction that has written to partition 0, ready to end."""
    me = world.init()
    world.enlist(me)
    world.write(me, b"a")
    return me


def write(
    world: CoordinatedWorld,
    who: ProducerIdentity,
    value: bytes,
    before: CommittedBefore | None,
    sequence: int = 0,
) -> None:
    """Produce to partition 0."""
    encoded = batch(value, producer=who.producer_id, epoch=who.epoch, sequence=sequence, transactional=True)
    world.seek((world.topic_id, 0), ProduceRequest([ProducePartition(world.topic_id, 0, before)]), (encoded,))


def word(ended: ProducerIdentity, following: ProducerIdentity) -> CommittedBefore:
    return CommittedBefore(ended.epoch, following.coordinator_epoch)


def test_records_bring_the_marker_along() -> None:
    with CoordinatedWorld(partitions=2) as world:
        first = first_of(world)
        second = end(world, first)
        assert second.begun
        write(world, second, b"b", word(first, second))
        assert world.read() == [b"a"], "seen at once: nobody had to wait for a marker to be sent"
        third = end(world, second)
        write(world, third, b"c", word(second, third))
        world.end(third, commit=False)
        world.until_state("complete_abort")
        assert world.read() == [b"a", b"b"]


def test_records_without_the_word_are_refused_while_the_one_before_is_open() -> None:
    with CoordinatedWorld(partitions=2) as world:
        first = first_of(world)
        second = end(world, first)
        with pytest.raises(InvalidTransaction):
            write(world, second, b"b", None)
        with pytest.raises(InvalidTransaction):
            write(world, second, b"b", CommittedBefore(first.epoch + 1, second.coordinator_epoch))


def test_where_nobody_brings_the_word_the_coordinator_sends_it() -> None:
    with CoordinatedWorld(partitions=2) as world:
        first = first_of(world)
        end(world, first)
        world.until_true(lambda: world.read() == [b"a"])
        assert world.transaction().state == "ongoing"


def test_what_is_not_written_to_again_is_told_before_the_next_end() -> None:
    with CoordinatedWorld(partitions=2) as world:
        first = world.init()
        world.enlist(first, (0, 1))
        world.write(first, b"a", partition=0)
        world.write(first, b"b", partition=1)
        second = end(world, first, (0, 1))
        write(world, second, b"c", word(first, second))
        third = end(world, second, (0,), again=False)
        assert not third.begun
        world.until_state("complete_commit")
        assert world.read() == [b"a", b"c"]
        assert world.read(partition=1) == [b"b"]


def test_a_late_end_does_not_speak_for_the_next_transaction() -> None:
    """The double of a commit names what that one wrote to, which says nothing about its own markers."""
    with CoordinatedWorld(partitions=2) as world:
        first = world.init()
        world.enlist(first, (0, 1))
        world.write(first, b"a", partition=0)
        world.write(first, b"b", partition=1)
        second = end(world, first, (0, 1))
        assert end(world, first, (0, 1)).epoch == second.epoch
        write(world, second, b"c", word(first, second))
        end(world, second, (0,), again=False)
        world.until_state("complete_commit")
        assert world.read(partition=1) == [b"b"], "partition 1 was told of the first"


def test_offsets_bring_the_marker_along() -> None:
    with CoordinatedWorld() as world:
        first = world.init()
        world.enlist(first, (), [GROUP])
        world.stage(first, 5)
        second = end(world, first, (), (GROUP,))
        assert second.begun
        request = StageOffsetsRequest(
            *world.group_place,
            GROUP,
            "",
            -1,
            second.producer_id,
            second.epoch,
            [GroupOffset(world.topic_id, 0, 9)],
            word(first, second),
        )
        world.seek(world.group_place, request)
        end(world, second, (), (GROUP,), again=False)
        world.until_state("complete_commit")
        assert world.offsets() == {0: 9}


@pytest.mark.parametrize("told", [False, True])
def test_the_next_coordinator_goes_on(told: bool) -> None:
    with CoordinatedWorld(partitions=2) as world:
        first = first_of(world)
        second = end(world, first)
        if told:
            write(world, second, b"b", word(first, second))
        victim = world.leader_at(world.transaction_place)
        world.cluster.kill_broker(victim)
        restart(world, victim)
        if not told:
            write(world, second, b"b", word(first, second))
        third = end(world, second)
        assert third.begun
        world.end(third, commit=False)
        world.until_state("complete_abort")
        assert world.read() == [b"a", b"b"]


def test_a_transaction_that_is_overdue_and_commits_does_not_time_out_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It cannot be aborted at once: the end of the one before has not reached a partition, as far as the
    coordinator knows. While that waits the producer, which has told the partition, commits and goes on."""
    original = Markers.send
    held: list[Any] | None = []

    def send(*errand: Any) -> None:
        if held is None:
            original(*errand)
        else:
            held.append(errand)

    with CoordinatedWorld(partitions=2) as world:
        first = world.init(timeout_ms=15_000)
        world.enlist(first)
        world.write(first, b"a")
        replica = world.transaction_replica(world.leader_at(world.transaction_place))
        monkeypatch.setattr(Markers, "send", send)
        second = end(world, first)
        write(world, second, b"b", word(first, second))
        world.until(lambda: bool(replica._waiting), 40.0)  # it is overdue
        third = end(world, second)
        assert third.begun
        write(world, third, b"c", word(second, third))

        async def release() -> None:
            nonlocal held
            late, held = held, None
            for errand in late or ():
                original(*errand)

        world.cluster.run(release(), node="admin")
        world.pass_time(1.0)
        assert world.transaction().state == "ongoing", "it has only just begun"
        world.end(third)
