"""The metadata state machine: what each command does, when it is refused, and equal states after replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftlog.errors import (
    ConfigError,
    ForeignDataDir,
    InvalidReplicationFactor,
    RaftlogError,
    StaleController,
    TopicExists,
    UnknownPartition,
    UnknownReplica,
    UnknownTopic,
    from_wire,
    to_wire,
)
from raftlog.raft.types import Entry
from raftlog.record.frame import FrameKind
from raftlog.state.command import ApplyMismatch, UnknownCommand, UnknownSnapshot
from raftlog.state.image import Broker, Partition, Topic
from raftlog.state.metadata import (
    FEATURE_LEVEL_MAX,
    FIRST_REPLICA_ID,
    PRODUCER_ID_BLOCK_MAX,
    MetadataState,
)
from raftlog.state.metadata_commands import (
    CODEC,
    COMMANDS,
    AddBroker,
    AddPartitions,
    AllocateProducerIds,
    AlterPartition,
    Command,
    CompletePartition,
    CreateTopic,
    DeleteTopic,
    FoundCluster,
    RegisterBroker,
    RemoveBroker,
    ReplaceReplica,
    SetDraining,
    SetFeatureLevel,
    SetReplication,
    TakeControl,
)

ID_A, ID_B = b"a" * 16, b"b" * 16
FOUNDERS = ((1, 11), (2, 12), (3, 13))


class Metadata:
    """A metadata group in miniature: ``state`` is what its leader stages."""

    def __init__(self) -> None:
        self.state = MetadataState()
        self.entries: list[Entry] = []

    def do(self, command: Command) -> object:
        """Apply the command; what the leader's check says must be what apply does."""
        refusal = self.state.check(command)
        before = self.state.copy()
        result = self.append(FrameKind.COMMAND, CODEC.encode(command))
        if refusal is None:
            assert not isinstance(result, RaftlogError)
        else:
            assert isinstance(result, RaftlogError)
            assert to_wire(result) == to_wire(refusal)
            before.applied_index += 1
            assert self.state == before, "a refused command changes nothing"
        return result

    def append(self, kind: int, payload: bytes) -> object:
        entry = Entry.create(0, kind, 1, self.state.applied_index + 1, 1000, payload)
        result = self.state.apply(entry)
        self.entries.append(entry)
        return result

    def replay(self, snapshot_at: int | None = None) -> MetadataState:
        state = MetadataState()
        for position, entry in enumerate(self.entries):
            if position == snapshot_at:
                state = MetadataState.restore(state.snapshot())
            state.apply(entry)
        return state


def create(
    name: str = "t", topic_id: bytes = ID_A, assignment: Sequence[Sequence[int]] = ((1, 2), (2, 3))
) -> CreateTopic:
    return CreateTopic(name, topic_id, {"retention_ms": 5}, False, [list(each) for each in assignment])


def register(broker_id: int, disk_id: bytes | None = None, **changes: Any) -> RegisterBroker:
    disk_id = disk_id or b"disk%d" % broker_id
    row = RegisterBroker(broker_id, disk_id, f"node{broker_id}", "zone", broker_id + 10, 1)
    return msgspec.structs.replace(row, **changes)


@pytest.fixture
def metadata() -> Metadata:
    """A founded cluster with brokers 1, 2 and 3."""
    made = Metadata()
    made.do(FoundCluster("c1", FOUNDERS, 1))
    for broker_id in (1, 2, 3):
        made.do(register(broker_id))
    return made


# -- cluster and brokers -------------------------------------------------------------------------------------


def test_a_cluster_is_founded_once() -> None:
    metadata = Metadata()
    assert metadata.do(FoundCluster("c1", FOUNDERS, 1)) == "c1"
    assert metadata.do(FoundCluster("c1", FOUNDERS, 1)) == "c1", "its retry finds it founded"
    refusal = metadata.do(FoundCluster("c2", FOUNDERS, 1))
    assert isinstance(refusal, ForeignDataDir)
    assert "c1" in refusal.message
    assert "c2" in refusal.message
    assert metadata.state.cluster_id == "c1"


def test_a_broker_registers_again_after_moving_to_another_node(metadata: Metadata) -> None:
    metadata.do(register(2, node_id="node9", zone="other"))
    assert metadata.state.brokers[2] == Broker(2, b"disk2", "node9", "other", 12)
    assert list(metadata.state.brokers) == [1, 2, 3]


