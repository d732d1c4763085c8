"""One test per claim of the Raft thesis (Ongaro, "Consensus: Bridging Theory and Practice", 2014).

Tests here are named by section; claims that a test elsewhere holds are listed in ``claims``.
"""

from __future__ import annotations

import importlib
import itertools

import pytest
from claims import ELSEWHERE
from raft_cluster import Cluster, chain

from raftlog.raft.raw_node import RawNode
from raftlog.raft.types import (
    AppendRequest,
    AppendResponse,
    ConfState,
    HardState,
    Heartbeat,
    HeartbeatResponse,
    Message,
    Role,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)


def test_every_claim_that_is_held_elsewhere_has_its_test() -> None:
    for section, claim, name in ELSEWHERE:
        module, test = name.split(".")
        assert callable(getattr(importlib.import_module(module), test, None)), f"{section} {claim}: no {name}"


def silent(message: Message) -> bool:
    """For ``settle``: no answer to an append arrives."""
    return not isinstance(message, AppendResponse)


# -- 3: the algorithm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        VoteRequest(1, 2, 9, 5, 5),
        VoteResponse(1, 2, 9, False),
        AppendRequest(1, 2, 9, 0, 0, 0, 0),
        AppendResponse(1, 2, 9, 0, True),
        Heartbeat(1, 2, 9, 0),
        HeartbeatResponse(1, 2, 9),
        TimeoutNow(1, 2, 9),
    ],
    ids=lambda message: type(message).__name__,
)
@pytest.mark.parametrize("role", [Role.FOLLOWER, Role.CANDIDATE])
def test_3_3_a_higher_term_is_adopted_and_makes_a_follower(message: Message, role: Role) -> None:
    """If one server's term is smaller it takes the larger one; a candidate with a stale term reverts to
    follower."""
    cluster = Cluster(3)
    node = cluster.nodes[1]
    if role is Role.CANDIDATE:
        node.campaign(0)
        cluster.settle(only=lambda message: not isinstance(message, VoteRequest) or message.pre)
    assert node.role is role
    node.step(message, cluster.now)
    asked_to_campaign = isinstance(message, TimeoutNow)
    assert node.term == 9 + asked_to_campaign
    assert node.role is (Role.CANDIDATE if asked_to_campaign else Role.FOLLOWER)


def test_3_3_a_leader_with_a_stale_term_reverts_to_follower() -> None:
    cluster = Cluster(3)
    node = cluster.elect(1)
    node.step(AppendResponse(1, 2, 2, 0, True), cluster.now)
    assert (node.role, node.term, node.leader) == (Role.FOLLOWER, 2, 0)


@pytest.mark.parametrize("seed", range(5))
def test_3_3_messages_that_come_twice_do_no_harm(seed: int) -> None:
    """RPCs are idempotent: each of these arrives again, at once and late."""
    cluster = Cluster(3, seed=seed, append_bytes_max=100)
    late: list[Message] = []

    def twice(message: Message) -> bool:
        cluster.deliver(message)
        late.append(message)
        if cluster.random.random() < 0.3:
            cluster.deliver(cluster.random.choice(late))
        return True

    cluster.nodes[1].campaign(0)
    cluster.settle(only=twice)
    for number in range(20):
        cluster.propose(cluster.leader().id, b"%d" % number)
        cluster.settle(only=twice)
    cluster.advance(300)
    assert [bytes(entry.payload) for entry in cluster.committed[3][1:]] == [b"%d" % n for n in range(20)]
    assert cluster.log_of(1) == cluster.log_of(2) == cluster.log_of(3)


@pytest.mark.parametrize(
    "message", [Heartbeat(2, 1, 1, 1), AppendRequest(2, 1, 1, 1, 1, -1, 1)], ids=["heartbeat", "append"]
)
def test_3_4_a_follower_stays_one_while_it_hears_the_leader(message: Message) -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    node = cluster.nodes[2]
    for now in range(0, 60_000, 900):
        node.tick(now)
        node.step(message, now)
        assert node.role is Role.FOLLOWER
        assert node.deadline_ms >= now + 1000
    node.tick(node.deadline_ms)
    assert node.role is Role.PRE_CANDIDATE


def test_3_4_a_candidate_refuses_a_leader_of_an_older_term_and_goes_on() -> None:
    cluster = Cluster(3)
    node = cluster.restart_with(1, chain([1]), term=4)
    node.campaign(0)
    cluster.settle(only=lambda message: not isinstance(message, VoteRequest) or message.pre)
    assert (node.role, node.term) == (Role.CANDIDATE, 5)
    node.step(AppendRequest(1, 2, 4, 1, 1, -1, 1), 5)
    assert (node.role, node.term, node.commit) == (Role.CANDIDATE, 5, 0)
    assert node.ready().messages == (AppendResponse(2, 1, 5, 0, True),)


