"""The three delivery semantics side by side: flights are enriched by three workers that get killed.

Three brokers on a Ray of its own; topic ``flights`` with six partitions, three replicas each. Every mode
reads it with a group of its own and writes what it makes of it to a topic of its own.

*Exactly once* is ``log.process`` with three worker actors, while the driver sends the flights, and brokers,
workers and the metadata actor are killed at random. Nothing may be lost, and nothing doubled.

*At most once* and *at least once* are the loops that one writes by hand. Random kills would make their losses
and duplicates a matter of luck; so their workers die exactly where it hurts, with a full batch in hand: after
the commit and before processing, or after processing and before the commit. Exactly those records must then
be missing, or be there twice.

All that comes out is compared with what pandas makes of the same data, record by record. The exit code is 0
only if all of it agrees.

    python examples/exactly_once.py [--flights N] [--seconds S]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
import ray
from rich.console import Console
from rich.table import Table

import raftlog
from flights import start_ray
from flights_accounts import Flight, Sent
from flights_data import enriched_by_pandas, read_flights, read_names, to_records
from flights_enriched import Enricher, Verdict, compare
from raftlog.actors.launch import broker_actor, metadata_actor
from raftlog.errors import RaftlogError

if TYPE_CHECKING:
    from raftlog.client.descriptions import GroupDescription
    from raftlog.client.log import Log
    from raftlog.record.types import Record

CLUSTER = "exactly-once-demo"
INPUT = "flights"
PARTITIONS = 6
BROKERS = 3
WORKERS = 3
BATCH = 500
"""Records that a worker of the loops takes in hand at once."""
SPACING = 8
"""Full batches from one death to the next."""
PAUSE_S = (0.5, 2.5)
"""Between two random kills."""
SETTLE_S = 120.0
"""What does not move for this long is stuck."""
LOOK_S = 0.25
"""Between two looks at a group."""
PROBLEMS_SHOWN = 10

ByHand = Literal["at-most-once", "at-least-once"]


def output_of(semantics: str) -> str:
    """The topic that a mode writes to."""
    return f"enriched-{semantics}"


def witness_of(semantics: str) -> str:
    """The name of a mode's witness."""
    return f"witness-{semantics}"


# -- by hand: at most once, at least once


class Witness:
    """Decides who dies when, and remembers what it had in hand.

    Args:
        deaths: how many there are to be.
    """

    def __init__(self, deaths: int) -> None:
        self._deaths = deaths
        self._batches = 0
        self._in_hand: list[list[int]] = []

    def dies(self, rows: list[int]) -> bool:
        """Whether the worker that asks is to die, with these flights in hand."""
        if len(rows) < BATCH or len(self._in_hand) == self._deaths:
            return False
        self._batches += 1
        if self._batches % SPACING:
            return False
        self._in_hand.append(rows)
        return True

    def in_hand(self) -> list[list[int]]:
        """What each of the dead had in hand."""
        return self._in_hand


class Worker:
    """One member of the group: the loop, with a place to die in. Where it died Ray makes it anew."""

    def __init__(self, log: Log, semantics: ByHand, enrich: Enricher) -> None:
        self._log = log
        self._semantics = semantics
        self._enrich = enrich
        self._witness = ray.get_actor(witness_of(semantics))
        self._finished = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def finish(self) -> None:
        """Stop after the batch that is in hand; raise what went wrong."""
        self._finished = True
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._enrich_all()
        except Exception as error:  # noqa: BLE001  whoever calls finish hears of it
            self._error = error

    def _enrich_all(self) -> None:
        semantics, topic = self._semantics, output_of(self._semantics)
        # An ordinary producer in both: with acks=0, as at-most-once would have it, sends that were under way
        # could be lost as well, and nobody could say how many.
        with (
            self._log.producer() as producer,
            self._log.consumer(
                INPUT, group=semantics, semantics=semantics, max_poll_records=BATCH
            ) as consumer,
        ):
            while not self._finished:
                records = consumer.poll(timeout=0.2)  # at most once: committed before it returns
                if semantics == "at-most-once":
                    self._maybe_die(records)
                for record in records:
                    producer.send(topic, self._enrich(record), key=record.key)
                producer.flush()
                if semantics == "at-least-once":
                    self._maybe_die(records)
                    consumer.commit()

    def _maybe_die(self, records: list[Record]) -> None:
        rows = [msgspec.json.decode(record.value or b"", type=Flight).row for record in records]
        if rows and ray.get(self._witness.dies.remote(rows)):
            os.kill(os.getpid(), signal.SIGKILL)


