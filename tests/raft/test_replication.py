"""Replication: Figures 7 and 8, probing, windows, batching, losses, loads, commit news."""

from __future__ import annotations

from typing import Any

import pytest
from raft_cluster import Cluster, MemoryDisk, chain

from raftlog.errors import Busy, NotLeader
from raftlog.raft.log import LogDiverged
from raftlog.raft.progress import ProgressState
from raftlog.raft.types import (
    AppendRequest,
    AppendResponse,
    HardState,
    Heartbeat,
    HeartbeatResponse,
    Message,
    Role,
    VoteResponse,
)
from raftlog.record.frame import FRAME_HEADER_BYTES, FrameKind

FIGURE_7_LEADER = [1, 1, 1, 4, 4, 5, 5, 6, 6, 6]
FIGURE_7 = {
    "a": [1, 1, 1, 4, 4, 5, 5, 6, 6],
    "b": [1, 1, 1, 4],
    "c": [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 6],
    "d": [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 7, 7],
    "e": [1, 1, 1, 4, 4, 4, 4],
    "f": [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3],
}


def no_answers(message: Message) -> bool:
    return not isinstance(message, AppendResponse | HeartbeatResponse)


def with_logs(leader: list[int], others: dict[int, list[int]], term: int, **settings: Any) -> Cluster:
    """A group of len(others) + 1 whose replica 1 has ``leader`` as its log."""
    cluster = Cluster(len(others) + 1, **settings)
    cluster.restart_with(1, chain(leader), term)
    for replica, terms in others.items():
        cluster.restart_with(replica, chain(terms), term)
    return cluster


# -- the paper's figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURE_7)
def test_figure_7_each_follower_is_brought_in_line(name: str) -> None:
    cluster = with_logs(FIGURE_7_LEADER, {2: FIGURE_7[name], 3: FIGURE_7_LEADER}, term=7)
    leader = cluster.elect(1)
    assert leader.term == 8
    assert cluster.terms_of(2) == [*FIGURE_7_LEADER, 8]
    assert cluster.log_of(2) == cluster.log_of(1)
    assert leader.progress[2].match == 11
    assert cluster.nodes[2].commit == 11


def test_figure_7_all_followers_at_once() -> None:
    cluster = with_logs(FIGURE_7_LEADER, dict(enumerate(FIGURE_7.values(), start=2)), term=7)
    cluster.elect(1)  # with the votes of a, b, e and f
    for replica in cluster.nodes:
        assert cluster.log_of(replica) == cluster.log_of(1)
        assert cluster.nodes[replica].commit == 11


@pytest.mark.parametrize("name", ["c", "d"])
def test_figure_7_a_longer_or_newer_log_does_not_vote_for_the_leader(name: str) -> None:
    cluster = with_logs(FIGURE_7_LEADER, {2: FIGURE_7[name], 3: FIGURE_7["b"]}, term=7)
    cluster.isolate(3)
    cluster.nodes[1].campaign(0)
    cluster.settle()
    assert [answer.granted for answer in cluster.of(VoteResponse, sender=2)] == [False]
    assert cluster.nodes[1].role is Role.PRE_CANDIDATE
    assert cluster.nodes[1].term == 7


def test_figure_8_an_old_entry_on_a_majority_is_not_committed_by_counting() -> None:
    """(a) S1 leads term 2 and replicates index 2 to S2 only; (b) S5 leads term 3 and appends another entry
    there; (c) S1 leads term 4 and spreads its entry of term 2 to a majority, but nothing of term 4."""
    cluster = Cluster(5)
    for replica, terms in {1: [1, 2], 2: [1, 2], 3: [1], 4: [1], 5: [1, 3]}.items():
        cluster.restart_with(replica, chain(terms), term=3)
    cluster.isolate(4, 5)
    leader = cluster.nodes[1]
    leader.campaign(0)

    def without_the_new_term(message: Message) -> bool:
        return not (isinstance(message, AppendResponse) and message.index > 2)

    cluster.settle(only=without_the_new_term)
    assert leader.role is Role.LEADER
    assert leader.term == 4
    assert cluster.terms_of(3) == [1, 2, 4]
    leader.step(AppendResponse(1, 2, 4, 2), cluster.now)
    leader.step(AppendResponse(1, 3, 4, 2), cluster.now)
    assert [leader.progress[replica].match for replica in (2, 3)] == [2, 2]
    assert leader.commit == 0, "index 2 of term 2 is on a majority, yet may still be overwritten (d)"
    leader.step(AppendResponse(1, 2, 4, 3), cluster.now)
    assert leader.commit == 0
    leader.step(AppendResponse(1, 3, 4, 3), cluster.now)
    assert leader.commit == 3, "(e): with one of its own term on a majority, all below are committed"


