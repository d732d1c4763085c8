"""flush=interval on brokers: what a kill, a power cut and a blackout leave, and who may lead after them."""

from __future__ import annotations

from typing import Any

import pytest
from host_kit import TOPIC, Host

from raftlog.errors import ConfigError
from raftlog.net.connection import RpcConnection
from raftlog.net.handshake import Local
from raftlog.net.rpc import BrokerStatusRequest, ReplicaRow
from raftlog.raft.raw_node import RawNode
from raftlog.raft.types import Role
from raftlog.storage.manifest import load_manifest
from raftlog.testing.books import Violation
from raftlog.testing.disk import CrashMode
from raftlog.testing.sim_cluster import PORT, broker_name

INTERVAL_MS = 2000


def loose_host(seed: int, *, brokers: int = 3, **topic: Any) -> Host:
    """A cluster whose topic is synced every two seconds."""
    settings = {"flush": "interval", "flush_interval_ms": INTERVAL_MS, **topic}
    host = Host(seed, brokers, topic=settings)
    host.loop.run_for(3.0)
    return host


def unsynced(host: Host, broker_id: int) -> int:
    return host.cluster.disks[broker_id].unsynced_bytes


def expect_losses(host: Host) -> None:
    """From here on acknowledged records may go: the watch, which cannot believe that, looks away."""
    host.loop.on_step = None


def status(host: Host, broker_id: int) -> ReplicaRow:
    """The topic's replica as a broker presents it."""

    async def ask() -> ReplicaRow:
        plan = host.cluster.plan
        connection = await RpcConnection.open(
            host.cluster.seams("asker", "asker"),
            broker_name(broker_id),
            PORT,
            Local(cluster_id=plan.cluster_id, role="client", client_id="asker"),
            plan.secret,
        )
        answer, _ = await connection.call(BrokerStatusRequest([TOPIC]), timeout=5.0)
        connection.close()
        (row,) = answer.replicas
        return row  # type: ignore[no-any-return]

    return host.cluster.run(ask(), node="asker")


def settings_of(host: Host) -> int:
    return host.leader.log.spec.flush_interval_ms


def test_records_are_acknowledged_before_they_are_synced_and_synced_in_time() -> None:
    host = loose_host(1)
    assert settings_of(host) == INTERVAL_MS
    host.produce(3)
    assert all(unsynced(host, broker_id) for broker_id in host.cluster.brokers)
    host.loop.run_for(INTERVAL_MS / 1000 + 0.1)
    assert not any(unsynced(host, broker_id) for broker_id in host.cluster.brokers)
    host.close()


def test_the_metadata_group_is_always_synced() -> None:
    host = loose_host(2)
    for broker in host.cluster.brokers.values():
        assert broker.metadata.replica.log.spec.flush_interval_ms == 0
    host.close()


def test_killed_processes_lose_nothing() -> None:
    host = loose_host(3)
    host.produce(5)
    for broker_id in list(host.cluster.brokers):
        host.cluster.kill_broker(broker_id)
    for broker_id in host.cluster.disks:
        host.cluster.start_broker(broker_id)
        assert not host.cluster.brokers[broker_id].store.rebooted
    host.wait(lambda: host.leader_id is not None)
    assert [int(record.value.split(b":")[0]) for record in host.consume()] == list(range(5))
    host.wait(host.is_equal)
    host.close()


def crash_and_cut(host: Host, *, seconds: float = 0.1) -> tuple[int, int, int]:
    """The classic: leader L and follower r have records that f has not; r loses power, L is cut off for so
    long. Returns (L, r, f)."""
    leader = host.leader_id
    assert leader is not None
    forgetful, third = host.followers()
    host.cluster.network.cut(broker_name(third), broker_name(leader), both=True)
    host.cluster.network.cut(broker_name(third), broker_name(forgetful), both=True)
    host.produce(5)
    host.cluster.cut_power(forgetful, CrashMode.NONE)
    host.cluster.network.heal()
    host.cluster.network.cut(broker_name(leader), broker_name(third), both=True)
    host.cluster.network.cut(broker_name(leader), broker_name(forgetful), both=True)
    host.cluster.start_broker(forgetful)
    host.wait(lambda: host.find(forgetful) is not None)
    host.loop.run_for(seconds)
    return leader, forgetful, third


def test_after_a_power_cut_it_does_not_vote_until_a_leader_has_cured_it() -> None:
    host = loose_host(4)
    leader, forgetful, third = crash_and_cut(host)
    replica = host.replica(forgetful)
    assert replica.node.amnesiac
    assert replica.node.last_index < host.replica(leader).node.last_index
    for _ in range(100):
        host.loop.run_for(0.1)
        assert host.replica(third).node.role is not Role.LEADER
        assert replica.node.role is Role.FOLLOWER
    assert "waits for a leader" in status(host, forgetful).fault
    host.cluster.network.heal()
    host.wait(lambda: host.leader_id is not None and not replica.node.amnesiac)
    assert host.leader_id == leader, "nobody else has the records"
    host.produce(1)
    assert [int(record.value.split(b":")[0]) for record in host.consume()] == list(range(6))
    host.wait(host.is_equal)
    assert status(host, forgetful).fault == ""
    manifest = host.cluster.run(load_manifest(host.cluster.disks[forgetful]))
    assert manifest is not None
    assert manifest.amnesiac == ()
    host.close()


def test_without_the_flag_records_would_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raftlog.raft.amnesia.matters", lambda *_: False)
    host = loose_host(4)
    with pytest.raises(Violation, match="leader completeness"):
        crash_and_cut(host, seconds=10.0)
    host.close()


