"""LocalCluster and its pytest fixtures, as users' tests use them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import raftlog
from raftlog.errors import ForeignDataDir
from raftlog.testing import LocalCluster


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"


def test_the_fixture_gives_a_log(raftlog_log: raftlog.Log) -> None:
    raftlog_log.create_topic("from-the-fixture")
    with raftlog_log.producer() as producer:
        assert producer.send("from-the-fixture", b"x").result(10).offset == 0


def test_the_fixture_is_shared_by_the_module(raftlog_cluster: LocalCluster, raftlog_log: raftlog.Log) -> None:
    assert raftlog_cluster.log is raftlog_log
    assert "from-the-fixture" in raftlog_log.topics()


def test_it_recovers_what_an_earlier_one_left(tmp_path: Path) -> None:
    with LocalCluster(brokers=3, data_dir=tmp_path) as cluster:
        cluster.log.create_topic("kept", partitions=2)
        with cluster.log.producer() as producer:
            producer.send_batch("kept", [b"%d" % n for n in range(1000)]).result(30)
        cluster_id = cluster.log.describe_cluster().cluster_id
    with LocalCluster(brokers=3, data_dir=tmp_path) as cluster:
        assert cluster.log.describe_cluster().cluster_id == cluster_id
        with cluster.log.consumer("kept") as consumer:
            values = [record.value for record in consumer.records(until="end")]
        assert sorted(int(value) for value in values) == list(range(1000))


def test_a_wiped_directory_is_a_new_broker_in_the_place_of_the_old_one(tmp_path: Path) -> None:
    with LocalCluster(brokers=3, data_dir=tmp_path) as cluster:
        cluster.log.create_topic("kept", partitions=2)
        with cluster.log.producer() as producer:
            producer.send_batch("kept", [b"%d" % n for n in range(100)]).result(30)
    shutil.rmtree(tmp_path / "broker-1")
    for _ in range(2):  # and it stays so
        with LocalCluster(brokers=3, data_dir=tmp_path) as cluster:

            def brokers(cluster: LocalCluster = cluster) -> list[int]:
                return [broker.id for broker in cluster.log.describe_cluster().brokers]

            def holders(cluster: LocalCluster = cluster) -> list[list[int]]:
                topic = cluster.log.describe_topic("kept")
                return [sorted(partition.replicas) for partition in topic.partitions]

            wait_until(lambda: brokers() == [0, 2, 3])
            assert holders() == [[0, 2, 3]] * 2
            with cluster.log.consumer("kept") as consumer:
                assert len(list(consumer.records(until="end"))) == 100
    founded = sorted(path.parent.name for path in tmp_path.glob("*/IDENTITY"))
    assert founded == ["broker-0", "broker-2", "broker-3"]


def test_a_temporary_cluster_leaves_nothing() -> None:
    with LocalCluster() as cluster:
        folder = cluster.data_dir
        assert (folder / "broker-0").is_dir()
    assert not folder.exists()


def test_a_killed_broker_comes_back_with_its_data() -> None:
    with LocalCluster(brokers=3) as cluster:
        log = cluster.log
        log.create_topic("t")
        with log.producer(linger_ms=0) as producer:
            for round_number in range(3):
                leader = log.describe_topic("t").partitions[0].leader
                assert leader is not None
                cluster.kill_broker(leader)
                assert producer.send("t", b"x").result(30).offset == round_number
                cluster.restart_broker(leader)


def test_directories_of_two_clusters_are_not_mixed(tmp_path: Path) -> None:
    with LocalCluster(data_dir=tmp_path / "a"):
        pass
    with LocalCluster(data_dir=tmp_path / "b"):
        pass
    (tmp_path / "mixed").mkdir()
    (tmp_path / "a" / "broker-0").rename(tmp_path / "mixed" / "broker-0")
    (tmp_path / "b" / "broker-0").rename(tmp_path / "mixed" / "broker-1")
    with pytest.raises(ForeignDataDir, match="different clusters"):
        LocalCluster(brokers=2, data_dir=tmp_path / "mixed").start()


def test_a_cluster_has_brokers() -> None:
    with pytest.raises(ValueError, match="at least one"):
        LocalCluster(brokers=0)
