"""`raftlog status --watch`: rates, drawing in place, and how it ends."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console

from raftlog.cli import status
from raftlog.cli.status import Look, Watcher
from raftlog.client.descriptions import (
    BrokerDescription,
    ClusterDescription,
    PartitionDescription,
    TopicDescription,
)
from raftlog.errors import ConnectionLost

Run = Callable[..., Any]


def cluster(*totals: dict[str, int], pid: int = 100) -> ClusterDescription:
    return ClusterDescription(
        "default",
        "c",
        [
            BrokerDescription(each, f"node{each}", f"h:{each}", "alive", pid + each, 1, 1, counted)
            for each, counted in enumerate(totals)
        ],
    )


def topic(*ends: int) -> TopicDescription:
    rows = [PartitionDescription(index, 0, [0, 1], 3, 0, end, end, []) for index, end in enumerate(ends)]
    return TopicDescription("orders", "t", {}, rows)


def totals(records: int, elections: int = 0) -> dict[str, int]:
    return {
        "records_in": records,
        "bytes_in": records * 100,
        "bytes_out": records * 200,
        "elections_won": elections,
    }


class World:
    """A cluster that is looked at, and a clock that only sleeping moves."""

    def __init__(self, *looks: tuple[ClusterDescription, list[TopicDescription]] | Exception) -> None:
        self.now = 1000.0
        self.looks = list(looks)

    def look(self) -> tuple[ClusterDescription, list[TopicDescription]]:
        if not self.looks:
            raise KeyboardInterrupt
        found = self.looks.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def sleep(self) -> None:
        self.now += 2.0

    def watcher(self) -> Watcher:
        return Watcher(self.look, self.sleep, lambda: self.now)

    def watch(self) -> list[Look]:
        """All looks until Ctrl-C."""
        found: list[Look] = []
        try:
            for each in self.watcher().looks(forever=True):
                found.append(each)
        except KeyboardInterrupt:
            return found
        raise AssertionError("it goes on for ever")


def shown(world: World, *, terminal: bool) -> str:
    out = Console(file=io.StringIO(), width=200, force_terminal=terminal, color_system=None, highlight=False)
    with pytest.raises(KeyboardInterrupt):
        status._watch(out, world.watcher())
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_rates_are_per_second_between_two_looks() -> None:
    world = World(
        (cluster(totals(100), totals(0)), [topic(50, 50)]),
        (cluster(totals(500, 1), totals(0)), [topic(250, 250)]),
    )
    first, second = world.watch()
    assert first.brokers is None
    assert second.brokers is not None
    rates = second.brokers[0]
    assert (rates.records_in, rates.bytes_in, rates.bytes_out) == (200, 20_000, 40_000)
    assert rates.elections == 1, "elections are counted, not divided"
    assert second.brokers[1].records_in == 0
    assert second.partitions == {("orders", 0): 100, ("orders", 1): 100}


def test_a_broker_that_was_started_anew_has_no_rates_yet() -> None:
    world = World(
        (cluster(totals(100)), []), (cluster(totals(7), pid=900), []), (cluster(totals(17), pid=900), [])
    )
    _, second, third = world.watch()
    assert second.brokers == {}
    assert third.brokers is not None
    assert third.brokers[0].records_in == 5


def test_a_broker_that_does_not_answer_has_no_rates() -> None:
    world = World((cluster(totals(100), totals(9)), []), (cluster(totals(100), {}), []))
    seen = world.watch()[1]
    assert seen.brokers is not None
    assert seen.brokers.keys() == {0}


def test_nobody_answers_for_a_while() -> None:
    world = World(
        (cluster(totals(100)), [topic(5)]), ConnectionLost("all are gone"), (cluster(totals(500)), [topic(5)])
    )
    _, away, back = world.watch()
    assert "all are gone" in away.trouble
    assert away.topics == [topic(5)], "what was seen before stays"
    assert back.brokers is not None
    assert back.brokers[0].records_in == 100, "the time that nobody answered counts"


def test_when_nobody_answers_at_first_there_is_nothing_to_watch() -> None:
    with pytest.raises(ConnectionLost):
        next(World(ConnectionLost("none")).watcher().looks(forever=True))


LOOKS = ((cluster(totals(0)), [topic(0)]), (cluster(totals(5000, 2)), [topic(2468)]))


def test_on_a_terminal_it_is_drawn_in_place() -> None:
    text = shown(World(*LOOKS), terminal=True)
    first, second = text.split("2,500", 1)[0], text
    assert "\x1b[2K" in second, "lines are drawn over"
    assert "\x1b[1A" in second, "from the top"
    assert "records/s" not in first.split("orders")[0], "rates come with the second look"
    assert "1,234" in second, "of the partition"


def test_elsewhere_it_is_block_after_block() -> None:
    text = shown(World(*LOOKS), terminal=False)
    assert "\x1b" not in text
    assert text.count("cluster default") == 2
    last = text.rsplit("cluster default", 1)[1]
    row = next(line.split() for line in last.splitlines() if line.startswith("0 "))
    assert row[-4:] == ["2,500", "0.25", "0.50", "2"]
    assert "2,500 records/s, 0.25 MB/s in, 0.50 MB/s out, none under-replicated" in last


def test_a_name_cannot_draw(run: Run) -> None:
    world = World((cluster(totals(0)), []), ConnectionLost("[bold]x[/bold] [/nothing]"))
    assert "no answer: [bold]x[/bold] [/nothing]" in shown(world, terminal=False)


@pytest.fixture
def two_looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Let time pass at once, and Ctrl-C come at the second sleep."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", sleep)
    return slept


def test_watching_a_cluster_until_ctrl_c(run: Run, two_looks: list[float]) -> None:
    result = run("status", "--watch")
    assert result.exit_code == 130
    assert two_looks == [status.INTERVAL_S] * 2
    assert result.stdout.count("brokers alive") == 2
    assert "records/s" in result.stdout
    assert result.stderr == ""


def test_watching_every_so_many_seconds_as_json(run: Run, two_looks: list[float]) -> None:
    result = run("status", "--watch", "--json", "0.5")
    assert result.exit_code == 130
    assert two_looks == [0.5, 0.5]
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert "rates" not in first
    assert {"records_in", "bytes_in", "bytes_out", "elections"} == second["rates"]["0"].keys()


@pytest.mark.parametrize(
    "wrong", [["status", "5"], ["status", "--watch", "0"], ["status", "--watch", "soon"]]
)
def test_wrong_seconds_exit_2(run: Run, wrong: list[str]) -> None:
    assert run(*wrong).exit_code == 2
