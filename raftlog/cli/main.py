"""The command line: its commands, and how each ending looks.

A command ends with 0; with 1 and one red line on stderr when raftlog refuses or fails; with 2 and a usage
message when the command line is wrong; with 130, quietly, on Ctrl-C; and with 0, quietly, when the reader of
its output has gone (``raftlog consume flights | head``). A traceback is for bugs, and only with
RAFTLOG_LOG_LEVEL=debug.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from raftlog.cli import cluster, consume, groups, produce, recover, status, topics, transactions, verify
from raftlog.cli.session import abandon_stdout, print_error
from raftlog.errors import RaftlogError

INTERRUPTED = 130
"""What a shell makes of a process that SIGINT ended: 128 + 2."""


class QuietGroup(TyperGroup):
    """The root of the commands: every one of them ends in :meth:`invoke`."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; turn whatever it raises into an exit code."""
        try:
            return super().invoke(ctx)
        except RaftlogError as error:
            print_error(error)
        except BrokenPipeError:
            abandon_stdout()
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except OSError as error:  # a file the user named cannot be read, and the like
            print_error(error)
        raise typer.Exit(1)


app = typer.Typer(
    cls=QuietGroup,
    name="raftlog",
    help="A replicated, durable log inside your Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("start")(cluster.start)
app.command("status")(status.status)
app.add_typer(topics.app, name="topics")
app.add_typer(groups.app, name="groups")
app.add_typer(transactions.app, name="transactions")
app.command("produce")(produce.produce)
app.command("consume")(consume.consume)
app.command("verify")(verify.verify)
app.command("recover")(recover.recover)
app.command("upgrade")(cluster.upgrade)
app.command("drain")(cluster.drain)
app.command("rebalance")(cluster.rebalance)
app.command("shutdown")(cluster.shutdown)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"raftlog {version('raftlog')}")
        except PackageNotFoundError:  # run from a source tree on PYTHONPATH
            typer.echo("raftlog (not installed)")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``raftlog`` script."""
    try:
        app()
    except KeyboardInterrupt:  # before or after the command itself: while modules load, or at exit
        sys.exit(INTERRUPTED)
    except Exception as error:  # a bug: still one line, unless the traceback is asked for
        if os.environ.get("RAFTLOG_LOG_LEVEL", "").lower() == "debug":
            raise
        print_error(error)
        typer.echo("this is a bug in raftlog; RAFTLOG_LOG_LEVEL=debug shows where", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
