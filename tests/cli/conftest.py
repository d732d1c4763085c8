"""A cluster without Ray behind the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from raftlog.cli.main import app
from raftlog.cli.session import Session
from raftlog.client.log import Log
from raftlog.controller.controller import PlannedMove
from raftlog.testing.local_cluster import LocalCluster

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Three brokers, shared by the tests of a module."""
    with LocalCluster(brokers=3) as cluster:
        yield cluster


@pytest.fixture
def run(cluster: LocalCluster) -> Run:
    """Run a command line against the cluster: ``run("topics", "list", input=None)``."""

    def connect(name: str) -> Log:
        return Log(cluster.bootstrap)

    def start(**_: Any) -> Log:
        return Log(cluster.bootstrap)

    def shutdown(name: str, force: bool) -> None:
        raise AssertionError("not in these tests")

    def plan(name: str, begin: bool) -> list[Any]:
        return [] if begin else [PlannedMove("orders", 2, (0, 1, 2), (0, 1, 3), 5_000_000, "balance")]

    session = Session(connect=connect, start=start, shutdown=shutdown, plan=plan)

    def invoke(*arguments: str, input: str | bytes | None = None) -> Any:
        return CliRunner().invoke(app, list(arguments), input=input, obj=session)

    return invoke
