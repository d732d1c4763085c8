"""The atlas of damage: which copies of which entries are spoilt, so that one good copy of each is left.

What is in a replica's folder (segments, their indexes, snapshots) is repaired from any peer that has the
bytes. So every broker may be damaged, as long as each entry that is damaged anywhere stands whole on the
disk of at least one member of its group: at other entries each may be. It may be down or cut off meanwhile;
then those that need it wait. Terms and votes are not at stake: they are in the journal. Journal, manifest
and identity cannot be repaired: whoever damages those must count the broker as lost.

Which bytes of a segment are which entry is known from the watch's books, not from the code under test.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Final

from raftlog.storage.journal_format import FILE_HEADER_BYTES
from raftlog.storage.journal_scan import scan_journal
from raftlog.storage.segment import SEGMENT_HEADER_BYTES, parse_segment_name
from raftlog.storage.snapshot_file import parse_snapshot_name
from raftlog.testing.books import Group, Member
from raftlog.testing.sim_cluster import SimCluster

TRIES_MAX: Final = 20
_SNAPSHOT: Final = -1


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of one file on one broker's disk."""

    broker_id: int
    path: str
    start: int
    end: int


class Atlas:
    """What was damaged so far.

    Args:
        cluster: whose disks.
        lost: brokers whose data is lost for good (shared with the nemesis).
    """

    def __init__(self, cluster: SimCluster, lost: set[int]) -> None:
        self.cluster = cluster
        self._lost = lost
        self._spoilt: dict[tuple[str, int, int], set[int]] = defaultdict(set)
        """(group, index, crc) -> brokers whose copy is damaged; of a snapshot the crc is _SNAPSHOT."""

    # -- files that are repaired -----------------------------------------------------------------------------

    def extents(self, broker_id: int) -> list[Extent]:
        """The files of a broker's replicas, as far as they are written."""
        disk = self.cluster.disks[broker_id]
        found = []
        for path in disk.paths():
            if path.startswith("replicas/"):
                size = len(disk.content(path))
                if path.endswith(".seg"):
                    size = max((end for _, end, _ in self._entries(broker_id, path)), default=0)
                if size:
                    found.append(Extent(broker_id, path, 0, size))
        return found

    @property
    def spoilt(self) -> set[int]:
        """Brokers on whose disks anything was damaged that can be repaired."""
        return {broker_id for brokers in self._spoilt.values() for broker_id in brokers}

    def may_spoil(self, extent: Extent) -> bool:
        """Whether a good copy of all that stands there is left on somebody else's disk."""
        return all(
            self._has_good_copy(group, index, crc, {extent.broker_id})
            for group, index, crc in self._what_stands_at(extent)
        )

    def spoil(self, extent: Extent) -> None:
        """Those bytes are damaged now."""
        for group, index, crc in self._what_stands_at(extent):
            self._spoilt[group.name, index, crc].add(extent.broker_id)

    def may_lose(self, broker_id: int) -> bool:
        """Whether all that is damaged anywhere has a good copy without this broker's disk."""
        groups = {group.name: group for group in self.cluster.watch.groups.values()}
        return all(
            self._has_good_copy(groups[name], index, crc, {broker_id}) for name, index, crc in self._spoilt
        )

    def choose(self, broker_id: int, rng: random.Random, size: int, align: int = 1) -> Extent | None:
        """``size`` bytes of a replica's file that may be damaged, if some are soon found."""
        files = self.extents(broker_id)
        for _ in range(TRIES_MAX if files else 0):
            file = rng.choice(files)
            start = rng.randrange(file.end) // align * align
            extent = Extent(broker_id, file.path, start, min(start + size, file.end))
            if self.may_spoil(extent):
                return extent
        return None

    def choose_twins(
        self, broker_id: int, rng: random.Random, size: int, align: int
    ) -> tuple[Extent, Extent] | None:
        """The same ``size`` bytes of two partitions' segments that begin with the same index, where frames of
        one may pass for the other's: often the first ones, for later frames seldom begin at the same byte."""
        files = self.extents(broker_id)
        twins = [
            (one, other)
            for one, other in permutations(files, 2)
            if one.path.endswith(".seg") and _name(one) == _name(other)
        ]
        for _ in range(TRIES_MAX if twins else 0):
            pair = rng.choice(twins)
            end = min(each.end for each in pair)
            start = rng.choice([0, rng.randrange(end) // align * align])
            one, other = (replace(each, start=start, end=min(start + size, end)) for each in pair)
            if self.may_spoil(one) and self.may_spoil(other):
                return one, other
        return None

    def _what_stands_at(self, extent: Extent) -> Iterator[tuple[Group, int, int]]:
        found = self._owner(extent.broker_id, extent.path)
        if found is None or extent.path.endswith(".idx"):
            return
        if extent.path.endswith(".snap"):
            index = parse_snapshot_name(_name(extent))
            if index is not None:
                yield found[0], index, _SNAPSHOT
            return
        for start, end, (index, crc) in self._entries(extent.broker_id, extent.path):
            if start < extent.end and extent.start < end:
                yield found[0], index, crc

    def _owner(self, broker_id: int, path: str) -> tuple[Group, Member] | None:
        """Whose file that is; None: of nobody any more."""
        replica_id = int(path.split("/")[1])
        for group in self.cluster.watch.groups.values():
            member = group.members.get(replica_id)
            if member is not None and member.broker_id == broker_id:
                return group, member
        return None

    def _entries(self, broker_id: int, path: str) -> Iterator[tuple[int, int, tuple[int, int]]]:
        """(first byte, byte behind, (index, crc)) of each entry of a segment that a later sync has covered
        again: damage to the last ones could not be told from a torn write. The header counts as a part of the
        first."""
        found = self._owner(broker_id, path)
        name = parse_segment_name(path.rsplit("/", 1)[1])
        if found is None or name is None:
            return
        rows, covered, index = found[1].rows, found[1].covered, name[0]
        start, end = 0, SEGMENT_HEADER_BYTES
        size = len(self.cluster.disks[broker_id].content(path))
        while index in rows and index <= covered:
            end += rows[index].size
            if end > size:
                return
            yield start, end, (index, rows[index].crc)
            start, index = end, index + 1

    def _has_good_copy(self, group: Group, index: int, crc: int, without: set[int]) -> bool:
        spoilt = self._spoilt.get((group.name, index, crc), set()) | without | self._lost
        confs = group.confs_in_force()
        for member in group.members.values():
            if member.broker_id in spoilt or member.broker_id not in self.cluster.disks:
                continue
            if not all(member.replica_id in conf.members for conf in confs):
                continue
            if crc == _SNAPSHOT:
                path = f"replicas/{member.replica_id}/{index:016x}.snap"
                if path in self.cluster.disks[member.broker_id].paths():
                    return True
            elif index <= member.durable and index in member.rows and member.rows[index].crc == crc:
                return True
        return False

    # -- files that are not ----------------------------------------------------------------------------------

    def vital(self, broker_id: int) -> list[Extent]:
        """Journal, manifest, identity. What the journal holds above its sync floor is spared: damage there
        cannot be told from a torn write, and recovery rightly cuts it."""
        disk = self.cluster.disks[broker_id]
        scan = self.cluster.run(scan_journal(disk, None))
        floors = {file.path: min(file.end, scan.floor) - file.base for file in scan.files}
        found = []
        for path in disk.paths():
            size = len(disk.content(path))
            if path in floors:
                size = FILE_HEADER_BYTES + floors[path] if floors[path] > 0 else 0
            if size and not path.startswith("replicas/"):
                found.append(Extent(broker_id, path, 0, size))
        return found


def _name(extent: Extent) -> str:
    return extent.path.rsplit("/", 1)[1]
