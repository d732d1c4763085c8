"""Finding frames that check in files that are damaged.

Reads only, at any time, whatever else goes on: what it returns is proved by checksums or it is not returned.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Final

from raftlog.errors import CorruptFrame, DamagedData
from raftlog.raft.types import Entry
from raftlog.record.frame import (
    FRAME_BYTES_MAX,
    FRAME_HEADER_BYTES,
    FRAME_VERSION,
    Buffer,
    FrameHeader,
    FrameKind,
    frame_length,
    iter_frames,
    parse_frame,
)
from raftlog.storage.damage import Anchor, BrokenLog
from raftlog.storage.disk import Disk, DiskFile
from raftlog.storage.segment import (
    SEGMENT_HEADER_BYTES,
    Segment,
    decode_segment_header,
    parse_segment_name,
    replica_folder,
    segment_path,
)
from raftlog.storage.segment_recovery import rescan

READ_BYTES: Final = 256 << 10
"""Read at a time: small, for it runs beside everything else on the broker's loop."""

_ANY_FRAME: Final = re.compile(
    # length < 2^27 | crc | prev_crc | kind | version | term < 2^32 | index < 2^48
    rb"(?s)(?=[\x00-\x07].{11}[\x00-%c]%c\x00{4}.{4}\x00\x00)" % (max(FrameKind), FRAME_VERSION)
)


async def survey(disk: Disk, segment: Segment) -> BrokenLog | None:
    """Read the frames of a live log's segment as far as they are flushed.

    Returns:
        Where its first damage is; None if all checks.
    """
    anchors = {(segment.last_index, segment.last_crc)}
    fresh = Segment(
        segment.spec,
        segment.base_index,
        segment.base_offset,
        segment.prev_term,
        segment.prev_crc,
        segment.interval,
    )
    upto_index = segment.last_index
    try:
        file = await disk.open(segment.path)
    except FileNotFoundError:
        return BrokenLog.at(fresh, "the file is missing", anchors)
    try:
        header = decode_segment_header(await file.read(0, SEGMENT_HEADER_BYTES), segment.path)
        fresh.header_written = header == segment.header
    except DamagedData:
        pass  # header_written says so
    try:
        if not fresh.header_written:
            return BrokenLog.at(fresh, "the header does not check", anchors)
        await rescan(file, fresh, upto_index, read_bytes=READ_BYTES)
    except BrokenLog as error:
        return error.with_anchors(anchors)
    finally:
        file.close()
    if fresh.last_index < upto_index:
        return BrokenLog.at(fresh, "the file ends early", anchors)
    return None


async def find_anchors(disk: Disk, broken: BrokenLog) -> frozenset[Anchor]:
    """All entries behind the break whose crcs this disk knows: those it is told of, the predecessor of the
    next frame in the file that checks, and of the segments further on. That frame may be another log's, which
    a misdirected write has put here; so that of the run which leads to a known entry counts, too."""
    segment = broken.segment
    needed = segment.last_index + 1 if segment.header_written else segment.last_index
    reach = max(index for index, _ in broken.anchors)
    anchors = set(broken.anchors)
    replica_id = segment.spec.replica_id
    for name in await disk.list(replica_folder(replica_id)):
        parsed = parse_segment_name(name)
        if parsed is not None and segment.base_index < parsed[0] <= reach:
            anchors |= await _anchor_of_header(disk, segment_path(replica_id, *parsed))
    try:
        file = await disk.open(segment.path)
    except FileNotFoundError:
        return frozenset(anchors)
    known = frozenset(anchors)
    try:
        before: Anchor = 0, 0
        last: Anchor | None = None
        async for header in _frames_behind(file, segment.end_position, needed + 1, reach):
            follows = header.index - 1, header.prev_crc
            if last is None:
                anchors.add(follows)
            if follows != last:
                before = follows
            last = (header.index, header.crc)
            if last in known:
                anchors.add(before)
                break
    finally:
        file.close()
    return frozenset(anchors)


async def _frames_behind(file: DiskFile, start: int, lowest: int, highest: int) -> AsyncIterator[FrameHeader]:
    """Headers of the frames at or behind ``start`` that check and have one of these indexes."""
    end = start
    async for position, data in _windows(file, start):
        for match in _ANY_FRAME.finditer(data):
            at = position + match.start()
            if at < end:
                continue  # within one that checks
            if len(data) - match.start() < FRAME_HEADER_BYTES:
                break  # it is whole in the next window
            header = FrameHeader(data, match.start())
            if not lowest <= header.index <= highest:
                continue
            if await _checks(file, at, data[match.start() :], header.length):
                end = at + header.length
                yield header


