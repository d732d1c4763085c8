"""What it costs to reach brokers through calls of their actors instead of their ports.

Three brokers as Ray actors on this machine, one client, one partition replicated three times; the two ways
take turns.

    python bench/transport.py [--seconds N] [--rounds N] [--json PATH]
"""

from __future__ import annotations

import sys
import time
from random import Random
from typing import TYPE_CHECKING, Any, Final

from _ray import CLUSTER, new_topic, own_cluster
from _report import arguments, console, machine, percentile, show, spread, write

import raftlog

if TYPE_CHECKING:
    from raftlog.client.log import Log

WAYS: Final = ("streams", "actor")
VALUE: Final = Random(1).randbytes(100)
BATCH: Final = [Random(2).randbytes(1000)] * 1000
UNCOUNTED: Final = 50


def latencies(log: Log, topic: str, seconds: float) -> list[float]:
    """ms of one acknowledged record after another."""
    found = []
    with log.producer(linger_ms=0) as producer:
        for _ in range(UNCOUNTED):
            producer.send(topic, VALUE).result(timeout=30)
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            producer.send(topic, VALUE).result(timeout=30)
            found.append((time.perf_counter() - began) * 1000)
    return found


def written(log: Log, topic: str, seconds: float) -> float:
    """MB/s of send_batch."""
    count = 0
    with log.producer(compression="none") as producer:
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            producer.send_batch(topic, BATCH)
            count += 1
        producer.flush()
        return count / (time.perf_counter() - began)


def read(log: Log, topic: str) -> float:
    """MB/s of poll_arrow, from the beginning to the end."""
    size = 0
    end = log.describe_topic(topic).partitions[0].end_offset
    with log.consumer(topic) as consumer:
        began = time.perf_counter()
        offset = 0
        while offset < end:
            table = consumer.poll_arrow(timeout=30.0)
            size += table["value"].nbytes
            offset = table["offset"][-1].as_py() + 1
        return size / 1e6 / (time.perf_counter() - began)


def measure(seconds: float, rounds: int) -> dict[str, Any]:
    """Rounds of each way."""
    found: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}

    def note(way: str, name: str, value: float) -> None:
        found[way].setdefault(name, []).append(value)
        console.print(f"{way}: {name} {value:.3g}")

    with own_cluster():
        for number in range(rounds):
            for way in WAYS:
                client = raftlog.connect(CLUSTER, transport=way)
                assert client.transport == way
                topic = new_topic(client, f"{way}-{number}", 1)
                took = latencies(client, topic, seconds)
                note(way, "p50_ms", percentile(took, 50))
                note(way, "p99_ms", percentile(took, 99))
                note(way, "write_mb_per_s", written(client, topic, seconds))
                note(way, "read_mb_per_s", read(client, topic))
    return {way: {name: spread(values) for name, values in one.items()} for way, one in found.items()}


def main() -> int:
    """Measure and report."""
    parser = arguments("Brokers reached through actor calls, against streams.", "transport")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    result = {"machine": machine(), "transports": measure(options.seconds, options.rounds)}
    rows = [
        [way, *(f"{figure['median']:.3g}" for figure in one.values())]
        for way, one in result["transports"].items()
    ]
    show("Transports", ("way", "p50 ms", "p99 ms", "written MB/s", "read MB/s"), rows)
    write(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
