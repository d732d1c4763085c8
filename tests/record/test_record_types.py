"""What users see of records."""

from __future__ import annotations

import copy
import pickle
from datetime import UTC, datetime

import pytest

from raftlog.record.types import BatchRange, Record, RecordMetadata, TopicPartition

RECORD = Record("flights", 3, 17, 1_357_034_400_123, b"N14228", b"{}", (("trace", b"x"), ("none", None)))


def test_datetime_is_aware_and_exact_to_the_millisecond() -> None:
    assert RECORD.datetime == datetime(2013, 1, 1, 10, 0, 0, 123_000, tzinfo=UTC)
    assert RECORD.datetime.tzinfo is UTC


@pytest.mark.parametrize(
    "value", [RECORD, RecordMetadata("t", 1, 2, 3), BatchRange("t", 1, 2, 3), TopicPartition("t", 1)]
)
def test_values_are_equal_hashable_and_survive_pickling(value: object) -> None:
    assert pickle.loads(pickle.dumps(value)) == copy.copy(value) == value
    assert hash(pickle.loads(pickle.dumps(value))) == hash(value)


def test_records_do_not_change() -> None:
    with pytest.raises(AttributeError):
        RECORD.offset = 18  # type: ignore[misc]


def test_a_topic_partition_is_its_tuple() -> None:
    assert TopicPartition("t", 1) == ("t", 1)
    assert {("t", 1): "x"}[TopicPartition("t", 1)] == "x"
