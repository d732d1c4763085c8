"""The transaction coordinator's decisions along a transaction's way; what it answers in every state is in
test_transaction_table."""

from __future__ import annotations

import pytest
from coordinated import P0, P1, P2, Coordinated

from raftlog.broker.transactions import (
    EPOCH_MAX,
    TRANSACTION_TIMEOUT_MS_MAX,
    NeedsProducerId,
    has_landed,
)
from raftlog.errors import (
    ConcurrentTransactions,
    ConfigError,
    ConnectionLost,
    InvalidTransaction,
    NotLeader,
    ProducerFenced,
    RaftlogError,
    StaleCoordinator,
    TransactionAborted,
    TransactionTimedOut,
    UnknownTransactionalId,
)
from raftlog.record.control import Marker
from raftlog.state.transactions import (
    Cause,
    Identity,
    Phase,
    PutTransaction,
    TransactionsState,
)

DAY_MS = 24 * 3_600_000


@pytest.fixture
def at() -> Coordinated:
    return Coordinated()


# -- a transaction's way -------------------------------------------------------------------------------------


def test_a_transaction_from_init_to_the_next_one(at: Coordinated) -> None:
    first = at.init()
    assert first == Identity(7, 0)
    at.enlist(first, P0, P1)
    at.now_ms += 100
    at.enlist(first, P1, P2, groups=("g",))
    assert at.transaction.partitions == (P0, P1, P2)
    assert at.transaction.groups == ("g",)
    assert at.transaction.start_ms == at.now_ms - 100
    before = at.transaction
    at.enlist(first, P0, groups=("g",))
    assert at.transaction == before, "what is enlisted is not written again"
    second = at.end(first, commit=True)
    assert second == Identity(7, 1)
    assert at.coordinator.marker(at.transaction) == Marker(7, 0, 1, True)
    assert at.transaction.ended is not None
    assert at.transaction.ended.partitions == (P0, P1, P2), "markers are due there"
    at.complete()
    assert (at.transaction.partitions, at.transaction.groups) == ((), ())
    at.now_ms += 100
    at.enlist(second, P1)
    assert (at.transaction.partitions, at.transaction.start_ms) == ((P1,), at.now_ms)
    assert at.end(second, commit=False) == Identity(7, 2)
    assert at.coordinator.marker(at.transaction) == Marker(7, 1, 1, False)


def test_mistake_12_enlistment_only_in_memory(at: Coordinated) -> None:
    """The coordinator dies between enlisting and the end: the next one sends markers to every partition."""
    identity = at.init()
    at.enlist(identity, P0, groups=("g",))
    at.move(term=2)
    at.enlist(identity, P1)
    at.move(term=3)
    at.end(identity, commit=True)
    at.move(term=4)
    (ending,) = at.state.ending()
    assert ending.ended is not None
    assert (ending.ended.partitions, ending.ended.groups) == ((P0, P1), ("g",))
    assert at.coordinator.marker(ending) == Marker(7, 0, 4, True)


def test_mistake_14_a_delayed_end_hits_the_next_transaction(at: Coordinated) -> None:
    first = at.init()
    at.enlist(first, P0)
    second = at.end(first, commit=True)
    at.complete()
    at.enlist(second, P1)
    before = at.transaction
    assert at.end(first, commit=True) == second, "a double of the end that was carried out"
    with pytest.raises(InvalidTransaction):
        at.end(first, commit=False)
    assert at.transaction == before
    third = at.end(second, commit=True)
    at.complete()
    at.enlist(third, P1)
    assert at.end(first, commit=True) == third, "the second may have begun with it, and its answer be lost"
    fourth = at.end(third, commit=True)
    at.complete()
    at.enlist(fourth, P1)
    before = at.transaction
    for commit in (True, False):
        with pytest.raises(ProducerFenced):
            at.end(first, commit)
    assert at.transaction == before


@pytest.mark.parametrize("commit", [True, False])
def test_mistake_15_finished_transactions_forgotten_so_that_the_retry_of_an_end_fails(
    at: Coordinated, commit: bool
) -> None:
    identity = at.init()
    at.enlist(identity, P0)
    following = at.end(identity, commit)
    for term in (2, 3):
        assert at.end(identity, commit) == following
        at.move(term)
        assert at.end(identity, commit) == following
        if at.transaction.phase.is_ending:
            at.complete()
    at.now_ms += 6 * DAY_MS
    assert at.coordinator.expired(at.state, at.now_ms) == []
    assert at.end(identity, commit) == following


