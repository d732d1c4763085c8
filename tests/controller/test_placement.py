"""Placement: apart on nodes, spread over zones, balanced, and the same for the same arguments."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftlog.controller.placement import BrokerInfo, place
from raftlog.errors import ConfigError, InvalidReplicationFactor


def one_per_node(count: int) -> list[BrokerInfo]:
    return [BrokerInfo(number, f"node{number}") for number in range(1, count + 1)]


def spread(counts: Counter[int], brokers: list[BrokerInfo]) -> int:
    values = [counts[broker.id] for broker in brokers]
    return max(values) - min(values)


brokers_strategy = st.lists(
    st.builds(
        BrokerInfo,
        id=st.integers(1, 1000),
        node_id=st.sampled_from(["n1", "n2", "n3", "n4", "n5"]),
        zone=st.sampled_from(["", "a", "b", "c"]),
        replicas=st.integers(0, 20),
        leaders=st.integers(0, 20),
    ),
    min_size=1,
    max_size=9,
    unique_by=lambda broker: broker.id,
)


@settings(max_examples=200, deadline=None)
@given(
    brokers=brokers_strategy, partitions=st.integers(1, 30), factor=st.integers(1, 9), seed=st.integers(0, 9)
)
def test_every_placement_is_valid_and_depends_on_its_arguments_alone(
    brokers: list[BrokerInfo], partitions: int, factor: int, seed: int
) -> None:
    factor = min(factor, len(brokers))
    placement = place(partitions, factor, brokers)
    assert len(placement) == partitions
    ids = {broker.id for broker in brokers}
    for holders in placement:
        assert len(holders) == len(set(holders)) == factor
        assert set(holders) <= ids
    shuffled = brokers[:]
    random.Random(seed).shuffle(shuffled)
    assert place(partitions, factor, shuffled) == placement


@settings(max_examples=200, deadline=None)
@given(brokers=brokers_strategy, partitions=st.integers(1, 10), factor=st.integers(1, 9))
def test_replicas_are_on_as_many_nodes_as_there_are(
    brokers: list[BrokerInfo], partitions: int, factor: int
) -> None:
    factor = min(factor, len(brokers))
    node_of = {broker.id: broker.node_id for broker in brokers}
    nodes = len(set(node_of.values()))
    for holders in place(partitions, factor, brokers):
        assert len({node_of[each] for each in holders}) == min(factor, nodes)


@settings(max_examples=200, deadline=None)
@given(
    zone_sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    partitions=st.integers(1, 10),
    factor=st.integers(1, 6),
)
def test_replicas_are_in_as_many_zones_as_there_are(
    zone_sizes: list[int], partitions: int, factor: int
) -> None:
    zones = [zone for zone, size in enumerate(zone_sizes) for _ in range(size)]
    brokers = [BrokerInfo(number, f"n{number}", f"z{zone}") for number, zone in enumerate(zones)]
    factor = min(factor, len(brokers))
    for holders in place(partitions, factor, brokers):
        assert len({zones[each] for each in holders}) == min(factor, len(zone_sizes))


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 9), partitions=st.integers(1, 60), factor=st.integers(1, 9))
def test_replicas_and_leaders_are_balanced_within_one(count: int, partitions: int, factor: int) -> None:
    brokers = one_per_node(count)
    placement = place(partitions, min(factor, count), brokers)
    assert spread(Counter(each for holders in placement for each in holders), brokers) <= 1
    assert spread(Counter(holders[0] for holders in placement), brokers) <= 1


@settings(max_examples=100, deadline=None)
@given(brokers=brokers_strategy, partitions=st.integers(1, 20), factor=st.integers(1, 9))
def test_no_leadership_could_be_handed_over_to_even_it_out(
    brokers: list[BrokerInfo], partitions: int, factor: int
) -> None:
    placement = place(partitions, min(factor, len(brokers)), brokers)
    leaders = Counter({broker.id: broker.leaders for broker in brokers})
    leaders.update(holders[0] for holders in placement)
    for leader, *followers in placement:
        for follower in followers:
            assert leaders[leader] - leaders[follower] <= 1


def test_leaders_are_evened_out_over_chains_of_partitions() -> None:
    """Broker 1 leads too many and shares no partition with 3, the only one with room: 2 passes one on."""
    brokers = [
        BrokerInfo(1, "a", leaders=1),
        BrokerInfo(2, "b", leaders=1),
        BrokerInfo(3, "c"),
        BrokerInfo(4, "d"),
    ]
    placement = place(12, 2, brokers)
    leaders = Counter({1: 1, 2: 1})
    leaders.update(holders[0] for holders in placement)
    assert sorted(leaders.values()) == [3, 3, 4, 4]


def test_new_replicas_go_to_the_brokers_that_have_fewest() -> None:
    brokers = [
        BrokerInfo(1, "a", replicas=100, leaders=50),
        BrokerInfo(2, "b", replicas=100, leaders=50),
        BrokerInfo(3, "c"),
        BrokerInfo(4, "d"),
    ]
    placement = place(10, 2, brokers)
    assert {frozenset(holders) for holders in placement} == {frozenset({3, 4})}
    assert Counter(holders[0] for holders in placement) == {3: 5, 4: 5}


def test_partitions_share_pairs_of_brokers_evenly_so_that_a_failure_spreads() -> None:
    placement = place(20, 2, one_per_node(5))
    pairs = Counter(pair for holders in placement for pair in combinations(sorted(holders), 2))
    assert len(pairs) == 10
    assert set(pairs.values()) == {2}


def test_several_brokers_on_one_node() -> None:
    brokers = [BrokerInfo(1, "a"), BrokerInfo(2, "a"), BrokerInfo(3, "a"), BrokerInfo(4, "b")]
    for holders in place(6, 2, brokers):
        assert 4 in holders
    for holders in place(6, 3, brokers):
        assert len(holders) == 3


@pytest.mark.parametrize("factor", [0, -1, 4, 100])
def test_replication_factor_above_the_number_of_brokers(factor: int) -> None:
    with pytest.raises(InvalidReplicationFactor) as caught:
        place(1, factor, one_per_node(3))
    assert str(factor) in caught.value.message
    assert "3" in caught.value.message
    assert (caught.value.replication_factor, caught.value.brokers) == (factor, 3)
    assert place(1, 3, one_per_node(3)) == [[1, 2, 3]], "the next valid request succeeds"


def test_no_partitions_no_brokers() -> None:
    with pytest.raises(ConfigError, match="at least 1 partition"):
        place(0, 1, one_per_node(3))
    with pytest.raises(InvalidReplicationFactor, match="1 to 0"):
        place(1, 1, [])
