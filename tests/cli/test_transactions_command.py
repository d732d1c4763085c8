"""``raftlog transactions`` against three real brokers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from raftlog.client.log import Log
from raftlog.errors import TransactionAborted
from raftlog.testing.local_cluster import LocalCluster

Run = Callable[..., Any]


def ok(result: Any) -> str:
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def test_transactions_list_describe_abort(run: Run, cluster: LocalCluster) -> None:
    assert "payment" not in ok(run("transactions", "list", "--all"))
    ok(run("topics", "create", "ledger", "--partitions", "2"))
    with Log(cluster.bootstrap) as log, log.producer(transactional_id="payment-1") as producer:
        txn = producer.transaction().begin()
        txn.send("ledger", b"a", partition=0)
        txn.send("ledger", b"b", partition=1)
        producer.flush()
        (row,) = [line for line in ok(run("transactions", "list")).splitlines() if "payment-1" in line]
        assert row.split()[:2] == ["payment-1", "ongoing"]
        assert row.split()[-2:] == ["2", "0"]
        (found,) = json.loads(ok(run("transactions", "list", "--json")))
        assert found["partitions"] == [["ledger", 0], ["ledger", 1]]
        described = ok(run("transactions", "describe", "payment-1"))
        assert "ongoing" in described
        assert "aborted after 60 s" in described
        waiting = json.loads(ok(run("transactions", "list", "--topic", "ledger", "--json")))
        assert [(each["transactional_id"], each["first_offset"]) for each in waiting] == [
            ("payment-1", 0)
        ] * 2
        assert "payment-1" in ok(run("transactions", "list", "--topic", "ledger"))
        assert run("transactions", "abort", "payment-1", input="n\n").exit_code == 1
        ok(run("transactions", "abort", "payment-1", "--yes"))
        with pytest.raises(TransactionAborted):
            txn.commit()
        with producer.transaction() as txn:
            txn.send("ledger", b"c", partition=0)
        with log.consumer("ledger") as consumer:
            assert next(consumer.records()).value == b"c"
    deadline = time.monotonic() + 30  # its records are visible before the coordinator calls it complete
    while "payment-1" in ok(run("transactions", "list")):
        assert time.monotonic() < deadline, "its last transaction was committed"
    assert "payment-1" in ok(run("transactions", "list", "--all"))


def test_what_is_wrong_is_said(run: Run) -> None:
    for arguments, words in (
        (("describe", "nobody"), "nobody"),
        (("abort", "nobody", "-y"), "nobody"),
        (("abort",), "name a transactional id"),
        (("abort", "x", "--topic", "t"), "name a transactional id"),
        (("abort", "--topic", "ledger"), "belong together"),
        (("list", "--topic", "nowhere"), "nowhere"),
    ):
        result = run("transactions", *arguments)
        assert result.exit_code == 1
        assert words in result.stderr
