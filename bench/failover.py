"""Failover: the broker that leads is killed, twenty times; how long until the next acknowledged write?

Three brokers as Ray actors, one topic with one partition. A producer sends a numbered record every two
milliseconds all the while. Kills alternate between ``ray.kill`` of the leader's actor and SIGKILL of its
process. The clock runs from the call that kills to the acknowledgement of a record that was sent after the
process was gone, so no acknowledgement of the dead leader counts. The next kill waits until the broker is
back under a new process id and every replica has caught up. At the end everything is read back from offset
0: an acknowledged record that is missing is lost, a number that is there twice is doubled, one that is
elsewhere than its acknowledgement said is moved.

    python bench/failover.py [--kills N] [--json PATH]
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import ray
from _ray import CLUSTER, is_level, new_topic, own_cluster, wait_until
from _report import arguments, console, machine, percentile, show, verdict, write

from raftlog.actors.launch import broker_actor
from raftlog.errors import RaftlogError

if TYPE_CHECKING:
    from raftlog.client.log import Log

INTERVAL_S: Final = 0.002
WRITE_TIMEOUT_S: Final = 30.0
LEVEL_STEP_S: Final = 0.05
P50_AIM_MS: Final = 300.0
MAX_AIM_MS: Final = 1000.0


class Acknowledged(NamedTuple):
    """One record: when it was sent, when acknowledged, and where it is."""

    number: int
    sent_at: float
    at: float
    place: tuple[int, int]
    """Partition and offset."""


class Stream(threading.Thread):
    """Sends a numbered record every ``interval`` seconds until stopped, to one partition after another, and
    keeps every acknowledgement."""

    def __init__(self, log: Log, topic: str, *, interval: float = INTERVAL_S, partitions: int = 1) -> None:
        super().__init__(name="stream", daemon=True)
        self.acknowledged: list[Acknowledged] = []
        self.failed: dict[int, BaseException] = {}
        self.sent = 0
        self._log = log
        self._topic = topic
        self._interval = interval
        self._partitions = partitions
        self._stopping = threading.Event()
        self._news = threading.Condition()

    def run(self) -> None:
        with self._log.producer(linger_ms=0) as producer:
            while not self._stopping.wait(self._interval):
                number, sent_at = self.sent, time.perf_counter()
                self.sent += 1
                partition = number % self._partitions
                delivery = producer.send(self._topic, number.to_bytes(8, "big"), partition=partition)
                delivery.add_done_callback(self._listener(number, sent_at))

    def _listener(self, number: int, sent_at: float) -> Callable[[Any], None]:
        def done(delivery: Any) -> None:
            at = time.perf_counter()
            error = delivery.exception()
            with self._news:
                if error is None:
                    found = delivery.result()
                    place = found.partition, found.offset
                    self.acknowledged.append(Acknowledged(number, sent_at, at, place))
                else:
                    self.failed[number] = error
                self._news.notify_all()

        return done

    def next_after(self, moment: float, since: int = 0) -> Acknowledged:
        """Wait for the first acknowledgement of a record that was sent after ``moment``; look from the
        acknowledgement number ``since`` on."""
        deadline = time.perf_counter() + WRITE_TIMEOUT_S
        with self._news:
            while True:
                while since < len(self.acknowledged):
                    if self.acknowledged[since].sent_at > moment:
                        return self.acknowledged[since]
                    since += 1
                if not self._news.wait(max(0.0, deadline - time.perf_counter())):
                    raise TimeoutError(f"nothing was acknowledged for {WRITE_TIMEOUT_S:.0f} s after a kill")

    def longest_silence(self, since: int, last: Acknowledged) -> float:
        """The longest time between two acknowledgements from number ``since`` up to ``last``, in seconds."""
        with self._news:
            moments = [one.at for one in self.acknowledged[max(0, since - 1) :] if one.at <= last.at]
        return max((b - a for a, b in pairwise(moments)), default=0.0)

    def finish(self) -> None:
        """Stop, and wait until every record has an answer."""
        self._stopping.set()
        self.join()


def by_ray(broker: Any) -> None:
    """``ray.kill`` of the broker's actor."""
    ray.kill(broker_actor(CLUSTER, broker.id))


def by_signal(broker: Any) -> None:
    """SIGKILL of the broker's process."""
    os.kill(broker.pid, signal.SIGKILL)


KINDS: Final[dict[str, Callable[[Any], None]]] = {"ray.kill": by_ray, "SIGKILL": by_signal}


