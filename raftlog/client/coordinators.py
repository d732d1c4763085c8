"""Where the coordinators of groups and transactions are: leaders of partitions of internal topics.

A group or a transactional id belongs to the partition that its name hashes to, so that its coordinator is
found like the leader of any other partition (:meth:`raftlog.client.cluster.ClusterClient.call_leader`).
"""

from __future__ import annotations

from typing import Final

from raftlog.client.cluster import ClusterClient
from raftlog.client.metadata import PartitionView
from raftlog.record.partitioner import murmur2

GROUPS_TOPIC: Final = "__groups"
TRANSACTIONS_TOPIC: Final = "__transactions"


async def coordinator(cluster: ClusterClient, topic: str, name: str, *, timeout: float) -> PartitionView:
    """The partition whose leader coordinates a group or a transactional id.

    Args:
        topic: GROUPS_TOPIC or TRANSACTIONS_TOPIC; made by the brokers if nobody has asked for it before.
        name: of the group, or the transactional id.
        timeout: seconds.

    Raises:
        ConnectionLost, RequestTimeout, Busy: nobody could say, or make it, in time.
    """
    partitions = (await cluster.topic(topic, timeout=timeout)).partitions
    return partitions[(murmur2(name.encode()) & 0x7FFFFFFF) % len(partitions)]
