"""Recovering the segments of one replica: which files make up its log, and what is in them."""

from __future__ import annotations

from dataclasses import dataclass

from raftlog.errors import CorruptFrame, DamagedData
from raftlog.raft.types import HardState
from raftlog.record.frame import FRAME_BYTES_MAX, FRAME_HEADER_BYTES, frame_length, parse_frame
from raftlog.storage.damage import BrokenLog, BrokenSnapshot
from raftlog.storage.disk import Disk, DiskFile
from raftlog.storage.journal_format import Checkpoint
from raftlog.storage.segment import (
    SEGMENT_HEADER_BYTES,
    Segment,
    SegmentHeader,
    decode_segment_header,
    parse_segment_name,
    replica_folder,
    segment_path,
)
from raftlog.storage.segment_index import SegmentSummary, read_index, read_summary
from raftlog.storage.snapshot_file import parse_snapshot_name, read_snapshot
from raftlog.storage.spec import ReplicaSpec, StorageConfig

_SCAN_BYTES = 4 << 20


@dataclass(slots=True)
class LoadedSegments:
    """Result of :func:`load_segments`."""

    segments: list[Segment]
    flushed: Checkpoint
    """At or above the journal's checkpoint: an index file may know of more."""
    leftovers: list[str]


async def load_segments(
    disk: Disk, config: StorageConfig, spec: ReplicaSpec, checkpoint: Checkpoint
) -> LoadedSegments:
    """Follow the chain of segments from the checkpoint's first index on.

    Each next file is the one whose name says that it continues where the one before ends; other files are
    leftovers of truncated uncommitted entries or of a prefix that was dropped.

    Raises:
        BrokenLog: a file that the checkpoint vouches for is missing or does not check.
        BrokenSnapshot: that is the first one, and the snapshot before it does not check either.
        DamagedData: the segments contradict the checkpoint.
    """
    folder = replica_folder(spec.replica_id)
    files = await disk.list(folder)
    names = {name for name in map(parse_segment_name, files) if name is not None}
    segments: list[Segment] = []
    base = checkpoint.first_index
    candidates = sorted(name for name in names if name[0] == base)
    # Two only if one is a leftover that was never flushed: what is flushed decides.
    problem: DamagedData | None = None
    for candidate in candidates:
        try:
            segments = await _follow(disk, config, spec, checkpoint, names, candidate)
        except DamagedData as error:
            problem = error
        else:
            problem = None
            break
    if problem is not None and checkpoint.index >= base:
        raise problem
    if not segments:
        if checkpoint.index >= base:
            first = await _first_segment(disk, config, spec, base)
            raise BrokenLog.at(first, "the segment is missing", {(checkpoint.index, checkpoint.crc)})
        segments = [
            Segment(
                spec, base, checkpoint.offset, checkpoint.term, checkpoint.crc, config.index_interval_bytes
            )
        ]
        segments[0].last_leader_time_ms = checkpoint.leader_time_ms
    last = segments[-1]
    flushed = Checkpoint(
        HardState(),
        last.last_index,
        last.last_term,
        last.last_crc,
        last.end_offset,
        last.last_leader_time_ms,
        base,
    )
    used = {path for s in segments for path in (s.path, s.index_path)}
    leftovers = [
        path for name in files if (path := f"{folder}/{name}") not in used and _is_leftover(name, base)
    ]
    return LoadedSegments(segments, flushed, leftovers)


async def _first_segment(disk: Disk, config: StorageConfig, spec: ReplicaSpec, base_index: int) -> Segment:
    """What is known of a log's first segment without looking at it."""
    if base_index == 1:
        return Segment(spec, 1, 0, 0, spec.origin_crc, config.index_interval_bytes)
    try:
        snapshot = await read_snapshot(disk, spec.replica_id, base_index - 1)
    except (FileNotFoundError, DamagedData) as error:
        raise BrokenSnapshot.at(spec, (base_index - 1,)) from error
    return Segment(
        spec, base_index, snapshot.next_offset, snapshot.term, snapshot.crc, config.index_interval_bytes
    )


def _is_leftover(name: str, first_index: int) -> bool:
    snapshot = parse_snapshot_name(name)
    return snapshot is None or snapshot < first_index - 1


async def _follow(
    disk: Disk,
    config: StorageConfig,
    spec: ReplicaSpec,
    checkpoint: Checkpoint,
    names: set[tuple[int, int]],
    first: tuple[int, int],
) -> list[Segment]:
    segments: list[Segment] = []
    name = first
    while name in names:
        segment = await _load(disk, config, spec, name, checkpoint, segments[-1] if segments else None)
        if segment is None:
            break
        segments.append(segment)
        if not segment.is_full:
            break
        name = (segment.last_index + 1, segment.end_offset)
    reached = segments[-1] if segments else None
    if (reached.last_index if reached else first[0] - 1) < checkpoint.index:
        assert reached is not None, "a file that the checkpoint vouches for is loaded or raises"
        what = "the file ends early"
        if reached.is_full:
            what = "the segment is missing"
            reached = Segment(spec, *name, reached.last_term, reached.last_crc, config.index_interval_bytes)
        raise BrokenLog.at(reached, what, {(checkpoint.index, checkpoint.crc)})
    if reached is not None and reached.last_index == checkpoint.index and reached.last_crc != checkpoint.crc:
        raise DamagedData(
            f"{reached.path}: entry {checkpoint.index} is not the one that was checkpointed",
            path=reached.path,
            position=0,
        )
    return segments


