"""Every flight out of New York in 2013 through a replicated topic, with a leader killed half way.

Three brokers on a Ray of its own; topic ``flights`` with six partitions, three replicas each. The driver
produces all 336,776 flights as JSON, keyed by tail number, with the real time of departure as timestamp. Two
consumer actors add up delays per carrier meanwhile. Half way the broker that leads partition 0 is killed; the
metadata actor brings it back.

Then the accounts: carriers against pandas on the same data; every record read back from offset 0 by fresh
consumers and compared, byte by byte, with what was sent; replicas compared with one another by their bytes on
disk. The exit code is 0 only if all of it agrees.

    python examples/flights.py [--data-dir D]  # keep the log in D; a second run proves that it is there
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import raftlog
from flights_accounts import (
    Accounts,
    CarrierTotals,
    Flight,
    Place,
    Sent,
    add,
    check_records,
    check_replicas,
    check_totals,
    merged,
)
from flights_data import read_flights, to_records, totals_by_pandas
from raftlog.actors.launch import broker_actor
from raftlog.errors import RaftlogError
from raftlog.storage.real_disk import RealDisk
from raftlog.storage.verify import VerifyReport, verify

if TYPE_CHECKING:
    from raftlog.client.log import Log
    from raftlog.record.types import Record

CLUSTER = "flights-demo"
TOPIC = "flights"
PARTITIONS = 6
BROKERS = 3
CONSUMERS = 2
SLICE = 2_000  # flights sent between two looks at the progress bar
RECOVERY_S = 60.0  # a broker that is not back by then is a failure
PROBLEMS_SHOWN = 10


class DelaysByCarrier:
    """Adds up delays per carrier while flights come in."""

    def __init__(self, log: Log, partitions: list[int]) -> None:
        self._log = log
        self._partitions = partitions
        self._count = 0
        self._end: int | None = None

    def count(self) -> int:
        """Records consumed so far."""
        return self._count

    def finish(self, end: int) -> None:
        """Stop once this many records are consumed."""
        self._end = end

    def run(self) -> dict[str, CarrierTotals]:
        """Consume until :meth:`finish` says that this was all; return the totals."""
        totals: dict[str, CarrierTotals] = {}
        decode = msgspec.json.Decoder(Flight).decode
        with self._log.consumer(assign=[(TOPIC, partition) for partition in self._partitions]) as consumer:
            while self._end is None or self._count < self._end:
                records = consumer.poll(timeout=0.1, max_records=5_000)
                for record in records:
                    add(totals, decode(record.value))
                self._count += len(records)
        return totals


class Failover:
    """The time from the kill to the next acknowledged write on partition 0.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.ms: float | None = None
        self._killed_at: float | None = None
        self._say = say
        self._told = False

    def kill_leader(self, log: Log) -> None:
        """Kill the broker that leads partition 0; return once its process is gone."""
        leader = log.describe_topic(TOPIC).partitions[0].leader
        assert leader is not None, "partition 0 has no leader to kill"
        pid = next(broker.pid for broker in log.describe_cluster().brokers if broker.id == leader)
        actor = broker_actor(CLUSTER, leader)
        self._killed_at = time.perf_counter()
        ray.kill(actor)
        wait_until(lambda: not runs(pid), "the killed process is gone")
        self._say(f"killed broker {leader} (process {pid}), which led partition 0")

    def watch(self, delivery: raftlog.Delivery) -> None:
        """Watch a record sent once the process was gone: its acknowledgement cannot be the dead leader's."""
        if self._killed_at is not None and self.ms is None:
            delivery.add_done_callback(self._done)

    def _done(self, delivery: raftlog.Delivery) -> None:
        now = time.perf_counter()
        if self.ms is None and delivery.exception() is None and delivery.result().partition == 0:
            assert self._killed_at is not None
            self.ms = (now - self._killed_at) * 1_000

    def tell(self) -> None:
        """Say, once, how long it took."""
        if self.ms is not None and not self._told:
            self._told = True
            self._say(f"partition 0 acknowledged its next write {self.ms:.0f} ms after the kill")


def runs(pid: int) -> bool:
    """Whether the process runs (one that ended and was not waited for yet does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], what: str, timeout: float = RECOVERY_S) -> None:
    """Look again every 5 ms; TimeoutError if it does not come true."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:.0f} s: {what}")
        time.sleep(0.005)


def is_level(log: Log) -> bool:
    """Whether every broker is alive and every replica holds everything."""
    brokers = log.describe_cluster().brokers
    partitions = log.describe_topic(TOPIC).partitions
    return all(broker.state == "alive" for broker in brokers) and all(
        partition.leader is not None and not partition.lagging for partition in partitions
    )


