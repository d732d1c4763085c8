"""The metadata state machine: what each command does, when it is refused, and equal states after replay."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftlog.errors import (
    ConfigError,
    ForeignDataDir,
    RaftlogError,
    StaleController,
    TopicExists,
    UnknownPartition,
    UnknownTopic,
    from_wire,
    to_wire,
)
from raftlog.raft.types import Entry
from raftlog.record.frame import FrameKind
from raftlog.state.command import ApplyMismatch, UnknownCommand, UnknownSnapshot
from raftlog.state.metadata import (
    FEATURE_LEVEL_MAX,
    FIRST_REPLICA_ID,
    PRODUCER_ID_BLOCK_MAX,
    AllocateProducerIds,
    Broker,
    Command,
    CreateTopic,
    DeleteTopic,
    FoundCluster,
    MetadataState,
    RegisterBroker,
    RemoveBroker,
    SetFeatureLevel,
    TakeControl,
    Topic,
    decode_command,
    encode_command,
)

ID_A, ID_B = b"a" * 16, b"b" * 16


class Metadata:
    """A metadata group in miniature: ``state`` is what its leader stages."""

    def __init__(self) -> None:
        self.state = MetadataState()
        self.entries: list[Entry] = []

    def do(self, command: Command) -> object:
        """Apply the command; what the leader's check says must be what apply does."""
        refusal = self.state.check(command)
        before = self.state.copy()
        result = self.append(FrameKind.COMMAND, encode_command(command))
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


@pytest.fixture
def metadata() -> Metadata:
    """A founded cluster with brokers 1, 2 and 3."""
    made = Metadata()
    made.do(FoundCluster("c1"))
    for broker_id in (1, 2, 3):
        made.do(RegisterBroker(broker_id, b"disk%d" % broker_id, f"node{broker_id}", "zone"))
    return made


# -- cluster and brokers -------------------------------------------------------------------------------------


def test_a_cluster_is_founded_once() -> None:
    metadata = Metadata()
    assert metadata.do(FoundCluster("c1")) == "c1"
    assert metadata.do(FoundCluster("c1")) == "c1", "its retry finds it founded"
    refusal = metadata.do(FoundCluster("c2"))
    assert isinstance(refusal, ForeignDataDir)
    assert "c1" in refusal.message
    assert "c2" in refusal.message
    assert metadata.state.cluster_id == "c1"


def test_a_broker_registers_again_after_moving_to_another_node(metadata: Metadata) -> None:
    metadata.do(RegisterBroker(2, b"disk2", "node9", "other"))
    assert metadata.state.brokers[2] == Broker(2, b"disk2", "node9", "other")
    assert list(metadata.state.brokers) == [1, 2, 3]


def test_a_wiped_disk_is_not_the_broker_it_was(metadata: Metadata) -> None:
    assert isinstance(metadata.do(RegisterBroker(2, b"new disk", "node2", "zone")), ForeignDataDir)
    assert isinstance(metadata.do(RegisterBroker(4, b"disk2", "node2", "zone")), ForeignDataDir)
    assert metadata.do(RegisterBroker(4, b"new disk", "node2", "zone")) is None


# -- topics --------------------------------------------------------------------------------------------------


def test_a_topic_gets_replica_ids_that_are_never_used_twice(metadata: Metadata) -> None:
    topic = metadata.do(create())
    assert isinstance(topic, Topic)
    first = FIRST_REPLICA_ID
    assert topic.partitions == (((first, 1), (first + 1, 2)), ((first + 2, 2), (first + 3, 3)))
    assert topic.config == {"retention_ms": 5}
    metadata.do(DeleteTopic("t", ID_A))
    again = metadata.do(create(topic_id=ID_B))
    assert isinstance(again, Topic)
    assert again.partitions[0] == ((first + 4, 1), (first + 5, 2))


def test_topics_are_found_by_name_by_id_and_by_broker(metadata: Metadata) -> None:
    topic = metadata.do(create())
    other = metadata.do(create("u", ID_B, [[3]]))
    state = metadata.state
    assert state.topic("t") is state.topic_by_id(ID_A) is topic
    assert state.topic_by_id(b"?" * 16) is None
    assert state.partition(ID_A, 1) == ((FIRST_REPLICA_ID + 2, 2), (FIRST_REPLICA_ID + 3, 3))
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
    assert isinstance(metadata.state.check(command), ConfigError)
    with pytest.raises(UnknownCommand, match="feature level"):
        metadata.append(FrameKind.COMMAND, encode_command(command))


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


COMMANDS: list[Command] = [
    FoundCluster("c"),
    RegisterBroker(1, b"d", "n", "z"),
    create(),
    DeleteTopic("t", ID_A),
    AllocateProducerIds(5),
    TakeControl(),
    RemoveBroker(1, 2),
    SetFeatureLevel(1, 2),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
def test_commands_are_arrays_of_type_version_and_fields(command: Command) -> None:
    encoded = encode_command(command)
    assert decode_command(memoryview(encoded)) == command
    assert msgspec.msgpack.decode(encoded) == [command.type, 1, *msgspec.structs.astuple(command)]


def test_the_numbers_of_commands_are_on_disk_for_ever() -> None:
    assert [(type(command).__name__, command.type, command.version) for command in COMMANDS] == [
        ("FoundCluster", 1, 1),
        ("RegisterBroker", 2, 1),
        ("CreateTopic", 3, 1),
        ("DeleteTopic", 4, 1),
        ("AllocateProducerIds", 5, 1),
        ("TakeControl", 6, 1),
        ("RemoveBroker", 7, 1),
        ("SetFeatureLevel", 8, 1),
    ]


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
    metadata.do(RegisterBroker(4, b"disk4", "n"))
    assert copied.snapshot() == before
    assert copied.topic_by_id(ID_A) is copied.topic("t")
    assert copied.topic_by_id(ID_B) is None


def test_snapshots_of_other_versions_are_refused(metadata: Metadata) -> None:
    snapshot = metadata.state.snapshot()
    fields = msgspec.msgpack.decode(snapshot)
    for wrong in ([2, *fields[1:]], [1], [*fields, 0]):
        with pytest.raises(UnknownSnapshot):
            MetadataState.restore(msgspec.msgpack.encode(wrong))


names = st.sampled_from(["a", "b", "c"])
ids = st.sampled_from([ID_A, ID_B, b"c" * 16])
brokers = st.integers(1, 4)
commands = st.one_of(
    st.builds(FoundCluster, st.sampled_from(["c1", "c2"])),
    st.builds(
        RegisterBroker, brokers, st.sampled_from([b"d1", b"d2", b"d3", b"d4"]), st.just("n"), st.just("z")
    ),
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
)


@settings(max_examples=200, deadline=None)
@given(script=st.lists(commands, max_size=40), at=st.integers(0, 40))
def test_replay_through_a_snapshot_gives_an_equal_state(script: list[Command], at: int) -> None:
    metadata = Metadata()
    for broker_id in (1, 2):
        metadata.do(RegisterBroker(broker_id, b"d%d" % broker_id, "n", "z"))
    for command in script:
        metadata.do(command)
    state = metadata.state
    assert metadata.replay() == metadata.replay(snapshot_at=at) == state == state.copy()
    replica_ids = [rid for topic in state.topics.values() for each in topic.partitions for rid, _ in each]
    assert len(set(replica_ids)) == len(replica_ids)
    assert all(FIRST_REPLICA_ID <= rid < state.next_replica_id for rid in replica_ids)
    assert {topic.topic_id for topic in state.topics.values()} == set(state._topics_by_id)
