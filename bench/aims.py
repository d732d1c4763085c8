"""What raftlog aims at, as data; and what became of it.

A limit on the ratio of two contenders is judged by the median of the ratios within rounds of one run. Where
nothing was measured an aim is open, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import ge, le
from typing import Final

from store import Results, metric, ratio, script
from transactions import KAFKA, SERIAL

Measure = Callable[[Results], float | None]


@dataclass(frozen=True)
class Limit:
    """One number that has a bound.

    Args:
        text: what it is, with the bound.
        measure: finds it in the results; None: it was not measured.
        holds: ``le`` or ``ge``.
        bound: in the unit of the number.
    """

    text: str
    measure: Measure
    holds: Callable[[float, float], bool]
    bound: float


@dataclass(frozen=True)
class Aim:
    """What is aimed at: all of its limits.

    Args:
        what: in tables.
        limits: each is judged by itself.
        decides: whether it is one of those that matter most.
    """

    what: str
    limits: tuple[Limit, ...]
    decides: bool = False


@dataclass(frozen=True)
class Verdict:
    """What became of one limit of an aim."""

    aim: Aim
    limit: Limit
    value: float | None

    @property
    def word(self) -> str:
        """For the table."""
        if self.value is None:
            return "not measured"
        return "reached" if self.limit.holds(self.value, self.limit.bound) else "missed"

    @property
    def number(self) -> str:
        """The value, rounded as it deserves."""
        if self.value is None:
            return ""
        return f"{self.value:,.0f}" if abs(self.value) >= 1000 else f"{self.value:.3g}"

    def line(self) -> str:
        """For the terminal."""
        return f"{self.word:>12}  {self.aim.what}: {self.limit.text}: {self.number}"


def against(work: str, name: str, other: str, bound: float, label: str, *, less: bool) -> Limit:
    """raftlog's share of another contender's figure."""
    text = f"{'at most' if less else 'at least'} {bound:g} x {label}"
    return Limit(
        text, lambda results: ratio(results, work, name, "raftlog", other), le if less else ge, bound
    )


def value(work: str, name: str, bound: float, text: str, *, less: bool, scale: float = 1.0) -> Limit:
    """A figure of raftlog itself, ``scale`` times what is in the results."""

    def measure(results: Results) -> float | None:
        found = metric(results, work, "raftlog", name)
        return None if found is None else found["median"] * scale

    return Limit(text, measure, le if less else ge, bound)


def within(work: str, name: str, base: str, bound: float, text: str) -> Limit:
    """One of raftlog's own figures against another of the same run."""

    def measure(results: Results) -> float | None:
        one, other = metric(results, work, "raftlog", name), metric(results, work, "raftlog", base)
        return None if one is None or other is None else one["median"] / other["median"]

    return Limit(text, measure, le, bound)


def of_plain(_results: Results) -> float | None:
    """Transactions one after another, as a share of plain produce: of ``transactions.py``."""
    found = script("transactions")
    return None if found is None else float(found["contenders"][SERIAL]["ratio_to_plain"]["median"])


def worst_of(kind: str) -> Measure:
    """The worst acknowledgement in the steps of that kind, in ms: of ``elastic.py``."""

    def measure(_results: Results) -> float | None:
        found = script("elastic")
        if found is None:
            return None
        return max(float(one["worst_ms"]) for one in found["steps"] if one["kind"] == kind)

    return measure


def killed(name: str) -> Measure:
    """From the kill of a leader's broker to the next acknowledgement, in ms: of ``failover.py``."""

    def measure(_results: Results) -> float | None:
        found = script("failover")
        return None if found is None else float(found["failover"]["all"][name])

    return measure


def of_kafka(_results: Results) -> float | None:
    """The same against Kafka's transactions."""
    found = script("transactions")
    if found is None or KAFKA not in found["contenders"]:
        return None
    ours, theirs = (found["contenders"][name]["records_per_second"]["median"] for name in (SERIAL, KAFKA))
    return float(ours / theirs)


_LATENCY: Final = ("latency-100", "p50_ms")
_BATCH: Final = ("batch-100", "records_per_s")
_BULK: Final = ("bulk-1000000", "mb_per_s")

