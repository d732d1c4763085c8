"""The groups state machine: what each command does, when it is refused, and equal states after replay."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftlog.errors import (
    GroupNotEmpty,
    InvalidTransaction,
    ProducerFenced,
    RaftlogError,
    StaleCoordinator,
    UnknownGroup,
    UnstableOffsets,
    to_wire,
)
from raftlog.raft.types import Entry
from raftlog.record.frame import FrameKind
from raftlog.state.command import ApplyMismatch, UnknownCommand, UnknownSnapshot
from raftlog.state.groups import (
    CODEC,
    Assignment,
    ChangeGroup,
    Command,
    DeleteGroup,
    EndOffsets,
    ExpireProducers,
    GroupsState,
    Member,
    MemberState,
    NewOffset,
    PutOffsets,
    RemoveOffsets,
    StageOffsets,
    assignment_of,
    keys_of,
)

T, U = b"t" * 16, b"u" * 16
PRODUCER = 7


class Groups:
    """A ``__groups`` partition in miniature: ``state`` is what its leader stages."""

    def __init__(self) -> None:
        self.state = GroupsState()
        self.entries: list[Entry] = []
        self.time_ms = 1000

    def do(self, command: Command) -> object:
        """Apply the command; what the leader's check says must be what apply does."""
        refusal = self.state.check(command)
        before = self.state.copy()
        result = self.append(FrameKind.COMMAND, CODEC.encode(command))
        if refusal is None:
            assert not isinstance(result, RaftlogError)
        else:
            assert isinstance(result, RaftlogError)
            assert to_wire(result) == to_wire(refusal)
            before.applied_index += 1
            assert self.state == before, "a refused command changes nothing"
        self.state.check_invariants()
        return result

    def append(self, kind: int, payload: bytes) -> object:
        entry = Entry.create(0, kind, 1, self.state.applied_index + 1, self.time_ms, payload)
        result = self.state.apply(entry)
        self.entries.append(entry)
        return result

    def replay(self, snapshot_at: int | None = None) -> GroupsState:
        state = GroupsState()
        for position, entry in enumerate(self.entries):
            if position == snapshot_at:
                state = GroupsState.restore(state.snapshot())
            state.apply(entry)
        return state

    def committed(self, group_id: str = "g") -> dict[tuple[bytes, int], int]:
        return {key: each.offset for key, each in self.state.offsets.get(group_id, {}).items()}


def offset(partition: int, position: int, topic_id: bytes = T) -> NewOffset:
    return NewOffset(topic_id, partition, position)


def put(*offsets: NewOffset, group_id: str = "g") -> PutOffsets:
    return PutOffsets(group_id, offsets)


def stage(epoch: int, *offsets: NewOffset, producer_id: int = PRODUCER, group_id: str = "g") -> StageOffsets:
    return StageOffsets(group_id, producer_id, epoch, offsets)


def end(epoch: int, commit: bool, coordinator_epoch: int = 1, producer_id: int = PRODUCER) -> EndOffsets:
    return EndOffsets(producer_id, epoch, coordinator_epoch, commit)


def member(name: str, epoch: int = 1, revision: int = 1, assigned: Assignment | None = None) -> Member:
    held = assigned or {}
    return Member(name, "c", "h", ("t",), 1000, 1000, epoch, 0, revision, assigned=held, target=held)


def change(epoch: int, *members: Member, removed: tuple[str, ...] = ()) -> ChangeGroup:
    return ChangeGroup("g", epoch, "uniform", {"t": (T, 4)}, 1, members, removed)


# -- assignments ---------------------------------------------------------------------------------------------


@given(st.sets(st.tuples(st.sampled_from([T, U]), st.integers(0, 9))))
def test_an_assignment_is_the_sum_of_its_partitions_in_order(keys: set[tuple[bytes, int]]) -> None:
    assignment = assignment_of(keys)
    assert list(keys_of(assignment)) == sorted(keys)
    assert all(assignment.values())


# -- members -------------------------------------------------------------------------------------------------


def test_a_change_makes_the_group_puts_members_and_removes_them() -> None:
    groups = Groups()
    groups.do(change(1, member("a", assigned={T: (0, 1)})))
    group = groups.state.groups["g"]
    assert (group.epoch, group.assignor, group.topics) == (1, "uniform", {"t": (T, 4)})
    assert group.empty_since_ms == 0
    groups.do(ChangeGroup("g", 2, "sticky", None, 1, (member("b", 2),)))
    group = groups.state.groups["g"]
    assert (group.epoch, group.assignor, list(group.members)) == (2, "sticky", ["a", "b"])
    assert group.topics == {"t": (T, 4)}, "None leaves the topics as they were"
    groups.time_ms = 5000
    groups.do(change(3, removed=("a", "b")))
    group = groups.state.groups["g"]
    assert (group.epoch, group.members, group.empty_since_ms) == (3, {}, 5000)
    groups.time_ms = 6000
    groups.do(change(4))
    assert groups.state.groups["g"].empty_since_ms == 5000, "empty since then, still"
    groups.do(change(5, member("a", 5)))
    assert groups.state.groups["g"].empty_since_ms == 0


