"""A consumer's part in its group: taking over partitions and giving them up, and committing offsets.

What the group asks for is carried out when the consumer is used, in the thread (or task) that uses it. So it
is written as steps (:meth:`Sharing.rebalance`), which the blocking and the asynchronous consumer go through
each in its own way: user callbacks in place, coroutines on the loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Coroutine, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

from raftlog.client.assigned import COMMITTED, AssignedPartition
from raftlog.client.group import Change, Membership
from raftlog.client.metadata import PartitionView
from raftlog.client.offsets import LOOKUP_TIMEOUT_S, UNKNOWN_TERM, Offset, Place, row_of
from raftlog.errors import RaftlogError
from raftlog.net.rpc import GroupOffset
from raftlog.record.types import Record, TopicPartition

if TYPE_CHECKING:
    from raftlog.client.consumer import ConsumerCore

log = logging.getLogger("raftlog.client")


@dataclass(frozen=True, slots=True)
class Callback:
    """User code to be called where the consumer is used."""

    function: Callable[[list[TopicPartition]], Any]
    partitions: list[TopicPartition]

    def __call__(self) -> Any:
        return self.function(self.partitions)


Step: TypeAlias = Callback | Coroutine[Any, Any, None]


class Sharing:
    """See the module.

    Args:
        core: the consumer's.
        member: its membership.
    """

    def __init__(self, core: ConsumerCore, member: Membership) -> None:
        self.member = member
        self._core = core
        self._config = core.config
        self._is_busy = False

    # -- what changes hands ----------------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """Whether :meth:`rebalance` has anything to do. Not while it is under way: callbacks may use the
        consumer."""
        return (self.member.disturbed or bool(self._core.unlimited)) and not self._is_busy

    def rebalance(self) -> Generator[Step]:
        """What the group asks for, step by step. Where a step raises, close the iterator: the partition it
        was about changes hands all the same.

        Raises:
            RaftlogError: the group refuses this member for good.
        """
        if self._is_busy:
            return
        self._is_busy = True
        try:
            while (change := self.member.change()) is not None:
                yield from self._take_over(change) if change.kind == "assigned" else self._give_up(change)
            if self._core.unlimited:  # it failed when they came
                yield self._limit()
        finally:
            self._is_busy = False

    def part(self) -> Generator[Step]:
        """Give up everything, before the consumer is closed."""
        if self._is_busy:
            return
        self._is_busy = True
        try:
            views = frozenset(each.view for each in self._core.partitions.values())
            lost = views & self.member.taken
            for change in (Change("lost", lost), Change("revoked", views - lost)):
                if change.views:
                    yield from self._give_up(change)
        finally:
            self._is_busy = False

    def _take_over(self, change: Change) -> Generator[Step]:
        core = self._core
        names = core.add(sorted(change.views, key=attrgetter("topic", "index")))
        core.fetch()
        if self._config.on_assigned is not None:
            yield Callback(self._config.on_assigned, names)
        if core.unlimited:
            yield self._limit()

    async def _limit(self) -> None:
        self._core.limit(await self._core.ends(self._core.unlimited))

    def _give_up(self, change: Change) -> Generator[Step]:
        core, config = self._core, self._config
        partitions = [each for each in core.partitions.values() if each.view in change.views]
        callback = config.on_revoked
        try:
            if change.kind == "lost":
                callback = config.on_lost or callback
            elif config.enable_auto_commit:
                yield self._save_quietly(partitions)
            if callback is not None and partitions:
                yield Callback(callback, sorted(each.name for each in partitions))
        finally:
            core.drop(partitions)
            self.member.let_go(change)

    # -- committing ------------------------------------------------------------------------------------------

    def positions(self) -> dict[TopicPartition, tuple[int, int]]:
        """(position, term of the record before it) of each partition.

        Raises:
            StaleMember: some of the partitions are lost.
        """
        partitions = self._core.partitions.values()
        self.member.check(each.view for each in partitions)
        return {
            each.name: (each.position, each.position_term) for each in partitions if each.position is not None
        }

    async def commit(self, offsets: Mapping[Place, Offset] | None, timeout: float) -> None:
        """Commit positions, or what is given; see :meth:`raftlog.Consumer.commit`."""
        if offsets is not None:
            await self._commit_given(offsets, timeout)
            return
        partitions = list(self._core.partitions.values())
        taken = self.member.taken
        await self.save([each for each in partitions if each.view not in taken], timeout)
        self.member.check(each.view for each in partitions)

    async def save(self, partitions: Iterable[AssignedPartition], timeout: float = LOOKUP_TIMEOUT_S) -> None:
        """Commit the positions of these, as far as they have changed."""
        changed = [each for each in partitions if each.position is not None and each.position != each.saved]
        if changed:
            rows = [_row(each) for each in changed]
            await self.member.commit(rows, timeout=timeout)
            for each, row in zip(changed, rows, strict=True):
                each.saved = row.offset

    async def _save_quietly(self, partitions: Collection[AssignedPartition]) -> None:
        try:
            await self.save(partitions)
        except RaftlogError as error:
            # Everything handed out was committed before: what this would have added is where a seek went.
            log.warning("group %s: not committed while giving up partitions: %s", self.member.group, error)

    async def _commit_given(self, offsets: Mapping[Place, Offset], timeout: float) -> None:
        given: list[tuple[PartitionView, AssignedPartition | None, GroupOffset]] = []
        for place, offset in offsets.items():
            each = self._core.partitions.get(TopicPartition(*place))
            view = await self._view(place)
            term = each.position_term if each is not None and each.position == offset else UNKNOWN_TERM
            given.append((view, each, row_of(view, offset, term)))
        self.member.check(view for view, _, _ in given)
        if given:
            await self.member.commit([row for _, _, row in given], timeout=timeout)
        for _, each, row in given:
            if each is not None:
                each.saved = row.offset

    async def committed(self, place: Place) -> GroupOffset | None:
        """What the group has committed of a partition, assigned to this member or not."""
        view = await self._view(place)
        return (await self.member.committed([view])).get(view)

    async def _view(self, place: Place) -> PartitionView:
        each = self._core.partitions.get(TopicPartition(*place))
        return each.view if each is not None else await self._core.view(place)

    def seek_to_committed(self, places: Sequence[Place]) -> None:
        """Go back to what the group has committed, looked up when it is needed."""
        for each in self._core.chosen(places):
            self._core.jump(each, None, COMMITTED)

    # -- committing before handing out -----------------------------------------------------------------------

    async def save_before(self, begins: Callable[[], Mapping[TopicPartition, int]]) -> None:
        """Commit the positions behind records that are about to be handed out. If that fails they are not,
        and come again.

        Args:
            begins: tells the first offset of them in each partition.
        """
        try:
            await self.save(self._core.partitions.values())
        except BaseException:  # also where the caller is interrupted
            for name, offset in begins().items():
                self._core.seek(name, offset)
            raise

    def claim(self, record: Record) -> Coroutine[Any, Any, None] | None:
        """The same for records that are handed out one by one: all that are decoded are committed at once.
        None: this one was, already."""
        each = self._core.find((record.topic, record.partition))
        if record.offset < each.claimed:
            return None
        return self._claim(each, record)

    async def _claim(self, each: AssignedPartition, record: Record) -> None:
        ahead = each.available()
        end = each.first + each.cursor + ahead if ahead else record.offset + 1
        try:
            await self.member.commit([row_of(each.view, end)], timeout=LOOKUP_TIMEOUT_S)
        except BaseException:  # also an interrupt: the record is not handed out
            self._core.seek(each.name, record.offset)
            raise
        each.claimed = each.saved = end


def _row(each: AssignedPartition) -> GroupOffset:
    assert each.position is not None
    return GroupOffset(each.view.topic_id, each.view.index, each.position, each.position_term)
