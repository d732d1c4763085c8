"""The header of Kafka's RecordBatch v2: parse it, check it, stamp it. Never a look at the records inside.

Layout (big endian, 61 bytes of header, then the records, compressed as a whole or not)::

    0             8              12             16      17    21           23                  27
    | base_offset | batch_length | leader_epoch | magic | crc | attributes | last_offset_delta |
    27                35              43            51               53              57             61
    | first_timestamp | max_timestamp | producer_id | producer_epoch | base_sequence | record_count | records

``batch_length`` counts what follows it (the batch is 12 bytes longer). ``crc`` is CRC-32C over everything
from ``attributes`` on: so the leader writes base offset and leader epoch into a finished batch without
touching it.

Attributes: bits 0-2 compression, 3 timestamp type, 4 transactional, 5 control, 6 delete horizon.
Source: Kafka's documentation, "Record Batch"; KIP-98.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

import msgspec
from crc32c import crc32c

from raftlog.errors import ConfigError, CorruptBatch, RecordTooLarge
from raftlog.record.frame import Buffer

_HEADER = struct.Struct(">qiibIhiqqqhii")
_OFFSET_LENGTH_EPOCH = struct.Struct(">qii")
_LENGTH = struct.Struct(">i")
_UNTIL_CRC = struct.Struct(">qiibI")
_AFTER_CRC = struct.Struct(">hiqqqhii")

BATCH_HEADER_BYTES: Final = _HEADER.size  # 61
MAGIC: Final = 2
NO_PRODUCER: Final = -1
NO_SEQUENCE: Final = -1
SEQUENCE_MODULUS: Final = 2**31
"""Sequence numbers are int32 without a sign: after 2^31 - 1 comes 0."""
BATCH_BYTES_LIMIT: Final = 32 * 1024 * 1024
"""No topic may allow a larger batch."""

LENGTH_END: Final = 12
STAMPED_BYTES: Final = 16
ATTRIBUTES_AT: Final = 21
_UNSTAMPED_EPOCH: Final = -1

COMPRESSION_MASK: Final = 0x07
TIMESTAMP_TYPE: Final = 0x08
TRANSACTIONAL: Final = 0x10
CONTROL: Final = 0x20


class Compression(IntEnum):
    """Kafka's compression types. This release reads and writes NONE, LZ4 and ZSTD."""

    NONE = 0
    GZIP = 1
    SNAPPY = 2
    LZ4 = 3
    ZSTD = 4


def compression_named(name: str | None) -> Compression:
    """ "none" (or None), "lz4" or "zstd" as a :class:`Compression`; ConfigError for anything else."""
    kind = _READABLE_NAMES.get("none" if name is None else name)
    if kind is None:
        raise ConfigError(f"compression {name!r} is not one of {', '.join(_READABLE_NAMES)}")
    return kind


_READABLE: Final = frozenset({Compression.NONE, Compression.LZ4, Compression.ZSTD})
_READABLE_NAMES: Final = {kind.name.lower(): kind for kind in sorted(_READABLE)}
_ATTRIBUTES_ACCEPTED: Final = COMPRESSION_MASK | TRANSACTIONAL
"""What a producer may set. In particular no control bit (markers are the brokers' own) and no log-append
timestamps (the records' timestamps are the producer's)."""


class BatchHeader(msgspec.Struct, frozen=True, gc=False):
    """A parsed header; fields in wire order. Nothing is checked by parsing."""

    base_offset: int
    batch_length: int
    leader_epoch: int
    magic: int
    crc: int
    attributes: int
    last_offset_delta: int
    first_timestamp: int
    max_timestamp: int
    producer_id: int
    producer_epoch: int
    base_sequence: int
    record_count: int

    @classmethod
    def parse(cls, buffer: Buffer, position: int = 0) -> BatchHeader:
        """Parse the header at ``position``.

        Raises:
            CorruptBatch: fewer than 61 bytes are left.
        """
        try:
            return cls(*_HEADER.unpack_from(buffer, position))
        except struct.error:
            left = max(0, len(buffer) - position)
            raise CorruptBatch(f"{left} bytes are too few for a record batch header") from None

    @property
    def size(self) -> int:
        """Bytes of the whole batch."""
        return self.batch_length + LENGTH_END

    @property
    def last_offset(self) -> int:
        return self.base_offset + self.last_offset_delta

    @property
    def next_offset(self) -> int:
        """The offset after the batch's last record."""
        return self.base_offset + self.last_offset_delta + 1

    @property
    def compression(self) -> int:
        """The number in the attributes: a :class:`Compression` once the batch is checked."""
        return self.attributes & COMPRESSION_MASK

    @property
    def is_transactional(self) -> bool:
        return bool(self.attributes & TRANSACTIONAL)

    @property
    def is_control(self) -> bool:
        return bool(self.attributes & CONTROL)

    @property
    def is_log_append_time(self) -> bool:
        """The records' timestamps are all ``max_timestamp``."""
        return bool(self.attributes & TIMESTAMP_TYPE)

    @property
    def last_sequence(self) -> int:
        """Sequence of the last record; -1 without a producer id. Wraps after 2^31 - 1."""
        if self.base_sequence < 0:
            return NO_SEQUENCE
        return (self.base_sequence + self.last_offset_delta) % SEQUENCE_MODULUS