class Bars:
    """The progress bars: sent, acknowledged, consumed."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.say = progress.console.print
        self._progress = progress
        self._tasks: dict[str, TaskID] = {
            name: progress.add_task(name, total=total) for name in ("sent", "acknowledged", "consumed")
        }

    def show(self, **completed: int) -> None:
        """Move the named bars."""
        for name, count in completed.items():
            self._progress.update(self._tasks[name], completed=count)


@dataclass
class Outcome:
    """What the streaming half of the demo leaves to be checked."""

    places: list[Place | None]
    totals: dict[str, CarrierTotals]
    failover_ms: float


def stream(log: Log, records: Sequence[Sent], bars: Bars) -> Outcome:
    """Produce everything while two actors consume; kill a leader half way and wait until it is back."""
    consumer = ray.remote(DelaysByCarrier).options(num_cpus=0, max_concurrency=2)
    actors: list[Any] = [consumer.remote(log, share(i)) for i in range(CONSUMERS)]
    running = [actor.run.remote() for actor in actors]
    failover = Failover(bars.say)

    def consumed() -> int:
        return sum(ray.get([actor.count.remote() for actor in actors]))

    with log.producer() as producer:
        deliveries = produce(log, producer, records, failover, bars, consumed)
        places = [place_of(delivery) for delivery in deliveries]
    bars.show(acknowledged=sum(place is not None for place in places))
    failover.tell()
    per_partition = Counter(place.partition for place in places if place is not None)
    for i, actor in enumerate(actors):
        actor.finish.remote(sum(per_partition[partition] for partition in share(i)))
    totals = merged(ray.get(running, timeout=RECOVERY_S))
    bars.show(consumed=sum(carrier.flights for carrier in totals.values()))
    wait_until(lambda: is_level(log), "the killed broker is back and has caught up")
    bars.say("the killed broker is back and has caught up")
    if failover.ms is None:
        raise RuntimeError("partition 0 acknowledged nothing after its leader was killed")
    return Outcome(places, totals, failover.ms)


def share(consumer: int) -> list[int]:
    """The partitions that a consumer actor reads."""
    return list(range(consumer, PARTITIONS, CONSUMERS))


def produce(
    log: Log,
    producer: raftlog.Producer,
    records: Sequence[Sent],
    failover: Failover,
    bars: Bars,
    consumed: Callable[[], int],
) -> list[raftlog.Delivery]:
    """Send all records; half way, kill the leader of partition 0."""
    deliveries: list[raftlog.Delivery] = []
    acknowledged = 0
    half = len(records) // 2
    for first in range(0, len(records), SLICE):
        if first <= half < first + SLICE:
            failover.kill_leader(log)
        for key, value, stamp in records[first : first + SLICE]:
            delivery = producer.send(TOPIC, value, key=key, timestamp_ms=stamp)
            failover.watch(delivery)
            deliveries.append(delivery)
        while acknowledged < len(deliveries) and deliveries[acknowledged].done():
            acknowledged += 1
        bars.show(sent=len(deliveries), acknowledged=acknowledged, consumed=consumed())
        failover.tell()
    return deliveries


def place_of(delivery: raftlog.Delivery) -> Place | None:
    """Where the record is, once acknowledged; None if it was not."""
    try:
        meta = delivery.result()
    except RaftlogError as error:
        print(f"a flight was not acknowledged: {error}", file=sys.stderr)
        return None
    return Place(meta.partition, meta.offset)


def read_back(log: Log) -> Iterator[Record]:
    """Everything in the topic from offset 0 on, partition by partition, each by a consumer of its own."""
    for partition in range(PARTITIONS):
        with log.consumer(assign=[(TOPIC, partition)], auto_offset_reset="none") as consumer:
            consumer.seek((TOPIC, partition), 0)
            yield from consumer.records(until="end")


def prove_earlier_run(log: Log, receipt: Path, records: Sequence[Sent], console: Console) -> list[str]:
    """If the directory holds an earlier run's log, compare it with the data; then make room for this run."""
    if TOPIC not in log.topics():
        return [f"{receipt} tells of an earlier run, but its topic is gone"] if receipt.exists() else []
    if receipt.exists():
        places = [Place(*place) for place in json.loads(receipt.read_text())]
        accounts = check_records(records, places, read_back(log))
        console.print(
            f"from the run before: {accounts.consumed} flights are still there, {accounts.lost} lost, "
            f"{accounts.duplicated} duplicated, {len(accounts.problems)} differences"
        )
        problems = [f"from the run before: {problem}" for problem in accounts.problems]
        receipt.unlink()
    else:
        console.print("the run before did not end: its flights are dropped")
        problems = []
    log.delete_topic(TOPIC)
    return problems


