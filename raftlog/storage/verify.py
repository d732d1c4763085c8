"""Check every byte of a broker's directory, offline, changing nothing.

It believes what recovery believes and then reads all the rest: every frame of every segment, its crc and its
place in the chain, the index files against the frames, every snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from hashlib import sha256

import msgspec

from raftlog.errors import CorruptFrame, DamagedData, RaftlogError
from raftlog.record.frame import FRAME_HEADER_BYTES, Buffer, FrameKind, frame_length, parse_frame
from raftlog.storage.damage import BrokenLog, BrokenSnapshot
from raftlog.storage.disk import Disk
from raftlog.storage.identity import find_identity
from raftlog.storage.journal_format import RecordKind, record_begins
from raftlog.storage.journal_scan import JournalScan, scan_journal
from raftlog.storage.manifest import Manifest, load_manifest
from raftlog.storage.recovery import FrameSource, RecoveredReplica, Replayed, recover_replica, replay_whole
from raftlog.storage.segment import SEGMENT_HEADER_BYTES, Segment, batch_fields, replica_folder
from raftlog.storage.segment_index import SparseIndex, read_index
from raftlog.storage.snapshot_file import parse_snapshot_name, read_snapshot
from raftlog.storage.spec import ReplicaSpec, StorageConfig

_READ_BYTES = 4 << 20


class ReplicaRow(msgspec.Struct, frozen=True):
    """One replica as it stands on this disk. Iterates over the columns of a table."""

    topic: str
    partition: int
    replica_id: int
    first_index: int
    last_index: int
    committed: int
    """Known to be committed when last written; the truth may be further."""
    start_offset: int
    end_offset: int
    bytes: int
    """Of all its frames."""
    sha256: str
    """Over its frames in order, up to the index asked for. Replicas that hold the same entries, and have
    dropped the same prefix, agree."""

    def __iter__(self) -> Iterator[str | int]:
        yield self.topic
        yield self.partition
        yield self.replica_id
        yield f"{self.first_index}..{self.last_index}"
        yield f"{self.start_offset}..{self.end_offset}"
        yield self.bytes
        yield self.sha256


class Outcome(StrEnum):
    """What a broker does about damage when it runs."""

    STOP = "stops the broker"
    """The journal, the manifest or the identity: what it promised may be forgotten."""
    REPLACE = "needs another replica in its place"
    """What one replica promised may be forgotten."""
    REPAIR = "is repaired by its peers"
    """What others have is asked of them."""
    IGNORE = "is read around"
    """An index file: the frames say the same."""


class Problem(msgspec.Struct, frozen=True):
    """Something that does not check."""

    path: str
    position: int
    what: str
    outcome: Outcome = Outcome.STOP

    def __str__(self) -> str:
        return f"{self.what} ({self.outcome})"


class VerifyReport(msgspec.Struct, frozen=True):
    """Result of :func:`verify`."""

    broker_id: int | None
    cluster_id: str | None
    clean: bool
    """The broker was stopped in order."""
    replicas: list[ReplicaRow]
    problems: list[Problem]
    notes: list[str]
    """What is in order, but worth knowing: a torn tail that the next start will cut."""


async def verify(disk: Disk, through: Mapping[tuple[str, int], int] | None = None) -> VerifyReport:
    """Check a data directory. Take care that no broker runs in it.

    Args:
        disk: rooted at the broker's directory; it is closed at the end.
        through: (topic, partition) -> the last index that its sha256 covers, where replicas of different
            length are to be compared; default: all that is there.

    Returns:
        What is there and what is wrong.
    """
    try:
        return await _Verifier(disk, through or {}).run()
    finally:
        await disk.close()


class _Digest:
    """Over a replica's frames up to an index; None: over all."""

    def __init__(self, through: int | None) -> None:
        self._through = through
        self._sha256 = sha256()

    def add(self, index: int, frame: Buffer) -> None:
        if self._through is None or index <= self._through:
            self._sha256.update(frame)

    def hex(self) -> str:
        return self._sha256.hexdigest()


