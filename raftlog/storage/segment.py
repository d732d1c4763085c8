"""One segment file of a replica: its name and header, and what is known of its frames.

The file holds a header and then frames, one after another: those of ``base_index``, ``base_index`` + 1, … A
segment ends with the frame that reaches the replica's ``segment_bytes``: a function of the frames alone,
known as soon as that frame is appended, so the segments of all replicas of a partition hold equal ranges of
frames, byte for byte.

A frame's place is fixed at append. Its bytes come later, when it is committed
(:mod:`raftlog.storage.flusher`); only large ones are written at once. Hence ``append_position`` (in memory)
runs ahead of ``end_position`` (on disk, synced).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import msgspec
from crc32c import crc32c

from raftlog.errors import DamagedData
from raftlog.raft.types import ConfState, Entry
from raftlog.record.frame import FRAME_HEADER_BYTES, Buffer, FrameHeader, FrameKind
from raftlog.storage.disk import DiskFile
from raftlog.storage.segment_index import NO_TIMESTAMP, SegmentSummary, SparseIndex
from raftlog.storage.spec import ReplicaSpec

_HEADER = struct.Struct(">8sHxxQ16sQQQI")
_U32 = struct.Struct(">I")
_MAGIC: Final = b"RLOGSEGM"
_VERSION: Final = 1
SEGMENT_HEADER_BYTES: Final = _HEADER.size + _U32.size
REPLICAS_FOLDER: Final = "replicas"

_BATCH = struct.Struct(">q15xi8xq")
"""Of a RecordBatch v2: base offset, last offset delta, greatest timestamp."""


def batch_fields(frame: Buffer, position: int = 0) -> tuple[int, int]:
    """(record offset after the batch, its greatest timestamp) of the BATCH frame that begins at
    ``position``."""
    base, delta, timestamp = _BATCH.unpack_from(frame, position + FRAME_HEADER_BYTES)
    return base + delta + 1, timestamp


def batch_base_offset(frame: Buffer, position: int = 0) -> int:
    """Record offset of the first record of the BATCH frame that begins at ``position``."""
    base: int = _BATCH.unpack_from(frame, position + FRAME_HEADER_BYTES)[0]
    return base


def replica_folder(replica_id: int) -> str:
    """Folder of a replica's segments, indexes and snapshots."""
    return f"{REPLICAS_FOLDER}/{replica_id}"


def segment_path(replica_id: int, base_index: int, base_offset: int) -> str:
    """Path of a segment file."""
    return f"{replica_folder(replica_id)}/{base_index:016x}-{base_offset:016x}.seg"


def parse_segment_name(name: str) -> tuple[int, int] | None:
    """(base index, base offset) of a segment file's name; None for another name."""
    stem, _, suffix = name.partition(".")
    index, _, offset = stem.partition("-")
    if suffix != "seg" or len(index) != 16 or len(offset) != 16:
        return None
    try:
        return int(index, 16), int(offset, 16)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """Header of a segment file."""

    replica_id: int
    topic_id: bytes
    base_index: int
    base_offset: int
    prev_term: int
    prev_crc: int
    """Term and crc of the entry before ``base_index``."""

    def encode(self) -> bytes:
        head = _HEADER.pack(
            _MAGIC,
            _VERSION,
            self.replica_id,
            self.topic_id,
            self.base_index,
            self.base_offset,
            self.prev_term,
            self.prev_crc,
        )
        return head + _U32.pack(crc32c(head))


def decode_segment_header(data: Buffer, path: str) -> SegmentHeader:
    """Parse a segment's first bytes.

    Raises:
        DamagedData: they are not the header of a segment.
    """
    if len(data) >= SEGMENT_HEADER_BYTES:
        magic, version, *fields = _HEADER.unpack_from(data)
        crc = _U32.unpack_from(data, _HEADER.size)[0]
        if magic == _MAGIC and version == _VERSION and crc32c(data[: _HEADER.size]) == crc:
            return SegmentHeader(*fields)
    raise DamagedData(f"{path}: the segment's header does not check", path=path, position=0)


