"""How commands end: exit codes, and one line instead of a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from typer.testing import CliRunner

from raftlog.cli.main import app
from raftlog.cli.session import Session
from raftlog.errors import ClusterInUse, NotRunning

COMMANDS = ("start", "status", "topics", "produce", "consume", "verify", "shutdown")


def session_that_raises(make: Callable[[], BaseException]) -> Session:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise make()

    return Session(connect=fail, start=fail, shutdown=fail, plan=fail)


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f" {command} " in result.output
        assert CliRunner().invoke(app, [command, "-h"]).exit_code == 0


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("raftlog ")


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["topics", "list"],
        ["topics", "create", "t"],
        ["topics", "describe", "t"],
        ["topics", "delete", "t", "--yes"],
        ["produce", "t"],
        ["consume", "t"],
        ["start"],
    ],
)
def test_no_cluster_is_one_line_that_says_what_to_do(command: list[str]) -> None:
    session = session_that_raises(lambda: NotRunning("no cluster 'default'\nanswers"))
    result = CliRunner().invoke(app, command, obj=session)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        "error: no cluster 'default' answers (start one with raftlog.start() or `raftlog start`)\n"
    )


def test_the_error_is_red_on_a_terminal() -> None:
    session = session_that_raises(lambda: NotRunning("gone"))
    result = CliRunner().invoke(app, ["status"], obj=session, color=True)
    assert result.stderr.startswith("\x1b[31m")


def test_shutdown_says_who_is_connected() -> None:
    session = session_that_raises(lambda: ClusterInUse("2 clients are connected: a, b", clients=["a", "b"]))
    result = CliRunner().invoke(app, ["shutdown"], obj=session)
    assert result.exit_code == 1
    assert "a, b" in result.stderr
    assert "force" in result.stderr


def test_ctrl_c_exits_130_and_says_nothing() -> None:
    result = CliRunner().invoke(app, ["status"], obj=session_that_raises(KeyboardInterrupt))
    assert result.exit_code == 130
    assert result.output == ""


def test_a_closed_pipe_is_no_error() -> None:
    result = CliRunner().invoke(app, ["status"], obj=session_that_raises(BrokenPipeError))
    assert result.exit_code == 0
    assert result.output == ""


@pytest.mark.parametrize(
    "command",
    [
        ["nonsense"],
        ["consume"],
        ["consume", "t", "--json", "--raw"],
        ["consume", "t", "--count", "many"],
        ["produce", "t", "--key", "k", "-K", ":"],
        ["produce", "t", "-z", "gzip"],
        ["start", "--brokers", "0"],
        ["topics", "create", "t", "--partitions", "0"],
    ],
)
def test_a_wrong_command_line_exits_2_before_anything_is_asked(command: list[str]) -> None:
    result = CliRunner().invoke(app, command, obj=session_that_raises(AssertionError))
    assert result.exit_code == 2
    assert "Usage" in result.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["consume", "t", "--from", "yonder"], "--from 'yonder'"),
        (["consume", "t", "--format", "%q"], "unknown field %q"),
        (["produce", "t", "-H", "novalue"], "'novalue' is not KEY=VALUE"),
        (["topics", "create", "t", "--config", "x"], "'x' is not KEY=VALUE"),
        (["topics", "create", "t", "-r", "three"], "'three' is neither"),
    ],
)
def test_a_wrong_value_is_named_before_anything_is_asked(command: list[str], said: str) -> None:
    result = CliRunner().invoke(app, command, obj=session_that_raises(AssertionError))
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_bug_is_one_line_unless_the_traceback_is_asked_for() -> None:
    code = (
        "from raftlog.cli import main, status\n"
        "status.connected = None\n"
        "main.sys.argv = ['raftlog', 'status']\n"
        "main.main()"
    )
    result = python(code)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: TypeError")
    result = python(code, env={**os.environ, "RAFTLOG_LOG_LEVEL": "debug"})
    assert "Traceback" in result.stderr


def test_what_others_in_the_process_print_is_not_in_the_output() -> None:
    """Ray's listener prints to sys.stdout when a node dies, whatever was asked of it."""
    code = (
        "import sys, raftlog\n"
        "from raftlog.cli.main import main\n"
        "class Log:\n"
        "    def topics(self):\n"
        "        print('(raylet) a node has died')\n"
        "        return []\n"
        "    close = lambda self: None\n"
        "raftlog.connect = lambda name, timeout: Log()\n"
        "sys.argv = ['raftlog', 'topics', 'list', '--json']\n"
        "main()"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"
    assert "a node has died" in result.stderr


def test_the_command_line_loads_nothing_heavy(tmp_path: Path) -> None:
    result = python(
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from raftlog.cli.main import app\n"
        "assert CliRunner().invoke(app, ['--version']).exit_code == 0\n"
        "print(*{'ray', 'aiokafka', 'pandas', 'pyarrow', 'pydantic', 'asyncio'} & sys.modules.keys())",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert result.stderr == ""
    assert result.stdout.strip() == ""
