"""From a Dataset's rows to encoded record batches: what tasks do of a write.

A batch is encoded under no identity, and where its records have neither key nor partition without a
partition: whoever sends it adds both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from time import time_ns
from typing import Any, Final, NamedTuple

import pyarrow as pa

from raftlog.client.accumulator import RECORD_OVERHEAD
from raftlog.client.producer import group_by_partition, too_large
from raftlog.errors import ConfigError, InvalidRecord, UnknownPartition
from raftlog.record.batch import BATCH_HEADER_BYTES, compression_named
from raftlog.record.codec import BatchBuilder
from raftlog.record.partitioner import DefaultPartitioner

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
        InvalidRecord: a column holds something else than bytes or text.
        RecordTooLarge, UnknownPartition: about one of the rows.
    """
    values = _bytes_of(table, layout.value, "value")
    longest = max((len(each) for each in values if each is not None), default=0)
    if longest + RECORD_OVERHEAD + BATCH_HEADER_BYTES > layout.bytes_max:
        raise too_large(longest, layout.bytes_max, layout.topic)
    keys = None if layout.key is None else _bytes_of(table, layout.key, "key")
    compression = compression_named(layout.compression)
    now_ms = time_ns() // 1_000_000
    for partition, some_values, some_keys in _by_partition(table, layout, values, keys):
        start = 0
        while start < len(some_values):
            builder = BatchBuilder(min(BATCH_BYTES, layout.bytes_max))
            end = builder.extend(some_values, some_keys, now_ms, start)
            yield Batch(partition, end - start, builder.build(compression))
            start = end


def _bytes_of(table: pa.Table, name: str, what: str) -> list[bytes | None]:
    column = _column(table, name, what)
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = column.cast(pa.large_binary())
    elif pa.types.is_null(kind):
        return [None] * len(column)
    elif not (
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    ):
        raise InvalidRecord(
            f"column {name!r} holds {kind}, and a record's {what} is bytes: make them with map_batches"
        )
    found: list[bytes | None] = column.to_pylist()
    return found


def _column(table: pa.Table, name: str, what: str) -> Any:
    if name not in table.column_names:
        raise ConfigError(f"{what}={name!r}: there are the columns {', '.join(table.column_names)}")
    return table.column(name)


def _by_partition(
    table: pa.Table, layout: Layout, values: Sequence[bytes | None], keys: Sequence[bytes | None] | None
) -> Iterator[tuple[int, Sequence[bytes | None], Sequence[bytes | None] | None]]:
    if layout.partition is not None:
        yield from _by_column(_column(table, layout.partition, "partition").to_pylist(), layout, values, keys)
        return
    if keys is not None and None not in keys:
        partitioner = DefaultPartitioner(Random(0))  # only keys are asked for, and they leave no choice
        groups = group_by_partition(partitioner, layout.partitions, values, keys, None)
        for chosen, some_values, some_keys in groups:
            assert chosen is not None, "a key belongs to a partition"
            yield chosen, some_values, some_keys
        return
    if keys is None:
        yield ANY_PARTITION, values, None
        return
    keyless = [value for value, key in zip(values, keys, strict=True) if key is None]
    yield ANY_PARTITION, keyless, None
    keyed = [(value, key) for value, key in zip(values, keys, strict=True) if key is not None]
    if keyed:
        yield from _by_partition(table, layout, *zip(*keyed, strict=True))


def _by_column(
    chosen: Sequence[int | None],
    layout: Layout,
    values: Sequence[bytes | None],
    keys: Sequence[bytes | None] | None,
) -> Iterator[tuple[int, Sequence[bytes | None], Sequence[bytes | None] | None]]:
    rows: dict[int, list[int]] = {}
    for row, index in enumerate(chosen):
        if not isinstance(index, int) or not 0 <= index < layout.partitions:
            raise UnknownPartition(
                f"row {row} says partition {index!r}: topic {layout.topic!r} has 0 to {layout.partitions - 1}"
            )
        rows.setdefault(index, []).append(row)
    for index, some in rows.items():
        yield index, [values[row] for row in some], None if keys is None else [keys[row] for row in some]
