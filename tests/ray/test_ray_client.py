"""A program that has only Ray Client (``ray.init("ray://…")``), and none of the brokers' ports."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray_nodes import RayNodes

pytest.importorskip("grpc", reason='Ray Client takes pip install "ray[client]"')

PROGRAM = """
import sys
import ray, raftlog
from raftlog.errors import ConnectionLost
from raftlog.net.network import RealNetwork

async def refuse(self, factory, host, port, *, timeout):
    raise ConnectionLost(f"cannot connect to {host}:{port}: a test forbids it")

RealNetwork.connect = refuse
for attempt in range(5):
    try:
        ray.init(sys.argv[1], namespace="raftlog", log_to_driver=False)
        break
    except ConnectionError:  # the first process that Ray's proxy forks for a client may end at once
        assert attempt < 4
for transport in ("actor", "auto"):
    with raftlog.connect(transport=transport) as log:
        assert log.transport == "actor"
        log.create_topic(transport, partitions=2)
        with log.producer() as producer:
            producer.send_batch(transport, [b"%d" % number for number in range(1000)]).result(30)
            assert ray.get(producer.send(transport, b"1000").ref, timeout=30).topic == transport
        with log.producer(transactional_id=transport) as producer, producer.transaction() as transaction:
            transaction.send(transport, b"1001")
        with log.consumer(transport, group="g") as consumer:
            found = []
            while len(found) < 1002:
                found += consumer.poll(timeout=10)
            consumer.commit()
        assert sorted(int(record.value) for record in found) == list(range(1002))
print("all of it")
"""


@pytest.mark.timeout(180)
def test_all_of_it_through_ray_client(tmp_path: Path, sessions: str) -> None:
    nodes = RayNodes(tmp_path, f"{sessions}/1", 1)
    try:
        nodes.raftlog("start", "--brokers", "1", "--data-dir", "$RAFTLOG_DISK/data")
        del nodes.environment["RAY_ADDRESS"]
        done = nodes.run("python", "-c", PROGRAM, nodes.client_address)
        assert (done.returncode, done.stdout) == (0, "all of it\n"), done.stderr
        nodes.environment |= {"RAY_ADDRESS": nodes.client_address, "RAFTLOG_TRANSPORT": "actor"}
        assert "1 of 1 brokers alive" in nodes.raftlog("status")
    finally:
        nodes.kill()
