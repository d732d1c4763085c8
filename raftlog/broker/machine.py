"""What a replica drives: a replicated state machine, applied or staged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

from raftlog.raft.types import Entry
from raftlog.record.frame import Buffer


class StateMachine(Protocol):
    """A replicated state machine (see ``raftlog.state``)."""

    applied_index: int

    def apply(self, entry: Entry) -> object: ...

    def copy(self) -> Self: ...

    def snapshot(self) -> bytes: ...

    @classmethod
    def restore(cls, data: Buffer) -> Self: ...


def stage(staged: StateMachine, entries: Sequence[Entry]) -> None:
    """Advance ``staged`` by those of the entries that it has not seen: what the core appends by itself (a
    configuration) does not come through ``propose``."""
    if entries and staged.applied_index < entries[-1].index:
        for entry in entries:
            if entry.index > staged.applied_index:
                staged.apply(entry)
