"""The programs of docs/PIPELINES.md, one after another as they stand there, do what is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from data_kit import positions

import raftlog
from raftlog.client import attach

PROGRAMS = re.findall(
    r"```python\n(.*?)^```", (Path(__file__).parents[2] / "docs" / "PIPELINES.md").read_text(), re.S | re.M
)


def invoices(log: raftlog.Log) -> list[float]:
    with log.consumer("invoices") as consumer:
        return sorted(json.loads(record.value)["due"] for record in consumer.records(until="end"))


def content(log: raftlog.Log, topic: str) -> list[Any]:
    with log.consumer(topic) as consumer:
        return sorted(
            (each.partition, each.key, each.value, each.timestamp_ms)
            for each in consumer.records(until="end")
        )


@pytest.mark.ray
@pytest.mark.usefixtures("ray_data")
def test_from_nothing_to_a_pipeline(
    log: raftlog.Log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(raftlog, "start", lambda: log)
    monkeypatch.setattr(attach, "connect", lambda: log)
    monkeypatch.chdir(tmp_path)
    begin, read, transform, write, stream, copy, archive = PROGRAMS
    scope: dict[str, Any] = {"__name__": "pipeline"}
    for program in (begin, read, transform, write, write):
        exec(program, scope)
        expected = sorted(number * 1.19 for number in range(1000))
    assert invoices(log) == expected
    exec(begin, scope)
    exec(stream, scope)
    assert invoices(log) == sorted(expected * 2)
    exec(copy, scope)
    assert content(log, "orders-copy") == content(log, "orders")
    exec(archive.replace("/data/orders", str(tmp_path / "orders")), scope)
    assert list((tmp_path / "orders").glob("*.parquet"))
    assert sum(positions(log, "archive", [("orders", each) for each in range(6)]).values()) == 2000
    assert scope["raftlog"].read_topic("orders", group="archive").count() == 0


def test_every_program_is_one_that_was_run() -> None:
    assert len(PROGRAMS) == 7
