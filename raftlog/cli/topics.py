"""``raftlog topics``: list, create, alter, describe, delete."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from raftlog.cli.session import ClusterOption, JsonOption, connected, console, print_json, table, write_out
from raftlog.cli.status import is_under_replicated, partitions_table
from raftlog.errors import ConfigError

app = typer.Typer(help="List, create, alter, describe and delete topics.", no_args_is_help=True)

TopicArgument = Annotated[str, typer.Argument(metavar="TOPIC", help="Name of the topic.")]


@app.command("list")
def list_topics(
    ctx: typer.Context,
    cluster: ClusterOption = "default",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Names only, one a line.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the topics: partitions, replicas and records of each."""
    with connected(ctx, cluster) as log:
        names = sorted(log.topics())
        if quiet:
            write_out("".join(f"{name}\n" for name in names).encode())
            return
        topics = [log.describe_topic(name) for name in names]
    if as_json:
        print_json(topics)
        return
    rows = table(
        "topic",
        "partitions",
        "replicas",
        "records",
        "under-replicated",
        right=frozenset({"partitions", "records"}),
    )
    for topic in topics:
        factors = {len(partition.replicas) for partition in topic.partitions}
        rows.add_row(
            topic.name,
            str(len(topic.partitions)),
            "-".join(map(str, sorted({min(factors), max(factors)}))) if factors else "0",
            str(sum(partition.committed - partition.start_offset for partition in topic.partitions)),
            str(sum(map(is_under_replicated, topic.partitions)) or ""),
        )
    console().print(rows)


@app.command()
def create(
    ctx: typer.Context,
    topic: TopicArgument,
    cluster: ClusterOption = "default",
    partitions: Annotated[int, typer.Option("--partitions", "-p", min=1, help="Number of partitions.")] = 1,
    replication_factor: Annotated[
        str,
        typer.Option("--replication-factor", "-r", metavar="N|auto", help="Replicas; auto: min(3, brokers)."),
    ] = "auto",
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config", metavar="KEY=VALUE", help="A setting, such as retention_ms=86400000. Repeatable."
        ),
    ] = None,
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="Accept a topic that is there.")] = False,
) -> None:
    """Create a topic; return once each partition has a leader."""
    factor, settings = _factor(replication_factor), parse_settings(config or [])
    with connected(ctx, cluster) as log:
        log.create_topic(
            topic,
            partitions=partitions,
            replication_factor=factor,
            config=settings,
            exist_ok=exist_ok,
        )
    console().print(f"topic {topic} is ready")


@app.command()
def alter(
    ctx: typer.Context,
    topic: TopicArgument,
    cluster: ClusterOption = "default",
    partitions: Annotated[
        int | None, typer.Option("--partitions", "-p", min=1, help="How many in all; never fewer than now.")
    ] = None,
    replication_factor: Annotated[
        str | None,
        typer.Option("--replication-factor", "-r", metavar="N|auto", help="Replicas of each partition."),
    ] = None,
    allow_key_reorder: Annotated[
        bool,
        typer.Option("--allow-key-reorder", help="Records of one key may be in two partitions from here on."),
    ] = False,
) -> None:
    """Give a topic more partitions, or another number of replicas, while it is in use."""
    factor = None if replication_factor is None else _factor(replication_factor)
    with connected(ctx, cluster) as log:
        if partitions is not None:
            there = len(log.describe_topic(topic).partitions)
            if partitions < there:
                raise ConfigError(f"topic {topic!r} has {there} partitions and can have no fewer")
            if partitions > there:
                log.add_partitions(topic, partitions - there, allow_key_reorder)
            console().print(f"topic {topic} has {partitions} partitions")
        if factor is not None:
            log.set_replication(topic, factor)
            console().print(f"topic {topic} is to have {factor} replicas; the controller sees to it")


@app.command()
def describe(
    ctx: typer.Context, topic: TopicArgument, cluster: ClusterOption = "default", as_json: JsonOption = False
) -> None:
    """Show a topic's settings, and each partition's leader, term and positions."""
    with connected(ctx, cluster) as log:
        described = log.describe_topic(topic)
    if as_json:
        print_json(described)
        return
    out = console()
    out.print(f"topic [bold]{described.name}[/bold]")
    for key, value in sorted(described.config.items()):
        out.print(f"  {key} = {value}", markup=False)
    out.print()
    out.print(partitions_table([described]))


@app.command()
def delete(
    ctx: typer.Context,
    topic: TopicArgument,
    cluster: ClusterOption = "default",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a topic and every record in it."""
    with connected(ctx, cluster) as log:
        log.describe_topic(topic)  # ask only about what is there
        if not yes:
            typer.confirm(f"Delete topic {topic} and every record in it?", abort=True)
        log.delete_topic(topic)
    console().print(f"topic {topic} is deleted")


def _factor(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise ConfigError(f"replication factor {text!r} is neither a number nor auto")
    return int(text)


def parse_settings(pairs: list[str]) -> dict[str, str]:
    """``["a=1", …]`` as a dict.

    Raises:
        ConfigError: a pair without "=".
    """
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{pair!r} is not KEY=VALUE")
        settings[key.strip()] = value.strip()
    return settings
