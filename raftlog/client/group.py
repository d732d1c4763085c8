"""A consumer's membership of a group: heartbeats in the background, and what changes hands.

Two sides meet here. On the loop, heartbeats bring assignments (the protocol is in ``raftlog.broker.groups``);
the consumer, on whichever thread polls, carries them out at a time of its own (:meth:`Membership.change`).
User code that takes its time costs no membership, and a partition changes hands only when the consumer has
come back and its position is exact::

            wanted      newest assignment; the loop's
            held        what the consumer reads; its thread's, except that
            taken       held partitions which others may have already: the member fell out of the group, or
                        the consumer did not come back within the rebalance timeout

    wanted - held  -->  "assigned"        held - wanted  -->  "revoked"        taken  -->  "lost"

A member that fell out joins again when the consumer has been told what it lost. Until then nobody waits for
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final, Literal, TypeVar

import msgspec

from raftlog.client.cluster import ClusterClient
from raftlog.client.coordinators import GROUPS_TOPIC, coordinator
from raftlog.client.metadata import PartitionView
from raftlog.client.offsets import LOOKUP_TIMEOUT_S
from raftlog.client.retry import BACKOFF
from raftlog.config import ConsumerConfig
from raftlog.errors import Closed, RaftlogError, RequestTimeout, StaleMember
from raftlog.net.rpc import (
    JOIN_EPOCH,
    LEAVE_EPOCH,
    GroupHeartbeatRequest,
    GroupHeartbeatResponse,
    GroupOffset,
    OffsetCommitRequest,
    OffsetFetchRequest,
    Request,
)

log = logging.getLogger("raftlog.client")

R = TypeVar("R", bound=msgspec.Struct)

BEAT_TIMEOUT_S: Final = 10.0
"""A heartbeat without an answer is repeated after this."""
WAIT_MS: Final = 3_000
"""How long the coordinator may keep a heartbeat that it has no news for."""
UNKNOWN_WAIT_MS: Final = 100
"""The same while this client does not know all of its partitions yet."""
LEAVE_TIMEOUT_S: Final = 3.0
"""Whom the coordinator does not hear leave is out soon after its connection ends."""
PATIENCE: Final = 0.8
"""The part of the rebalance timeout after which partitions are given up without the consumer: the
coordinator would end the whole membership."""

_Key = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class Change:
    """What the consumer is to do next."""

    kind: Literal["assigned", "revoked", "lost"]
    views: frozenset[PartitionView]


@dataclass(frozen=True, slots=True)
class Seat:
    """A consumer's place in its group for as long as it does not fall out: what goes with positions, so that
    nobody else's are committed with them."""

    membership: Membership
    member_id: str

    @property
    def group(self) -> str:
        """The group's name."""
        return self.membership.group

    @property
    def member_epoch(self) -> int:
        """The epoch, as far as is known: it may move on at any time, :meth:`call` copes with that."""
        return self.membership.epoch

    async def call(self, make: Callable[[PartitionView, str, int], Request[R]], *, timeout: float) -> R:
        """As :meth:`Membership.call`; StaleMember too when the consumer has fallen out since."""
        return await self.membership.call(make, timeout=timeout, member_id=self.member_id)


