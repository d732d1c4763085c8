"""Rules that the linters do not know. Each names the file and line that breaks it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES_MAX = 600
SOURCES = sorted(
    path
    for folder in ("raftlog", "tests", "examples", "bench", "deploy")
    for path in (ROOT / folder).rglob("*.py")
)
TEXTS = [
    *SOURCES,
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("deploy/**/*.yaml"),
    *(ROOT / name for name in ("Makefile", "pyproject.toml", "cluster.yaml", ".ci/run")),
]
PACKAGES = sorted(path.parent for path in (ROOT / "raftlog").rglob("__init__.py"))

PUBLIC = (
    "*.py",
    "client/*.py",
    "record/*.py",
    "testing/*.py",
    "cli/*.py",
    "actors/launch.py",
    "storage/verify.py",
)
"""What users import, or read because they import it."""

LEFT_OVER = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError|breakpoint\(\))")
MACHINE_PATH = re.compile(r"(?<![\w.~}/])/(work|root|home|Users|mnt)/\w")


def breaches(paths: list[Path], pattern: re.Pattern[str]) -> Iterator[str]:
    """file:line for each line that matches, this file left out."""
    for path in paths:
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if pattern.search(line):
                yield f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def refuse(found: Iterable[str]) -> None:
    """Fail with everything that was found, a line each."""
    lines = list(found)
    assert not lines, "\n" + "\n".join(lines)


def test_a_file_holds_one_idea() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: lines for path, lines in long.items() if lines > LINES_MAX} == {}


def test_nothing_is_left_unfinished() -> None:
    refuse(breaches(SOURCES, LEFT_OVER))


def test_no_path_of_a_developers_machine() -> None:
    refuse(breaches(TEXTS, MACHINE_PATH))


def test_tests_wait_for_conditions_and_not_for_time() -> None:
    tests = [path for path in SOURCES if path.is_relative_to(ROOT / "tests")]
    refuse(breaches(tests, re.compile(r"\btime\.sleep\(")))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_says_what_it_is_for(package: Path) -> None:
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    assert docstring, f"{package} has no docstring: what is it for, what may it import, where to begin?"


def test_what_users_import_is_documented() -> None:
    missing = []
    for path in (path for name in PUBLIC for path in (ROOT / "raftlog").glob(name)):
        module = ast.parse(path.read_text())
        if not ast.get_docstring(module):
            missing.append(f"{path.relative_to(ROOT)}: the module")
        for node in module.body:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}")
    refuse(missing)


def test_the_patterns_can_fail() -> None:
    assert LEFT_OVER.search("x = 1  # TODO: later")
    assert MACHINE_PATH.search("path = '/home/somebody'")
    assert not MACHINE_PATH.search("https://example.org/home/page and ~/work/x")
