"""Logs that begin behind a snapshot: compaction, who needs one, taking it over."""

from __future__ import annotations

import pytest
from raft_cluster import Cluster, chain

from raftlog.raft.progress import ProgressState
from raftlog.raft.types import (
    AppendRequest,
    AppendResponse,
    ConfState,
    HeartbeatResponse,
    InstallSnapshot,
    InstallSnapshotResponse,
    Snapshot,
)


def behind() -> Cluster:
    """Leader 1 and follower 2 have dropped the first ten entries; follower 3 has one of them."""
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(3)
    for _ in range(9):
        cluster.propose(1, b"x")
        cluster.settle()
    for replica in (1, 2):
        cluster.compact(replica, 10)
    cluster.propose(1, b"y")
    cluster.settle()
    cluster.sent.clear()
    return cluster


def test_a_follower_too_far_behind_is_asked_a_snapshot_for() -> None:
    cluster = behind()
    cluster.heal()
    cluster.advance(500, snapshots=False)
    assert cluster.snapshots_wanted == [(1, 3)]
    assert cluster.nodes[1].progress[3].state is ProgressState.SNAPSHOT
    sent = len(cluster.of(AppendRequest, to=3))
    cluster.propose(1, b"z")
    cluster.advance(1000, snapshots=False)
    assert len(cluster.of(AppendRequest, to=3)) == sent, "nothing is sent meanwhile"
    assert cluster.snapshots_wanted == [(1, 3)], "and it is asked for once"
    cluster.settle()
    assert cluster.nodes[3].applied == 12
    assert cluster.nodes[3].first_index == 11
    assert cluster.nodes[1].progress[3].state is ProgressState.REPLICATE


def test_a_snapshot_that_fails_is_asked_for_again() -> None:
    cluster = behind()
    cluster.heal()
    cluster.advance(500, snapshots=False)
    cluster.serve_snapshot(fail=True)
    cluster.settle(snapshots=False)
    assert cluster.snapshots_wanted == []
    cluster.advance(100, snapshots=False)
    assert cluster.snapshots_wanted == [(1, 3)]
    for call in (cluster.nodes[1].on_snapshot_failed, lambda to: cluster.nodes[1].on_snapshot_sent(to, 3)):
        call(2)
        call(42)
    assert cluster.nodes[1].progress[2].state is ProgressState.REPLICATE


def test_a_snapshot_whose_acknowledgement_is_lost_still_ends() -> None:
    cluster = behind()
    cluster.heal()
    cluster.advance(500, snapshots=False)
    cluster.serve_snapshot()
    cluster.settle(only=lambda message: not isinstance(message, AppendResponse))
    cluster.advance(300)
    assert cluster.nodes[3].applied == 11


def test_a_connection_lost_under_a_snapshot_leads_to_another_one_when_it_is_back() -> None:
    cluster = behind()
    cluster.heal()
    cluster.advance(500, snapshots=False)
    assert cluster.snapshots_wanted == [(1, 3)]
    leader = cluster.nodes[1]
    leader.peer_lost(3, cluster.now)
    assert leader.progress[3].state is ProgressState.SNAPSHOT, "its host still has to end it"
    leader.peer_restored(3, cluster.now)
    cluster.settle(snapshots=False)
    assert cluster.snapshots_wanted == [(1, 3), (1, 3)]
    cluster.settle()
    assert cluster.nodes[3].applied == leader.commit


def test_an_acknowledgement_ends_it_even_without_the_host() -> None:
    cluster = behind()
    cluster.heal()
    cluster.advance(500, snapshots=False)
    leader = cluster.nodes[1]
    leader.step(AppendResponse(1, 3, 1, 5), cluster.now)
    assert leader.progress[3].state is ProgressState.SNAPSHOT, "not far enough"
    leader.step(AppendResponse(1, 3, 1, 10), cluster.now)
    assert leader.progress[3].state is ProgressState.REPLICATE


def test_a_replica_restarts_from_snapshot_and_log() -> None:
    cluster = behind()
    cluster.crash(2)
    node = cluster.start(2)
    assert (node.first_index, node.last_index, node.applied) == (11, 11, 10)
    cluster.advance(500)
    assert node.applied == 11


def test_taking_over_replaces_log_and_configuration() -> None:
    cluster = Cluster(3)
    node = cluster.restart_with(3, chain([1, 1, 1]), term=1)
    four = ConfState((1, 2, 3, 4))
    snapshot = Snapshot(9, 2, 1234, four)
    node.step(InstallSnapshot(3, 1, 2, snapshot), 0)
    assert node.leader == 1
    append = node.ready().append
    assert append is not None, "term 2"
    assert node.restore(snapshot, 0, leader_time_ms=5000)
    assert (node.first_index, node.last_index, node.commit, node.applied, node.durable_index) == (
        10,
        9,
        9,
        9,
        9,
    )
    assert (node.conf, node.last_crc, node.last_leader_time_ms) == (four, 1234, 5000)
    assert node.conf_at(9) == four
    assert node.ready().messages == (), "not before term 2 is durable"
    node.on_durable(append.sequence)
    assert node.ready().messages == (AppendResponse(1, 3, 2, 9),)
    entry = chain([2], first=10, prev_crc=1234)
    node.step(AppendRequest(3, 1, 2, 9, 2, 1234, 0, tuple(entry)), 0)
    assert node.last_index == 10


def test_a_snapshot_of_what_the_log_has_only_commits() -> None:
    cluster = Cluster(3)
    log = chain([1, 1, 1])
    node = cluster.restart_with(3, log, term=1)
    node.step(InstallSnapshot(3, 1, 1, Snapshot(2, 1, log[1].crc, cluster.conf)), 0)
    assert not node.restore(Snapshot(2, 1, log[1].crc, cluster.conf), 0)
    assert (node.last_index, node.commit, node.applied) == (3, 2, 0)
    cluster.settle()
    assert node.applied == 2
    assert not node.restore(Snapshot(1, 1, log[0].crc, cluster.conf), 0), "older than what is committed"
    assert node.commit == 2
    cluster.settle()
    assert cluster.of(AppendResponse)[-1].index == 2


def test_a_leader_takes_no_snapshot() -> None:
    cluster = Cluster(3)
    node = cluster.elect(1)
    with pytest.raises(AssertionError):
        node.restore(Snapshot(9, 1, 1, cluster.conf), 0)


def test_compaction_under_a_streaming_follower_leads_to_a_snapshot() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(3)
    for _ in range(30):  # more than the window of messages to 3
        cluster.propose(1, b"x")
        cluster.settle()
    leader = cluster.nodes[1]
    assert leader.progress[3].state is ProgressState.REPLICATE
    cluster.compact(1)
    for _ in range(2):
        leader.step(HeartbeatResponse(1, 3, 1, 0, 1), cluster.now)
    cluster.settle(snapshots=False)
    assert cluster.snapshots_wanted == [(1, 3)]


def test_answers_to_chunks_are_signs_of_life() -> None:
    cluster = behind()
    leader = cluster.nodes[1]
    cluster.isolate(1)
    for _ in range(30):
        cluster.advance(100)
        leader.step(InstallSnapshotResponse(1, 3, 1, 10, 5), cluster.now)
        leader.step(InstallSnapshotResponse(1, 42, 1, 10, 5), cluster.now)
    assert leader.role.value == "leader"


def test_only_what_is_durable_and_applied_is_compacted() -> None:
    cluster = behind()
    node = cluster.nodes[1]
    with pytest.raises(AssertionError):
        node.on_compacted(node.durable_index + 2, 0)
    node.on_compacted(5, 0)  # long gone
    assert node.first_index == 11
