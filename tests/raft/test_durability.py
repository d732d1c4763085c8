"""What is said only once it is durable, and what a late sync may not prove."""

from __future__ import annotations

import pytest
from incarnations import power_cut
from raft_cluster import Cluster, chain

from raftlog.raft.durability import Durability
from raftlog.raft.node import NEVER
from raftlog.raft.raw_node import RawNode
from raftlog.raft.types import Append, AppendRequest, AppendResponse, HardState, Heartbeat, Role, VoteRequest


def follower_of_1(terms: list[int], term: int) -> tuple[Cluster, RawNode]:
    cluster = Cluster(3)
    return cluster, cluster.restart_with(2, chain(terms), term)


def taken(node: RawNode) -> Append:
    append = node.ready().append
    assert append is not None
    return append


def acknowledged(node: RawNode) -> list[int]:
    return [
        message.index
        for message in node.ready().messages
        if isinstance(message, AppendResponse) and not message.rejected
    ]


def test_an_acknowledgement_waits_for_the_sync() -> None:
    _, node = follower_of_1([1], 1)
    node.step(AppendRequest(2, 1, 1, 1, 1, -1, 0, tuple(chain([1, 1, 1])[1:])), 0)
    ready = node.ready()
    assert ready.messages == ()
    assert ready.append is not None
    assert len(ready.append.entries) == 2
    node.on_durable(ready.append.sequence)
    assert acknowledged(node) == [3]


def test_acknowledgements_of_several_appends_become_one() -> None:
    _, node = follower_of_1([], 1)
    log = chain([1] * 6)
    for at in range(6):
        node.step(AppendRequest(2, 1, 1, at, 1 if at else 0, -1, 0, (log[at],)), 0)
    append = taken(node)
    assert len(append.entries) == 6
    node.on_durable(append.sequence)
    assert acknowledged(node) == [6]


def test_each_sync_acknowledges_what_it_covers() -> None:
    _, node = follower_of_1([], 1)
    log = chain([1] * 4)
    sequences = []
    for at in (0, 2):
        node.step(AppendRequest(2, 1, 1, at, 1 if at else 0, -1, 0, tuple(log[at : at + 2])), 0)
        sequences.append(taken(node).sequence)
    assert sequences == [1, 2]
    node.on_durable(1)
    assert acknowledged(node) == [2]
    node.on_durable(2)
    assert acknowledged(node) == [4]


def test_an_entry_of_this_term_is_not_acknowledged_before_the_term_is_durable() -> None:
    _, node = follower_of_1([1, 1], 1)
    node.step(AppendRequest(2, 1, 5, 2, 1, -1, 0, ()), 0)  # all of it durable, but term 5 is not
    append = taken(node)
    assert append.hard_state == HardState(5, 0, 0)
    assert acknowledged(node) == []
    node.on_durable(append.sequence)
    assert acknowledged(node) == [2]


def test_a_late_sync_of_an_older_term_acknowledges_nothing_to_the_new_leader() -> None:
    _, node = follower_of_1([1], 1)
    node.step(AppendRequest(2, 1, 1, 1, 1, -1, 0, tuple(chain([1, 1, 1])[1:])), 0)
    old = taken(node)
    node.step(Heartbeat(2, 3, 2, 0), 0)  # a new leader, of whose log nothing is known yet
    new = taken(node)
    node.on_durable(old.sequence)
    node.on_durable(new.sequence)
    assert acknowledged(node) == []
    assert node.durable_index == 3
    node.step(AppendRequest(2, 3, 2, 1, 1, -1, 0, ()), 0)
    assert acknowledged(node) == [1], "only what this leader is known to have"


def test_aba_an_entry_cut_and_appended_again_is_not_proved_by_its_first_sync() -> None:
    _, node = follower_of_1([1], 1)
    one, two_two = chain([1, 2])
    two_three = chain([3], first=2, prev_crc=one.crc)[0]
    node.step(AppendRequest(2, 1, 2, 1, 1, -1, 0, (two_two,)), 0)
    first = taken(node)
    node.step(AppendRequest(2, 3, 3, 1, 1, -1, 0, (two_three,)), 0)
    second = taken(node)
    node.step(AppendRequest(2, 1, 4, 1, 1, -1, 0, (two_two,)), 0)
    third = taken(node)
    assert first.entries == third.entries
    for append in (first, second):
        node.on_durable(append.sequence)
        assert node.durable_index == 1, "a crash now may leave term 3's entry at index 2"
        assert acknowledged(node) == []
    node.on_durable(third.sequence)
    assert node.durable_index == 2
    assert acknowledged(node) == [2]


