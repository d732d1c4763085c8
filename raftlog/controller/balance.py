"""Which replicas should be elsewhere: an incremental plan from what is to what should be.

A pure function of the brokers, of who holds what and of how large it is. Priorities, each decided only among
what the ones before leave open:

1. as many replicas as wanted, none on a broker that is lost or draining, as far as others are there;
2. replicas of a partition on distinct nodes, then spread over zones;
3. every broker the same number of replicas, within one;
4. about the same number of bytes: partitions are exchanged where brokers differ much;
5. every broker the preferred leader of the same number of partitions, within one.

Nothing moves that need not: what is balanced stays as it is, and of two brokers that differ only the
difference moves. Sums of squares measure how even something is, as in Kafka's Cruise Control goals.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice
from typing import Final, TypeAlias

_CANDIDATES_MAX: Final = 16
"""Partitions looked at for one move: enough to find one of about the right size."""
_BYTES_RATIO: Final = 0.2
_BYTES_LEAST: Final = 1 << 30
"""Two brokers that differ by less than this part of the mean, or by less than this, are left as they are."""


class BrokerState(Enum):
    """What may be done with a broker."""

    ALIVE = "alive"
    AWAY = "away"
    """It keeps what it has, for it may be back at once, and is given nothing."""
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Site:
    """A broker that may hold replicas."""

    id: int
    node_id: str
    zone: str = ""
    state: BrokerState = BrokerState.ALIVE


@dataclass(frozen=True, slots=True)
class Held:
    """A partition and who should hold it now."""

    topic_id: bytes
    index: int
    brokers: tuple[int, ...]
    """The preferred leader first."""
    factor: int
    """How many replicas it should have."""
    size: int = 0
    """Bytes of one replica."""


class Reason(Enum):
    """Why a partition should be held by others; in order of urgency."""

    LEADER_LEAVES = "its leader drains"
    LOST = "a replica is lost"
    DRAIN = "a replica drains"
    FACTOR = "replication factor"
    SPREAD = "nodes and zones"
    BALANCE = "balance"
    LEADERS = "balance of leaders"


@dataclass(frozen=True, slots=True)
class Move:
    """One partition, held by others."""

    held: Held
    brokers: tuple[int, ...]
    """The preferred leader first."""
    reason: Reason

    @property
    def added(self) -> tuple[int, ...]:
        """Brokers that get a replica."""
        return tuple(each for each in self.brokers if each not in self.held.brokers)

    @property
    def bytes(self) -> int:
        """What is to be copied."""
        return len(self.added) * self.held.size


_Cost: TypeAlias = tuple[int, int]
"""Of nodes and of zones: the sums of the squares of how many replicas each has."""
_Rank: TypeAlias = tuple[int, int, int]
"""(replicas, bytes, broker id)."""


class Planner:
    """One plan under way.

    Args:
        held: every partition.
        sites: every broker that exists; holders that are none of these are lost.
    """

    def __init__(self, held: Sequence[Held], sites: Iterable[Site]) -> None:
        self._held = held
        self._sites = {site.id: site for site in sorted(sites, key=lambda site: site.id)}
        for each in held:
            for broker_id in each.brokers:
                self._sites.setdefault(broker_id, Site(broker_id, f"lost {broker_id}", "", BrokerState.LOST))
        self._alive = [site for site in self._sites.values() if site.state is BrokerState.ALIVE]
        self._now = [list(each.brokers) for each in held]
        self._reasons: dict[int, Reason] = {}
        self._on: dict[int, dict[int, None]] = {broker_id: {} for broker_id in self._sites}
        """broker id -> numbers of partitions that it is to hold, in order."""
        self._bytes: Counter[int] = Counter()
        self._leads: dict[int, dict[int, None]] = {broker_id: {} for broker_id in self._sites}
        for number, brokers in enumerate(self._now):
            for broker_id in brokers:
                self._on[broker_id][number] = None
                self._bytes[broker_id] += held[number].size
            if brokers:
                self._leads[brokers[0]][number] = None
        self._ranked = sorted(self._rank(site.id) for site in self._alive)
        """Brokers that are alive, those that hold least first."""
        nodes_of = {
            zone: {each.node_id for each in self._alive if each.zone == zone} for zone in self._zones()
        }
        self._rooms = {zone: len(nodes) for zone, nodes in nodes_of.items()}
        self._ideal: dict[int, _Cost] = {}

    def _zones(self) -> set[str]:
        return {site.zone for site in self._alive}

    def _rank(self, broker_id: int) -> _Rank:
        return len(self._on[broker_id]), self._bytes[broker_id], broker_id

    def moves(self) -> list[Move]:
        """What is to be done, the most urgent first."""
        urgency = {reason: rank for rank, reason in enumerate(Reason)}
        found = [
            Move(held, tuple(now), self._reasons[number])
            for number, (held, now) in enumerate(zip(self._held, self._now, strict=True))
            if tuple(now) != held.brokers
        ]
        return sorted(found, key=lambda move: urgency[move.reason])

    # -- one partition ---------------------------------------------------------------------------------------

    def repair(self) -> None:
        """Priorities 1 and 2."""
        if not self._alive:
            return
        for number, held in enumerate(self._held):
            states = {self._sites[each].state for each in held.brokers}
            if not states <= {BrokerState.ALIVE, BrokerState.AWAY} or len(held.brokers) != held.factor:
                self._refill(number)
        self.spread()

    def spread(self) -> bool:
        """Priority 2 alone."""
        if not self._alive:
            return False
        return sum(self._spread(number) for number in range(len(self._now))) > 0

    def _refill(self, number: int) -> None:
        held = self._held[number]
        reason = Reason.FACTOR
        for position, broker_id in enumerate(held.brokers):
            state = self._sites[broker_id].state
            if state in (BrokerState.LOST, BrokerState.DRAINING):
                if state is BrokerState.LOST:
                    reason = Reason.LOST
                elif reason is not Reason.LOST:
                    reason = Reason.LEADER_LEAVES if position == 0 else Reason.DRAIN
                if len(self._now[number]) > held.factor:
                    self._change(number, broker_id, None, reason)
                else:
                    new = self._best(number, broker_id)
                    if new is not None:
                        self._change(number, broker_id, new, reason)
        while len(self._now[number]) < held.factor:
            new = self._best(number, None)
            if new is None:
                break
            self._change(number, None, new, Reason.FACTOR)
        while len(self._now[number]) > held.factor:
            self._change(number, self._least(number), None, Reason.FACTOR)
        now = self._now[number]
        if now and self._sites[now[0]].state in (BrokerState.LOST, BrokerState.DRAINING):
            self._prefer_one_that_stays(number, reason)

    def _prefer_one_that_stays(self, number: int, reason: Reason) -> None:
        staying = [each for each in self._now[number] if self._sites[each].state is BrokerState.ALIVE]
        if staying:
            self._prefer(number, min(staying, key=lambda each: len(self._leads[each])), reason)

    def _best(self, number: int, instead_of: int | None) -> int | None:
        """Who should get a replica of the partition; None: nobody is left."""
        now = self._now[number]
        others = [each for each in now if each != instead_of]
        nodes = Counter(self._sites[each].node_id for each in others)
        zones = Counter(self._sites[each].zone for each in others)
        for rank in sorted({zones[zone] for zone in self._rooms}):
            for _, _, broker_id in self._ranked:
                site = self._sites[broker_id]
                if zones[site.zone] == rank and not nodes[site.node_id] and broker_id not in now:
                    return broker_id
        free = (self._sites[rank[2]] for rank in self._ranked if rank[2] not in now)
        found = min(free, key=lambda site: (nodes[site.node_id], zones[site.zone]), default=None)
        return None if found is None else found.id

    def _least(self, number: int) -> int:
        """Whose replica of the partition is needed least."""

        def key(broker_id: int) -> tuple[object, ...]:
            others = [each for each in self._now[number] if each != broker_id]
            stays = self._sites[broker_id].state is BrokerState.ALIVE
            is_first = broker_id == self._now[number][0]
            return stays, *self._cost(others), is_first, -len(self._on[broker_id]), -self._bytes[broker_id]

        return min(self._now[number], key=key)

    def _cost(self, brokers: Iterable[int]) -> _Cost:
        sites = [self._sites[each] for each in brokers]
        nodes = Counter(site.node_id for site in sites)
        zones = Counter(site.zone for site in sites)
        return sum(n * n for n in nodes.values()), sum(n * n for n in zones.values())

    def _least_cost(self, count: int) -> _Cost:
        """What ``count`` replicas cost when they are spread as evenly as nodes and zones allow, or less."""
        found = self._ideal.get(count)
        if found is None:
            zones = dict.fromkeys(self._rooms, 0)
            for _ in range(count):
                free = [zone for zone in zones if zones[zone] < self._rooms[zone]] or [*zones]
                zones[min(free, key=lambda zone: zones[zone])] += 1
            nodes = sum(self._rooms.values())
            full, rest = divmod(count, nodes)
            node_cost = rest * (full + 1) ** 2 + (nodes - rest) * full**2
            found = self._ideal[count] = node_cost, sum(n * n for n in zones.values())
        return found

    def _spread(self, number: int) -> bool:
        """Exchange replicas of the partition while that spreads them better over nodes and zones."""
        now = self._now[number]
        has_changed = False
        while len(now) > 1 and (cost := self._cost(now)) > self._least_cost(len(now)):
            found = None
            for old in now:
                if self._sites[old].state is not BrokerState.ALIVE:
                    continue
                new = self._best(number, old)
                if new is None:
                    continue
                better = self._cost(new if each == old else each for each in now)
                key = (better, len(self._on[new]) - len(self._on[old]))
                if better < cost and (found is None or key < found[0]):
                    found = key, old, new
            if found is None:
                break
            self._change(number, found[1], found[2], Reason.SPREAD)
            has_changed = True
        return has_changed

    def _change(self, number: int, old: int | None, new: int | None, reason: Reason) -> None:
        """Put ``new`` in the place of ``old``; where there is no old, at the end."""
        now, size = self._now[number], self._held[number].size
        first = now[0] if now else None
        if old is None:
            assert new is not None
            now.append(new)
        elif new is None:
            now.remove(old)
        else:
            now[now.index(old)] = new
        if old is not None:
            self._loaded(old, number, -size)
        if new is not None:
            self._loaded(new, number, size)
        self._leader_changed(number, first)
        self._reasons.setdefault(number, reason)

    def _loaded(self, broker_id: int, number: int, size: int) -> None:
        """The broker is to hold the partition, or no more if it was to; ``size``: bytes that come or go."""
        is_ranked = self._sites[broker_id].state is BrokerState.ALIVE
        if is_ranked:
            del self._ranked[bisect_left(self._ranked, self._rank(broker_id))]
        if number in self._on[broker_id]:
            del self._on[broker_id][number]
        else:
            self._on[broker_id][number] = None
        self._bytes[broker_id] += size
        if is_ranked:
            insort(self._ranked, self._rank(broker_id))

    def _prefer(self, number: int, broker_id: int, reason: Reason) -> None:
        now = self._now[number]
        first = now[0]
        now.remove(broker_id)
        now.insert(0, broker_id)
        self._leader_changed(number, first)
        self._reasons.setdefault(number, reason)

    def _leader_changed(self, number: int, first: int | None) -> None:
        now = self._now[number]
        if first is not None and first != now[0]:
            del self._leads[first][number]
        self._leads[now[0]][number] = None

    # -- replicas --------------------------------------------------------------------------------------------

    def even_replicas(self) -> bool:
        """Priority 3: from who has most to who has least, while they differ by two. Returns whether there was
        anything to do, as the others do."""
        blocked: set[tuple[int, str]] = set()
        has_changed = False
        while self._even_once(blocked):
            has_changed = True
        return has_changed

    def _even_once(self, blocked: set[tuple[int, str]]) -> bool:
        """Make one move. ``blocked``: (broker, zone) that no partition can leave for, as things stand."""
        for most, _, giver_id in reversed(self._ranked):
            giver = self._sites[giver_id]
            for least, _, taker_id in self._ranked:
                taker = self._sites[taker_id]
                if most - least < 2:
                    break
                if (giver.id, taker.zone) in blocked:
                    continue
                number = self._movable(giver, taker)
                if number is not None:
                    self._change(number, giver.id, taker.id, Reason.BALANCE)
                    others = {*self._now[number], giver.id}
                    blocked.difference_update([each for each in blocked if each[0] in others])
                    return True
                if not any(self._may_zone(each, giver, taker) for each in self._on[giver.id]):
                    blocked.add((giver.id, taker.zone))
        return False

    def _movable(self, giver: Site, taker: Site) -> int | None:
        """A partition that the one can hand to the other: of those looked at, the one that evens out their
        bytes best, and their leaders."""
        wanted = (self._bytes[giver.id] - self._bytes[taker.id]) // 2
        leads = len(self._leads[giver.id]) - len(self._leads[taker.id]) >= 2
        here = self._on[taker.id]
        legal = (
            number for number in self._on[giver.id] if number not in here and self._may(number, giver, taker)
        )
        return min(
            islice(legal, _CANDIDATES_MAX),
            key=lambda number: (
                abs(self._held[number].size - wanted),
                (self._now[number][0] == giver.id) != leads,
            ),
            default=None,
        )

    def _may(self, number: int, giver: Site, taker: Site) -> bool:
        """Whether the partition is spread as well when the taker has the giver's replica."""
        if giver.node_id != taker.node_id:
            nodes = [self._sites[each].node_id for each in self._now[number]]
            if nodes.count(taker.node_id) > nodes.count(giver.node_id) - 1:
                return False
        return giver.zone == taker.zone or self._may_zone(number, giver, taker)

    def _may_zone(self, number: int, giver: Site, taker: Site) -> bool:
        if giver.zone == taker.zone:
            return True
        zones = [self._sites[each].zone for each in self._now[number]]
        return zones.count(taker.zone) <= zones.count(giver.zone) - 1

    # -- bytes -----------------------------------------------------------------------------------------------

    def even_bytes(self) -> bool:
        """Priority 4: exchange a large partition for a small one."""
        has_changed = False
        while self._exchange():
            has_changed = True
        return has_changed

    def _exchange(self) -> bool:
        ranked = sorted(self._alive, key=lambda site: (self._bytes[site.id], site.id))
        mean = sum(self._bytes[site.id] for site in ranked) // max(1, len(ranked))
        most_differ = max(_BYTES_LEAST, int(mean * _BYTES_RATIO))
        for giver in reversed(ranked):
            for taker in ranked:
                differ = self._bytes[giver.id] - self._bytes[taker.id]
                if differ <= most_differ:
                    break
                if self._swap(giver, taker, differ):
                    return True
        return False

    def _swap(self, giver: Site, taker: Site, differ: int) -> bool:
        """Exchange two partitions such that at least a quarter of the difference goes."""
        sizes = self._held
        large = [
            n for n in self._on[giver.id] if n not in self._on[taker.id] and sizes[n].size >= differ // 8
        ]
        small = [n for n in self._on[taker.id] if n not in self._on[giver.id]]
        large = sorted(large, key=lambda n: -sizes[n].size)[:_CANDIDATES_MAX]
        small = sorted(small, key=lambda n: sizes[n].size)[:_CANDIDATES_MAX]
        best = None
        for one in large:
            if not self._may(one, giver, taker):
                continue
            for other in small:
                left = abs(differ - 2 * (sizes[one].size - sizes[other].size))
                is_better = left <= differ * 3 // 4 and (best is None or left < best[0])
                if is_better and self._may(other, taker, giver):
                    best = left, one, other
        if best is None:
            return False
        self._change(best[1], giver.id, taker.id, Reason.BALANCE)
        self._change(best[2], taker.id, giver.id, Reason.BALANCE)
        return True

    # -- leaders ---------------------------------------------------------------------------------------------

    def even_leaders(self) -> None:
        """Priority 5: hand preferred leaderships over, along chains of partitions (see
        :func:`raftlog.controller.placement.place`)."""
        for number, now in enumerate(self._now):
            if now and self._sites[now[0]].state is not BrokerState.ALIVE:
                self._prefer_one_that_stays(number, Reason.LEADERS)
        done: set[int] = set()
        while True:
            givers = [site.id for site in self._alive if site.id not in done]
            if not givers:
                return
            giver = max(givers, key=lambda each: (len(self._leads[each]), -each))
            done |= self._hand_over(giver)

    def _hand_over(self, giver: int) -> set[int]:
        """Carry out the shortest chain that evens out; where there is none, return all brokers that it could
        have led over: none of those has one that this one has not."""
        least = len(self._leads[giver]) - 2
        reached: dict[int, int | None] = {giver: None}
        queue = deque([giver])
        while queue:
            holder = queue.popleft()
            if len(self._leads[holder]) <= least:
                while (number := reached[holder]) is not None:
                    previous = self._now[number][0]
                    self._prefer(number, holder, Reason.LEADERS)
                    holder = previous
                return set()
            if len(reached) == len(self._alive) and not queue:
                break
            for number in self._leads[holder]:
                for follower in self._now[number]:
                    if follower not in reached and self._sites[follower].state is BrokerState.ALIVE:
                        reached[follower] = number
                        queue.append(follower)
        return set(reached)


def plan(held: Sequence[Held], sites: Sequence[Site], *, balance: bool = True) -> list[Move]:
    """What should be held by others.

    Args:
        held: every partition, in any order that stays the same.
        sites: every broker.
        balance: else only what is lost, drains, is too few, too many or too close together.

    Returns:
        At most one move per partition, the most urgent first. Equal arguments give equal plans; a cluster
        that has followed a plan is given an empty one.
    """
    planner = Planner(held, sites)
    planner.repair()
    if balance:
        # What one does may open a way for another; it ends, for none undoes what one of higher priority did.
        while any([planner.even_replicas(), planner.even_bytes(), planner.spread()]):
            pass
        planner.even_leaders()
    return planner.moves()


def carried_out(held: Sequence[Held], moves: Iterable[Move]) -> list[Held]:
    """The partitions when the moves are done."""
    changed = {(move.held.topic_id, move.held.index): move.brokers for move in moves}
    return [replace(each, brokers=changed.get((each.topic_id, each.index), each.brokers)) for each in held]