def test_3_5_a_leader_never_overwrites_or_deletes_its_own_entries() -> None:
    """Leader append-only. Refusals, losses, restored connections and stale words move its followers only."""
    cluster = Cluster(3)
    for replica, terms in {1: [1, 1, 2, 2], 2: [1, 1, 1, 1, 1], 3: []}.items():
        cluster.restart_with(replica, chain(terms), term=2)
    leader = cluster.elect(1)
    before = cluster.log_of(1)
    for number in range(30):
        cluster.propose(1, b"%d" % number)
        cluster.settle(only=lambda message: cluster.random.random() < 0.6)
        leader.step(AppendResponse(1, 3, leader.term, 2, True, 1, 1), cluster.now)
        leader.step(AppendRequest(1, 2, 2, 0, 0, 0, 9, tuple(chain([2]))), cluster.now)
        cluster.advance(150)
        now = cluster.log_of(1)
        assert now[: len(before)] == before
        before = now
    assert leader.role is Role.LEADER
    assert leader.commit == leader.last_index == 35


def test_3_5_log_matching_equal_index_and_term_is_equal_up_to_there() -> None:
    """All logs that five replicas can get in three terms, whatever arrives of each leader's entries."""
    cluster = Cluster(5, seed=11)
    for number in range(60):
        leader = cluster.random.choice(list(cluster.nodes))
        cluster.nodes[leader].campaign(cluster.now)
        cluster.settle(only=lambda message: cluster.random.random() < 0.9)
        for replica, node in cluster.nodes.items():
            if node.role is Role.LEADER:
                cluster.propose(replica, b"%d" % number)
        cluster.advance(400, only=lambda message: cluster.random.random() < 0.5)
    logs = [cluster.log_of(replica) for replica in cluster.nodes]
    assert len({tuple(cluster.terms_of(replica)) for replica in cluster.nodes}) > 1, "they do differ"
    for one, other in itertools.combinations(logs, 2):
        common = [index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a.term == b.term]
        if common:
            assert one[: common[-1] + 1] == other[: common[-1] + 1]
            assert common == list(range(len(common)))


@pytest.mark.parametrize("holders", list(itertools.combinations(range(1, 6), 3)), ids=str)
def test_3_6_3_who_lacks_a_committed_entry_cannot_be_elected(holders: tuple[int, ...]) -> None:
    """Leader completeness: the majority that holds it and the majority that votes have a member in common."""
    cluster = Cluster(5)
    for replica in cluster.nodes:
        cluster.restart_with(replica, chain([1, 2] if replica in holders else [1, 1]), term=2)
    for replica in sorted(set(cluster.nodes) - set(holders)):
        cluster.nodes[replica].campaign(cluster.now)
        cluster.settle()
        cluster.nodes[replica].step(TimeoutNow(replica, holders[0], cluster.nodes[replica].term), cluster.now)
        cluster.settle()
        assert not any(node.role is Role.LEADER for node in cluster.nodes.values())
    cluster.elect(holders[0])


def test_3_8_the_commit_index_may_be_lost() -> None:
    """It is safe to start again from zero: the next leader finds out."""
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose(1, b"x")
    cluster.settle()
    for replica in cluster.nodes:
        disk = cluster.disks[replica]
        disk.hard_state = HardState(disk.hard_state.term, disk.hard_state.vote, 0)
        cluster.crash(replica)
    nodes = [cluster.start(replica) for replica in (1, 2, 3)]
    assert [node.commit for node in nodes] == [0, 0, 0]
    cluster.advance(4000)
    assert {node.applied for node in nodes} == {3}
    assert [entry.index for entry in cluster.committed[2]] == [1, 2, 3]


# -- 4: membership -------------------------------------------------------------------------------------------


def joint_group() -> tuple[Cluster, RawNode]:
    """1 leads 1 2 3; the joint configuration with 1 4 5 is in all five logs and not committed."""
    cluster = Cluster(3, learners=(4, 5))
    leader = cluster.elect(1)
    leader.propose_conf([1, 4, 5], [], cluster.now)
    cluster.settle(only=silent)
    assert all(node.conf == ConfState((1, 4, 5), (), (1, 2, 3), (), True) for node in cluster.nodes.values())
    return cluster, leader


@pytest.mark.parametrize(
    ("reachable", "elected"),
    [
        ((4, 5), False),
        ((2, 3), False),
        ((2, 4), False),
        ((1, 4, 5), False),
        ((1, 2, 4), True),
        ((2, 3, 4, 5), True),
    ],
    ids=str,
)
def test_4_3_a_joint_configuration_elects_with_both_majorities(
    reachable: tuple[int, ...], elected: bool
) -> None:
    cluster, leader = joint_group()
    leader.step_down(cluster.now)
    cluster.wire.clear()
    cluster.isolate(*reachable)
    cluster.advance(1000, only=lambda message: False)  # leases end
    candidate = reachable[-1]
    cluster.nodes[candidate].step(TimeoutNow(candidate, 1, cluster.nodes[candidate].term), cluster.now)
    cluster.settle()
    assert (cluster.nodes[candidate].role is Role.LEADER) is elected


