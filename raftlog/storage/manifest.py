"""The synced list of replicas that were created on this broker.

A row without data is a *lost* replica: it has forgotten its term and vote, so it must never vote under that
id again.
"""

from __future__ import annotations

from typing import Final

import msgspec

from raftlog.storage.checked_file import seal, unseal_as
from raftlog.storage.disk import Disk
from raftlog.storage.spec import ReplicaSpec

MANIFEST_PATH: Final = "MANIFEST"
_MAGIC: Final = b"RLOGMANI"
_VERSION: Final = 1


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    """Contents of the manifest file."""

    disk_id: bytes
    replicas: tuple[ReplicaSpec, ...] = ()
    journal_sequence: int = 0
    """The journal had a durable file of this sequence number when the manifest was written: should the newest
    one found be older, the journal's end is missing."""
    clean: bool = False
    """True from a clean stop until the next start."""
    boot_id: str = ""
    """The operating system's boot during which it was written."""
    amnesiac: tuple[int, ...] = ()
    """Replicas that may have lost entries which they had confirmed as written: not synced yet when the
    machine, or a sync, failed. Each stays here until it has caught up with a leader."""
    metadata_index: int = 0
    """Index of the metadata by which a replica was removed last: older metadata may still name it, and it
    must not come into being again under its id."""

    def rebooted(self, boot_id: str) -> bool:
        """Whether the system was started anew since, without a clean stop: what was written and not synced
        may be gone."""
        return not self.clean and self.boot_id != boot_id

    def amnesiac_at(self, boot_id: str) -> set[int]:
        """Ids of ``amnesiac`` replicas, and of those that are by now."""
        if not self.rebooted(boot_id):
            return set(self.amnesiac)
        return {*self.amnesiac, *(spec.replica_id for spec in self.replicas if spec.flush_interval_ms)}


async def load_manifest(disk: Disk) -> Manifest | None:
    """The manifest, None when there is none yet (DamagedData when it does not check)."""
    if not await disk.exists(MANIFEST_PATH):
        return None
    return unseal_as(Manifest, _MAGIC, _VERSION, await disk.read_file(MANIFEST_PATH), MANIFEST_PATH)


async def store_manifest(disk: Disk, manifest: Manifest) -> None:
    """Write it atomically and durably."""
    await disk.replace_file(MANIFEST_PATH, seal(_MAGIC, _VERSION, msgspec.msgpack.encode(manifest)))
