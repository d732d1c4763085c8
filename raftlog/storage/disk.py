"""The Disk seam: everything that touches a file goes through it.

A Disk is rooted in one broker's data directory; paths are relative to it, with "/" between parts. Writes are
positional. There are two lanes: ``commit`` is the journal's, served in call order by one writer thread and
made to be short; ``write`` is for lazy work (segments, snapshots) and may run beside it. What was written
without a sync survives the process, not the machine; the next sync of the same file covers it.

Errors: StorageFull when the device has no room, StorageFailed for every other failure of the device,
FileNotFoundError where a path that must exist does not. After a failed sync the caller must not trust the
file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from raftlog.record.frame import Buffer


class DiskFile(Protocol):
    """An open file. Closing twice is allowed."""

    @property
    def path(self) -> str:
        """Relative to the disk's root."""

    def try_read(self, position: int, size: int) -> bytes | None:
        """The bytes if they can be had without blocking (page cache); None if not. Short at the end of the
        file."""

    async def read(self, position: int, size: int) -> bytes:
        """Read at most ``size`` bytes; short at the end of the file."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Write:
    """One gathered write of ``buffers``, one after another, from ``position`` on. Without buffers it only
    names a file to sync."""

    file: DiskFile
    position: int
    buffers: Sequence[Buffer]


class Disk(Protocol):
    """A broker's directory."""

    @property
    def boot_id(self) -> str:
        """Which boot of the operating system this is. Equal to one seen earlier only if nothing that was
        written since can have been lost for want of a sync."""

    async def open(self, path: str, *, create: bool = False, allocate: int = 0) -> DiskFile:
        """Open for reading and writing. ``create`` makes it (and its folder) if missing, durably;
        ``allocate`` reserves that many bytes so that later syncs need not grow the file."""

    async def commit(self, writes: Sequence[Write], *, sync: bool = True) -> None:
        """The journal's lane: all writes, in order, then (with ``sync``) one sync of each file named. First
        in, first out."""

    def begin_commit(
        self, writes: Sequence[Write], done: Callable[[BaseException | None], None], sync: bool = True
    ) -> None:
        """As :meth:`commit`, without a coroutine: ``done`` is called on the loop, now or later, with None or
        with what ``commit`` would have raised."""

    async def write(self, writes: Sequence[Write], *, sync: bool = True) -> None:
        """The lazy lane: all writes, then (with ``sync``) a sync of each file."""

    async def truncate(self, file: DiskFile, size: int) -> None:
        """Cut the file at ``size`` and sync it."""

    async def file_size(self, path: str) -> int: ...

    async def read_file(self, path: str) -> bytes: ...

    async def replace_file(self, path: str, data: bytes) -> None:
        """Atomically and durably make ``path`` hold ``data`` (write aside, sync, rename, sync the folder)."""

    async def list(self, folder: str) -> list[str]:
        """Names in the folder, sorted; [] when there is no such folder."""

    async def exists(self, path: str) -> bool: ...

    async def remove(self, path: str) -> None:
        """Remove a file (durably); missing is fine."""

    async def remove_tree(self, folder: str) -> None:
        """Remove a folder and all in it; missing is fine."""

    async def rename(self, old: str, new: str) -> None:
        """Rename durably (the folder is synced)."""

    async def free_bytes(self) -> int:
        """Bytes that may still be written."""

    async def lock(self) -> None:
        """Take the directory for this process until ``close``; DataDirLocked names the holder."""

    async def close(self) -> None:
        """Let running work end, close files, release the lock."""
