"""What a group coordinator decides: pure functions of the leader's staged groups, a request and the time.

A group's coordinator is the leader of the ``__groups`` partition that the group's name hashes to. It follows
KIP-848: the broker assigns, members reconcile one heartbeat at a time, and only partitions that change hands
pause. ::

    member A (holds t0 t1)        coordinator                                  member B
      |                             |    heartbeat(B, epoch 0, rev 0, topics)    |   joins
      |                             |<-------------------------------------------|
      |                             |  group epoch 2; target A: t0, B: t1        |
      |                             |  t1 is A's still: B waits ("unreleased")   |
      |                             |------------------------------------------->|
      |                             |    epoch 2, rev 1, assigned: nothing       |
      | heartbeat(A, epoch 1, rev 1)|                                            |
      |---------------------------->|  A "unrevoked": t0 assigned, t1 revoking   |
      |<----------------------------|                                            |
      | epoch 1, rev 2, assigned t0 |                                            |
      | stops reading t1, commits its offset (epoch 1), calls back; t0 never     |
      | pauses                      |                                            |
      | heartbeat(A, epoch 1, rev 2)|                                            |
      |---------------------------->|  the echo of rev 2 frees t1; A "stable"    |
      |<----------------------------|                                            |
      | epoch 2, rev 2              |    heartbeat(B, epoch 2, rev 1)            |
      |                             |<-------------------------------------------|
      |                             |------------------------------------------->|
      |                             |    epoch 2, rev 2, assigned t1             |   fetches its offset,
      |                             |                                            |   reads

What a member does:

- It makes up a member id and joins with epoch 0. From then on it names the epoch and revision of its newest
  answer, the revision only once it has let go of all that is not in that answer's ``assigned``; having let go
  it heartbeats at once. One heartbeat at a time; late answers to earlier ones are ignored.
- It heartbeats within ``heartbeat_ms``. With ``wait_ms`` the answer waits for news, and a rebalance takes no
  polling.
- StaleMember on a heartbeat: it is out. It drops all its partitions, leaves under its old id in case that is
  still known, and joins under a new one.
- StaleMember on a commit whose ``member_epoch`` detail is not -1: it is in, at another epoch. It takes a
  heartbeat and then repeats the commit for what it still holds.
- It leaves with epoch -1.

A heartbeat moves its member on only if it names the newest epoch *and* revision. Any other of a known epoch
is one whose answer was lost, or a late copy: it is answered with what there is, and counts as a sign of life,
nothing more. So no late message can release a partition, and a member is never more than one step ahead of
what it knows.

What a host does:

- All methods take ``staged``, the leader's staged machine. The host proposes ``Decision.commands`` in order
  and sends the answer when the last of them is applied. Without commands, it sends the answer when
  everything that ``staged`` held is applied: an answer must not tell what a crash could still undo.
- Offsets are the business of ``group_offsets``. Its ``fetch``, and ``describe`` here, only read: the host
  calls them with the applied machine after ``confirm_leadership()``.
- A heartbeat whose decision has no ``news`` may be parked for its ``wait_ms``: when a ChangeGroup of the
  group is applied and the member is not ``settled`` any more, or the topics change, it is decided again.
  When the time is up, or a newer request of the member comes, it gets the answer that it had.
- On becoming leader: a new coordinator and ``restart``, which gives everyone a full session: a coordinator's
  own failure expels nobody. At ``due_ms``: ``expire``. When a connection breaks: ``connection_lost``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

import msgspec

from raftlog.broker.assignors import ASSIGNORS, uniform
from raftlog.broker.group_offsets import EMPTY, Decision, check_id, offset_row, raise_refusal, stale
from raftlog.errors import ConfigError
from raftlog.net.rpc import (
    JOIN_EPOCH,
    LEAVE_EPOCH,
    DeleteGroupRequest,
    DescribeGroupsRequest,
    DescribeGroupsResponse,
    Empty,
    GroupHeartbeatRequest,
    GroupHeartbeatResponse,
    GroupOffset,
    GroupRow,
    MemberRow,
)
from raftlog.state.groups import (
    ChangeGroup,
    Command,
    DeleteGroup,
    Group,
    GroupsState,
    Key,
    Member,
    MemberState,
    assignment_of,
    keys_of,
)

MEMBERS_MAX: Final = 1_000
TIMEOUT_MAX_MS: Final = 30 * 60_000
BROKEN_SESSION_MS: Final = 1_000
"""What is left of a session whose connection broke, unless the member comes back on another one."""
RECONCILE_INTERVAL_MS: Final = 200
"""Heartbeat interval of members that wait for a partition, or have not heard of the newest epoch."""


@dataclass(frozen=True, slots=True)
class TopicView:
    """The topics as this broker's metadata has them.

    Args:
        version: grows with the metadata (its applied index).
        find: name -> (topic id, number of partitions), or None.
    """

    version: int
    find: Callable[[str], tuple[bytes, int] | None]


@dataclass(slots=True)
class _Session:
    """What the coordinator remembers of a member, in memory only."""

    deadline_ms: int
    connection: Hashable = None
    revision: int = 0
    """The revocation that ``revoke_by_ms`` is about."""
    revoke_by_ms: int | None = None

    @property
    def due_ms(self) -> int:
        return self.deadline_ms if self.revoke_by_ms is None else min(self.deadline_ms, self.revoke_by_ms)


class _Draft:
    """A group while a decision about it is made."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.members = dict(group.members)
        self.epoch = group.epoch
        self.topics = group.topics
        self.topics_version = group.topics_version
        self.assignor = group.assignor

    def retarget(self, view: TopicView) -> None:
        """Begin a new epoch: everyone gets a new target."""
        self.epoch += 1
        is_newer = view.version >= self.topics_version
        topics: dict[str, tuple[bytes, int]] = {}
        for name in sorted({topic for member in self.members.values() for topic in member.topics}):
            found = (None if is_newer else self.topics.get(name)) or view.find(name)
            if found is not None:
                topics[name] = found
        self.topics = topics
        self.topics_version = max(view.version, self.topics_version)
        targets = ASSIGNORS.get(self.assignor, uniform)(
            {name: member.topics for name, member in self.members.items()},
            topics,
            {name: member.target for name, member in self.members.items()},
        )
        for name, target in targets.items():
            if self.members[name].target != target:
                self.members[name] = msgspec.structs.replace(self.members[name], target=target)

    def is_outdated(self, topics: Iterable[str], view: TopicView) -> bool:
        """Whether the targets were computed for other partitions of these topics than there are."""
        if view.version < self.topics_version:
            return False
        return any(view.find(name) != self.topics.get(name) for name in topics)

    def reconcile(self, member: Member) -> Member:
        """One step of a member towards its target, taken when it has carried out its newest assignment."""
        if member.state == MemberState.STABLE and member.epoch == self.epoch:
            return member
        held, target = set(keys_of(member.assigned)), set(keys_of(member.target))
        lost = held - target
        if lost:
            return msgspec.structs.replace(
                member,
                revision=member.revision + 1,
                state=MemberState.UNREVOKED,
                assigned=assignment_of(held - lost),
                revoking=assignment_of(lost),
            )
        missing = target - held
        free = missing - self._held_by_others(member) if missing else missing
        changed = bool(free or member.revision == 0)
        return msgspec.structs.replace(
            member,
            epoch=self.epoch,
            previous_epoch=member.epoch if member.epoch != self.epoch else member.previous_epoch,
            revision=member.revision + changed,
            state=MemberState.UNRELEASED if missing - free else MemberState.STABLE,
            assigned=assignment_of(held | free) if free else member.assigned,
            revoking={},
        )

    def _held_by_others(self, member: Member) -> set[Key]:
        held: set[Key] = set()
        for other in self.members.values():
            if other.member_id != member.member_id:
                held.update(keys_of(other.assigned))
                held.update(keys_of(other.revoking))
        return held

    def commands(self) -> tuple[ChangeGroup, ...]:
        """What changed, as one command; none if nothing did."""
        before = self.group.members
        changed = tuple(member for name, member in self.members.items() if before.get(name) is not member)
        removed = tuple(name for name in before if name not in self.members)
        if not changed and not removed and self.epoch == self.group.epoch:
            return ()
        topics = None if self.topics == self.group.topics else self.topics
        return (
            ChangeGroup(
                self.group.group_id,
                self.epoch,
                self.assignor,
                topics,
                self.topics_version,
                changed,
                removed,
            ),
        )


