"""A cluster of several nodes that come and go under a producer; run by ``test_elastic.py`` in a process of
its own, for its Ray is another than that of the other tests.

    python elastic_scenario.py DIRECTORY

Prints a line for each step. Ends with an error if a send fails, or a record is lost or doubled.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

import raftlog
from raftlog.actors.launch import metadata_actor

PARTITIONS = 6
RATE = 100
STEP_SECONDS = 90.0


class Nodes:
    """The Ray cluster; each node has a disk of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0
        self._cluster = Cluster(initialize_head=True, head_node_args=self._arguments())
        self.address = self._cluster.address

    def _arguments(self) -> dict[str, Any]:
        self._count += 1
        disk = self._directory / f"disk-{self._count}"
        return {"num_cpus": 1, "include_dashboard": False, "env_vars": {"RAFTLOG_DISK": str(disk)}}

    def add(self) -> Any:
        arguments = self._arguments()
        del arguments["include_dashboard"]
        return self._cluster.add_node(**arguments)

    def kill(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()


class Writer:
    """Sends numbers at a fixed rate, on a thread."""

    def __init__(self, log: raftlog.Log) -> None:
        self._log = log
        self.over = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self.sent = 0
        self.gap = 0.0
        """The longest time from a send to its acknowledgement, since it was last asked for."""
        self._thread.start()

    def _write(self) -> None:
        with self._log.producer(linger_ms=0) as producer:
            while not self.over.wait(1 / RATE):
                begin = time.monotonic()
                delivery = producer.send("t", b"%d" % self.sent)
                delivery.add_done_callback(lambda _, begin=begin: self._acknowledged(begin))
                self.sent += 1

    def _acknowledged(self, begin: float) -> None:
        self.gap = max(self.gap, time.monotonic() - begin)

    def stop(self) -> int:
        self.over.set()
        self._thread.join()
        return self.sent


def wait_until(what: str, condition: Callable[[], bool], writer: Writer) -> None:
    begin = time.monotonic()
    writer.gap = 0.0
    while not condition():
        assert time.monotonic() - begin < STEP_SECONDS, f"not within {STEP_SECONDS:.0f} s: {what}"
        writer.over.wait(0.2)
    print(
        f"{what}: {time.monotonic() - begin:.1f} s, worst acknowledgement {writer.gap * 1000:.0f} ms",
        flush=True,
    )


def holders(log: raftlog.Log) -> list[set[int]]:
    return [set(each.replicas) for each in log.describe_topic("t").partitions]


def alive(log: raftlog.Log) -> set[int]:
    return {each.id for each in log.describe_cluster().brokers if each.state != "lost"}


def on_node(log: raftlog.Log, node: Any) -> int:
    return next(each.id for each in log.describe_cluster().brokers if each.node_id == node.node_id)


def is_balanced(log: raftlog.Log) -> bool:
    """Whether each broker has its share of replicas and leaders, and all are level."""
    partitions = log.describe_topic("t").partitions
    brokers = alive(log)
    held = [sum(broker in each.replicas for each in partitions) for broker in brokers]
    led = [sum(broker == each.leader for each in partitions) for broker in brokers]
    is_even = max(held) - min(held) <= 1 and max(led) - min(led) <= 1
    return is_even and all(len(each.replicas) == 3 and not each.lagging for each in partitions)


def main(directory: Path) -> None:
    nodes = Nodes(directory)
    others = [nodes.add() for _ in range(2)]
    ray.init(address=nodes.address, namespace="raftlog", log_to_driver=False)
    log = raftlog.start("elastic", data_dir="$RAFTLOG_DISK/data", replace_after=3.0)
    log.create_topic("t", partitions=PARTITIONS)
    assert alive(log) == {0, 1, 2}
    writer = Writer(log)
    wait_until("it runs", lambda: writer.sent > RATE, writer)

    others.append(nodes.add())
    wait_until("a node joins", lambda: len(alive(log)) == 4 and is_balanced(log), writer)

    leaving = others.pop(0)
    broker = on_node(log, leaving)
    log.drain([broker])
    wait_until("one drains", lambda: all(broker not in each for each in holders(log)), writer)
    nodes.kill(leaving)
    wait_until("it goes", lambda: broker not in {each.id for each in log.describe_cluster().brokers}, writer)

    others.append(nodes.add())
    wait_until("another joins", lambda: len(alive(log)) == 4 and is_balanced(log), writer)

    killed = others.pop(0)
    broker = on_node(log, killed)
    ray.kill(metadata_actor("elastic"), no_restart=False)
    nodes.kill(killed)
    wait_until("one is killed", lambda: broker not in set().union(*holders(log)) and is_balanced(log), writer)
    sent = writer.stop()
    with log.consumer("t") as consumer:
        values = [int(record.value or b"") for record in consumer.records(until="end")]
    assert sorted(values) == list(range(sent)), "lost or doubled"
    print(f"{sent} records, none lost, none doubled", flush=True)
    log.close()
    raftlog.shutdown("elastic", force=True)
    ray.shutdown()
    nodes.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
