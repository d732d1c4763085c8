"""What a broker's directory holds after whatever happened to it.

1. :mod:`raftlog.storage.journal_scan` says which records of the journal count.
2. They are replayed in order. An entry truncates its replica's log at its own index, so an entry that was
   replaced once stays replaced however often the journal is replayed (etcd-io/etcd#22442 shows what happens
   otherwise).
3. Large frames that the journal only refers to are looked up in their segments. One above the sync floor that
   does not check is part of the torn tail: the journal ends before it. Below the floor it is damage, and so
   it is where the record says that the frame had been synced when it was referred to again.
4. Segments are trusted up to what the last checkpoint or their own index file says (both are written after
   the sync), are tied together by names, offsets and the chain of crcs, and the journal's entries go on top.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from raftlog.errors import CorruptFrame, DamagedData, IncompatibleVersion
from raftlog.raft.types import ConfState, Entry, HardState
from raftlog.record.frame import FrameHeader
from raftlog.storage.damage import BrokenLog, BrokenSnapshot
from raftlog.storage.disk import Disk
from raftlog.storage.journal_format import (
    Checkpoint,
    Place,
    Record,
    RecordKind,
    decode_checkpoint,
    decode_entry_ref,
    decode_hard_state,
)
from raftlog.storage.journal_scan import JournalScan
from raftlog.storage.replica_log import Recovered
from raftlog.storage.segment import Segment, conf_entries, replica_folder, segment_path
from raftlog.storage.segment_recovery import load_segments
from raftlog.storage.snapshot_file import LogSnapshot, parse_snapshot_name, read_snapshot
from raftlog.storage.spec import ReplicaSpec, StorageConfig

_KNOWN_KINDS = frozenset(RecordKind)


@dataclass(frozen=True, slots=True)
class JournaledEntry:
    """An entry as the journal holds it: with its frame, or with the place of its frame."""

    position: int
    """Of its record in the unbounded journal."""
    sequence: int
    """Of the journal file."""
    header: FrameHeader
    frame: memoryview | None
    place: Place | None
    synced: bool = False
    """Its frame was, in that place, before this record was written."""


@dataclass(slots=True)
class Replayed:
    """A replica as the journal alone describes it."""

    hard_state: HardState = field(default_factory=HardState)
    checkpoint: Checkpoint | None = None
    entries: list[JournaledEntry] = field(default_factory=list)


@dataclass(slots=True)
class RecoveredReplica:
    """All that a ReplicaLog is made from."""

    spec: ReplicaSpec
    recovered: Recovered
    flushed: Checkpoint
    segments: list[Segment]
    snapshot: LogSnapshot | None
    snapshots: list[int]
    places: dict[int, Place]
    needed: dict[int, int]
    """Sequence of a journal file -> highest index for which this replica needs it."""
    leftovers: list[str]
    """Files in its folder that nothing refers to."""
    damaged_snapshots: set[int]
    """Indexes of snapshots that do not check; it can run without them."""


def replay(scan: JournalScan) -> dict[int, Replayed]:
    """Replay the valid records.

    Raises:
        IncompatibleVersion: a record of a kind that this release does not know.
    """
    replicas: dict[int, Replayed] = {}
    for sequence, record in scan.records():
        kind = record.kind
        if kind == RecordKind.MARK:
            continue
        if kind not in _KNOWN_KINDS:
            raise IncompatibleVersion(
                f"the journal holds a record of kind {kind}; this release does not know it"
            )
        replica = replicas.get(record.replica_id)
        if replica is None:
            replica = replicas[record.replica_id] = Replayed()
        _replay_record(replica, sequence, record)
    return replicas


def _replay_record(replica: Replayed, sequence: int, record: Record) -> None:
    kind = record.kind
    if kind == RecordKind.HARD_STATE:
        replica.hard_state = decode_hard_state(record.body)
    elif kind == RecordKind.CHECKPOINT:
        checkpoint = replica.checkpoint = decode_checkpoint(record.body)
        replica.hard_state = checkpoint.hard_state
        entries = replica.entries
        if entries and entries[0].header.index <= checkpoint.index:
            replica.entries = [entry for entry in entries if entry.header.index > checkpoint.index]
    elif kind == RecordKind.RESET:
        checkpoint = replica.checkpoint = decode_checkpoint(record.body)
        replica.hard_state = checkpoint.hard_state
        replica.entries = []
    else:
        if kind == RecordKind.ENTRY:
            header, frame, place = FrameHeader(record.body), record.body, None
        else:
            header, place = decode_entry_ref(record.body)
            frame = None
        synced = kind == RecordKind.ENTRY_REF_AGAIN
        entries = replica.entries
        while entries and entries[-1].header.index >= header.index:
            entries.pop()
        if replica.checkpoint is None or header.index > replica.checkpoint.index:
            entries.append(JournaledEntry(record.position, sequence, header, frame, place, synced))


class FrameSource:
    """Reads the frames that the journal refers to, each once."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._found: dict[tuple[int, Place, int], bytes | None] = {}

    async def read(self, replica_id: int, entry: JournaledEntry) -> bytes | None:
        """The frame's bytes, None when what stands in its place is something else."""
        assert entry.place is not None
        header = entry.header
        key = (replica_id, entry.place, header.crc)
        if key not in self._found:
            self._found[key] = await self._read(replica_id, entry.place, header)
        return self._found[key]

    async def _read(self, replica_id: int, place: Place, header: FrameHeader) -> bytes | None:
        path = segment_path(replica_id, place.base_index, place.base_offset)
        try:
            file = await self._disk.open(path)
        except FileNotFoundError:
            return None
        try:
            data = await file.read(place.position, header.length)
        finally:
            file.close()
        try:
            found = Entry.parse(data)
        except CorruptFrame:
            return None
        return data if (found.crc, found.index) == (header.crc, header.index) else None


