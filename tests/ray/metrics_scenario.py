"""A cluster on a Ray of its own does a bit of everything; its metrics and log files go to the folder that is
named. Run by ``test_metrics.py`` in a process of its own, for a process can only have one Ray.

    python metrics_scenario.py FOLDER
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

import ray
from ray_nodes import free_port, local_ray, until

from raftlog.actors import launch
from raftlog.client.log import Log

CLUSTER = "metered"
RECORDS = 1000
PARTITIONS = 2 + 8 + 8
"""Of orders, __groups and __transactions."""


class Scrape(NamedTuple):
    """What Prometheus would get, raftlog's part: (name, labels, value) of each series."""

    series: list[tuple[str, dict[str, str], float]]

    @classmethod
    def parse(cls, text: str) -> Scrape:
        """From the text that Ray's agent answers with."""
        series = []
        for line in text.splitlines():
            if line.startswith("ray_raftlog_"):
                found = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line)
                assert found is not None, line
                labels = dict(re.findall(r'(\w+)="([^"]*)"', found[2]))
                series.append((found[1], labels, float(found[3])))
        return cls(series)

    @property
    def names(self) -> set[str]:
        return {name for name, _, _ in self.series}

    def find(self, name: str, **labels: str) -> list[float]:
        """Values of all series of that name (without prefixes) with these labels."""
        return [
            value
            for each, has, value in self.series
            if each == f"ray_raftlog_{name}" and labels.items() <= has.items()
        ]

    def sum(self, name: str, **labels: str) -> float:
        """Of all series with these labels; there is one at least."""
        found = self.find(name, **labels)
        assert found, f"no {name} with {labels}"
        return sum(found)


def ask(port: int) -> str:
    """What Ray's agent answers; nothing while nobody listens yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
    except OSError:
        return ""
    return text


def missing(scrape: Scrape) -> dict[str, float]:
    """What of all that was done has not come through, and how far it is."""
    found = {
        "records": sum(scrape.find("produced_records_total", topic="orders")) - RECORDS - 1,
        "committed": sum(scrape.find("transactions_total", outcome="committed")) - 1,
        "lag": sum(scrape.find("group_lag_records", group="billing")) - RECORDS // 2,
        "partitions": sum(scrape.find("partitions")) - PARTITIONS,
        "leaders": sum(scrape.find("leaders")) - PARTITIONS - 1,
        "brokers": len(scrape.find("disk_free_bytes")) - 3,
    }
    return {name: short for name, short in found.items() if short < 0}


def work(log: Log) -> None:
    """Records, a group that is half through, transactions that end either way."""
    log.create_topic("orders", partitions=2)
    with log.producer() as producer:
        producer.send_batch("orders", [b"x" * 100] * RECORDS)
    with log.consumer("orders", group="billing") as consumer:
        taken = 0
        while taken < RECORDS // 2:
            taken += len(consumer.poll(max_records=RECORDS // 2 - taken))
        consumer.commit()
    with log.producer(transactional_id="copy") as producer:
        with producer.transaction() as transaction:
            transaction.send("orders", b"committed")
        try:
            with producer.transaction() as transaction:
                transaction.send("orders", b"aborted")
                raise LookupError
        except LookupError:
            pass


def lose_a_leader(log: Log) -> int:
    """Kill the broker that leads a partition, and wait until it is back; which one that was."""
    leader = log.describe_topic("orders").partitions[0].leader
    assert leader is not None
    pid = {broker.id: broker.pid for broker in log.describe_cluster().brokers}[leader]
    os.kill(pid, signal.SIGKILL)
    until(
        "it is back",
        lambda: all(each.state == "alive" and each.pid != pid for each in log.describe_cluster().brokers),
    )
    return leader


def look(port: int) -> Scrape:
    return Scrape.parse(ask(port))


def run(folder: Path, port: int) -> None:
    """Do it, and write down what is to be seen."""
    config: dict[str, object] = {"metrics_interval_ms": 500, "log_format": "json"}
    log = Log(launch.start(CLUSTER, 3, folder / "data", config=config))
    work(log)
    try:
        until("all that was done is to be seen", lambda: not missing(look(port)))
    except AssertionError as error:
        raise AssertionError(missing(look(port))) from error
    before = ask(port)
    (folder / "before.txt").write_text(before)
    elections = Scrape.parse(before).sum("elections_won_total")
    killed = lose_a_leader(log)
    until("an election is to be seen", lambda: look(port).sum("elections_won_total") > elections)
    (folder / "after.txt").write_text(ask(port))
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    for path in logs.glob(f"raftlog-{CLUSTER}-*.log"):
        shutil.copy(path, folder)
    (folder / "killed.json").write_text(json.dumps(killed))
    log.close()
    launch.stop(CLUSTER, force=True)


if __name__ == "__main__":
    port = free_port()
    with local_ray(_metrics_export_port=port, _system_config={"metrics_report_interval_ms": 1000}):
        run(Path(sys.argv[1]), port)
