"""``raftlog consume``: records of a topic to stdout."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

import typer

from raftlog.cli.format import FIELDS_HELP, Formatter, as_json, template
from raftlog.cli.session import ClusterOption, connected, reader_gone, stdout
from raftlog.cli.topics import TopicArgument
from raftlog.errors import ConfigError

if TYPE_CHECKING:
    from raftlog.client.log import Log
    from raftlog.client.sync import Consumer
    from raftlog.record.types import Record

POLL_S: Final = 0.2
"""Seconds a follower waits for records before it looks whether its reader is still there."""
_UNITS_MS: Final = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


class Where(Enum):
    """What the number of a :class:`Start` means."""

    START = "start"
    END = "end"
    OFFSET = "offset"
    LAST = "last"
    TIME = "time"


class Start(NamedTuple):
    """Where to begin reading: OFFSET and LAST count records per partition, TIME is ms since 1970."""

    where: Where
    number: int = 0


def consume(
    ctx: typer.Context,
    topic: TopicArgument,
    cluster: ClusterOption = "default",
    start: Annotated[
        str,
        typer.Option(
            "--from",
            "-o",
            metavar="WHERE",
            help="start, end, an offset, -N (the last N of each partition), a date and time (UTC unless it "
            "says otherwise), @MS since 1970, or how long ago: 90s, 30m, 2h, 1d.",
        ),
    ] = "start",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more at the end.")] = False,
    count: Annotated[int | None, typer.Option("-n", "--count", min=0, help="End after N records.")] = None,
    partition: Annotated[
        list[int] | None, typer.Option("--partition", "-p", min=0, help="Only this partition. Repeatable.")
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", "-F", metavar="TEMPLATE", help=f"How to print a record: {FIELDS_HELP}."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", "-J", help="One JSON object a line.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="The bare bytes of the values, with nothing between.")
    ] = False,
) -> None:
    """Print the records of a topic up to its present end, or with --follow as they come."""
    if sum((format_ is not None, json, raw)) > 1:
        raise typer.BadParameter("--format, --json and --raw exclude each other")
    formatter = _formatter(format_, json, raw)
    position = parse_start(start, now_ms=time.time_ns() // 1_000_000)
    with connected(ctx, cluster) as log, _consumer(log, topic, partition) as consumer:
        seek(log, consumer, position)
        records = _follow(consumer) if follow else _chunks(consumer.records(until="end"))
        _print(records, formatter, count)


def _consumer(log: Log, topic: str, partitions: list[int] | None) -> Consumer:
    if partitions:
        return log.consumer(assign=[(topic, partition) for partition in partitions])
    return log.consumer(topic)


def _formatter(text: str | None, json: bool, raw: bool) -> Formatter:
    if json:
        return as_json
    return template("%v", end="") if raw else template("%v" if text is None else text)


def parse_start(text: str, now_ms: int) -> Start:
    """Read the value of ``--from``; ``now_ms`` is what "30m" counts back from.

    Raises:
        ConfigError: none of the ways to say it.
    """
    if text in ("start", "earliest", "beginning"):
        return Start(Where.START)
    if text in ("end", "latest"):
        return Start(Where.END)
    if re.fullmatch(r"\d+", text):
        return Start(Where.OFFSET, int(text))
    if re.fullmatch(r"-\d+", text):
        return Start(Where.LAST, int(text[1:]))
    if re.fullmatch(r"@\d+", text):
        return Start(Where.TIME, int(text[1:]))
    if ago := re.fullmatch(r"(\d+)([smhd])", text):
        return Start(Where.TIME, now_ms - int(ago[1]) * _UNITS_MS[ago[2]])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"--from {text!r} is not start, end, an offset, -N, a date and time, @MS, or a time ago (30m)"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return Start(Where.TIME, int(moment.timestamp() * 1000))


def seek(log: Log, consumer: Consumer, start: Start) -> None:
    """Move every assigned partition to ``start``."""
    match start.where:
        case Where.START:
            consumer.seek_to_beginning()
        case Where.END:
            consumer.seek_to_end()
        case Where.TIME:
            consumer.seek_to_time(start.number)
        case Where.OFFSET:
            for assigned in consumer.assignment():
                consumer.seek(assigned, start.number)
        case Where.LAST:
            for assigned in consumer.assignment():
                partition = log.describe_topic(assigned.topic).partitions[assigned.partition]
                consumer.seek(assigned, max(partition.start_offset, partition.committed - start.number))


def _follow(consumer: Consumer) -> Iterator[list[Record]]:
    while not reader_gone():
        yield consumer.poll(timeout=POLL_S)


def _chunks(records: Iterable[Record], size: int = 500) -> Iterator[list[Record]]:
    iterator = iter(records)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _print(chunks: Iterable[list[Record]], formatter: Formatter, count: int | None) -> None:
    """Write chunk by chunk, each flushed, so that a reader sees a record as soon as it is there."""
    out = stdout().buffer
    left = count
    if left == 0:
        return
    for chunk in chunks:
        wanted = chunk if left is None else chunk[:left]
        if wanted:
            out.write(b"".join(map(formatter, wanted)))
            out.flush()
        if left is not None:
            left -= len(wanted)
            if left == 0:
                return
