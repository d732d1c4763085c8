"""The example itself on a real Ray, with fewer flights and for a shorter time: luck has no part in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
FLIGHTS = 20_000
DEATHS = 2
IN_HAND = 500


def test_the_three_semantics() -> None:
    """Killed at random: nothing lost or doubled. Killed at the worst moment: exactly what was in hand."""
    arguments = ["--flights", str(FLIGHTS), "--seconds", "10", "--deaths", str(DEATHS)]
    result = subprocess.run(
        [sys.executable, "examples/exactly_once.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in result.stderr, result.stderr
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout
    cost = DEATHS * IN_HAND
    killed = re.fullmatch(
        rf"{FLIGHTS} flights; exactly-once: 0 lost, 0 duplicated, (\d+) killed; "
        rf"at-most-once: {cost} lost, 0 duplicated, {DEATHS} killed; "
        rf"at-least-once: 0 lost, {cost} duplicated, {DEATHS} killed",
        lines[-1],
    )
    assert killed is not None, lines[-1]
    assert int(killed[1]) >= 3, "a broker, a worker and the metadata actor"
    assert int(killed[1]) == sum(line.startswith("killed ") for line in lines)
