"""Transactions as their producer sees them: what may be done when, and what is asked of the coordinator.

::

    NEW ----------> READY ---------> OPEN ---------> COMMITTING ---> READY
       InitTransactions  begin          | commit          |  |
                           ^            |                 |  +--> IN_DOUBT: commit again
                           |            | something       |       (its outcome is unknown)
                           |            | failed          | it was aborted
                           |            v                 |
                           |          FAILED <------------+
                           |            | abort           |
                           +-------- ABORTING <-- OPEN    +--> DEAD: fenced, or the id is gone; any state

The protocol is drawn in ``raftlog.broker.transactions``. The rules of this side:

- Nothing is sent to a partition before the coordinator has made it a part of the transaction. What has to be
  enlisted while a request is under way goes with the next one, and records gather in their batches meanwhile.
- Where transactions follow each other, the commit of one begins the next, with the partitions and groups that
  the one before has used. So that its records need not wait for those to hear of the commit, they bring the
  word along. A transaction that is begun and not wanted after all is given back.
- Every transaction is written under an identity of its own, which its end hands out. So a batch that fails
  fails its transaction and nothing else, and nothing is ever sent again under another identity (rp#3039): all
  that is not settled is given up, the transaction is aborted, and whatever of it arrives late is refused.
- A commit without an answer is asked for again, the same, for as long as the caller has time; the coordinator
  answers the hundredth as it would have the first.
"""

from __future__ import annotations

import asyncio
import enum
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import inf
from typing import Final, Protocol, TypeAlias, TypeVar

import msgspec

from raftlog.client.cluster import ClusterClient
from raftlog.client.coordinators import TRANSACTIONS_TOPIC, coordinator
from raftlog.client.delivery import when_all_done
from raftlog.client.handle import wait_until
from raftlog.client.identities import Obtained
from raftlog.client.metadata import PartitionView
from raftlog.client.retry import is_retriable
from raftlog.client.sender import Sender
from raftlog.client.window import Identity
from raftlog.errors import (
    Closed,
    CommitInDoubt,
    ConnectionLost,
    InvalidTransaction,
    RaftlogError,
    TransactionAborted,
    UnknownReplica,
)
from raftlog.net.rpc import CommittedBefore, GroupOffset, Request, StageOffsetsRequest
from raftlog.net.rpc_transactions import EndTransactionRequest, EnlistRequest, InitTransactionsRequest
from raftlog.record.types import TopicPartition

R = TypeVar("R", bound=msgspec.Struct)
Positions: TypeAlias = Mapping[TopicPartition, tuple[int, int]]

ABORT_TIMEOUT_S: Final = 10.0
"""How long to wait for the coordinator to abort what it aborts anyway when its time is over."""
LEAVE_TIMEOUT_S: Final = 1.0
"""The same, when the producer is closed and nothing was written."""
FOLLOWS_S: Final = 1.0
"""A transaction that ends so soon after the one before is expected to be followed by the next as soon; it has
that long to. A tenth of the transaction's timeout, if that is less: it runs from when the next has begun."""


class State(enum.Enum):
    """Where a transactional producer is. See the module's drawing."""

    NEW = "is not initialised"
    READY = "has no transaction open"
    OPEN = "has a transaction open"
    FAILED = "has a transaction that has to be aborted"
    COMMITTING = "is committing its transaction"
    IN_DOUBT = "does not know the outcome of its commit"
    ABORTING = "is aborting its transaction"
    DEAD = "cannot be used any more"


TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    State.NEW: frozenset({State.READY, State.DEAD}),
    State.READY: frozenset({State.OPEN, State.FAILED, State.DEAD}),
    State.OPEN: frozenset({State.COMMITTING, State.ABORTING, State.FAILED, State.DEAD}),
    State.FAILED: frozenset({State.ABORTING, State.DEAD}),
    State.COMMITTING: frozenset({State.READY, State.FAILED, State.IN_DOUBT, State.DEAD}),
    State.IN_DOUBT: frozenset({State.COMMITTING, State.DEAD}),
    State.ABORTING: frozenset({State.READY, State.FAILED, State.DEAD}),
    State.DEAD: frozenset(),
}


class OffsetsOwner(Protocol):
    """Who may commit offsets of a group: one of its members (:class:`raftlog.client.group.Seat`), or anybody
    as long as it has none (:class:`raftlog.client.group_admin.Memberless`)."""

    @property
    def group(self) -> str:
        """The group's name."""

    async def call(self, make: Callable[[PartitionView, str, int], Request[R]], *, timeout: float) -> R:
        """Ask the group's coordinator, as that member."""


