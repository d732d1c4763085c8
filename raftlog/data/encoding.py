"""From a Dataset's rows to encoded record batches: what tasks do of a write.

A batch is encoded under no identity, and where its records have neither key nor partition without a
partition: whoever sends it adds both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from time import time_ns
from typing import Final, NamedTuple

from raftlog.client.accumulator import RECORD_OVERHEAD
from raftlog.client.producer import too_large
from raftlog.errors import ConfigError, InvalidRecord, UnknownPartition
from raftlog.record.arrow import Integers, np, pa
from raftlog.record.arrow_headers import headers_of, timestamps_of
from raftlog.record.arrow_rows import ArrowRows, as_column
from raftlog.record.batch import BATCH_HEADER_BYTES, compression_named
from raftlog.record.partitioner import DefaultPartitioner
from raftlog.record.rows import Rows

ANY_PARTITION: Final = -1
BATCH_BYTES: Final = 1024 * 1024
"""Uncompressed; larger than a producer's, for nobody waits for a single one."""
SCHEMA: Final = pa.schema(
    [
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("records", pa.int32(), nullable=False),
        pa.field("batch", pa.large_binary(), nullable=False),
    ]
)


class Batch(NamedTuple):
    """An encoded record batch."""

    partition: int
    """ANY_PARTITION: the sender's choice."""
    records: int
    encoded: bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns become records, and of which topic."""

    topic: str
    partitions: int
    bytes_max: int
    """Of a batch, compressed."""
    value: str
    key: str | None
    partition: str | None
    compression: str = "lz4"
    headers: str | None = None
    timestamp: str | None = None


def encode_table(table: pa.Table, layout: Layout) -> pa.Table:
    """All rows of a table as batches, a row of :data:`SCHEMA` each."""
    rows = list(encode(table, layout))
    columns = zip(*rows, strict=True) if rows else ([], [], [])
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )


def encode(table: pa.Table, layout: Layout) -> Iterator[Batch]:
    """All rows of a table as batches, in order within each partition.

    Raises:
        ConfigError: there is no such column.
        InvalidRecord: a column holds something that does not belong there.
        RecordTooLarge, UnknownPartition: about one of the rows.
    """
    rows = _rows(table, layout)
    longest = rows.longest
    if longest + RECORD_OVERHEAD + BATCH_HEADER_BYTES > layout.bytes_max:
        raise too_large(longest, layout.bytes_max, layout.topic)
    compression = compression_named(layout.compression)
    for partition, some in _by_partition(table, layout, rows):
        start = 0
        while start < len(some):
            batch, end = some.pack(start, min(BATCH_BYTES, layout.bytes_max), compression)
            yield Batch(partition, end - start, b"".join(batch.seal()))
            start = end


def _rows(table: pa.Table, layout: Layout) -> ArrowRows:
    """The columns that become records."""
    values = _bytes(table, layout.value, "value")
    keys = None if layout.key is None else _bytes(table, layout.key, "key")
    now_ms = time_ns() // 1_000_000
    timestamps: int | Integers = now_ms
    if layout.timestamp is not None:
        timestamps = timestamps_of(_column(table, layout.timestamp, "timestamp"), layout.timestamp, now_ms)
    headers = None
    if layout.headers is not None:
        headers = headers_of(_column(table, layout.headers, "headers"), layout.headers)
    return ArrowRows(values, keys, timestamps, headers)


def _column(table: pa.Table, name: str, what: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise ConfigError(f"{what}={name!r}: there are the columns {', '.join(table.column_names)}")
    return table.column(name)


def _bytes(table: pa.Table, name: str, what: str) -> pa.LargeBinaryArray:
    column = _column(table, name, what)
    try:
        return as_column(column, what)
    except InvalidRecord as error:
        raise InvalidRecord(f"column {name!r}: {error.message}") from error


def _by_partition(table: pa.Table, layout: Layout, rows: ArrowRows) -> Iterator[tuple[int, Rows]]:
    if layout.partition is not None:
        chosen = _chosen(table, layout, layout.partition)
        for index in np.unique(chosen).tolist():
            yield index, rows.take(np.flatnonzero(chosen == index))
        return
    by_key = rows.by_partition(DefaultPartitioner(Random()), layout.partitions)
    yield from [(ANY_PARTITION, rows)] if by_key is None else by_key


def _chosen(table: pa.Table, layout: Layout, name: str) -> Integers:
    """The partition of each row, as a column says."""
    column = _column(table, name, "partition")
    if not pa.types.is_integer(column.type):
        raise InvalidRecord(f"column {name!r} holds {column.type}, and a partition is an integer")
    chosen: Integers = column.fill_null(-1).to_numpy()
    wrong = (chosen < 0) | (chosen >= layout.partitions)
    if wrong.any():
        raise UnknownPartition(
            f"row {int(wrong.argmax())} says partition {column[int(wrong.argmax())]}: topic {layout.topic!r} "
            f"has 0 to {layout.partitions - 1}"
        )
    return chosen
