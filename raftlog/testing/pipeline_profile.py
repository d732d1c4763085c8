"""What a seed means for groups and transactions."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Final

from raftlog.broker.transactions import EPOCH_MAX

CLIENT_FAULTS: Final = {"client pause": 1.0, "client cut": 1.0, "kill coordinator": 1.0}
"""Faults for runs with groups and transactions only, and how often they come."""
OFFSETS_RETENTION_MS: Final = 60_000
"""Longer than faults keep all members of a group away, and than transactions of the dead take to end."""


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
    takers: int = 0
    """Members of each group that commits positions without transactions: at least once, at most once."""
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
    epoch_max: int = EPOCH_MAX
    """The last epoch of a producer id that a coordinator gives out; a small one is soon used up."""
    offsets_retention_ms: int | None = None
    """A group that only looks in at the beginning is forgotten after this, and no other one."""


def draw_pipeline(seed: int) -> PipelineProfile | None:
    """The pipeline of a seed; None: it has none."""
    rng = random.Random(f"pipeline {seed}")
    if rng.random() < 0.4:
        return None
    profile = PipelineProfile(
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
    return replace(
        profile,
        takers=rng.choice([0, 1, 2]),
        epoch_max=rng.choice([EPOCH_MAX, EPOCH_MAX, 4]),
        offsets_retention_ms=rng.choice([None, None, None, None, OFFSETS_RETENTION_MS]),
    )
