"""The incremental plan: apart on nodes, within one, no move that need not be, and the same every time."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from raftlog.controller.balance import BrokerState, Held, Move, Reason, Site, carried_out, plan

ALIVE, AWAY, DRAINING, LOST = BrokerState
TOPIC = b"t" * 16


def one_per_node(count: int, zones: int = 1) -> list[Site]:
    return [Site(each, f"n{each}", f"z{each % zones}") for each in range(count)]


def ring(partitions: int, brokers: int, factor: int = 3, size: int = 0) -> list[Held]:
    """Partitions on neighbours: balanced when brokers divide partitions."""
    return [
        Held(TOPIC, index, tuple((index + each) % brokers for each in range(factor)), factor, size)
        for index in range(partitions)
    ]


def counted(held: list[Held]) -> Counter[int]:
    return Counter(broker_id for each in held for broker_id in each.brokers)


def led(held: list[Held]) -> Counter[int]:
    return Counter(each.brokers[0] for each in held)


def spread(counts: Counter[int], brokers: list[int]) -> int:
    values = [counts[each] for each in brokers]
    return max(values) - min(values)


def added(moves: list[Move]) -> int:
    return sum(len(move.added) for move in moves)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Held], list[Site]]:
    """Anything: several brokers a node, zones, every state, partitions anywhere, some on unknown brokers."""
    count = draw(st.integers(1, 8))
    sites = [
        Site(
            each,
            draw(st.sampled_from(["n1", "n2", "n3", "n4", "n5", "n6"])),
            draw(st.sampled_from(["", "a", "b"])),
            draw(st.sampled_from([ALIVE, ALIVE, ALIVE, AWAY, DRAINING, LOST])),
        )
        for each in range(count)
    ]
    held = []
    for index in range(draw(st.integers(0, 25))):
        holders = draw(st.lists(st.integers(0, count + 1), min_size=1, max_size=4, unique=True))
        factor = draw(st.sampled_from([len(holders), 1, 3]))
        held.append(Held(TOPIC, index, tuple(holders), factor, draw(st.integers(0, 5)) << 30))
    return held, sites


@settings(max_examples=300, deadline=None)
@given(clusters())
def test_a_plan_is_legal_and_final(cluster: tuple[list[Held], list[Site]]) -> None:
    held, sites = cluster
    moves = plan(held, sites)
    assert moves == plan(held, sites)
    after = carried_out(held, moves)
    assert plan(after, sites) == []
    state = {site.id: site.state for site in sites}
    node_of = {site.id: site.node_id for site in sites}
    alive = [site for site in sites if site.state is ALIVE]
    for before, each in zip(held, after, strict=True):
        assert len(set(each.brokers)) == len(each.brokers)
        given = set(each.brokers) - set(before.brokers)
        assert all(state[broker_id] is ALIVE for broker_id in given)
        if not alive:
            assert each == before
            continue
        gone = [each for each in each.brokers if state.get(each, LOST) in (LOST, DRAINING)]
        others = [site.id for site in alive if site.id not in each.brokers]
        if gone or len(each.brokers) < each.factor:
            assert not others, "somebody could have taken it"
        if not gone and all(state[broker_id] is ALIVE for broker_id in each.brokers):
            nodes = len({site.node_id for site in alive})
            here = len({node_of[broker_id] for broker_id in each.brokers})
            assert here == min(len(each.brokers), nodes), "two replicas on a node, and a node without"
        if any(state.get(broker_id) is ALIVE for broker_id in each.brokers):
            assert state.get(each.brokers[0], LOST) in (ALIVE, AWAY), "who is to lead goes"


@settings(max_examples=200, deadline=None)
@given(
    st.integers(3, 9),
    st.lists(st.permutations(list(range(9))), min_size=1, max_size=40),
    st.integers(1, 3),
)
def test_one_broker_a_node_is_balanced_within_one(count: int, orders: list[list[int]], factor: int) -> None:
    brokers = list(range(count))
    held = [
        Held(TOPIC, index, tuple(each for each in order if each < count)[:factor], factor)
        for index, order in enumerate(orders)
    ]
    moves = plan(held, one_per_node(count))
    after = carried_out(held, moves)
    before, now = counted(held), counted(after)
    assert spread(now, brokers) <= 1
    for leader, *followers in (each.brokers for each in after):
        for follower in followers:
            assert led(after)[leader] - led(after)[follower] <= 1
    # the least number of moves: what those above the mean have too many of goes, and nothing else
    mean, rest = divmod(sum(before.values()), count)
    ranked = sorted((before[each] for each in brokers), reverse=True)
    targets = [mean + (position < rest) for position in range(count)]
    assert added(moves) == sum(max(0, has - should) for has, should in zip(ranked, targets, strict=True))


def test_what_is_balanced_stays() -> None:
    assert plan(ring(60, 6), one_per_node(6)) == []


def test_a_node_that_joins_gets_its_share_and_nothing_else_moves() -> None:
    held = ring(60, 5)
    moves = plan(held, one_per_node(6))
    after = carried_out(held, moves)
    assert added(moves) == 30
    assert all(move.added == (5,) for move in moves if move.added)
    assert set(counted(after).values()) == {30}
    assert set(led(after).values()) == {10}


def test_a_draining_broker_gives_everything_away_leaders_first() -> None:
    held = ring(60, 5)
    sites = one_per_node(5)
    sites[2] = replace(sites[2], state=DRAINING)
    moves = plan(held, sites)
    after = carried_out(held, moves)
    assert counted(after)[2] == 0
    assert spread(counted(after), [0, 1, 3, 4]) <= 1
    assert added(moves) == 36
    reasons = [move.reason for move in moves]
    assert reasons[:12] == [Reason.LEADER_LEAVES] * 12
    assert Reason.LEADER_LEAVES not in reasons[12:]


def test_a_lost_broker_is_replaced_and_one_that_is_away_is_not() -> None:
    sites = one_per_node(5)
    sites[0] = replace(sites[0], state=AWAY)
    assert plan(ring(20, 5), sites, balance=False) == []
    sites[0] = replace(sites[0], state=LOST)
    moves = plan(ring(20, 5), sites, balance=False)
    assert {move.reason for move in moves} == {Reason.LOST}
    assert counted(carried_out(ring(20, 5), moves))[0] == 0


def test_without_anybody_to_take_over_everything_stays() -> None:
    sites = one_per_node(3)
    sites[1] = replace(sites[1], state=LOST)
    after = carried_out(ring(9, 3), plan(ring(9, 3), sites))
    assert all(set(each.brokers) == {0, 1, 2} for each in after), "the lost one may be back"
    assert led(after)[1] == 0


def test_a_replication_factor_is_raised_and_lowered() -> None:
    held = [replace(each, factor=3) for each in ring(12, 6, factor=1)]
    after = carried_out(held, plan(held, one_per_node(6)))
    assert {len(each.brokers) for each in after} == {3}
    assert set(counted(after).values()) == {6}
    held = [replace(each, factor=2) for each in after]
    moves = plan(held, one_per_node(6))
    after = carried_out(held, moves)
    assert {len(each.brokers) for each in after} == {2}
    assert spread(counted(after), list(range(6))) <= 1
    assert set(led(after).values()) == {2}


def test_replicas_go_to_other_zones_when_there_are_any() -> None:
    held = ring(12, 3)
    sites = [*one_per_node(3), Site(3, "n3", "other"), Site(4, "n4", "third")]
    after = carried_out(held, plan(held, sites))
    zone_of = {site.id: site.zone for site in sites}
    assert all(len({zone_of[broker_id] for broker_id in each.brokers}) == 3 for each in after)


def test_bytes_are_evened_out_without_changing_the_counts() -> None:
    held = [
        replace(each, size=(100 << 30) if 0 in each.brokers else 1 << 30) for each in ring(40, 8, factor=1)
    ]
    moves = plan(held, one_per_node(8))
    after = carried_out(held, moves)
    assert set(counted(after).values()) == {5}
    sizes: Counter[int] = Counter()
    for each in after:
        sizes[each.brokers[0]] += each.size
    assert max(sizes.values()) <= 105 << 30
    assert plan(after, one_per_node(8)) == []


def test_two_hundred_nodes_and_twenty_thousand_partitions() -> None:
    held = ring(20_000, 100)
    sites = one_per_node(200, zones=4)
    sites[7] = replace(sites[7], state=LOST)
    sites[8] = replace(sites[8], state=DRAINING)
    begin = time.process_time()
    after = carried_out(held, plan(held, sites))
    assert time.process_time() - begin < 15.0, "a few seconds on the slowest machine"
    alive = [site.id for site in sites if site.state is ALIVE]
    assert spread(counted(after), alive) <= 2
    assert plan(after, sites) == []
