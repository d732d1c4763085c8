"""Swarm: what kind of run a seed means.

Every seed draws its own cluster size, settings, workload and set of faults, and how often each comes. A run
with few kinds of faults goes deeper into them than one with all (Groce et al., "Swarm testing", 2012).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, Final

from raftlog.config import BrokerConfig
from raftlog.controller.reconcile import Policy
from raftlog.storage.spec import StorageConfig
from raftlog.testing.pipeline_profile import CLIENT_FAULTS, PipelineProfile, draw_pipeline

FAULTS: Final[dict[str, float]] = {
    "break": 1.0,
    "kill": 1.0,
    "crash twice": 1.0,
    "power cut": 1.5,
    "blackout": 1.5,
    "isolate": 1.0,
    "one way": 1.0,
    "split": 1.0,
    "clog": 0.7,
    "slow link": 0.7,
    "slow receiver": 0.7,
    "deafen": 0.5,
    "usurp": 2.0,
    "stall": 1.0,
    "pause": 1.0,
    "clock": 0.5,
    "full disk": 0.7,
    "failed sync": 0.5,
    "transfer": 0.7,
    "move": 2.0,
    "fall behind": 1.5,
    "client crash": 0.5,
    "rot": 1.0,
    "misdirected write": 0.7,
    "rot of the journal": 0.7,
    "wipe": 0.7,
}
"""Every fault and how often it comes, relative to the others, where a seed has it at all."""
ELASTIC_FAULTS: Final = {"kill controller": 1.0, "two controllers": 0.4, "drain": 1.0, "grow": 0.6}
"""Of runs in which brokers come and go."""

SEGMENT_BYTES_MIN: Final = 64 << 10
NEVER_MS: Final = 1 << 40


@dataclass(frozen=True)
class Profile:
    """One run, without its chances. ``skip`` leaves out faults by their number (to shrink a failure)."""

    seed: int
    brokers: int = 3
    partitions: int = 2
    replication: int = 3
    producers: int = 2
    values: int = 250
    fault_count: int = 12
    gap_seconds: tuple[float, float] = (0.05, 2.5)
    weights: dict[str, float] = field(default_factory=lambda: dict(FAULTS))
    sync_seconds: tuple[float, float] = (0.0002, 0.003)
    latency: tuple[float, float] = (0.0001, 0.002)
    large_values: float = 0.03
    """Share of values that are padded, up to ``value_bytes_max``."""
    value_bytes_max: int = 20_000
    topic: dict[str, Any] = field(default_factory=lambda: {"segment_bytes": SEGMENT_BYTES_MIN})
    """Settings of the topic."""
    config: BrokerConfig = field(default_factory=BrokerConfig)
    storage: StorageConfig = field(
        default_factory=lambda: StorageConfig(
            journal_bytes=256 << 10, direct_bytes=8 << 10, flush_bytes=64 << 10
        )
    )
    liveness: bool = False
    """In the end only a random quorum is healed, and must make progress, before all is."""
    pipeline: PipelineProfile | None = None
    """Groups and transactions."""
    policy: Policy = field(default_factory=Policy)
    """Of the controller."""
    skip: frozenset[int] = frozenset()

    @property
    def retains(self) -> bool:
        """Whether the topic has a retention, so that log starts move."""
        return bool(self.topic.keys() & {"retention_bytes", "retention_ms"})

    @property
    def may_forget(self) -> bool:
        """Whether a power cut may take what was acknowledged (flush=interval)."""
        return self.topic.get("flush") == "interval"

    def without(self, faults: frozenset[int]) -> Profile:
        """The same run without these faults as well."""
        return replace(self, skip=self.skip | faults)


def draw(seed: int) -> Profile:
    """The profile of a seed."""
    rng = random.Random(f"profile {seed}")
    brokers = rng.choices([1, 3, 4, 5], [1, 5, 1, 3])[0]
    latency = rng.choice([0.001, 0.002, 0.02])
    kinds = rng.sample(sorted(FAULTS), rng.randint(4, len(FAULTS)))
    journal = rng.choice([32, 128, 256])
    sync = rng.choice([0.0005, 0.003, 0.02])
    topic = _draw_topic(rng)
    profile = Profile(
        seed=seed,
        brokers=brokers,
        partitions=rng.randint(1, 3),
        replication=min(brokers, rng.choice([3, 3, 5])),
        producers=rng.randint(1, 3),
        values=rng.choice([60, 120]),
        fault_count=rng.randint(4, 14),
        gap_seconds=(0.02, rng.choice([0.5, 1.5, 2.5])),
        weights={kind: FAULTS[kind] * rng.choice([0.3, 1.0, 3.0]) for kind in kinds},
        sync_seconds=(sync / 10, sync),
        latency=(latency / 20, latency),
        large_values=rng.choice([0.0, 0.03, 0.2]),
        topic=topic,
        config=BrokerConfig(
            election_timeout_ms=rng.choice([300, 1000]),
            preferred_leader_after_ms=random.Random(f"leaders {seed}").choice([0, 300, 2000]),
            heartbeat_ms=rng.choice([50, 100]),
            append_bytes_max=rng.choice([2 << 10, 64 << 10, 1 << 20]),
            inflight_messages_max=rng.choice([1, 4, 16]),
            inflight_bytes_max=rng.choice([64 << 10, 8 << 20]),
            cache_bytes_max=rng.choice([0, 32 << 10, 4 << 20]),
        ),
        storage=StorageConfig(
            journal_bytes=journal << 10,
            direct_bytes=rng.choice([2, 8, 64]) << 10,
            cache_bytes=rng.choice([16 << 10, 64 << 20]),
            flush_bytes=rng.choice([8, 64]) << 10,
            index_interval_bytes=1024,
            index_checkpoint_bytes=64 << 10,
        ),
        liveness=rng.random() < 0.4,
    )
    profile = _with_policy(profile)
    pipeline = draw_pipeline(seed)
    if pipeline is not None:
        weights = profile.weights | CLIENT_FAULTS
        if pipeline.offsets_retention_ms is not None:
            weights.pop("clock", None)  # who is forgotten goes by the coordinator's clock
            forgets = {"offsets_retention_ms": pipeline.offsets_retention_ms}
            profile = replace(profile, config=profile.config.model_copy(update=forgets))
        profile = replace(profile, pipeline=pipeline, weights=weights)
    return replace(profile, large_values=0.4) if profile.retains else profile


def _with_policy(profile: Profile) -> Profile:
    """How the controller of a seed goes about it, and what happens to it."""
    rng = random.Random(f"elastic {profile.seed}")
    policy = Policy(
        replace_after_ms=rng.choice([3_000, 30_000, NEVER_MS]),
        moves_max=rng.choice([1, 4, 20]),
        bytes_max=rng.choice([1 << 10, 1 << 30]),
        brokers=profile.brokers,
    )
    is_elastic = profile.brokers >= 3 and rng.random() < 0.4
    weights = profile.weights | ELASTIC_FAULTS if is_elastic else profile.weights
    return replace(profile, policy=policy, weights=weights)


def _draw_topic(rng: random.Random) -> dict[str, Any]:
    """Settings of the topic. With retention the segments are small, and so is what must stay."""
    topic: dict[str, Any] = {"segment_bytes": rng.choice([1, 1, 16]) * SEGMENT_BYTES_MIN}
    if rng.random() < 0.35:
        topic["segment_bytes"] = SEGMENT_BYTES_MIN
        limits = {"retention_bytes": rng.choice([0, 64, 200]) << 10, "retention_ms": rng.choice([500, 3_000])}
        for name in rng.choice([["retention_bytes"], ["retention_ms"], list(limits)]):
            topic[name] = limits[name]
    if rng.random() < 0.3:
        topic |= {"flush": "interval", "flush_interval_ms": rng.choice([20, 500, 5_000])}
    if rng.random() < 0.1:
        topic["max_message_bytes"] = 16 << 10
    return topic
