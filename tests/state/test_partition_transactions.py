"""Transactions at a partition: what opens, ends and hides them, and how far readers may read."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_group import Group

from raftlog.errors import (
    InvalidTransaction,
    OutOfOrderSequence,
    ProducerFenced,
    RaftlogError,
    StaleCoordinator,
    TransactionAborted,
    UnknownProducer,
)
from raftlog.raft.types import Entry
from raftlog.record.batch import BatchHeader, stamped
from raftlog.record.control import Marker, encode_marker
from raftlog.record.frame import FrameKind
from raftlog.state.aborted import AbortedRange, AbortedRanges
from raftlog.state.command import ApplyMismatch
from raftlog.state.partition import ExpireProducers, PartitionState, SetLogStart
from raftlog.state.producers import Duplicate, Outcome

A, B, C = 7, 8, 9


def refused(
    group: Group, error: type[RaftlogError], pid: int, epoch: int, seq: int, txn: bool = True
) -> None:
    """The batch is refused with exactly this error, and the state is as before."""
    before = group.state.snapshot()
    with pytest.raises(RaftlogError) as caught:
        group.produce(1, pid, epoch, seq, txn)
    assert type(caught.value) is error
    assert group.state.snapshot() == before


def marker_refused(
    group: Group, error: type[RaftlogError], pid: int, epoch: int, commit: bool, coordinator: int = 1
) -> None:
    before = group.state.snapshot()
    with pytest.raises(RaftlogError) as caught:
        group.mark(pid, epoch, commit, coordinator)
    assert type(caught.value) is error
    assert group.state.snapshot() == before


# -- the last stable offset ----------------------------------------------------------------------------------


def test_the_last_stable_offset_is_where_the_first_open_transaction_begins(group: Group) -> None:
    state = group.state
    assert state.last_stable_offset == 0
    group.produce(3)
    assert state.last_stable_offset == 3, "nothing is open"
    group.produce(2, A, 0, 0, txn=True)  # 3, 4
    group.produce(1, B, 0, 0, txn=True)  # 5
    group.produce(4)  # 6 to 9
    group.produce(2, A, 0, 2, txn=True)  # 10, 11
    assert state.last_stable_offset == 3
    assert [(pid, each.first_offset) for pid, each in state.open_transactions()] == [(A, 3), (B, 5)]
    assert group.mark(B, 0, commit=True) == 12
    assert state.last_stable_offset == 3, "A still holds it back"
    assert group.mark(A, 0, commit=True) == 13
    assert state.last_stable_offset == state.next_offset == 14
    assert state.open_transactions() == []


def test_mistake_7_the_last_stable_offset_ahead_of_applied_state(group: Group) -> None:
    """A leader has staged what is not committed yet: what its readers may see goes by what is applied, in
    which the transaction has not even begun, or has not ended."""
    group.produce(2)
    applied = group.state.copy()
    group.produce(2, A, 0, 0, txn=True)
    group.produce(5)
    group.mark(A, 0, commit=True)
    assert group.state.last_stable_offset == 10
    assert applied.last_stable_offset == 2
    for entry in group.entries[applied.applied_index :]:
        applied.apply(entry)
        opened = applied.open_transactions()
        assert applied.last_stable_offset == (2 if opened else applied.next_offset)
        assert applied.last_stable_offset <= applied.next_offset
    assert applied.last_stable_offset == 10


def test_the_log_start_may_pass_an_open_transaction_and_readers_stay_before_it(group: Group) -> None:
    group.produce(3, A, 0, 0, txn=True)
    group.produce(3)
    group.command(SetLogStart(4))
    assert group.state.last_stable_offset == 4
    group.mark(A, 0, commit=False)
    assert group.state.last_stable_offset == 7
    assert group.state.aborted_in(4, 7) == [(A, 0, 6)]


# -- what is hidden ------------------------------------------------------------------------------------------


def test_an_aborted_range_hides_a_producer_from_its_first_offset_to_its_marker(group: Group) -> None:
    group.produce(1, A, 0, 0, txn=True)  # 0
    group.produce(1, B, 0, 0, txn=True)  # 1
    assert group.mark(A, 0, commit=False) == 2
    group.produce(1, C, 0, 0, txn=True)  # 3
    assert group.mark(C, 0, commit=False) == 4
    assert group.mark(B, 0, commit=False) == 5
    group.produce(1, A, 1, 0, txn=True)  # 6
    assert group.mark(A, 1, commit=True) == 7
    everything = [(A, 0, 2), (C, 3, 4), (B, 1, 5)]
    assert group.state.aborted_in(0, 8) == everything
    assert group.state.aborted_in(0, 1) == [(A, 0, 2)]
    assert group.state.aborted_in(1, 2) == [(A, 0, 2), (B, 1, 5)]
    assert group.state.aborted_in(1, 3) == [(A, 0, 2), (B, 1, 5)]
    assert group.state.aborted_in(3, 4) == [(C, 3, 4), (B, 1, 5)]
    assert group.state.aborted_in(5, 8) == [(B, 1, 5)]
    assert group.state.aborted_in(6, 8) == []
    assert PartitionState.restore(group.state.snapshot()).aborted_in(0, 8) == everything


def test_mistake_13_aborts_filtered_by_producer_without_epoch(group: Group) -> None:
    """The same producer aborts, commits and aborts: only what lies in an aborted range is hidden."""
    for epoch, commit in enumerate((False, True, False, True)):
        group.produce(2, A, epoch, 0, txn=True)
        group.mark(A, epoch, commit)
    assert group.state.aborted_in(0, 12) == [(A, 0, 2), (A, 6, 8)]
    visible = [o for o in range(12) if o % 3 < 2 and not hidden(group.state, A, o, 12)]
    assert visible == [3, 4, 9, 10]


def hidden(state: PartitionState, pid: int, offset: int, end: int) -> bool:
    return any(each == pid and first <= offset < last for each, first, last in state.aborted_in(0, end))


def test_ranges_that_ended_below_the_log_start_are_forgotten(group: Group) -> None:
    for epoch in range(4):
        group.produce(1, A, epoch, 0, txn=True)  # 0, 2, 4, 6 and markers 1, 3, 5, 7
        group.mark(A, epoch, commit=False)
    for start, left in ((1, 4), (2, 3), (5, 2), (8, 0)):
        group.command(SetLogStart(start))
        assert len(group.state.aborted) == left


def test_the_search_for_ranges_stops_where_no_other_can_overlap() -> None:
    """A long history of aborts is not looked at to read its beginning."""
    ranges = AbortedRanges()
    for number in range(10_000):
        ranges.append(AbortedRange(number, 0, 2 * number, 2 * number + 1, 2 * number + 2))
    looked_at = []

    class Counting(AbortedRanges):
        def __getitem__(self, position: int) -> AbortedRange:
            looked_at.append(position)
            return super().__getitem__(position)

    found = Counting(ranges.packed()).overlapping(4000, 4004)
    assert [each.producer_id for each in found] == [2000, 2001]
    assert len(looked_at) < 25


# -- what ends, and what comes late --------------------------------------------------------------------------


@pytest.mark.parametrize("written", [True, False], ids=["with data", "without data"])
@pytest.mark.parametrize("commit", [True, False], ids=["commit", "abort"])
@pytest.mark.parametrize("restored", [True, False], ids=["restored", "as it was"])
def test_the_marker_ends_the_epoch_so_a_late_append_opens_nothing(
    group: Group, written: bool, commit: bool, restored: bool
) -> None:
    if written:
        group.produce(2, A, 3, 0, txn=True)
    group.mark(A, 3, commit)
    if restored:
        group.state = PartitionState.restore(group.state.snapshot())
    for txn in (True, False):
        for seq in (0, 2, 5):
            refused(group, InvalidTransaction if commit else TransactionAborted, A, 3, seq, txn)
        refused(group, ProducerFenced, A, 2, 0, txn)
    assert not group.state.open
    if written:
        assert group.produce(2, A, 3, 0, txn=True) == Duplicate(0, group.now_ms), "it is there, and says so"
    refused(group, OutOfOrderSequence, A, 4, 2)
    assert group.produce(1, A, 4, 0, txn=True) == group.state.next_offset - 1


def test_the_end_is_idempotent_and_the_opposite_is_refused(group: Group) -> None:
    for epoch, commit in ((0, True), (1, False)):
        group.produce(1, A, epoch, 0, txn=True)
        assert group.mark(A, epoch, commit) is not None
        end = group.state.next_offset
        for coordinator in (1, 2):
            assert group.mark(A, epoch, commit, coordinator) is None
            marker_refused(group, InvalidTransaction, A, epoch, not commit, coordinator)
        assert group.state.next_offset == end


def test_a_stale_coordinators_marker_is_refused(group: Group) -> None:
    """Paused while it was about to write its marker, when a new coordinator came and went on."""
    group.produce(1, A, 0, 0, txn=True)
    group.mark(A, 0, commit=True, coordinator=5)
    group.produce(1, A, 1, 0, txn=True)
    for epoch in (0, 1, 2):
        for commit in (True, False):
            marker_refused(group, StaleCoordinator, A, epoch, commit, coordinator=4)
    group.state = PartitionState.restore(group.state.snapshot())
    marker_refused(group, StaleCoordinator, A, 1, commit=False, coordinator=4)
    assert group.mark(A, 1, commit=True, coordinator=5) is not None


def test_mistake_14_a_delayed_marker_hits_the_next_transaction(group: Group) -> None:
    group.produce(1, A, 0, 0, txn=True)
    group.mark(A, 0, commit=False)
    group.produce(1, A, 1, 0, txn=True)
    marker_refused(group, ProducerFenced, A, 0, commit=False)
    marker_refused(group, ProducerFenced, A, 0, commit=True)
    assert group.state.open[A].epoch == 1


def test_a_transaction_before_that_hangs_is_aborted_with_the_next_one_and_never_committed(
    group: Group,
) -> None:
    group.produce(1, A, 0, 0, txn=True)
    marker_refused(group, InvalidTransaction, A, 1, commit=True)
    assert group.mark(A, 1, commit=False) == 1
    assert group.state.aborted_in(0, 2) == [(A, 0, 1)]
    refused(group, TransactionAborted, A, 1, 0)
    refused(group, ProducerFenced, A, 0, 1)


def test_a_zombie_is_refused_before_and_after_the_first_write_of_the_new_one(group: Group) -> None:
    """The new producer's Init aborted the zombie's transaction, at this partition too."""
    group.produce(1, A, 0, 0, txn=True)
    group.mark(A, 0, commit=False)
    refused(group, TransactionAborted, A, 0, 1)
    group.produce(1, A, 2, 0, txn=True)
    refused(group, ProducerFenced, A, 0, 1)
    refused(group, ProducerFenced, A, 1, 0)
    assert group.state.open[A].first_offset == 2


def test_batches_are_checked_in_the_order_duplicate_open_transaction_epoch_sequence(group: Group) -> None:
    group.produce(1, A, 1, 0, txn=True)
    group.produce(1, A, 1, 1, txn=True)
    # duplicate before open transaction
    assert group.produce(1, A, 1, 0, txn=False) == Duplicate(0, group.now_ms)
    # open transaction before epoch and before sequence
    refused(group, InvalidTransaction, A, 0, 2, txn=False)
    refused(group, InvalidTransaction, A, 1, 2, txn=False)
    refused(group, InvalidTransaction, A, 1, 9, txn=False)
    refused(group, InvalidTransaction, A, 2, 9, txn=True)
    # epoch before sequence
    refused(group, ProducerFenced, A, 0, 9, txn=True)
    refused(group, OutOfOrderSequence, A, 1, 9, txn=True)
    assert group.produce(1, A, 1, 2, txn=True) == 2


def test_mistake_8_a_batch_in_doubt_resent_under_a_new_epoch_is_refused_inside_the_transaction(
    group: Group,
) -> None:
    """Its acknowledgement was lost. To number it anew would write it twice: a new epoch cannot be written
    while the transaction that may hold it is open, and once that is aborted nobody reads the first copy."""
    group.produce(1, A, 0, 0, txn=True)
    refused(group, InvalidTransaction, A, 1, 0)
    assert group.produce(1, A, 0, 0, txn=True) == Duplicate(0, group.now_ms), "the same identity is safe"
    group.mark(A, 0, commit=False)
    assert group.produce(1, A, 1, 0, txn=True) == 2
    group.mark(A, 1, commit=True)
    assert group.state.aborted_in(0, 4) == [(A, 0, 1)]


def test_mistake_8_a_batch_in_doubt_is_unknown_after_its_producer_was_forgotten(group: Group) -> None:
    """It is refused, and not appended again: the client hears that its outcome is not known."""
    group.produce(1, A, 0, 0)
    group.produce(1, A, 0, 1)
    group.now_ms += 1
    assert group.command(ExpireProducers(group.now_ms)) == 1
    refused(group, UnknownProducer, A, 0, 1, txn=False)


def test_mistake_11_a_snapshot_keeps_what_is_open_and_what_ended_without_data(group: Group) -> None:
    group.produce(1, A, 0, 0, txn=True)
    group.mark(B, 4, commit=False, coordinator=3)
    restored = PartitionState.restore(group.state.snapshot())
    assert restored.open_transactions() == group.state.open_transactions()
    assert restored.last_stable_offset == 0
    assert restored.producers[B].outcome is Outcome.ABORTED
    assert restored.producers[B].coordinator_epoch == 3
    group.state = restored
    refused(group, TransactionAborted, B, 4, 0)
    assert group.mark(B, 4, commit=False, coordinator=3) is None


def test_a_copy_has_transactions_of_its_own(group: Group) -> None:
    group.produce(1, A, 0, 0, txn=True)
    group.produce(1, B, 0, 0, txn=True)
    group.mark(A, 0, commit=False)
    copied = group.state.copy()
    before = copied.snapshot()
    group.produce(1, C, 0, 0, txn=True)
    group.mark(B, 0, commit=False)
    assert copied.snapshot() == before
    assert copied.aborted_in(0, 9) == [(A, 0, 2)]
    assert group.state.aborted_in(0, 9) == [(A, 0, 2), (B, 1, 4)]


# -- bounds --------------------------------------------------------------------------------------------------


def test_open_transactions_are_neither_evicted_nor_expired(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PartitionState, "PRODUCERS_MAX", 3)
    group.produce(1, A, 0, 0, txn=True)
    for pid in (20, 21, 22, 23):
        group.now_ms += 1
        group.produce(1, pid, 0, 0)
    assert list(group.state.producers) == [A, 22, 23]
    assert group.command(ExpireProducers(group.now_ms + 1)) == 2
    assert list(group.state.producers) == [A]
    for pid in (30, 31, 32):
        group.produce(1, pid, 0, 0, txn=True)
    assert list(group.state.producers) == [A, 30, 31, 32], "no room can be made: they are all open"
    group.mark(A, 0, commit=True)
    group.now_ms += 1
    group.produce(1, 33, 0, 0)
    assert list(group.state.producers) == [30, 31, 32, 33]
    for at in range(len(group.entries)):
        assert group.replay(snapshot_at=at) == group.state


# -- what halts a replica ------------------------------------------------------------------------------------


def test_a_marker_that_the_leader_should_not_have_appended_halts(group: Group) -> None:
    group.produce(1, A, 1, 0, txn=True)
    group.mark(B, 0, commit=True, coordinator=2)
    before = group.state.snapshot()
    for marker in (
        Marker(A, 0, 2, True),
        Marker(B, 0, 2, True),
        Marker(B, 0, 2, False),
        Marker(B, 1, 1, True),
        Marker(A, 2, 2, True),
    ):
        batch = bytearray(stamped(encode_marker(marker, 5), group.state.next_offset, group.term))
        for damage in (None, 69, 22):
            if damage is not None:
                batch[damage] ^= 2
            entry = Entry.create(
                0, FrameKind.BATCH, group.term, group.state.applied_index + 1, 5, bytes(batch)
            )
            with pytest.raises(ApplyMismatch):
                group.state.apply(entry)
            assert group.state.snapshot() == before
    assert group.mark(A, 1, commit=True, coordinator=2) is not None


# -- against a model -----------------------------------------------------------------------------------------

steps = st.one_of(
    st.tuples(st.just("produce"), st.integers(1, 3), st.integers(-1, 2), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("mark"), st.integers(0, 2), st.integers(0, 3), st.booleans(), st.integers(1, 2)),
    st.tuples(st.just("start"), st.integers(0, 30)),
    st.tuples(st.just("expire")),
)


@settings(max_examples=300, deadline=None)
@given(script=st.lists(steps, max_size=40), at=st.integers(0, 40))
def test_readers_of_committed_records_see_exactly_the_committed_batches(
    script: list[tuple[object, ...]], at: int
) -> None:
    """Books of its own: who wrote each offset, and how that transaction ended."""
    group = Group()
    written: list[tuple[int, int] | None] = []
    transaction_at: list[int | None] = []
    """Per offset: number of its transaction; None: outside of any, or a marker."""
    transactions: list[bool | None] = []
    """Per transaction: how it ended; None: open."""
    open_now: dict[int, int] = {}
    stable = 0
    for step in script:
        group.now_ms += 1
        try:
            match step:
                case ("produce", int(count), int(pid), int(epoch), bool(txn)):
                    outcome = produce_next(group, count, pid, epoch, txn)
                    assert isinstance(outcome, int)
                    if pid >= 0 and txn and pid not in open_now:
                        open_now[pid] = len(transactions)
                        transactions.append(None)
                    number = open_now[pid] if pid >= 0 and txn else None
                    written += [(pid, epoch)] * count
                    transaction_at += [number] * count
                case ("mark", int(pid), int(epoch), bool(commit), int(coordinator)):
                    if group.mark(pid, epoch, commit, coordinator) is not None:
                        written.append(None)
                        transaction_at.append(None)
                        if pid in open_now:
                            transactions[open_now.pop(pid)] = commit
                case ("start", int(offset)):
                    group.command(SetLogStart(offset))
                case ("expire",):
                    group.command(ExpireProducers(group.now_ms - 3))
        except RaftlogError:
            pass
        state = group.state
        firsts = [transaction_at.index(number) for number in open_now.values()]
        assert state.last_stable_offset == max([min([*firsts, len(written)]), state.log_start])
        assert state.last_stable_offset >= stable, "it never moves back"
        stable = state.last_stable_offset
        assert {pid: each.first_offset for pid, each in state.open.items()} == dict(
            zip(open_now, firsts, strict=True)
        )
    check_views(group.replay(snapshot_at=at), written, transaction_at, transactions)
    assert group.replay(snapshot_at=at) == group.state


def produce_next(group: Group, count: int, pid: int, epoch: int, txn: bool) -> int | Duplicate:
    if pid < 0:
        return group.produce(count)
    known = group.state.producers.get(pid)
    fits = known is not None and known.epoch == epoch and known.window
    return group.produce(count, pid, epoch, known.expected_sequence if known and fits else 0, txn)


def check_views(
    state: PartitionState,
    written: list[tuple[int, int] | None],
    transaction_at: list[int | None],
    transactions: list[bool | None],
) -> None:
    """Whatever part is read, it shows what is committed and nothing else."""
    stable = state.last_stable_offset
    for start in range(state.log_start, stable + 1):
        for end in {start, min(start + 3, stable), stable}:
            aborted = state.aborted_in(start, end)
            for offset in range(start, end):
                by, number = written[offset], transaction_at[offset]
                if by is None:
                    continue  # a marker: clients pass over it
                concealed = any(pid == by[0] and first <= offset < last for pid, first, last in aborted)
                assert concealed == (number is not None and transactions[number] is False)


def test_markers_are_batches_with_an_offset_of_their_own(group: Group) -> None:
    group.produce(2, A, 0, 0, txn=True)
    group.mark(A, 0, commit=True)
    header = BatchHeader.parse(group.entries[-1].payload)
    assert (header.base_offset, header.next_offset, header.is_control) == (2, 3, True)
    assert group.produce(1) == 3
