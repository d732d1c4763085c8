"""Configuration changes: learners first, joint consensus, rollback, one at a time."""

from __future__ import annotations

import pytest
from raft_cluster import Cluster

from raftlog.errors import Busy, ConfigError, NotLeader
from raftlog.raft.confchange import enter, leave
from raftlog.raft.raw_node import RawNode
from raftlog.raft.types import (
    AppendRequest,
    AppendResponse,
    ConfState,
    Message,
    Role,
    TimeoutNow,
    VoteRequest,
)
from raftlog.record.frame import FrameKind

THREE = ConfState((1, 2, 3))


def with_spares(*spares: int) -> tuple[Cluster, RawNode]:
    cluster = Cluster(3, spares=spares)
    return cluster, cluster.elect(1)


def change(cluster: Cluster, node: RawNode, voters: list[int], learners: list[int]) -> None:
    node.propose_conf(voters, learners, cluster.now)
    cluster.settle()


# -- from one configuration to another -----------------------------------------------------------------------


def test_learners_change_in_one_step() -> None:
    assert enter(THREE, [1, 2, 3], [4]) == ConfState((1, 2, 3), (4,))
    assert enter(ConfState((1, 2, 3), (4,)), [3, 2, 1], []) == THREE


def test_voters_change_through_a_joint_configuration() -> None:
    joint = enter(ConfState((1, 2, 3), (4, 5)), [2, 3, 4], [5])
    assert joint == ConfState((2, 3, 4), (5,), (1, 2, 3), (), True)
    assert leave(joint) == ConfState((2, 3, 4), (5,))


def test_a_demoted_voter_votes_until_the_joint_phase_ends() -> None:
    joint = enter(THREE, [1, 2], [3])
    assert joint == ConfState((1, 2), (), (1, 2, 3), (3,), True)
    assert leave(joint) == ConfState((1, 2), (3,))