@pytest.mark.parametrize("replica", [1, 2, 3, 4, 5])
def test_4_3_a_server_of_either_configuration_may_lead(replica: int) -> None:
    cluster, leader = joint_group()
    leader.step_down(cluster.now)
    cluster.wire.clear()
    cluster.advance(1000, only=lambda message: False)
    node = cluster.nodes[replica]
    node.step(TimeoutNow(replica, 1, node.term), cluster.now)
    cluster.settle(only=silent)
    assert node.role is Role.LEADER
    cluster.advance(1000)
    assert cluster.leader().conf == ConfState((1, 4, 5))
    assert cluster.leader().id in (1, 4, 5), "one that is in the old half only leaves office at the end"


def test_4_3_entries_go_to_both_halves_and_clients_are_served_meanwhile() -> None:
    cluster, leader = joint_group()
    assert set(leader.progress) == {2, 3, 4, 5}
    entry = cluster.propose(1, b"meanwhile")[0]
    assert leader.conf.is_joint
    cluster.settle(only=silent)
    assert all(node.last_index == entry.index for node in cluster.nodes.values())
    cluster.advance(400)
    assert leader.applied > entry.index
    assert leader.conf == ConfState((1, 4, 5))


# -- 6: clients ----------------------------------------------------------------------------------------------


def test_6_4_step_2_a_read_is_served_at_the_commit_index_of_when_it_came() -> None:
    """What is committed while the heartbeats are under way need not be waited for."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.propose(1, b"x")
    cluster.settle()
    context = cluster.read(1)
    cluster.take_ready(1)
    cluster.propose(1, b"y")
    cluster.settle(only=lambda message: not isinstance(message, HeartbeatResponse))
    assert leader.commit == 3
    assert cluster.reads[1] == []
    leader.step(HeartbeatResponse(1, 2, 1, 1, 2), cluster.now)
    cluster.settle()
    assert cluster.reads[1] == [(context, 2)]


def test_6_4_step_4_an_index_may_be_told_before_it_is_applied() -> None:
    """The host waits for its state machine; the core only says for what."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.propose(1, b"x")
    cluster.take_ready(1)
    for follower in (2, 3):
        leader.step(AppendResponse(1, follower, 1, 2), cluster.now)
    context = cluster.read(1)
    assert leader.ready().committed
    leader.step(HeartbeatResponse(1, 3, 1, 1, 2), cluster.now)
    assert leader.ready().reads == ((context, 2),)
    assert leader.applied == 1


# -- 9 and 10: elections evaluated, performance --------------------------------------------------------------


def test_9_6_the_term_rises_only_with_a_majority_that_would_vote() -> None:
    cluster = Cluster(5)
    node = cluster.nodes[1]
    node.campaign(0)
    assert node.ready().append is None, "nothing durable changes"
    node.step(VoteResponse(1, 2, 1, True, True), 1)
    assert (node.role, node.term) == (Role.PRE_CANDIDATE, 0)
    node.step(VoteResponse(1, 3, 1, True, True), 1)
    assert (node.role, node.term) == (Role.CANDIDATE, 1)


def test_9_6_answering_a_pre_vote_changes_nothing() -> None:
    cluster = Cluster(3)
    node = cluster.nodes[2]
    before = (node.term, node.vote, node.role, node.deadline_ms)
    node.step(VoteRequest(2, 1, 1, 0, 0, pre=True), 0)
    node.step(VoteRequest(2, 3, 1, 0, 0, pre=True), 0)
    assert (node.term, node.vote, node.role, node.deadline_ms) == before
    ready = node.ready()
    assert ready.append is None
    assert [(answer.to, answer.granted) for answer in ready.messages] == [(1, True), (3, True)]


@pytest.mark.parametrize("seed", range(5))
def test_10_2_2_pipelined_entries_may_arrive_in_any_order(seed: int) -> None:
    """The consistency check refuses what comes too early; the leader goes back and sends it again."""
    cluster = Cluster(3, seed=seed, append_bytes_max=1, inflight_messages_max=8)
    leader = cluster.elect(1)
    for _ in range(5):
        cluster.propose(1, *[b"x"] * 8)
        cluster.take_ready(1)
        messages = list(cluster.wire)
        cluster.random.shuffle(messages)
        cluster.wire.clear()
        cluster.wire.extend(messages)
        cluster.settle()
        cluster.advance(300)
    assert cluster.of(AppendResponse, rejected=True)
    assert leader.commit == 41
    assert cluster.log_of(1) == cluster.log_of(2) == cluster.log_of(3)