def by_hand(log: Log, semantics: ByHand, enrich: Enricher, deaths: int) -> tuple[int, Counter[int]]:
    """Enrich everything in that mode; return how many workers died, and what they had in hand."""
    witness: Any = ray.remote(Witness).options(num_cpus=0, name=witness_of(semantics)).remote(deaths)
    worker = ray.remote(Worker).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
    workers: list[Any] = [worker.remote(log, semantics, enrich) for _ in range(WORKERS)]
    wait_for_group(log, semantics, is_done)
    ray.get([each.finish.remote() for each in workers], timeout=SETTLE_S)
    in_hand = ray.get(witness.in_hand.remote())
    return len(in_hand), Counter(row for rows in in_hand for row in rows)


def wait_for_group(log: Log, group: str, reached: Callable[[GroupDescription], bool]) -> None:
    """Wait until a group is where it has to be. TimeoutError if it stands still for SETTLE_S before that."""
    seen: GroupDescription | None = None
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(RaftlogError):  # there is no such group yet, or nobody answers just now
            now = log.describe_group(group)
            if reached(now):
                return
            if now != seen:
                seen, deadline = now, time.monotonic() + SETTLE_S
        time.sleep(LOOK_S)
    raise TimeoutError(f"group {group!r} stands still at {seen}")


def is_done(group: GroupDescription) -> bool:
    """Whether a group has committed all that there is of the input."""
    return len(group.offsets) == PARTITIONS and all(each.lag == 0 for each in group.offsets)


# -- exactly once


class Chaos:
    """Kills brokers, workers and the metadata actor, in random order and at random times, in a ``with``.

    Args:
        log: of the cluster.
        group: whose members are the workers.
        say: prints a line.
    """

    ROUND: Final = ("broker", "worker", "worker", "metadata actor")
    """Every kind in every round, so that a short run has them all."""

    def __init__(self, log: Log, group: str, say: Callable[[str], None]) -> None:
        self.killed: Counter[str] = Counter()
        self._log = log
        self._group = group
        self._say = say
        self._random = random.Random()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)

    def _run(self) -> None:
        kinds: list[str] = []
        while not self._over.wait(self._random.uniform(*PAUSE_S)):
            kinds = kinds or self._random.sample(self.ROUND, len(self.ROUND))
            try:
                victim = self._kill(kinds[-1])
            except (RaftlogError, ray.exceptions.RayError, ProcessLookupError):
                continue  # whom it was to hit is down already
            if victim is not None:
                self.killed[kinds.pop()] += 1
                self._say(f"killed {victim}")

    def _kill(self, kind: str) -> str | None:
        """Kill one of that kind; None if it is better to wait."""
        if kind == "broker":
            brokers = self._log.describe_cluster().brokers
            if any(broker.state != "alive" for broker in brokers):
                return None  # without a majority nothing moves, and this is about what happens when it does
            broker = self._random.choice(brokers)
            ray.kill(broker_actor(CLUSTER, broker.id))
            return f"broker {broker.id}"
        if kind == "metadata actor":
            ray.kill(metadata_actor(CLUSTER), no_restart=False)
            return "the metadata actor"
        members = self._log.describe_group(self._group).members
        if not members:
            return None
        pid = int(self._random.choice(members).client_id.rsplit(":", 2)[1])
        os.kill(pid, signal.SIGKILL)
        return f"the worker in process {pid}"

    def __enter__(self) -> Chaos:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def send_all(log: Log, records: Sequence[Sent], seconds: float) -> None:
    """Send the flights, evenly over that time."""
    began = time.monotonic()
    sent = 0
    with log.producer() as producer:
        while sent < len(records):
            due = min(len(records), int(len(records) * (time.monotonic() - began) / seconds) + 1)
            for key, value, stamp in records[sent:due]:
                producer.send(INPUT, value, key=key, timestamp_ms=stamp)
            sent = due
            time.sleep(0.02)


def exactly_once(
    log: Log, records: Sequence[Sent], enrich: Enricher, seconds: float, say: Callable[[str], None]
) -> Counter[str]:
    """Send and enrich everything while the cluster is being killed; return who was, by kind."""
    group = "exactly-once"
    with log.process(INPUT, output_of(group), group, enrich, workers=WORKERS) as processing:
        wait_for_group(log, group, lambda now: len(now.members) == WORKERS)
        with Chaos(log, group, say) as chaos:
            send_all(log, records, seconds)
        wait_for_group(log, group, is_done)
        processing.stop(SETTLE_S)  # one that was killed last may not be back yet
    return chaos.killed


# -- the accounts