def test_killed_before_it_was_cured_it_still_does_not_vote() -> None:
    host = loose_host(5)
    _, forgetful, _ = crash_and_cut(host)
    host.loop.run_for(1.0)
    host.cluster.kill_broker(forgetful)
    host.cluster.start_broker(forgetful)
    host.wait(lambda: host.find(forgetful) is not None)
    assert host.replica(forgetful).node.amnesiac
    host.cluster.network.heal()
    host.wait(lambda: not host.replica(forgetful).node.amnesiac)
    host.loop.run_for(0.5)
    host.cluster.kill_broker(forgetful)
    host.cluster.start_broker(forgetful)
    host.wait(lambda: host.find(forgetful) is not None)
    assert not host.replica(forgetful).node.amnesiac, "once cured, a mere kill forgets nothing"
    host.close()


def blackout(host: Host) -> None:
    for broker_id in list(host.cluster.brokers):
        host.cluster.cut_power(broker_id, CrashMode.NONE)
    for broker_id in host.cluster.disks:
        host.cluster.start_broker(broker_id)


def test_after_a_blackout_nobody_leads() -> None:
    host = loose_host(6)
    host.produce(5)
    blackout(host)
    host.wait(lambda: all(host.find(broker_id) for broker_id in host.cluster.disks))
    host.loop.run_for(30.0)
    assert host.leader_id is None
    assert all("waits for a leader" in status(host, broker_id).fault for broker_id in host.cluster.disks)
    host.close()


def test_after_a_blackout_nobody_leads_even_if_nothing_was_lost() -> None:
    """A replica knows that the machine went down, not what that took. Who had the topic made said that it
    shall wait then."""
    host = loose_host(9)
    host.produce(5)
    host.loop.run_for(INTERVAL_MS / 1000 + 0.1)
    assert not any(unsynced(host, broker_id) for broker_id in host.cluster.brokers)
    blackout(host)
    host.wait(lambda: all(host.find(broker_id) for broker_id in host.cluster.disks))
    host.loop.run_for(30.0)
    assert host.leader_id is None
    host.close()


def test_unless_the_topic_says_that_it_may_lose_its_last_interval() -> None:
    host = loose_host(6, unclean_leader_election=True)
    host.produce(5)
    expect_losses(host)
    blackout(host)
    host.wait(lambda: host.leader_id is not None)
    host.wait(host.is_equal)
    kept = len(host.consume())
    assert kept < 5, "the power cut took the last interval"
    host.count = kept
    host.produce(3)
    assert len(host.consume()) == kept + 3
    host.close()


def test_what_was_synced_survives_a_blackout() -> None:
    host = loose_host(7, unclean_leader_election=True)
    host.produce(5)
    host.loop.run_for(INTERVAL_MS / 1000 + 0.1)
    blackout(host)
    host.wait(lambda: host.leader_id is not None)
    assert len(host.consume()) == 5
    host.close()


@pytest.mark.parametrize("brokers", [1, 2])
def test_few_replicas_go_on_by_themselves(brokers: int) -> None:
    host = loose_host(8, brokers=brokers)
    host.produce(3)
    leader = host.leader_id
    assert leader is not None
    if brokers == 1:
        expect_losses(host)
    host.cluster.cut_power(leader, CrashMode.NONE)
    host.cluster.start_broker(leader)
    host.wait(lambda: host.leader_id is not None)
    if brokers == 2:
        assert [int(record.value.split(b":")[0]) for record in host.consume()] == list(range(3))
    host.wait(host.is_equal)
    host.close()


def test_a_leader_takes_back_what_the_former_incarnation_acknowledged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, bool]] = []
    restored = RawNode.peer_restored

    def spy(node: RawNode, replica: int, now_ms: int, *, forgot: bool = False) -> None:
        restored(node, replica, now_ms, forgot=forgot)
        if forgot and node.role is Role.LEADER:
            calls.append((replica, node.progress[replica].match == 0))

    host = loose_host(9)
    host.produce(3)
    follower = host.followers()[0]
    monkeypatch.setattr(RawNode, "peer_restored", spy)
    host.cluster.kill_broker(follower)
    host.cluster.start_broker(follower)
    host.wait(host.is_equal)
    assert calls
    assert all(was_reset for _, was_reset in calls)
    calls.clear()
    leader = host.leader_id
    assert leader is not None
    host.cluster.network.break_connections(broker_name(leader), broker_name(follower))
    host.produce(1)
    host.wait(host.is_equal)
    assert not calls, "the same incarnation has forgotten nothing"
    host.close()


def test_unread_acknowledgements_of_the_former_incarnation_are_dropped() -> None:
    """They stand in the buffers of connections that are closed before the leader talks to the new one."""
    host = loose_host(10)
    leader, follower = host.leader_id, host.followers()[0]
    assert leader is not None
    server = host.cluster.brokers[leader].server
    before = host.cluster.brokers[follower].identity.incarnation
    host.cluster.kill_broker(follower)
    host.cluster.start_broker(follower)
    host.wait(host.is_equal)
    known = [c.peer.incarnation for c in server.connections if c.peer.broker_id == follower]
    assert known
    assert min(known) > before
    host.close()


def test_an_internal_topic_is_always_synced() -> None:
    from raftlog.broker.metadata import check_topic

    with pytest.raises(ConfigError, match="internal topics are always synced"):
        check_topic("__groups", 1, {"flush": "interval"}, internal=True)
    assert check_topic("t", 1, {"flush": "interval"}) == {"flush": "interval"}
