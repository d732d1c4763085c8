"""What the README shows works, and what it points to is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import raftlog
from raftlog.cli.main import app
from raftlog.testing.local_cluster import LocalCluster

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_programs_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    with LocalCluster() as cluster:
        monkeypatch.setattr(raftlog, "start", lambda: cluster.log)
        exec(compile(first, "README.md", "exec"), names)
        acknowledged, read = capsys.readouterr().out.splitlines()
        for program in others:
            exec(compile(program, "README.md", "exec"), names)
        with cluster.log.consumer("invoices") as consumer:
            (invoice,) = consumer.poll(timeout=10.0)  # its marker may be on its way
    assert acknowledged.startswith("RecordMetadata(topic='orders'")
    assert read == """0 b'customer-7' b'{"id": 1}'"""
    assert (invoice.key, invoice.value) == (b"customer-7", b'invoice for {"id": 1}')


def test_the_commands_exist() -> None:
    shown = re.findall(r"raftlog ([a-z]+)", "\n".join(re.findall(r"```console\n(.*?)```", README, re.DOTALL)))
    assert set(shown) >= {"start", "topics", "produce", "consume", "status", "shutdown", "verify"}
    for command in set(shown):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^\$ make ([a-z]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", targets, re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    for path in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / path).exists(), path
