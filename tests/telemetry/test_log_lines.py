"""Log lines with fields, in three formats."""

from __future__ import annotations

import io
import json
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from raftlog.telemetry.logs import FORMATS, configure, formatter, log_event


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The logger of all, put back afterwards."""
    ours = logging.getLogger("raftlog")
    handlers, level, propagate = ours.handlers[:], ours.level, ours.propagate
    yield logging.getLogger("raftlog.broker")
    for each in ours.handlers:
        if each not in handlers:
            each.close()
    ours.handlers, ours.propagate = handlers, propagate
    ours.setLevel(level)


def line_in(log_format: str, logger: logging.Logger, event: str | None, **fields: object) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter(log_format))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        if event is None:
            logger.warning("it is %s", 'so\n"so"')
        else:
            log_event(logger, logging.INFO, event, "broker %d: %s", 2, "all is well", **fields)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return stream.getvalue()


def test_json_has_the_fields(logger: logging.Logger) -> None:
    line = line_in("json", logger, "leader_won", broker=2, topic="orders", partition=0, term=7, at=Path("/x"))
    assert line.count("\n") == 1
    found = json.loads(line)
    time = found.pop("time")
    assert time.endswith("Z")
    assert len(time) == len("2026-03-01T12:00:00.123Z")
    assert found == {
        "level": "info",
        "logger": "raftlog.broker",
        "event": "leader_won",
        "broker": 2,
        "topic": "orders",
        "partition": 0,
        "term": 7,
        "at": "/x",
        "message": "broker 2: all is well",
    }


def test_logfmt_can_be_split(logger: logging.Logger) -> None:
    line = line_in("logfmt", logger, "leader_won", broker=2, topic="or ders", none=None, empty="")
    assert line.count("\n") == 1
    words = dict(word.split("=", 1) for word in shlex.split(line))
    assert words.pop("time").endswith("Z")
    assert words == {
        "level": "info",
        "logger": "raftlog.broker",
        "event": "leader_won",
        "broker": "2",
        "topic": "or ders",
        "none": "None",
        "empty": "",
        "message": "broker 2: all is well",
    }


def test_text_is_for_people(logger: logging.Logger) -> None:
    line = line_in("text", logger, "leader_won", broker=2)
    assert line.endswith(" INFO raftlog.broker: broker 2: all is well\n")


@pytest.mark.parametrize("log_format", FORMATS)
def test_lines_without_an_event_are_lines_too(log_format: str, logger: logging.Logger) -> None:
    line = line_in(log_format, logger, None)
    assert "so" in line
    if log_format == "text":
        return
    assert line.count("\n") == 1, "whatever is in the message, it is one line"
    if log_format == "json":
        assert json.loads(line)["message"] == 'it is so\n"so"'


def test_a_traceback_is_in_the_line(logger: logging.Logger) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter("json"))
    logger.addHandler(handler)
    try:
        raise ValueError("bang")
    except ValueError:
        logger.exception("a task failed")
    finally:
        logger.removeHandler(handler)
    found = json.loads(stream.getvalue())
    assert "ValueError: bang" in found["exception"]


def test_nothing_is_made_of_an_event_that_nobody_wants(logger: logging.Logger) -> None:
    class Untouched:
        def __str__(self) -> str:
            raise AssertionError("nobody wants to know")

    logger.setLevel(logging.WARNING)
    log_event(logger, logging.INFO, "leader_won", "broker %s", Untouched(), broker=Untouched())
    logger.setLevel(logging.NOTSET)


def test_all_goes_to_the_file_and_warnings_to_stderr(
    logger: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "raftlog-default-broker-0.log"
    configure("logfmt", "INFO", file)
    configure("json", "INFO", file)  # again: a metadata actor that is started anew, say
    logger.info("quiet")
    logger.debug("silent")
    logger.warning("loud")
    assert [json.loads(line)["message"] for line in file.read_text().splitlines()] == ["quiet", "loud"]
    said = capsys.readouterr().err.splitlines()
    assert [json.loads(line)["message"] for line in said] == ["loud"]


def test_without_a_file_all_goes_to_stderr(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("text", "DEBUG", None)
    logger.debug("even this")
    assert capsys.readouterr().err.endswith("DEBUG raftlog.broker: even this\n")
