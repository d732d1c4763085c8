"""Interaction scripts (``golden/*.txt``): each must print today what it printed when it was last looked at.

``GOLDEN_REWRITE=1 pytest tests/raft/test_golden.py`` writes what they print now into the files: read the
difference before you commit it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transcript import Stage, parse, play

from raftlog.raft.log import RaftLog

GOLDEN = Path(__file__).parent / "golden"
SCRIPTS = sorted(GOLDEN.glob("*.txt"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_prints_what_it_printed(path: Path) -> None:
    text = path.read_text()
    played = play(text)
    if os.environ.get("GOLDEN_REWRITE"):
        path.write_text(played)
    else:
        assert played.splitlines() == text.splitlines()


def test_a_script_shows_what_no_invariant_forbids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Canary: without hints the logs still come to agree, one index at a time."""
    text = (GOLDEN / "conflict_hints.txt").read_text()
    monkeypatch.setattr(RaftLog, "meeting_point", lambda self, index, term: min(index - 1, self.last_index))
    assert play(text) != text


def test_the_scripts_use_every_command() -> None:
    blocks = [block for path in SCRIPTS for block in parse(path.read_text())]
    used = {command.split()[0] for block in blocks for command in block.commands}
    assert used == {
        name[:-1].replace("_", "-") for name in vars(Stage) if name.endswith("_") and not name.startswith("_")
    }
