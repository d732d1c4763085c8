"""One produce request for many partitions: each batch is settled by itself, and waits for no other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from broker_kit import RAW, World, batch

from raftlog.errors import (
    LeadershipLost,
    ProtocolError,
    RaftlogError,
    StorageFailed,
    UnknownReplica,
    from_wire,
)
from raftlog.net.connection import RpcConnection
from raftlog.net.rpc import ProducePartition, ProduceRequest, ProduceResponse

PARTITIONS = 4


@pytest.fixture
def world() -> Iterator[World]:
    """One broker that leads all partitions of a topic."""
    with World(1, partitions=PARTITIONS) as made:
        for partition in range(PARTITIONS):
            made.leader(partition)
        yield made


class Asked:
    """A request that was sent, and what came of it, part by part."""

    def __init__(
        self, world: World, connection: RpcConnection, to: Sequence[tuple[int, bytes]], acks: int = -1
    ) -> None:
        self.parts: list[ProduceResponse] = []
        self.error: RaftlogError | None = None
        self.batches = [encoded for _, encoded in to]
        partitions = [ProducePartition(world.topic_id, partition) for partition, _ in to]
        lengths = [len(encoded) for encoded in self.batches[:-1]]
        self.request = ProduceRequest(partitions, lengths, acks)

        async def ask() -> None:
            connection.ask(self.request, self.batches, self._answered)

        world.cluster.run(ask(), node=RAW)

    def _answered(self, response: ProduceResponse | None, _: Any, error: RaftlogError | None) -> None:
        if response is None:
            self.error = error
        else:
            self.parts.append(response)

    @property
    def over(self) -> bool:
        return self.error is not None or any(not part.numbers for part in self.parts)

    @property
    def outcomes(self) -> dict[int, int | type[RaftlogError]]:
        """Number of the batch -> its offset, or why there is none."""
        left = dict.fromkeys(range(len(self.batches)))
        found: dict[int, int | type[RaftlogError]] = {}
        for part in self.parts:
            numbers = part.numbers or list(left)
            for number, each in zip(numbers, part.batches, strict=True):
                del left[number]
                wire = each.error
                refusal = None if wire is None else type(from_wire(wire.name, wire.message, wire.details))
                found[number] = refusal or each.base_offset
        return found


def test_batches_of_many_partitions_come_back_in_one_answer(world: World) -> None:
    connection = world.dial(0)
    world.written(connection, batch(b"before"), 2)
    asked = Asked(world, connection, [(n, batch(b"%d" % n)) for n in range(PARTITIONS)])
    world.until(lambda: asked.over)
    assert len(asked.parts) == 1, "what is synced together is answered together"
    assert asked.outcomes == {0: 0, 1: 0, 2: 1, 3: 0}
    for n in range(PARTITIONS):
        assert world.fetched(connection, partition=n)[-1] == b"%d" % n


def test_batches_of_one_partition_are_taken_in_order(world: World) -> None:
    connection = world.dial(0)
    sent = [batch(b"%d" % n, producer=7, epoch=1, sequence=n) for n in range(3)]
    asked = Asked(world, connection, [(1, encoded) for encoded in sent])
    world.until(lambda: asked.over)
    assert asked.outcomes == {0: 0, 1: 1, 2: 2}
    assert world.fetched(connection, partition=1) == [b"0", b"1", b"2"]


def test_what_is_refused_is_refused_alone(world: World) -> None:
    connection = world.dial(0)
    rubbish = bytearray(batch(b"rubbish"))
    rubbish[-1] ^= 1
    asked = Asked(
        world, connection, [(0, batch(b"a")), (9, batch(b"?")), (1, bytes(rubbish)), (2, batch(b"b"))]
    )
    world.until(lambda: asked.over)
    assert {n: what if isinstance(what, int) else what.__name__ for n, what in asked.outcomes.items()} == {
        0: 0,
        1: "UnknownReplica",
        2: "CorruptBatch",
        3: 0,
    }
    errors = world.broker(0).server.errors
    assert (errors["UnknownReplica"], errors["CorruptBatch"]) == (1, 1), "they count as answered errors"
    assert world.broker(0).server.in_flight_bytes == 0


def test_a_request_of_one_batch_is_refused_as_such(world: World) -> None:
    with pytest.raises(UnknownReplica):
        world.written(world.dial(0), batch(b"?"), 9)


def test_a_partition_without_a_quorum_does_not_keep_the_news_of_others() -> None:
    with World(3, partitions=PARTITIONS) as world:
        leader = world.leader(0)
        led = [n for n in range(PARTITIONS) if world.leader(n) == leader]
        while len(led) < 2:
            pytest.fail("one broker leads two of four partitions")
        connection = world.dial(leader)
        for broker_id in set(world.cluster.brokers) - {leader}:
            world.replica(broker_id, led[0]).retire(StorageFailed("for the test"))
        asked = Asked(world, connection, [(n, batch(b"%d" % n)) for n in led])
        world.until(lambda: len(asked.parts) == 1, 0.1)
        assert asked.parts[0].numbers == list(range(1, len(led)))
        assert [each.error for each in asked.parts[0].batches] == [None] * (len(led) - 1)
        in_flight = world.broker(leader).server.in_flight_bytes
        assert in_flight < sum(map(len, asked.batches)), "what is answered is not held against the client"
        world.until(lambda: asked.over)
        assert asked.outcomes[0].__name__ == "LeadershipLost"  # type: ignore[union-attr]
        assert world.broker(leader).server.in_flight_bytes == 0


@pytest.mark.parametrize(
    ("lengths", "partitions"),
    [([], 2), ([10, 10], 2), ([10], 1), ([-1], 2), ([10_000], 2), ([10], 0), ([], 0)],
    ids=["too few", "too many", "for one", "negative", "more than came", "of nothing", "nothing"],
)
def test_lengths_that_do_not_fit_are_refused_and_nothing_is_written(
    world: World, lengths: list[int], partitions: int
) -> None:
    connection = world.dial(0)
    to = [ProducePartition(world.topic_id, n) for n in range(partitions)]
    payload = (batch(b"a"), batch(b"b"))
    with pytest.raises(ProtocolError):
        world.call(connection, ProduceRequest(to, lengths), payload)
    world.tell(connection, ProduceRequest(to, lengths, acks=0), payload)
    assert world.written(connection, batch(b"first")) == 0, "on the same connection"


def test_unacknowledged_batches_are_written_each_by_itself(world: World) -> None:
    connection = world.dial(0)
    sent = [batch(b"a"), b"rubbish", batch(b"c"), batch(b"?")]
    to = [ProducePartition(world.topic_id, n) for n in (0, 1, 2, 9)]
    world.tell(connection, ProduceRequest(to, list(map(len, sent[:-1])), acks=0), sent)
    world.until(lambda: world.replica(0, 2).committed_offset == 1)
    assert [world.replica(0, n).committed_offset for n in range(PARTITIONS)] == [1, 0, 1, 0]


def test_a_bug_that_one_batch_meets_is_not_told_of_the_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = world.dial(0)
    reported: list[dict[str, Any]] = []
    world.loop.set_exception_handler(lambda _, context: reported.append(context))

    def divide(*_: object) -> None:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(world.replica(0, 1), "produce", divide)
    asked = Asked(world, connection, [(n, batch(b"%d" % n)) for n in range(PARTITIONS)])
    world.until(lambda: asked.over)
    assert asked.outcomes == {0: 0, 1: RaftlogError, 2: 0, 3: 0}
    assert [type(context["exception"]) for context in reported] == [ZeroDivisionError]


@pytest.mark.parametrize("step", ["hand_out", "store", "follow_up"])
def test_a_bug_in_the_cycle_ends_the_replica_that_met_it_and_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    connection = world.dial(0)

    def broken() -> bool:
        raise AssertionError("an invariant")

    monkeypatch.setattr(world.replica(0, 1), step, broken)
    asked = Asked(world, connection, [(n, batch(b"%d" % n)) for n in range(PARTITIONS)])
    world.until(lambda: asked.over)
    assert asked.outcomes == {0: 0, 1: LeadershipLost, 2: 0, 3: 0}
    assert [world.replica(0, n).fault is None for n in range(PARTITIONS)] == [True, False, True, True]
