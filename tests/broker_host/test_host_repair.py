"""Damaged replicas are repaired in place by their peers, while clients go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from host_kit import Host
from test_host_disks import status

from raftlog.broker.partition import PartitionReplica
from raftlog.errors import DamagedData, StorageFailed
from raftlog.net.rpc_repair import LogFramesRequest, LogFramesResponse
from raftlog.state.partition import SetLogStart
from raftlog.storage.segment import SEGMENT_HEADER_BYTES
from raftlog.storage.snapshot_file import snapshot_path
from raftlog.storage.verify import VerifyReport, verify
from raftlog.testing.sim_cluster import broker_name

RECORDS = 80
"""Enough for several segments."""


def filled(seed: int, brokers: int = 3, **broker: Any) -> Host:
    """A cluster whose partition has several segments, flushed on every broker."""
    host = Host(seed, brokers, **broker)
    host.produce(RECORDS)
    host.wait(host.is_equal)
    for broker_id, broker_ in host.cluster.brokers.items():
        host.cluster.run(broker_.store.flush(), node=broker_name(broker_id))
    return host


def paths_of(host: Host, broker_id: int) -> list[str]:
    """The topic's segments on a broker that runs."""
    return [segment.path for segment in host.replica(broker_id).log.segments if segment.header_written]


def damage(host: Host, broker_id: int, *places: float, files: slice = slice(None)) -> None:
    """Flip a bit at these parts of the files' frames, under the running broker."""
    disk = host.cluster.disks[broker_id]
    for path in paths_of(host, broker_id)[files]:
        size = len(disk.content(path)) - SEGMENT_HEADER_BYTES
        for place in places:
            disk.flip(path, SEGMENT_HEADER_BYTES + int(size * place), 1 << 5)


def forget_indexes(host: Host, broker_id: int) -> None:
    """Without index files recovery reads every frame."""
    disk = host.cluster.disks[broker_id]
    for path in disk.paths():
        if path.endswith(".idx"):
            del disk._nodes[path]


def restart(host: Host, broker_id: int) -> None:
    host.cluster.kill_broker(broker_id)
    host.cluster.start_broker(broker_id)


def is_repaired(host: Host, broker_ids: Iterable[int]) -> Callable[[], bool]:
    def all_well() -> bool:
        return all(
            host.cluster.brokers[broker_id].repairs.completed > 0
            and not host.cluster.brokers[broker_id].store.ward.patients
            and host.find(broker_id) is not None
            for broker_id in broker_ids
        )

    return all_well


def verified(host: Host, broker_id: int) -> VerifyReport:
    """Stop the broker and check its directory."""
    host.cluster.kill_broker(broker_id)
    disk = host.cluster.disks[broker_id].copy()
    return host.cluster.run(verify(disk))


def evict(host: Host, broker_id: int) -> None:
    """Forget the frames that are cached: from now on they come from the segments."""
    log = host.replica(broker_id).log
    log.memory_starts_at(log.flushed_index + 1)


def check_all(host: Host) -> None:
    """Everything is there, on all replicas and for clients, and all bytes check."""
    host.wait(host.is_equal)
    assert [record.offset for record in host.consume()] == list(range(host.count))
    for broker_id in list(host.cluster.brokers):
        report = verified(host, broker_id)
        assert not report.problems, report.problems
    host.close()


def test_a_damaged_replica_is_repaired_votes_and_leads_again() -> None:
    host = filled(1)
    victim = host.followers()[0]
    paths = paths_of(host, victim)
    whole = {path: host.cluster.disks[victim].content(path) for path in paths}
    damage(host, victim, 0.2, 0.6, files=slice(0, 2))
    del host.cluster.disks[victim]._nodes[paths[2]]
    host.cluster.kill_broker(victim)
    forget_indexes(host, victim)
    host.produce(5)
    host.cluster.start_broker(victim)
    store = host.cluster.brokers[victim].store
    assert list(store.damaged)
    host.wait(is_repaired(host, [victim]))
    assert {path: host.cluster.disks[victim].content(path) for path in paths[:-1]} == {
        path: whole[path] for path in paths[:-1]
    }
    host.wait(host.is_equal)
    # It is needed for a majority, and then it is the only one that may lead.
    others = [broker_id for broker_id in host.cluster.brokers if broker_id != victim]
    host.cluster.kill_broker(others[0])
    host.wait(lambda: host.leader_id is not None)
    host.produce(5)
    host.wait(lambda: host.replica(victim).node.last_index == host.replica(others[1]).node.last_index)
    if host.leader_id != victim:
        host.cluster.run(_transfer(host, victim), node=broker_name(others[1]))
    host.wait(lambda: host.leader_id == victim)
    host.produce(5)
    host.cluster.start_broker(others[0])
    check_all(host)


