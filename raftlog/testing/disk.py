"""A simulated disk: what a power cut, a full device, a failing sync or a flipped bit does, on demand and from
a seed.

Every file has a *durable* layer and a list of *pending* writes that no sync has covered. Reads see both, a
crash keeps the durable layer and what the chosen mode lets through of the pending writes, torn at sectors of
512 bytes. Operations on names (create, rename, remove, replace) are durable when they return, as the seam
demands.

``trace`` records every change in order, so that a test can build the disk as it was after any prefix of them.
"""

from __future__ import annotations

import asyncio
import random as random_module
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Final

from raftlog.errors import DataDirLocked, RaftlogError, StorageFailed, StorageFull
from raftlog.storage.disk import DiskFile, Write

SECTOR_BYTES: Final = 512


class CrashMode(Enum):
    """What a crash keeps of the writes that were not synced."""

    NONE = "none"
    ALL = "all"
    PREFIX = "prefix"
    """The first sectors of all that was pending, in the order written."""
    RANDOM = "random"
    """Any subset of the sectors."""


class Op(Enum):
    """Kinds of change in a trace."""

    CREATE = "create"
    WRITE = "write"
    SYNC = "sync"
    TRUNCATE = "truncate"
    REPLACE = "replace"
    REMOVE = "remove"
    REMOVE_TREE = "remove tree"
    RENAME = "rename"
    NOTE = "note"
    """Of the test itself (for example: this entry was acknowledged)."""


@dataclass(frozen=True, slots=True)
class Step:
    """One change."""

    op: Op
    path: str = ""
    position: int = 0
    data: bytes = b""
    note: object = None


@dataclass(slots=True)
class _Node:
    live: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    reserved: int = 0


class SimFile:
    """An open file of a SimDisk."""

    __slots__ = ("_disk", "_node", "_path")

    def __init__(self, disk: SimDisk, path: str, node: _Node) -> None:
        self._disk = disk
        self._path = path
        self._node = node

    @property
    def path(self) -> str:
        return self._path

    def try_read(self, position: int, size: int) -> bytes | None:
        self._disk._check_alive()
        if not self._disk.cached:
            return None
        return bytes(self._node.live[position : position + size])

    async def read(self, position: int, size: int) -> bytes:
        await self._disk._delay(self._disk.read_latency)
        return bytes(self._node.live[position : position + size])

    def close(self) -> None:
        """Nothing to let go of."""


