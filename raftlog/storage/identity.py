"""Who a data directory belongs to: cluster, broker, disk, secret, and how to find the metadata group.

The file ``IDENTITY`` is written once when a broker joins and again when its incarnation or its knowledge of
addresses changes. It holds the cluster's secret, so only its owner may read it.
"""

from __future__ import annotations

from typing import Final

import msgspec

from raftlog.errors import DataDirError, ForeignDataDir
from raftlog.storage.checked_file import seal, unseal_as
from raftlog.storage.disk import Disk

IDENTITY_PATH: Final = "IDENTITY"
_MAGIC: Final = b"RLOGIDNT"
_VERSION: Final = 2


class Identity(msgspec.Struct, frozen=True, array_like=True):
    """Contents of the identity file."""

    cluster_id: str
    cluster_name: str
    broker_id: int
    disk_id: bytes
    """16 random bytes drawn when the directory was made: a wiped disk is a new broker."""
    incarnation: int
    """Grows by one with each start of the broker."""
    secret: bytes
    metadata_replica: int
    """Id of this broker's replica of the metadata group."""
    metadata_voters: tuple[tuple[int, int], ...] = ()
    """(broker id, replica id) of the metadata group's first configuration, learners included."""
    addresses: dict[int, tuple[int, str, int]] = {}
    """Broker id -> (incarnation, host, port), as last heard of."""
    survivors: tuple[int, ...] = ()
    """The brokers with which the cluster went on when it had lost its majority for good (``raftlog
    recover``); () if that never happened."""
    recovering: bool = False
    """That has begun in this directory and is not finished: no broker may run here before."""

    def next_incarnation(self) -> Identity:
        """The identity of the broker's next start."""
        return msgspec.structs.replace(self, incarnation=self.incarnation + 1)

    def check_recovered(self) -> None:
        """Raise DataDirError if a recovery of this directory has begun and is not finished."""
        if self.recovering:
            raise DataDirError(
                f"the recovery of broker {self.broker_id}'s directory was not finished: run `raftlog "
                "recover` again, with the same directories"
            )

    def check(
        self, *, cluster_id: str | None = None, broker_id: int | None = None, disk_id: bytes | None = None
    ) -> None:
        """Compare with what the caller expects to find; None is not compared.

        Raises:
            ForeignDataDir: the directory is someone else's.
        """
        for name, expected, found in (
            ("cluster", cluster_id, self.cluster_id),
            ("broker", broker_id, self.broker_id),
            ("disk", disk_id, self.disk_id),
        ):
            if expected is not None and expected != found:
                raise ForeignDataDir(
                    f"the data directory belongs to {name} {_text(found)}, not {_text(expected)}: "
                    "give this broker a directory of its own",
                    path=IDENTITY_PATH,
                )


def _text(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


async def load_identity(disk: Disk) -> Identity:
    """The directory's identity.

    Raises:
        DataDirError: it has none: it was never founded. Or it is being recovered.
        DamagedData: the file does not check.
    """
    identity = await find_identity(disk)
    if identity is None:
        raise DataDirError(f"the data directory has no {IDENTITY_PATH}: no broker was founded in it")
    identity.check_recovered()
    return identity


async def find_identity(disk: Disk) -> Identity | None:
    """The directory's identity, None when it has none yet (DamagedData when the file does not check)."""
    if not await disk.exists(IDENTITY_PATH):
        return None
    return parse_identity(await disk.read_file(IDENTITY_PATH))


def parse_identity(data: bytes) -> Identity:
    """Decode the identity file's bytes (DamagedData when they do not check)."""
    return unseal_as(Identity, _MAGIC, _VERSION, data, IDENTITY_PATH)


async def store_identity(disk: Disk, identity: Identity) -> None:
    """Write it atomically and durably.

    Raises:
        ForeignDataDir: the directory already belongs to another cluster, broker or disk.
    """
    found = await find_identity(disk)
    if found is not None:
        found.check(cluster_id=identity.cluster_id, broker_id=identity.broker_id, disk_id=identity.disk_id)
    await disk.replace_file(IDENTITY_PATH, seal(_MAGIC, _VERSION, msgspec.msgpack.encode(identity)))
