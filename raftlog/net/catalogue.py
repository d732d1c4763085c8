"""The rpc catalogue: which api number stands for which request or one-way message."""

from __future__ import annotations

from typing import Any, Final

from raftlog.net.rpc import (
    Addresses,
    BrokerHeartbeat,
    BrokerStatusRequest,
    CreateTopicRequest,
    DeleteGroupRequest,
    DeleteOffsetsRequest,
    DeleteTopicRequest,
    DescribeGroupsRequest,
    FetchRequest,
    GroupHeartbeatRequest,
    InitProducerRequest,
    JoinRequest,
    ListOffsetsRequest,
    LogFramesRequest,
    MetadataCommandRequest,
    MetadataRequest,
    OffsetCommitRequest,
    OffsetFetchRequest,
    ProduceRequest,
    RaftMessages,
    Request,
    SnapshotBytesRequest,
    StageOffsetsRequest,
    Struct,
)

REQUESTS: Final[dict[int, type[Request[Any]]]] = {
    cls.api: cls
    for cls in (
        ProduceRequest,
        FetchRequest,
        ListOffsetsRequest,
        MetadataRequest,
        CreateTopicRequest,
        DeleteTopicRequest,
        InitProducerRequest,
        MetadataCommandRequest,
        JoinRequest,
        BrokerStatusRequest,
        GroupHeartbeatRequest,
        OffsetCommitRequest,
        OffsetFetchRequest,
        DescribeGroupsRequest,
        DeleteGroupRequest,
        StageOffsetsRequest,
        DeleteOffsetsRequest,
        LogFramesRequest,
        SnapshotBytesRequest,
    )
}
ONE_WAY: Final[dict[int, type[Struct]]] = {
    Addresses.api: Addresses,
    RaftMessages.api: RaftMessages,
    BrokerHeartbeat.api: BrokerHeartbeat,
    ProduceRequest.api: ProduceRequest,
}