def test_figure_8_d_the_old_entry_is_overwritten() -> None:
    cluster = Cluster(5)
    for replica, terms in {1: [1, 2, 4], 2: [1, 2], 3: [1, 2], 4: [1], 5: [1, 3]}.items():
        cluster.restart_with(replica, chain(terms), term=4)
    cluster.crash(1)
    cluster.elect(5)  # votes of 2, 3 and 4
    for replica in (2, 3, 4):
        assert cluster.terms_of(replica) == [1, 3, 5]
    cluster.start(1)
    cluster.advance(1000)
    assert cluster.terms_of(1) == [1, 3, 5]


# -- where logs meet -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leader", "follower", "refusals"),
    [
        ([1] * 50, [1] * 2, 1),  # far behind: its hint says where it ends
        ([1] * 2 + [5] * 60, [1] * 2 + [3] * 40, 1),  # a long foreign term is skipped by one hint
        ([1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1], 1),  # and so is the leader's side
        ([1] * 5 + [2] * 5 + [4] * 5, [1] * 3 + [3] * 20, 2),  # one per term that the other has not
    ],
)
def test_hints_find_the_meeting_point_in_few_round_trips(
    leader: list[int], follower: list[int], refusals: int
) -> None:
    cluster = with_logs(leader, {2: follower, 3: leader}, term=max(leader))
    cluster.elect(1)
    assert cluster.log_of(2) == cluster.log_of(1)
    assert len(cluster.of(AppendResponse, sender=2, rejected=True)) <= refusals


def test_alternating_terms_cost_at_most_one_trip_per_term() -> None:
    cluster = with_logs([1, 3, 3, 5, 5, 7, 7], {2: [1, 2, 2, 4, 4, 6, 6, 6], 3: []}, term=7)
    cluster.elect(1)
    assert cluster.log_of(2) == cluster.log_of(1)
    assert len(cluster.of(AppendResponse, sender=2, rejected=True)) <= 3


def test_a_shorter_message_that_agrees_cuts_nothing(cluster: Cluster) -> None:
    node = cluster.restart_with(2, chain([1, 1, 1]), term=1)
    first = chain([1])
    node.step(AppendRequest(2, 1, 1, 0, 0, 0, 0, tuple(first)), 0)
    assert node.last_index == 3
    assert node.ready().messages == (AppendResponse(1, 2, 1, 1),)


def test_nothing_at_or_below_commit_is_ever_cut(cluster: Cluster) -> None:
    node = cluster.restart_with(2, chain([1, 1]), term=1, commit=2)
    with pytest.raises(LogDiverged, match="entry 2 "):
        node.step(AppendRequest(2, 1, 3, 1, 1, -1, 0, tuple(chain([1, 3])[1:])), 0)
    assert cluster.terms_of(2) == [1, 1]
    with pytest.raises(AssertionError):
        node._node.cut(2)


def test_an_append_below_commit_is_taken_from_commit_on(cluster: Cluster) -> None:
    node = cluster.restart_with(2, chain([1, 1, 1]), term=1, commit=2)
    node.step(AppendRequest(2, 1, 1, 0, 0, 0, 4, tuple(chain([1, 1, 1, 1]))), 0)
    assert node.last_index == 4
    assert node.commit == 4
    node.step(AppendRequest(2, 1, 1, 0, 0, 0, 1, ()), 0)
    cluster.settle(only=lambda message: False)
    assert cluster.of(AppendResponse)[-1].index == 4


def test_a_gap_is_refused(cluster: Cluster) -> None:
    node = cluster.restart_with(2, chain([1, 1]), term=1)
    node.step(AppendRequest(2, 1, 1, 5, 1, -1, 0, ()), 0)
    assert node.ready().messages == (AppendResponse(1, 2, 1, 5, True, 2, 1),)


# -- the chain of crcs ---------------------------------------------------------------------------------------


def test_equal_terms_with_other_bytes_halt_the_replica(cluster: Cluster) -> None:
    node = cluster.restart_with(2, chain([1, 1]), term=1)
    with pytest.raises(LogDiverged, match="entry 2 of term 1"):
        node.step(AppendRequest(2, 1, 1, 2, 1, 12345, 0, ()), 0)


def test_an_entry_known_with_other_bytes_halts_the_replica(cluster: Cluster) -> None:
    node = cluster.restart_with(2, chain([1, 1]), term=1)
    other = chain([1, 1], size=20)
    with pytest.raises(LogDiverged, match="entry 1 of term 1"):
        node.step(AppendRequest(2, 1, 1, 0, 0, 0, 0, tuple(other)), 0)