def kill_leader(log: Log, topic: str, stream: Stream, kind: str) -> dict[str, Any]:
    """Kill once, measure, and wait until everything is as before."""
    leader = log.describe_topic(topic).partitions[0].leader
    broker = next(one for one in log.describe_cluster().brokers if one.id == leader)
    process = os.pidfd_open(broker.pid)
    try:
        gone = select.poll()
        gone.register(process, select.POLLIN)
        since, killed_at = len(stream.acknowledged), time.perf_counter()
        KINDS[kind](broker)
        if not gone.poll(WRITE_TIMEOUT_S * 1000):
            raise TimeoutError(f"broker {broker.id} survives {kind}")
        gone_at = time.perf_counter()
    finally:
        os.close(process)
    first = stream.next_after(gone_at, since)
    silence = stream.longest_silence(since, first)

    def is_back() -> bool:
        pids = {one.id: one.pid for one in log.describe_cluster().brokers}
        return pids.get(broker.id) != broker.pid and is_level(log, topic)

    wait_until(is_back, f"broker {broker.id} is back and has caught up", step=LEVEL_STEP_S)
    return {
        "kind": kind,
        "broker": broker.id,
        "failover_ms": (first.at - killed_at) * 1e3,
        "process_gone_ms": (gone_at - killed_at) * 1e3,
        "silence_ms": silence * 1e3,
        "back_s": time.perf_counter() - killed_at,
    }


def read_back(log: Log, topic: str, stream: Stream) -> dict[str, int]:
    """Compare what the topic holds with what was acknowledged."""
    seen: Counter[int] = Counter()
    places: dict[int, tuple[int, int]] = {}
    with log.consumer(topic) as consumer:
        for record in consumer.records(until="end", idle_timeout=WRITE_TIMEOUT_S):
            number = int.from_bytes(record.value or b"", "big")
            seen[number] += 1
            places[number] = record.partition, record.offset
    return {
        "sent": stream.sent,
        "acknowledged": len(stream.acknowledged),
        "failed": len(stream.failed),
        "read": sum(seen.values()),
        "lost": sum(one.number not in seen for one in stream.acknowledged),
        "doubled": sum(times - 1 for times in seen.values()),
        "moved": sum(places.get(one.number, one.place) != one.place for one in stream.acknowledged),
    }


def measure(log: Log, kills: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """All kills, then the accounts."""
    topic = new_topic(log, "failover", partitions=1)
    stream = Stream(log, topic)
    stream.start()
    stream.next_after(time.perf_counter())
    found = []
    for i in range(kills):
        kind = list(KINDS)[i % len(KINDS)]
        one = kill_leader(log, topic, stream, kind)
        found.append(one)
        console.print(
            f"{i + 1:>3}  {kind:<8}  broker {one['broker']}: next write {one['failover_ms']:>6.0f} ms, "
            f"gone after {one['process_gone_ms']:.0f} ms, back after {one['back_s']:.1f} s"
        )
    try:
        stream.finish()
    except RaftlogError as error:
        console.print(f"the producer ended with {error}")
    return found, read_back(log, topic, stream)


def summarise(found: list[dict[str, Any]]) -> dict[str, Any]:
    """p50 and maximum, of all kills and of each kind, in milliseconds."""
    groups = {"all": found, **{kind: [one for one in found if one["kind"] == kind] for kind in KINDS}}
    return {
        name: {
            "kills": len(group),
            "p50_ms": percentile([one["failover_ms"] for one in group], 50),
            "max_ms": max(one["failover_ms"] for one in group),
            "silence_p50_ms": percentile([one["silence_ms"] for one in group], 50),
            "back_p50_s": percentile([one["back_s"] for one in group], 50),
        }
        for name, group in groups.items()
        if group
    }


def main() -> int:
    """Measure, print, write; 1 if a record was lost, doubled or moved."""
    parser = arguments(
        "Time from the death of the leader's broker to the next acknowledged write.", "failover"
    )
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "failover", "machine": machine(), "replication": 3}
    with own_cluster() as log:
        found, accounts = measure(log, options.kills)
    result |= {"failover": summarise(found), "records": accounts, "kills": found}
    report(result)
    write(options.json, result)
    console.print(f"written: {options.json.name}")
    return 1 if accounts["lost"] or accounts["doubled"] or accounts["moved"] else 0


def report(result: dict[str, Any]) -> None:
    """Print the table, the accounts and what became of the aims."""
    rows = [
        [
            name,
            str(one["kills"]),
            *(f"{one[key]:.0f}" for key in ("p50_ms", "max_ms", "silence_p50_ms")),
            f"{one['back_p50_s']:.1f}",
        ]
        for name, one in result["failover"].items()
    ]
    columns = ["", "kills", "p50 ms", "max ms", "silence p50 ms", "broker back p50 s"]
    show("from the kill to the next acknowledged write", columns, rows)
    console.print(", ".join(f"{count} {name}" for name, count in result["records"].items()))
    both = result["failover"]["all"]
    console.print(
        f"aim p50 under {P50_AIM_MS:.0f} ms: {both['p50_ms']:.0f}, {verdict(both['p50_ms'] < P50_AIM_MS)}"
    )
    console.print(
        f"aim max under {MAX_AIM_MS:.0f} ms: {both['max_ms']:.0f}, {verdict(both['max_ms'] < MAX_AIM_MS)}"
    )


if __name__ == "__main__":
    sys.exit(main())
