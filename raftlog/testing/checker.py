"""The checker: what clients saw, held against the promises of produce, consume and transactions.

After Jepsen's Kafka workload. The *version order* of a partition (offset to value) is put together from
everything that proves a record: acknowledgements, polls, and what is read from every replica once all has
healed. The checker knows nothing of how the log works; it sees a :class:`~raftlog.testing.history.History`
and nothing else.

===================== ==================================================================================
anomaly               how it shows
===================== ==================================================================================
inconsistent offsets  one offset holds two values
duplicate             one value stands at two offsets
lost write            a committed value below the highest offset read, and not read there
unseen                acknowledged, and above everything read in the end
aborted read          (G1a) the value of a send or a transaction that certainly failed was read
intermediate read     (G1b) part of a transaction was read: before its end, or without the rest of it
precommitted read     a transaction polled what it sent itself
garbage read          a value was read that nobody sent (there)
poll skip             a gap in what one consumer polled
non-monotonic poll    a step back in what one consumer polled
send skip             between two values of a producer there is an offset that holds nothing
non-monotonic send    a producer's values stand in another order than it sent them
write cycle           (G0) transactions wrote over one another in a circle
information cycle     (G1c) the same with reads: each saw or followed the next one's writes
consume count         committed exactly-once work processed a value twice, or never; a group did twice what it
                      promised to do at most once, or never what it promised to do at least once
===================== ==================================================================================

Send skips over what others sent are allowed: producers interleave. So are poll skips over a rebalance (the
reader has another name then, and begins where the group's position is), records below a log start that was
committed (retention), and a poll that goes on exactly there. The worst time from an acknowledgement to its
visibility is reported, not judged.

Where transactions of several producers interleave in a partition, as the log allows, write cycles are no
anomaly: ``writes_interleave`` leaves the edges between writes out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import pairwise

from raftlog.testing.anomalies import Anomaly, Kind, show
from raftlog.testing.checker_delivery import check_delivery
from raftlog.testing.checker_transactions import Committed, check_cycles, check_transactions
from raftlog.testing.history import History, Outcome, Place, Read, Send


def check(history: History, *, writes_interleave: bool = True) -> list[Anomaly]:
    """Every anomaly in ``history``, in a fixed order.

    Args:
        writes_interleave: several transactions may write to one partition at the same time.
    """
    committed = Committed.of(history)
    return [
        *_check_versions(history),
        *_check_duplicates(history),
        *_check_writes(history, committed),
        *_check_reads(history),
        *_check_polls(history, committed),
        *_check_send_order(history),
        *_check_send_skips(history),
        *check_transactions(history, committed),
        *check_delivery(history),
        *check_cycles(history, committed, writes_interleave=writes_interleave),
    ]


def _reads(history: History) -> Iterator[tuple[str, Place, int, bytes]]:
    """(reader, place, offset, value) of every read."""
    for source in (history.polls, history.finals):
        for (reader, place), row in source.items():
            for offset, value in row:
                yield reader, place, offset, value


def _claims(history: History) -> Iterator[tuple[str, Place, int, bytes]]:
    """(who, place, offset, value) of everything that proves a record."""
    for send in history.sends.values():
        if send.outcome is Outcome.OK:
            yield f"acknowledgement to {send.producer}", send.place, send.offset, send.value
    yield from _reads(history)


def _check_versions(history: History) -> list[Anomaly]:
    first: dict[tuple[Place, int], tuple[str, bytes]] = {}
    found: dict[tuple[Place, int], Anomaly] = {}
    for who, place, offset, value in _claims(history):
        known_who, known = first.setdefault((place, offset), (who, value))
        if known != value and (place, offset) not in found:
            text = f"{place}@{offset} is {show(known)} ({known_who}), {show(value)} ({who})"
            found[place, offset] = Anomaly(Kind.INCONSISTENT_OFFSETS, text)
    return list(found.values())


def _check_duplicates(history: History) -> list[Anomaly]:
    first: dict[bytes, tuple[str, Place, int]] = {}
    found: dict[bytes, Anomaly] = {}
    for who, place, offset, value in _claims(history):
        known_who, known_place, known = first.setdefault(value, (who, place, offset))
        if (known_place, known) != (place, offset) and value not in found:
            text = f"{show(value)} stands at {known_place}@{known} ({known_who})"
            found[value] = Anomaly(Kind.DUPLICATE, f"{text} and at {place}@{offset} ({who})")
    return list(found.values())


def _check_writes(history: History, committed: Committed) -> list[Anomaly]:
    """What was acknowledged or seen once must be in every final read that shows it."""
    known: dict[Place, dict[int, bytes]] = defaultdict(dict)
    for _, place, offset, value in _claims(history):
        known[place].setdefault(offset, value)
    rows = {place: sorted(row.items()) for place, row in known.items()}
    shown = {
        place: [(offset, value) for offset, value in row if committed.is_shown(value)]
        for place, row in rows.items()
    }
    found = []
    for (reader, place), row in history.finals.items():
        there = {offset for offset, _ in row}
        end = max(there, default=-1)
        for offset, value in (shown if reader in history.committed_only else rows).get(place, ()):
            if offset not in there and offset >= history.start(place):
                kind = Kind.LOST_WRITE if offset < end else Kind.UNSEEN
                text = f"{show(value)} was committed at {place}@{offset}; {reader} read up to {end}"
                found.append(Anomaly(kind, f"{text} without it"))
                break  # what follows tells nothing new of this reader
    return found


def _check_reads(history: History) -> list[Anomaly]:
    found: dict[bytes, Anomaly] = {}
    for who, place, offset, value in _reads(history):
        if value in found:
            continue
        send = history.sends.get(value)
        at = f"{show(value)}, read by {who} at {place}@{offset},"
        if send is None or send.place != place:
            found[value] = Anomaly(Kind.GARBAGE_READ, f"{at} was never sent there")
        elif send.transaction is None and send.outcome is Outcome.FAILED:
            found[value] = Anomaly(Kind.ABORTED_READ, f"{at} certainly failed, as {send.producer} was told")
    return list(found.values())


def _check_polls(history: History, committed: Committed) -> list[Anomaly]:
    found: list[Anomaly] = []
    hidden: dict[Place, set[int]] = defaultdict(set)
    for _, place, offset, value in _claims(history):
        if not committed.is_shown(value):
            hidden[place].add(offset)
    for source, is_final in ((history.polls, False), (history.finals, True)):
        for (reader, place), row in source.items():
            begin = history.begins.get((reader, place), 0)
            # A replica drops whole segments, and some later than others.
            starts = range(history.start(place) + 1) if is_final else {*history.starts.get(place, ())}
            passed = history.markers.get(place, set())
            if reader in history.committed_only:
                passed = passed | hidden[place]
            found += _check_row(reader, place, begin, row, starts, passed)
    return found


def _check_row(
    who: str, place: Place, begin: int, row: Sequence[Read], starts: Container[int], passed: Container[int]
) -> Iterator[Anomaly]:
    """One reader's records: one after the other, but for what it is to pass over, and log starts."""
    for before, after in pairwise((begin - 1, *(offset for offset, _ in row))):
        if after <= before:
            yield Anomaly(Kind.NON_MONOTONIC_POLL, f"{who} polled {place}@{after} after {before}")
            return
        missing = [each for each in range(before + 1, after) if each not in passed]
        if missing and not any(start in starts for start in range(missing[-1] + 1, after + 1)):
            yield Anomaly(Kind.POLL_SKIP, f"{who} polled {place}@{after} after {before}: {missing[:5]}")
            return


