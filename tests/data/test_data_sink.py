"""Datasets into topics, on a real Ray: once, whatever happens."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data
from data_kit import dies_once, fill, numbers, positions, rows, settle

import raftlog
from raftlog.data import sink
from raftlog.data.groups import transactional_id
from raftlog.errors import (
    ConfigError,
    GroupNotEmpty,
    InvalidRecord,
    InvalidTopic,
    RaftlogError,
    StaleOffsets,
    UnknownTopic,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_data")]


def copy(ds: Any, topic: str, log: raftlog.Log, group: str | None = None, **options: Any) -> None:
    """Write what was read, with its offsets."""
    commit = None if group is None else (group, raftlog.offsets_of(ds))
    raftlog.write_topic(ds, topic, value="value", key="key", commit=commit, log=log, **options)


def test_count_before_the_write_writes_nothing(log: raftlog.Log) -> None:
    fill(log, "counted", range(1000), partitions=3)
    log.create_topic("counted-out", partitions=2)
    ds = raftlog.read_topic("counted", group="counters", log=log)
    doubled = ds.map_batches(lambda table: table, batch_format="pyarrow")
    assert doubled.count() == 1000
    assert numbers(log, "counted-out") == []
    copy(doubled, "counted-out", log, "counters")
    assert doubled.count() == 1000
    assert numbers(log, "counted-out") == [*range(1000)]
    assert rows(raftlog.read_topic("counted", group="counters", log=log)) == []


def test_order_and_keys_are_kept(log: raftlog.Log) -> None:
    log.create_topic("ordered-out", partitions=3)
    ds = ray.data.range(20_000, override_num_blocks=7).map_batches(
        lambda batch: {"key": [b"%d" % (each % 11) for each in batch["id"]], "value": batch["id"].astype(str)}
    )
    copy(ds, "ordered-out", log)
    by_key: dict[bytes | None, list[int]] = {}
    with log.consumer("ordered-out") as consumer:
        for record in consumer.records(until="end"):
            by_key.setdefault(record.key, []).append(int(record.value))
    assert by_key == {b"%d" % key: [*range(key, 20_000, 11)] for key in range(11)}


@pytest.mark.parametrize("semantics", ["exactly-once", "at-least-once"])
def test_a_topic_that_is_read_and_written_is_a_copy(log: raftlog.Log, semantics: str) -> None:
    name, copied = f"original-{semantics}", f"copy-{semantics}"
    log.create_topic(name, partitions=3)
    log.create_topic(copied, partitions=3)
    with log.producer() as producer:
        for n in range(500):
            headers = [("n", b"%d" % n), ("n", None)] if n % 3 else []
            key = None if n % 5 == 0 else b"%d" % (n % 7)
            value = None if n % 11 == 0 else b"%d" % n
            producer.send(name, value, key=key, headers=headers, timestamp_ms=10**12 + n * n)
    ds = raftlog.read_topic(name, log=log)
    ds = ds.map_batches(lambda table: table, batch_format="pyarrow")
    raftlog.write_topic(
        ds,
        copied,
        value="value",
        key="key",
        partition="partition",
        headers="headers",
        timestamp="timestamp",
        semantics=semantics,  # type: ignore[arg-type]
        log=log,
    )

    def content(topic: str) -> list[Any]:
        with log.consumer(topic) as consumer:
            return sorted(
                (
                    (each.partition, each.timestamp_ms, each.key, each.value, each.headers)
                    for each in consumer.records(until="end")
                ),
                key=repr,
            )

    assert len(content(name)) == 500
    assert content(copied) == content(name)
    with pytest.raises(InvalidRecord, match="column 'value' holds binary, and headers are lists"):
        raftlog.write_topic(ds, copied, value="value", headers="value", log=log)


def test_a_worker_killed_in_mid_write_changes_nothing(log: raftlog.Log, tmp_path: Path) -> None:
    fill(log, "killed", range(1000), partitions=4)
    log.create_topic("killed-out")
    ds = raftlog.read_topic("killed", group="killers", log=log)
    marker = tmp_path / "died"
    copy(ds.map_batches(dies_once(marker, b"500"), batch_format="pyarrow"), "killed-out", log, "killers")
    assert marker.exists()
    assert numbers(log, "killed-out") == [*range(1000)]


def test_an_error_leaves_nothing_behind(log: raftlog.Log) -> None:
    fill(log, "failing", range(100), partitions=2)
    log.create_topic("failing-out")

    def fail(table: Any) -> Any:
        if b"77" in table["value"].to_pylist():
            raise ValueError("seventy-seven")
        return table

    ds = raftlog.read_topic("failing", group="failures", log=log)
    with pytest.raises(Exception, match="seventy-seven"):
        copy(ds.map_batches(fail, batch_format="pyarrow"), "failing-out", log, "failures")
    with pytest.raises(InvalidRecord, match="value is bytes"):
        raftlog.write_topic(ds, "failing-out", value="offset", log=log)
    assert numbers(log, "failing-out", isolation="read_uncommitted") == []
    assert positions(log, "failures", [("failing", 0)]) == {}
    copy(ds, "failing-out", log, "failures")
    assert numbers(log, "failing-out") == [*range(100)]


def test_what_fails_while_it_is_sent_is_aborted(log: raftlog.Log, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(log, "broken", range(100))
    log.create_topic("broken-out")
    ds = raftlog.read_topic("broken", group="breakers", log=log)

    def fail(*_: Any) -> None:
        raise OSError("no more")

    monkeypatch.setattr(sink, "_stage", fail)
    with pytest.raises(OSError, match="no more"):
        copy(ds, "broken-out", log, "breakers")
    settle(log, "broken-out")
    assert numbers(log, "broken-out") == []
    monkeypatch.undo()
    copy(ds, "broken-out", log, "breakers")
    assert numbers(log, "broken-out") == [*range(100)]


def test_the_same_records_are_committed_once(log: raftlog.Log) -> None:
    fill(log, "twice", range(100))
    log.create_topic("twice-out")
    first = raftlog.read_topic("twice", group="twins", log=log)
    second = raftlog.read_topic("twice", group="twins", log=log)
    copy(first, "twice-out", log, "twins")
    for again in (first, second):
        with pytest.raises(StaleOffsets, match="offset 100 of"):
            copy(again, "twice-out", log, "twins")
    plain = dict(raftlog.offsets_of(first))
    log.commit_offsets("twins", {("twice", 0): 50})
    with pytest.raises(StaleOffsets):
        copy(first, "twice-out", log, "twins")
    assert numbers(log, "twice-out") == [*range(100)]
    raftlog.write_topic(first.limit(0), "twice-out", value="value", commit=("twins", plain), log=log)
    assert positions(log, "twins", [("twice", 0)]) == {("twice", 0): 100}


def test_of_two_drivers_only_one_commits(log: raftlog.Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stands still with everything sent, and wakes up when the second is done."""
    fill(log, "rivals", range(100))
    log.create_topic("rivals-out")
    first = raftlog.read_topic("rivals", group="rivals", log=log)
    second = raftlog.read_topic("rivals", group="rivals", log=log)
    stands, goes_on = threading.Event(), threading.Event()
    stage = sink._stage

    def stand_still(*arguments: Any) -> None:
        if not stands.is_set():
            stands.set()
            assert goes_on.wait(60)
        stage(*arguments)

    monkeypatch.setattr(sink, "_stage", stand_still)
    outcome: list[BaseException] = []

    def write() -> None:
        try:
            copy(first, "rivals-out", log, "rivals")
        except RaftlogError as error:
            outcome.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    assert stands.wait(60)
    copy(second, "rivals-out", log, "rivals")
    goes_on.set()
    thread.join(60)
    assert [each.fatal or each.abortable for each in outcome] == [True]  # type: ignore[attr-defined]
    assert numbers(log, "rivals-out") == [*range(100)]


