"""What docs/SEMANTICS.md says of errors and links is so, and its programs do what they say."""

from __future__ import annotations

import ast
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from typer.testing import CliRunner

import raftlog
from raftlog import errors
from raftlog.cli.main import app
from raftlog.config import ConsumerConfig, ProducerConfig
from raftlog.testing.local_cluster import LocalCluster

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "SEMANTICS.md").read_text()
CLASSES = ("retriable", "abortable", "fatal")


def error_rows() -> dict[str, list[str]]:
    """First cell -> error classes named in the last one."""
    body = TEXT.split("\n## Errors: three classes\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
    return {row[0].strip("`"): row[3].split(", ") for row in rows[3:] if len(row) == 4}


@pytest.mark.parametrize("kind", [*(f"error.{name}" for name in CLASSES), "none of them"])
def test_errors_are_of_the_class_they_are_listed_under(kind: str) -> None:
    named = error_rows()[kind]
    assert len(named) >= 3
    for name in named:
        error = getattr(errors, name)
        flags = [flag for flag in CLASSES if getattr(error, flag)]
        assert flags == ([kind.removeprefix("error.")] if "." in kind else []), name


def test_an_error_is_of_one_class_at_most() -> None:
    found = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]
    assert len(found) > 40
    for error in found:
        assert sum(getattr(error, flag) for flag in CLASSES) <= 1, error.__name__


def test_modes_are_the_settings_own() -> None:
    modes = {mode.strip('"') for mode in re.findall(r"^\| `(\"[a-z-]+\")` \|", TEXT, re.MULTILINE)}
    assert modes == set(ConsumerConfig.presets) == set(ProducerConfig.presets)


PROGRAMS = [dedent(each) for each in re.findall(r"```python\n(.*?)^ *```", TEXT, re.DOTALL | re.MULTILINE)]


def program(word: str) -> str:
    """The one program that has this in it."""
    (found,) = [each for each in PROGRAMS if word in each]
    return found


def test_programs_parse() -> None:
    assert len(PROGRAMS) >= 5
    for each in PROGRAMS:
        ast.parse(each)


@pytest.fixture
def log() -> Iterator[raftlog.Log]:
    """A cluster with ten orders."""
    with LocalCluster() as cluster:
        for topic in ("orders", "invoices", "audit"):
            cluster.log.create_topic(topic, partitions=2)
        with cluster.log.producer() as producer:
            producer.send_batch(
                "orders", [b"order %d" % n for n in range(10)], [b"%d" % n for n in range(10)]
            )
        yield cluster.log


def test_the_transaction_moves_records_and_positions(log: raftlog.Log) -> None:
    exec(program("txn.send_offsets"), {"log": log})
    with log.consumer("orders", group="copy") as consumer:  # waits until the markers are there
        copied = sum(consumer.committed(("orders", partition)) or 0 for partition in range(2))
    assert copied > 0
    for topic in ("invoices", "audit"):
        with log.consumer(topic) as consumer:
            seen = 0
            while seen < copied and (records := consumer.poll(timeout=10.0)):
                seen += len(records)
            assert seen == copied


def test_a_sink_that_keeps_the_position_has_everything_once(log: raftlog.Log) -> None:
    database = sqlite3.connect(":memory:")
    database.execute("create table bills (key, value)")
    database.execute("create table positions (topic, partition, next, primary key (topic, partition))")
    for _ in range(2):  # the group has committed nothing: the second run begins where the sink is
        exec(program("begin_where_stored"), {"log": log, "database": database})
        bills = database.execute("select value from bills").fetchall()
        assert sorted(bills) == [(b"order %d" % n,) for n in range(10)]
    database.close()


def test_the_commands_exist() -> None:
    text = TEXT + (DOCS / "FROM_KAFKA.md").read_text()
    shown = {tuple(each.split()) for each in re.findall(r"`raftlog ((?:[a-z]+ ?)+)", text)}
    assert len(shown) >= 8
    for words in shown:
        assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0, words


def test_links_lead_somewhere() -> None:
    for path in DOCS.glob("*.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (DOCS / link).exists(), f"{path.name}: {link}"
