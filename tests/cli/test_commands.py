"""The commands against three real brokers: what goes in comes out, and wrong names are named."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from raftlog.state.metadata import FEATURE_LEVEL_MAX
from raftlog.testing.local_cluster import LocalCluster

Run = Callable[..., Any]


@pytest.fixture
def topic(run: Run, request: pytest.FixtureRequest) -> str:
    """A topic of two partitions, named after the test."""
    name = "t." + request.node.name.translate(str.maketrans("[]", "--"))[:60]
    result = run("topics", "create", name, "--partitions", "2")
    assert result.exit_code == 0, result.stderr
    return name


def ok(result: Any) -> str:
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def test_topics_create_list_describe_delete(run: Run) -> None:
    assert "ready" in ok(
        run("topics", "create", "orders", "-p", "3", "-r", "3", "--config", "retention.ms=60000")
    )
    again = run("topics", "create", "orders")
    assert again.exit_code == 1
    assert "orders" in again.stderr
    assert "exist" in again.stderr
    ok(run("topics", "create", "orders", "-p", "3", "--exist-ok"))
    assert "orders" in ok(run("topics", "list", "--quiet")).split()
    listed = next(row for row in json.loads(ok(run("topics", "list", "--json"))) if row["name"] == "orders")
    assert len(listed["partitions"]) == 3
    described = ok(run("topics", "describe", "orders"))
    assert "retention_ms = 60000" in described
    rows = [line.split() for line in described.splitlines() if line.startswith("orders ")]
    assert [row[1] for row in rows] == ["0", "1", "2"]
    assert all(row[2] in "012" for row in rows), "every partition has a leader"
    assert run("topics", "delete", "orders", input="n\n").exit_code == 1
    assert "orders" in ok(run("topics", "list", "-q")).split()
    ok(run("topics", "delete", "orders", input="y\n"))
    assert "orders" not in ok(run("topics", "list", "-q")).split()
    gone = run("topics", "delete", "orders", "--yes")
    assert gone.exit_code == 1
    assert gone.stderr.startswith("error: ")
    assert "orders" in gone.stderr


def test_bad_topics_are_refused_by_name_and_number(run: Run) -> None:
    for arguments, said in (
        (("a b",), "a b"),
        (("t", "-r", "4"), "4"),
        (("t", "--config", "retention.mss=1"), "retention.ms"),
    ):
        result = run("topics", "create", *arguments)
        assert result.exit_code == 1
        assert said in result.stderr
        assert result.stderr.count("\n") == 1
    assert ok(run("topics", "create", "t")) == "topic t is ready\n"


def test_lines_go_in_and_come_out(run: Run, topic: str) -> None:
    result = run("produce", topic, "-p", "1", input="one\n\nthr\xe9e")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr == "3 records acknowledged\n"
    assert ok(run("consume", topic)) == "one\n\nthr\xe9e\n"
    assert ok(run("consume", topic, "--format", "%t %p %o")) == f"{topic} 1 0\n{topic} 1 1\n{topic} 1 2\n"
    assert run("consume", topic, "--raw").stdout_bytes == "onethr\xe9e".encode()
    assert [json.loads(line)["offset"] for line in ok(run("consume", topic, "--json")).splitlines()] == [
        0,
        1,
        2,
    ]


def test_bytes_that_are_no_text_survive(run: Run, topic: str) -> None:
    value = bytes(byte for byte in range(256) if byte != 10)
    ok(run("produce", topic, "--quiet", input=value + b"\n"))
    assert run("consume", topic, "--raw").stdout_bytes == value
    assert "base64" in json.loads(ok(run("consume", topic, "--json")))["value"]


def test_keys_and_headers(run: Run, topic: str) -> None:
    ok(run("produce", topic, "-K", "\\t", "-H", "a=1", "-H", "b=2", input="k\tv\tw\nk\tx\n"))
    assert ok(run("consume", topic, "--format", "%k|%v|%h")) == "k|v\tw|a=1,b=2\nk|x|a=1,b=2\n"
    assert len(set(ok(run("consume", topic, "--format", "%p")).split())) == 1, "one key, one partition"
    ok(run("produce", topic, "--key", "K", input="y\n"))
    assert "K=y\n" in ok(run("consume", topic, "--format", "%k=%v"))


def test_a_line_without_a_key_ends_it_and_what_was_before_is_written(run: Run, topic: str) -> None:
    result = run("produce", topic, "-K", ":", input="a:1\nb:2\nthree\nd:4\n")
    assert result.exit_code == 1
    assert "line 3" in result.stderr
    assert sorted(ok(run("consume", topic)).split()) == ["1", "2"]


def test_where_to_begin(run: Run, topic: str) -> None:
    ok(run("produce", topic, "-p", "0", input="".join(f"a{i}\n" for i in range(10))))
    ok(run("produce", topic, "-p", "1", input="".join(f"b{i}\n" for i in range(5))))

    def read(*arguments: str) -> list[str]:
        return sorted(ok(run("consume", topic, *arguments)).split())

    assert len(read()) == 15
    assert read("--from", "end") == []
    assert read("--from", "4", "-p", "1") == ["b4"]
    assert read("--from", "8", "-p", "0") == ["a8", "a9"]
    assert read("--from", "-2") == ["a8", "a9", "b3", "b4"]
    assert read("--from", "-100") == read()
    assert read("--from", "1h") == read()
    assert read("--from", "2999-01-01") == []
    assert read("-p", "0", "-n", "3") == ["a0", "a1", "a2"]
    assert read("-n", "0") == []
    stamps = json.loads(
        "[" + ok(run("consume", topic, "-p", "1", "--format", "%T,")).replace("\n", "")[:-1] + "]"
    )
    assert len(read("--from", f"@{stamps[-1]}", "-p", "1")) == stamps.count(stamps[-1])


def test_consume_names_what_is_not_there(run: Run, topic: str) -> None:
    for arguments, said in (
        (("consume", "no-such-topic"), "no-such-topic"),
        (("consume", topic, "-p", "7"), "7"),
        (("produce", "no-such-topic"), "no-such-topic"),
        (("produce", topic, "-p", "7"), "7"),
        (("topics", "describe", "no-such-topic"), "no-such-topic"),
    ):
        result = run(*arguments, input="x\n")
        assert result.exit_code == 1, arguments
        assert said in result.stderr
        assert "Traceback" not in result.output
        assert result.stderr.count("\n") == 1, result.stderr


def test_status(run: Run, topic: str) -> None:
    ok(run("produce", topic, "-p", "1", input="x\ny\n"))
    deadline = time.monotonic() + 30
    while True:  # a follower may be a moment behind
        text = ok(run("status"))
        rows = [line.split() for line in text.splitlines() if line.startswith(f"{topic} ")]
        if rows[1][7:] == ["0", "2", "2"] or time.monotonic() > deadline:
            break
    assert "3 of 3 brokers alive" in text
    assert "none under-replicated" in text
    row = rows[1]
    assert [row[1] for row in rows] == ["0", "1"]
    assert row[2] in "012"
    assert int(row[3]) >= 1, "the term"
    assert sorted(row[4:7]) == ["0", "1", "2"]
    assert row[7:] == ["0", "2", "2"], "start, committed, end, and nobody behind"
    found = json.loads(ok(run("status", "--json")))
    assert len(found["cluster"]["brokers"]) == 3


def test_start_shows_the_brokers(run: Run) -> None:
    assert ok(run("start")).count("alive") == 3


def test_status_names_the_under_replicated(cluster: LocalCluster, run: Run, topic: str) -> None:
    cluster.kill_broker(2)
    try:
        ok(run("produce", topic, "-p", "0", input="x\n"))
        text = ok(run("status"))
        rows = [line.split() for line in text.splitlines() if line.startswith(f"{topic} ")]
        assert [row[-1] for row in rows] == ["2", "2"]
        assert "lost" in text
        assert "under-replicated" in text
        assert "none under-replicated" not in text
    finally:
        cluster.restart_broker(2)


def test_upgrade_raises_the_level_to_what_every_broker_knows(run: Run) -> None:
    done = run("upgrade")
    assert done.exit_code == 0
    assert f"feature level {FEATURE_LEVEL_MAX}" in done.output
