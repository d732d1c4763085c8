"""A replica of one ``__groups`` partition; as leader, the coordinator of the groups that hash to it.

What is decided is in ``raftlog.broker.groups`` and ``group_offsets``. Here is what they leave to their host:
the log, the timers, and heartbeats that wait for news. ::

    heartbeat --> decided --> news, or a command --> logged --> applied --> answered
                     ^ |
                     | '----> nothing new --> parked --> time is up, the member's next one comes --> answered
                     |                           |
                     '---------------------------'  its group changed, or the topics did
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Hashable
from functools import partial
from typing import Any, Final

from raftlog.broker import group_offsets
from raftlog.broker.assigned import Complete
from raftlog.broker.coordinator_replica import CoordinatorHost, CoordinatorReplica, nobody_waits
from raftlog.broker.group_offsets import Decision
from raftlog.broker.groups import GroupCoordinator, TopicView
from raftlog.broker.replica import Done
from raftlog.errors import RaftlogError, StorageFailed, StorageFull
from raftlog.net.rpc import (
    DeleteGroupRequest,
    DeleteOffsetsRequest,
    DescribeGroupsRequest,
    DescribeGroupsResponse,
    GroupHeartbeatRequest,
    GroupHeartbeatResponse,
    OffsetCommitRequest,
    OffsetFetchRequest,
    OffsetFetchResponse,
    StageOffsetsRequest,
)
from raftlog.raft.config import RecoveredLog
from raftlog.record.control import Marker
from raftlog.state.groups import CODEC, ChangeGroup, GroupsState
from raftlog.state.image import Partition
from raftlog.storage.replica_log import ReplicaLog

logger = logging.getLogger("raftlog.broker")

_EXPIRY_STEP_S: Final = 0.02
"""Sessions end this much late at most, and a device that takes no writes is tried no more often."""
_STALLED_MS: Final = 1_000
"""A timer that comes this much late says that nothing else was done meanwhile either."""


class _Parked:
    """A heartbeat that waits for news."""

    __slots__ = ("answer", "connection", "done", "host", "request", "timer")

    def __init__(
        self,
        request: GroupHeartbeatRequest,
        host: str,
        connection: Hashable,
        answer: GroupHeartbeatResponse,
        done: Done,
    ) -> None:
        self.request = request
        self.host = host
        self.connection = connection
        self.answer = answer
        self.done = done
        self.timer: asyncio.TimerHandle | None = None


class GroupReplica(CoordinatorReplica[GroupsState]):
    """See the module."""

    kind = GroupsState

    def __init__(
        self,
        host: CoordinatorHost,
        log: ReplicaLog,
        machine: GroupsState,
        recovered: RecoveredLog,
        assignment: Partition,
        complete: Complete,
    ) -> None:
        super().__init__(host, log, machine, recovered, assignment, complete)
        self._coordinator = GroupCoordinator()
        """Of the term in which this replica serves."""
        self._parked: dict[str, dict[str, _Parked]] = {}
        """group id -> member id -> its newest heartbeat, if that waits."""
        self._changed: set[str] = set()
        """Groups whose parked heartbeats are to be decided again."""
        self._expires_ms = 0
        """When the timer of the sessions is due."""

    def encode(self, command: Any) -> bytes:
        return CODEC.encode(command)

    # -- leadership ------------------------------------------------------------------------------------------

    def began_serving(self, staged: GroupsState) -> None:
        self._coordinator = GroupCoordinator()
        self._coordinator.restart(staged, self.host.now_ms())
        self._arm()

    def stopped_serving(self) -> None:
        super().stopped_serving()
        parked, self._parked = self._parked, {}
        for members in parked.values():
            for each in members.values():
                if each.timer is not None:
                    each.timer.cancel()
                each.done(None, self._not_leader())

    # -- members ---------------------------------------------------------------------------------------------

    def heartbeat(self, request: GroupHeartbeatRequest, host: str, connection: Hashable, done: Done) -> None:
        """A member joins, stays or leaves; ``done(GroupHeartbeatResponse, None)``, at once or when there is
        news for it.

        Args:
            host: where it is, to show to people.
            connection: what the request came on: when that breaks (:meth:`connection_lost`) its session is
                short.

        Raises:
            NotLeader, Busy, StorageFull, and what the coordinator raises.
        """
        staged = self.check_serving()
        self.check_name(request.group_id)
        self._release(request.group_id, request.member_id)
        decision = self._decide(staged, request, host, connection)
        # Longer than the interval of its heartbeats it must not wait: parked, it gives no signs of life.
        wait_ms = min(request.wait_ms, decision.answer.heartbeat_ms)
        if decision.news or decision.commands or wait_ms <= 0:
            self._log(staged, decision, done)
            return
        parked = _Parked(request, host, connection, decision.answer, done)
        self._parked.setdefault(request.group_id, {})[request.member_id] = parked
        parked.timer = asyncio.get_running_loop().call_later(
            wait_ms / 1000, self._release, request.group_id, request.member_id
        )

    def _decide(
        self, staged: GroupsState, request: GroupHeartbeatRequest, host: str, connection: Hashable
    ) -> Decision[GroupHeartbeatResponse]:
        decision = self._coordinator.heartbeat(
            staged, request, self.host.now_ms(), self._view(), host=host, connection=connection
        )
        self._arm()
        return decision

    def _log(self, staged: GroupsState, decision: Decision[Any], done: Done) -> None:
        """Carry out a decision; a change of a group is news for those of it that wait."""
        group_ids = [each.group_id for each in decision.commands if isinstance(each, ChangeGroup)]
        if group_ids:
            done = partial(self._group_changed, group_ids, done)
        self.carry_out(staged, decision.commands, decision.answer, done)

    def _group_changed(
        self, group_ids: list[str], done: Done, answer: Any, error: RaftlogError | None
    ) -> None:
        done(answer, error)
        if error is None:
            self._reconsider(group_ids)

    def _view(self) -> TopicView:
        image = self.host.metadata.image

        def find(name: str) -> tuple[bytes, int] | None:
            topic = image.topics.get(name)
            return None if topic is None or topic.internal else (topic.topic_id, len(topic.partitions))

        return TopicView(image.applied_index, find)

    # -- heartbeats that wait --------------------------------------------------------------------------------

    def _take(self, group_id: str, member_id: str) -> _Parked | None:
        members = self._parked.get(group_id)
        found = members.pop(member_id, None) if members is not None else None
        if found is not None:
            assert found.timer is not None
            found.timer.cancel()
            if not members:
                del self._parked[group_id]
        return found

    def _release(self, group_id: str, member_id: str) -> None:
        """Answer the parked heartbeat of a member, if there is one, with what it had."""
        found = self._take(group_id, member_id)
        if found is not None:
            found.done(found.answer, None)

    def _reconsider(self, group_ids: list[str]) -> None:
        """Decide the parked heartbeats of these groups again, soon: not amid the entries being applied."""
        waiting = [each for each in group_ids if each in self._parked]
        if waiting and not self._changed:
            asyncio.get_running_loop().call_soon(self._decide_again)
        self._changed.update(waiting)

    def _decide_again(self) -> None:
        changed, self._changed = self._changed, set()
        staged = self.staged
        if staged is None:
            return
        for group_id in sorted(changed):
            for parked in list(self._parked.get(group_id, {}).values()):
                self._decide_parked(staged, parked)

    def _decide_parked(self, staged: GroupsState, parked: _Parked) -> None:
        request = parked.request
        try:
            decision = self._decide(staged, request, parked.host, parked.connection)
            if decision.news or decision.commands:
                self._take(request.group_id, request.member_id)
                self._log(staged, decision, parked.done)
        except RaftlogError as error:
            self._take(request.group_id, request.member_id)
            parked.done(None, error)

    def metadata_changed(self) -> None:
        if self.staged is not None and self._parked:
            self._reconsider(list(self._parked))

    # -- time ------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """See to it that a timer runs for the session that ends first."""
        due_ms = self._coordinator.due_ms
        if due_ms is not None and ("expiry" not in self.timers or due_ms < self._expires_ms):
            self._expires_ms = due_ms
            seconds = max((due_ms - self.host.now_ms()) / 1000, _EXPIRY_STEP_S)
            self.call_later("expiry", seconds, self._expire)

    def _expire(self) -> None:
        staged = self.staged
        assert staged is not None, "timers end with the leadership"
        now_ms = self.host.now_ms()
        if now_ms - self._expires_ms > _STALLED_MS:
            # This process was held up: the members' signs of life lie unread before it.
            self._coordinator.restart(staged, now_ms)
        else:
            self._expel(now_ms)
        self._arm()

    def _expel(self, now_ms: int) -> None:
        try:
            staged = self.check_serving()
            for command in self._coordinator.expire(staged, now_ms, self._view()):
                self._log(staged, Decision((command,), None), nobody_waits)
        except (StorageFull, StorageFailed) as error:
            # Heartbeats are refused, too, so nobody can show that it lives.
            logger.info("%s: no member is expelled: %s", self.name, error)
            if self.staged is not None:
                self._coordinator.restart(self.staged, now_ms)
        except RaftlogError as error:
            logger.debug("%s: members are expelled later: %s", self.name, error)

    def connection_lost(self, connection: Hashable) -> None:
        """A client's connection broke: members that were last heard on it are soon out."""
        if self.staged is not None:
            self._coordinator.connection_lost(connection, self.host.now_ms())
            for members in list(self._parked.values()):
                for parked in [each for each in members.values() if each.connection == connection]:
                    self._release(parked.request.group_id, parked.request.member_id)
            self._arm()

    async def keep_house(self) -> None:
        """As leader, forget offsets and groups that nobody needs; then as any internal topic."""
        if self.staged is not None:
            try:
                self._forget(self.check_serving())
            except RaftlogError as error:
                logger.debug("%s: offsets expire later: %s", self.name, error)
        await super().keep_house()

    def _forget(self, staged: GroupsState) -> None:
        config = self.host.config
        commands = group_offsets.expire(
            staged, self.leader_time_ms(), config.offsets_retention_ms, config.producer_expiry_ms
        )
        for command in commands:
            self.log_command(staged, command, nobody_waits)

    # -- groups and offsets ----------------------------------------------------------------------------------

    def commit(self, request: OffsetCommitRequest, done: Done) -> None:
        """Commit offsets; ``done(Empty, None)``."""
        staged = self.check_serving()
        self.check_name(request.group_id)
        self._log(staged, group_offsets.commit(staged, request), done)

    def stage(self, request: StageOffsetsRequest, done: Done) -> None:
        """Keep offsets for the end of a transaction; ``done(Empty, None)``. If the transaction ``before`` it
        has offsets here, they are committed first."""
        staged = self.check_serving()
        self.check_name(request.group_id)
        before, pending = request.before, staged.pending.get(request.producer_id)
        is_open = before is not None and pending is not None and pending.epoch == before.epoch
        if before is not None and is_open and before.epoch < request.producer_epoch:
            marker = Marker(request.producer_id, before.epoch, before.coordinator_epoch, commit=True)
            self.write_marker(marker, nobody_waits)
        self._log(staged, group_offsets.stage(staged, request), done)

    def write_marker(self, marker: Marker, done: Done) -> None:
        """The transaction of a producer has ended: its offsets are committed, or forgotten."""
        staged = self.check_serving()
        decision = group_offsets.end(
            staged, marker.producer_id, marker.epoch, marker.coordinator_epoch, marker.commit
        )
        self._log(staged, decision, done)

    def delete_offsets(self, request: DeleteOffsetsRequest, done: Done) -> None:
        """Forget committed offsets; ``done(Empty, None)``."""
        staged = self.check_serving()
        self._log(staged, group_offsets.delete(staged, request), done)

    def delete(self, request: DeleteGroupRequest, done: Done) -> None:
        """Forget a group; ``done(Empty, None)``."""
        staged = self.check_serving()
        self._log(staged, self._coordinator.delete(staged, request), done)

    async def fetch(self, request: OffsetFetchRequest) -> OffsetFetchResponse:
        """Committed offsets: all that were acknowledged to anybody before the call."""
        await self.confirm_leadership()
        self.check_name(request.group_id)
        return group_offsets.fetch(self.machine, request)

    async def describe(self, request: DescribeGroupsRequest) -> DescribeGroupsResponse:
        """Groups of this partition."""
        await self.confirm_leadership()
        return self._coordinator.describe(self.machine, request)
