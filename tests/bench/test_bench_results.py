"""From results to verdicts and the page: ratios within rounds, aims, tables, what counts as lost ground."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import page
import pytest
import regress
import store
from aims import AIMS, judge


def section(**contenders: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "machine": {
            "cores": 2,
            "processor": "x",
            "system": "y",
            "python": "3",
            "packages": {},
            "load_1_minute_at_start": 0.0,
            "date": "2026-01-01",
        },
        "rounds": 2,
        "contenders": {
            name.replace("_", "-"): {key: store.rounds_of(values) for key, values in metrics.items()}
            for name, metrics in contenders.items()
        },
    }


def latency(raftlog: list[float], floor: list[float]) -> store.Results:
    return {"latency-100": section(raftlog={"p50_ms": raftlog}, floor={"p50_ms": floor})}


def test_a_ratio_is_made_within_rounds() -> None:
    results = latency([1.0, 8.0, 3.0], [1.0, 4.0, 1.0])
    assert store.ratio(results, "latency-100", "p50_ms", "raftlog", "floor") == 2.0
    assert store.ratio(results, "latency-100", "p50_ms", "raftlog", "kafka") is None
    assert store.ratio(results, "send-100", "p50_ms", "raftlog", "floor") is None


def test_a_work_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    store.replace(path, "a", section(raftlog={"p50_ms": [1.0]}, floor={"p50_ms": [1.0]}))
    store.replace(path, "b", section(raftlog={"p50_ms": [2.0]}))
    store.replace(path, "a", section(raftlog={"p50_ms": [3.0]}))
    found = store.read(path)
    assert list(found["a"]["contenders"]) == ["raftlog"]
    assert found["b"]["contenders"]["raftlog"]["p50_ms"]["median"] == 2.0


@pytest.mark.parametrize(("raftlog", "word"), [(1.2, "reached"), (1.4, "missed")])
def test_an_aim_is_reached_missed_or_not_measured(raftlog: float, word: str) -> None:
    verdicts = {each.limit.text: each for each in judge(latency([raftlog], [1.0]))}
    assert verdicts["at most 1.3 x the floor"].word == word
    assert verdicts["at most 0.6 x NATS synced"].word == "not measured"


def test_more_is_better_where_it_is() -> None:
    results = {"batch-100": section(raftlog={"records_per_s": [8e5]}, kafka={"records_per_s": [9e5]})}
    verdicts = {each.limit.text: each for each in judge(results) if each.aim.what == "`send_batch`, 100 B"}
    assert verdicts["at least 700,000 records/s"].word == "reached"
    assert verdicts["at least 1 x Kafka"].word == "missed"


def test_aims_stand_by_names_of_their_own() -> None:
    limits = [(aim.what, limit.text) for aim in AIMS for limit in aim.limits]
    assert len(set(limits)) == len(limits)


def test_the_page_keeps_what_is_written_by_hand() -> None:
    text = "by hand\n<!-- bench:latency -->\nold\n<!-- /bench -->\nmore by hand\n"
    filled = page.fill(text, latency([1.0], [0.5]))
    assert filled.startswith("by hand\n<!-- bench:latency -->\n![")
    assert filled.endswith("\n<!-- /bench -->\nmore by hand\n")
    assert "| raftlog, synced | 1 (1 to 1) |" in filled
    assert "old" not in filled
    assert page.fill(filled, latency([1.0], [0.5])) == filled


def test_the_page_says_who_is_not_there_and_why() -> None:
    results = latency([1.0], [0.5])
    results["latency-100"]["contenders"]["kafka"] = {"skipped": "Kafka needs Java"}
    text = page.fill("<!-- bench:latency -->\n<!-- /bench -->", results)
    assert "Not there: Kafka, unsynced: Kafka needs Java." in text


def test_every_marker_of_the_real_page_is_known() -> None:
    text = page.PAGE.read_text()
    assert text.count("<!-- bench:") == text.count("<!-- /bench -->") == len(page.PARTS)
    page.fill(text, {})


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page.draw("latency", latency([1.0, 2.0], [0.5, 0.6]), tmp_path)
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("work", "metric", "kept", "now", "loss"),
    [
        ("latency-100", "p50_ms", 2.0, 3.0, 0.5),
        ("latency-100", "p50_ms", 2.0, 1.0, -0.5),
        ("send-100", "records_per_s", 0.5, 0.25, 1.0),
        ("send-100", "records_per_s", 0.5, 1.0, -0.5),
    ],
)
def test_lost_ground_has_a_direction(work: str, metric: str, kept: float, now: float, loss: float) -> None:
    def results(value: float) -> store.Results:
        return {work: section(raftlog={metric: [value]}, floor={metric: [1.0]})}

    (change,) = regress.changes(results(kept), results(now))
    assert change.loss == pytest.approx(loss)
    assert regress.lost([change], 0.25) == ([change] if loss > 0.25 else [])