def read_all(log: Log, topic: str) -> Iterator[Record]:
    """Everything that is committed in a topic, from offset 0 on, in the order of each partition."""
    ends = {
        (topic, each.index): each.committed for each in log.describe_topic(topic).partitions if each.committed
    }
    deadline = time.monotonic() + SETTLE_S
    with log.consumer(topic) as consumer:
        while any(consumer.position(each) < end for each, end in ends.items()):
            yield from consumer.poll(timeout=0.2, max_records=5_000)
            if time.monotonic() > deadline:
                raise TimeoutError(f"a transaction is still open in {topic}")


def print_table(console: Console, verdicts: Sequence[Verdict]) -> None:
    """The three side by side."""
    table = Table(title="flights enriched, as they came out", title_justify="left")
    table.add_column("semantics")
    for column in ("killed", "came out", "lost", "expected", "duplicated", "expected"):
        table.add_column(column, justify="right")
    for each in verdicts:
        counts = (
            each.deaths,
            each.tally.records,
            each.lost,
            each.expected_lost.total(),
            each.repeated,
            each.expected_repeated.total(),
        )
        table.add_row(each.semantics, *(f"{count:,}" for count in counts))
    console.print(table)


def report(verdicts: Sequence[Verdict], flights: int, console: Console) -> int:
    """Print the table, what differs, and the last line; return the exit code."""
    print_table(console, verdicts)
    problems = [problem for each in verdicts for problem in each.problems()]
    for problem in problems[:PROBLEMS_SHOWN]:
        console.print(problem, style="red", markup=False)
    if len(problems) > PROBLEMS_SHOWN:
        console.print(f"and {len(problems) - PROBLEMS_SHOWN} more", style="red")
    console.print(f"{flights} flights; {'; '.join(each.summary() for each in verdicts)}", soft_wrap=True)
    return 1 if problems else 0


def run(data_dir: Path, flights: int | None, seconds: float, deaths: int, console: Console) -> int:
    """The whole demo on one directory; 0 if everything is as it has to be, 1 if anything is not."""
    console.print("reading the flights")
    table = read_flights().iloc[:flights]
    records = to_records(table)
    expected = enriched_by_pandas(table)
    keys = [record.key for record in records]
    enrich = Enricher(*read_names())
    console.print(f"starting Ray and {BROKERS} brokers")
    start_ray()
    log = raftlog.start(CLUSTER, brokers=BROKERS, data_dir=str(data_dir))
    modes: tuple[ByHand, ...] = ("at-most-once", "at-least-once")
    for topic in (INPUT, *(output_of(each) for each in ("exactly-once", *modes))):
        log.create_topic(topic, partitions=PARTITIONS, replication_factor=BROKERS)

    def verdict(semantics: str, deaths: int, lost: Counter[int], repeated: Counter[int]) -> Verdict:
        in_order = semantics != "at-least-once"
        tally = compare(expected, keys, read_all(log, output_of(semantics)), in_order)
        return Verdict(semantics, deaths, tally, lost, repeated)

    none = Counter[int]()
    console.print(f"exactly once: {len(records):,} flights in {seconds:.0f} s, and killers at large")
    killed = exactly_once(log, records, enrich, seconds, console.print)
    verdicts = [verdict("exactly-once", killed.total(), none, none)]
    verdicts[0].others += [f"no {kind} was killed" for kind in sorted({*Chaos.ROUND}) if not killed[kind]]
    for semantics in modes:
        console.print(f"{semantics.replace('-', ' ')}: {deaths} workers die with {BATCH} flights in hand")
        died, in_hand = by_hand(log, semantics, enrich, deaths)
        most = semantics == "at-most-once"
        verdicts.append(verdict(semantics, died, in_hand if most else none, none if most else in_hand))
        if died != deaths:
            verdicts[-1].others.append(f"{died} workers died, not {deaths}")
    log.close()
    raftlog.shutdown(CLUSTER, force=True)
    return report(verdicts, len(records), console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; the exit code."""
    parser = argparse.ArgumentParser(description="Three delivery semantics side by side, under fire.")
    parser.add_argument("--flights", type=int, metavar="N", help="only the first N flights (all: 336,776)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="of random kills (60)")
    parser.add_argument("--deaths", type=int, default=12, metavar="D", help="in each of the other modes (12)")
    options = parser.parse_args(arguments)
    out = sys.stdout
    console = Console(file=out, highlight=False, width=None if out.isatty() else 110)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="raftlog-exactly-once-") as directory,
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),  # Ray has a paragraph there for each worker that dies
        ):
            try:
                return run(Path(directory), options.flights, options.seconds, options.deaths, console)
            finally:
                ray.shutdown()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
