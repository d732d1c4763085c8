"""A replica of one ``__transactions`` partition; as leader, the coordinator of the transactional ids that
hash to it.

What is decided is in ``raftlog.broker.transactions``. Here is what it leaves to its host: a decision that
ends a transaction is applied, only then its markers are sent, and when every partition has its own the
transaction is completed. A new leader finds in its state which ones are ending, and sends their markers again
under its own term; what is twice at a partition is taken once.

Where the next transaction has begun with the end, its producer tells the partitions that it goes on writing
to, and says so when it ends that one, too. Markers are sent to the rest, when a moment has passed or somebody
waits for them.

What cannot be decided while a transaction of the same id is ending waits for that, for a while: so a producer
that begins one transaction after another need not ask again and again in between.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

from raftlog.broker.coordinator_replica import CoordinatorReplica, nobody_waits
from raftlog.broker.internal_topics import GROUPS_TOPIC, internal_topic, partition_of
from raftlog.broker.replica import Done
from raftlog.broker.transactions import (
    ABORT_SCAN_MS,
    Decision,
    Enlisted,
    NeedsProducerId,
    TransactionCoordinator,
    has_landed,
)
from raftlog.errors import (
    Busy,
    ConcurrentTransactions,
    InvalidTopic,
    RaftlogError,
    StaleCoordinator,
    UnknownReplica,
)
from raftlog.net.rpc import Empty
from raftlog.net.rpc_transactions import (
    AbortTransactionRequest,
    DescribeTransactionsRequest,
    DescribeTransactionsResponse,
    EndTransactionRequest,
    EnlistRequest,
    InitTransactionsRequest,
    MarkerRow,
    ProducerIdentity,
    TransactionRow,
)
from raftlog.raft.types import Entry
from raftlog.record.control import Marker
from raftlog.state.metadata import MetadataState
from raftlog.state.transactions import (
    Cause,
    Ended,
    Identity,
    Phase,
    Target,
    Transaction,
    TransactionsState,
    encode_command,
)

logger = logging.getLogger("raftlog.broker")

_AGAIN_S: Final = 0.1
_CARRY_S: Final = 0.02
"""How long a producer that goes on has to tell the partitions itself: readers wait for it, too."""
_EMPTY: Final = Empty()
_OPEN: Final = (Phase.ONGOING, Phase.PREPARE_COMMIT, Phase.PREPARE_ABORT)

_WAIT_S: Final = 2.0
"""How long a request may wait for the end of the transaction before."""
_WAITING_MAX: Final = 100
"""Requests that wait for the end of one transaction."""
_Decide: TypeAlias = "Callable[[TransactionCoordinator, TransactionsState, int, int | None], Decision]"


class _Waiting:
    """A request that waits for the end of the transaction before."""

    __slots__ = ("decide", "done", "refusal", "timer")

    def __init__(self, decide: _Decide, done: Done, refusal: ConcurrentTransactions) -> None:
        self.decide = decide
        self.done = done
        self.refusal = refusal
        self.timer: asyncio.TimerHandle | None = None


class _Settling:
    """An end that is applied, and who is not known to have been told."""

    __slots__ = ("identity", "is_sent", "left", "timer")

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.left: set[Target] | None = None
        """None: not asked for yet, or this broker's metadata was too old to say."""
        self.is_sent = False
        """The markers for all that was left were sent."""
        self.timer: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        """Another has taken its place, or nobody is left."""
        if self.timer is not None:
            self.timer.cancel()


