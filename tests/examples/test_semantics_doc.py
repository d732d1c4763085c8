"""What docs/SEMANTICS.md says of errors, commands and links is so, and its programs are programs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from textwrap import dedent

import pytest

from raftlog import errors
from raftlog.config import ConsumerConfig, ProducerConfig

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "SEMANTICS.md").read_text()
CLASSES = ("retriable", "abortable", "fatal")


def error_rows() -> dict[str, list[str]]:
    """First cell -> error classes named in the last one."""
    body = TEXT.split("\n## Errors: three classes\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
    return {row[0].strip("`"): row[3].split(", ") for row in rows[3:] if len(row) == 4}


@pytest.mark.parametrize("kind", [*(f"error.{name}" for name in CLASSES), "none of them"])
def test_errors_are_of_the_class_they_are_listed_under(kind: str) -> None:
    named = error_rows()[kind]
    assert len(named) >= 3
    for name in named:
        error = getattr(errors, name)
        flags = [flag for flag in CLASSES if getattr(error, flag)]
        assert flags == ([kind.removeprefix("error.")] if "." in kind else []), name


def test_an_error_is_of_one_class_at_most() -> None:
    found = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]
    assert len(found) > 40
    for error in found:
        assert sum(getattr(error, flag) for flag in CLASSES) <= 1, error.__name__


def test_modes_are_the_settings_own() -> None:
    modes = {mode.strip('"') for mode in re.findall(r"^\| `(\"[a-z-]+\")` \|", TEXT, re.MULTILINE)}
    assert modes == set(ConsumerConfig.presets) == set(ProducerConfig.presets)


def test_programs_parse() -> None:
    programs = [
        dedent(each) for each in re.findall(r"^ *```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE)
    ]
    assert len(programs) >= 4
    for program in programs:
        ast.parse(program)


def test_links_lead_somewhere() -> None:
    for path in DOCS.glob("*.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (DOCS / link).exists(), f"{path.name}: {link}"
