"""Micro-batches, on a real Ray."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from data_kit import fill, numbers, positions, rows
from hypothesis import given
from hypothesis import strategies as st

import raftlog
from raftlog.data import streaming
from raftlog.data.spans import Span
from raftlog.data.streaming import limited
from raftlog.errors import ConfigError, StaleOffsets


def span(partition: int, records: int, size: float) -> Span:
    return Span("t", b"id", partition, 5, 5 + records, memory_bytes=size)


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.sampled_from([0.0, 10.0, 1e4])), max_size=8),
    st.integers(1, 2000),
    st.integers(1, 10**6),
)
def test_a_batch_keeps_to_its_limits_and_always_gets_on(
    sizes: list[tuple[int, float]], rows_max: int, bytes_max: int
) -> None:
    spans = [span(number, *size) for number, size in enumerate(sizes)]
    taken = limited(spans, rows_max, bytes_max)
    assert [each.start for each in taken] == [each.start for each in spans]
    for before, after in zip(spans, taken, strict=True):
        assert after.start <= after.end <= before.end
        assert (after.end > after.start) == (before.end > before.start)
    some = sum(each.end > each.start for each in taken)
    assert sum(each.end - each.start for each in taken) <= max(rows_max, some) + some
    largest = max((each.memory_bytes for each in taken), default=0.0)
    assert sum(each.size for each in taken) <= bytes_max + some * (largest + 1)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_data")
class TestStream:
    """On a real Ray."""

    def write(self, batch: Any, topic: str, group: str, log: raftlog.Log) -> None:
        commit = (group, raftlog.offsets_of(batch))
        raftlog.write_topic(batch, topic, value="value", key="key", commit=commit, log=log)

    def test_stops_and_resumes_without_loss_or_duplicates(self, log: raftlog.Log) -> None:
        fill(log, "endless", range(1000), partitions=3)
        log.create_topic("endless-out", partitions=2)
        sizes = []
        stream = raftlog.stream("endless", group="e", max_rows=200, log=log)
        for batch in stream:
            sizes.append(batch.count())
            self.write(batch, "endless-out", "e", log)
            if len(sizes) == 2:
                stream.stop()
        assert len(sizes) == 2
        assert all(150 < size <= 200 for size in sizes)
        for batch in raftlog.stream("endless", group="e", max_rows=300, log=log):
            self.write(batch, "endless-out", "e", log)
            break
        left = next(raftlog.stream("endless", group="e", log=log))
        assert left.count() > 0, "and nobody asks for the next: it is not committed"
        fill(log, "endless", range(1000, 1100))
        for batch in raftlog.stream("endless", group="e", until="end", log=log):
            self.write(batch, "endless-out", "e", log)
        assert numbers(log, "endless-out") == [*range(1100)]
        assert list(raftlog.stream("endless", group="e", until="end", log=log)) == []

    def test_other_sinks_are_committed_when_the_next_is_asked_for(self, log: raftlog.Log) -> None:
        fill(log, "other", range(100))
        seen = []
        stream = raftlog.stream("other", group="o", max_rows=40, until="end", columns=["value"], log=log)
        for batch in stream:
            done = positions(log, "o", [("other", 0)]).get(("other", 0), 0)
            assert done == len(seen)
            seen += rows(batch)
        assert seen == [*range(100)]
        assert positions(log, "o", [("other", 0)]) == {("other", 0): 100}

    def test_waits_for_records_and_for_more_of_them(self, log: raftlog.Log) -> None:
        log.create_topic("slow")
        stream = raftlog.stream("slow", group="s", max_seconds=0.2, log=log)
        writer = threading.Thread(target=fill, args=(log, "slow", range(50)))
        writer.start()
        found: list[int] = []
        while len(found) < 50:
            found += rows(next(stream))
        writer.join()
        assert found == [*range(50)]
        threading.Timer(0.1, stream.stop).start()
        assert next(stream, None) is None

    def test_idle_asks_nobody_and_hears_of_a_record_at_once(
        self, log: raftlog.Log, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log.create_topic("idle", partitions=3)
        monkeypatch.setattr(streaming, "IDLE_S", 50.0)  # what comes is not found by looking again
        looks: list[float] = []
        look = streaming.find_spans

        def spied(*args: Any) -> Any:
            looks.append(time.monotonic())
            return look(*args)

        monkeypatch.setattr(streaming, "find_spans", spied)
        stream = raftlog.stream("idle", group="i", max_seconds=0.01, log=log)
        written: list[float] = []

        def write() -> None:
            fill(log, "idle", range(1))
            written.append(time.monotonic())

        threading.Timer(2.0, write).start()
        batch = next(stream)
        found = time.monotonic() - written[0]
        assert rows(batch) == [0]
        assert found < 1.0
        assert len([each for each in looks if each < written[0] - 0.5]) <= 2, "for two seconds"
        threading.Timer(0.5, stream.stop).start()
        stopped = time.monotonic()
        assert next(stream, None) is None
        assert time.monotonic() - stopped < 10.0, "a wait is broken off"

    def test_two_streams_of_a_group(self, log: raftlog.Log) -> None:
        fill(log, "both", range(100))
        log.create_topic("both-out")
        first = raftlog.stream("both", group="b", max_rows=50, log=log)
        mine, theirs = next(first), next(raftlog.stream("both", group="b", max_rows=70, log=log))
        self.write(theirs, "both-out", "b", log)
        with pytest.raises(StaleOffsets):
            self.write(mine, "both-out", "b", log)
        with pytest.raises(StaleOffsets):
            next(first)
        assert numbers(log, "both-out") == [*range(70)]

    @pytest.mark.parametrize(
        "wrong", [{"max_rows": 0}, {"max_bytes": 0}, {"max_seconds": 0}, {"until": "now"}, {"columns": ["x"]}]
    )
    def test_what_is_refused(self, log: raftlog.Log, wrong: dict[str, Any]) -> None:
        fill(log, "refused", range(1))
        with pytest.raises(ConfigError):
            raftlog.stream("refused", group="r", log=log, **wrong)
