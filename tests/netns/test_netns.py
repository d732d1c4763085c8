"""Brokers on hosts of their own, whose network fails: minority leaders acknowledge nothing, the majority goes
on, and there is one history at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from netns_kit import Network, Writer, wait_for, why_not

from raftlog.record.types import Record
from raftlog.storage.offline import entries_above, look_into
from raftlog.storage.real_disk import RealDisk

REASON = why_not()
pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(REASON), reason=REASON)]


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    made = Network(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.remove()


def consumed(network: Network) -> list[str]:
    with network.log.consumer("t") as consumer:
        records: list[Record] = list(consumer.records(until="end"))
    assert all(after.offset == before.offset + 1 for before, after in pairwise(records))
    return [(record.value or b"").decode() for record in records]


def check_one_history(network: Network, *writers: Writer) -> None:
    """All that was acknowledged is there, nothing twice, and all replicas hold the same, entry by entry."""
    for writer in writers:
        writer.stop()

    def is_level() -> bool:
        partition = network.log.describe_topic("t").partitions[0]
        return partition.leader is not None and not partition.lagging

    wait_for("all replicas level", is_level)
    values = consumed(network)
    assert len(values) == len(set(values)), "doubled"
    for writer in writers:
        assert set(writer.acknowledged) <= set(values), "lost"
    network.stop_brokers()
    logs = [asyncio.run(frames(network.data / f"broker-{host}")) for host in range(network.count)]
    assert len(logs[0]) >= len(values)
    for other in logs[1:]:
        common = min(len(logs[0]), len(other))  # the last may have been on its way when they were stopped
        assert other[:common] == logs[0][:common]
        assert common >= len(values)


async def frames(folder: Path) -> list[bytes]:
    """Every entry of the topic's replica on one broker."""
    disk = RealDisk(folder)
    await disk.lock()
    try:
        found = await look_into(disk)
        replica = next(each for each in found.replicas.values() if each.spec.topic == "t")
        return [bytes(entry.frame) async for entry in entries_above(disk, replica, 0)]
    finally:
        await disk.close()


def check_cut_off(inside: Writer, outside: Writer) -> None:
    """The majority goes on; beside the leader that is cut off nothing is acknowledged any more."""
    outside.wait_for(20, "the majority goes on")
    before, failed = len(inside.acknowledged), len(inside.failed)
    outside.wait_for(50, "the majority goes on")
    wait_for("the minority fails", lambda: len(inside.failed) > failed)
    assert len(inside.acknowledged) == before, "a minority leader acknowledged"


def test_a_leader_whose_cable_is_cut(network: Network) -> None:
    leader = network.leader()
    inside, outside = network.writer("inside", leader), network.writer("outside")
    inside.wait_for(20, "it runs inside")
    outside.wait_for(20, "it runs outside")
    network.cut(leader)
    check_cut_off(inside, outside)
    assert network.leader() != leader
    network.mend(leader)
    inside.wait_for(20, "it is healed")
    check_one_history(network, inside, outside)


@pytest.mark.parametrize("direction", ["sends", "hears"])
def test_a_leader_is_cut_off_one_way(network: Network, direction: str) -> None:
    """What it sends to the others does not arrive; or what they send to it."""
    leader = network.leader()
    inside, outside = network.writer("inside", leader), network.writer("outside")
    inside.wait_for(20, "it runs inside")
    outside.wait_for(20, "it runs outside")
    others = [host for host in range(network.count) if host != leader]
    cuts = [(leader, other) if direction == "sends" else (other, leader) for other in others]
    for sender, receiver in cuts:
        network.deafen(sender, receiver)
    check_cut_off(inside, outside)
    for sender, receiver in cuts:
        network.undeafen(sender, receiver)
    inside.wait_for(20, "it is healed")
    check_one_history(network, inside, outside)


def test_two_hosts_that_do_not_reach_each_other_but_both_a_third(network: Network) -> None:
    leader = network.leader()
    outside = network.writer("outside")
    outside.wait_for(20, "it runs")
    other = (leader + 1) % network.count
    for sender, receiver in ((leader, other), (other, leader)):
        network.deafen(sender, receiver)
    outside.wait_for(100, "it goes on")
    for sender, receiver in ((leader, other), (other, leader)):
        network.undeafen(sender, receiver)
    outside.wait_for(20, "it is healed")
    check_one_history(network, outside)


def test_a_slow_link_to_one_host_holds_up_nobody(network: Network) -> None:
    leader = network.leader()
    outside = network.writer("outside")
    outside.wait_for(20, "it runs")
    network.slow((leader + 1) % network.count, "64kbit")
    outside.wait_for(200, "it goes on")
    network.unslow((leader + 1) % network.count)
    check_one_history(network, outside)