async def _anchor_of_header(disk: Disk, path: str) -> set[Anchor]:
    try:
        file = await disk.open(path)
    except FileNotFoundError:
        return set()
    try:
        header = decode_segment_header(await file.read(0, SEGMENT_HEADER_BYTES), path)
    except DamagedData:
        return set()
    finally:
        file.close()
    return {(header.base_index - 1, header.prev_crc)}


async def salvage(disk: Disk, replica_id: int, index: int, prev_crc: int, bytes_max: int) -> bytes:
    """Frames from ``index`` on, out of the segment files of a replica in whatever state they are.

    Args:
        prev_crc: crc of the entry before ``index``; only a frame that follows it is returned.
        bytes_max: soft limit; one frame comes even above it.

    Returns:
        Contiguous frames, each checked and chained; b"" when the files hold no such frame.
    """
    names = await disk.list(replica_folder(replica_id))
    parsed = [name for name in map(parse_segment_name, names) if name is not None and name[0] <= index]
    for name in sorted(parsed, reverse=True):
        try:
            file = await disk.open(segment_path(replica_id, *name))
        except FileNotFoundError:
            continue  # dropped meanwhile
        try:
            found = await _find_run(file, index, prev_crc, bytes_max)
        finally:
            file.close()
        if found:
            return found
    return b""


async def _find_run(file: DiskFile, index: int, prev_crc: int, bytes_max: int) -> bytes:
    exact = re.compile(
        b"(?s)(?=.{8}%s.%c.{8}%s)"
        % (
            re.escape(prev_crc.to_bytes(4, "big")),
            FRAME_VERSION,
            re.escape(index.to_bytes(8, "big")),
        )
    )
    async for position, data in _windows(file, SEGMENT_HEADER_BYTES):
        for match in exact.finditer(data):
            at = position + match.start()
            if await _checks(file, at, data[match.start() :], frame_length(data, match.start())):
                wanted = max(bytes_max, frame_length(data, match.start()))
                return chained(await file.read(at, wanted), index, prev_crc, bytes_max)
    return b""


async def _windows(file: DiskFile, position: int) -> AsyncIterator[tuple[int, bytes]]:
    """(position, bytes) of a file, overlapping so that every frame's header is whole in one of them."""
    while True:
        data = await file.read(position, READ_BYTES)
        if len(data) < FRAME_HEADER_BYTES:
            return
        yield position, data
        position += len(data) - FRAME_HEADER_BYTES + 1


async def _checks(file: DiskFile, position: int, known: bytes, length: int) -> bool:
    """Whether a frame of ``length`` bytes that checks begins at ``position``."""
    if not FRAME_HEADER_BYTES <= length <= FRAME_BYTES_MAX:
        return False
    data = known if len(known) >= length else await file.read(position, length)
    try:
        parse_frame(data)
    except CorruptFrame:
        return False
    return True


def chained(data: Buffer, index: int, prev_crc: int, bytes_max: int) -> bytes:
    """The run of whole frames at the beginning of ``data`` that check, begin with ``index`` and follow one
    another from ``prev_crc`` on; as many as ``bytes_max`` allows, and one in any case."""
    end = 0
    try:
        for header, at in iter_frames(data):
            if (header.index, header.prev_crc) != (index, prev_crc) or (
                end and at + header.length > bytes_max
            ):
                break
            index, prev_crc = header.index + 1, header.crc
            end = at + header.length
    except CorruptFrame:
        pass  # what lies before it is good
    return bytes(memoryview(data)[:end])


def run_of(entries: Iterable[Entry] | Sequence[Entry], index: int, prev_crc: int, bytes_max: int) -> bytes:
    """The same out of entries in memory."""
    run: list[Buffer] = []
    size = 0
    for entry in entries:
        if entry.index < index:
            continue
        if (entry.index, entry.prev_crc) != (index, prev_crc) or (run and size + entry.size > bytes_max):
            break
        run.append(entry.frame)
        size += entry.size
        index, prev_crc = index + 1, entry.crc
    return b"".join(run)