async def _load(
    disk: Disk,
    config: StorageConfig,
    spec: ReplicaSpec,
    name: tuple[int, int],
    checkpoint: Checkpoint,
    previous: Segment | None,
) -> Segment | None:
    """One segment; None when nothing in it was ever flushed."""
    base_index, base_offset = name
    path = segment_path(spec.replica_id, base_index, base_offset)
    summary = await _usable_summary(disk, path, (spec.replica_id, *name))
    if summary is None and base_index > checkpoint.index:
        return None
    anchors = {(checkpoint.index, checkpoint.crc)} if checkpoint.index >= base_index else set()
    if summary is not None:
        anchors.add((summary.last_index, summary.last_crc))
    file = await disk.open(path)
    try:
        header = await _checked_header(file, spec, name, previous)
        if header is None:
            if previous is None:
                fresh = await _first_segment(disk, config, spec, base_index)
            else:
                fresh = Segment(
                    spec, *name, previous.last_term, previous.last_crc, config.index_interval_bytes
                )
            raise BrokenLog.at(fresh, "the header does not check", anchors)
        segment = _empty(header, spec, config.index_interval_bytes)
        if summary is not None:
            await _restore(disk, segment, summary)
        size = await disk.file_size(path)
        if size < segment.end_position:  # what the index file vouches for is not all there
            segment = _empty(header, spec, config.index_interval_bytes)
            await rescan(file, segment, summary.last_index if summary is not None else 0)
            raise BrokenLog.at(segment, "the file ends early", anchors)
        await rescan(file, segment, checkpoint.index)
    except BrokenLog as error:
        raise error.with_anchors(anchors) from None
    finally:
        file.close()
    segment.append_position = segment.end_position
    segment.sealed = segment.is_full and segment.index_saved_position == segment.end_position
    return segment


async def _checked_header(
    file: DiskFile, spec: ReplicaSpec, name: tuple[int, int], previous: Segment | None
) -> SegmentHeader | None:
    """The header of the segment of that name behind ``previous``; None if it is not that."""
    try:
        header = decode_segment_header(await file.read(0, SEGMENT_HEADER_BYTES), file.path)
    except DamagedData:
        return None
    if previous is not None:
        follows = (previous.last_term, previous.last_crc)
    else:
        follows = (header.prev_term, header.prev_crc)
    expected = SegmentHeader(spec.replica_id, spec.topic_id, *name, *follows)
    return header if header == expected else None


def _empty(header: SegmentHeader, spec: ReplicaSpec, interval: int) -> Segment:
    segment = Segment(
        spec, header.base_index, header.base_offset, header.prev_term, header.prev_crc, interval
    )
    segment.header_written = True
    return segment


async def _usable_summary(disk: Disk, path: str, of: tuple[int, int, int]) -> SegmentSummary | None:
    index_path = path.removesuffix(".seg") + ".idx"
    try:
        summary = await read_summary(disk, index_path)
    except (FileNotFoundError, DamagedData):
        return None  # it only saves time: the frames say the same
    found = summary.replica_id, summary.base_index, summary.base_offset
    return summary if found == of else None  # else a disk put that of another segment here


async def _restore(disk: Disk, segment: Segment, summary: SegmentSummary) -> None:
    """Take the index file's word for what it covers; load the arrays if the segment will grow."""
    if summary.end_position >= segment.spec.segment_bytes:
        segment.restore(summary, None)
        return
    try:
        _, index = await read_index(disk, segment.index_path)
    except DamagedData:
        return
    segment.restore(summary, index)


async def rescan(file: DiskFile, segment: Segment, upto_index: int, *, read_bytes: int = _SCAN_BYTES) -> None:
    """Take note of the frames up to ``upto_index`` (or to the end of segment or file) that ``segment`` does
    not cover yet.

    Args:
        read_bytes: read this much at a time.

    Raises:
        BrokenLog: a frame does not check.
    """
    position = segment.end_position
    pending = b""
    while segment.last_index < upto_index and position < segment.spec.segment_bytes:
        wanted = read_bytes
        if len(pending) >= FRAME_HEADER_BYTES:
            wanted = max(wanted, min(frame_length(pending), FRAME_BYTES_MAX))
        more = await file.read(position + len(pending), wanted - len(pending))
        data = pending + more
        at = _take_frames(segment, data, position, upto_index, final=len(data) < wanted)
        if at == 0 and not more:
            break
        position += at
        pending = data[at:]


def _take_frames(segment: Segment, data: bytes, position: int, upto_index: int, *, final: bool) -> int:
    """Frames that are whole in ``data``; returns the bytes they take."""
    at = 0
    while segment.last_index < upto_index and position + at < segment.spec.segment_bytes:
        left = len(data) - at
        if not final and (left < FRAME_HEADER_BYTES or left < min(frame_length(data, at), FRAME_BYTES_MAX)):
            break
        try:
            header = parse_frame(data, at)
        except CorruptFrame as error:
            raise BrokenLog.at(segment, str(error)) from error
        if (header.index, header.prev_crc) != (segment.last_index + 1, segment.last_crc):
            raise BrokenLog.at(segment, "the frame does not follow the one before")
        segment.advance(header, data, at)
        at += header.length
    return at