def _check_send_order(history: History) -> list[Anomaly]:
    offsets = _offsets(history)
    found = []
    for before, after in _sent_in_a_row(history, offsets):
        if offsets[after.value] <= offsets[before.value]:
            text = f"{after.producer} sent {show(before.value)} ({offsets[before.value]}) before"
            text = f"{text} {show(after.value)} ({offsets[after.value]})"
            found.append(Anomaly(Kind.NON_MONOTONIC_SEND, text))
    return found


def _check_send_skips(history: History) -> list[Anomaly]:
    offsets = _offsets(history)
    filled: dict[Place, set[int]] = defaultdict(set)
    for _, place, offset, _ in _claims(history):
        filled[place].add(offset)
    for place, markers in history.markers.items():
        filled[place] |= markers
    holes = {
        place: [each for each in range(history.start(place), max(some)) if each not in some]
        for place, some in filled.items()
        if some
    }
    found = []
    for before, after in _sent_in_a_row(history, offsets):
        some = holes[after.place]
        at = bisect_right(some, offsets[before.value])
        if at < len(some) and some[at] < offsets[after.value]:
            text = (
                f"{after.producer} wrote {after.place}@{offsets[before.value]}, then {offsets[after.value]}"
            )
            found.append(Anomaly(Kind.SEND_SKIP, f"{text}: nothing is at {some[at]}"))
    return found


def _offsets(history: History) -> dict[bytes, int]:
    """Where each value stands, as far as is known."""
    offsets: dict[bytes, int] = {}
    for _, _, offset, value in _claims(history):
        offsets.setdefault(value, offset)
    return offsets


def _sent_in_a_row(history: History, offsets: Container[bytes]) -> Iterable[tuple[Send, Send]]:
    """Sends of one producer to one partition that are known to stand there, each with the one before."""
    last: dict[tuple[str, Place], Send] = {}
    for value, send in history.sends.items():
        if value in offsets:
            before = last.get((send.producer, send.place))
            if before is not None:
                yield before, send
            last[send.producer, send.place] = send
