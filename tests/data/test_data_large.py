"""Values of tens of MB, all the way; and those above the limit, of which nothing is left anywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data_kit import settle

import raftlog
from raftlog.errors import ConfigError, RecordTooLarge

MIB = 1024 * 1024
LIMIT = 32 * MIB
LARGE = [np.random.default_rng(seed).bytes(20_000_000) for seed in range(3)]
"""Which no compression makes smaller."""
TOO_LARGE = bytes(LIMIT)
"""Which any compression would: the limit is on what readers have to hold."""


def topic(log: raftlog.Log, name: str) -> str:
    log.create_topic(name, config={"max_message_bytes": LIMIT})
    return name


def values_of(log: raftlog.Log, name: str) -> list[bytes]:
    with log.consumer(name) as consumer:
        return [record.value for record in consumer.records(until="end")]


def arrow_values_of(log: raftlog.Log, name: str, count: int) -> list[bytes]:
    found: list[bytes] = []
    with log.consumer(name) as consumer:
        while len(found) < count:
            table = consumer.poll_arrow(timeout=30.0)
            assert table.num_rows, "nothing more came"
            found += table["value"].to_pylist()
    return found


def test_one_by_one(log: raftlog.Log) -> None:
    name = topic(log, "large-sent")
    with log.producer() as producer:
        deliveries = [producer.send(name, value, key=b"k") for value in LARGE]
        with pytest.raises(RecordTooLarge, match="large-sent"):
            producer.send(name, TOO_LARGE)
        deliveries.append(producer.send(name, b"small"))
    assert [each.result(timeout=60).offset for each in deliveries] == [0, 1, 2, 3]
    assert values_of(log, name) == [*LARGE, b"small"]
    assert arrow_values_of(log, name, 4) == [*LARGE, b"small"]


@pytest.mark.parametrize("kind", ["list", "arrow", "numpy"])
def test_as_a_batch(log: raftlog.Log, kind: str) -> None:
    name = topic(log, f"large-batch-{kind}")
    given: dict[str, Any] = {
        "list": LARGE,
        "arrow": pa.array(LARGE, pa.large_binary()),
        "numpy": np.stack([np.frombuffer(value, np.uint8) for value in LARGE]),
    }
    with log.producer() as producer:
        producer.send_batch(name, given[kind])
        with pytest.raises(RecordTooLarge, match=name):
            producer.send_batch(name, [b"small", TOO_LARGE])
    assert values_of(log, name) == LARGE


def test_a_topic_says_how_large_values_may_be(log: raftlog.Log) -> None:
    log.create_topic("not-large")
    with log.producer() as producer:
        with pytest.raises(RecordTooLarge, match="not-large"):
            producer.send("not-large", LARGE[0])
        assert producer.send("not-large", b"small").result(timeout=30).offset == 0
    with pytest.raises(ConfigError, match="max_message_bytes"):
        log.create_topic("too-large", config={"max_message_bytes": 2**31})


@pytest.mark.ray
@pytest.mark.usefixtures("ray_data")
class TestRayData:
    """On a real Ray."""

    def test_from_topic_to_topic(self, log: raftlog.Log) -> None:
        name, copied = topic(log, "large-read"), topic(log, "large-written")
        with log.producer() as producer:
            for value in LARGE:
                producer.send(name, value)
        ds = raftlog.read_topic(name, group="movers", log=log)
        commit = "movers", raftlog.offsets_of(ds)
        raftlog.write_topic(ds, copied, value="value", commit=commit, log=log)
        assert values_of(log, copied) == LARGE
        log.create_topic("unfit")
        with pytest.raises(RecordTooLarge, match="unfit"):
            raftlog.write_topic(raftlog.read_topic(name, log=log), "unfit", value="value", log=log)
        settle(log, "unfit")
        assert values_of(log, "unfit") == []