def check_crc(batch: Buffer, header: BatchHeader) -> None:
    """Raise CorruptBatch unless the CRC-32C of a batch that fills ``batch`` is the one in its header."""
    found = crc32c(memoryview(batch)[ATTRIBUTES_AT:])
    if found != header.crc:
        raise CorruptBatch(f"record batch crc is {found:08x}, header says {header.crc:08x}")


def check_batch(buffer: Buffer, bytes_max: int = BATCH_BYTES_LIMIT) -> BatchHeader:
    """Check a batch as a producer sent it, all that can be checked without decompressing it.

    Args:
        buffer: exactly one batch.
        bytes_max: largest batch allowed, in bytes, header included (``max_message_bytes`` of the topic).

    Returns:
        Its header.

    Raises:
        RecordTooLarge: above ``bytes_max``; decided before anything else is looked at.
        CorruptBatch: everything else that is wrong with it.
    """
    size = len(buffer)
    if size > bytes_max:
        raise RecordTooLarge(
            f"record batch of {size} bytes is above the limit of {bytes_max}", limit=bytes_max
        )
    header = BatchHeader.parse(buffer)
    if header.magic != MAGIC:
        raise CorruptBatch(f"record batch of magic {header.magic}; only {MAGIC} is accepted")
    if header.batch_length + LENGTH_END != size:
        raise CorruptBatch(f"record batch says {header.batch_length + LENGTH_END} bytes, {size} came")
    check_crc(buffer, header)
    _check_attributes(header.attributes)
    if header.record_count < 1 or header.record_count != header.last_offset_delta + 1:
        raise CorruptBatch(
            f"record batch of {header.record_count} records has last offset delta {header.last_offset_delta}"
        )
    _check_producer(header)
    return header


def _check_attributes(attributes: int) -> None:
    if attributes & ~_ATTRIBUTES_ACCEPTED:
        names = [
            name
            for bit, name in (
                (TIMESTAMP_TYPE, "log append time"),
                (CONTROL, "control"),
            )
            if attributes & bit
        ]
        what = ", ".join(names) or "unknown bits"
        raise CorruptBatch(
            f"record batch attributes {attributes & 0xFFFF:#06x} are not accepted here: {what}"
        )
    compression = attributes & COMPRESSION_MASK
    if compression not in _READABLE:
        raise CorruptBatch(f"record batch compression {compression} is not supported; use lz4, zstd or none")


def _check_producer(header: BatchHeader) -> None:
    """Id, epoch and sequence come all three or not at all; a transaction has a producer."""
    if header.producer_id == NO_PRODUCER:
        if header.base_sequence != NO_SEQUENCE:
            raise CorruptBatch(f"record batch has sequence {header.base_sequence} but no producer id")
        if header.attributes & TRANSACTIONAL:
            raise CorruptBatch("record batch is transactional but has no producer id")
    elif header.producer_id < 0 or header.producer_epoch < 0 or header.base_sequence < 0:
        raise CorruptBatch(
            f"record batch has producer id {header.producer_id}, epoch {header.producer_epoch}, "
            f"sequence {header.base_sequence}"
        )


class Unsealed(msgspec.Struct, frozen=True, gc=False):
    """A batch that is finished but for its sender.

    The records stay where they are, sealing makes the header that goes before them: so a batch that was
    never sent may be sealed again under another identity. What may have reached a broker must keep its own
    for ever.
    """

    records: tuple[Buffer, ...]
    """The records section in pieces, compressed or not."""
    compression: Compression
    count: int
    first_timestamp: int
    max_timestamp: int

    @classmethod
    def parse(cls, batch: Buffer) -> Unsealed:
        """Take a finished batch apart; it is not checked.

        Raises:
            CorruptBatch: fewer than 61 bytes, or an unknown compression.
        """
        header = BatchHeader.parse(batch)
        if header.compression not in _READABLE:
            raise CorruptBatch(f"record batch compression {header.compression} is not supported")
        records = memoryview(batch)[BATCH_HEADER_BYTES:]
        times = header.first_timestamp, header.max_timestamp
        return cls((records,), Compression(header.compression), header.record_count, *times)

    @property
    def size(self) -> int:
        """Bytes of the whole batch."""
        return BATCH_HEADER_BYTES + sum(map(len, self.records))

    def seal(
        self,
        producer_id: int = NO_PRODUCER,
        producer_epoch: int = NO_PRODUCER,
        base_sequence: int = NO_SEQUENCE,
        transactional: bool = False,
    ) -> tuple[Buffer, ...]:
        """(header, *records): the batch in pieces, base offset 0 and no leader epoch."""
        after = _AFTER_CRC.pack(
            self.compression | TRANSACTIONAL if transactional else self.compression,
            self.count - 1,
            self.first_timestamp,
            self.max_timestamp,
            producer_id,
            producer_epoch,
            base_sequence,
            self.count,
        )
        crc = crc32c(after)
        for piece in self.records:
            crc = crc32c(piece, crc)
        head = _UNTIL_CRC.pack(0, self.size - LENGTH_END, _UNSTAMPED_EPOCH, MAGIC, crc) + after
        return head, *self.records


def stamped(batch: Buffer, base_offset: int, leader_epoch: int) -> bytes:
    """The batch with base offset and leader epoch (= Raft term) written in: one copy, crc unharmed.

    The argument is left as it was: a received frame's buffer belongs to whoever received it.
    """
    view = memoryview(batch)
    (batch_length,) = _LENGTH.unpack_from(view, 8)
    return b"".join(
        (_OFFSET_LENGTH_EPOCH.pack(base_offset, batch_length, leader_epoch), view[STAMPED_BYTES:])
    )