async def _transfer(host: Host, broker_id: int) -> None:
    leader = host.leader
    leader.node.transfer_leadership(host.replica(broker_id).replica_id, leader.host.now_ms())
    leader.host.mark(leader)


def test_two_of_three_are_damaged_at_different_places_and_the_third_is_down() -> None:
    host = filled(2)
    first, second, third = host.cluster.brokers
    damage(host, first, 0.3)
    damage(host, second, 0.7)
    for broker_id in (first, second, third):
        host.cluster.kill_broker(broker_id)
        forget_indexes(host, broker_id)
    for broker_id in (first, second):
        host.cluster.start_broker(broker_id)
        assert host.cluster.brokers[broker_id].store.damaged
    host.wait(is_repaired(host, [first, second]))
    host.wait(lambda: host.leader_id is not None)
    host.produce(10)
    host.cluster.start_broker(third)
    check_all(host)


def test_it_waits_for_a_peer_and_says_for_what() -> None:
    host = filled(3)
    victim, *others = host.cluster.brokers
    damage(host, victim, 0.5)
    for broker_id in (victim, *others):
        host.cluster.kill_broker(broker_id)
    forget_indexes(host, victim)
    host.cluster.start_broker(victim)
    host.loop.run_for(20.0)
    (row,) = status(host, victim)
    assert row.role == "out of service"
    assert "waits for a peer that has entries" in row.fault
    for broker_id in others:
        host.cluster.start_broker(broker_id)
    host.wait(is_repaired(host, [victim]))
    assert not status(host, victim)[0].fault
    host.produce(5)
    check_all(host)


# -- rot that is found while the replica runs ----------------------------------------------------------------


def test_rot_under_a_consumer_is_repaired_and_never_served() -> None:
    host = filled(4)
    leader = host.leader_id
    assert leader is not None
    evict(host, leader)
    damage(host, leader, 0.1, 0.5, 0.9)
    assert [record.offset for record in host.consume()] == list(range(RECORDS))
    broker = host.cluster.brokers[leader]
    assert broker.repairs.completed > 0
    assert host.leader_id == leader, "a quick repair costs no leadership"
    host.produce(5)
    check_all(host)


def test_a_leader_that_cannot_be_repaired_gives_up() -> None:
    host = filled(5)
    old = host.leader_id
    assert old is not None
    evict(host, old)
    replica = host.replica(old)
    term = replica.node.term
    for other in host.followers():  # they can be led to, and not be asked
        host.cluster.brokers[other].repairs.lend_frames = _lend_nothing  # type: ignore[method-assign]
    damage(host, old, 0.5, files=slice(0, 1))
    with pytest.raises(DamagedData):
        host.cluster.run(_read(replica), node=broker_name(old))
    host.wait(lambda: host.leader_id not in (None, old), 10.0)
    assert host.leader.node.term > term
    (row,) = status(host, old)
    assert "waits for a peer" in row.fault
    # The others go first as long as there are any.
    for _ in range(2):
        leader = host.leader_id
        assert leader is not None
        restart(host, leader)
        host.cluster.brokers[leader].repairs.lend_frames = _lend_nothing  # type: ignore[method-assign]
        host.wait(lambda: host.leader_id is not None)
        assert host.leader_id != old
    for other in host.followers():
        if other != old:
            restart(host, other)
    host.wait(is_repaired(host, [old]))
    host.produce(5)
    host.wait(host.is_equal)
    host.close()


async def _lend_nothing(request: LogFramesRequest) -> tuple[LogFramesResponse, bytes]:
    return LogFramesResponse(), b""


