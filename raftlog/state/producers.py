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

Everything here is immutable, so that copying all producers is a shallow copy of one dict. The window is
packed in bytes, 24 per batch: a full one takes 153 bytes where tuples take 1.2 KB, and there may be 100,000
of them.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import msgspec

from raftlog.errors import DuplicateSequence, OutOfOrderSequence, ProducerFenced, UnknownProducer
from raftlog.record.batch import SEQUENCE_MODULUS, BatchHeader

WINDOW_BATCHES: Final = 5
"""Batches remembered per producer; also the most that an idempotent producer may have in flight."""

_BATCH = struct.Struct(">iiqq")
_WINDOW_BYTES: Final = WINDOW_BATCHES * _BATCH.size
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


class ProducerState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One producer at one partition. Invariant: ``window`` holds 1 to 5 batches of ``epoch``, the newest
    last."""

    epoch: int
    window: bytes
    last_time_ms: int
    """Leader's time of its last batch: what expiry goes by."""

    @property
    def batches(self) -> tuple[BatchTrace, ...]:
        """The remembered batches, oldest first."""
        return tuple(BatchTrace(*fields) for fields in _BATCH.iter_unpack(self.window))

    @property
    def expected_sequence(self) -> int:
        """The only first sequence with which a new batch of this epoch is accepted."""
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
        UnknownProducer, ProducerFenced, OutOfOrderSequence, DuplicateSequence: refuse it.
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
    if first == known.expected_sequence:
        return None
    return _find_duplicate(known, header)


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


def _find_duplicate(known: ProducerState, header: BatchHeader) -> Duplicate:
    first, last, expected = header.base_sequence, header.last_sequence, known.expected_sequence
    for each in known.batches:
        if each.first_sequence == first and each.last_sequence == last:
            return Duplicate(each.base_offset, each.timestamp_ms)
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


def record_batch(
    known: ProducerState | None, header: BatchHeader, base_offset: int, timestamp_ms: int
) -> ProducerState:
    """The producer's state after a batch that :func:`check_sequence` let pass was appended."""
    packed = _BATCH.pack(header.base_sequence, header.last_sequence, base_offset, timestamp_ms)
    if known is not None and known.epoch == header.producer_epoch:
        packed = known.window[_BATCH.size - _WINDOW_BYTES :] + packed
    return ProducerState(header.producer_epoch, packed, timestamp_ms)
