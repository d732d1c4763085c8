"""Record batches as Arrow columns, without Python objects for records.

Records that look alike, as those of a batch often do, lie at a fixed distance: once the bytes that hold
lengths were compared with those of the first record, everything is known of all of them. Of others the
beginnings are found by hopping from length to length; then every field of all of them is decoded at once, a
varint of all taking a few numpy operations. Keys and values are taken out of the batch by Arrow, which is
told that what lies between them are values too, and which ones are wanted. Batches with headers, or with
attributes that mean nothing yet, go through the compiled codec.

Importing this module imports numpy and pyarrow (the extra ``raftlog[data]``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from raftlog.errors import CorruptBatch
from raftlog.record.arrow import Booleans, Bytes, Integers, np, npt, pa
from raftlog.record.batch import (
    BATCH_HEADER_BYTES,
    COMPRESSION_MASK,
    MAGIC,
    BatchHeader,
    Compression,
    check_crc,
)
from raftlog.record.codec import decode_batch
from raftlog.record.compression import UNCOMPRESSED_BYTES_MAX, decompress
from raftlog.record.frame import Buffer
from raftlog.record.types import Record

SCHEMA: Final = pa.schema(
    [
        pa.field("key", pa.binary()),
        pa.field("value", pa.binary()),
        pa.field("topic", pa.string()),
        pa.field("partition", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("timestamp", pa.timestamp("ms", tz="UTC")),
        pa.field("headers", pa.list_(pa.struct([("key", pa.string()), ("value", pa.binary())]))),
    ]
)
"""What records are as columns. Headers are lists of pairs: a map could hold neither their order nor a name
twice."""

_TIMESTAMP: Final = SCHEMA.field("timestamp").type
_ALIKE_MIN: Final = 16
_VARINT_BITS_MAX: Final = 63
_NULL: Final = -1


def decode_columns(
    buffer: Buffer,
    topic: str,
    partition: int,
    *,
    check: bool = True,
    uncompressed_bytes_max: int = UNCOMPRESSED_BYTES_MAX,
) -> pa.RecordBatch:
    """The records of one stamped batch as columns of :data:`SCHEMA`; see :func:`codec.decode_batch`.

    Raises:
        CorruptBatch: anything about it is wrong.
    """
    header = BatchHeader.parse(buffer)
    if header.magic != MAGIC or header.size != len(buffer):
        raise CorruptBatch(f"{len(buffer)} bytes are not one record batch of magic {MAGIC}")
    if check:
        check_crc(buffer, header)
    records: Buffer = memoryview(buffer)[BATCH_HEADER_BYTES:]
    kind = header.attributes & COMPRESSION_MASK
    if kind != Compression.NONE:
        records = decompress(kind, records, uncompressed_bytes_max)
    count = header.record_count
    if count < 1 or count != header.last_offset_delta + 1:
        raise CorruptBatch(f"batch of {count} records has last offset delta {header.last_offset_delta}")
    try:
        fields = _decode(records, count)
    except (IndexError, CorruptBatch) as error:  # IndexError: a length leads behind the end
        raise CorruptBatch(f"records at offset {header.base_offset} do not decode: {error}") from error
    if fields is None:
        return columns_of(
            decode_batch(buffer, topic, partition, check=False, uncompressed_bytes_max=uncompressed_bytes_max)
        )
    if header.is_log_append_time:
        timestamps = np.full(count, header.max_timestamp, np.int64)
    else:
        timestamps = fields.deltas + header.first_timestamp
    section = pa.py_buffer(records)
    topics, partitions, no_headers = _constants(topic, partition, 1 << (count - 1).bit_length())
    return _record_batch(
        _taken(section, fields.no_key, fields.key_at, fields.key_end),
        _taken(section, fields.no_value, fields.value_at, fields.value_end),
        topics.slice(0, count),
        partitions.slice(0, count),
        pa.array(np.arange(header.base_offset, header.base_offset + count)),
        _timestamps(timestamps),
        no_headers.slice(0, count),
    )


@lru_cache(maxsize=32)
def _constants(topic: str, partition: int, count: int) -> tuple[pa.Array, pa.Array, pa.Array]:
    """The columns that are the same for every record without headers."""
    return (
        pa.repeat(pa.scalar(topic, pa.string()), count),
        pa.repeat(pa.scalar(partition, pa.int32()), count),
        _lists(np.zeros(count + 1, np.int32), [], []),
    )


def columns_of(records: Sequence[Record]) -> pa.RecordBatch:
    """Records as columns, one by one."""
    ends = [0]
    names: list[str] = []
    values: list[bytes | None] = []
    for record in records:
        for name, value in record.headers:
            names.append(name)
            values.append(value)
        ends.append(len(names))
    return _record_batch(
        pa.array([each.key for each in records], pa.binary()),
        pa.array([each.value for each in records], pa.binary()),
        pa.array([each.topic for each in records], pa.string()),
        pa.array([each.partition for each in records], pa.int32()),
        pa.array([each.offset for each in records], pa.int64()),
        _timestamps(np.array([each.timestamp_ms for each in records], np.int64)),
        _lists(np.array(ends, np.int32), names, values),
    )


def table_of(batches: Sequence[pa.RecordBatch]) -> pa.Table:
    """One table of several batches; nothing is copied."""
    return pa.Table.from_batches(batches, SCHEMA)


def _record_batch(*columns: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(list(columns), schema=SCHEMA)


def _timestamps(milliseconds: Integers) -> pa.Array:
    mask = milliseconds < 0  # -1 is what a producer wrote that had none
    if mask.any():
        return pa.array(milliseconds, pa.int64(), mask=mask).cast(_TIMESTAMP)
    return pa.Array.from_buffers(_TIMESTAMP, len(milliseconds), [None, pa.py_buffer(milliseconds)])


def _lists(ends: npt.NDArray[np.int32], names: list[str], values: list[bytes | None]) -> pa.Array:
    fields = SCHEMA.field("headers").type.value_type
    pairs = pa.StructArray.from_arrays(
        [pa.array(names, pa.string()), pa.array(values, pa.binary())], fields=list(fields)
    )
    return pa.ListArray.from_arrays(pa.array(ends), pairs)


# -- the records section -------------------------------------------------------------------------------------


class _Fields(NamedTuple):
    """Of some records, in order; places are relative to the records section."""

    deltas: Integers
    """Of timestamps."""
    no_key: Booleans
    key_at: Integers
    key_end: Integers
    no_value: Booleans
    value_at: Integers
    value_end: Integers


def _decode(records: Buffer, count: int) -> _Fields | None:
    """All records of a section; None if some are for the codec.

    Raises:
        CorruptBatch, IndexError: this is not ``count`` records.
    """
    view, data = memoryview(records), np.frombuffer(records, np.uint8)
    pieces: list[_Fields] = []
    at = 0
    while count:
        alike = _alike(view, data, at, count) if count >= _ALIKE_MIN else None
        if alike is None:
            rest = _various(view, data, at, count)
            if rest is None:
                return None
            pieces.append(rest)
            break
        piece, at = alike
        pieces.append(piece)
        count -= len(piece.deltas)
        if not count and at != len(data):
            raise CorruptBatch(f"{len(data) - at} bytes follow the last record")
    return pieces[0] if len(pieces) == 1 else _Fields(*map(np.concatenate, zip(*pieces, strict=True)))


def _alike(view: memoryview, data: Bytes, at: int, count: int) -> tuple[_Fields, int] | None:
    """(records from ``at`` on that have all their fields at the same places, where the next one begins); None
    if that are only few, or have headers.

    Each record begins where the one before says that it ends, for that says the same as the first does.
    """
    length, body = _varint(view, at)
    _, offset_at = _varint(view, body + 1)
    _, key_length_at = _varint(view, offset_at)
    key_length, key_at = _varint(view, key_length_at)
    key_end = key_at + max(key_length, 0)
    value_length, value_at = _varint(view, key_end)
    value_end = value_at + max(value_length, 0)
    size = value_end + 1 - at
    if (
        body + length != value_end + 1
        or min(key_length, value_length) < _NULL
        or view[value_end]
        or view[body]
    ):
        return None
    count = min(count, (len(data) - at) // size)
    rows = np.lib.stride_tricks.as_strided(data[at:], (count, size), (size, 1), writeable=False)
    same = np.ones(count, np.bool_)
    for place in (*range(at, body + 1), *range(key_length_at, key_at), *range(key_end, value_at), value_end):
        same &= rows[:, place - at] == view[place]
    for place in range(body + 1, key_length_at):  # timestamp and offset deltas: as long, whatever they say
        same &= (rows[:, place - at] ^ np.uint8(view[place])) < 0x80
    if not same.all():
        count = int(same.argmin())
        if count < _ALIKE_MIN:
            return None
    starts = np.arange(0, count * size, size)
    fields = _Fields(
        _varints(data, starts + (body + 1))[0],
        np.full(count, key_length == _NULL),
        starts + key_at,
        starts + key_end,
        np.full(count, value_length == _NULL),
        starts + value_at,
        starts + value_end,
    )
    return fields, at + count * size


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """(the zigzag varint at this place, the place behind it)"""
    raw = shift = 0
    while True:
        byte = view[at]
        at += 1
        raw |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (raw >> 1) ^ -(raw & 1), at
        shift += 7
        if shift > _VARINT_BITS_MAX:
            raise CorruptBatch("a number of more than 64 bits")


def _various(view: memoryview, data: Bytes, at: int, count: int) -> _Fields | None:
    """The last ``count`` records of a section; None if some are for the codec."""
    starts = np.array(_hops(view, at, count), np.int64)
    lengths, places = _varints(data, starts)
    ends = places + lengths
    if not np.array_equal(ends[:-1], starts[1:]) or ends[-1] != len(data):
        raise CorruptBatch("the lengths of the records do not add up")
    if data[places].any():
        return None
    deltas, places = _varints(data, places + 1)  # behind the attributes
    _, places = _varints(data, places)  # offset deltas count from 0
    key = _field(data, places)
    value = _field(data, key[-1])
    headers, places = _varints(data, value[-1])
    if headers.any():
        return None
    if not np.array_equal(places, ends):
        raise CorruptBatch("a record's fields do not fill it")
    return _Fields(deltas, *key, *value)


def _hops(view: memoryview, at: int, count: int) -> list[int]:
    """Where this many records begin; that each ends where the next one begins is checked afterwards."""
    starts = []
    for _ in range(count):
        starts.append(at)
        byte = view[at]
        if byte < 0x80:
            at += 1 + (byte >> 1)
        else:
            length, at = _varint(view, at)
            at += length
    return starts


def _varints(data: Bytes, at: Integers) -> tuple[Integers, Integers]:
    """(the zigzag varints at these places, the places behind them)"""
    byte = data[at]
    raw = (byte & 0x7F).astype(np.uint64)
    at = at + 1
    going = np.flatnonzero(byte > 0x7F)
    shift = 7
    while going.size:
        if shift > _VARINT_BITS_MAX:
            raise CorruptBatch("a number of more than 64 bits")
        byte = data[at[going]]
        raw[going] |= (byte & 0x7F).astype(np.uint64) << np.uint64(shift)
        at[going] += 1
        going = going[byte > 0x7F]
        shift += 7
    return (raw >> np.uint64(1)).view(np.int64) ^ -(raw & np.uint64(1)).view(np.int64), at


def _field(data: Bytes, at: Integers) -> tuple[Booleans, Integers, Integers]:
    """Of keys or values: (which are not there, where they begin, where they end)"""
    lengths, begins = _varints(data, at)
    if lengths.min() < _NULL or lengths.max() > len(data):
        raise CorruptBatch(f"keys or values of {lengths.min()} to {lengths.max()} bytes")
    return lengths == _NULL, begins, begins + np.maximum(lengths, 0)


def _taken(section: pa.Buffer, nulls: Booleans, begins: Integers, ends: Integers) -> pa.Array:
    """These pieces of the section: every second item of an array of them and of what lies between."""
    count = len(begins)
    mask = nulls if nulls.any() else None
    if mask is not None and mask.all():
        return pa.nulls(count, pa.binary())
    bounds = np.zeros(2 * count + 1, np.int32)
    bounds[1::2] = begins
    bounds[2::2] = ends
    woven = pa.Array.from_buffers(pa.binary(), 2 * count, [None, pa.py_buffer(bounds), section])
    return woven.take(pa.array(np.arange(1, 2 * count, 2), mask=mask))
