"""What does not check on a broker's disk and can be made right with bytes from peers: replicas that recovery
could not put together, and damaged files of replicas that run.

A damaged replica *sleeps*: it is not among the logs, and nothing can be appended to it. What the journal says
of it is kept, for it belongs on top once the segments are right, and peers may need it meanwhile. The journal
takes it along from file to file, so that it holds back none.

A replica that runs may have segments and snapshots in which something was found not to check. Reading that
fails; all else goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace

import msgspec

from raftlog.errors import DamagedData, StorageFailed
from raftlog.raft.types import Entry
from raftlog.record.frame import Buffer
from raftlog.storage.damage import BrokenLog, BrokenSnapshot
from raftlog.storage.disk import Disk
from raftlog.storage.journal_format import Checkpoint
from raftlog.storage.recovery import (
    FrameSource,
    JournaledEntry,
    RecoveredReplica,
    Replayed,
    recover_replica,
)
from raftlog.storage.repair import Patch
from raftlog.storage.replica_log import ReplicaLog
from raftlog.storage.salvage import find_anchors, run_of, salvage, survey
from raftlog.storage.segment import Segment
from raftlog.storage.snapshot_file import parse_snapshot, read_snapshot, snapshot_path
from raftlog.storage.spec import ReplicaSpec, StorageConfig


@dataclass(slots=True)
class Sleeper:
    """A replica that recovery could not put together."""

    spec: ReplicaSpec
    checkpoint: Checkpoint
    """As the journal has it, with the last term and vote."""
    entries: list[JournaledEntry]
    """Above the checkpoint."""
    error: DamagedData
    """What is wrong."""

    @classmethod
    def of(cls, spec: ReplicaSpec, replayed: Replayed, error: DamagedData) -> Sleeper:
        """What recovery could not go on from."""
        assert replayed.checkpoint is not None
        checkpoint = msgspec.structs.replace(replayed.checkpoint, hard_state=replayed.hard_state)
        # Copies: the frames must not keep whole journal files in memory.
        entries = [
            entry if entry.frame is None else replace(entry, frame=memoryview(bytes(entry.frame)))
            for entry in replayed.entries
        ]
        return cls(spec, checkpoint, entries, error)

    @property
    def replayed(self) -> Replayed:
        """What recovery begins with."""
        return Replayed(self.checkpoint.hard_state, self.checkpoint, list(self.entries))

    def run(self, index: int, prev_crc: int, bytes_max: int) -> bytes:
        """The journal's frames from ``index`` on, as :func:`~raftlog.storage.salvage.run_of`."""
        held = (Entry.of(entry.header, entry.frame) for entry in self.entries if entry.frame is not None)
        return run_of(held, index, prev_crc, bytes_max)


Wake = Callable[[RecoveredReplica], Awaitable[None]]


