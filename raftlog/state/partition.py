"""The state machine of a topic's partition: where its log starts and ends, and what its producers wrote last.

The leader asks ``check`` of its staged state before it appends a batch; every replica repeats the check
when it applies the entry, and halts when the answers differ: better one replica out of service than two
logs.
"""

from __future__ import annotations

from typing import ClassVar, Final, TypeAlias

import msgspec

from raftlog.errors import OffsetOutOfRange, RaftlogError
from raftlog.raft.types import Entry
from raftlog.record.batch import BatchHeader
from raftlog.record.frame import Buffer, FrameKind
from raftlog.state.command import (
    ApplyMismatch,
    CommandCodec,
    CommandStruct,
    SnapshotStruct,
    UnknownCommand,
    decode_snapshot,
)
from raftlog.state.producers import Duplicate, ProducerState, check_sequence, record_batch

_SNAPSHOT_VERSION: Final = 1


class SetLogStart(CommandStruct, frozen=True):
    """Records below ``offset`` are gone (retention). It never moves back: a lower offset changes nothing."""

    type = 1
    offset: int


class ExpireProducers(CommandStruct, frozen=True):
    """Forget producers whose last batch has a leader time below ``before_ms``."""

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


class _Snapshot(SnapshotStruct, frozen=True):
    applied_index: int
    next_offset: int
    log_start: int
    producers: list[tuple[int, ProducerState]]
    """In order of last use: the order is state, since it decides whom eviction takes."""


class PartitionState:
    """A partition after the entry at ``applied_index``.

    ``producers`` maps producer id to state, the one that wrote longest ago first. Leader times never decrease
    along the log, so this is also the order of ``last_time_ms``.
    """

    PRODUCERS_MAX: ClassVar[int] = 100_000
    """Above this the idlest producer is forgotten. Part of the state machine: to change it takes a new
    feature level, or replicas of two releases would forget different producers."""

    __slots__ = ("applied_index", "log_start", "next_offset", "producers")

    def __init__(self) -> None:
        self.applied_index = 0
        self.next_offset = 0
        """The offset that the next record gets."""
        self.log_start = 0
        """The lowest offset that can still be read."""
        self.producers: dict[int, ProducerState] = {}

    # -- decide (leader, on its staged state) ----------------------------------------------------------------

    def check(self, header: BatchHeader) -> Duplicate | None:
        """Decide about a batch whose header was checked.

        Returns:
            None: append it at ``next_offset``. A Duplicate: it is in the log already, there.

        Raises:
            UnknownProducer, ProducerFenced, OutOfOrderSequence, DuplicateSequence: refuse it.
        """
        if header.producer_id < 0:
            return None
        return check_sequence(self.producers.get(header.producer_id), header)

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
        if entry.kind == FrameKind.BATCH:
            result = self._apply_batch(entry)
        elif entry.kind == FrameKind.COMMAND:
            result = self._apply_command(decode_command(entry.payload))
        elif entry.kind not in (FrameKind.NOOP, FrameKind.CONF):
            raise UnknownCommand(f"entry {entry.index} is of kind {entry.kind}: upgrade raftlog")
        self.applied_index = entry.index
        return result

    def _apply_batch(self, entry: Entry) -> int:
        header = BatchHeader.parse(entry.payload)
        base_offset = self.next_offset
        if header.base_offset != base_offset or header.leader_epoch != entry.term:
            raise ApplyMismatch(
                f"batch at index {entry.index} has base offset {header.base_offset} and epoch "
                f"{header.leader_epoch}; offset {base_offset} and epoch {entry.term} are due"
            )
        if header.producer_id >= 0:
            try:
                duplicate = self.check(header)
            except RaftlogError as error:
                raise ApplyMismatch(f"batch at index {entry.index} is refused: {error}") from error
            if duplicate is not None:
                raise ApplyMismatch(f"batch at index {entry.index} doubles that at {duplicate.base_offset}")
            self._remember(header, base_offset, entry.leader_time_ms)
        self.next_offset = header.next_offset
        return base_offset

    def _remember(self, header: BatchHeader, base_offset: int, time_ms: int) -> None:
        producers = self.producers
        # taken out and put in again, so that it moves to the end of the order
        known = producers.pop(header.producer_id, None)
        if known is None and len(producers) >= self.PRODUCERS_MAX:
            del producers[next(iter(producers))]
        producers[header.producer_id] = record_batch(known, header, base_offset, time_ms)

    def _apply_command(self, command: Command) -> object:
        refusal = self.check_command(command)
        if refusal is not None:
            return refusal
        if isinstance(command, SetLogStart):
            self.log_start = max(self.log_start, command.offset)
            return self.log_start
        return self._expire(command.before_ms)

    def _expire(self, before_ms: int) -> int:
        expired: list[int] = []
        for producer_id, state in self.producers.items():
            if state.last_time_ms >= before_ms:
                break
            expired.append(producer_id)
        for producer_id in expired:
            del self.producers[producer_id]
        return len(expired)

    # -- copies ----------------------------------------------------------------------------------------------

    def copy(self) -> PartitionState:
        """An independent copy; cheap, since everything below the dict is immutable."""
        copied = type(self)()
        copied.applied_index = self.applied_index
        copied.next_offset = self.next_offset
        copied.log_start = self.log_start
        copied.producers = self.producers.copy()
        return copied

    def snapshot(self) -> bytes:
        """The whole state, for :meth:`restore`."""
        state = _Snapshot(
            _SNAPSHOT_VERSION,
            self.applied_index,
            self.next_offset,
            self.log_start,
            list(self.producers.items()),
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
        return restored

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PartitionState) and self.snapshot() == other.snapshot()
