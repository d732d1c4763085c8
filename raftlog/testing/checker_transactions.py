"""The part of the checker that is about transactions: what is seen of them and when, what they depend on, and
what exactly-once work has consumed.

A transaction is *committed* if its producer was told so, or if a reader of committed transactions has seen
anything of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

from raftlog.testing.anomalies import Anomaly, Kind, show
from raftlog.testing.history import History, Outcome, Place, Reader, Transaction


class Committed:
    """Which transactions are committed, as far as clients can tell.

    Args:
        history: what they know.
        names: of the transactions.
    """

    def __init__(self, history: History, names: set[str]) -> None:
        self._history = history
        self.names = names

    @classmethod
    def of(cls, history: History) -> Committed:
        """Find out."""
        names = {each.name for each in history.transactions.values() if each.outcome is Outcome.OK}
        for _, _, _, value in committed_reads(history):
            send = history.sends.get(value)
            if send is not None and send.transaction is not None:
                names.add(send.transaction)
        failed = {each.name for each in history.transactions.values() if each.outcome is Outcome.FAILED}
        return cls(history, names - failed)

    def is_shown(self, value: bytes) -> bool:
        """Whether readers of committed transactions see it: all that is not part of one, and what is part of
        a committed one."""
        send = self._history.sends.get(value)
        return send is None or send.transaction is None or send.transaction in self.names

    def transactions(self) -> Iterator[Transaction]:
        """The committed ones, in the order begun."""
        return (each for name, each in self._history.transactions.items() if name in self.names)


def committed_reads(history: History) -> Iterator[tuple[str, Place, int, bytes]]:
    """(reader, place, offset, value) of what readers of committed transactions saw."""
    for source in (history.polls, history.finals):
        for (reader, place), row in source.items():
            if reader in history.committed_only:
                for offset, value in row:
                    yield reader, place, offset, value


def check_transactions(history: History, committed: Committed) -> list[Anomaly]:
    """Every anomaly that is about one transaction, or about what several of them consumed."""
    if not history.transactions:
        return []
    return [
        *_check_aborted(history),
        *_check_early(history),
        *_check_halves(history, committed),
        *_check_whole(history, committed),
        *_check_own(history),
        *_check_consumed(history, committed),
    ]


def _check_aborted(history: History) -> Iterator[Anomaly]:
    told: set[str] = set()
    for who, place, offset, value in committed_reads(history):
        transaction = _transaction_of(history, value)
        if transaction is None or transaction.outcome is not Outcome.FAILED or transaction.name in told:
            continue
        told.add(transaction.name)
        at = f"{show(value)}, read by {who} at {place}@{offset}"
        yield Anomaly(Kind.ABORTED_READ, f"{at}, is part of {transaction.name}, which was aborted")


def _check_early(history: History) -> Iterator[Anomaly]:
    """Nothing of a transaction is seen before its producer has asked for the commit."""
    for value, seen in history.shown_at.items():
        transaction = _transaction_of(history, value)
        if transaction is None or transaction.outcome is Outcome.FAILED:
            continue
        if transaction.end_asked is None or seen < transaction.end_asked:
            text = f"{show(value)} of {transaction.name} was shown at {seen:.3f} s, before its commit"
            yield Anomaly(Kind.INTERMEDIATE_READ, text)


def _check_halves(history: History, committed: Committed) -> Iterator[Anomaly]:
    """Who has read beyond a value of a transaction and saw another one of it in the same partition, saw this
    one, too."""
    offsets = _committed_offsets(history)
    parts: dict[Place, list[tuple[int, bytes, str]]] = defaultdict(list)
    for transaction in committed.transactions():
        for value in transaction.sent:
            if value in offsets:
                parts[history.sends[value].place].append((offsets[value], value, transaction.name))
    for (reader, place), row in history.polls.items():
        if reader not in history.committed_only or not row:
            continue
        values = {value for _, value in row}
        seen = {name for _, value, name in parts[place] if value in values}
        begin, end = history.begins.get((reader, place), 0), row[-1][0]
        for offset, value, name in parts[place]:
            if begin <= offset <= end and name in seen and value not in values:
                if any(start > offset for start in history.starts.get(place, ())):
                    continue
                text = f"{reader} saw part of {name} in {place} and read on, without {show(value)}"
                yield Anomaly(Kind.INTERMEDIATE_READ, f"{text} at {offset}")
                break


def _committed_offsets(history: History) -> dict[bytes, int]:
    offsets = {value: offset for _, _, offset, value in committed_reads(history)}
    for send in history.sends.values():
        if send.outcome is Outcome.OK:
            offsets.setdefault(send.value, send.offset)
    return offsets


def _check_whole(history: History, committed: Committed) -> Iterator[Anomaly]:
    """All of a committed transaction is there in the end."""
    rows: dict[Place, list[tuple[Reader, set[bytes]]]] = defaultdict(list)
    for (reader, place), row in history.finals.items():
        if reader in history.committed_only:
            rows[place].append(((reader, place), {value for _, value in row}))
    for transaction in committed.transactions():
        for value in transaction.sent:
            place = history.sends[value].place
            if history.start(place):
                continue  # it may have been removed
            without = [reader for (reader, _), values in rows[place] if value not in values]
            if without:
                text = f"{show(value)} in {place} is part of {transaction.name}, which was committed"
                yield Anomaly(Kind.LOST_WRITE, f"{text}; {without[0]} read all without it")
                break


def _check_own(history: History) -> Iterator[Anomaly]:
    for transaction in history.transactions.values():
        own = set(transaction.sent)
        for place, offset, value in transaction.polled:
            if value in own:
                text = f"{transaction.name} polled {show(value)}, which it sent, at {place}@{offset}"
                yield Anomaly(Kind.PRECOMMITTED_READ, text)
                break


# -- what was consumed ---------------------------------------------------------------------------------------


def _check_consumed(history: History, committed: Committed) -> Iterator[Anomaly]:
    """Committed work of a group processed every value once, and the group's positions say how far it is."""
    consumed: dict[tuple[str, Place], dict[int, str]] = defaultdict(dict)
    for transaction in committed.transactions():
        if transaction.group is None:
            continue
        for place, offset, value in transaction.polled:
            known = consumed[transaction.group, place].setdefault(offset, transaction.name)
            if known != transaction.name:
                text = f"{show(value)} at {place}@{offset} was processed by {known} and by {transaction.name}"
                yield Anomaly(Kind.CONSUME_COUNT, text)
                return
    shown = shown_in_the_end(history)
    for (group, place), position in history.groups.items():
        if group in history.promises:
            continue  # that is no exactly-once work
        yield from _check_position(group, place, position, consumed[group, place], shown.get(place, {}))


