"""The pipelines' examples themselves, on a real Ray, with less data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> list[str]:
    """What the example prints; it must end well."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def test_the_pipeline() -> None:
    lines = run("examples/pipeline.py", "--flights", "20000")
    assert any(line.startswith("first run: 20,000 records") for line in lines)
    assert any(line.startswith("second run: 0 records") for line in lines)
    assert lines[-1].startswith("20,000 records came out: 0 lost, 0 duplicated, 0 not as pandas has them")


def test_the_rollouts() -> None:
    lines = run("examples/rollouts.py", "--episodes", "20")
    assert lines[-1] == "what it got adds up to what was sent: yes"
