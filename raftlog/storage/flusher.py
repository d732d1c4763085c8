"""The lazy lane: what is committed moves from memory to segments, then index files and snapshots are written.

Nothing waits for it but the release of old journal files, so it runs beside the journal and takes its time.
It never writes an entry that could still be truncated, nor one that the journal does not hold durably.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from raftlog.errors import RaftlogError, StorageFailed, StorageFull
from raftlog.raft.types import Entry
from raftlog.record.frame import Buffer, FrameHeader
from raftlog.storage.disk import Disk, Write
from raftlog.storage.journal import Journal
from raftlog.storage.replica_log import ReplicaLog
from raftlog.storage.segment import Segment
from raftlog.storage.segment_index import write_index
from raftlog.storage.snapshot_file import write_snapshot
from raftlog.storage.spec import StorageConfig


class Flusher:
    """One task per broker.

    Args:
        on_fault: told of StorageFull, StorageFailed and None, as the journal's.
    """

    def __init__(
        self,
        disk: Disk,
        config: StorageConfig,
        journal: Journal,
        on_fault: Callable[[RaftlogError | None], None],
    ) -> None:
        self._disk = disk
        self._config = config
        self._journal = journal
        self._on_fault = on_fault
        self._dirty: dict[int, ReplicaLog] = {}
        self._cached: deque[tuple[ReplicaLog, int, int]] = deque()
        """(log, index, bytes) of flushed entries that are still in memory, oldest first."""
        self._cached_bytes = 0
        self.unflushed_bytes = 0
        """Bytes of entries in memory that no segment holds yet."""
        self._left_bytes = 0
        self._snapshots_wait = False
        """Some could not be written in the last pass: what they stand for was not synced yet."""
        self._wanted = False
        self._wake: asyncio.Future[None] | None = None
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._full = False
        self._busy = asyncio.Lock()

    def start(self) -> None:
        """Begin to serve (in a task of the running loop)."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="raftlog-flusher")

    def added(self, log: ReplicaLog, size: int) -> None:
        """The log took ``size`` bytes into memory (negative: a truncation dropped them)."""
        self._dirty[log.spec.replica_id] = log
        self.unflushed_bytes += size

    def group_done(self) -> None:
        """The journal has synced a group: flush if enough has come together since the last time."""
        enough = self.unflushed_bytes - self._left_bytes >= self._config.flush_bytes
        if enough or self._snapshots_wait or self._journal.files.can_release():
            self.request()

    def request(self, log: ReplicaLog | None = None) -> None:
        """Make a pass soon."""
        if log is not None:
            self._dirty[log.spec.replica_id] = log
        self._wanted = True
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def forget(self, log: ReplicaLog) -> None:
        """The replica was removed."""
        self._dirty.pop(log.spec.replica_id, None)
        memory = log.memory
        unflushed = memory.entries[max(0, log.flushed_index + 1 - memory.first_index) :]
        self.unflushed_bytes -= sum(len(entry.frame) for entry in unflushed)

    async def close(self) -> None:
        """Flush all that may be flushed and save every index, then stop."""
        self._closing = True
        self.request()
        if self._task is not None:
            await self._task

    async def abort(self) -> None:
        """Stop at once; what is not flushed stays so."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    # -- passes ----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        delay = self._config.retry_seconds
        while not self._closing:
            if not self._wanted:
                self._wake = asyncio.get_running_loop().create_future()
                await self._wake
                self._wake = None
            self._wanted = False
            try:
                await self.flush_all()
                await self._journal.files.release()
            except StorageFull as error:
                if not self._full:
                    self._full = True
                    self._on_fault(error)
                await asyncio.sleep(delay)
                delay = min(2 * delay, self._config.retry_seconds_max)
                self._wanted = True
            except Exception as error:  # noqa: BLE001 - unflushed entries would gather, and nobody be told
                self._on_fault(error if isinstance(error, RaftlogError) else StorageFailed(repr(error)))
                return
            else:
                delay = self._config.retry_seconds
                if self._full:
                    self._full = False
                    self._on_fault(None)
                self._journal.free_oldest()

    async def flush_all(self) -> None:
        """Flush every log that has something to flush."""
        for log in list(self._dirty.values()):
            await self.flush(log)
            if log.flushed_index == log.last_index and not log.pending_snapshots:
                self._dirty.pop(log.spec.replica_id, None)
        self._left_bytes = self.unflushed_bytes
        self._snapshots_wait = any(log.pending_snapshots for log in self._dirty.values())

    async def flush(self, log: ReplicaLog, *, save_index: bool = False) -> None:
        """Write the log's committed entries to its segments and sync them; then snapshots that wait for it.

        Args:
            save_index: write the index of the growing segment too, so that recovery need not rescan it.
        """
        async with self._busy:
            if not log.removed and log.flushed_index >= log.first_index:
                await self._seal_if_due(log, log.segment_of(log.flushed_index))  # there was no room before
            target = log.flushable_index
            while log.flushed_index < target and not log.removed:
                await self._flush_some(log, target)
            if log.removed:
                return
            for index in sorted(log.pending_snapshots):
                if index <= log.flushed_index:
                    await write_snapshot(self._disk, log.spec.replica_id, log.pending_snapshots[index])
                    del log.pending_snapshots[index]
                    log.snapshots.append(index)
                    log.snapshots.sort()
            segment = log.segment_of(max(log.flushed_index, log.first_index))
            if save_index and segment.header_written and not segment.sealed:
                await self._save_index(segment)

    async def finish_sealing(self, log: ReplicaLog) -> None:
        """Recovery found complete segments whose index file was not written: write it."""
        for segment in log.segments:
            complete = segment.is_full and segment.append_position == segment.end_position
            if complete and not segment.sealed:
                segment.file = await self._disk.open(segment.path)
                await self._seal(log, segment)

    async def _flush_some(self, log: ReplicaLog, target: int) -> None:
        """One lazy write: entries of one segment, of limited size."""
        first = log.flushed_index + 1
        segment = log.segment_of(first)
        entries = self._choose(log, segment, first, target)
        if segment.file is None:
            segment.file = await self._disk.open(segment.path, create=True)
        writes = _writes(log, segment, entries)
        if writes:
            await self._disk.write(writes)
        segment.header_written = True
        size = 0
        for entry in entries:
            segment.advance(FrameHeader(entry.frame), entry.frame)
            size += len(entry.frame)
        log.flushed_to(segment)
        self.unflushed_bytes -= size
        self._keep(log, entries[-1].index, size)
        await self._seal_if_due(log, segment)
        if segment.end_position - segment.index_saved_position >= self._config.index_checkpoint_bytes:
            await self._save_index(segment)
        self._journal.checkpoint_due(log)

    def _choose(self, log: ReplicaLog, segment: Segment, first: int, target: int) -> list[Entry]:
        memory = log.memory
        chosen: list[Entry] = []
        size = 0
        start = first - memory.first_index
        for entry in memory.entries[start : target + 1 - memory.first_index]:
            if chosen and (
                size >= self._config.flush_write_bytes or log.segment_of(entry.index) is not segment
            ):
                break
            chosen.append(entry)
            size += len(entry.frame)
        return chosen

    async def _seal_if_due(self, log: ReplicaLog, segment: Segment) -> None:
        complete = segment.is_full and segment.append_position == segment.end_position
        if complete and not segment.sealed:
            await self._seal(log, segment)

    async def _seal(self, log: ReplicaLog, segment: Segment) -> None:
        """No further frame comes: drop what a truncated large frame may have left behind, and save the
        index."""
        if await self._disk.file_size(segment.path) > segment.end_position:
            assert segment.file is not None
            await self._disk.truncate(segment.file, segment.end_position)
        await self._save_index(segment)
        log.sealed(segment)

    async def _save_index(self, segment: Segment) -> None:
        assert segment.index is not None
        await write_index(self._disk, segment.index_path, segment.summary(), segment.index)
        segment.index_saved_position = segment.end_position

    async def settle(self) -> None:
        """Return when no flush is under way."""
        async with self._busy:
            pass

    # -- what stays in memory --------------------------------------------------------------------------------

    def _keep(self, log: ReplicaLog, index: int, size: int) -> None:
        """Flushed entries stay in memory until the broker's cache is full, then the oldest go."""
        self._cached.append((log, index, size))
        self._cached_bytes += size
        while self._cached_bytes > self._config.cache_bytes:
            oldest, upto, freed = self._cached.popleft()
            self._cached_bytes -= freed
            oldest.memory.evict(upto)


def _writes(log: ReplicaLog, segment: Segment, entries: list[Entry]) -> list[Write]:
    """Gathered writes of the frames that are not in the file yet: each run between large ones is one
    write."""
    assert segment.file is not None
    writes: list[Write] = []
    if not segment.header_written:
        writes.append(Write(segment.file, 0, (segment.header.encode(),)))
    run: list[Buffer] = []
    run_position = 0
    for entry in entries:
        position = log.memory.position_of(entry.index)
        if log.place_of(entry.index) is not None:
            if run:
                writes.append(Write(segment.file, run_position, run))
                run = []
            continue
        if not run:
            run_position = position
        run.append(entry.frame)
    if run:
        writes.append(Write(segment.file, run_position, run))
    return writes
