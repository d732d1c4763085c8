"""Leadership transfer and ReadIndex."""

from __future__ import annotations

import pytest
from raft_cluster import Cluster

from raftlog.errors import Busy, ConfigError, NotLeader
from raftlog.raft.types import (
    AppendResponse,
    Heartbeat,
    HeartbeatResponse,
    ReadIndexRequest,
    ReadIndexResponse,
    Role,
    TimeoutNow,
    VoteRequest,
)


def lone_leader() -> Cluster:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose(1, b"x")
    cluster.settle()
    cluster.sent.clear()
    return cluster


# -- transfer ------------------------------------------------------------------------------------------------


def test_a_transfer_to_a_level_follower_is_immediate_and_overrides_leases() -> None:
    cluster = lone_leader()
    cluster.nodes[1].transfer_leadership(3, cluster.now)
    cluster.settle()
    assert cluster.nodes[3].serving
    assert cluster.nodes[3].term == 2
    assert not cluster.of(VoteRequest, pre=True)
    assert all(request.transfer for request in cluster.of(VoteRequest))
    assert cluster.nodes[1].leader == 3


def test_a_transfer_waits_until_the_follower_is_level_and_refuses_proposals_meanwhile() -> None:
    cluster = lone_leader()
    leader = cluster.nodes[1]
    cluster.propose(1, b"y")
    leader.transfer_leadership(2, cluster.now)
    assert not [message for message in leader.ready().messages if isinstance(message, TimeoutNow)]
    with pytest.raises(Busy, match="transferred to replica 2"):
        cluster.propose(1, b"z")
    with pytest.raises(Busy, match="transferred to replica 2"):
        leader.propose_conf([1, 2], [], 0)
    leader.step(AppendResponse(1, 2, 1, 3), cluster.now)
    assert TimeoutNow(2, 1, 1) in leader.ready().messages


def test_a_transfer_that_takes_too_long_is_given_up() -> None:
    cluster = lone_leader()
    cluster.cut_links.add((1, 2))
    cluster.cut_links.add((2, 1))
    cluster.nodes[1].transfer_leadership(2, cluster.now)
    cluster.advance(900)
    with pytest.raises(Busy):
        cluster.propose(1, b"y")
    cluster.advance(300)
    cluster.propose(1, b"y")
    cluster.settle()
    assert cluster.nodes[1].commit == 3


def test_a_transfer_ends_when_the_target_is_lost_or_removed() -> None:
    cluster = lone_leader()
    leader = cluster.nodes[1]
    cluster.isolate(2)
    leader.transfer_leadership(2, cluster.now)
    leader.peer_lost(2, cluster.now)
    cluster.propose(1, b"y")


def test_a_transfer_survives_the_end_of_a_joint_phase_unless_the_target_loses_its_vote() -> None:
    for voters, learners in (([1, 2, 3, 4], []), ([1, 3, 4], [2]), ([1, 3, 4], [])):
        cluster = Cluster(3, learners=(4,))
        leader = cluster.elect(1)
        leader.propose_conf(voters, learners, 0)
        cluster.settle(only=lambda message: not isinstance(message, AppendResponse))
        assert leader.conf.is_joint
        leader.transfer_leadership(2, cluster.now)
        cluster.cut_links |= {(2, 1)}  # it holds all, and cannot say so
        for follower in (3, 4):
            leader.step(AppendResponse(1, follower, 1, 2), cluster.now)
        assert not leader.conf.is_joint
        if 2 in voters:
            with pytest.raises(Busy, match="transferred to replica 2"):
                cluster.propose(1, b"y")
        else:
            cluster.propose(1, b"y")


def test_a_transfer_to_itself_is_nothing_and_to_strangers_an_error() -> None:
    cluster = lone_leader()
    leader = cluster.nodes[1]
    leader.transfer_leadership(1, cluster.now)
    cluster.propose(1, b"y")
    with pytest.raises(ConfigError):
        leader.transfer_leadership(9, cluster.now)
    with pytest.raises(NotLeader):
        cluster.nodes[2].transfer_leadership(1, cluster.now)
    learners = Cluster(1, learners=(5,))
    learners.elect(1)
    with pytest.raises(ConfigError, match="not a voter"):
        learners.nodes[1].transfer_leadership(5, 0)
    learners.nodes[5].step(TimeoutNow(5, 1, 1), 0)
    assert learners.nodes[5].role is Role.LEARNER


