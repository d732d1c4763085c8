"""The machine of a partition of ``__transactions``: what may become of a transaction, and equal states after
replay."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftlog.errors import InvalidTransaction, UnknownTransactionalId
from raftlog.raft.types import Entry
from raftlog.record.frame import FrameKind
from raftlog.state.command import ApplyMismatch, UnknownCommand, UnknownSnapshot
from raftlog.state.transactions import (
    TRANSITIONS,
    Cause,
    Command,
    Ended,
    Identity,
    Phase,
    PutTransaction,
    RemoveTransaction,
    Transaction,
    TransactionsState,
    decode_command,
    encode_command,
)

TOPIC = b"t" * 16
LEGAL = {
    (Phase.DEAD, Phase.EMPTY),
    (Phase.EMPTY, Phase.EMPTY),
    (Phase.EMPTY, Phase.ONGOING),
    (Phase.EMPTY, Phase.COMPLETE_ABORT),
    (Phase.EMPTY, Phase.DEAD),
    (Phase.ONGOING, Phase.ONGOING),
    (Phase.ONGOING, Phase.PREPARE_COMMIT),
    (Phase.ONGOING, Phase.PREPARE_ABORT),
    (Phase.PREPARE_COMMIT, Phase.COMPLETE_COMMIT),
    (Phase.PREPARE_ABORT, Phase.COMPLETE_ABORT),
    (Phase.COMPLETE_COMMIT, Phase.EMPTY),
    (Phase.COMPLETE_COMMIT, Phase.ONGOING),
    (Phase.COMPLETE_COMMIT, Phase.COMPLETE_ABORT),
    (Phase.COMPLETE_COMMIT, Phase.DEAD),
    (Phase.COMPLETE_ABORT, Phase.EMPTY),
    (Phase.COMPLETE_ABORT, Phase.ONGOING),
    (Phase.COMPLETE_ABORT, Phase.COMPLETE_ABORT),
    (Phase.COMPLETE_ABORT, Phase.DEAD),
}


def transaction(phase: Phase, epoch: int = 0, pid: int = 7, name: str = "x", term: int = 1) -> Transaction:
    who = (((TOPIC, 0), (TOPIC, 3)), ("g",))
    nobody: tuple[tuple[()], tuple[()]] = ((), ())
    commit = phase in (Phase.PREPARE_COMMIT, Phase.COMPLETE_COMMIT)
    ended = Ended(Identity(pid, 0), commit, Cause.TIMEOUT, *(who if phase.is_ending else nobody))
    return Transaction(
        name,
        Identity(pid, epoch),
        phase,
        60_000,
        1000,
        2000,
        term,
        *(who if phase is Phase.ONGOING else nobody),
        None if phase in (Phase.EMPTY, Phase.ONGOING) else ended,
    )


def apply(state: TransactionsState, command: Command, term: int = 1) -> object:
    payload = encode_command(command)
    return state.apply(Entry.create(0, FrameKind.COMMAND, term, state.applied_index + 1, 5, payload))


def at(phase: Phase) -> TransactionsState:
    """A state in which "x" is in that phase."""
    state = TransactionsState()
    if phase is not Phase.DEAD:
        state.transactions["x"] = transaction(phase)
    return state


@pytest.mark.parametrize(
    ("before", "after"), list(itertools.product(Phase, Phase)), ids=lambda phase: phase.name
)
def test_every_step_between_phases_is_legal_or_halts(before: Phase, after: Phase) -> None:
    assert (after in TRANSITIONS[before]) == ((before, after) in LEGAL)
    state = at(before)
    held = before.is_ending or after is Phase.ONGOING
    command: Command = PutTransaction(transaction(after, epoch=0 if held else 1))
    if after is Phase.DEAD:
        command = RemoveTransaction("x")
    if (before, after) in LEGAL:
        assert state.check_command(command) is None
        apply(state, command)
        assert state.transactions.get("x") == (None if after is Phase.DEAD else command.transaction)  # type: ignore[union-attr]
        return
    assert isinstance(state.check_command(command), InvalidTransaction)
    kept = state.snapshot()
    with pytest.raises(ApplyMismatch):
        apply(state, command)
    assert state.snapshot() == kept


@pytest.mark.parametrize(
    ("before", "after", "epoch", "pid"),
    [
        (Phase.EMPTY, Phase.EMPTY, 0, 7),  # the same identity given to a second producer
        (Phase.COMPLETE_COMMIT, Phase.EMPTY, 0, 7),
        (Phase.EMPTY, Phase.ONGOING, 1, 7),  # a transaction under an identity that nobody was given
        (Phase.ONGOING, Phase.ONGOING, 1, 7),
        (Phase.ONGOING, Phase.PREPARE_COMMIT, 0, 7),  # the next one would have the same identity
        (Phase.PREPARE_COMMIT, Phase.COMPLETE_COMMIT, 1, 7),
        (Phase.PREPARE_ABORT, Phase.COMPLETE_ABORT, 0, 8),
    ],
)
def test_an_identity_moves_on_with_an_end_or_a_new_producer_and_at_no_other_time(
    before: Phase, after: Phase, epoch: int, pid: int
) -> None:
    with pytest.raises(ApplyMismatch, match="cannot follow"):
        apply(at(before), PutTransaction(transaction(after, epoch, pid)))


def test_a_decision_of_another_term_than_its_entry_halts() -> None:
    state = TransactionsState()
    with pytest.raises(ApplyMismatch, match="term"):
        apply(state, PutTransaction(transaction(Phase.EMPTY, term=2)), term=3)
    assert state == TransactionsState()


def test_what_is_not_known_is_said_so() -> None:
    state = at(Phase.ONGOING)
    with pytest.raises(UnknownTransactionalId):
        state.transaction("y")
    with pytest.raises(UnknownCommand):
        state.apply(Entry.create(0, FrameKind.BATCH, 1, 1, 5, b""))
    with pytest.raises(UnknownCommand):
        state.apply(Entry.create(0, FrameKind.COMMAND, 1, 1, 5, msgspec.msgpack.encode([99, 1])))
    with pytest.raises(ApplyMismatch):
        state.apply(Entry.create(0, FrameKind.NOOP, 1, 2, 5, b""))
    state.apply(Entry.create(0, FrameKind.NOOP, 1, 1, 5, b""))
    state.apply(Entry.create(0, FrameKind.CONF, 1, 2, 5, b""))
    assert state.applied_index == 2


@pytest.mark.parametrize("phase", [each for each in Phase if each is not Phase.DEAD])
def test_commands_and_snapshots_keep_everything(phase: Phase) -> None:
    command = PutTransaction(transaction(phase))
    decoded = decode_command(memoryview(encode_command(command)))
    assert decoded == command
    assert isinstance(decoded, PutTransaction)
    assert isinstance(decoded.transaction.identity, Identity)
    restored = TransactionsState.restore(at(phase).snapshot())
    assert restored.transactions == {"x": transaction(phase)}
    assert [each.transactional_id for each in restored.ending()] == (["x"] if phase.is_ending else [])


def test_mistake_11_a_snapshot_keeps_the_open_transaction_that_has_no_data_yet() -> None:
    """It is enlisted, nothing is written: a new leader still knows where its marker is due."""
    state = TransactionsState()
    apply(state, PutTransaction(transaction(Phase.EMPTY)))
    apply(state, PutTransaction(transaction(Phase.ONGOING)))
    restored = TransactionsState.restore(state.snapshot())
    assert restored == state
    assert restored.transaction("x").phase is Phase.ONGOING
    assert restored.transaction("x").partitions == ((TOPIC, 0), (TOPIC, 3))
    assert restored.transaction("x").groups == ("g",)


def test_snapshots_of_other_versions_are_refused() -> None:
    fields = msgspec.msgpack.decode(TransactionsState().snapshot())
    for wrong in ([fields[0] + 1, *fields[1:]], [*fields, 0], [], [1]):
        with pytest.raises(UnknownSnapshot):
            TransactionsState.restore(msgspec.msgpack.encode(wrong))


@settings(max_examples=100, deadline=None)
@given(
    script=st.lists(
        st.tuples(st.sampled_from("xyz"), st.sampled_from(list(Phase)), st.integers(0, 1)), max_size=40
    ),
    snapshot_at=st.integers(0, 40),
)
def test_replay_through_a_snapshot_gives_an_equal_state(
    script: list[tuple[str, Phase, int]], snapshot_at: int
) -> None:
    leader, follower = TransactionsState(), TransactionsState()
    for position, (name, phase, moved) in enumerate(script):
        known = leader.transactions.get(name)
        epoch = 0 if known is None else known.identity.epoch + moved
        command: Command = PutTransaction(transaction(phase, epoch, name=name))
        if phase is Phase.DEAD:
            command = RemoveTransaction(name)
        if leader.check_command(command) is not None:
            continue
        copied = leader.copy()
        before = copied.snapshot()
        apply(leader, command)
        assert copied.snapshot() == before, "a copy is independent"
        if position == snapshot_at:
            follower = TransactionsState.restore(follower.snapshot())
        apply(follower, command)
    assert follower == leader
