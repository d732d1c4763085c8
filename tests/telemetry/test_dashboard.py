"""The dashboard shows every metric, and none that is not there; so do the alerts of docs/OPERATIONS.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from raftlog.telemetry.catalogue import BROKER_METRICS, CLUSTER_METRICS, Kind, Metric

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "raftlog.json"
OPERATIONS = ROOT / "docs" / "OPERATIONS.md"
METRICS = {f"ray_{each.name}": each for each in BROKER_METRICS + CLUSTER_METRICS}
USE = re.compile(r"\b(ray_raftlog_\w+)(\{([^}]*)\})?")
ALWAYS = {"cluster"}


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def metric_of(name: str) -> Metric:
    """The metric of a series; a histogram's are its buckets."""
    found = METRICS.get(name) or METRICS[name.removesuffix("_bucket")]
    assert (found.kind is Kind.HISTOGRAM) == name.endswith("_bucket"), name
    return found


def labels(text: str) -> set[str]:
    return set(re.findall(r"(\w+)\s*=", text or ""))


def check(expression: str) -> set[Metric]:
    """Hold an expression against the catalogue; which metrics are in it."""
    used = set()
    for name, _, selector in USE.findall(expression):
        metric = metric_of(name)
        used.add(metric)
        known = ALWAYS | set(metric.tags) | ({"broker"} if metric in BROKER_METRICS else set())
        assert labels(selector) <= known, expression
        for by in re.findall(r"by \(([^)]*)\)", expression):
            assert set(by.replace(" ", "").split(",")) <= known | {"le"}, expression
        if metric.kind is Kind.COUNTER:
            assert re.search(rf"(rate|increase)\({name}", expression), "a sum since the start says nothing"
        elif metric.kind is Kind.HISTOGRAM:
            assert "histogram_quantile" in expression
            assert re.search(r"by \([^)]*\ble\b", expression)
        else:
            assert not re.search(rf"(rate|increase)\({name}", expression), expression
    return used


def test_it_shows_every_metric() -> None:
    shown = set().union(*map(check, expressions()))
    assert set(METRICS.values()) - shown == set()


def test_every_panel_asks_the_chosen_source_about_the_chosen_cluster() -> None:
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            for name, _, selector in USE.findall(target["expr"]):
                assert 'cluster="$cluster"' in selector, name


def test_nothing_lies_on_anything_else() -> None:
    document = json.loads(DASHBOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])


def test_its_variables_are_asked_of_metrics_that_are_there() -> None:
    variables = {each["name"]: each for each in json.loads(DASHBOARD.read_text())["templating"]["list"]}
    assert variables.keys() == {"datasource", "cluster", "broker", "topic"}
    for name in ("cluster", "broker", "topic"):
        asked = re.fullmatch(r"label_values\((ray_\w+)(\{.*\})?, (\w+)\)", variables[name]["definition"])
        assert asked is not None
        assert asked[3] == name
        assert name in {"cluster", "broker", *metric_of(asked[1]).tags}


def test_alerts_in_the_docs_name_metrics_that_are_there() -> None:
    text = OPERATIONS.read_text()
    alerts = [
        line for line in text.splitlines() if line.startswith("| `") and "ray_raftlog_" in line.split("|")[1]
    ]
    assert len(alerts) >= 10
    for line in alerts:
        assert check(line.split("|")[1]), line


@pytest.mark.parametrize(
    "wrong",
    [
        "ray_raftlog_replica",
        "sum(ray_raftlog_produced_bytes_total)",
        "rate(ray_raftlog_leaders[1m])",
        'sum by (topic) (ray_raftlog_leaders{cluster="x"})',
        'ray_raftlog_leaders{colour="red"}',
        "ray_raftlog_produce_seconds",
    ],
)
def test_the_check_can_fail(wrong: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        check(wrong)


def test_the_docs_name_every_event_and_no_other() -> None:
    logged = {
        name
        for path in (ROOT / "raftlog").rglob("*.py")
        for name in re.findall(r'"([a-z]+_[a-z_]+)"', path.read_text())
    }
    table = OPERATIONS.read_text().split("| event | |")[1].split("\n\n")[0]
    documented = {
        name
        for row in table.splitlines()
        for name in re.findall(r"`([a-z_]+)`", row.split("|")[1] if row else "")
    }
    assert len(documented) > 20
    assert documented <= logged, "what is documented is logged"
    for path in (ROOT / "raftlog").rglob("*.py"):
        for call in re.findall(r"(?:log_event|replica_event|_log)\(([^)]*)", path.read_text()):
            for name in re.findall(r'"([a-z]+_[a-z_]+)"', call):
                assert name in documented, f"{path}: {name}"
