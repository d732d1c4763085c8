"""Topics as Ray Data reads them, on a real Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_kit import abort, dies_once, fill, positions, rows

import raftlog
from raftlog.errors import ConfigError
from raftlog.record.columns import SCHEMA

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_data")]


def test_a_topic_is_a_dataset(log: raftlog.Log) -> None:
    fill(log, "numbers", range(1000), partitions=3)
    abort(log, "numbers", range(5000, 5010))
    ds = raftlog.read_topic("numbers", log=log)
    assert ds.schema().base_schema == SCHEMA
    assert ds.count() == 1000
    assert rows(ds) == [*range(1000)]
    some = raftlog.read_topic("numbers", columns=["value", "offset"], log=log)
    assert some.columns() == ["value", "offset"]
    assert len(rows(raftlog.read_topic("numbers", isolation="read_uncommitted", log=log))) == 1010


def test_what_is_read_is_fixed_when_the_dataset_is_made(log: raftlog.Log) -> None:
    fill(log, "fixed", range(100))
    ds = raftlog.read_topic("fixed", log=log)
    fill(log, "fixed", range(100, 200))
    assert ds.count() == 100
    assert rows(ds) == [*range(100)] == rows(ds)
    assert raftlog.offsets_of(ds) == {("fixed", 0): 100}


def test_several_tasks_share_a_partition(log: raftlog.Log) -> None:
    log.create_topic("large")
    with log.producer() as producer:
        for number in range(4000):
            producer.send("large", b"%d" % number + b" " * 2000)
    ds = raftlog.read_topic("large", log=log, override_num_blocks=6)
    assert ds._logical_plan.dag.datasource.estimate_inmemory_data_size() == pytest.approx(8e6, rel=0.1)
    tasks = ds._logical_plan.dag.datasource.get_read_tasks(6)
    assert len(tasks) == 6
    assert rows(ds) == [*range(4000)]


def test_there_are_as_many_tasks_as_are_worth_while(log: raftlog.Log) -> None:
    """Ray's own choice would be 200, and then it would neither fuse reading with what follows nor leave the
    blocks as they are."""
    log.create_topic("worth", partitions=2)
    with log.producer() as producer:
        for number in range(4000):
            producer.send("worth", b"%d" % number + b" " * 10_000)
    ds = raftlog.read_topic("worth", log=log).map_batches(lambda table: table, batch_format="pyarrow")
    assert rows(ds) == [*range(4000)]
    source = ds._logical_plan.dag.input_dependencies[0].datasource
    assert 3 <= source.tasks_worth_while(2) <= 6
    assert 3 <= source.tasks_worth_while(100) <= 6, "of 40 MB"
    made = ds.materialize().stats()
    assert "SplitBlocks" not in made
    assert "ReadTopic->MapBatches" in made, "in one task"


def test_a_task_whose_worker_dies_reads_the_same_again(log: raftlog.Log, tmp_path: Path) -> None:
    fill(log, "dying", range(1000), partitions=2)
    marker = tmp_path / "died"
    ds = raftlog.read_topic("dying", log=log)
    fill(log, "dying", range(1000, 2000))
    passed = ds.map_batches(dies_once(marker, b"500"), batch_format="pyarrow")
    assert rows(passed) == [*range(1000)]
    assert marker.exists()


def test_nothing_to_read_is_an_empty_dataset(log: raftlog.Log) -> None:
    log.create_topic("empty", partitions=2)
    ds = raftlog.read_topic("empty", log=log)
    assert ds.count() == 0
    assert raftlog.offsets_of(ds) == {("empty", 0): 0, ("empty", 1): 0}


def test_several_topics_and_what_is_made_of_them(log: raftlog.Log) -> None:
    fill(log, "one", range(10))
    fill(log, "two", range(10, 20), partitions=2)
    both = raftlog.read_topic(["one", "two"], log=log)
    assert rows(both) == [*range(20)]
    made = both.filter(lambda row: int(row["value"]) % 2 == 0).map_batches(lambda batch: batch)
    offsets = raftlog.offsets_of(made)
    assert set(offsets) == {("one", 0), ("two", 0), ("two", 1)}
    assert sum(offsets.values()) == 20
    assert offsets.starts == dict.fromkeys(offsets, 0)
    log.commit_offsets("outside", offsets)
    assert positions(log, "outside", [("one", 0)]) == {("one", 0): 10}
    assert rows(raftlog.read_topic(["one", "two"], group="outside", log=log)) == []
    joined = raftlog.read_topic("one", log=log).union(raftlog.read_topic("two", log=log))
    assert raftlog.offsets_of(joined) == offsets


def test_offsets_that_cannot_be_told(log: raftlog.Log) -> None:
    import ray.data

    fill(log, "told", range(10))
    ds = raftlog.read_topic("told", log=log)
    twice = ds.union(raftlog.read_topic("told", end=5, log=log))
    with pytest.raises(ConfigError, match="read twice"):
        raftlog.offsets_of(twice)
    with pytest.raises(ConfigError, match="does not read a topic"):
        raftlog.offsets_of(ds.materialize())
    with pytest.raises(ConfigError, match="does not read a topic"):
        raftlog.offsets_of(ray.data.range(3))


@pytest.mark.parametrize("wrong", [{"columns": ["values"]}, {"columns": []}, {"isolation": "dirty"}])
def test_what_is_refused_at_once(log: raftlog.Log, wrong: dict[str, Any]) -> None:
    fill(log, "wrong", range(1))
    with pytest.raises(ConfigError):
        raftlog.read_topic("wrong", log=log, **wrong)
