"""``raftlog verify`` on real directories: in order, damaged, in use, not there."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raftlog.cli.main import app
from raftlog.storage.real_disk import RealDisk
from raftlog.storage.verify import ReplicaRow
from raftlog.storage.verify import verify as verify_disk
from raftlog.testing.local_cluster import LocalCluster

RECORDS = 100


def verify(*arguments: Path | str) -> Any:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of three brokers that were stopped in order."""
    folder = tmp_path_factory.mktemp("original")
    with LocalCluster(brokers=3, data_dir=folder) as cluster:
        cluster.log.create_topic("orders")
        with cluster.log.producer() as producer:
            for number in range(RECORDS):
                producer.send("orders", b"value %d" % number)
    return folder


@pytest.fixture
def data_dir(original: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(original, tmp_path / "data")


def test_what_was_written_checks_and_nothing_is_changed(data_dir: Path) -> None:
    before = contents(data_dir)
    result = verify(data_dir)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("every byte checks") == 3
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("orders ")]
    assert len(rows) == 3
    assert all(row[1] == "0" and row[4] == f"0..{RECORDS}" for row in rows)
    assert contents(data_dir) == before
    one = verify("--json", data_dir / "broker-1")
    (report,) = json.loads(one.stdout).values()
    assert (report["broker_id"], report["problems"]) == (1, [])


def test_replicas_of_different_length_are_compared_through_an_index(tmp_path: Path) -> None:
    def row(through: int | None) -> ReplicaRow:
        bound = {} if through is None else {("orders", 0): through}
        report = asyncio.run(verify_disk(RealDisk(tmp_path / "broker-0"), bound))
        return next(row for row in report.replicas if row.topic == "orders")

    def write(cluster: LocalCluster) -> None:
        with cluster.log.producer(linger_ms=0) as producer:
            for number in range(20):
                producer.send("orders", b"%d" % number).result(timeout=10)

    with LocalCluster(data_dir=tmp_path) as cluster:
        cluster.log.create_topic("orders")
        write(cluster)
    short = row(None)
    with LocalCluster(data_dir=tmp_path) as cluster:
        write(cluster)
    long = row(None)
    assert long.last_index > short.last_index
    assert long.sha256 != short.sha256
    assert row(short.last_index).sha256 == short.sha256
    assert row(short.last_index - 1).sha256 != short.sha256
    assert row(long.last_index).sha256 == long.sha256
    assert row(0).sha256 == hashlib.sha256().hexdigest()


def contents(data_dir: Path) -> dict[str, bytes]:
    files = (path for path in data_dir.rglob("*") if path.is_file() and path.name != "LOCK")
    return {str(path): path.read_bytes() for path in files}


def segment(folder: Path) -> Path:
    return max(folder.rglob("*.seg"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    "find", [segment, lambda folder: folder / "IDENTITY", lambda folder: folder / "MANIFEST"]
)
def test_one_flipped_bit_is_named_and_exits_1(data_dir: Path, find: Callable[[Path], Path]) -> None:
    path = find(data_dir / "broker-2")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if path.suffix != ".seg" else 150] ^= 1
    path.write_bytes(data)
    result = verify(data_dir)
    assert result.exit_code == 1, result.output
    assert result.stdout.count("every byte checks") == 2
    (wrong,) = (line for line in result.stdout.splitlines() if line.startswith("wrong: "))
    assert path.name in wrong
    assert "Traceback" not in result.output
    repaired = bytearray(data)
    repaired[len(data) // 2 if path.suffix != ".seg" else 150] ^= 1
    path.write_bytes(repaired)
    assert verify(data_dir).exit_code == 0


def test_a_broker_that_runs_is_left_alone(data_dir: Path) -> None:
    with LocalCluster(brokers=3, data_dir=data_dir):
        result = verify(data_dir)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert verify(data_dir).exit_code == 0


def test_no_data_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        result = verify(path)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: no broker's data in {path}")
        assert result.stderr.count("\n") == 1
