"""The part of the checker that is about groups which commit their positions without transactions.

*At least once*: all that lies below the group's position was processed by some member, for each commits what
it has processed. *At most once*: nothing was processed twice, for each commits what it is about to process.
"""

from __future__ import annotations

from collections.abc import Iterator

from raftlog.testing.anomalies import Anomaly, Kind, show
from raftlog.testing.checker_transactions import shown_in_the_end
from raftlog.testing.history import History, Place

AT_LEAST_ONCE = "at-least-once"
AT_MOST_ONCE = "at-most-once"


def check_delivery(history: History) -> Iterator[Anomaly]:
    """Every broken promise of such a group; the first one of each partition."""
    for group, promise in history.promises.items():
        times: dict[Place, dict[int, int]] = {}
        for who, place, offset, value in history.processed:
            if who != group:
                continue
            known = times.setdefault(place, {})
            known[offset] = known.get(offset, 0) + 1
            if promise == AT_MOST_ONCE and known[offset] == 2:
                text = f"group {group} has processed {show(value)} at {place}@{offset} twice"
                yield Anomaly(Kind.CONSUME_COUNT, f"{text}, at most once was promised")
        if promise == AT_LEAST_ONCE:
            yield from _check_lost(history, group, times)


def _check_lost(history: History, group: str, times: dict[Place, dict[int, int]]) -> Iterator[Anomaly]:
    for place, row in shown_in_the_end(history).items():
        position = history.groups.get((group, place), 0)
        for offset, value in row.items():
            if offset < position and offset not in times.get(place, ()):
                text = f"group {group} is at {place}@{position} and has never processed {show(value)}"
                yield Anomaly(Kind.CONSUME_COUNT, f"{text} at {offset}, at least once was promised")
                break
