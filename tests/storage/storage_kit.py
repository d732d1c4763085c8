"""What the tests of storage share: entries with real batch headers, and a store driven like a broker drives
it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from raftlog.raft.types import Append, ConfState, Entry, HardState, Snapshot
from raftlog.record.frame import Buffer, FrameKind, iter_frames
from raftlog.storage.replica_log import ReplicaLog
from raftlog.storage.segment import batch_fields
from raftlog.storage.spec import ReplicaSpec, StorageConfig
from raftlog.storage.store import BrokerStore
from raftlog.testing.disk import CrashMode, SimDisk

T = TypeVar("T")

DISK_ID = b"d" * 16
SMALL = StorageConfig(
    journal_bytes=8 << 10,
    direct_bytes=2048,
    cache_bytes=4096,
    flush_bytes=4096,
    flush_write_bytes=2048,
    index_interval_bytes=256,
    index_checkpoint_bytes=2048,
    idle_mark_seconds=0.01,
    retry_seconds=0.001,
)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run on a fresh event loop."""
    return asyncio.run(work)


def spec(replica_id: int = 1, *, segment_bytes: int = 4096, partition: int = 0) -> ReplicaSpec:
    return ReplicaSpec(replica_id, "orders", b"t" * 16, partition, ConfState((replica_id,)), segment_bytes)


def batch(base_offset: int, count: int, size: int, timestamp_ms: int, fill: int = 0) -> bytes:
    """Bytes laid out as a RecordBatch v2 (its crc is not looked at by storage)."""
    head = struct.pack(
        ">qiibIhiqqqhii",
        base_offset,
        size,
        0,
        2,
        0,
        0,
        count - 1,
        timestamp_ms,
        timestamp_ms,
        -1,
        -1,
        -1,
        count,
    )
    return head + bytes([fill % 251]) * max(0, size - len(head))


class Writer:
    """Makes the entries that follow a log's last one, as a leader would."""

    def __init__(self, log: ReplicaLog) -> None:
        self.log = log
        self.sequence = 0
        self.acknowledged = 0
        """Index up to which entries were reported durable."""
        self.errors: list[BaseException] = []

    def entry(
        self,
        term: int,
        *,
        index: int | None = None,
        size: int = 100,
        count: int = 1,
        kind: FrameKind = FrameKind.BATCH,
        timestamp_ms: int | None = None,
        payload: bytes | None = None,
        previous: Entry | None = None,
    ) -> Entry:
        """The entry at ``index`` (default: the next), after what the log holds before it."""
        log = self.log
        index = log.last_index + 1 if index is None else index
        crc, offset = self.before(index) if previous is None else (previous.crc, end_offset(previous))
        if payload is None:
            time = index * 10 if timestamp_ms is None else timestamp_ms
            payload = batch(offset, count, size, time, index * 7 + term) if kind is FrameKind.BATCH else b""
        return Entry.create(crc, kind, term, index, index * 10, payload)

    def before(self, index: int) -> tuple[int, int]:
        """(crc of the entry before ``index``, record offset there)."""
        log, memory = self.log, self.log.memory
        if index - 1 >= memory.first_index:
            return memory.at(index - 1).crc, memory.ends[index - 1 - memory.first_index]
        assert index - 1 == log.flushed_index, "the entry before is no longer in memory"
        return log.flushed.crc, log.flushed.offset


def end_offset(entry: Entry) -> int:
    """Record offset after a batch."""
    return batch_fields(entry.frame)[0]


async def append(
    store: BrokerStore, log: ReplicaLog, entries: Sequence[Entry] = (), hard_state: HardState | None = None
) -> None:
    """Append and wait until it is durable."""
    await submit(store, log, entries, hard_state)


def submit(
    store: BrokerStore, log: ReplicaLog, entries: Sequence[Entry] = (), hard_state: HardState | None = None
) -> asyncio.Future[None]:
    """Append; the future is done when it is durable."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    store.append(log, Append(0, hard_state, tuple(entries)), done)
    asyncio.get_running_loop().call_soon(store.begin)  # what is submitted together is one group
    future.add_done_callback(lambda told: told.cancelled() or told.exception())  # nobody need ask
    return future


async def grow(
    store: BrokerStore, log: ReplicaLog, count: int, *, term: int = 1, size: int = 100, commit: bool = True
) -> list[Entry]:
    """Append ``count`` batches one by one; returns them."""
    made = []
    for _ in range(count):
        entry = Writer(log).entry(term, size=size)
        await append(store, log, [entry], HardState(term, 0, log.committed))
        if commit:
            log.set_committed(entry.index)
        made.append(entry)
    return made


async def contents(log: ReplicaLog) -> list[bytes]:
    """Every frame of the log, through the reading side."""
    frames: list[bytes] = []
    index = log.first_index
    while index <= log.last_index:
        for entry in await log.entries(index, log.last_index + 1, 1000):
            assert entry.index == index
            frames.append(bytes(entry.frame))
            index += 1
    return frames


def snapshot_at(log: ReplicaLog, index: int) -> Snapshot:
    """A snapshot of some state machine at an entry that is in memory."""
    entry = log.memory.at(index)
    return Snapshot(index, entry.term, entry.crc, log.conf_at(index), b"state at %d" % index)


async def reopen(store: BrokerStore, disk: SimDisk, *, clean: bool = True) -> tuple[BrokerStore, SimDisk]:
    """Stop the store, or cut its power, and open what is left."""
    if clean:
        await store.close()
    else:
        disk = disk.crash(CrashMode.NONE)
    return await BrokerStore.open(disk, SMALL, disk_id=DISK_ID), disk


def frames_in(buffers: Sequence[Buffer]) -> list[int]:
    """Indexes of the frames in contiguous buffers."""
    return [header.index for header, _ in iter_frames(b"".join(buffers))]
