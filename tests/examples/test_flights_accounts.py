"""The demo's accounts can fail: one record dropped, doubled or altered, and it exits with 1."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pandas as pd
import pytest
from rich.console import Console

import flights
import flights_accounts
from flights_accounts import CarrierTotals, Flight, Place
from flights_data import to_records, totals_by_pandas
from raftlog.record.types import Record

TABLE = pd.DataFrame(
    {
        "time_hour": ["2013-01-01T10:00:00Z", "2013-07-01T23:00:00Z", "2013-01-01T10:00:00Z"] * 4,
        "minute": [15, 0, 59] * 4,
        "dep_delay": [2.0, None, -4.0] * 4,
        "arr_delay": [11.0, None, None] * 4,
        "carrier": ["UA", "AA", "UA"] * 4,
        "flight": range(12),
        "tailnum": ["N14228", "N1", None] * 4,
        "origin": ["EWR", "LGA", "JFK"] * 4,
        "dest": ["IAH", "MIA", "BQN"] * 4,
        "distance": [1400, 1089, 1576] * 4,
    }
)
SENT = to_records(TABLE)
PLACES = [Place(row % 6, row // 6) for row in range(len(SENT))]


def as_read(row: int, **changes: Any) -> Record:
    key, value, stamp = SENT[row]
    record = Record("flights", *PLACES[row], timestamp_ms=stamp, key=key, value=value)
    return msgspec.structs.replace(record, **changes)


def exit_code(
    records: list[Record], places: list[Place | None], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    accounts = flights_accounts.check_records(SENT, places, records)
    code = flights.report(accounts, [], 41.6, Console(file=io.StringIO()))
    return code, capsys.readouterr().out.splitlines()[-1]


def test_a_flight_is_stamped_with_its_real_departure() -> None:
    left, cancelled, early = SENT[:3]
    assert left.timestamp_ms == 1_357_035_420_000  # 2013-01-01 05:17 in New York
    assert cancelled.timestamp_ms == 1_372_719_600_000  # never left: 2013-07-01 19:00 as scheduled
    assert early.timestamp_ms == 1_357_037_700_000  # four minutes before 05:59
    assert (left.key, early.key) == (b"N14228", None)
    flight = msgspec.json.decode(left.value, type=Flight)
    assert (flight.row, flight.carrier, flight.scheduled, flight.dep_delay) == (
        0,
        "UA",
        "2013-01-01T10:15Z",
        2,
    )
    assert msgspec.json.decode(cancelled.value)["dep_delay"] is None


def test_everything_as_it_was_sent_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = exit_code([as_read(row) for row in range(12)], list(PLACES), capsys)
    assert code == 0
    assert line == "12 acknowledged, 12 consumed, 0 lost, 0 duplicated, failover 42 ms"


def drop(records: list[Record]) -> None:
    del records[7]


def double(records: list[Record]) -> None:
    records.append(as_read(7, offset=99))


def alter_value(records: list[Record]) -> None:
    records[7] = as_read(7, value=SENT[7].value.replace(b"MIA", b"MIB"))


def alter_key(records: list[Record]) -> None:
    records[7] = as_read(7, key=b"N2")


def alter_timestamp(records: list[Record]) -> None:
    records[7] = as_read(7, timestamp_ms=SENT[7].timestamp_ms + 1)


def alter_row(records: list[Record]) -> None:
    records[7] = as_read(7, value=SENT[7].value.replace(b'"row":7', b'"row":8'))


def alter_to_no_row(records: list[Record]) -> None:
    records[7] = as_read(7, value=SENT[7].value.replace(b'"row":7', b'"row":-1'))


def alter_to_garbage(records: list[Record]) -> None:
    records[7] = as_read(7, value=b"\xff")


def alter_to_nothing(records: list[Record]) -> None:
    records[7] = as_read(7, value=None)


def move(records: list[Record]) -> None:
    records[7] = as_read(7, partition=5, offset=77)


def invent(records: list[Record]) -> None:
    records.append(as_read(7, value=SENT[7].value.replace(b'"row":7', b'"row":12'), offset=99))


@pytest.mark.parametrize(
    ("tamper", "counts"),
    [
        (drop, "12 acknowledged, 11 consumed, 1 lost, 0 duplicated"),
        (double, "12 acknowledged, 13 consumed, 0 lost, 1 duplicated"),
        (alter_value, "12 acknowledged, 12 consumed, 0 lost, 0 duplicated"),
        (alter_key, "12 acknowledged, 12 consumed, 0 lost, 0 duplicated"),
        (alter_timestamp, "12 acknowledged, 12 consumed, 0 lost, 0 duplicated"),
        (alter_row, "12 acknowledged, 12 consumed, 1 lost, 1 duplicated"),
        (alter_to_no_row, "12 acknowledged, 12 consumed, 1 lost, 0 duplicated"),
        (alter_to_garbage, "12 acknowledged, 12 consumed, 1 lost, 0 duplicated"),
        (alter_to_nothing, "12 acknowledged, 12 consumed, 1 lost, 0 duplicated"),
        (move, "12 acknowledged, 12 consumed, 0 lost, 0 duplicated"),
        (invent, "12 acknowledged, 13 consumed, 0 lost, 0 duplicated"),
    ],
)
def test_one_record_that_is_not_right_exits_1(
    tamper: Callable[[list[Record]], None], counts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [as_read(row) for row in range(12)]
    tamper(records)
    code, line = exit_code(records, list(PLACES), capsys)
    assert code == 1
    assert line == f"{counts}, failover 42 ms"


def test_a_flight_that_was_not_acknowledged_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    places: list[Place | None] = [*PLACES[:11], None]
    code, line = exit_code([as_read(row) for row in range(12)], places, capsys)
    assert code == 1
    assert line.startswith("11 acknowledged, 12 consumed")


def test_another_problem_alone_exits_1() -> None:
    out = io.StringIO()
    assert flights.report(flights_accounts.Accounts(), ["replicas differ"], 1, Console(file=out)) == 1
    assert "replicas differ" in out.getvalue()


def test_totals_are_pandas_own_and_a_difference_is_named() -> None:
    found: dict[str, CarrierTotals] = {}
    for record in SENT:
        flights_accounts.add(found, msgspec.json.decode(record.value, type=Flight))
    assert found["UA"] == CarrierTotals(flights=8, departed=8, dep_delay=-8, arrived=4, arr_delay=44)
    by_pandas = totals_by_pandas(TABLE)
    assert flights_accounts.check_totals(found, by_pandas) == []
    assert flights_accounts.check_totals(flights_accounts.merged([found, {}]), by_pandas) == []
    assert len(flights_accounts.check_totals(flights_accounts.merged([found, found]), by_pandas)) == 2
    found["UA"].dep_delay += 1
    assert [line[:10] for line in flights_accounts.check_totals(found, by_pandas)] == ["carrier UA"]
    del found["AA"]
    assert len(flights_accounts.check_totals(found, by_pandas)) == 2


def reports(**digests: str) -> dict[str, Any]:
    return {
        name: SimpleNamespace(
            problems=[],
            replicas=[
                SimpleNamespace(topic="flights", partition=p, end_offset=9, sha256=f"{digest}{p}")
                for p in range(6)
            ],
        )
        for name, digest in digests.items()
    }


def compared(found: dict[str, Any]) -> list[str]:
    return flights_accounts.check_replicas(found, "flights", partitions=6, replication=3)


def test_replicas_are_compared() -> None:
    assert compared(reports(a="x", b="x", c="x")) == []
    assert len(compared(reports(a="x", b="x", c="y"))) == 6
    assert len(compared(reports(a="x", b="x"))) == 6
    damaged = reports(a="x", b="x", c="x")
    damaged["b"].problems.append("journal/0: crc")
    assert compared(damaged) == ["b: journal/0: crc"]
    short = reports(a="x", b="x", c="x")
    short["c"].replicas[0].end_offset = 8
    assert len(compared(short)) == 1
    missing = reports(a="x", b="x", c="x")
    del missing["c"].replicas[4]
    assert [line[:30] for line in compared(missing)] == ["the replicas of partition 4 di"]