class SimDisk:
    """A Disk in memory. No threads; time passes on the running loop only.

    Args:
        random: decides what a crash keeps.
        latency: seconds that a synced write takes; ``read_latency`` a read that is not cached.
        capacity: bytes it holds; None: no limit.
        prompt: a commit that is begun is done at once, as RealDisk's are while the device is quick; not while
            the disk stalls, or is busy with another.
        record: keep ``trace``.

    Attributes:
        boot_id: a kill keeps it, a crash does not.
    """

    def __init__(
        self,
        random: random_module.Random | None = None,
        *,
        latency: float = 0.0,
        read_latency: float = 0.0,
        capacity: int | None = None,
        prompt: bool = False,
        record: bool = False,
    ) -> None:
        self.random = random or random_module.Random(0)
        self.latency = latency
        self.read_latency = read_latency
        self.capacity = capacity
        self.prompt = prompt
        self.cached = True
        """False: ``try_read`` finds nothing in memory."""
        self.syncs = 0
        """Syncs of a file so far."""
        self.commits = 0
        """Commits of the journal's lane that have begun to write something, failed ones too; one that found
        no room and is tried again counts once."""
        self.commits_done = 0
        """The last of them that was synced (with it, those before that were only written)."""
        self.commits_written = 0
        """The last of them that was written, or synced if it was to be."""
        self.commits_marked = -1
        """The last of them that was synced before another one began, whose mark says so."""
        self.boot_id = "boot 1"
        self.trace: list[Step] | None = [] if record else None
        self._nodes: dict[str, _Node] = {}
        self._failing_syncs = 0
        self._failing_writes = 0
        self._again = False
        self._stalled_until = 0.0
        self._dead = False
        self._locked = False
        self._lane = asyncio.Lock()
        self._begun: set[asyncio.Task[None]] = set()

    # -- faults ----------------------------------------------------------------------------------------------

    def crash(self, mode: CrashMode = CrashMode.RANDOM) -> SimDisk:
        """Cut the power: this disk and its open files are dead; the one returned holds what survived."""
        disk = self._heir()
        disk.boot_id = f"boot {int(self.boot_id.split()[1]) + 1}"
        budget = _prefix_budget(self._nodes, self.random) if mode is CrashMode.PREFIX else 0
        for path, node in self._nodes.items():
            content = bytearray(node.durable)
            for position, data in node.pending:
                for start, part in _sectors(position, data):
                    if mode is CrashMode.PREFIX:
                        budget -= 1
                    keep = (
                        mode is CrashMode.ALL
                        or (mode is CrashMode.PREFIX and budget >= 0)
                        or (mode is CrashMode.RANDOM and self.random.random() < 0.5)
                    )
                    if keep:
                        _put(content, start, part)
            disk._nodes[path] = _Node(content, bytearray(content))
        self._dead = True
        return disk

    def kill(self) -> SimDisk:
        """Kill the process only: what was written stays, synced or not."""
        disk = self._heir()
        for path, node in self._nodes.items():
            disk._nodes[path] = _Node(
                bytearray(node.live), bytearray(node.durable), list(node.pending), node.reserved
            )
        self._dead = True
        return disk

    def _heir(self) -> SimDisk:
        disk = SimDisk(
            self.random,
            latency=self.latency,
            read_latency=self.read_latency,
            capacity=self.capacity,
            prompt=self.prompt,
            record=self.trace is not None,
        )
        disk.boot_id = self.boot_id
        disk.cached = self.cached
        return disk

    def fail_sync(self, count: int = 1) -> None:
        """Let the next ``count`` syncs fail; what they covered is dropped from the durable layer's future."""
        self._failing_syncs = count

    def fail_write(self, count: int = 1) -> None:
        """Let the next ``count`` writes fail."""
        self._failing_writes = count

    def stall(self, seconds: float) -> None:
        """Nothing moves for this long (loop time)."""
        self._stalled_until = asyncio.get_running_loop().time() + seconds

    def flip(self, path: str, position: int, mask: int = 1) -> None:
        """Flip bits of one byte, in what is durable and in what is read."""
        node = self._nodes[path]
        node.live[position] ^= mask
        if position < len(node.durable):
            node.durable[position] ^= mask

    def overwrite(self, path: str, position: int, data: bytes) -> None:
        """Other bytes stand there, in what is durable and in what is read; the file's length stays."""
        node = self._nodes[path]
        for layer in (node.live, node.durable):
            part = data[: max(0, len(layer) - position)]
            layer[position : position + len(part)] = part

    def note(self, note: object) -> None:
        """Put something of the test's own into the trace."""
        self._log(Step(Op.NOTE, note=note))

    # -- looking at it ---------------------------------------------------------------------------------------

    def paths(self) -> list[str]:
        """All files."""
        return sorted(self._nodes)

    def content(self, path: str) -> bytes:
        """What a read would see."""
        return bytes(self._nodes[path].live)

    def put(self, path: str, data: bytes) -> None:
        """Set a file's durable content."""
        self._nodes[path] = _Node(bytearray(data), bytearray(data))

    def copy(self) -> SimDisk:
        """An independent disk with the same content, all of it durable."""
        disk = self._heir()
        for path, node in self._nodes.items():
            disk._nodes[path] = _Node(bytearray(node.live), bytearray(node.live))
        return disk

    @property
    def fails_soon(self) -> bool:
        """Whether a sync that is to fail has not come yet."""
        return self._failing_syncs > 0

    @property
    def used_bytes(self) -> int:
        return sum(max(len(node.live), node.reserved) for node in self._nodes.values())

    @property
    def unsynced_bytes(self) -> int:
        """Bytes written that no sync has covered yet."""
        return sum(len(data) for node in self._nodes.values() for _, data in node.pending)

    # -- Disk ------------------------------------------------------------------------------------------------

    async def open(self, path: str, *, create: bool = False, allocate: int = 0) -> DiskFile:
        await self._delay(self.read_latency)
        node = self._nodes.get(path)
        if node is None:
            if not create:
                raise FileNotFoundError(path)
            node = _Node()
            self._room(allocate)
            self._nodes[path] = node
            self._log(Step(Op.CREATE, path))
        if allocate > max(node.reserved, len(node.live)):
            self._room(allocate - max(node.reserved, len(node.live)))
            node.reserved = allocate
        return SimFile(self, path, node)

    async def commit(self, writes: Sequence[Write], *, sync: bool = True) -> None:
        async with self._lane:
            with self._counted(writes, sync):
                await self._write(writes, sync=sync)

    @contextmanager
    def _counted(self, writes: Sequence[Write], sync: bool) -> Iterator[None]:
        """Around what a commit does."""
        has_bytes = any(write.buffers for write in writes)
        # one that only syncs carries nothing that was handed over; a second try nothing that came meanwhile
        if has_bytes and not self._again:
            self.commits += 1
        ordinal, synced = self.commits, self.commits_done
        try:
            yield
        except StorageFull:
            self._again = True
            raise
        self._again = False
        if has_bytes:
            self.commits_marked = synced
        self.commits_written = ordinal
        if sync:
            self.commits_done = ordinal

    def begin_commit(
        self, writes: Sequence[Write], done: Callable[[BaseException | None], None], sync: bool = True
    ) -> None:
        stalls = asyncio.get_running_loop().time() < self._stalled_until
        if self.prompt and not (stalls or self._begun or self._lane.locked()):
            try:
                with self._counted(writes, sync):
                    files = self._put_all(writes)
                    if sync:
                        self._sync_all(files)
            except RaftlogError as error:
                done(error)
            else:
                done(None)
            return
        work = asyncio.get_running_loop().create_task(self.commit(writes, sync=sync))
        self._begun.add(work)
        work.add_done_callback(partial(self._commit_ended, done))

    def _commit_ended(self, done: Callable[[BaseException | None], None], work: asyncio.Task[None]) -> None:
        self._begun.discard(work)
        if not work.cancelled():
            done(work.exception())

    async def write(self, writes: Sequence[Write], *, sync: bool = True) -> None:
        await self._write(writes, sync=sync)

    async def _write(self, writes: Sequence[Write], *, sync: bool) -> None:
        files = self._put_all(writes)
        await self._delay(self.latency if sync else 0.0)
        if sync:
            self._sync_all(files)

    def _put_all(self, writes: Sequence[Write]) -> dict[str, _Node]:
        self._check_alive()
        files: dict[str, _Node] = {}
        for write in writes:
            file = write.file
            assert isinstance(file, SimFile)
            assert file._disk is self, "a file of an earlier incarnation"
            if write.buffers:
                self._put_pending(file, write.position, b"".join(write.buffers))
            files[file.path] = file._node
        return files

    def _sync_all(self, files: dict[str, _Node]) -> None:
        for path, node in files.items():
            self._sync(path, node)

    def _put_pending(self, file: SimFile, position: int, data: bytes) -> None:
        if self._failing_writes:
            self._failing_writes -= 1
            raise StorageFailed(f"{file.path}: Input/output error", path=file.path)
        node = file._node
        held = max(len(node.live), node.reserved)
        self._room(max(0, position + len(data) - held))
        _put(node.live, position, data)
        node.pending.append((position, data))
        self._log(Step(Op.WRITE, file.path, position, data))

    def _sync(self, path: str, node: _Node) -> None:
        self.syncs += 1
        if self._failing_syncs:
            self._failing_syncs -= 1
            node.pending.clear()  # as Linux does: the pages are marked clean and a later sync reports nothing
            raise StorageFailed(f"{path}: Input/output error", path=path)
        for position, data in node.pending:
            _put(node.durable, position, data)
        node.pending.clear()
        self._log(Step(Op.SYNC, path))

    async def truncate(self, file: DiskFile, size: int) -> None:
        await self._delay(self.latency)
        assert isinstance(file, SimFile)
        node = file._node
        self._sync(file.path, node)
        del node.live[size:]
        del node.durable[size:]
        node.reserved = 0
        self._log(Step(Op.TRUNCATE, file.path, size))

    async def file_size(self, path: str) -> int:
        await self._delay(self.read_latency)
        return len(self._existing(path).live)

    async def read_file(self, path: str) -> bytes:
        await self._delay(self.read_latency)
        return bytes(self._existing(path).live)

    async def replace_file(self, path: str, data: bytes) -> None:
        await self._delay(self.latency)
        if self._failing_writes:
            self._failing_writes -= 1
            raise StorageFailed(f"{path}: Input/output error", path=path)
        self._room(len(data))
        self.syncs += 1
        self._nodes[path] = _Node(bytearray(data), bytearray(data))
        self._log(Step(Op.REPLACE, path, 0, bytes(data)))

    async def list(self, folder: str) -> list[str]:
        await self._delay(self.read_latency)
        prefix = folder.rstrip("/") + "/"
        return sorted({path[len(prefix) :].split("/")[0] for path in self._nodes if path.startswith(prefix)})

    async def exists(self, path: str) -> bool:
        await self._delay(self.read_latency)
        return path in self._nodes or any(name.startswith(path + "/") for name in self._nodes)

    async def remove(self, path: str) -> None:
        await self._delay(self.latency)
        self._nodes.pop(path, None)
        self._log(Step(Op.REMOVE, path))

    async def remove_tree(self, folder: str) -> None:
        await self._delay(self.latency)
        _remove_tree(self._nodes, folder)
        self._log(Step(Op.REMOVE_TREE, folder))

    async def rename(self, old: str, new: str) -> None:
        await self._delay(self.latency)
        self._existing(old)
        self._nodes[new] = self._nodes.pop(old)
        self._log(Step(Op.RENAME, old, note=new))

    async def free_bytes(self) -> int:
        await self._delay(self.read_latency)
        return (1 << 40) if self.capacity is None else max(0, self.capacity - self.used_bytes)

    async def lock(self) -> None:
        await self._delay(self.read_latency)
        if self._locked:
            raise DataDirLocked("the data directory is in use by this process", holder="simulation")
        self._locked = True

    async def close(self) -> None:
        self._locked = False

    # -- inside ----------------------------------------------------------------------------------------------

    def _existing(self, path: str) -> _Node:
        node = self._nodes.get(path)
        if node is None:
            raise FileNotFoundError(path)
        return node

    def _check_alive(self) -> None:
        if self._dead:
            raise StorageFailed("the disk crashed")

    async def _delay(self, seconds: float) -> None:
        self._check_alive()
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(seconds, self._stalled_until - loop.time(), 0.0))
        self._check_alive()

    def _room(self, count: int) -> None:
        if count > 0 and self.capacity is not None and self.used_bytes + count > self.capacity:
            raise StorageFull("no room on the simulated device")

    def _log(self, step: Step) -> None:
        if self.trace is not None:
            self.trace.append(step)


