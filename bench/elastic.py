"""Nodes come and go under load: what each change costs, and whether anything is lost.

Ray nodes on this machine (``ray.cluster_utils.Cluster``), each with a directory for its broker, and one topic
with six partitions. A producer sends 200 numbered records a second, to the partitions in turn, each
acknowledged by itself, and a group of two consumers reads along and commits. Meanwhile nodes join, drain, are
killed and come back, the metadata actor is killed, and all brokers are restarted one after another.

Of each step: how long until everything is as it should be (all brokers with as many replicas and leaders,
give or take one, and none that lags), and the longest time from a send to its acknowledgement meanwhile. At
the end everything is read back: what was acknowledged and is missing is lost, what is there twice is doubled.

    python bench/elastic.py [--replace-after S] [--json PATH]
"""

from __future__ import annotations

import logging
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
from _ray import wait_until
from _report import arguments, console, machine, percentile, show, verdict, write
from failover import Stream, read_back
from ray.cluster_utils import Cluster

import raftlog
from raftlog.actors.launch import broker_actor, metadata_actor

if TYPE_CHECKING:
    from raftlog.client.log import Log

NAME: Final = "elastic"
TOPIC: Final = "elastic"
GROUP: Final = "readers"
PARTITIONS: Final = 6
REPLICAS: Final = 3
INTERVAL_S: Final = 0.005
READERS: Final = 2
STEP_S: Final = 150.0
LOOK_S: Final = 0.1
STEADY_S: Final = 3.0
REPLACE_AFTER_S: Final = 30.0
"""raftlog's default."""
PLANNED_AIM_MS: Final = 100.0
NODE_KILL_AIM_MS: Final = 2500.0
BROKER_KILL_AIM_MS: Final = 1000.0


class Nodes:
    """The Ray cluster, at first the head and two more. Each node has a directory that outlives it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._disks: dict[Any, Path] = {}
        head = {"include_dashboard": False, **self._arguments(self._new_disk())}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.others = [self.add() for _ in range(REPLICAS - 1)]

    def _new_disk(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._directory, prefix="disk-"))

    def _arguments(self, disk: Path) -> dict[str, Any]:
        return {"num_cpus": 1, "env_vars": {"RAFTLOG_DISK": str(disk)}}

    def add(self, disk: Path | None = None) -> Any:
        """A node joins, on an empty disk or on that one."""
        disk = disk or self._new_disk()
        node = self.cluster.add_node(**self._arguments(disk))
        self._disks[node] = disk
        return node

    def kill(self, node: Any) -> Path:
        """All of its processes die at once; its disk."""
        self.cluster.remove_node(node, allow_graceful=False)
        return self._disks.pop(node)


class Readers:
    """A group of consumers that read along and commit."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(READERS)]
        self.seen: list[int] = []
        """Numbers, as they were delivered; again where a member took over before a commit."""
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        with self._log.consumer(TOPIC, group=GROUP) as consumer:
            while not self._over.is_set():
                records = consumer.poll(timeout=0.2)
                self.seen += [int.from_bytes(record.value or b"", "big") for record in records]
                if records:
                    consumer.commit()

    def stop(self) -> None:
        """Leave the group."""
        self._over.set()
        for thread in self._threads:
            thread.join()


class Scenario:
    """The steps, and what is measured of each.

    Args:
        nodes: of Ray.
        log: the cluster on them.
        stream: the producer.
    """

    def __init__(self, nodes: Nodes, log: Log, stream: Stream) -> None:
        self.steps: list[dict[str, Any]] = []
        self._nodes = nodes
        self._log = log
        self._stream = stream

    def run(self) -> None:
        """Everything, one after another."""
        nodes, others = self._nodes, self._nodes.others
        begin = time.perf_counter()
        self._until("nothing happens", "", lambda: time.perf_counter() - begin > STEADY_S)
        with self._step("two nodes join", "planned"):
            others += [nodes.add(), nodes.add()]
            self._settled(5)
        with self._step("a node drains", "planned"):
            leaving = others.pop(0)
            drained = self._broker_on(leaving)
            self._log.drain([drained])
            self._wait(lambda: not any(drained in held for held in self._holders()), "it holds nothing")
        with self._step("it goes", "planned"):
            nodes.kill(leaving)
            self._settled(4)
        with self._step("a node is killed, and comes back with its disk", "node kill"):
            killed = others.pop(0)
            broker = self._broker_on(killed)
            disk = nodes.kill(killed)
            self._wait(lambda: broker not in self._alive(), "it is missed")
            others.append(nodes.add(disk))
            self._settled(4)
            assert broker in self._alive(), "the broker is another one"
        with self._step("a node is killed for good", "node kill"):
            nodes.kill(others.pop(0))
            self._settled(3)
        with self._step("a node joins in its place", "planned"):
            others.append(nodes.add())
            self._settled(4)
        with self._step("the metadata actor is killed", "planned"):
            before = self._metadata_pid()
            ray.kill(metadata_actor(NAME), no_restart=False)
            self._wait(lambda: self._metadata_pid() not in (None, before), "it is back")
            self._settled(4)
        with self._step("all brokers are restarted, one after another", "broker kill"):
            for broker in sorted(self._alive()):
                self._restart(broker)
                self._settled(4)

    def _restart(self, broker_id: int) -> None:
        pid = self._pid(broker_id)
        actor = broker_actor(NAME, broker_id)
        ray.get(actor.stop.remote())
        ray.kill(actor)
        self._wait(lambda: self._pid(broker_id) not in (None, pid), f"broker {broker_id} is back")

    # -- steps -----------------------------------------------------------------------------------------------

    @contextmanager
    def _step(self, name: str, kind: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        end = time.perf_counter()
        times = [
            one.at - one.sent_at
            for one in self._stream.acknowledged
            if one.at >= begin and one.sent_at <= end
        ]
        step = {
            "step": name,
            "kind": kind,
            "seconds": end - begin,
            "p50_ms": percentile(times, 50) * 1e3,
            "worst_ms": max(times) * 1e3,
        }
        self.steps.append(step)
        console.print(f"{name}: {step['seconds']:.1f} s, worst acknowledgement {step['worst_ms']:.0f} ms")

    def _until(self, name: str, kind: str, condition: Callable[[], bool]) -> None:
        with self._step(name, kind):
            self._wait(condition, name)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, what, timeout=STEP_S, step=LOOK_S)

    def _settled(self, brokers: int) -> None:
        self._wait(lambda: len(self._alive()) == brokers and self._is_balanced(), f"{brokers} brokers share")

    # -- looking ---------------------------------------------------------------------------------------------

    def _alive(self) -> set[int]:
        return {each.id for each in self._log.describe_cluster().brokers if each.state == "alive"}

    def _holders(self) -> list[set[int]]:
        return [set(each.replicas) for each in self._log.describe_topic(TOPIC).partitions]

    def _is_balanced(self) -> bool:
        """Over all topics, those of the brokers' own included. Who leads two more than another may have none
        that it could hand to it."""
        brokers = [each for each in self._log.describe_cluster().brokers if each.state == "alive"]
        held, led = [each.replicas for each in brokers], [each.leaders for each in brokers]
        is_even = max(held) - min(held) <= 1 and max(led) - min(led) <= 2
        partitions = self._log.describe_topic(TOPIC).partitions
        return is_even and all(len(each.replicas) == REPLICAS and not each.lagging for each in partitions)

    def _broker_on(self, node: Any) -> int:
        brokers = self._log.describe_cluster().brokers
        return next(each.id for each in brokers if each.node_id == node.node_id)

    def _pid(self, broker_id: int) -> int | None:
        brokers = self._log.describe_cluster().brokers
        return next((each.pid for each in brokers if each.id == broker_id and each.state == "alive"), None)

    def _metadata_pid(self) -> int | None:
        try:
            return int(ray.get(metadata_actor(NAME).pid.remote(), timeout=1.0))
        except (ray.exceptions.RayError, ValueError):
            return None


