"""Elections: PreVote, votes, leases, CheckQuorum, early campaigns. One test per claim."""

from __future__ import annotations

import random

import pytest
from raft_cluster import Cluster, MemoryDisk, chain

from raftlog.raft.config import RaftConfig, RecoveredLog
from raftlog.raft.raw_node import RawNode
from raftlog.raft.types import (
    TERM_MAX,
    AppendRequest,
    AppendResponse,
    ConfState,
    HardState,
    Heartbeat,
    Role,
    VoteRequest,
    VoteResponse,
)
from raftlog.record.frame import FrameKind


def test_a_campaign_elects_and_the_no_op_commits(cluster: Cluster) -> None:
    node = cluster.elect(2)
    assert node.term == 1
    assert node.serving
    assert [entry.kind for entry in cluster.committed[2]] == [FrameKind.NOOP]
    assert {other.leader for other in cluster.nodes.values()} == {2}
    assert all(cluster.committed[replica] == cluster.committed[2] for replica in (1, 3))


def test_a_leader_serves_only_once_its_no_op_is_applied(cluster: Cluster) -> None:
    node = cluster.nodes[1]
    node.campaign(0)
    cluster.settle(only=lambda message: not isinstance(message, AppendResponse))
    assert node.role is Role.LEADER
    assert not node.serving
    cluster.advance(300)
    assert node.serving


def test_timeouts_are_drawn_from_t_to_2t() -> None:
    conf = ConfState((1, 2, 3))
    seen = set()
    for seed in range(300):
        node = RawNode(
            RaftConfig(1), RecoveredLog(HardState(), ((0, conf),)), random.Random(seed), now_ms=7_000
        )
        seen.add(node.deadline_ms - 7_000)
    assert min(seen) >= 1000
    assert max(seen) < 2000
    assert max(seen) - min(seen) > 900


def test_a_group_left_alone_elects_one_leader(cluster: Cluster) -> None:
    cluster.advance(2500)
    assert cluster.leader().serving
    assert sum(node.role is Role.LEADER for node in cluster.nodes.values()) == 1


def test_tick_before_the_deadline_does_nothing(cluster: Cluster) -> None:
    node = cluster.nodes[1]
    node.tick(node.deadline_ms - 1)
    assert not node.has_ready()
    node.tick(node.deadline_ms)
    assert node.role is Role.PRE_CANDIDATE


def test_a_split_vote_elects_nobody_and_the_next_try_does(cluster: Cluster) -> None:
    cluster.isolate(3)
    for replica in (1, 2):
        cluster.nodes[replica].campaign(0)  # both hear yes to their pre-votes, then vote for themselves
    cluster.settle()
    assert {cluster.nodes[replica].role for replica in (1, 2)} == {Role.CANDIDATE}
    assert {cluster.nodes[replica].term for replica in (1, 2)} == {1}
    assert {cluster.nodes[replica].vote for replica in (1, 2)} == {1, 2}
    cluster.advance(8000)
    assert cluster.leader().serving
    assert cluster.leader().term >= 2


def test_pre_vote_a_replica_that_was_cut_off_does_not_disturb(cluster: Cluster) -> None:
    cluster.elect(1)
    cluster.isolate(3)
    cluster.advance(20_000)
    assert cluster.nodes[3].role is Role.PRE_CANDIDATE
    assert cluster.nodes[3].term == 1, "a pre-candidate does not raise its term"
    cluster.heal()
    cluster.advance(3000)
    assert cluster.leader().id == 1
    assert cluster.leader().term == 1
    assert cluster.nodes[3].leader == 1


def test_check_quorum_a_leader_cut_off_steps_down(cluster: Cluster) -> None:
    node = cluster.elect(1)
    cluster.isolate(1)
    cluster.advance(900)
    assert node.role is Role.LEADER
    cluster.advance(300)
    assert node.role is not Role.LEADER


