"""Two of three disks are lost for good: Ray alone brings nothing back, and an operator who says
``raftlog recover`` has the cluster go on from the third, as docs/OPERATIONS.md has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ray_nodes import RayNodes, until

NODES = 3
DATA_DIR = ("--data-dir", "$RAFTLOG_DISK/data")


@pytest.mark.timeout(180)
def test_the_last_disk_has_the_cluster_go_on(tmp_path: Path, sessions: str) -> None:
    nodes = RayNodes(tmp_path, f"{sessions}/1", NODES)

    def produce(first: int, end: int) -> None:
        nodes.raftlog("produce", "orders", input="\n".join(map(str, range(first, end))))

    def is_whole() -> bool:
        found = json.loads(nodes.raftlog("status", "--json"))
        partitions = [each for topic in found["topics"] for each in topic["partitions"]]
        return all(
            len(each["replicas"]) == NODES and each["leader"] is not None and not each["lagging"]
            for each in partitions
        )

    try:
        nodes.raftlog("start", *DATA_DIR)
        nodes.raftlog("topics", "create", "orders", "-p", "2", "-r", "3")
        produce(0, 500)
        until("all replicas have everything", is_whole)
        nodes.raftlog("shutdown")
        for lost in (1, 2):
            shutil.rmtree(tmp_path / f"disk-{lost}")
        (survivor,) = tmp_path.glob("disk-0/data/broker-*")

        refused = nodes.run("raftlog", "start", *DATA_DIR)
        assert refused.returncode == 1
        assert "the data of only 1 of the 3 brokers" in refused.stderr
        assert "raftlog recover" in refused.stderr
        assert list(tmp_path.glob("disk-[12]/data/*")) == [], "nothing is founded beside it"

        recovered = nodes.raftlog("recover", "--data-dir", str(survivor.parent), "--yes")
        assert "lost: brokers" in recovered
        started = nodes.raftlog("start", *DATA_DIR)
        assert started.count("alive") >= 1
        produce(500, 600)
        assert nodes.values("orders") == list(range(600)), "what the survivor had, and what is new"
        until("new brokers have what it has", is_whole)
    finally:
        nodes.kill()
