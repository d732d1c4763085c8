"""How commands reach the outside: the cluster, the terminal, and the one line in which an error ends."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TextIO

import typer

from raftlog.errors import RaftlogError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from raftlog.client.log import Log

CONNECT_TIMEOUT_S = 10.0
"""Seconds a command waits for a cluster to answer."""
PIPE_WIDTH = 200
"""Columns of a table that goes into a pipe or file: nothing is folded or cut short there."""

ClusterOption = Annotated[
    str,
    typer.Option("--cluster", "-c", envvar="RAFTLOG_CLUSTER", help="Name of the cluster.", metavar="NAME"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


class _Start(Protocol):
    def __call__(
        self,
        *,
        name: str,
        brokers: int | None,
        data_dir: str | None,
        ephemeral: bool,
        brokers_per_node: int,
        replace_after: float,
    ) -> Log: ...


@dataclass(frozen=True, slots=True)
class Session:
    """The public API as the commands use it; tests put a cluster of their own behind it (click's ``obj``).

    Args:
        connect: (cluster name) -> Log, or NotRunning.
        start: found or recover a cluster on the Ray that runs.
        shutdown: (cluster name, force) -> None.
        plan: (cluster name, whether to begin at once) -> what will move.
    """

    connect: Callable[[str], Log]
    start: _Start
    shutdown: Callable[[str, bool], None]
    plan: Callable[[str, bool], list[Any]]


_kept: TextIO | None = None
"""Stdout, once others in this process are sent to stderr."""


def session(ctx: typer.Context) -> Session:
    """The session given to the command line, or the real one.

    With the real one, stdout is the command's alone from here on (see :func:`stdout`): Ray prints there, from
    a thread of its own, that a node has died, and would do so in the middle of what ``--json`` prints.
    """
    global _kept
    if isinstance(ctx.obj, Session):
        return ctx.obj
    if _kept is None:
        _kept, sys.stdout = sys.stdout, sys.stderr
    return Session(connect=_connect, start=_start, shutdown=_shutdown, plan=_plan)


def _connect(name: str) -> Log:
    import raftlog

    return raftlog.connect(name, timeout=CONNECT_TIMEOUT_S)


def _plan(name: str, begin: bool) -> list[Any]:
    from raftlog.actors.launch import plan

    return plan(name, begin)


def _start(
    *,
    name: str,
    brokers: int | None,
    data_dir: str | None,
    ephemeral: bool,
    brokers_per_node: int,
    replace_after: float,
) -> Log:
    import raftlog
    from raftlog.actors.launch import attach_ray

    attach_ray()  # a Ray that start() made here would end with this process, and the brokers too
    return raftlog.start(
        name,
        brokers=brokers,
        data_dir=data_dir,
        ephemeral=ephemeral,
        brokers_per_node=brokers_per_node,
        replace_after=replace_after,
    )


def _shutdown(name: str, force: bool) -> None:
    import raftlog

    raftlog.shutdown(name, force=force)


@contextlib.contextmanager
def connected(ctx: typer.Context, cluster: str) -> Iterator[Log]:
    """The cluster's Log, closed at the end.

    Raises:
        NotRunning: no such cluster answers.
    """
    log = session(ctx).connect(cluster)
    try:
        yield log
    finally:
        log.close()


def stdout() -> TextIO:
    """Where a command prints what it was asked for; nothing else goes there."""
    return _kept or sys.stdout


def console(*, stderr: bool = False) -> Console:
    """A console on the present stdout or stderr; wide, so that nothing is cut, unless it is a terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else stdout()
    return Console(
        file=stream,
        width=None if stream.isatty() else PIPE_WIDTH,
        highlight=False,
        soft_wrap=not stream.isatty(),
    )


def table(*columns: str, right: frozenset[str] = frozenset(), title: str | None = None) -> Table:
    """A plain table, greppable like ``kubectl``'s; ``right`` names the columns of numbers."""
    from rich.table import Table

    made = Table(
        box=None, pad_edge=False, title=title, title_justify="left", header_style="bold", title_style="bold"
    )
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    return made


def print_json(value: Any) -> None:
    """One line of JSON; structs and dataclasses become objects, bytes base64."""
    import msgspec

    write_out(msgspec.json.encode(value) + b"\n")


def write_out(data: bytes) -> None:
    """Write bytes to stdout and flush.

    Raises:
        BrokenPipeError: who read it has gone.
    """
    stdout().buffer.write(data)
    stdout().buffer.flush()


def print_error(error: BaseException) -> None:
    """One red line on stderr: what happened, and what to do about it."""
    text = f"{type(error).__name__}: {error}" if not isinstance(error, RaftlogError) else str(error)
    typer.secho("error: " + " ".join(text.split()), fg=typer.colors.RED, err=True)


def abandon_stdout() -> None:
    """After a broken pipe: drop what is still buffered, so that the flush at exit is quiet."""
    with contextlib.suppress(io.UnsupportedOperation, OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stdout().fileno())
        os.close(null)


def reader_gone() -> bool:
    """Whether stdout is a pipe that nobody reads: a follower with nothing to write would never notice."""
    import select

    try:
        poll = select.poll()
        poll.register(stdout().fileno(), 0)
    except (io.UnsupportedOperation, OSError, ValueError):  # not a file of the system's: a test's buffer
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
