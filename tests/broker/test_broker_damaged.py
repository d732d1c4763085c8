"""A broker of which one replica is damaged: everything else goes on."""

from __future__ import annotations

import pytest
from broker_kit import TOPIC, World, batch

from raftlog.broker.repair import Repairs
from raftlog.errors import DamagedData, UnknownReplica
from raftlog.net.rpc import DeleteTopicRequest
from raftlog.net.rpc_repair import LogFramesRequest, LogFramesResponse
from raftlog.storage.damage import BrokenLog
from raftlog.testing.sim_cluster import broker_name


def stop_with_segments(world: World) -> tuple[int, list[str]]:
    """A follower, stopped, whose replica has several segments: its broker id and their paths."""
    leader = world.leader()
    connection = world.dial(leader)
    for number in range(60):
        world.written(connection, batch(b"%d" % number + b"v" * 3_000))
    victim = (leader + 1) % 3
    world.until(lambda: world.committed(victim) >= 55)
    world.cluster.run(world.broker(victim).store.flush(), node=broker_name(victim))
    paths = [segment.path for segment in world.replica(victim).log.segments]
    assert len(paths) > 2
    world.cluster.kill_broker(victim)
    return victim, paths


async def lend_nothing(repairs: Repairs, request: LogFramesRequest) -> tuple[LogFramesResponse, bytes]:
    return LogFramesResponse(), b""


def test_a_damaged_replica_is_out_of_service_and_its_broker_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Repairs, "lend_frames", lend_nothing)
    with World(topic_config={"segment_bytes": 64 << 10}) as world:
        victim, paths = stop_with_segments(world)
        disk = world.cluster.disks[victim]
        world.cluster.run(disk.remove(paths[0]))
        world.cluster.start_broker(victim)
        store = world.broker(victim).store
        assert [type(error) for error in store.damaged.values()] == [BrokenLog]
        with pytest.raises(UnknownReplica):
            world.written(world.dial(victim), batch(b"x"))
        assert world.written(world.dial(world.leader()), batch(b"the others go on")) == 60
        world.create("new", 1, 3)
        new = world.broker(victim).metadata.image.topics
        world.until(lambda: "new" in new)
        world.until(lambda: (new["new"].topic_id, 0) in world.broker(victim).hosting.by_place)
        assert disk.content(paths[1]), "what is damaged is not touched"
        world.call(world.dial(world.metadata_leader()), DeleteTopicRequest(TOPIC))
        world.until(lambda: not store.damaged)
        world.until(lambda: not any(path in disk.paths() for path in paths))


def test_a_broker_whose_metadata_is_damaged_says_which_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Repairs, "lend_frames", lend_nothing)
    with World() as world:
        victim = (world.metadata_leader() + 1) % 3
        world.cluster.run(world.broker(victim).store.flush(), node=broker_name(victim))
        (segment,) = world.broker(victim).metadata.replica.log.segments
        world.cluster.kill_broker(victim)
        disk = world.cluster.disks[victim]
        kept = disk.content(segment.path)
        disk.put(segment.path, kept[:50])
        with pytest.raises(DamagedData, match=segment.path):
            world.cluster.start_broker(victim)
        disk = world.cluster.disks[victim] = disk.kill()
        disk.put(segment.path, kept)
        world.cluster.start_broker(victim)
        assert world.written(world.dial(world.leader()), batch(b"a")) == 0
