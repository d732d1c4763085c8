"""Retention: the leader decides, the log says so, every replica carries it out; readers hear of it."""

from __future__ import annotations

import pytest
from host_kit import SEGMENT_BYTES, TOPIC, Host

from raftlog.broker import metadata as metadata_module
from raftlog.broker import partition as partition_module
from raftlog.broker.metadata import MetadataReplica, metadata_spec
from raftlog.broker.retention import Retention, last_index_below
from raftlog.client.admin import Admin
from raftlog.client.producer import ProducerCore
from raftlog.config import ProducerConfig, TopicConfig
from raftlog.errors import OffsetOutOfRange
from raftlog.raft.types import ConfState
from raftlog.storage.segment import SEGMENT_HEADER_BYTES, Segment
from raftlog.storage.spec import ReplicaSpec

MINUTE_S = 60.0


def segments(*rows: tuple[int, int, int]) -> list[Segment]:
    """Segments of (base offset, bytes, leader time of the last entry); all but the last are sealed."""
    spec = ReplicaSpec(1, TOPIC, bytes(16), 0, ConfState((1,)))
    made = []
    for base_offset, size, time in rows:
        segment = Segment(spec, base_offset + 1, base_offset, 1, 0, 4096)
        segment.append_position = SEGMENT_HEADER_BYTES + size
        segment.last_leader_time_ms = time
        segment.sealed = True
        made.append(segment)
    made[-1].sealed = False
    return made


THREE = ((0, 100, 1000), (10, 100, 2000), (20, 50, 3000))


@pytest.mark.parametrize(
    ("ms", "size", "now", "start"),
    [
        (None, None, 1 << 50, None),
        (1000, None, 2000, None),
        (1000, None, 2001, 10),
        (1000, None, 3001, 20),
        (0, None, 1 << 50, 20),  # the newest stays, however old
        (None, 151, 0, None),
        (None, 150, 0, 10),
        (None, 51, 0, 10),
        (None, 50, 0, 20),
        (None, 0, 0, 20),
        (1000, 51, 2001, 10),
        (10**9, 50, 2001, 20),
    ],
)
def test_what_may_go(ms: int | None, size: int | None, now: int, start: int | None) -> None:
    assert Retention(ms, size).start_offset(segments(*THREE), now) == start


def test_what_is_not_sealed_stays_and_all_behind_it() -> None:
    rows = segments(*THREE)
    rows[0].sealed = False
    assert Retention(0, 0).start_offset(rows, 1 << 50) is None
    assert Retention(0, 0).start_offset(rows[:1], 1 << 50) is None


def test_segments_below_an_offset() -> None:
    rows = segments(*THREE)
    assert [last_index_below(rows, offset) for offset in (0, 9, 10, 19, 20, 99)] == [0, 0, 10, 10, 20, 20]
    assert Retention.of(TopicConfig(retention_ms=-1, retention_bytes=5)) == Retention(None, 5)


def test_by_size_on_every_replica() -> None:
    host = Host(3, topic={"retention_bytes": 2 * SEGMENT_BYTES})
    host.produce(100)
    host.loop.run_for(30.0)
    replicas = [host.replica(broker_id) for broker_id in host.cluster.brokers]
    start = replicas[0].machine.log_start
    assert start > 40
    assert {(replica.machine.log_start, replica.log.start_offset) for replica in replicas} == {(start, start)}
    assert {replica.node.first_index for replica in replicas} == {replicas[0].log.first_index}
    kept = sum(segment.append_position for segment in replicas[0].log.segments)
    assert 2 * SEGMENT_BYTES <= kept < 4 * SEGMENT_BYTES
    for broker_id, replica in zip(host.cluster.brokers, replicas, strict=True):
        files = [path for path in host.cluster.disks[broker_id].paths() if f"/{replica.replica_id}/" in path]
        assert sum(path.endswith(".seg") for path in files) <= len(replica.log.segments)
        assert len([path for path in files if path.endswith(".snap")]) <= len(replica.log.segments)
    # Who begins at the beginning gets what there is; who insists on an offset is told.
    assert [record.offset for record in host.consume()] == list(range(start, host.count))
    assert [record.offset for record in host.consume(start=0)] == list(range(start, host.count))
    with pytest.raises(OffsetOutOfRange) as caught:
        host.consume("none", start=0)
    assert (caught.value.start, caught.value.end) == (start, host.count)
    # All of it survives a restart.
    for broker_id in list(host.cluster.brokers):
        host.cluster.cut_power(broker_id)
        host.cluster.start_broker(broker_id)
        host.wait(host.is_equal)
    host.produce(3)
    assert [record.offset for record in host.consume()] == list(range(start, host.count))
    host.close()


