"""Many records at once, from Arrow columns and numpy arrays, without Python objects for rows.

Keys and values become columns of ``large_binary``, without a copy where they are contiguous. Rows of one
shape are laid out by numpy, a batch as few rectangles of bytes; others are joined by Arrow, field by field.
The layout of a record is in ``rows``.

Importing this module imports numpy and pyarrow (the extra ``raftlog[data]``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from raftlog.errors import InvalidRecord
from raftlog.record.arrow import Bytes, Integers, Unsigned, np, pa
from raftlog.record.arrow_murmur2 import Hashes, murmur2_of
from raftlog.record.batch import BATCH_HEADER_BYTES, Compression, Unsealed
from raftlog.record.codec import check_timestamp, compressed
from raftlog.record.frame import Buffer
from raftlog.record.layout import BODY_BYTES, DELTA_WIDTHS, NULL, RECORD_BYTES_MIN, varint
from raftlog.record.partitioner import DefaultPartitioner, murmur2
from raftlog.record.rows import Rows

COLUMN: Final = pa.large_binary()
NO_HEADERS: Final = b"\0"
"""The section of a record that has none: their number."""


class ArrowRows:
    """Rows of columns.

    Args:
        values: an Arrow array or chunked array of binary or text, of whatever width (null: no value), or a
            numpy array, of which ``values[i].tobytes()`` is the value of record i. Or a list.
        keys: the same; None when no record has one.
        timestamps: milliseconds; of all of them, or of each (see ``arrow_headers.timestamps_of``).
        headers: their sections (see ``arrow_headers.headers_of``); None when no record has any.

    Raises:
        InvalidRecord: columns of something else, more of one than of the other, or a timestamp that is none.
    """

    __slots__ = ("_headers", "_keys", "_shortest", "_timestamps", "_values")

    def __init__(
        self,
        values: Any,
        keys: Any,
        timestamps: int | Integers,
        headers: pa.LargeBinaryArray | None = None,
    ) -> None:
        if not isinstance(timestamps, np.ndarray):
            check_timestamp(timestamps)
        self._timestamps = timestamps
        self._headers = None if headers is None else _Column(headers)
        self._values = _Column(as_column(values, "value"))
        self._keys = None if keys is None else _Column(as_column(keys, "key"))
        if self._keys is not None and len(self._keys.array) != len(self._values.array):
            raise InvalidRecord(f"{len(self._values.array)} values and {len(self._keys.array)} keys")
        self._shortest = RECORD_BYTES_MIN + max(int(self._values.lengths.min(initial=2**31)), 0)

    @property
    def longest(self) -> int:
        """See :attr:`Rows.longest`."""
        columns = self._values, self._keys, self._headers
        return max(0 if each is None else each.longest for each in columns)

    def __len__(self) -> int:
        return len(self._values.array)

    def by_partition(self, partitioner: DefaultPartitioner, count: int) -> Sequence[tuple[int, Rows]] | None:
        """See :meth:`Rows.by_partition`."""
        if self._keys is None:
            return None
        chosen = (self._keys.murmur2() & np.uint32(0x7FFFFFFF)) % np.uint32(count)
        nulls = self._keys.lengths == NULL
        if nulls.any():
            chosen[nulls] = partitioner.partition(None, count)
        groups = []
        for index in np.unique(chosen).tolist():
            groups.append((index, self.take(np.flatnonzero(chosen == index))))
        return groups

    def take(self, rows: Integers) -> ArrowRows:
        """Some of them, by their numbers."""
        wanted = pa.array(rows)
        return ArrowRows(
            self._values.array.take(wanted),
            None if self._keys is None else self._keys.array.take(wanted),
            self._timestamps if isinstance(self._timestamps, int) else self._timestamps[rows],
            None if self._headers is None else self._headers.array.take(wanted),
        )

    def pack(self, start: int, bytes_max: int, compression: Compression) -> tuple[Unsealed, int]:
        """See :meth:`Rows.pack`."""
        room = bytes_max - BATCH_HEADER_BYTES
        most = min(len(self) - start, room // self._shortest + 1, DELTA_WIDTHS[-1][1])
        deltas = self._timestamp_deltas(start, most)
        bodies = self._bodies(start, most, deltas)
        ends = np.cumsum(_taken(bodies))
        count = max(int(np.searchsorted(ends, room, "right")), 1)
        is_uniform = self._values.uniform is not None and (
            self._keys is None or self._keys.uniform is not None
        )
        if is_uniform and deltas is None and self._headers is None:
            records = self._laid_out(start, count, int(ends[count - 1]))
        else:
            records = self._joined(start, count, bodies[:count], deltas)
        moments = self._timestamps
        if isinstance(moments, int):
            first = last = moments
        else:
            first, last = int(moments[start]), int(moments[start : start + count].max())
        return compressed(compression, (records,), count, first, last), start + count

    def _timestamp_deltas(self, start: int, count: int) -> Integers | None:
        """From the first of these records, as which a batch begins; None: they have one timestamp."""
        if isinstance(self._timestamps, int):
            return None
        deltas: Integers = self._timestamps[start : start + count] - self._timestamps[start]
        return deltas

    def _bodies(self, start: int, count: int, timestamps: Integers | None) -> Integers:
        """The lengths of these records, as the first ones of a batch."""
        rows = slice(start, start + count)
        deltas = np.arange(count)
        bodies = _taken(self._values.lengths[rows]) + BODY_BYTES
        bodies += 1 if self._keys is None else _taken(self._keys.lengths[rows])
        for first, _, _ in DELTA_WIDTHS:
            bodies += deltas >= first
        if timestamps is not None:
            bodies += widths_of(zigzag(timestamps)) - 1
        if self._headers is not None:
            bodies += self._headers.lengths[rows] - 1
        return bodies

    def _laid_out(self, start: int, count: int, size: int) -> Buffer:
        """Records of one shape: rectangles, one for each width of the offset deltas."""
        keys, values = self._keys, self._values
        assert values.uniform is not None, "records of one shape"
        before_key = varint(NULL if keys is None else keys.uniform or 0)
        before_value = varint(values.uniform)
        key_length = 0 if keys is None else keys.uniform or 0
        records = np.empty(size, np.uint8)
        at = 0
        for first, last, width in DELTA_WIDTHS:
            rows = min(count, last) - first
            if rows <= 0:
                break
            body = BODY_BYTES + width + len(before_key) + key_length + len(before_value) + values.uniform
            head = varint(body) + b"\0\0"
            template = b"".join(
                (
                    head,
                    bytes(width),
                    before_key,
                    bytes(key_length),
                    before_value,
                    bytes(values.uniform),
                    b"\0",
                )
            )
            block = records[at : at + rows * len(template)].reshape(rows, len(template))
            block[:] = np.frombuffer(template, np.uint8)
            place = len(head)
            zigzag = np.arange(first, first + rows) << 1
            for byte in range(width):
                more = 0x80 if byte + 1 < width else 0
                block[:, place + byte] = (zigzag >> 7 * byte) & 0x7F | more
            place += width + len(before_key)
            if keys is not None:
                block[:, place : place + key_length] = keys.rectangle(start + first, rows)
            place += key_length + len(before_value)
            block[:, place : place + values.uniform] = values.rectangle(start + first, rows)
            at += block.size
        return records.data

    def _joined(self, start: int, count: int, bodies: Integers, timestamps: Integers | None) -> Buffer:
        """Records of any shape."""
        import pyarrow.compute as pc

        pieces = [varints(bodies), pa.scalar(b"\0" if timestamps is not None else b"\0\0", COLUMN)]
        if timestamps is not None:
            pieces.append(varints(timestamps[:count]))
        pieces.append(_offset_deltas(count))
        if self._keys is None:
            pieces.append(pa.scalar(varint(NULL), COLUMN))
        else:
            pieces += self._keys.pieces(start, count)
        pieces += self._values.pieces(start, count)
        if self._headers is None:
            pieces.append(pa.scalar(NO_HEADERS, COLUMN))
        else:
            pieces.append(self._headers.array.slice(start, count))
        pieces.append(pa.scalar(b"", COLUMN))
        joined = pc.binary_join_element_wise(*pieces)
        return memoryview(joined.buffers()[2])[: int(_offsets(joined)[-1])]


class _Column:
    """The keys, or the values."""

    __slots__ = ("array", "lengths", "longest", "uniform")

    def __init__(self, array: pa.LargeBinaryArray) -> None:
        self.array = array
        self.lengths = lengths_of(array)
        self.longest = int(self.lengths.max()) if len(array) else 0
        self.uniform: int | None = None
        """The length of all of them, if it is the same and none is null."""
        if not array.null_count and len(array) and (self.lengths == self.longest).all():
            self.uniform = self.longest

    def rectangle(self, start: int, count: int) -> Bytes:
        """These, where all are of one length: a row each."""
        assert self.uniform is not None, "a rectangle has one width"
        if not self.uniform:
            return np.empty((count, 0), np.uint8)
        data = np.frombuffer(self.array.buffers()[2], np.uint8)
        at = int(_offsets(self.array)[start])
        return data[at : at + count * self.uniform].reshape(count, self.uniform)

    def murmur2(self) -> Hashes:
        """Their hashes; that of null means nothing."""
        data = self.array.buffers()[2]
        if data is None:
            return np.full(len(self.array), murmur2(b""), np.uint32)
        return murmur2_of(
            np.frombuffer(data, np.uint8), _offsets(self.array)[:-1], np.maximum(self.lengths, 0)
        )

    def pieces(self, start: int, count: int) -> tuple[pa.Array, pa.Array]:
        """(their lengths as varints, themselves), null as empty."""
        import pyarrow.compute as pc

        array = self.array.slice(start, count)
        filled = pc.fill_null(array, b"") if array.null_count else array
        return varints(self.lengths[start : start + count]), filled


def as_column(given: Any, what: str) -> pa.LargeBinaryArray:
    """A column of bytes, nothing of it copied where it is contiguous.

    Raises:
        InvalidRecord: it holds something else, or is no column.
    """
    if isinstance(given, np.ndarray):
        return _of_rows(given, what)
    if isinstance(given, (list, tuple)):
        try:
            return pa.array(given, COLUMN)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InvalidRecord(f"a record's {what} is bytes or None: {error}") from error
    if not isinstance(given, (pa.Array, pa.ChunkedArray)):
        raise InvalidRecord(
            f"{what}s are a list, a numpy array or one Arrow column, not a {type(given).__name__}"
        )
    if pa.types.is_dictionary(given.type):
        given = given.cast(given.type.value_type)
    if not (is_bytes_or_text(given.type) or pa.types.is_null(given.type)):
        raise InvalidRecord(f"a record's {what} is bytes, and this column holds {given.type}")
    column = given.cast(COLUMN)
    if isinstance(column, pa.ChunkedArray):
        column = (
            column.chunk(0)
            if column.num_chunks == 1
            else pa.concat_arrays([pa.array([], COLUMN), *column.chunks])
        )
    return column


def is_bytes_or_text(kind: Any) -> bool:
    """Whether a column of this type becomes one of bytes."""
    kinds = pa.types
    return bool(
        kinds.is_binary(kind)
        or kinds.is_large_binary(kind)
        or kinds.is_fixed_size_binary(kind)
        or kinds.is_string(kind)
        or kinds.is_large_string(kind)
    )


def _of_rows(given: Any, what: str) -> pa.LargeBinaryArray:
    if given.ndim == 0 or given.dtype.hasobject or given.dtype.kind == "U":
        shape = f"{given.dtype} of shape {given.shape}"
        raise InvalidRecord(f"an array of {what}s has a row of numbers or bytes for each record, not {shape}")
    if given.dtype.kind == "S" and given.ndim == 1:  # an item is without its padding
        return pa.array(given.tolist(), COLUMN)
    rows = np.ascontiguousarray(given)
    count = len(rows)
    width = rows.nbytes // count if count else 0
    bounds = np.arange(count + 1, dtype=np.int64) * width
    return pa.Array.from_buffers(COLUMN, count, [None, pa.py_buffer(bounds), pa.py_buffer(rows)])


def _offsets(array: pa.LargeBinaryArray) -> Integers:
    """Where the items of an array begin in its data, and where the last one ends."""
    bounds = array.buffers()[1]
    if not len(array) or bounds is None:
        return np.zeros(1, np.int64)
    return np.frombuffer(bounds, np.int64)[array.offset : array.offset + len(array) + 1]


def lengths_of(array: pa.LargeBinaryArray) -> Integers:
    """Of its items; NULL of those that are null."""
    lengths: Integers = np.diff(_offsets(array))
    if array.null_count:
        lengths = np.where(array.is_null().to_numpy(zero_copy_only=False), NULL, lengths)
    return lengths


def _taken(lengths: Integers) -> Integers:
    """Bytes that lengths and what they count take together."""
    lengths = np.maximum(lengths, 0)
    return lengths + widths_of(zigzag(lengths))


def zigzag(numbers: Integers) -> Unsigned:
    """Small ones of either sign as small ones without."""
    return ((numbers << 1) ^ (numbers >> 63)).view(np.uint64)


def widths_of(zigzags: Unsigned) -> Integers:
    """How many bytes each takes as a varint."""
    widths = np.ones(len(zigzags), np.int64)
    bits = 7
    greatest = int(zigzags.max(initial=0))
    while greatest >> bits:
        widths += zigzags >= np.uint64(1 << bits)
        bits += 7
    return widths


def varints(numbers: Integers) -> pa.LargeBinaryArray:
    """Each number as a zigzag varint."""
    zigzags = zigzag(numbers)
    widths = widths_of(zigzags)
    bounds = np.zeros(len(widths) + 1, np.int64)
    np.cumsum(widths, out=bounds[1:])
    data = np.empty(int(bounds[-1]), np.uint8)
    starts = bounds[:-1]
    for place in range(int(widths.max(initial=0))):
        if place:
            longer = widths > place
            zigzags, widths, starts = zigzags[longer], widths[longer], starts[longer]
        more = (widths > place + 1).astype(np.uint8) << np.uint8(7)
        data[starts + place] = (zigzags >> np.uint64(7 * place)).astype(np.uint8) & np.uint8(0x7F) | more
    return pa.Array.from_buffers(COLUMN, len(numbers), [None, pa.py_buffer(bounds), pa.py_buffer(data)])


def _offset_deltas(count: int) -> pa.LargeBinaryArray:
    return _delta_table(1 << (count - 1).bit_length()).slice(0, count)


@lru_cache(maxsize=4)
def _delta_table(count: int) -> pa.LargeBinaryArray:
    return pa.array([varint(delta) for delta in range(count)], COLUMN)
