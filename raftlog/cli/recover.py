"""``raftlog recover``: go on with what is left when a majority is lost for good."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raftlog.cli.session import console, table
from raftlog.cli.verify import broker_folders
from raftlog.errors import RecoveryRefused

if TYPE_CHECKING:
    from rich.console import Console

    from raftlog.broker.majority_loss import Group, Loss
    from raftlog.storage.offline import OfflineStore

NUMBERS = frozenset({"from broker", "term", "index", "known committed", "records up to", "new term"})
_STATEMENT = """\
[bold]If you go on:[/bold]
- Each partition goes on from the most recent log that is left, up to "records up to". Where a majority is
  lost, what was acknowledged beyond that is lost too; [bold]how much nobody can tell[/bold], for only the
  lost brokers knew.
- Topics are as the metadata that are left have them: what was made or altered last may be missing, what was
  deleted last may be back.
- Where __groups is cut, groups go on from older positions and read again what they have read. Where
  __transactions is cut, or a partition that a transaction wrote to, a transaction may be there in one place
  and missing in another.
- Consumers that have read beyond the end are told LogTruncated; producers may be told OutOfOrderSequence.
- This is a [bold]new history[/bold], in a new term. The lost brokers are removed from the cluster: should
  their disks turn up, their data are not let in any more. There is no way back: copy the directories first.
"""


def recover(
    data_dir: Annotated[
        list[Path],
        typer.Option(
            "--data-dir",
            metavar="DIR",
            help="A data directory that is left: a cluster's, or one broker's. Name all there are.",
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what is left and what is lost.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Go on with what is left.")] = False,
) -> None:
    """Go on with what is left when a majority of the brokers is lost for good. What was acknowledged only
    there is lost. Offline: the brokers are stopped, and the directories of all that are left are named."""
    import asyncio

    if dry_run and yes:
        raise typer.BadParameter("--dry-run and --yes: say one of them")
    asyncio.run(_recover(_folders(data_dir), yes))


def _folders(named: list[Path]) -> list[Path]:
    """The brokers' directories that are named; none beside them may be forgotten.

    Raises:
        RecoveryRefused: one beside them is of the same cluster.
    """
    from raftlog.storage.identity import IDENTITY_PATH, parse_identity

    folders = sorted({folder.resolve() for each in named for folder in broker_folders(each)})
    clusters = {parse_identity((folder / IDENTITY_PATH).read_bytes()).cluster_id for folder in folders}
    for beside in sorted({path for folder in folders for path in folder.parent.glob(f"*/{IDENTITY_PATH}")}):
        if beside.parent not in folders and parse_identity(beside.read_bytes()).cluster_id in clusters:
            raise RecoveryRefused(
                f"{beside.parent} is a directory of this cluster too: name it, or move it away if it is not "
                "to be used"
            )
    return folders


async def _recover(folders: list[Path], yes: bool) -> None:
    from raftlog.broker.new_history import begin, check_stopped, examine
    from raftlog.net.network import real_seams
    from raftlog.storage.real_disk import RealDisk

    out = console()
    disks: dict[str, RealDisk] = {}
    try:
        for folder in folders:
            disk = disks[str(folder)] = RealDisk(folder)
            await disk.lock()
        stores, by_broker, loss = await examine(disks)
        await check_stopped(real_seams(), {each: store.identity for each, store in stores.items()})
        begun = any(store.identity.recovering for store in stores.values())
        _check_due(loss, begun)
        _print(out, loss, stores)
        if begun:
            out.print(
                "A recovery was begun here and is not finished: it has to be, and this goes on with it."
            )
        if not yes:
            out.print("Nothing was changed. Say --yes to go on.")
            return
        await begin(
            loss, stores, by_broker, int(time.time() * 1000), lambda what: out.print(what, markup=False)
        )
    finally:
        for disk in disks.values():
            await disk.close()


def _check_due(loss: Loss, begun: bool) -> None:
    if loss.is_due or begun:
        return
    survivors = ", ".join(map(str, loss.survivors))
    raise RecoveryRefused(
        f"with brokers {survivors} every group has its majority, and nothing is lost: start the cluster with "
        "`raftlog start`; lost brokers are replaced by themselves"
    )


def _print(out: Console, loss: Loss, stores: Mapping[int, OfflineStore]) -> None:
    identity = stores[loss.survivors[0]].identity
    out.print(f"cluster [bold]{identity.cluster_name}[/bold]  {identity.cluster_id}")
    out.print(
        f"here: brokers {_listed(loss.survivors)}; [red]lost: brokers {_listed(loss.lost) or 'none'}[/red]"
    )
    out.print()
    rows = table(
        "partition",
        "left on",
        "from broker",
        "term",
        "index",
        "known committed",
        "records up to",
        "new term",
        "fate",
        right=NUMBERS,
    )
    for group in (loss.metadata, *loss.groups):
        rows.add_row(*_row(group))
    out.print(rows)
    out.print(f"{loss.unaffected} other partitions have lost nothing")
    for what in loss.unusable:
        out.print(f"cannot be used, and is given up: {what}", style="yellow", markup=False)
    out.print()
    out.print(_STATEMENT)


def _row(group: Group) -> tuple[str, ...]:
    from raftlog.broker.majority_loss import Fate

    colour = {Fate.KEPT: "green", Fate.CUT: "yellow", Fate.LOST: "red"}[group.fate]
    fate = f"[{colour}]{group.fate.value}[/{colour}]"
    if not group.copies:
        return (group.name, "none", "", "", "", "", "0", str(group.term), fate)
    best = group.copies[0]
    return (
        group.name,
        " ".join(str(copy.broker_id) for copy in group.copies),
        str(best.broker_id),
        str(best.term),
        str(best.index),
        f"{best.committed} ({best.committed_offset} records)",
        f"{best.end_offset}" + (" (less after a reboot)" if best.amnesiac else ""),
        str(group.term),
        fate,
    )


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