def test_by_age_in_leader_time_never_by_the_records_own() -> None:
    host = Host(4, topic={"retention_ms": int(MINUTE_S * 1000)})

    async def produce_ancient() -> None:
        client = host.client("ancient")
        producer = ProducerCore(client, ProducerConfig(linger_ms=0), host.loop, host.loop.call_soon)
        await producer.load_topic(TOPIC, 60.0)
        for number in range(60):
            await producer.send(TOPIC, number.to_bytes(4, "big") * 2000, None, (), 0, 1000 + number)
        producer.sender.stop()
        await client.close()

    host.cluster.run(produce_ancient(), node="ancient")
    host.produce(0)
    host.count = 60
    host.produce(60)
    host.loop.run_for(MINUTE_S / 2)
    assert host.leader.machine.log_start == 0
    host.produce(40)
    host.loop.run_for(MINUTE_S / 2 + 12)
    start = host.leader.machine.log_start
    assert 90 < start <= 120, "the second half minute's records are kept"
    assert all(host.replica(broker_id).log.start_offset == start for broker_id in host.cluster.brokers)
    host.loop.run_for(2 * MINUTE_S)
    assert 120 < host.leader.machine.log_start < 160, "the newest segment stays"
    assert host.consume()[-1].offset == 159
    host.close()


def test_a_follower_that_slept_through_it_gets_a_snapshot() -> None:
    host = Host(5, topic={"retention_bytes": SEGMENT_BYTES})
    host.produce(30)
    victim = host.followers()[0]
    host.cluster.cut_power(victim)
    host.produce(100)
    host.loop.run_for(20.0)
    assert host.leader.log.start_offset > 60
    host.cluster.start_broker(victim)
    host.wait(host.is_equal)
    assert host.replica(victim).snapshots_installed == 1
    assert host.replica(victim).log.start_offset == host.leader.log.start_offset
    host.close()


def test_idle_producers_are_forgotten_by_leader_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition_module, "EXPIRY_INTERVAL_MS", 40_000)
    host = Host(6, producer_expiry_ms=20_000)
    host.produce(3)
    host.loop.run_for(10.0)
    host.produce(3)
    assert len(host.leader.machine.producers) == 2
    applied = host.leader.node.applied
    host.loop.run_for(17.0)
    assert len(host.leader.machine.producers) == 1, "the first was idle for more than 20 s"
    host.loop.run_for(20.0)
    assert len(host.leader.machine.producers) == 1, "not so soon again"
    assert host.leader.node.applied == applied + 1
    host.loop.run_for(30.0)
    assert all(not host.replica(broker_id).machine.producers for broker_id in host.cluster.brokers)
    assert host.leader.node.applied == applied + 2
    host.loop.run_for(60.0)
    assert host.leader.node.applied == applied + 2, "nothing is proposed when there is nothing to do"
    host.produce(3)
    host.close()


def test_nothing_is_dropped_by_default() -> None:
    host = Host(8)
    host.produce(100)
    host.loop.run_for(1000 * MINUTE_S / 24)
    assert host.leader.machine.log_start == 0
    assert [record.offset for record in host.consume()] == list(range(100))
    host.close()


def test_metadata_drops_what_lies_below_its_newest_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a broker that missed it gets the image as a snapshot, and follows it."""

    def small(*arguments: object) -> ReplicaSpec:
        spec = metadata_spec(*arguments)  # type: ignore[arg-type]
        return ReplicaSpec(
            spec.replica_id, spec.topic, spec.topic_id, spec.partition, spec.conf, 4096, internal=True
        )

    monkeypatch.setattr(metadata_module, "metadata_spec", small)
    host = Host(9)

    def metadata(broker_id: int) -> MetadataReplica:
        return host.cluster.brokers[broker_id].metadata.replica

    async def make(first: int, count: int) -> None:
        client = host.client("admin")
        admin = Admin(client)
        for number in range(first, first + count):
            await admin.create_topic(f"topic-{number}", 1, 3, None, False, 60.0)
            if number % 10:
                await admin.delete_topic(f"topic-{number}", 60.0)
        await client.close()

    host.cluster.run(make(0, 20), node="admin")
    victim = next(b for b in host.cluster.brokers if metadata(b).staged is None)
    host.cluster.kill_broker(victim)
    host.cluster.run(make(20, 30), node="admin")
    for broker in list(host.cluster.brokers.values()):
        host.cluster.run(broker.store.flush(), node=f"broker-{broker.broker_id}")
    host.loop.run_for(10.0)
    leader = next(b for b in host.cluster.brokers if metadata(b).staged is not None)
    first = metadata(leader).log.first_index
    assert first > 40
    assert len(metadata(leader).log.segments) <= 2
    host.cluster.start_broker(victim)
    host.wait(lambda: metadata(victim).machine == metadata(leader).machine)
    assert metadata(victim).snapshots_installed == 1
    assert metadata(victim).log.first_index == first

    def follows() -> bool:
        topics = {replica.log.spec.topic for replica in host.cluster.brokers[victim].replicas()}
        return {f"topic-{number}" for number in (0, 10, 20, 30, 40)} <= topics

    host.wait(follows)
    for broker_id in list(host.cluster.brokers):
        host.cluster.cut_power(broker_id)
    for broker_id in list(host.cluster.disks):
        host.cluster.start_broker(broker_id)
    host.wait(lambda: any(metadata(b).staged is not None for b in host.cluster.brokers))
    assert len(metadata(victim).machine.topics) == 6
    host.cluster.run(make(60, 1), node="admin")
    host.close()
