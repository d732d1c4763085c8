"""The checker: what clients saw, held against the promises of produce and consume.

After Jepsen's Kafka workload. Values are globally unique, so a value says which send it came from. The
*version order* of a partition (offset to value) is put together from everything that proves a committed
record: acknowledgements, polls, and what is read from every replica once all has healed. The checker knows
nothing of how the log works; it sees a :class:`History` and nothing else.

===================== ==================================================================================
anomaly               how it shows
===================== ==================================================================================
inconsistent offsets  one offset holds two values
duplicate             one value stands at two offsets
lost write            a committed value below the highest offset read, and not read there
unseen                acknowledged, and above everything read in the end
aborted read          the value of a send that certainly failed was read
garbage read          a value was read that nobody sent (there)
poll skip             a gap in what one consumer polled
non-monotonic poll    a step back in what one consumer polled
non-monotonic send    a producer's values stand in another order than it sent them
===================== ==================================================================================

Send skips are allowed: producers interleave. So are records below a log start that was committed (retention),
and a poll that goes on exactly there. The worst time from an acknowledgement to its visibility is
reported, not judged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise


class Outcome(Enum):
    """How a send ended."""

    OPEN = "open"
    """Nothing was heard: the producer died."""
    OK = "ok"
    FAILED = "failed"
    """Certainly not written."""
    UNKNOWN = "unknown"
    """Written or not: the producer cannot know."""


class Kind(Enum):
    """Anomalies."""

    INCONSISTENT_OFFSETS = "inconsistent offsets"
    DUPLICATE = "duplicate"
    LOST_WRITE = "lost write"
    UNSEEN = "unseen"
    ABORTED_READ = "aborted read"
    GARBAGE_READ = "garbage read"
    POLL_SKIP = "poll skip"
    NON_MONOTONIC_POLL = "non-monotonic poll"
    NON_MONOTONIC_SEND = "non-monotonic send"


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One broken promise."""

    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.text}"


@dataclass(slots=True)
class Send:
    """One value sent. Times are seconds of the loop."""

    producer: str
    partition: int
    value: bytes
    outcome: Outcome = Outcome.OPEN
    offset: int = -1
    """Acknowledged at this offset."""
    ended: float = 0.0


Read = tuple[int, bytes]
"""(offset, value)."""


@dataclass
class History:
    """What clients did and were told."""

    sends: dict[bytes, Send] = field(default_factory=dict)
    """By value, in the order sent."""
    polls: dict[tuple[str, int], list[Read]] = field(default_factory=dict)
    """(consumer, partition) -> what it polled, in order. A consumer that starts anew has another name."""
    finals: dict[tuple[str, int], list[Read]] = field(default_factory=dict)
    """(reader, partition) -> everything from the beginning, once all has healed. Each replica is a reader."""
    starts: dict[int, list[int]] = field(default_factory=dict)
    """partition -> every log start that was ever committed, ascending; without one: 0 all the time."""
    seen_at: dict[bytes, float] = field(default_factory=dict)
    """Value -> when a consumer first polled it."""

    def start(self, partition: int) -> int:
        """Where the log of a partition begins in the end."""
        return max(self.starts.get(partition, ()), default=0)

    def count(self, outcome: Outcome) -> int:
        """Sends that ended so."""
        return sum(1 for send in self.sends.values() if send.outcome is outcome)

    @property
    def lag_seconds(self) -> float:
        """The worst time from an acknowledgement to the first poll of the value."""
        lags = [
            self.seen_at[send.value] - send.ended
            for send in self.sends.values()
            if send.outcome is Outcome.OK and send.value in self.seen_at
        ]
        return max(lags, default=0.0)


def check(history: History) -> list[Anomaly]:
    """Every anomaly in ``history``, in a fixed order."""
    return [
        *_check_versions(history),
        *_check_duplicates(history),
        *_check_writes(history),
        *_check_reads(history),
        *_check_polls(history),
        *_check_send_order(history),
    ]


def _reads(history: History) -> Iterable[tuple[str, int, int, bytes]]:
    """(reader, partition, offset, value) of every read."""
    for source in (history.polls, history.finals):
        for (reader, partition), row in source.items():
            for offset, value in row:
                yield reader, partition, offset, value


def _claims(history: History) -> Iterable[tuple[str, int, int, bytes]]:
    """(who, partition, offset, value) of everything that proves a committed record."""
    for send in history.sends.values():
        if send.outcome is Outcome.OK:
            yield f"acknowledgement to {send.producer}", send.partition, send.offset, send.value
    yield from _reads(history)


