"""Fifty members, five hundred partitions: what a rebalance costs, and whom."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from group_kit import TOPIC, GroupWorld, Reader

from raftlog.broker.group_replica import GroupReplica
from raftlog.net.rpc import GroupHeartbeatRequest

PARTITIONS = 500
MEMBERS = 50


class Wire:
    """Counts the heartbeats that reach coordinators."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.beats: Counter[str] = Counter()
        heartbeat = GroupReplica.heartbeat

        def counted(replica: GroupReplica, request: GroupHeartbeatRequest, *rest: Any) -> None:
            self.beats[request.member_id] += 1
            heartbeat(replica, request, *rest)

        monkeypatch.setattr(GroupReplica, "heartbeat", counted)


def moved(readers: list[Reader]) -> int:
    return sum(len(reader.called("on_revoked")) for reader in readers)


def test_fifty_members_share_five_hundred_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(monkeypatch)
    with GroupWorld(PARTITIONS, brokers=1) as world:
        readers = [world.reader(f"r{number}") for number in range(MEMBERS)]
        took = world.until(lambda: world.is_shared(PARTITIONS))
        assert took < 3.0
        # docs/SEMANTICS.md tells users: 4 to 10 each, 298 in all
        assert max(wire.beats.values()) <= 12, "heartbeats from joining to all consuming"
        assert sum(wire.beats.values()) <= 6.5 * MEMBERS
        world.loop.run_for(1.0)
        assert moved(readers) < 2 * PARTITIONS
        before = {reader.name: set(reader.assigned) for reader in readers}
        revoked = moved(readers)
        known = set(wire.beats)
        wire.beats.clear()
        late = world.reader("late")
        assert world.until(lambda: world.is_shared(PARTITIONS)) < 0.5
        assert sum(wire.beats.values()) < 2 * MEMBERS, "one for each, and one more for who gives up"
        assert sum(count for name, count in wire.beats.items() if name not in known) <= 5
        assert moved(readers) - revoked == len(late.assigned) == PARTITIONS // (MEMBERS + 1)
        for reader in readers:
            assert reader.assigned <= before[reader.name], "nothing moves between those who stay"
        revoked = moved(readers)
        readers[0].kill()
        assert world.until(lambda: world.is_shared(PARTITIONS)) < 2.0
        assert moved(readers[1:]) == revoked - len(readers[0].called("on_revoked"))


def test_who_keeps_a_partition_reads_on_while_others_move() -> None:
    """Records come at a steady pace; the longest gap between two of a partition that stays is that of a quiet
    time."""
    with GroupWorld(12) as world:
        readers = [world.reader(f"r{number}", commit=False) for number in range(3)]
        world.until(lambda: world.is_shared(12))
        seen: dict[tuple[str, int], list[float]] = {}
        for reader in readers:
            spy(world, reader, seen)

        async def produce() -> None:
            async with world.log("producer").producer(linger_ms=0) as producer:
                for number in range(400):
                    delivery = await producer.send(TOPIC, b"%d" % number, partition=number % 12)
                    await delivery

        task = world.loop.run_as("producer", produce())
        world.loop.run_for(0.5)
        late = world.reader("late")
        world.until(task.done)
        kept = {place for place in seen if place not in late.assigned}
        assert len(kept) == 9
        gaps = [
            later - earlier
            for place in kept
            for earlier, later in zip(seen[place], seen[place][1:], strict=False)
        ]
        assert max(gaps) < 0.2, "a few turns of the producer"


def spy(world: GroupWorld, reader: Reader, seen: dict[tuple[str, int], list[float]]) -> None:
    poll = reader.consumer.poll

    async def timed(timeout: float = 1.0, max_records: int | None = None) -> Any:
        records = await poll(timeout, max_records)
        for record in records:
            seen.setdefault((record.topic, record.partition), []).append(world.loop.time())
        return records

    reader.consumer.poll = timed  # type: ignore[method-assign]