@pytest.mark.parametrize(
    "bad",
    [
        change(1),
        change(2, member("a", 1, 2)),
        change(2, member("a", 2, 1)),
        change(2, member("b", 3)),
    ],
    ids=["group goes back", "member goes back", "revision goes back", "member ahead of its group"],
)
def test_a_change_that_turns_time_back_halts_the_replica(bad: ChangeGroup) -> None:
    groups = Groups()
    groups.do(change(2, member("a", 2, 2)))
    before = groups.state.copy()
    with pytest.raises(ApplyMismatch):
        groups.append(FrameKind.COMMAND, CODEC.encode(bad))
    assert groups.state == before


def test_epochs_go_on_where_a_group_of_the_same_name_ended() -> None:
    groups = Groups()
    groups.do(change(41, member("a", 41)))
    groups.do(change(42, removed=("a",)))
    groups.do(DeleteGroup("g"))
    groups.do(put(offset(0, 1)))
    assert groups.state.groups["g"].epoch == 42
    with pytest.raises(ApplyMismatch):
        groups.do(change(1, member("a", 1)))


BROKEN: dict[str, Callable[[], tuple[Member, ...]]] = {
    "two hold one partition": lambda: (
        member("a", assigned={T: (0,)}),
        msgspec.structs.replace(member("b"), assigned={T: (0,)}),
    ),
    "held by one, given up by another": lambda: (
        member("a", assigned={T: (0,)}),
        msgspec.structs.replace(member("b"), revoking={T: (0,)}, state=MemberState.UNREVOKED),
    ),
    "two are to hold one partition": lambda: (
        msgspec.structs.replace(member("a", 0), target={T: (0,)}),
        msgspec.structs.replace(member("b", 0), target={T: (0,)}),
    ),
    "revoking, and yet stable": lambda: (msgspec.structs.replace(member("a"), revoking={T: (0,)}),),
    "stable without its target": lambda: (msgspec.structs.replace(member("a"), target={T: (0,)}),),
    "a target of a topic that is not there": lambda: (
        msgspec.structs.replace(member("a", 0), target={U: (0,)}),
    ),
}


@pytest.mark.parametrize("members", BROKEN.values(), ids=BROKEN.keys())
def test_check_invariants_can_fail(members: Callable[[], tuple[Member, ...]]) -> None:
    groups = Groups()
    groups.append(FrameKind.COMMAND, CODEC.encode(change(1, *members())))
    with pytest.raises(AssertionError):
        groups.state.check_invariants()


# -- offsets -------------------------------------------------------------------------------------------------


def test_offsets_keep_what_came_with_them() -> None:
    groups = Groups()
    groups.do(PutOffsets("g", (NewOffset(T, 3, 17, 4, "m"), NewOffset(U, 0, 1))))
    known = groups.state.offsets["g"][T, 3]
    assert (known.offset, known.leader_epoch, known.metadata, known.time_ms) == (17, 4, "m", 1000)
    assert groups.state.groups["g"].empty_since_ms == 1000
    groups.do(put(offset(3, 2)))
    assert groups.committed() == {(T, 3): 2, (U, 0): 1}, "an offset may go back"


def test_removing_offsets_counts_those_that_were_there() -> None:
    groups = Groups()
    groups.do(put(offset(0, 5), offset(1, 6)))
    assert groups.do(RemoveOffsets("g", ((T, 0), (T, 7)))) == 1
    assert groups.committed() == {(T, 1): 6}
    assert groups.do(RemoveOffsets("g", ((T, 1),))) == 1
    assert groups.state.offsets == {}
    assert groups.do(RemoveOffsets("nobody", ((T, 1),))) == 0


def test_a_group_is_deleted_with_its_offsets_once_it_has_no_members() -> None:
    groups = Groups()
    assert isinstance(groups.do(DeleteGroup("g")), UnknownGroup)
    groups.do(put(offset(0, 5)))
    groups.do(change(1, member("a")))
    refused = groups.do(DeleteGroup("g"))
    assert isinstance(refused, GroupNotEmpty)
    assert refused.members == ["a"]
    groups.do(change(2, removed=("a",)))
    groups.do(DeleteGroup("g"))
    assert groups.state.groups == groups.state.offsets == {}


# -- offsets of transactions ---------------------------------------------------------------------------------


