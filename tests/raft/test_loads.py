"""Entries that are no longer in memory: the leader asks for them, the host reads, the window holds."""

from __future__ import annotations

from typing import Any

from raft_cluster import Cluster, chain

from raftlog.raft.progress import ProgressState
from raftlog.raft.types import AppendResponse, HeartbeatResponse, LoadRequest, Message


def no_answers(message: Message) -> bool:
    return not isinstance(message, AppendResponse | HeartbeatResponse)


def behind(**settings: Any) -> Cluster:
    """Leader 1 has 30 entries, none of them in memory; follower 3 has none of them and can be reached."""
    cluster = Cluster(3, cache_bytes_max=0, **settings)
    cluster.elect(1)
    cluster.isolate(3)
    for number in range(30):
        cluster.propose(1, b"%d" % number)
        cluster.settle()
    cluster.nodes[1].peer_lost(3, cluster.now)
    cluster.heal()
    cluster.sent.clear()
    assert cluster.nodes[1].entries_in_memory(2, 3) is None
    assert cluster.nodes[1].entries_in_memory(32, 32) == []
    return cluster


def test_entries_below_memory_are_loaded_one_request_at_a_time() -> None:
    cluster = behind(append_bytes_max=200)
    leader = cluster.nodes[1]
    leader.peer_restored(3, cluster.now)
    ready = leader.ready()
    (probe,) = ready.messages
    assert probe.entries == (), "a guess does not load"
    assert ready.loads == ()
    cluster.deliver(probe)
    cluster.settle(only=no_answers)
    leader.step(AppendResponse(1, 3, 1, 1), cluster.now)
    ready = leader.ready()
    assert ready.loads == (LoadRequest(3, 2, 200),)
    assert ready.messages == ()
    cluster.propose(1, b"x")
    assert leader.ready().loads == (), "one at a time"
    entries = cluster.log_of(1)[1:4]
    leader.on_loaded(3, entries)
    sent = [message for message in leader.ready().messages if message.to == 3 and message.entries]
    assert [message.entries for message in sent] == [tuple(entries)]
    assert sent[0].prev_crc == entries[0].prev_crc
    cluster.settle()


def test_a_follower_far_behind_catches_up_through_loads() -> None:
    cluster = behind(append_bytes_max=200, inflight_messages_max=2)
    cluster.nodes[1].peer_restored(3, cluster.now)
    cluster.settle()
    assert cluster.nodes[3].applied == 31
    assert cluster.log_of(3) == cluster.log_of(1)


def test_a_loaded_entry_waits_for_room_in_the_window() -> None:
    cluster = behind(append_bytes_max=100, inflight_bytes_max=100)
    leader, progress = cluster.nodes[1], cluster.nodes[1].progress[3]
    log = cluster.log_of(1)
    leader.peer_restored(3, cluster.now)
    leader.ready()
    leader.step(AppendResponse(1, 3, 1, 1), cluster.now)
    assert leader.ready().loads == (LoadRequest(3, 2, 100),)
    leader.on_loaded(3, log[1:3])
    room = 100 - progress.inflight_bytes
    assert 0 < room < log[3].size
    assert leader.ready().loads == (LoadRequest(3, 4, room),)
    leader.on_loaded(3, log[3:4])  # storage reads one at least
    assert progress.inflight_messages == 1
    assert progress.inflight_bytes <= 100
    cluster.propose(1, b"x")
    assert leader.ready().loads == (), "it would not fit again"
    leader.step(AppendResponse(1, 3, 1, 3), cluster.now)
    assert leader.ready().loads == (LoadRequest(3, 4, 100),)
    leader.on_loaded(3, log[3:5])
    assert progress.next == 6
    assert progress.room_needed == 0


def test_a_failed_load_is_tried_again_at_the_next_answer() -> None:
    cluster = behind()
    leader = cluster.nodes[1]
    leader.peer_restored(3, cluster.now)
    while not cluster.loads:
        cluster.take_ready(1)
        if cluster.wire:
            cluster.deliver(cluster.wire.popleft())
        for replica in (2, 3):
            cluster.take_ready(replica)
            cluster.sync(replica)
    cluster.loads.clear()
    leader.on_load_failed(3)
    cluster.settle()
    assert cluster.nodes[3].applied == 1
    cluster.advance(100)
    assert cluster.nodes[3].applied == 31
    leader.on_load_failed(3)
    leader.on_load_failed(42)
    assert leader.progress[3].state is ProgressState.REPLICATE


def test_loads_that_come_too_late_are_dropped() -> None:
    cluster = behind()
    leader = cluster.nodes[1]
    log = cluster.log_of(1)
    leader.on_loaded(3, log[1:3])
    leader.on_loaded(42, log[1:3])
    leader.peer_restored(3, cluster.now)
    while not cluster.loads:
        cluster.take_ready(1)
        if cluster.wire:
            cluster.deliver(cluster.wire.popleft())
        for replica in (2, 3):
            cluster.take_ready(replica)
            cluster.sync(replica)
    cluster.loads.clear()
    leader.on_loaded(3, chain([9], first=2, prev_crc=log[0].crc))  # cut before this term began
    ready = leader.ready()
    assert not [message for message in ready.messages if message.to == 3 and message.entries]
    assert len(ready.loads) == 1, "asked again"
    leader.on_loaded(3, [])
    assert len(leader.ready().loads) == 1
    leader.on_loaded(3, log[5:6])  # not where the follower stands
    assert len(leader.ready().loads) == 1
    cluster.serve_load()
    leader.on_loaded(3, log[1:])
    cluster.settle()
    assert cluster.nodes[3].applied == 31
