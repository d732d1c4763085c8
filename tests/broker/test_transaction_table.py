"""What a transaction's coordinator answers in every state: to the present identity, to one whose transaction
has ended, and to one that is out of date."""

from __future__ import annotations

import pytest
from coordinated import P0, P1, P2, Coordinated

from raftlog.errors import (
    ConcurrentTransactions,
    InvalidTransaction,
    ProducerFenced,
    RaftlogError,
    TransactionAborted,
    TransactionTimedOut,
)
from raftlog.state.transactions import Cause, Identity, Phase

SCENARIOS: dict[str, str] = {
    "empty": "",
    "ongoing": "enlist",
    "ongoing after a commit": "enlist commit complete enlist",
    "ongoing after an abort": "enlist abort complete enlist",
    "prepare commit": "enlist commit",
    "prepare abort": "enlist abort",
    "prepare abort, timed out": "enlist timeout",
    "prepare abort, by an operator": "enlist operator",
    "prepare abort, fenced": "enlist init",
    "complete commit": "enlist commit complete",
    "complete abort": "enlist abort complete",
    "complete abort, timed out": "enlist timeout complete",
    "complete abort, by an operator": "enlist operator complete",
    "complete abort, fenced": "enlist init complete",
    "complete abort, nothing begun": "abort",
    "empty after a commit": "enlist commit complete init",
    "empty after a fence": "enlist init complete init",
}

MOVES = "moves on"
"""A new decision; answers the next identity."""
AGAIN = "again"
"""The answer that the first try had, and nothing is decided."""
Expected = str | type[RaftlogError]
FENCED = (ProducerFenced, ProducerFenced)

# scenario: (commit, abort) by the present identity; by the transaction's, when it has ended; by an older one
ENDS: dict[str, tuple[tuple[Expected, Expected], tuple[Expected, Expected] | None]] = {
    "empty": ((InvalidTransaction, MOVES), None),
    "ongoing": ((MOVES, MOVES), None),
    "ongoing after a commit": ((MOVES, MOVES), (AGAIN, InvalidTransaction)),
    "ongoing after an abort": ((MOVES, MOVES), (InvalidTransaction, AGAIN)),
    "prepare commit": ((ConcurrentTransactions, ConcurrentTransactions), (AGAIN, InvalidTransaction)),
    "prepare abort": ((ConcurrentTransactions, ConcurrentTransactions), (InvalidTransaction, AGAIN)),
    "prepare abort, timed out": (
        (ConcurrentTransactions, ConcurrentTransactions),
        (TransactionTimedOut, AGAIN),
    ),
    "prepare abort, by an operator": (
        (ConcurrentTransactions, ConcurrentTransactions),
        (TransactionAborted, AGAIN),
    ),
    "prepare abort, fenced": (FENCED, FENCED),
    "complete commit": ((InvalidTransaction, MOVES), (AGAIN, InvalidTransaction)),
    "complete abort": ((InvalidTransaction, MOVES), (InvalidTransaction, AGAIN)),
    "complete abort, timed out": ((InvalidTransaction, MOVES), (TransactionTimedOut, AGAIN)),
    "complete abort, by an operator": ((InvalidTransaction, MOVES), (TransactionAborted, AGAIN)),
    "complete abort, fenced": (FENCED, FENCED),
    "complete abort, nothing begun": ((InvalidTransaction, MOVES), (InvalidTransaction, AGAIN)),
    "empty after a commit": ((InvalidTransaction, MOVES), FENCED),
    "empty after a fence": ((InvalidTransaction, MOVES), FENCED),
}


