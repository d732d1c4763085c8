"""Disks that stall, and replicas whose data is lost or does not check."""

from __future__ import annotations

import msgspec
import pytest
from host_kit import TOPIC, Host

from raftlog.broker.repair import Repairs
from raftlog.errors import NotLeader, RaftlogError, StorageFull
from raftlog.net.connection import RpcConnection
from raftlog.net.handshake import Local
from raftlog.net.rpc import BrokerStatusRequest, ReplicaRow
from raftlog.net.rpc_repair import LogFramesRequest, LogFramesResponse
from raftlog.raft.types import Role
from raftlog.record.frame import FrameKind
from raftlog.storage.manifest import load_manifest, store_manifest
from raftlog.testing.sim_cluster import PORT, broker_name


def stall(host: Host, broker_id: int, seconds: float) -> None:
    host.loop.call_soon(host.cluster.disks[broker_id].stall, seconds)
    host.loop.run_for(0.001)


def write(host: Host, *, size: int = 0) -> list[RaftlogError | None]:
    """Propose something small on the leader; the list fills when the outcome is known."""
    outcomes: list[RaftlogError | None] = []
    leader = host.leader
    leader.propose(
        leader.check_serving(), FrameKind.NOOP, bytes(size), lambda _, error: outcomes.append(error)
    )
    return outcomes


def test_a_leader_whose_disk_stalls_hands_over_and_does_not_come_back_while_it_stalls() -> None:
    host = Host(11)
    host.produce(3)
    old = host.leader_id
    assert old is not None
    slow = host.leader
    term = slow.node.term
    stall(host, old, 12.0)
    outcomes = write(host)
    began = host.loop.time()
    host.wait(lambda: host.leader_id not in (None, old), 5.0)
    election_timeout = host.cluster.config.election_timeout_ms / 1000
    assert election_timeout <= host.loop.time() - began < election_timeout + 1.0
    assert outcomes == [None], "the others committed it"
    assert host.leader.node.term > term
    with pytest.raises(NotLeader):
        slow.check_serving()
    # Even without a leader it does not campaign before its disk moves again.
    others = host.followers()
    for other in [*others, host.leader_id]:
        if other != old:
            assert other is not None
            host.cluster.network.cut(broker_name(old), broker_name(other), both=True)
    before = slow.node.term
    while host.loop.time() < began + 11.5:
        host.loop.run_for(0.1)
        assert slow.node.role is Role.FOLLOWER
        assert slow.node.term == before
    host.cluster.network.heal()
    host.wait(host.is_equal)
    host.produce(3)
    host.close()


def test_a_short_stall_changes_nothing() -> None:
    host = Host(12)
    host.produce(3)
    old, term = host.leader_id, host.leader.node.term
    assert old is not None
    stall(host, old, 0.8)
    outcomes = write(host)
    host.loop.run_for(5.0)
    assert (host.leader_id, host.leader.node.term) == (old, term)
    assert outcomes == [None]
    host.close()


def test_a_leader_alone_stays_however_long_its_disk_stalls() -> None:
    host = Host(13, brokers=1)
    host.produce(3)
    term = host.leader.node.term
    stall(host, 0, 5.0)
    outcomes = write(host)
    host.loop.run_for(4.0)
    assert host.leader_id == 0
    assert [record.offset for record in host.consume()] == [0, 1, 2], "reads go on"
    host.loop.run_for(3.0)
    assert outcomes == [None]
    assert host.leader.node.term == term
    host.close()


def test_a_full_disk_is_no_stall_reads_go_on() -> None:
    host = Host(14)
    host.produce(3)
    old, term = host.leader_id, host.leader.node.term
    assert old is not None
    disk = host.cluster.disks[old]
    disk.capacity = disk.used_bytes
    write(host, size=20_000)  # goes straight to its segment, which must grow
    store = host.cluster.brokers[old].store
    host.wait(lambda: isinstance(store.fault, StorageFull))
    host.loop.run_for(4.0)
    assert store.oldest_pending_since is not None
    assert (host.leader_id, host.leader.node.term) == (old, term)
    with pytest.raises(StorageFull):
        host.leader.check_serving()
    assert [record.offset for record in host.consume()] == [0, 1, 2]
    disk.capacity = None
    host.wait(host.is_equal)
    host.close()


# -- replicas out of service ---------------------------------------------------------------------------------