def verify_brokers(data_dir: Path) -> dict[str, VerifyReport]:
    """Check every byte of every broker's directory, and digest the replicas in it. The cluster is stopped.

    A broker that stopped a moment before the others lacks the (empty) entry with which the next leader began.
    Then digests are taken again, over what all have: that no record is missing from it, check_replicas sees.
    """
    folders = sorted(identity.parent for identity in data_dir.rglob("IDENTITY"))

    def verify_all(through: dict[tuple[str, int], int]) -> dict[str, VerifyReport]:
        return {folder.name: asyncio.run(verify(RealDisk(folder), through)) for folder in folders}

    reports = verify_all({})
    lengths: dict[tuple[str, int], set[int]] = {}
    for row in (row for report in reports.values() for row in report.replicas):
        lengths.setdefault((row.topic, row.partition), set()).add(row.last_index)
    if any(len(each) > 1 for each in lengths.values()):
        reports = verify_all({name: min(each) for name, each in lengths.items()})
    return reports


def print_carriers(
    console: Console, totals: dict[str, CarrierTotals], by_pandas: dict[str, CarrierTotals]
) -> None:
    """The table of carriers, and whether pandas agrees with each line."""
    rows = Table(title="delays by carrier, as the consumer actors added them up", title_justify="left")
    for column in ("carrier", "flights", "never left", "mean delay leaving", "arriving", "pandas"):
        rows.add_column(column, justify="left" if column in ("carrier", "pandas") else "right")
    for name, carrier in sorted(totals.items(), key=lambda item: -item[1].flights):
        rows.add_row(
            name,
            f"{carrier.flights:,}",
            f"{carrier.flights - carrier.departed:,}",
            f"{carrier.dep_delay / max(1, carrier.departed):.1f} min",
            f"{carrier.arr_delay / max(1, carrier.arrived):.1f} min",
            "agrees" if by_pandas.get(name) == carrier else "[red]differs[/red]",
        )
    console.print(rows)


def run(directory: Path, flights: int | None, console: Console) -> int:
    """The whole demo on one directory; 0 if everything agrees, 1 if anything does not."""
    console.print("reading the flights")
    table = read_flights().iloc[:flights]
    records = to_records(table)
    by_pandas = totals_by_pandas(table)
    console.print(f"starting Ray and {BROKERS} brokers")
    start_ray()
    log = raftlog.start(CLUSTER, brokers=BROKERS, data_dir=str(directory / "log"))
    receipt = directory / "receipt.json"
    problems = prove_earlier_run(log, receipt, records, console)
    log.create_topic(TOPIC, partitions=PARTITIONS, replication_factor=BROKERS)
    with Progress(
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        outcome = stream(log, records, Bars(progress, len(records)))
    console.print("reading everything back from offset 0")
    accounts = check_records(records, outcome.places, read_back(log))
    wait_until(lambda: is_level(log), "all replicas hold everything")
    log.close()
    raftlog.shutdown(CLUSTER, force=True)
    console.print("comparing the replicas on disk")
    problems += check_totals(outcome.totals, by_pandas)
    problems += check_replicas(verify_brokers(directory / "log"), TOPIC, PARTITIONS, BROKERS)
    receipt.write_text(json.dumps(outcome.places))
    print_carriers(console, outcome.totals, by_pandas)
    return report(accounts, problems, outcome.failover_ms, console)


def report(accounts: Accounts, others: Sequence[str], failover_ms: float, console: Console) -> int:
    """Print what differs, in the accounts and among ``others``, then the last line; return the exit code."""
    problems = [*accounts.problems, *others]
    for problem in problems[:PROBLEMS_SHOWN]:
        console.print(problem, style="red", markup=False)
    if len(problems) > PROBLEMS_SHOWN:
        console.print(f"and {len(problems) - PROBLEMS_SHOWN} more", style="red")
    print(accounts.summary(failover_ms), flush=True)
    return 1 if problems else 0


def start_ray() -> None:
    """A Ray of our own on this machine, and quiet."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; the exit code."""
    parser = argparse.ArgumentParser(
        description="Flights through a replicated topic, with a leader killed half way."
    )
    parser.add_argument(
        "--data-dir", type=Path, help="keep the log there; what an earlier run left is checked first"
    )
    parser.add_argument("--flights", type=int, metavar="N", help="only the first N flights (all: 336,776)")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    try:
        if options.data_dir is not None:
            return run(options.data_dir.absolute(), options.flights, console)
        with tempfile.TemporaryDirectory(prefix="raftlog-flights-") as directory:
            return run(Path(directory), options.flights, console)
    except KeyboardInterrupt:
        return 130
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
