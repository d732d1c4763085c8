"""What a group coordinator decides about offsets: who may commit them, what a transaction holds back, when
nobody needs them any more. Pure functions; ``raftlog.broker.groups`` says what a host does with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from raftlog.errors import ConfigError, GroupNotEmpty, RaftlogError, StaleMember, UnstableOffsets
from raftlog.net.rpc import (
    LEAVE_EPOCH,
    NO_MEMBER,
    DeleteOffsetsRequest,
    Empty,
    GroupOffset,
    OffsetCommitRequest,
    OffsetFetchRequest,
    OffsetFetchResponse,
    StageOffsetsRequest,
)
from raftlog.state.groups import (
    Command,
    DeleteGroup,
    EndOffsets,
    ExpireProducers,
    GroupsState,
    Key,
    Member,
    NewOffset,
    Offset,
    PutOffsets,
    RemoveOffsets,
    StageOffsets,
)

NAME_MAX: Final = 249
OFFSET_METADATA_MAX: Final = 4_096
EMPTY: Final = Empty()

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Decision(Generic[A]):
    """What to log, and what to answer once it is committed."""

    commands: tuple[Command, ...]
    answer: A
    news: bool = True
    """The answer tells a member something that it does not know."""


def commit(staged: GroupsState, request: OffsetCommitRequest) -> Decision[Empty]:
    """Commit offsets.

    Raises:
        StaleMember: the member is out, at another epoch, or does not hold one of the partitions.
        GroupNotEmpty: NO_MEMBER, and the group has members.
        ConfigError: an offset below 0 or metadata that is too long.
    """
    new = _new_offsets(request.group_id, request.offsets)
    _check_member(staged, request.group_id, request.member_id, request.member_epoch, request.offsets)
    return Decision((PutOffsets(request.group_id, new),) if new else (), EMPTY)


def stage(staged: GroupsState, request: StageOffsetsRequest) -> Decision[Empty]:
    """Keep offsets for the end of a transaction.

    Raises:
        StaleMember, GroupNotEmpty, ConfigError: as :func:`commit`.
        ProducerFenced, InvalidTransaction: the producer's epoch is over.
    """
    new = _new_offsets(request.group_id, request.offsets)
    _check_member(staged, request.group_id, request.member_id, request.member_epoch, request.offsets)
    command = StageOffsets(request.group_id, request.producer_id, request.producer_epoch, new)
    raise_refusal(staged.check(command))
    return Decision((command,) if new else (), EMPTY)


def end(
    staged: GroupsState, producer_id: int, epoch: int, coordinator_epoch: int, commit: bool
) -> Decision[Empty]:
    """A marker: the producer's transaction has committed or aborted.

    Raises:
        StaleCoordinator, ProducerFenced, InvalidTransaction: it is too late, or contradicts the end.
    """
    command = EndOffsets(producer_id, epoch, coordinator_epoch, commit)
    raise_refusal(staged.check(command))
    return Decision(() if staged.is_ended(command) else (command,), EMPTY)


def fetch(machine: GroupsState, request: OffsetFetchRequest) -> OffsetFetchResponse:
    """Committed offsets.

    Args:
        machine: the applied state.

    Raises:
        UnstableOffsets: an open transaction may commit others; ask again.
    """
    known = machine.offsets.get(request.group_id, {})
    keys = list(known) if request.partitions is None else request.partitions
    pending = machine.pending_keys(request.group_id)
    if pending and (request.partitions is None or not pending.isdisjoint(keys)):
        raise UnstableOffsets(f"a transaction is about to commit offsets of group {request.group_id!r}")
    return OffsetFetchResponse([offset_row(key, known[key]) for key in keys if key in known])


def delete(staged: GroupsState, request: DeleteOffsetsRequest) -> Decision[Empty]:
    """Forget committed offsets.

    Raises:
        UnknownGroup.
        GroupNotEmpty: a member reads one of the topics.
        UnstableOffsets: a transaction holds one of them.
    """
    group = staged.group(request.group_id)
    read = {topic_id for topic_id, _ in group.topics.values()}
    if any(topic_id in read for topic_id, _ in request.partitions):
        raise GroupNotEmpty(f"group {group.group_id!r} reads the topic", members=sorted(group.members))
    command = RemoveOffsets(group.group_id, tuple(request.partitions))
    raise_refusal(staged.check(command))
    return Decision((command,) if command.keys else (), EMPTY)


def expire(
    staged: GroupsState, time_ms: int, retention_ms: int, producers_retention_ms: int
) -> tuple[Command, ...]:
    """What nobody needs any more; to be called now and then.

    Offsets go when they are ``retention_ms`` old and their group has had no members for as long, or has
    members of which none reads the topic. What an open transaction is about to replace stays: its end must
    not find the group gone (https://github.com/redpanda-data/redpanda/issues/31483). A group without
    members and offsets goes too.

    Args:
        time_ms: the leader time.
        producers_retention_ms: how long the ends of transactions are remembered.
    """
    commands: list[Command] = []
    before_ms = time_ms - retention_ms
    held = {key for pending in staged.pending.values() for key in pending.offsets}
    held_groups = {group_id for group_id, _, _ in held}
    for group in staged.groups.values():
        if not group.members and group.empty_since_ms > before_ms:
            continue
        name = group.group_id
        offsets = staged.offsets.get(name, {})
        read = {topic_id for topic_id, _ in group.topics.values()}
        old = tuple(
            key
            for key, each in offsets.items()
            if each.time_ms <= before_ms and key[0] not in read and (name, *key) not in held
        )
        if not group.members and len(old) == len(offsets) and name not in held_groups:
            commands.append(DeleteGroup(name))
        elif old:
            commands.append(RemoveOffsets(name, old))
    oldest = next(iter(staged.ended.values()), None)
    if oldest is not None and oldest.time_ms < time_ms - producers_retention_ms:
        commands.append(ExpireProducers(time_ms - producers_retention_ms))
    return tuple(commands)


# -- checks, for both halves of the coordinator --------------------------------------------------------------


def raise_refusal(refusal: RaftlogError | None) -> None:
    """Raise it, if there is one."""
    if refusal is not None:
        raise refusal


def check_id(what: str, name: str) -> None:
    """Raise ConfigError for a name that is empty or too long."""
    if not 1 <= len(name) <= NAME_MAX:
        raise ConfigError(f"a {what} id has 1 to {NAME_MAX} characters, not {len(name)}")


def stale(group_id: str, member_id: str, member: Member | None) -> StaleMember:
    """The error for a request of an epoch that is not the member's; None: there is no such member."""
    if member is None:
        return StaleMember(f"{member_id!r} is no member of group {group_id!r}", member_epoch=LEAVE_EPOCH)
    return StaleMember(
        f"member {member_id!r} of group {group_id!r} is at epoch {member.epoch}", member_epoch=member.epoch
    )


def offset_row(key: Key, offset: Offset) -> GroupOffset:
    """An offset for clients."""
    return GroupOffset(*key, offset.offset, offset.leader_epoch, offset.metadata)


def _check_member(
    staged: GroupsState, group_id: str, member_id: str, member_epoch: int, offsets: Sequence[GroupOffset]
) -> None:
    """Whether this member may commit these offsets now."""
    group = staged.groups.get(group_id)
    if member_id == NO_MEMBER and member_epoch == LEAVE_EPOCH:
        if group is not None and group.members:
            raise GroupNotEmpty(
                f"group {group_id!r} has {len(group.members)} members, which commit themselves",
                members=sorted(group.members),
            )
        return
    member = group.members.get(member_id) if group is not None else None
    if member is None or member.epoch != member_epoch:
        raise stale(group_id, member_id, member)
    for each in offsets:
        if not member.holds((each.topic_id, each.partition)):
            raise StaleMember(
                f"member {member_id!r} of group {group_id!r} does not hold partition {each.partition} of "
                f"topic {each.topic_id.hex()}",
                member_epoch=member.epoch,
            )


def _new_offsets(group_id: str, offsets: Iterable[GroupOffset]) -> tuple[NewOffset, ...]:
    check_id("group", group_id)
    new: list[NewOffset] = []
    for each in offsets:
        if each.offset < 0 or each.partition < 0:
            raise ConfigError(f"offset {each.offset} of partition {each.partition}: neither is below 0")
        if len(each.metadata) > OFFSET_METADATA_MAX:
            raise ConfigError(f"metadata of {len(each.metadata)} characters; {OFFSET_METADATA_MAX} at most")
        new.append(NewOffset(each.topic_id, each.partition, each.offset, each.leader_epoch, each.metadata))
    return tuple(new)
