"""The window of one partition, claim by claim; and what errors mean."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftlog.client.window import WINDOW_SIZE, Identity, Verdict, Window, judge
from raftlog.errors import (
    Busy,
    ConnectionLost,
    CorruptBatch,
    DuplicateSequence,
    LeadershipLost,
    NotLeader,
    OutOfOrderSequence,
    ProducerFenced,
    RaftlogError,
    RecordTooLarge,
    RequestTimeout,
    StorageFull,
    UnknownProducer,
)

ME = Identity(7, 0)


@dataclass(eq=False)
class Batch:
    """What the window knows of one."""

    sequence: int = -1
    count: int = 1
    attempt: int = 0
    deadline: float = 0.0
    doubt_before: bool = False
    in_doubt: bool = False
    order: int = 0

    def sequence_after(self) -> int:
        return (self.sequence + self.count) % 2**31


def begun(size: int = WINDOW_SIZE) -> Window[Batch]:
    window: Window[Batch] = Window(size)
    assert window.needs_identity()
    window.begin(ME)
    return window


def send(window: Window[Batch], count: int = 1) -> Batch:
    batch = Batch(window.next_sequence, count)
    window.sent_new(batch)
    return batch


def test_sequences_count_records_and_wrap() -> None:
    window = begun()
    assert [send(window, 3).sequence for _ in range(3)] == [0, 3, 6]
    window = begun()
    window.next_sequence = 2**31 - 2
    assert [send(window, 3).sequence for _ in range(2)] == [2**31 - 2, 1]


def test_no_more_than_five_beyond_the_oldest_even_if_later_ones_are_answered() -> None:
    window = begun()
    batches = [send(window) for _ in range(5)]
    assert not window.may_send_new()
    for batch in batches[1:]:
        window.acknowledged(batch)
    assert not window.may_send_new(), "the leader would forget the oldest"
    window.acknowledged(batches[0])
    assert window.may_send_new()


def test_after_a_failure_nothing_goes_until_all_are_answered_then_all_in_order() -> None:
    window = begun()
    first, second, third, fourth = (send(window) for _ in range(4))
    window.acknowledged(first)
    assert window.refused(third, OutOfOrderSequence("")) is Verdict.RETRY
    assert window.refused(second, NotLeader("")) is Verdict.RETRY
    assert not window.may_resend()
    assert not window.may_send_new()
    assert window.refused(fourth, ConnectionLost("", indeterminate=True)) is Verdict.RETRY
    assert not window.may_send_new(), "first those that failed"
    assert [window.resend() for _ in range(3)] == [second, third, fourth]
    assert [batch.in_doubt for batch in (second, third, fourth)] == [True] * 3
    assert not window.may_resend()
    assert window.may_send_new()


def test_doubt_once_stays() -> None:
    window = begun()
    batch = send(window)
    window.refused(batch, RequestTimeout(""))
    assert batch.in_doubt
    window.resend()
    window.refused(batch, Busy(""))
    assert batch.in_doubt, "the first attempt may have been written"
    other = begun()
    batch = send(other)
    other.refused(batch, Busy(""))
    assert not batch.in_doubt


def test_giving_up_breaks_the_window_and_only_what_is_certainly_not_there_moves() -> None:
    window = begun()
    lost, refused_later, doubtful = (send(window) for _ in range(3))
    window.give_up(lost)
    assert not window.may_send_new()
    assert not window.needs_identity(), "others are unanswered"
    assert window.refused(refused_later, OutOfOrderSequence("")) is Verdict.RETRY
    assert window.refused(doubtful, ConnectionLost("", indeterminate=True)) is Verdict.RETRY
    assert not window.may_resend()
    assert window.needs_identity()
    assert window.dissolve() == ([refused_later], [doubtful])
    window.begin(Identity(8, 0))
    assert send(window).sequence == 0


def test_an_answer_to_an_attempt_that_was_given_up_is_stale() -> None:
    window = begun()
    batch = send(window)
    attempt = batch.attempt
    window.abandon_in_flight()
    assert batch.attempt != attempt
    assert window.may_resend()
    assert window.resend() is batch


@pytest.mark.parametrize(
    ("error", "oldest", "broken", "in_doubt", "verdict"),
    [
        (DuplicateSequence(""), True, False, True, Verdict.WRITTEN),
        (OutOfOrderSequence(""), True, False, False, Verdict.FAIL),
        (OutOfOrderSequence(""), False, False, True, Verdict.RETRY),
        (OutOfOrderSequence(""), True, True, False, Verdict.RETRY),
        (UnknownProducer(""), True, False, False, Verdict.RENEW),
        (UnknownProducer(""), True, False, True, Verdict.FAIL),
        (UnknownProducer(""), False, False, True, Verdict.RETRY),
        (NotLeader(""), True, False, False, Verdict.RETRY),
        (LeadershipLost(""), True, False, True, Verdict.RETRY),
        (ConnectionLost(""), True, False, True, Verdict.RETRY),
        (StorageFull(""), True, False, False, Verdict.RETRY),
        (CorruptBatch(""), True, False, False, Verdict.FAIL),
        (RecordTooLarge(""), False, False, False, Verdict.FAIL),
        (ProducerFenced(""), True, False, False, Verdict.FAIL),
    ],
)
def test_what_an_error_means(
    error: RaftlogError, oldest: bool, broken: bool, in_doubt: bool, verdict: Verdict
) -> None:
    assert judge(error, oldest=oldest, broken=broken, in_doubt=in_doubt) is verdict


def test_what_an_earlier_producer_wrote_and_the_partition_lost_is_not_this_one_s_to_tell() -> None:
    window: Window[Batch] = Window()
    window.begin(Identity(7, 0), 200)
    first = send(window)
    assert window.refused(first, OutOfOrderSequence("")) is Verdict.RENEW
    assert window.dissolve() == ([first], [])
    window.begin(Identity(7, 1))
    window.acknowledged(send(window))
    assert window.refused(send(window), OutOfOrderSequence("")) is Verdict.FAIL


class Leader:
    """A partition that keeps the rules of sequences, as the window must be able to rely on."""

    def __init__(self) -> None:
        self.log: list[Batch] = []

    def append(self, batch: Batch, sequence: int) -> RaftlogError | None:
        if batch in self.log:
            return None if batch in self.log[-5:] else DuplicateSequence("")
        expected = self.log[-1].sequence_after() if self.log else 0
        if sequence == expected:
            self.log.append(batch)
            return None
        return OutOfOrderSequence("") if self.log else UnknownProducer("")


@given(st.lists(st.sampled_from(["ok", "ok", "ok", "lost", "unsent", "busy", "late"]), max_size=60))
def test_whatever_fails_the_log_holds_each_batch_once_and_in_order(fates: list[str]) -> None:
    window, leader, sent = begun(), Leader(), []
    plan = iter(fates)
    pending: list[tuple[Batch, RaftlogError | None]] = []
    for _ in range(200):
        while window.may_resend() or (window.may_send_new() and len(sent) < 20):
            if window.may_resend():
                batch = window.resend()
            else:
                batch = send(window)
                sent.append(batch)
            fate = next(plan, "ok")
            if fate == "unsent":
                pending.append((batch, ConnectionLost("")))
            elif fate == "busy":
                pending.append((batch, Busy("")))
            else:
                error = leader.append(batch, batch.sequence)
                lost = error is None and fate == "lost"
                pending.append((batch, LeadershipLost("") if lost else error))
                if fate == "late":
                    pending.insert(0, pending.pop())
        if not pending:
            break
        batch, error = pending.pop(0)
        if error is None:
            window.acknowledged(batch)
        else:
            assert window.refused(batch, error) is Verdict.RETRY, error
    assert len(sent) == 20
    assert leader.log == sent


def test_epochs_run_out() -> None:
    assert Identity(7, 0).renewed() == Identity(7, 1)
    assert Identity(7, 2**15 - 1).renewed() is None