def test_check_quorum_one_follower_is_enough_of_three(cluster: Cluster) -> None:
    node = cluster.elect(1)
    cluster.isolate(3)
    cluster.advance(10_000)
    assert node.role is Role.LEADER
    assert node.term == 1


def test_a_leader_whose_host_was_held_up_does_not_blame_its_followers(cluster: Cluster) -> None:
    node = cluster.elect(1)
    node.tick(cluster.now + 30_000)  # answers lie unread meanwhile
    assert node.role is Role.LEADER
    for ms in range(30_100, 31_200, 100):
        node.tick(cluster.now + ms)
    assert node.role is Role.FOLLOWER, "the time since then does count"


def test_a_follower_whose_host_was_held_up_reads_its_mail_first(cluster: Cluster) -> None:
    cluster.elect(1)
    node = cluster.nodes[2]
    late = node.deadline_ms + 500
    node.tick(late)
    assert node.role is Role.FOLLOWER
    assert node.deadline_ms == late + 100
    node.step(Heartbeat(2, 1, 1, 0), late + 50)
    node.tick(late + 100)
    assert node.role is Role.FOLLOWER
    late = node.deadline_ms + 500
    node.tick(late)
    node.tick(late + 900)
    assert node.role is Role.PRE_CANDIDATE, "put off once, not for ever"


def test_a_lease_refuses_votes_even_of_a_higher_term(cluster: Cluster) -> None:
    cluster.elect(1)
    voter = cluster.nodes[2]
    for pre in (True, False):
        voter.step(VoteRequest(2, 3, 5, 99, 5, pre), cluster.now + 999)
        assert voter.term == 1
        assert voter.leader == 1
    assert [(answer.granted, answer.pre, answer.term) for answer in voter.ready().messages] == [
        (False, True, 1)
    ], "a pre-vote is refused aloud, a vote in silence"


def test_a_lease_ends_after_the_minimum_election_timeout(cluster: Cluster) -> None:
    cluster.elect(1)
    voter = cluster.nodes[2]
    voter.step(VoteRequest(2, 3, 2, 99, 1, True), cluster.now + 1000)
    assert [answer.granted for answer in voter.ready().messages] == [True]


def test_a_transfer_overrides_the_lease(cluster: Cluster) -> None:
    cluster.elect(1)
    cluster.nodes[2].step(VoteRequest(2, 3, 2, 99, 1, False, True), cluster.now + 1)
    assert cluster.nodes[2].vote == 3
    assert cluster.nodes[2].term == 2


def test_a_leader_refuses_votes(cluster: Cluster) -> None:
    node = cluster.elect(1)
    node.step(VoteRequest(1, 3, 9, 99, 5), cluster.now + 5000)
    assert node.role is Role.LEADER


@pytest.mark.parametrize("seed", range(20))
def test_the_leaders_connection_lost_the_lowest_rank_is_elected_within_100_ms(seed: int) -> None:
    cluster = Cluster(3, seed=seed)
    cluster.elect(2)
    cluster.advance(5000)
    cluster.crash(2)
    for replica in (1, 3):
        cluster.nodes[replica].peer_lost(2, cluster.now)
    waits = [cluster.nodes[replica].deadline_ms - cluster.now for replica in (1, 3)]
    assert 0 <= waits[0] <= 50 <= waits[1] <= 100
    cluster.advance(100)
    assert cluster.leader().id == 1
    assert cluster.leader().serving


def test_the_other_rank_goes_when_the_first_is_lost_too() -> None:
    cluster = Cluster(5)
    cluster.elect(3)
    for replica in (1, 3):
        cluster.crash(replica)
    for replica in (2, 4, 5):
        cluster.nodes[replica].peer_lost(3, cluster.now)
    cluster.advance(150)
    assert cluster.leader().id == 2


