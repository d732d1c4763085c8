"""Who of a group's members should hold which partition: pure functions of members, topics and what they held.

Both rules give every partition of a subscribed topic to exactly one of the members that subscribe to it.

``uniform``
    balance first: the sum of the squares of the members' partition counts is as small as the subscriptions
    permit, so that with equal subscriptions no two members differ by more than one. Among all such
    assignments it takes one that moves the fewest partitions away from who held them.
``sticky``
    rest first: a partition stays with its holder; only what nobody holds is handed out, to members that have
    least. A member that would get nothing takes one from the member that has most.

Uniform is a minimum cost flow with convex costs (Ahuja, Magnanti, Orlin: Network Flows, chapter 14): one unit
per partition, from its topic to a member; the k-th partition of a member costs 2k - 1, times more than all
moves together, and moving away from the holder costs 1. A flow is of least cost exactly when its residual
graph has no negative cycle. With equal subscriptions quotas give that at once; otherwise we begin with a good
guess and cancel cycles until there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from heapq import heapify, heapreplace
from typing import Final, TypeAlias

from raftlog.state.groups import Assignment, Key, assignment_of, keys_of

Subscriptions: TypeAlias = Mapping[str, tuple[str, ...]]
"""member id -> names of topics."""
Topics: TypeAlias = Mapping[str, tuple[bytes, int]]
"""name -> (topic id, partitions) of topics that exist."""
Held: TypeAlias = Mapping[str, Assignment]
"""member id -> what it had until now."""
Assignor: TypeAlias = Callable[[Subscriptions, Topics, Held], dict[str, Assignment]]


def uniform(members: Subscriptions, topics: Topics, held: Held) -> dict[str, Assignment]:
    """Balanced, and among the balanced ones of the fewest moves.

    Args:
        members: who takes part; the result has a value for each.
        topics: names that are not in it do not exist.
        held: no partition twice; what does not exist, or its holder did not subscribe to, is free.
    """
    work = _Work(members, topics, held)
    if work.is_equal:
        work.trim_to_quotas()
        work.hand_out()
    else:
        work.hand_out()
        work.level()
        work.cancel_cycles()
    return work.result()


def sticky(members: Subscriptions, topics: Topics, held: Held) -> dict[str, Assignment]:
    """Nothing moves but what it takes that nobody is without work; arguments as for :func:`uniform`."""
    work = _Work(members, topics, held)
    work.hand_out()
    work.feed()
    return work.result()


ASSIGNORS: Final[Mapping[str, Assignor]] = {"uniform": uniform, "sticky": sticky}


class _Work:
    """An assignment in the making. Members are numbers, in the order of their ids, so that equal input gives
    equal output."""

    def __init__(self, members: Subscriptions, topics: Topics, held: Held) -> None:
        self._names = sorted(members)
        self._topics = sorted((topic_id, count) for topic_id, count in topics.values())
        by_name = {name: topic_id for name, (topic_id, _) in topics.items()}
        self._wants = [
            {by_name[topic] for topic in members[name] if topic in by_name} for name in self._names
        ]
        self.is_equal = all(wants == self._wants[0] for wants in self._wants)
        self._home: dict[Key, int] = {}
        """Who held it, of those that may hold it now."""
        self._has: list[dict[bytes, set[int]]] = []
        for number, name in enumerate(self._names):
            wants, has = self._wants[number], dict[bytes, set[int]]()
            sizes = dict(self._topics)
            for topic_id, partition in keys_of(held.get(name, {})):
                if topic_id in wants and partition < sizes[topic_id]:
                    has.setdefault(topic_id, set()).add(partition)
                    self._home[topic_id, partition] = number
            self._has.append(has)
        self._load = [sum(map(len, has.values())) for has in self._has]

    def result(self) -> dict[str, Assignment]:
        return {
            name: assignment_of((topic, part) for topic, parts in has.items() for part in parts)
            for name, has in zip(self._names, self._has, strict=True)
        }

    def _give(self, key: Key, to: int) -> None:
        self._has[to].setdefault(key[0], set()).add(key[1])
        self._load[to] += 1

    def _take(self, key: Key, of: int) -> None:
        self._has[of][key[0]].remove(key[1])
        self._load[of] -= 1

    # -- equal subscriptions ---------------------------------------------------------------------------------

    def trim_to_quotas(self) -> None:
        """Take from members what is above their share. Who has most may keep the bigger shares: every other
        choice would move at least as much."""
        if not self._names:
            return
        wanted = sum(count for topic_id, count in self._topics if topic_id in self._wants[0])
        share, bigger = divmod(wanted, len(self._names))
        for rank, number in enumerate(sorted(range(len(self._names)), key=lambda each: -self._load[each])):
            quota = share + (rank < bigger)
            while self._load[number] > quota:
                has = self._has[number]
                topic = max(has, key=lambda each: (len(has[each]), each))
                self._take((topic, max(has[topic])), number)

    def hand_out(self) -> None:
        """Give what nobody has to whoever has least, topics with few readers first."""
        had = {(topic, part) for has in self._has for topic, parts in has.items() for part in parts}
        readers = {
            topic_id: [number for number, wants in enumerate(self._wants) if topic_id in wants]
            for topic_id, _ in self._topics
        }
        for topic_id, count in sorted(self._topics, key=lambda each: (len(readers[each[0]]), each[0])):
            heap = [(self._load[number], number) for number in readers[topic_id]]
            if not heap:
                continue
            heapify(heap)
            for partition in range(count):
                if (topic_id, partition) not in had:
                    load, number = heap[0]
                    self._give((topic_id, partition), number)
                    heapreplace(heap, (load + 1, number))

    # -- sticky ----------------------------------------------------------------------------------------------

    def feed(self) -> None:
        """Give each member without anything one partition of the member that has most of what it reads."""
        for number, wants in enumerate(self._wants):
            if self._load[number]:
                continue
            givers = [
                giver
                for giver, has in enumerate(self._has)
                if self._load[giver] > 1 and any(has.get(topic) for topic in wants)
            ]
            if givers:
                giver = max(givers, key=lambda each: (self._load[each], -each))
                key = self._cheapest(giver, number)
                self._take(key, giver)
                self._give(key, number)

    # -- unequal subscriptions -------------------------------------------------------------------------------

    def _common(self, giver: int, taker: int) -> Iterable[Key]:
        wants, has = self._wants[taker], self._has[giver]
        for topic in sorted(wants.intersection(has)):
            for partition in has[topic]:
                yield topic, partition

    def _price(self, key: Key, giver: int, taker: int) -> int:
        home = self._home.get(key)
        return (home == giver) - (home == taker)

    def _cheapest(self, giver: int, taker: int) -> Key:
        return min(self._common(giver, taker), key=lambda key: (self._price(key, giver, taker), key))

    def level(self) -> None:
        """While a member has two more than another that could take one of them, it gives it one: most of the
        way to balance, cheaply."""
        count = len(self._names)
        moved = True
        while moved:
            moved = False
            by_load = sorted(range(count), key=lambda each: (self._load[each], each))
            for giver in reversed(by_load):
                for taker in by_load:
                    if self._load[giver] < self._load[taker] + 2:
                        break
                    if any(self._has[giver].get(topic) for topic in self._wants[taker]):
                        key = self._cheapest(giver, taker)
                        self._take(key, giver)
                        self._give(key, taker)
                        moved = True
                        break

    def cancel_cycles(self) -> None:
        """Make the flow one of least cost."""
        count = len(self._names)
        scale = 1 + 2 * (sum(self._load) + 1)
        prices = [self._prices(giver) for giver in range(count)]
        while True:
            cycle = self._negative_cycle(prices, scale)
            if cycle is None:
                return
            # each hop's partition is chosen before any of them moves: an edge's price is of this flow
            moves = [
                (self._cheapest(giver, taker), giver, taker)
                for giver, taker in cycle
                if giver < count and taker < count
            ]
            for key, giver, taker in moves:
                self._take(key, giver)
                self._give(key, taker)
            for member in {member for _, giver, taker in moves for member in (giver, taker)}:
                prices[member] = self._prices(member)

    def _prices(self, giver: int) -> dict[int, int]:
        """taker -> the least price of moving one of the giver's partitions to it."""
        best: dict[int, int] = {}
        own: set[bytes] = set()
        other: set[bytes] = set()
        back: set[tuple[int, bytes]] = set()
        for topic, partitions in self._has[giver].items():
            for partition in partitions:
                home = self._home.get((topic, partition))
                if home == giver:
                    own.add(topic)
                else:
                    other.add(topic)
                    if home is not None:
                        back.add((home, topic))
        homes = {home for home, _ in back}
        for taker, wants in enumerate(self._wants):
            if taker == giver:
                continue
            if taker in homes:
                best[taker] = -1  # what was its home reads the topic
            elif not other.isdisjoint(wants):
                best[taker] = 0
            elif not own.isdisjoint(wants):
                best[taker] = 1
        return best

    def _negative_cycle(self, prices: list[dict[int, int]], scale: int) -> list[tuple[int, int]] | None:
        """Edges (giver, taker) of a cycle of negative cost, or None (Bellman and Ford, all nodes as sources).

        The node after the last member closes the paths: a unit that leaves member u for good and ends at v
        is the cycle node, u, …, v, node.
        """
        node = len(self._names)
        edges: list[list[tuple[int, int]]] = [
            [*((taker, price) for taker, price in prices[giver].items()), (node, scale * (2 * load + 1))]
            for giver, load in enumerate(self._load)
        ]
        edges.append([(member, -scale * (2 * load - 1)) for member, load in enumerate(self._load) if load])
        cost = [0] * (node + 1)
        parent = [-1] * (node + 1)
        changed = list(range(node + 1))
        for _ in range(node + 2):
            again: set[int] = set()
            for giver in changed:
                base = cost[giver]
                for taker, price in edges[giver]:
                    if base + price < cost[taker]:
                        cost[taker] = base + price
                        parent[taker] = giver
                        again.add(taker)
            if not again:
                return None
            cycle = _cycle_of(parent)
            if cycle is not None:
                return cycle
            changed = sorted(again)
        raise AssertionError("Bellman and Ford ends after as many rounds as there are nodes")


def _cycle_of(parent: list[int]) -> list[tuple[int, int]] | None:
    """A cycle in the graph of parents, which is one of negative cost; None if there is none."""
    seen = [0] * len(parent)
    for start in range(len(parent)):
        at = start
        while at >= 0 and not seen[at]:
            seen[at] = start + 1
            at = parent[at]
        if at >= 0 and seen[at] == start + 1:
            cycle = [(parent[at], at)]
            while cycle[-1][0] != at:
                giver = cycle[-1][0]
                cycle.append((parent[giver], giver))
            return cycle
    return None