def test_offsets_of_a_transaction_show_only_after_its_marker() -> None:
    groups = Groups()
    groups.do(put(offset(0, 1)))
    groups.do(stage(3, offset(0, 10)))
    groups.do(stage(3, offset(1, 20), offset(0, 11)))
    assert groups.committed() == {(T, 0): 1}
    assert groups.state.pending_keys("g") == {(T, 0), (T, 1)}
    assert groups.state.pending_keys("other") == set()
    groups.time_ms = 2000
    assert groups.do(end(3, commit=True)) is True
    assert groups.committed() == {(T, 0): 11, (T, 1): 20}
    assert groups.state.offsets["g"][T, 0].time_ms == 2000, "committed when the marker came"
    assert groups.state.pending_keys("g") == set()


def test_an_abort_drops_them() -> None:
    groups = Groups()
    groups.do(put(offset(0, 1)))
    groups.do(stage(3, offset(0, 10)))
    assert groups.do(end(3, commit=False)) is True
    assert groups.committed() == {(T, 0): 1}
    assert groups.state.pending == {}


def test_a_marker_ends_all_groups_of_its_producer_and_no_other_producer() -> None:
    groups = Groups()
    groups.do(stage(3, offset(0, 10), group_id="g"))
    groups.do(stage(3, offset(0, 20), group_id="h"))
    groups.do(stage(3, offset(0, 30), group_id="i", producer_id=8))
    groups.do(end(3, commit=True))
    assert groups.committed("g") == {(T, 0): 10}
    assert groups.committed("h") == {(T, 0): 20}
    assert groups.committed("i") == {}
    assert groups.state.pending_keys("i") == {(T, 0)}


def test_of_two_commits_the_later_one_holds_wherever_the_marker_comes() -> None:
    groups = Groups()
    groups.do(stage(3, offset(0, 10), offset(1, 10)))
    groups.do(put(offset(0, 99)))
    groups.do(end(3, commit=True))
    assert groups.committed() == {(T, 0): 99, (T, 1): 10}


OPEN, COMMITTED, ABORTED, NOTHING = "open", "committed", "aborted", "nothing"


def in_state(state: str) -> Groups:
    groups = Groups()
    if state != NOTHING:
        groups.do(stage(5, offset(0, 10)))
    if state in (COMMITTED, ABORTED):
        groups.do(end(5, state == COMMITTED, coordinator_epoch=4))
    return groups


ENDS = [
    # state, epoch, commit, result
    *((state, 4, commit, ProducerFenced) for state in (OPEN, COMMITTED, ABORTED) for commit in (True, False)),
    (OPEN, 5, True, True),
    (OPEN, 5, False, True),
    (OPEN, 6, True, InvalidTransaction),
    (OPEN, 6, False, True),
    (COMMITTED, 5, True, False),
    (COMMITTED, 5, False, InvalidTransaction),
    (ABORTED, 5, True, InvalidTransaction),
    (ABORTED, 5, False, False),
    *((state, 6, commit, True) for state in (COMMITTED, ABORTED) for commit in (True, False)),
    *((NOTHING, epoch, commit, True) for epoch in (4, 5, 6) for commit in (True, False)),
]


@pytest.mark.parametrize(("state", "epoch", "commit", "result"), ENDS)
def test_end_is_idempotent_and_the_opposite_outcome_is_refused(
    state: str, epoch: int, commit: bool, result: bool | type[RaftlogError]
) -> None:
    groups = in_state(state)
    before = groups.committed()
    found = groups.do(end(epoch, commit, coordinator_epoch=4))
    if isinstance(result, bool):
        assert found is result
        assert groups.state.pending == {}
        assert groups.state.ended[PRODUCER].epoch == epoch
        if state == OPEN:
            assert groups.committed() == ({(T, 0): 10} if commit else {})
        else:
            assert groups.committed() == before
    else:
        assert isinstance(found, result)


@pytest.mark.parametrize("state", [OPEN, COMMITTED, ABORTED])
@pytest.mark.parametrize("epoch", [4, 5, 6])
def test_a_late_stage_touches_no_other_transaction(state: str, epoch: int) -> None:
    groups = in_state(state)
    found = groups.do(stage(epoch, offset(0, 66)))
    if epoch == 4:
        assert isinstance(found, ProducerFenced)
    elif state == OPEN and epoch == 5:
        assert found is None
    elif state == OPEN or epoch == 5:
        assert isinstance(found, InvalidTransaction), "not ended yet, or ended"
    else:
        assert found is None
        assert groups.state.pending[PRODUCER].epoch == 6


