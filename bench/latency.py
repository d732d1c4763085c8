"""Sequential acknowledged writes of 100 B: raftlog, the floor and a bare Ray actor call, in interleaved
rounds.

raftlog: replication 3, synced on a majority, three brokers as Ray actors, ``linger_ms=0``, one record a
call, wait for its result before the next. Once through the synchronous handles and once through
``raftlog.aio``. The floor is ``floor.py``: three bare processes. The Ray call is one async actor that
returns what it was given. Rounds are interleaved (A B C D, B C D A, …), so that noise of the machine hits all
alike; ratios are made within a round.

    python bench/latency.py [--rounds N] [--count N] [--json PATH]
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
import uvloop
from _ray import CLUSTER, echo_actor, new_topic, own_cluster
from _report import arguments, console, machine, percentile, show, spread, verdict, write
from floor import RECORD_BYTES, Floor

import raftlog.aio

if TYPE_CHECKING:
    from raftlog.client.log import Log

Contender = Callable[[int], list[float]]
"""Does so many calls one after another; seconds each."""

RAFTLOG: Final = "raftlog"
AIO: Final = "raftlog.aio"
FLOOR: Final = "floor"
RAY_CALL: Final = "Ray actor call"
UNCOUNTED: Final = 20
"""Calls at the beginning of each turn that do not count: caches and clocks are another's until then."""
FLOOR_AIM: Final = 1.5
"""raftlog's p50 against the floor's; against a Ray call it is 1."""


def produce_sync(producer: Any, topic: str, payload: bytes) -> Contender:
    """Through the synchronous handles."""

    def run(count: int) -> list[float]:
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            producer.send(topic, payload).result(10)
            times.append(time.perf_counter() - begin)
        return times

    return run


def produce_aio(runner: Any, producer: Any, topic: str, payload: bytes) -> Contender:
    """Through ``raftlog.aio``, on a uvloop loop of ours."""

    async def calls(count: int) -> list[float]:
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            await (await producer.send(topic, payload))
            times.append(time.perf_counter() - begin)
        return times

    return lambda count: runner.run(calls(count))


def call_ray(payload: bytes) -> Contender:
    """One bare async actor."""
    actor = echo_actor()

    def run(count: int) -> list[float]:
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            ray.get(actor.echo.remote(payload))
            times.append(time.perf_counter() - begin)
        return times

    return run


def measure(log: Log, floor: Floor, rounds: int, count: int) -> dict[str, list[list[float]]]:
    """Contender -> for each round, the seconds of each call."""
    payload = os.urandom(RECORD_BYTES)
    topic = new_topic(log, "latency", partitions=1)
    with (
        log.producer(linger_ms=0) as producer,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        aio_log = runner.run(raftlog.aio.connect(CLUSTER))
        aio_producer = runner.run(_aio_producer(aio_log))
        contenders: dict[str, Contender] = {
            RAFTLOG: produce_sync(producer, topic, payload),
            AIO: produce_aio(runner, aio_producer, topic, payload),
            FLOOR: lambda count: floor.sequential(count, payload),
            RAY_CALL: call_ray(payload),
        }
        for run in contenders.values():
            run(count)  # warm: connections, caches, files
        times: dict[str, list[list[float]]] = {name: [] for name in contenders}
        names = list(contenders)
        for turn in range(rounds):
            # Each round begins with another, so that none always follows the same one.
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                contenders[name](UNCOUNTED)
                times[name].append(contenders[name](count))
        runner.run(aio_producer.close())
        runner.run(aio_log.close())
    return times


async def _aio_producer(log: Any) -> Any:
    return log.producer(linger_ms=0)


def summarise(times: dict[str, list[list[float]]]) -> dict[str, Any]:
    """p50 and p99 of each contender in milliseconds, and ratios of p50 within rounds; medians over rounds."""
    p50 = {name: [percentile(one, 50) * 1e3 for one in rounds] for name, rounds in times.items()}
    p99 = {name: [percentile(one, 99) * 1e3 for one in rounds] for name, rounds in times.items()}
    ratios = {
        f"{name} / {other}": spread([a / b for a, b in zip(p50[name], p50[other], strict=True)])
        for name in (RAFTLOG, AIO)
        for other in (FLOOR, RAY_CALL)
    }
    return {
        "contenders": {name: {"p50_ms": spread(p50[name]), "p99_ms": spread(p99[name])} for name in times},
        "ratios_of_p50": ratios,
    }


def main() -> None:
    """Measure, print, write."""
    parser = arguments("Latency of a sequential acknowledged produce of 100 B.", "latency")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--count", type=int, default=300, help="calls per contender and round")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "latency",
        "machine": machine(),
        "rounds": options.rounds,
        "calls_per_round": options.count,
        "record_bytes": RECORD_BYTES,
        "replication": 3,
    }
    with (
        tempfile.TemporaryDirectory(prefix="raftlog-bench-") as directory,
        own_cluster() as log,
        Floor(Path(directory)) as floor,
    ):
        times = measure(log, floor, options.rounds, options.count)
    result |= summarise(times)
    report(result)
    write(options.json, result)
    console.print(f"written: {options.json.name}")


def report(result: dict[str, Any]) -> None:
    """Print the tables and what became of the aims."""
    rows = [
        [name, *(f"{one[key]['median']:.3f}" for key in ("p50_ms", "p99_ms")), _range(one["p50_ms"])]
        for name, one in result["contenders"].items()
    ]
    title = f"sequential acknowledged 100 B, {result['rounds']} rounds of {result['calls_per_round']} calls"
    show(title, ["", "p50 ms", "p99 ms", "p50, least to greatest"], rows)
    ratios = result["ratios_of_p50"]
    show(
        "ratios of p50 within a round",
        ["", "median", "least to greatest"],
        [[name, f"{one['median']:.2f}", _range(one)] for name, one in ratios.items()],
    )
    to_floor = ratios[f"{RAFTLOG} / {FLOOR}"]["median"]
    to_ray = ratios[f"{RAFTLOG} / {RAY_CALL}"]["median"]
    console.print(
        f"aim p50 at most {FLOOR_AIM} x the floor: {to_floor:.2f} x, {verdict(to_floor <= FLOOR_AIM)}"
    )
    console.print(f"aim p50 below one Ray actor call: {to_ray:.2f} x, {verdict(to_ray < 1)}")


def _range(values: dict[str, float]) -> str:
    return f"{values['min']:.3g} to {values['max']:.3g}"


if __name__ == "__main__":
    main()
