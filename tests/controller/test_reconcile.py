"""What a controller does next: one table of situations, and what holds in all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from msgspec.structs import replace

from raftlog.controller.balance import BrokerState, Reason
from raftlog.controller.reconcile import (
    Action,
    Assign,
    DrainBroker,
    ForgetBroker,
    JoinBroker,
    Node,
    Observed,
    Policy,
    StartBroker,
    broker_states,
    decide,
    is_at_rest,
    starts,
)
from raftlog.net.rpc_cluster import LedRow
from raftlog.state.image import Broker, Partition, Topic
from raftlog.state.metadata import MetadataState

TOPIC_ID = b"t" * 16
POLICY = Policy(replace_after_ms=1000)


def image(brokers: int, *holders: tuple[int, ...], replication: int = 0) -> MetadataState:
    """Brokers 0 to n - 1 on nodes n0 …, and a topic whose partition p has replicas 10 p, 10 p + 1 … on these
    holders."""
    made = MetadataState()
    for broker_id in range(brokers):
        made.brokers[broker_id] = Broker(broker_id, b"%d" % broker_id, f"n{broker_id}", "", broker_id + 1)
    partitions = tuple(
        Partition.founded(tuple(enumerate(each, 10 * index))) for index, each in enumerate(holders)
    )
    made._set_topic(Topic("t", TOPIC_ID, {}, False, partitions, replication))
    return made


def change(state: MetadataState, index: int, **fields: object) -> Partition:
    partition = replace(state.partition(TOPIC_ID, index), **fields)
    state._set_partition(TOPIC_ID, index, partition)
    return partition


def drain(state: MetadataState, broker_id: int) -> None:
    state.brokers[broker_id] = replace(state.brokers[broker_id], draining=True)


def seen(
    state: MetadataState,
    running: Collection[int] | None = None,
    *,
    size: int = 0,
    away_since_ms: int = 0,
    nodes: dict[str, Node] | None = None,
    gone: Collection[int] = (),
) -> Observed:
    """A cluster that is as its metadata want it, but for brokers that do not run."""
    running = frozenset(state.brokers if running is None else running)
    led = {
        partition.wanted[0]: LedRow(partition.wanted[0], partition.wanted, size, False)
        for topic in state.topics.values()
        for partition in topic.partitions
        if partition.replicas[0][1] in running
    }
    up = {f"n{each}": Node(f"n{each}", disks=frozenset({each})) for each in sorted(running)}
    away = {each: away_since_ms for each in state.brokers if each not in running}
    return Observed(up if nodes is None else nodes, running, running, away, frozenset(gone), led)


def brokers(action: Action) -> tuple[int, ...]:
    assert isinstance(action, Assign)
    return tuple(broker_id for broker_id, _ in action.replicas)


BALANCED = ((0, 1, 2), (1, 2, 0), (2, 0, 1))


def test_where_all_is_well_there_is_nothing_to_do() -> None:
    state = image(3, *BALANCED)
    assert decide(state, seen(state), 0, POLICY) == []
    assert is_at_rest(state, seen(state))


# -- processes -----------------------------------------------------------------------------------------------


def test_a_process_that_has_died_is_started_where_its_data_are() -> None:
    state = image(3, *BALANCED)
    nodes = {f"n{each}": Node(f"n{each}", disks=frozenset({each})) for each in range(3)}
    assert starts(state, nodes, {0, 2}) == [StartBroker(1, "n1")]
    assert decide(state, seen(state, {0, 2}, nodes=nodes), 0, POLICY) == []


def test_without_metadata_everything_is_started() -> None:
    nodes = {"a": Node("a", disks=frozenset({0, 1})), "b": Node("b", disks=frozenset({2}))}
    assert starts(None, nodes, ()) == [
        StartBroker(0, "a"),
        StartBroker(1, "a"),
        StartBroker(2, "b"),
    ]


def test_brokers_that_several_nodes_see_are_spread_over_them() -> None:
    nodes = {each: Node(each, disks=frozenset({0, 1})) for each in "ab"}
    assert starts(None, nodes, ()) == [StartBroker(0, "a"), StartBroker(1, "b")]


def test_a_broker_that_was_removed_is_not_started() -> None:
    state = image(3, *BALANCED)
    state.removed[7] = 99
    nodes = {f"n{each}": Node(f"n{each}", disks=frozenset({each, 7})) for each in range(3)}
    assert starts(state, nodes, {0, 1, 2}) == []
    assert starts(state, nodes, {0, 1}) == [StartBroker(2, "n2")]


def test_a_node_that_comes_gets_a_broker() -> None:
    state = image(3, *BALANCED)
    observed = seen(state)
    nodes = {**observed.nodes, "new": Node("new")}
    assert decide(state, seen(state, nodes=nodes), 0, POLICY) == [JoinBroker("new")]
    leaving = {**observed.nodes, "new": Node("new", draining=True)}
    assert decide(state, seen(state, nodes=leaving), 0, POLICY) == []


def test_a_node_that_comes_back_before_its_old_self_is_known_to_be_dead_gets_no_other_broker() -> None:
    state = image(3, *BALANCED)
    observed = seen(state, {0, 1})
    twice = {f"n{each}": Node(f"n{each}", disks=frozenset({each})) for each in range(3)}
    twice["n2-again"] = Node("n2-again", disks=frozenset({2}))
    assert decide(state, dataclasses.replace(observed, nodes=twice), 500, POLICY) == []
    both = {**twice, "new": Node("new")}
    assert decide(state, dataclasses.replace(observed, nodes=both), 500, POLICY) == [JoinBroker("new")]


def test_a_node_has_as_many_brokers_as_it_should() -> None:
    state = image(1)
    nodes = {"n0": Node("n0", disks=frozenset({0}))}
    two = Policy(brokers_per_node=2)
    assert decide(state, seen(state, nodes=nodes), 0, two) == [JoinBroker("n0")]
    assert decide(state, seen(state, nodes=nodes), 0, Policy(brokers=3)) == [JoinBroker("n0")]
    assert decide(state, seen(state, nodes=nodes), 0, Policy(brokers=1, brokers_per_node=9)) == []


def test_where_all_nodes_see_the_same_directories_who_is_gone_is_replaced() -> None:
    state = image(3, *BALANCED)
    state.founders = ((0, 1), (1, 2), (2, 3))
    both = frozenset({0, 2})
    alone = seen(state, {0, 2}, nodes={"n0": Node("n0", disks=both)})
    assert broker_states(state, alone, 0, POLICY)[1] is BrokerState.AWAY, "its node may be seen next"
    nodes = {"n0": Node("n0", disks=both), "n1": Node("n1", disks=both)}
    observed = seen(state, {0, 2}, nodes=nodes)
    assert (
        broker_states(state, dataclasses.replace(observed, nodes={"n1": nodes["n1"]}), 0, POLICY)[1]
        is BrokerState.LOST
    ), "that was its node"
    assert broker_states(state, observed, 0, POLICY)[1] is BrokerState.LOST
    assert JoinBroker("n1") in decide(state, observed, 0, POLICY)
    state.brokers[3] = replace(state.brokers[0], broker_id=3)  # it is made, and nobody has seen its data yet
    joining = dataclasses.replace(seen(state, {0, 2}, nodes=nodes), is_joining=True)
    assert broker_states(state, joining, 0, POLICY)[3] is BrokerState.AWAY
    assert decide(state, joining, 0, POLICY) == []
    nodes = {"n0": Node("n0", disks=frozenset({0, 2, 3}))}
    assert JoinBroker("n0") not in decide(state, seen(state, {0, 2, 3}, nodes=nodes), 0, POLICY)


def test_a_node_that_is_away_for_a_moment_is_not_replaced_by_another() -> None:
    state = image(3, *BALANCED)
    assert decide(state, seen(state, {0, 1}, away_since_ms=500), 1000, POLICY) == []


# -- brokers that go -----------------------------------------------------------------------------------------


def test_brokers_of_a_node_that_is_to_go_drain() -> None:
    state = image(4, *BALANCED)
    observed = seen(state)
    nodes = {**observed.nodes, "n1": Node("n1", draining=True, disks=frozenset({1}))}
    assert DrainBroker(1) in decide(state, seen(state, nodes=nodes), 0, POLICY)
    drain(state, 1)
    assert DrainBroker(1) not in decide(state, seen(state, nodes=nodes), 0, POLICY)


def test_leaders_leave_a_draining_broker_before_replicas_do() -> None:
    state = image(4, *BALANCED)
    drain(state, 1)
    actions = [each for each in decide(state, seen(state), 0, POLICY) if isinstance(each, Assign)]
    assert all(set(brokers(each)) == {0, 1, 2} for each in actions), "no replica moves yet"
    first = next(each for each in actions if each.index == 1)
    assert brokers(first)[0] != 1, "it leads this one"
    change(state, 1, replicas=tuple((replica, broker) for broker, replica in first.replicas))
    then = decide(state, seen(state), 0, POLICY)
    assert len(then) == 3
    assert all(set(brokers(each)) == {0, 2, 3} for each in then)
    assert all((3, 0) in each.replicas for each in then if isinstance(each, Assign)), "a new replica"


def test_who_is_away_is_replaced_after_a_while() -> None:
    state = image(4, (0, 1, 2), (1, 2, 3))
    assert decide(state, seen(state, {0, 1, 3}, away_since_ms=1), 1000, POLICY) == []
    moves = decide(state, seen(state, {0, 1, 3}, away_since_ms=0), 1000, POLICY)
    assert [set(brokers(each)) for each in moves] == [{0, 1, 3}, {0, 1, 3}]


def test_who_was_drained_is_replaced_at_once() -> None:
    state = image(4, (0, 1, 2))
    drain(state, 2)
    (move,) = decide(state, seen(state, {0, 1, 3}, away_since_ms=999), 1000, POLICY)
    assert set(brokers(move)) == {0, 1, 3}


def test_whose_data_are_gone_is_replaced_at_once_and_forgotten() -> None:
    state = image(4, (0, 1, 2))
    (move,) = decide(state, seen(state, {0, 1, 3}, gone={2}), 0, POLICY)
    assert set(brokers(move)) == {0, 1, 3}
    state = image(4, (0, 1, 3))
    assert decide(state, seen(state, {0, 1, 3}, gone={2}), 0, POLICY) == [ForgetBroker(2)]


def test_where_a_lost_broker_and_the_newest_hold_a_partition_another_one_takes_it() -> None:
    """Both were there when the topic was made (simulator, seed 200329)."""
    state = image(4, (0, 2, 3), (1, 2, 0))
    moves = decide(state, seen(state, {0, 1, 3}, gone={2}), 0, POLICY)
    assert [set(brokers(move)) for move in moves] == [{0, 1, 3}, {0, 1, 3}]


def test_a_broker_is_forgotten_when_it_holds_nothing_and_enough_others_are_there() -> None:
    state = image(4, (0, 1, 2))
    assert decide(state, seen(state, {0, 1, 2}), 999, POLICY) == []
    assert decide(state, seen(state, {0, 1, 2}), 1000, POLICY) == [ForgetBroker(3)]
    change(state, 0, leaving=((77, 3),))
    assert ForgetBroker(3) not in decide(state, seen(state, {0, 1, 2}), 1000, POLICY)
    few = image(3, (0, 1))
    assert ForgetBroker(2) not in decide(few, seen(few, {0, 1}), 1000, POLICY)


# -- limits --------------------------------------------------------------------------------------------------


def test_few_move_at_a_time() -> None:
    state = image(6, *((0, 1, 2) for _ in range(12)))
    moves = decide(state, seen(state), 0, Policy(moves_max=2, leaders_max=0))
    assert len(moves) == 2
    index = moves[0].index if isinstance(moves[0], Assign) else -1
    change(state, index, leaving=((99, 0),))  # this one is under way
    assert len(decide(state, seen(state), 0, Policy(moves_max=2, leaders_max=0))) == 1


def test_few_bytes_move_at_a_time() -> None:
    state = image(6, *((0, 1, 2) for _ in range(12)))
    policy = Policy(moves_max=9, leaders_max=0, bytes_max=250)
    assert len(decide(state, seen(state, size=100), 0, policy)) in (1, 2)
    assert len(decide(state, seen(state, size=10_000), 0, policy)) == 1, "one at least"
    assert len(decide(state, seen(state, size=1), 0, policy)) == 6, "all that have to move"


def test_few_leaders_change_at_a_time_for_balance() -> None:
    state = image(3, *((0, 1, 2) for _ in range(30)))
    moves = decide(state, seen(state), 0, Policy(leaders_max=5))
    assert len(moves) == 5
    assert {each.reason for each in moves if isinstance(each, Assign)} == {Reason.LEADERS}


def test_a_move_under_way_is_left_alone_unless_it_waits_for_who_is_lost() -> None:
    state = image(5, (0, 1, 2), replication=3)
    change(state, 0, replicas=((10, 0), (11, 1), (12, 3)), leaving=((13, 2),))
    observed = seen(state, {0, 1, 2, 4}, away_since_ms=500)
    assert decide(state, observed, 1000, POLICY) == []
    (move,) = decide(state, seen(state, {0, 1, 2, 4}), 1000, POLICY)
    assert brokers(move) in ((0, 1, 2), (0, 1, 4))
    if brokers(move)[2] == 2:
        assert isinstance(move, Assign)
        assert move.replicas[2] == (2, 13), "the one that was leaving stays"


def test_replication_is_raised_as_brokers_come_and_never_lowered_by_itself() -> None:
    state = image(3, (0,), (1,), (2,))
    moves = decide(state, seen(state), 0, POLICY)
    assert all(set(brokers(each)) == {0, 1, 2} for each in moves)
    assert len(moves) == 3
    explicit = image(3, (0,), (1,), (2,), replication=1)
    assert decide(explicit, seen(explicit), 0, POLICY) == []
    many = image(5, (0, 1, 2, 3, 4))
    assert decide(many, seen(many), 0, POLICY) == []
    fewer = image(5, (0, 1, 2, 3, 4), replication=3)
    (move,) = decide(fewer, seen(fewer), 0, POLICY)
    assert len(brokers(move)) == 3
    assert set(brokers(move)) < {0, 1, 2, 3, 4}


def test_nothing_is_balanced_while_somebody_may_be_back_any_moment() -> None:
    state = image(4, *((0, 1, 2) for _ in range(8)))
    observed = seen(state, {0, 1, 3}, away_since_ms=0)
    assert decide(state, observed, 500, POLICY) == []
    assert broker_states(state, observed, 500, POLICY)[2] is BrokerState.AWAY


def test_a_partition_is_not_at_rest_before_its_leader_says_so() -> None:
    state = image(3, *BALANCED)
    observed = seen(state)
    rows = dict(observed.led)
    for said in (LedRow(0, (0, 1), 0, False), LedRow(0, (0, 1, 2), 0, True), LedRow(1, (0, 1, 2), 0, False)):
        led = {**rows, said.replica_id: said}
        if said.replica_id:
            del led[0]
        assert not is_at_rest(state, dataclasses.replace(observed, led=led))
