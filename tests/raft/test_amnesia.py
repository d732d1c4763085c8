"""Replicas whose disk forgot what it had acknowledged (flush=interval and a power cut)."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from incarnations import power_cut, reconnect
from raft_cluster import Cluster

from raftlog.raft.config import RaftConfig
from raftlog.raft.raw_node import RawNode
from raftlog.raft.types import (
    AppendRequest,
    ConfState,
    Heartbeat,
    HeartbeatResponse,
    Role,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)


def committed_by_two(cluster: Cluster) -> RawNode:
    """Leader 1 and follower 2 have committed three entries of which 3 has none."""
    leader = cluster.elect(1)
    cluster.isolate(3)
    cluster.propose(1, b"a", b"b", b"c")
    cluster.settle()
    assert leader.commit == 4
    assert cluster.nodes[3].last_index == 1
    return leader


def run_without(cluster: Cluster, *replicas: int) -> None:
    """Cut these off and give the others time for many elections."""
    cluster.heal()
    cluster.isolate(*replicas)
    for _ in range(20):
        cluster.advance(1000)


def test_it_does_not_elect_one_that_lacks_what_it_forgot() -> None:
    """The classic: {1, 2} commit, 2 loses power, 1 is cut off. 3 must not win with the vote of 2."""
    cluster = Cluster(3)
    leader = committed_by_two(cluster)
    two = power_cut(cluster, 2, keep=1)
    assert two.amnesiac
    run_without(cluster, 1)
    assert cluster.nodes[3].role is not Role.LEADER
    assert two.role is Role.FOLLOWER
    cluster.heal()
    reconnect(cluster, 2)
    cluster.advance(5000)
    assert cluster.leader() is leader, "nobody else has the entries"
    assert not two.amnesiac
    assert [n.commit >= 4 for n in cluster.nodes.values()] == [True] * 3


def test_were_the_flag_ignored_the_checker_would_see_it() -> None:
    cluster = Cluster(3)
    committed_by_two(cluster)
    power_cut(cluster, 2, keep=1, amnesiac=False)
    with pytest.raises(AssertionError, match=r"lacks committed entry|has another entry"):
        run_without(cluster, 1)


def test_once_cured_it_votes_and_campaigns_again() -> None:
    cluster = Cluster(3)
    committed_by_two(cluster)
    two = power_cut(cluster, 2, keep=1)
    cluster.heal()
    reconnect(cluster, 2)
    cluster.settle()
    assert not two.amnesiac
    assert two.last_index == 4
    run_without(cluster, 1)
    assert {cluster.nodes[2].role, cluster.nodes[3].role} == {Role.LEADER, Role.FOLLOWER}


def test_nothing_makes_it_campaign_or_vote() -> None:
    cluster = Cluster(3)
    committed_by_two(cluster)
    two = power_cut(cluster, 2, keep=1)
    term = two.term
    two.campaign(cluster.now)
    two.step(TimeoutNow(2, 1, term), cluster.now)
    two.peer_lost(1, cluster.now)
    two.step(VoteRequest(2, 3, term + 1, 9, 9, pre=True), cluster.now)
    two.step(VoteRequest(2, 3, term + 1, 9, 9), cluster.now)
    cluster.settle(only=lambda message: False)
    assert two.role is Role.FOLLOWER
    assert two.term == term + 1, "terms are still settled"
    answers = [m for m in cluster.sent if isinstance(m, VoteResponse) and m.sender == 2 and m.to == 3]
    assert [m.granted for m in answers[-2:]] == [False, False]
    assert not cluster.of(VoteRequest, sender=2)
    assert two.vote == 0


def test_what_a_new_leader_has_not_committed_yet_does_not_cure() -> None:
    """1 comes back as leader of a later term and does not know yet that its entries are committed. A commit
    index that lags behind must not set 2 free, or it could elect 3."""
    cluster = Cluster(3)
    committed_by_two(cluster)
    power_cut(cluster, 1, keep=4, amnesiac=False)
    cluster.disks[1].hard_state = msgspec.structs.replace(cluster.disks[1].hard_state, commit=1)
    power_cut(cluster, 1, keep=4, amnesiac=False)
    two = power_cut(cluster, 2, keep=1)
    cluster.heal()
    cluster.cut_links |= {(1, 2), (2, 1)}
    one = cluster.nodes[1]
    one.campaign(cluster.now)
    cluster.settle(only=lambda m: not isinstance(m, AppendRequest))
    assert one.role is Role.LEADER
    assert one.commit == 1, "its no-op is on its way"
    cluster.cut_links.clear()
    reconnect(cluster, 2)
    cluster.take_ready(1)
    told = [m for m in cluster.wire if isinstance(m, AppendRequest) and m.to == 2]
    assert told
    assert max(m.commit for m in told) == 1
    for message in told:
        two.step(replace_entries(message), cluster.now)
    two.on_durable(0)
    assert two.amnesiac, "at commit 1 of an earlier term"
    cluster.wire.clear()
    run_without(cluster, 1)
    assert cluster.nodes[3].role is not Role.LEADER


def replace_entries(message: AppendRequest) -> AppendRequest:
    """The same as a probe just above what the receiver holds."""
    return AppendRequest(message.to, message.sender, message.term, 1, 1, -1, message.commit)


def test_the_part_of_the_log_that_came_along_does_not_cure() -> None:
    """What its leader has committed with the help of the former incarnation may lie above it."""
    cluster = Cluster(3)
    leader = committed_by_two(cluster)
    two = power_cut(cluster, 2, keep=1)
    second = cluster.log_of(1)[1]
    two.step(AppendRequest(2, 1, leader.term, 1, 1, -1, 4, (second,)), cluster.now)
    cluster.take_ready(2)
    cluster.sync(2)
    assert (two.commit, two.durable_index) == (2, 2)
    assert two.amnesiac


def test_a_heartbeat_does_not_cure() -> None:
    """It names what this follower acknowledged, not what is committed."""
    cluster = Cluster(3)
    leader = committed_by_two(cluster)
    two = power_cut(cluster, 2, keep=1)
    two.step(Heartbeat(2, 1, leader.term, 1), cluster.now)
    assert two.amnesiac
    cluster.settle(only=lambda message: False)
    answer = next(m for m in reversed(cluster.sent) if m.sender == 2)
    assert answer.amnesiac


def test_an_idle_leader_tells_its_commit_index_when_asked() -> None:
    """Partitions hear of commits with the next entries: an idle one would never cure anybody."""
    cluster = Cluster(3, announce_commits=False, quiet_after_ms=300)
    leader = committed_by_two(cluster)
    two = power_cut(cluster, 2, keep=1)
    cluster.heal()
    cluster.isolate(2)
    cluster.advance(100)
    cluster.heal()
    reconnect(cluster, 2)
    # All that tells the commit index is lost but the answer to the question.
    cluster.settle(only=lambda m: not (isinstance(m, AppendRequest) and m.to == 2 and not m.entries))
    cluster.advance(2500)
    assert leader.role is Role.LEADER
    assert not two.amnesiac
    assert leader.quiet
    assert two.quiet


def test_it_does_not_rest_before_it_is_cured() -> None:
    cluster = Cluster(3)
    leader = committed_by_two(cluster)
    two = power_cut(cluster, 2, keep=4)
    two.step(Heartbeat(2, 1, leader.term, 4, 0, True), cluster.now)
    assert not two.quiet


def test_a_busy_leader_is_caught_up_with() -> None:
    """The leader's commit index is always a little ahead of what this disk has written."""
    cluster = Cluster(3)
    leader = committed_by_two(cluster)
    two = power_cut(cluster, 2, keep=1)
    entries = cluster.log_of(1)[1:]
    for entry in entries:
        index = entry.index
        two.step(AppendRequest(2, 1, leader.term, index - 1, 1, -1, index, (entry,)), cluster.now)
        assert two.amnesiac == (index < 4)
        cluster.take_ready(2)
        cluster.sync(2, len(cluster.disks[2].pending) - 1)


