"""The state machine of a topic's partition: where its log starts and ends, what its producers wrote last, and
which transactions are open in it.

A transaction is open here from its first batch to its marker. Readers of committed records read up to the
*last stable offset*, where the first open transaction begins; below it every transaction has ended, and what
the aborted ones wrote is known by :meth:`PartitionState.aborted_in`.

The leader asks ``check`` of its staged state before it appends a batch; every replica repeats the check
when it applies the entry, and halts when the answers differ: better one replica out of service than two
logs.
"""

from __future__ import annotations

from typing import ClassVar, Final, TypeAlias

import msgspec

from raftlog.errors import InvalidTransaction, OffsetOutOfRange, RaftlogError
from raftlog.raft.types import Entry
from raftlog.record.batch import CONTROL, TRANSACTIONAL, BatchHeader
from raftlog.record.control import Marker, decode_marker
from raftlog.record.frame import BATCH, COMMAND, CONF, FRAME_HEADER_BYTES, NOOP, Buffer
from raftlog.state.aborted import AbortedRange, AbortedRanges
from raftlog.state.command import (
    ApplyMismatch,
    CommandCodec,
    CommandStruct,
    SnapshotStruct,
    UnknownCommand,
    decode_snapshot,
)
from raftlog.state.producers import (
    Duplicate,
    ProducerState,
    check_marker,
    check_sequence,
    find_duplicate,
    record_batch,
    record_marker,
)

_SNAPSHOT_VERSION: Final = 2


class SetLogStart(CommandStruct, frozen=True):
    """Records below ``offset`` are gone (retention). It never moves back: a lower offset changes nothing."""

    type = 1
    offset: int


class ExpireProducers(CommandStruct, frozen=True):
    """Forget producers whose last batch has a leader time below ``before_ms``, but for those with an open
    transaction."""

    type = 2
    before_ms: int


Command: TypeAlias = SetLogStart | ExpireProducers

_codec: Final[CommandCodec[Command]] = CommandCodec("partition", SetLogStart, ExpireProducers)


def encode_command(command: Command) -> bytes:
    """The command as the payload of an entry of kind COMMAND."""
    return _codec.encode(command)


def decode_command(payload: Buffer) -> Command:
    """The command in such a payload; UnknownCommand if this release does not know it."""
    return _codec.decode(payload)


