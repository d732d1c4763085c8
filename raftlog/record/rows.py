"""Many records at once, from lists to batches.

A record without headers is, every number a zigzag varint::

    | length | attributes 0 | timestamp delta | offset delta | key length | key | value length | value | 0 |
                                                                                      number of headers ^

Records of one call share their timestamp, so its delta is 0. Where all values are of one length, and all
keys, what stands between them depends on the offset delta alone: it is made once, kept, and one ``join``
weaves it with the values. That takes a third of what the compiled codec takes, which encodes all others.

Source: Kafka's documentation, "Record".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, Protocol

from raftlog.errors import InvalidRecord
from raftlog.record.batch import BATCH_HEADER_BYTES, Compression, Unsealed
from raftlog.record.codec import BatchBuilder, check_timestamp, compressed
from raftlog.record.frame import Buffer
from raftlog.record.layout import DELTA_WIDTHS, NULL, record_bytes, varint
from raftlog.record.partitioner import DefaultPartitioner

_HEADS_MAX: Final = 16_384
"""So many heads are kept, enough for a batch of 1 MiB with records of 64 bytes."""


def as_bytes(given: Any, what: str) -> bytes:
    """``given`` as bytes if it is bytes-like; InvalidRecord if not."""
    if isinstance(given, (bytes, bytearray, memoryview)):
        return bytes(given)
    raise InvalidRecord(f"a record's {what} is bytes or None, not {type(given).__name__}")


class Rows(Protocol):
    """Keys and values of many records, to be cut into batches."""

    @property
    def longest(self) -> int:
        """Bytes of the longest key or value."""
        ...

    def __len__(self) -> int: ...

    def by_partition(self, partitioner: DefaultPartitioner, count: int) -> Sequence[tuple[int, Rows]] | None:
        """(partition, its records in order) for each of ``count`` partitions that some key belongs to; None:
        there are no keys."""
        ...

    def pack(self, start: int, bytes_max: int, compression: Compression) -> tuple[Unsealed, int]:
        """Encode records from index ``start`` on: one at least, then as many as fit.

        Args:
            start: below the number of records.
            bytes_max: of the batch, its header included, uncompressed.
            compression: of the batch.

        Returns:
            (the batch, index after the last record in it).
        """
        ...


class ListRows:
    """Rows of lists.

    Args:
        values: bytes-like, or None.
        keys: as many; None when no record has one.
        timestamp_ms: of all of them.

    Raises:
        InvalidRecord: a key or value that is not bytes-like, more of one than of the other, or a timestamp
            that is none.
    """

    __slots__ = ("_keys", "_shape", "_timestamp_ms", "_values", "longest")

    def __init__(
        self, values: Sequence[Buffer | None], keys: Sequence[Buffer | None] | None, timestamp_ms: int
    ) -> None:
        if keys is not None and len(keys) != len(values):
            raise InvalidRecord(f"{len(values)} values and {len(keys)} keys")
        check_timestamp(timestamp_ms)
        self._timestamp_ms = timestamp_ms
        self._values, value_lengths = _checked(values, "value")
        self._keys: Sequence[bytes | None] | None = None
        key_lengths = {NULL}
        if keys is not None:
            self._keys, key_lengths = _checked(keys, "key")
        self.longest = max(*value_lengths, *key_lengths, 0)
        self._shape: tuple[int, int] | None = None
        """(length of each key, or NULL if there are none; length of each value), where that can be said."""
        has_nulls = NULL in value_lengths or (keys is not None and NULL in key_lengths)
        if len(value_lengths) == len(key_lengths) == 1 and not has_nulls:
            self._shape = key_lengths.pop(), value_lengths.pop()

    def __len__(self) -> int:
        return len(self._values)

    def by_partition(self, partitioner: DefaultPartitioner, count: int) -> Sequence[tuple[int, Rows]] | None:
        """See :meth:`Rows.by_partition`."""
        if self._keys is None:
            return None
        choose = partitioner.partition
        groups: dict[int, tuple[list[bytes | None], list[bytes | None]]] = {}
        for key, value in zip(self._keys, self._values, strict=True):
            index = choose(key, count)
            group = groups.get(index)
            if group is None:
                group = groups[index] = ([], [])
            group[0].append(value)
            group[1].append(key)
        return [(index, ListRows(*group, self._timestamp_ms)) for index, group in groups.items()]

    def pack(self, start: int, bytes_max: int, compression: Compression) -> tuple[Unsealed, int]:
        """See :meth:`Rows.pack`."""
        at = self._timestamp_ms
        if self._shape is None:
            builder = BatchBuilder(bytes_max)
            end = builder.extend(self._values, self._keys, at, start)
            return builder.finish(compression), end
        count = min(_fitting(*self._shape, bytes_max - BATCH_HEADER_BYTES), len(self) - start)
        return compressed(compression, (self._woven(start, count),), count, at, at), start + count

    def _woven(self, start: int, count: int) -> bytes:
        assert self._shape is not None, "records of one shape"
        values, keys = self._values[start : start + count], self._keys
        columns: list[Sequence[bytes | None]] = [_heads(*self._shape)[:count]]
        if keys is not None:
            columns += (keys[start : start + count], [varint(self._shape[1])] * count)
        columns.append(values)
        pieces: list[Any] = [b""] * (len(columns) * count)
        for index, column in enumerate(columns):
            pieces[index :: len(columns)] = column
        pieces[0] = pieces[0][1:]
        pieces.append(b"\0")
        return b"".join(pieces)


def _checked(given: Sequence[Buffer | None], what: str) -> tuple[Sequence[bytes | None], set[int]]:
    """(as bytes, the lengths there are)"""
    types = set(map(type, given))
    if types == {bytes}:
        return given, set(map(len, given))  # type: ignore[return-value, arg-type]  # as their types say
    checked = [None if each is None else as_bytes(each, what) for each in given]
    return checked, {NULL if each is None else len(each) for each in checked}


def _fitting(key_length: int, value_length: int, room: int) -> int:
    """How many such records ``room`` bytes hold, one at least."""
    count = 0
    for first, last, width in DELTA_WIDTHS:
        size = record_bytes(key_length, value_length, width)[1]
        count = first + room // size
        room -= (last - first) * size
        if room < 0:
            break
    return max(min(count, _HEADS_MAX), 1)


@lru_cache(maxsize=8)
def _heads(key_length: int, value_length: int) -> Sequence[bytes]:
    """What goes between the value before and the key, or the value where there are no keys; by offset delta.
    It begins with the number of headers (0) of the record before."""
    after = varint(key_length)
    if key_length == NULL:
        after += varint(value_length)
    heads: list[bytes] = []
    for first, last, width in DELTA_WIDTHS:
        before = b"\0" + varint(record_bytes(key_length, value_length, width)[0]) + b"\0\0"
        heads += [before + varint(delta) + after for delta in range(first, min(last, _HEADS_MAX))]
    return heads
