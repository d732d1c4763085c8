"""What the tests of a lost majority share: a cluster's data, what is lost of them, the command line."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from raftlog.cli.main import app
from raftlog.testing.local_cluster import LocalCluster


def recover(*arguments: str, data_dirs: Iterable[Path]) -> Any:
    """Run ``raftlog recover`` with these directories."""
    named = [part for each in data_dirs for part in ("--data-dir", str(each))]
    return CliRunner().invoke(app, ["recover", *named, *arguments])


def lose(data_dir: Path, *brokers: int) -> None:
    """Remove the directories of brokers."""
    for broker in brokers:
        shutil.rmtree(data_dir / f"broker-{broker}")


def digest(folder: Path) -> dict[str, str]:
    """Every file below a folder, but the lock's."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "LOCK"
    }


def fill(cluster: LocalCluster, topic: str, values: Iterable[bytes], **settings: Any) -> None:
    """Make a topic and have these acknowledged."""
    cluster.log.create_topic(topic, **settings)
    with cluster.log.producer() as producer:
        producer.send_batch(topic, list(values)).result(30)


def read(cluster: LocalCluster, topic: str) -> list[bytes | None]:
    """All values of a topic."""
    with cluster.log.consumer(topic) as consumer:
        return [record.value for record in consumer.records(until="end")]


def wait_for_replicas(cluster: LocalCluster, topic: str, brokers: list[int], seconds: float = 60.0) -> None:
    """Until each partition is led, and held by these brokers, all level."""
    deadline = time.monotonic() + seconds

    def is_so(partition: Any) -> bool:
        return (
            partition.leader is not None and not partition.lagging and sorted(partition.replicas) == brokers
        )

    while not all(map(is_so, cluster.log.describe_topic(topic).partitions)):
        assert time.monotonic() < deadline, cluster.log.describe_topic(topic)