class GroupCoordinator:
    """The decisions of one ``__groups`` partition's leader about groups and members, and the timers that go
    with them. Times are the leader's own, of its monotonic clock.
    """

    def __init__(self) -> None:
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._due: list[tuple[int, str, str]] = []
        """A heap; an entry may be too early, never too late."""

    # -- members ---------------------------------------------------------------------------------------------

    def heartbeat(
        self,
        staged: GroupsState,
        request: GroupHeartbeatRequest,
        now_ms: int,
        view: TopicView,
        *,
        host: str = "",
        connection: Hashable = None,
    ) -> Decision[GroupHeartbeatResponse]:
        """A member joins, stays or leaves.

        Args:
            host: where the member is, to show to people.
            connection: what the request came in on, for :meth:`connection_lost`.

        Raises:
            StaleMember: the member is unknown, or at another epoch.
            ConfigError: a request of bad values, or one member too many.
        """
        group = staged.groups.get(request.group_id)
        if request.member_epoch == LEAVE_EPOCH:
            return self._leave(group, request.member_id, view)
        _check_heartbeat(request)
        group = group or Group(request.group_id, staged.epoch_floor)
        member = group.members.get(request.member_id)
        draft = _Draft(group)
        if member is None:
            if request.member_epoch != JOIN_EPOCH:
                raise stale(request.group_id, request.member_id, None)
            member = self._join(draft, request, host, view)
        elif request.member_epoch == member.epoch and request.revision == member.revision:
            member = self._step(draft, member, request, view)
        elif request.member_epoch not in (JOIN_EPOCH, member.epoch, member.previous_epoch) or (
            request.revision > member.revision
        ):
            raise stale(request.group_id, request.member_id, member)
        self._heard(group.group_id, member, now_ms, connection)
        unknown = (member.epoch, member.revision) != (request.member_epoch, request.revision)
        interval = max(1, member.session_timeout_ms // 3)
        if member.state != MemberState.UNREVOKED and not _is_in_place(member, draft.epoch):
            interval = min(interval, RECONCILE_INTERVAL_MS)
        answer = GroupHeartbeatResponse(
            member_epoch=member.epoch,
            revision=member.revision,
            assigned=member.assigned if unknown else None,
            heartbeat_ms=interval,
        )
        return Decision(draft.commands(), answer, unknown)

    def _join(self, draft: _Draft, request: GroupHeartbeatRequest, host: str, view: TopicView) -> Member:
        if len(draft.members) >= MEMBERS_MAX:
            raise ConfigError(f"group {request.group_id!r} has {MEMBERS_MAX} members, more are not allowed")
        draft.members[request.member_id] = Member(
            request.member_id,
            request.client_id,
            host,
            request.topics,
            request.session_timeout_ms,
            request.rebalance_timeout_ms,
        )
        draft.assignor = request.assignor
        draft.retarget(view)
        member = draft.reconcile(draft.members[request.member_id])
        draft.members[member.member_id] = member
        return member

    def _step(self, draft: _Draft, member: Member, request: GroupHeartbeatRequest, view: TopicView) -> Member:
        """A heartbeat of a member that knows where it is."""
        name = member.member_id
        has_new_topics = member.topics != request.topics
        if has_new_topics or (member.session_timeout_ms, member.rebalance_timeout_ms) != (
            request.session_timeout_ms,
            request.rebalance_timeout_ms,
        ):
            draft.members[name] = msgspec.structs.replace(
                member,
                topics=request.topics,
                session_timeout_ms=request.session_timeout_ms,
                rebalance_timeout_ms=request.rebalance_timeout_ms,
            )
        if has_new_topics or draft.is_outdated(request.topics, view):
            draft.retarget(view)
        before = draft.members[name]
        after = draft.reconcile(before)
        if after != before:
            draft.members[name] = after
        return draft.members[name]

    def _leave(
        self, group: Group | None, member_id: str, view: TopicView
    ) -> Decision[GroupHeartbeatResponse]:
        answer = GroupHeartbeatResponse(LEAVE_EPOCH, 0, {}, 0)
        if group is None or member_id not in group.members:
            return Decision((), answer)
        return Decision(_without(group, [member_id], view), answer)

    def settled(self, staged: GroupsState, group_id: str, member_id: str) -> bool:
        """Whether a parked heartbeat of this member, decided again, would find nothing to tell it."""
        group = staged.groups.get(group_id)
        member = group.members.get(member_id) if group is not None else None
        return group is not None and member is not None and _is_in_place(member, group.epoch)

    # -- timers ----------------------------------------------------------------------------------------------

    def restart(self, staged: GroupsState, now_ms: int) -> None:
        """This broker begins to lead: everybody's time begins anew."""
        self._sessions.clear()
        self._due.clear()
        for group in staged.groups.values():
            for member in group.members.values():
                self._heard(group.group_id, member, now_ms, None)

    def _heard(self, group_id: str, member: Member, now_ms: int, connection: Hashable) -> None:
        key = group_id, member.member_id
        deadline_ms = now_ms + member.session_timeout_ms
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = _Session(deadline_ms)
            heappush(self._due, (deadline_ms, *key))
        before_ms = session.due_ms
        session.deadline_ms, session.connection = deadline_ms, connection
        if member.state != MemberState.UNREVOKED:
            session.revoke_by_ms = None
        elif session.revoke_by_ms is None or session.revision != member.revision:
            session.revision = member.revision
            session.revoke_by_ms = now_ms + member.rebalance_timeout_ms
        if session.due_ms < before_ms:
            heappush(self._due, (session.due_ms, *key))

    def connection_lost(self, connection: Hashable, now_ms: int) -> None:
        """Sessions last heard of on this connection end in a second, unless they are heard of again."""
        for key, session in self._sessions.items():
            if session.connection == connection and session.deadline_ms > now_ms + BROKEN_SESSION_MS:
                session.deadline_ms = now_ms + BROKEN_SESSION_MS
                heappush(self._due, (session.due_ms, *key))

    @property
    def due_ms(self) -> int | None:
        """When :meth:`expire` may have something to do; None: nothing is timed."""
        return self._due[0][0] if self._due else None

    def expire(self, staged: GroupsState, now_ms: int, view: TopicView) -> tuple[Command, ...]:
        """Remove members whose session is over, or who did not give up their partitions in time.

        Where the commands cannot be logged, the next call brings them again.
        """
        over: dict[str, list[str]] = {}
        again: list[tuple[int, str, str]] = []
        while self._due and self._due[0][0] <= now_ms:
            _, group_id, member_id = heappop(self._due)
            session = self._sessions.get((group_id, member_id))
            if session is None:
                continue
            group = staged.groups.get(group_id)
            member = group.members.get(member_id) if group is not None else None
            if member is None:
                del self._sessions[group_id, member_id]
            elif session.deadline_ms <= now_ms or self._is_late(session, member, now_ms):
                names = over.setdefault(group_id, [])
                if member_id not in names:
                    names.append(member_id)
                    again.append((now_ms + 1, group_id, member_id))
            else:
                again.append((max(session.due_ms, now_ms + 1), group_id, member_id))
        for entry in dict.fromkeys(again):
            heappush(self._due, entry)
        return tuple(
            command
            for group_id, names in over.items()
            for command in _without(staged.groups[group_id], names, view)
        )

    def _is_late(self, session: _Session, member: Member, now_ms: int) -> bool:
        if member.state != MemberState.UNREVOKED or session.revision != member.revision:
            session.revoke_by_ms = None
        return session.revoke_by_ms is not None and session.revoke_by_ms <= now_ms

    # -- groups ----------------------------------------------------------------------------------------------

    def delete(self, staged: GroupsState, request: DeleteGroupRequest) -> Decision[Empty]:
        """Forget a group.

        Raises:
            UnknownGroup, GroupNotEmpty.
            UnstableOffsets: a transaction is about to commit offsets of it.
        """
        command = DeleteGroup(request.group_id)
        raise_refusal(staged.check(command))
        return Decision((command,), EMPTY)

    def describe(self, machine: GroupsState, request: DescribeGroupsRequest) -> DescribeGroupsResponse:
        """Groups as they are.

        Args:
            machine: the applied state.
        """
        if request.groups is None:
            return DescribeGroupsResponse([_group_row(group, [], []) for group in machine.groups.values()])
        rows: list[GroupRow] = []
        for group_id in request.groups:
            group = machine.groups.get(group_id)
            if group is not None:
                offsets = [
                    offset_row(key, each) for key, each in sorted(machine.offsets.get(group_id, {}).items())
                ]
                rows.append(_group_row(group, offsets, sorted(machine.pending_keys(group_id))))
        return DescribeGroupsResponse(rows)


def _is_in_place(member: Member, epoch: int) -> bool:
    """Whether the member has reached the target of the group's epoch."""
    return member.state == MemberState.STABLE and member.epoch == epoch


def _without(group: Group, names: Iterable[str], view: TopicView) -> tuple[ChangeGroup, ...]:
    """The group without these members: what they held is free at once, and their commits are refused."""
    draft = _Draft(group)
    for name in names:
        del draft.members[name]
    draft.retarget(view)
    return draft.commands()


def _check_heartbeat(request: GroupHeartbeatRequest) -> None:
    check_id("group", request.group_id)
    check_id("member", request.member_id)
    for name in ("session_timeout_ms", "rebalance_timeout_ms"):
        value = getattr(request, name)
        if not 1 <= value <= TIMEOUT_MAX_MS:
            raise ConfigError(f"{name} is 1 to {TIMEOUT_MAX_MS}, not {value}")
    if request.assignor not in ASSIGNORS:
        raise ConfigError(f"no assignor {request.assignor!r}; there are {', '.join(ASSIGNORS)}")
    if list(request.topics) != sorted(set(request.topics)):
        raise ConfigError("topics are to be in order, each once")


def _group_row(group: Group, offsets: list[GroupOffset], pending: list[Key]) -> GroupRow:
    members = [
        MemberRow(
            member.member_id,
            member.client_id,
            member.host,
            member.epoch,
            member.state.name.lower(),
            member.topics,
            member.assigned,
            member.target,
        )
        for member in group.members.values()
    ]
    is_stable = all(_is_in_place(member, group.epoch) for member in group.members.values())
    state = "empty" if not members else "stable" if is_stable else "reconciling"
    return GroupRow(group.group_id, state, group.epoch, group.assignor, members, offsets, pending)
