"""Flights are enriched as pandas does it, and the accounts of what came out can fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec
import pytest

from flights_data import enriched_by_pandas, read_flights, read_names, to_records
from flights_enriched import Enriched, Enricher, Verdict, compare
from raftlog.record.types import Record

TABLE = read_flights().iloc[:3_000]
SENT = to_records(TABLE)
KEYS = [sent.key for sent in SENT]
EXPECTED = enriched_by_pandas(TABLE)
PARTITIONS = 6


def as_written(row: int, **changes: object) -> Record:
    record = Record("enriched", row % PARTITIONS, row // PARTITIONS, 0, KEYS[row], EXPECTED[row], ())
    return msgspec.structs.replace(record, **changes)


def everything() -> list[Record]:
    return [as_written(row) for row in range(len(SENT))]


def verdict(records: list[Record], lost: set[int], repeated: set[int], in_order: bool = True) -> Verdict:
    tally = compare(EXPECTED, KEYS, records, in_order)
    return Verdict("at-some-times", 2, tally, Counter(lost), Counter(repeated))


def test_the_function_makes_what_pandas_makes() -> None:
    enrich = Enricher(*read_names())
    made = [enrich(Record("flights", 0, row, 0, *SENT[row][:2], ())) for row in range(len(SENT))]
    assert made == EXPECTED
    outcomes = {msgspec.json.decode(value, type=Enriched).outcome for value in made}
    assert outcomes == {"cancelled", "diverted", "late", "on time"}
    assert msgspec.json.decode(made[0], type=Enriched) == Enriched(
        row=0,
        airline="United Air Lines Inc.",
        flight="UA 1545",
        route="EWR-IAH",
        destination="George Bush Intercontinental",
        distance_km=2253,
        outcome="on time",
    )


def test_everything_once_is_well() -> None:
    found = verdict(everything(), set(), set())
    assert found.problems() == []
    assert found.summary() == "at-some-times: 0 lost, 0 duplicated, 2 killed"


def test_what_was_expected_to_be_lost_or_doubled_is_well() -> None:
    records = [each for each in everything() if each.value not in (EXPECTED[7], EXPECTED[8])]
    found = verdict(records, {7, 8}, set())
    assert (found.problems(), found.lost) == ([], 2)
    found = verdict([*everything(), as_written(7), as_written(9)], set(), {7, 9}, in_order=False)
    assert (found.problems(), found.repeated) == ([], 2)


def lose(records: list[Record]) -> None:
    del records[70]


def double(records: list[Record]) -> None:
    records.append(records[-1])


def alter(records: list[Record]) -> None:
    records[70] = as_written(70, value=EXPECTED[70].replace(b"distance_km", b"distance_mi"))


def alter_key(records: list[Record]) -> None:
    records[70] = as_written(70, key=b"N2")


def invent(records: list[Record]) -> None:
    records.append(as_written(70, value=b'{"row":3000}'))


def write_garbage(records: list[Record]) -> None:
    records.append(as_written(70, value=b"\xff"))


def swap(records: list[Record]) -> None:
    records[70], records[70 + PARTITIONS] = records[70 + PARTITIONS], records[70]


@pytest.mark.parametrize("tamper", [lose, double, alter, alter_key, invent, write_garbage, swap])
def test_one_record_that_is_not_right_is_told_of(tamper: Callable[[list[Record]], None]) -> None:
    records = everything()
    tamper(records)
    (problem,) = verdict(records, set(), set()).problems()
    assert problem.startswith("at-some-times: ")


def test_a_crash_that_cost_nothing_is_told_of() -> None:
    """What must be lost or doubled and is not: then the crash was not where it had to be."""
    assert verdict(everything(), {7}, set()).problems() == [
        "at-some-times: flight 7 is not lost, although a crash had it in hand"
    ]
    assert verdict(everything(), set(), {7}).problems() == [
        "at-some-times: flight 7 is not there again, although a crash had it in hand"
    ]
    others = [*everything(), as_written(8)]
    assert len(verdict(others, set(), {7}, in_order=False).problems()) == 2
    thrice = [*everything(), as_written(7), as_written(7)]
    assert len(verdict(thrice, set(), {7}, in_order=False).problems()) == 1