def test_what_nobody_has_any_more_does_not_end_the_rest() -> None:
    """The same entry is damaged on every replica: one of them leads all the same."""
    host = filled(9)
    old = host.leader_id
    assert old is not None
    for broker_id in host.cluster.brokers:
        evict(host, broker_id)
        damage(host, broker_id, 0.5, files=slice(0, 1))
    for broker_id in host.cluster.brokers:
        with pytest.raises(DamagedData):
            host.cluster.run(_read(host.replica(broker_id)), node=broker_name(broker_id))
    host.loop.run_for(30.0)
    host.wait(lambda: host.leader_id is not None)
    assert not any(broker.repairs.completed for broker in host.cluster.brokers.values())
    leader, term = host.leader_id, host.leader.node.term
    host.produce(5)
    host.loop.run_for(30.0)
    assert (host.leader_id, host.leader.node.term) == (leader, term), "and goes on to"
    assert [record.offset for record in host.consume(start=RECORDS)] == list(range(RECORDS, host.count))
    assert leader is not None
    host.cluster.kill_broker(leader)
    host.wait(lambda: host.leader_id is not None)
    host.produce(5)
    host.close()


async def _read(replica: PartitionReplica) -> None:
    log = replica.log
    index = log.first_index
    while index <= log.flushed_index:
        index = (await log.entries(index, log.last_index + 1, 1 << 16))[-1].index + 1


def test_a_follower_far_behind_makes_a_leader_find_its_rot() -> None:
    host = filled(6, cache_bytes_max=0)
    leader = host.leader_id
    assert leader is not None
    behind = host.followers()[0]
    host.cluster.kill_broker(behind)
    before = host.count
    host.produce(60)
    host.cluster.run(host.cluster.brokers[leader].store.flush(), node=broker_name(leader))
    host.wait(lambda: host.leader_id == leader)
    evict(host, leader)
    damage(host, leader, 0.4)
    assert host.count == before + 60
    host.cluster.start_broker(behind)
    host.wait(host.is_equal)
    host.wait(is_repaired(host, [leader]))
    assert [record.offset for record in host.consume()] == list(range(host.count))
    host.close()


def test_rot_that_replaying_finds_at_the_start_keeps_the_rest_of_the_broker_going() -> None:
    """Recovery trusts the index files; reading the state back finds the damage."""
    host = filled(7)
    victim = host.followers()[0]
    for name in host.cluster.disks[victim].paths():
        if name.endswith(".snap"):
            del host.cluster.disks[victim]._nodes[name]
    damage(host, victim, 0.5, files=slice(0, 1))
    restart(host, victim)
    assert host.find(victim) is None
    (row,) = status(host, victim)
    assert row.role == "out of service"
    host.wait(is_repaired(host, [victim]))
    host.produce(5)
    check_all(host)


# -- snapshots -----------------------------------------------------------------------------------------------


def fall_behind(seed: int) -> tuple[Host, int, int, int]:
    """(host, leader, the other one that is up, one that is down and needs a snapshot)."""
    host = Host(seed)
    host.produce(30)
    behind = host.followers()[0]
    host.cluster.kill_broker(behind)
    host.produce(60)
    for broker_id in list(host.cluster.brokers):
        host.compact(broker_id)
    leader = host.leader_id
    assert leader is not None
    (other,) = host.followers()
    return host, leader, other, behind


def spoil_border(host: Host, broker_id: int) -> None:
    log = host.replica(broker_id).log
    host.cluster.disks[broker_id].flip(snapshot_path(log.spec.replica_id, log.first_index - 1), 30)


def test_a_leader_with_a_damaged_border_snapshot_gets_it_from_a_peer() -> None:
    host, leader, _, behind = fall_behind(8)
    spoil_border(host, leader)
    host.cluster.start_broker(behind)
    host.wait(host.is_equal)
    assert host.replica(behind).snapshots_installed == 1
    assert host.cluster.brokers[leader].repairs.completed == 1
    assert host.leader_id == leader
    host.produce(5)
    host.wait(host.is_equal)
    host.close()


def test_a_border_snapshot_that_nobody_has_is_missed_until_retention_passes_it() -> None:
    """Records below a newer one do not go for its sake (simulator, seed 60048: they went)."""
    host, leader, other, behind = fall_behind(10)
    for broker_id in (leader, other):
        spoil_border(host, broker_id)
    first = host.replica(leader).log.first_index
    host.cluster.start_broker(behind)
    host.produce(40)
    host.loop.run_for(10.0)
    assert [host.replica(broker_id).log.first_index for broker_id in (leader, other)] == [first, first]
    assert host.replica(behind).snapshots_installed == 0
    given_up = SetLogStart(host.count - 5)
    for broker_id in (leader, other):
        replica = host.replica(broker_id)
        if replica.staged is not None:
            host.loop.run_as(broker_name(broker_id), _command(replica, given_up))
    host.wait(host.is_equal)
    assert host.replica(behind).log.first_index > first
    host.close()


