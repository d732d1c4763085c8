"""Faults of disks: they stand still, are full, fail a sync, rot, put writes in wrong places, are empty."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from raftlog.testing.atlas import Atlas, Extent
from raftlog.testing.disk import SECTOR_BYTES

if TYPE_CHECKING:
    from raftlog.testing.faults import Nemesis

ROOM_BYTES_MAX: Final = 96 << 10
MISDIRECTED_SECTORS_MAX: Final = 8


class DiskFaults:
    """Does them.

    Args:
        nemesis: whose part this is.
    """

    def __init__(self, nemesis: Nemesis) -> None:
        self._nemesis = nemesis
        self._cluster = nemesis.cluster
        self.atlas = Atlas(nemesis.cluster, nemesis.lost)
        self.faults: dict[str, Callable[[int], None]] = {
            "stall": self._stall,
            "full disk": self._full_disk,
            "failed sync": self._failed_sync,
            "rot": self._rot,
            "misdirected write": self._misdirect,
            "rot of the journal": self._rot_vital,
            "wipe": self._wipe,
        }

    def may(self, name: str, broker_id: int) -> bool:
        """Whether that much may be taken from the cluster now."""
        if name == "failed sync":
            return self._nemesis.may_cut_power(1)
        if name not in ("rot of the journal", "wipe"):
            return True
        nemesis = self._nemesis
        if nemesis.spare <= 0 or nemesis.spare_copies <= 0 or not self.atlas.may_lose(broker_id):
            return False
        return nemesis.mover.is_quorum(nemesis.sound - {broker_id})

    @property
    def _random(self) -> random.Random:
        return self._nemesis.random

    def _stall(self, broker_id: int) -> None:
        disk, seconds = self._cluster.disks[broker_id], self._random.uniform(0.1, 3.0)
        self._cluster.loop.call_soon(disk.stall, seconds)

    def _full_disk(self, broker_id: int) -> None:
        disk = self._cluster.disks[broker_id]
        disk.capacity = disk.used_bytes + self._random.randrange(ROOM_BYTES_MAX)
        self._cluster.loop.call_later(self._random.uniform(0.2, 4.0), self._make_room, broker_id)

    def _make_room(self, broker_id: int) -> None:
        disk = self._cluster.disks.get(broker_id)
        if disk is not None:
            disk.capacity = None

    def _failed_sync(self, broker_id: int) -> None:
        """The next sync fails. What it covered can be read until the power is cut and is not on the device,
        and no later sync says so. The process ends and is started anew: recovery writes again what it read,
        so nothing that it vouches for depends on the sync that failed."""
        self._nemesis.may_have_forgotten(broker_id)
        self._cluster.disks[broker_id].fail_sync(1)

    # -- damage ----------------------------------------------------------------------------------------------

    def _rot(self, broker_id: int) -> None:
        """Bits flip in files that can be repaired, under a broker that runs or just before it starts."""
        for _ in range(self._random.randint(1, 4)):
            extent = self.atlas.choose(broker_id, self._random, 1)
            if extent is not None:
                self.atlas.spoil(extent)
                self._flip(extent)
        self._perhaps_restart(broker_id)

    def _flip(self, extent: Extent) -> None:
        disk = self._cluster.disks[extent.broker_id]
        disk.flip(extent.path, extent.start, 1 << self._random.randrange(8))
        self._nemesis.say(f"rot in {extent.path} at {extent.start} of broker {extent.broker_id}")

    def _misdirect(self, broker_id: int) -> None:
        """What was written to one place went to another, and the place it was meant for holds zeros. Half of
        them hit the same place of another partition's segment."""
        rng, atlas = self._random, self.atlas
        size = rng.randint(1, MISDIRECTED_SECTORS_MAX) * SECTOR_BYTES
        twins = atlas.choose_twins(broker_id, rng, size, SECTOR_BYTES) if rng.random() < 0.5 else None
        meant, hit = twins or (atlas.choose(broker_id, rng, size, SECTOR_BYTES), None)
        if meant is None:
            return
        atlas.spoil(meant)
        hit = hit or atlas.choose(broker_id, rng, meant.end - meant.start, SECTOR_BYTES)
        if hit is not None:
            atlas.spoil(hit)
        disk = self._cluster.disks[broker_id]
        data = disk.content(meant.path)[meant.start : meant.end]
        disk.overwrite(meant.path, meant.start, bytes(len(data)))
        self._nemesis.say(f"a write to {meant.path} at {meant.start} of broker {broker_id} is not there")
        if hit is not None:
            disk.overwrite(hit.path, hit.start, data[: hit.end - hit.start])
            self._nemesis.say(f"it went to {hit.path} at {hit.start}")
        self._perhaps_restart(broker_id)

    def _perhaps_restart(self, broker_id: int) -> None:
        if self._random.random() < 0.5:
            self._cluster.kill_broker(broker_id)
            self._nemesis.start(broker_id)

    def _rot_vital(self, broker_id: int) -> None:
        """Bits flip where nothing can be repaired: the broker may refuse to start, it may not lie."""
        self._nemesis.suspect.add(broker_id)
        self._cluster.kill_broker(broker_id)
        files = self.atlas.vital(broker_id)
        for _ in range(self._random.randint(1, 3)):
            file = self._random.choice(files)
            start = self._random.randrange(file.end)
            self._flip(Extent(broker_id, file.path, start, start + 1))
        self._nemesis.start(broker_id)

    def _wipe(self, broker_id: int) -> None:
        """The directory is gone: the broker stays away, until another one takes its place."""
        self._cluster.kill_broker(broker_id)
        disk = self._cluster.disks[broker_id]
        for path in disk.paths():
            disk.put(path, b"")
        self._nemesis.lose(broker_id)
