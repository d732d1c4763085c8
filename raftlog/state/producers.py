"""What a partition remembers of each producer, and the rules by which a batch is new, a duplicate or refused.

A producer numbers its records per partition, modulo 2^31, and keeps at most five batches in flight (KIP-98,
KIP-360). The partition keeps for each producer its epoch and its last five batches. With ``expected`` the
sequence after the last one, a batch [first, last] of the same epoch is::

    first == expected                       new
    (first, last) equal to one of the five  duplicate: success, with the original offset
    last < expected                         DuplicateSequence: written, but it is not known where
    first < expected <= last                OutOfOrderSequence: a part is written, a part is not
    first > expected                        OutOfOrderSequence: something is missing in between

where "less" is on the circle of 2^31 numbers: up to half of it behind. An older epoch is fenced; a newer one
begins at 0, and so does a producer that the partition does not know.

A transactional producer has a new epoch for each transaction (KIP-890), so the marker that ends one ends its
epoch: what comes of it afterwards is refused, even where the transaction had written nothing. Only a resend
of a batch that is in the window is told its offset still. Otherwise a late append would open a transaction
that nobody ends.

Everything here is immutable, so that copying all producers is a shallow copy of one dict. The window is
packed in bytes, 24 per batch: a full one takes 153 bytes where tuples take 1.2 KB, and there may be 100,000
of them.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple, NoReturn

import msgspec

from raftlog.errors import (
    DuplicateSequence,
    InvalidTransaction,
    OutOfOrderSequence,
    ProducerFenced,
    StaleCoordinator,
    TransactionAborted,
    UnknownProducer,
)
from raftlog.record.batch import SEQUENCE_MODULUS, BatchHeader
from raftlog.record.control import Marker

WINDOW_BATCHES: Final = 5
"""Batches remembered per producer; also the most that an idempotent producer may have in flight."""

_BATCH = struct.Struct(">iiqq")
_BATCH_BYTES: Final = _BATCH.size
_WINDOW_BYTES: Final = WINDOW_BATCHES * _BATCH_BYTES
_HALF: Final = SEQUENCE_MODULUS // 2


class BatchTrace(NamedTuple):
    """One remembered batch."""

    first_sequence: int
    last_sequence: int
    base_offset: int
    timestamp_ms: int
    """Leader's time of the append."""


class Duplicate(msgspec.Struct, frozen=True, gc=False):
    """The batch was appended before, here."""

    base_offset: int
    timestamp_ms: int


class Outcome(IntEnum):
    """How the transaction of an epoch ended at a partition."""

    NONE = 0
    """It has not, or there is none."""
    COMMITTED = 1
    ABORTED = 2


class ProducerState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One producer at one partition. Invariant: ``window`` holds at most 5 batches of ``epoch``, the newest
    last; it is empty only when that epoch has ended without any."""

    epoch: int
    window: bytes
    last_time_ms: int
    """Leader's time of its last batch or marker: what expiry goes by."""
    coordinator_epoch: int = -1
    """The highest of its markers; -1: there was none."""
    outcome: Outcome = Outcome.NONE
    """If not NONE, ``epoch`` has ended: it takes no more batches."""

    @property
    def batches(self) -> tuple[BatchTrace, ...]:
        """The remembered batches, oldest first."""
        return tuple(BatchTrace(*fields) for fields in _BATCH.iter_unpack(self.window))

    @property
    def expected_sequence(self) -> int:
        """The only first sequence with which a new batch of this epoch is accepted, while it has not
        ended."""
        last: int = _BATCH.unpack_from(self.window, len(self.window) - _BATCH.size)[1]
        return (last + 1) % SEQUENCE_MODULUS


def check_sequence(known: ProducerState | None, header: BatchHeader) -> Duplicate | None:
    """Decide about a batch with a producer id.

    Args:
        known: what the partition remembers of that producer; None: nothing.
        header: of the checked batch.

    Returns:
        None: append it. A Duplicate: do not, and answer with what it says.

    Raises:
        UnknownProducer, ProducerFenced, OutOfOrderSequence, DuplicateSequence, TransactionAborted,
        InvalidTransaction: refuse it.
    """
    first = header.base_sequence
    if known is None:
        if first:
            raise UnknownProducer(
                f"producer {header.producer_id} is not known here, yet its batch has sequence {first}"
            )
        return None
    if header.producer_epoch != known.epoch:
        _check_epoch(known, header)
        return None
    if known.outcome:
        return _find_in_ended(known, header)
    window = known.window
    if first == (_BATCH.unpack_from(window, len(window) - _BATCH_BYTES)[1] + 1) % SEQUENCE_MODULUS:
        return None  # as expected
    return find_duplicate(known, header) or _refuse(known, header)


