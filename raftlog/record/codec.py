"""Records in and out of batches: the adapter around aiokafka's compiled codec.

Importing this module imports aiokafka (0.2 s), so only what encodes or decodes imports it: clients, never
brokers.

The compiled codec does 3 to 4 million records a second on one core, aiokafka's pure Python fallback a tenth
of it; the fallback is refused rather than used silently. Compression, producer fields and CRC-32C are done
here: see ``compression`` for why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from raftlog.errors import CorruptBatch, InvalidRecord
from raftlog.record.batch import (
    ATTRIBUTES_AT,
    BATCH_HEADER_BYTES,
    COMPRESSION_MASK,
    MAGIC,
    NO_PRODUCER,
    NO_SEQUENCE,
    BatchHeader,
    Compression,
    Unsealed,
    check_crc,
)
from raftlog.record.compression import UNCOMPRESSED_BYTES_MAX, compress, decompress
from raftlog.record.frame import Buffer
from raftlog.record.layout import NULL, record_bytes, varint
from raftlog.record.types import Record

try:
    from aiokafka.errors import CorruptRecordException
    from aiokafka.record._crecords import DefaultRecordBatch, DefaultRecordBatchBuilder
except ImportError as error:
    raise ImportError(
        "raftlog needs aiokafka's compiled record codec (aiokafka.record._crecords), which this installation "
        "of aiokafka lacks: install a wheel of aiokafka for this platform, or build it with a C compiler"
    ) from error

_ATTRIBUTES_LOW_BYTE: Final = ATTRIBUTES_AT + 1
_BUILDER_BYTES_MAX: Final = 2**31 - 1
TIMESTAMP_MS_MAX: Final = 253_402_300_799_999
"""The end of the year 9999: what ``datetime`` can still say."""
LARGE_BYTES: Final = 64 * 1024
"""A value of so many bytes is not copied into a batch that it has to itself."""
_NO_HEADERS: Final[list[tuple[str, bytes | None]]] = []


def check_timestamp(timestamp_ms: int) -> None:
    """Raise InvalidRecord unless it is milliseconds from 1970 to the year 9999."""
    # None would make the codec read the clock, and -1 is its own mark for "no record yet"
    if type(timestamp_ms) is not int or not 0 <= timestamp_ms <= TIMESTAMP_MS_MAX:
        raise InvalidRecord(f"timestamp {timestamp_ms!r} ms is not an int from 0 to {TIMESTAMP_MS_MAX}")


class BatchBuilder:
    """Collects records for one batch.

    Args:
        bytes_max: the uncompressed batch, header included, stays within this many bytes, except that a first
            record is accepted whatever its size (as Kafka's producer does).

    Not thread-safe.
    """

    __slots__ = ("_append", "_builder", "_bytes_max", "_large", "count")

    count: int
    """Records appended so far; the relative offset that the next one gets."""

    def __init__(self, bytes_max: int) -> None:
        self._builder = DefaultRecordBatchBuilder(
            MAGIC,
            Compression.NONE,
            0,
            NO_PRODUCER,
            NO_PRODUCER,
            NO_SEQUENCE,
            min(bytes_max, _BUILDER_BYTES_MAX),
        )
        self._append = self._builder.append
        self._bytes_max = bytes_max
        self._large: tuple[int, bytes | None, bytes] | None = None
        """(timestamp, key, value) of the only record so far, if it is large: not in the builder then."""
        self.count = 0

    def append(
        self,
        timestamp_ms: int,
        key: Buffer | None,
        value: Buffer | None,
        headers: Iterable[tuple[str, bytes | None]] = (),
    ) -> int | None:
        """Append one record.

        Returns:
            Its offset within the batch, or None when the batch is full (nothing was appended then).

        Raises:
            InvalidRecord: key or value not bytes-like, headers not pairs of (str, bytes or None), timestamp
                not an int from 1970 to the year 9999.
        """
        check_timestamp(timestamp_ms)
        if (
            not self.count
            and type(value) is bytes  # which nobody changes meanwhile
            and len(value) >= LARGE_BYTES
            and (key is None or type(key) is bytes)
            and not headers
        ):
            self._large = timestamp_ms, key, value
            self.count = 1
            return 0
        try:
            if self._large is not None and not self._take_in(key, value):
                return None
            pairs = list(headers) if headers else _NO_HEADERS
            if self._append(self.count, timestamp_ms, key, value, pairs) is None:
                return None
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRecord(f"cannot encode record: {error}") from error
        offset = self.count
        self.count = offset + 1
        return offset

    def extend(
        self,
        values: Sequence[Buffer | None],
        keys: Sequence[Buffer | None] | None,
        timestamp_ms: int,
        start: int = 0,
    ) -> int:
        """Append records from lists, as many as fit: the fast way in for many records.

        Args:
            values: one value per record.
            keys: one key per record, or None when no record has one.
            timestamp_ms: the timestamp of all of them.
            start: index of the first record to take.

        Returns:
            Index after the last record that was appended: ``len(values)`` when all fitted.

        Raises:
            InvalidRecord: a key or value that is not bytes-like; the records before it were appended.
        """
        append, headers = self._append, _NO_HEADERS
        # the codec's offset is relative to the batch, the loop's index to the lists
        shift = self.count - start
        index, end = start, len(values)
        try:
            check_timestamp(timestamp_ms)
            alone = self._large is not None and index < end
            if alone and not self._take_in(None if keys is None else keys[index], values[index]):
                return index
            while index < end:
                key = None if keys is None else keys[index]
                if append(index + shift, timestamp_ms, key, values[index], headers) is None:
                    break
                index += 1
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRecord(f"cannot encode record {index}: {error}") from error
        finally:
            self.count = index + shift
        return index

    def _take_in(self, key: Buffer | None, value: Buffer | None) -> bool:
        """Let the large record have company, unless this one cannot fit."""
        assert self._large is not None, "there is one"
        if self.size + len(key or b"") + len(value or b"") > self._bytes_max:
            return False
        self._append(0, *self._large, _NO_HEADERS)
        self._large = None
        return True

    @property
    def size(self) -> int:
        """Bytes of the batch so far, uncompressed, header included."""
        if self._large is not None:
            _, key, value = self._large
            return BATCH_HEADER_BYTES + record_bytes(NULL if key is None else len(key), len(value), 1)[1]
        size: int = self._builder.size()
        return size

    def finish(self, compression: Compression = Compression.NONE) -> Unsealed:
        """The batch, to be sealed. It holds the builder's buffer: while it is there nothing can be appended.

        Records that compression would not make smaller stay as they are.
        """
        if not self.count:
            raise ValueError("a batch needs at least one record")
        if self._large is not None:
            timestamp_ms, key, value = self._large
            return compressed(compression, _pieces(key, value), 1, timestamp_ms, timestamp_ms)
        plain = memoryview(self._builder.build())
        built = BatchHeader.parse(plain)
        records = (plain[BATCH_HEADER_BYTES:],)
        return compressed(compression, records, self.count, built.first_timestamp, built.max_timestamp)

    def build(self, compression: Compression = Compression.NONE) -> bytes:
        """The batch without a producer, as it is so far; may be called again."""
        return b"".join(self.finish(compression).seal())


def _pieces(key: bytes | None, value: bytes) -> tuple[Buffer, ...]:
    """The one record of a batch, around its value."""
    key_bytes = NULL if key is None else len(key)
    head = varint(record_bytes(key_bytes, len(value), 1)[0]) + b"\0\0\0" + varint(key_bytes)
    return head + (key or b"") + varint(len(value)), value, b"\0"


def compressed(
    compression: Compression,
    records: tuple[Buffer, ...],
    count: int,
    first_timestamp: int,
    max_timestamp: int,
) -> Unsealed:
    """A batch of these records, which come in pieces, compressed where that makes them smaller."""
    if compression is not Compression.NONE:
        plain = records[0] if len(records) == 1 else b"".join(records)
        smaller = compress(compression, plain)
        if len(smaller) < len(plain):
            return Unsealed((smaller,), compression, count, first_timestamp, max_timestamp)
    return Unsealed(records, Compression.NONE, count, first_timestamp, max_timestamp)


def encode_batch(
    values: Sequence[Buffer | None],
    keys: Sequence[Buffer | None] | None,
    timestamp_ms: int,
    *,
    compression: Compression = Compression.NONE,
    producer_id: int = NO_PRODUCER,
    producer_epoch: int = NO_PRODUCER,
    base_sequence: int = NO_SEQUENCE,
    transactional: bool = False,
) -> bytes:
    """One batch of all of ``values`` (and ``keys``), base offset 0, whatever its size."""
    builder = BatchBuilder(_BUILDER_BYTES_MAX)
    builder.extend(values, keys, timestamp_ms)
    batch = builder.finish(compression)
    return b"".join(batch.seal(producer_id, producer_epoch, base_sequence, transactional))


def decode_batch(
    buffer: Buffer,
    topic: str,
    partition: int,
    *,
    check: bool = True,
    uncompressed_bytes_max: int = UNCOMPRESSED_BYTES_MAX,
) -> list[Record]:
    """The records of one stamped batch, offsets counted from its base offset.

    Args:
        buffer: exactly one batch.
        topic: for the records' ``topic``.
        partition: for the records' ``partition``.
        check: verify the CRC; False where a frame's crc has just covered the same bytes.
        uncompressed_bytes_max: a batch whose records decompress to more is refused.

    Raises:
        CorruptBatch: anything about it is wrong; no record of it is returned then.
    """
    header = BatchHeader.parse(buffer)
    if header.magic != MAGIC or header.size != len(buffer):
        raise CorruptBatch(f"{len(buffer)} bytes are not one record batch of magic {MAGIC}")
    if check:
        check_crc(buffer, header)
    kind = header.attributes & COMPRESSION_MASK
    if kind != Compression.NONE:
        view = memoryview(buffer)
        head = bytearray(view[:BATCH_HEADER_BYTES])
        head[_ATTRIBUTES_LOW_BYTE] &= ~COMPRESSION_MASK
        buffer = head + decompress(kind, view[BATCH_HEADER_BYTES:], uncompressed_bytes_max)
    try:
        records = [
            Record(topic, partition, offset, each.timestamp, each.key, each.value, tuple(each.headers))
            for offset, each in enumerate(DefaultRecordBatch(buffer), header.base_offset)
        ]
    except (CorruptRecordException, ValueError) as error:
        raise CorruptBatch(f"records at offset {header.base_offset} do not decode: {error}") from error
    if len(records) != header.record_count or len(records) != header.last_offset_delta + 1:
        raise CorruptBatch(
            f"{len(records)} records at offset {header.base_offset}, the header says {header.record_count} "
            f"and a last offset delta of {header.last_offset_delta}"
        )
    return records