class TransactionManager:
    """The transactions of one producer, one after another.

    Args:
        cluster: whose loop its requests run on.
        transactional_id: the name under which they go on after a restart.
        timeout_ms: the coordinator aborts a transaction that is open for longer.
        request_timeout_s: how long enlisting may take, and what else has no limit of its own.
    """

    transactional = True

    def __init__(
        self, cluster: ClusterClient, transactional_id: str, timeout_ms: int, request_timeout_s: float
    ) -> None:
        self.transactional_id = transactional_id
        self.state = State.NEW
        self.error: RaftlogError | None = None
        """Why it is FAILED or DEAD."""
        self._cluster = cluster
        self._timeout_ms = timeout_ms
        self._request_timeout_s = request_timeout_s
        self._lock = threading.Lock()
        self._sender: Sender
        self._place: PartitionView
        """Of the coordinator."""
        self._identity = Identity(-1, -1)
        self._begun = False
        """The coordinator may know that the transaction is open. If this is READY, it has begun the next."""
        self.before: CommittedBefore | None = None
        """The end with which this one has begun: see :class:`raftlog.client.identities.Identities`."""
        self._follows_s = min(FOLLOWS_S, timeout_ms / 10_000)
        self._ended_at = -inf
        self._giving_back: asyncio.Task[None] | None = None
        self._members: set[PartitionView] = set()
        self._groups: set[str] = set()
        self._written: dict[PartitionView, None] = {}
        """What this transaction writes to."""
        self._staged_groups: dict[str, None] = {}
        self._usual: dict[PartitionView, None] = {}
        """What the one before has written to."""
        self._wanted: dict[PartitionView, Obtained] = {}
        self._wanted_groups: dict[str, asyncio.Future[None]] = {}
        self._enlisting: asyncio.Task[None] | None = None
        self._staging: set[asyncio.Task[None]] = set()

    def attach(self, sender: Sender) -> None:
        """The sender that writes what belongs to the transactions."""
        self._sender = sender
        sender.accumulator.shut(self._refusal)

    # -- states ----------------------------------------------------------------------------------------------

    def _move(self, to: State, *expected: State) -> None:
        """Raises InvalidTransaction, or why it is dead, if it is in none of the states expected."""
        with self._lock:
            if self.state not in expected:
                raise self._refusal()
            assert to in TRANSITIONS[self.state], (self.state, to)
            self.state = to

    def _refusal(self) -> RaftlogError:
        """Why nothing can be sent, or this not be done, now."""
        if self.state is State.FAILED:
            return self._failure()
        if self.state is State.DEAD:
            return _again(self.error) if self.error is not None else Closed("the producer is closed")
        return InvalidTransaction(f"the producer of {self.transactional_id!r} {self.state.value}")

    def _failure(self) -> RaftlogError:
        """What became of a transaction that has to be aborted."""
        error = self.error
        assert error is not None, "a transaction fails for a reason"
        if isinstance(error, TransactionAborted):
            return _again(error)
        failure = TransactionAborted(
            f"the transaction of {self.transactional_id!r} cannot commit: {type(error).__name__}: "
            f"{error.message}"
        )
        failure.__cause__ = error
        return failure

    def raise_failure(self) -> None:
        """Raise why the transaction cannot commit, if it cannot."""
        if self.state in (State.FAILED, State.DEAD):
            raise self._refusal()

    def begin(self) -> bool:
        """Begin a transaction, from any thread; False if :meth:`recover` has to come first.

        Raises:
            InvalidTransaction: there is one.
            RaftlogError: why this producer is dead.
        """
        with self._lock:
            if self.state in (State.NEW, State.FAILED) or self._giving_back is not None:
                return False
            if self.state is not State.READY:
                raise self._refusal()
            self.state = State.OPEN
        self._sender.accumulator.reopen()
        return True

    async def recover(self, timeout: float) -> None:
        """Open the transactional id, or have aborted what failed or was not wanted, so that a transaction can
        begin.

        Args:
            timeout: seconds.

        Raises:
            ProducerFenced, ConfigError: for good.
            ConnectionLost, RequestTimeout, ConcurrentTransactions: not in time; try again.
        """
        if self._giving_back is not None:
            await asyncio.wait([self._giving_back], timeout=timeout)
        if self.state is State.FAILED:
            await self.abort(timeout)
        elif self.state is State.NEW:
            await self._init(timeout)

    async def _init(self, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        place = await coordinator(self._cluster, TRANSACTIONS_TOPIC, self.transactional_id, timeout=timeout)
        request = InitTransactionsRequest(
            place.topic_id, place.index, self.transactional_id, self._timeout_ms
        )
        left = max(deadline - loop.time(), 0.001)
        answer, _ = await self._cluster.call_leader(place, request, timeout=left)
        self._place = place
        self._identity = Identity(answer.producer_id, answer.epoch)
        self._move(State.READY, State.NEW)

    # -- for the sender --------------------------------------------------------------------------------------

    def begin_window(self, view: PartitionView) -> tuple[Identity, int] | None:
        """See :class:`raftlog.client.identities.Identities`."""
        if view not in self._members:
            return None
        self._written[view] = None
        return self._identity, 0

    def obtain(self, view: PartitionView, is_wanted: Callable[[], bool], obtained: Obtained) -> None:
        """Enlist a partition."""
        assert view not in self._wanted, "a partition waits once"
        self._wanted[view] = obtained
        self._enlist_soon()

    def broken(self, identity: Identity | None) -> None:
        """The transaction has failed already, by the batch that broke it."""

    def failed(self, error: BaseException) -> None:
        """The transaction can only be aborted now: everything else of it is given up."""
        with self._lock:
            if self.state not in (State.OPEN, State.COMMITTING):
                return
            if not isinstance(error, RaftlogError):
                error = RaftlogError(repr(error))
            self.error = error
            self.state = State.DEAD if error.fatal else State.FAILED
        self._give_up()

    def _give_up(self) -> None:
        self._sender.accumulator.shut(self._refusal)
        self._sender.abandon(TransactionAborted(f"the transaction of {self.transactional_id!r} was given up"))

    def close(self, sequences: object) -> None:
        """The producer is done; an identity of a transaction is of no use to anybody else."""
        with self._lock:
            self.state = State.DEAD
            self.error = self.error or Closed("the producer is closed")
        for task in self._tasks():
            task.cancel()

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [*self._staging] if self._enlisting is None else [self._enlisting, *self._staging]

    async def _stop_tasks(self) -> None:
        tasks = self._tasks()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)  # their callbacks have run then, too: they were there first

    # -- enlisting -------------------------------------------------------------------------------------------

    def _enlist_soon(self) -> None:
        if self._enlisting is None:
            self._enlisting = self._cluster.spawn(self._enlist())
            self._enlisting.add_done_callback(self._enlisted)

    async def _enlist(self) -> None:
        """Enlist what is wanted, and what comes to be wanted meanwhile. With the first goes what the
        transaction before has written to: most likely this one does so, too, and then it costs one round trip
        instead of two; if not, a marker too many."""
        usual = [view for view in self._usual if not view.deleted and view not in self._members]
        while self._wanted or self._wanted_groups:
            wanted, groups = dict(self._wanted), dict(self._wanted_groups)
            views = list(dict.fromkeys([*wanted, *usual]))
            self._begun = True
            try:
                await self._ask_to_enlist(
                    views, groups, is_retriable if not usual else _is_retriable_but_missing
                )
            except UnknownReplica:
                if not usual:
                    raise
                usual = []  # one of these is gone, and nobody has asked for it
                continue
            usual = []
            self._members.update(views)
            self._groups.update(groups)
            for view in [view for view in self._wanted if view in self._members]:
                self._wanted.pop(view)(None)
            for group, future in groups.items():
                del self._wanted_groups[group]
                future.set_result(None)

    async def _ask_to_enlist(
        self,
        views: Iterable[PartitionView],
        groups: Iterable[str],
        retriable: Callable[[BaseException], bool],
    ) -> None:
        request = EnlistRequest(
            self._place.topic_id,
            self._place.index,
            self.transactional_id,
            *self._identity,
            [(view.topic_id, view.index) for view in views],
            list(groups),
        )
        await self._cluster.call_leader(
            self._place, request, timeout=self._request_timeout_s, retriable=retriable
        )

    def _enlisted(self, task: asyncio.Task[None]) -> None:
        self._enlisting = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.failed(error)
        if self.state in (State.OPEN, State.COMMITTING):
            if self._wanted or self._wanted_groups:  # they came after the task's last look
                self._enlist_soon()
            return
        wanted, self._wanted = self._wanted, {}
        groups, self._wanted_groups = self._wanted_groups, {}
        for obtained in wanted.values():
            obtained(None)  # nothing of it is left to be sent
        for future in groups.values():
            future.cancel()

    # -- offsets of a group ----------------------------------------------------------------------------------

    def stage(self, seat: OffsetsOwner, positions: Positions) -> asyncio.Task[None]:
        """Let offsets of a group be committed with the transaction. Commit waits for that, and if it cannot
        be done the transaction fails.

        Args:
            seat: whose positions they are.
            positions: (next offset, leader epoch of the record before it) of partitions that it has had ever
                since.
        """
        if self.state is not State.OPEN:
            raise self._refusal()
        task = self._cluster.spawn(self._stage(seat, positions))
        self._staging.add(task)
        task.add_done_callback(self._staged)
        return task

    async def fail(self, error: RaftlogError) -> None:
        """What belongs to the transaction cannot be had: it must not commit without."""
        self.failed(error)

    async def send_offsets(self, seat: OffsetsOwner, positions: Positions) -> None:
        """The same, and wait for it: what the consumer does afterwards cannot change whose offsets they are.

        Raises:
            TransactionAborted: it cannot be done; the cause tells why.
        """
        await asyncio.wait([self.stage(seat, positions)])
        self.raise_failure()

    async def _stage(self, seat: OffsetsOwner, positions: Positions) -> None:
        identity, before, timeout = self._identity, self.before, self._request_timeout_s
        offsets = []
        for (topic, partition), (offset, leader_epoch) in positions.items():
            view = await self._cluster.partition(topic, partition, timeout=timeout)
            offsets.append(GroupOffset(view.topic_id, partition, offset, leader_epoch))
        if seat.group not in self._groups:
            enlisted = self._wanted_groups.get(seat.group)
            if enlisted is None:
                enlisted = self._wanted_groups[seat.group] = asyncio.get_running_loop().create_future()
                self._enlist_soon()
            await asyncio.shield(enlisted)

        def request(place: PartitionView, member_id: str, epoch: int) -> StageOffsetsRequest:
            return StageOffsetsRequest(
                place.topic_id, place.index, seat.group, member_id, epoch, *identity, offsets, before
            )

        await seat.call(request, timeout=timeout)
        self._staged_groups[seat.group] = None

    def _staged(self, task: asyncio.Task[None]) -> None:
        self._staging.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.failed(error)

    # -- the end ---------------------------------------------------------------------------------------------

    async def commit(self, timeout: float | None) -> None:
        """Deliver everything, then commit; also once more when the outcome is in doubt.

        Args:
            timeout: seconds for the commit itself, deliveries have a limit of their own; default: what a
                delivery may take.

        Raises:
            TransactionAborted: (also TransactionTimedOut) nothing of it will be read; it has to be aborted
                here, too.
            CommitInDoubt: no answer came in time.
            ProducerFenced, UnknownTransactionalId: for good.
        """
        doubtful = self.state is State.IN_DOUBT  # as long as nobody has said what came of the first one
        self._move(State.COMMITTING, State.OPEN, State.IN_DOUBT)

        def retriable(error: BaseException) -> bool:
            nonlocal doubtful
            # a connection that breaks may have carried the request, and its answer be lost
            lost = isinstance(error, ConnectionLost)
            doubtful = doubtful or lost or (isinstance(error, RaftlogError) and error.indeterminate)
            return is_retriable(error)

        sent = False
        try:
            batches = self._sender.accumulator.shut(self._refusal)
            if batches:
                await wait_until(partial(when_all_done, batches), None)
            while self._staging:
                await asyncio.wait(self._staging)
            if self.state is not State.COMMITTING:
                raise self._refusal()
            if self._begun:
                sent = True
                await self._end(True, self._request_timeout_s if timeout is None else timeout, retriable)
        except BaseException as error:  # also cancelled: the commit may be under way
            self._commit_failed(error, sent, doubtful)
            raise
        self._over(State.READY)

    def _commit_failed(self, error: BaseException, sent: bool, doubtful: bool) -> None:
        """Find the state in which a commit that was refused, broken off or not answered leaves this."""
        if self.state is not State.COMMITTING:
            return  # it failed before it came to that
        if not isinstance(error, RaftlogError):
            if sent:
                self.state = State.IN_DOUBT
            else:
                self.failed(TransactionAborted(f"the commit was broken off: {error!r}"))
        elif error.fatal:
            self._die(error)
        elif doubtful and not error.abortable:
            self.state = State.IN_DOUBT
            raise CommitInDoubt(
                f"whether the transaction of {self.transactional_id!r} was committed is not known: "
                f"{error.message}"
            ) from error
        else:
            self.failed(error)
            raise self._failure() from error

    async def abort(self, timeout: float | None) -> None:
        """Give everything up, and have the coordinator abort it.

        Args:
            timeout: seconds; default: 10.

        Raises:
            ConnectionLost, RequestTimeout: not in time; it can be done again, and the coordinator does it
                when the transaction's own time is over.
            ProducerFenced, UnknownTransactionalId: for good.
        """
        self._move(State.ABORTING, State.OPEN, State.FAILED)
        self._give_up()
        try:
            await self._stop_tasks()
            if self._begun:
                await self._end(False, ABORT_TIMEOUT_S if timeout is None else timeout, is_retriable)
        except BaseException as error:  # also cancelled: the abort may be done again
            if isinstance(error, RaftlogError) and not error.retriable:
                self._die(error)
            else:
                self.error = self.error or TransactionAborted("its abort was not finished")
                self.state = State.FAILED
            raise
        self._over(State.READY)

    async def _end(self, commit: bool, timeout: float, retriable: Callable[[BaseException], bool]) -> None:
        loop = asyncio.get_running_loop()
        request = EndTransactionRequest(
            self._place.topic_id, self._place.index, self.transactional_id, *self._identity, commit
        )
        if commit:
            request = msgspec.structs.replace(
                request,
                partitions=[(view.topic_id, view.index) for view in self._written],
                groups=list(self._staged_groups),
                again=loop.time() - self._ended_at < self._follows_s,
            )
        answer, _ = await self._cluster.call_leader(
            self._place, request, timeout=timeout, retriable=retriable
        )
        self.before = (
            CommittedBefore(self._identity.epoch, answer.coordinator_epoch) if answer.begun else None
        )
        self._identity = Identity(answer.producer_id, answer.epoch)
        self._ended_at = loop.time()

    def _over(self, to: State) -> None:
        """The transaction has ended; the next has begun if ``before`` says so."""
        self._sender.end_windows()
        self._begun = self.before is not None
        self._members = set(self._written) if self._begun else set()
        self._groups = set(self._staged_groups) if self._begun else set()
        self._usual, self._written, self._staged_groups = self._written, {}, {}
        self.error = None
        self._move(to, State.COMMITTING, State.ABORTING)
        if self._begun:
            asyncio.get_running_loop().call_later(self._follows_s, self._give_back, self._identity)

    # -- a transaction that nobody wants ---------------------------------------------------------------------

    def _give_back(self, identity: Identity) -> None:
        """Have the transaction aborted that has begun with the end of the one before, if it has not begun
        here: operators should not see it open, nor the coordinator wait for it."""
        with self._lock:
            if self.state is State.READY and self._begun and self._identity == identity:
                self._giving_back = self._cluster.spawn(self._abort_unused(ABORT_TIMEOUT_S))

    async def _abort_unused(self, timeout: float) -> None:
        try:
            await self._end(False, timeout, is_retriable)
        except RaftlogError as error:
            if not error.retriable:
                self._die(error)
            elif self.state is State.READY:
                self.error = TransactionAborted(
                    "the abort of a transaction that was not used was not finished"
                )
                self._move(State.FAILED, State.READY)
        else:
            self._begun = False
            self._members, self._groups = set(), set()
        finally:
            self._giving_back = None

    async def leave(self) -> None:
        """The producer is about to be closed: leave nothing open that was not used."""
        if self._giving_back is not None:
            await asyncio.wait([self._giving_back])
        elif self.state is State.READY and self._begun:
            await self._abort_unused(LEAVE_TIMEOUT_S)

    def _die(self, error: RaftlogError) -> None:
        with self._lock:
            self.error = error
            self.state = State.DEAD
        self._give_up()


def _is_retriable_but_missing(error: BaseException) -> bool:
    """Worth another attempt, where a partition that is not there is not."""
    return is_retriable(error) and not isinstance(error, UnknownReplica)


def _again(error: RaftlogError) -> RaftlogError:
    """The same once more: an error that is raised twice must not share its traceback."""
    copy = type(error)(error.message, **error.details)
    copy.__cause__ = error
    return copy