def test_an_entry_that_does_not_follow_halts_the_replica(cluster: Cluster) -> None:
    node = cluster.restart_with(2, chain([1]), term=1)
    stranger = chain([1], first=2, prev_crc=99)
    with pytest.raises(LogDiverged, match="entry 2 of term 1 follows crc"):
        node.step(AppendRequest(2, 1, 1, 1, 1, -1, 0, tuple(stranger)), 0)


# -- windows and limits --------------------------------------------------------------------------------------


def streaming(**settings: Any) -> Cluster:
    """A group whose leader 1 streams to all, at rest."""
    cluster = Cluster(3, **settings)
    cluster.elect(1)
    assert all(progress.state is ProgressState.REPLICATE for progress in cluster.nodes[1].progress.values())
    cluster.sent.clear()
    return cluster


def test_many_proposals_between_two_readies_are_one_append_and_one_message_each() -> None:
    cluster = streaming()
    cluster.propose(1, *[b"x"] * 50)
    ready = cluster.nodes[1].ready()
    assert ready.append is not None
    assert len(ready.append.entries) == 50
    assert [(message.to, len(message.entries)) for message in ready.messages] == [(2, 50), (3, 50)]


def test_append_bytes_max_splits_and_a_single_big_entry_still_goes() -> None:
    frame = FRAME_HEADER_BYTES + 100
    cluster = streaming(append_bytes_max=3 * frame)
    cluster.propose(1, *[bytes(100)] * 7, bytes(5000))
    sizes = [len(message.entries) for message in cluster.nodes[1].ready().messages if message.to == 2]
    assert sizes == [3, 3, 1, 1]


def test_the_window_holds_messages_back_and_acknowledgements_open_it() -> None:
    cluster = streaming(inflight_messages_max=2)
    leader = cluster.nodes[1]
    for _ in range(5):
        cluster.propose(1, b"x")
        cluster.settle(only=no_answers)
    assert len(cluster.of(AppendRequest, to=2)) == 2
    assert leader.progress[2].inflight_messages == 2
    leader.step(AppendResponse(1, 2, 1, 2), cluster.now)
    cluster.settle(only=no_answers)
    sent = cluster.of(AppendRequest, to=2)
    assert [entry.index for entry in sent[2].entries] == [4, 5, 6], "what waited goes as one"


def test_the_window_in_bytes_is_never_passed_but_by_a_single_entry() -> None:
    frame = FRAME_HEADER_BYTES + 100
    cluster = streaming(inflight_bytes_max=2 * frame + 10)
    leader = cluster.nodes[1]
    cluster.propose(1, *[bytes(100)] * 5)
    cluster.settle(only=no_answers)
    assert leader.progress[2].inflight_bytes == 2 * frame
    cluster.settle()
    leader.step(AppendResponse(1, 2, 1, 3), cluster.now)
    cluster.settle()
    cluster.advance(300)
    assert leader.commit == 6
    cluster.propose(1, b"", bytes(1000))
    cluster.settle(only=no_answers)
    assert leader.progress[2].inflight_messages == 1, "the big one waits for an empty window"
    cluster.advance(400)
    assert leader.commit == 8


def test_busy_above_the_uncommitted_bytes_yet_one_entry_always_goes() -> None:
    cluster = streaming(uncommitted_bytes_max=1000)
    leader = cluster.nodes[1]
    cluster.propose(1, bytes(5000))
    last = (leader.last_index, leader.last_crc)
    with pytest.raises(Busy, match="limit of 1000"):
        cluster.propose(1, b"")
    assert (leader.last_index, leader.last_crc) == last, "nothing happened"
    cluster.settle()
    cluster.propose(1, bytes(500))
    with pytest.raises(Busy):
        cluster.propose(1, bytes(500))
    cluster.propose(1, bytes(100))
    cluster.settle()
    assert leader.commit == leader.last_index == 4


def test_a_new_leader_counts_what_it_inherits_as_uncommitted() -> None:
    cluster = with_logs([1] * 10, {2: [], 3: []}, term=1, uncommitted_bytes_max=400)
    cluster.nodes[1].campaign(0)
    cluster.settle(only=no_answers)
    assert cluster.nodes[1].role is Role.LEADER
    with pytest.raises(Busy):
        cluster.propose(1, b"")


