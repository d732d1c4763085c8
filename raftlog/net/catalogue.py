"""All requests and one-way messages by their numbers."""

from __future__ import annotations

from typing import Any, Final

from raftlog.net import rpc, rpc_cluster, rpc_repair, rpc_transactions

REQUESTS: Final[dict[int, type[rpc.Request[Any]]]] = {
    cls.api: cls
    for cls in (
        rpc.ProduceRequest,
        rpc.FetchRequest,
        rpc.ListOffsetsRequest,
        rpc.MetadataRequest,
        rpc.CreateTopicRequest,
        rpc.DeleteTopicRequest,
        rpc.InitProducerRequest,
        rpc.MetadataCommandRequest,
        rpc.JoinRequest,
        rpc.UpgradeRequest,
        rpc.BrokerStatusRequest,
        rpc.GroupHeartbeatRequest,
        rpc.OffsetCommitRequest,
        rpc.OffsetFetchRequest,
        rpc.DescribeGroupsRequest,
        rpc.DeleteGroupRequest,
        rpc.StageOffsetsRequest,
        rpc.DeleteOffsetsRequest,
        rpc_repair.LogFramesRequest,
        rpc_repair.SnapshotBytesRequest,
        rpc_cluster.ImageRequest,
        rpc_cluster.AlterTopicRequest,
        rpc_cluster.DrainRequest,
        rpc_cluster.ReportRequest,
        rpc_transactions.InitTransactionsRequest,
        rpc_transactions.EnlistRequest,
        rpc_transactions.EndTransactionRequest,
        rpc_transactions.WriteMarkersRequest,
        rpc_transactions.DescribeTransactionsRequest,
        rpc_transactions.AbortTransactionRequest,
        rpc_transactions.OpenTransactionsRequest,
    )
}
ONE_WAY: Final[dict[int, type[rpc.Struct]]] = {
    cls.api: cls for cls in (rpc.Addresses, rpc.RaftMessages, rpc.BrokerHeartbeat, rpc.ProduceRequest)
}
