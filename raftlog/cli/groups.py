"""``raftlog groups``: list, describe, delete, reset."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from raftlog.cli.session import ClusterOption, JsonOption, connected, console, print_json, table, write_out
from raftlog.errors import ConfigError

if TYPE_CHECKING:
    from raftlog.client.descriptions import GroupDescription
    from raftlog.client.group_admin import ResetTo

app = typer.Typer(help="List, describe, delete and reset consumer groups.", no_args_is_help=True)

GroupArgument = Annotated[str, typer.Argument(metavar="GROUP", help="Name of the group.")]


@app.command("list")
def list_groups(
    ctx: typer.Context,
    cluster: ClusterOption = "default",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Names only, one a line.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the groups: members, partitions and lag of each."""
    with connected(ctx, cluster) as log:
        names = log.groups()
        if quiet:
            write_out("".join(f"{name}\n" for name in names).encode())
            return
        groups = [log.describe_group(name) for name in names]
    if as_json:
        print_json(groups)
        return
    rows = table(
        "group",
        "state",
        "members",
        "partitions",
        "lag",
        right=frozenset({"members", "partitions", "lag"}),
    )
    for group in groups:
        rows.add_row(
            group.name,
            group.state,
            str(len(group.members)),
            str(len(group.offsets)),
            str(sum(each.lag or 0 for each in group.offsets)),
        )
    console().print(rows)


@app.command()
def describe(
    ctx: typer.Context, group: GroupArgument, cluster: ClusterOption = "default", as_json: JsonOption = False
) -> None:
    """Show a group's members, and how far it has come with each partition."""
    with connected(ctx, cluster) as log:
        described = log.describe_group(group)
    if as_json:
        print_json(described)
    else:
        _print_group(described)


def _print_group(group: GroupDescription) -> None:
    out = console()
    out.print(f"group [bold]{group.name}[/bold], {group.state}, epoch {group.epoch}, {group.assignor}")
    out.print()
    if group.members:
        rows = table("member", "client", "host", "state", "partitions", right=frozenset({"partitions"}))
        for member in group.members:
            rows.add_row(
                member.member_id[:_SHORT],
                member.client_id,
                member.host,
                member.state,
                str(len(member.partitions)),
            )
        out.print(rows)
        out.print()
    right = frozenset({"partition", "committed", "end", "lag"})
    rows = table("topic", "partition", "committed", "end", "lag", "member", "metadata", right=right)
    for each in group.offsets:
        rows.add_row(
            each.topic,
            str(each.partition),
            "-" if each.committed is None else str(each.committed),
            str(each.end),
            "-" if each.lag is None else str(each.lag),
            (each.member_id or "-")[:_SHORT],
            each.metadata,
        )
    out.print(rows)


_SHORT = 8
"""Characters of a member id: enough to tell the members of a group apart."""


@app.command()
def delete(
    ctx: typer.Context,
    group: GroupArgument,
    cluster: ClusterOption = "default",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a group without members, and what it has committed."""
    with connected(ctx, cluster) as log:
        log.describe_group(group)  # ask only about what is there
        if not yes:
            typer.confirm(f"Delete group {group} and all offsets it has committed?", abort=True)
        log.delete_group(group)
    console().print(f"group {group} is deleted")


@app.command()
def reset(
    ctx: typer.Context,
    group: GroupArgument,
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="Name of the topic.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="earliest|latest|TIME|OFFSET",
            help="Where to go on: the first record there is, the end, the first record of a time (ISO 8601, "
            "local unless it names a zone), or an offset of each partition in --partition.",
        ),
    ],
    cluster: ClusterOption = "default",
    partitions: Annotated[
        list[int] | None,
        typer.Option("--partition", "-p", min=0, help="With an offset: of this partition. Repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Have a group without members read a topic from elsewhere."""
    target = _target(to, topic, partitions)
    with connected(ctx, cluster) as log:
        found = log.reset_offsets(group, topic, target)
    if as_json:
        print_json(
            [{"topic": each.topic, "partition": each.partition, "offset": found[each]} for each in found]
        )
        return
    rows = table("topic", "partition", "offset", right=frozenset({"partition", "offset"}))
    for place, offset in sorted(found.items()):
        rows.add_row(place.topic, str(place.partition), str(offset))
    console().print(rows)


def _target(text: str, topic: str, partitions: list[int] | None) -> ResetTo:
    if text.isdecimal():
        if not partitions:
            raise ConfigError(f"offset {text}: of which partition? Name it with --partition")
        return {(topic, each): int(text) for each in partitions}
    if partitions:
        raise ConfigError(f"--partition goes with an offset, not with {text!r}")
    if text == "earliest":
        return "earliest"
    if text == "latest":
        return "latest"
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise ConfigError(f"{text!r} is neither earliest, latest, an offset nor a time") from None
