"""The demo itself on a real Ray, with fewer flights: it ends well; a second run tells what has changed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
FLIGHTS = 6_000


def demo(data_dir: Path) -> tuple[int, list[str]]:
    """Exit code and lines of one run."""
    result = subprocess.run(
        [sys.executable, "examples/flights.py", "--data-dir", str(data_dir), "--flights", str(FLIGHTS)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, result.stdout.splitlines()


def test_twice_on_one_directory(tmp_path: Path) -> None:
    code, lines = demo(tmp_path)
    assert code == 0, lines
    pattern = rf"{FLIGHTS} acknowledged, {FLIGHTS} consumed, 0 lost, 0 duplicated, failover \d+ ms"
    assert re.fullmatch(pattern, lines[-1])
    assert sum(line.rstrip(" │").endswith("agrees") for line in lines) >= 15, "a line for each carrier"

    receipt = tmp_path / "receipt.json"
    places = json.loads(receipt.read_text())
    places[41][1] += 1
    receipt.write_text(json.dumps(places))
    code, lines = demo(tmp_path)
    assert (
        f"from the run before: {FLIGHTS} flights are still there, 0 lost, 0 duplicated, 1 differences"
        in lines
    )
    assert any("flight 41 was acknowledged at" in line for line in lines)
    assert re.fullmatch(pattern, lines[-1]), "this run itself lost nothing"
    assert code == 1