def test_a_stage_after_its_marker_does_not_hang_though_the_marker_found_nothing() -> None:
    groups = Groups()
    groups.do(end(5, commit=False))
    assert isinstance(groups.do(stage(5, offset(0, 10))), InvalidTransaction)
    assert isinstance(groups.do(stage(4, offset(0, 10))), ProducerFenced)
    assert groups.state.pending == {}


@pytest.mark.parametrize("state", [OPEN, COMMITTED])
def test_a_stale_coordinators_marker_is_refused(state: str) -> None:
    groups = in_state(COMMITTED)
    if state == OPEN:
        groups.do(stage(6, offset(0, 20)))
    for commit in (True, False):
        assert isinstance(groups.do(end(6, commit, coordinator_epoch=3)), StaleCoordinator)
    assert groups.do(end(6, commit=True, coordinator_epoch=4)) is True


def test_what_a_transaction_holds_is_neither_removed_nor_deleted() -> None:
    groups = Groups()
    groups.do(put(offset(0, 1), offset(1, 1)))
    groups.do(stage(3, offset(0, 10)))
    assert isinstance(groups.do(RemoveOffsets("g", ((T, 0), (T, 1)))), UnstableOffsets)
    assert groups.do(RemoveOffsets("g", ((T, 1),))) == 1
    assert isinstance(groups.do(DeleteGroup("g")), UnstableOffsets)
    groups.do(end(3, commit=False))
    groups.do(DeleteGroup("g"))


def test_ends_are_forgotten_by_time_and_above_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupsState, "PRODUCERS_MAX", 3)
    groups = Groups()
    for producer_id in (1, 2, 3):
        groups.time_ms += 10
        groups.do(end(0, commit=True, producer_id=producer_id))
    groups.time_ms += 10
    groups.do(end(1, commit=True, producer_id=1))
    groups.do(end(0, commit=True, producer_id=4))
    assert list(groups.state.ended) == [3, 1, 4], "2 was the one of longest ago"
    assert groups.do(ExpireProducers(groups.time_ms)) == 1
    assert list(groups.state.ended) == [1, 4]


# -- the log -------------------------------------------------------------------------------------------------


def test_entries_come_in_order_and_other_kinds_halt() -> None:
    groups = Groups()
    groups.append(FrameKind.NOOP, b"")
    with pytest.raises(ApplyMismatch):
        groups.state.apply(Entry.create(0, FrameKind.NOOP, 1, 3, 1000, b""))
    with pytest.raises(UnknownCommand):
        groups.append(FrameKind.BATCH, b"")
    with pytest.raises(UnknownCommand):
        groups.append(FrameKind.COMMAND, msgspec.msgpack.encode([99, 1]))
    assert groups.state.applied_index == 1


def test_a_snapshot_of_another_version_halts() -> None:
    state = msgspec.msgpack.decode(GroupsState().snapshot())
    with pytest.raises(UnknownSnapshot):
        GroupsState.restore(msgspec.msgpack.encode([99, *state[1:]]))
    with pytest.raises(UnknownSnapshot):
        GroupsState.restore(b"\xc1")


names = st.sampled_from(["g", "h"])
positions = st.lists(
    st.builds(NewOffset, st.sampled_from([T, U]), st.integers(0, 2), st.integers(0, 99)),
    min_size=1,
    max_size=3,
).map(tuple)
producers = st.integers(0, 2)
epochs = st.integers(0, 3)
commands: st.SearchStrategy[Command] = st.one_of(
    st.builds(PutOffsets, names, positions),
    st.builds(StageOffsets, names, producers, epochs, positions),
    st.builds(EndOffsets, producers, epochs, st.integers(0, 2), st.booleans()),
    st.builds(RemoveOffsets, names, st.just(((T, 0), (U, 1)))),
    st.builds(DeleteGroup, names),
    st.builds(ExpireProducers, st.integers(1000, 1100)),
)


@settings(deadline=None)
@given(st.lists(st.tuples(commands, st.integers(0, 20)), max_size=40), st.data())
def test_replay_copies_and_snapshots_give_the_same_state(
    steps: list[tuple[Command, int]], data: st.DataObject
) -> None:
    groups = Groups()
    copied_at = data.draw(st.integers(0, len(steps)))
    copy: GroupsState | None = None
    image = b""
    for position, (command, later_ms) in enumerate(steps):
        if position == copied_at:
            copy, image = groups.state.copy(), groups.state.snapshot()
        groups.time_ms += later_ms
        groups.do(command)
    assert groups.replay() == groups.state
    assert groups.replay(data.draw(st.integers(0, len(steps)))) == groups.state
    assert GroupsState.restore(groups.state.snapshot()) == groups.state
    if copy is not None:
        assert copy.snapshot() == image, "a copy is independent"
        for entry in groups.entries[copied_at:]:
            copy.apply(entry)
        assert copy == groups.state
