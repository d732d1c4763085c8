"""What a consumer hands out as Arrow columns. Importing this module imports pyarrow."""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa

from raftlog.client.assigned import AssignedPartition
from raftlog.record.batch import BatchHeader
from raftlog.record.codec import decode_batch
from raftlog.record.columns import columns_of, decode_columns, table_of
from raftlog.record.frame import Buffer
from raftlog.record.types import Record, TopicPartition

_FEW_RECORDS: Final = 64
"""Batches of fewer are decoded to records, which become columns together: columns have a price per batch."""


def decode(batch: Buffer, topic: str, partition: int, *, check: bool) -> list[Record] | pa.RecordBatch:
    """The records of a batch, as columns unless they are few."""
    if BatchHeader.parse(batch).record_count < _FEW_RECORDS:
        return decode_batch(batch, topic, partition, check=check)
    return decode_columns(batch, topic, partition, check=check)


class Pieces:
    """A table in the making."""

    __slots__ = ("_columns", "_records", "begins")

    def __init__(self) -> None:
        self.begins: dict[TopicPartition, int] = {}
        """The first offset of each partition."""
        self._columns: list[pa.RecordBatch] = []
        self._records: list[Record] = []

    def __len__(self) -> int:
        return sum(map(len, self._columns)) + len(self._records)

    def hand_out(self, each: AssignedPartition, end: int) -> bool:
        """Take what is decoded up to this index."""
        self.begins.setdefault(each.name, each.first + each.cursor)
        piece: Any = each.decoded[each.cursor : end]
        if isinstance(piece, list):
            self._records += piece
        else:
            self._put_records()
            self._columns.append(piece)
        each.move(end)
        return True

    def table(self) -> pa.Table:
        """All of it, in the order in which it was taken."""
        self._put_records()
        return table_of(self._columns)

    def _put_records(self) -> None:
        if self._records:
            self._columns.append(columns_of(self._records))
            self._records = []
