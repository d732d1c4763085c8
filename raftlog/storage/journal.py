"""The broker's journal: group commit, rolling to the next file, release of old files.

All that is submitted while a write is under way goes into the next one: one gathered write, one sync (plus
one for each segment that took a large frame), which may come later where replicas allow it (see
:mod:`raftlog.storage.journal_sync`). One group is under way at a time. The ordinary one costs a call that
hands it to the disk and one that comes back; what takes several steps (a new file, large frames, no room)
runs in a task. A group in the file::

      | MARK floor | HARD_STATE? ENTRY ENTRY_REF … (of each append, in order) | copies | checkpoints due |

and the first group of a file has the checkpoints of all replicas behind its mark, so a file never needs the
ones before it for anything but entries that are not yet flushed (see :mod:`raftlog.storage.journal_files`).

Why a failed write may be tried again when the device is full: the group is written anew, whole, at the same
place, and nothing before it depends on pages whose sync failed. After any other error nothing is tried: the
store is failed for good.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

from raftlog.errors import RaftlogError, StorageFailed, StorageFull
from raftlog.raft.types import Append
from raftlog.storage.disk import Disk, Write
from raftlog.storage.journal_files import JournalFile, JournalFiles
from raftlog.storage.journal_format import (
    CHECKPOINT_BYTES,
    ENTRY_REF_BYTES,
    FILE_HEADER_BYTES,
    HARD_STATE_BYTES,
    MARK_BYTES,
    RECORD_HEADER_BYTES,
    FileHeader,
    RecordKind,
    encode_file_header,
    encode_mark,
)
from raftlog.storage.journal_group import Group
from raftlog.storage.journal_sync import Unsynced
from raftlog.storage.replica_log import ReplicaLog
from raftlog.storage.segment import Segment
from raftlog.storage.spec import StorageConfig
from raftlog.storage.ward import Sleeper

T = TypeVar("T")
Done: TypeAlias = Callable[[BaseException | None], None]


@dataclass(slots=True)
class _Item:
    log: ReplicaLog
    append: Append
    direct: dict[int, Segment] | None
    done: Done
    size: int
    """Bytes of its frames."""
    written: int
    """Bytes it takes in the journal."""
    since: float


class Journal:
    """See the module.

    Args:
        logs: the replicas, by id; the store adds and removes.
        sleepers: the damaged ones, likewise.
        sequence, base: of the file that the first group will begin.
        old: (sequence, base, needed) of the files that recovery found, oldest first.
        on_fault: told of StorageFull, StorageFailed and None (all is well again).
        on_durable: told after each sync.
        on_roll: told when a new file was begun.
    """

    def __init__(
        self,
        disk: Disk,
        config: StorageConfig,
        disk_id: bytes,
        logs: dict[int, ReplicaLog],
        sleepers: dict[int, Sleeper],
        *,
        sequence: int,
        base: int,
        old: Iterable[tuple[int, int, dict[int, int]]] = (),
        on_fault: Callable[[RaftlogError | None], None],
        on_durable: Callable[[], None],
        on_roll: Callable[[], None],
    ) -> None:
        self._disk = disk
        self._config = config
        self._disk_id = disk_id
        self._logs = logs
        self._sleepers = sleepers
        self._files = JournalFiles(disk, config, logs, sequence, old)
        for replica_id, sleeper in sleepers.items():
            self._files.checkpointed(replica_id, sleeper.checkpoint.index)
        self._position = base
        """Where the next group begins."""
        self._synced = base
        """Everything below is durable."""
        self._unsynced = Unsynced()
        self._sync_timer: asyncio.TimerHandle | None = None
        self._on_fault = on_fault
        self._on_durable = on_durable
        self._on_roll = on_roll
        self._current: JournalFile | None = None
        self._queue: list[_Item] = []
        self._running: list[_Item] = []
        self._due: dict[int, ReplicaLog] = {}
        self._resets: dict[int, ReplicaLog] = {}
        self._copies: dict[int, tuple[ReplicaLog, int]] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self._running_waiters: list[asyncio.Future[None]] = []
        self._loop = asyncio.get_running_loop()
        self._busy = True
        """A group is under way (or the journal was not started, or has stopped)."""
        self._due_soon = False
        """:meth:`_advance` is about to be called."""
        self._mark_timer: asyncio.TimerHandle | None = None
        self._mark_due = False
        self._marked = True
        self._last_write = 0.0
        self._closing = False
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._task: asyncio.Task[None] | None = None
        """Carries out what takes several steps."""
        self.failed: RaftlogError | None = None
        self.pending_bytes = 0
        self.groups = 0
        """Put together so far: what is appended now goes into the next."""

    # -- for the store ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve (on the running loop), with a new file."""
        self._mark_due = True
        self._busy = False
        self._wake_up()
        self._mark_timer = self._loop.call_later(self._config.idle_mark_seconds, self._idle)

    def submit(self, log: ReplicaLog, append: Append, direct: dict[int, Segment] | None, done: Done) -> int:
        """Queue an append whose entries ``log`` has taken, for :meth:`begin`; ``done`` is called once it is
        durable (written, for a replica with ``flush_interval_ms``). Returns the bytes of its frames."""
        size, written = 0, HARD_STATE_BYTES
        for entry in append.entries:
            size += len(entry.frame)
            written += RECORD_HEADER_BYTES
        written += size
        if direct is not None:
            for index in direct:
                written += ENTRY_REF_BYTES - len(log.memory.at(index).frame)
        self._queue.append(_Item(log, append, direct, done, size, written, self._loop.time()))
        self.pending_bytes += size
        return size

    def begin(self) -> None:
        """Write what is queued, unless a group is under way: then it goes into the next."""
        if self._queue and not self._busy:
            self._advance()

    def checkpoint_due(self, log: ReplicaLog) -> None:
        """The replica's flushed index has grown: say so in the next group (at once if old files wait for
        it)."""
        self._due[log.spec.replica_id] = log
        if len(self._files) > 1:
            self._wake_up()

    async def checkpoint(self, logs: Iterable[ReplicaLog]) -> None:
        """Write the checkpoints of these replicas now; returns when they are durable.

        Raises:
            StorageFailed: the journal has failed.
        """
        if self.failed is not None:
            raise self.failed
        for log in logs:
            self._due[log.spec.replica_id] = log
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        self._wake_up()
        await waiter

    async def reset(self, log: ReplicaLog) -> None:
        """Write that ``log`` begins anew behind a snapshot; returns when that is durable. Nothing of it may
        be queued, and nothing may be appended to it until then.

        Raises:
            StorageFailed: the journal has failed.
        """
        self._resets[log.spec.replica_id] = log
        await self.checkpoint(())

    def fail(self, error: RaftlogError) -> None:
        """Take nothing more: the store has failed elsewhere."""
        self._fail(error)
        self._wake_up()

    def forget(self, replica_id: int) -> None:
        """The replica was removed: no file is needed for it."""
        self._files.forget(replica_id)
        self._due.pop(replica_id, None)
        self._resets.pop(replica_id, None)
        self._copies.pop(replica_id, None)

    def free_oldest(self) -> None:
        """If too many files are held, copy what holds the oldest (entries that are not yet committed) to the
        head."""
        if len(self._files) <= self._config.journal_files_max or self.failed is not None:
            return
        for replica_id in self._files.oldest.needed:
            log = self._logs.get(replica_id)
            if log is not None and log.flushed_index >= log.flushable_index:
                self._copies[replica_id] = (log, log.flushed_index + 1)
                self._due[replica_id] = log
        if self._copies:
            self._wake_up()

    @property
    def oldest_pending_since(self) -> float | None:
        """Loop time at which the oldest append that is not confirmed was submitted."""
        for items in (self._running, self._queue):
            if items:
                return items[0].since
        return None

    @property
    def sequence(self) -> int:
        """Of the newest durable file."""
        return self._files.sequence

    @property
    def files(self) -> JournalFiles:
        """Those that are still needed."""
        return self._files

    async def close(self) -> None:
        """Write what is queued and sync all, then stop."""
        self._closing = True
        self._cancel_timers()
        self._wake_up()
        if self.failed is None:
            await self._stopped
        self._files.close()

    async def abort(self) -> None:
        """Stop without writing what is queued; nobody who waits is told anything."""
        self._closing = True
        self._cancel_timers()
        self._stopped.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        for waiter in self._running_waiters + self._waiters:
            waiter.cancel()
        self._files.close()

    # -- one group after another -----------------------------------------------------------------------------

    def _wake_up(self) -> None:
        """There is something to write: begin with it at the end of this turn of the loop."""
        if not self._busy and not self._due_soon:
            self._due_soon = True
            self._loop.call_soon(self._advance)

    def _advance(self) -> None:
        """Begin the next group, if there is anything to write."""
        self._due_soon = False
        if self._busy or self._stopped.done() or self.failed is not None:
            return
        if not (self._queue or self._due_now() or self._mark_due):
            if not self._closing:
                return
            if self._unsynced.due is None:
                self._stopped.set_result(None)
                return
            self._mark_due = True  # the last sync
        self._busy = True
        file = self._current
        if file is None or self._is_full(file):
            self._in_steps(self._roll)
        else:
            self._write_group(file)

    def _write_group(self, file: JournalFile, *, header: bytes = b"") -> None:
        """Write a group and, unless that may wait, sync it. Built without a pause before: the logs' memory
        stands where its last append left it."""
        self._running, self._queue = self._queue, self._running
        at = FILE_HEADER_BYTES + self._position - file.base
        group = self._build(self._running, first=bool(header))
        if header:
            group.buffers.insert(0, header)
            at = 0
        assert file.file is not None
        write = Write(file.file, at, group.buffers)
        unsynced = self._unsynced
        now = self._loop.time()
        if unsynced.due is not None and now >= unsynced.due:
            group.sync = True
        if group.direct or (group.sync and unsynced.due is not None):
            self._in_steps(partial(self._write_mixed, file, write, group, now))
        else:
            self._disk.begin_commit((write,), partial(self._written, file, write, group, now), group.sync)

    def _written(
        self, file: JournalFile, write: Write, group: Group, now: float, error: BaseException | None
    ) -> None:
        """The disk is done with an ordinary group."""
        if self._stopped.done() or self.failed is not None:
            return
        if error is None:
            if not group.sync:
                self._note_unsynced([(None, write)], group, now)
            self._finish(file, group)
        elif isinstance(error, StorageFull):
            self._in_steps(partial(self._write_mixed, file, write, group, now))
        else:
            self._fail(error)

    def _in_steps(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._task = self._loop.create_task(self._guarded(work), name="raftlog-journal")

    async def _guarded(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - no other group would ever begin, and nobody be told
            if not self._stopped.done():
                self._fail(error)

    async def _roll(self) -> None:
        """Begin a new file, whose header says that everything below its base is durable."""
        if self._unsynced.due is not None:
            await self._retry_all(self._disk.commit)
            self._synced = self._position
            self._unsynced.clear()
        file = await self._retry(lambda: self._files.create(self._position))
        if self.failed is not None:
            return  # the store failed elsewhere meanwhile; the checkpoints would speak of what was given up
        self._write_group(
            file, header=encode_file_header(FileHeader(self._disk_id, file.sequence, file.base))
        )

    def _build(self, items: list[_Item], *, first: bool) -> Group:
        self.groups += 1
        group = Group(self._position)
        group.add(encode_mark(group.position, self._synced))
        # Before the checkpoints, which already describe the logs as they are after it.
        group.resets, self._resets = list(self._resets.values()), {}
        for log in group.resets:
            group.add_checkpoint(log, RecordKind.RESET)
        if first:
            for log in self._logs.values():
                group.add_checkpoint(log)
            for sleeper in self._sleepers.values():
                group.add_sleeper(sleeper)
        for item in items:
            group.add_append(item.log, item.append, item.direct)
        for log, index in self._copies.values():
            group.add_copy(log, index)
        self._copies.clear()
        due, self._due = self._due, {}
        for log in due.values():
            group.add_checkpoint(log)
        self._running_waiters, self._waiters = self._waiters, []
        if first or self._mark_due or self._running_waiters or group.checkpoints or not group.interval_ms:
            group.sync = True
        self._mark_due = False
        self._marked = self._synced == self._position and group.position == self._position + MARK_BYTES
        return group

    def _finish(self, file: JournalFile, group: Group) -> None:
        """The group is written (and synced, unless that may wait): tell those who wait for it."""
        self._position = group.position
        if group.sync:
            self._synced = group.position
        if file is not self._current:
            self._current = file
            self._files.add(file)
            self._on_roll()
        for log in group.resets:
            self._files.forget(log.spec.replica_id)
        for replica_id, first, last in group.entries:
            # Not before: until now, older files were all that held what was copied.
            if replica_id in self._logs or replica_id in self._sleepers:
                self._files.need(file, replica_id, first, last)
        for log, index in group.checkpoints:
            self._files.checkpointed(log.spec.replica_id, index)
        items, self._running = self._running, []
        counts = self._unsynced.appends
        for item in items:
            self.pending_bytes -= item.size
            replica_id = item.log.spec.replica_id
            counts[replica_id] = counts.get(replica_id, 0) + 1
        self._last_write = self._loop.time()
        if group.sync:
            for replica_id, count in counts.items():
                found = self._logs.get(replica_id)
                if found is not None:
                    found.made_durable(count)
            counts.clear()
            self._unsynced.clear()
            self._on_durable()
        waiters, self._running_waiters = self._running_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._busy = False
        for item in items:
            self._tell(item.done, None)
        if self._queue or self._due_now() or self._mark_due or self._closing:
            self._wake_up()

    def _fail(self, cause: BaseException) -> None:
        if self.failed is not None:
            return
        error = self.failed = cause if isinstance(cause, RaftlogError) else StorageFailed(repr(cause))
        self._cancel_timers()
        self._on_fault(error)
        items = self._running + self._queue
        self._running, self._queue = [], []
        self.pending_bytes = 0
        waiters = self._running_waiters + self._waiters
        self._running_waiters, self._waiters = [], []
        for item in items:
            self._tell(item.done, error)
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)
        if self._closing and not self._stopped.done():
            self._stopped.set_result(None)

    def _tell(self, done: Done, error: BaseException | None) -> None:
        try:
            done(error)
        except Exception as raised:  # noqa: BLE001 - one replica's host must not stop the journal of all
            self._loop.call_exception_handler(
                {"message": "a callback of storage raised", "exception": raised}
            )

    # -- writing ---------------------------------------------------------------------------------------------

    async def _write_mixed(self, file: JournalFile, write: Write, group: Group, now: float) -> None:
        """A group with large frames, one whose sync covers earlier writes, or one that found no room."""
        placed: list[tuple[Segment | None, Write]] = []

        async def attempt(before: list[Write]) -> None:
            nonlocal placed
            placed = [(None, write), *await self._direct_writes(group)]
            writes = [each for _, each in placed]
            await self._disk.commit([*before, *writes] if group.sync else writes, sync=group.sync)

        await self._retry_all(attempt)
        if self.failed is not None:
            return
        for segment, _, _ in group.direct:
            segment.header_written = True
        if not group.sync:
            self._note_unsynced(placed, group, now)
        self._finish(file, group)

    def _note_unsynced(self, placed: list[tuple[Segment | None, Write]], group: Group, now: float) -> None:
        """Written only: a sync follows in time, also if nothing else comes."""
        self._unsynced.add(placed, now + group.interval_ms / 1000)
        self._await_sync()

    async def _direct_writes(self, group: Group) -> list[tuple[Segment | None, Write]]:
        writes: list[tuple[Segment | None, Write]] = []
        for segment, position, frame in group.direct:
            if segment.file is None:
                segment.file = await self._disk.open(segment.path, create=True)
            if not segment.header_written:
                writes.append((segment, Write(segment.file, 0, (segment.header.encode(),))))
            writes.append((segment, Write(segment.file, position, (frame,))))
        return writes

    def _is_full(self, file: JournalFile) -> bool:
        used = self._position - file.base
        coming = MARK_BYTES + (len(self._due) + len(self._resets)) * CHECKPOINT_BYTES
        coming += sum([item.written for item in self._queue])
        return used > 0 and FILE_HEADER_BYTES + used + coming > self._config.journal_bytes

    async def _retry_all(self, attempt: Callable[[list[Write]], Awaitable[None]]) -> None:
        """As :meth:`_retry`, for what syncs earlier writes too. ``attempt`` is given these: at first without
        their bytes, then with them, for a sync that failed for want of room may have dropped them."""
        writes = self._unsynced.files()

        async def once() -> None:
            nonlocal writes
            earlier, writes = writes, self._unsynced.again()
            await attempt(earlier)

        await self._retry(once)

    async def _retry(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Run ``attempt`` until the device has room."""
        delay = self._config.retry_seconds
        full = False
        while True:
            try:
                result = await attempt()
            except StorageFull as error:
                if self._closing:
                    raise StorageFailed(f"closed while the device was full: {error.message}") from error
                if not full:
                    full = True
                    self._on_fault(error)
                await asyncio.sleep(delay)
                delay = min(2 * delay, self._config.retry_seconds_max)
            else:
                if full:
                    self._on_fault(None)
                return result

    # -- waking ----------------------------------------------------------------------------------------------

    def _due_now(self) -> bool:
        return bool(self._waiters or self._copies or (self._due and len(self._files) > 1))

    def _await_sync(self) -> None:
        """See to it that what is unsynced is synced in time, also if nothing else comes."""
        due = self._unsynced.due
        assert due is not None
        if self._sync_timer is None or self._sync_timer.when() > due:
            if self._sync_timer is not None:
                self._sync_timer.cancel()
            self._sync_timer = self._loop.call_at(due, self._sync_is_due)

    def _sync_is_due(self) -> None:
        self._sync_timer = None
        if self._unsynced.due is None:
            return
        if self._loop.time() < self._unsynced.due:
            self._await_sync()  # another sync came first
            return
        self._mark_due = True
        self._wake_up()

    def _cancel_timers(self) -> None:
        for timer in (self._mark_timer, self._sync_timer):
            if timer is not None:
                timer.cancel()

    def _idle(self) -> None:
        """Cover the last group with a mark once nothing was written for a while."""
        loop = self._loop
        due = self._last_write + self._config.idle_mark_seconds
        if not self._marked and not self._queue and not self._running and loop.time() >= due:
            self._mark_due = True
            self._wake_up()
        at = due if due > loop.time() else loop.time() + self._config.idle_mark_seconds
        self._mark_timer = loop.call_at(at, self._idle)
