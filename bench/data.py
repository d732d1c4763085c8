"""Ray Data: read_topic and write_topic, against Parquet files of the same data and read_kafka on a Kafka.

Three brokers as Ray actors (or of Kafka, never both at once) on this machine, replicated three times. A file
is columns that one process wrote; a topic is records that anybody may append to at any time, so how much of
Parquet's speed is reached is told, and not aimed at. The aim is three times read_kafka, where Java is there.

    python bench/data.py [--mb N] [--rounds N] [--json PATH]
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

os.environ["RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"] = "1"  # read when Ray Data is imported, here and in tasks
# By itself each read_parquet starts 32 actors for the files' footers and ends them: a minute on two cores,
# which says nothing of Parquet.

import pyarrow as pa
import ray
import ray.data
from _ray import own_cluster, own_ray
from _report import arguments, console, machine, show, spread, verdict, write
from contenders.base import Unavailable
from contenders.on_kafka import BULK, Kafka, KafkaBrokers, drain, produce

import raftlog

if TYPE_CHECKING:
    from raftlog.client.log import Log

PARTITIONS: Final = 6
SIZES: Final = (200, 10_000)
"""Bytes of a value."""
AIM_KAFKA: Final = 3.0
RANDOM_PART: Final = 2
"""One byte in so many is random: about what JSON compresses to."""


def values(size: int, total: int) -> list[bytes]:
    """Values of that size, half of each random."""
    random = Random(size)
    half = size // RANDOM_PART
    return [random.randbytes(half) + bytes(size - half) for _ in range(total // size)]


def dataset(made: list[bytes], blocks: int) -> Any:
    """The values in the object store, with a key each."""
    table = pa.table({"key": [b"%d" % number for number in range(len(made))], "value": made})
    step = -(-len(made) // blocks)
    return ray.data.from_arrow([table.slice(at, step) for at in range(0, len(made), step)]).materialize()


def timed(name: str, work: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each round; one goes before that does not count."""
    console.print(name)
    work()
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
        console.print(f"  {took[-1]:.2f} s")
    return took


def rates(seconds: list[float], records: int, size: int) -> dict[str, Any]:
    """Records and MB per second."""
    return {
        "records_per_s": spread([records / each for each in seconds]),
        "mb_per_s": spread([records * size / each / 1e6 for each in seconds]),
    }


def read_all(ds: Any, expected: int) -> None:
    """Have everything in the object store."""
    found = ds.materialize().count()
    assert found == expected, f"{found} records instead of {expected}"


def on_raftlog(mb: int, rounds: int) -> dict[str, Any]:
    """Topics and Parquet files, on the same Ray."""
    result: dict[str, Any] = {}
    with own_cluster() as log, tempfile.TemporaryDirectory(prefix="raftlog-bench-") as directory:
        quiet()
        for size in SIZES:
            made = values(size, mb * 1_000_000)
            ds = dataset(made, 8)
            topic, files = f"values-{size}", Path(directory) / f"values-{size}"
            log.create_topic(topic, partitions=PARTITIONS)
            raftlog.write_topic(ds, topic, value="value", key="key", log=log)
            raftlog.read_topic(topic, log=log).write_parquet(str(files))
            work: dict[str, Callable[[], Any]] = {
                "read_topic": partial(read_topic, log, topic, len(made)),
                "read_parquet": partial(read_parquet, files, len(made)),
                "write_topic": partial(write_anew, log, ds, f"written-{size}"),
                "write_parquet": partial(files_anew, ds, Path(directory) / f"written-{size}"),
            }
            result[str(size)] = {
                name: rates(timed(f"{name}, {size} B", each, rounds), len(made), size)
                for name, each in work.items()
            }
    return result


def read_topic(log: Log, topic: str, expected: int) -> None:
    """A topic into the object store."""
    read_all(raftlog.read_topic(topic, log=log), expected)


def read_parquet(folder: Path, expected: int) -> None:
    """Files into the object store."""
    read_all(ray.data.read_parquet(str(folder)), expected)


def read_kafka(servers: list[str], topic: str, expected: int) -> None:
    """A topic of Kafka's into the object store."""
    read_all(ray.data.read_kafka(topic, bootstrap_servers=servers), expected)


def write_anew(log: Log, ds: Any, topic: str) -> None:
    """Into a topic that is empty."""
    if topic in log.topics():
        log.delete_topic(topic)
    log.create_topic(topic, partitions=PARTITIONS)
    raftlog.write_topic(ds, topic, value="value", key="key", log=log)


def files_anew(ds: Any, folder: Path) -> None:
    """Into a folder that is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    ds.write_parquet(str(folder))


@contextmanager
def running_kafka() -> Iterator[KafkaBrokers]:
    """Three brokers, their data in a temporary folder.

    Raises:
        Unavailable: no Java.
    """
    with tempfile.TemporaryDirectory(prefix="raftlog-bench-") as directory:
        system = KafkaBrokers()
        try:
            system.start(Path(directory) / "kafka")
            yield system
        finally:
            system.stop()


def on_kafka(mb: int, rounds: int) -> dict[str, Any]:
    """read_kafka of the same values."""
    result: dict[str, Any] = {}
    with running_kafka() as system:
        kafka = Kafka(system)
        with own_ray():
            quiet()
            for size in SIZES:
                made = values(size, mb * 1_000_000)
                topic = f"values-{size}"
                kafka.create(topic, PARTITIONS)
                producer = kafka._producer({**BULK, "compression.type": "lz4"})
                for value in made:
                    produce(producer, topic, value)
                drain(producer)
                read = partial(read_kafka, system.servers.split(","), topic, len(made))
                result[str(size)] = {
                    "read_kafka": rates(timed(f"read_kafka, {size} B", read, rounds), len(made), size)
                }
    return result


def quiet() -> None:
    """Nothing on the terminal but the result."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def report(result: dict[str, Any]) -> None:
    """The table, shares of Parquet's speed, and the aim."""
    rows = []
    for size, found in result["sizes"].items():
        for name, rate in found.items():
            other = name.replace("topic", "parquet").replace("kafka", "parquet")
            share = rate["mb_per_s"]["median"] / found[other]["mb_per_s"]["median"]
            rows.append(
                [
                    f"{name}, {size} B",
                    f"{rate['records_per_s']['median']:,.0f}",
                    f"{rate['mb_per_s']['median']:,.0f}",
                    f"{share:.0%}",
                ]
            )
    show("Ray Data", ("what", "records/s", "MB/s", "of Parquet"), rows)
    for size, times in result["times_read_kafka"].items():
        console.print(f"{size} B: {times:.1f} times read_kafka: {verdict(times >= AIM_KAFKA)}")


def main() -> int:
    """Measure and report."""
    parser = arguments("Ray Data: topics against Parquet files and read_kafka.", "data")
    parser.add_argument("--mb", type=int, default=200, help="of values, per size")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    facts = machine()
    sizes = on_raftlog(options.mb, options.rounds)
    times: dict[str, float] = {}
    try:
        for size, found in on_kafka(options.mb, options.rounds).items():
            ours = sizes[size]["read_topic"]["records_per_s"]["median"]
            times[size] = ours / found["read_kafka"]["records_per_s"]["median"]
            sizes[size] |= found
    except Unavailable as reason:
        console.print(f"without Kafka: {reason}")
    result = {"machine": facts, "mb": options.mb, "sizes": sizes, "times_read_kafka": times}
    report(result)
    write(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
