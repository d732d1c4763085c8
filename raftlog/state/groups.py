"""The state machine of one ``__groups`` partition: consumer groups, their members and committed offsets.

The leader decides (``raftlog.broker.groups``) and logs what it decided; apply only writes it down: no
assignor runs here, no clock, no view of the topics. One heartbeat's decision is one command, so that a crash
never leaves half of it.

A partition is *held* by a member that has it in ``assigned``, or in ``revoking`` until the member says that
it has let go. No two members of a group hold the same partition, ever (:meth:`GroupsState.check_invariants`).

Offsets of a transaction are ``pending`` until its marker (:class:`EndOffsets`) makes them visible or drops
them. What ended is remembered, so that nothing of a transaction that comes after its marker has an effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import ClassVar, Final, TypeAlias

import msgspec

from raftlog.errors import (
    GroupNotEmpty,
    InvalidTransaction,
    ProducerFenced,
    RaftlogError,
    StaleCoordinator,
    UnknownGroup,
    UnstableOffsets,
)
from raftlog.raft.types import Entry
from raftlog.record.frame import Buffer, FrameKind
from raftlog.state.command import (
    ApplyMismatch,
    CommandCodec,
    CommandStruct,
    SnapshotStruct,
    UnknownCommand,
    decode_snapshot,
)

_SNAPSHOT_VERSION: Final = 1

Assignment: TypeAlias = dict[bytes, tuple[int, ...]]
"""topic id -> partitions, both ascending, none empty; never changed in place."""
Key: TypeAlias = tuple[bytes, int]
"""(topic id, partition)."""


def keys_of(assignment: Assignment) -> Iterator[Key]:
    """The partitions of an assignment, one by one."""
    for topic_id, partitions in assignment.items():
        for partition in partitions:
            yield topic_id, partition


def assignment_of(keys: Iterable[Key]) -> Assignment:
    """The assignment that consists of these partitions."""
    found: dict[bytes, list[int]] = {}
    for topic_id, partition in sorted(keys):
        found.setdefault(topic_id, []).append(partition)
    return {topic_id: tuple(partitions) for topic_id, partitions in found.items()}


# -- what a group consists of --------------------------------------------------------------------------------


class MemberState(IntEnum):
    """Where a member is on the way to its target (KIP-848)."""

    STABLE = 0
    """It holds what the target of its epoch gives it."""
    UNREVOKED = 1
    """It was told to give up ``revoking`` and has not said yet that it did."""
    UNRELEASED = 2
    """It has given up what it had to, and waits for partitions that others still hold."""


class Member(msgspec.Struct, frozen=True, array_like=True):
    member_id: str
    client_id: str
    host: str
    topics: tuple[str, ...]
    """Names it subscribes to, ascending."""
    session_timeout_ms: int
    rebalance_timeout_ms: int
    epoch: int = 0
    """The group's epoch whose target it has moved to; commits of offsets name it. It only grows."""
    previous_epoch: int = 0
    """The epoch before, which a member that lost the last answer still names."""
    revision: int = 0
    """Number of the assignment, raised with every change of ``assigned``."""
    state: MemberState = MemberState.STABLE
    assigned: Assignment = {}
    revoking: Assignment = {}
    target: Assignment = {}
    """What it should hold, as computed for the group's epoch."""

    def holds(self, key: Key) -> bool:
        """Whether nobody else may have this partition now."""
        topic_id, partition = key
        return partition in self.assigned.get(topic_id, ()) or partition in self.revoking.get(topic_id, ())


class Group(msgspec.Struct, frozen=True, array_like=True):
    group_id: str
    epoch: int
    """Raised whenever members, subscriptions or partitions of their topics change; every target is that of
    this epoch."""
    assignor: str = ""
    topics: dict[str, tuple[bytes, int]] = {}
    """Subscribed topics that exist: name -> (topic id, partitions), as the targets were computed for."""
    topics_version: int = 0
    """Version of the metadata that ``topics`` is from; an older image is not believed."""
    members: dict[str, Member] = {}
    empty_since_ms: int = 0
    """Leader time at which the last member left, or the group was made without any; 0: it has members."""

    def changed(self, change: ChangeGroup, time_ms: int) -> Group:
        """The group after a change at this leader time (ms)."""
        members = {name: member for name, member in self.members.items() if name not in change.removed}
        members.update({member.member_id: member for member in change.members})
        return Group(
            self.group_id,
            change.epoch,
            change.assignor,
            self.topics if change.topics is None else change.topics,
            change.topics_version,
            members,
            0 if members else self.empty_since_ms or time_ms,
        )


