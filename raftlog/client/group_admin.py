"""Administration of consumer groups: listing, describing, deleting, and moving their offsets. All
asynchronous, on the cluster client's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import inf
from typing import Literal, TypeAlias, TypeVar

import msgspec

from raftlog.client.cluster import ClusterClient, partition_of
from raftlog.client.coordinators import GROUPS_TOPIC, coordinator
from raftlog.client.descriptions import GroupDescription, describe_members, describe_offsets
from raftlog.client.metadata import PartitionView
from raftlog.client.offsets import Offset, OffsetFinder, Place, row_of, to_ms
from raftlog.client.retry import is_retriable
from raftlog.config import validate_topic_name
from raftlog.errors import ConfigError, OffsetOutOfRange, RaftlogError, UnknownGroup, UnstableOffsets
from raftlog.net.rpc import (
    LEAVE_EPOCH,
    NO_MEMBER,
    OFFSET_EARLIEST,
    OFFSET_LATEST,
    DeleteGroupRequest,
    DescribeGroupsRequest,
    OffsetCommitRequest,
    OffsetFetchRequest,
    Request,
)
from raftlog.record.types import TopicPartition

R = TypeVar("R", bound=msgspec.Struct)
ResetTo: TypeAlias = Literal["earliest", "latest"] | datetime | int | Mapping[Place, Offset]

CALL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Memberless:
    """Who commits offsets of a group that has no members; refused where it has some."""

    cluster: ClusterClient
    group: str

    async def call(self, make: Callable[[PartitionView, str, int], Request[R]], *, timeout: float) -> R:
        """Ask the group's coordinator.

        Raises:
            GroupNotEmpty: its members commit themselves.
            ConnectionLost, RequestTimeout, and what else the request is answered with.
        """
        view = await coordinator(self.cluster, GROUPS_TOPIC, self.group, timeout=timeout)
        request = make(view, NO_MEMBER, LEAVE_EPOCH)
        return (await self.cluster.call_leader(view, request, timeout=timeout))[0]


class GroupAdmin:
    """What a Log does about groups."""

    def __init__(self, cluster: ClusterClient) -> None:
        self._cluster = cluster

    async def groups(self) -> list[str]:
        """See :meth:`raftlog.Log.groups`."""
        answer = await self._cluster.metadata(None, timeout=CALL_TIMEOUT_S)
        if all(row.name != GROUPS_TOPIC for row in answer.topics):
            return []  # nobody has ever had a group: looking is no reason to make the topic
        topic = await self._cluster.topic(GROUPS_TOPIC, timeout=CALL_TIMEOUT_S)
        rows = await asyncio.gather(*(self._groups_of(view) for view in topic.partitions))
        return sorted(name for names in rows for name in names)

    async def _groups_of(self, view: PartitionView) -> list[str]:
        request = DescribeGroupsRequest(view.topic_id, view.index)
        answer, _ = await self._cluster.call_leader(view, request, timeout=CALL_TIMEOUT_S)
        return [row.group_id for row in answer.groups]

    async def describe(self, group: str) -> GroupDescription:
        """See :meth:`raftlog.Log.describe_group`."""
        answer = await self._call(group, lambda topic, index: DescribeGroupsRequest(topic, index, [group]))
        if not answer.groups:
            raise UnknownGroup(f"there is no group {group!r}")
        row = answer.groups[0]
        topics = (await self._cluster.metadata(None, timeout=CALL_TIMEOUT_S)).topics
        names = {topic.topic_id: topic.name for topic in topics}
        members = describe_members(row, names)
        places = {
            TopicPartition(names[each.topic_id], each.partition): each
            for each in row.offsets
            if each.topic_id in names  # the topic may have been deleted since
        }
        wanted = sorted({*places, *(name for member in members for name in member.partitions)})
        views = [await self._partition(name) for name in wanted]
        ends = await self._find(views, OFFSET_LATEST)
        return GroupDescription(
            row.group_id,
            row.state,
            row.epoch,
            row.assignor,
            members,
            describe_offsets(places, members, dict(zip(wanted, ends, strict=True))),
        )

    async def delete(self, group: str, timeout: float) -> None:
        """See :meth:`raftlog.Log.delete_group`."""
        doubtful = False

        def retriable(error: BaseException) -> bool:
            nonlocal doubtful
            doubtful = doubtful or (isinstance(error, RaftlogError) and error.indeterminate)
            return is_retriable(error)

        try:
            await self._call(
                group,
                lambda topic, index: DeleteGroupRequest(topic, index, group),
                timeout=timeout,
                retriable=retriable,
            )
        except UnknownGroup:
            if not doubtful:
                raise
            # an earlier attempt of ours, whose answer was lost, has deleted it

    async def commit(self, group: str, offsets: Mapping[Place, Offset], timeout: float) -> None:
        """See :meth:`raftlog.Log.commit_offsets`."""
        rows = [row_of(await self._partition(place), offset) for place, offset in offsets.items()]
        await self._call(
            group,
            lambda topic, index: OffsetCommitRequest(topic, index, group, NO_MEMBER, LEAVE_EPOCH, rows),
            timeout=timeout,
        )

    async def committed(
        self, group: str, places: Sequence[Place], timeout: float, patience: float = inf
    ) -> dict[Place, int]:
        """What a group has committed of these partitions; those without are left out. Waits while a
        transaction is about to commit.

        Args:
            timeout: seconds for everything.
            patience: seconds for that transaction.

        Raises:
            UnstableOffsets: it takes longer.
            UnknownTopic, UnknownPartition, ConfigError, ConnectionLost, RequestTimeout.
        """
        views = [await self._partition(place) for place in places]
        by_key = {(view.topic_id, view.index): place for view, place in zip(views, places, strict=True)}
        loop = asyncio.get_running_loop()
        unstable_since: float | None = None

        def worth_it(error: BaseException) -> bool:
            nonlocal unstable_since
            if isinstance(error, UnstableOffsets):
                unstable_since = loop.time() if unstable_since is None else unstable_since
                return loop.time() - unstable_since < patience
            return is_retriable(error)

        answer = await self._call(
            group,
            lambda topic, index: OffsetFetchRequest(topic, index, group, list(by_key)),
            timeout=timeout,
            retriable=worth_it,
        )
        return {by_key[each.topic_id, each.partition]: each.offset for each in answer.offsets}

    async def reset(self, group: str, topic: str, to: ResetTo, timeout: float) -> dict[TopicPartition, int]:
        """See :meth:`raftlog.Log.reset_offsets`."""
        offsets = await self._targets(validate_topic_name(topic), to)
        await self.commit(group, offsets, timeout)
        return {
            TopicPartition(*place): offset if isinstance(offset, int) else offset[0]
            for place, offset in offsets.items()
        }

    async def _targets(self, topic: str, to: ResetTo) -> Mapping[Place, Offset]:
        views = (await self._cluster.topic(topic, timeout=CALL_TIMEOUT_S)).partitions
        if isinstance(to, Mapping):
            await self._check(topic, to)
            return to
        if isinstance(to, str):
            if to not in ("earliest", "latest"):
                raise ConfigError(f"to={to!r} is neither 'earliest' nor 'latest', a time, nor offsets")
            found = await self._find(views, OFFSET_EARLIEST if to == "earliest" else OFFSET_LATEST)
        else:
            finder = OffsetFinder(self._cluster)
            timestamp_ms = to_ms(to)
            found = await asyncio.gather(*(finder.since(view, timestamp_ms) for view in views))
        return {TopicPartition(topic, view.index): offset for view, offset in zip(views, found, strict=True)}

    async def _check(self, topic: str, offsets: Mapping[Place, Offset]) -> None:
        """Raise unless a consumer of the topic could begin at these offsets."""
        for place, offset in offsets.items():
            if place[0] != topic:
                raise ConfigError(f"{place[0]}[{place[1]}] is not a partition of topic {topic!r}")
            view = await self._partition(place)
            number = row_of(view, offset).offset
            (start,), (end,) = (
                await self._find([view], OFFSET_EARLIEST),
                await self._find([view], OFFSET_LATEST),
            )
            if not start <= number <= end:
                raise OffsetOutOfRange(
                    f"{view} holds offsets {start} to {end}, not {number}", start=start, end=end
                )

    async def _find(self, views: list[PartitionView], what: int) -> list[int]:
        finder = OffsetFinder(self._cluster)
        return await asyncio.gather(*(finder.find(view, what) for view in views))

    async def _partition(self, place: Place) -> PartitionView:
        topic = await self._cluster.topic(validate_topic_name(place[0]), timeout=CALL_TIMEOUT_S)
        return partition_of(topic, place[1])

    async def _call(
        self,
        group: str,
        make: Callable[[bytes, int], Request[R]],
        *,
        timeout: float = CALL_TIMEOUT_S,
        retriable: Callable[[BaseException], bool] = is_retriable,
    ) -> R:
        """Ask the group's coordinator."""
        if not isinstance(group, str) or not group:
            raise ConfigError(f"a group's name is a str that is not empty, not {group!r}")
        view = await coordinator(self._cluster, GROUPS_TOPIC, group, timeout=timeout)
        request = make(view.topic_id, view.index)
        return (await self._cluster.call_leader(view, request, timeout=timeout, retriable=retriable))[0]
