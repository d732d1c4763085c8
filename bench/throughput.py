"""Records per second: ``send``, ``send_batch`` and consuming, 100 B records, replication 3, synced.

Three brokers as Ray actors. ``send`` takes one record a call; ``send_batch`` takes 10,000, with at most
eight calls under way. Each run lasts a fixed time and counts until the last acknowledgement; that every
record is in the log exactly once is checked by the end offsets. Values are random bytes, so
``compression="none"`` unless a row says otherwise. Consuming reads what ``send_batch`` wrote. MB are of
values. The floor (``floor.py``) relays batches of 100 KB, eight under way. Rounds of all contenders follow
one another.

    python bench/throughput.py [--rounds N] [--seconds S] [--json PATH]
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from _ray import new_topic, own_cluster
from _report import arguments, console, machine, show, spread, verdict, write
from floor import RECORD_BYTES, Floor

if TYPE_CHECKING:
    from raftlog.client.log import Log

Contender = Callable[[float], float]
"""Runs for so many seconds; records per second."""

CALL_RECORDS: Final = 10_000
CALLS_UNDER_WAY: Final = 8
POLL_RECORDS: Final = 10_000
AIM: Final = 300_000
FLOOR_BATCH_BYTES: Final = 100_000
PARTITIONS: Final = (1, 6)


class Topic:
    """A topic that counts what is written to it, to compare with what it holds."""

    def __init__(self, log: Log, name: str, partitions: int) -> None:
        self.log = log
        self.name = new_topic(log, name, partitions)
        self.written = 0

    def check(self) -> None:
        """Every record is there, and none twice."""
        held = sum(each.end_offset for each in self.log.describe_topic(self.name).partitions)
        assert held == self.written, f"{self.name}: {self.written} acknowledged, {held} in the log"


def send(topic: Topic, values: list[bytes]) -> Contender:
    """One record a call."""

    def run(seconds: float) -> float:
        with topic.log.producer(compression="none") as producer:
            producer.send(topic.name, values[0]).result(10)  # connected, and with a producer id
            one, name, count = producer.send, topic.name, 0
            begin = time.perf_counter()
            while time.perf_counter() - begin < seconds:
                for value in values:
                    one(name, value)
                count += len(values)
            producer.flush()
            elapsed = time.perf_counter() - begin
        topic.written += count + 1
        topic.check()
        return count / elapsed

    return run


def send_batch(topic: Topic, values: list[bytes], compression: str) -> Contender:
    """Many records a call."""

    def run(seconds: float) -> float:
        with topic.log.producer(compression=compression) as producer:
            producer.send(topic.name, values[0]).result(10)
            under_way: deque[Any] = deque()
            count = 0
            begin = time.perf_counter()
            while time.perf_counter() - begin < seconds:
                under_way.append(producer.send_batch(topic.name, values))
                count += len(values)
                if len(under_way) >= CALLS_UNDER_WAY:
                    under_way.popleft().result(30)
            producer.flush()
            elapsed = time.perf_counter() - begin
        topic.written += count + 1
        topic.check()
        return count / elapsed

    return run


def consume(topic: Topic) -> Contender:
    """From the first offset on."""

    def run(seconds: float) -> float:
        with topic.log.consumer(topic.name) as consumer:
            count = 0
            begin = time.perf_counter()
            while count < topic.written and time.perf_counter() - begin < seconds:
                count += len(consumer.poll(timeout=1.0, max_records=POLL_RECORDS))
            return count / (time.perf_counter() - begin)

    return run


def contenders(log: Log, floor: Floor) -> dict[str, Contender]:
    """All of them, in the order of a round."""
    values = [os.urandom(RECORD_BYTES) for _ in range(CALL_RECORDS)]
    texts = [value.hex().encode()[:RECORD_BYTES] for value in values]
    frame = os.urandom(FLOOR_BATCH_BYTES)
    runs: dict[str, Contender] = {
        floor_name(): lambda seconds: floor.pipelined(frame, seconds) / RECORD_BYTES
    }
    for partitions in PARTITIONS:
        single = Topic(log, f"send-{partitions}", partitions)
        batch = Topic(log, f"send-batch-{partitions}", partitions)
        runs[f"send, {_plural(partitions)}"] = send(single, values)
        runs[batch_name(partitions)] = send_batch(batch, values, "none")
        runs[f"consume, {_plural(partitions)}"] = consume(batch)
    text = Topic(log, "send-batch-lz4", PARTITIONS[-1])
    runs[f"send_batch lz4 of hex digits, {_plural(PARTITIONS[-1])}"] = send_batch(text, texts, "lz4")
    return runs


def floor_name() -> str:
    """The floor's row."""
    return f"floor, {FLOOR_BATCH_BYTES // 1000} KB batches"


def batch_name(partitions: int) -> str:
    """The row of ``send_batch``."""
    return f"send_batch, {_plural(partitions)}"


def _plural(partitions: int) -> str:
    return f"{partitions} partition{'s' if partitions > 1 else ''}"


def main() -> None:
    """Measure, print, write."""
    parser = arguments("Throughput of 100 B records, replicated to three and synced.", "throughput")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.2, help="of each contender in each round")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "throughput",
        "machine": machine(),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "record_bytes": RECORD_BYTES,
        "replication": 3,
    }
    rates: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="raftlog-bench-") as directory,
        own_cluster() as log,
        Floor(Path(directory)) as floor,
    ):
        runs = contenders(log, floor)
        for name, run in runs.items():
            run(options.seconds / 4)  # warm
            rates[name] = []
        for _ in range(options.rounds):
            for name, run in runs.items():
                rates[name].append(run(options.seconds))
    result["contenders"] = {
        name: {
            "records_per_second": spread(rounds),
            "megabytes_per_second": spread([rate * RECORD_BYTES / 1e6 for rate in rounds]),
            "ratio_to_floor": spread([a / b for a, b in zip(rounds, rates[floor_name()], strict=True)]),
        }
        for name, rounds in rates.items()
    }
    report(result)
    write(options.json, result)
    console.print(f"written: {options.json.name}")


def report(result: dict[str, Any]) -> None:
    """Print the table and what became of the aim."""
    rows = []
    for name, one in result["contenders"].items():
        rate = one["records_per_second"]
        rows.append(
            [
                name,
                f"{rate['median']:,.0f}" if name != floor_name() else "",
                f"{rate['min']:,.0f} to {rate['max']:,.0f}" if name != floor_name() else "",
                f"{one['megabytes_per_second']['median']:.1f}",
                f"{one['ratio_to_floor']['median']:.2f}",
            ]
        )
    title = f"100 B records, {result['rounds']} rounds of {result['seconds']:g} s each"
    show(title, ["", "records/s", "least to greatest", "MB/s", "of the floor"], rows)
    best = max(
        result["contenders"][batch_name(count)]["records_per_second"]["median"] for count in PARTITIONS
    )
    console.print(f"aim send_batch {AIM:,} records/s: {best:,.0f}, {verdict(best >= AIM)}")


if __name__ == "__main__":
    main()