def test_a_wiped_disk_is_not_the_broker_it_was(metadata: Metadata) -> None:
    assert isinstance(metadata.do(register(2, b"new disk")), ForeignDataDir)
    assert isinstance(metadata.do(register(4, b"disk2")), ForeignDataDir)
    assert isinstance(metadata.do(register(4, b"new disk")), ForeignDataDir), "nobody was added under that id"
    added = metadata.do(AddBroker(b"new disk", "node2", "zone", 1))
    assert added == (Broker(4, b"new disk", "node2", "zone", FIRST_REPLICA_ID), FOUNDERS)
    assert metadata.do(AddBroker(b"new disk", "node2", "zone", 1)) == added, "its retry gives the same broker"
    assert metadata.do(register(4, b"new disk", metadata_replica=FIRST_REPLICA_ID, node_id="node9")) is None
    assert isinstance(metadata.do(register(4, b"new disk")), ForeignDataDir), "another metadata replica"
    other = metadata.do(AddBroker(b"another disk", "node3", "zone", 1))
    assert isinstance(other, tuple)
    assert other[0].broker_id == 5


def test_a_removed_broker_does_not_come_back_and_its_id_is_not_given_again(metadata: Metadata) -> None:
    metadata.do(TakeControl())
    for broker_id in (3, 2):
        assert metadata.do(RemoveBroker(1, broker_id)) is None
    assert isinstance(metadata.do(RemoveBroker(1, 1)), ConfigError), "the last one"
    assert isinstance(metadata.do(register(3)), ForeignDataDir)
    added = metadata.do(AddBroker(b"disk3", "node3", "zone", 1))
    assert isinstance(added, tuple)
    assert added[0].broker_id == 4
    assert metadata.replay(snapshot_at=5) == metadata.state


def test_no_broker_is_added_before_the_cluster_is_founded() -> None:
    assert isinstance(Metadata().do(AddBroker(b"d", "n", "z", 1)), ConfigError)


# -- topics --------------------------------------------------------------------------------------------------


def test_a_topic_gets_replica_ids_that_are_never_used_twice(metadata: Metadata) -> None:
    topic = metadata.do(create())
    assert isinstance(topic, Topic)
    first = FIRST_REPLICA_ID
    assert topic.partitions == (
        Partition(((first, 1), (first + 1, 2)), (), (first, first + 1)),
        Partition(((first + 2, 2), (first + 3, 3)), (), (first + 2, first + 3)),
    )
    assert topic.config == {"retention_ms": 5}
    metadata.do(DeleteTopic("t", ID_A))
    again = metadata.do(create(topic_id=ID_B))
    assert isinstance(again, Topic)
    assert again.partitions[0].replicas == ((first + 4, 1), (first + 5, 2))


def test_topics_are_found_by_name_by_id_and_by_broker(metadata: Metadata) -> None:
    topic = metadata.do(create())
    other = metadata.do(create("u", ID_B, [[3]]))
    state = metadata.state
    assert state.topic("t") is state.topic_by_id(ID_A) is topic
    assert state.topic_by_id(b"?" * 16) is None
    assert state.partition(ID_A, 1).replicas == ((FIRST_REPLICA_ID + 2, 2), (FIRST_REPLICA_ID + 3, 3))
    assert list(state.replicas_on(2)) == [(topic, 0, FIRST_REPLICA_ID + 1), (topic, 1, FIRST_REPLICA_ID + 2)]
    assert list(state.replicas_on(3)) == [(topic, 1, FIRST_REPLICA_ID + 3), (other, 0, FIRST_REPLICA_ID + 4)]
    assert list(state.replicas_on(9)) == []
    with pytest.raises(UnknownTopic, match="'nope'"):
        state.topic("nope")
    with pytest.raises(UnknownTopic):
        state.partition(b"?" * 16, 0)
    for index in (2, -1):
        with pytest.raises(UnknownPartition, match="0 to 1"):
            state.partition(ID_A, index)


