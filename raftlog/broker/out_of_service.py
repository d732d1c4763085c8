"""Replicas that were created on this broker and do not run: nothing of their data is left, it does not check,
or a newer release wrote it.

They are not opened: messages to them are dropped, so they neither vote nor acknowledge, and an empty replica
never takes the place of one that has forgotten what it promised. They are shown with the reason, until they
are repaired (``repair.py``) or the metadata gives their place to another replica.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftlog.net.rpc import ReplicaRow
from raftlog.storage.spec import ReplicaSpec

if TYPE_CHECKING:
    from raftlog.broker.broker import Broker


def out_of_service_rows(broker: Broker) -> list[ReplicaRow]:
    """How a broker presents such replicas of its directory."""
    store = broker.store
    found = dict(store.out_of_service)
    for replica_id in store.ward.patients:
        note = broker.repairs.note(replica_id)
        if replica_id in found:
            spec, fault = found[replica_id]
            found[replica_id] = (spec, note or fault)
        elif broker.replica(replica_id) is None and replica_id in store.logs:
            found[replica_id] = (store.logs[replica_id].spec, note)
    for replica_id, error in broker.hosting.halted.items():
        found[replica_id] = (store.logs[replica_id].spec, str(error))
    return [_row(spec, fault) for spec, fault in found.values()]


def _row(spec: ReplicaSpec, fault: str) -> ReplicaRow:
    return ReplicaRow(
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