def replay(trace: Sequence[Step], mode: CrashMode, random: random_module.Random) -> SimDisk:
    """The disk as a crash right after the last of ``trace`` would leave it."""
    disk = SimDisk(random)
    nodes = disk._nodes
    for step in trace:
        if step.op is Op.CREATE:
            nodes[step.path] = _Node()
        elif step.op is Op.WRITE:
            node = nodes[step.path]
            _put(node.live, step.position, step.data)
            node.pending.append((step.position, step.data))
        elif step.op is Op.SYNC:
            disk._sync(step.path, nodes[step.path])
        elif step.op is Op.TRUNCATE:
            del nodes[step.path].live[step.position :]
            del nodes[step.path].durable[step.position :]
        elif step.op is Op.REPLACE:
            nodes[step.path] = _Node(bytearray(step.data), bytearray(step.data))
        elif step.op is Op.REMOVE:
            nodes.pop(step.path, None)
        elif step.op is Op.REMOVE_TREE:
            _remove_tree(nodes, step.path)
        elif step.op is Op.RENAME:
            assert isinstance(step.note, str)
            nodes[step.note] = nodes.pop(step.path)
    return disk.crash(mode)


def _remove_tree(nodes: dict[str, _Node], folder: str) -> None:
    prefix = folder.rstrip("/") + "/"
    for path in [path for path in nodes if path.startswith(prefix)]:
        del nodes[path]


def _put(content: bytearray, position: int, data: bytes) -> None:
    if len(content) < position:
        content.extend(bytes(position - len(content)))
    content[position : position + len(data)] = data


def _sectors(position: int, data: bytes) -> list[tuple[int, bytes]]:
    """``data`` cut where the device's sectors end."""
    parts: list[tuple[int, bytes]] = []
    start = 0
    while start < len(data):
        end = min(len(data), start + SECTOR_BYTES - (position + start) % SECTOR_BYTES)
        parts.append((position + start, data[start:end]))
        start = end
    return parts


def _prefix_budget(nodes: dict[str, _Node], random: random_module.Random) -> int:
    total = sum(len(_sectors(position, data)) for node in nodes.values() for position, data in node.pending)
    return random.randint(0, total)
