"""Quiet partitions on whole brokers: idle ones cost nothing, and no broker dies unnoticed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from broker_kit import World, batch

from raftlog.broker.peers import Peers
from raftlog.config import BrokerConfig
from raftlog.errors import ConnectionLost, StorageFailed
from raftlog.net.connection import RpcConnection
from raftlog.net.rpc import BrokerHeartbeat
from raftlog.raft.types import Role
from raftlog.testing.sim_cluster import broker_name

PARTITIONS = 6


@pytest.fixture
def world() -> Iterator[World]:
    """Three brokers and a topic of six partitions, all at rest."""
    with World(3, partitions=PARTITIONS, replication=3) as made:
        made.leader()
        rest(made)
        yield made


def rest(world: World) -> None:
    """Wait until every replica rests."""
    world.until(lambda: all(broker.pulse.awake == 0 for broker in world.cluster.brokers.values()))


def terms(world: World) -> list[int]:
    return [replica.node.term for broker in world.cluster.brokers.values() for replica in broker.replicas()]


def leaders(world: World) -> dict[str, int]:
    """Partition -> the running broker that leads it in its highest term and serves."""
    found: dict[str, tuple[int, int]] = {}
    for broker_id, broker in world.cluster.brokers.items():
        for replica in broker.replicas():
            if replica.node.role is Role.LEADER and replica.node.serving:
                known = found.get(replica.name, (0, -1))
                found[replica.name] = max(known, (replica.node.term, broker_id))
    return {name: broker_id for name, (_, broker_id) in found.items()}


def count_sent(world: World, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """From here on: frames between brokers by type, and ticks of brokers."""
    sent: Counter[str] = Counter()
    send = RpcConnection.send

    def counted(self: RpcConnection, message: Any, payload: Any = (), **how: Any) -> None:
        sent[type(message).__name__] += 1
        send(self, message, payload, **how)

    monkeypatch.setattr(RpcConnection, "send", counted)
    for broker in world.cluster.brokers.values():
        tick = broker.pulse._tick

        def counted_tick(tick: Any = tick) -> None:
            sent["ticks"] += 1
            tick()

        monkeypatch.setattr(broker.pulse, "_tick", counted_tick)
    return sent


def replaced(world: World, dead: int, names: set[str], limit_s: float) -> float:
    """Seconds until others than ``dead`` lead these partitions."""
    begin = world.loop.time()

    def done() -> bool:
        now = leaders(world)
        return all(now.get(name, dead) != dead for name in names)

    world.until(done, limit_s)
    return world.loop.time() - begin


def led_by(world: World, broker_id: int) -> set[str]:
    return {name for name, leader in leaders(world).items() if leader == broker_id}


# -- what rest costs -----------------------------------------------------------------------------------------


def test_idle_partitions_send_nothing_and_brokers_only_beat(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = terms(world)
    sent = count_sent(world, monkeypatch)
    world.loop.run_for(60.0)
    ticks = sent.pop("ticks")
    assert set(sent) == {"BrokerHeartbeat"}, sent
    assert 6 * 590 <= sent["BrokerHeartbeat"] <= 6 * 610
    assert ticks <= 3 * 610
    assert terms(world) == before, "heartbeats of brokers keep followers from campaigning"


def test_with_quiet_switched_off_every_group_speaks_for_itself() -> None:
    with World(3, partitions=2, replication=3, config=BrokerConfig(quiet_after_ms=0)) as world:
        world.leader()
        world.loop.run_for(5.0)
        assert [broker.pulse.awake for broker in world.cluster.brokers.values()] == [3, 3, 3]


def test_a_record_to_a_quiet_partition_is_not_kept_waiting(world: World) -> None:
    world.loop.run_for(20.0)
    leader = world.leader()
    connection = world.dial(leader)
    begin = world.loop.time()
    assert world.written(connection, batch(b"x")) == 0
    assert world.loop.time() - begin < 0.05
    world.until(lambda: all(world.replica(broker_id).machine.next_offset == 1 for broker_id in range(3)), 1.0)
    assert sum(broker.pulse.awake for broker in world.cluster.brokers.values()) == 3, "one group woke"
    rest(world)
    assert world.fetched(connection) == [b"x"]


# -- deaths --------------------------------------------------------------------------------------------------


def test_a_killed_leader_is_replaced_at_once(world: World) -> None:
    world.loop.run_for(10.0)
    dead = world.leader()
    names = led_by(world, dead)
    world.cluster.kill_broker(dead)
    assert replaced(world, dead, names, 2.0) < 0.5
    world.cluster.start_broker(dead)
    rest(world)


@pytest.mark.parametrize("how", ["power", "isolated", "paused"])
def test_a_leader_gone_without_a_word_is_replaced_within_two_election_timeouts(
    world: World, how: str
) -> None:
    world.loop.run_for(10.0)
    dead = world.leader()
    names = led_by(world, dead)
    if how == "power":
        world.cluster.cut_power(dead)
    elif how == "isolated":
        world.isolate(dead)
    else:
        world.loop.pause(broker_name(dead))
    assert 0.8 < replaced(world, dead, names, 5.0) < 2.8
    if how == "isolated":
        assert not led_by(world, dead) & names
        world.until(lambda: all(r.node.role is not Role.LEADER for r in world.broker(dead).replicas()), 1.0)
        world.cluster.network.heal()
    elif how == "paused":
        world.loop.resume(broker_name(dead))
    else:
        world.cluster.start_broker(dead)
    rest(world)
    assert len(leaders(world)) == PARTITIONS + 1


def test_brokers_that_were_held_up_disturb_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the others said meanwhile lies unread before them."""
    before = terms(world)
    sent = count_sent(world, monkeypatch)
    for broker_id in range(3):
        world.loop.pause(broker_name(broker_id))
    world.loop.run_for(5.0)
    for broker_id in range(3):
        world.loop.resume(broker_name(broker_id))
    world.loop.run_for(10.0)
    assert terms(world) == before
    assert not sent["RaftMessages"], "nobody woke"


