"""Replicas that were created on this broker and cannot run: nothing of their data is left, or it does not
check.

They are never opened: messages to them are dropped, so they neither vote nor acknowledge, and an empty
replica never takes the place of one that has forgotten what it promised. They are shown with the reason,
until the metadata gives their place to another replica.
"""

from __future__ import annotations

from raftlog.net.rpc import ReplicaRow
from raftlog.storage.store import BrokerStore


def out_of_service_rows(store: BrokerStore) -> list[ReplicaRow]:
    """How a broker presents such replicas of its directory."""
    return [
        ReplicaRow(
            topic=spec.topic,
            partition=spec.partition,
            replica_id=spec.replica_id,
            role="out of service",
            term=0,
            leader=-1,
            start_offset=0,
            end_offset=0,
            committed_offset=0,
            last_index=0,
            commit_index=0,
            applied_index=0,
            durable_index=0,
            voters=[],
            fault=fault,
        )
        for spec, fault in store.out_of_service.values()
    ]
