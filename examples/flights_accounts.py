"""What the demo counts and compares: pure functions, so that a test can show that each of them can fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from raftlog.record.types import Record
    from raftlog.storage.verify import VerifyReport


# -- flights and carriers


@dataclass(slots=True)
class Flight:
    """The value of a record, as JSON. ``row`` is the flight's number in the data set: no two are alike."""

    row: int
    carrier: str
    flight: int
    tailnum: str | None
    origin: str
    dest: str
    distance: int
    scheduled: str
    dep_delay: int | None  # minutes; None: it never left
    arr_delay: int | None


class Sent(NamedTuple):
    """What one record must be when it is read again."""

    key: bytes | None
    value: bytes
    timestamp_ms: int


@dataclass
class CarrierTotals:
    """Delays of one carrier, in minutes; integers, so that sums agree exactly in any order."""

    flights: int = 0
    departed: int = 0
    dep_delay: int = 0
    arrived: int = 0
    arr_delay: int = 0


def add(totals: dict[str, CarrierTotals], flight: Flight) -> None:
    """Count one flight."""
    carrier = totals.get(flight.carrier)
    if carrier is None:
        carrier = totals[flight.carrier] = CarrierTotals()
    carrier.flights += 1
    if flight.dep_delay is not None:
        carrier.departed += 1
        carrier.dep_delay += flight.dep_delay
    if flight.arr_delay is not None:
        carrier.arrived += 1
        carrier.arr_delay += flight.arr_delay


def merged(parts: Iterable[dict[str, CarrierTotals]]) -> dict[str, CarrierTotals]:
    """The sum of several totals."""
    whole: dict[str, CarrierTotals] = {}
    for part in parts:
        for name, more in part.items():
            carrier = whole.setdefault(name, CarrierTotals())
            for attribute, value in vars(more).items():
                setattr(carrier, attribute, getattr(carrier, attribute) + value)
    return whole


# -- what was read back against what was sent


class Place(NamedTuple):
    """Where the acknowledgement said that a record is."""

    partition: int
    offset: int


class _RowOnly(msgspec.Struct):
    row: int


@dataclass
class Accounts:
    """What was read back against what was sent. ``problems`` holds a sentence for each difference."""

    acknowledged: int = 0
    consumed: int = 0
    lost: int = 0
    duplicated: int = 0
    problems: list[str] = field(default_factory=list)

    def summary(self, failover_ms: float) -> str:
        """The last line of the demo."""
        return (
            f"{self.acknowledged} acknowledged, {self.consumed} consumed, {self.lost} lost, "
            f"{self.duplicated} duplicated, failover {failover_ms:.0f} ms"
        )


def check_records(
    sent: Sequence[Sent], acknowledged: Sequence[Place | None] | None, records: Iterable[Record]
) -> Accounts:
    """Compare records read back with what was sent, by the row id in each value.

    Args:
        sent: by row id, what was sent.
        acknowledged: by row id, the place in its acknowledgement (None: none came). None altogether: it is no
            longer known, so every row must be there, anywhere.
        records: everything that the topic holds, in any order of partitions.

    Returns:
        Accounts; ``problems`` is empty only if each acknowledged record is there exactly once, where its
        acknowledgement said, with the key, value and timestamp that were sent, and nothing else is.
    """
    accounts = Accounts()
    accounts.acknowledged = (
        len(sent) if acknowledged is None else sum(place is not None for place in acknowledged)
    )
    seen = Counter[int]()
    row_of = msgspec.json.Decoder(_RowOnly).decode
    for record in records:
        accounts.consumed += 1
        try:
            row = row_of(record.value or b"").row
            expected = sent[row] if row >= 0 else None
        except (msgspec.DecodeError, IndexError):
            expected = None
        if expected is None:
            accounts.problems.append(f"{_where(record)} is no flight that was sent: {record.value!r:.80}")
            continue
        seen[row] += 1
        if (record.key, record.value, record.timestamp_ms) != expected:
            accounts.problems.append(f"{_where(record)}: flight {row} is not as it was sent")
        elif acknowledged is not None and acknowledged[row] not in (None, (record.partition, record.offset)):
            accounts.problems.append(
                f"{_where(record)}: flight {row} was acknowledged at {acknowledged[row]}"
            )
    for row in range(len(sent)):
        if acknowledged is not None and acknowledged[row] is None:
            accounts.problems.append(f"flight {row} was not acknowledged")
        elif not seen[row]:
            accounts.lost += 1
            accounts.problems.append(f"flight {row} is lost")
    for row, times in seen.items():
        if times > 1:
            accounts.duplicated += times - 1
            accounts.problems.append(f"flight {row} is there {times} times")
    return accounts


def _where(record: Record) -> str:
    return f"partition {record.partition}, offset {record.offset}"


def check_totals(found: dict[str, CarrierTotals], by_pandas: dict[str, CarrierTotals]) -> list[str]:
    """A sentence for each carrier whose totals differ."""
    return [
        f"carrier {name}: the consumers say {found.get(name)}, pandas says {by_pandas.get(name)}"
        for name in sorted(found.keys() | by_pandas.keys())
        if found.get(name) != by_pandas.get(name)
    ]


def check_replicas(
    reports: dict[str, VerifyReport], topic: str, partitions: int, replication: int
) -> list[str]:
    """A sentence for each partition whose replicas do not all hold the same bytes, and each damaged file.

    Args:
        reports: by the name of a broker's directory, what verify found in it.
        topic: whose partitions are compared.
        partitions: how many it has.
        replication: how many replicas there must be of each.
    """
    problems = [f"{name}: {problem}" for name, report in reports.items() for problem in report.problems]
    for partition in range(partitions):
        digests = {
            name: (row.end_offset, row.sha256)
            for name, report in reports.items()
            for row in report.replicas
            if (row.topic, row.partition) == (topic, partition)
        }
        if len(digests) != replication or len(set(digests.values())) != 1:
            problems.append(f"the replicas of partition {partition} differ on disk: {digests}")
    return problems