def test_replicas_that_still_hear_the_leader_refuse_an_early_campaign(cluster: Cluster) -> None:
    node = cluster.elect(1)
    cluster.advance(500)
    cluster.cut_links |= {(1, 3), (3, 1)}
    cluster.nodes[3].peer_lost(1, cluster.now)
    cluster.advance(700)
    assert cluster.of(VoteRequest, sender=3, pre=True), "it did try"
    assert cluster.of(VoteResponse, sender=2, to=3, pre=True, granted=False)
    assert node.role is Role.LEADER
    assert cluster.nodes[2].leader == 1
    assert all(other.term == 1 for other in cluster.nodes.values())
    cluster.heal()
    cluster.advance(200)
    assert cluster.nodes[3].leader == 1


@pytest.mark.parametrize("late_ms", [30, 80, 140])
def test_an_early_campaign_refused_by_one_who_learns_later_is_repeated_soon(late_ms: int) -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.advance(500)
    cluster.crash(1)
    cluster.nodes[2].peer_lost(1, cluster.now)
    cluster.advance(late_ms)  # 2 asks, 3 still has its lease
    cluster.nodes[3].peer_lost(1, cluster.now)
    cluster.advance(300)
    assert cluster.leader().serving


def test_losing_a_connection_to_a_follower_is_no_reason_to_campaign(cluster: Cluster) -> None:
    cluster.elect(1)
    before = cluster.nodes[2].deadline_ms
    cluster.nodes[2].peer_lost(3, cluster.now)
    assert cluster.nodes[2].deadline_ms == before
    assert cluster.nodes[2].leader == 1


def test_a_vote_leaves_only_once_it_is_durable(cluster: Cluster) -> None:
    voter = cluster.nodes[2]
    voter.step(VoteRequest(2, 1, 1, 0, 0), 0)
    ready = voter.ready()
    assert ready.messages == ()
    assert ready.append is not None
    assert ready.append.hard_state == HardState(1, 1, 0)
    assert ready.append.entries == ()
    assert not voter.has_ready()
    voter.on_durable(ready.append.sequence)
    assert voter.ready().messages == (VoteResponse(1, 2, 1, True),)


def test_a_vote_whose_term_is_over_when_it_is_durable_stays(cluster: Cluster) -> None:
    voter = cluster.nodes[2]
    voter.step(VoteRequest(2, 1, 1, 0, 0), 0)
    append = voter.ready().append
    assert append is not None
    voter.step(Heartbeat(2, 3, 2, 0), 1)
    voter.on_durable(append.sequence)
    assert not [message for message in voter.ready().messages if isinstance(message, VoteResponse)]


def test_votes_are_asked_for_only_once_the_own_vote_is_durable(cluster: Cluster) -> None:
    node = cluster.nodes[1]
    node.campaign(0)
    cluster.settle(sync=False)
    assert node.role is Role.CANDIDATE
    assert not cluster.of(VoteRequest, pre=False)
    cluster.settle()
    assert node.role is Role.LEADER


def test_no_second_vote_in_a_term_not_even_after_a_crash(cluster: Cluster) -> None:
    cluster.nodes[3].step(VoteRequest(3, 1, 1, 0, 0), 0)
    cluster.settle()
    cluster.crash(3)
    node = cluster.start(3)
    assert (node.term, node.vote) == (1, 1)
    node.step(VoteRequest(3, 2, 1, 9, 1), 0)
    assert node.ready().messages == (VoteResponse(2, 3, 1, False),)
    node.step(VoteRequest(3, 1, 1, 9, 1), 0)  # the same one may ask again
    assert node.ready().messages == (VoteResponse(1, 3, 1, True),)


@pytest.mark.parametrize(
    ("terms", "granted"), [([1, 1], True), ([1, 1, 1], False), ([1, 2], False), ([1], True), ([], True)]
)
def test_votes_go_only_to_logs_at_least_as_up_to_date(terms: list[int], granted: bool) -> None:
    cluster = Cluster(3)
    node = cluster.restart_with(2, chain(terms), term=2)
    for pre in (True, False):
        node.step(VoteRequest(2, 1, 3, 2, 1, pre), 0)
        cluster.settle(only=lambda message: False)
        assert cluster.of(VoteResponse, pre=pre)[0].granted is granted


