"""How a replica's state machine comes back after a restart: its newest snapshot, and the log above it that is
known to be committed."""

from __future__ import annotations

from typing import Final

from raftlog.broker.history import lacks_beginning
from raftlog.broker.machine import StateMachine
from raftlog.broker.replica import M
from raftlog.raft.config import RecoveredLog
from raftlog.storage.replica_log import ReplicaLog

_CHUNK_BYTES: Final = 8 << 20


async def restored(log: ReplicaLog, kind: type[M]) -> tuple[M, RecoveredLog]:
    """The state machine of a recovered log, and what the core begins with."""
    machine = kind.restore(log.snapshot.data) if log.snapshot is not None else kind()
    return machine, await recover(log, machine)


async def recover(log: ReplicaLog, machine: StateMachine) -> RecoveredLog:
    """Apply what a recovered log knows to be committed above the machine's snapshot.

    Args:
        log: as storage recovered it.
        machine: restored from ``log.snapshot``, or new when there is none.

    Returns:
        What the core begins with.
    """
    found = log.recovered
    applied = log.snapshot.index if log.snapshot is not None else found.first_index - 1
    commit = min(found.hard_state.commit, found.last_index)
    while applied < commit:
        for entry in await log.entries(applied + 1, commit + 1, _CHUNK_BYTES):
            machine.apply(entry)
            applied = entry.index
    log.set_committed(applied)
    return RecoveredLog(
        hard_state=found.hard_state,
        confs=found.confs,
        first_index=found.first_index,
        prev_term=found.prev_term,
        prev_crc=found.prev_crc,
        terms=found.terms,
        last_index=found.last_index,
        tail=found.tail,
        applied=applied,
        last_crc=found.last_crc,
        last_leader_time_ms=found.last_leader_time_ms,
        amnesiac=log.amnesiac or lacks_beginning(found),
    )