def test_a_pre_vote_is_refused_while_the_leaders_broker_is_heard(world: World) -> None:
    """Optimised heartbeats must still keep leases fresh (SEMANTICS mistake 20)."""
    world.loop.run_for(20.0)
    before = terms(world)
    leader = world.leader()
    follower = next(broker_id for broker_id in range(3) if broker_id != leader)
    broker, replica = world.broker(follower), world.replica(follower)

    async def campaign() -> None:
        replica.node.campaign(broker.now_ms())
        broker.mark(replica)

    world.cluster.run(campaign(), node=broker_name(follower))
    assert replica.node.role is Role.PRE_CANDIDATE
    world.loop.run_for(0.05)
    assert replica.node.role is Role.FOLLOWER
    rest(world)
    assert terms(world) == before
    assert world.leader() == leader


def test_a_leading_replica_out_of_service_on_a_living_broker_is_replaced(world: World) -> None:
    world.loop.run_for(10.0)
    leader = world.leader()
    replica = world.replica(leader)
    others = leaders(world)
    replica.retire(StorageFailed("rot"))
    assert replaced(world, leader, {replica.name}, 3.0) < 0.6
    world.loop.run_for(5.0)
    now = leaders(world)
    assert now.pop(replica.name) != leader
    assert now == {name: broker_id for name, broker_id in others.items() if name != replica.name}
    leading = world.replica(leaders(world)[replica.name])
    assert not leading.node.quiet, "a member is missing"


def test_a_leader_that_comes_back_before_it_was_missed_is_not_believed_in(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody notices that the connections broke; only its new incarnation is heard."""
    for broker in world.cluster.brokers.values():
        monkeypatch.setattr(broker.peers, "_on_down", lambda broker_id: None)
    leader = world.leader()
    names = led_by(world, leader)
    world.cluster.kill_broker(leader)
    world.cluster.start_broker(leader)
    relying = [
        replica
        for broker_id, broker in world.cluster.brokers.items()
        for replica in broker.replicas()
        if broker_id != leader and replica.name in names
    ]
    world.until(lambda: not any(replica.node.quiet for replica in relying), 0.3)
    world.until(lambda: names <= leaders(world).keys(), 3.5)
    rest(world)


def test_no_leader_rests_whose_follower_was_never_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker of an older release does not beat: groups with members there go on as they always did."""
    broadcast = Peers.broadcast

    def all_but_one(self: Peers, message: Any) -> None:
        if self.local.broker_id != 2:
            broadcast(self, message)

    monkeypatch.setattr(Peers, "broadcast", all_but_one)
    with World(3, partitions=PARTITIONS, replication=3) as world:
        world.leader()
        world.loop.run_for(10.0)  # preferred leaders are back in office
        led = [
            replica
            for broker_id in (0, 1)
            for replica in world.broker(broker_id).replicas()
            if replica.node.role is Role.LEADER
        ]
        before = [replica.node.term for replica in led]
        assert len(led) >= 3
        for _ in range(100):
            world.loop.run_for(0.05)
            assert not any(replica.node.quiet for replica in led)
        assert [replica.node.term for replica in led] == before
        monkeypatch.setattr(Peers, "broadcast", broadcast)
        rest(world)


# -- what is heard -------------------------------------------------------------------------------------------


def test_a_client_cannot_beat_for_a_broker(world: World) -> None:
    connection = world.dial(0)
    world.tell(connection, BrokerHeartbeat([1, 2, 3]))
    world.until(lambda: connection.closed)
    before = terms(world)
    world.loop.run_for(3.0)
    assert terms(world) == before


def test_the_word_of_an_older_incarnation_counts_no_more(world: World) -> None:
    pulse = world.broker(0).pulse

    async def hear() -> None:
        pulse.heard(7, 3, BrokerHeartbeat())
        await asyncio.sleep(0.5)
        pulse.heard(7, 2, BrokerHeartbeat([1]))

    world.cluster.run(hear(), node=broker_name(0))
    heard = pulse._heard[7]
    assert heard.incarnation == 3
    assert not heard.retired
    assert world.broker(0).now_ms() - heard.at_ms >= 499


def test_a_closed_broker_beats_no_more(world: World) -> None:
    broker = world.broker(2)
    world.cluster.run(broker.close(), node=broker_name(2))
    assert broker.pulse._timer is not None
    assert broker.pulse._timer.cancelled()
    broker.pulse._schedule(broker.now_ms())
    assert broker.pulse._timer.cancelled()
    with pytest.raises(ConnectionLost):
        broker.peers.connection(0)
