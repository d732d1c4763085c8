"""The transaction coordinator: the leader of a ``__transactions`` partition decides about the transactions of
the transactional ids that hash to it.

Decisions are pure: a method reads the staged state and the time, and returns a :class:`Decision`, whose
command the host proposes and whose answer it gives once that is committed. One transaction, with C the
coordinator, P a partition of a topic, G a partition of ``__groups``::

    producer                       C (log of __transactions)                  P              G
       | InitTransactions            |                                        |              |
       |---------------------------->| EMPTY (7, 0)                           |              |
       |<----------------- (7, 0) ---|                                        |              |
       | Enlist (7, 0): P            |                                        |              |
       |---------------------------->| ONGOING (7, 0) [P]                     |              |
       |<----------------------------|                                        |              |
       | Produce (7, 0), sequence 0  |                                        |              |
       |--------------------------------------------------------------------->| opens (7, 0) |
       | Enlist (7, 0): group g      |                                        |              |
       |---------------------------->| ONGOING (7, 0) [P, g]                  |              |
       | StageOffsets (7, 0), member |                                        |              |
       |------------------------------------------------------------------------------------>| stages
       | EndTransaction (7, 0) commit|                                        |              |
       |---------------------------->| PREPARE_COMMIT, next is (7, 1)         |              |
       |<----------------- (7, 1) ---|                                        |              |
       |                             |-- WriteMarkers (7, 0) commit, term --->| ends (7, 0)  |
       |                             |----------------------------------------|------------->| shows
       |                             | COMPLETE_COMMIT                        |              |
       | Enlist (7, 1): P            |                                        |              |
       |---------------------------->| ONGOING (7, 1) [P]      ...

A producer whose transactions follow each other asks for the next one with the commit. Then the decision and
the next enlistment are one command, and until the next commit two rounds are enough::

       | EndTransaction (7, 1) commit, written: P; begin again             |
       |---------------------------->| ONGOING (7, 2) [P], ended (7, 1) [P]   |
       |<-- (7, 2), begun ---------- |                                        |
       | Produce (7, 2), "(7, 1) was committed, says coordinator epoch 3"     |
       |--------------------------------------------------------------------->| ends (7, 1), opens (7, 2)
       | EndTransaction (7, 2) commit, written: P; begin again             |
       |---------------------------->| ONGOING (7, 3) [P], ended (7, 2) [P]  ...

The producer carries the decision to where it goes on writing, and there the marker goes into the log just
before its records. What it has written in epoch 2 needs no other marker of epoch 1: so says the next end.
Where it does not come by the coordinator sends the marker, when a moment has passed.

Why it holds:

- *One outcome.* PREPARE_COMMIT or PREPARE_ABORT is one entry of a Raft log, and :data:`TRANSITIONS` knows no
  way from one to the other. Markers are sent only of what is committed and applied, so two coordinators (an
  old leader that does not know it yet, and a new one) can only send the same; the older one's are refused all
  the same, by their term.
- *Nothing late.* A transaction has an identity of its own (KIP-890). Its marker ends that identity at every
  partition that was enlisted, also where nothing was written, before the next but one begins: data,
  enlistments and ends that come later name an identity that is over. Where the next one writes before the
  marker is there, its epoch ends the one before as well; and while that is open, no record of the next is
  taken without the word that it has ended. So nothing is ever a part of two transactions.
- *The word of a producer* is as good as the coordinator's: it has it from there, after it was committed.
- *Nothing hangs.* A partition is enlisted durably before the producer may write to it, so whoever leads knows
  where markers are due.
- *No fence is handed out.* Init on an open transaction moves the id to an epoch that nobody is given, aborts,
  and has the caller ask again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from msgspec.structs import replace

from raftlog.errors import (
    ConcurrentTransactions,
    ConfigError,
    InvalidTransaction,
    ProducerFenced,
    RaftlogError,
    TransactionAborted,
    TransactionTimedOut,
    UnknownTransactionalId,
)
from raftlog.record.control import Marker
from raftlog.state.transactions import (
    Cause,
    Command,
    Ended,
    Identity,
    Phase,
    PutTransaction,
    RemoveTransaction,
    Target,
    Transaction,
    TransactionsState,
)

EPOCH_MAX: Final = 32_766
"""The last epoch that is given to a producer; after it comes another producer id. One is left above, to fence
with: epochs are int16."""
TRANSACTION_TIMEOUT_MS_MAX: Final = 15 * 60_000
TRANSACTIONAL_ID_EXPIRY_MS: Final = 7 * 24 * 3_600_000
ABORT_SCAN_MS: Final = 10_000
"""How often a leader looks for transactions that are overdue."""
_ID_LENGTH_MAX: Final = 249


class NeedsProducerId(Exception):
    """The decision takes a producer id that nobody had before: get one, and decide again with it."""


class Decision(NamedTuple):
    """What a request comes to.

    Without a command the answer waits all the same, until everything that was staged when it was decided is
    committed: it may speak of a command that is in flight.
    """

    command: Command | None = None
    answer: Identity | None = None
    begun: bool = False
    """A transaction has begun under the answer."""
    error: RaftlogError | None = None
    """Instead of an answer, although there is a command."""


class Enlisted(NamedTuple):
    """What takes part in a transaction: at least one of something."""

    partitions: tuple[Target, ...]
    groups: tuple[str, ...]


class TransactionCoordinator:
    """Decides for one term of one leader.

    Args:
        term: of the leader; part of what it decides and of every marker.
        since_ms: when it began to serve, by the clock that gives it ``now_ms``. Transactions that were open
            then get their whole timeout again, so that neither a restart nor a clock that is ahead aborts
            anybody's work.
        timeout_ms_max: longest transaction timeout that a producer may ask for.
        expiry_ms: a transactional id that was not used for so long is forgotten.
    """

    def __init__(
        self,
        term: int,
        since_ms: int,
        *,
        timeout_ms_max: int = TRANSACTION_TIMEOUT_MS_MAX,
        expiry_ms: int = TRANSACTIONAL_ID_EXPIRY_MS,
    ) -> None:
        self.term: Final = term
        self._since_ms = since_ms
        self._timeout_ms_max = timeout_ms_max
        self._expiry_ms = expiry_ms

    # -- requests of producers -------------------------------------------------------------------------------

    def init(
        self,
        state: TransactionsState,
        now_ms: int,
        transactional_id: str,
        timeout_ms: int,
        holder: Identity | None = None,
        fresh: int | None = None,
    ) -> Decision:
        """A producer opens the transactional id; whoever had it before is fenced.

        Args:
            state: staged.
            now_ms: leader time.
            transactional_id: 1 to 249 characters.
            timeout_ms: its transactions are aborted when they are open for longer.
            holder: the identity of a producer that has the id and wants another epoch (KIP-360): refused if
                somebody else has opened the id since.
            fresh: a producer id that nobody had before, if NeedsProducerId was raised.

        Returns:
            With the identity to write under.

        Raises:
            ConcurrentTransactions: one is being ended; ask again. Also as the decision's error, when one is
                open: it is aborted now.
            ConfigError, ProducerFenced, UnknownTransactionalId (with a holder only), NeedsProducerId.
        """
        self._check_settings(transactional_id, timeout_ms)
        old = state.transactions.get(transactional_id)
        if old is None:
            if holder is not None:
                raise UnknownTransactionalId(f"transactional id {transactional_id!r} has expired")
            if fresh is None:
                raise NeedsProducerId
            first = Transaction(
                transactional_id, Identity(fresh, 0), Phase.EMPTY, timeout_ms, now_ms, now_ms, self.term
            )
            return Decision(PutTransaction(first), first.identity)
        if holder is not None:
            _check_holder(old, holder)
        if old.is_ending:
            raise _ending(old)
        if old.phase is Phase.ONGOING:
            cause = Cause.FENCED if holder is None else Cause.PRODUCER
            return Decision(self._prepare(old, now_ms, False, cause, fresh), error=_ending(old))
        identity = _next(old.identity, fresh)
        ended = old.ended
        if holder is None:
            ended = None
        elif holder == old.identity:
            ended = Ended(holder, commit=False)
        new = self._changed(
            old, now_ms, identity=identity, phase=Phase.EMPTY, timeout_ms=timeout_ms, ended=ended, before=None
        )
        return Decision(PutTransaction(new), identity)

    def _check_settings(self, transactional_id: str, timeout_ms: int) -> None:
        if not 0 < len(transactional_id) <= _ID_LENGTH_MAX:
            raise ConfigError(f"a transactional id has 1 to {_ID_LENGTH_MAX} characters")
        if not 0 < timeout_ms <= self._timeout_ms_max:
            raise ConfigError(f"transaction timeout {timeout_ms} ms is not in 1 to {self._timeout_ms_max}")

    def enlist(
        self,
        state: TransactionsState,
        now_ms: int,
        transactional_id: str,
        identity: Identity,
        partitions: Iterable[Target] = (),
        groups: Iterable[str] = (),
        topics_version: int = 0,
    ) -> Decision:
        """Partitions and groups are about to take part; the first one begins the transaction.

        Args:
            topics_version: of metadata that has all of them.

        Raises:
            ConcurrentTransactions: the one before is still being ended; ask again.
            TransactionTimedOut, TransactionAborted, InvalidTransaction: it was ended.
            ProducerFenced, UnknownTransactionalId.
        """
        old = _held(state, transactional_id, identity)
        begun = old.phase is Phase.ONGOING
        if old.is_ending and not begun:
            raise _ending(old)
        all_partitions = tuple(dict.fromkeys((*old.partitions, *partitions)))
        all_groups = tuple(dict.fromkeys((*old.groups, *groups)))
        if (all_partitions, all_groups) == (old.partitions, old.groups):
            return Decision()
        new = self._changed(
            old,
            now_ms,
            phase=Phase.ONGOING,
            start_ms=old.start_ms if begun else now_ms,
            partitions=all_partitions,
            groups=all_groups,
            topics_version=max(topics_version, old.topics_version),
        )
        return Decision(PutTransaction(new))

    def end(
        self,
        state: TransactionsState,
        now_ms: int,
        transactional_id: str,
        identity: Identity,
        commit: bool,
        fresh: int | None = None,
        *,
        settled: bool = False,
        again: Enlisted | None = None,
        topics_version: int = 0,
    ) -> Decision:
        """The producer ends the transaction of this identity. May be asked again, with the same answer.

        Args:
            settled: all who were to be told of the end of the one before have been, as far as the host knows.
            again: begin the next one with these, if it commits.
            topics_version: of metadata that has all of them.

        Returns:
            With the identity for the next transaction.

        Raises:
            ConcurrentTransactions: the one before is still being ended; ask again.
            TransactionTimedOut, TransactionAborted: it cannot commit, for it was aborted.
            InvalidTransaction: it has ended in the other way, or there is nothing to commit.
            ProducerFenced, UnknownTransactionalId, NeedsProducerId.
        """
        old = state.transaction(transactional_id)
        for ended in (old.ended, old.before):
            if ended is not None and identity == ended.identity and not _is_fence(old):
                if commit != ended.commit:
                    raise _over(old, ended)
                return Decision(None, old.identity, old.phase is Phase.ONGOING)
        _held(state, transactional_id, identity)
        if old.is_ending and not (settled and old.phase is Phase.ONGOING):
            raise _ending(old)
        if old.phase is Phase.ONGOING:
            if commit and again is not None and identity.epoch < EPOCH_MAX:
                return self._commit_and_begin(old, now_ms, again, topics_version)
            prepare = self._prepare(old, now_ms, commit, Cause.PRODUCER, fresh)
            return Decision(prepare, prepare.transaction.identity)
        if commit:
            raise InvalidTransaction(f"{transactional_id!r}: no transaction has begun, nothing to commit")
        # An enlistment may still be on its way: the epoch is over, so that it will open nothing.
        return self._skip(old, now_ms, Cause.PRODUCER, fresh)

    def _skip(self, old: Transaction, now_ms: int, cause: Cause, fresh: int | None) -> Decision:
        """End an identity under which nothing has begun."""
        ended = Ended(old.identity, False, cause)
        identity = _next(old.identity, fresh)
        new = self._changed(
            old, now_ms, identity=identity, phase=Phase.COMPLETE_ABORT, ended=ended, before=None
        )
        return Decision(PutTransaction(new), identity)

    def _prepare(
        self, old: Transaction, now_ms: int, commit: bool, cause: Cause, fresh: int | None
    ) -> PutTransaction:
        """The decision how an open transaction ends."""
        assert old.phase is Phase.ONGOING, old
        if cause is Cause.FENCED:
            identity = Identity(old.identity.producer_id, old.identity.epoch + 1)
        else:
            identity = _next(old.identity, fresh)
        phase = Phase.PREPARE_COMMIT if commit else Phase.PREPARE_ABORT
        return PutTransaction(
            self._changed(
                old,
                now_ms,
                identity=identity,
                phase=phase,
                partitions=(),
                groups=(),
                ended=_end(old, commit, cause),
                before=_remembered(old.ended),
            )
        )

    def _commit_and_begin(
        self, old: Transaction, now_ms: int, again: Enlisted, topics_version: int
    ) -> Decision:
        """The decision that what is open has committed, and its next begins."""
        identity = Identity(old.identity.producer_id, old.identity.epoch + 1)
        new = self._changed(
            old,
            now_ms,
            identity=identity,
            start_ms=now_ms,
            partitions=again.partitions,
            groups=again.groups,
            ended=_end(old, True, Cause.PRODUCER),
            before=_remembered(old.ended),
            topics_version=max(topics_version, old.topics_version),
        )
        return Decision(PutTransaction(new), identity, begun=True)

    def _changed(self, old: Transaction, now_ms: int, **fields: object) -> Transaction:
        return replace(old, update_ms=max(now_ms, old.update_ms), coordinator_epoch=self.term, **fields)

    # -- markers ---------------------------------------------------------------------------------------------

    def marker(self, transaction: Transaction) -> Marker:
        """What every partition and group of a transaction that is ending has to be told. Only of what is
        applied, never of what is merely staged."""
        ended = transaction.ended
        assert ended is not None, transaction
        assert not ended.is_complete, transaction
        return Marker(ended.identity.producer_id, ended.identity.epoch, self.term, ended.commit)

    def complete(
        self, state: TransactionsState, now_ms: int, transactional_id: str, identity: Identity
    ) -> Command | None:
        """All markers of the transaction with this identity have landed (see :func:`has_landed`).

        Returns:
            The command to propose; None if somebody has completed it before.
        """
        old = state.transactions.get(transactional_id)
        ended = None if old is None else old.ended
        if old is None or ended is None or ended.identity != identity or ended.is_complete:
            return None
        phase = old.phase
        if phase is not Phase.ONGOING:
            phase = Phase.COMPLETE_COMMIT if ended.commit else Phase.COMPLETE_ABORT
        return PutTransaction(self._changed(old, now_ms, phase=phase, ended=_remembered(ended)))

    # -- time and operators ----------------------------------------------------------------------------------

    def overdue(self, state: TransactionsState, now_ms: int) -> list[str]:
        """Transactional ids whose transaction has been open for longer than its timeout: to be aborted by
        :meth:`abort` with Cause.TIMEOUT."""
        return [
            each.transactional_id
            for each in state.transactions.values()
            if each.phase is Phase.ONGOING and now_ms - max(each.start_ms, self._since_ms) >= each.timeout_ms
        ]

    def abort(
        self,
        state: TransactionsState,
        now_ms: int,
        transactional_id: str,
        cause: Cause,
        fresh: int | None = None,
    ) -> Decision:
        """Abort what is open, in place of its producer, which may go on with the next transaction. An
        operator's abort with nothing open ends the identity all the same.

        Raises:
            ConcurrentTransactions: it is being ended already.
            UnknownTransactionalId, NeedsProducerId.
        """
        old = state.transaction(transactional_id)
        if old.is_ending:
            raise _ending(old)
        if old.phase is Phase.ONGOING:
            return Decision(self._prepare(old, now_ms, False, cause, fresh))
        if cause is Cause.TIMEOUT:
            return Decision()
        return Decision(self._skip(old, now_ms, cause, fresh).command)

    def abort_hanging(
        self, state: TransactionsState, transactional_id: str, identity: Identity, target: Target
    ) -> Marker:
        """An operator aborts what is open at a partition (``OpenTransactions`` of it says what), and of which
        no transaction knows.

        Args:
            state: staged.
            transactional_id: whose it was; "" if no partition of ``__transactions`` knows the producer id.
            identity: what is open there.
            target: the partition.

        Returns:
            The marker to write.

        Raises:
            InvalidTransaction: it may still be a part of a transaction: abort that one.
            ConcurrentTransactions: its marker is on its way.
            UnknownTransactionalId.
        """
        if transactional_id:
            _check_hanging(state.transaction(transactional_id), identity, target)
        else:
            for each in state.transactions.values():
                ending = each.ended if each.is_ending else None
                known = (each.identity, *(() if ending is None else (ending.identity,)))
                if any(identity.producer_id == one.producer_id for one in known):
                    raise InvalidTransaction(
                        f"producer {identity.producer_id} belongs to {each.transactional_id!r}: name it"
                    )
        return Marker(identity.producer_id, identity.epoch, self.term, commit=False)

    def expired(self, state: TransactionsState, now_ms: int) -> list[Command]:
        """Forget the transactional ids that nobody has used for long."""
        return [
            RemoveTransaction(each.transactional_id)
            for each in state.transactions.values()
            if each.phase is not Phase.ONGOING
            and not each.is_ending
            and now_ms - max(each.update_ms, self._since_ms) >= self._expiry_ms
        ]


def _end(transaction: Transaction, commit: bool, cause: Cause) -> Ended:
    """The end of what is open, which all that is enlisted has to be told."""
    return Ended(transaction.identity, commit, cause, transaction.partitions, transaction.groups)


def _remembered(ended: Ended | None) -> Ended | None:
    """An end that is complete."""
    return None if ended is None else replace(ended, partitions=(), groups=())


def has_landed(error: RaftlogError | None) -> bool:
    """Whether a partition that answered a marker so needs it no more.

    Of the errors, ProducerFenced and InvalidTransaction say that the transaction is over there; on anything
    else the marker is sent again, but for StaleCoordinator: then a later leader sends it.
    """
    return error is None or isinstance(error, ProducerFenced | InvalidTransaction)


def _next(identity: Identity, fresh: int | None) -> Identity:
    """The identity after this one."""
    if identity.epoch < EPOCH_MAX:
        return Identity(identity.producer_id, identity.epoch + 1)
    if fresh is None:
        raise NeedsProducerId
    return Identity(fresh, 0)


def _held(state: TransactionsState, transactional_id: str, identity: Identity) -> Transaction:
    """The transaction of that id, whose present identity must be this one."""
    found = state.transaction(transactional_id)
    if identity == found.identity and not _is_fence(found):
        return found
    if found.ended is not None and identity == found.ended.identity:
        raise _over(found, found.ended)
    raise _fenced(found, identity)


def _is_fence(transaction: Transaction) -> bool:
    """Nobody was given the present identity."""
    return transaction.ended is not None and transaction.ended.cause is Cause.FENCED


def _check_holder(old: Transaction, holder: Identity) -> None:
    """The producer that says so has the id still: its identity is the present one, or the one before if that
    was ended without a new producer."""
    if _is_fence(old):
        raise _fenced(old, holder)
    before = old.ended is not None and holder == old.ended.identity and old.phase is not Phase.ONGOING
    if holder != old.identity and not before:
        raise _fenced(old, holder)


def _check_hanging(transaction: Transaction, identity: Identity, target: Target) -> None:
    if identity == transaction.identity:
        raise InvalidTransaction(
            f"{tuple(identity)} is the present identity of {transaction.transactional_id!r}: abort that"
        )
    ended = transaction.ended
    if ended is not None and identity == ended.identity and target in ended.partitions:
        raise _ending(transaction)


def _ending(transaction: Transaction) -> ConcurrentTransactions:
    return ConcurrentTransactions(f"{transaction.transactional_id!r} is ending its last transaction")


def _fenced(transaction: Transaction, identity: Identity) -> ProducerFenced:
    return ProducerFenced(
        f"{transaction.transactional_id!r}: {tuple(identity)} is fenced by {tuple(transaction.identity)}",
        epoch=transaction.identity.epoch,
    )


def _over(transaction: Transaction, ended: Ended) -> RaftlogError:
    """Why the transaction that has ended so takes no more part in anything."""
    name = repr(transaction.transactional_id)
    if ended.cause is Cause.FENCED:
        return _fenced(transaction, ended.identity)
    if ended.cause is Cause.TIMEOUT:
        return TransactionTimedOut(
            f"{name}: its transaction was open for more than {transaction.timeout_ms} ms"
        )
    if ended.cause is Cause.OPERATOR:
        return TransactionAborted(f"{name}: its transaction was aborted by an operator")
    how = "committed" if ended.commit else "aborted"
    return InvalidTransaction(f"{name}: its transaction of epoch {ended.identity.epoch} was {how} before")
