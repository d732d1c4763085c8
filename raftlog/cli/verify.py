"""``raftlog verify``: check every byte of a data directory, offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raftlog.cli.session import JsonOption, console, print_json, table
from raftlog.errors import DataDirError, RaftlogError

if TYPE_CHECKING:
    from rich.console import Console

    from raftlog.storage.verify import VerifyReport

NUMBERS = frozenset({"partition", "replica", "indexes", "offsets", "bytes"})
DEPTH = 2
"""Folders of brokers may lie this deep below the directory that the user names."""


class NoData(DataDirError):
    """No broker keeps its data there."""

    hint = "name the directory that was given to `raftlog start --data-dir`, or one broker's in it"


def verify(
    data_dir: Annotated[
        Path, typer.Argument(metavar="DATA_DIR", help="A cluster's data directory, or one broker's.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a data directory, offline, changing nothing; exit with 1 if anything is wrong."""
    import asyncio

    reports = {str(folder): asyncio.run(_verify(folder)) for folder in broker_folders(data_dir)}
    if as_json:
        print_json(reports)
    else:
        out = console()
        for folder, report in reports.items():
            _print_report(out, folder, report)
    if any(report.problems for report in reports.values()):
        raise typer.Exit(1)


def broker_folders(data_dir: Path) -> list[Path]:
    """The folders at or below ``data_dir`` that belong to a broker, sorted.

    Raises:
        NoData: there is none.
    """
    from raftlog.storage.identity import IDENTITY_PATH

    patterns = ["/".join(["*"] * depth + [IDENTITY_PATH]) for depth in range(DEPTH + 1)]
    found = sorted({path.parent for pattern in patterns for path in data_dir.glob(pattern)})
    if not found:
        raise NoData(f"no broker's data in {data_dir}")
    return found


async def _verify(folder: Path) -> VerifyReport:
    """The report on one broker's directory; DataDirLocked if the broker runs: half a write is no damage."""
    from raftlog.storage.real_disk import RealDisk
    from raftlog.storage.verify import verify as verify_disk

    disk = RealDisk(folder)
    try:
        await disk.lock()
    except RaftlogError:
        await disk.close()
        raise
    return await verify_disk(disk)


def _print_report(out: Console, folder: str, report: VerifyReport) -> None:
    stopped = "stopped in order" if report.clean else "not stopped in order"
    out.print(f"[bold]{folder}[/bold]  broker {report.broker_id}, {stopped}")
    rows = table("topic", "partition", "replica", "indexes", "offsets", "bytes", "sha256", right=NUMBERS)
    for replica in report.replicas:
        rows.add_row(*map(str, replica))
    out.print(rows)
    for note in report.notes:
        out.print(f"note: {note}", style="yellow", markup=False)
    for problem in report.problems:
        out.print(f"wrong: {problem}", style="red", markup=False)
    out.print("[green]every byte checks[/green]" if not report.problems else "[red]damaged[/red]")
    out.print()