async def replay_whole(scan: JournalScan, source: FrameSource) -> dict[int, Replayed]:
    """Replay; cut the journal before a record above the floor whose frame did not reach its segment;
    again."""
    while True:
        replicas = replay(scan)
        torn: int | None = None
        for replica_id, replica in replicas.items():
            for entry in replica.entries:
                if (
                    entry.place is not None
                    and not entry.synced
                    and entry.position >= scan.floor
                    and (torn is None or entry.position < torn)
                    and await source.read(replica_id, entry) is None
                ):
                    torn = entry.position
        if torn is None:
            return replicas
        scan.cut(torn)


async def recover_replica(
    disk: Disk, config: StorageConfig, spec: ReplicaSpec, replayed: Replayed, source: FrameSource
) -> RecoveredReplica:
    """Put one replica together.

    Raises:
        BrokenLog, BrokenSnapshot: its segments or snapshots do not check: peers may have the bytes.
        DamagedData: its part of the journal does not check.
    """
    checkpoint = replayed.checkpoint
    if checkpoint is None:
        raise _damage(spec, "the journal holds no checkpoint of it")
    loaded = await load_segments(disk, config, spec, checkpoint)
    segments, flushed = loaded.segments, loaded.flushed
    tail: list[Entry] = []
    places: dict[int, Place] = {}
    needed: dict[int, int] = {}
    last_index, last_crc, last_time = flushed.index, flushed.crc, flushed.leader_time_ms
    for journaled in replayed.entries:
        header = journaled.header
        if header.index <= flushed.index:
            continue
        if header.index != last_index + 1 or header.prev_crc != last_crc:
            raise _damage(spec, f"entry {header.index} in the journal does not follow entry {last_index}")
        if journaled.frame is not None:
            frame: bytes | None = bytes(journaled.frame)
        else:
            assert journaled.place is not None
            places[header.index] = journaled.place
            frame = await source.read(spec.replica_id, journaled)
        if frame is None:
            raise _broken_place(spec, journaled)
        tail.append(Entry.of(header, frame))
        needed[journaled.sequence] = max(header.index, needed.get(journaled.sequence, 0))
        last_index, last_crc, last_time = header.index, header.crc, header.leader_time_ms
    snapshots = await _load_snapshots(disk, spec, segments[0].base_index, flushed.index)
    start = await _first_conf(disk, spec, segments[0].base_index - 1, snapshots)
    recovered = Recovered(
        hard_state=_clamped(replayed.hard_state, flushed, last_index, tail),
        confs=_confs(segments, tail, start),
        first_index=segments[0].base_index,
        prev_term=segments[0].prev_term,
        prev_crc=segments[0].prev_crc,
        terms=_terms(segments, tail),
        last_index=last_index,
        tail=tuple(tail),
        last_crc=last_crc,
        last_leader_time_ms=last_time,
    )
    referred = {segment_path(spec.replica_id, p.base_index, p.base_offset) for p in places.values()}
    leftovers = [path for path in loaded.leftovers if path not in referred]
    return RecoveredReplica(
        spec,
        recovered,
        flushed,
        segments,
        snapshots.newest,
        snapshots.indexes,
        places,
        needed,
        leftovers,
        snapshots.damaged,
    )