class Segment:
    """State of one segment of a live log."""

    __slots__ = (
        "append_position",
        "base_index",
        "base_offset",
        "confs",
        "end_offset",
        "end_position",
        "file",
        "header_written",
        "index",
        "index_saved_position",
        "interval",
        "last_crc",
        "last_index",
        "last_leader_time_ms",
        "last_term",
        "max_timestamp",
        "prev_crc",
        "prev_term",
        "sealed",
        "spec",
        "terms",
    )

    def __init__(
        self,
        spec: ReplicaSpec,
        base_index: int,
        base_offset: int,
        prev_term: int,
        prev_crc: int,
        interval: int,
    ) -> None:
        self.spec = spec
        self.base_index = base_index
        self.base_offset = base_offset
        self.prev_term = prev_term
        self.prev_crc = prev_crc
        self.interval = interval
        self.append_position = SEGMENT_HEADER_BYTES
        """Where the next frame goes."""
        self.file: DiskFile | None = None
        self.header_written = False
        self.sealed = False
        """Complete and synced, its index file written."""
        # What follows covers the frames that are in the file and synced.
        self.index: SparseIndex | None = SparseIndex()
        self.index_saved_position = SEGMENT_HEADER_BYTES
        self.last_index = base_index - 1
        self.last_term = prev_term
        self.last_crc = prev_crc
        self.last_leader_time_ms = 0
        self.end_position = SEGMENT_HEADER_BYTES
        self.end_offset = base_offset
        self.max_timestamp = NO_TIMESTAMP
        self.terms: list[tuple[int, int]] = []
        self.confs: list[tuple[int, ConfState]] = []

    @property
    def path(self) -> str:
        return segment_path(self.spec.replica_id, self.base_index, self.base_offset)

    @property
    def index_path(self) -> str:
        return self.path.removesuffix(".seg") + ".idx"

    @property
    def header(self) -> SegmentHeader:
        spec = self.spec
        return SegmentHeader(
            spec.replica_id, spec.topic_id, self.base_index, self.base_offset, self.prev_term, self.prev_crc
        )

    @property
    def is_full(self) -> bool:
        """No further frame will be placed in it."""
        return self.append_position >= self.spec.segment_bytes

    def advance(self, header: FrameHeader, frame: Buffer, at: int = 0) -> None:
        """Take note of the next frame of the file (``frame`` holds its bytes from ``at`` on)."""
        assert header.index == self.last_index + 1, (header, self.last_index)
        assert header.prev_crc == self.last_crc, (header, self.last_crc)
        position = self.end_position
        index = self.index
        assert index is not None
        if not index.positions or position - index.positions[-1] >= self.interval:
            index.add(position, header.index, self.end_offset, self.max_timestamp, header.prev_crc)
        if header.kind == FrameKind.BATCH:
            self.end_offset, timestamp = batch_fields(frame, at)
            self.max_timestamp = max(self.max_timestamp, timestamp)
        elif header.kind == FrameKind.CONF:
            payload = memoryview(frame)[at + FRAME_HEADER_BYTES : at + header.length]
            self.confs.append((header.index, decode_conf(payload)))
        if not self.terms or header.term != self.last_term:
            self.terms.append((header.index, header.term))
        self.last_index = header.index
        self.last_term = header.term
        self.last_crc = header.crc
        self.last_leader_time_ms = header.leader_time_ms
        self.end_position = position + header.length

    def summary(self) -> SegmentSummary:
        """What the index file says of the frames so far."""
        return SegmentSummary(
            self.spec.replica_id,
            self.base_index,
            self.base_offset,
            self.last_index,
            self.last_term,
            self.last_crc,
            self.last_leader_time_ms,
            self.end_position,
            self.end_offset,
            self.max_timestamp,
            tuple(self.terms),
            tuple(self.confs),
        )

    def restore(self, summary: SegmentSummary, index: SparseIndex | None) -> None:
        """Take over what an index file says (``index`` None: not loaded)."""
        self.last_index = summary.last_index
        self.last_term = summary.last_term
        self.last_crc = summary.last_crc
        self.last_leader_time_ms = summary.last_leader_time_ms
        self.end_position = self.append_position = self.index_saved_position = summary.end_position
        self.end_offset = summary.end_offset
        self.max_timestamp = summary.max_timestamp
        self.terms = list(summary.terms)
        self.confs = list(summary.confs)
        self.index = index


def decode_conf(payload: Buffer) -> ConfState:
    """The configuration in a CONF frame."""
    return msgspec.msgpack.decode(payload, type=ConfState)


def conf_entries(entries: Iterable[Entry]) -> list[tuple[int, ConfState]]:
    """(index, configuration) of the CONF entries among ``entries``."""
    return [(e.index, decode_conf(e.payload)) for e in entries if e.kind == FrameKind.CONF]
