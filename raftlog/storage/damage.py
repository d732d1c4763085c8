"""Damage that peers can repair, described so that they can.

Frames are chained by their crcs, so whatever a replica's log lacks can be proved when a peer sends it: it
must follow from the last entry that still checks, and lead to an entry whose crc is known. Such a known crc
is an *anchor*::

      our file   | 7 | 8 | 9 | ### what stood here does not check ### | 14 | 15 | …
                           ^ it goes on behind this crc             ^ 14 names the crc of 13: an anchor

Damage of the journal, the manifest or the identity is none of these: term and vote may be gone with it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

from raftlog.errors import DamagedData
from raftlog.storage.segment import Segment, replica_folder
from raftlog.storage.spec import ReplicaSpec

Anchor: TypeAlias = tuple[int, int]
"""(index of an entry, its crc)."""


class BrokenLog(DamagedData):
    """A replica's chain of frames breaks inside of what had been synced.

    Attributes:
        segment: as its frames describe it up to the last one that checks; the next belongs at its
            ``end_position``.
        anchors: entries further on whose crcs are known.
    """

    segment: Segment
    anchors: frozenset[Anchor]

    @classmethod
    def at(cls, segment: Segment, what: str, anchors: Collection[Anchor] = ()) -> BrokenLog:
        """The chain breaks where ``segment`` ends."""
        spec = segment.spec
        error = cls(
            f"{segment.path}: {what} at byte {segment.end_position}: entry {segment.last_index + 1} of "
            f"{spec.topic}-{spec.partition} is needed from another replica",
            path=segment.path,
            position=segment.end_position,
            replica_id=spec.replica_id,
        )
        error.segment = segment
        error.anchors = frozenset(anchors)
        return error

    def with_anchors(self, anchors: Collection[Anchor]) -> BrokenLog:
        """The same, with what the caller knows."""
        self.anchors |= frozenset(anchors)
        return self


class BrokenSnapshot(DamagedData):
    """A log begins behind a snapshot, and none that it could begin with checks.

    Attributes:
        indexes: any of these snapshots will do.
    """

    indexes: tuple[int, ...]

    @classmethod
    def at(cls, spec: ReplicaSpec, indexes: Collection[int]) -> BrokenSnapshot:
        """One of the snapshots at ``indexes`` is needed."""
        error = cls(
            f"replica {spec.replica_id} of {spec.topic}-{spec.partition}: its log begins after a snapshot, "
            "and none of its snapshots checks",
            path=replica_folder(spec.replica_id),
            replica_id=spec.replica_id,
        )
        error.indexes = tuple(sorted(set(indexes), reverse=True))
        return error
