"""What ``raftlog start`` passes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raftlog.cli.main import app
from raftlog.cli.session import Session
from raftlog.errors import NotRunning


def started_with(*arguments: str) -> dict[str, Any]:
    """Run it, and end where the cluster would start."""
    told: dict[str, Any] = {}

    def start(**settings: Any) -> Any:
        told.update(settings)
        raise NotRunning("not in this test")

    def refuse(*_: Any) -> Any:
        raise AssertionError("not in this test")

    session = Session(connect=refuse, start=start, shutdown=refuse, plan=refuse)
    assert CliRunner().invoke(app, ["start", *arguments], obj=session).exit_code == 1
    return told


def test_variables_in_the_data_directory_are_each_nodes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISK", "/of/the/head")
    assert started_with("--data-dir", "$DISK/raftlog")["data_dir"] == "$DISK/raftlog"
    assert started_with("--data-dir", "/mnt/$DISK")["data_dir"] == "/mnt/$DISK"


def test_other_directories_are_those_of_who_says_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/of/the/user")
    assert started_with("--data-dir", "here")["data_dir"] == str(tmp_path / "here")
    assert started_with("--data-dir", "~/data")["data_dir"] == "/of/the/user/data"
    monkeypatch.delenv("RAFTLOG_DATA_DIR", raising=False)
    assert started_with()["data_dir"] is None


def test_how_long_a_broker_may_be_away() -> None:
    assert started_with()["replace_after"] == 30.0
    assert started_with("--replace-after", "600")["replace_after"] == 600.0
