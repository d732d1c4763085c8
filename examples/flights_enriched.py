"""What becomes of a flight when it is enriched, and the accounts of what was lost or doubled on the way. Pure
functions, so that a test can show that each of them can fail; and no pandas, which workers need not load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from flights_accounts import Flight

if TYPE_CHECKING:
    from raftlog.record.types import Record

KM_PER_MILE: Final = 1.609344
LATE_MINUTES: Final = 15


class Enriched(msgspec.Struct):
    """The value of a record that was enriched, as JSON."""

    row: int
    airline: str
    flight: str
    route: str
    destination: str | None
    """The airport's name, where the data set has it."""
    distance_km: int
    outcome: str
    """"cancelled", "diverted", "late" or "on time"."""


class Enricher:
    """Enriches one record. It is called with the same record more than once where a worker died over it.

    Args:
        airlines: name by code.
        airports: name by code.
    """

    def __init__(self, airlines: Mapping[str, str], airports: Mapping[str, str]) -> None:
        self._airlines = dict(airlines)
        self._airports = dict(airports)

    def __call__(self, record: Record) -> bytes:
        """The value that is written for it."""
        return self.enrich(record.value or b"")

    def enrich(self, value: bytes) -> bytes:
        """The same, of a record's value."""
        flight = msgspec.json.decode(value, type=Flight)
        return msgspec.json.encode(
            Enriched(
                row=flight.row,
                airline=self._airlines[flight.carrier],
                flight=f"{flight.carrier} {flight.flight}",
                route=f"{flight.origin}-{flight.dest}",
                destination=self._airports.get(flight.dest),
                distance_km=round(flight.distance * KM_PER_MILE),
                outcome=_outcome(flight.dep_delay, flight.arr_delay),
            )
        )


def _outcome(dep_delay: int | None, arr_delay: int | None) -> str:
    if dep_delay is None:
        return "cancelled"
    if arr_delay is None:
        return "diverted"
    return "late" if arr_delay >= LATE_MINUTES else "on time"


# -- the accounts


class _RowOnly(msgspec.Struct):
    row: int


@dataclass
class Tally:
    """What came out against what had to. ``problems`` holds a sentence for each record that is wrong in
    itself; ``lost`` and ``repeated`` hold rows: whether those are as they should be, depends on the mode."""

    records: int = 0
    lost: Counter[int] = field(default_factory=Counter)
    repeated: Counter[int] = field(default_factory=Counter)
    """Row -> how often it is there beyond the first time."""
    problems: list[str] = field(default_factory=list)


def compare(
    expected: Sequence[bytes], keys: Sequence[bytes | None], records: Iterable[Record], in_order: bool
) -> Tally:
    """Compare records with what was expected, by the row id in each value.

    Args:
        expected: by row, the value.
        keys: by row, the key.
        records: everything that the topic holds; in order within each partition.
        in_order: rows with a key must ascend in each partition, as they did where they came from.
    """
    tally = Tally()
    seen = Counter[int]()
    last: dict[int, int] = {}
    row_of = msgspec.json.Decoder(_RowOnly).decode
    for record in records:
        tally.records += 1
        where = f"partition {record.partition}, offset {record.offset}"
        try:
            row = row_of(record.value or b"").row
        except msgspec.DecodeError:
            row = -1
        if not 0 <= row < len(expected):
            tally.problems.append(f"{where} is no flight: {record.value!r:.80}")
            continue
        seen[row] += 1
        if (record.key, record.value) != (keys[row], expected[row]):
            tally.problems.append(f"{where}: flight {row} is not as pandas has it")
        if in_order and record.key is not None:
            if row < last.get(record.partition, -1):
                tally.problems.append(f"{where}: flight {row} comes after {last[record.partition]}")
            last[record.partition] = row
    tally.lost = Counter(row for row in range(len(expected)) if row not in seen)
    tally.repeated = Counter({row: times - 1 for row, times in seen.items() if times > 1})
    return tally


@dataclass
class Verdict:
    """One mode's line in the table, and what is wrong with it."""

    semantics: str
    deaths: int
    tally: Tally
    expected_lost: Counter[int]
    expected_repeated: Counter[int]
    others: list[str] = field(default_factory=list)
    """What else went wrong, a sentence each."""

    @property
    def lost(self) -> int:
        """Records that never came out."""
        return self.tally.lost.total()

    @property
    def repeated(self) -> int:
        """Records that came out beyond the first time."""
        return self.tally.repeated.total()

    def problems(self) -> list[str]:
        """A sentence for each thing that is not as it has to be; none if all is well."""
        problems = [*self.others, *self.tally.problems]
        for what, found, expected in (
            ("lost", self.tally.lost, self.expected_lost),
            ("there again", self.tally.repeated, self.expected_repeated),
        ):
            for row in sorted((found - expected).keys()):
                problems.append(f"flight {row} is {what}, and no crash explains it")
            for row in sorted((expected - found).keys()):
                problems.append(f"flight {row} is not {what}, although a crash had it in hand")
        return [f"{self.semantics}: {problem}" for problem in problems]

    def summary(self) -> str:
        """Its part of the last line."""
        return f"{self.semantics}: {self.lost} lost, {self.repeated} duplicated, {self.deaths} killed"
