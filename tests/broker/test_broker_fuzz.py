"""Requests that decode and make no sense: each gets an answer, none of them a bug."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from broker_kit import TOPIC, World, batch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raftlog.errors import RaftlogError
from raftlog.net.catalogue import REQUESTS
from raftlog.net.connection import RpcConnection
from raftlog.net.rpc import (
    BrokerStatusRequest,
    CreateTopicRequest,
    DeleteGroupRequest,
    DeleteOffsetsRequest,
    DeleteTopicRequest,
    DescribeGroupsRequest,
    FetchPartition,
    FetchRequest,
    GroupHeartbeatRequest,
    GroupOffset,
    InitProducerRequest,
    JoinRequest,
    ListOffsetsRequest,
    MetadataCommandRequest,
    MetadataRequest,
    OffsetCommitRequest,
    OffsetFetchRequest,
    OffsetQuery,
    ProducePartition,
    ProduceRequest,
    StageOffsetsRequest,
    UpgradeRequest,
)
from raftlog.net.rpc_cluster import AlterTopicRequest, DrainRequest, ImageRequest, ReportRequest
from raftlog.net.rpc_repair import LogFramesRequest, SnapshotBytesRequest
from raftlog.net.rpc_transactions import (
    AbortTransactionRequest,
    DescribeTransactionsRequest,
    EndTransactionRequest,
    EnlistRequest,
    HangingTransaction,
    InitTransactionsRequest,
    MarkerRow,
    OpenTransactionsRequest,
    WriteMarkersRequest,
)

numbers = st.sampled_from([0, 1, -1, 2, -2, 99, 2**31, -(2**31), 2**53, 2**63 - 1, -(2**63), 2**64 - 1])
names = st.sampled_from(["", ".", TOPIC, "new", "a b", "x" * 300, "\0", "ü", "__metadata"]) | st.text(
    max_size=4
)
plain = (
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=4) | st.lists(numbers, max_size=2)
)
topic_ids = st.sampled_from([b"", b"?" * 16, b"topic", b"groups", b"transactions"]) | st.binary(max_size=17)
"""b"topic" stands for the id of the topic that there is; the others for those of the internal ones."""
places = st.tuples(topic_ids, numbers)
producers = st.sampled_from([-1, 0, 1, 1000, 2**63 - 1])
epochs = st.sampled_from([-1, 0, 1, 32_766, 32_767])
group_offsets = st.lists(st.builds(GroupOffset, topic_ids, numbers, numbers, numbers, names), max_size=3)
fetch_partitions = st.builds(FetchPartition, topic_ids, numbers, numbers, numbers, numbers)
topic_settings = st.sampled_from(
    ["segment_bytes", "retention.ms", "max_message_bytes", "flush", "colour", ""]
)
creations = st.builds(
    CreateTopicRequest,
    names.filter(lambda name: name != TOPIC),
    numbers.filter(lambda count: count not in (1, 2, 99)),
    numbers,
    st.dictionaries(topic_settings, plain, max_size=3),
    st.booleans(),
)

STRATEGIES: dict[type[Any], st.SearchStrategy[Any]] = {
    ProduceRequest: st.builds(
        ProduceRequest,
        st.lists(st.builds(ProducePartition, topic_ids, numbers), max_size=3),
        st.lists(numbers, max_size=3),
        numbers,
    ),
    FetchRequest: st.builds(
        FetchRequest, numbers.map(lambda wait: min(wait, 50)), numbers, st.lists(fetch_partitions, max_size=4)
    ),
    ListOffsetsRequest: st.builds(
        ListOffsetsRequest, st.lists(st.builds(OffsetQuery, topic_ids, numbers, numbers), max_size=3)
    ),
    MetadataRequest: st.builds(MetadataRequest, st.none() | st.lists(names, max_size=3)),
    CreateTopicRequest: creations,
    DeleteTopicRequest: st.builds(DeleteTopicRequest, names.filter(lambda name: name != TOPIC)),
    InitProducerRequest: st.builds(InitProducerRequest, st.none() | st.text(max_size=3)),
    MetadataCommandRequest: st.just(MetadataCommandRequest()),
    JoinRequest: st.builds(
        JoinRequest, st.binary(max_size=20).filter(lambda disk_id: len(disk_id) != 16), names, names, numbers
    ),
    UpgradeRequest: st.builds(UpgradeRequest, numbers),
    BrokerStatusRequest: st.builds(BrokerStatusRequest, st.none() | st.lists(names, max_size=3)),
    LogFramesRequest: st.builds(LogFramesRequest, topic_ids, numbers, numbers, numbers, numbers),
    SnapshotBytesRequest: st.builds(SnapshotBytesRequest, topic_ids, numbers, numbers, numbers, numbers),
    GroupHeartbeatRequest: st.builds(
        GroupHeartbeatRequest,
        topic_ids,
        numbers,
        names,
        names,
        epochs,
        numbers,
        st.lists(names, max_size=2).map(lambda found: tuple(sorted(set(found)))),
        numbers,
        numbers,
        names,
        st.sampled_from(["uniform", "sticky", ""]),
        numbers.map(lambda wait: min(wait, 50)),
    ),
    OffsetCommitRequest: st.builds(
        OffsetCommitRequest, topic_ids, numbers, names, names, epochs, group_offsets
    ),
    OffsetFetchRequest: st.builds(
        OffsetFetchRequest, topic_ids, numbers, names, st.none() | st.lists(places, max_size=2)
    ),
    DescribeGroupsRequest: st.builds(
        DescribeGroupsRequest, topic_ids, numbers, st.none() | st.lists(names, max_size=2)
    ),
    DeleteGroupRequest: st.builds(DeleteGroupRequest, topic_ids, numbers, names),
    StageOffsetsRequest: st.builds(
        StageOffsetsRequest, topic_ids, numbers, names, names, epochs, producers, epochs, group_offsets
    ),
    DeleteOffsetsRequest: st.builds(
        DeleteOffsetsRequest, topic_ids, numbers, names, st.lists(places, max_size=2)
    ),
    InitTransactionsRequest: st.builds(
        InitTransactionsRequest, topic_ids, numbers, names, numbers, producers, epochs
    ),
    EnlistRequest: st.builds(
        EnlistRequest,
        topic_ids,
        numbers,
        names,
        producers,
        epochs,
        st.lists(places, max_size=2),
        st.lists(names, max_size=2),
    ),
    EndTransactionRequest: st.builds(
        EndTransactionRequest, topic_ids, numbers, names, producers, epochs, st.booleans()
    ),
    WriteMarkersRequest: st.builds(
        WriteMarkersRequest,
        st.lists(
            st.builds(MarkerRow, topic_ids, numbers, producers, epochs, numbers, st.booleans()), max_size=3
        ),
    ),
    DescribeTransactionsRequest: st.builds(
        DescribeTransactionsRequest, topic_ids, numbers, st.none() | st.lists(names, max_size=2)
    ),
    AbortTransactionRequest: st.builds(
        AbortTransactionRequest,
        topic_ids,
        numbers,
        names,
        st.none() | st.builds(HangingTransaction, topic_ids, numbers, producers, epochs),
    ),
    OpenTransactionsRequest: st.builds(OpenTransactionsRequest, topic_ids, numbers),
    ImageRequest: st.builds(ImageRequest, numbers),
    AlterTopicRequest: st.builds(AlterTopicRequest, names, numbers, numbers, st.booleans()),
    DrainRequest: st.builds(DrainRequest, st.lists(numbers, max_size=3), st.booleans()),
    ReportRequest: st.builds(ReportRequest),
}
payloads = st.sampled_from([b"", batch(b"a"), batch(b"a")[:-1], b"\x92\x06\x01"]) | st.binary(max_size=80)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(brokers=1) as made:
        made.written(made.dial(0), batch(b"first"))
        yield made


def real(request: Any, topic_id: bytes) -> Any:
    """The request with the topic's real id where it is stood for."""
    if isinstance(request, FetchRequest):
        return msgspec.structs.replace(
            request, partitions=[real(each, topic_id) for each in request.partitions]
        )
    if isinstance(request, ListOffsetsRequest):
        return msgspec.structs.replace(request, queries=[real(each, topic_id) for each in request.queries])
    if isinstance(request, ProduceRequest):
        partitions = [real(each, topic_id) for each in request.partitions]
        return msgspec.structs.replace(request, partitions=partitions)
    if getattr(request, "topic_id", b"") == b"topic":
        return msgspec.structs.replace(request, topic_id=topic_id)
    return request


def test_every_request_has_its_strategy() -> None:
    assert set(STRATEGIES) == set(REQUESTS.values())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@pytest.mark.parametrize("kind", list(STRATEGIES), ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_nonsense_is_answered(world: World, kind: type[Any], data: st.DataObject) -> None:
    """With a response or with a typed error of its own; and the connection stands. What a bug in a handler
    raises would end the simulation."""
    role = data.draw(st.sampled_from(["client", "controller"]))
    connection: RpcConnection = world.dial(0, role)
    try:
        request = real(data.draw(STRATEGIES[kind]), world.topic_id)
        task = world.ask(connection, request, (data.draw(payloads),))
        world.until(task.done)
        error = task.exception()
        assert error is None or (isinstance(error, RaftlogError) and type(error) is not RaftlogError), error
        assert not connection.closed
        assert world.fetched(connection)[0] == b"first"
    finally:
        connection.close()
