"""The command on a real Ray: found a cluster, use it, stop it, recover it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from ray_nodes import local_ray
from typer.testing import CliRunner

import raftlog
from raftlog.cli.main import app
from raftlog.errors import NoRay

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A Ray of this module's own."""
    with local_ray() as address:
        yield address


def test_a_cluster_from_start_to_shutdown_and_back(ray_address: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "RAY_ADDRESS": ray_address,
        "RAFTLOG_CLUSTER": "cli",
        "PYTHONPATH": str(ROOT),
    }

    def raftlog(*arguments: str, input: str = "", code: int = 0) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "raftlog.cli.main", *arguments],
            input=input,
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
        )
        assert result.returncode == code, (arguments, result.stdout, result.stderr)
        assert "Traceback" not in result.stderr
        return result.stdout if code == 0 else result.stderr

    assert "no raftlog cluster 'cli'" in raftlog("status", code=1)
    assert raftlog("start", "--brokers", "3", "--data-dir", str(tmp_path)).count("alive") == 3
    raftlog("topics", "create", "orders")
    raftlog("produce", "orders", input="one\ntwo\n")
    raftlog("shutdown", "--force")
    raftlog("status", code=1)
    raftlog("verify", str(tmp_path))
    assert raftlog("start", "--data-dir", str(tmp_path)).count("alive") == 3
    assert raftlog("consume", "orders") == "one\ntwo\n"
    (topic,) = json.loads(raftlog("status", "--json"))["topics"]
    assert topic["partitions"][0]["committed"] == 2
    raftlog("shutdown", "--force")


def test_without_ray_it_says_what_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(*_: Any, **options: Any) -> NoReturn:
        assert options["address"] == "auto", "the command never starts a Ray of its own"
        raise ConnectionError("no Ray here")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for command in (["start"], ["status"], ["shutdown"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: no Ray cluster runs here")
        assert "ray start --head" in result.stderr
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    for command in (["start"], ["status"]):
        result = CliRunner().invoke(app, command)
        assert "RAY_ADDRESS=192.0.2.1:6379 does not answer" in result.stderr
        assert "no Ray here" in result.stderr
    with pytest.raises(NoRay, match=r"192\.0\.2\.1"):
        raftlog.start()  # and does not start one of its own instead