def test_an_end_where_nothing_began_makes_sure_that_nothing_will(at: Coordinated) -> None:
    """Its enlistment may be on its way still. To commit nothing, on the other hand, is a mistake: something
    was enlisted, as the producer believes, and it is not there."""
    identity = at.init()
    with pytest.raises(InvalidTransaction):
        at.end(identity, commit=True)
    following = at.end(identity, commit=False)
    assert at.transaction.phase is Phase.COMPLETE_ABORT
    with pytest.raises(InvalidTransaction):
        at.enlist(identity, P0)
    assert at.end(identity, commit=False) == following
    at.enlist(following, P0)


# -- time ----------------------------------------------------------------------------------------------------


def test_a_transaction_is_overdue_after_its_timeout_and_no_earlier(at: Coordinated) -> None:
    identity = at.init(timeout_ms=1000)
    at.now_ms += 5000
    assert at.coordinator.overdue(at.state, at.now_ms) == [], "nothing is open"
    at.enlist(identity, P0)
    at.now_ms += 600
    at.enlist(identity, P1)
    assert at.coordinator.overdue(at.state, at.now_ms + 399) == []
    assert at.coordinator.overdue(at.state, at.now_ms + 400) == ["x"], "counted from its begin"
    at.abort(Cause.TIMEOUT)
    assert at.coordinator.overdue(at.state, at.now_ms + 4000) == []


def test_a_new_leader_gives_the_whole_timeout_again(at: Coordinated) -> None:
    """Its clock may be an hour ahead of the old one's."""
    identity = at.init(timeout_ms=1000)
    at.enlist(identity, P0)
    at.now_ms += 3_600_000
    at.move(term=2)
    assert at.coordinator.overdue(at.state, at.now_ms + 999) == []
    assert at.coordinator.overdue(at.state, at.now_ms + 1000) == ["x"]


def test_timeout_before_commit_gives_an_abort_and_a_recoverable_error(at: Coordinated) -> None:
    identity = at.init()
    at.enlist(identity, P0)
    at.abort(Cause.TIMEOUT)
    for _ in range(2):
        with pytest.raises(TransactionTimedOut) as caught:
            at.end(identity, commit=True)
        assert caught.value.abortable
        assert not caught.value.fatal
        with pytest.raises(TransactionTimedOut):
            at.enlist(identity, P1)
        if at.transaction.phase.is_ending:
            at.complete()
    following = at.end(identity, commit=False)
    at.enlist(following, P0)
    assert at.end(following, commit=True).epoch == following.epoch + 1


def test_commit_before_timeout_gives_a_commit(at: Coordinated) -> None:
    identity = at.init()
    at.enlist(identity, P0)
    following = at.end(identity, commit=True)
    with pytest.raises(ConcurrentTransactions):
        at.abort(Cause.TIMEOUT)
    at.complete()
    before = at.transaction
    at.abort(Cause.TIMEOUT)
    assert at.transaction == before
    assert at.end(identity, commit=True) == following


def test_ids_that_nobody_uses_expire_and_open_transactions_do_not(at: Coordinated) -> None:
    identity = at.init()
    at.enlist(identity, P0)
    at.now_ms += 8 * DAY_MS
    assert at.coordinator.expired(at.state, at.now_ms) == []
    following = at.end(identity, commit=True)
    at.now_ms += 8 * DAY_MS
    assert at.coordinator.expired(at.state, at.now_ms) == []
    at.complete()
    assert at.coordinator.expired(at.state, at.now_ms + 7 * DAY_MS - 1) == []
    (command,) = at.coordinator.expired(at.state, at.now_ms + 7 * DAY_MS)
    at.put(command)
    with pytest.raises(UnknownTransactionalId):
        at.enlist(following, P0)
    with pytest.raises(UnknownTransactionalId):
        at.init(holder=following)
    assert at.init() == Identity(8, 0), "another producer id"


# -- identities ----------------------------------------------------------------------------------------------


def at_the_last_epoch(at: Coordinated) -> Identity:
    at.init()
    last = Identity(7, EPOCH_MAX)
    moved = at.coordinator._changed(at.transaction, at.now_ms, identity=last)
    at.put(PutTransaction(moved))
    at.enlist(last, P0)
    return last


def test_after_the_last_epoch_comes_another_producer_id(at: Coordinated) -> None:
    last = at_the_last_epoch(at)
    with pytest.raises(NeedsProducerId):
        at.coordinator.end(at.state, at.now_ms, "x", last, True)
    following = at.end(last, commit=True)
    assert following == Identity(8, 0)
    assert at.coordinator.marker(at.transaction) == Marker(7, EPOCH_MAX, 1, True)
    at.complete()
    assert at.end(last, commit=True) == following
    at.enlist(following, P0)
    with pytest.raises(ProducerFenced):
        at.enlist(Identity(7, EPOCH_MAX - 1), P0)


