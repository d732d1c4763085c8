"""``raftlog recover`` on real disks: a majority of the directories is gone for good."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from recovery_kit import digest, fill, lose, read, recover, wait_for_replicas

from raftlog.broker.broker import Broker
from raftlog.broker.founding import decide
from raftlog.broker.history import HISTORY_TERMS
from raftlog.client.log import Log
from raftlog.errors import ForeignDataDir, LogTruncated, OutOfOrderSequence
from raftlog.record.types import TopicPartition
from raftlog.storage.identity import IDENTITY_PATH, parse_identity
from raftlog.testing.local_cluster import LocalCluster

VALUES = [b"%d" % number for number in range(300)]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """The data of a stopped cluster of three: records, a group's position, a transaction."""
    with LocalCluster(3, data_dir=tmp_path) as cluster:
        fill(cluster, "orders", VALUES, partitions=2)
        with cluster.log.consumer("orders", group="billing") as consumer:
            assert len(consumer.poll(timeout=10.0, max_records=50)) == 50
            consumer.commit()
        with cluster.log.producer(transactional_id="copy-1") as producer, producer.transaction() as txn:
            txn.send("orders", b"committed", partition=0)
    return tmp_path


def test_what_the_survivor_had_is_served_and_replicated_anew(three: Path) -> None:
    lose(three, 0, 2)
    done = recover("--yes", data_dirs=[three])
    assert done.exit_code == 0, done.output
    assert "orders/0: goes on with brokers 1, from broker 1's log" in done.output
    identity = parse_identity((three / "broker-1" / IDENTITY_PATH).read_bytes())
    assert decide("local", {1: identity}).brokers == (1,), "nobody waits for a majority of the founders"
    with LocalCluster(3, data_dir=three) as cluster:
        log = cluster.log
        assert sorted(read(cluster, "orders")) == sorted([*VALUES, b"committed"])
        with log.producer() as producer:
            producer.send("orders", b"more", partition=1).result(30)
        wait_for_replicas(cluster, "orders", [1, 3, 4])
        assert {broker.id for broker in log.describe_cluster().brokers} == {1, 3, 4}
        assert all(each.term > HISTORY_TERMS for each in log.describe_topic("orders").partitions)
        with log.consumer("orders", group="billing") as consumer:
            rest = list(consumer.records(until="end"))
        assert len(rest) == len(VALUES) + 2 - 50, "the group goes on from its position"
        with log.producer(transactional_id="copy-1") as producer, producer.transaction() as txn:
            txn.send("orders", b"again", partition=0)
        with log.consumer("orders") as consumer:
            assert any(record.value == b"again" for record in consumer)


@pytest.mark.parametrize("arguments", [("--dry-run",), ()])
def test_without_yes_no_byte_changes(three: Path, arguments: tuple[str, ...]) -> None:
    lose(three, 0, 2)
    before = digest(three)
    said = recover(*arguments, data_dirs=[three])
    assert said.exit_code == 0
    assert "here: brokers 1; lost: brokers 0, 2" in said.output
    assert "how much nobody can tell" in said.output
    assert "copy the directories first" in said.output
    row = next(line.split() for line in said.output.splitlines() if line.startswith("orders/0"))
    assert row[1:3] == ["1", "1"], "left on broker 1, from its log"
    assert "Nothing was changed" in said.output
    assert digest(three) == before


def test_with_a_majority_there_it_is_refused(three: Path) -> None:
    lose(three, 2)
    before = digest(three)
    refused = recover("--yes", data_dirs=[three])
    assert refused.exit_code == 1
    assert "every group has its majority" in refused.output
    assert digest(three) == before


def test_a_directory_that_is_not_named_is_not_forgotten(three: Path) -> None:
    """Naming one of three that are all there would throw away the other two."""
    refused = recover("--yes", data_dirs=[three / "broker-1"])
    assert refused.exit_code == 1
    assert "broker-0 is a directory of this cluster too" in refused.output


def test_while_brokers_run_it_is_refused(tmp_path: Path) -> None:
    """Also where the directories that are named are those of stopped ones: the others answer."""
    with LocalCluster(3, data_dir=tmp_path / "data") as cluster:
        fill(cluster, "orders", VALUES)
        refused = recover("--yes", data_dirs=[tmp_path / "data"])
        assert refused.exit_code == 1
        assert "is in use by process" in refused.output
        cluster.kill_broker(1)
        elsewhere = tmp_path / "elsewhere"
        shutil.copytree(tmp_path / "data" / "broker-1", elsewhere)
        refused = recover("--yes", data_dirs=[elsewhere])
        assert refused.exit_code == 1
        assert "brokers 0, 2 run" in refused.output


