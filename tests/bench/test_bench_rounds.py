"""The harness takes turns, checks what a contender says, and shows who did not take part and why."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from contenders.base import UNCOUNTED, Contender, NotOffered, System, Turn, cpu_seconds, free_ports, pace
from contenders.listing import KINDS
from run import Field, Rounds, settle
from works import SIZES, WORKS, Work

TWO_ROUNDS = replace(SIZES["tiny"], rounds=2)


class Nothing(System):
    """A system of no servers."""

    name = "nothing"


class Memory(Contender):
    """Keeps counts; loses some of the records if it is told to."""

    def __init__(self, name: str, lost: int = 0) -> None:
        super().__init__(Nothing())
        self.name = name
        self.lost = lost
        self.counts: dict[str, int] = {}
        self.turns: list[str] = []

    def create(self, topic: str, partitions: int) -> None:
        self.counts[topic] = 0
        self.turns.append(topic)

    def delete(self, topic: str) -> None:
        del self.counts[topic]

    def held(self, topic: str) -> int | None:
        return self.counts[topic] - self.lost

    def send(self, topic: str, values: Sequence[bytes], seconds: float) -> Turn:
        turn = self.turn()
        with turn.timed():
            turn.add(values)
        self.counts[topic] += UNCOUNTED + len(values)
        return turn

    def consume(self, topic: str, count: int) -> Turn:
        return self.turn().read(count, lambda: 1000)


def work_named(name: str, *contenders: str) -> Work:
    (found,) = (work for work in WORKS if work.name == name)
    return replace(found, contenders=contenders)


def run(work: Work, *contenders: Contender, missing: dict[str, str] | None = None) -> Rounds:
    field = Field()
    field.contenders = {each.name: each for each in contenders}
    field.missing = missing or {}
    rounds = Rounds(work, field)
    rounds.run(TWO_ROUNDS)
    return rounds


def test_each_round_begins_with_another() -> None:
    order: list[str] = []

    class Noted(Memory):
        def create(self, topic: str, partitions: int) -> None:
            super().create(topic, partitions)
            order.append(self.name)

    rounds = run(work_named("send-100", "a", "b"), Noted("a"), Noted("b"))
    assert order == ["a", "b", "b", "a"]
    assert {name: len(turns) for name, turns in rounds.results.items()} == {"a": 2, "b": 2}
    assert rounds.failed == []


def test_a_lost_record_is_a_failure_and_no_figure() -> None:
    rounds = run(work_named("send-100", "a", "b"), Memory("a"), Memory("b", lost=1))
    section = rounds.section(TWO_ROUNDS, {})
    assert len(rounds.failed) == 1
    assert "held" in section["contenders"]["b"]["skipped"]
    assert section["contenders"]["a"]["records_per_s"]["median"] > 0


def test_topics_are_removed_also_after_a_failure() -> None:
    loser = Memory("a", lost=1)
    run(work_named("send-100", "a"), loser)
    assert loser.turns
    assert loser.counts == {}


def test_what_is_not_offered_is_shown_and_no_failure() -> None:
    rounds = run(work_named("columns", "a", "gone"), Memory("a"), missing={"gone": "no Java", "other": "x"})
    section = rounds.section(TWO_ROUNDS, {})
    assert rounds.failed == []
    assert section["contenders"] == {
        "a": {"skipped": "its client has no columns"},
        "gone": {"skipped": "no Java"},
    }


def test_a_reader_must_get_exactly_what_was_written() -> None:
    rounds = run(work_named("consume", "a"), Memory("a"))  # reads in thousands, of 10,020
    assert len(rounds.failed) == 1
    assert "11000 records read, 10020 written" in rounds.failed[0]


def test_pace_keeps_its_rate_and_counts_from_when_a_record_was_due() -> None:
    fired: list[float] = []

    def fire(acknowledged: object) -> None:
        fired.append(time.perf_counter())
        if callable(acknowledged):
            acknowledged()

    stalled, never = iter([0.05]), threading.Event()
    times, sent = pace(fire, lambda seconds: never.wait(next(stalled, seconds)), rate=2000, seconds=0.15)
    assert sent == len(fired)
    assert 150 <= sent <= 300
    assert max(times) > 0.04, "the stall of the sender is part of a latency"


def test_warming_goes_on_while_it_gets_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("run.time.perf_counter", lambda: next(clock))
    taken = iter([8.0, 4.0, 2.0, 1.0, 1.0, 0.99, 1.0, 0.1])
    settle(lambda: next(taken), seconds=2)
    assert list(taken) == [0.1]


def test_warming_ends_also_where_it_always_gets_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("run.time.perf_counter", lambda: next(clock))
    taken = iter([2.0**-each for each in range(50)])
    settle(lambda: next(taken), seconds=2)
    assert len(list(taken)) == 30


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_works_name_contenders_that_there_are(work: Work) -> None:
    assert set(work.contenders) <= {kind.name for kind in KINDS}


def test_contenders_have_a_name_a_title_and_their_settings() -> None:
    assert len({kind.name for kind in KINDS}) == len({kind.title for kind in KINDS}) == len(KINDS)
    assert all(kind.settings for kind in KINDS)


def test_what_is_not_overridden_is_not_offered() -> None:
    with pytest.raises(NotOffered):
        Memory("a").sequential("t", b"", 1)


def test_processor_time_grows() -> None:
    before = cpu_seconds([os.getpid()])
    deadline = time.process_time() + 0.05
    while time.process_time() < deadline:
        pass
    assert 0.03 <= cpu_seconds([os.getpid()]) - before <= 5


def test_free_ports_differ() -> None:
    assert len(set(free_ports(6))) == 6
