"""Metadata at the broker: topics, commands, producer ids, registration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from broker_kit import TOPIC, World, batch, create_request, outcome

from raftlog.broker.metadata import METADATA_VOTERS_MAX, PRODUCER_ID_BLOCK, metadata_spec
from raftlog.errors import (
    ConfigError,
    ForeignDataDir,
    InvalidReplicationFactor,
    InvalidTopic,
    LeadershipLost,
    NotLeader,
    ProtocolError,
    RaftlogError,
    StaleController,
    TopicExists,
    UnknownTopic,
)
from raftlog.net.rpc import (
    BrokerStatusRequest,
    CreateTopicRequest,
    CreateTopicResponse,
    DeleteTopicRequest,
    InitProducerRequest,
    MetadataCommandRequest,
    MetadataRequest,
    MetadataResponse,
)
from raftlog.state.metadata_commands import (
    CODEC,
    AllocateProducerIds,
    Command,
    CreateTopic,
    FoundCluster,
    RegisterBroker,
    RemoveBroker,
    SetFeatureLevel,
    TakeControl,
)


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


def metadata(world: World, broker: int, topics: list[str] | None = None) -> MetadataResponse:
    response: MetadataResponse = world.call(world.dial(broker), MetadataRequest(topics))[0]
    return response


# -- topics --------------------------------------------------------------------------------------------------


def test_every_broker_soon_answers_with_the_new_topic(world: World) -> None:
    leader = world.metadata_leader()
    created: CreateTopicResponse = world.call(
        world.dial(leader), create_request("new", 2, 3, {"retention.ms": 5})
    )[0]
    assert created.created
    assert created.topic.config == {"retention_ms": 5}
    for broker in range(3):
        world.until(lambda broker=broker: "new" in world.broker(broker).metadata.image.topics)
        found = metadata(world, broker, ["new", "old"])
        assert found.unknown_topics == ["old"]
        assert [row.name for row in found.topics] == ["new"]
        assert [sorted(each.replicas) for each in found.topics[0].partitions] == [[0, 1, 2]] * 2
        assert found.version >= created.version
        assert {each.id: each.state for each in found.brokers} == {0: "alive", 1: "alive", 2: "alive"}
        assert found.metadata_leader == leader


def test_only_the_leader_creates_and_deletes(world: World) -> None:
    leader = world.metadata_leader()
    follower = world.dial((leader + 1) % 3)
    for request in (create_request("new"), DeleteTopicRequest(TOPIC)):
        with pytest.raises(NotLeader) as caught:
            world.call(follower, request)
        assert caught.value.leader == leader
    assert list(world.broker(leader).metadata.image.topics) == [TOPIC]
    world.call(world.dial(leader), create_request("new"))


def test_a_topic_that_exists_is_refused_or_accepted_as_it_is(world: World) -> None:
    connection = world.dial(world.metadata_leader())
    with pytest.raises(TopicExists):
        world.call(connection, create_request(TOPIC, 9))
    request = CreateTopicRequest(TOPIC, 9, 1, {}, exist_ok=True)
    response: CreateTopicResponse = world.call(connection, request)[0]
    assert (response.created, len(response.topic.partitions)) == (False, 1)


def test_of_two_that_create_one_topic_at_once_one_succeeds(world: World) -> None:
    leader = world.metadata_leader()
    tasks = [world.ask(world.dial(leader), create_request("new", 1, 3)) for _ in range(2)]
    world.until(lambda: all(task.done() for task in tasks))
    assert {type(outcome(task)) for task in tasks} == {CreateTopicResponse, TopicExists}


def test_a_topic_deleted_and_made_again_is_another_and_empty(world: World) -> None:
    connection = world.dial(world.metadata_leader())
    world.written(world.dial(world.leader()), batch(b"old"))
    before = world.topic_id
    world.call(connection, DeleteTopicRequest(TOPIC))
    with pytest.raises(UnknownTopic):
        world.call(connection, DeleteTopicRequest(TOPIC))
    world.call(connection, create_request(TOPIC, 1, 3))
    world.until(lambda: all(TOPIC in each.metadata.image.topics for each in world.cluster.brokers.values()))
    assert world.topic_id != before
    assert world.written(world.dial(world.leader()), batch(b"new")) == 0
    world.until(lambda: all(len(each.store.logs) == 2 for each in world.cluster.brokers.values()))


@pytest.mark.parametrize("factor", [4, -1])
def test_replication_factor_above_the_number_of_brokers(world: World, factor: int) -> None:
    """The error says both numbers."""
    connection = world.dial(world.metadata_leader())
    with pytest.raises(InvalidReplicationFactor) as caught:
        world.call(connection, create_request("wide", 1, factor))
    assert str(factor) in str(caught.value)
    assert "3, the number of brokers" in str(caught.value)
    assert world.call(connection, create_request("wide", 1, 3))[0].created


def test_replicas_of_absent_brokers_catch_up(world: World) -> None:
    leader = world.metadata_leader()
    absent = (leader + 1) % 3
    world.cluster.kill_broker(absent)
    world.until(lambda: absent not in world.broker(leader).alive_brokers())
    created: CreateTopicResponse = world.call(world.dial(leader), create_request("new", 1, 3))[0]
    assert sorted(created.topic.partitions[0].replicas) == [0, 1, 2]
    smaller: CreateTopicResponse = world.call(world.dial(leader), create_request("auto", 1, 0))[0]
    assert sorted(smaller.topic.partitions[0].replicas) == sorted({0, 1, 2} - {absent})
    world.cluster.start_broker(absent)
    replica_id = next(
        each
        for each, broker in zip(
            created.topic.partitions[0].replica_ids, created.topic.partitions[0].replicas, strict=True
        )
        if broker == absent
    )
    world.until(lambda: world.broker(absent).replica(replica_id) is not None)
    found = world.broker(absent).replica(replica_id)
    assert found is not None
    world.until(lambda: found.leader_broker is not None)


def test_a_creation_under_way_when_the_leader_is_cut_off_is_indeterminate(world: World) -> None:
    leader = world.metadata_leader()
    connection = world.dial(leader)
    world.isolate(leader)
    task = world.ask(connection, create_request("new", 1, 1))
    world.until(task.done)
    found = outcome(task)
    assert isinstance(found, LeadershipLost)
    assert found.indeterminate
    world.cluster.network.heal()
    following = world.metadata_leader()
    created: CreateTopicResponse = world.call(
        world.dial(following), CreateTopicRequest("new", 1, 1, {}, exist_ok=True)
    )[0]
    assert created.topic.name == "new"


# -- commands ------------------------------------------------------------------------------------------------

UNKNOWN_COMMANDS = {
    "nothing": b"",
    "rubbish": b"\xc1\xff",
    "not a list": msgspec.msgpack.encode({"a": 1}),
    "too short": msgspec.msgpack.encode([1]),
    "unknown type": msgspec.msgpack.encode([99, 1, 2]),
    "unknown version": msgspec.msgpack.encode([6, 9]),
    "a field too many": msgspec.msgpack.encode([6, 1, "x"]),
    "a field of a wrong type": msgspec.msgpack.encode([5, 1, "many"]),
    "a type that cannot be looked up": msgspec.msgpack.encode([[1], {}]),
}


def peer(world: World) -> Any:
    """A connection to the metadata leader as another broker has it."""
    return world.dial(world.metadata_leader(), "broker", as_broker=9, incarnation=1, purpose="control")


@pytest.mark.parametrize("case", UNKNOWN_COMMANDS)
def test_a_command_that_nobody_knows_is_a_typed_error(world: World, case: str) -> None:
    """And nothing of it reaches the log, where it would halt every replica."""
    connection = peer(world)
    replica = world.broker(world.metadata_leader()).metadata.replica
    before = replica.node.last_index
    with pytest.raises(ProtocolError):
        world.call(connection, MetadataCommandRequest(), (UNKNOWN_COMMANDS[case],))
    assert replica.node.last_index == before
    assert replica.fault is None
    response, _ = world.call(connection, MetadataCommandRequest(), (CODEC.encode(AllocateProducerIds(10)),))
    assert isinstance(response.result, int)


def creation(name: str = "new", assignment: Any = ((0, 1),), **config: Any) -> CreateTopic:
    return CreateTopic(name, b"i" * 16, config, False, [list(each) for each in assignment])


REFUSED_COMMANDS: dict[str, tuple[Command, type[RaftlogError]]] = {
    "another cluster": (FoundCluster("another", (), 1), ForeignDataDir),
    "another disk": (RegisterBroker(0, b"d" * 16, "n", "", 1, 1), ForeignDataDir),
    "too many ids": (AllocateProducerIds(10**9), ConfigError),
    "no ids": (AllocateProducerIds(0), ConfigError),
    "an old controller": (RemoveBroker(-1, 0), StaleController),
    "a level to come": (SetFeatureLevel(0, 99), ConfigError),
    "a topic that exists": (creation(TOPIC), TopicExists),
    "a topic on nobody": (creation(assignment=[[8]]), ConfigError),
    "a topic twice on one": (creation(assignment=[[1, 1]]), ConfigError),
    "a topic of no partitions": (creation(assignment=[]), ConfigError),
    "a topic without replicas": (creation(assignment=[[]]), ConfigError),
    "a name that may not be": (creation("../up"), InvalidTopic),
    "a setting that nobody could open": (creation(colour="red"), ConfigError),
    "a setting out of range": (creation(segment_bytes=-1), ConfigError),
}


@pytest.mark.parametrize("case", REFUSED_COMMANDS)
def test_a_command_that_cannot_be_carried_out_changes_nothing(world: World, case: str) -> None:
    command, expected = REFUSED_COMMANDS[case]
    connection = peer(world)
    replica = world.broker(world.metadata_leader()).metadata.replica
    before = replica.node.last_index
    with pytest.raises(expected) as caught:
        world.call(connection, MetadataCommandRequest(), (CODEC.encode(command),))
    assert type(caught.value) is expected
    assert replica.node.last_index == before
    response, _ = world.call(connection, MetadataCommandRequest(), (CODEC.encode(TakeControl()),))
    assert response.result == 1
    assert world.call(connection, create_request("valid", 1, 3))[0].created
    world.until(lambda: all("valid" in each.metadata.image.topics for each in world.cluster.brokers.values()))


def test_clients_have_no_commands(world: World) -> None:
    connection = world.dial(world.metadata_leader())
    with pytest.raises(ProtocolError, match="clients"):
        world.call(connection, MetadataCommandRequest(), (CODEC.encode(TakeControl()),))
    assert world.broker(world.metadata_leader()).metadata.image.controller_epoch == 0
    assert world.call(connection, create_request("valid"))[0].created


# -- producer ids --------------------------------------------------------------------------------------------


def test_producer_ids_are_unique_over_brokers_and_restarts(world: World) -> None:
    """Also of a broker killed in the middle of its block, and while the metadata group changes its leader."""
    given: list[int] = []

    def take(broker: int, count: int) -> None:
        connection = world.dial(broker)
        tasks = [world.ask(connection, InitProducerRequest()) for _ in range(count)]
        world.until(lambda: all(task.done() for task in tasks))
        given.extend(task.result()[0].producer_id for task in tasks)

    for broker in range(3):
        take(broker, 40)
    for broker in range(3):
        if broker == 1:
            world.cluster.cut_power(broker)
        else:
            world.cluster.kill_broker(broker)
        world.cluster.start_broker(broker)
        again = world.broker(broker).metadata.replica
        world.until(lambda again=again: again.leader_broker is not None and again.node.applied > 0)
        world.loop.run_for(0.5)
        take(broker, 40)
    take(0, PRODUCER_ID_BLOCK + 20)
    assert len(given) == 3 * 80 + PRODUCER_ID_BLOCK + 20
    assert len(set(given)) == len(given)


def test_a_producer_id_waits_for_nobody_else_and_fails_typed_without_a_leader(world: World) -> None:
    leader = world.metadata_leader()
    follower = (leader + 1) % 3
    connection = world.dial(follower)
    world.isolate(follower)
    with pytest.raises(RaftlogError) as caught:
        world.call(connection, InitProducerRequest())
    assert caught.value.retriable
    world.cluster.network.heal()

    world.loop.run_for(5.0)
    assert world.call(connection, InitProducerRequest())[0].epoch == 0


def test_a_transactional_id_is_refused_as_long_as_there_are_no_transactions(world: World) -> None:
    connection = world.dial(0)
    with pytest.raises(ConfigError, match="transaction"):
        world.call(connection, InitProducerRequest("copy-1"))
    assert world.call(connection, InitProducerRequest())[0].epoch == 0


# -- brokers -------------------------------------------------------------------------------------------------


def test_the_sixth_broker_learns_and_does_not_vote() -> None:
    members = [(broker, broker + 1) for broker in range(METADATA_VOTERS_MAX + 2)]
    spec = metadata_spec(members, 7)
    assert (spec.replica_id, spec.conf.voters, spec.conf.learners) == (7, (1, 2, 3, 4, 5), (6, 7))
    with World(brokers=METADATA_VOTERS_MAX + 1) as world:
        learner = METADATA_VOTERS_MAX
        found = metadata(world, learner)
        assert len(found.brokers) == METADATA_VOTERS_MAX + 1
        assert found.metadata_leader == world.metadata_leader() != learner
        assert world.call(world.dial(learner), InitProducerRequest())[0].producer_id >= 0


def test_a_broker_that_is_gone_is_lost_and_comes_back_alive(world: World) -> None:
    def states(broker: int) -> dict[int, str]:
        return {each.id: each.state for each in world.broker(broker).broker_rows()}

    world.cluster.kill_broker(2)
    world.until(lambda: states(0) == {0: "alive", 1: "alive", 2: "lost"} == states(1))
    world.cluster.start_broker(2)
    world.until(lambda: states(0) == states(1) == states(2) == dict.fromkeys(range(3), "alive"))
    assert {each.incarnation for each in world.broker(0).broker_rows()} == {1, 2}


def test_the_status_of_a_broker_shows_its_replicas(world: World) -> None:
    leader = world.leader()
    connection = world.dial(leader)
    world.written(connection, batch(b"a", b"b"))
    status, _ = world.call(connection, BrokerStatusRequest([TOPIC]))
    (row,) = status.replicas
    assert (row.role, row.leader, row.end_offset, row.committed_offset) == ("leader", leader, 2, 2)
    assert (row.voters, row.fault) == ([0, 1, 2], "")
    assert status.clients == ["raw"]
    status, _ = world.call(connection, BrokerStatusRequest())
    assert {row.topic for row in status.replicas} == {TOPIC, "__metadata"}
    status, _ = world.call(connection, BrokerStatusRequest([]))
    assert status.replicas == []
    lagging = (leader + 1) % 3
    world.cluster.kill_broker(lagging)
    world.until(lambda: lagging not in world.broker(leader).alive_brokers())
    status, _ = world.call(connection, BrokerStatusRequest([TOPIC]))
    assert status.replicas[0].lagging == [lagging]
