"""What transactions cost: 1,000 records of 100 B over 3 partitions in each, against producing without them.

Three brokers as Ray actors, replication 3, synced. Plain: an idempotent producer sends the same records in
the same way, a record a call, and everything is acknowledged at the end of the run. One after another: each
transaction begins when the one before is committed. Side by side: two producers, each in a thread of its own,
so that one sends while the other commits. Kafka's transactions are made in the same way, with confluent-kafka
on three brokers, where there is a Java to run them. A round is all contenders, one after another; every
record is in the log exactly once, which a reader of committed records counts at the end.

    python bench/transactions.py [--rounds N] [--seconds S] [--json PATH]
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from _ray import new_topic, own_cluster
from _report import arguments, console, machine, show, spread, verdict, write
from contenders.base import Unavailable
from contenders.on_kafka import PRODUCER, Kafka, KafkaBrokers, produce

if TYPE_CHECKING:
    from raftlog.client.log import Log

Contender = Callable[[float], tuple[int, float]]
"""Runs for so many seconds; records acknowledged or committed, and seconds."""

RECORD_BYTES: Final = 100
RECORDS: Final = 1_000
PARTITIONS: Final = 3
SIDE_BY_SIDE: Final = 2
AIM: Final = 0.8
PLAIN: Final = "plain"
STEPPED: Final = "plain, acknowledged every 1,000"
SERIAL: Final = "transactions, one after another"
PARALLEL: Final = f"transactions, {SIDE_BY_SIDE} producers side by side"
KAFKA: Final = "Kafka, unsynced: transactions, one after another"
TOPIC: Final = "transactions"


def plain(log: Log, topic: str, values: list[bytes], stepped: bool) -> Contender:
    """Without transactions."""

    def run(seconds: float) -> tuple[int, float]:
        with log.producer(compression="none") as producer:
            producer.send(topic, values[0], partition=0).result(10)  # connected, and with a producer id
            send, count = producer.send, 0
            begin = time.perf_counter()
            while time.perf_counter() - begin < seconds:
                for index, value in enumerate(values):
                    send(topic, value, partition=index % PARTITIONS)
                count += len(values)
                if stepped:
                    producer.flush()
            producer.flush()
            return count + 1, time.perf_counter() - begin

    return run


def transactional(log: Log, topic: str, values: list[bytes], name: str) -> Contender:
    """Transaction after transaction."""

    def run(seconds: float) -> tuple[int, float]:
        with log.producer(transactional_id=name, compression="none") as producer:
            with producer.transaction() as txn:
                txn.send(topic, values[0], partition=0)
            count = 0
            begin = time.perf_counter()
            while time.perf_counter() - begin < seconds:
                with producer.transaction() as txn:
                    send = txn.send
                    for index, value in enumerate(values):
                        send(topic, value, partition=index % PARTITIONS)
                count += len(values)
            return count + 1, time.perf_counter() - begin

    return run


def of_kafka(brokers: KafkaBrokers, topic: str, values: list[bytes]) -> Contender:
    """Kafka's, one after another."""
    from confluent_kafka import Producer

    def run(seconds: float) -> tuple[int, float]:
        producer = Producer({"bootstrap.servers": brokers.servers, "transactional.id": "bench", **PRODUCER})
        producer.init_transactions()
        producer.begin_transaction()
        produce(producer, topic, values[0])
        producer.commit_transaction()
        count = 0
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            producer.begin_transaction()
            for index, value in enumerate(values):
                produce(producer, topic, value, partition=index % PARTITIONS)
            producer.commit_transaction()
            count += len(values)
        return count + 1, time.perf_counter() - begin

    return run


@contextmanager
def kafka() -> Iterator[Kafka | None]:
    """Three brokers with the topic; None where they cannot run."""
    system = KafkaBrokers()
    with tempfile.TemporaryDirectory(prefix="raftlog-bench-") as directory:
        try:
            system.start(Path(directory) / "kafka")
            contender = Kafka(system)
            contender.create(TOPIC, PARTITIONS)
        except Unavailable as reason:
            console.print(f"without Kafka: {reason}")
            system.stop()
            yield None
            return
        try:
            yield contender
        finally:
            system.stop()


def side_by_side(runs: list[Contender]) -> Contender:
    """Several at the same time."""

    def run(seconds: float) -> tuple[int, float]:
        with ThreadPoolExecutor(len(runs)) as threads:
            done = list(threads.map(lambda each: each(seconds), runs))
        return sum(count for count, _ in done), max(elapsed for _, elapsed in done)

    return run


def main() -> None:
    """Measure, print, write."""
    parser = arguments("Transactions of 1,000 records against plain idempotent produce.", "transactions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each contender in each round")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "transactions",
        "machine": machine(),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "record_bytes": RECORD_BYTES,
        "records_per_transaction": RECORDS,
        "partitions": PARTITIONS,
        "replication": 3,
    }
    values = [os.urandom(RECORD_BYTES) for _ in range(RECORDS)]
    with kafka() as peer, own_cluster() as log:
        topic = new_topic(log, TOPIC, PARTITIONS)
        names = [f"bench-{number}" for number in range(SIDE_BY_SIDE)]
        runs = {
            PLAIN: plain(log, topic, values, stepped=False),
            STEPPED: plain(log, topic, values, stepped=True),
            SERIAL: transactional(log, topic, values, "bench"),
            PARALLEL: side_by_side([transactional(log, topic, values, name) for name in names]),
        }
        if peer is not None:
            runs[KAFKA] = of_kafka(peer.brokers, TOPIC, values)
        rates: dict[str, list[float]] = {name: [] for name in runs}
        written = dict.fromkeys(runs, 0)
        for number in range(options.rounds + 1):
            for name, run in runs.items():
                count, elapsed = run(options.seconds if number else options.seconds / 4)
                written[name] += count
                if number:  # the first round warms
                    rates[name].append(count / elapsed)
        with log.consumer(topic) as consumer:
            held = sum(1 for _ in consumer.records(until="end"))
        by_peer = written.pop(KAFKA, 0)
        assert held == sum(written.values()), f"{written} committed, {held} in the log"
        if peer is not None:
            turn = peer.consume(TOPIC, by_peer)
            assert turn.untimed + turn.records == by_peer, f"{by_peer} committed, {turn.records} in Kafka"
    result["contenders"] = {
        name: {
            "records_per_second": spread(rounds),
            "ratio_to_plain": spread([a / b for a, b in zip(rounds, rates[PLAIN], strict=True)]),
            "ratio_to_stepped": spread([a / b for a, b in zip(rounds, rates[STEPPED], strict=True)]),
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
        rate, ratio = one["records_per_second"], one["ratio_to_plain"]
        rows.append(
            [
                name,
                f"{rate['median']:,.0f}",
                f"{rate['min']:,.0f} to {rate['max']:,.0f}",
                f"{ratio['median']:.2f}",
                f"{one['ratio_to_stepped']['median']:.2f}",
                f"{RECORDS / rate['median'] * 1000:.1f}",
            ]
        )
    title = f"{RECORDS:,} records of {RECORD_BYTES} B over {PARTITIONS} partitions, {result['rounds']} rounds"
    show(title, ["", "records/s", "least to greatest", "of plain", "of that in steps", "ms per 1,000"], rows)
    for name in (SERIAL, PARALLEL):
        ratio = result["contenders"][name]["ratio_to_plain"]["median"]
        console.print(f"aim {name} {AIM} of plain: {ratio:.2f}, {verdict(ratio >= AIM)}")


if __name__ == "__main__":
    main()