def play(scenario: str) -> tuple[Coordinated, Identity | None]:
    """The scenario, and the identity of the transaction that ended last in it."""
    at = Coordinated()
    at.init()
    identity, ended = at.init(), None
    for step in SCENARIOS[scenario].split():
        if step in ("commit", "abort"):
            ended, identity = identity, at.end(identity, step == "commit")
        elif step == "enlist":
            at.enlist(identity, P0)
        elif step == "complete":
            at.complete()
        elif step == "timeout":
            ended = identity
            at.abort(Cause.TIMEOUT)
        elif step == "operator":
            ended = identity
            at.abort(Cause.OPERATOR)
        elif at.transaction.phase is Phase.ONGOING:
            ended = identity
            with pytest.raises(ConcurrentTransactions):
                at.init()
        else:
            ended, identity = ended or identity, at.init()
    return at, ended


def check_end(at: Coordinated, identity: Identity, commit: bool, expected: Expected) -> None:
    before = at.transaction
    if isinstance(expected, str):
        following = at.end(identity, commit)
        assert following == at.transaction.identity
        assert (at.transaction == before) == (expected == AGAIN)
        if expected == MOVES:
            assert following != identity
            assert following.epoch == identity.epoch + 1
            assert at.end(identity, commit) == following, "and may be asked again"
        return
    with pytest.raises(RaftlogError) as caught:
        at.end(identity, commit)
    assert type(caught.value) is expected
    assert at.transaction == before, "nothing happened"


@pytest.mark.parametrize("restored", [False, True], ids=["", "after a change of leader"])
@pytest.mark.parametrize("commit", [True, False], ids=["commit", "abort"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_end_is_idempotent_and_the_opposite_refused_in_every_state(
    scenario: str, commit: bool, restored: bool
) -> None:
    present, retry = ENDS[scenario]
    for which, expected in (("present", present), ("retry", retry), ("stale", FENCED)):
        at, ended = play(scenario)
        if restored:
            at.move(term=2)
        identity = {"present": at.transaction.identity, "retry": ended, "stale": Identity(7, 0)}[which]
        assert (identity is None) == (expected is None)
        if identity is not None and expected is not None:
            check_end(at, identity, commit, expected[0 if commit else 1])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_enlist_in_every_state(scenario: str) -> None:
    at, ended = play(scenario)
    phase, present = at.transaction.phase, at.transaction.identity
    if "fenced" in scenario:
        expected: type[RaftlogError] | None = ProducerFenced
    else:
        expected = ConcurrentTransactions if phase.is_ending else None
    if expected is None:
        at.enlist(present, P1)
        assert at.transaction.phase is Phase.ONGOING
        assert at.transaction.partitions == ((P0, P1) if phase is Phase.ONGOING else (P1,))
    else:
        with pytest.raises(expected):
            at.enlist(present, P1)
    before = at.transaction
    late = InvalidTransaction
    for word, error in (("timed", TransactionTimedOut), ("operator", TransactionAborted)):
        late = error if word in scenario else late
    if "fence" in scenario or scenario == "empty after a commit":
        late = ProducerFenced
    for identity, error in ((ended, late), (Identity(7, 0), ProducerFenced)):
        if identity is not None:
            with pytest.raises(RaftlogError) as caught:
                at.enlist(identity, P2)
            assert type(caught.value) is error
    assert at.transaction == before


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_init_in_every_state_never_hands_out_an_identity_twice(scenario: str) -> None:
    at, _ = play(scenario)
    present, phase = at.transaction.identity, at.transaction.phase
    if phase is Phase.ONGOING or phase.is_ending:
        with pytest.raises(ConcurrentTransactions):
            at.init()
        fence = at.transaction.identity
        assert at.transaction.phase.is_ending
        with pytest.raises(ConcurrentTransactions):
            at.init()
        assert at.transaction.identity == fence, "asking again decides nothing"
        at.complete()
        assert at.init() == Identity(7, fence.epoch + 1), "the fencing epoch itself is never handed out"
    else:
        assert at.init() == Identity(7, present.epoch + 1)
    for stale in range(at.transaction.identity.epoch):
        with pytest.raises(ProducerFenced):
            at.enlist(Identity(7, stale), P0)
