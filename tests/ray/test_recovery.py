"""A whole cluster stopped, or killed, and started again from its data, on other ports."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import ray
from ray_nodes import until

import raftlog
from raftlog.errors import ClusterInUse, ForeignDataDir, NotRunning


def test_a_cluster_is_recovered_on_other_ports(ray_session: None, tmp_path: Path) -> None:
    log = raftlog.start("recover", brokers=3, data_dir=str(tmp_path))
    before = log.describe_cluster()
    log.create_topic("kept", partitions=4)
    with log.producer() as producer:
        producer.send_batch("kept", [b"%d" % n for n in range(2000)]).result(60)
    log.close()
    raftlog.shutdown("recover")
    with pytest.raises(NotRunning):
        raftlog.connect("recover", timeout=1.0)

    occupied = []
    for broker in before.brokers:
        host, _, port = broker.address.rpartition(":")
        occupied.append(socket.create_server((host, int(port))))
    try:
        log = raftlog.start("recover", data_dir=str(tmp_path))
        after = log.describe_cluster()
        assert after.cluster_id == before.cluster_id
        assert {one.address for one in after.brokers}.isdisjoint({one.address for one in before.brokers})
        with log.consumer("kept") as consumer:
            values = [record.value for record in consumer.records(until="end")]
        assert sorted(values, key=int) == [b"%d" % n for n in range(2000)]
        with log.producer() as producer:
            producer.send("kept", b"more").result(30)
    finally:
        for one in occupied:
            one.close()
    log.close()
    raftlog.shutdown("recover")


def test_a_cluster_survives_the_sigkill_of_all_its_brokers(ray_session: None, tmp_path: Path) -> None:
    log = raftlog.start("all-killed", brokers=3, data_dir=str(tmp_path))
    log.create_topic("kept", partitions=2)
    with log.producer(linger_ms=0) as producer:
        for n in range(200):
            producer.send("kept", b"%d" % n).result(30)
        for broker in log.describe_cluster().brokers:
            os.kill(broker.pid, signal.SIGKILL)
        producer.send("kept", b"200").result(60)
    with log.consumer("kept") as consumer:
        values = [record.value for record in consumer.records(until="end")]
    assert sorted(values, key=int) == [b"%d" % n for n in range(201)]
    log.close()
    raftlog.shutdown("all-killed")


def metadata_voters(log: raftlog.Log) -> list[int]:
    """Brokers that vote in the metadata group, as its leader says."""
    brokers: Any = log.describe_cluster().brokers
    statuses = log._call(log._admin()._statuses(brokers, ["__metadata"]))
    return next((row.voters for status in statuses for row in status.replicas if row.role == "leader"), [])


def test_a_wiped_disk_comes_back_as_a_new_broker(ray_session: None, tmp_path: Path) -> None:
    """Once while the cluster is stopped, once under it; the new ones hold what the old ones held."""
    log = raftlog.start("wiped", brokers=3, data_dir=str(tmp_path))
    log.create_topic("kept", partitions=2)
    with log.producer() as producer:
        producer.send_batch("kept", [b"%d" % n for n in range(500)]).result(60)
    log.close()
    raftlog.shutdown("wiped")

    def place_of(gone: int, expected: list[int]) -> None:
        def is_so() -> bool:
            brokers = [broker.id for broker in log.describe_cluster().brokers]
            topic = log.describe_topic("kept")
            holders = [sorted(partition.replicas) for partition in topic.partitions]
            # the next one can only be spared once the new one votes on the metadata too
            return brokers == expected and holders == [expected] * 2 and metadata_voters(log) == expected

        until(f"another has the place of broker {gone}", is_so)
        assert not (tmp_path / f"broker-{gone}" / "IDENTITY").exists()
        with log.consumer("kept") as consumer:
            values = [record.value for record in consumer.records(until="end")]
        assert sorted(values, key=int) == [b"%d" % n for n in range(500)]

    shutil.rmtree(tmp_path / "broker-1")
    log = raftlog.start("wiped", data_dir=str(tmp_path))
    place_of(1, [0, 2, 3])
    victim = next(broker for broker in log.describe_cluster().brokers if broker.id == 2)
    shutil.rmtree(tmp_path / "broker-2")
    os.kill(victim.pid, signal.SIGKILL)
    place_of(2, [0, 3, 4])
    log.close()
    raftlog.shutdown("wiped")


def test_data_of_another_cluster_is_refused(ray_session: None, tmp_path: Path) -> None:
    raftlog.start("first", brokers=1, data_dir=str(tmp_path)).close()
    raftlog.shutdown("first")
    with pytest.raises(ForeignDataDir, match="first"):
        raftlog.start("second", brokers=1, data_dir=str(tmp_path))
    with raftlog.start("first", data_dir=str(tmp_path)) as log:
        log.create_topic("fine")
    raftlog.shutdown("first")


def test_a_cluster_in_use_is_not_stopped(ray_session: None) -> None:
    with raftlog.start("in-use", brokers=1, ephemeral=True) as log:
        log.create_topic("t")

    @ray.remote(num_cpus=0)
    class User:
        def __init__(self) -> None:
            self._log = raftlog.connect("in-use")

        def topics(self) -> list[str]:
            return self._log.topics()

    user = User.remote()
    assert ray.get(user.topics.remote(), timeout=60) == ["t"]
    with pytest.raises(ClusterInUse) as caught:
        raftlog.shutdown("in-use")
    assert len(caught.value.clients) == 1
    assert ray.get(user.topics.remote(), timeout=60) == ["t"], "it still runs"
    raftlog.shutdown("in-use", force=True)
    with pytest.raises(NotRunning):
        raftlog.connect("in-use", timeout=1.0)
