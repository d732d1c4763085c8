"""Log lines with fields, for people and for machines.

Who logs an event names it and gives its fields beside the sentence (:func:`log_event`); nothing is logged per
record. A line then looks like one of these::

    2026-03-01 12:00:00,123 INFO raftlog.broker: broker 2: orders/0 is led by it from term 7 on
    time=2026-03-01T12:00:00.123Z level=info logger=raftlog.broker event=leader_won broker=2 topic=orders …
    {"time": "2026-03-01T12:00:00.123Z", "level": "info", …, "event": "leader_won", "broker": 2, …}
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

TEXT: Final = "text"
LOGFMT: Final = "logfmt"
JSON: Final = "json"
FORMATS: Final = (TEXT, LOGFMT, JSON)

FILE_BYTES_MAX: Final = 64 * 1024 * 1024
FILES_KEPT: Final = 3

_PLAIN: Final = re.compile(r"[^\s=\"\\]+")
_OURS: Final = "raftlog-handler"


def log_event(
    logger: logging.Logger, level: int, event: str, message: str, *args: object, **fields: object
) -> None:
    """Log one line about an event.

    Args:
        logger: below ``raftlog``.
        level: of the logging module.
        event: its name, words_with_underscores; the same for all of its kind.
        message: the sentence, with ``args`` to fill in.
        fields: what a machine would look for: broker, topic, partition, term, …
    """
    if logger.isEnabledFor(level):
        logger.log(level, message, *args, extra={"event": event, "fields": fields}, stacklevel=2)


def _items(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    """What a line consists of, in order."""
    time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    yield "time", time.removesuffix("+00:00") + "Z"
    yield "level", record.levelname.lower()
    yield "logger", record.name
    event = getattr(record, "event", None)
    if event is not None:
        yield "event", event
        yield from record.__dict__["fields"].items()
    yield "message", record.getMessage()
    if record.exc_info:
        yield "exception", logging.Formatter().formatException(record.exc_info)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return json.dumps(dict(_items(record)), default=str, ensure_ascii=False)


class LogfmtFormatter(logging.Formatter):
    """``key=value`` pairs; values with anything but plain characters in quotes, as JSON has them."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return " ".join(f"{key}={_quoted(value)}" for key, value in _items(record))


def _quoted(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def formatter(log_format: str) -> logging.Formatter:
    """The formatter of that name: "text", "logfmt" or "json"."""
    assert log_format in FORMATS, log_format
    if log_format == JSON:
        return JsonFormatter()
    if log_format == LOGFMT:
        return LogfmtFormatter()
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def configure(log_format: str, level: str, file: Path | None) -> None:
    """Have this process log in that format what is logged below ``raftlog``. For processes of raftlog's own;
    in others, their owner decides. Called again, it replaces what it did before.

    Args:
        log_format: see :func:`formatter`.
        level: name of the lowest level that is logged.
        file: gets everything, and is rotated; warnings go to stderr as well. None: everything goes to stderr.
    """
    ours = logging.getLogger("raftlog")
    ours.setLevel(level)
    ours.propagate = False
    for before in [each for each in ours.handlers if each.name == _OURS]:
        ours.removeHandler(before)
        before.close()
    stderr: logging.Handler = logging.StreamHandler()
    handlers = [stderr]
    if file is not None:
        stderr.setLevel(logging.WARNING)
        handlers.append(
            logging.handlers.RotatingFileHandler(
                file, maxBytes=FILE_BYTES_MAX, backupCount=FILES_KEPT, delay=True, encoding="utf-8"
            )
        )
    for handler in handlers:
        handler.name = _OURS
        handler.setFormatter(formatter(log_format))
        ours.addHandler(handler)
