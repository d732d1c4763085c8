"""Raft's safety properties under lost, doubled and reordered messages, crashes and late disks, from seeds."""

from __future__ import annotations

import pytest
from chaos import Chaos

pytestmark = pytest.mark.walk

SEEDS_PER_TEST = 25


@pytest.mark.parametrize("first", range(0, 300, SEEDS_PER_TEST))
def test_safety_holds_after_every_step_and_progress_returns(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        try:
            Chaos(seed).run(500)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