@pytest.mark.parametrize("voters", [1, 2])
def test_where_every_quorum_is_all_of_them_it_goes_on(voters: int) -> None:
    cluster = Cluster(voters)
    cluster.elect(1)
    cluster.propose(1, b"a", b"b")
    cluster.settle()
    one = power_cut(cluster, 1, keep=4 - voters)
    assert not one.amnesiac
    cluster.advance(10_000)
    leader = cluster.leader()
    assert leader.id == voters, "of two, the one that has all"
    assert leader.last_index >= 3


def test_joint_configurations_count_by_their_larger_half() -> None:
    cluster = Cluster(3)
    disk = cluster.disks[1]
    for conf, matters in (
        (ConfState((1,)), False),
        (ConfState((1, 2), learners=(3,)), False),
        (ConfState((1, 2), outgoing=(1,)), False),
        (ConfState((1, 2, 3)), True),
        (ConfState((1,), outgoing=(1, 2, 3)), True),
    ):
        recovered = replace(disk.recovered(), amnesiac=True, confs=((0, conf),))
        assert RawNode(RaftConfig(id=1), recovered, random.Random(1), 0).amnesiac is matters


def test_acknowledgements_of_the_former_incarnation_count_no_longer() -> None:
    """2 acknowledged 5 and 6 to leader 1, which has not counted that yet when 2 comes back without them."""
    cluster = Cluster(3)
    leader = committed_by_two(cluster)
    cluster.propose(1, b"d", b"e")
    cluster.take_ready(1)
    cluster.settle(sync=False)
    cluster.sync(2)
    cluster.settle(sync=False)
    assert leader.progress[2].match == 6
    assert leader.commit == 4, "its own disk is slow"
    two = power_cut(cluster, 2, keep=1)
    reconnect(cluster, 2)
    cluster.cut_links |= {(1, 2), (2, 1)}
    cluster.sync(1)
    assert leader.commit == 4
    cluster.cut_links -= {(1, 2), (2, 1)}
    leader.peer_restored(2, cluster.now, forgot=True)
    cluster.settle()
    assert leader.commit == 6
    assert not two.amnesiac


