"""Fetch at the broker: long polls, limits, several partitions, and what stands in segments only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from broker_kit import RAW, World, batch, values_of

from raftlog.broker import fetch
from raftlog.errors import LeadershipLost, RaftlogError, from_wire
from raftlog.net.connection import RpcConnection
from raftlog.net.frames import FRAME_BYTES_MAX
from raftlog.net.rpc import (
    OFFSET_EARLIEST,
    OFFSET_LATEST,
    DeleteTopicRequest,
    FetchPartition,
    FetchRequest,
    FetchResponse,
    ListOffsetsRequest,
    OffsetQuery,
    WireError,
)
from raftlog.record.batch import BATCH_BYTES_LIMIT


@pytest.fixture
def world() -> Iterator[World]:
    """Three brokers, a topic of three partitions that one broker can be asked for."""
    with World(brokers=3, partitions=3) as made:
        yield made


def error_of(found: WireError | None) -> str:
    assert found is not None
    return type(from_wire(found.name, found.message, found.details)).__name__


def led_by(world: World, broker: int) -> int:
    """A partition that ``broker`` leads."""
    return next(partition for partition in range(3) if world.leader(partition) == broker)


def test_a_long_poll_is_woken_by_the_commit(world: World) -> None:
    leader = world.leader()
    reader, writer = world.dial(leader), world.dial(leader)
    poll = world.ask(reader, world.fetch_request(0, wait_ms=20_000))
    world.loop.run_for(1.0)
    assert not poll.done()
    before = world.loop.time()
    world.written(writer, batch(b"news"))
    response, payload = world.answer(poll)
    assert values_of(payload) == [b"news"]
    assert response.partitions[0].committed == 1
    assert world.loop.time() - before < 0.5


def test_a_long_poll_does_not_show_what_is_not_committed(world: World) -> None:
    leader = world.leader()
    reader, writer = world.dial(leader), world.dial(leader)
    world.isolate(leader)
    poll = world.ask(reader, world.fetch_request(0, wait_ms=300))
    produced = world.produce(writer, batch(b"doubtful"))
    world.until(lambda: world.replica(leader).log.end_offset == 1)
    response, payload = world.answer(poll)
    assert response.partitions[0].error is None
    assert response.partitions[0].committed == 0
    assert not payload
    assert not produced.done()


def test_a_fetch_ends_where_the_committed_log_ends(world: World) -> None:
    """Whatever else stands in the leader's log may yet be lost."""
    leader = world.leader()
    reader, writer = world.dial(leader), world.dial(leader)
    world.written(writer, batch(b"kept"))
    world.isolate(leader)
    doubtful = [world.produce(writer, batch(b"doubtful", timestamp_ms=at)) for at in (2_000, 9_000)]
    world.until(lambda: world.replica(leader).log.end_offset == 3)
    response, payload = world.call(reader, world.fetch_request(0))
    assert values_of(payload) == [b"kept"]
    assert response.partitions[0].committed == 1
    queries = [OffsetQuery(world.topic_id, 0, at) for at in (OFFSET_LATEST, 5_000)]
    answers = world.call(reader, ListOffsetsRequest(queries))[0].answers
    # another may lead already and have acknowledged more: of an end, this one can say nothing
    assert [answer.error and answer.error.name for answer in answers] == ["NotLeader", "NotLeader"]
    world.until(lambda: all(each.done() for each in doubtful))
    assert all(isinstance(each.exception(), LeadershipLost) for each in doubtful)


def test_a_long_poll_ends_with_nothing_after_its_time(world: World) -> None:
    leader = world.leader()
    reader = world.dial(leader)
    before = world.loop.time()
    response, payload = world.call(reader, world.fetch_request(0, wait_ms=700))
    assert 0.7 <= world.loop.time() - before < 0.8
    assert (response.partitions[0].error, response.partitions[0].committed, len(payload)) == (None, 0, 0)
    assert not world.replica(leader).readers_waiting, "nobody is left waiting"


def test_nobody_waits_for_ever_whatever_was_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "WAIT_MS_MAX", 3_000)
    leader = world.leader()
    reader = world.dial(leader)
    world.loop.run_as(RAW, send_and_forget(reader, world.fetch_request(0, wait_ms=2**60)))
    world.until(lambda: bool(world.replica(leader).readers_waiting))
    world.until(lambda: not world.replica(leader).readers_waiting, 3.1)


async def send_and_forget(connection: RpcConnection, request: FetchRequest) -> None:
    connection.request(request).add_done_callback(lambda future: future.exception())


@pytest.mark.parametrize("wait_ms", [0, -1])
def test_without_waiting_the_answer_comes_at_once(world: World, wait_ms: int) -> None:
    reader = world.dial(world.leader())
    before = world.loop.time()
    response, _ = world.call(reader, world.fetch_request(0, wait_ms=wait_ms))
    assert response.partitions[0].error is None
    assert world.loop.time() - before < 0.1