AIMS: Final[tuple[Aim, ...]] = (
    Aim(
        "sequential acknowledgement p50, 100 B, synced",
        (
            against(*_LATENCY, "nats-sync", 0.6, "NATS synced", less=True),
            against(*_LATENCY, "nats", 1.0, "NATS unsynced", less=True),
            against(*_LATENCY, "floor", 1.3, "the floor", less=True),
        ),
        decides=True,
    ),
    Aim(
        "the same, p99",
        (against("latency-100", "p99_ms", "nats-sync", 1.0, "NATS synced", less=True),),
    ),
    Aim(
        "`send`, one record a call, 100 B",
        (
            value("send-100", "records_per_s", 250_000, "at least 250,000 records/s", less=False),
            against("send-100", "records_per_s", "nats", 8.0, "NATS unsynced, pipelined", less=False),
        ),
    ),
    Aim(
        "`send_batch`, 100 B",
        (
            value(*_BATCH, 700_000, "at least 700,000 records/s", less=False),
            against(*_BATCH, "kafka", 1.0, "Kafka", less=False),
        ),
        decides=True,
    ),
    Aim(
        "1 MB batches, synced",
        (
            against(*_BULK, "floor", 0.85, "the floor", less=False),
            against(*_BULK, "floor-keeps", 0.85, "the floor that keeps what it is given", less=False),
            against(*_BULK, "nats", 1.3, "NATS unsynced", less=False),
            against(*_BULK, "kafka", 1.0, "Kafka", less=False),
        ),
        decides=True,
    ),
    Aim(
        "consume, one consumer",
        (
            value("consume", "records_per_s", 1_000_000, "at least 1,000,000 records/s", less=False),
            value(
                "columns", "records_per_s", 3_000_000, "at least 3,000,000 records/s as columns", less=False
            ),
            against("consume", "records_per_s", "kafka", 1.0, "Kafka", less=False),
        ),
        decides=True,
    ),
    Aim(
        "producer to consumer p50, synced",
        (value("end-to-end", "ratio_to_ack", 1.5, "at most 1.5 x the acknowledgement", less=True),),
    ),
    Aim(
        "1,000 idle partitions x 3 replicas on 3 brokers, the busiest broker",
        (
            value("many-partitions", "idle_cores", 3.0, "at most 3 % of a core", less=True, scale=100.0),
            value("many-partitions", "kb_per_replica", 60.0, "at most 60 KB a replica", less=True),
        ),
        decides=True,
    ),
    Aim(
        "acknowledgement p50 with 64 partitions written at once",
        (within("many-partitions", "ack_64_at_once_p50_ms", "ack_p50_ms", 1.5, "at most 1.5 x that of one"),),
    ),
    Aim(
        "acknowledgement p50 with 1,000 partitions open, each record to the next",
        (within("many-partitions", "ack_open_next_p50_ms", "ack_p50_ms", 1.2, "at most 1.2 x that of one"),),
    ),
    Aim(
        "broker start with 1,000 replicas and 5 GB, until each can vote",
        (value("broker-start", "votes_s", 5.0, "at most 5 s", less=True),),
    ),
    Aim(
        "transactions of 1,000 records over 3 partitions",
        (
            Limit("at least 0.8 x plain", of_plain, ge, 0.8),
            Limit("at least 1 x Kafka's", of_kafka, ge, 1.0),
        ),
    ),
    Aim(
        "worst acknowledgement while nodes join and drain, and leaders move",
        (Limit("at most 100 ms", worst_of("planned"), le, 100.0),),
    ),
    Aim(
        "a leader's broker is killed",
        (
            Limit("p50 at most 150 ms", killed("p50_ms"), le, 150.0),
            Limit("at most 1,000 ms", killed("max_ms"), le, 1000.0),
        ),
    ),
    Aim(
        "worst acknowledgement when a node is killed",
        (Limit("at most 2,500 ms", worst_of("node kill"), le, 2500.0),),
    ),
)


def judge(results: Results) -> list[Verdict]:
    """Every limit of every aim."""
    return [Verdict(aim, limit, limit.measure(results)) for aim in AIMS for limit in aim.limits]
