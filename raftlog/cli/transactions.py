"""``raftlog transactions``: list, describe, abort."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from raftlog.cli.session import ClusterOption, JsonOption, connected, console, print_json, table
from raftlog.errors import ConfigError

if TYPE_CHECKING:
    from raftlog.client.transaction_admin import TransactionDescription

app = typer.Typer(help="List, describe and abort transactions.", no_args_is_help=True)

OPEN = ("ongoing", "prepare_commit", "prepare_abort")


@app.command("list")
def list_transactions(
    ctx: typer.Context,
    cluster: ClusterOption = "default",
    topic: Annotated[
        str | None,
        typer.Option("--topic", "-t", help="What is open in this topic, and holds up its readers."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", "-a", help="Also transactional ids with nothing open.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the transactions that are open, and for how long."""
    if topic is not None:
        _list_open(ctx, cluster, topic, as_json)
        return
    with connected(ctx, cluster) as log:
        found = [each for each in log.transactions() if every or each.state in OPEN]
    if as_json:
        print_json(found)
        return
    rows = table(
        "transactional id",
        "state",
        "open for",
        "timeout",
        "partitions",
        "groups",
        right=frozenset({"open for", "timeout", "partitions", "groups"}),
    )
    for each in found:
        rows.add_row(
            each.transactional_id,
            each.state,
            _since(each.start_ms),
            f"{each.timeout_ms / 1000:g} s",
            str(len(each.partitions)),
            str(len(each.groups)),
        )
    console().print(rows)


def _list_open(ctx: typer.Context, cluster: str, topic: str, as_json: bool) -> None:
    with connected(ctx, cluster) as log:
        found = log.open_transactions(topic)
    if as_json:
        print_json(found)
        return
    right = frozenset({"partition", "from offset", "open for", "producer id", "epoch"})
    rows = table(
        "transactional id", "partition", "from offset", "open for", "producer id", "epoch", right=right
    )
    for each in found:
        rows.add_row(
            each.transactional_id or "hangs: nobody knows of it",
            str(each.partition),
            str(each.first_offset),
            _since(each.start_ms),
            str(each.producer_id),
            str(each.epoch),
        )
    console().print(rows)


@app.command()
def describe(
    ctx: typer.Context,
    transactional_id: Annotated[str, typer.Argument(metavar="ID", help="The transactional id.")],
    cluster: ClusterOption = "default",
    as_json: JsonOption = False,
) -> None:
    """Show one transactional id: its state, and what its transaction has enlisted."""
    with connected(ctx, cluster) as log:
        found = log.describe_transaction(transactional_id)
    if as_json:
        print_json(found)
        return
    _print(found)


def _print(found: TransactionDescription) -> None:
    out = console()
    out.print(
        f"transactional id [bold]{found.transactional_id}[/bold], {found.state}, "
        f"producer {found.producer_id} epoch {found.epoch}, coordinator "
        + ("unknown" if found.coordinator is None else f"broker {found.coordinator}")
    )
    if found.state in OPEN:
        out.print(f"open for {_since(found.start_ms)}, aborted after {found.timeout_ms / 1000:g} s")
    rows = table("enlisted", "partition", right=frozenset({"partition"}))
    for topic, index in found.partitions:
        rows.add_row(topic, str(index))
    for group in found.groups:
        rows.add_row(f"group {group}", "")
    if found.partitions or found.groups:
        out.print()
        out.print(rows)


@app.command()
def abort(
    ctx: typer.Context,
    transactional_id: Annotated[
        str | None, typer.Argument(metavar="ID", help="The transactional id; none for one that hangs.")
    ] = None,
    cluster: ClusterOption = "default",
    topic: Annotated[str | None, typer.Option("--topic", "-t", help="Where it hangs.")] = None,
    partition: Annotated[int | None, typer.Option("--partition", "-p", min=0)] = None,
    producer_id: Annotated[int | None, typer.Option("--producer-id", min=0)] = None,
    epoch: Annotated[int | None, typer.Option("--epoch", min=0)] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Abort what an id has open, or what hangs in a partition; `list --topic` shows that."""
    given = (topic, partition, producer_id, epoch)
    if (transactional_id is None) == (given == (None,) * 4):
        raise ConfigError("name a transactional id, or --topic, --partition, --producer-id and --epoch")
    with connected(ctx, cluster) as log:
        if transactional_id is not None:
            found = log.describe_transaction(transactional_id)  # ask only about what is there
            if not yes:
                typer.confirm(f"Abort what {transactional_id} has open ({found.state})?", abort=True)
            log.abort_transaction(transactional_id)
        else:
            if topic is None or partition is None or producer_id is None or epoch is None:
                raise ConfigError("--topic, --partition, --producer-id and --epoch belong together")
            if not yes:
                typer.confirm(f"Abort what hangs in {topic}[{partition}]?", abort=True)
            log.abort_hanging_transaction(topic, partition, producer_id, epoch)
    console().print("it is aborted")


def _since(start_ms: int) -> str:
    return "-" if not start_ms else f"{max(time.time() - start_ms / 1000, 0.0):.1f} s"
