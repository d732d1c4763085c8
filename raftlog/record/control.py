"""Control batches: the markers that end a transaction in a partition, in Kafka's format.

A marker is a batch of one record with the transactional and the control bit set. It takes one offset, has no
sequence, and only brokers write it. The record is the same 17 bytes every time but for three fields, so that
neither a codec nor varints are needed::

    | 32 | 0 | 0 | 0 | 8 | version i16 | type i16 | 12 | version i16 | coordinator_epoch i32 | 0 |
      ^length (16)     ^key of 4 bytes              ^value of 6 bytes                          ^no headers

where a byte that holds a length is a zigzag varint (twice the length), and the three zeros are attributes,
timestamp delta and offset delta. Type 0 aborts, 1 commits.

Sources: Kafka's documentation, "Control Batches"; KIP-98, "Control Messages".
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec
from crc32c import crc32c

from raftlog.errors import CorruptBatch
from raftlog.record.batch import (
    BATCH_HEADER_BYTES,
    CONTROL,
    LENGTH_END,
    MAGIC,
    NO_SEQUENCE,
    TRANSACTIONAL,
    BatchHeader,
)
from raftlog.record.frame import Buffer

_UNTIL_CRC = struct.Struct(">qiibI")
_AFTER_CRC = struct.Struct(">hiqqqhii")
_RECORD = struct.Struct(">5Bhh B hi B")
_RECORD_START: Final = (32, 0, 0, 0, 8)
_RECORD_VERSION: Final = 0
_ABORT: Final = 0
_COMMIT: Final = 1

CONTROL_BATCH_BYTES: Final = BATCH_HEADER_BYTES + _RECORD.size  # 78


class Marker(msgspec.Struct, frozen=True, gc=False):
    """How one transaction ends. It names the transaction in full, for every transaction of a producer has an
    epoch of its own: a marker that comes late cannot end another one."""

    producer_id: int
    epoch: int
    """The epoch that the transaction ran under."""
    coordinator_epoch: int
    """Term of the coordinator that sent it."""
    commit: bool


def encode_marker(marker: Marker, timestamp_ms: int) -> bytes:
    """The marker as a batch, base offset 0 and no leader epoch: to be stamped like any other.

    Args:
        marker: what it says.
        timestamp_ms: when, in milliseconds since the epoch.
    """
    record = _RECORD.pack(
        *_RECORD_START,
        _RECORD_VERSION,
        _COMMIT if marker.commit else _ABORT,
        12,
        _RECORD_VERSION,
        marker.coordinator_epoch,
        0,
    )
    after = _AFTER_CRC.pack(
        TRANSACTIONAL | CONTROL,
        0,
        timestamp_ms,
        timestamp_ms,
        marker.producer_id,
        marker.epoch,
        NO_SEQUENCE,
        1,
    )
    crc = crc32c(record, crc32c(after))
    return b"".join((_UNTIL_CRC.pack(0, CONTROL_BATCH_BYTES - LENGTH_END, -1, MAGIC, crc), after, record))


def decode_marker(batch: Buffer, header: BatchHeader) -> Marker:
    """The marker in a control batch.

    Args:
        batch: exactly one batch.
        header: of it, parsed.

    Raises:
        CorruptBatch: it is not a marker as :func:`encode_marker` writes it.
    """
    if header.attributes != TRANSACTIONAL | CONTROL or len(batch) != CONTROL_BATCH_BYTES:
        raise CorruptBatch(f"batch at offset {header.base_offset} is not a transaction marker")
    *start, key_version, kind, value_length, value_version, coordinator_epoch, headers = _RECORD.unpack_from(
        batch, BATCH_HEADER_BYTES
    )
    layout = (*start, value_length, headers, header.record_count, header.last_offset_delta)
    if layout != (*_RECORD_START, 12, 0, 1, 0) or (key_version, value_version) != (0, 0):
        raise CorruptBatch(f"control record at offset {header.base_offset} is of a layout not known here")
    if kind not in (_ABORT, _COMMIT):
        raise CorruptBatch(f"control record at offset {header.base_offset} is of type {kind}")
    return Marker(header.producer_id, header.producer_epoch, coordinator_epoch, kind == _COMMIT)
