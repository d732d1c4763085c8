"""The table of bad input, data directories: a broker that should not use one refuses to start, says which
file and what to do, and starts when that was done, with the data that was there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from raftlog.config import BrokerConfig
from raftlog.errors import DamagedData, DataDirError, DataDirLocked, ForeignDataDir, RaftlogError
from raftlog.storage import real_disk
from raftlog.testing.local_cluster import LocalCluster

TOPIC = "orders"
FAST = BrokerConfig(election_timeout_ms=100, heartbeat_ms=20)


def local(folder: Path, brokers: int = 1) -> LocalCluster:
    """A cluster that does not take long to elect leaders after a restart."""
    return LocalCluster(brokers, data_dir=folder, config=FAST)


def begin(folder: Path, brokers: int = 1, value: bytes = b"kept") -> None:
    """A cluster that has written one record, stopped."""
    with local(folder, brokers) as cluster:
        cluster.log.create_topic(TOPIC)
        write(cluster, value)


def write(cluster: LocalCluster, value: bytes) -> None:
    with cluster.log.producer(linger_ms=0) as producer:
        producer.send(TOPIC, value).result(timeout=10)


def read(cluster: LocalCluster) -> list[bytes | None]:
    with cluster.log.consumer(TOPIC) as consumer:
        return [record.value for record in consumer.records(until="end")]


def starts(folder: Path, brokers: int = 1) -> None:
    """The directory is usable: what was written is there, and more can be written."""
    with local(folder, brokers) as cluster:
        assert read(cluster) == [b"kept"]
        write(cluster, b"more")
        assert read(cluster) == [b"kept", b"more"]


def refuses(folder: Path, expected: type[RaftlogError], brokers: int = 1) -> str:
    """Starting fails; returns what is said."""
    cluster = local(folder, brokers)
    with pytest.raises(expected) as caught:
        cluster.start()
    assert type(caught.value) is expected
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a cluster of one broker."""
    begin(tmp_path / "data")
    return tmp_path / "data"


# -- of another cluster --------------------------------------------------------------------------------------


def test_data_directory_of_another_cluster(tmp_path: Path) -> None:
    ours, theirs, aside = tmp_path / "ours", tmp_path / "theirs", tmp_path / "aside"
    begin(ours, 2)
    begin(theirs, 2, b"other")
    (ours / "broker-1").rename(aside)
    shutil.copytree(theirs / "broker-1", ours / "broker-1")
    said = refuses(ours, ForeignDataDir, 2)
    assert "brokers 0 and 1 have data of different clusters" in said
    assert "move away" in said
    shutil.rmtree(ours / "broker-1")
    aside.rename(ours / "broker-1")
    starts(ours, 2)


def test_data_directory_of_another_broker(tmp_path: Path) -> None:
    data = tmp_path / "data"
    begin(data, 2)

    def swap() -> None:
        (data / "broker-0").rename(data / "aside")
        (data / "broker-1").rename(data / "broker-0")
        (data / "aside").rename(data / "broker-1")

    swap()
    said = refuses(data, ForeignDataDir, 2)
    assert "the directory of broker 0 holds data of broker 1" in said
    swap()
    starts(data, 2)


def test_data_directory_whose_identity_was_lost(folder: Path) -> None:
    """A new identity on old data is the identity of another disk: the journal knows."""
    identity = folder / "broker-0" / "IDENTITY"
    kept = identity.read_bytes()
    identity.unlink()
    said = refuses(folder, ForeignDataDir)
    assert "disk" in said
    identity.write_bytes(kept)
    starts(folder)


# -- locked --------------------------------------------------------------------------------------------------


def test_data_directory_locked(folder: Path) -> None:
    with local(folder) as cluster:
        said = refuses(folder, DataDirLocked)
        assert str(folder / "broker-0") in said
        assert str(os.getpid()) in said
        assert "stop it or choose another directory" in said
        assert read(cluster) == [b"kept"], "whoever has it is not disturbed"
        cluster.log.create_topic("more")
        assert set(cluster.log.topics()) == {TOPIC, "more"}
    starts(folder)


# -- unwritable ----------------------------------------------------------------------------------------------


def test_data_directory_unwritable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(real_disk.os, "access", lambda path, mode: False)  # also when root runs the tests
        said = refuses(folder, DataDirError)
    assert str(folder / "broker-0") in said
    assert "not writable" in said
    starts(folder)


def test_data_directory_that_is_a_file(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "broker-0").write_bytes(b"a file of mine")
    said = refuses(data, DataDirError)
    assert str(data / "broker-0") in said
    assert (data / "broker-0").read_bytes() == b"a file of mine"
    (data / "broker-0").unlink()
    begin(data)
    starts(data)


# -- damaged -------------------------------------------------------------------------------------------------


def journal(folder: Path) -> Path:
    """The oldest file of the journal."""
    return min(path for path in (folder / "broker-0").rglob("*") if "journal" in str(path) and path.is_file())


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Path], int]] = {
    "identity": (lambda folder: folder / "broker-0" / "IDENTITY", 30),
    "identity's header": (lambda folder: folder / "broker-0" / "IDENTITY", 1),
    "manifest": (lambda folder: folder / "broker-0" / "MANIFEST", 40),
    "journal's header": (journal, 3),
    "journal": (journal, 200),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_data_directory_damaged(folder: Path, case: str) -> None:
    find, position = DAMAGE[case]
    path = find(folder)
    flip(path, position)
    said = refuses(folder, DamagedData)
    assert path.name in said
    before = path.read_bytes()
    refuses(folder, DamagedData)
    assert path.read_bytes() == before, "what is damaged is evidence: nobody touches it"
    flip(path, position)
    starts(folder)


@pytest.mark.parametrize("size", [0, 10])
def test_data_directory_with_a_cut_identity(folder: Path, size: int) -> None:
    path = folder / "broker-0" / "IDENTITY"
    kept = path.read_bytes()
    path.write_bytes(kept[:size])
    assert "IDENTITY" in refuses(folder, DamagedData)
    path.write_bytes(kept)
    starts(folder)
