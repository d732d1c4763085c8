"""Nodes join, drain, die and come back under a producer and a group: nothing is lost, and all have a share
in the end. The scenario is that of the benchmark, in a process of its own, for its Ray is another one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCENARIO = Path(__file__).parents[2] / "bench" / "elastic.py"
TIMEOUT_S = 600


@pytest.mark.timeout(TIMEOUT_S + 30)
def test_nodes_come_and_go(tmp_path: Path) -> None:
    result = tmp_path / "elastic.json"
    done = subprocess.run(
        [sys.executable, str(SCENARIO), "--json", str(result)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    found = json.loads(result.read_text())
    records = found["records"]
    assert len(found["steps"]) == 9
    assert records["sent"] == records["acknowledged"] == records["read"] == records["read_by_group"]
    assert [records[key] for key in ("failed", "lost", "doubled", "moved")] == [0, 0, 0, 0]