def test_a_cut_takes_back_what_was_durable() -> None:
    _, node = follower_of_1([1, 2, 2], 2)
    assert node.durable_index == 3
    one = chain([1])[0]
    other = chain([3], first=2, prev_crc=one.crc)
    node.step(AppendRequest(2, 3, 3, 1, 1, -1, 0, tuple(other)), 0)
    assert node.durable_index == 1
    assert node.last_index == 2


def test_the_leaders_own_disk_is_one_of_the_majority() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.propose(1, b"x")
    cluster.take_ready(1)
    leader.step(AppendResponse(1, 2, 1, 2), 0)
    assert leader.commit == 1, "one follower alone, while the leader's own sync is under way"
    leader.on_durable(cluster.disks[1].sync())
    assert leader.commit == 2


def test_two_followers_commit_without_the_leaders_disk() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.propose(1, b"x")
    cluster.take_ready(1)
    for replica in (2, 3):
        leader.step(AppendResponse(1, replica, 1, 2), 0)
    assert leader.commit == 2
    assert leader.durable_index == 1
    assert [entry.index for entry in leader.ready().committed] == [2]


def test_entries_go_to_followers_and_to_the_own_disk_in_the_same_ready() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose(1, b"x")
    ready = cluster.nodes[1].ready()
    assert ready.append is not None
    assert {message.to for message in ready.messages} == {2, 3}


def test_commit_is_never_written_for_its_own_sake() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose(1, b"x")
    cluster.settle()
    written = [disk.hard_state.commit for disk in cluster.disks.values()]
    assert max(written) < 2
    assert {node.commit for node in cluster.nodes.values()} == {2}
    cluster.propose(1, b"y")
    append = cluster.nodes[1].ready().append
    assert append is not None
    assert append.hard_state == HardState(1, 1, 2), "it goes along with entries"


def test_restart_loses_what_was_not_synced_and_nothing_else() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose(1, b"x")
    cluster.settle()
    cluster.propose(1, b"y")
    cluster.take_ready(1)
    cluster.disks[1].pending.clear()
    cluster.crash(1)
    node = cluster.start(1)
    assert (node.last_index, node.term, node.vote) == (2, 1, 1)
    assert node.role is Role.FOLLOWER
    cluster.advance(3000)
    assert cluster.leader().serving


def test_a_commit_index_beyond_the_recovered_log_is_cut_back() -> None:
    cluster = Cluster(3)
    node = cluster.restart_with(2, chain([1, 1]), term=1, commit=9)
    assert node.commit == 2


def test_recovered_entries_that_are_committed_are_handed_out_again_to_be_applied() -> None:
    cluster = Cluster(3)
    node = cluster.restart_with(2, chain([1, 1, 1]), term=1, commit=2)
    assert node.has_ready()
    ready = node.ready()
    assert [entry.index for entry in ready.committed] == [1, 2]
    assert ready.append is None
    assert node.applied == 0
    with pytest.raises(AssertionError):
        node.applied_to(3)
    node.applied_to(2)
    assert not node.has_ready()


def test_what_must_wait_goes_at_once_when_all_is_durable_already() -> None:
    _, node = follower_of_1([], 3)
    node.step(VoteRequest(2, 1, 4, 0, 0), 0)
    node.on_durable(taken(node).sequence)
    node.ready()
    node.step(VoteRequest(2, 1, 4, 0, 0), 0)
    ready = node.ready()
    assert ready.append is None
    assert len(ready.messages) == 1


def test_sequences_are_confirmed_in_order_and_only_if_handed_out() -> None:
    durability = Durability(0, 0)
    assert durability.hand_out(3, 1) == 1
    assert durability.hand_out(5, 1) == 2
    with pytest.raises(AssertionError, match="never handed out"):
        durability.confirm(3)
    durability.confirm(2)
    durability.confirm(1)
    assert (durability.index, durability.confirmed) == (5, 2)


def test_an_amnesiac_that_a_late_sync_cures_may_campaign_although_nobody_speaks_any_more() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.propose(1, b"x")
    cluster.settle()
    node = power_cut(cluster, 2, keep=1)
    node.step(AppendRequest(2, 1, leader.term, 1, 1, -1, 2, tuple(cluster.log_of(1)[1:])), cluster.now)
    cluster.take_ready(2)
    node.tick(node.deadline_ms)
    assert node.deadline_ms == NEVER, "it must not campaign"
    assert node.amnesiac
    cluster.sync(2)
    assert not node.amnesiac
    node.tick(node.deadline_ms)
    assert node.role is Role.PRE_CANDIDATE
