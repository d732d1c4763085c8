"""``raftlog start``, ``status``, ``upgrade`` and ``shutdown``: a cluster as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raftlog.cli import session
from raftlog.cli.session import ClusterOption, JsonOption, connected, console, print_json, table

if TYPE_CHECKING:
    from rich.console import Console

    from raftlog.client.descriptions import (
        ClusterDescription,
        PartitionDescription,
        TopicDescription,
    )

NUMBERS = frozenset(
    {"partition", "partitions", "term", "start", "committed", "end", "replicas held", "leads", "pid"}
)


def start(
    ctx: typer.Context,
    cluster: ClusterOption = "default",
    brokers: Annotated[
        int | None,
        typer.Option("--brokers", "-b", min=1, help="Brokers to start; one per node if not given."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="RAFTLOG_DATA_DIR", help="Where brokers keep their data; what is there is recovered."
        ),
    ] = None,
    ephemeral: Annotated[
        bool, typer.Option("--ephemeral", help="Keep the data in a temporary directory.")
    ] = False,
    brokers_per_node: Annotated[
        int, typer.Option("--brokers-per-node", min=1, help="For nodes with many cores.")
    ] = 1,
) -> None:
    """Start a cluster on the Ray that runs, recover it from its data, or attach to it when it is up."""
    directory = None if data_dir is None else str(data_dir.expanduser().absolute())
    log = session.session(ctx).start(
        name=cluster,
        brokers=brokers,
        data_dir=directory,
        ephemeral=ephemeral,
        brokers_per_node=brokers_per_node,
    )
    try:
        _print_brokers(console(), log.describe_cluster())
    finally:
        log.close()


def status(ctx: typer.Context, cluster: ClusterOption = "default", as_json: JsonOption = False) -> None:
    """Show brokers, and each partition's leader, term and commit position; name what is under-replicated."""
    with connected(ctx, cluster) as log:
        described = log.describe_cluster()
        topics = [log.describe_topic(name) for name in sorted(log.topics())]
    if as_json:
        print_json({"cluster": described, "topics": topics})
        return
    out = console()
    _print_brokers(out, described)
    if topics:
        out.print()
        print_partitions(out, topics)
    out.print()
    out.print(_summary(described, topics))


def shutdown(
    ctx: typer.Context,
    cluster: ClusterOption = "default",
    force: Annotated[bool, typer.Option("--force", help="Even while clients are connected.")] = False,
) -> None:
    """Stop a cluster's brokers. Its data stays: `raftlog start` brings it back."""
    session.session(ctx).shutdown(cluster, force)
    console().print(f"cluster {cluster} is stopped; its data stays")


def upgrade(ctx: typer.Context, cluster: ClusterOption = "default") -> None:
    """Use what a new release brings, once every broker runs it. There is no way back."""
    with connected(ctx, cluster) as log:
        level = log.upgrade()
    console().print(f"cluster {cluster} runs at feature level {level}, the newest that every broker knows")


def drain(
    ctx: typer.Context,
    brokers: Annotated[list[int], typer.Argument(metavar="BROKER...", help="Ids of the brokers.")],
    cluster: ClusterOption = "default",
    undo: Annotated[bool, typer.Option("--undo", help="Let them stay after all.")] = False,
) -> None:
    """Move everything away from brokers that are to go: first leaders, then replicas. `raftlog status` shows
    what they still hold."""
    with connected(ctx, cluster) as log:
        log.drain(brokers, undo=undo)
    names = ", ".join(map(str, brokers))
    console().print(
        f"brokers {names} {'stay' if undo else 'drain: they are empty when they hold 0 replicas'}"
    )


def rebalance(
    ctx: typer.Context,
    cluster: ClusterOption = "default",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would move.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what the controller will move, and have it look at once."""
    moves = session.session(ctx).plan(cluster, not dry_run)
    if as_json:
        print_json(moves)
        return
    out = console()
    if not moves:
        out.print("nothing to move")
        return
    rows = table("topic", "partition", "brokers", "to", "MB to copy", "why", right=NUMBERS | {"MB to copy"})
    for move in moves:
        rows.add_row(
            move.topic,
            str(move.partition),
            " ".join(map(str, move.brokers)),
            " ".join(map(str, move.to)),
            f"{move.bytes / 1e6:.1f}",
            move.reason,
        )
    out.print(rows)
    out.print()
    total = sum(move.bytes for move in moves) / 1e6
    verb = "would change" if dry_run else "change"
    out.print(f"{len(moves)} partitions {verb}, {total:.1f} MB to copy")


def _print_brokers(out: Console, described: ClusterDescription) -> None:
    out.print(f"cluster [bold]{described.name}[/bold]  {described.cluster_id}")
    out.print()
    rows = table("broker", "state", "address", "node", "pid", "replicas held", "leads", right=NUMBERS)
    for broker in described.brokers:
        colour = {"alive": "green", "draining": "yellow"}.get(broker.state, "red")
        rows.add_row(
            str(broker.id),
            f"[{colour}]{broker.state}[/{colour}]",
            str(broker.address),
            broker.node_id[:12],
            str(broker.pid),
            str(broker.replicas),
            str(broker.leaders),
        )
    out.print(rows)


def print_partitions(out: Console, topics: list[TopicDescription]) -> None:
    """A table with one line per partition: leader, term, replicas, offsets, and who is behind."""
    rows = table(
        "topic",
        "partition",
        "leader",
        "term",
        "replicas",
        "start",
        "committed",
        "end",
        "behind",
        right=NUMBERS,
    )
    for topic in topics:
        for partition in topic.partitions:
            rows.add_row(
                topic.name,
                str(partition.index),
                "[red]none[/red]" if partition.leader is None else str(partition.leader),
                str(partition.term),
                " ".join(map(str, partition.replicas)),
                str(partition.start_offset),
                str(partition.committed),
                str(partition.end_offset),
                f"[yellow]{' '.join(map(str, partition.lagging))}[/yellow]",
            )
    out.print(rows)


def is_under_replicated(partition: PartitionDescription) -> bool:
    """Whether a replica is behind, or there is no leader to tell."""
    return partition.leader is None or bool(partition.lagging)


def _summary(described: ClusterDescription, topics: list[TopicDescription]) -> str:
    partitions = [partition for topic in topics for partition in topic.partitions]
    behind = sum(map(is_under_replicated, partitions))
    alive = sum(broker.state == "alive" for broker in described.brokers)
    counts = f"{alive} of {len(described.brokers)} brokers alive, {len(partitions)} partitions"
    if behind:
        return f"{counts}, [yellow]{behind} under-replicated[/yellow]"
    return f"{counts}, [green]none under-replicated[/green]"