def test_what_is_wrong_with_a_new_topic(metadata: Metadata) -> None:
    metadata.do(create())
    assert isinstance(metadata.do(create(topic_id=ID_B)), TopicExists)
    assert isinstance(metadata.do(create("other", ID_A)), TopicExists)
    for assignment, complaint in (
        ([], "needs a partition"),
        ([[1], []], "needs a partition"),
        ([[1], [2, 7, 8]], r"unknown brokers \[7, 8\]"),
        ([[1, 2, 1]], "broker twice"),
    ):
        refusal = metadata.do(create("u", ID_B, assignment))
        assert isinstance(refusal, ConfigError)
        with pytest.raises(ConfigError, match=complaint):
            raise refusal
    assert isinstance(metadata.do(create("u", ID_B)), Topic)


def test_deleting_names_the_topic_that_was_meant(metadata: Metadata) -> None:
    """A delayed delete must not hit the topic that was made again under the name."""
    metadata.do(create())
    assert metadata.do(DeleteTopic("t", ID_A)) is None
    assert metadata.state.topics == {}
    assert metadata.state.topic_by_id(ID_A) is None
    metadata.do(create(topic_id=ID_B))
    assert isinstance(metadata.do(DeleteTopic("t", ID_A)), UnknownTopic)
    assert "t" in metadata.state.topics


# -- moves ---------------------------------------------------------------------------------------------------


def moved(metadata: Metadata, *replicas: tuple[int, int]) -> Partition:
    """The first partition, wanted on these (broker id, replica id or 0)."""
    result = metadata.do(AlterPartition(metadata.state.controller_epoch, ID_A, 0, list(replicas)))
    assert isinstance(result, Partition)
    assert metadata.state.partition(ID_A, 0) is result
    return result


def test_a_replica_moves_in_two_steps(metadata: Metadata) -> None:
    """Wanted elsewhere, it stays until the group's leader says that the configuration has followed."""
    metadata.do(TakeControl())
    topic = metadata.do(create(assignment=[[1, 2]]))
    a, b, c = FIRST_REPLICA_ID, FIRST_REPLICA_ID + 1, FIRST_REPLICA_ID + 2
    assert moved(metadata, (3, 0), (2, b)) == Partition(((c, 3), (b, 2)), ((a, 1),), (a, b), 2)
    state = metadata.state
    assert [next(state.replicas_on(broker))[2] for broker in (1, 2, 3)] == [a, b, c]
    assert state.topic("t") is state.topic_by_id(ID_A) is not topic
    assert isinstance(metadata.do(RemoveBroker(1, 1)), ConfigError), "its replica has not left yet"
    assert isinstance(metadata.do(CompletePartition(ID_A, 0, 1)), UnknownReplica), "of an older assignment"
    done = metadata.do(CompletePartition(ID_A, 0, 2))
    assert done == Partition(((c, 3), (b, 2)), (), (a, b), 3)
    assert list(metadata.state.replicas_on(1)) == []
    assert metadata.do(RemoveBroker(1, 1)) is None


def test_a_move_may_be_called_off_and_asked_for_twice(metadata: Metadata) -> None:
    metadata.do(TakeControl())
    metadata.do(create(assignment=[[1, 2]]))
    a, b, c = FIRST_REPLICA_ID, FIRST_REPLICA_ID + 1, FIRST_REPLICA_ID + 2
    moving = moved(metadata, (1, a), (3, 0))
    assert moved(metadata, (1, a), (3, c)) is moving, "nothing new"
    assert moved(metadata, (1, a), (2, b)) == Partition(((a, 1), (b, 2)), ((c, 3),), (a, b), 3)
    assert moved(metadata, (2, b), (1, a)).version == 4, "another preferred leader"


def test_a_lost_replica_is_replaced_on_its_broker(metadata: Metadata) -> None:
    metadata.do(create(assignment=[[1, 2]]))
    a, b, c = FIRST_REPLICA_ID, FIRST_REPLICA_ID + 1, FIRST_REPLICA_ID + 2
    assert metadata.do(ReplaceReplica(ID_A, 0, b)) == c
    assert metadata.state.partition(ID_A, 0) == Partition(((a, 1), (c, 2)), ((b, 2),), (a, b), 2)
    assert isinstance(metadata.do(ReplaceReplica(ID_A, 0, b)), UnknownReplica), "its retry"


