"""Hand-made histories with transactions and groups: the checker must flag each bad one, and none of the good
ones that are next to them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from raftlog.testing.anomalies import Kind
from raftlog.testing.checker import check
from raftlog.testing.checker_delivery import AT_LEAST_ONCE, AT_MOST_ONCE
from raftlog.testing.checker_transactions import components
from raftlog.testing.history import History, Outcome, Send, Transaction

IN, OUT = "in/0", "out/0"


def good() -> History:
    """A group reads a, b, c. The first transaction made A of a and B of b, the second C of c; a third one
    made X and was aborted. ``in/0`` holds a b c; ``out/0`` A B (commit) X (abort) C (commit)."""
    history = History()
    for offset, value in enumerate([b"a", b"b", b"c"]):
        history.sends[value] = Send("writer", IN, value, Outcome.OK, offset, 1.0)
    history.transactions = {
        "t1": Transaction("t1", "g", Outcome.OK, 2.0, [b"A", b"B"], [(IN, 0, b"a"), (IN, 1, b"b")], {IN: 2}),
        "t2": Transaction("t2", "g", Outcome.OK, 4.0, [b"C"], [(IN, 2, b"c")], {IN: 3}),
        "t3": Transaction("t3", "g", Outcome.FAILED, None, [b"X"], [(IN, 2, b"c")], {IN: 3}),
    }
    for value, offset, name in [(b"A", 0, "t1"), (b"B", 1, "t1"), (b"X", 3, "t3"), (b"C", 5, "t2")]:
        history.sends[value] = Send(name, OUT, value, Outcome.OK, offset, 1.5, name)
    history.markers = {OUT: {2, 4, 6}}
    history.committed_only = {"reader", "auditor"}
    history.polled(("reader", OUT), [(0, b"A"), (1, b"B")], 3.0)
    history.polled(("reader", OUT), [(5, b"C")], 5.0)
    history.polled(("dirty reader", OUT), [(0, b"A"), (1, b"B"), (3, b"X")], 1.6)
    history.finals["auditor", IN] = [(0, b"a"), (1, b"b"), (2, b"c")]
    history.finals["auditor", OUT] = [(0, b"A"), (1, b"B"), (5, b"C")]
    history.finals["replica", OUT] = [(0, b"A"), (1, b"B"), (3, b"X"), (5, b"C")]
    history.groups["g", IN] = 3
    return history


def found(history: History, *, writes_interleave: bool = False) -> set[Kind]:
    return {anomaly.kind for anomaly in check(history, writes_interleave=writes_interleave)}


def test_the_good_one_is_good() -> None:
    assert check(good(), writes_interleave=False) == []


# -- each bad history, and what must be found ----------------------------------------------------------------


def aborted_and_read(history: History) -> None:
    history.polls["reader", OUT].insert(2, (3, b"X"))


def aborted_and_read_in_the_end(history: History) -> None:
    history.finals["auditor", OUT].insert(2, (3, b"X"))


def seen_before_its_commit(history: History) -> None:
    history.shown_at[b"A"] = 1.9


def seen_of_one_that_never_asked_for_a_commit(history: History) -> None:
    history.transactions["t2"].outcome = Outcome.UNKNOWN
    history.transactions["t2"].end_asked = None


def half_of_it_seen(history: History) -> None:
    del history.polls["reader", OUT][0]
    history.begins["reader", OUT] = 0


def half_of_it_lost(history: History) -> None:
    """Its producer died in doubt; one of its two values is there."""
    history.transactions["t1"].outcome = Outcome.OPEN
    history.sends[b"B"].outcome = Outcome.OPEN
    for row in (*history.polls.values(), *history.finals.values()):
        row[:] = [read for read in row if read[1] != b"B"]
    history.markers[OUT].add(1)


def own_send_polled(history: History) -> None:
    history.transactions["t1"].polled.append((OUT, 0, b"A"))


def committed_and_not_read_by_one(history: History) -> None:
    history.finals["auditor", OUT].remove((1, b"B"))


def processed_twice(history: History) -> None:
    history.transactions["t2"].polled.insert(0, (IN, 1, b"b"))


def never_processed(history: History) -> None:
    history.transactions["t1"].polled.remove((IN, 0, b"a"))


def positions_lag_behind(history: History) -> None:
    history.groups["g", IN] = 2


def positions_ahead(history: History) -> None:
    """The second transaction did not commit; its offsets did."""
    history.transactions["t2"].outcome = Outcome.FAILED
    for row in (*history.polls.values(), *history.finals.values()):
        row[:] = [read for read in row if read[1] != b"C"]


def a_hole_between_two_sends(history: History) -> None:
    history.markers[OUT].discard(4)
    history.sends[b"C"].producer = history.sends[b"B"].producer = "p"


def a_gap_that_no_marker_explains(history: History) -> None:
    history.markers[OUT].discard(2)


def a_group_skips(history: History) -> None:
    history.begins["member@1", IN] = 1
    history.polls["member@1", IN] = [(2, b"c")]


def a_group_steps_back(history: History) -> None:
    history.begins["member@1", IN] = 1
    history.polls["member@1", IN] = [(0, b"a")]


def written_in_a_circle(history: History) -> None:
    """t1 before t2 in out/0, t2 before t1 in out/1."""
    for value, offset, name in [(b"D", 0, "t2"), (b"E", 1, "t1")]:
        history.sends[value] = Send(f"{name} too", "out/1", value, Outcome.OK, offset, 1.5, name)
        history.transactions[name].sent.append(value)


def read_in_a_circle(history: History) -> None:
    history.transactions["t1"].polled.append((OUT, 5, b"C"))
    history.transactions["t2"].polled.append((OUT, 0, b"A"))


def read_and_written_in_a_circle(history: History) -> None:
    history.transactions["t1"].polled.append((OUT, 5, b"C"))


def take(history: History, group: str, offsets: str, position: int) -> None:
    """A group without transactions has processed what stands at these offsets, in this order."""
    history.promises[group] = group
    history.processed += [(group, IN, int(offset), b"abc"[int(offset) :][:1]) for offset in offsets]
    history.groups[group, IN] = position


def twice_where_at_most_once_was_promised(history: History) -> None:
    take(history, AT_MOST_ONCE, "010", 2)


def never_where_at_least_once_was_promised(history: History) -> None:
    take(history, AT_LEAST_ONCE, "02", 3)


BAD: list[tuple[Callable[[History], None], Kind]] = [
    (aborted_and_read, Kind.ABORTED_READ),
    (aborted_and_read_in_the_end, Kind.ABORTED_READ),
    (seen_before_its_commit, Kind.INTERMEDIATE_READ),
    (seen_of_one_that_never_asked_for_a_commit, Kind.INTERMEDIATE_READ),
    (half_of_it_seen, Kind.INTERMEDIATE_READ),
    (half_of_it_lost, Kind.LOST_WRITE),
    (own_send_polled, Kind.PRECOMMITTED_READ),
    (committed_and_not_read_by_one, Kind.LOST_WRITE),
    (processed_twice, Kind.CONSUME_COUNT),
    (never_processed, Kind.CONSUME_COUNT),
    (positions_lag_behind, Kind.CONSUME_COUNT),
    (positions_ahead, Kind.CONSUME_COUNT),
    (twice_where_at_most_once_was_promised, Kind.CONSUME_COUNT),
    (never_where_at_least_once_was_promised, Kind.CONSUME_COUNT),
    (a_hole_between_two_sends, Kind.SEND_SKIP),
    (a_gap_that_no_marker_explains, Kind.POLL_SKIP),
    (a_group_skips, Kind.POLL_SKIP),
    (a_group_steps_back, Kind.NON_MONOTONIC_POLL),
    (written_in_a_circle, Kind.WRITE_CYCLE),
    (read_in_a_circle, Kind.INFORMATION_CYCLE),
    (read_and_written_in_a_circle, Kind.INFORMATION_CYCLE),
]


@pytest.mark.parametrize(("spoil", "kind"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_every_anomaly_is_flagged(spoil: Callable[[History], None], kind: Kind) -> None:
    history = good()
    spoil(history)
    assert kind in found(history)


def test_every_kind_has_a_bad_history() -> None:
    from tests.simulation import test_checker

    assert {kind for _, kind in (*BAD, *test_checker.BAD)} == set(Kind)


# -- what is next to it and allowed --------------------------------------------------------------------------


def dirty_readers_see_what_was_aborted(history: History) -> None:
    history.polls["dirty reader", OUT].append((5, b"C"))


def in_doubt_and_committed(history: History) -> None:
    history.transactions["t1"].outcome = Outcome.UNKNOWN


def in_doubt_and_gone(history: History) -> None:
    """It was aborted after all: nothing of it is shown, its positions are not committed."""
    history.transactions["t2"].outcome = Outcome.UNKNOWN
    for reader in ("reader", "auditor"):
        row = history.polls if reader == "reader" else history.finals
        row[reader, OUT].remove((5, b"C"))
    del history.shown_at[b"C"]
    history.groups["g", IN] = 2


def seen_while_the_commit_is_under_way(history: History) -> None:
    history.shown_at[b"A"] = 2.01


def a_reader_that_is_between_two_values(history: History) -> None:
    """Its next poll brings the rest."""
    history.polls["reader", OUT] = [(0, b"A")]


def processed_again_after_an_abort(history: History) -> None:
    history.transactions["t4"] = Transaction("t4", "g", Outcome.FAILED, None, [], [(IN, 0, b"a")])


def two_groups_process_the_same(history: History) -> None:
    for name in ("t1", "t2"):
        other = history.transactions[name]
        history.transactions[f"{name} of h"] = Transaction(
            f"{name} of h", "h", Outcome.OK, 6.0, [], list(other.polled), dict(other.offsets)
        )
    history.groups["h", IN] = 3


def a_rebalance(history: History) -> None:
    history.begins["member@2", IN] = 2
    history.polls["member@1", IN] = [(0, b"a")]
    history.polls["member@2", IN] = [(2, b"c")]


def others_between_two_sends(history: History) -> None:
    history.sends[b"C"].producer = history.sends[b"A"].producer = "p"


def read_in_one_direction(history: History) -> None:
    history.transactions["t2"].polled.append((OUT, 0, b"A"))


def lost_where_at_most_once_was_promised(history: History) -> None:
    take(history, AT_MOST_ONCE, "02", 3)


def twice_where_at_least_once_was_promised(history: History) -> None:
    take(history, AT_LEAST_ONCE, "01012", 3)


def not_there_yet_where_at_least_once_was_promised(history: History) -> None:
    take(history, AT_LEAST_ONCE, "0", 1)


GOOD = [
    lost_where_at_most_once_was_promised,
    twice_where_at_least_once_was_promised,
    not_there_yet_where_at_least_once_was_promised,
    dirty_readers_see_what_was_aborted,
    in_doubt_and_committed,
    in_doubt_and_gone,
    seen_while_the_commit_is_under_way,
    a_reader_that_is_between_two_values,
    processed_again_after_an_abort,
    two_groups_process_the_same,
    a_rebalance,
    others_between_two_sends,
    read_in_one_direction,
]


@pytest.mark.parametrize("change", GOOD, ids=[change.__name__ for change in GOOD])
def test_what_is_allowed(change: Callable[[History], None]) -> None:
    history = good()
    change(history)
    assert check(history, writes_interleave=False) == []


def test_transactions_that_interleave_are_no_write_cycle() -> None:
    history = good()
    written_in_a_circle(history)
    assert found(history, writes_interleave=True) == set()


def test_circles_of_any_shape() -> None:
    assert components({"a": {"b"}, "b": {"c"}, "c": {"d"}}) == []
    assert components({"a": {"a"}}) == []
    two = components({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d"}})
    assert sorted(map(sorted, two)) == [["a", "b", "c"], ["d", "e"]]
    assert components({str(number): [str(number + 1)] for number in range(50_000)}) == []
    long = {str(number): {str((number + 1) % 50_000)} for number in range(50_000)}
    assert len(components(long)[0]) == 50_000


def test_a_hundred_thousand_operations_take_seconds() -> None:
    history = History(committed_only={"reader", "auditor"})
    count = 50_000
    for number in range(count):
        value, name = b"%d" % number, f"t{number // 100}"
        history.sends[value] = Send("p", OUT, value, Outcome.OK, number, 1.0, name)
        transaction = history.transactions.setdefault(name, Transaction(name, "g", Outcome.OK, 1.0))
        transaction.sent.append(value)
        if number >= 100:
            transaction.polled.append((OUT, number - 100, b"%d" % (number - 100)))
    row = [(number, b"%d" % number) for number in range(count)]
    history.polled(("reader", OUT), row, 2.0)
    for reader in ("auditor", "replica 1", "replica 2", "replica 3"):
        history.finals[reader, OUT] = row
    history.groups["g", OUT] = count - 100
    begin = time.process_time()
    assert check(history, writes_interleave=False) == []
    assert time.process_time() - begin < 20.0