@pytest.mark.parametrize(
    ("voters", "learners", "why"),
    [
        ([], [1], "at least one voter"),
        ([1, 1, 2], [], "each id once"),
        ([1, 2], [2], "each id once"),
        ([0, 1], [], "above 0"),
        ([1, 2, 3, 4], [], "must be learners before"),
        ([3, 2, 1], [], "configuration in force"),
    ],
)
def test_impossible_configurations_are_refused(voters: list[int], learners: list[int], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        enter(THREE, voters, learners)


# -- in a group ----------------------------------------------------------------------------------------------


def test_a_replica_joins_as_learner_then_votes() -> None:
    cluster, leader = with_spares(4)
    cluster.propose(1, b"before")
    change(cluster, leader, [1, 2, 3], [4])
    assert cluster.nodes[4].role is Role.LEARNER
    assert cluster.nodes[4].applied == leader.commit == 3
    change(cluster, leader, [1, 2, 3, 4], [])
    assert leader.conf == cluster.nodes[4].conf == ConfState((1, 2, 3, 4))
    assert cluster.nodes[4].role is Role.FOLLOWER
    kinds = [entry.kind for entry in cluster.committed[4]]
    assert kinds[-2:] == [FrameKind.CONF, FrameKind.CONF], "joint, then final, without being asked"


def test_a_configuration_takes_effect_when_it_is_appended() -> None:
    cluster, leader = with_spares(4)
    leader.propose_conf([1, 2, 3], [4], 0)
    assert leader.conf.learners == (4,)
    assert 4 in leader.progress
    cluster.isolate(1)
    leader.ready()
    assert leader.commit == 1


def test_a_joint_configuration_needs_both_majorities() -> None:
    cluster, leader = with_spares(4, 5)
    change(cluster, leader, [1, 2, 3], [4, 5])
    cluster.isolate(1, 4, 5)
    change(cluster, leader, [1, 4, 5], [])
    assert leader.conf.is_joint
    assert leader.commit == 2, "1, 4 and 5 are a majority of the new half only"
    cluster.heal()
    cluster.advance(500)
    assert leader.conf == ConfState((1, 4, 5))
    assert leader.commit == leader.last_index == 4


def test_a_joint_phase_ends_when_its_own_entry_is_committed_and_not_before() -> None:
    cluster, leader = with_spares()
    cluster.propose(1, b"x")
    leader.propose_conf([1, 2], [], 0)
    cluster.take_ready(1)
    cluster.sync(1)
    leader.step(AppendResponse(1, 2, 1, 2), cluster.now)
    leader.step(AppendResponse(1, 3, 1, 2), cluster.now)
    assert leader.commit == 2
    assert leader.conf.is_joint
    leader.step(AppendResponse(1, 2, 1, 3), cluster.now)
    leader.step(AppendResponse(1, 3, 1, 3), cluster.now)
    assert leader.commit == 3
    assert leader.conf == ConfState((1, 2))


def test_one_change_at_a_time_and_none_before_the_no_op() -> None:
    cluster, leader = with_spares(4)
    with pytest.raises(NotLeader):
        cluster.nodes[2].propose_conf([1, 2, 3], [4], 0)
    assert leader.conf_settled
    leader.propose_conf([1, 2, 3], [4], 0)
    assert not leader.conf_settled
    with pytest.raises(Busy, match="under way"):
        leader.propose_conf([1, 2, 3], [], 0)
    cluster.settle()
    assert leader.conf_settled
    leader.propose_conf([1, 2], [], 0)
    with pytest.raises(Busy, match="under way"):
        leader.propose_conf([1, 2, 3], [], 0)

    fresh = Cluster(3)
    fresh.nodes[1].campaign(0)
    fresh.settle(only=lambda message: not isinstance(message, AppendResponse))
    with pytest.raises(Busy, match="committed nothing"):
        fresh.nodes[1].propose_conf([1, 2], [], 0)


def test_a_cut_rolls_the_configuration_back() -> None:
    cluster, leader = with_spares(4)
    cluster.isolate(1)
    leader.propose_conf([1, 2, 3], [4], 0)
    cluster.settle()
    assert leader.conf.learners == (4,)
    cluster.advance(5000)
    assert cluster.leader().id != 1
    cluster.heal()
    cluster.advance(500)
    assert leader.conf == THREE
    assert leader.role is Role.FOLLOWER


def test_a_new_leader_finishes_a_joint_phase() -> None:
    cluster, leader = with_spares()
    leader.propose_conf([2, 3], [], 0)

    def no_answers(message: Message) -> bool:
        return not isinstance(message, AppendResponse)

    cluster.settle(only=no_answers)
    assert cluster.nodes[2].conf.is_joint
    cluster.crash(1)
    cluster.nodes[3].peer_lost(1, cluster.now)
    cluster.nodes[2].peer_lost(1, cluster.now)
    cluster.elect(2)
    cluster.start(1)
    cluster.advance(1000)
    assert cluster.nodes[2].conf == ConfState((2, 3))
    assert cluster.nodes[2].commit == cluster.nodes[2].last_index


def test_a_leader_that_loses_its_vote_steps_down_and_hands_over() -> None:
    cluster, leader = with_spares()
    change(cluster, leader, [2, 3], [])
    assert leader.role is Role.FOLLOWER
    assert leader.conf == ConfState((2, 3))
    assert cluster.of(TimeoutNow)
    assert cluster.leader().id in (2, 3)
    assert cluster.leader().serving, "without waiting for a timeout"
    cluster.advance(10_000)
    assert not cluster.of(VoteRequest, sender=1, term=2)


def test_a_leader_removed_by_an_entry_that_only_it_has_can_still_be_elected() -> None:
    """Its log is the longest and a joint majority needs its vote, yet in its own log it is no voter any
    more."""
    cluster = Cluster(1, learners=(7,))
    leader = cluster.elect(1)
    leader.propose_conf([7], [1], 0)
    cluster.settle(only=lambda message: not (message.to == 7 and getattr(message, "prev_index", 0) >= 2))
    assert leader.conf == ConfState((7,), (1,))
    assert cluster.nodes[7].conf.is_joint
    leader.step_down(cluster.now)
    cluster.wire.clear()
    cluster.advance(10_000)
    assert cluster.nodes[7].role is Role.LEADER
    assert cluster.nodes[7].conf == ConfState((7,), (1,))
    assert leader.role is Role.LEARNER
    assert cluster.nodes[1].applied == cluster.nodes[7].applied


def test_a_leader_that_becomes_learner_steps_down() -> None:
    cluster, leader = with_spares()
    change(cluster, leader, [2, 3], [1])
    assert leader.role is Role.LEARNER
    cluster.propose(cluster.leader().id, b"x")
    cluster.advance(200)
    assert leader.applied == cluster.leader().last_index


def test_a_removed_follower_is_sent_nothing_and_disturbs_nobody() -> None:
    cluster, leader = with_spares()
    change(cluster, leader, [1, 2], [])
    assert 3 not in leader.progress
    sent = len(cluster.of(AppendRequest, to=3))
    term = leader.term
    cluster.propose(1, b"x")
    cluster.advance(20_000)
    assert len(cluster.of(AppendRequest, to=3)) == sent
    assert leader.role is Role.LEADER
    assert leader.term == term


def test_down_to_one_voter_and_up_again() -> None:
    cluster, leader = with_spares()
    change(cluster, leader, [1], [2, 3])
    cluster.isolate(1)
    cluster.propose(1, b"alone")
    cluster.settle()
    assert leader.commit == leader.last_index
    cluster.heal()
    cluster.advance(500)
    change(cluster, leader, [1, 2, 3], [])
    cluster.advance(200)
    assert leader.conf == THREE
    assert {node.applied for node in cluster.nodes.values()} == {leader.last_index}


def test_the_configuration_survives_a_restart() -> None:
    cluster, leader = with_spares(4)
    change(cluster, leader, [1, 2, 3], [4])
    cluster.crash(2)
    assert cluster.start(2).conf == ConfState((1, 2, 3), (4,))
