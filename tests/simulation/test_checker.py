"""The checker must flag a hand-made bad history for every anomaly, and nothing in a good one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from raftlog.testing.anomalies import Kind
from raftlog.testing.checker import check
from raftlog.testing.history import History, Outcome, Send

VALUES = [b"a", b"b", b"c", b"d"]


def good() -> History:
    """One producer, four values at offsets 0 to 3, a consumer, and two replicas that hold the same."""
    history = History()
    for offset, value in enumerate(VALUES):
        history.sends[value] = Send("p", "t/0", value, Outcome.OK, offset, 1.0)
    rows = list(enumerate(VALUES))
    history.polls["c", "t/0"] = list(rows)
    history.finals["replica 1", "t/0"] = list(rows)
    history.finals["replica 2", "t/0"] = list(rows)
    return history


def kinds(history: History) -> set[Kind]:
    return {anomaly.kind for anomaly in check(history)}


def one_offset_two_values(history: History) -> None:
    history.sends[b"x"] = Send("q", "t/0", b"x", Outcome.UNKNOWN)
    history.finals["replica 2", "t/0"][3] = (3, b"x")


def acknowledged_elsewhere(history: History) -> None:
    history.sends[b"a"].offset = 7


def stands_twice(history: History) -> None:
    for row in history.finals.values():
        row.append((4, b"b"))


def lost_below_the_end(history: History) -> None:
    history.finals["replica 1", "t/0"] = [(0, b"a"), (1, b"b"), (3, b"d")]


def lost_by_one_replica_after_a_poll(history: History) -> None:
    history.sends[b"c"].outcome = Outcome.UNKNOWN
    history.finals["replica 2", "t/0"] = [(0, b"a"), (1, b"b"), (3, b"d")]


def acknowledged_and_gone(history: History) -> None:
    history.polls.clear()
    for row in history.finals.values():
        row.pop()


def one_replica_is_short(history: History) -> None:
    history.finals["replica 2", "t/0"].pop()


def one_replica_is_empty(history: History) -> None:
    history.finals["replica 2", "t/0"].clear()


def failed_and_there(history: History) -> None:
    history.sends[b"d"].outcome = Outcome.FAILED


def nobody_sent_it(history: History) -> None:
    del history.sends[b"d"]


def in_the_wrong_partition(history: History) -> None:
    history.sends[b"d"] = Send("p", "t/1", b"d", Outcome.UNKNOWN)


def poll_with_a_gap(history: History) -> None:
    del history.polls["c", "t/0"][1]


def poll_that_begins_late(history: History) -> None:
    del history.polls["c", "t/0"][0]


def poll_that_steps_back(history: History) -> None:
    history.polls["c", "t/0"].append((2, b"c"))


def poll_that_repeats(history: History) -> None:
    history.polls["c", "t/0"].append((3, b"d"))


def sent_in_another_order(history: History) -> None:
    sends = history.sends
    history.sends = {value: sends[value] for value in (b"a", b"c", b"b", b"d")}


BAD: list[tuple[Callable[[History], None], Kind]] = [
    (one_offset_two_values, Kind.INCONSISTENT_OFFSETS),
    (acknowledged_elsewhere, Kind.DUPLICATE),
    (stands_twice, Kind.DUPLICATE),
    (lost_below_the_end, Kind.LOST_WRITE),
    (lost_by_one_replica_after_a_poll, Kind.LOST_WRITE),
    (acknowledged_and_gone, Kind.UNSEEN),
    (one_replica_is_short, Kind.UNSEEN),
    (one_replica_is_empty, Kind.UNSEEN),
    (failed_and_there, Kind.ABORTED_READ),
    (nobody_sent_it, Kind.GARBAGE_READ),
    (in_the_wrong_partition, Kind.GARBAGE_READ),
    (poll_with_a_gap, Kind.POLL_SKIP),
    (poll_that_begins_late, Kind.POLL_SKIP),
    (poll_that_steps_back, Kind.NON_MONOTONIC_POLL),
    (poll_that_repeats, Kind.NON_MONOTONIC_POLL),
    (sent_in_another_order, Kind.NON_MONOTONIC_SEND),
]


@pytest.mark.parametrize(("spoil", "kind"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_every_anomaly_is_flagged(spoil: Callable[[History], None], kind: Kind) -> None:
    history = good()
    spoil(history)
    assert kind in kinds(history)


def test_a_good_history_has_no_anomaly() -> None:
    assert check(good()) == []


def test_what_is_allowed() -> None:
    """Send skips between producers, an unknown send that is there, one that is not, an open one."""
    history = good()
    history.sends[b"b"].producer = "q"
    history.sends[b"b"].outcome = Outcome.UNKNOWN
    history.sends[b"e"] = Send("p", "t/0", b"e", Outcome.UNKNOWN)
    history.sends[b"f"] = Send("p", "t/0", b"f", Outcome.FAILED)
    history.sends[b"g"] = Send("p", "t/0", b"g")
    history.polls["c", "t/0"].pop()  # a consumer may be behind
    assert check(history) == []


def without_the_first_two() -> History:
    """Retention removed offsets 0 and 1; a consumer that was at 1 goes on at 2."""
    history = good()
    history.starts["t/0"] = [0, 2]
    history.polls["c", "t/0"] = [(0, b"a"), (2, b"c"), (3, b"d")]
    for row in history.finals.values():
        del row[:2]
    return history


def test_what_retention_removed_may_be_missing() -> None:
    history = without_the_first_two()
    assert check(history) == []
    history.finals["replica 1", "t/0"].insert(0, (1, b"b"))  # it dropped less
    assert check(history) == []
    history.polls["d", "t/0"] = [(2, b"c")]
    assert check(history) == []


def test_above_the_log_start_nothing_may_be_missing() -> None:
    history = without_the_first_two()
    del history.finals["replica 2", "t/0"][0]
    assert kinds(history) == {Kind.LOST_WRITE, Kind.POLL_SKIP}
    history = without_the_first_two()
    history.starts["t/0"] = [0, 1]
    assert kinds(history) == {Kind.LOST_WRITE, Kind.POLL_SKIP}


def test_a_consumer_goes_on_at_a_log_start_and_nowhere_else() -> None:
    history = without_the_first_two()
    history.starts["t/0"] = [0, 3]
    assert kinds(history) == {Kind.POLL_SKIP}


def test_the_realtime_lag_is_reported() -> None:
    history = good()
    history.seen_at = {b"a": 1.5, b"b": 3.25}
    assert history.lag_seconds == 2.25