def test_a_fence_above_the_last_epoch_still_fits_an_int16(at: Coordinated) -> None:
    last = at_the_last_epoch(at)
    with pytest.raises(ConcurrentTransactions):
        at.init()
    assert at.transaction.identity == Identity(7, 2**15 - 1)
    assert at.coordinator.marker(at.transaction) == Marker(*last, 1, False)
    at.complete()
    assert at.init() == Identity(8, 0)


def test_a_producer_that_recovers_is_not_let_in_after_its_successor(at: Coordinated) -> None:
    first = at.init()
    at.enlist(first, P0)
    with pytest.raises(ConcurrentTransactions):
        at.init(holder=first)
    with pytest.raises(ConcurrentTransactions):
        at.init(holder=first)
    at.complete()
    second = at.init(holder=first)
    assert second == Identity(7, 2)
    third = at.init(holder=first)
    assert third == Identity(7, 3), "the answer was lost"
    with pytest.raises(ProducerFenced):
        at.enlist(second, P0)
    successor = at.init()
    for late in (first, second, third):
        with pytest.raises(ProducerFenced):
            at.init(holder=late)
    at.enlist(successor, P0)


def test_settings_are_checked_before_anything_else(at: Coordinated) -> None:
    for timeout_ms in (0, -1, TRANSACTION_TIMEOUT_MS_MAX + 1):
        with pytest.raises(ConfigError, match="timeout"):
            at.init(timeout_ms=timeout_ms)
    for name in ("", "n" * 250):
        with pytest.raises(ConfigError, match="249"):
            at.coordinator.init(at.state, at.now_ms, name, 1000, None, 1)
    assert at.state == TransactionsState()


# -- operators -----------------------------------------------------------------------------------------------


def test_an_operator_aborts_what_is_open_and_its_producer_goes_on(at: Coordinated) -> None:
    identity = at.init()
    at.enlist(identity, P0)
    at.abort(Cause.OPERATOR)
    assert at.transaction.phase is Phase.PREPARE_ABORT
    with pytest.raises(TransactionAborted) as caught:
        at.end(identity, commit=True)
    assert caught.value.abortable
    with pytest.raises(ConcurrentTransactions):
        at.abort(Cause.OPERATOR)
    at.complete()
    following = at.end(identity, commit=False)
    at.abort(Cause.OPERATOR)
    with pytest.raises(TransactionAborted):
        at.enlist(following, P0)
    at.enlist(at.end(following, commit=False), P0)


def test_a_hanging_transaction_is_aborted_by_an_operator_and_one_in_use_is_not(at: Coordinated) -> None:
    first = at.init()
    hanging = at.coordinator.abort_hanging
    with pytest.raises(InvalidTransaction):
        hanging(at.state, "x", first, P0)  # it may be enlisted at any moment
    at.enlist(first, P0)
    with pytest.raises(InvalidTransaction):
        hanging(at.state, "x", first, P1)
    following = at.end(first, commit=True)
    with pytest.raises(ConcurrentTransactions):
        hanging(at.state, "x", first, P0)  # its commit is on its way
    assert hanging(at.state, "x", first, P1) == Marker(7, 0, 1, False), "nobody will end it there"
    at.complete()
    assert hanging(at.state, "x", first, P0) == Marker(7, 0, 1, False)
    with pytest.raises(InvalidTransaction):
        hanging(at.state, "x", following, P0)
    with pytest.raises(InvalidTransaction, match="name it"):
        hanging(at.state, "", first, P0)
    with pytest.raises(UnknownTransactionalId):
        hanging(at.state, "y", first, P0)
    assert hanging(at.state, "", Identity(99, 3), P0) == Marker(99, 3, 1, False)


def test_what_answers_settle_a_marker() -> None:
    assert has_landed(None)
    for error in (ProducerFenced("later"), InvalidTransaction("the other way")):
        assert has_landed(error)
    for error in (NotLeader("x"), ConnectionLost("x"), StaleCoordinator("x"), RaftlogError("x")):
        assert not has_landed(error)


def test_a_coordinator_that_comes_late_completes_nothing(at: Coordinated) -> None:
    first = at.init()
    at.enlist(first, P0)
    second = at.end(first, commit=True)
    complete = at.coordinator.complete
    assert complete(at.state, at.now_ms, "x", second) is None
    assert complete(at.state, at.now_ms, "y", first) is None
    at.complete()
    assert complete(at.state, at.now_ms, "x", first) is None, "somebody has"
    at.enlist(second, P0)
    assert complete(at.state, at.now_ms, "x", first) is None
    at.end(second, commit=True)
    assert complete(at.state, at.now_ms, "x", first) is None
    assert complete(at.state, at.now_ms, "x", second) is not None
