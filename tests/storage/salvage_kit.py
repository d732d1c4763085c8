"""What the tests of repair share: stores in several segments, ways to damage them, and repair by hand."""

from __future__ import annotations

from storage_kit import DISK_ID, SMALL, grow, spec

from raftlog.storage.damage import BrokenLog
from raftlog.storage.real_disk import RealDisk
from raftlog.storage.segment import SEGMENT_HEADER_BYTES
from raftlog.storage.store import BrokerStore
from raftlog.testing.disk import CrashMode, SimDisk

ENTRIES = 150


async def open_store(disk: SimDisk | RealDisk) -> BrokerStore:
    return await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)


async def filled(
    disk: SimDisk | RealDisk, *, count: int = ENTRIES, large: tuple[int, ...] = ()
) -> BrokerStore:
    """A store with one replica in several segments, the last of them growing."""
    store = await open_store(disk)
    log = await store.create(spec())
    for number in range(count):
        size = 3000 if number in large else 100
        await grow(store, log, 1, size=size, term=1 + number // 60)
    await store.flush()
    return store


async def repaired(store: BrokerStore, *peers: BrokerStore, bytes_max: int = 700) -> int:
    """Repair replica 1 with what the peers have; returns how many patches it took."""
    patches = 0
    while (damage := await store.ward.next_damage(1)) is not None:
        assert isinstance(damage, BrokenLog), damage
        patch = await store.ward.patch(damage)
        while not patch.is_proved:
            for peer in peers:
                found = await peer.ward.frames(1, patch.index, patch.prev_crc, bytes_max)
                if found:
                    break
            else:
                raise damage
            await patch.add(found)
            if patch.is_hopeless:
                patch.restart()
                raise damage
        await patch.apply()
        await patch.close()
        patches += 1
        assert patches < 20
    return patches


def segments(disk: SimDisk) -> dict[str, bytes]:
    return {path: disk.content(path) for path in disk.paths() if path.endswith(".seg")}


def flip(disk: SimDisk, path: str, *positions: int) -> None:
    for position in positions:
        disk.flip(path, position)


def flip_in(disk: SimDisk, paths: list[str], *places: float) -> None:
    """Flip a bit at each of these parts of the files' frames."""
    for path in paths:
        size = len(disk.content(path)) - SEGMENT_HEADER_BYTES
        flip(disk, path, *(SEGMENT_HEADER_BYTES + int(size * place) for place in places))


def cut(disk: SimDisk, path: str, place: float) -> None:
    content = disk.content(path)
    disk.put(path, content[: int(len(content) * place)])


def remove(disk: SimDisk, *paths: str) -> None:
    for path in paths:
        del disk._nodes[path]


def forget_indexes(disk: SimDisk) -> None:
    """Without index files, recovery reads the frames of every segment."""
    remove(disk, *(path for path in disk.paths() if path.endswith(".idx")))


async def crashed(store: BrokerStore, disk: SimDisk, mode: CrashMode = CrashMode.NONE) -> SimDisk:
    """The power goes: what is left of the disk."""
    left = disk.crash(mode)
    await store.abort()
    return left
