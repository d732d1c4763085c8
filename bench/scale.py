"""What many partitions cost, and how long a broker with much on its disk takes to start. raftlog's own:
nobody to compare with.

Each has a cluster to itself, on the Ray of the run.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from _ray import BROKERS, is_level, wait_until
from _report import percentile
from contenders.base import cpu_seconds, resident_bytes, stepwise

import raftlog

if TYPE_CHECKING:
    from raftlog.client.log import Log

NAME: Final = "scale"
PARTITIONS: Final = 1_000
AT_ONCE: Final = 64
READY_TIMEOUT_S: Final = 180.0
IDLE_S: Final = {"tiny": 2.0, "quick": 15.0, "full": 60.0}
CALLS: Final = {"tiny": 100, "quick": 1_000, "full": 5_000}
START_BYTES: Final = {"tiny": 20_000_000, "quick": 250_000_000, "full": 5_000_000_000}
"""Of values, on each broker."""
SETTLE_S: Final = 3.0
"""After which groups that have nothing to do rest."""
ONE: Final[dict[str, Any]] = {"linger_ms": 0, "compression": "none"}


@dataclass(frozen=True)
class SoloWork:
    """One thing that raftlog does alone.

    Args:
        name: in JSON and on the command line.
        do: (folder for data, name of the size) -> metrics.
    """

    name: str
    do: Callable[[Path, str], dict[str, float]]


@contextmanager
def cluster(folder: Path) -> Iterator[Log]:
    """Three brokers that end with the block; the data stay."""
    log = raftlog.start(NAME, brokers=BROKERS, data_dir=str(folder))
    try:
        yield log
    finally:
        log.close()
        raftlog.shutdown(NAME, force=True)


def topic_of(log: Log, name: str, partitions: int) -> str:
    """Make it, and wait until all of it is ready."""
    log.create_topic(name, partitions=partitions, replication_factor=BROKERS, timeout=READY_TIMEOUT_S)
    wait_until(lambda: is_level(log, name), f"topic {name} is ready", timeout=READY_TIMEOUT_S, step=0.1)
    return name


def many_partitions(folder: Path, size: str) -> dict[str, float]:
    """Acknowledgements of one partition, of 64 at once, and with 1,000 open; and what 1,000 cost at rest."""
    calls, value = CALLS[size], os.urandom(100)
    with cluster(folder) as log, log.producer(**ONE) as producer:
        pids = [broker.pid for broker in log.describe_cluster().brokers]
        one, several = topic_of(log, "one", 1), topic_of(log, "several", AT_ONCE)

        def p50(place: Callable[[int], tuple[str, int]], count: int = calls) -> float:
            places = (place(number) for number in range(10 * count))
            times = stepwise(lambda: send_to(producer, *next(places), value).result(30), count)
            return percentile(times, 50) * 1e3

        found = {"ack_p50_ms": p50(lambda _: (one, 0))}
        found["ack_64_at_once_p50_ms"] = at_once(producer, several, AT_ONCE, value, calls // 10)
        found["ack_64_in_one_p50_ms"] = at_once(producer, one, 1, value, calls // 10)
        time.sleep(SETTLE_S)
        before = [resident_bytes(pid) for pid in pids]
        begin = time.perf_counter()
        many = topic_of(log, "many", PARTITIONS)
        found["create_s"] = time.perf_counter() - begin
        found |= at_rest(pids, before, IDLE_S[size])
        for index in range(PARTITIONS):
            producer.send(many, value, partition=index)
        producer.flush()
        found["ack_p50_again_ms"] = p50(lambda _: (one, 0))
        found["ack_open_same_p50_ms"] = p50(lambda _: (many, 7))
        found["ack_open_next_p50_ms"] = p50(lambda number: (many, number % PARTITIONS))
        for _ in range(int(SETTLE_S)):
            time.sleep(1)
        written = at_rest(pids, before, IDLE_S[size])
        found |= {f"written_{key}": number for key, number in written.items()}
    return found


def send_to(producer: Any, topic: str, partition: int, value: bytes) -> Any:
    """One record to one partition."""
    return producer.send(topic, value, partition=partition)


def at_once(producer: Any, topic: str, partitions: int, value: bytes, rounds: int) -> float:
    """p50 in milliseconds, of 64 records sent together, to as many partitions as there are, from the call
    of each to its acknowledgement; then the next 64."""
    times: list[float] = []
    for number in range(rounds + 1):
        moments = []
        for index in range(AT_ONCE):
            begin = time.perf_counter()
            delivery = producer.send(topic, value, partition=index % partitions)
            delivery.add_done_callback(lambda _, begin=begin: times.append(time.perf_counter() - begin))
            moments.append(delivery)
        for delivery in moments:
            delivery.result(30)
        if number == 0:  # connected, and each partition has met the producer
            times.clear()
    return percentile(times, 50) * 1e3


def at_rest(pids: list[int], before: list[int], seconds: float) -> dict[str, float]:
    """Share of a core and memory per replica of the broker that takes most."""
    time.sleep(SETTLE_S)
    cpu = [cpu_seconds([pid]) for pid in pids]
    time.sleep(seconds)
    shares = [(cpu_seconds([pid]) - used) / seconds for pid, used in zip(pids, cpu, strict=True)]
    grown = [resident_bytes(pid) - was for pid, was in zip(pids, before, strict=True)]
    return {"idle_cores": max(shares), "kb_per_replica": max(grown) / PARTITIONS / 1000}


# -- a broker's start ----------------------------------------------------------------------------------------


def broker_start(folder: Path, size: str) -> dict[str, float]:
    """1,000 replicas with so many bytes are written; all brokers stop; one of them starts, while the other
    two are there already. Until each of its replicas can vote, and until all of them have a leader
    again."""
    written = fill(folder, START_BYTES[size])
    others = [Child(folder, number) for number in range(1, BROKERS)]
    child: Child | None = None
    try:
        for each in others:
            each.wait_for("votes", PARTITIONS)
        os.sync()
        child = Child(folder, 0)
        found = {"gigabytes": written / 1e9, "replicas": float(PARTITIONS)}
        for stage in ("imported", "recovered", "votes"):
            found[f"{stage}_s"] = child.wait_for(stage, PARTITIONS)
    finally:
        for each in [*others, *([child] if child else [])]:
            each.stop()
    return found


def fill(folder: Path, total: int) -> int:
    """Write values of 1 MB or less evenly to 1,000 partitions; how many bytes."""
    value = os.urandom(min(1_000_000, total // PARTITIONS))
    sent = 0
    with cluster(folder) as log, log.producer(compression="none") as producer:
        topic = topic_of(log, "many", PARTITIONS)
        while sent < total:
            for index in range(PARTITIONS):
                producer.send(topic, value, partition=index)
            sent += PARTITIONS * len(value)
        producer.flush()
        wait_until(lambda: is_level(log, topic), "all replicas have everything", READY_TIMEOUT_S, 0.1)
    return sent


class Child:
    """A broker in a process of its own, that says how far it has come."""

    def __init__(self, folder: Path, number: int) -> None:
        (path,) = folder.glob(f"**/broker-{number}")
        command = [sys.executable, __file__, "--broker", str(path)]
        self._begin = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait_for(self, stage: str, replicas: int) -> float:
        """Seconds from the start of the process until it has said so."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if stage == "votes":
            print(replicas, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.strip() == stage:
                return time.perf_counter() - self._begin
        raise RuntimeError(f"the broker ended before it had come to: {stage}")

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(30)


async def run_broker(path: Path) -> None:
    """Start a broker on its data and report: recovered; and when as many replicas as standard input says
    are there to be asked for votes."""
    from raftlog.broker.broker import Broker
    from raftlog.net.network import real_seams
    from raftlog.storage.real_disk import RealDisk

    loop = asyncio.get_running_loop()
    broker = await Broker.start(real_seams(), RealDisk(path))
    print("recovered", flush=True)
    replicas = int(await loop.run_in_executor(None, sys.stdin.readline))
    while len(broker.hosting.by_id) < replicas:  # noqa: ASYNC110 (nothing tells; 5 ms are no matter here)
        await asyncio.sleep(0.005)
    print("votes", flush=True)
    await asyncio.Event().wait()


FIGURES: Final = {
    "ack_p50_ms": "acknowledgement p50 of one partition, ms",
    "ack_64_at_once_p50_ms": "of 64 records sent at once to 64 partitions, ms",
    "ack_64_in_one_p50_ms": "of 64 records sent at once to one partition, ms",
    "create_s": "a topic of 1,000 partitions is made and ready, s",
    "idle_cores": "share of a core of the busiest broker, 1,000 partitions never written",
    "kb_per_replica": "memory, KB a replica of the largest broker, never written",
    "ack_p50_again_ms": "acknowledgement p50 of one partition with 1,000 others open, ms",
    "ack_open_same_p50_ms": "of one of the 1,000, ms",
    "ack_open_next_p50_ms": "of 1,000 partitions, each record to the next one, ms",
    "written_idle_cores": "share of a core of the busiest broker, 1,000 partitions written and left alone",
    "written_kb_per_replica": "memory, KB a replica of the largest broker, written",
    "gigabytes": "broker start: GB on the broker",
    "replicas": "broker start: replicas",
    "imported_s": "broker start: Python has imported what it needs, s",
    "recovered_s": "broker start: the journal and all segments are looked through, s",
    "votes_s": "broker start: every replica can be asked for its vote, s",
}
"""Metrics of these works, for the page."""

SOLO: Final = (SoloWork("many-partitions", many_partitions), SoloWork("broker-start", broker_start))

if __name__ == "__main__":
    import uvloop

    assert sys.argv[1] == "--broker", "it is run.py that runs these"
    print("imported", flush=True)
    uvloop.run(run_broker(Path(sys.argv[2])))