class OpenTransaction(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A transaction that has written here and not ended here. Its epoch is the one its producer has here."""

    epoch: int
    first_offset: int
    start_ms: int
    """Leader's time of its first batch."""


class _Snapshot(SnapshotStruct, frozen=True):
    applied_index: int
    next_offset: int
    log_start: int
    producers: list[tuple[int, ProducerState]]
    """In order of last use: the order is state, since it decides whom eviction takes."""
    open: list[tuple[int, OpenTransaction]]
    aborted: bytes


class PartitionState:
    """A partition after the entry at ``applied_index``.

    ``producers`` maps producer id to state, the one that wrote longest ago first. Leader times never decrease
    along the log, so this is also the order of ``last_time_ms``. ``open`` maps producer id to transaction, in
    order of ``first_offset``.
    """

    PRODUCERS_MAX: ClassVar[int] = 100_000
    """Above this the idlest producer without an open transaction is forgotten. Part of the state machine: to
    change it takes a new feature level, or replicas of two releases would forget different producers."""

    __slots__ = ("aborted", "applied_index", "log_start", "next_offset", "open", "producers")

    def __init__(self) -> None:
        self.applied_index = 0
        self.next_offset = 0
        """The offset that the next record gets."""
        self.log_start = 0
        """The lowest offset that can still be read."""
        self.producers: dict[int, ProducerState] = {}
        self.open: dict[int, OpenTransaction] = {}
        self.aborted = AbortedRanges()

    # -- look up ---------------------------------------------------------------------------------------------

    @property
    def last_stable_offset(self) -> int:
        """All transactions with a record below it have ended: what readers of committed records may read up
        to. Never moves back."""
        for first in self.open.values():
            return max(first.first_offset, self.log_start)
        return self.next_offset

    def aborted_in(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """What a reader of ``[start, end)``, with ``end`` at most the last stable offset, has to hide.

        Returns:
            (producer id, first offset, offset of the marker): batches of that producer between the two.
        """
        return [
            (each.producer_id, each.first_offset, each.marker_offset)
            for each in self.aborted.overlapping(start, end)
        ]

    def open_transactions(self) -> list[tuple[int, OpenTransaction]]:
        """(producer id, transaction), the one that holds back the last stable offset first."""
        return list(self.open.items())

    # -- decide (leader, on its staged state) ----------------------------------------------------------------

    def check(self, header: BatchHeader) -> Duplicate | None:
        """Decide about a batch whose header was checked.

        Returns:
            None: append it at ``next_offset``. A Duplicate: it is in the log already, there.

        Raises:
            UnknownProducer, ProducerFenced, OutOfOrderSequence, DuplicateSequence, TransactionAborted,
            InvalidTransaction: refuse it.
        """
        producer_id = header.producer_id
        if producer_id < 0:
            return None
        known = self.producers.get(producer_id)
        if producer_id in self.open:
            return self._check_while_open(self.open[producer_id], known, header)
        return check_sequence(known, header)

    def _check_while_open(
        self, opened: OpenTransaction, known: ProducerState | None, header: BatchHeader
    ) -> Duplicate | None:
        """In this order: duplicate, open transaction, epoch, sequence."""
        assert known is not None, "a producer with an open transaction is never forgotten"
        if header.attributes & TRANSACTIONAL and header.producer_epoch <= opened.epoch:
            return check_sequence(known, header)
        duplicate = find_duplicate(known, header)
        if duplicate is None:
            raise InvalidTransaction(
                f"producer {header.producer_id} has a transaction of epoch {opened.epoch} open here since "
                f"offset {opened.first_offset}: no other batch of it is taken before that has ended"
            )
        return duplicate

    def check_marker(self, marker: Marker) -> bool:
        """Decide about a marker. A producer that has written nothing here gets one too: it refuses what may
        come late.

        Returns:
            True: append it, as :func:`~raftlog.record.control.encode_marker` makes it. False: its transaction
            has ended so here already. Answer success, once that other marker is committed: at the latest when
            everything that is staged now has been applied.

        Raises:
            StaleCoordinator: a later coordinator has sent a marker before.
            ProducerFenced: a later epoch of the producer has been here, so this transaction is long over.
            InvalidTransaction: the transaction has ended in the other way, or one before it is still open
                here and must not be committed with it.
        """
        if not check_marker(self.producers.get(marker.producer_id), marker):
            return False
        opened = self.open.get(marker.producer_id)
        if marker.commit and opened is not None and opened.epoch != marker.epoch:
            raise InvalidTransaction(
                f"commit of epoch {marker.epoch} of producer {marker.producer_id} meets its transaction of "
                f"epoch {opened.epoch}, open here since offset {opened.first_offset}"
            )
        return True

    def check_command(self, command: Command) -> RaftlogError | None:
        """Why the command would be refused, or None."""
        if isinstance(command, SetLogStart) and not 0 <= command.offset <= self.next_offset:
            return OffsetOutOfRange(
                f"log start {command.offset} is outside of [{self.log_start}, {self.next_offset}]",
                start=self.log_start,
                end=self.next_offset,
            )
        return None

    # -- apply (every replica) -------------------------------------------------------------------------------

    def apply(self, entry: Entry) -> object:
        """Apply the entry after ``applied_index``.

        Returns:
            Of a batch, its base offset; of SetLogStart, the log start; of ExpireProducers, how many were
            forgotten; of a refused command, the RaftlogError (state unchanged); otherwise None.

        Raises:
            ApplyMismatch, UnknownCommand: the replica must halt; the state is as before.
        """
        if entry.index != self.applied_index + 1:
            raise ApplyMismatch(f"entry {entry.index} does not follow {self.applied_index}")
        result: object = None
        if entry.kind == BATCH:
            result = self._apply_batch(entry)
        elif entry.kind == COMMAND:
            result = self._apply_command(decode_command(entry.payload))
        elif entry.kind not in (NOOP, CONF):
            raise UnknownCommand(f"entry {entry.index} is of kind {entry.kind}: upgrade raftlog")
        self.applied_index = entry.index
        return result

    def _apply_batch(self, entry: Entry) -> int:
        header = BatchHeader.parse(entry.frame, FRAME_HEADER_BYTES)
        base_offset = self.next_offset
        if header.base_offset != base_offset or header.leader_epoch != entry.term:
            raise ApplyMismatch(
                f"batch at index {entry.index} has base offset {header.base_offset} and epoch "
                f"{header.leader_epoch}; offset {base_offset} and epoch {entry.term} are due"
            )
        if header.attributes & CONTROL:
            self._apply_marker(entry, header)
        elif header.producer_id >= 0:
            try:
                duplicate = self.check(header)
            except RaftlogError as error:
                raise ApplyMismatch(f"batch at index {entry.index} is refused: {error}") from error
            if duplicate is not None:
                raise ApplyMismatch(f"batch at index {entry.index} doubles that at {duplicate.base_offset}")
            self._remember(header, base_offset, entry.leader_time_ms)
        self.next_offset = base_offset + header.last_offset_delta + 1
        return base_offset

    def _remember(self, header: BatchHeader, base_offset: int, time_ms: int) -> None:
        producer_id = header.producer_id
        # taken out and put in again, so that it moves to the end of the order
        known = self.producers.pop(producer_id, None)
        if known is None:
            self._make_room()
        self.producers[producer_id] = record_batch(known, header, base_offset, time_ms)
        if header.attributes & TRANSACTIONAL and producer_id not in self.open:
            self.open[producer_id] = OpenTransaction(header.producer_epoch, base_offset, time_ms)

    def _make_room(self) -> None:
        if len(self.producers) >= self.PRODUCERS_MAX:
            idlest = next((each for each in self.producers if each not in self.open), None)
            if idlest is not None:
                del self.producers[idlest]

    def _apply_marker(self, entry: Entry, header: BatchHeader) -> None:
        try:
            marker = decode_marker(entry.payload, header)
            due = self.check_marker(marker)
        except RaftlogError as error:
            raise ApplyMismatch(f"marker at index {entry.index} is refused: {error}") from error
        if not due:
            raise ApplyMismatch(f"marker at index {entry.index} doubles an earlier one")
        producer_id, offset = marker.producer_id, self.next_offset
        known = self.producers.pop(producer_id, None)
        if known is None:
            self._make_room()
        self.producers[producer_id] = record_marker(known, marker, entry.leader_time_ms)
        opened = self.open.pop(producer_id, None)
        self.next_offset = offset + 1
        if opened is not None and not marker.commit:
            self.aborted.append(
                AbortedRange(producer_id, opened.epoch, opened.first_offset, offset, self.last_stable_offset)
            )

    def _apply_command(self, command: Command) -> object:
        refusal = self.check_command(command)
        if refusal is not None:
            return refusal
        if isinstance(command, SetLogStart):
            self.log_start = max(self.log_start, command.offset)
            self.aborted.drop_below(self.log_start)
            return self.log_start
        return self._expire(command.before_ms)

    def _expire(self, before_ms: int) -> int:
        expired: list[int] = []
        for producer_id, state in self.producers.items():
            if state.last_time_ms >= before_ms:
                break
            if producer_id not in self.open:
                expired.append(producer_id)
        for producer_id in expired:
            del self.producers[producer_id]
        return len(expired)

    # -- copies ----------------------------------------------------------------------------------------------

    def copy(self) -> PartitionState:
        """An independent copy; cheap, since everything below the dicts is immutable or packed."""
        copied = type(self)()
        copied.applied_index = self.applied_index
        copied.next_offset = self.next_offset
        copied.log_start = self.log_start
        copied.producers = self.producers.copy()
        copied.open = self.open.copy()
        copied.aborted = self.aborted.copy()
        return copied

    def snapshot(self) -> bytes:
        """The whole state, for :meth:`restore`."""
        state = _Snapshot(
            _SNAPSHOT_VERSION,
            self.applied_index,
            self.next_offset,
            self.log_start,
            list(self.producers.items()),
            list(self.open.items()),
            self.aborted.packed(),
        )
        return msgspec.msgpack.encode(state)

    @classmethod
    def restore(cls, data: Buffer) -> PartitionState:
        """The state that :meth:`snapshot` encoded.

        Raises:
            UnknownSnapshot: of another version, or not a snapshot.
        """
        state = decode_snapshot(data, _Snapshot, _SNAPSHOT_VERSION)
        restored = cls()
        restored.applied_index = state.applied_index
        restored.next_offset = state.next_offset
        restored.log_start = state.log_start
        restored.producers = dict(state.producers)
        restored.open = dict(state.open)
        restored.aborted = AbortedRanges(state.aborted)
        return restored

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PartitionState) and self.snapshot() == other.snapshot()
