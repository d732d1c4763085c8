"""The head dies, and all of Ray with it; another Ray starts, and ``raftlog start`` with the same
directories recovers everything. Nodes are started by ``ray start`` on ports of their own, as
docs/OPERATIONS.md has it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import RayNodes, until

from raftlog.actors import launch
from raftlog.errors import NotRunning

NODES = 3


def test_the_head_dies_and_all_is_recovered(tmp_path: Path, sessions: str) -> None:
    clusters: list[RayNodes] = []
    driver: subprocess.Popen[str] | None = None
    try:
        first = RayNodes(tmp_path, f"{sessions}/1", NODES)
        clusters.append(first)
        started = first.raftlog("start", "--data-dir", "$RAFTLOG_DISK/data")
        assert started.count("alive") == NODES
        assert sorted(each.parent.parent.name for each in tmp_path.glob("disk-*/data/broker-*")) == [
            "disk-0",
            "disk-1",
            "disk-2",
        ]
        driver = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("head_loss_driver.py")), first.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=first.environment,
        )

        def hear(word: str) -> str:
            assert driver is not None
            assert driver.stdout is not None
            for line in driver.stdout:
                if line.startswith(word):
                    return line.removeprefix(word).strip()
            raise AssertionError(f"the driver ended before it said {word!r}")

        def say(line: str) -> None:
            assert driver is not None
            assert driver.stdin is not None
            driver.stdin.write(line + "\n")
            driver.stdin.flush()

        hear("ready")
        first.kill()
        say("killed")
        assert hear("refused") in ("DeliveryTimeout", "ConnectionLost")
        second = RayNodes(tmp_path, f"{sessions}/2", NODES)
        clusters.append(second)
        again = second.raftlog("start", "--data-dir", "$RAFTLOG_DISK/data")
        assert again.count("alive") == NODES
        say(f"address {second.address}")
        hear("done")
    finally:
        if driver is not None:
            driver.kill()
            driver.wait()
        for cluster in clusters:
            cluster.kill()


def test_a_node_comes_back_with_its_disk(tmp_path: Path, sessions: str) -> None:
    """Ray knows it as another node. Its broker is found by its data, and catches up."""
    nodes = RayNodes(tmp_path, f"{sessions}/1", NODES)
    try:

        def status() -> Any:
            return json.loads(nodes.raftlog("status", "--json"))

        def produce(first: int) -> None:
            values = "\n".join(map(str, range(first, first + 200)))
            nodes.raftlog("produce", "orders", input=values)

        nodes.raftlog("start", "--data-dir", "$RAFTLOG_DISK/data", "--replace-after", "600")
        nodes.raftlog("topics", "create", "orders", "-p", "2", "-r", "3")
        produce(0)
        before = {each["id"]: each["node_id"] for each in status()["cluster"]["brokers"]}
        (folder,) = (tmp_path / "disk-2" / "data").glob("broker-*")
        broker = int(folder.name.removeprefix("broker-"))
        nodes.kill(2)
        produce(200)
        nodes.start(2)

        def is_back() -> bool:
            found = status()
            brokers = {each["id"]: each for each in found["cluster"]["brokers"]}
            partitions = [each for topic in found["topics"] for each in topic["partitions"]]
            return (
                brokers[broker]["state"] == "alive"
                and brokers[broker]["node_id"] != before[broker]
                and all(not each["lagging"] and each["leader"] is not None for each in partitions)
            )

        until("the broker is back and level", is_back)
        assert set(before) == {each["id"] for each in status()["cluster"]["brokers"]}
        assert nodes.values("orders") == list(range(400))
    finally:
        nodes.kill()


def test_nobody_attaches_by_itself_to_a_ray_that_was_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread looks for the cluster again while the user goes from one Ray to another: Ray's own way is to
    begin anew with the old one at the next call."""

    class Remote:
        def __getattr__(self, method: str) -> Any:
            raise AssertionError("this would attach")

    monkeypatch.setattr("raftlog.actors.launch.ray.is_initialized", lambda: False)
    with pytest.raises(NotRunning, match="has left its Ray"):
        launch._call(Remote(), "bootstrap", timeout=1.0)
