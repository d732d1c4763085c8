"""A consumer that does not come, and a follower that stands still: what others notice, and how much memory it
takes.

One producer sends at a fixed rate to one partition with three replicas, one consumer reads along. In turn
nothing is slow; a second consumer, in a process of its own, takes one record and no more; a follower's
process is stopped (SIGSTOP), and goes on at the end. Each turn has a topic of its own.

    python bench/slow.py [--seconds N] [--rounds N] [--json PATH]
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, Final

import ray
from _ray import CLUSTER, is_level, new_topic, own_cluster, wait_until
from _report import arguments, console, machine, percentile, show, spread, write
from contenders.base import resident_bytes

import raftlog

if TYPE_CHECKING:
    from raftlog.client.log import Log

VALUES: Final = [Random(1).randbytes(1000)] * 100
BATCH_MB: Final = 0.1
BATCHES_PER_S: Final = 200
MB: Final = 1e6
LOOK_S: Final = 0.1
CATCH_UP_S: Final = 120.0
TURNS: Final = ("nothing", "a consumer", "a follower")


@ray.remote(num_cpus=0)
class Idler:
    """A consumer that takes one record, and does not come again."""

    def __init__(self, topic: str) -> None:
        self._consumer = raftlog.connect(CLUSTER).consumer(topic)

    def take(self) -> int:
        """Bytes of this process once the first record is there."""
        while not self._consumer.poll(timeout=1.0, max_records=1):
            pass
        return resident_bytes(os.getpid())

    def memory(self) -> int:
        """Bytes of this process."""
        return resident_bytes(os.getpid())


@dataclass
class Seen:
    """What the others of one turn saw."""

    acknowledged_ms: list[float] = field(default_factory=list)
    read: int = 0
    memory: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Process of a broker -> bytes at first and at most."""

    def look(self, pids: list[int]) -> None:
        """Note how much memory they have."""
        for pid in pids:
            now = resident_bytes(pid)
            first, most = self.memory.get(pid, (now, now))
            self.memory[pid] = first, max(most, now)


def send(log: Log, topic: str, seconds: float, seen: Seen) -> int:
    """Batches at a fixed rate, however long their acknowledgements take; how many."""
    count = int(seconds * BATCHES_PER_S)

    with log.producer(linger_ms=0, compression="none") as producer:
        began = time.perf_counter()
        for number in range(count):
            due = began + number / BATCHES_PER_S
            time.sleep(max(0.0, due - time.perf_counter()))
            producer.send_batch(topic, VALUES).add_done_callback(
                lambda _, due=due: seen.acknowledged_ms.append((time.perf_counter() - due) * 1000)
            )
        producer.flush()
    return count * len(VALUES)


@contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run it in a thread until the block is left."""
    ended = threading.Event()
    thread = threading.Thread(target=work, args=(ended,))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def turn(log: Log, slow: str, topic: str, seconds: float) -> dict[str, float]:
    """One turn: its figures, by name."""
    new_topic(log, topic, 1)
    seen = Seen()
    found: dict[str, float] = {}
    brokers = {broker.id: broker.pid for broker in log.describe_cluster().brokers}
    leader = log.describe_topic(topic).partitions[0].leader
    assert leader is not None
    stopped = next(pid for broker, pid in brokers.items() if broker != leader) if slow == "a follower" else 0

    def look(ended: threading.Event) -> None:
        while not ended.wait(LOOK_S):
            seen.look(list(brokers.values()))

    def read(ended: threading.Event) -> None:
        with log.consumer(topic) as consumer:
            while not ended.is_set():
                seen.read += len(consumer.poll(timeout=0.1, max_records=10_000))

    idler = Idler.remote(topic) if slow == "a consumer" else None
    with beside(look), beside(read):
        if idler is not None:
            first_taken = idler.take.remote()
            send(log, topic, 0.1, Seen())
            before = ray.get(first_taken)
        if stopped:
            os.kill(stopped, signal.SIGSTOP)
        try:
            began = time.perf_counter()
            sent = send(log, topic, seconds, seen)
            wait_until(lambda: seen.read >= sent, "the reader is at the end", CATCH_UP_S)
            found["seconds"] = time.perf_counter() - began
        finally:
            if stopped:
                os.kill(stopped, signal.SIGCONT)
        if stopped:
            began = time.perf_counter()
            wait_until(lambda: is_level(log, topic), "the follower has caught up", CATCH_UP_S)
            found["caught_up_after_s"] = time.perf_counter() - began
    if idler is not None:
        found["slow_one_grew_mb"] = (ray.get(idler.memory.remote()) - before) / MB
        ray.kill(idler)
    found["p50_ms"] = percentile(seen.acknowledged_ms, 50)
    found["p99_ms"] = percentile(seen.acknowledged_ms, 99)
    found["sent_mb"] = sent * len(VALUES[0]) / MB
    first, most = seen.memory[brokers[leader]]
    found["leader_grew_mb"] = (most - first) / MB
    log.delete_topic(topic)
    return found


def measure(seconds: float, rounds: int) -> dict[str, Any]:
    """Rounds of all turns; one before does not count, in which caches fill."""
    found: dict[str, dict[str, list[float]]] = {slow: {} for slow in TURNS}
    with own_cluster() as log:
        turn(log, TURNS[0], "warm", seconds)
        for number in range(rounds):
            for slow in TURNS:
                topic = f"{slow.replace(' ', '-')}-{number}"
                for name, value in turn(log, slow, topic, seconds).items():
                    found[slow].setdefault(name, []).append(value)
                    console.print(f"{slow} is slow: {name} {value:.3g}")
    return {slow: {name: spread(values) for name, values in one.items()} for slow, one in found.items()}


def main() -> int:
    """Measure and report."""
    parser = arguments("What a slow consumer or follower costs the others.", "slow")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    result = {
        "machine": machine(),
        "mb_per_s": BATCHES_PER_S * BATCH_MB,
        "turns": measure(options.seconds, options.rounds),
    }
    names = ("p50_ms", "p99_ms", "sent_mb", "leader_grew_mb", "slow_one_grew_mb", "caught_up_after_s")
    rows = [
        [slow, *(f"{one[name]['median']:.3g}" if name in one else "" for name in names)]
        for slow, one in result["turns"].items()
    ]
    show("Slow ones", ("slow is", *names), rows)
    write(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
