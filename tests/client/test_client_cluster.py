"""Metadata, leaders and connections: what a client believes, and how it finds out."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from fake_cluster import TOPIC, FakeBroker, SimWorld
from fake_partition import FakePartition

from raftlog.client.cluster import ClusterClient
from raftlog.client.connections import Bootstrap, Connections
from raftlog.client.metadata import NO_LEADER, MetadataCache, PartitionView
from raftlog.client.retry import BACKOFF, retry
from raftlog.errors import (
    Busy,
    Closed,
    ConfigError,
    ConnectionLost,
    IncompatibleVersion,
    InvalidTopic,
    LeadershipLost,
    NotLeader,
    RaftlogError,
    RequestTimeout,
    TopicExists,
    UnknownReplica,
    UnknownTopic,
)
from raftlog.net.rpc import (
    RPC_VERSION_MAX,
    CreateTopicRequest,
    InitProducerRequest,
    MetadataRequest,
    MetadataResponse,
    PartitionRow,
    ProducePartition,
    ProduceRequest,
    TopicRow,
)
from raftlog.record.codec import encode_batch


def view(leader: int, term: int) -> PartitionView:
    return PartitionView(TOPIC, b"t" * 16, 0, PartitionRow([0, 1, 2], leader, term))


@pytest.mark.parametrize(
    ("known", "heard", "after"),
    [
        ((0, 3), (1, 4), (1, 4)),
        ((0, 3), (1, 2), (0, 3)),
        ((0, 3), (1, 3), (0, 3)),
        ((0, 3), (NO_LEADER, 4), (0, 3)),
        ((NO_LEADER, 3), (1, 3), (1, 3)),
    ],
)
def test_the_newer_term_counts_and_a_term_has_one_leader(
    known: tuple[int, int], heard: tuple[int, int], after: tuple[int, int]
) -> None:
    partition = view(*known)
    assert partition.learn(*heard) == (after != known)
    assert (partition.leader, partition.term) == after


def test_a_denial_counts_from_the_leader_itself() -> None:
    partition = view(0, 3)
    partition.deny(1, 3)
    partition.deny(2, 5)
    partition.deny(0, 2)
    assert (partition.leader, partition.term) == (0, 3)
    partition.deny(0, 3)
    assert (partition.leader, partition.term) == (NO_LEADER, 3)


def test_a_term_in_which_nobody_leads_hides_no_leader() -> None:
    """A candidate may tell of its term, and die before it has stored it (seed 3104516)."""
    partition = view(0, 3)
    partition.deny(0, 9)
    assert not partition.learn(0, 3), "it has said that it leads in term 3 no more"
    assert partition.learn(0, 4)
    assert (partition.leader, partition.term) == (0, 4)
    partition = view(NO_LEADER, 9)
    assert partition.learn(0, 4)


def answer(version: int, *topics: TopicRow, unknown: tuple[str, ...] = ()) -> MetadataResponse:
    return MetadataResponse("c1", [], list(topics), list(unknown), version)


def row(name: str, topic_id: bytes, partitions: int = 1) -> TopicRow:
    return TopicRow(name, topic_id, [PartitionRow([0], 0, 1)] * partitions, {})


def test_an_older_answer_neither_deletes_nor_revives_a_topic() -> None:
    cache = MetadataCache()
    cache.merge(answer(5, row("a", b"1")))
    first = cache.topics["a"].partitions[0]
    cache.merge(answer(4, unknown=("a",)))
    assert not first.deleted
    cache.merge(answer(6, row("a", b"1", 3)))
    assert cache.topics["a"].partitions[0] is first, "a partition's view lives as long as its topic"
    assert len(cache.topics["a"].partitions) == 3
    cache.merge(answer(7, unknown=("a",)))
    assert first.deleted
    cache.merge(answer(6, row("a", b"1")))
    assert "a" not in cache.topics
    cache.merge(answer(8, row("a", b"2")))
    cache.merge(answer(7, row("a", b"1")))
    assert cache.topics["a"].topic_id == b"2"


def test_backoff_climbs_to_its_bound() -> None:
    dice = random.Random(1)
    delays = [BACKOFF.delay(attempt, dice) for attempt in range(1, 40)]
    assert all(0.015 <= delay <= 0.625 for delay in delays)
    assert max(delays[:5]) < 0.08
    assert min(delays[20:]) > 0.37


def run(world: SimWorld, work: Any) -> Any:
    async def whole() -> Any:
        client = world.client()
        try:
            return await work(client)
        finally:
            await client.close()

    return world.run(whole())


def test_retry_keeps_to_its_deadline_on_the_loops_clock(world: SimWorld) -> None:
    attempts: list[float] = []

    async def fails() -> None:
        attempts.append(world.loop.time())
        raise Busy("no")

    async def work(_: ClusterClient) -> float:
        began = world.loop.time()
        with pytest.raises(Busy):
            await retry(fails, random=random.Random(1), deadline=began + 5)
        return world.loop.time() - began

    assert 4 < run(world, work) <= 5
    assert len(attempts) > 15


def test_an_unknown_topic_is_doubted_for_a_moment_only(world: SimWorld) -> None:
    async def work(client: ClusterClient) -> float:
        began = world.loop.time()
        with pytest.raises(UnknownTopic):
            await client.topic("nosuch", timeout=60)
        return world.loop.time() - began

    assert 0.2 < run(world, work) < 0.7


def test_a_broker_that_has_not_heard_of_a_new_topic_does_not_hide_it(world: SimWorld) -> None:
    world.cluster.create(TOPIC)
    for broker in (0, 1):
        world.cluster.brokers[broker].blind = True

    async def work(client: ClusterClient) -> None:
        await client.topic("other", timeout=1)

    with pytest.raises(UnknownTopic):
        run(world, work)

    async def again(client: ClusterClient) -> None:
        assert (await client.topic(TOPIC, timeout=10)).name == TOPIC

    run(world, again)


def test_a_topic_that_is_known_is_described_whatever_an_old_broker_says(world: SimWorld) -> None:
    """One that had just been killed and started again was asked, and said that there was no such topic."""
    world.cluster.create(TOPIC)

    async def work() -> None:
        async with world.log() as log:
            assert len((await log.describe_topic(TOPIC)).partitions) == 1
            for broker in (0, 1):
                world.cluster.brokers[broker].blind = True
            for _ in range(10):
                assert len((await log.describe_topic(TOPIC)).partitions) == 1
                assert await log.topics() == [TOPIC]

    world.run(work())


def test_without_a_metadata_leader_nobody_can_say_that_there_is_no_topic(world: SimWorld) -> None:
    """Found by seed 70055: after a power cut all brokers had older metadata for a moment, in which a consumer
    was told that its topic did not exist."""
    cluster = world.cluster
    cluster.metadata_leader = None
    cluster.version = 0

    def elect() -> None:
        cluster.metadata_leader = 1
        cluster.create("late")

    async def work(client: ClusterClient) -> None:
        asyncio.get_running_loop().call_later(3.0, elect)
        assert (await client.topic("late", timeout=10)).name == "late"

    run(world, work)


def test_a_broker_that_cannot_help_is_not_the_only_one_asked(world: SimWorld) -> None:
    """It may be cut off from the others, and yet be the only one we are connected to (found by the simulator:
    seed 10105)."""
    asked: list[int] = []

    def refuse(broker_id: int) -> RaftlogError | None:
        asked.append(broker_id)
        return NotLeader("cut off") if broker_id == asked[0] else None

    world.cluster.refuse_identity = refuse

    async def work(client: ClusterClient) -> int:
        await client.metadata([], timeout=5)  # now all addresses are known
        await asyncio.sleep(1.0)  # and every dial has ended
        for spare in client.connections.open_ones()[1:]:
            spare.close()
        await asyncio.sleep(0.1)
        assert len(client.connections.open_ones()) == 1
        return (await client.call_any(InitProducerRequest(), timeout=5)).producer_id

    assert run(world, work) > 0
    assert len(asked) == 2
    assert asked[0] != asked[1]


@pytest.mark.parametrize("seed", range(6))
def test_a_broker_of_another_release_is_not_the_only_one_asked(seed: int) -> None:
    world = SimWorld(3, seed)

    def replace(broker_id: int) -> None:
        broker, node = world.cluster.brokers[broker_id], f"broker-{broker_id}"
        broker.rpc_versions = (RPC_VERSION_MAX + 1, RPC_VERSION_MAX + 1)
        world.run(broker.stop(), node=node)
        world.run(broker.restart(world.seams(node), node), node=node)

    async def work(client: ClusterClient) -> int:
        return (await client.connections.any()).peer.broker_id

    replace(0)
    replace(1)
    assert run(world, work) == 2
    replace(2)
    with pytest.raises(IncompatibleVersion):
        run(world, work)
    world.close()


def test_many_partitions_look_for_their_leaders_together(world: SimWorld) -> None:
    partitions = world.cluster.create(TOPIC, 60)

    async def work(client: ClusterClient) -> None:
        topic = await client.topic(TOPIC, timeout=5)
        await asyncio.gather(*(client.seek_leader(each) for each in topic.partitions))
        for partition in partitions:
            if partition.leader == 0:
                world.cluster.move(partition, 1)
        world.loop.kill("broker-0")
        await asyncio.sleep(0.05)
        before = world.cluster.count(MetadataRequest)
        found = await asyncio.gather(*(client.seek_leader(each) for each in topic.partitions))
        assert {connection.peer.broker_id for connection in found} == {1, 2}
        assert world.cluster.count(MetadataRequest) - before <= 6, "not one question per partition"

    run(world, work)


def test_a_broker_that_hosts_the_partition_no_more_is_not_asked_again(
    world: SimWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    (partition,) = world.cluster.create(TOPIC)
    led = FakeBroker._led

    def gone(broker: FakeBroker, topic_id: bytes, index: int) -> FakePartition:
        if broker.id == 0:
            raise UnknownReplica("not here any more")
        return led(broker, topic_id, index)

    async def work() -> float:
        client = world.client()
        place = await client.partition(TOPIC, 0, timeout=5)
        world.cluster.move(partition, 1)
        monkeypatch.setattr(FakeBroker, "_led", gone)
        began = world.loop.time()
        batch = encode_batch([b"x"], None, 0)
        await client.call_leader(
            place, ProduceRequest([ProducePartition(place.topic_id, 0)]), (batch,), timeout=5
        )
        await client.close()
        return world.loop.time() - began

    assert world.run(work()) < 0.5


def test_who_seeks_a_leader_hears_of_the_topics_end_and_of_the_clients(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)
    partition.leader = None

    async def work(client: ClusterClient) -> None:
        topic = await client.topic(TOPIC, timeout=5)
        seeking = client.seek_leader(topic.partitions[0])
        await asyncio.sleep(5)
        assert not seeking.done()
        world.cluster.delete(TOPIC)
        with pytest.raises(UnknownTopic):
            await seeking
        world.cluster.create("other")[0].leader = None
        other = await client.topic("other", timeout=5)
        seeking = client.seek_leader(other.partitions[0])
        world.loop.call_later(1, lambda: asyncio.ensure_future(client.close()))
        with pytest.raises(Closed):
            await seeking

    run(world, work)


def test_when_no_address_answers_new_ones_are_asked_for(world: SimWorld) -> None:
    world.cluster.create(TOPIC)
    asked = []

    async def refresh() -> Bootstrap:
        asked.append(world.loop.time())
        return world.cluster.bootstrap

    async def work() -> None:
        nowhere = Bootstrap("fake", "c1", world.cluster.bootstrap.secret, (("broker-0", 1), ("nowhere", 2)))
        client = ClusterClient(world.seams("client"), nowhere, "client", refresh)
        assert (await client.topic(TOPIC, timeout=20)).name == TOPIC
        assert len(asked) == 1
        await client.close()

    world.run(work())


def test_when_all_hosts_are_gone_and_nobody_says_so_leaders_are_sought_at_new_addresses(
    world: SimWorld,
) -> None:
    """Nothing refuses a connection to a host that is not there any more, and asking Ray takes its time."""
    world.cluster.create(TOPIC)

    async def refresh() -> Bootstrap:
        await asyncio.sleep(1.0)
        return world.cluster.bootstrap

    async def work() -> float:
        client = ClusterClient(world.seams("client"), world.cluster.bootstrap, "client", refresh)
        topic = await client.topic(TOPIC, timeout=5)
        await client.seek_leader(topic.partitions[0])
        for broker_id, broker in world.cluster.brokers.items():
            world.network.power_cut(f"broker-{broker_id}")
            name = f"broker-{broker_id}b"
            await world.loop.run_as(name, broker.restart(world.seams(name), name))
        for connection in client.connections.open_ones():
            connection.close()
        began = world.loop.time()
        connection = await client.seek_leader(topic.partitions[0])
        assert (connection.peer.broker_id, connection.peer.incarnation) == (0, 2)
        await client.close()
        return world.loop.time() - began

    assert world.run(work()) < 8


def test_closing_ends_the_search_for_new_addresses(world: SimWorld) -> None:
    async def refresh() -> Bootstrap:
        return await asyncio.Future()

    async def work() -> None:
        nowhere = Bootstrap("fake", "c1", b"", (("nowhere", 1),))
        client = ClusterClient(world.seams("client"), nowhere, "client", refresh)
        asking = asyncio.ensure_future(client.metadata([], timeout=30))
        await asyncio.sleep(5)
        assert not asking.done()
        await client.close()
        with pytest.raises(Closed):
            await asking

    world.run(work())


def test_metadata_are_asked_for_again_when_nobody_has_answered(world: SimWorld) -> None:
    world.cluster.create(TOPIC)

    async def work(client: ClusterClient) -> None:
        await client.topic(TOPIC, timeout=5)
        for broker in world.cluster.brokers.values():
            broker.silent = True
        await asyncio.sleep(25)  # in which they grew old, and whoever was asked said nothing
        for broker in world.cluster.brokers.values():
            broker.silent = False
        before = world.cluster.count(MetadataRequest)
        await asyncio.sleep(25)
        assert world.cluster.count(MetadataRequest) > before

    run(world, work)


def test_a_broker_at_a_new_address_is_found_through_the_others(world: SimWorld) -> None:
    (partition,) = world.cluster.create(TOPIC)

    async def work(client: ClusterClient) -> None:
        topic = await client.topic(TOPIC, timeout=5)
        connection = await client.seek_leader(topic.partitions[0])
        assert connection.peer.broker_id == 0
        world.loop.kill("broker-0")
        partition.leader = None
        await asyncio.sleep(1)
        world.loop.run_as(
            "broker-0b", world.cluster.brokers[0].restart(world.seams("broker-0b"), "broker-0b")
        )
        await asyncio.sleep(0.1)
        world.cluster.move(partition, 0)
        connection = await client.seek_leader(topic.partitions[0])
        assert (connection.peer.broker_id, connection.peer.incarnation) == (0, 2)

    run(world, work)


# -- topics --------------------------------------------------------------------------------------------------


def test_creating_a_topic_returns_when_all_partitions_have_leaders(world: SimWorld) -> None:
    world.cluster.born_leaderless = True

    async def work() -> float:
        async with world.log() as log:
            began = world.loop.time()
            world.loop.call_later(1.5, world.cluster.elect_all)
            await log.create_topic(TOPIC, partitions=6)
            return world.loop.time() - began

    assert 1.5 <= world.run(work()) < 1.8


def test_a_lost_answer_to_create_is_no_topic_exists(world: SimWorld) -> None:
    world.cluster.create_faults.append(LeadershipLost("stepped down"))

    async def work() -> None:
        async with world.log() as log:
            await log.create_topic(TOPIC)
            with pytest.raises(TopicExists):
                await log.create_topic(TOPIC)
            await log.create_topic(TOPIC, exist_ok=True)

    world.run(work())


def test_a_topic_without_leaders_is_told_in_time(world: SimWorld) -> None:
    world.cluster.born_leaderless = True

    async def work() -> None:
        async with world.log() as log:
            with pytest.raises(RequestTimeout, match="was created"):
                await log.create_topic(TOPIC, timeout=2)

    world.run(work())


def test_without_a_metadata_leader_creating_fails_in_time(world: SimWorld) -> None:
    world.cluster.metadata_leader = None

    async def work() -> None:
        async with world.log() as log:
            began = world.loop.time()
            with pytest.raises(RequestTimeout) as caught:
                await log.create_topic(TOPIC, timeout=2)
            assert not caught.value.indeterminate, "nobody was asked"
            assert world.loop.time() - began < 2.2
            world.cluster.metadata_leader = 2
            await log.create_topic(TOPIC, timeout=2)

    world.run(work())
    assert world.cluster.count(CreateTopicRequest) == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"name": "a b"}, InvalidTopic),
        ({"partitions": 0}, ConfigError),
        ({"partitions": "3"}, ConfigError),
        ({"replication_factor": 0}, ConfigError),
        ({"replication_factor": "all"}, ConfigError),
        ({"config": {"retention.msec": 5}}, ConfigError),
    ],
)
def test_what_is_wrong_with_a_topic_is_told_before_anything_is_sent(
    world: SimWorld, arguments: dict[str, Any], error: type[RaftlogError]
) -> None:
    async def work() -> None:
        async with world.log() as log:
            with pytest.raises(error):
                await log.create_topic(**{"name": TOPIC, **arguments})
            assert not world.cluster.requests
            await log.create_topic(TOPIC, config={"max.message.bytes": 4096})

    world.run(work())
    assert world.cluster.configs[TOPIC] == {"max_message_bytes": 4096}


def test_nobody_answers(world: SimWorld) -> None:
    async def work() -> float:
        nowhere = Bootstrap("fake", "c1", b"", (("nowhere", 1),))
        client = ClusterClient(world.seams("client"), nowhere, "client")
        began = world.loop.time()
        with pytest.raises(ConnectionLost, match="nowhere:1"):
            await client.metadata([], timeout=3)
        await client.close()
        return world.loop.time() - began

    assert world.run(work()) < 6.5


def test_descriptions_are_put_together_from_what_brokers_say(world: SimWorld) -> None:
    world.cluster.create(TOPIC, 2)

    async def work() -> None:
        async with world.log() as log:
            described = await log.describe_topic(TOPIC)
            assert [(each.index, each.leader, each.replicas) for each in described.partitions] == [
                (0, 0, [0, 1, 2]),
                (1, 1, [1, 2, 0]),
            ]
            assert [each.lagging for each in described.partitions] == [[], []]
            world.network.cut("client", "broker-1")
            described = await log.describe_topic(TOPIC)
            assert [each.leader for each in described.partitions] == [0, None]
            assert [each.lagging for each in described.partitions] == [[1], [1]]
            cluster = await log.describe_cluster()
            assert [(each.id, each.state) for each in cluster.brokers] == [
                (0, "alive"),
                (1, "lost"),
                (2, "alive"),
            ]
            assert [each.leaders for each in cluster.brokers] == [1, 0, 0]
            with pytest.raises(UnknownTopic):
                await log.describe_topic("nosuch")

    world.run(work())


@pytest.mark.parametrize("taken", [False, True], ids=["nobody is there", "another broker is there"])
def test_a_leader_that_is_gone_is_dialed_now_and_then(
    world: SimWorld, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    (partition,) = world.cluster.create(TOPIC)
    dials: list[Any] = []
    dial = Connections._open

    async def counted(self: Connections, address: Any) -> Any:
        dials.append(address)
        return await dial(self, address)

    monkeypatch.setattr(Connections, "_open", counted)

    async def work() -> None:
        client = world.client()
        view = await client.partition(TOPIC, 0, timeout=5)
        await client.seek_leader(view)
        world.loop.kill("broker-0")
        partition.leader = None
        if taken:
            client.connections.links[0].address = world.cluster.brokers[1].address
        await asyncio.sleep(0.1)
        dials.clear()
        found = client.seek_leader(view)
        await asyncio.sleep(10)
        assert 10 < len(dials) < 100, "as the back-off says, and not as fast as it is refused"
        world.cluster.move(partition, 2)
        assert (await found).peer.broker_id == 2
        await client.close()

    world.run(work())