DRIVER = """
import os, pickle, signal, sys
import ray, raftlog
from raftlog.client.sync_producer import Transaction
from raftlog.data import sink

address, bootstrap, when = sys.argv[1], sys.argv[2], sys.argv[3]
log = pickle.loads(bytes.fromhex(bootstrap))
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
ds = raftlog.read_topic("deadly-" + when, group="deadly-" + when, log=log)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

stage, commit = sink._stage, Transaction.commit

def staged(log, producer, *rest):
    producer.flush()
    stage(log, producer, *rest)
    if when == "before":
        die()

def committed(self, timeout=None):
    commit(self, timeout)
    die()

sink._stage, Transaction.commit = staged, committed
raftlog.write_topic(ds, "deadly-out-" + when, value="value", key="key",
                    commit=("deadly-" + when, raftlog.offsets_of(ds)), log=log)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_driver_dies_around_the_commit(log: raftlog.Log, when: str) -> None:
    source, target = f"deadly-{when}", f"deadly-out-{when}"
    fill(log, source, range(300), partitions=2)
    log.create_topic(target)
    address = ray.get_runtime_context().gcs_address
    arguments = [sys.executable, "-c", DRIVER, address, pickle.dumps(log).hex(), when]
    ended = subprocess.run(arguments, timeout=120, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    if when == "before":
        assert len(numbers(log, target, isolation="read_uncommitted")) == 300
        assert numbers(log, target) == []
    ds = raftlog.read_topic(source, group=source, log=log)
    if when == "after":
        assert rows(ds) == []
    copy(ds, target, log, source)
    assert numbers(log, target) == [*range(300)]
    assert rows(raftlog.read_topic(source, group=source, log=log)) == []


def test_a_group_with_members_commits_by_itself(log: raftlog.Log) -> None:
    fill(log, "manned", range(10))
    log.create_topic("manned-out")
    with log.consumer("manned", group="crew") as member:
        member.poll(timeout=30)
        ds = raftlog.read_topic("manned", group="crew", log=log)
        with pytest.raises(RaftlogError) as raised:
            copy(ds, "manned-out", log, "crew")
    assert isinstance(raised.value, GroupNotEmpty) or isinstance(raised.value.__cause__, GroupNotEmpty)
    settle(log, "manned-out")
    assert numbers(log, "manned-out") == []


def test_offsets_alone_are_committed_too(log: raftlog.Log) -> None:
    fill(log, "none", range(10))
    log.create_topic("none-out")
    ds = raftlog.read_topic("none", group="nobody", log=log)
    copy(ds.filter(lambda row: False), "none-out", log, "nobody")
    assert numbers(log, "none-out") == []
    assert positions(log, "nobody", [("none", 0)]) == {("none", 0): 10}


def test_at_least_once_is_written_by_the_tasks(log: raftlog.Log) -> None:
    fill(log, "direct", range(1000), partitions=2)
    log.create_topic("direct-out", partitions=2)
    ds = raftlog.read_topic("direct", group="workers", log=log)
    before = {each.transactional_id for each in log.transactions()}
    copy(ds, "direct-out", log, "workers", semantics="at-least-once")
    assert numbers(log, "direct-out") == [*range(1000)]
    assert positions(log, "workers", [("direct", 0), ("direct", 1)]) == raftlog.offsets_of(ds)
    assert {each.transactional_id for each in log.transactions()} == before


def test_writes_of_a_process_share_a_transactional_id(log: raftlog.Log) -> None:
    log.create_topic("shared-out")
    ds = ray.data.from_items([{"value": b"1"}])
    raftlog.write_topic(ds, "shared-out", value="value", log=log)
    before = {each.transactional_id for each in log.transactions()}
    raftlog.write_topic(ds, "shared-out", value="value", log=log)
    assert {each.transactional_id for each in log.transactions()} == before
    assert len(transactional_id("g" * 300)) <= 249
    assert transactional_id("g") != transactional_id("h")


def test_a_transaction_is_open_for_as_long_as_it_may_take() -> None:
    assert sink.timeout_for(0) == 60_000
    assert sink.timeout_for(240_000_000) == 120_000
    assert sink.timeout_for(10**12) == 900_000


def test_what_is_refused_before_anything_is_run(log: raftlog.Log) -> None:
    log.create_topic("refused-out")
    ds = ray.data.from_items([{"value": b"1"}])
    with pytest.raises(UnknownTopic):
        raftlog.write_topic(ds, "nowhere", value="value", log=log)
    with pytest.raises(InvalidTopic):
        raftlog.write_topic(ds, "__groups", value="value", log=log)
    with pytest.raises(ConfigError, match="'exactly-once' or 'at-least-once'"):
        raftlog.write_topic(ds, "refused-out", value="value", semantics="at-most-once", log=log)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a pair"):
        raftlog.write_topic(ds, "refused-out", value="value", commit="group", log=log)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there are the columns value"):
        raftlog.write_topic(ds, "refused-out", value="nothing", log=log)