@dataclass(slots=True)
class _Snapshots:
    indexes: list[int]
    """Of those that can start this log, ascending."""
    newest: LogSnapshot | None
    """That checks."""
    damaged: set[int]


async def _load_snapshots(disk: Disk, spec: ReplicaSpec, first_index: int, flushed_index: int) -> _Snapshots:
    """The snapshots that can start this log.

    Raises:
        BrokenSnapshot: it needs one, and none checks.
    """
    names = await disk.list(replica_folder(spec.replica_id))
    indexes = sorted(index for index in map(parse_snapshot_name, names) if index is not None)
    found = _Snapshots([index for index in indexes if first_index - 1 <= index <= flushed_index], None, set())
    for index in reversed(found.indexes):
        try:
            found.newest = await read_snapshot(disk, spec.replica_id, index)
        except DamagedData:
            found.damaged.add(index)  # an older one and more of the log give the same state
        else:
            return found
    if first_index > 1:
        raise BrokenSnapshot.at(spec, {*found.indexes, first_index - 1})
    return found


def _clamped(state: HardState, flushed: Checkpoint, last_index: int, tail: list[Entry]) -> HardState:
    """``commit`` is written without care: bring it within what is there. A torn group can leave entries whose
    term's HARD_STATE is lost with it; that term then has no vote, and none was ever sent."""
    term, vote = state.term, state.vote
    newest = max(flushed.term, tail[-1].term if tail else 0)
    if newest > term:
        term, vote = newest, 0
    return HardState(term, vote, max(flushed.index, min(state.commit, last_index)))


async def _first_conf(
    disk: Disk, spec: ReplicaSpec, index: int, snapshots: _Snapshots
) -> tuple[int, ConfState]:
    """The configuration in force before the log's first entry: what the snapshot there says, for a follower
    may need that snapshot. Should it be damaged, what the newest one says will do for everything else."""
    if index == 0:
        return 0, spec.conf
    assert snapshots.newest is not None
    try:
        oldest = await read_snapshot(disk, spec.replica_id, index)
    except (DamagedData, FileNotFoundError):
        snapshots.damaged.add(index)
        oldest = snapshots.newest
    return oldest.index, oldest.conf


def _confs(
    segments: list[Segment], tail: list[Entry], start: tuple[int, ConfState]
) -> tuple[tuple[int, ConfState], ...]:
    later = [conf for segment in segments for conf in segment.confs]
    later += conf_entries(tail)
    return (start, *(conf for conf in later if conf[0] > start[0]))


def _terms(segments: list[Segment], tail: list[Entry]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for index, term in _term_points(segments, tail):
        if not runs or runs[-1][1] != term:
            runs.append((index, term))
    return tuple(runs)


def _term_points(segments: list[Segment], tail: list[Entry]) -> Iterator[tuple[int, int]]:
    for segment in segments:
        yield from segment.terms
    for entry in tail:
        yield entry.index, entry.term


def _broken_place(spec: ReplicaSpec, entry: JournaledEntry) -> BrokenLog:
    """The journal knows the entry's place and crc, and its bytes are not there."""
    assert entry.place is not None
    header, place = entry.header, entry.place
    segment = Segment(spec, place.base_index, place.base_offset, 0, 0, 1)
    segment.header_written = True  # the flusher sees to it
    segment.end_position = segment.append_position = place.position
    segment.last_index, segment.last_crc = header.index - 1, header.prev_crc
    return BrokenLog.at(
        segment, f"the bytes of entry {header.index} do not check", {(header.index, header.crc)}
    )


def _damage(spec: ReplicaSpec, what: str) -> DamagedData:
    return DamagedData(
        f"replica {spec.replica_id} of {spec.topic}-{spec.partition}: {what}",
        replica_id=spec.replica_id,
        path=replica_folder(spec.replica_id),
    )
