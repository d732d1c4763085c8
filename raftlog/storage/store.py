"""A broker's storage: all its replicas' logs over one journal.

The host appends without waiting and is called back in order; reads and everything else are on
:class:`ReplicaLog`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import TypeAlias

from raftlog.errors import Closed, DamagedData, RaftlogError, StorageFailed, StorageFull
from raftlog.raft.types import Append, HardState
from raftlog.record.frame import Buffer
from raftlog.storage.disk import Disk, Write
from raftlog.storage.flusher import Flusher
from raftlog.storage.journal import Done, Journal
from raftlog.storage.journal_format import Checkpoint, Place
from raftlog.storage.journal_scan import JournalScan
from raftlog.storage.manifest import Manifest, load_manifest, store_manifest
from raftlog.storage.recovery import Directory, FrameSource, RecoveredReplica, recover_directory
from raftlog.storage.replica_log import Accept, Recovered, ReplicaLog
from raftlog.storage.segment import SEGMENT_HEADER_BYTES, Segment, replica_folder, segment_path
from raftlog.storage.segment_reader import SegmentReader
from raftlog.storage.snapshot_file import LogSnapshot, parse_snapshot, read_snapshot, snapshot_path
from raftlog.storage.spec import ReplicaSpec, StorageConfig
from raftlog.storage.ward import Sleeper, Ward

OnFault: TypeAlias = Callable[[RaftlogError | None], None]


class BrokerStore:
    """Opened by :meth:`open`.

    Attributes:
        logs: the replicas, by id.
        lost: created here once, and nothing of them is left: an empty replica must never vote under such an
        id.
        ward: damaged replicas, which do not run, and damaged files of those that do; the broker's other
        replicas are not affected.
        fault: StorageFull while the device has no room (what was appended waits and is tried again; nothing
        is lost),
            StorageFailed once a write or sync failed: then for good.
        on_fault: called whenever ``fault`` changes.
        was_clean: the last stop was a clean one.
        metadata_index: replicas were removed here by metadata of this index; older metadata is not to be
            followed.
        rebooted: the system was started anew since, without a clean stop of the store: what was written and
            not synced may be gone.
    """

    def __init__(self, disk: Disk, config: StorageConfig, disk_id: bytes) -> None:
        self.logs: dict[int, ReplicaLog] = {}
        self.lost: dict[int, ReplicaSpec] = {}
        self.fault: RaftlogError | None = None
        self.on_fault: OnFault = _ignore
        self.was_clean = True
        self.rebooted = False
        self.metadata_index = 0
        self._disk = disk
        self._config = config
        self._disk_id = disk_id
        self._specs: dict[int, ReplicaSpec] = {}
        self._amnesiac: set[int] = set()
        self._note: asyncio.Task[None] | None = None
        self.ward = Ward(disk, config, self.logs, self._wake)
        self._reader = SegmentReader(disk, config, self.ward.note_segment)
        self._journal: Journal
        self._flusher: Flusher
        self._full: dict[str, RaftlogError] = {}
        self._manifest_lock = asyncio.Lock()
        self._closed = False

    @classmethod
    async def open(cls, disk: Disk, config: StorageConfig | None = None, *, disk_id: bytes) -> BrokerStore:
        """Lock the directory and recover all that is in it.

        Args:
            disk_id: the directory's own id, from its identity.

        Raises:
            DataDirLocked: another broker has it open.
            ForeignDataDir: journal or manifest were written under another disk id.
            DamagedData: the journal or the manifest does not check where it had been synced.
            StorageFull, StorageFailed: the device.
        """
        await disk.lock()
        store = cls(disk, config or StorageConfig(), disk_id)
        try:
            await store._recover()
        except BaseException:  # also cancelled: the lock must not stay
            await disk.close()
            raise
        return store

    # -- replicas --------------------------------------------------------------------------------------------

    async def create(self, spec: ReplicaSpec) -> ReplicaLog:
        """Create one replica; see :meth:`create_many`."""
        return (await self.create_many([spec]))[0]

    async def create_many(self, specs: Iterable[ReplicaSpec]) -> list[ReplicaLog]:
        """Create empty replicas; they are in the synced manifest before this returns.

        Raises:
            StorageFailed: the store has failed.
        """
        made = []
        for spec in specs:
            assert spec.replica_id not in self._specs, f"replica id {spec.replica_id} was used before"
            made.append(self._new_log(spec))
        for log in made:
            self.logs[log.spec.replica_id] = log
        try:
            # First the record that it exists with nothing in it, then the promise that there is such a
            # record.
            await self._journal.checkpoint(made)
            async with self._manifest_lock:
                for log in made:
                    self._specs[log.spec.replica_id] = log.spec
                await self._store_manifest()
        except BaseException:  # also cancelled: nothing was created
            for log in made:
                self.logs.pop(log.spec.replica_id, None)
                self._specs.pop(log.spec.replica_id, None)
            raise
        return made

    async def remove(self, replica_id: int, metadata_index: int) -> None:
        """Forget a replica and delete its data. One that is not there is fine.

        Args:
            metadata_index: of the metadata that has it no more. What was removed by it would come back, empty
                and without its vote, if a broker that was started anew followed an older state of it.
        """
        self.metadata_index = max(self.metadata_index, metadata_index)
        log = self.logs.pop(replica_id, None)
        self.lost.pop(replica_id, None)
        self.ward.forget(replica_id)
        self._journal.forget(replica_id)
        if log is not None:
            log.removed = True
            self._flusher.forget(log)
        if self._specs.pop(replica_id, None) is not None:
            async with self._manifest_lock:
                await self._store_manifest()
        if log is not None:
            await self._flusher.settle()
            await self._journal.checkpoint(())  # behind it, no write to its segments is under way
            for segment in log.segments:
                self._reader.forget(segment)
        await self._disk.remove_tree(replica_folder(replica_id))

    @property
    def out_of_service(self) -> dict[int, tuple[ReplicaSpec, str]]:
        """Lost and damaged replicas, by id, and what is wrong with each. They must not run, nor may others
        under their ids."""
        found: dict[int, tuple[ReplicaSpec, str]] = {}
        for replica_id, spec in self.lost.items():
            what = f"nothing is left of replica {replica_id} of {spec.topic}-{spec.partition} on this disk"
            found[replica_id] = (spec, what)
        for replica_id, error in self.damaged.items():
            found[replica_id] = (self._specs[replica_id], error.message)
        return found

    @property
    def damaged(self) -> dict[int, DamagedData]:
        """What is wrong with each replica that recovery could not put together."""
        return {replica_id: sleeper.error for replica_id, sleeper in self.ward.sleepers.items()}

    # -- append ----------------------------------------------------------------------------------------------

    def append(self, log: ReplicaLog, append: Append, done: Done) -> None:
        """Take the entries into the log now, to be made durable after :meth:`begin`; never blocks.

        Args:
            done: called on the loop with None once durable, in order per replica; with StorageFailed if they
            are not
                and never will be.
        """
        failed = self._journal.failed
        if failed is not None or self._closed:
            error = failed or Closed("the store is closed")
            asyncio.get_running_loop().call_soon(done, error)
            return
        dropped, direct = log.take(append.entries)
        self._flusher.added(log, self._journal.submit(log, append, direct, done) - dropped)

    def begin(self) -> None:
        """Begin to write what was appended since the last call, as one group. If one is under way, this will
        be the next."""
        self._journal.begin()

    @property
    def pending_bytes(self) -> int:
        """Bytes appended and not yet durable."""
        return self._journal.pending_bytes

    @property
    def groups(self) -> int:
        """Groups of appends that were put together since it was opened; what is appended now goes into the
        next."""
        return self._journal.groups

    @property
    def oldest_pending_since(self) -> float | None:
        """Loop time at which the oldest append that is not yet durable was made."""
        return self._journal.oldest_pending_since

    async def flush(self) -> None:
        """Move all that is committed to the segments now (tests, and a broker that drains)."""
        await self._flusher.flush_all()
        await self._journal.checkpoint(self.logs.values())
        await self._journal.files.release()

    async def close(self) -> None:
        """Write and flush everything, note that the stop was clean, release the directory."""
        if self._closed:
            return
        self._closed = True
        try:
            if self.fault is None:
                await self._flusher.close()
                await self._journal.checkpoint(())
                for log in self.logs.values():
                    await self._flusher.flush(log, save_index=True)
                await self._journal.checkpoint(self.logs.values())
                await self._journal.files.release()
                await self._journal.close()
                if self.fault is None:
                    await self._store_manifest(clean=True)
            else:
                await self._flusher.close()
                await self._journal.close()
        except RaftlogError as error:
            self._set_fault("close", error)
        finally:
            if self._note is not None:
                await self._note
            await self._release()

    async def abort(self) -> None:
        """Stop as a killed process does, as far as a living one can: nothing more is written but what is
        under way, nobody is told, and the directory is released without a note that the stop was clean."""
        if self._closed:
            return
        self._closed = True
        if self._note is not None:
            self._note.cancel()
        await self._flusher.abort()
        await self._journal.abort()
        await self._release()

    async def _release(self) -> None:
        for log in self.logs.values():
            for segment in log.segments:
                self._reader.forget(segment)
        await self._disk.close()

    # -- recovery --------------------------------------------------------------------------------------------

    async def _recover(self) -> None:
        manifest = await load_manifest(self._disk)
        if manifest is None:
            manifest = Manifest(self._disk_id, clean=True)
        self.was_clean = manifest.clean
        self.rebooted = manifest.rebooted(self._disk.boot_id)
        self._amnesiac = manifest.amnesiac_at(self._disk.boot_id)
        self.metadata_index = manifest.metadata_index
        self._specs = {spec.replica_id: spec for spec in manifest.replicas}
        found = await recover_directory(self._disk, self._config, manifest, self._disk_id)
        self.lost = {spec.replica_id: spec for spec in found.lost}
        for spec, held, error in found.damaged:
            self.ward.sleepers[spec.replica_id] = Sleeper.of(spec, held, error)
        await self._begin(manifest, found)

    async def _begin(self, manifest: Manifest, directory: Directory) -> None:
        """From here on the directory is changed."""
        scan, found, source = directory.scan, directory.whole, directory.source
        await self._cut_torn_tail(scan)
        if not manifest.clean:
            await self._write_again_what_was_read(scan, found, source)
        for replica in found:
            for path in replica.leftovers:
                await self._disk.remove(path)
            self.logs[replica.spec.replica_id] = self._recovered_log(replica)
        needed = {file.sequence: dict[int, int]() for file in scan.files}
        for replica in found:
            for sequence, index in replica.needed.items():
                needed[sequence][replica.spec.replica_id] = index
        for sleeper in self.ward.sleepers.values():
            for entry in sleeper.entries:
                needed[entry.sequence][sleeper.spec.replica_id] = entry.header.index
        self._journal = Journal(
            self._disk,
            self._config,
            self._disk_id,
            self.logs,
            self.ward.sleepers,
            sequence=scan.sequence + 1,
            base=scan.end,
            old=[(file.sequence, file.base, needed[file.sequence]) for file in scan.files],
            on_fault=lambda error: self._set_fault("journal", error),
            on_durable=self._group_done,
            on_roll=self._rolled,
        )
        self._flusher = Flusher(
            self._disk, self._config, self._journal, lambda error: self._set_fault("segments", error)
        )
        for log in self.logs.values():
            self._flusher.added(log, sum(len(entry.frame) for entry in log.recovered.tail))
            await self._flusher.finish_sealing(log)
        await self._store_manifest()
        self._journal.start()
        self._flusher.start()

    async def _cut_torn_tail(self, scan: JournalScan) -> None:
        if scan.files and not scan.files[-1].header_valid:
            await self._disk.remove(scan.files.pop().path)
        if scan.files:
            last = scan.files[-1]
            if len(last.data) > last.size:
                # Not only for tidiness: what stands behind could one day line up with new records.
                file = await self._disk.open(last.path)
                await self._disk.truncate(file, last.size)
                file.close()

    async def _write_again_what_was_read(
        self, scan: JournalScan, found: list[RecoveredReplica], source: FrameSource
    ) -> None:
        """What recovery read counts as durable from now on: the next mark's floor says so. But a process that
        was killed leaves writes that no sync has covered, and after a failed sync the operating system may
        show as written what never reached the device. So what could be either, the newest journal file
        (nothing is written behind a failed sync) and the large frames it refers to, is written again and
        synced."""
        if not scan.files:
            return
        last = scan.files[-1]
        contents: dict[str, list[tuple[int, Buffer]]] = {last.path: [(0, last.data[: last.size])]}

        def add(spec: ReplicaSpec, place: Place, frame: Buffer) -> None:
            path = segment_path(spec.replica_id, place.base_index, place.base_offset)
            contents.setdefault(path, []).append((place.position, frame))

        for replica in found:
            for entry in replica.recovered.tail:
                place = replica.places.get(entry.index)
                if place is not None:
                    add(replica.spec, place, entry.frame)
        for sleeper in self.ward.sleepers.values():
            for held in sleeper.entries:
                frame = await source.read(sleeper.spec.replica_id, held) if held.place is not None else None
                if frame is not None and held.place is not None:
                    add(sleeper.spec, held.place, frame)
        for path, parts in contents.items():
            file = await self._disk.open(path)
            try:
                if path != last.path:
                    parts.append((0, await file.read(0, SEGMENT_HEADER_BYTES)))
                await self._disk.write([Write(file, position, (data,)) for position, data in parts])
            finally:
                file.close()

    async def _wake(self, replica: RecoveredReplica) -> None:
        """A damaged replica is whole again: from here on it is like any other."""
        for path in replica.leftovers:
            await self._disk.remove(path)
        log = self._recovered_log(replica)
        await self._flusher.finish_sealing(log)  # if the disk fails here, it sleeps on and is tried again
        if self.ward.sleepers.pop(log.spec.replica_id, None) is not None:  # else it was removed meanwhile
            self.logs[log.spec.replica_id] = log
            self._flusher.added(log, sum(len(entry.frame) for entry in log.recovered.tail))

    def _new_log(self, spec: ReplicaSpec) -> ReplicaLog:
        origin = spec.origin_crc
        recovered = Recovered(HardState(), ((0, spec.conf),), 1, 0, origin, (), 0, (), origin, 0)
        segment = Segment(spec, 1, 0, 0, origin, self._config.index_interval_bytes)
        flushed = Checkpoint(HardState(), 0, 0, origin, 0, 0, 1)
        return self._make_log(spec, recovered, [segment], flushed)

    def _recovered_log(self, replica: RecoveredReplica) -> ReplicaLog:
        log = self._make_log(replica.spec, replica.recovered, replica.segments, replica.flushed)
        log.snapshot = replica.snapshot
        log.snapshots = replica.snapshots
        log.amnesiac = replica.spec.replica_id in self._amnesiac
        for index in replica.damaged_snapshots:
            self.ward.note_snapshot(replica.spec.replica_id, index)
        for index, place in replica.places.items():
            segment = log.segment_of(index)
            if place == (segment.base_index, segment.base_offset, log.memory.position_of(index)):
                log.mark_direct(index, place)
        return log

    def _make_log(
        self, spec: ReplicaSpec, recovered: Recovered, segments: list[Segment], flushed: Checkpoint
    ) -> ReplicaLog:
        return ReplicaLog(spec, self._config, self._reader, recovered, segments, flushed, self)

    # -- what the logs ask for -------------------------------------------------------------------------------

    def request_flush(self, log: ReplicaLog) -> None:
        """Flush the log soon (it has a snapshot to write)."""
        self._flusher.request(log)

    async def truncate_prefix(self, log: ReplicaLog, index: int) -> None:
        """See :meth:`ReplicaLog.truncate_prefix`."""
        border = await self._last_border(log, index)
        await self._flusher.settle()
        dropped: list[Segment] = []
        # By where the next one begins: of a segment's own entries some may not be flushed yet.
        while len(log.segments) > 1 and log.segments[1].base_index - 1 <= border:
            dropped.append(log.segments.pop(0))
        if not dropped:
            return
        first = log.first_index
        log.memory_starts_at(first)
        old_snapshots = [i for i in log.snapshots if i < first - 1]
        log.snapshots = [i for i in log.snapshots if i >= first - 1]
        await self._journal.checkpoint([log])  # a crash from here on only leaves files that recovery removes
        await self._remove_files(log, dropped, old_snapshots)

    async def _last_border(self, log: ReplicaLog, index: int) -> int:
        """The last end of a sealed segment, not above ``index``, that a snapshot which checks stands at."""
        ends = []
        for segment in log.segments[:-1]:
            if not segment.sealed or segment.last_index > index:
                break
            ends.append(segment.last_index)
        for end in reversed(ends):
            if end in log.snapshots:
                try:
                    await read_snapshot(self._disk, log.spec.replica_id, end)
                except (DamagedData, FileNotFoundError):
                    self.ward.note_snapshot(log.spec.replica_id, end)
                    continue
                return end
        return 0

    async def _remove_files(self, log: ReplicaLog, segments: list[Segment], snapshots: list[int]) -> None:
        used = {segment.path for segment in log.segments}
        for segment in segments:
            self._reader.forget(segment)
            if segment.path not in used:
                await self._disk.remove(segment.path)
                await self._disk.remove(segment.index_path)
        for index in snapshots:
            await self._disk.remove(snapshot_path(log.spec.replica_id, index))

    async def snapshot_chunk(
        self, log: ReplicaLog, index: int, position: int, size: int
    ) -> tuple[bytes, int]:
        """See :meth:`ReplicaLog.snapshot_chunk`."""
        replica_id = log.spec.replica_id
        if position == 0:
            try:
                await read_snapshot(self._disk, replica_id, index)
            except DamagedData as error:
                self.ward.note_snapshot(replica_id, index)
                raise StorageFailed(f"the snapshot at {index} cannot be sent: {error}") from error
            except FileNotFoundError:
                if index == log.first_index - 1:
                    self.ward.note_snapshot(replica_id, index)
        data, total = await self.ward.snapshot_chunk(replica_id, index, position, size)
        if not total:
            raise StorageFailed(f"{snapshot_path(replica_id, index)}: there is no such snapshot")
        return data, total

    async def keep_snapshot(self, log: ReplicaLog, index: int, data: Buffer) -> LogSnapshot:
        """See :meth:`ReplicaLog.keep_snapshot`."""
        path = snapshot_path(log.spec.replica_id, index)
        snapshot = parse_snapshot(data, index, path)
        await self._disk.replace_file(path, bytes(data))
        return snapshot

    async def begin_behind(self, log: ReplicaLog, snapshot: LogSnapshot, accept: Accept) -> bool:
        """See :meth:`ReplicaLog.begin_behind`.

        The order makes a crash harmless at every step: a snapshot file above what the log holds means
        nothing; one journal record then turns the log from the old to the new one; files of the old one are
        leftovers.
        """
        await self._journal.checkpoint(())  # behind it, nothing of this log is in the journal's queue
        await self._flusher.settle()
        if log.removed or not accept():
            return False
        self._flusher.forget(log)
        segments = log.restart_behind(snapshot)
        snapshots, log.snapshots = log.snapshots, [snapshot.index]
        await self._journal.reset(log)
        await self._remove_files(log, segments, [old for old in snapshots if old != snapshot.index])
        return True

    # -- writes that no sync has covered ---------------------------------------------------------------------

    async def _note_failure(self) -> None:
        """A sync may have failed: what it would have covered may be gone however the system shows it now. If
        the device does not even take this note, a restart within the same boot does not know."""
        self._amnesiac.update(spec.replica_id for spec in self._specs.values() if spec.flush_interval_ms)
        if self._amnesiac:
            with contextlib.suppress(RaftlogError):
                async with self._manifest_lock:
                    await self._store_manifest()

    async def cured(self, log: ReplicaLog) -> None:
        """See :meth:`ReplicaLog.cured`."""
        log.amnesiac = False
        async with self._manifest_lock:
            if self.fault is None and log.spec.replica_id in self._amnesiac:
                self._amnesiac.discard(log.spec.replica_id)
                await self._store_manifest()

    # -- inside ----------------------------------------------------------------------------------------------

    async def _store_manifest(self, *, clean: bool = False) -> None:
        journal_sequence = self._journal.sequence
        manifest = Manifest(
            self._disk_id,
            tuple(self._specs.values()),
            journal_sequence,
            clean,
            self._disk.boot_id,
            tuple(sorted(self._amnesiac & self._specs.keys())),
            self.metadata_index,
        )
        await store_manifest(self._disk, manifest)

    def _group_done(self) -> None:
        self._flusher.group_done()

    def _rolled(self) -> None:
        self._flusher.request()

    def _set_fault(self, source: str, error: RaftlogError | None) -> None:
        before = self.fault
        if error is None:
            self._full.pop(source, None)
        else:
            self._full[source] = error
        failed = [fault for fault in self._full.values() if not isinstance(fault, StorageFull)]
        self.fault = failed[0] if failed else next(iter(self._full.values()), None)
        if failed and self._journal.failed is None:
            self._journal.fail(failed[0])
        if failed and self._note is None:
            self._note = asyncio.get_running_loop().create_task(self._note_failure())
        if self.fault is not before:
            self.on_fault(self.fault)


def _ignore(fault: RaftlogError | None) -> None:
    """Until the host listens."""
