"""What clients did and were told: what the checker judges.

Values are globally unique, so a value says which send it came from. A *place* is a partition of a topic,
named as in ``"work/0"``. Times are seconds of the loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

Place: TypeAlias = str
"""``"topic/partition"``."""
Read: TypeAlias = tuple[int, bytes]
"""(offset, value)."""
Reader: TypeAlias = tuple[str, Place]
"""(who, what it reads). A reader that starts anew, or is assigned a partition anew, has another name."""


class Outcome(Enum):
    """How a send or a transaction ended."""

    OPEN = "open"
    """Nothing was heard: the producer died."""
    OK = "ok"
    FAILED = "failed"
    """Certainly not written, or aborted."""
    UNKNOWN = "unknown"
    """Written or not: the producer cannot know."""


@dataclass(slots=True)
class Send:
    """One value sent."""

    producer: str
    place: Place
    value: bytes
    outcome: Outcome = Outcome.OPEN
    offset: int = -1
    """Acknowledged at this offset."""
    ended: float = 0.0
    transaction: str | None = None
    """Of which it is a part. What becomes of it is then the transaction's outcome."""


@dataclass(slots=True)
class Transaction:
    """Sends that shall be seen together or not at all, and the positions of a group that move with them."""

    name: str
    group: str | None = None
    outcome: Outcome = Outcome.OPEN
    end_asked: float | None = None
    """When its producer first asked for a commit; None: never, so that nobody may see anything of it."""
    sent: list[bytes] = field(default_factory=list)
    polled: list[tuple[Place, int, bytes]] = field(default_factory=list)
    """What it read: (place, offset, value)."""
    offsets: dict[Place, int] = field(default_factory=dict)
    """Positions of the group that are committed with it: all that was polled lies below."""


@dataclass
class History:
    """What all clients did."""

    sends: dict[bytes, Send] = field(default_factory=dict)
    """By value, in the order sent."""
    transactions: dict[str, Transaction] = field(default_factory=dict)
    """By name."""
    polls: dict[Reader, list[Read]] = field(default_factory=dict)
    """What each reader polled, in order."""
    finals: dict[Reader, list[Read]] = field(default_factory=dict)
    """Everything from the beginning, once all has healed. Each replica is a reader."""
    committed_only: set[str] = field(default_factory=set)
    """Readers that see committed transactions only. The others see what aborted ones wrote, too."""
    begins: dict[Reader, int] = field(default_factory=dict)
    """Where a reader was told to begin; without one: at the beginning."""
    starts: dict[Place, list[int]] = field(default_factory=dict)
    """Every log start that was ever committed, ascending; without one: 0 all the time."""
    markers: dict[Place, set[int]] = field(default_factory=dict)
    """Offsets that hold the ends of transactions, as replicas have them in their logs."""
    groups: dict[tuple[str, Place], int] = field(default_factory=dict)
    """(group, place) -> position of the group in the end."""
    promises: dict[str, str] = field(default_factory=dict)
    """Groups that commit positions without transactions -> at-least-once or at-most-once."""
    processed: list[tuple[str, Place, int, bytes]] = field(default_factory=list)
    """(group, place, offset, value) of every time that such a group has processed something."""
    seen_at: dict[bytes, float] = field(default_factory=dict)
    """Value -> when a consumer first polled it."""
    shown_at: dict[bytes, float] = field(default_factory=dict)
    """The same, of readers that see committed transactions only."""

    def start(self, place: Place) -> int:
        """Where the log of a partition begins in the end."""
        return max(self.starts.get(place, ()), default=0)

    def count(self, outcome: Outcome) -> int:
        """Sends that ended so."""
        return sum(1 for send in self.sends.values() if send.outcome is outcome)

    def polled(self, reader: Reader, reads: list[Read], now: float) -> None:
        """Note what a reader polled at a time."""
        self.polls.setdefault(reader, []).extend(reads)
        is_committed = reader[0] in self.committed_only
        for _, value in reads:
            self.seen_at.setdefault(value, now)
            if is_committed:
                self.shown_at.setdefault(value, now)

    @property
    def lag_seconds(self) -> float:
        """The worst time from an acknowledgement to the first poll of the value."""
        lags = [
            self.seen_at[send.value] - send.ended
            for send in self.sends.values()
            if send.outcome is Outcome.OK and send.value in self.seen_at
        ]
        return max(lags, default=0.0)
