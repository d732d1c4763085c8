"""A Ray Data pipeline that is exactly once: flights from a topic, enriched, into another topic.

Three brokers on a Ray of its own. The pipeline reads where its group is, and commits the group's new position
with its output, in one transaction. Amid the work one of Ray's workers is killed; Ray runs its task again.
Then the pipeline is run once more, as after a crash or by a scheduler: there is nothing left for it to do.

What came out is read back and compared with what pandas makes of the same data, record by record. The exit
code is 0 only if all of it agrees.

    python examples/pipeline.py [--flights N]
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.data
from rich.console import Console

import raftlog
from flights import start_ray
from flights_accounts import Sent
from flights_data import enriched_by_pandas, read_flights, read_names, to_records
from flights_enriched import Enricher, Tally, compare

if TYPE_CHECKING:
    from raftlog.client.log import Log

CLUSTER = "pipeline-demo"
SOURCE, TARGET, GROUP = "flights", "flights-enriched", "enrich"
PARTITIONS = 6
BROKERS = 3
PROBLEMS_SHOWN = 10


class Enrich:
    """What the pipeline does with a batch; kills its worker, once.

    Args:
        enricher: makes the new value of a record.
        death: a file that says that it has happened.
    """

    def __init__(self, enricher: Enricher, death: Path) -> None:
        self._enricher = enricher
        self._death = death

    def replace_values(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Keys stay as they are."""
        values = [self._enricher.enrich(value) for value in batch["value"]]
        if not self._death.exists():
            self._death.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"key": batch["key"], "value": values}


def send(log: Log, records: Sequence[Sent]) -> None:
    """The flights into the source topic."""
    with log.producer() as producer:
        for key, value, stamp in records:
            producer.send(SOURCE, value, key=key, timestamp_ms=stamp)


def run_pipeline(log: Log, enrich: Enrich) -> int:
    """The whole pipeline; returns how many records it has processed."""
    flights = raftlog.read_topic(SOURCE, group=GROUP, columns=["key", "value"], log=log)
    offsets = raftlog.offsets_of(flights)
    enriched = flights.map_batches(enrich.replace_values)
    raftlog.write_topic(enriched, TARGET, value="value", key="key", commit=(GROUP, offsets), log=log)
    return sum(end - offsets.starts[place] for place, end in offsets.items())


def read_back(log: Log, records: Sequence[Sent], expected: Sequence[bytes]) -> Tally:
    """Compare what is in the target topic with what pandas has."""
    with log.consumer(TARGET) as consumer:
        found = consumer.records(until="end")
        return compare(expected, [record.key for record in records], found, in_order=True)


def demonstrate(log: Log, directory: Path, flights: int | None, console: Console) -> int:
    """Run it twice and look at the outcome; the exit code."""
    table = read_flights().head(flights)
    records = to_records(table)
    for topic in (SOURCE, TARGET):
        log.create_topic(topic, partitions=PARTITIONS)
    send(log, records)
    console.print(f"{len(records):,} flights are in topic {SOURCE!r}")
    death = directory / "a-worker-died"
    enrich = Enrich(Enricher(*read_names()), death)
    processed = []
    for run in ("first", "second"):
        began = time.monotonic()
        processed.append(run_pipeline(log, enrich))
        console.print(f"{run} run: {processed[-1]:,} records processed in {time.monotonic() - began:.1f} s")
    tally = read_back(log, records, enriched_by_pandas(table))
    problems = list(tally.problems)
    if processed != [len(records), 0]:
        problems.append(f"the runs processed {processed} records, not {len(records)} and none")
    if not death.exists():
        problems.append("no worker was killed")
    for problem in problems[:PROBLEMS_SHOWN]:
        console.print(problem, style="red", markup=False)
    lost, repeated = tally.lost.total(), tally.repeated.total()
    console.print(
        f"{tally.records:,} records came out: {lost} lost, {repeated} duplicated, {len(tally.problems)} not "
        "as pandas has them; 1 worker killed"
    )
    return 1 if problems or lost or repeated else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; the exit code."""
    parser = argparse.ArgumentParser(description="An exactly-once Ray Data pipeline from topic to topic.")
    parser.add_argument("--flights", type=int, metavar="N", help="only the first N flights (all: 336,776)")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    start_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory(prefix="raftlog-pipeline-") as directory:
            log = raftlog.start(CLUSTER, brokers=BROKERS, data_dir=str(Path(directory) / "log"))
            try:
                return demonstrate(log, Path(directory), options.flights, console)
            finally:
                log.close()
                raftlog.shutdown(CLUSTER, force=True)
    except KeyboardInterrupt:
        return 130
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
