"""What is measured: the works that contenders do in turn."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from _report import percentile
from contenders.base import UNCOUNTED, Contender, Turn

SYNCED: Final = ("raftlog", "floor", "nats-sync")
STREAMS: Final = ("raftlog", "raftlog-interval", "nats-sync", "nats", "kafka")
ALL: Final = ("raftlog", "raftlog-interval", "floor", "nats-sync", "nats", "kafka", "ray-queue", "ray-actor")
BATCHED: Final = ("raftlog", "raftlog-interval", "floor", "floor-keeps", "kafka", "ray-queue")
BULK: Final = (
    "raftlog",
    "raftlog-interval",
    "floor",
    "floor-keeps",
    "nats-sync",
    "nats",
    "kafka",
    "ray-queue",
)
PARTITIONED: Final = ("raftlog", "raftlog-interval", "kafka")

CALL_RECORDS: Final = 10_000
CALL_BYTES: Final = 1_000_000
PROBE_SHARE: Final = 0.4
"""Of a turn, to find the maximum before the load is halved."""

Metrics = dict[str, float]


@dataclass(frozen=True)
class Size:
    """How long each turn takes.

    Args: rounds: turns of each contender. calls: sequential calls in a turn. seconds: of a turn that is
        bounded by time. warm_s: for which every contender sends one record after another, up to ten times
        as long if it still gets quicker, and then as many as it can, before anything counts.
    """

    rounds: int
    calls: int
    seconds: float
    warm_s: float


SIZES: Final = {
    "tiny": Size(rounds=1, calls=30, seconds=0.2, warm_s=0.2),
    "quick": Size(rounds=3, calls=200, seconds=0.5, warm_s=1.5),
    "full": Size(rounds=7, calls=600, seconds=3.0, warm_s=10.0),
}


@dataclass(frozen=True)
class Work:
    """One thing to do.

    Args:
        name: in JSON and on the command line.
        group: works of one group share a table and a plot.
        column: its heading there.
        metric: what the table shows, with its unit last in the name.
        do: takes a turn: (contender, topic, size) -> metrics; and the records that the topic must hold then.
        contenders: who takes part.
        partitions: of the topic.
    """

    name: str
    group: str
    column: str
    metric: str
    do: Callable[[Contender, str, Size], tuple[Metrics, int | None]]
    contenders: tuple[str, ...]
    partitions: int = 1


def values_of(record_bytes: int) -> list[bytes]:
    """Different random values of one size, as many as one call of ``send_batch`` takes; they do not
    compress."""
    count = max(1, min(CALL_RECORDS, CALL_BYTES // record_bytes))
    return [os.urandom(record_bytes) for _ in range(count)]


def latency(record_bytes: int, contender: Contender, topic: str, size: Size) -> tuple[Metrics, int | None]:
    """One acknowledged record after another."""
    times = contender.sequential(topic, os.urandom(record_bytes), size.calls)
    return quantiles(times), size.calls


def half_load(record_bytes: int, contender: Contender, topic: str, size: Size) -> tuple[Metrics, int | None]:
    """Open-loop load of half of what ``send`` has just been seen to reach."""
    most = contender.send(topic, values_of(record_bytes), size.seconds * PROBE_SHARE)
    rate = most.records / most.seconds / 2
    times, sent = contender.paced(topic, os.urandom(record_bytes), rate, size.seconds)
    return {**quantiles(times), "records_per_s": rate}, most.records + UNCOUNTED + sent


def send(record_bytes: int, contender: Contender, topic: str, size: Size) -> tuple[Metrics, int | None]:
    """One record a call."""
    turn = contender.send(topic, values_of(record_bytes), size.seconds)
    return rates(turn), turn.records


def send_batch(record_bytes: int, contender: Contender, topic: str, size: Size) -> tuple[Metrics, int | None]:
    """Lists of records."""
    turn = contender.send_batch(topic, values_of(record_bytes), size.seconds)
    return rates(turn), turn.records


def consume(columns: bool, contender: Contender, topic: str, size: Size) -> tuple[Metrics, int | None]:
    """Read back what the contender itself wrote in the same time, in the fastest way that it has."""
    fill = contender.send_batch if type(contender).send_batch is not Contender.send_batch else contender.send
    written = fill(topic, values_of(100), size.seconds).records + UNCOUNTED
    turn = (contender.consume_columns if columns else contender.consume)(topic, written)
    read = turn.untimed + turn.records
    assert read == written, f"{read} records read, {written} written"
    turn.bytes = turn.records * 100
    return rates(turn), None


def end_to_end(contender: Contender, topic: str, size: Size) -> tuple[Metrics, int | None]:
    """A consumer waits for each record; then acknowledgements alone, on a topic of their own, to compare."""
    value, own = os.urandom(100), f"{topic}-read"
    contender.create(own, 1)
    try:
        found = quantiles(contender.end_to_end(own, value, size.calls))
    finally:
        contender.delete(own)
    acknowledged = quantiles(contender.sequential(topic, value, size.calls))["p50_ms"]
    return {**found, "ratio_to_ack": found["p50_ms"] / acknowledged}, size.calls


def quantiles(times: list[float]) -> Metrics:
    """p50 and p99 in milliseconds."""
    return {"p50_ms": percentile(times, 50) * 1e3, "p99_ms": percentile(times, 99) * 1e3}


def rates(turn: Turn) -> Metrics:
    """Per second, and the processor time of all servers together per million records and per GB of values."""
    return {
        "records_per_s": turn.records / turn.seconds,
        "mb_per_s": turn.bytes / turn.seconds / 1e6,
        "server_cpu_s_per_million": turn.server_cpu_s / turn.records * 1e6,
        "server_cpu_s_per_gb": turn.server_cpu_s / turn.bytes * 1e9,
        "client_cpu_s_per_million": turn.client_cpu_s / turn.records * 1e6,
    }


def _work(
    name: str, group: str, column: str, metric: str, do: Any, who: tuple[str, ...], **more: int
) -> Work:
    return Work(name, group, column, metric, do, who, **more)


_SIZES: Final = ((100, "100 B"), (1_000, "1 KB"), (10_000, "10 KB"), (100_000, "100 KB"))

WORKS: Final[tuple[Work, ...]] = (
    *(
        _work(f"latency-{size}", "latency", text, "p50_ms", partial(latency, size), ("raftlog-aio", *ALL))
        for size, text in _SIZES
    ),
    _work("half-load", "half-load", "100 B", "p50_ms", partial(half_load, 100), STREAMS),
    _work("end-to-end", "end-to-end", "100 B", "p50_ms", end_to_end, (*STREAMS, "ray-queue")),
    *(
        _work(f"send-{size}", "send", text, "records_per_s", partial(send, size), ALL)
        for size, text in _SIZES[:2]
    ),
    *(
        _work(f"batch-{size}", "batch", text, "records_per_s", partial(send_batch, size), BATCHED)
        for size, text in _SIZES[:2]
    ),
    *(
        _work(f"bulk-{size}", "bulk", text, "mb_per_s", partial(send, size), BULK)
        for size, text in ((100_000, "100 KB"), (1_000_000, "1 MB"))
    ),
    _work("consume", "consume", "records", "records_per_s", partial(consume, False), (*STREAMS, "ray-queue")),
    _work("columns", "consume", "columns", "records_per_s", partial(consume, True), STREAMS),
    *(
        _work(
            f"partitions-{count}",
            "partitions",
            str(count),
            "records_per_s",
            partial(send_batch, 100),
            PARTITIONED,
            partitions=count,
        )
        for count in (1, 8, 64, 512)
    ),
)