def _check_versions(history: History) -> list[Anomaly]:
    first: dict[tuple[int, int], tuple[str, bytes]] = {}
    found: dict[tuple[int, int], Anomaly] = {}
    for who, partition, offset, value in _claims(history):
        known_who, known = first.setdefault((partition, offset), (who, value))
        if known != value and (partition, offset) not in found:
            text = f"offset {offset} of partition {partition} is {_show(known)} ({known_who}), "
            found[partition, offset] = Anomaly(Kind.INCONSISTENT_OFFSETS, f"{text}{_show(value)} ({who})")
    return list(found.values())


def _check_duplicates(history: History) -> list[Anomaly]:
    first: dict[bytes, tuple[str, int, int]] = {}
    found: dict[bytes, Anomaly] = {}
    for who, partition, offset, value in _claims(history):
        known_who, *place = first.setdefault(value, (who, partition, offset))
        if place != [partition, offset] and value not in found:
            text = f"{_show(value)} stands at {place[0]}/{place[1]} ({known_who})"
            found[value] = Anomaly(Kind.DUPLICATE, f"{text} and at {partition}/{offset} ({who})")
    return list(found.values())


def _check_writes(history: History) -> list[Anomaly]:
    """What was acknowledged or seen once must be in every final read."""
    committed: dict[int, dict[int, bytes]] = defaultdict(dict)
    for _, partition, offset, value in _claims(history):
        committed[partition].setdefault(offset, value)
    found = []
    for (reader, partition), row in history.finals.items():
        there = {offset for offset, _ in row}
        end = max(there, default=-1)
        for offset, value in sorted(committed[partition].items()):
            if offset not in there and offset >= history.start(partition):
                kind = Kind.LOST_WRITE if offset < end else Kind.UNSEEN
                text = f"{_show(value)} was committed at {partition}/{offset}; {reader} read up to {end}"
                found.append(Anomaly(kind, f"{text} without it"))
                break  # what follows tells nothing new of this reader
    return found


def _check_reads(history: History) -> list[Anomaly]:
    found: dict[bytes, Anomaly] = {}
    for who, partition, offset, value in _reads(history):
        send = history.sends.get(value)
        at = f"{_show(value)}, read by {who} at {partition}/{offset},"
        if value in found:
            continue
        if send is None or send.partition != partition:
            found[value] = Anomaly(Kind.GARBAGE_READ, f"{at} was never sent there")
        elif send.outcome is Outcome.FAILED:
            found[value] = Anomaly(Kind.ABORTED_READ, f"{at} certainly failed, as {send.producer} was told")
    return list(found.values())


def _check_polls(history: History) -> list[Anomaly]:
    found: list[Anomaly] = []
    for (consumer, partition), row in history.polls.items():
        found += _check_row(consumer, partition, row, {0, *history.starts.get(partition, ())})
    for (reader, partition), row in history.finals.items():
        # A replica drops whole segments, and some later than others.
        found += _check_row(reader, partition, row, range(history.start(partition) + 1))
    return found


def _check_row(who: str, partition: int, row: Sequence[Read], starts: Container[int]) -> Iterator[Anomaly]:
    offsets = [offset for offset, _ in row]
    if offsets and offsets[0] not in starts:
        yield Anomaly(Kind.POLL_SKIP, f"{who} began {partition} at {offsets[0]}")
    for before, after in pairwise(offsets):
        if after <= before:
            yield Anomaly(Kind.NON_MONOTONIC_POLL, f"{who} polled {partition}/{after} after {before}")
            return
        if after != before + 1 and after not in starts:
            yield Anomaly(Kind.POLL_SKIP, f"{who} polled {partition}/{after} after {before}")
            return


def _check_send_order(history: History) -> list[Anomaly]:
    place: dict[bytes, int] = {}
    for _, _, offset, value in _claims(history):
        place.setdefault(value, offset)
    last: dict[tuple[str, int], Send] = {}
    found = []
    for value, send in history.sends.items():
        if value not in place:
            continue
        before = last.get((send.producer, send.partition))
        if before is not None and place[value] <= place[before.value]:
            text = f"{send.producer} sent {_show(before.value)} ({place[before.value]}) before {_show(value)}"
            found.append(Anomaly(Kind.NON_MONOTONIC_SEND, f"{text} ({place[value]})"))
        last[send.producer, send.partition] = send
    return found


def _show(value: bytes) -> str:
    return repr(value if len(value) <= 40 else value[:40] + b"...")