class Offset(msgspec.Struct, frozen=True, array_like=True):
    """A committed position."""

    offset: int
    leader_epoch: int
    metadata: str
    time_ms: int
    """Leader time of the commit."""
    index: int
    """Of the entry that brought it: of two commits the later one holds, wherever a marker comes."""


class Pending(msgspec.Struct, frozen=True, array_like=True):
    """Offsets of a producer's open transaction."""

    epoch: int
    offsets: dict[tuple[str, bytes, int], Offset]
    """By (group id, topic id, partition)."""


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """How a producer's last transaction ended here."""

    epoch: int
    coordinator_epoch: int
    commit: bool
    time_ms: int


# -- commands ------------------------------------------------------------------------------------------------


class ChangeGroup(CommandStruct, frozen=True):
    """Everything that one decision changes of a group's members; makes the group if there is none."""

    type = 1
    group_id: str
    epoch: int
    assignor: str
    topics: dict[str, tuple[bytes, int]] | None
    """None: as before."""
    topics_version: int
    members: tuple[Member, ...]
    """New ones and changed ones, whole."""
    removed: tuple[str, ...] = ()


class NewOffset(msgspec.Struct, frozen=True, array_like=True):
    """A position to commit."""

    topic_id: bytes
    partition: int
    offset: int
    leader_epoch: int = -1
    metadata: str = ""


class PutOffsets(CommandStruct, frozen=True):
    """Commit offsets; makes the group if there is none."""

    type = 2
    group_id: str
    offsets: tuple[NewOffset, ...]


class StageOffsets(CommandStruct, frozen=True):
    """Keep offsets for the end of a transaction; makes the group if there is none."""

    type = 3
    group_id: str
    producer_id: int
    epoch: int
    offsets: tuple[NewOffset, ...]


class EndOffsets(CommandStruct, frozen=True):
    """The marker: the producer's transaction of this epoch has ended, in all groups here; an abort also ends
    one of an epoch below. Result: True; False if it was known already."""

    type = 4
    producer_id: int
    epoch: int
    coordinator_epoch: int
    commit: bool


class RemoveOffsets(CommandStruct, frozen=True):
    """Forget committed offsets. Result: how many there were."""

    type = 5
    group_id: str
    keys: tuple[Key, ...]


class DeleteGroup(CommandStruct, frozen=True):
    """Forget a group and its offsets."""

    type = 6
    group_id: str


class ExpireProducers(CommandStruct, frozen=True):
    """Forget the ends of transactions with a leader time below ``before_ms``. Result: how many."""

    type = 7
    before_ms: int


Command: TypeAlias = (
    ChangeGroup | PutOffsets | StageOffsets | EndOffsets | RemoveOffsets | DeleteGroup | ExpireProducers
)

CODEC: Final[CommandCodec[Command]] = CommandCodec(
    "groups", ChangeGroup, PutOffsets, StageOffsets, EndOffsets, RemoveOffsets, DeleteGroup, ExpireProducers
)


class _Snapshot(SnapshotStruct, frozen=True):
    applied_index: int
    epoch_floor: int
    groups: list[Group]
    offsets: list[tuple[str, list[tuple[bytes, int, Offset]]]]
    pending: list[tuple[int, int, list[tuple[str, bytes, int, Offset]]]]
    ended: list[tuple[int, Ended]]
    """In order of time: the order is state, since it decides whom eviction takes."""