class Membership:
    """One member of one group.

    Args:
        cluster: whose loop this runs on.
        config: the consumer's; it names the group.
        topics: names.
        loop: the cluster's.
        arrived: wakes the consumer.
        call_soon: the loop's ``call_soon``, or ``call_soon_threadsafe`` where another thread polls.
    """

    def __init__(
        self,
        cluster: ClusterClient,
        config: ConsumerConfig,
        topics: Sequence[str],
        loop: asyncio.AbstractEventLoop,
        arrived: Callable[[], None],
        call_soon: Callable[..., Any],
    ) -> None:
        assert config.group is not None
        self.group = config.group
        self.disturbed = False
        """There is something for the consumer to do: see :meth:`change`."""
        self.settled = False
        """The first assignment has come."""
        self._cluster = cluster
        self._config = config
        self._topics = tuple(sorted(set(topics)))
        self._loop = loop
        self._arrived = arrived
        self._call_soon = call_soon
        self._lock = Lock()
        self._place: PartitionView
        self._member_id = ""
        self._epoch = JOIN_EPOCH
        self._revision = 0
        self._echo = 0
        """The newest revision that is carried out."""
        self._keys: frozenset[_Key] = frozenset()
        """The newest assignment, as it came."""
        self._wanted: frozenset[PartitionView] = frozenset()
        self._held: frozenset[PartitionView] = frozenset()
        self._taken: frozenset[PartitionView] = frozenset()
        self._out = False
        """Not a member; joins again when the consumer knows."""
        self._error: RaftlogError | None = None
        self._give_up_at: float | None = None
        self._nudged = asyncio.Event()
        self._answered: list[asyncio.Future[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    # -- heartbeats, on the loop -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Find the coordinator and begin to join.

        Raises:
            ConnectionLost, RequestTimeout: nobody answers.
        """
        self._place = await coordinator(self._cluster, GROUPS_TOPIC, self.group, timeout=LOOKUP_TIMEOUT_S)
        self._renew()
        self._spawn(self._run())

    def _renew(self) -> None:
        """Become somebody new."""
        self._member_id = f"{self._cluster.seams.random.getrandbits(128):032x}"
        self._epoch, self._revision, self._echo = JOIN_EPOCH, 0, 0
        self._keys = frozenset()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self) -> None:
        failures = 0
        while not self._closed:
            if self._out:
                await self._nap(None)
                continue
            member_id = self._member_id
            try:
                answer = await self._beat()
            except StaleMember as error:
                self._fall_out(member_id, error)
            except RaftlogError as error:
                if not error.retriable:
                    self._fail(error)
                    return
                failures += 1
                await self._nap(BACKOFF.delay(failures, self._cluster.seams.random))
            else:
                failures = 0
                if member_id != self._member_id:  # it fell out meanwhile: this is of no concern any more
                    continue
                await self._take(answer, member_id)
                if self._echo != self._revision:  # the consumer has to let go first
                    await self._nap(min(answer.heartbeat_ms / 1000, self._patience_left()))
                    self._lose_patience()

    async def _nap(self, seconds: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._nudged.wait()
        self._nudged.clear()

    async def _beat(self) -> GroupHeartbeatResponse:
        config = self._config
        request = GroupHeartbeatRequest(
            topic_id=self._place.topic_id,
            partition=self._place.index,
            group_id=self.group,
            member_id=self._member_id,
            member_epoch=self._epoch,
            revision=self._echo,
            topics=self._topics,
            session_timeout_ms=config.session_timeout_ms,
            rebalance_timeout_ms=config.rebalance_timeout_ms,
            client_id=self._cluster.client_id,
            assignor=config.assignor,
            wait_ms=WAIT_MS if len(self._wanted) == len(self._keys) else UNKNOWN_WAIT_MS,
        )
        answer, _ = await self._cluster.call_leader(
            self._place, request, timeout=BEAT_TIMEOUT_S, retriable=_never
        )
        return answer

    async def _take(self, answer: GroupHeartbeatResponse, member_id: str) -> None:
        """Take in an answer: partitions that this client cannot find yet come later."""
        if answer.assigned is not None:
            self._keys = frozenset(
                (topic_id, index) for topic_id, indices in answer.assigned.items() for index in indices
            )
        views = {key: self._view(key) for key in self._keys}
        if None in views.values():
            # topics that are new, or have new partitions, of which this client has not heard
            with contextlib.suppress(RaftlogError):  # the next answer brings another try
                await self._cluster.metadata(list(self._topics), timeout=1.0)
            if member_id != self._member_id:  # it fell out meanwhile
                return
            views = {key: self._view(key) for key in self._keys}
        with self._lock:
            self._epoch, self._revision = answer.member_epoch, answer.revision
            self._wanted = frozenset(view for view in views.values() if view is not None)
            self.settled = True
            self._settle()
        answered, self._answered = self._answered, []
        for future in answered:
            if not future.done():
                future.set_result(None)
        self._arrived()

    def _view(self, key: _Key) -> PartitionView | None:
        topic_id, index = key
        for name in self._topics:
            topic = self._cluster.cache.topics.get(name)
            if topic is not None and topic.topic_id == topic_id and index < len(topic.partitions):
                return topic.partitions[index]
        return None

    def _settle(self) -> None:
        """With the lock: find out whether the consumer has something to do, and whether it was done."""
        if self._held <= self._wanted:
            self._echo = self._revision
            self._give_up_at = None
        elif self._give_up_at is None:
            self._give_up_at = self._loop.time() + PATIENCE * self._config.rebalance_timeout_ms / 1000
        self.disturbed = bool(
            self._error is not None or self._taken or self._out or self._held != self._wanted
        )

    def _patience_left(self) -> float:
        return 3600.0 if self._give_up_at is None else max(self._give_up_at - self._loop.time(), 0.0)

    def _lose_patience(self) -> None:
        """The consumer has not come back in time: others get what it was to give up."""
        with self._lock:
            if self._give_up_at is None or self._loop.time() < self._give_up_at:
                return
            late = self._held - self._wanted
            self._held -= late
            self._taken |= late
            self._settle()
        log.warning(
            "group %s: %s go to others although this consumer has not been used for %d ms",
            self.group,
            sorted(map(repr, late)),
            PATIENCE * self._config.rebalance_timeout_ms,
        )
        self._arrived()

    def _fall_out(self, member_id: str, error: StaleMember) -> None:
        """This member is none any more."""
        if member_id != self._member_id or self._out:
            return
        log.warning("group %s: this consumer fell out, and will join again: %s", self.group, error.message)
        self._spawn(self._say_goodbye(member_id))
        with self._lock:
            self._taken |= self._held
            self._held = self._wanted = frozenset()
            self._out = bool(self._taken)
            self._renew()
            self._settle()
        self._arrived()

    def _fail(self, error: RaftlogError) -> None:
        with self._lock:
            self._error = error
            self.disturbed = True
        self._arrived()

    # -- the consumer's thread -------------------------------------------------------------------------------

    def change(self) -> Change | None:
        """What to do next, if anything. What was lost or revoked is to be followed by :meth:`let_go`; what is
        assigned may be read from now on.

        Raises:
            RaftlogError: the group refuses this member for good.
        """
        with self._lock:
            if self._error is not None:
                raise self._error.with_traceback(None)
            if self._taken:
                return Change("lost", self._taken)
            if self._held - self._wanted:
                return Change("revoked", self._held - self._wanted)
            if self._wanted - self._held:
                new = self._wanted - self._held
                self._held |= new
                self._settle()
                return Change("assigned", new)
            return None

    def let_go(self, change: Change) -> None:
        """These are read no longer, nor will their offsets be committed."""
        with self._lock:
            self._taken -= change.views
            self._held -= change.views
            self._out = self._out and bool(self._taken)
            self._settle()
        self._call_soon(self._nudged.set)

    @property
    def taken(self) -> frozenset[PartitionView]:
        """What this consumer reads and has lost."""
        return self._taken

    def check(self, views: Iterable[PartitionView]) -> None:
        """Raise StaleMember if this consumer has lost any of these and was not told yet."""
        lost = sorted(map(repr, self._taken.intersection(views)))
        if lost:
            raise StaleMember(
                f"group {self.group!r} may have given {', '.join(lost)} to others: this consumer was out of "
                "reach, or not used for longer than rebalance_timeout_ms",
                member_epoch=LEAVE_EPOCH if self._out else self._epoch,
            )

    # -- requests in the member's name, on the loop ----------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Of the member, as of the newest answer."""
        return self._epoch

    @property
    def seat(self) -> Seat:
        """Who this consumer is in the group now."""
        return Seat(self, self._member_id)

    async def call(
        self,
        make: Callable[[PartitionView, str, int], Request[R]],
        *,
        timeout: float,
        member_id: str | None = None,
    ) -> R:
        """Ask the coordinator for what only this member may have.

        Args:
            make: (place, member id, member epoch) -> request; called again when the epoch has moved on
                meanwhile.
            timeout: seconds.
            member_id: only in the name of this one.

        Raises:
            StaleMember: it is out of the group, or does not hold a partition that the request is about.
            RaftlogError: the last attempt's.
        """
        deadline = self._loop.time() + timeout
        while True:
            if member_id is not None and member_id != self._member_id:
                raise StaleMember(
                    f"member {member_id} fell out of group {self.group!r}", member_epoch=LEAVE_EPOCH
                )
            while self._epoch == JOIN_EPOCH:
                await self._next_answer(deadline)
            asker, epoch = self._member_id, self._epoch
            left = max(deadline - self._loop.time(), 0.001)
            try:
                request = make(self._place, asker, epoch)
                return (await self._cluster.call_leader(self._place, request, timeout=left))[0]
            except StaleMember as error:
                now = error.details.get("member_epoch", LEAVE_EPOCH)
                if now == LEAVE_EPOCH or asker != self._member_id:
                    self._fall_out(asker, error)
                    raise
                if now == epoch:  # it is in, at this epoch: a partition is not its own
                    raise
                while self._epoch == epoch and asker == self._member_id:
                    await self._next_answer(deadline)

    async def _next_answer(self, deadline: float) -> None:
        """Wait until a heartbeat is answered."""
        if self._closed:
            raise Closed("the consumer is closed")
        if self._error is not None:
            raise self._error.with_traceback(None)
        if self._out:
            self.check(self._taken)
        answered: asyncio.Future[None] = self._loop.create_future()
        self._answered.append(answered)
        try:
            async with asyncio.timeout_at(deadline):
                await answered
        except TimeoutError:
            raise RequestTimeout(
                f"the coordinator of group {self.group!r} does not answer", indeterminate=False
            ) from None

    async def commit(self, offsets: list[GroupOffset], *, timeout: float) -> None:
        """Commit offsets of partitions that this member holds.

        Raises:
            As :meth:`call`.
        """
        group = self.group

        def request(place: PartitionView, member_id: str, epoch: int) -> OffsetCommitRequest:
            return OffsetCommitRequest(place.topic_id, place.index, group, member_id, epoch, offsets)

        await self.call(request, timeout=timeout)

    async def committed(self, views: Sequence[PartitionView]) -> dict[PartitionView, GroupOffset]:
        """What the group has committed of these partitions; waits while a transaction is about to commit.

        Raises:
            UnstableOffsets: that takes longer than a lookup may.
            ConnectionLost, RequestTimeout: nobody answers.
        """
        by_key = {(view.topic_id, view.index): view for view in views}
        place = self._place
        request = OffsetFetchRequest(place.topic_id, place.index, self.group, list(by_key))
        answer, _ = await self._cluster.call_leader(place, request, timeout=LOOKUP_TIMEOUT_S)
        return {by_key[each.topic_id, each.partition]: each for each in answer.offsets}

    # -- the end ---------------------------------------------------------------------------------------------

    async def leave(self) -> None:
        """Leave the group, at once where the coordinator answers."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        if self._member_id and not self._out and self._error is None:
            await self._say_goodbye(self._member_id)

    async def _say_goodbye(self, member_id: str) -> None:
        place = self._place
        request = GroupHeartbeatRequest(
            place.topic_id, place.index, self.group, member_id, LEAVE_EPOCH, 0, self._topics, 1, 1
        )
        with contextlib.suppress(RaftlogError):  # it is out when its session ends
            await self._cluster.call_leader(place, request, timeout=LEAVE_TIMEOUT_S)


def _never(error: BaseException) -> bool:
    return False
