"""What users see of records: the record itself and the names of places in a topic."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

Headers: TypeAlias = tuple[tuple[str, bytes | None], ...]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class TopicPartition(NamedTuple):
    """A partition of a topic. A plain ``(topic, partition)`` tuple is accepted wherever one is asked for."""

    topic: str
    partition: int


class Record(msgspec.Struct, frozen=True, gc=False):
    """One record as a consumer hands it out.

    ``key`` and ``value`` are bytes or None as they stand in the log; where a consumer was given a
    deserializer, ``value`` is what that made of the bytes. Not tracked by the garbage collector: a value is
    made before its record and so cannot refer back to it.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    """Milliseconds since the epoch; the producer's (-1 where a foreign producer gave none)."""
    key: bytes | None
    value: Any
    headers: Headers = ()

    @property
    def datetime(self) -> datetime:
        """``timestamp_ms`` as an aware datetime in UTC."""
        return _EPOCH + timedelta(milliseconds=self.timestamp_ms)


class RecordMetadata(msgspec.Struct, frozen=True, gc=False):
    """Where a record was written. ``offset`` is -1 when nobody was asked to acknowledge it (acks=0)."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int


class BatchRange(msgspec.Struct, frozen=True, gc=False):
    """Where ``count`` records of one batch were written: offsets base_offset to base_offset + count - 1."""

    topic: str
    partition: int
    base_offset: int
    count: int
