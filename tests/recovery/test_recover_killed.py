"""``raftlog recover`` is killed at each of its writes, and run again."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recovery_kit import digest, fill, lose, read, recover

from raftlog.broker.founding import decide
from raftlog.broker.majority_loss import Loss
from raftlog.broker.new_history import examine
from raftlog.errors import DataDirError
from raftlog.record.types import TopicPartition
from raftlog.storage.identity import IDENTITY_PATH, parse_identity
from raftlog.storage.real_disk import RealDisk
from raftlog.storage.verify import verify
from raftlog.testing.local_cluster import LocalCluster

KILLED = 9
COUNT = 200
STRIDE = 4
"""The writes are spread over so many tests."""


ATTEMPTS = 3
"""A process that was forked while another thread held a lock may wait for that for ever."""


@pytest.fixture(scope="module")
def two_of_five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Brokers 0 and 1 of five are left. Of five partitions of three replicas each, one has lost all of them,
    two a majority, two just one."""
    data = tmp_path_factory.mktemp("five") / "data"
    with LocalCluster(5, data_dir=data) as cluster:
        fill(cluster, "orders", [b"%d" % number for number in range(COUNT)], partitions=5)
    lose(data, 2, 3, 4)
    return data


def examined(data: Path) -> Loss:
    folders = sorted(data.glob("broker-*"))

    async def look() -> Loss:
        disks = {str(each): RealDisk(each) for each in folders}
        try:
            return (await examine(disks))[2]
        finally:
            for disk in disks.values():
                await disk.close()

    return asyncio.run(look())


def run_to_step(step: int, data: Path) -> None:
    """In a process of its own: recover, and end as if by SIGKILL before that write."""
    left = step

    def counted(name: str) -> None:
        original: Callable[..., Any] = getattr(RealDisk, name)

        def instead(self: RealDisk, *arguments: Any, **named: Any) -> Any:
            nonlocal left
            if left == 0:
                os._exit(KILLED)
            left -= 1
            return original(self, *arguments, **named)

        setattr(RealDisk, name, instead)

    for name in ("replace_file", "begin_commit", "truncate", "remove"):
        counted(name)
    os._exit(recover("--yes", data_dirs=[data]).exit_code)


def killed_runs(source: Path, scratch: Path, first: int) -> Iterator[tuple[int, Path]]:
    """A copy of the directories for each of these steps, after a run that was killed there."""
    for step in range(first, 1000, STRIDE):
        data = scratch / f"step-{step}"
        for _ in range(ATTEMPTS):
            subprocess.run(
                ["cp", "-a", "--sparse=always", source, data], check=True
            )  # journals are mostly holes
            process = multiprocessing.get_context("fork").Process(target=run_to_step, args=(step, data))
            process.start()
            process.join(30)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            shutil.rmtree(data)
        if process.exitcode == 0:
            return
        assert process.exitcode == KILLED
        yield step, data
        shutil.rmtree(data)


@pytest.mark.parametrize("first", range(STRIDE))
def test_killed_anywhere_and_repeated_it_ends_the_same(two_of_five: Path, tmp_path: Path, first: int) -> None:
    loss = examined(two_of_five)
    fates = [group.fate for group in loss.groups if group.topic == "orders"]
    assert sorted(fate.name for fate in fates) == ["CUT", "CUT", "KEPT", "KEPT", "LOST"]
    held = {group.partition: group.copies[0].end_offset for group in loss.groups if group.copies}
    steps, half_way = 0, 0
    for step, data in killed_runs(two_of_five, tmp_path, first):
        steps = step
        identities = {
            int(path.parent.name.removeprefix("broker-")): parse_identity(path.read_bytes())
            for path in data.glob(f"*/{IDENTITY_PATH}")
        }
        is_half_way = any(each.recovering for each in identities.values())
        if is_half_way:
            half_way += 1
            with pytest.raises(DataDirError, match="not finished"):
                decide("local", identities)
            if half_way == 1:
                with_one = recover("--yes", data_dirs=[move(data, 1, tmp_path)])
                assert "can only be finished with the same" in with_one.output
                move_back(data, 1, tmp_path)
        again = recover("--yes", data_dirs=[data])
        assert again.exit_code == 0 or "every group has its majority" in again.output, (step, again.output)
        after = examined(data)
        assert (after.is_due, after.groups, after.lost, after.unaffected) == (False, (), (), 5), step
        check_logs(data, held)
        if is_half_way and half_way == 3:
            check_served(data)
    assert 3 < half_way < steps, "most of the writes are in the middle of it"


def move(data: Path, broker: int, aside: Path) -> Path:
    (data / f"broker-{broker}").rename(aside / f"aside-{broker}")
    return data


def move_back(data: Path, broker: int, aside: Path) -> None:
    (aside / f"aside-{broker}").rename(data / f"broker-{broker}")


def check_logs(data: Path, held: dict[int, int]) -> None:
    """Every byte checks, and no survivor has less than it had."""
    ends: dict[int, int] = {}
    for folder in data.glob("broker-*"):
        report = asyncio.run(verify(RealDisk(folder)))
        assert not report.problems
        for row in report.replicas:
            if row.topic == "orders":
                ends[row.partition] = max(row.end_offset, ends.get(row.partition, 0))
    assert {partition: ends[partition] for partition in held} == held


def check_served(data: Path) -> None:
    """It starts, serves what is left, and takes more in every partition."""
    with LocalCluster(2, data_dir=data) as cluster:
        before = len(read(cluster, "orders"))
        with cluster.log.producer() as producer:
            for partition in range(5):
                producer.send("orders", b"more", partition=partition).result(30)
        assert len(read(cluster, "orders")) == before + 5
        with cluster.log.consumer(assign=[TopicPartition("orders", 2)]) as consumer:
            assert [record.offset for record in consumer.records(until="end")] == [0], "it began anew"


def test_a_partition_of_which_nothing_is_left_is_named(two_of_five: Path) -> None:
    before = digest(two_of_five)
    said = recover("--dry-run", data_dirs=[two_of_five]).output
    assert "everything is lost" in next(line for line in said.splitlines() if line.startswith("orders/2"))
    assert "nothing is lost" in next(line for line in said.splitlines() if line.startswith("orders/0"))
    assert digest(two_of_five) == before