def test_what_is_wrong_with_a_move(metadata: Metadata) -> None:
    metadata.do(TakeControl())
    metadata.do(create(assignment=[[1, 2]]))
    a, b = FIRST_REPLICA_ID, FIRST_REPLICA_ID + 1
    for replicas, complaint in (
        ([], "at least one"),
        ([(1, a), (9, 0)], "each known"),
        ([(1, a), (1, a)], "none twice"),
        ([(1, 0), (2, b)], "broker 1 has replicas"),
        ([(1, a), (3, b)], "broker 3 has replicas"),
        ([(1, b)], "broker 1 has replicas"),
    ):
        refusal = metadata.do(AlterPartition(1, ID_A, 0, replicas))
        with pytest.raises(ConfigError, match=complaint):
            raise refusal  # type: ignore[misc]
    assert isinstance(metadata.do(AlterPartition(0, ID_A, 0, [(1, a)])), StaleController)
    for command in (
        AlterPartition(1, ID_B, 0, [(1, a)]),
        ReplaceReplica(ID_B, 0, a),
        CompletePartition(ID_B, 0, 1),
    ):
        assert isinstance(metadata.do(command), UnknownTopic)
        other = msgspec.structs.replace(command, topic_id=ID_A, partition=7)
        assert isinstance(metadata.do(other), UnknownPartition)
    assert metadata.state.partition(ID_A, 0).version == 1


# -- counters ------------------------------------------------------------------------------------------------


def test_blocks_of_producer_ids_never_overlap(metadata: Metadata) -> None:
    assert [metadata.do(AllocateProducerIds(count)) for count in (1000, 1, 1000)] == [0, 1000, 1001]
    for count in (0, -5, PRODUCER_ID_BLOCK_MAX + 1):
        assert isinstance(metadata.do(AllocateProducerIds(count)), ConfigError)
    assert metadata.do(AllocateProducerIds(PRODUCER_ID_BLOCK_MAX)) == 2001


def test_of_two_controllers_only_the_later_one_acts(metadata: Metadata) -> None:
    first, second = metadata.do(TakeControl()), metadata.do(TakeControl())
    assert (first, second) == (1, 2)
    refusal = metadata.do(RemoveBroker(1, 3))
    assert isinstance(refusal, StaleController)
    assert refusal.epoch == 2
    assert 3 in metadata.state.brokers
    assert metadata.do(RemoveBroker(2, 3)) is None
    assert 3 not in metadata.state.brokers
    assert isinstance(metadata.do(SetFeatureLevel(3, 1)), StaleController), "an epoch that nobody was given"


def test_a_broker_that_holds_replicas_is_not_removed(metadata: Metadata) -> None:
    metadata.do(TakeControl())
    metadata.do(create())
    refusal = metadata.do(RemoveBroker(1, 3))
    assert isinstance(refusal, ConfigError)
    assert "partition 1 of 't'" in refusal.message
    assert isinstance(metadata.do(RemoveBroker(1, 9)), ConfigError)
    metadata.do(DeleteTopic("t", ID_A))
    assert metadata.do(RemoveBroker(1, 3)) is None


def test_the_feature_level_never_goes_down(metadata: Metadata) -> None:
    metadata.do(TakeControl())
    assert metadata.do(SetFeatureLevel(1, 1)) == 1
    assert isinstance(metadata.do(SetFeatureLevel(1, 0)), ConfigError)


def test_a_level_above_this_release_is_not_proposed_and_halts_if_it_comes(metadata: Metadata) -> None:
    metadata.do(TakeControl())
    command = SetFeatureLevel(1, FEATURE_LEVEL_MAX + 1)
    refusal = metadata.do(command)
    assert isinstance(refusal, ConfigError), "brokers do not know it"
    for broker_id in (1, 2, 3):
        metadata.do(register(broker_id, level=FEATURE_LEVEL_MAX + 1))
    assert isinstance(metadata.state.check(command), ConfigError)
    with pytest.raises(UnknownCommand, match="feature level"):
        metadata.append(FrameKind.COMMAND, CODEC.encode(command))


# -- entries, encoding, copies -------------------------------------------------------------------------------


def test_entries_that_are_not_commands_count_and_unknown_ones_halt(metadata: Metadata) -> None:
    before = metadata.state.applied_index
    assert metadata.append(FrameKind.NOOP, b"") is None
    assert metadata.append(FrameKind.CONF, b"x") is None
    assert metadata.state.applied_index == before + 2
    for kind, payload in (
        (FrameKind.BATCH, b"x"),
        (9, b""),
        (FrameKind.COMMAND, msgspec.msgpack.encode([99, 1])),
    ):
        with pytest.raises(UnknownCommand):
            metadata.append(kind, payload)
    with pytest.raises(ApplyMismatch):
        metadata.state.apply(Entry.create(0, FrameKind.NOOP, 1, before + 4, 0, b""))
    assert metadata.state.applied_index == before + 2


