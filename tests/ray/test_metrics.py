"""Ray shows every metric that the dashboard asks for, with values that follow from what was done; and its log
files hold the events."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from metrics_scenario import CLUSTER, PARTITIONS, RECORDS, Scrape

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "raftlog.json"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec("aiohttp") is None,
    reason='Ray shows metrics only with its dashboard agent: pip install "ray[default]"',
)


class Seen(NamedTuple):
    """What came of the scenario."""

    before: Scrape
    """A broker was killed."""
    after: Scrape
    killed: int
    events: dict[str, list[dict[str, Any]]]
    """Log file -> its lines."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("metrics")
    scenario = Path(__file__).with_name("metrics_scenario.py")
    done = subprocess.run(
        [sys.executable, scenario, folder], cwd=ROOT, timeout=240, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    events = {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.glob("*.log")
    }
    killed = json.loads((folder / "killed.json").read_text())
    before, after = (Scrape.parse((folder / f"{each}.txt").read_text()) for each in ("before", "after"))
    return Seen(before, after, killed, events)


def test_every_metric_that_the_dashboard_asks_for_is_there(seen: Seen) -> None:
    asked = set(re.findall(r"\bray_raftlog_\w+", DASHBOARD.read_text()))
    assert len(asked) > 30
    assert asked - seen.before.names == set()


def test_all_carry_cluster_and_broker(seen: Seen) -> None:
    of_cluster = {f"ray_raftlog_{each}" for each in ("offline_partitions", "partitions", "brokers")}
    of_cluster |= {"ray_raftlog_moving_partitions", "ray_raftlog_controller_look_seconds"}
    for name, tags, _ in seen.before.series:
        assert tags["cluster"] == CLUSTER
        assert tags.get("broker", "") in (("",) if name in of_cluster else ("0", "1", "2")), name


def test_throughput_is_what_was_sent_and_read(seen: Seen) -> None:
    scrape = seen.before
    records = scrape.sum("produced_records_total", topic="orders")
    assert records in (RECORDS + 1, RECORDS + 2), "what was aborted may never have been sent"
    assert scrape.sum("produced_bytes_total", topic="orders") > 100
    assert scrape.sum("fetched_bytes_total", topic="orders") > 100
    assert scrape.sum("produced_batches_total") >= 2
    assert scrape.sum("fetches_total") >= 2
    assert scrape.sum("journal_syncs_total") >= 10


def test_latencies_are_plausible(seen: Seen) -> None:
    for name, count in (
        ("produce", "produced_batches"),
        ("fetch", "fetches"),
        ("journal_sync", "journal_syncs"),
    ):
        observed = seen.before.sum(f"{name}_seconds_count")
        assert 1 <= observed <= seen.before.sum(f"{count}_total")
        assert seen.before.sum(f"{name}_seconds_bucket", le="+Inf") == observed
        assert 0 < seen.before.sum(f"{name}_seconds_sum") / observed < 2.0


def test_groups_and_transactions(seen: Seen) -> None:
    scrape = seen.before
    lag = scrape.sum("group_lag_records", group="billing", topic="orders")
    assert RECORDS // 2 <= lag <= RECORDS // 2 + 4, "records, and what transactions left: two and two markers"
    assert scrape.sum("transactions_total", outcome="committed") == 1
    assert scrape.sum("transactions_total", outcome="aborted") >= 1
    assert scrape.sum("transactions_total", outcome="begun") >= 2
    assert scrape.sum("open_transactions") == 0


def test_a_cluster_that_is_well(seen: Seen) -> None:
    scrape = seen.before
    assert scrape.sum("partitions") == PARTITIONS
    assert scrape.sum("leaders") == PARTITIONS + 1, "the metadata's is one"
    assert scrape.sum("replicas") == 3 * (PARTITIONS + 1)
    assert scrape.sum("elections_won_total") >= PARTITIONS + 1
    assert scrape.sum("brokers", state="alive") == 3
    assert scrape.sum("disk_free_bytes") > 1e6
    assert scrape.sum("connections", role="broker") >= 3
    for name in ("offline_partitions", "under_replicated_partitions", "leaderless_replicas", "storage_fault"):
        assert scrape.sum(name) == 0, name
    assert scrape.sum("out_of_service_replicas") == scrape.sum("brokers", state="lost") == 0
    assert scrape.sum("request_errors_total", error="Busy") >= 0


def test_a_leader_that_dies_is_seen_in_the_counts(seen: Seen) -> None:
    assert seen.after.sum("elections_won_total") > seen.before.sum("elections_won_total")


def test_the_log_files_hold_the_events(seen: Seen) -> None:
    assert seen.events.keys() == {
        *(f"raftlog-{CLUSTER}-broker-{each}.log" for each in range(3)),
        f"raftlog-{CLUSTER}-metadata.log",
    }
    won = [
        (line["broker"], line["partition"])
        for lines in seen.events.values()
        for line in lines
        if line.get("event") == "leader_won" and line["topic"] == "orders"
    ]
    assert {partition for _, partition in won} == {0, 1}
    assert len(won) >= 3, "one of them twice"
    killed = seen.events[f"raftlog-{CLUSTER}-broker-{seen.killed}.log"]
    assert [line["clean"] for line in killed if line.get("event") == "broker_started"] == [True, False]
    metadata = [line.get("event") for line in seen.events[f"raftlog-{CLUSTER}-metadata.log"]]
    assert {"cluster_running", "broker_process_ended"} <= set(metadata)
