"""Quiet groups: who rests, what wakes it, and that no death goes unnoticed while nobody speaks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from raft_cluster import Cluster

from raftlog.errors import ConfigError, NotLeader
from raftlog.raft.config import RaftConfig
from raftlog.raft.node import NEVER
from raftlog.raft.raw_node import RawNode
from raftlog.raft.types import (
    AppendResponse,
    Heartbeat,
    HeartbeatResponse,
    Role,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)

LONG_MS = 600_000


def group(voters: int = 3, *, seed: int = 0, learners: tuple[int, ...] = ()) -> Cluster:
    """A group that 1 leads, still awake."""
    cluster = Cluster(voters, learners=learners, seed=seed, quiet_after_ms=300)
    cluster.elect(1)
    return cluster


def quiet_group(voters: int = 3, *, seed: int = 0, learners: tuple[int, ...] = ()) -> Cluster:
    """A group that 1 leads, at rest."""
    cluster = group(voters, seed=seed, learners=learners)
    cluster.advance(600)
    assert all(node.quiet for node in cluster.nodes.values())
    cluster.sent.clear()
    return cluster


def awake(cluster: Cluster) -> set[int]:
    return {replica for replica, node in cluster.nodes.items() if not node.quiet}


def time_to_lead(cluster: Cluster, old: int, limit_ms: int = 10_000) -> int:
    """Milliseconds until another than ``old`` leads."""
    begin = cluster.now
    while cluster.now - begin < limit_ms:
        cluster.advance(10)
        if any(node.role is Role.LEADER and node.id != old for node in cluster.nodes.values()):
            return cluster.now - begin
    raise AssertionError("nobody leads")


# -- going quiet ---------------------------------------------------------------------------------------------


def test_an_idle_group_says_nothing_for_ten_minutes() -> None:
    cluster = quiet_group()
    cluster.advance(LONG_MS)
    assert not cluster.sent
    assert all(node.quiet and node.deadline_ms == NEVER for node in cluster.nodes.values())
    assert [node.role for node in cluster.nodes.values()] == [Role.LEADER, Role.FOLLOWER, Role.FOLLOWER]


def test_quiet_is_off_unless_the_host_asks_for_it() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.advance(5000)
    assert awake(cluster) == {1, 2, 3}
    with pytest.raises(ConfigError, match="quiet_after_ms"):
        RaftConfig(1, quiet_after_ms=-1)


def test_the_last_word_is_one_message_per_follower_and_unanswered() -> None:
    cluster = group()
    cluster.advance(600)
    last = cluster.of(Heartbeat, quiet=True)
    assert [message.to for message in last] == [2, 3]
    at = cluster.sent.index(last[0])
    assert cluster.sent[at:] == last
    assert {message.commit for message in last} == {cluster.nodes[1].last_index}


def test_a_group_that_works_stays_awake() -> None:
    cluster = group()
    for _ in range(30):
        cluster.propose(1, b"x")
        cluster.advance(200)
        assert awake(cluster) == {1, 2, 3}
    for _ in range(30):
        cluster.read(1)
        cluster.advance(200)
        assert awake(cluster) == {1, 2, 3}
    cluster.advance(600)
    assert awake(cluster) == set()


def test_learners_and_lone_voters_rest_too() -> None:
    cluster = quiet_group(learners=(9,))
    cluster.advance(LONG_MS)
    assert not cluster.sent
    assert cluster.nodes[9].leader == 1
    lone = quiet_group(voters=1)
    lone.advance(LONG_MS)
    lone.propose(1, b"x")
    lone.advance(100)
    assert lone.nodes[1].applied == 2
    lone.advance(600)
    assert lone.nodes[1].quiet


@pytest.mark.parametrize(
    "hinder",
    [
        pytest.param(lambda cluster: cluster.isolate(3), id="a follower that lags"),
        pytest.param(lambda cluster: cluster.crash(3), id="a follower that is down"),
        pytest.param(lambda cluster: cluster.nodes[1].peer_lost(3, cluster.now), id="a connection lost"),
    ],
)
def test_a_leader_does_not_rest_with_a_follower_it_cannot_vouch_for(
    hinder: Callable[[Cluster], None],
) -> None:
    cluster = group()
    cluster.cut_links.add((3, 1))  # whatever else: it does not answer
    hinder(cluster)
    cluster.propose(1, b"x")
    for _ in range(50):
        cluster.advance(100)
        assert {1, 2} <= awake(cluster)
    assert cluster.nodes[1].role is Role.LEADER


def test_a_leader_does_not_rest_before_its_answers_came() -> None:
    cluster = group()
    cluster.advance(50)
    for _ in range(20):
        cluster.advance(100, only=lambda message: not isinstance(message, HeartbeatResponse))
        if cluster.nodes[1].role is not Role.LEADER:
            break
        assert not cluster.nodes[1].quiet


def test_nobody_rests_in_a_joint_configuration() -> None:
    cluster = Cluster(3, learners=(4, 5), quiet_after_ms=100)
    cluster.elect(1)
    cluster.isolate(4, 5)
    cluster.nodes[1].propose_conf([1, 4, 5], [2, 3], cluster.now)
    for _ in range(8):
        cluster.advance(100)
        assert cluster.nodes[1].conf.is_joint
        assert not cluster.nodes[1].quiet
    cluster.heal()
    cluster.advance(1000)
    assert cluster.nodes[1].conf.voters == (1, 4, 5)
    assert awake(cluster) == set()


def test_nobody_rests_during_a_transfer_or_on_an_unsynced_log() -> None:
    cluster = group()
    cluster.advance(250)
    cluster.nodes[1].transfer_leadership(2, cluster.now)
    cluster.settle(only=lambda message: not isinstance(message, TimeoutNow))
    cluster.advance(400, only=lambda message: not isinstance(message, TimeoutNow))
    assert awake(cluster) == {1, 2, 3}
    cluster.advance(3000)
    assert awake(cluster) == set()
    cluster.propose(1, b"x")
    cluster.advance(800, sync=False)
    assert awake(cluster) == {1, 2, 3}


@pytest.mark.parametrize("slow", [1, 2])
def test_nobody_rests_while_a_disk_has_not_caught_up(slow: int) -> None:
    """Two disks commit; the third replica answers heartbeats, but holds nothing of it for certain."""
    cluster = group()
    entry = cluster.propose(1, b"x")[0]
    for _ in range(12):
        cluster.advance(100, sync=False)
        for _ in range(3):
            for replica in {1, 2, 3} - {slow}:
                cluster.sync(replica)
            cluster.settle(sync=False)
        assert not cluster.nodes[1].quiet
    assert cluster.nodes[1].commit == entry.index
    cluster.advance(600)
    assert awake(cluster) == set()


def test_an_answer_from_before_the_connection_was_lost_vouches_for_nobody() -> None:
    cluster = group()
    cluster.advance(50)
    cluster.nodes[1].peer_lost(3, cluster.now)
    cluster.nodes[1].step(AppendResponse(1, 3, 1, 1), cluster.now)
    cluster.cut_links.add((1, 3))
    for _ in range(8):
        cluster.advance(100)
        cluster.nodes[1].step(AppendResponse(1, 3, 1, 1), cluster.now)
        assert not cluster.nodes[1].quiet


def test_a_follower_that_disagrees_answers_and_so_wakes_the_leader() -> None:
    cluster = quiet_group()
    node = cluster.nodes[3]
    node.step(Heartbeat(3, 1, 1, 2, 0, True), cluster.now)
    assert not node.quiet
    cluster.settle()
    assert cluster.of(HeartbeatResponse, sender=3, last_index=1)
    assert awake(cluster) == {1, 3}
    cluster.advance(600)
    assert awake(cluster) == set()


def test_a_follower_that_campaigned_in_vain_rests_again() -> None:
    """It has acknowledged nothing since, and need not."""
    cluster = quiet_group()
    cluster.nodes[3].campaign(cluster.now)
    cluster.advance(700)
    assert awake(cluster) == set()
    assert cluster.nodes[3].leader == 1


# -- waking up -----------------------------------------------------------------------------------------------


def test_a_proposal_wakes_the_group_and_commits_without_delay() -> None:
    cluster = quiet_group()
    cluster.now += LONG_MS
    entry = cluster.propose(1, b"x")[0]
    cluster.settle()
    assert cluster.nodes[1].commit == entry.index
    assert awake(cluster) == {1, 2, 3}
    cluster.beat()
    cluster.advance(250)
    assert [node.applied for node in cluster.nodes.values()] == [entry.index] * 3
    assert cluster.nodes[1].role is Role.LEADER, "nobody is blamed for the silence"
    cluster.advance(600)
    assert awake(cluster) == set()
    assert {node.term for node in cluster.nodes.values()} == {1}


def test_a_read_wakes_the_group() -> None:
    cluster = quiet_group()
    context = cluster.read(1)
    cluster.settle()
    assert cluster.reads[1] == [(context, 1)]
    cluster.advance(600)
    assert awake(cluster) == set()
    context = cluster.read(2)
    cluster.settle()
    assert cluster.reads[2] == [(context, 1)]
    assert 1 in awake(cluster)


def test_a_transfer_and_a_new_configuration_wake_the_group() -> None:
    cluster = quiet_group(learners=(9,))
    cluster.nodes[1].transfer_leadership(2, cluster.now)
    cluster.settle()
    assert cluster.leader().id == 2
    cluster.advance(600)
    assert awake(cluster) == set()
    cluster.nodes[2].propose_conf([1, 2, 3], [], cluster.now)
    cluster.settle()
    assert awake(cluster) == {1, 2, 3}


@pytest.mark.parametrize(
    "message",
    [
        VoteRequest(1, 2, 2, 0, 0, True),
        VoteResponse(1, 2, 1, True),
        HeartbeatResponse(1, 2, 1, 0, 1),
        AppendResponse(1, 2, 1, 1),
    ],
)
def test_any_message_wakes_a_leader(message: VoteRequest) -> None:
    cluster = quiet_group()
    node = cluster.nodes[1]
    node.step(message, cluster.now)
    assert not node.quiet
    assert node.role is Role.LEADER
    cluster.advance(150)
    assert awake(cluster) == {1, 2, 3}, "its heartbeat wakes the others"


def test_the_last_word_said_twice_wakes_nobody() -> None:
    cluster = quiet_group()
    cluster.nodes[2].step(Heartbeat(2, 1, 1, 1, 0, True), cluster.now)
    assert cluster.nodes[2].quiet
    assert not cluster.nodes[2].has_ready()


def test_connections_wake_those_they_matter_to() -> None:
    cluster = quiet_group()
    cluster.nodes[2].peer_lost(3, cluster.now)
    assert cluster.nodes[2].quiet, "not its leader"
    cluster.nodes[2].peer_lost(1, cluster.now)
    assert not cluster.nodes[2].quiet
    cluster.nodes[1].peer_lost(3, cluster.now)
    assert not cluster.nodes[1].quiet
    cluster = quiet_group()
    cluster.nodes[1].peer_restored(3, cluster.now)
    assert not cluster.nodes[1].quiet


def test_a_refused_call_leaves_the_group_at_rest() -> None:
    cluster = quiet_group()
    with pytest.raises(NotLeader):
        cluster.propose(2, b"x")
    with pytest.raises(NotLeader):
        cluster.nodes[2].transfer_leadership(1, cluster.now)
    with pytest.raises(ConfigError):
        cluster.nodes[1].transfer_leadership(77, cluster.now)
    with pytest.raises(ConfigError):
        cluster.nodes[1].propose_conf([1, 2, 77], [], cluster.now)
    assert awake(cluster) == set()


def test_waking_one_that_is_awake_changes_nothing() -> None:
    cluster = group()
    for node in cluster.nodes.values():
        before = node.deadline_ms
        node.wake(cluster.now, {})
        node.leader_heard(cluster.now + 5000)
        assert node.deadline_ms == before


def test_a_followers_timeout_counts_from_the_last_sign_of_life() -> None:
    seen = set()
    for seed in range(60):
        cluster = quiet_group(seed=seed)
        node = cluster.nodes[2]
        now = cluster.now + LONG_MS
        node.wake(now, {1: now - 400})
        seen.add(node.deadline_ms - (now - 400))
        node.check_invariants()
    assert min(seen) >= 1000
    assert max(seen) < 2000
    assert max(seen) - min(seen) > 700
    late = quiet_group().nodes[2]
    late.wake(2 * LONG_MS, {1: LONG_MS})
    assert late.deadline_ms == 2 * LONG_MS, "at once, and not in the past"


def test_a_quiet_leader_that_steps_down_hands_over() -> None:
    cluster = quiet_group()
    cluster.now += LONG_MS
    cluster.nodes[1].step_down(cluster.now)
    cluster.settle()
    assert cluster.of(TimeoutNow)
    assert cluster.leader().id == 2


def test_a_quiet_follower_campaigns_when_told_to() -> None:
    cluster = quiet_group()
    cluster.crash(1)
    cluster.now += LONG_MS
    cluster.nodes[2].campaign(cluster.now)
    cluster.settle()
    assert cluster.leader().id == 2


# -- no death goes unnoticed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_a_dead_leader_is_replaced_within_the_usual_bounds(first: int) -> None:
    for seed in range(first, first + 20):
        cluster = quiet_group(seed=seed)
        cluster.advance(10_000 + 37 * seed)
        cluster.crash(1)
        assert 900 <= time_to_lead(cluster, old=1) <= 2300, f"seed {seed}"


def test_a_dead_leader_whose_connections_break_is_replaced_at_once() -> None:
    cluster = quiet_group()
    cluster.advance(LONG_MS)
    cluster.crash(1)
    for replica in (2, 3):
        cluster.nodes[replica].peer_lost(1, cluster.now)
    assert time_to_lead(cluster, old=1) <= 150


def test_a_leader_cut_off_steps_down_and_another_is_elected() -> None:
    cluster = quiet_group()
    cluster.advance(5000)
    cluster.isolate(1)
    cluster.advance(1250)
    assert cluster.nodes[1].role is not Role.LEADER, "it lost its quorum an election timeout ago"
    assert time_to_lead(cluster, old=1) <= 1100
    cluster.heal()
    cluster.advance(2000)
    assert len({node.term for node in cluster.nodes.values()}) == 1
    assert awake(cluster) == set()


def test_a_leader_that_was_started_anew_is_not_believed_in() -> None:
    """It is back within the election timeout, so it was never silent; but it leads no more."""
    cluster = quiet_group()
    cluster.advance(5000)
    cluster.crash(1)
    cluster.start(1)
    cluster.advance(150)
    assert {2, 3} <= awake(cluster)
    cluster.advance(2500)
    assert cluster.leader().serving


def test_a_lost_last_word_is_made_good() -> None:
    cluster = group()
    cluster.advance(700, only=lambda message: not (isinstance(message, Heartbeat) and message.to == 3))
    assert awake(cluster) == {1, 2, 3} or awake(cluster) == {3}
    cluster.advance(4000)
    assert awake(cluster) == set()
    assert {node.term for node in cluster.nodes.values()} == {1}
    assert cluster.nodes[1].role is Role.LEADER


def test_a_leader_that_left_office_unheard_is_not_believed_in() -> None:
    """Its answers are lost, so it steps down; its host is well and heard. Its own pre-vote ends its lease."""
    cluster = quiet_group()
    cluster.cut_links |= {(2, 1), (3, 1)}
    cluster.advance(1300)
    assert cluster.nodes[1].role is Role.FOLLOWER
    assert time_to_lead(cluster, old=1) < 4500


def test_a_vote_request_of_the_leader_itself_ends_its_lease() -> None:
    cluster = quiet_group()
    node = cluster.nodes[2]
    node.leader_heard(cluster.now)
    node.step(VoteRequest(2, 1, 2, 1, 1, True), cluster.now)
    assert node.leader == 0
    assert not node.quiet
    node.check_invariants()


# -- leases (SEMANTICS mistake 20: optimised heartbeats must still refresh followers' timers) ----------------


def test_a_pre_vote_is_refused_while_the_leaders_host_is_heard() -> None:
    cluster = quiet_group()
    cluster.advance(LONG_MS)
    cluster.nodes[3].campaign(cluster.now)
    cluster.settle()
    refusals = cluster.of(VoteResponse, to=3, granted=False, pre=True)
    assert {message.sender for message in refusals} == {1, 2}
    cluster.advance(3000)
    assert {node.term for node in cluster.nodes.values()} == {1}
    assert cluster.nodes[1].role is Role.LEADER
    assert awake(cluster) == set()


def test_without_word_from_the_leaders_host_the_lease_ends() -> None:
    """The other side of the claim: it is the host's word that the lease lived on."""

    def answer(heard_ms: int) -> VoteResponse:
        node: RawNode = quiet_group().nodes[2]
        node.leader_heard(heard_ms)
        node.step(VoteRequest(2, 3, 2, 1, 1, True), LONG_MS)
        response = node.ready().messages[0]
        assert isinstance(response, VoteResponse)
        return response

    assert answer(LONG_MS - 1001).granted
    assert not answer(LONG_MS - 999).granted
