"""``raftlog start``, ``shutdown``, ``upgrade``, ``drain`` and ``rebalance``: a cluster as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raftlog.cli import session
from raftlog.cli.session import ClusterOption, JsonOption, connected, console, print_json, table
from raftlog.cli.status import brokers_table


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
            envvar="RAFTLOG_DATA_DIR",
            help="Where brokers keep their data; what is there is recovered. $VARIABLES are each node's own.",
        ),
    ] = None,
    ephemeral: Annotated[
        bool, typer.Option("--ephemeral", help="Keep the data in a temporary directory.")
    ] = False,
    brokers_per_node: Annotated[
        int, typer.Option("--brokers-per-node", min=1, help="For nodes with many cores.")
    ] = 1,
    replace_after: Annotated[
        float,
        typer.Option(
            "--replace-after",
            min=0.0,
            metavar="SECONDS",
            help="A broker that is away for longer is replaced, if there are other nodes.",
        ),
    ] = 30.0,
) -> None:
    """Start a cluster on the Ray that runs, recover it from its data, or attach to it when it is up."""
    log = session.session(ctx).start(
        name=cluster,
        brokers=brokers,
        data_dir=None if data_dir is None else directory_of(data_dir),
        ephemeral=ephemeral,
        brokers_per_node=brokers_per_node,
        replace_after=replace_after,
    )
    try:
        described = log.describe_cluster()
        out = console()
        out.print(f"cluster [bold]{described.name}[/bold]  {described.cluster_id}")
        out.print()
        out.print(brokers_table(described))
    finally:
        log.close()


def directory_of(named: Path) -> str:
    """The data directory as every node is told of it: ``~`` and what is relative are those of whoever says
    it, variables those of each node."""
    text = str(named.expanduser())
    return text if text.startswith("$") else str(Path(text).absolute())


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
    rows = table(
        "topic",
        "partition",
        "brokers",
        "to",
        "MB to copy",
        "why",
        right=frozenset({"partition", "MB to copy"}),
    )
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