async def _command(leader: PartitionReplica, command: SetLogStart) -> None:
    leader._command(leader.check_serving(), command)


# -- what cannot be repaired ---------------------------------------------------------------------------------


def test_a_replica_whose_missing_entries_are_nowhere_any_more_is_replaced() -> None:
    host = Host(11)
    host.produce(60)
    host.wait(host.is_equal)
    behind = host.followers()[0]
    before = host.replica(behind).replica_id
    host.cluster.run(host.cluster.brokers[behind].store.flush(), node=broker_name(behind))
    damage(host, behind, 0.5, files=slice(0, 1))
    host.cluster.kill_broker(behind)
    forget_indexes(host, behind)
    host.produce(60)
    for broker_id in list(host.cluster.brokers):
        host.compact(broker_id)
    host.cluster.start_broker(behind)
    assert list(host.cluster.brokers[behind].store.damaged) == [before]
    host.wait(lambda: host.find(behind) is not None)
    host.wait(host.is_equal)
    assert host.replica(behind).replica_id != before
    host.produce(5)
    host.wait(host.is_equal)
    host.close()


def test_a_crash_in_the_middle_of_a_repair_is_only_a_delay() -> None:
    host = filled(14)
    victim = host.followers()[0]
    damage(host, victim, 0.2, 0.5, 0.8)
    host.cluster.kill_broker(victim)
    forget_indexes(host, victim)
    for attempt in range(8):
        host.cluster.start_broker(victim)
        broker = host.cluster.brokers[victim]
        host.loop.run_for(0.004 * (attempt + 1))
        assert attempt > 3 or not broker.repairs.completed
        host.cluster.cut_power(victim)
    host.cluster.start_broker(victim)
    host.wait(lambda: host.find(victim) is not None)
    host.produce(5)
    check_all(host)


def test_a_repair_whose_sync_failed_is_done_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes stand there when it is tried again, and nothing is left to do but to open the replica
    (simulator, seed 700400)."""
    host = filled(15)
    victim = host.followers()[0]
    damage(host, victim, 0.5, files=slice(0, 1))
    host.cluster.kill_broker(victim)
    forget_indexes(host, victim)
    disk = host.cluster.disks[victim]
    failed: list[str] = []

    def sync(path: str, node: Any) -> None:
        if path.endswith(".seg") and not failed:
            failed.append(path)
            raise StorageFailed(f"{path}: Input/output error", path=path)
        type(disk)._sync(disk, path, node)

    monkeypatch.setattr(disk, "_sync", sync)
    host.cluster.start_broker(victim)
    host.wait(is_repaired(host, [victim]))
    assert failed
    host.produce(5)
    check_all(host)


# -- the metadata group --------------------------------------------------------------------------------------


def test_a_damaged_replica_of_the_metadata_group_is_repaired_first() -> None:
    host = filled(12)
    victim = host.followers()[0]
    log = host.cluster.brokers[victim].metadata.replica.log
    path = log.segments[0].path
    disk = host.cluster.disks[victim]
    whole = disk.content(path)
    host.cluster.kill_broker(victim)
    disk = host.cluster.disks[victim]
    del disk._nodes[path]
    host.cluster.start_broker(victim)
    host.produce(5)
    host.wait(host.is_equal)
    assert disk.content(path)[: len(whole)] == whole
    check_all(host)


def test_a_broker_with_damaged_metadata_and_nobody_to_help_does_not_start() -> None:
    host = filled(13)
    victim, *others = host.cluster.brokers
    path = host.cluster.brokers[victim].metadata.replica.log.segments[0].path
    for broker_id in (victim, *others):
        host.cluster.kill_broker(broker_id)
    disk = host.cluster.disks[victim]
    kept = disk.content(path)
    disk.put(path, kept[:50])
    with pytest.raises(DamagedData, match=path):
        host.cluster.start_broker(victim)
    for broker_id in (*others, victim):
        host.cluster.start_broker(broker_id)
    host.wait(host.is_equal)
    check_all(host)
