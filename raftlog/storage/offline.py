"""A broker's directory as it stands: recovered in memory, and nothing on the disk is changed.

What recovery would cut or remove is left there. For looking before something irrevocable is done.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from raftlog.errors import DamagedData, DataDirError, ForeignDataDir
from raftlog.raft.types import Entry
from raftlog.storage.disk import Disk
from raftlog.storage.identity import Identity, find_identity
from raftlog.storage.journal_scan import scan_journal
from raftlog.storage.manifest import load_manifest
from raftlog.storage.recovery import FrameSource, RecoveredReplica, recover_replica, replay_whole
from raftlog.storage.segment import Segment
from raftlog.storage.segment_reader import SegmentReader
from raftlog.storage.spec import ReplicaSpec, StorageConfig

_READ_BYTES = 4 << 20


@dataclass(slots=True)
class OfflineStore:
    """What one directory holds.

    Attributes:
        identity: whose it is.
        replicas: those that can run, by id.
        unusable: lost and damaged ones, by id, and what is wrong with each.
        amnesiac: ids of those that may lack the end of what they had written: it was not synced yet when the
            machine, or a sync, failed.
    """

    identity: Identity
    replicas: dict[int, RecoveredReplica] = field(default_factory=dict)
    unusable: dict[int, tuple[ReplicaSpec, str]] = field(default_factory=dict)
    amnesiac: frozenset[int] = frozenset()


async def look_into(disk: Disk) -> OfflineStore:
    """Read a directory. The caller has locked it.

    Args:
        disk: rooted at the broker's directory.

    Raises:
        DataDirError: it has no identity.
        ForeignDataDir: its files are of another disk.
        DamagedData: identity, manifest or journal do not check.
    """
    identity = await find_identity(disk)
    if identity is None:
        raise DataDirError("the data directory has no identity: no broker was founded in it")
    found = OfflineStore(identity)
    manifest = await load_manifest(disk)
    if manifest is None:
        return found
    if manifest.disk_id != found.identity.disk_id:
        raise ForeignDataDir("the manifest was written on another disk")
    scan = await scan_journal(disk, manifest.disk_id, manifest.journal_sequence)
    if scan.damage:
        raise scan.damage[0]
    source = FrameSource(disk)
    replayed = await replay_whole(scan, source)
    for spec in manifest.replicas:
        held = replayed.get(spec.replica_id)
        if held is None or held.checkpoint is None:
            found.unusable[spec.replica_id] = spec, "nothing is left of it"
            continue
        try:
            found.replicas[spec.replica_id] = await recover_replica(disk, StorageConfig(), spec, held, source)
        except DamagedData as error:
            found.unusable[spec.replica_id] = spec, error.message
    amnesiac = set(manifest.amnesiac)
    if not manifest.clean and manifest.boot_id != disk.boot_id:
        amnesiac.update(spec.replica_id for spec in manifest.replicas if spec.flush_interval_ms)
    found.amnesiac = frozenset(amnesiac)
    return found


async def entries_above(disk: Disk, replica: RecoveredReplica, index: int) -> AsyncIterator[Entry]:
    """The entries of a replica's log above ``index``, which its first segment or a snapshot reaches, in
    order, uncommitted ones included.

    Raises:
        DamagedData: a frame does not check.
    """
    reader = SegmentReader(disk, StorageConfig(), _ignore)
    for segment in replica.segments:
        try:
            while index < segment.last_index:
                for entry in await reader.entries(segment, index + 1, segment.last_index + 1, _READ_BYTES):
                    yield entry
                    index = entry.index
        finally:
            reader.forget(segment)
    for entry in replica.recovered.tail:
        if entry.index > index:
            yield entry


def _ignore(segment: Segment) -> None:
    """Damage is raised as well, and nobody repairs here."""