def test_what_is_there_is_answered_at_once_however_long_one_would_wait(world: World) -> None:
    connection = world.dial(world.leader())
    world.written(connection, batch(b"there"))
    before = world.loop.time()
    assert world.fetched(connection, 0, wait_ms=20_000) == [b"there"]
    assert world.loop.time() - before < 0.1


def test_a_poll_over_several_partitions_is_woken_by_any_of_them() -> None:
    with World(brokers=1, partitions=3) as alone:
        reader, writer = alone.dial(0), alone.dial(0)
        wanted = [FetchPartition(alone.topic_id, partition, 0) for partition in range(3)]
        poll = alone.ask(reader, FetchRequest(20_000, 1 << 20, wanted))
        alone.loop.run_for(0.5)
        assert not poll.done()
        alone.written(writer, batch(b"of one"), partition=1)
        response, payload = alone.answer(poll)
        assert [row.length > 0 for row in response.partitions] == [False, True, False]
        assert values_of(payload) == [b"of one"]
        for partition in range(3):
            assert not alone.replica(0, partition).readers_waiting


def test_the_rows_of_several_partitions_follow_one_another_in_the_payload() -> None:
    with World(brokers=1, partitions=3) as world:
        connection = world.dial(0)
        for partition in (2, 0):
            world.written(connection, batch(b"%d" % partition, b"x"), partition)
        wanted = [FetchPartition(world.topic_id, partition, 0) for partition in (2, 1, 0)]
        response, payload = world.call(connection, FetchRequest(1_000, 1 << 20, wanted))
        ends = [row.length for row in response.partitions]
        assert sum(ends) == len(payload)
        assert ends[1] == 0
        assert values_of(payload[: ends[0]]) == [b"2", b"x"]
        assert values_of(payload[ends[0] :]) == [b"0", b"x"]


def test_one_bad_partition_does_not_spoil_the_others(world: World) -> None:
    leader = world.leader()
    mine = led_by(world, leader)
    other = next(partition for partition in range(3) if world.leader(partition) != leader)
    connection = world.dial(leader)
    world.written(connection, batch(b"good"), mine)
    wanted = [
        FetchPartition(b"?" * 16, 0, 0),
        FetchPartition(world.topic_id, other, 0),
        FetchPartition(world.topic_id, mine, 99),
        FetchPartition(world.topic_id, mine, -1),
        FetchPartition(world.topic_id, mine, 0),
    ]
    response, payload = world.call(connection, FetchRequest(5_000, 1 << 20, wanted))
    errors = [row.error and error_of(row.error) for row in response.partitions]
    assert errors == ["UnknownReplica", "NotLeader", "OffsetOutOfRange", "OffsetOutOfRange", None]
    assert values_of(payload) == [b"good"]


@pytest.mark.parametrize("limit", [1, 0, -5])
def test_at_least_one_batch_comes_whatever_the_limit(world: World, limit: int) -> None:
    connection = world.dial(world.leader())
    for value in (b"a" * 3_000, b"b" * 3_000):
        world.written(connection, batch(value))
    assert world.fetched(connection, 0, bytes_max=limit) == [b"a" * 3_000]
    assert world.fetched(connection, 1, partition_bytes_max=limit) == [b"b" * 3_000]


def test_bytes_max_is_shared_by_the_partitions() -> None:
    with World(brokers=1, partitions=2) as world:
        connection = world.dial(0)
        for partition in (0, 1):
            for _ in range(4):
                world.written(connection, batch(b"x" * 1_000), partition)
        wanted = [FetchPartition(world.topic_id, partition, 0) for partition in (0, 1)]
        response, payload = world.call(connection, FetchRequest(0, 3_500, wanted))
        assert [row.length > 0 for row in response.partitions] == [True, True]
        assert len(payload) < 5_000
        response, payload = world.call(connection, FetchRequest(0, 1_000, wanted))
        assert [row.length > 0 for row in response.partitions] == [True, False]
        assert response.partitions[1].committed == 4, "it says that there is more"


def test_a_leader_that_loses_office_answers_its_long_polls(world: World) -> None:
    leader = world.leader()
    reader = world.dial(leader)
    poll = world.ask(reader, world.fetch_request(0, wait_ms=25_000))
    world.until(lambda: bool(world.replica(leader).readers_waiting))
    before = world.loop.time()
    world.isolate(leader)
    response, _ = world.answer(poll)
    assert error_of(response.partitions[0].error) == "NotLeader"
    assert world.loop.time() - before < 10.0


def test_a_deleted_topic_answers_its_long_polls(world: World) -> None:
    leader = world.leader()
    poll = world.ask(world.dial(leader), world.fetch_request(0, wait_ms=25_000))
    world.until(lambda: bool(world.replica(leader).readers_waiting))
    before = world.loop.time()
    world.call(world.dial(world.metadata_leader()), DeleteTopicRequest("orders"))
    response, _ = world.answer(poll)
    assert error_of(response.partitions[0].error) == "UnknownReplica"
    assert world.loop.time() - before < 5.0