EXAMPLES: list[Command] = [
    FoundCluster("c", FOUNDERS, 1),
    register(1),
    create(),
    DeleteTopic("t", ID_A),
    AllocateProducerIds(5),
    TakeControl(),
    RemoveBroker(1, 2),
    SetFeatureLevel(1, 2),
    AlterPartition(1, ID_A, 0, [(1, 0)]),
    ReplaceReplica(ID_A, 0, 1000),
    CompletePartition(ID_A, 0, 2),
    AddBroker(b"d", "n", "z", 1),
    AddPartitions(ID_A, 1, [[1, 2]]),
    SetReplication(ID_A, 2),
    SetDraining(1, True),
]


@pytest.mark.parametrize("command", EXAMPLES, ids=lambda command: type(command).__name__)
def test_commands_are_arrays_of_type_version_and_fields(command: Command) -> None:
    encoded = CODEC.encode(command)
    assert CODEC.decode(memoryview(encoded)) == command
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(msgspec.structs.astuple(command)))
    assert msgspec.msgpack.decode(encoded) == [command.type, 1, *fields]


def test_the_numbers_of_commands_are_on_disk_for_ever() -> None:
    assert [(type(command).__name__, command.type, command.version) for command in EXAMPLES] == [
        ("FoundCluster", 1, 1),
        ("RegisterBroker", 2, 1),
        ("CreateTopic", 3, 1),
        ("DeleteTopic", 4, 1),
        ("AllocateProducerIds", 5, 1),
        ("TakeControl", 6, 1),
        ("RemoveBroker", 7, 1),
        ("SetFeatureLevel", 8, 1),
        ("AlterPartition", 9, 1),
        ("ReplaceReplica", 10, 1),
        ("CompletePartition", 11, 1),
        ("AddBroker", 12, 1),
        ("AddPartitions", 13, 1),
        ("SetReplication", 14, 1),
        ("SetDraining", 15, 1),
    ]
    assert tuple(type(command) for command in EXAMPLES) == COMMANDS


def test_a_topic_gets_more_partitions_once(metadata: Metadata) -> None:
    before = metadata.do(create())
    count = len(before.partitions)
    more = AddPartitions(ID_A, count, [[2, 1], [1]])
    topic = metadata.do(more)
    assert topic.partitions[:count] == before.partitions
    assert [[holder for _, holder in each.replicas] for each in topic.partitions[count:]] == [[2, 1], [1]]
    assert isinstance(metadata.do(more), ConfigError), "its retry adds nothing"
    assert isinstance(metadata.do(AddPartitions(ID_B, 1, [[1]])), UnknownTopic)
    assert isinstance(metadata.do(AddPartitions(ID_A, count + 2, [[1, 1]])), ConfigError)
    assert isinstance(metadata.do(AddPartitions(ID_A, count + 2, [[9]])), ConfigError)
    assert metadata.state.topic("t") == topic == metadata.state.topic_by_id(ID_A)


def test_nobody_adds_partitions_to_an_internal_topic(metadata: Metadata) -> None:
    metadata.do(CreateTopic("__groups", ID_A, {}, True, [[1]]))
    assert isinstance(metadata.do(AddPartitions(ID_A, 1, [[1]])), ConfigError)


def test_the_wanted_replication_is_kept(metadata: Metadata) -> None:
    assert metadata.do(create()).replication == 0
    assert metadata.do(SetReplication(ID_A, 2)).replication == 2
    assert isinstance(metadata.do(SetReplication(ID_A, 99)), InvalidReplicationFactor)
    assert isinstance(metadata.do(SetReplication(ID_B, 1)), UnknownTopic)
    assert metadata.state.topic("t").replication == 2


def test_a_broker_drains_until_it_is_told_not_to_or_runs_elsewhere(metadata: Metadata) -> None:
    assert metadata.do(SetDraining(1, True)).draining
    metadata.do(register(1))
    assert metadata.state.brokers[1].draining, "started again on the same node"
    assert not metadata.do(SetDraining(1, False)).draining
    metadata.do(SetDraining(1, True))
    metadata.do(msgspec.structs.replace(register(1), node_id="another"))
    assert not metadata.state.brokers[1].draining
    assert isinstance(metadata.do(SetDraining(99, True)), ConfigError)


