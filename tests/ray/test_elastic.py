"""Nodes join, drain and die under a producer: nothing is lost, and everyone has a share in the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCENARIO = Path(__file__).parent / "elastic_scenario.py"
TIMEOUT_S = 400


@pytest.mark.timeout(TIMEOUT_S + 30)
def test_nodes_come_and_go(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCENARIO), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    # Ray writes there too: what its killed nodes had logged.
    assert any(line.endswith("records, none lost, none doubled") for line in done.stdout.splitlines()), (
        done.stdout
    )