class TransactionReplica(CoordinatorReplica[TransactionsState]):
    """See the module."""

    kind = TransactionsState

    _coordinator: TransactionCoordinator | None = None
    """Of the term in which this replica serves."""
    _settling: dict[str, _Settling]
    """By transactional id."""
    _to_send: list[str]
    """Transactional ids whose markers are due now."""
    _waiting: dict[str, list[_Waiting]]
    """By transactional id."""
    _open: set[Identity]
    """Of transactions that have begun and not ended, as far as applied: to count them."""

    def encode(self, command: Any) -> bytes:
        return encode_command(command)

    # -- leadership ------------------------------------------------------------------------------------------

    def began_serving(self, staged: TransactionsState) -> None:
        config = self.host.config
        self._coordinator = TransactionCoordinator(
            self.node.term,
            self.leader_time_ms(),
            timeout_ms_max=config.transaction_timeout_ms_max,
            expiry_ms=config.transactional_id_expiry_ms,
        )
        self._settling = {}
        self._to_send = []
        self._waiting = {}
        known = self.machine.transactions.values()
        self._open = {each.identity for each in known if each.phase is Phase.ONGOING}
        for transaction in self.machine.ending():
            self._settle(self._coordinator, transaction, 0.0)
        self.call_later("scan", ABORT_SCAN_MS / 1000, self._scan)

    def stopped_serving(self) -> None:
        super().stopped_serving()
        if self._coordinator is not None:
            self._coordinator = None
            for settling in self._settling.values():
                settling.stop()
            waiting, self._waiting = self._waiting, {}
            for requests in waiting.values():
                for each in requests:
                    assert each.timer is not None
                    each.timer.cancel()
                    each.done(None, self._not_leader())

    def _serving(self) -> tuple[TransactionCoordinator, TransactionsState]:
        staged = self.check_serving()
        assert self._coordinator is not None
        return self._coordinator, staged

    # -- requests of producers -------------------------------------------------------------------------------

    def init(self, request: InitTransactionsRequest, done: Done) -> None:
        """A producer opens its transactional id; ``done(ProducerIdentity, None)``.

        Raises:
            NotLeader, Busy, StorageFull, and what the coordinator raises; all may come to ``done``, too.
        """
        holder = None if request.producer_id < 0 else Identity(request.producer_id, request.epoch)
        name, timeout_ms = request.transactional_id, request.timeout_ms
        self._decide(
            name,
            lambda coordinator, staged, now_ms, fresh: coordinator.init(
                staged, now_ms, name, timeout_ms, holder, fresh
            ),
            done,
        )

    def enlist(self, request: EnlistRequest, done: Done) -> None:
        """Partitions and groups become part of a transaction; ``done(Empty, None)``."""
        image = self.host.metadata.image
        _check_places(image, request.partitions, request.groups)
        identity = Identity(request.producer_id, request.epoch)
        name = request.transactional_id
        self._decide(
            name,
            lambda coordinator, staged, now_ms, fresh: coordinator.enlist(
                staged, now_ms, name, identity, request.partitions, request.groups, image.applied_index
            ),
            done,
        )

    def end(self, request: EndTransactionRequest, done: Done) -> None:
        """A transaction is committed or aborted; ``done(ProducerIdentity, None)`` once that is decided."""
        identity = Identity(request.producer_id, request.epoch)
        name, commit = request.transactional_id, request.commit
        again = self._again(request)

        def decide(
            coordinator: TransactionCoordinator, staged: TransactionsState, now_ms: int, fresh: int | None
        ) -> Decision:
            return coordinator.end(
                staged,
                now_ms,
                name,
                identity,
                commit,
                fresh,
                settled=self._is_settled(staged, identity, request),
                again=again,
                topics_version=self.host.metadata.image.applied_index,
            )

        self._decide(name, decide, done)

    def _again(self, request: EndTransactionRequest) -> Enlisted | None:
        """What the next transaction is to begin with; None if it is not to, or cannot."""
        if not request.again or not (request.partitions or request.groups):
            return None
        try:
            _check_places(self.host.metadata.image, request.partitions, request.groups)
        except RaftlogError as error:
            logger.debug("%s: %r begins no other: %s", self.name, request.transactional_id, error)
            return None  # the producer enlists what there is
        return Enlisted(tuple(request.partitions), tuple(request.groups))

    def _decide(self, name: str, decide: _Decide, done: Done, fresh: int | None = None) -> None:
        coordinator, staged = self._serving()
        self.check_name(name)
        try:
            decision = decide(coordinator, staged, self.leader_time_ms(), fresh)
        except NeedsProducerId:
            self.host.spawn(self._decide_with_id(name, decide, done))
            return
        except ConcurrentTransactions as refusal:
            self._wait(name, _Waiting(decide, done, refusal))
            return
        commands = () if decision.command is None else (decision.command,)
        if isinstance(decision.error, ConcurrentTransactions):
            self.carry_out(staged, commands, None, nobody_waits)
            self._wait(name, _Waiting(decide, done, decision.error))
            return
        assert decision.error is None, decision
        answer: Any = _EMPTY
        if decision.answer is not None:
            answer = ProducerIdentity(*decision.answer, coordinator.term, decision.begun)
        self.carry_out(staged, commands, answer, done)

    async def _decide_with_id(self, name: str, decide: _Decide, done: Done) -> None:
        try:
            try:
                fresh = await self.host.metadata.producer_id()
            except RaftlogError as error:
                # as it is it would speak of another leader than this partition's
                raise Busy(f"no producer id is to be had now: {error}") from error
            self._decide(name, decide, done, fresh)
        except RaftlogError as error:
            done(None, error)

    # -- requests that wait for the end of the transaction before --------------------------------------------

    def _wait(self, name: str, request: _Waiting) -> None:
        waiting = self._waiting.setdefault(name, [])
        if len(waiting) >= _WAITING_MAX:
            raise request.refusal
        waiting.append(request)
        settling = self._settling.get(name)
        if settling is not None and self._coordinator is not None:
            self._send_markers(self._coordinator, name, settling)
        request.timer = asyncio.get_running_loop().call_later(_WAIT_S, self._refuse, name, request)

    def _refuse(self, name: str, request: _Waiting) -> None:
        """It took too long: the caller may ask again."""
        self._waiting[name].remove(request)
        if not self._waiting[name]:
            del self._waiting[name]
        request.done(None, request.refusal)

    def _ended(self, name: str) -> None:
        """The transaction is complete: decide what has waited for that."""
        for request in self._waiting.pop(name, ()):
            assert request.timer is not None
            request.timer.cancel()
            try:
                self._decide(name, request.decide, request.done)
            except RaftlogError as error:
                request.done(None, error)

    # -- markers ---------------------------------------------------------------------------------------------

    def applied(self, entry: Entry, result: object) -> object:
        coordinator = self._coordinator
        if coordinator is not None and isinstance(result, Transaction):
            self._count(result)
            # a producer that has the next transaction already tells the partitions itself; let it
            is_hurried = result.phase is not Phase.ONGOING or result.transactional_id in self._waiting
            self._settle(coordinator, result, 0.0 if is_hurried else _CARRY_S)
        return result

    def _count(self, transaction: Transaction) -> None:
        """Whether one has begun, or ended, with this change."""
        counters, ended = self.host.counters, transaction.ended
        if ended is not None and ended.identity in self._open:
            self._open.remove(ended.identity)
            if ended.commit:
                counters.transactions_committed += 1
            else:
                counters.transactions_aborted += 1
        if transaction.phase is Phase.ONGOING and transaction.identity not in self._open:
            self._open.add(transaction.identity)
            counters.transactions_begun += 1

    @property
    def open_transactions(self) -> int:
        """How many are open here, while this replica leads."""
        return 0 if self._coordinator is None else len(self._open)

    def _settle(self, coordinator: TransactionCoordinator, transaction: Transaction, delay_s: float) -> None:
        """Take in what is applied: if it is an end, see to it that all hear of it."""
        name, ended = transaction.transactional_id, transaction.ended
        known = self._settling.get(name)
        if known is not None:
            if ended is not None and ended.identity == known.identity and not ended.is_complete:
                return
            known.stop()
            del self._settling[name]
        if ended is None or ended.is_complete:
            return
        settling = self._settling[name] = _Settling(ended.identity)
        if delay_s:
            send = partial(self._send_markers, coordinator, name, settling)
            settling.timer = asyncio.get_running_loop().call_later(delay_s, send)
            return
        # soon, not amid the entries being applied
        if not self._to_send:
            asyncio.get_running_loop().call_soon(self._send_all)
        self._to_send.append(name)

    def _send_all(self) -> None:
        coordinator = self._coordinator
        to_send, self._to_send = self._to_send, []
        for name in to_send:
            settling = self._settling.get(name)
            if coordinator is not None and settling is not None:
                self._send_markers(coordinator, name, settling)

    def _send_markers(self, coordinator: TransactionCoordinator, name: str, settling: _Settling) -> None:
        """Send its markers to all that are left, unless that was done."""
        if self._coordinator is not coordinator or self._settling.get(name) is not settling:
            return
        if settling.is_sent:
            return
        transaction = self.machine.transactions[name]
        left = self._left(transaction, settling)
        if left is None:
            again = partial(self._send_markers, coordinator, name, settling)
            asyncio.get_running_loop().call_later(_AGAIN_S, again)
            return
        settling.is_sent = True
        marker = coordinator.marker(transaction)

        def landed(target: Target, error: RaftlogError | None) -> None:
            if not has_landed(error):
                logger.info("%s leaves %r to a later coordinator: %s", self.name, name, error)
                return
            left.discard(target)
            if not left:
                self._complete_transaction(coordinator, name, settling.identity)

        for target in sorted(left):
            self._send(coordinator, marker, target, partial(landed, target))
        if not left:
            self._complete_transaction(coordinator, name, settling.identity)

    def _left(self, transaction: Transaction, settling: _Settling) -> set[Target] | None:
        """The partitions that may not have been told; None: this broker's metadata is too old to say."""
        if settling.left is None and self.host.metadata.image.applied_index >= transaction.topics_version:
            ended = transaction.ended
            assert ended is not None, transaction
            settling.left = set(self._targets(ended.partitions, ended.groups))
        return settling.left

    def _targets(self, partitions: Iterable[Target], groups: Sequence[str]) -> list[Target]:
        """The partitions, and those of ``__groups`` that the groups are in."""
        targets = list(partitions)
        if groups:
            topic = internal_topic(self.host.metadata.image, GROUPS_TOPIC)
            assert topic is not None, "it was there when the group was enlisted, and is never deleted"
            count = len(topic.partitions)
            targets += dict.fromkeys((topic.topic_id, partition_of(each, count)) for each in groups)
        return targets

    def _is_settled(
        self, staged: TransactionsState, identity: Identity, request: EndTransactionRequest
    ) -> bool:
        """Whether all know of the end before this one: also those, as its producer says, to which it has
        written in this transaction, for they took nothing of it before they knew."""
        name = request.transactional_id
        settling, present = self._settling.get(name), staged.transactions.get(name)
        if settling is None or present is None or present.identity != identity:
            return False
        if present.ended is None or present.ended.identity != settling.identity:
            return False
        left = self._left(present, settling)
        if left is None:
            return False
        left.difference_update(self._targets(request.partitions, request.groups))
        return not left

    def _send(
        self,
        coordinator: TransactionCoordinator,
        marker: Marker,
        target: Target,
        landed: Callable[[RaftlogError | None], None],
    ) -> None:
        row = MarkerRow(*target, marker.producer_id, marker.epoch, marker.coordinator_epoch, marker.commit)
        self.host.markers.send(row, landed, lambda: self._coordinator is coordinator)

    def _complete_transaction(
        self, coordinator: TransactionCoordinator, name: str, identity: Identity
    ) -> None:
        if self._coordinator is not coordinator:
            return
        try:
            staged = self.check_serving()
            command = coordinator.complete(staged, self.leader_time_ms(), name, identity)
            if command is not None:
                self.log_command(staged, command, nobody_waits)
                self._ended(name)
        except RaftlogError as error:
            logger.debug("%s completes %r later: %s", self.name, name, error)
            again = partial(self._complete_transaction, coordinator, name, identity)
            asyncio.get_running_loop().call_later(_AGAIN_S, again)

    # -- time ------------------------------------------------------------------------------------------------

    def _scan(self) -> None:
        """Abort what is open for too long, forget what nobody uses."""
        self.call_later("scan", ABORT_SCAN_MS / 1000, self._scan)
        try:
            coordinator, staged = self._serving()
            now_ms = self.leader_time_ms()
            for name in coordinator.overdue(staged, now_ms):
                logger.info("%s: the transaction of %r is open for too long: aborted", self.name, name)
                identity = staged.transaction(name).identity
                self._decide(name, partial(_time_out, name, identity), nobody_waits)
            for command in coordinator.expired(staged, now_ms):
                self.log_command(staged, command, nobody_waits)
        except RaftlogError as error:
            logger.debug("%s: transactions time out later: %s", self.name, error)

    # -- operators -------------------------------------------------------------------------------------------

    async def abort(self, request: AbortTransactionRequest, done: Done) -> None:
        """Abort the transaction of an id, or what is open at a partition though no transaction knows of it;
        ``done(Empty, None)`` once the first is decided, or the marker of the second is written."""
        await self.confirm_leadership()  # what a replaced leader takes for an orphan may be a new transaction
        hanging = request.hanging
        if hanging is None:
            name = request.transactional_id
            self._decide(name, partial(_abort, name, Cause.OPERATOR), partial(_nothing, done))
            return
        coordinator, staged = self._serving()
        target = hanging.topic_id, hanging.partition
        identity = Identity(hanging.producer_id, hanging.epoch)
        marker = coordinator.abort_hanging(staged, request.transactional_id, identity, target)

        def landed(error: RaftlogError | None) -> None:
            if (
                isinstance(error, StaleCoordinator)
                and not request.transactional_id
                and "epoch" in error.details
            ):
                # terms of another partition of this topic: whoever had that one knows the producer no more
                again = Marker(*identity, error.details["epoch"], commit=False)
                self._send(coordinator, again, target, partial(_landed, done))
            else:
                _landed(done, error)

        self._send(coordinator, marker, target, landed)

    async def describe(self, request: DescribeTransactionsRequest) -> DescribeTransactionsResponse:
        """Transactions of this partition."""
        await self.confirm_leadership()
        known = self.machine.transactions
        if request.transactional_ids is None:
            return DescribeTransactionsResponse([_row(each) for each in known.values()])
        found = [known[name] for name in request.transactional_ids if name in known]
        return DescribeTransactionsResponse([_row(each) for each in found])


