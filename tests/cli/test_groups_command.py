"""``raftlog groups`` against three real brokers."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from raftlog.client.log import Log
from raftlog.testing.local_cluster import LocalCluster

Run = Callable[..., Any]


def ok(result: Any) -> str:
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def rows(text: str, first: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.startswith(f"{first} ")]


@pytest.fixture
def read(run: Run, cluster: LocalCluster, request: pytest.FixtureRequest) -> tuple[str, str]:
    """A topic of two partitions with ten records each, and a group that has read four of the first."""
    topic = "t." + request.node.name[:40]
    group = "g." + request.node.name[:40]
    ok(run("topics", "create", topic, "--partitions", "2"))
    for partition in ("0", "1"):
        ok(run("produce", topic, "-p", partition, input="\n".join("abcdefghij") + "\n"))
    with Log(cluster.bootstrap) as log:
        log.commit_offsets(group, {(topic, 0): (4, "half way")})
    return topic, group


def test_groups_list_describe_delete(run: Run, cluster: LocalCluster, read: tuple[str, str]) -> None:
    topic, group = read
    assert group in ok(run("groups", "list", "--quiet")).split()
    with Log(cluster.bootstrap) as log, log.consumer(topic, group=group) as consumer:
        while sum(consumer.lag().values()) or len(consumer.assignment()) < 2:
            consumer.poll(timeout=1)
        consumer.commit({(topic, 0): 7})
        assert rows(ok(run("groups", "list")), group) == [[group, "stable", "1", "2", "3"]]
        described = ok(run("groups", "describe", group))
        member = json.loads(ok(run("groups", "describe", group, "--json")))["members"][0]["member_id"]
        assert rows(described, member[:8])[0][-2:] == ["stable", "2"]
        assert rows(described, topic) == [
            [topic, "0", "7", "10", "3", member[:8]],
            [topic, "1", "-", "10", "-", member[:8]],
        ]
        refused = run("groups", "delete", group, "--yes")
        assert refused.exit_code == 1
        assert "close its consumers" in refused.stderr
    assert rows(ok(run("groups", "list")), group) == [[group, "empty", "0", "1", "3"]]
    assert run("groups", "delete", group, input="n\n").exit_code == 1
    ok(run("groups", "delete", group, input="y\n"))
    assert group not in ok(run("groups", "list", "-q")).split()
    gone = run("groups", "describe", group)
    assert gone.exit_code == 1
    assert group in gone.stderr


def test_groups_reset(run: Run, read: tuple[str, str]) -> None:
    topic, group = read
    assert rows(ok(run("groups", "describe", group)), topic) == [
        [topic, "0", "4", "10", "6", "-", "half", "way"]
    ]
    assert rows(ok(run("groups", "reset", group, topic, "--to", "latest")), topic) == [
        [topic, "0", "10"],
        [topic, "1", "10"],
    ]
    ok(run("groups", "reset", group, topic, "--to", "earliest"))
    ok(run("groups", "reset", group, topic, "--to", "3", "-p", "1"))
    found = json.loads(ok(run("groups", "describe", group, "--json")))["offsets"]
    assert [each["committed"] for each in found] == [0, 3]
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    assert [row[2] for row in rows(ok(run("groups", "reset", group, topic, "--to", later)), topic)] == [
        "10",
        "10",
    ]
    answer = json.loads(ok(run("groups", "reset", group, topic, "--to", "1999-12-31", "--json")))
    assert [each["offset"] for each in answer] == [0, 0]


def test_what_is_wrong_is_said_in_a_line(run: Run, read: tuple[str, str]) -> None:
    topic, group = read
    for arguments, said in (
        (("reset", group, topic, "--to", "yesterday"), "yesterday"),
        (("reset", group, topic, "--to", "3"), "--partition"),
        (("reset", group, topic, "--to", "latest", "-p", "1"), "latest"),
        (("reset", group, topic, "--to", "11", "-p", "1"), "10"),
        (("reset", group, topic, "--to", "1", "-p", "2"), "2 partitions"),
        (("reset", group, "nowhere", "--to", "latest"), "nowhere"),
        (("delete", "nobody", "-y"), "nobody"),
    ):
        result = run("groups", *arguments)
        assert result.exit_code == 1
        assert said in result.stderr
        assert result.stderr.count("\n") == 1
    assert json.loads(ok(run("groups", "describe", group, "--json")))["offsets"][0]["committed"] == 4
