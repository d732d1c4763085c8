"""Recovering the segments of one replica: which files make up its log, and what is in them."""

from __future__ import annotations

from dataclasses import dataclass

from raftlog.errors import CorruptFrame, DamagedData
from raftlog.raft.types import HardState
from raftlog.record.frame import FRAME_HEADER_BYTES, frame_length, parse_frame
from raftlog.storage.disk import Disk, DiskFile
from raftlog.storage.journal_format import Checkpoint
from raftlog.storage.segment import (
    SEGMENT_HEADER_BYTES,
    Segment,
    decode_segment_header,
    parse_segment_name,
    replica_folder,
    segment_path,
)
from raftlog.storage.segment_index import SegmentSummary, read_index, read_summary
from raftlog.storage.snapshot_file import parse_snapshot_name
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
        DamagedData: a file that the checkpoint vouches for is missing or does not check.
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
            path = segment_path(spec.replica_id, base, 0).rpartition("-")[0] + "-*.seg"
            raise DamagedData(f"{path}: the segment is missing", path=path, position=0)
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
        path = segment_path(spec.replica_id, *name)
        raise DamagedData(f"{path}: the segment is missing", path=path, position=0)
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
    summary = await _usable_summary(disk, path)
    if summary is None and base_index > checkpoint.index:
        return None
    file = await disk.open(path)
    try:
        header = decode_segment_header(await file.read(0, SEGMENT_HEADER_BYTES), path)
        expected = (spec.replica_id, spec.topic_id, base_index, base_offset)
        if (header.replica_id, header.topic_id, header.base_index, header.base_offset) != expected:
            raise DamagedData(f"{path}: the header is of another segment", path=path, position=0)
        if previous is not None and (header.prev_term, header.prev_crc) != (
            previous.last_term,
            previous.last_crc,
        ):
            raise DamagedData(f"{path} does not follow {previous.path}", path=path, position=0)
        segment = Segment(
            spec, base_index, base_offset, header.prev_term, header.prev_crc, config.index_interval_bytes
        )
        segment.header_written = True
        if summary is not None:
            await _restore(disk, segment, summary)
        await rescan(file, segment, checkpoint.index)
        size = await disk.file_size(path)
    finally:
        file.close()
    if size < segment.end_position:
        raise DamagedData(f"{path}: the file ends early", path=path, position=size)
    segment.append_position = segment.end_position
    segment.sealed = segment.is_full and segment.index_saved_position == segment.end_position
    return segment


async def _usable_summary(disk: Disk, path: str) -> SegmentSummary | None:
    index_path = path.removesuffix(".seg") + ".idx"
    try:
        return await read_summary(disk, index_path)
    except (FileNotFoundError, DamagedData):
        return None  # it only saves time: the frames say the same


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


async def rescan(file: DiskFile, segment: Segment, upto_index: int) -> None:
    """Take note of the frames up to ``upto_index`` (or to the segment's end) that ``segment`` does not cover
    yet.

    Raises:
        DamagedData: a frame does not check.
    """
    position = segment.end_position
    pending = b""
    while segment.last_index < upto_index and position < segment.spec.segment_bytes:
        wanted = _SCAN_BYTES
        if len(pending) >= FRAME_HEADER_BYTES:
            wanted = max(wanted, frame_length(pending))
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
        if not final and (left < FRAME_HEADER_BYTES or left < frame_length(data, at)):
            break
        try:
            header = parse_frame(data, at)
        except CorruptFrame as error:
            raise DamagedData(
                f"{segment.path}: {error} at byte {position + at}", path=segment.path, position=position + at
            ) from error
        if (header.index, header.prev_crc) != (segment.last_index + 1, segment.last_crc):
            raise DamagedData(
                f"{segment.path}: the frame at byte {position + at} does not follow the one before",
                path=segment.path,
                position=position + at,
            )
        segment.advance(header, data, at)
        at += header.length
    return at