def test_what_was_meant_for_the_former_incarnation_does_not_reach_the_new_one() -> None:
    cluster = Cluster(3)
    leader = committed_by_two(cluster)
    cluster.propose(1, b"d")
    cluster.take_ready(1)
    cluster.settle(sync=False)
    cluster.sync(2)
    leader.step(response(cluster), cluster.now)  # an empty append with commit 4 is on its way to 2
    cluster.sync(1)
    cluster.settle(sync=False, only=lambda m: m.to == 1)
    leader.peer_restored(2, cluster.now, forgot=True)
    ready = leader.ready()
    (probe,) = [m for m in ready.messages if m.to == 2]
    assert probe.commit == leader.commit


def response(cluster: Cluster) -> Any:
    return HeartbeatResponse(1, 2, cluster.nodes[1].term, 0, 5, True)


@pytest.mark.walk
@pytest.mark.parametrize("seed", range(60))
def test_walks_with_power_cuts_of_a_minority_lose_nothing(seed: int) -> None:
    """Three replicas of which one at a time forgets all that it acknowledged since some moment. The next one
    only when the last is cured."""
    chance = random.Random(seed)
    cluster = Cluster(3, seed=seed, announce_commits=False)
    cluster.advance(5000)
    proposed = 0
    for _ in range(60):
        what = chance.random()
        leaders = [n for n in cluster.nodes.values() if n.role is Role.LEADER]
        if what < 0.5 and leaders:
            cluster.propose(chance.choice(leaders).id, b"%d" % proposed)
            proposed += 1
            cluster.settle(sync=chance.random() < 0.8)
        elif what < 0.65:
            cluster.heal()
            for replica in cluster.nodes:
                reconnect(cluster, replica)
            if chance.random() < 0.7:
                cluster.isolate(chance.choice([1, 2, 3]))
        elif what < 0.8 and not any(n.amnesiac for n in cluster.nodes.values()):
            replica = chance.choice([1, 2, 3])
            held = len(cluster.disks[replica].entries)
            power_cut(cluster, replica, keep=chance.randint(max(0, held - 3), held))
            reconnect(cluster, replica)
        else:
            cluster.advance(chance.choice([50, 300, 3000]))
    cluster.heal()
    for replica in cluster.nodes:
        reconnect(cluster, replica)
    cluster.advance(10_000)
    assert not any(node.amnesiac for node in cluster.nodes.values())
    assert cluster.checker.committed
