"""The idempotence rules, one test per row of the contract: duplicates, gaps, epochs, expiry, wrap."""

from __future__ import annotations

import pytest
from partition_group import Group

from raftlog.errors import (
    DuplicateSequence,
    OutOfOrderSequence,
    ProducerFenced,
    RaftlogError,
    UnknownProducer,
)
from raftlog.record.batch import SEQUENCE_MODULUS
from raftlog.state.partition import ExpireProducers, PartitionState
from raftlog.state.producers import WINDOW_BATCHES, Duplicate

PID = 7


def refused(group: Group, error: type[RaftlogError], **batch: int) -> RaftlogError:
    """The batch is refused with exactly this error, and the state is as before."""
    before = group.state.snapshot()
    with pytest.raises(RaftlogError) as caught:
        group.produce(pid=PID, **batch)
    assert type(caught.value) is error
    assert group.state.snapshot() == before
    return caught.value


def write_seven(group: Group) -> None:
    """Batches of two records: sequences 0-1, 2-3 … 12-13 at the offsets of the same numbers."""
    for number in range(7):
        group.now_ms = 1000 + number
        assert group.produce(2, PID, 0, 2 * number) == 2 * number


def test_each_of_the_last_five_batches_resent_succeeds_with_its_original_offset_and_time(
    group: Group,
) -> None:
    write_seven(group)
    before = group.state.snapshot()
    for number in range(2, 7):
        assert group.produce(2, PID, 0, 2 * number) == Duplicate(2 * number, 1000 + number)
    assert group.state.snapshot() == before
    assert group.produce(2, PID, 0, 14) == 14, "the producer goes on as if nothing had happened"


def test_the_sixth_oldest_resent_is_a_duplicate_without_an_offset(group: Group) -> None:
    write_seven(group)
    assert len(group.state.producers[PID].batches) == WINDOW_BATCHES
    for number in (0, 1):
        refused(group, DuplicateSequence, count=2, epoch=0, seq=2 * number)


