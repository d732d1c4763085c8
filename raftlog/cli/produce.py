"""``raftlog produce``: each line of stdin becomes a record."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, NamedTuple

import typer

from raftlog.cli.format import unescape
from raftlog.cli.session import ClusterOption, connected
from raftlog.cli.topics import TopicArgument, parse_settings
from raftlog.errors import InvalidRecord


class Line(NamedTuple):
    """A line of input as a record."""

    key: bytes | None
    value: bytes


def produce(
    ctx: typer.Context,
    topic: TopicArgument,
    cluster: ClusterOption = "default",
    key_separator: Annotated[
        str | None,
        typer.Option(
            "--key-separator",
            "-K",
            metavar="TEXT",
            help=r"Split each line into key and value at the first TEXT (\t: tab).",
        ),
    ] = None,
    key: Annotated[str | None, typer.Option("--key", "-k", help="The same key for every record.")] = None,
    partition: Annotated[
        int | None,
        typer.Option("--partition", "-p", min=0, help="The partition to write to; by key if not given."),
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option("--header", "-H", metavar="NAME=VALUE", help="A header. Repeatable.")
    ] = None,
    compression: Annotated[
        Literal["none", "lz4", "zstd"], typer.Option("--compression", "-z", help="Codec of batches.")
    ] = "lz4",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not say how many were written.")] = False,
) -> None:
    """Write each line of stdin as a record; return once all are acknowledged by a majority of replicas."""
    if key is not None and key_separator is not None:
        raise typer.BadParameter("--key and --key-separator exclude each other")
    headers = tuple((name, value.encode()) for name, value in parse_settings(header or []).items())
    fixed_key = None if key is None else key.encode()
    separator = None if key_separator is None else unescape(key_separator)
    count = 0
    with connected(ctx, cluster) as log, log.producer(compression=compression) as producer:
        for line in split_lines(sys.stdin.buffer, separator):
            producer.send(
                topic,
                line.value,
                key=fixed_key if separator is None else line.key,
                headers=headers,
                partition=partition,
            )
            count += 1
    if not quiet:
        typer.echo(f"{count} record{'' if count == 1 else 's'} acknowledged", err=True)


def split_lines(lines: Iterable[bytes], separator: bytes | None) -> Iterator[Line]:
    """Lines without their newline, split at the first ``separator``.

    Raises:
        InvalidRecord: a line without the separator: its key would be lost, and with it its place.
    """
    for number, line in enumerate(lines, 1):
        text = line.removesuffix(b"\n")
        if separator is None:
            yield Line(None, text)
            continue
        key, found, value = text.partition(separator)
        if not found:
            shown = text[:40].decode(errors="backslashreplace")
            raise MissingSeparator(
                f"line {number} has no {separator.decode(errors='backslashreplace')!r}: {shown!r}"
            )
        yield Line(key, value)


class MissingSeparator(InvalidRecord):
    """A line cannot be split into key and value."""

    hint = "the lines before it are written"
