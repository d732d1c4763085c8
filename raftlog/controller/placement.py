"""Where the replicas of a new topic go: a pure function of what the brokers hold already.

Priorities, each decided only among what the ones before leave open:

1. replicas of a partition on distinct nodes (a node is what fails together), as far as there are nodes;
2. spread over zones as evenly as possible;
3. the broker with the fewest replicas;
4. the broker that shares the fewest partitions with those chosen: when one fails, its load spreads;
5. a rotation by partition number.

The preferred leaders are then dealt out so that no broker has two more than another whom it could hand one
to.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from raftlog.errors import ConfigError, InvalidReplicationFactor


@dataclass(frozen=True, slots=True)
class BrokerInfo:
    """A broker that may be given replicas, with what it holds now."""

    id: int
    node_id: str
    zone: str = ""
    replicas: int = 0
    leaders: int = 0
    """Partitions whose preferred leader it is."""


def place(partitions: int, replication_factor: int, brokers: Sequence[BrokerInfo]) -> list[list[int]]:
    """Choose brokers for the partitions of a new topic.

    Args:
        partitions: how many, at least 1.
        replication_factor: replicas of each.
        brokers: candidates, in any order.

    Returns:
        For each partition the broker ids, the preferred leader first. Equal arguments give equal placements.

    Raises:
        InvalidReplicationFactor: below 1, or above the number of brokers.
        ConfigError: fewer than 1 partition.
    """
    if partitions < 1:
        raise ConfigError(f"a topic has at least 1 partition, not {partitions}")
    if not 1 <= replication_factor <= len(brokers):
        raise InvalidReplicationFactor(
            f"replication factor {replication_factor} is not in 1 to {len(brokers)}, the number of brokers",
            replication_factor=replication_factor,
            brokers=len(brokers),
        )
    ranked = sorted(brokers, key=lambda broker: broker.id)
    replicas = {broker.id: broker.replicas for broker in ranked}
    shared: Counter[tuple[int, int]] = Counter()
    placement = [_choose(index, replication_factor, ranked, replicas, shared) for index in range(partitions)]
    _deal_leaders(placement, {broker.id: broker.leaders for broker in ranked})
    return placement


def _choose(
    index: int,
    replication_factor: int,
    ranked: Sequence[BrokerInfo],
    replicas: dict[int, int],
    shared: Counter[tuple[int, int]],
) -> list[int]:
    """Brokers for one partition. Counts them in ``replicas``, by broker, and ``shared``, by pair of
    brokers."""
    rank = {broker.id: (position - index) % len(ranked) for position, broker in enumerate(ranked)}
    nodes: Counter[str] = Counter()
    zones: Counter[str] = Counter()
    left = list(ranked)
    chosen: list[int] = []
    for _ in range(replication_factor):
        best = min(
            left,
            key=lambda each: (
                nodes[each.node_id],
                zones[each.zone],
                replicas[each.id],
                sum(shared[each.id, other] for other in chosen),
                rank[each.id],
            ),
        )
        left.remove(best)
        nodes[best.node_id] += 1
        zones[best.zone] += 1
        replicas[best.id] += 1
        for other in chosen:
            shared[best.id, other] += 1
            shared[other, best.id] += 1
        chosen.append(best.id)
    return chosen


def _deal_leaders(placement: list[list[int]], leaders: dict[int, int]) -> None:
    """Move a leader to the front of each partition's list, then even out along chains of partitions.

    A chain hands leadership from a broker to a follower of one of its partitions, from there on likewise,
    and ends at a broker with at least two fewer than the first: it lowers the first by one and raises the
    last by one. When no chain is left, no placement of leaders on these replicas is more even (Harvey et
    al., "Semi-matchings for bipartite graphs and load balancing", 2003).
    """
    for brokers in placement:
        _put_first(brokers, min(brokers, key=lambda each: leaders[each]))
        leaders[brokers[0]] += 1
    improved = True
    while improved:
        improved = any(
            _hand_over(placement, leaders, giver)
            for giver in sorted(leaders, key=lambda each: -leaders[each])
        )


def _hand_over(placement: list[list[int]], leaders: dict[int, int], giver: int) -> bool:
    """Carry out the shortest chain from ``giver`` that evens out, found breadth first; False if there is
    none."""
    led: dict[int, list[list[int]]] = {}
    for brokers in placement:
        led.setdefault(brokers[0], []).append(brokers)
    reached: dict[int, list[int] | None] = {giver: None}  # broker -> the partition that would be handed to it
    queue = deque([giver])
    while queue:
        holder = queue.popleft()
        if leaders[holder] <= leaders[giver] - 2:
            leaders[giver] -= 1
            leaders[holder] += 1
            while (handed := reached[holder]) is not None:
                previous = handed[0]
                _put_first(handed, holder)
                holder = previous
            return True
        for brokers in led.get(holder, ()):
            for follower in brokers[1:]:
                if follower not in reached:
                    reached[follower] = brokers
                    queue.append(follower)
    return False


def _put_first(brokers: list[int], leader: int) -> None:
    brokers.remove(leader)
    brokers.insert(0, leader)