def test_only_leaders_take_proposals(cluster: Cluster) -> None:
    """They name no leader: clients took a replica's id for a broker's, and looked for that one (seed 164)."""
    with pytest.raises(NotLeader):
        cluster.propose(2, b"x")
    cluster.elect(1)
    with pytest.raises(NotLeader) as caught:
        cluster.propose(2, b"x")
    assert (caught.value.leader, caught.value.term) == (None, 1)


def test_leader_time_never_runs_back(cluster: Cluster) -> None:
    node = cluster.elect(1)
    times = [node.propose(FrameKind.BATCH, b"", at).leader_time_ms for at in (500, 400, 600)]
    assert times == [500, 500, 600]
    assert node.last_leader_time_ms == 600
    cluster.settle()
    cluster.advance(50)
    node.step_down(cluster.now)
    cluster.nodes[3].peer_lost(1, cluster.now)
    assert cluster.elect(2).last_leader_time_ms == 600, "the no-op carries the last entry's"


# -- news of commits -----------------------------------------------------------------------------------------


def test_a_commit_is_told_at_once_in_one_small_message_that_needs_no_answer() -> None:
    cluster = streaming()
    cluster.propose(1, b"x")
    cluster.settle()
    assert [cluster.nodes[replica].applied for replica in (1, 2, 3)] == [2, 2, 2]
    for follower in (2, 3):
        assert [len(message.entries) for message in cluster.of(AppendRequest, to=follower)] == [1, 0]
        assert len(cluster.of(AppendResponse, sender=follower)) == 1


def test_a_commit_rides_on_entries_that_go_anyway() -> None:
    cluster = streaming()
    cluster.propose(1, b"x")
    cluster.settle(only=no_answers)
    cluster.propose(1, b"y")
    leader = cluster.nodes[1]
    leader.step(AppendResponse(1, 2, 1, 2), cluster.now)
    sent = [message for message in leader.ready().messages if message.to == 2]
    assert [(message.commit, len(message.entries)) for message in sent] == [(2, 1)]


def test_a_heartbeat_never_carries_more_commit_than_the_follower_has() -> None:
    cluster = streaming()
    cluster.isolate(3)
    cluster.propose(1, b"x")
    cluster.settle()
    assert cluster.nodes[1].commit == 2
    cluster.sent.clear()
    cluster.advance(100)
    assert {message.commit for message in cluster.of(Heartbeat, to=2)} == {2}
    assert {message.commit for message in cluster.of(Heartbeat, to=3)} == {1}


def test_a_lost_commit_message_is_made_good_by_the_next_heartbeat() -> None:
    cluster = streaming()
    cluster.propose(1, b"x")
    cluster.settle(only=lambda message: not (isinstance(message, AppendRequest) and not message.entries))
    assert cluster.nodes[2].commit == 1
    cluster.advance(100)
    assert cluster.nodes[2].commit == 2


def test_a_restarted_follower_learns_the_commit_without_new_entries() -> None:
    cluster = streaming()
    cluster.propose(1, b"x")
    cluster.settle()
    cluster.crash(2)
    cluster.start(2)
    assert cluster.nodes[2].commit < 2
    cluster.advance(200)
    assert cluster.nodes[2].applied == 2


# -- losses --------------------------------------------------------------------------------------------------


def test_lost_entries_are_noticed_and_sent_again() -> None:
    cluster = streaming()
    cluster.propose(1, b"x")
    cluster.settle(only=lambda message: not isinstance(message, AppendRequest))
    assert cluster.nodes[1].commit == 1
    cluster.advance(350)
    assert [node.applied for node in cluster.nodes.values()] == [2, 2, 2]


def test_lost_acknowledgements_are_asked_for_again_without_sending_the_entries_twice() -> None:
    cluster = streaming()
    cluster.propose(1, b"x")
    cluster.settle(only=lambda message: not isinstance(message, AppendResponse))
    cluster.advance(350)
    assert cluster.nodes[1].commit == 2
    assert len([message for message in cluster.of(AppendRequest, to=2) if message.entries]) == 1


def test_a_slow_disk_is_not_taken_for_a_loss() -> None:
    cluster = streaming()
    cluster.propose(1, b"x")
    cluster.advance(600, sync=False)
    assert cluster.nodes[1].progress[2].state is ProgressState.REPLICATE
    assert not cluster.of(AppendResponse, rejected=True)
    cluster.settle()
    assert cluster.nodes[1].commit == 2
    assert len([message for message in cluster.of(AppendRequest, to=2) if message.entries]) == 1


def test_a_lost_probe_is_repeated_by_the_next_heartbeat_response(cluster: Cluster) -> None:
    cluster.nodes[1].campaign(0)
    cluster.settle(only=lambda message: not isinstance(message, AppendRequest))
    assert cluster.nodes[1].progress[2].paused
    assert len(cluster.of(AppendRequest, to=2)) == 1
    cluster.advance(100)
    assert cluster.nodes[1].serving