class GroupsState:
    """The groups of a partition after the entry at ``applied_index``.

    ``groups`` maps group id to Group; ``offsets`` group id to the positions by (topic id, partition), for
    groups that have any; ``pending`` and ``ended`` are by producer id. All below the dicts is immutable.
    """

    codec: ClassVar[CommandCodec[Command]] = CODEC
    PRODUCERS_MAX: ClassVar[int] = 100_000
    """Above this the end that is longest ago is forgotten. Part of the state machine: to change it takes a
    new feature level."""

    __slots__ = ("applied_index", "ended", "epoch_floor", "groups", "offsets", "pending")

    def __init__(self) -> None:
        self.applied_index = 0
        self.epoch_floor = 0
        """No group that is made from now on has an epoch up to this: a group that was deleted and comes
        again does not repeat epochs."""
        self.groups: dict[str, Group] = {}
        self.offsets: dict[str, dict[Key, Offset]] = {}
        self.pending: dict[int, Pending] = {}
        self.ended: dict[int, Ended] = {}

    # -- look up ---------------------------------------------------------------------------------------------

    def group(self, group_id: str) -> Group:
        """The group of that name.

        Raises:
            UnknownGroup: there is none.
        """
        found = self.groups.get(group_id)
        if found is None:
            raise UnknownGroup(f"no group {group_id!r}", group=group_id)
        return found

    def pending_keys(self, group_id: str) -> set[Key]:
        """The partitions of a group whose offsets an open transaction holds."""
        return {
            (topic_id, partition)
            for pending in self.pending.values()
            for owner, topic_id, partition in pending.offsets
            if owner == group_id
        }

    # -- decide (leader, on its staged state) ----------------------------------------------------------------

    def check(self, command: Command) -> RaftlogError | None:
        """Why the command would be refused in this state, or None. The leader asks before it proposes."""
        if isinstance(command, StageOffsets):
            return self._check_stage(command.producer_id, command.epoch)
        if isinstance(command, EndOffsets):
            return self._check_end(command)
        if isinstance(command, DeleteGroup):
            return self._check_delete(command.group_id)
        if isinstance(command, RemoveOffsets):
            pending = self.pending_keys(command.group_id).intersection(command.keys)
            return _unstable(command.group_id, pending) if pending else None
        return None

    def is_ended(self, command: EndOffsets) -> bool:
        """Whether this marker has been here: nothing to do, and no refusal."""
        ended = self.ended.get(command.producer_id)
        return ended is not None and ended.epoch == command.epoch and ended.commit == command.commit

    def _check_stage(self, producer_id: int, epoch: int) -> RaftlogError | None:
        ended, pending = self.ended.get(producer_id), self.pending.get(producer_id)
        newest = max(ended.epoch if ended else -1, pending.epoch if pending else -1)
        if epoch < newest:
            return ProducerFenced(f"producer {producer_id} is at epoch {newest}, not {epoch}")
        if ended is not None and epoch == ended.epoch:
            return InvalidTransaction(f"the transaction of producer {producer_id}, epoch {epoch}, has ended")
        if pending is not None and epoch > pending.epoch:
            return InvalidTransaction(
                f"the transaction of producer {producer_id}, epoch {pending.epoch}, has not ended yet"
            )
        return None

    def _check_end(self, command: EndOffsets) -> RaftlogError | None:
        producer_id, epoch = command.producer_id, command.epoch
        ended, pending = self.ended.get(producer_id), self.pending.get(producer_id)
        if ended is not None and command.coordinator_epoch < ended.coordinator_epoch:
            return StaleCoordinator(
                f"a coordinator of epoch {ended.coordinator_epoch} has ended transactions of producer "
                f"{producer_id}; this one is of epoch {command.coordinator_epoch}",
                epoch=ended.coordinator_epoch,
            )
        newest = max(ended.epoch if ended else -1, pending.epoch if pending else -1)
        if epoch < newest:
            return ProducerFenced(f"producer {producer_id} is at epoch {newest}, not {epoch}")
        if pending is not None and command.commit and epoch != pending.epoch:
            return InvalidTransaction(
                f"commit of epoch {epoch} of producer {producer_id} meets its transaction of epoch "
                f"{pending.epoch}, which has not ended yet"
            )
        if ended is not None and epoch == ended.epoch and command.commit != ended.commit:
            return InvalidTransaction(
                f"the transaction of producer {producer_id}, epoch {epoch}, "
                f"has {'committed' if ended.commit else 'aborted'}"
            )
        return None

    def _check_delete(self, group_id: str) -> RaftlogError | None:
        group = self.groups.get(group_id)
        if group is None:
            return UnknownGroup(f"no group {group_id!r}", group=group_id)
        if group.members:
            return GroupNotEmpty(
                f"group {group_id!r} has {len(group.members)} members", members=sorted(group.members)
            )
        pending = self.pending_keys(group_id)
        return _unstable(group_id, pending) if pending else None

    # -- apply (every replica) -------------------------------------------------------------------------------

    def apply(self, entry: Entry) -> object:
        """Apply the entry after ``applied_index``.

        Returns:
            A command's result (see the commands), or the RaftlogError with which it was refused (state
            unchanged); None for other entries.

        Raises:
            ApplyMismatch, UnknownCommand: the replica must halt; the state is as before.
        """
        if entry.index != self.applied_index + 1:
            raise ApplyMismatch(f"entry {entry.index} does not follow {self.applied_index}")
        result: object = None
        if entry.kind == FrameKind.COMMAND:
            result = self._apply_command(CODEC.decode(entry.payload), entry)
        elif entry.kind not in (FrameKind.NOOP, FrameKind.CONF):
            raise UnknownCommand(f"groups entry {entry.index} is of kind {entry.kind}")
        self.applied_index = entry.index
        return result

    def _apply_command(self, command: Command, entry: Entry) -> object:
        refusal = self.check(command)
        if refusal is not None:
            return refusal
        if isinstance(command, PutOffsets):
            self._put(command, entry)
        elif isinstance(command, ChangeGroup):
            self._change(command, entry.leader_time_ms)
        elif isinstance(command, StageOffsets):
            self._stage(command, entry)
        elif isinstance(command, EndOffsets):
            return self._end(command, entry.leader_time_ms)
        elif isinstance(command, RemoveOffsets):
            return self._remove(command)
        elif isinstance(command, DeleteGroup):
            self._delete(command.group_id)
        else:
            return self._expire(command.before_ms)
        return None

    def _change(self, change: ChangeGroup, time_ms: int) -> None:
        known = self.groups.get(change.group_id) or Group(change.group_id, self.epoch_floor)
        if change.epoch < known.epoch:
            raise ApplyMismatch(f"group {change.group_id!r} is at epoch {known.epoch}, not {change.epoch}")
        for member in change.members:
            before = known.members.get(member.member_id)
            if before is not None and (member.epoch < before.epoch or member.revision < before.revision):
                raise ApplyMismatch(f"member {member.member_id} of {change.group_id!r} goes back in time")
            if member.epoch > change.epoch:
                raise ApplyMismatch(f"member {member.member_id} of {change.group_id!r} is ahead of it")
        self.groups[change.group_id] = known.changed(change, time_ms)

    def _put(self, command: PutOffsets, entry: Entry) -> None:
        time_ms, index = entry.leader_time_ms, entry.index
        self._make(command.group_id, time_ms)
        offsets = self.offsets.setdefault(command.group_id, {})
        for new in command.offsets:
            offsets[new.topic_id, new.partition] = Offset(
                new.offset, new.leader_epoch, new.metadata, time_ms, index
            )

    def _make(self, group_id: str, time_ms: int) -> None:
        if group_id not in self.groups:
            self.groups[group_id] = Group(group_id, self.epoch_floor, empty_since_ms=time_ms)

    def _stage(self, command: StageOffsets, entry: Entry) -> None:
        self._make(command.group_id, entry.leader_time_ms)
        known = self.pending.get(command.producer_id)
        offsets = dict(known.offsets) if known is not None else {}
        for new in command.offsets:
            offsets[command.group_id, new.topic_id, new.partition] = Offset(
                new.offset, new.leader_epoch, new.metadata, entry.leader_time_ms, entry.index
            )
        self.pending[command.producer_id] = Pending(command.epoch, offsets)

    def _end(self, command: EndOffsets, time_ms: int) -> bool:
        producer_id = command.producer_id
        is_news = not self.is_ended(command)
        # an abort of a fencing epoch ends the transaction of the epoch below it, too
        pending = self.pending.pop(producer_id, None)
        if pending is not None and command.commit:
            for (group_id, topic_id, partition), new in pending.offsets.items():
                offsets = self.offsets.setdefault(group_id, {})
                known = offsets.get((topic_id, partition))
                if known is None or known.index < new.index:
                    offsets[topic_id, partition] = msgspec.structs.replace(new, time_ms=time_ms)
        # taken out and put in again, so that it moves to the end of the order
        if self.ended.pop(producer_id, None) is None and len(self.ended) >= self.PRODUCERS_MAX:
            del self.ended[next(iter(self.ended))]
        self.ended[producer_id] = Ended(command.epoch, command.coordinator_epoch, command.commit, time_ms)
        return is_news

    def _remove(self, command: RemoveOffsets) -> int:
        offsets = self.offsets.get(command.group_id, {})
        removed = sum(offsets.pop(key, None) is not None for key in command.keys)
        if not offsets:
            self.offsets.pop(command.group_id, None)
        return removed

    def _delete(self, group_id: str) -> None:
        self.epoch_floor = max(self.epoch_floor, self.groups.pop(group_id).epoch)
        self.offsets.pop(group_id, None)

    def _expire(self, before_ms: int) -> int:
        expired: list[int] = []
        for producer_id, ended in self.ended.items():
            if ended.time_ms >= before_ms:
                break
            expired.append(producer_id)
        for producer_id in expired:
            del self.ended[producer_id]
        return len(expired)

    # -- invariants ------------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Assert what must hold after every entry."""
        for group in self.groups.values():
            holders: dict[Key, str] = {}
            assert bool(group.members) != bool(group.empty_since_ms), group
            for name, member in group.members.items():
                assert name == member.member_id, (name, member)
                assert member.previous_epoch <= member.epoch <= group.epoch, (member, group.epoch)
                assert bool(member.revoking) == (member.state == MemberState.UNREVOKED), member
                assert not member.target.keys() - {topic_id for topic_id, _ in group.topics.values()}, member
                for assignment in (member.assigned, member.revoking):
                    for key in keys_of(assignment):
                        other = holders.setdefault(key, name)
                        assert other == name, f"{key} of {group.group_id!r} is held by {other} and {name}"
                assert not set(keys_of(member.assigned)).intersection(keys_of(member.revoking)), member
                if member.state == MemberState.STABLE and member.epoch == group.epoch:
                    assert member.assigned == member.target, member
            targets = [key for member in group.members.values() for key in keys_of(member.target)]
            assert len(targets) == len(set(targets)), f"targets of {group.group_id!r} overlap"
        assert self.offsets.keys() <= self.groups.keys()
        assert all(self.offsets.values()), "no group keeps an empty dict"
        for producer_id, pending in self.pending.items():
            ended = self.ended.get(producer_id)
            assert ended is None or ended.epoch < pending.epoch, (producer_id, pending, ended)
            assert {group_id for group_id, _, _ in pending.offsets} <= self.groups.keys(), pending

    # -- copies ----------------------------------------------------------------------------------------------

    def copy(self) -> GroupsState:
        """An independent copy; cheap, since what the dicts hold is immutable."""
        copied = type(self)()
        copied.applied_index = self.applied_index
        copied.epoch_floor = self.epoch_floor
        copied.groups = self.groups.copy()
        copied.offsets = {group_id: offsets.copy() for group_id, offsets in self.offsets.items()}
        copied.pending = self.pending.copy()
        copied.ended = self.ended.copy()
        return copied

    def snapshot(self) -> bytes:
        """The whole state, for :meth:`restore`."""
        state = _Snapshot(
            version=_SNAPSHOT_VERSION,
            applied_index=self.applied_index,
            epoch_floor=self.epoch_floor,
            groups=list(self.groups.values()),
            offsets=[
                (group_id, [(*key, offset) for key, offset in offsets.items()])
                for group_id, offsets in self.offsets.items()
            ],
            pending=[
                (producer_id, pending.epoch, [(*key, offset) for key, offset in pending.offsets.items()])
                for producer_id, pending in self.pending.items()
            ],
            ended=list(self.ended.items()),
        )
        return msgspec.msgpack.encode(state)

    @classmethod
    def restore(cls, data: Buffer) -> GroupsState:
        """The state that :meth:`snapshot` encoded.

        Raises:
            UnknownSnapshot: of another version, or not a snapshot.
        """
        state = decode_snapshot(data, _Snapshot, _SNAPSHOT_VERSION)
        restored = cls()
        restored.applied_index = state.applied_index
        restored.epoch_floor = state.epoch_floor
        restored.groups = {group.group_id: group for group in state.groups}
        restored.offsets = {
            group_id: {(topic_id, partition): offset for topic_id, partition, offset in offsets}
            for group_id, offsets in state.offsets
        }
        restored.pending = {
            producer_id: Pending(epoch, {(group, topic, part): offset for group, topic, part, offset in rows})
            for producer_id, epoch, rows in state.pending
        }
        restored.ended = dict(state.ended)
        return restored

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupsState) and self.snapshot() == other.snapshot()


def _unstable(group_id: str, keys: Iterable[Key]) -> UnstableOffsets:
    names = [f"{topic_id.hex()}:{partition}" for topic_id, partition in sorted(keys)[:3]]
    return UnstableOffsets(f"an open transaction holds offsets of group {group_id!r}: {', '.join(names)}")
