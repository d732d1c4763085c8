"""Followers that need what the leader has dropped: the snapshot comes in chunks, then frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from host_kit import Host

from raftlog.broker import snapshots
from raftlog.broker.snapshots import SnapshotExchange
from raftlog.errors import LeadershipLost
from raftlog.raft.types import InstallSnapshot, InstallSnapshotResponse, Message
from raftlog.record.frame import FrameKind
from raftlog.testing.disk import CrashMode


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    made = Host(getattr(request, "param", 1))
    yield made
    made.close()


def fall_behind(host: Host) -> int:
    """Stop a follower, write, and drop on the others what it would need; returns its broker id."""
    host.produce(30)
    victim = host.followers()[0]
    host.cluster.kill_broker(victim)
    host.produce(60)
    for broker_id in list(host.cluster.brokers):
        host.compact(broker_id)
    assert host.leader.log.first_index > 40
    return victim


def chunks(host: Host) -> list[Message]:
    """All snapshot messages that brokers queue from now on."""
    seen: list[Message] = []
    for broker in host.cluster.brokers.values():
        peers = broker.peers
        before = peers.send

        def send(to: int, message: Message, before=before) -> None:  # type: ignore[no-untyped-def]
            if isinstance(message, InstallSnapshot | InstallSnapshotResponse):
                seen.append(message)
            before(to, message)

        peers.send = send  # type: ignore[method-assign]
    return seen


def test_a_follower_too_far_behind_gets_a_snapshot_and_then_frames(host: Host) -> None:
    victim = fall_behind(host)
    host.cluster.start_broker(victim)
    host.wait(host.is_equal)
    replica = host.replica(victim)
    assert replica.snapshots_installed == 1
    assert host.leader.snapshots_sent == 1
    assert replica.log.first_index == host.leader.log.first_index
    assert replica.log.start_offset == host.leader.log.start_offset > 0
    host.produce(30)
    host.wait(host.is_equal)
    # What it took over it can hand on, after a power cut too, and lead with.
    host.cluster.cut_power(victim, CrashMode.NONE)
    host.cluster.start_broker(victim)
    host.wait(host.is_equal)
    assert host.replica(victim).snapshots_installed == 0
    other = next(b for b in host.cluster.brokers if b not in (victim, host.leader_id))
    host.cluster.kill_broker(other)
    host.wait(lambda: host.leader_id is not None)
    if host.leader_id != victim:
        leader, replica = host.leader, host.replica(victim)
        leader.node.transfer_leadership(replica.replica_id, host.leader.host.now_ms())
        leader.host.mark(leader)
    host.wait(lambda: host.leader_id == victim)
    host.produce(10)


def test_chunks_resume_where_a_connection_broke(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "CHUNK_BYTES", 20)
    victim = fall_behind(host)
    host.cluster.start_broker(victim)
    seen = chunks(host)

    def sent() -> list[InstallSnapshot]:
        return [message for message in seen if isinstance(message, InstallSnapshot)]

    host.wait(lambda: len(sent()) >= 4)
    assert host.replica(victim).snapshots_installed == 0
    reached = max(message.position for message in sent())
    host.cluster.network.break_connections(f"broker-{host.leader_id}", f"broker-{victim}")
    before = len(sent())
    host.wait(host.is_equal)
    after = sent()[before:]
    assert host.replica(victim).snapshots_installed == 1
    total = after[0].total
    assert total > 8 * 20
    again = [message.position for message in after if 0 < message.position <= reached - 20]
    assert not again, "the first chunk asks where to go on, and that is where it goes on"
    data = sum(len(message.snapshot.data) for message in sent())
    assert data < total + 5 * 20


def test_a_snapshot_survives_a_change_of_leader(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "CHUNK_BYTES", 10)
    victim = fall_behind(host)
    host.cluster.start_broker(victim)
    seen = chunks(host)
    host.wait(lambda: len(seen) >= 10)
    old = host.leader_id
    assert old is not None
    host.cluster.kill_broker(old)
    # The victim's vote is needed, and its log is too short to win: the third one must lead, and go on.
    host.wait(lambda: host.leader_id is not None)
    assert host.leader_id not in (old, victim)
    host.wait(lambda: host.replica(victim).node.applied == host.leader.node.last_index)
    assert host.replica(victim).snapshots_installed == 1
    host.produce(5)
    host.cluster.start_broker(old)
    host.wait(host.is_equal)


MOMENTS: dict[str, Callable[[SnapshotExchange], bool]] = {
    "some chunks are here": lambda exchange: exchange._incoming is not None,
    "all are here": lambda exchange: exchange._storing,
    "the log is being replaced": lambda exchange: exchange.installing,
}


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_follower_that_dies_in_the_middle_of_it_comes_back_whole(
    moment: str, power: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "CHUNK_BYTES", 60)
    host = Host(7)
    victim = fall_behind(host)
    host.produce(20)
    deaths = 0
    for later in range(6):
        host.cluster.start_broker(victim)
        host.wait(lambda: host.find(victim) is not None)
        replica = host.replica(victim)
        exchange = replica._exchange
        host.wait(lambda: MOMENTS[moment](exchange) or host.is_equal())  # noqa: B023
        deaths += MOMENTS[moment](exchange)
        host.loop.run_for(0.0004 * later)
        if power:
            host.cluster.cut_power(victim)
        else:
            host.cluster.kill_broker(victim)
    assert deaths >= 1
    host.cluster.start_broker(victim)
    host.wait(host.is_equal)
    assert host.replica(victim).log.first_index == host.leader.log.first_index
    host.produce(5)
    host.wait(host.is_equal)
    host.close()


def test_a_deposed_leader_gives_up_its_own_end_of_the_log(host: Host) -> None:
    """It wrote on while it was cut off, past the index of the snapshot that then replaces it all."""
    host.produce(20)
    old = host.leader_id
    assert old is not None
    deposed = host.leader
    for other in host.followers():
        host.cluster.network.cut(f"broker-{old}", f"broker-{other}", both=True)
    failed: list[object] = []
    staged = deposed.check_serving()
    for _ in range(90):
        deposed.propose(staged, FrameKind.NOOP, b"", lambda result, error: failed.append(error))
    host.wait(lambda: host.leader_id not in (None, old))
    host.produce(60)
    for broker_id in host.cluster.brokers:
        if broker_id != old:
            host.compact(broker_id)
    snapshot_index = host.leader.log.first_index - 1
    assert deposed.log.last_index > snapshot_index > deposed.node.commit
    host.cluster.network.heal()
    host.wait(host.is_equal)
    assert deposed.snapshots_installed == 1
    assert deposed.log.first_index == snapshot_index + 1
    assert len(failed) == 90
    assert all(isinstance(error, LeadershipLost) for error in failed)
    host.cluster.cut_power(old, CrashMode.NONE)
    host.cluster.start_broker(old)
    host.wait(host.is_equal)