def test_a_poll_whose_connection_broke_is_no_burden(world: World) -> None:
    leader = world.leader()
    reader, writer = world.dial(leader), world.dial(leader)
    poll = world.ask(reader, world.fetch_request(0, wait_ms=25_000))
    world.until(lambda: bool(world.replica(leader).readers_waiting))
    reader.close()
    world.until(poll.done)
    assert isinstance(poll.exception(), RaftlogError)
    assert world.written(writer, batch(b"a")) == 0
    assert world.fetched(writer) == [b"a"]


# -- from segments -------------------------------------------------------------------------------------------

COUNT = 120


def cold_world() -> World:
    """A broker whose log was rolled through several segments, started anew: memory holds only the end."""
    world = World(brokers=1, topic_config={"segment_bytes": 64 << 10})
    connection = world.dial(0)
    for number in range(COUNT):
        assert world.written(connection, batch(value_at(number), timestamp_ms=1_000 + number)) == number
    world.cluster.run(world.broker(0).store.flush(), node="broker-0")
    world.cluster.kill_broker(0)
    world.cluster.start_broker(0)
    world.leader()
    assert len(world.replica(0).log.segments) > 2
    world.cluster.disks[0].cached = False
    return world


def value_at(number: int) -> bytes:
    return b"%d-" % number + b"v" * 2_000


def test_what_stands_in_segments_only_is_read_whatever_the_limit() -> None:
    with cold_world() as world:
        assert world.replica(0).log.try_read(0, 10, 1 << 20) is None, "not in memory"
        connection = world.dial(0)
        for bytes_max in (1, 5_000, 1 << 20):
            offset, steps = 0, 0
            while offset < COUNT:
                values = world.fetched(connection, offset, bytes_max=bytes_max, wait_ms=1_000)
                first = next(n for n in range(COUNT) if value_at(n) == values[0])
                assert first <= offset < first + len(values)
                assert values == [value_at(n) for n in range(first, first + len(values))]
                offset, steps = first + len(values), steps + 1
            assert steps > 1


def test_damage_in_a_segment_is_an_error_of_that_partition_only() -> None:
    with cold_world() as world:
        world.create("other")
        other = world.broker(0).metadata.image.topics["other"].topic_id
        log = world.replica(0).log
        path = log.segments[0].path
        disk = world.cluster.disks[0]
        disk.put(path, disk.content(path)[:100])
        connection = world.dial(0)
        wanted = [FetchPartition(world.topic_id, 0, 20), FetchPartition(other, 0, 0)]
        response, payload = world.call(connection, FetchRequest(0, 1 << 20, wanted))
        assert error_of(response.partitions[0].error) == "Busy", "it may be repaired"
        assert response.partitions[1].error is None
        assert not payload
        disk.cached = True
        response, _ = world.call(connection, FetchRequest(0, 1 << 20, wanted))
        assert error_of(response.partitions[0].error) == "Busy", "found out without waiting"
        assert response.partitions[1].error is None
        assert world.fetched(connection, COUNT - 1) == [value_at(COUNT - 1)]
        assert world.written(connection, batch(b"goes on")) == COUNT


# -- offsets -------------------------------------------------------------------------------------------------


def test_offsets_by_position_and_by_time() -> None:
    with cold_world() as world:
        connection = world.dial(0)
        asked = [OFFSET_EARLIEST, OFFSET_LATEST, 0, 1_000, 1_037, 1_000 + COUNT - 1, 1_000 + COUNT]
        queries = [OffsetQuery(world.topic_id, 0, at) for at in asked]
        queries.append(OffsetQuery(b"?" * 16, 0, OFFSET_LATEST))
        response, _ = world.call(connection, ListOffsetsRequest(queries))
        *found, unknown = response.answers
        assert [answer.offset for answer in found] == [0, COUNT, 0, 0, 37, COUNT - 1, COUNT]
        assert all(answer.error is None for answer in found)
        assert error_of(unknown.error) == "UnknownReplica"


def test_an_answer_is_never_above_what_a_frame_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer that asks for more than there is room for gets as much as there is room for."""
    assert fetch.FETCH_BYTES_MAX + BATCH_BYTES_LIMIT < FRAME_BYTES_MAX
    monkeypatch.setattr(fetch, "FETCH_BYTES_MAX", 5_000)
    with World(brokers=1) as world:
        connection = world.dial(0)
        for number in range(10):
            world.written(connection, batch(value_at(number)))
        response: FetchResponse
        request = world.fetch_request(0, bytes_max=2**40, partition_bytes_max=2**40)
        response, payload = world.call(connection, request)
        assert values_of(payload) == [value_at(0), value_at(1)]
        assert response.partitions[0].committed == 10
