"""The results that are kept: one JSON file with a section for each work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from _report import RESULTS as FOLDER
from _report import machine, spread, write

RESULTS: Final = FOLDER / "bench.json"

Results = dict[str, Any]
"""Work -> its section: facts of its run, and contender -> metric -> median, min, max and rounds (or the one
key ``skipped``, with a reason)."""


def rounds_of(values: Sequence[float]) -> dict[str, Any]:
    """One metric's median, least and greatest, and each round."""
    return {**spread(values), "rounds": list(values)}


def facts(rounds: int) -> dict[str, Any]:
    """What goes with every section."""
    return {"machine": machine(), "rounds": rounds}


def read(path: Path = RESULTS) -> Results:
    """All sections; empty where there are none."""
    found: Results = json.loads(path.read_text())["works"] if path.exists() else {}
    return found


def script(name: str) -> dict[str, Any] | None:
    """What a benchmark that is a script of its own has left; None: nothing."""
    path = FOLDER / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def replace(path: Path, work: str, section: dict[str, Any]) -> None:
    """Put a work's section in the place of the one before."""
    works = read(path)
    works[work] = section
    write(path, {"benchmark": "bench", "works": works})


def metric(results: Results, work: str, contender: str, name: str) -> dict[str, Any] | None:
    """One metric; None where it was not measured."""
    found = results.get(work, {}).get("contenders", {}).get(contender, {}).get(name)
    return found if isinstance(found, dict) else None


def ratio(results: Results, work: str, name: str, one: str, other: str) -> float | None:
    """Of two contenders' metric in one work: the median of the ratios within rounds."""
    a, b = metric(results, work, one, name), metric(results, work, other, name)
    if a is None or b is None or len(a["rounds"]) != len(b["rounds"]):
        return None
    return float(median(x / y for x, y in zip(a["rounds"], b["rounds"], strict=True)))
