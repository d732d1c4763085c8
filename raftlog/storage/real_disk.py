"""The Disk of production: a directory of a local file system.

The journal's lane: a small commit is carried out on the loop's own thread while the device is quick, for to
hand it to another thread and back takes as long as the sync. Large ones, and all while the device is slow, go
to one thread of their own, in order, and the loop goes on meanwhile. A small pool serves lazy writes, reads
that must wait, and everything about names.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Final, ParamSpec, TypeVar

from raftlog.errors import DataDirError, DataDirLocked, StorageFailed, StorageFull
from raftlog.record.frame import Buffer
from raftlog.storage.disk import DiskFile, Write
from raftlog.telemetry.counters import Latency

P = ParamSpec("P")
T = TypeVar("T")

_IOV_MAX: Final = 1024
_POOL_THREADS: Final = 4
_FILE_MODE: Final = 0o600
_FOLDER_MODE: Final = 0o700
_NOWAIT: Final[int] = getattr(os, "RWF_NOWAIT", 0)
_BOOT_ID_PATH: Final = Path("/proc/sys/kernel/random/boot_id")
_READ_CHUNK: Final = 1 << 30
"""Linux moves at most 2 GiB in one call."""
_SMALL_BYTES: Final = 32 << 10
"""A commit up to this is small."""
_QUICK_S: Final = 0.001
"""The device is quick while small commits take less than this, on average."""
_AVERAGE_SHARE: Final = 0.125
"""Of the newest one in the average."""


class RealFile:
    """An open file. A descriptor is closed only after the operations that use it: closing it under them could
    make them hit another file that was given the same number."""

    __slots__ = ("_closed", "_path", "_pool", "_users", "fd")

    def __init__(self, path: str, fd: int, pool: ThreadPoolExecutor) -> None:
        self._path = path
        self.fd = fd
        self._pool = pool
        self._users = 0
        self._closed = False

    @property
    def path(self) -> str:
        return self._path

    def acquire(self) -> None:
        """One more operation under way (on the loop's thread)."""
        if self._closed:
            raise StorageFailed(f"{self._path} is closed")
        self._users += 1

    def release(self) -> None:
        """One less."""
        self._users -= 1
        if self._closed and self._users == 0:
            os.close(self.fd)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._users == 0:
                os.close(self.fd)

    def try_read(self, position: int, size: int) -> bytes | None:
        if not _NOWAIT or self._closed:
            return None
        buffer = bytearray(size)
        try:
            count = os.preadv(self.fd, [buffer], position, _NOWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # a file system without the flag: use the threads
                return None
            raise _typed(error, self._path) from error
        if count < size and position + count < os.fstat(self.fd).st_size:
            return None  # only its beginning is in memory
        return bytes(memoryview(buffer)[:count]) if count < size else bytes(buffer)

    async def read(self, position: int, size: int) -> bytes:
        return await _in_thread(self._pool, [self], _read, self.fd, self._path, position, size)


class RealDisk:
    """A broker's directory on a local file system.

    Args:
        root: the directory; made if missing.

    Raises:
        DataDirError: it cannot be made, or is not writable.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        try:
            self.root.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
        except OSError as error:
            raise DataDirError(f"cannot make the data directory {root}: {error.strerror}") from error
        if not os.access(self.root, os.R_OK | os.W_OK | os.X_OK):
            raise DataDirError(f"the data directory {root} is not writable by this user")
        self._queue: SimpleQueue[_Commit | None] = SimpleQueue()
        self._writer: threading.Thread | None = None
        self._handed_over = 0
        """Commits that the thread has and is not done with."""
        self._average_s = 0.0
        """How long small commits take."""
        self._pool = ThreadPoolExecutor(_POOL_THREADS, thread_name_prefix="raftlog-disk")
        self._lock_fd = -1
        self._closed = False
        self.boot_id: Final = _boot_id()
        self.syncs: Final = Latency()
        """Of the journal's groups that are synced."""

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        assert not kwargs
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    async def open(self, path: str, *, create: bool = False, allocate: int = 0) -> DiskFile:
        fd = await self._run(_open, self.root, path, create, allocate)
        return RealFile(path, fd, self._pool)

    async def commit(self, writes: Sequence[Write], *, sync: bool = True) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.begin_commit(writes, partial(_settle, done), sync)
        await done

    def begin_commit(
        self, writes: Sequence[Write], done: Callable[[BaseException | None], None], sync: bool = True
    ) -> None:
        loop = asyncio.get_running_loop()
        if self._closed:
            loop.call_soon(done, StorageFailed("the disk is closed"))
            return
        try:
            files = _acquire(writes)
        except StorageFailed as error:
            loop.call_soon(done, error)
            return
        small = len(writes) == 1 and sum(map(len, writes[0].buffers)) <= _SMALL_BYTES
        commit = _Commit(writes, sync, files, done, small)
        if small and not self._handed_over and self._average_s < _QUICK_S:
            commit.carry_out()
            self._finish(commit)
            return
        if self._writer is None:
            self._writer = threading.Thread(
                target=_serve_commits,
                args=(self._queue, loop, self._returned),
                name="raftlog-journal",
                daemon=True,
            )
            self._writer.start()
        self._handed_over += 1
        self._queue.put(commit)

    def _returned(self, commit: _Commit) -> None:
        """The thread is done with a commit."""
        self._handed_over -= 1
        self._finish(commit)

    def _finish(self, commit: _Commit) -> None:
        if commit.sync and commit.error is None:
            syncs = self.syncs
            syncs.count += 1
            if syncs.count >= syncs.next:
                syncs.add(commit.took_s)
            if commit.small:
                self._average_s += (commit.took_s - self._average_s) * _AVERAGE_SHARE
        _release(commit.files)
        commit.done(commit.error)

    async def write(self, writes: Sequence[Write], *, sync: bool = True) -> None:
        files = [_real(write.file) for write in writes]
        await _in_thread(self._pool, files, _write_all, writes, sync)

    async def truncate(self, file: DiskFile, size: int) -> None:
        real = _real(file)
        await _in_thread(self._pool, [real], _truncate, real.fd, real.path, size)

    async def file_size(self, path: str) -> int:
        return (await self._run(os.stat, self.root / path)).st_size

    async def read_file(self, path: str) -> bytes:
        return await self._run(_guarded(lambda: (self.root / path).read_bytes(), path))

    async def replace_file(self, path: str, data: bytes) -> None:
        await self._run(_replace_file, self.root, path, data)

    async def list(self, folder: str) -> list[str]:
        return await self._run(_list, self.root / folder)

    async def exists(self, path: str) -> bool:
        return await self._run((self.root / path).exists)

    async def remove(self, path: str) -> None:
        await self._run(_remove, self.root, path)

    async def remove_tree(self, folder: str) -> None:
        await self._run(_remove_tree, self.root, folder)

    async def rename(self, old: str, new: str) -> None:
        await self._run(_rename, self.root, old, new)

    async def free_bytes(self) -> int:
        found = await self._run(os.statvfs, self.root)
        return found.f_bavail * found.f_frsize

    async def lock(self) -> None:
        if self._lock_fd < 0:
            self._lock_fd = await self._run(_lock, self.root)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._writer is not None:
            self._queue.put(None)
            await self._run(self._writer.join)
        await asyncio.get_running_loop().run_in_executor(None, self._pool.shutdown)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)  # the lock goes with the descriptor
            self._lock_fd = -1


# -- the journal's lane --------------------------------------------------------------------------------------


class _Commit:
    __slots__ = ("done", "error", "files", "small", "sync", "took_s", "writes")

    def __init__(
        self,
        writes: Sequence[Write],
        sync: bool,
        files: list[RealFile],
        done: Callable[[BaseException | None], None],
        small: bool,
    ) -> None:
        self.writes = writes
        self.sync = sync
        self.files = files
        self.done = done
        self.small = small
        self.took_s = 0.0
        self.error: BaseException | None = None

    def carry_out(self) -> None:
        """Write and sync, on whichever thread."""
        began = time.perf_counter()
        try:
            _write_all(self.writes, self.sync)
        except BaseException as caught:  # noqa: BLE001 - whatever it is, the waiter must hear of it
            self.error = caught
        self.took_s = time.perf_counter() - began


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    """Tell who awaits a commit, unless it was cancelled meanwhile."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _serve_commits(
    queue: SimpleQueue[_Commit | None],
    loop: asyncio.AbstractEventLoop,
    returned: Callable[[_Commit], None],
) -> None:
    while (commit := queue.get()) is not None:
        commit.carry_out()
        with contextlib.suppress(RuntimeError):  # the loop was closed while the write was under way
            loop.call_soon_threadsafe(returned, commit)


async def _in_thread(
    pool: ThreadPoolExecutor, files: list[RealFile], function: Callable[..., T], *args: object
) -> T:
    """Run in a thread what uses these files. Shielded: a cancelled caller must not make the descriptors
    available while the thread uses them."""
    for file in files:
        file.acquire()
    future = asyncio.get_running_loop().run_in_executor(pool, function, *args)
    future.add_done_callback(lambda _: _release(files))
    return await asyncio.shield(future)


def _acquire(writes: Sequence[Write]) -> list[RealFile]:
    files = [_real(write.file) for write in writes]
    for file in files:
        file.acquire()
    return files


def _release(files: list[RealFile]) -> None:
    for file in files:
        file.release()


def _real(file: DiskFile) -> RealFile:
    assert isinstance(file, RealFile), "a file of another disk"
    return file


def _boot_id() -> str:
    """Linux tells. Elsewhere nothing does that can be relied on: each process then takes itself for the first
    of a new boot."""
    try:
        return _BOOT_ID_PATH.read_text(encoding="ascii").strip()
    except OSError:
        return str(uuid.uuid4())


# -- what runs in threads ------------------------------------------------------------------------------------


def _typed(error: OSError, path: str) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"no room on the device of {path}", path=path)
    return StorageFailed(f"{path}: {error.strerror or error}", path=path, errno=error.errno)


def _guarded(function: Callable[[], T], path: str) -> Callable[[], T]:
    def run() -> T:
        try:
            return function()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _typed(error, path) from error

    return run


def _write_all(writes: Sequence[Write], sync: bool) -> None:
    fds: dict[int, str] = {}
    for write in writes:
        file = _real(write.file)
        fds[file.fd] = file.path
        try:
            _pwritev(file.fd, write.buffers, write.position)
        except OSError as error:
            raise _typed(error, file.path) from error
    if sync:
        for fd, path in fds.items():
            try:
                os.fdatasync(fd)
            except OSError as error:
                raise _typed(error, path) from error


def _pwritev(fd: int, buffers: Sequence[Buffer], position: int) -> None:
    for start in range(0, len(buffers), _IOV_MAX):
        group = buffers[start : start + _IOV_MAX] if len(buffers) > _IOV_MAX else buffers
        wanted = sum(map(len, group))
        written = os.pwritev(fd, group, position)
        while written < wanted:  # short: a signal, a quota, or more than 2 GiB
            written += os.pwritev(fd, _skip(group, written)[:_IOV_MAX], position + written)
        position += wanted


def _skip(buffers: Sequence[Buffer], count: int) -> list[Buffer]:
    rest: list[Buffer] = []
    for buffer in buffers:
        if count >= len(buffer):
            count -= len(buffer)
        else:
            rest.append(memoryview(buffer)[count:] if count else buffer)
            count = 0
    return rest


def _read(fd: int, path: str, position: int, size: int) -> bytes:
    parts: list[bytes] = []
    while size > 0:
        try:
            part = os.pread(fd, min(size, _READ_CHUNK), position)
        except OSError as error:
            raise _typed(error, path) from error
        if not part:
            break
        parts.append(part)
        position += len(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_folder(root: Path, folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(root, folder.parent)
    folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)
    _sync_folder(folder.parent)


def _open(root: Path, path: str, create: bool, allocate: int) -> int:
    full = root / path
    try:
        try:
            fd = os.open(full, os.O_RDWR | os.O_CLOEXEC)
            created = False
        except FileNotFoundError:
            if not create:
                raise
            _make_folder(root, full.parent)
            fd = os.open(full, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
            created = True
        try:
            if allocate > os.fstat(fd).st_size:
                os.posix_fallocate(fd, 0, allocate)
                os.fsync(fd)
            if created:
                _sync_folder(full.parent)
        except BaseException:  # raised again; the descriptor must not stay open
            os.close(fd)
            raise
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _typed(error, path) from error
    return fd


def _truncate(fd: int, path: str, size: int) -> None:
    try:
        os.ftruncate(fd, size)
        os.fsync(fd)
    except OSError as error:
        raise _typed(error, path) from error


def _replace_file(root: Path, path: str, data: bytes) -> None:
    full = root / path
    aside = full.with_name(full.name + ".new")
    try:
        _make_folder(root, full.parent)
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _FILE_MODE)
        try:
            _pwritev(fd, [data], 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(aside, full)
        _sync_folder(full.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise _typed(error, path) from error


def _list(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _remove(root: Path, path: str) -> None:
    full = root / path
    try:
        full.unlink()
        _sync_folder(full.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _typed(error, path) from error


def _remove_tree(root: Path, folder: str) -> None:
    full = root / folder
    try:
        shutil.rmtree(full)
        _sync_folder(full.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _typed(error, folder) from error


def _rename(root: Path, old: str, new: str) -> None:
    try:
        _make_folder(root, (root / new).parent)
        os.replace(root / old, root / new)
        _sync_folder((root / new).parent)
        if (root / old).parent != (root / new).parent:
            _sync_folder((root / old).parent)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _typed(error, old) from error


def _lock(root: Path) -> int:
    path = root / "LOCK"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, 64, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise DataDirLocked(
                f"{root} is in use by process {holder}: stop it or choose another directory", holder=holder
            ) from error
        raise _typed(error, "LOCK") from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
