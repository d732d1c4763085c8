"""What the journal has written and no sync has covered yet, and when the next sync is due.

Only groups that hold nothing but entries of replicas with ``flush_interval_ms`` are written without a sync
(see :func:`must_sync`). Their appends are confirmed as *written*; for storage itself they become durable only
with the sync, so segments, snapshots and the release of journal files never run ahead of the device. A
journal file begins only when all before it is synced.
"""

from __future__ import annotations

from collections.abc import Iterable

from raftlog.raft.types import Append
from raftlog.record.frame import FrameKind
from raftlog.storage.disk import DiskFile, Write
from raftlog.storage.replica_log import ReplicaLog
from raftlog.storage.segment import Segment


def must_sync(log: ReplicaLog, append: Append) -> bool:
    """Whether this append of a replica with an interval must be synced before it is confirmed all the same.

    Term and vote must: a replica that forgot them could vote twice. So must a configuration: one that forgot
    that others were added could elect itself.
    """
    state, known = append.hard_state, log.hard_state
    if state is not None and (state.term, state.vote) != (known.term, known.vote):
        return True
    return any(entry.kind == FrameKind.CONF for entry in append.entries)


class Unsynced:
    """The writes since the last sync.

    Attributes:
        due: loop time at which a sync must begin; None: nothing is written that is not synced.
        appends: how many appends of each replica, by id, its log has not been told of.
    """

    __slots__ = ("_writes", "appends", "due")

    def __init__(self) -> None:
        self._writes: list[tuple[Segment | None, Write]] = []
        self.appends: dict[int, int] = {}
        self.due: float | None = None

    def add(self, writes: Iterable[tuple[Segment | None, Write]], due: float) -> None:
        """These (each with the segment that it goes to, None for the journal) have been written."""
        self._writes += writes
        self.due = due if self.due is None else min(due, self.due)

    def clear(self) -> None:
        """All is synced."""
        self._writes.clear()
        self.due = None

    def files(self) -> list[Write]:
        """What names the files to sync."""
        found: dict[str, DiskFile] = {write.file.path: write.file for write in self.again()}
        return [Write(file, 0, ()) for file in found.values()]

    def again(self) -> list[Write]:
        """The writes themselves, without those to a segment that a truncation took away meanwhile."""
        return [write for segment, write in self._writes if segment is None or segment.file is write.file]