def test_step_down_hands_over_to_the_follower_that_holds_most() -> None:
    cluster = lone_leader()
    cluster.cut_links.add((1, 2))
    cluster.propose(1, b"y")
    cluster.settle()
    cluster.heal()
    cluster.nodes[1].step_down(cluster.now)
    cluster.settle()
    assert cluster.of(TimeoutNow) == [TimeoutNow(3, 1, 1)]
    assert cluster.leader().id == 3
    assert cluster.leader().serving


def test_step_down_asks_nobody_who_does_not_answer() -> None:
    cluster = lone_leader()
    cluster.isolate(1)
    cluster.advance(950)
    for follower in (2, 3):
        cluster.nodes[1].peer_lost(follower, cluster.now)
    cluster.nodes[1].step_down(cluster.now)
    cluster.settle()
    assert not cluster.of(TimeoutNow)


# -- reads ---------------------------------------------------------------------------------------------------


def test_a_read_on_the_leader_is_confirmed_by_one_round() -> None:
    cluster = lone_leader()
    context = cluster.read(1)
    cluster.settle()
    assert cluster.reads[1] == [(context, 2)]
    assert len(cluster.of(Heartbeat)) == 2


def test_reads_between_two_readies_share_a_round() -> None:
    cluster = lone_leader()
    contexts = [cluster.read(1) for _ in range(100)]
    cluster.settle()
    assert cluster.reads[1] == [(context, 2) for context in contexts]
    assert len(cluster.of(Heartbeat)) == 2


def test_a_read_on_a_follower_goes_through_the_leader() -> None:
    cluster = lone_leader()
    context = cluster.read(3)
    cluster.settle()
    assert cluster.reads[3] == [(context, 2)]
    assert cluster.of(ReadIndexRequest) == [ReadIndexRequest(1, 3, 1, context)]


def test_a_leader_cut_off_confirms_no_read() -> None:
    cluster = lone_leader()
    cluster.isolate(1)
    cluster.read(1)
    cluster.advance(900)
    assert cluster.nodes[1].role is Role.LEADER
    assert cluster.reads[1] == []
    cluster.advance(5000)
    cluster.heal()
    cluster.advance(500)
    assert cluster.reads[1] == [], "and none after it has lost office"


def test_an_answer_to_an_earlier_heartbeat_confirms_nothing() -> None:
    cluster = lone_leader()
    leader = cluster.nodes[1]
    cluster.read(1)
    leader.ready()
    leader.step(HeartbeatResponse(1, 2, 1, 0, 2), cluster.now)
    assert leader.ready().reads == ()
    leader.step(HeartbeatResponse(1, 2, 1, 1, 2), cluster.now)
    assert len(leader.ready().reads) == 1


def test_reads_wait_for_the_no_op() -> None:
    cluster = Cluster(3)
    cluster.nodes[1].campaign(0)
    cluster.settle(only=lambda message: not isinstance(message, AppendResponse))
    context = cluster.read(1)
    cluster.settle(only=lambda message: not isinstance(message, AppendResponse))
    assert cluster.reads[1] == []
    cluster.advance(400)
    assert cluster.reads[1] == [(context, 1)]


def test_a_single_voter_confirms_at_once() -> None:
    cluster = Cluster(1)
    cluster.elect(1)
    context = cluster.read(1)
    assert cluster.nodes[1].ready().reads == ((context, 1),)


def test_without_a_leader_a_read_is_refused() -> None:
    cluster = Cluster(3)
    with pytest.raises(NotLeader):
        cluster.read(1)


def test_a_read_sent_to_one_who_does_not_lead_is_dropped() -> None:
    cluster = lone_leader()
    cluster.nodes[2].step(ReadIndexRequest(2, 3, 1, 7), cluster.now)
    assert not cluster.nodes[2].has_ready()
    cluster.read_floors[7] = 0
    cluster.nodes[2].step(ReadIndexResponse(2, 1, 1, 7, 2), cluster.now)
    cluster.settle()
    assert cluster.reads[2] == [(7, 2)]
