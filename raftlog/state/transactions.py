"""The state machine of one ``__transactions`` partition: where each transactional id stands.

The leader decides (``raftlog.broker.transactions``) and logs the outcome: the whole transaction as it is from
then on. Applying puts it in place. What a transaction may become is in one table, :data:`TRANSITIONS`::

    (new) --> EMPTY --> ONGOING --> PREPARE_COMMIT --> COMPLETE_COMMIT --> ONGOING (the next one) ...
                           \\-----> PREPARE_ABORT ---> COMPLETE_ABORT ---> ONGOING ...

PREPARE_COMMIT and PREPARE_ABORT are the decision: once one of them is committed there is only one way on.
Committing takes the coordinator's word to every partition that is enlisted; when all have it the transaction
is complete (KIP-98).

One command may commit a transaction and begin the next of the same producer::

    ONGOING, epoch n  -->  ONGOING, epoch n + 1; ``ended``: n, committed, and who is to be told

So a transactional id has at most two transactions: the present one, and the last that ended, which is
complete when nobody is left to be told. The present one cannot end before that.

Every end leaves the id with another (producer id, epoch) than the ended transaction had (KIP-890), and
remembers how the last two ended, whatever happens in between: so the retry of an end is answered as the first
try was, and can never be taken for the end of the next transaction.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple, TypeAlias

import msgspec

from raftlog.errors import InvalidTransaction, RaftlogError, UnknownTransactionalId
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

_SNAPSHOT_VERSION: Final = 2


class Identity(NamedTuple):
    """Who may write: a producer id and one of its epochs. No two transactions ever have the same."""

    producer_id: int
    epoch: int


Target: TypeAlias = tuple[bytes, int]
"""(topic id, partition)."""


class Phase(IntEnum):
    """Where the present transaction stands (Kafka's names)."""

    EMPTY = 0
    """The id has a producer, which has not begun a transaction."""
    ONGOING = 1
    PREPARE_COMMIT = 2
    """Decided, and not known everywhere yet; no other has begun."""
    PREPARE_ABORT = 3
    COMPLETE_COMMIT = 4
    COMPLETE_ABORT = 5
    DEAD = 6
    """The id is forgotten; never stored."""

    @property
    def is_ending(self) -> bool:
        """Decided, and not known everywhere; nothing else is open."""
        return self in (Phase.PREPARE_COMMIT, Phase.PREPARE_ABORT)


TRANSITIONS: Final[dict[Phase, frozenset[Phase]]] = {
    # a new producer takes over; a transaction begins; an abort of one that never began; the id expires
    Phase.EMPTY: frozenset({Phase.EMPTY, Phase.ONGOING, Phase.COMPLETE_ABORT, Phase.DEAD}),
    # another partition is enlisted, or it commits and the next begins; it ends
    Phase.ONGOING: frozenset({Phase.ONGOING, Phase.PREPARE_COMMIT, Phase.PREPARE_ABORT}),
    Phase.PREPARE_COMMIT: frozenset({Phase.COMPLETE_COMMIT}),
    Phase.PREPARE_ABORT: frozenset({Phase.COMPLETE_ABORT}),
    Phase.COMPLETE_COMMIT: frozenset({Phase.EMPTY, Phase.ONGOING, Phase.COMPLETE_ABORT, Phase.DEAD}),
    Phase.COMPLETE_ABORT: frozenset({Phase.EMPTY, Phase.ONGOING, Phase.COMPLETE_ABORT, Phase.DEAD}),
    Phase.DEAD: frozenset({Phase.EMPTY}),
}
"""What each phase may become by one command; DEAD stands for an id that is not there."""


class Cause(IntEnum):
    """Who ended a transaction: it decides what its producer hears."""

    PRODUCER = 0
    """The producer itself."""
    TIMEOUT = 1
    OPERATOR = 2
    FENCED = 3
    """A later producer of the same transactional id. The one that was fenced is out for good."""


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """How the last transaction ended, or is ending."""

    identity: Identity
    """It ran under this: what its markers name."""
    commit: bool
    cause: Cause = Cause.PRODUCER
    partitions: tuple[Target, ...] = ()
    """Each gets a marker. Empty, like ``groups``, when it is complete."""
    groups: tuple[str, ...] = ()
    """Consumer groups: the ``__groups`` partition of each gets a marker."""

    @property
    def is_complete(self) -> bool:
        """Whether all that took part in it have been told."""
        return not self.partitions and not self.groups


class Transaction(msgspec.Struct, frozen=True, array_like=True):
    """One transactional id."""

    transactional_id: str
    identity: Identity
    """Who may write now. After an end that is the one for the next transaction already, and given to the
    producer in its answer; only where the end was FENCED it is given to nobody."""
    phase: Phase
    timeout_ms: int
    start_ms: int
    """When the transaction began, by the clock of the leader that enlisted its first partition; if it was
    begun with the end of the one before, then. In other phases than ONGOING and the two that follow it, no
    meaning."""
    update_ms: int
    """When the last change was decided: what expiry goes by."""
    coordinator_epoch: int
    """Term of the leader that decided the last change."""
    partitions: tuple[Target, ...] = ()
    """Enlisted in what is ongoing."""
    groups: tuple[str, ...] = ()
    """Enlisted consumer groups."""
    ended: Ended | None = None
    """None: none has ended since the present producer opened the id."""
    before: Ended | None = None
    """The end before that: the transaction after it may have been begun with it, and be aborted, before its
    producer has heard of either."""
    topics_version: int = 0
    """A version of the metadata that has, or had, all that is enlisted: what one as new as this does not know
    was deleted."""

    @property
    def is_ending(self) -> bool:
        """Whether one is decided, and not yet known everywhere."""
        return self.ended is not None and not self.ended.is_complete


class PutTransaction(CommandStruct, frozen=True):
    """The transaction is this from now on."""

    type = 1
    transaction: Transaction


class RemoveTransaction(CommandStruct, frozen=True):
    """Forget a transactional id that was not used for long."""

    type = 2
    transactional_id: str


Command: TypeAlias = PutTransaction | RemoveTransaction

_codec: Final[CommandCodec[Command]] = CommandCodec("transactions", PutTransaction, RemoveTransaction)


def encode_command(command: Command) -> bytes:
    """The command as the payload of an entry of kind COMMAND."""
    return _codec.encode(command)


def decode_command(payload: Buffer) -> Command:
    """The command in such a payload; UnknownCommand if this release does not know it."""
    return _codec.decode(payload)


class _Snapshot(SnapshotStruct, frozen=True):
    applied_index: int
    transactions: list[Transaction]


def _follows(old: Transaction, new: Transaction) -> bool:
    """Identities only move on: with a transaction's end or a new producer, not in between."""
    moves_on = new.identity.producer_id != old.identity.producer_id or new.identity.epoch > old.identity.epoch
    if old.phase is Phase.ONGOING:
        enlists = new.phase is Phase.ONGOING and new.identity == old.identity
        return enlists or (moves_on and new.ended is not None and new.ended.identity == old.identity)
    if new.phase is Phase.ONGOING or old.is_ending:
        return new.identity == old.identity
    return moves_on


def _is_consistent(transaction: Transaction) -> bool:
    """Whether the phase says what the rest does."""
    phase, ended = transaction.phase, transaction.ended
    if phase is Phase.ONGOING:
        return bool(transaction.partitions or transaction.groups)
    if transaction.partitions or transaction.groups or transaction.is_ending is not phase.is_ending:
        return False
    return not phase.is_ending or (ended is not None and ended.commit is (phase is Phase.PREPARE_COMMIT))


class TransactionsState:
    """The transactions of one partition after the entry at ``applied_index``; transactional id ->
    Transaction, which is immutable."""

    __slots__ = ("applied_index", "transactions")

    def __init__(self) -> None:
        self.applied_index = 0
        self.transactions: dict[str, Transaction] = {}

    # -- look up ---------------------------------------------------------------------------------------------

    def transaction(self, transactional_id: str) -> Transaction:
        """The transaction of that id; UnknownTransactionalId if there is none."""
        found = self.transactions.get(transactional_id)
        if found is None:
            raise UnknownTransactionalId(f"no transactional id {transactional_id!r}")
        return found

    def ending(self) -> list[Transaction]:
        """Those that are decided but not complete: a new leader sends their markers (again)."""
        return [each for each in self.transactions.values() if each.is_ending]

    # -- decide (leader, on its staged state) ----------------------------------------------------------------

    def check_command(self, command: Command) -> RaftlogError | None:
        """Why the command would be refused, or None. A leader proposes no such command."""
        if isinstance(command, RemoveTransaction):
            new, name = None, command.transactional_id
        else:
            new, name = command.transaction, command.transaction.transactional_id
        old = self.transactions.get(name)
        before, after = (Phase.DEAD if each is None else each.phase for each in (old, new))
        if after not in TRANSITIONS[before]:
            return InvalidTransaction(f"{before.name} cannot become {after.name}")
        if new is not None and old is not None and not _follows(old, new):
            return InvalidTransaction(f"{tuple(new.identity)} cannot follow {tuple(old.identity)}")
        if new is not None and not _is_consistent(new):
            return InvalidTransaction(f"{after.name} contradicts what it is said of: {new}")
        return None

    # -- apply (every replica) -------------------------------------------------------------------------------

    def apply(self, entry: Entry) -> object:
        """Apply the entry after ``applied_index``.

        Returns:
            Of PutTransaction, the transaction; of RemoveTransaction, the one that was removed; otherwise
            None.

        Raises:
            ApplyMismatch, UnknownCommand: the replica must halt; the state is as before.
        """
        if entry.index != self.applied_index + 1:
            raise ApplyMismatch(f"entry {entry.index} does not follow {self.applied_index}")
        result: object = None
        if entry.kind == FrameKind.COMMAND:
            result = self._apply_command(entry, decode_command(entry.payload))
        elif entry.kind not in (FrameKind.NOOP, FrameKind.CONF):
            raise UnknownCommand(f"entry {entry.index} is of kind {entry.kind}: upgrade raftlog")
        self.applied_index = entry.index
        return result

    def _apply_command(self, entry: Entry, command: Command) -> Transaction:
        refusal = self.check_command(command)
        if refusal is not None:
            raise ApplyMismatch(f"transactional id at index {entry.index}: {refusal}") from refusal
        if isinstance(command, RemoveTransaction):
            return self.transactions.pop(command.transactional_id)
        transaction = command.transaction
        if transaction.coordinator_epoch != entry.term:
            raise ApplyMismatch(
                f"transaction at index {entry.index} was decided in term {transaction.coordinator_epoch}, "
                f"the entry is of {entry.term}"
            )
        self.transactions[transaction.transactional_id] = transaction
        return transaction

    # -- copies ----------------------------------------------------------------------------------------------

    def copy(self) -> TransactionsState:
        """An independent copy."""
        copied = type(self)()
        copied.applied_index = self.applied_index
        copied.transactions = self.transactions.copy()
        return copied

    def snapshot(self) -> bytes:
        """The whole state, for :meth:`restore`."""
        state = _Snapshot(_SNAPSHOT_VERSION, self.applied_index, list(self.transactions.values()))
        return msgspec.msgpack.encode(state)

    @classmethod
    def restore(cls, data: Buffer) -> TransactionsState:
        """The state that :meth:`snapshot` encoded.

        Raises:
            UnknownSnapshot: of another version, or not a snapshot.
        """
        state = decode_snapshot(data, _Snapshot, _SNAPSHOT_VERSION)
        restored = cls()
        restored.applied_index = state.applied_index
        restored.transactions = {each.transactional_id: each for each in state.transactions}
        return restored

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TransactionsState) and self.snapshot() == other.snapshot()