def measure(directory: Path, replace_after: float) -> dict[str, Any]:
    """Run the scenario; what became of it."""
    nodes = Nodes(directory)
    ray.init(
        address=nodes.cluster.address, namespace="raftlog", log_to_driver=False, logging_level=logging.ERROR
    )
    try:
        with raftlog.start(NAME, data_dir="$RAFTLOG_DISK/data", replace_after=replace_after) as log:
            log.create_topic(TOPIC, partitions=PARTITIONS)
            stream = Stream(log, TOPIC, interval=INTERVAL_S, partitions=PARTITIONS)
            scenario = Scenario(nodes, log, stream)
            scenario._settled(REPLICAS)
            readers = Readers(log)
            stream.start()
            stream.next_after(time.perf_counter())
            try:
                scenario.run()
            finally:
                stream.finish()
            accounts = read_back(log, TOPIC, stream)
            wait_until(
                lambda: len(set(readers.seen)) == stream.sent, "the group has read all", timeout=STEP_S
            )
            readers.stop()
            accounts["read_by_group"] = len(set(readers.seen))
            accounts["read_again_by_group"] = len(readers.seen) - accounts["read_by_group"]
            raftlog.shutdown(NAME, force=True)
    finally:
        ray.shutdown()
        nodes.cluster.shutdown()
    return {"steps": scenario.steps, "records": accounts}


def main() -> int:
    """Measure, print, write; 1 if a send failed, or a record was lost, doubled or moved."""
    parser = arguments("What it costs when nodes come and go.", NAME)
    parser.add_argument(
        "--replace-after",
        type=float,
        default=REPLACE_AFTER_S,
        metavar="S",
        help="seconds for which a broker may be away before its replicas are made anew (default: raftlog's)",
    )
    options = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": NAME,
        "machine": machine(),
        "replication": REPLICAS,
        "partitions": PARTITIONS,
        "records_per_s": 1 / INTERVAL_S,
        "replace_after_s": options.replace_after,
    }
    with tempfile.TemporaryDirectory(prefix="raftlog-bench-") as directory:
        result |= measure(Path(directory), options.replace_after)
    report(result)
    write(options.json, result)
    records = result["records"]
    return 1 if any(records[key] for key in ("failed", "lost", "doubled", "moved")) else 0


def report(result: dict[str, Any]) -> None:
    """Print the table, the accounts and what became of the aims."""
    rows = [
        [one["step"], f"{one['seconds']:.1f}", f"{one['p50_ms']:.1f}", f"{one['worst_ms']:.0f}"]
        for one in result["steps"]
    ]
    show(f"{result['records_per_s']:.0f} records/s", ["", "settled after s", "p50 ms", "worst ms"], rows)
    console.print(", ".join(f"{count} {name}" for name, count in result["records"].items()))
    aims = {"planned": PLANNED_AIM_MS, "node kill": NODE_KILL_AIM_MS, "broker kill": BROKER_KILL_AIM_MS}
    for kind, aim in aims.items():
        worst = max(one["worst_ms"] for one in result["steps"] if one["kind"] == kind)
        console.print(f"aim {kind}: at most {aim:.0f} ms: {worst:.0f}, {verdict(worst <= aim)}")


if __name__ == "__main__":
    sys.exit(main())