def test_directories_of_two_clusters_or_twice_the_same_are_refused(three: Path, tmp_path: Path) -> None:
    lose(three, 0, 2)
    other = tmp_path / "other"
    with LocalCluster(1, data_dir=other) as cluster:
        fill(cluster, "orders", VALUES)
    twice = tmp_path / "twice" / "broker-1"
    shutil.copytree(three / "broker-1", twice)
    assert "2 clusters" in recover("--yes", data_dirs=[three / "broker-1", other]).output
    refused = recover("--yes", data_dirs=[three / "broker-1", twice])
    assert refused.exit_code == 1
    assert "second directory of broker 1" in refused.output


def test_consumers_beyond_the_end_are_told_and_producers_too(tmp_path: Path) -> None:
    """The survivor was away while the last records were acknowledged."""
    data = tmp_path / "data"
    with LocalCluster(3, data_dir=data) as cluster:
        fill(cluster, "orders", VALUES)
        wait_for_replicas(cluster, "orders", [0, 1, 2])
        cluster.kill_broker(1)
        log = Log(cluster.bootstrap)
        earlier = log.producer()
        earlier.send_batch("orders", [b"unlucky"] * 20).result(30)
        consumer = log.consumer("orders", auto_offset_reset="none")
        consumer.seek(TopicPartition("orders", 0), 0)
        assert len(list(consumer.records(until="end"))) == len(VALUES) + 20
    lose(data, 0, 2)
    assert recover("--yes", data_dirs=[data]).exit_code == 0
    with LocalCluster(1, data_dir=data) as cluster:
        assert len(read(cluster, "orders")) == len(VALUES)
        with cluster.log.producer() as new:  # lost nothing of its own, whatever identity it goes on under
            new.send_batch("orders", [b"new"] * 50).result(30)
        with log, consumer, earlier:
            with pytest.raises(OutOfOrderSequence):
                earlier.send_batch("orders", [b"new"] * 50).result(30)
            earlier.send_batch("orders", [b"new"] * 50).result(30)
            with pytest.raises(LogTruncated) as told:
                consumer.poll(timeout=30.0)
        assert told.value.details["offset"] <= len(VALUES)


def test_a_lost_disk_that_turns_up_is_not_let_in(
    three: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    aside = tmp_path_factory.mktemp("aside") / "broker-0"
    shutil.copytree(three / "broker-0", aside)
    lose(three, 0, 2)
    assert recover("--yes", data_dirs=[three]).exit_code == 0
    with LocalCluster(1, data_dir=three) as cluster:
        aside.rename(three / "broker-0")

        async def start() -> Broker:
            await cluster._start_one(0)
            cluster._introduce()
            return cluster._brokers.pop(0)

        broker = cluster._await(start())

        async def end() -> object:
            error = await asyncio.wait_for(broker.failed, 30)
            await broker.close()
            return error

        assert isinstance(cluster._await(end()), ForeignDataDir)
        assert sorted(read(cluster, "orders")) == sorted([*VALUES, b"committed"])


def test_after_a_power_cut_of_all_replicas_an_unsynced_topic_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is lost, and yet none of three that may have forgotten something can lead."""
    with LocalCluster(3, data_dir=tmp_path) as cluster:
        fill(cluster, "fast", VALUES, config={"flush": "interval", "flush_interval_ms": 10})
        wait_for_replicas(cluster, "fast", [0, 1, 2])
        for broker in (0, 1, 2):
            cluster.kill_broker(broker)
    monkeypatch.setattr("raftlog.storage.real_disk._boot_id", lambda: "another boot")
    said = recover("--dry-run", data_dirs=[tmp_path])
    assert said.exit_code == 0, said.output
    assert "lost: brokers none" in said.output
    assert "(less after a reboot)" in said.output
    assert "__metadata" in said.output
    done = recover("--yes", data_dirs=[tmp_path])
    assert done.exit_code == 0, done.output
    with LocalCluster(3, data_dir=tmp_path) as cluster:
        assert len(read(cluster, "fast")) == len(VALUES)
        with cluster.log.producer() as producer:
            producer.send("fast", b"more").result(30)
        wait_for_replicas(cluster, "fast", [0, 1, 2])


def test_a_damaged_copy_is_none(three: Path) -> None:
    """What is left of one partition does not check, and nobody else has it: it begins anew, others go on."""
    lose(three, 0, 2)
    with_records = max(
        (three / "broker-1" / "replicas").glob("*/*.seg"), key=lambda path: path.stat().st_size
    )
    with_records.unlink()
    said = recover("--dry-run", data_dirs=[three])
    assert "cannot be used, and is given up" in said.output
    lost = [line for line in said.output.splitlines() if "everything is lost" in line]
    assert len(lost) == 1
    partition = int(lost[0].split()[0].removeprefix("orders/"))
    done = recover("--yes", data_dirs=[three])
    assert done.exit_code == 0, done.output
    assert f"orders/{partition}: begins anew, empty, on broker 1" in done.output
    with LocalCluster(1, data_dir=three) as cluster:
        with cluster.log.producer() as producer:
            assert producer.send("orders", b"first", partition=partition).result(30).offset == 0
        wait_for_replicas(cluster, "orders", [1])
