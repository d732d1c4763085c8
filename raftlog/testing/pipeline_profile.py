"""What a seed means for groups and transactions."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

CLIENT_FAULTS: Final = {"client pause": 1.0, "kill coordinator": 1.0}
"""Faults for runs with groups and transactions only, and how often they come."""


@dataclass(frozen=True)
class PipelineProfile:
    """Feeders write transactions to one topic; workers, a group, process them exactly once into another."""

    partitions: int = 2
    feeders: int = 2
    shares_ids: bool = False
    """All feeders have one transactional id, so that each fences the one before."""
    transactions: int = 12
    """Of each feeder."""
    workers: int = 2
    timeout_ms: tuple[int, ...] = (2_000, 10_000)
    """Of transactions; one is drawn for each producer."""
    session_timeout_ms: int = 3_000
    rebalance_timeout_ms: int = 3_000
    stall: float = 0.05
    """How often a client stands still, or user code takes its time, within a transaction."""
    echoes: bool = False
    """Requests of a while ago arrive again."""
    large_values: float = 0.0
    """Share of values that are padded, so that segments roll and snapshots are made."""


def draw_pipeline(seed: int) -> PipelineProfile | None:
    """The pipeline of a seed; None: it has none."""
    rng = random.Random(f"pipeline {seed}")
    if rng.random() < 0.4:
        return None
    return PipelineProfile(
        partitions=rng.randint(1, 3),
        feeders=rng.randint(1, 3),
        shares_ids=rng.random() < 0.3,
        transactions=rng.choice([8, 16]),
        workers=rng.randint(1, 4),
        timeout_ms=rng.choice([(1_000,), (2_000, 10_000), (10_000,)]),
        session_timeout_ms=rng.choice([1_000, 3_000, 10_000]),
        rebalance_timeout_ms=rng.choice([1_000, 5_000]),
        stall=rng.choice([0.0, 0.05, 0.2]),
        echoes=rng.random() < 0.5,
        large_values=rng.choice([0.0, 0.3]),
    )