def test_a_connection_lost_stops_sending_and_restored_probes_at_once() -> None:
    cluster = streaming()
    leader = cluster.nodes[1]
    cluster.isolate(2)
    cluster.propose(1, b"x")
    cluster.settle()
    leader.peer_lost(2, cluster.now)
    cluster.propose(1, b"y")
    cluster.settle()
    assert len(cluster.of(AppendRequest, to=2)) <= 2, "nothing after the loss"
    assert leader.progress[2].state is ProgressState.PROBE
    cluster.heal()
    leader.peer_restored(2, cluster.now)
    cluster.settle()
    assert cluster.nodes[2].applied == 3, "without waiting for a heartbeat"
    leader.peer_lost(77, cluster.now)
    leader.peer_restored(77, cluster.now)
    cluster.nodes[2].peer_restored(1, cluster.now)


def test_an_answer_proves_that_the_connection_is_back() -> None:
    cluster = streaming()
    cluster.nodes[1].peer_lost(2, cluster.now)
    cluster.propose(1, b"x")
    cluster.settle()
    assert cluster.nodes[2].last_index == 1
    cluster.advance(100)
    assert cluster.nodes[2].applied == 2


def test_a_follower_that_forgot_what_it_acknowledged_counts_no_longer() -> None:
    cluster = streaming()
    cluster.propose(1, b"x", b"y")
    cluster.settle()
    leader = cluster.nodes[1]
    cluster.disks[3] = MemoryDisk(cluster.conf, HardState(1, 1, 0))  # a power cut with flush=interval
    cluster.start(3)
    leader.peer_lost(3, cluster.now)
    leader.peer_restored(3, cluster.now, forgot=True)
    assert leader.progress[3].match == 0
    cluster.settle()
    assert cluster.nodes[3].applied == 3
    assert leader.progress[3].match == 3


def test_stale_and_strange_answers_are_ignored() -> None:
    cluster = streaming()
    leader = cluster.nodes[1]
    leader.step(AppendResponse(1, 42, 1, 1), cluster.now)
    leader.step(HeartbeatResponse(1, 42, 1), cluster.now)
    leader.step(AppendResponse(1, 2, 1, 1, True, 0, 0), cluster.now)  # refused what it has accepted since
    assert leader.progress[2].state is ProgressState.REPLICATE
    leader.peer_lost(2, cluster.now)
    leader.progress[2].match = 1
    leader.step(AppendResponse(1, 2, 1, 0), cluster.now)  # an old answer: says nothing of the probe
    assert leader.progress[2].state is ProgressState.PROBE
    with pytest.raises(AssertionError, match="is beyond"):
        leader.step(AppendResponse(1, 2, 1, 99), cluster.now)


def test_a_commit_may_wait_for_the_next_entries_or_heartbeat() -> None:
    """Without announce_commits no message is sent for a commit alone."""
    cluster = Cluster(3, announce_commits=False)
    node = cluster.elect(1)
    cluster.advance(200)
    base = node.commit
    followers = [cluster.nodes[2], cluster.nodes[3]]
    assert [follower.commit for follower in followers] == [base, base], "a heartbeat told them"
    cluster.sent.clear()
    cluster.propose(1, b"a")
    cluster.settle()
    assert node.commit == base + 1
    assert len(cluster.of(AppendRequest)) == 2, "the entry to each follower, and nothing more"
    assert [follower.commit for follower in followers] == [base, base]
    cluster.propose(1, b"b")
    cluster.settle()
    assert [follower.commit for follower in followers] == [base + 1, base + 1], "the next entry told them"
    cluster.advance(200)
    assert [follower.commit for follower in followers] == [base + 2, base + 2]


def test_an_amnesiac_that_holds_all_is_told_the_commit_index_when_it_asks() -> None:
    cluster = streaming()
    leader = cluster.nodes[1]
    leader.step(HeartbeatResponse(1, 2, 1, 0, 1, amnesiac=True), cluster.now)
    assert leader.ready().messages == (AppendRequest(2, 1, 1, 1, 1, leader.last_crc, 1),)
    leader.step(HeartbeatResponse(1, 2, 1, 0, 1), cluster.now)
    assert not leader.has_ready()


def test_where_a_term_ends_in_the_log(cluster: Cluster) -> None:
    node = cluster.restart_with(2, chain([1, 1, 3, 3, 5]), term=5)
    assert [node.last_index_of(term) for term in range(7)] == [0, 2, 2, 4, 4, 5, 5]
