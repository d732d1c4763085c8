"""Killing a broker that shares its process with others: as quiet and as abrupt as a killed process."""

from __future__ import annotations

import logging

import pytest

from raftlog.testing.local_cluster import LocalCluster


def test_a_killed_broker_says_nothing_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with LocalCluster(brokers=3) as cluster:
        cluster.log.create_topic("t", partitions=3)
        with cluster.log.producer() as producer:
            for _ in range(50):
                producer.send("t", b"x" * 1000)
            cluster.kill_broker(1)
            for _ in range(50):
                producer.send("t", b"x" * 1000)
            producer.flush()
            cluster.restart_broker(1)
            producer.send("t", b"last").result(timeout=20)
        offsets = [partition.end_offset for partition in cluster.log.describe_topic("t").partitions]
        assert sum(offsets) == 101
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not errors, [record.getMessage() for record in errors]
