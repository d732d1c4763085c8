"""The partition's state machine: offsets, log start, what halts a replica, and equal states after replay."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_group import Group

from raftlog.errors import OffsetOutOfRange, RaftlogError
from raftlog.raft.types import Entry
from raftlog.record.batch import stamped
from raftlog.record.codec import encode_batch
from raftlog.record.frame import FrameKind
from raftlog.state.command import ApplyHalted, ApplyMismatch, UnknownCommand, UnknownSnapshot
from raftlog.state.partition import (
    Command,
    ExpireProducers,
    PartitionState,
    SetLogStart,
    decode_command,
    encode_command,
)
from raftlog.state.producers import Duplicate


def halted(group: Group, error: type[ApplyHalted], entry: Entry) -> str:
    """Applying the entry halts, and leaves the state as it was."""
    before = group.state.snapshot()
    with pytest.raises(error) as caught:
        group.state.apply(entry)
    assert group.state.snapshot() == before
    return str(caught.value)


def batch_entry(
    group: Group, *, base_offset: int, epoch: int, index: int | None = None, **producer: int
) -> Entry:
    fields: dict[str, Any] = dict(producer)
    payload = stamped(encode_batch([b"v"] * 2, None, 5, **fields), base_offset, epoch)
    at = group.state.applied_index + 1 if index is None else index
    return Entry.create(0, FrameKind.BATCH, group.term, at, group.now_ms, payload)


# -- offsets ------------------------------------------------------------------------------------------------


def test_offsets_begin_at_zero_and_entries_that_are_not_batches_leave_no_holes(group: Group) -> None:
    group.append(FrameKind.NOOP, b"")
    assert group.produce(3) == 0
    group.append(FrameKind.CONF, b"whatever")
    group.term = 2
    group.append(FrameKind.NOOP, b"")
    assert group.produce(1) == 3
    group.command(ExpireProducers(0))
    assert group.produce(1) == 4
    assert (group.state.next_offset, group.state.applied_index) == (5, 7)


def test_the_log_start_moves_forward_only_and_not_past_the_end(group: Group) -> None:
    group.produce(10)
    assert group.command(SetLogStart(4)) == 4
    assert group.command(SetLogStart(2)) == 4, "a command that a slower leader proposed earlier"
    for wrong in (11, -1):
        assert isinstance(group.state.check_command(SetLogStart(wrong)), OffsetOutOfRange)
        refusal = group.command(SetLogStart(wrong))
        assert isinstance(refusal, OffsetOutOfRange)
        assert group.state.log_start == 4
    assert group.state.check_command(SetLogStart(10)) is None
    assert group.command(SetLogStart(10)) == 10
    assert group.produce(1) == 10


# -- what halts a replica ------------------------------------------------------------------------------------


def test_a_base_offset_other_than_the_next_halts(group: Group) -> None:
    group.produce(2)
    for offset in (0, 1, 3, -1):
        assert "offset 2" in halted(group, ApplyMismatch, batch_entry(group, base_offset=offset, epoch=1))
    assert group.state.apply(batch_entry(group, base_offset=2, epoch=1)) == 2


def test_a_leader_epoch_other_than_the_term_halts(group: Group) -> None:
    for epoch in (0, 2, -1):
        halted(group, ApplyMismatch, batch_entry(group, base_offset=0, epoch=epoch))


def test_a_skipped_or_repeated_entry_halts(group: Group) -> None:
    group.produce(2)
    for index in (1, 3, 0):
        halted(group, ApplyMismatch, batch_entry(group, base_offset=2, epoch=1, index=index))


def test_a_batch_that_the_leader_should_have_refused_halts(group: Group) -> None:
    ids = {"producer_id": 7, "producer_epoch": 1}
    group.produce(2, 7, 1, 0)
    for wrong in (
        ids | {"base_sequence": 0},
        ids | {"base_sequence": 5},
        ids | {"base_sequence": 2, "producer_epoch": 0},
        ids | {"base_sequence": 2, "producer_id": 8},
    ):
        halted(group, ApplyMismatch, batch_entry(group, base_offset=2, epoch=1, **wrong))
    assert group.produce(2, 7, 1, 2) == 2


@pytest.mark.parametrize(
    "payload",
    [
        msgspec.msgpack.encode([99, 1]),
        msgspec.msgpack.encode([1, 2, 5]),
        msgspec.msgpack.encode([1, 1]),
        msgspec.msgpack.encode([1, 1, 5, 6]),
        msgspec.msgpack.encode([1, 1, "5"]),
        msgspec.msgpack.encode([1]),
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode([[1], 1, 5]),
        msgspec.msgpack.encode({"type": 1}),
        b"",
        b"\xc1garbage",
    ],
)
def test_an_unknown_command_halts_and_is_never_skipped(group: Group, payload: bytes) -> None:
    entry = Entry.create(0, FrameKind.COMMAND, 1, 1, 0, payload)
    assert "partition" in halted(group, UnknownCommand, entry)


def test_an_unknown_kind_of_entry_halts(group: Group) -> None:
    halted(group, UnknownCommand, Entry.create(0, 9, 1, 1, 0, b""))


@pytest.mark.parametrize("command", [SetLogStart(2**40), ExpireProducers(12)])
def test_commands_are_arrays_of_type_version_and_fields(command: Command) -> None:
    encoded = encode_command(command)
    assert decode_command(memoryview(encoded)) == command
    assert msgspec.msgpack.decode(encoded) == [command.type, 1, *msgspec.structs.astuple(command)]


# -- copies and snapshots ------------------------------------------------------------------------------------


def test_a_copy_is_independent(group: Group) -> None:
    group.produce(2, 7, 0, 0)
    copied = group.state.copy()
    before = copied.snapshot()
    group.produce(2, 7, 0, 2)
    group.produce(2, 8, 0, 0)
    group.command(SetLogStart(1))
    assert copied.snapshot() == before
    assert copied != group.state


def test_snapshots_of_other_versions_are_refused() -> None:
    snapshot = PartitionState().snapshot()
    fields = msgspec.msgpack.decode(snapshot)
    for wrong in ([fields[0] + 1, *fields[1:]], [1], [*fields, 0], [], {"version": 1}):
        with pytest.raises(UnknownSnapshot):
            PartitionState.restore(msgspec.msgpack.encode(wrong))
    with pytest.raises(UnknownSnapshot):
        PartitionState.restore(snapshot[:-1])
    with pytest.raises(UnknownSnapshot):
        PartitionState.restore(b"")


steps = st.one_of(
    st.tuples(
        st.just("produce"),
        st.integers(1, 4),
        st.integers(-1, 3),
        st.integers(0, 2),
        st.integers(0, 12),
    ),
    st.tuples(st.just("start"), st.integers(-1, 40)),
    st.tuples(st.just("expire"), st.integers(1_000_000, 1_000_040)),
    st.tuples(st.just("noop")),
    st.tuples(st.just("time"), st.integers(0, 5)),
)


@settings(max_examples=200, deadline=None)
@given(script=st.lists(steps, max_size=40), at=st.integers(0, 40), producers_max=st.integers(1, 3))
def test_replay_through_a_snapshot_gives_an_equal_state(
    script: list[tuple[object, ...]], at: int, producers_max: int
) -> None:
    limit = PartitionState.PRODUCERS_MAX
    PartitionState.PRODUCERS_MAX = producers_max
    try:
        group = Group()
        for step in script:
            run_step(group, step)
        replayed, restored = group.replay(), group.replay(snapshot_at=at)
    finally:
        PartitionState.PRODUCERS_MAX = limit
    assert replayed == restored == group.state == group.state.copy()
    assert list(restored.producers) == list(group.state.producers), "eviction would diverge"
    assert restored.next_offset == group.state.next_offset


def run_step(group: Group, step: tuple[object, ...]) -> None:
    match step:
        case ("produce", int(count), int(pid), int(epoch), int(seq)):
            identity = (pid, epoch, seq) if pid >= 0 else (-1, -1, -1)
            known = group.state.producers.get(pid)
            end = group.state.next_offset
            try:
                outcome = group.produce(count, *identity)
            except RaftlogError:
                assert group.state.next_offset == end
                assert group.state.producers.get(pid) is known
                return
            if isinstance(outcome, Duplicate):
                assert outcome.base_offset + count <= end
                assert group.state.next_offset == end
            else:
                assert (outcome, group.state.next_offset) == (end, end + count)
        case ("start", int(offset)):
            group.command(SetLogStart(offset))
        case ("expire", int(before_ms)):
            group.command(ExpireProducers(before_ms))
        case ("noop",):
            group.append(FrameKind.NOOP, b"")
        case ("time", int(passed_ms)):
            group.now_ms += passed_ms
