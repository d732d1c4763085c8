"""The commands that deployment files, the README and the manual name are those that there are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from raftlog.cli.main import app

ROOT = Path(__file__).parents[2]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DEPLOYMENT = sorted(
    [ROOT / "cluster.yaml", *(each for each in (ROOT / "deploy").rglob("*") if each.is_file())]
)
RAFTLOG = re.compile(r"(?<![\w.-])raftlog ((?:[a-z]|--)(?:[^'`|>#;]|(?<= )'[^'`]*')*)")
"""`raftlog` as a command, with its arguments, quoted ones too, up to what is the shell's."""
COMMAND_LINE = re.compile(r"^(?:#     |\$ )(.*)|`(raftlog [^`]*)`", re.MULTILINE)
"""In comments of a deployment file, after a prompt, or quoted in a text."""


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of each raftlog command that a text has somebody run."""
    for line in COMMAND_LINE.finditer(text):
        for found in RAFTLOG.finditer(line.group(1) or line.group(2)):
            yield shlex.split(found.group(1))


def parse(arguments: list[str]) -> dict[str, Any]:
    """The options that the command line makes of these arguments, by its own parser; nothing is run."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("raftlog", list(arguments))
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    options: dict[str, Any] = context.params
    return options


@pytest.mark.parametrize("path", [*DEPLOYMENT, *TEXTS], ids=lambda path: path.name)
def test_every_raftlog_command_is_one(path: Path) -> None:
    text = path.read_text()
    for arguments in commands(text):
        try:
            parse(arguments)
        except Exception as error:  # whatever the parser says: told with the file that has the command
            called = f"raftlog {shlex.join(arguments)}"
            is_short = "Missing parameter" in str(error) or type(error).__name__ == "NoArgsIsHelpError"
            if not is_short or f"`{called}`" not in text:  # a sentence may only name it
                raise AssertionError(f"{path.name}: {called}: {error}") from error


@pytest.mark.parametrize("path", ["cluster.yaml", "deploy/aws.yaml", "deploy/kuberay/raycluster.yaml"])
def test_a_deployment_says_how_to_start_raftlog_on_its_disk(path: str) -> None:
    text = (ROOT / path).read_text()
    starts = [parse(arguments) for arguments in commands(text) if arguments[0] == "start" and arguments[1:]]
    assert starts, "no `raftlog start`"
    for options in starts:
        assert str(options["data_dir"]) in {"~/raftlog-data", "/data/raftlog"}
        assert text.count(str(options["data_dir"]).removesuffix("/raftlog")) > 1, (
            "nothing makes that directory"
        )


def test_the_job_is_the_pipeline_with_options_it_has() -> None:
    job = yaml.safe_load((ROOT / "deploy/kuberay/rayjob.yaml").read_text())
    python, script, *options = shlex.split(job["spec"]["entrypoint"])
    assert python == "python"
    assert f"COPY deploy/pipeline.py {script}" in (ROOT / "deploy/kuberay/Dockerfile").read_text()
    source = (ROOT / "deploy/pipeline.py").read_text()
    assert all(f'"{option}"' in source for option in options if option.startswith("--"))


def test_the_parser_can_refuse() -> None:
    with pytest.raises(Exception, match="--data-dri"):
        parse(["start", "--data-dri", "x"])
    with pytest.raises(Exception, match="heal"):
        parse(["heal"])
    text = "#     exec '~/venv/bin/raftlog start --brokers 3'  # once\n$ raftlog drain 3 | cat\nraftlog is\n"
    assert list(commands(text)) == [["start", "--brokers", "3"], ["drain", "3"]]