def test_a_gap_is_out_of_order_and_says_what_was_expected(group: Group) -> None:
    write_seven(group)
    for seq in (15, 100, 14 + SEQUENCE_MODULUS // 2 - 1):
        assert refused(group, OutOfOrderSequence, count=2, epoch=0, seq=seq).expected == 14
    assert group.produce(2, PID, 0, 14) == 14


@pytest.mark.parametrize(("seq", "count"), [(13, 2), (12, 3), (2, 13), (0, 15)])
def test_a_batch_that_is_half_duplicate_is_neither_a_success_nor_appended(
    group: Group, seq: int, count: int
) -> None:
    """Calling it a duplicate would lose its second half, appending it would double its first."""
    write_seven(group)
    assert "in part" in refused(group, OutOfOrderSequence, count=count, epoch=0, seq=seq).message


@pytest.mark.parametrize(("seq", "count"), [(12, 1), (11, 2), (10, 4), (4, 10), (13, 1)])
def test_a_resend_with_other_borders_never_gets_a_wrong_offset(group: Group, seq: int, count: int) -> None:
    write_seven(group)
    refused(group, DuplicateSequence, count=count, epoch=0, seq=seq)


@pytest.mark.parametrize("distance", range(1, 12))
def test_the_rules_hold_across_the_wrap_of_the_sequence(group: Group, distance: int) -> None:
    """Batches of three, one of which may begin before and end after the largest sequence."""
    first = SEQUENCE_MODULUS - distance
    state = group.state
    group.produce(1, PID, 0, 0)
    # the producer has come close to the end: as if all in between had been written
    known = state.producers[PID]
    packed = (0).to_bytes(4, "big") + (first - 1).to_bytes(4, "big") + bytes(16)
    state.producers[PID] = type(known)(0, packed, known.last_time_ms)
    for number in range(5):
        assert group.produce(3, PID, 0, (first + 3 * number) % SEQUENCE_MODULUS) == 1 + 3 * number
    for number in range(5):
        resent = group.produce(3, PID, 0, (first + 3 * number) % SEQUENCE_MODULUS)
        assert resent == Duplicate(1 + 3 * number, group.now_ms)
    expected = (first + 15) % SEQUENCE_MODULUS
    refused(group, OutOfOrderSequence, count=1, epoch=0, seq=(expected + 1) % SEQUENCE_MODULUS)
    refused(group, OutOfOrderSequence, count=2, epoch=0, seq=(expected - 1) % SEQUENCE_MODULUS)
    refused(group, DuplicateSequence, count=2, epoch=0, seq=(expected - 2) % SEQUENCE_MODULUS)
    assert group.produce(1, PID, 0, expected) == 16


def test_a_new_epoch_begins_at_zero_and_the_older_one_is_fenced(group: Group) -> None:
    write_seven(group)
    refused(group, OutOfOrderSequence, count=2, epoch=1, seq=14)
    assert group.produce(2, PID, 0, 14) == 14, "before the new one's first write the zombie still writes"
    assert group.produce(2, PID, 1, 0) == 16
    assert refused(group, ProducerFenced, count=2, epoch=0, seq=16).epoch == 1
    refused(group, ProducerFenced, count=2, epoch=0, seq=14)
    refused(group, ProducerFenced, count=2, epoch=0, seq=0)
    assert group.produce(2, PID, 1, 0) == Duplicate(16, group.now_ms), "window of the new epoch only"
    assert group.produce(2, PID, 1, 2) == 18
    assert len(group.state.producers[PID].batches) == 2


def test_an_unknown_producer_begins_at_zero(group: Group) -> None:
    refused(group, UnknownProducer, epoch=0, seq=5)
    assert group.produce(1, PID, 3, 0) == 0


def test_an_expired_producer_is_unknown(group: Group) -> None:
    write_seven(group)
    assert group.command(ExpireProducers(before_ms=1006)) == 0, "its last batch has leader time 1006"
    assert group.command(ExpireProducers(before_ms=1007)) == 1
    refused(group, UnknownProducer, count=2, epoch=0, seq=12)
    refused(group, UnknownProducer, count=2, epoch=0, seq=14)


def test_expiry_takes_the_idle_and_leaves_the_others(group: Group) -> None:
    for pid in range(5):
        group.now_ms = 1000 + pid
        group.produce(1, pid, 0, 0)
    group.now_ms = 2000
    group.produce(1, 1, 0, 1)
    assert group.command(ExpireProducers(before_ms=1003)) == 2
    assert list(group.state.producers) == [3, 4, 1]


def test_without_a_producer_id_nothing_is_remembered(group: Group) -> None:
    assert [group.produce(3) for _ in range(3)] == [0, 3, 6]
    assert group.state.producers == {}


def test_producers_are_told_apart(group: Group) -> None:
    assert group.produce(1, 1, 0, 0) == 0
    assert group.produce(1, 2, 0, 0) == 1
    assert group.produce(1, 1, 0, 0) == Duplicate(0, group.now_ms)
    assert group.produce(1, 2, 0, 0) == Duplicate(1, group.now_ms)


def test_the_idlest_producer_makes_room_on_every_replica_alike(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PartitionState, "PRODUCERS_MAX", 3)
    for pid in (10, 11, 12):
        group.produce(1, pid, 0, 0)
    group.produce(1, 10, 0, 1)  # 11 is now the idlest
    group.produce(1, 13, 0, 0)
    assert list(group.state.producers) == [12, 10, 13]
    group.produce(1, 12, 1, 0)  # a new epoch of a known producer takes no room
    assert list(group.state.producers) == [10, 13, 12]
    for at in range(len(group.entries)):
        assert list(group.replay(snapshot_at=at).producers) == [10, 13, 12]


def test_a_snapshot_keeps_all_five_batches(group: Group) -> None:
    write_seven(group)
    group.state = PartitionState.restore(group.state.snapshot())
    for number in range(2, 7):
        assert group.produce(2, PID, 0, 2 * number) == Duplicate(2 * number, 1000 + number)
    refused(group, DuplicateSequence, count=2, epoch=0, seq=2)
    assert group.produce(2, PID, 0, 14) == 14


def test_a_truncated_batch_was_never_written(group: Group) -> None:
    """What a deposed leader staged is dropped with its copy; the resend to the new leader is appended."""
    write_seven(group)
    applied = group.state.copy()
    assert group.produce(2, PID, 0, 14) == 14
    group.state = applied
    assert group.produce(2, PID, 0, 14) == 14
