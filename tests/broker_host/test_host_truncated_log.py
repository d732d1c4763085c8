"""Consumers that have read records which a power cut then took (KIP-320)."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from host_kit import TOPIC, Host

from raftlog.broker import history
from raftlog.client.consumer import ConsumerCore
from raftlog.config import ConsumerConfig
from raftlog.errors import LogTruncated, OffsetOutOfRange
from raftlog.net.rpc import FetchPartition
from raftlog.record.types import Record, TopicPartition
from raftlog.testing.disk import CrashMode

INTERVAL_MS = 2000
PLACE = TopicPartition(TOPIC, 0)


class Reader:
    """A consumer that stays while brokers come and go."""

    def __init__(self, host: Host, reset: str = "earliest") -> None:
        self.host = host
        self.core = host.cluster.run(self._open(reset), node="reader")
        self.seek(0)

    async def _open(self, reset: str) -> ConsumerCore:
        host = self.host
        client = host.client("reader")
        config = ConsumerConfig(auto_offset_reset=reset)
        core = ConsumerCore(client, config, (TOPIC,), host.loop, host.loop.call_soon)
        await core.start()
        return core

    def seek(self, offset: int) -> None:
        async def seek() -> None:
            self.core.seek(PLACE, offset)

        self.host.cluster.run(seek(), node="reader")

    def read(self, count: int) -> list[tuple[int, str]]:
        """(offset, beginning of the value) of the next ``count`` records."""
        return self.host.cluster.run(self._read(count), node="reader")

    async def _read(self, count: int) -> list[tuple[int, str]]:
        found: list[Record] = []
        while len(found) < count:
            found += self.core.take(count - len(found))
            await asyncio.sleep(0.01)
        return [(record.offset, record.value.split(b":")[0].decode()) for record in found]

    def close(self) -> None:
        self.host.cluster.run(self.core.close(), node="reader")


def shortened(reset: str = "earliest", **topic: Any) -> tuple[Host, Reader]:
    """Records 0 to 2 are synced, 3 to 7 are read by the reader and lost; the log ends at offset 3."""
    settings = {"flush": "interval", "flush_interval_ms": INTERVAL_MS, "unclean_leader_election": True}
    host = Host(21, topic={**settings, **topic})
    host.produce(3)
    host.loop.run_for(INTERVAL_MS / 1000 + 0.5)
    host.produce(5)
    reader = Reader(host, reset)
    assert [offset for offset, _ in reader.read(8)] == list(range(8))
    host.loop.on_step = None  # the watch cannot believe that what is committed goes
    for broker_id in list(host.cluster.brokers):
        host.cluster.cut_power(broker_id, CrashMode.NONE)
    for broker_id in host.cluster.disks:
        host.cluster.start_broker(broker_id)
    host.wait(lambda: host.leader_id is not None)
    assert host.leader.machine.next_offset == 3
    host.count = 3
    return host, reader


def rename(host: Host, count: int) -> None:
    """Acknowledge ``count`` records of other values at the offsets from the log's end on."""
    host.produce(count, size=4001)


@pytest.mark.parametrize("reset", ["earliest", "latest"])
@pytest.mark.parametrize("fresh", [1, 20], ids=["the log is shorter", "the log has grown again"])
def test_it_goes_on_where_the_two_agree(reset: str, fresh: int, caplog: pytest.LogCaptureFixture) -> None:
    host, reader = shortened(reset)
    rename(host, fresh)
    with caplog.at_level(logging.WARNING, "raftlog"):
        found = reader.read(fresh)
    assert [offset for offset, _ in found] == list(range(3, 3 + fresh))
    assert "does not hold the record before offset 8" in caplog.text
    rename(host, 2)
    assert [offset for offset, _ in reader.read(2)] == [3 + fresh, 4 + fresh]
    reader.close()
    host.close()


@pytest.mark.parametrize("fresh", [1, 20], ids=["the log is shorter", "the log has grown again"])
def test_with_none_it_is_raised_until_somebody_seeks(fresh: int) -> None:
    host, reader = shortened("none")
    rename(host, fresh)
    for _ in range(2):
        with pytest.raises(LogTruncated) as caught:
            reader.read(1)
        assert caught.value.offset == 3
    reader.seek(caught.value.offset)
    assert [offset for offset, _ in reader.read(fresh)] == list(range(3, 3 + fresh))
    reader.close()
    host.close()


def test_who_waits_at_an_end_that_is_another_one_is_told_at_once() -> None:
    host, reader = shortened("none")
    rename(host, 5)
    assert host.leader.machine.next_offset == 8, "just where the reader waits"
    with pytest.raises(LogTruncated):
        reader.read(1)
    reader.close()
    host.close()


def test_a_position_of_unknown_origin_is_only_out_of_range() -> None:
    host, reader = shortened("none")
    reader.seek(8)
    with pytest.raises(OffsetOutOfRange):
        reader.read(1)
    reader.close()
    host.close()


def check(host: Host, offset: int, term: int) -> int | None:
    """The offset that LogTruncated names; None: all is as it was read."""
    replica = host.leader
    wanted = FetchPartition(replica.log.spec.topic_id, 0, offset, term)

    async def ask() -> int | None:
        try:
            await history.check(replica, wanted)
        except LogTruncated as error:
            return int(error.offset)
        return None

    found = host.cluster.run(ask())
    suspect = history.is_suspect(replica, wanted)
    assert suspect or found is None, "the quick look may suspect too much, never too little"
    return found


def test_every_offset_and_term_in_memory_and_in_segments() -> None:
    """Records of two terms in small segments, compared with all that a consumer can have read."""
    settings = {"flush": "interval", "flush_interval_ms": INTERVAL_MS, "unclean_leader_election": True}
    host = Host(22, topic=settings)
    host.produce(30)
    first = host.leader.node.term
    host.wait(host.is_equal)
    leader = host.leader_id
    assert leader is not None
    host.cluster.kill_broker(leader)
    host.wait(lambda: host.leader_id is not None)
    host.produce(30)
    second = host.leader.node.term
    assert second > first
    for flushed in (False, True):
        if flushed:
            leader = host.leader_id
            assert leader is not None
            host.cluster.run(host.cluster.brokers[leader].store.flush(), node=f"broker-{leader}")
            log = host.leader.log
            log.memory.evict(log.flushed_index)
            assert log.term_before(30) is None, "the segment holds both terms"
            assert log.term_before(1) == first
            assert log.term_before(60) == second
        for offset in (1, 15, 29, 30):
            assert check(host, offset, first) is None
        for offset in (31, 45, 60, 61, 99):
            assert check(host, offset, first) == 30
            assert check(host, offset, second) == (None if offset <= 60 else 60)
        assert check(host, 20, second) == 19, "of that term there is nothing below 30"
        assert check(host, 45, first + second) == 44
    host.close()


def test_topics_that_sync_first_are_not_compared() -> None:
    host = Host(23)
    host.produce(3)
    topic_id = host.leader.log.spec.topic_id
    assert not history.is_suspect(host.leader, FetchPartition(topic_id, 0, 3, 77))
    assert not history.is_suspect(host.leader, FetchPartition(topic_id, 0, 9, 77))
    host.close()