def _abort(
    name: str,
    cause: Cause,
    coordinator: TransactionCoordinator,
    staged: TransactionsState,
    now_ms: int,
    fresh: int | None,
) -> Decision:
    return coordinator.abort(staged, now_ms, name, cause, fresh)


def _time_out(
    name: str,
    identity: Identity,
    coordinator: TransactionCoordinator,
    staged: TransactionsState,
    now_ms: int,
    fresh: int | None,
) -> Decision:
    """Abort the transaction of this identity; what has begun since is not overdue."""
    present = staged.transactions.get(name)
    if present is None or present.identity != identity:
        return Decision()
    return coordinator.abort(staged, now_ms, name, Cause.TIMEOUT, fresh)


def _nothing(done: Done, answer: Any, error: RaftlogError | None) -> None:
    """The answer is for the producer, not for whoever asked."""
    done(None if error is not None else _EMPTY, error)


def _landed(done: Done, error: RaftlogError | None) -> None:
    done(None if error is not None else _EMPTY, error)


def _check_places(image: MetadataState, partitions: Iterable[Target], groups: Sequence[str]) -> None:
    """Raise unless all these can take part in a transaction."""
    for topic_id, partition in partitions:
        topic = image.topic_by_id(topic_id)
        if topic is None or not 0 <= partition < len(topic.partitions):
            raise UnknownReplica(f"no partition {partition} of a topic {topic_id.hex()} is known here")
        if topic.internal:
            raise InvalidTopic(f"topic {topic.name!r} is internal: it takes no transactions")
    if groups and internal_topic(image, GROUPS_TOPIC) is None:
        raise UnknownReplica(f"{GROUPS_TOPIC} is not known here yet")


def _row(transaction: Transaction) -> TransactionRow:
    present: Transaction | Ended = transaction
    if transaction.ended is not None and transaction.phase is not Phase.ONGOING:
        present = transaction.ended
    return TransactionRow(
        transaction.transactional_id,
        *transaction.identity,
        transaction.phase.name.lower(),
        transaction.timeout_ms,
        transaction.start_ms if transaction.phase in _OPEN else 0,
        transaction.update_ms,
        list(present.partitions),
        list(present.groups),
        transaction.coordinator_epoch,
        transaction.ended.identity if transaction.ended is not None and transaction.is_ending else None,
    )