def test_a_single_voter_elects_itself_and_commits_once_durable() -> None:
    cluster = Cluster(1)
    node = cluster.nodes[1]
    node.tick(node.deadline_ms)
    cluster.settle(sync=False)
    assert node.role is Role.CANDIDATE
    cluster.sync(1)
    assert node.role is Role.LEADER
    cluster.settle(sync=False)
    assert node.commit == 0, "its own disk is the majority, and has not synced"
    cluster.settle()
    assert node.serving
    cluster.propose(1, b"one", b"two")
    cluster.settle()
    assert node.applied == 3


def test_learners_receive_do_not_count_and_do_not_campaign() -> None:
    cluster = Cluster(3, learners=(7, 8))
    node = cluster.elect(1)
    assert cluster.nodes[7].role is Role.LEARNER
    cluster.isolate(1, 7, 8)
    cluster.propose(1, b"x")
    cluster.settle()
    assert node.progress[7].match == 2
    assert node.commit == 1, "one voter and two learners are no majority"
    cluster.heal()
    cluster.advance(1000)
    assert cluster.nodes[7].applied == 2
    for replica in (1, 2, 3):
        cluster.crash(replica)
    cluster.nodes[7].campaign(cluster.now)
    cluster.nodes[7].peer_lost(1, cluster.now)
    cluster.advance(60_000)
    assert cluster.nodes[7].role is Role.LEARNER
    assert cluster.nodes[7].leader == 0
    assert not cluster.of(VoteRequest, sender=7)


def test_the_last_term_is_never_passed() -> None:
    cluster = Cluster(1)
    cluster.disks[1] = MemoryDisk(cluster.conf, HardState(TERM_MAX, 0, 0))
    node = cluster.start(1)
    cluster.advance(10_000)
    assert node.role is Role.FOLLOWER
    assert node.term == TERM_MAX
    assert not node.has_ready()


def test_a_transfer_in_the_last_term_is_refused() -> None:
    from raftlog.raft import election

    cluster = Cluster(3)
    cluster.disks[1] = MemoryDisk(cluster.conf, HardState(TERM_MAX, 0, 0))
    node = cluster.start(1)
    election.start_election(node._node, transfer=True)
    assert (node.role, node.term) == (Role.FOLLOWER, TERM_MAX)


def test_a_term_beyond_the_last_is_ignored(cluster: Cluster) -> None:
    node = cluster.nodes[1]
    node.step(Heartbeat(1, 2, TERM_MAX + 1, 0), 0)
    assert node.term == 0


def test_a_leader_of_an_older_term_is_told_of_the_newer_one(cluster: Cluster) -> None:
    node = cluster.elect(1)
    cluster.restart_with(3, chain([]), term=6)
    cluster.advance(3000)
    assert cluster.of(AppendResponse, sender=3, term=6, rejected=True)
    assert cluster.leader().term == 7
    assert node.term == 7


def test_a_vote_request_of_an_older_term_is_answered_with_ours(cluster: Cluster) -> None:
    node = cluster.restart_with(2, [], term=4)
    for pre in (True, False):
        node.step(VoteRequest(2, 1, 3, 0, 0, pre), 0)
        assert node.ready().messages == (VoteResponse(1, 2, 4, False, pre),)
    node.step(VoteResponse(2, 1, 3, True), 0)
    assert not node.has_ready()


def test_a_pre_candidate_behind_learns_the_term(cluster: Cluster) -> None:
    cluster.restart_with(2, [], term=4)
    cluster.restart_with(3, [], term=4)
    cluster.nodes[1].campaign(0)
    cluster.settle()
    assert cluster.nodes[1].term == 4
    assert cluster.nodes[1].role is Role.FOLLOWER
    assert cluster.elect(1).term == 5


def test_a_majority_of_refusals_ends_a_campaign(cluster: Cluster) -> None:
    for replica in (2, 3):
        cluster.restart_with(replica, chain([1, 1]), term=1)
    node = cluster.restart_with(1, chain([1]), term=1)
    node.campaign(0)
    assert node.role is Role.PRE_CANDIDATE
    cluster.settle()
    assert node.role is Role.FOLLOWER
    assert node.term == 1