class Ward:
    """All that is known to be damaged on one disk.

    Args:
        logs: the replicas that run.
        wake: called with a sleeper that recovery could put together after all; moves it to the logs.

    Attributes:
        sleepers: by replica id.
        on_found: called with the id of a replica that runs when damage is found in one of its files.
    """

    def __init__(self, disk: Disk, config: StorageConfig, logs: Mapping[int, ReplicaLog], wake: Wake) -> None:
        self.sleepers: dict[int, Sleeper] = {}
        self.on_found: Callable[[int], None] = _ignore
        self._disk = disk
        self._config = config
        self._logs = logs
        self._wake = wake
        self._segments: dict[int, dict[int, Segment]] = {}
        self._snapshots: dict[int, set[int]] = {}

    # -- what is known ---------------------------------------------------------------------------------------

    @property
    def patients(self) -> list[int]:
        """Ids of all replicas with something to repair."""
        return sorted({*self.sleepers, *self._segments, *self._snapshots})

    def is_hurt(self, replica_id: int) -> bool:
        """Files of a replica that runs are known to be damaged."""
        return replica_id in self._segments or replica_id in self._snapshots

    def spec_of(self, replica_id: int) -> ReplicaSpec | None:
        """What the replica is; None once it was removed."""
        sleeper = self.sleepers.get(replica_id)
        if sleeper is not None:
            return sleeper.spec
        log = self._logs.get(replica_id)
        return log.spec if log is not None else None

    def replicas_of(self, topic_id: bytes, partition: int) -> list[int]:
        """Ids of all replicas of a partition on this disk, damaged ones too."""
        specs = [log.spec for log in self._logs.values()]
        specs += [sleeper.spec for sleeper in self.sleepers.values()]
        return [spec.replica_id for spec in specs if (spec.topic_id, spec.partition) == (topic_id, partition)]

    def note_segment(self, segment: Segment) -> None:
        """Something in the segment of a replica that runs does not check."""
        replica_id = segment.spec.replica_id
        known = self._segments.setdefault(replica_id, {})
        if segment.base_index not in known:
            known[segment.base_index] = segment
            self.on_found(replica_id)

    def note_snapshot(self, replica_id: int, index: int) -> None:
        """The snapshot of a replica that runs does not check, or is gone."""
        known = self._snapshots.setdefault(replica_id, set())
        if index not in known:
            known.add(index)
            self.on_found(replica_id)

    def forget(self, replica_id: int) -> None:
        """The replica was removed."""
        self.sleepers.pop(replica_id, None)
        self._segments.pop(replica_id, None)
        self._snapshots.pop(replica_id, None)

    # -- repair ----------------------------------------------------------------------------------------------

    async def next_damage(self, replica_id: int) -> DamagedData | None:
        """Look at what is damaged.

        Returns:
            A BrokenLog or BrokenSnapshot to be repaired next; another DamagedData if nothing can be done;
            None when all is well again (a sleeper is awake then).
        """
        sleeper = self.sleepers.get(replica_id)
        if sleeper is not None:
            return await self._try_to_wake(sleeper)
        log = self._logs.get(replica_id)
        if log is None:
            self.forget(replica_id)
            return None
        return await self._next_segment(log) or await self._next_snapshot(log)

    async def _try_to_wake(self, sleeper: Sleeper) -> DamagedData | None:
        spec = sleeper.spec
        try:
            found = await recover_replica(
                self._disk, self._config, spec, sleeper.replayed, FrameSource(self._disk)
            )
        except DamagedData as error:
            sleeper.error = error
            return error
        if spec.replica_id in self.sleepers:  # else it was removed meanwhile
            await self._wake(found)
        return None

    async def _next_segment(self, log: ReplicaLog) -> BrokenLog | None:
        known = self._segments.get(log.spec.replica_id, {})
        for base_index, segment in sorted(known.items()):
            broken = await survey(self._disk, segment) if segment in log.segments else None
            if broken is not None and segment in log.segments:
                return broken
            del known[base_index]
        if not known:
            self._segments.pop(log.spec.replica_id, None)
        return None

    async def _next_snapshot(self, log: ReplicaLog) -> BrokenSnapshot | None:
        replica_id = log.spec.replica_id
        known = self._snapshots.get(replica_id, set())
        for index in sorted(known):
            try:
                if index in log.snapshots or index == log.first_index - 1 > 0:
                    await read_snapshot(self._disk, replica_id, index)
            except (FileNotFoundError, DamagedData):
                return BrokenSnapshot.at(log.spec, (index,))
            known.discard(index)
        if not known:
            self._snapshots.pop(replica_id, None)
        return None

    async def patch(self, broken: BrokenLog) -> Patch:
        """What it takes to repair that."""
        return Patch(self._disk, broken, await find_anchors(self._disk, broken))

    async def keep_snapshot(self, replica_id: int, index: int, data: Buffer) -> None:
        """Put a peer's snapshot in the place of a damaged one (the peer is a member of the same group in the
        same state: its file has the same bytes).

        Raises:
            DamagedData: it does not check, or does not fit the log.
            StorageFull, StorageFailed: the device.
        """
        path = snapshot_path(replica_id, index)
        snapshot = parse_snapshot(data, index, path)
        log = self._logs.get(replica_id)
        if log is not None and index == log.first_index - 1 and snapshot.crc != log.prev_crc:
            raise DamagedData(f"{path}: the snapshot from a peer is of another log", path=path, position=0)
        await self._disk.replace_file(path, bytes(data))
        if log is not None and index not in log.snapshots:
            log.snapshots.append(index)
            log.snapshots.sort()

    async def begin_behind(self, replica_id: int, index: int, data: Buffer) -> bool:
        """Let a sleeper's log begin behind a peer's snapshot at ``index``: what it lacks below, nobody has
        any more, for retention has dropped it. It keeps term and vote, and all its entries above.

        Returns:
            False if its log does not go on from there.

        Raises:
            DamagedData: the snapshot does not check.
            StorageFull, StorageFailed: the device.
        """
        path = snapshot_path(replica_id, index)
        snapshot = parse_snapshot(data, index, path)
        sleeper = self.sleepers.get(replica_id)
        if sleeper is None or not sleeper.checkpoint.first_index <= index <= sleeper.checkpoint.index:
            return False
        if index == sleeper.checkpoint.index:
            follows = sleeper.checkpoint.crc == snapshot.crc
        else:
            follows = bool(await salvage(self._disk, replica_id, index + 1, snapshot.crc, 1))
        if not follows:
            return False
        await self._disk.replace_file(path, bytes(data))
        # Not written down: a process that ends before the journal's next checkpoint finds the same again.
        sleeper.checkpoint = msgspec.structs.replace(sleeper.checkpoint, first_index=index + 1)
        return True

    async def drop_snapshot(self, replica_id: int, index: int) -> bool:
        """Do without a damaged snapshot of a replica that runs, if its log does not begin behind it.

        Returns:
            False when it cannot be done without.
        """
        log = self._logs.get(replica_id)
        if log is None or index <= log.first_index - 1:
            return False
        if index in log.snapshots:
            log.snapshots.remove(index)
        await self._disk.remove(snapshot_path(replica_id, index))
        known = self._snapshots.get(replica_id, set())
        known.discard(index)
        return True

    # -- for peers -------------------------------------------------------------------------------------------

    async def frames(self, replica_id: int, index: int, prev_crc: int, bytes_max: int) -> bytes:
        """Frames from ``index`` on, from wherever this disk has them, whatever else is damaged.

        Args:
            prev_crc: crc of the entry before; only what follows it is returned.
            bytes_max: soft limit; one frame comes even above it.

        Returns:
            Contiguous frames, checked; b"" if there are none.
        """
        log = self._logs.get(replica_id)
        if log is not None and log.first_index <= index <= log.last_index:
            try:
                entries = await log.entries(index, log.last_index + 1, bytes_max)
            except (DamagedData, StorageFailed):
                pass  # what does not depend on the damage may still be found
            else:
                return run_of(entries, index, prev_crc, bytes_max)
        sleeper = self.sleepers.get(replica_id)
        found = sleeper.run(index, prev_crc, bytes_max) if sleeper is not None else b""
        return found or await salvage(self._disk, replica_id, index, prev_crc, bytes_max)

    async def snapshot_chunk(
        self, replica_id: int, index: int, position: int, size: int
    ) -> tuple[bytes, int]:
        """At most ``size`` bytes of a snapshot's file, and how many there are in all; (b"", 0) without one.
        They are not checked: who asks does that."""
        path = snapshot_path(replica_id, index)
        try:
            file = await self._disk.open(path)
            try:
                return await file.read(position, size), await self._disk.file_size(path)
            finally:
                file.close()
        except FileNotFoundError:
            return b"", 0


def _ignore(replica_id: int) -> None:
    """Until the host listens."""