class _Verifier:
    def __init__(self, disk: Disk, through: Mapping[tuple[str, int], int]) -> None:
        self._disk = disk
        self._through = through
        self._rows: list[ReplicaRow] = []
        self._problems: list[Problem] = []
        self._notes: list[str] = []

    async def run(self) -> VerifyReport:
        identity = manifest = None
        try:
            identity = await find_identity(self._disk)
        except RaftlogError as error:
            self._problem(error)
        try:
            manifest = await load_manifest(self._disk)
        except RaftlogError as error:
            self._problem(error)
        disk_id = identity.disk_id if identity else None
        if manifest is not None:
            if disk_id is not None and manifest.disk_id != disk_id:
                self._add("MANIFEST", 0, "the manifest was written on another disk")
            await self._check_journal(manifest)
        return VerifyReport(
            identity.broker_id if identity else None,
            identity.cluster_id if identity else None,
            manifest is not None and manifest.clean,
            self._rows,
            self._problems,
            self._notes,
        )

    async def _check_journal(self, manifest: Manifest) -> None:
        source = FrameSource(self._disk)
        try:
            scan = await scan_journal(self._disk, manifest.disk_id, manifest.journal_sequence)
            for damage in scan.damage:
                self._problem(damage)
            self._check_frames(scan)
            replayed = await replay_whole(scan, source)
        except RaftlogError as error:
            self._problem(error)
            return
        self._note_torn_tail(scan)
        for spec in manifest.replicas:
            found = replayed.get(spec.replica_id)
            if found is None:
                what = f"{_name(spec)}: nothing is left of it"
                self._add(replica_folder(spec.replica_id), 0, what, Outcome.REPLACE)
                continue
            await self._check_replica(spec, found, source)

    def _check_frames(self, scan: JournalScan) -> None:
        """A frame in the journal is covered by its record's crc; its own must agree."""
        for sequence, record in scan.records():
            if record.kind != RecordKind.ENTRY:
                continue
            try:
                parse_frame(record.body)
            except CorruptFrame as error:
                path = next(file.path for file in scan.files if file.sequence == sequence)
                what = f"{path}: record at journal position {record.position}: {error}"
                self._add(path, record.position, what)

    def _note_torn_tail(self, scan: JournalScan) -> None:
        if not scan.files:
            return
        last = scan.files[-1]
        if last.header_valid and record_begins(last.data, last.size, last.end):
            what = f"{last.path}: the next start drops what follows byte {last.size} (never synced)"
            self._notes.append(what)

    async def _check_replica(self, spec: ReplicaSpec, replayed: Replayed, source: FrameSource) -> None:
        try:
            replica = await recover_replica(self._disk, StorageConfig(), spec, replayed, source)
        except DamagedData as error:
            repairable = isinstance(error, BrokenLog | BrokenSnapshot)
            self._problem(error, Outcome.REPAIR if repairable else Outcome.REPLACE)
            await self._check_snapshots(spec)
            return
        digest = _Digest(self._through.get((spec.topic, spec.partition)))
        size = 0
        for segment in replica.segments:
            if segment.header_written:
                size += await self._check_segment(segment, digest)
        for entry in replica.recovered.tail:
            digest.add(entry.index, entry.frame)
            size += len(entry.frame)
        await self._check_snapshots(spec)
        self._rows.append(_row(replica, size, digest.hex()))

    async def _check_segment(self, segment: Segment, digest: _Digest) -> int:
        """Read all frames of a segment; returns their bytes."""
        fresh = Segment(
            segment.spec,
            segment.base_index,
            segment.base_offset,
            segment.prev_term,
            segment.prev_crc,
            segment.interval,
        )
        file = await self._disk.open(segment.path)
        try:
            position = SEGMENT_HEADER_BYTES
            while position < segment.end_position:
                data = await file.read(position, min(_READ_BYTES, segment.end_position - position))
                if len(data) >= FRAME_HEADER_BYTES and frame_length(data) > len(data):
                    data = await file.read(position, min(frame_length(data), segment.end_position - position))
                taken = self._take(fresh, data, position, segment.end_position, digest)
                if taken == 0:
                    return position - SEGMENT_HEADER_BYTES
                position += taken
        finally:
            file.close()
        await self._check_index(segment, fresh)
        return position - SEGMENT_HEADER_BYTES

    def _take(self, fresh: Segment, data: bytes, position: int, end: int, digest: _Digest) -> int:
        at = 0
        view = memoryview(data)
        while at < len(data):
            left = len(data) - at
            cut = left < FRAME_HEADER_BYTES or left < frame_length(data, at)
            if cut and position + len(data) < end and at > 0:
                break
            try:
                header = parse_frame(data, at)
            except CorruptFrame as error:
                what = f"{fresh.path}: {error} at byte {position + at}"
                self._add(fresh.path, position + at, what, Outcome.REPAIR)
                return 0
            if (header.index, header.prev_crc) != (fresh.last_index + 1, fresh.last_crc):
                what = f"{fresh.path}: the frame at byte {position + at} does not follow the one before"
                self._add(fresh.path, position + at, what, Outcome.REPAIR)
                return 0
            fresh.advance(header, data, at)
            digest.add(header.index, view[at : at + header.length])
            at += header.length
        return at

    async def _check_index(self, segment: Segment, fresh: Segment) -> None:
        """The index file must say what the frames say (as far as it goes)."""
        path = segment.index_path
        try:
            summary, index = await read_index(self._disk, path)
        except FileNotFoundError:
            return
        except RaftlogError as error:
            self._problem(error, Outcome.IGNORE)
            return
        assert fresh.index is not None
        size = await self._disk.file_size(segment.path)
        if summary.last_index == fresh.last_index:
            if summary != fresh.summary():
                what = f"{path}: the summary does not agree with the segment's frames"
                self._add(path, 0, what, Outcome.IGNORE)
            if segment.is_full and size != segment.end_position:
                what = f"{segment.path}: bytes after the last frame"
                self._add(segment.path, segment.end_position, what, Outcome.REPAIR)
        known = _slots(fresh.index)
        # The broker may have used another interval: compare the positions that both have.
        if any(known.get(position, row) != row for position, row in _slots(index).items()):
            what = f"{path}: the index does not agree with the segment's frames"
            self._add(path, 0, what, Outcome.IGNORE)

    async def _check_snapshots(self, spec: ReplicaSpec) -> None:
        for name in await self._disk.list(replica_folder(spec.replica_id)):
            index = parse_snapshot_name(name)
            if index is None:
                continue
            try:
                await read_snapshot(self._disk, spec.replica_id, index)
            except RaftlogError as error:
                self._problem(error, Outcome.REPAIR)

    def _add(self, path: str, position: int, what: str, outcome: Outcome = Outcome.STOP) -> None:
        self._problems.append(Problem(path, position, what, outcome))

    def _problem(self, error: RaftlogError, outcome: Outcome = Outcome.STOP) -> None:
        details = error.details
        self._add(str(details.get("path", "")), int(details.get("position", 0)), error.message, outcome)


def _slots(index: SparseIndex) -> dict[int, tuple[int, int]]:
    """Position -> (log index, record offset) of each granule."""
    rows = zip(index.indexes, index.offsets, strict=True)
    return dict(zip(index.positions, rows, strict=True))


def _row(replica: RecoveredReplica, size: int, digest: str) -> ReplicaRow:
    spec, recovered = replica.spec, replica.recovered
    end = replica.flushed.offset
    for entry in recovered.tail:
        end = batch_fields(entry.frame)[0] if entry.kind == FrameKind.BATCH else end
    return ReplicaRow(
        spec.topic,
        spec.partition,
        spec.replica_id,
        recovered.first_index,
        recovered.last_index,
        recovered.hard_state.commit,
        replica.segments[0].base_offset,
        end,
        size,
        digest,
    )


def _name(spec: ReplicaSpec) -> str:
    return f"replica {spec.replica_id} of {spec.topic}-{spec.partition}"
