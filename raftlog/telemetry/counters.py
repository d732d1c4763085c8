"""What hot paths count: plain numbers, added to in place and read by a sampler every few seconds.

Counters only grow while their process lives; whoever reads them takes differences. Latencies are taken of a
sample that is spread evenly over what happens, so that timing costs the same however much that is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

SAMPLES_PER_LOOK: Final = 200
"""Latencies that are taken between two looks, about."""


class Latency:
    """How long something takes, of every n-th time. On a hot path::

        latency.count += 1
        if latency.count >= latency.next:
            began = clock()
            ...
            latency.add(clock() - began)

    Attributes:
        count: how many there were.
        next: from which on the next one is timed.
    """

    __slots__ = ("_counted", "_stride", "_taken", "count", "next")

    def __init__(self) -> None:
        self.count = 0
        self.next = 0
        self._stride = 1
        self._counted = 0
        self._taken: list[float] = []

    def add(self, seconds: float) -> None:
        """One took so long."""
        self.next = self.count + self._stride
        if len(self._taken) < 2 * SAMPLES_PER_LOOK:
            self._taken.append(seconds)

    def take(self) -> list[float]:
        """What was timed since the last call, in seconds. How many go by untimed from here on follows from
        how many there were."""
        taken, self._taken = self._taken, []
        self._stride = 1 + (self.count - self._counted) // SAMPLES_PER_LOOK
        self._counted = self.count
        self.next = min(self.next, self.count + self._stride)
        return taken


@dataclass(slots=True)
class Traffic:
    """What went through one broker for one topic."""

    records_in: int = 0
    """Appended by leaders here; a few may never have been committed."""
    bytes_in: int = 0
    """Of their batches, as they came (compressed)."""
    bytes_out: int = 0
    """To consumers, as they are on disk."""


@dataclass(slots=True)
class Counters:
    """Of one broker.

    Args:
        clock: seconds, precise and never going back; a loop's own may stand still during a turn.
    """

    clock: Callable[[], float]
    topics: dict[str, Traffic] = field(default_factory=dict)
    produce: Latency = field(default_factory=Latency)
    """Of a batch, from its append by the leader until it is committed and applied."""
    fetch: Latency = field(default_factory=Latency)
    """Of a fetch, from when there is something to read until the answer is handed over."""
    elections_won: int = 0
    leaderships_lost: int = 0
    transactions_begun: int = 0
    transactions_committed: int = 0
    transactions_aborted: int = 0

    def traffic(self, topic: str) -> Traffic:
        """Of a topic: it outlives the replicas that count in it."""
        found = self.topics.get(topic)
        if found is None:
            found = self.topics[topic] = Traffic()
        return found

    def totals(self) -> dict[str, int]:
        """What `raftlog status` makes rates of."""
        topics = self.topics.values()
        return {
            "records_in": sum(each.records_in for each in topics),
            "bytes_in": sum(each.bytes_in for each in topics),
            "bytes_out": sum(each.bytes_out for each in topics),
            "elections_won": self.elections_won,
        }