def _check_epoch(known: ProducerState, header: BatchHeader) -> None:
    if header.producer_epoch < known.epoch:
        raise ProducerFenced(
            f"producer {header.producer_id} of epoch {header.producer_epoch} is fenced by {known.epoch}",
            epoch=known.epoch,
        )
    if header.base_sequence:
        raise OutOfOrderSequence(
            f"producer {header.producer_id} begins epoch {header.producer_epoch} with sequence "
            f"{header.base_sequence} instead of 0",
            expected=0,
        )


def find_duplicate(known: ProducerState, header: BatchHeader) -> Duplicate | None:
    """Where the batch was appended, if it is one of those remembered."""
    if header.producer_epoch == known.epoch:
        first, last = header.base_sequence, header.last_sequence
        for each in known.batches:
            if each.first_sequence == first and each.last_sequence == last:
                return Duplicate(each.base_offset, each.timestamp_ms)
    return None


def _find_in_ended(known: ProducerState, header: BatchHeader) -> Duplicate:
    duplicate = find_duplicate(known, header)
    if duplicate is not None:
        return duplicate
    late = f"producer {header.producer_id}: its transaction of epoch {known.epoch} was"
    if known.outcome is Outcome.ABORTED:
        raise TransactionAborted(f"{late} aborted here")
    raise InvalidTransaction(f"{late} committed here: it takes no more batches")


def _refuse(known: ProducerState, header: BatchHeader) -> NoReturn:
    first, last, expected = header.base_sequence, header.last_sequence, known.expected_sequence
    behind = (expected - first) % SEQUENCE_MODULUS
    if behind > _HALF:
        problem = f"sequence {first} leaves a gap after"
    elif behind < header.record_count:
        problem = f"sequences {first} to {last} are written only in part before"
    else:
        raise DuplicateSequence(
            f"producer {header.producer_id}: sequences {first} to {last} were written before, too long ago "
            f"for their offset to be known; {expected} is expected"
        )
    raise OutOfOrderSequence(f"producer {header.producer_id}: {problem} {expected}", expected=expected)


def check_marker(known: ProducerState | None, marker: Marker) -> bool:
    """Decide about a marker.

    Returns:
        True: append it. False: its transaction has ended so already; success, and nothing to append.

    Raises:
        StaleCoordinator: a later coordinator has sent a marker before.
        ProducerFenced: a later epoch of the producer has been here, so this one is over.
        InvalidTransaction: the transaction has ended in the other way.
    """
    if known is None:
        return True
    if marker.coordinator_epoch < known.coordinator_epoch:
        raise StaleCoordinator(
            f"marker for producer {marker.producer_id} comes from coordinator epoch "
            f"{marker.coordinator_epoch}; that of {known.coordinator_epoch} has taken over",
            epoch=known.coordinator_epoch,
        )
    if marker.epoch < known.epoch:
        raise ProducerFenced(
            f"marker for epoch {marker.epoch} of producer {marker.producer_id}, which is at {known.epoch}",
            epoch=known.epoch,
        )
    if marker.epoch > known.epoch or not known.outcome:
        return True
    if known.outcome is not _outcome(marker):
        raise InvalidTransaction(
            f"transaction {marker.epoch} of producer {marker.producer_id} is {known.outcome.name.lower()} "
            "here: it cannot end in the other way"
        )
    return False


def record_batch(
    known: ProducerState | None, header: BatchHeader, base_offset: int, timestamp_ms: int
) -> ProducerState:
    """The producer's state after a batch that :func:`check_sequence` let pass was appended."""
    first = header.base_sequence
    last = (first + header.last_offset_delta) % SEQUENCE_MODULUS
    packed = _BATCH.pack(first, last, base_offset, timestamp_ms)
    if known is None:
        return ProducerState(header.producer_epoch, packed, timestamp_ms)
    if known.epoch == header.producer_epoch:
        packed = known.window[_BATCH_BYTES - _WINDOW_BYTES :] + packed
    return ProducerState(header.producer_epoch, packed, timestamp_ms, known.coordinator_epoch)


def record_marker(known: ProducerState | None, marker: Marker, timestamp_ms: int) -> ProducerState:
    """The producer's state after a marker that :func:`check_marker` let pass was appended."""
    window = known.window if known is not None and known.epoch == marker.epoch else b""
    return ProducerState(marker.epoch, window, timestamp_ms, marker.coordinator_epoch, _outcome(marker))


def _outcome(marker: Marker) -> Outcome:
    return Outcome.COMMITTED if marker.commit else Outcome.ABORTED