def _check_position(
    group: str, place: Place, position: int, consumed: Mapping[int, str], shown: Mapping[int, bytes]
) -> Iterator[Anomaly]:
    beyond = [offset for offset in consumed if offset >= position]
    if beyond:
        name = consumed[min(beyond)]
        text = f"group {group} is at {place}@{position}, and {name} has processed {min(beyond)}"
        yield Anomaly(Kind.CONSUME_COUNT, text)
    for offset, value in shown.items():
        if offset < position and offset not in consumed:
            text = f"group {group} is at {place}@{position}, and no committed work processed"
            yield Anomaly(Kind.CONSUME_COUNT, f"{text} {show(value)} at {offset}")
            return


def shown_in_the_end(history: History) -> dict[Place, dict[int, bytes]]:
    """What is there in the end, for readers of committed transactions."""
    found: dict[Place, dict[int, bytes]] = defaultdict(dict)
    for (reader, place), row in history.finals.items():
        if reader in history.committed_only:
            found[place].update(row)
    return found


def _transaction_of(history: History, value: bytes) -> Transaction | None:
    send = history.sends.get(value)
    if send is None or send.transaction is None:
        return None
    return history.transactions[send.transaction]


# -- cycles --------------------------------------------------------------------------------------------------

Edges = dict[str, set[str]]
"""Transaction -> those that come after it."""


def check_cycles(history: History, committed: Committed, *, writes_interleave: bool) -> Iterator[Anomaly]:
    """Committed transactions that depend on one another in a circle.

    Args:
        writes_interleave: the order of writes in a partition says nothing about their transactions.
    """
    writes = {} if writes_interleave else _writes(history, committed)
    reads = _reads(history, committed)
    for circle in components(writes):
        yield Anomaly(Kind.WRITE_CYCLE, f"{_some(circle)} wrote over one another")
    both = {name: writes.get(name, set()) | reads.get(name, set()) for name in {**writes, **reads}}
    for circle in components(both):
        if any(not reads.get(name, set()).isdisjoint(circle) for name in circle):
            yield Anomaly(Kind.INFORMATION_CYCLE, f"{_some(circle)} each saw or followed another's writes")


def _writes(history: History, committed: Committed) -> Edges:
    """By version order: who wrote the value before."""
    offsets = _committed_offsets(history)
    order: dict[Place, list[tuple[int, str]]] = defaultdict(list)
    for transaction in committed.transactions():
        for value in transaction.sent:
            if value in offsets:
                order[history.sends[value].place].append((offsets[value], transaction.name))
    edges: Edges = defaultdict(set)
    for row in order.values():
        for (_, before), (_, after) in pairwise(sorted(row)):
            if before != after:
                edges[before].add(after)
    return edges


def _reads(history: History, committed: Committed) -> Edges:
    """By what was polled: who wrote it."""
    edges: Edges = defaultdict(set)
    for transaction in committed.transactions():
        for _, _, value in transaction.polled:
            send = history.sends.get(value)
            if send is None or send.transaction is None or send.transaction == transaction.name:
                continue
            if send.transaction in committed.names:
                edges[send.transaction].add(transaction.name)
    return edges


def _some(circle: Iterable[str]) -> str:
    return ", ".join(sorted(circle)[:5])


def components(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan 1972, without recursion)."""
    found: list[list[str]] = []
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    for root in edges:
        if root in number:
            continue
        work = [(root, iter(edges[root]))]
        number[root] = low[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, successors = work[-1]
            for each in successors:
                if each not in number:
                    number[each] = low[each] = len(number)
                    stack.append(each)
                    on_stack.add(each)
                    work.append((each, iter(edges.get(each, ()))))
                    break
                if each in on_stack:
                    low[node] = min(low[node], number[each])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == number[node]:
                    component = [stack.pop()]
                    while component[-1] != node:
                        component.append(stack.pop())
                    on_stack.difference_update(component)
                    if len(component) > 1:
                        found.append(component)
    return found