def test_a_candidate_follows_the_leader_of_its_term(cluster: Cluster) -> None:
    node = cluster.nodes[1]
    node.campaign(0)
    cluster.settle(only=lambda message: not isinstance(message, VoteRequest) or message.pre)
    assert node.role is Role.CANDIDATE
    node.step(AppendRequest(1, 2, 1, 0, 0, 0, 0), 5)
    assert node.role is Role.FOLLOWER
    assert node.leader == 2


def test_requests_of_a_candidate_that_has_found_a_leader_stay_here(cluster: Cluster) -> None:
    """Its log may have been cut since it wrote them: they would promise what it does not hold."""
    node = cluster.restart_with(1, chain([1, 1]), term=1)
    node.campaign(0)
    cluster.settle(sync=False)
    assert node.role is Role.CANDIDATE
    node.step(AppendRequest(1, 2, 2, 1, 1, -1, 0, tuple(chain([1, 2])[1:])), 5)
    assert (node.role, node.term) == (Role.FOLLOWER, 2)
    cluster.settle()
    assert not cluster.of(VoteRequest, sender=1, pre=False)


def test_answers_that_come_too_late_change_nothing(cluster: Cluster) -> None:
    node = cluster.elect(1)
    node.step(VoteResponse(1, 2, 1, True), cluster.now)
    node.step(VoteResponse(1, 2, 2, True, True), cluster.now)
    node.step(VoteResponse(1, 2, 1, False, True), cluster.now)
    assert node.role is Role.LEADER
    assert node.term == 1
    assert not node.has_ready()


def test_two_leaders_in_a_term_are_a_broken_invariant(cluster: Cluster) -> None:
    cluster.elect(1)
    with pytest.raises(AssertionError, match="two leaders in term 1"):
        cluster.nodes[1].step(Heartbeat(1, 2, 1, 0), cluster.now)
    with pytest.raises(AssertionError, match="two leaders in term 1"):
        cluster.nodes[2].step(Heartbeat(2, 3, 1, 0), cluster.now)


def test_campaigning_while_leading_or_outside_the_group_is_nothing(cluster: Cluster) -> None:
    node = cluster.elect(1)
    node.campaign(cluster.now)
    assert node.role is Role.LEADER
    outside = RawNode(
        RaftConfig(42), RecoveredLog(HardState(), ((0, cluster.conf),)), random.Random(0), now_ms=0
    )
    outside.campaign(0)
    assert outside.role is Role.FOLLOWER


def test_a_leader_that_steps_down_keeps_its_term_and_waits(cluster: Cluster) -> None:
    node = cluster.elect(1)
    node.step_down(cluster.now)
    assert node.role is Role.FOLLOWER
    assert (node.term, node.leader) == (1, 0)
    assert node.deadline_ms - cluster.now >= 1000
    node.step_down(cluster.now)
    cluster.advance(8000)
    assert cluster.leader().term >= 2


def test_soft_state_is_told_once_per_change(cluster: Cluster) -> None:
    node = cluster.nodes[1]
    node.campaign(0)
    soft = node.ready().soft_state
    assert soft is not None
    assert (soft.role, soft.term, soft.leader) == (Role.PRE_CANDIDATE, 0, 0)
    assert not node.has_ready()
    cluster.nodes[2].step(Heartbeat(2, 3, 1, 0), 0)
    assert cluster.nodes[2].ready().soft_state.leader == 3
    cluster.nodes[2].step(Heartbeat(2, 3, 1, 0), 0)
    assert cluster.nodes[2].ready().soft_state is None


def test_messages_for_another_replica_are_a_fault_of_the_host(cluster: Cluster) -> None:
    with pytest.raises(AssertionError, match="came to replica 1"):
        cluster.nodes[1].step(Heartbeat(2, 3, 1, 0), 0)
