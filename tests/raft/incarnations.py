"""A replica comes back with less than it had acknowledged: flush=interval and a power cut."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
from raft_cluster import Cluster

from raftlog.raft.config import RaftConfig
from raftlog.raft.raw_node import RawNode


def power_cut(cluster: Cluster, replica: int, keep: int, *, amnesiac: bool = True) -> RawNode:
    """The replica comes back with the first ``keep`` entries of its log; term and vote are whole. Its peers
    see its connections break and come back, and a new incarnation behind them."""
    disk = cluster.disks[replica]
    disk.pending.clear()
    del disk.entries[keep:]
    disk.hard_state = msgspec.structs.replace(disk.hard_state, commit=min(disk.hard_state.commit, keep))
    cluster.wire = type(cluster.wire)(m for m in cluster.wire if replica not in (m.to, m.sender))
    recovered = replace(disk.recovered(), amnesiac=amnesiac)
    config = RaftConfig(id=replica, **cluster.settings)
    node = cluster.nodes[replica] = RawNode(config, recovered, random.Random(replica), cluster.now)
    cluster.committed[replica] = []
    cluster.down.discard(replica)
    for other, peer in cluster.nodes.items():
        if other != replica:
            peer.peer_lost(replica, cluster.now)
    return node


def reconnect(cluster: Cluster, replica: int) -> None:
    """The connections to the replica's new incarnation stand."""
    for other, peer in cluster.nodes.items():
        if other != replica and (other, replica) not in cluster.cut_links:
            peer.peer_restored(replica, cluster.now, forgot=True)