def test_results_travel_to_whoever_asked(metadata: Metadata) -> None:
    topic = metadata.do(create())
    assert msgspec.convert(msgspec.msgpack.decode(msgspec.msgpack.encode(topic)), Topic) == topic
    refusal = metadata.do(create())
    assert isinstance(refusal, TopicExists)
    assert isinstance(from_wire(*to_wire(refusal)), TopicExists)


def test_a_copy_is_independent(metadata: Metadata) -> None:
    metadata.do(create())
    copied = metadata.state.copy()
    before = copied.snapshot()
    metadata.do(DeleteTopic("t", ID_A))
    metadata.do(create("u", ID_B))
    metadata.do(AddBroker(b"disk4", "n", "", 1))
    assert copied.snapshot() == before
    assert copied.topic_by_id(ID_A) is copied.topic("t")
    assert copied.topic_by_id(ID_B) is None


def test_snapshots_of_other_versions_are_refused(metadata: Metadata) -> None:
    snapshot = metadata.state.snapshot()
    fields = msgspec.msgpack.decode(snapshot)
    for wrong in ([1, *fields[1:]], [2], [*fields, 0]):
        with pytest.raises(UnknownSnapshot):
            MetadataState.restore(msgspec.msgpack.encode(wrong))


names = st.sampled_from(["a", "b", "c"])
ids = st.sampled_from([ID_A, ID_B, b"c" * 16])
brokers = st.integers(1, 4)
disks = st.sampled_from([b"d1", b"d2", b"d3", b"d4"])
replica_ids = st.integers(FIRST_REPLICA_ID, FIRST_REPLICA_ID + 6)
commands = st.one_of(
    st.builds(FoundCluster, st.sampled_from(["c1", "c2"]), st.just(FOUNDERS), st.just(1)),
    st.builds(register, brokers, disks),
    st.builds(AddBroker, disks, st.just("n"), st.just("z"), st.just(1)),
    st.builds(
        CreateTopic,
        names,
        ids,
        st.dictionaries(st.sampled_from(["retention_ms", "flush"]), st.integers(0, 9)),
        st.booleans(),
        st.lists(st.lists(brokers, max_size=3), max_size=3),
    ),
    st.builds(DeleteTopic, names, ids),
    st.builds(AllocateProducerIds, st.integers(-1, 10)),
    st.builds(TakeControl),
    st.builds(RemoveBroker, st.integers(0, 3), brokers),
    st.builds(SetFeatureLevel, st.integers(0, 3), st.integers(0, FEATURE_LEVEL_MAX)),
    st.builds(
        AlterPartition,
        st.integers(0, 3),
        ids,
        st.integers(0, 1),
        st.lists(st.tuples(brokers, replica_ids | st.just(0)), max_size=3),
    ),
    st.builds(ReplaceReplica, ids, st.integers(0, 1), replica_ids),
    st.builds(CompletePartition, ids, st.integers(0, 1), st.integers(1, 4)),
    st.builds(AddPartitions, ids, st.integers(0, 3), st.lists(st.lists(brokers, max_size=3), max_size=2)),
    st.builds(SetReplication, ids, st.integers(-1, 4)),
    st.builds(SetDraining, brokers, st.booleans()),
)


@settings(max_examples=200, deadline=None)
@given(script=st.lists(commands, max_size=40), at=st.integers(0, 40))
def test_replay_through_a_snapshot_gives_an_equal_state(script: list[Command], at: int) -> None:
    metadata = Metadata()
    metadata.do(FoundCluster("c1", FOUNDERS, 1))
    for broker_id in (1, 2):
        metadata.do(register(broker_id, b"d%d" % broker_id))
    for command in script:
        metadata.do(command)
    state = metadata.state
    assert metadata.replay() == metadata.replay(snapshot_at=at) == state == state.copy()
    given = [rid for topic in state.topics.values() for each in topic.partitions for rid, _ in each.members]
    given += [each.metadata_replica for each in state.brokers.values() if each.broker_id not in (1, 2, 3)]
    assert len(set(given)) == len(given)
    assert all(FIRST_REPLICA_ID <= rid < state.next_replica_id for rid in given)
    assert {topic.topic_id for topic in state.topics.values()} == set(state._topics_by_id)