def status(host: Host, broker_id: int) -> list[ReplicaRow]:
    """What the broker answers to BrokerStatus about the topic."""

    async def ask() -> list[ReplicaRow]:
        client = host.client("operator")
        host_name, port = broker_name(broker_id), PORT
        local = Local(host.cluster.plan.cluster_id, "client", client_id="operator")
        connection = await RpcConnection.open(
            client.seams, host_name, port, local, host.cluster.plan.secret, purpose="control", timeout=5.0
        )
        answer, _ = await connection.call(BrokerStatusRequest([TOPIC]), timeout=5.0)
        connection.close()
        await client.close()
        return list(answer.replicas)

    return host.cluster.run(ask(), node="operator")


def check_out_of_service(host: Host, victim: int, what: str) -> None:
    """It is shown with its fault and never votes; the others go on while they are a majority."""
    assert host.find(victim) is None
    (row,) = status(host, victim)
    assert what in row.fault
    assert row.role == "out of service"
    host.produce(5)
    old = host.leader_id
    assert old not in (None, victim)
    host.cluster.kill_broker(old)
    # Two of three are there; one of them has forgotten what it promised, so nobody may win.
    host.loop.run_for(10.0)
    assert host.leader_id is None
    host.cluster.start_broker(old)
    host.wait(lambda: host.leader_id is not None)
    host.produce(5)
    assert [record.offset for record in host.consume()] == list(range(host.count))
    assert host.find(victim) is None


def test_a_damaged_replica_that_nobody_can_repair_is_shown_and_never_votes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Repairs, "lend_frames", lend_nothing)
    host = Host(15)
    host.produce(60)
    victim = host.followers()[0]
    replica = host.replica(victim)
    host.cluster.run(host.cluster.brokers[victim].store.flush(), node=broker_name(victim))
    # Its first segment vanishes: what the checkpoint vouches for is not there.
    path = replica.log.segments[0].path
    host.cluster.kill_broker(victim)
    host.cluster.run(host.cluster.disks[victim].remove(path))
    host.cluster.start_broker(victim)
    assert list(host.cluster.brokers[victim].store.damaged) == [replica.replica_id]
    host.wait(lambda: host.leader_id is not None)
    check_out_of_service(host, victim, "the segment is missing")
    # Deleting the topic takes it away too, and the broker creates and serves what comes after.
    host.cluster.run(host.replace_topic(), node="admin")
    host.count = 0
    host.wait(lambda: host.find(victim) is not None and host.leader_id is not None)
    assert not host.cluster.brokers[victim].store.damaged
    host.produce(3)
    host.wait(host.is_equal)
    host.close()


async def lend_nothing(repairs: Repairs, request: LogFramesRequest) -> tuple[LogFramesResponse, bytes]:
    return LogFramesResponse(), b""


def test_a_lost_replica_never_votes_and_another_takes_its_place() -> None:
    """The manifest says that it was created here once; nothing else is left of it."""
    host = Host(16)
    host.produce(20)
    victim = host.followers()[0]
    host.cluster.kill_broker(victim)
    host.cluster.run(host.replace_topic(), node="admin")
    host.count = 0
    host.wait(lambda: host.leader_id is not None)
    host.produce(5)
    broker = next(iter(host.cluster.brokers.values()))
    partition = broker.metadata.image.topics[TOPIC].partitions[0]
    replica_id = next(replica_id for replica_id, broker_id in partition.replicas if broker_id == victim)
    spec = msgspec.structs.replace(host.leader.log.spec, replica_id=replica_id)
    disk = host.cluster.disks[victim]

    async def pretend() -> None:
        manifest = await load_manifest(disk)
        assert manifest is not None
        await store_manifest(disk, msgspec.structs.replace(manifest, replicas=(*manifest.replicas, spec)))

    host.cluster.run(pretend())
    old = host.leader_id
    assert old is not None
    host.cluster.kill_broker(old)
    host.cluster.start_broker(victim)
    store = host.cluster.brokers[victim].store
    assert list(store.lost) == [replica_id]
    # Two of three are there; one of them has forgotten what it promised, and the one that is to take its
    # place is in no configuration: nobody may win.
    host.loop.run_for(10.0)
    assert host.leader_id is None
    lost = next(row for row in status(host, victim) if row.replica_id == replica_id)
    assert "nothing is left" in lost.fault
    host.cluster.start_broker(old)
    host.wait(lambda: not store.lost and host.is_equal())
    assert host.replica(victim).replica_id > replica_id
    assert host.replica(victim).node.role is Role.FOLLOWER
    host.produce(5)
    assert [record.offset for record in host.consume()] == list(range(host.count))
    host.close()
