"""Bytes of the journal: the header of a file and its records. Pure.

A record (big endian)::

    0        4     8          16     17           25
    | length | crc | position | kind | replica id | body …

``length`` counts the whole record; ``crc`` is CRC-32C over everything from ``position`` on. ``position`` is
where the record begins in the unbounded journal (file headers do not count), so that the stale bytes of a
recycled file never pass for current ones: a record is valid only where it says that it is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

import msgspec
from crc32c import crc32c

from raftlog.raft.types import Entry, HardState
from raftlog.record.frame import FRAME_HEADER_BYTES, Buffer, FrameHeader

JOURNAL_FOLDER: Final = "journal"
JOURNAL_VERSION: Final = 1
_MAGIC: Final = b"RLOGJRNL"

_FILE_HEADER = struct.Struct(">8sHxx16sQQ")
_U32 = struct.Struct(">I")
FILE_HEADER_BYTES: Final = _FILE_HEADER.size + _U32.size

_LENGTH_CRC = struct.Struct(">II")
_AFTER_CRC = struct.Struct(">QBQ")
_RECORD = struct.Struct(">IIQBQ")
RECORD_HEADER_BYTES: Final = _RECORD.size

_MARK = struct.Struct(">Q")
_WHOLE_MARK = struct.Struct(">QBQQ")
_HARD_STATE = struct.Struct(">QQQ")
_WHOLE_HARD_STATE = struct.Struct(">QBQQQQ")
"""With _AFTER_CRC in front: these two are in every group."""
_PLACE = struct.Struct(">QQQ")
_CHECKPOINT = struct.Struct(">QQQQQIQQQ")
MARK_BYTES: Final = RECORD_HEADER_BYTES + _MARK.size
CHECKPOINT_BYTES: Final = RECORD_HEADER_BYTES + _CHECKPOINT.size
HARD_STATE_BYTES: Final = RECORD_HEADER_BYTES + _HARD_STATE.size
ENTRY_REF_BYTES: Final = RECORD_HEADER_BYTES + FRAME_HEADER_BYTES + _PLACE.size
_RECORD_BYTES_MAX: Final = (1 << 26) + 256
"""Above the largest frame and its record header."""


class RecordKind(IntEnum):
    """What a record's body is."""

    MARK = 1
    """Sync floor, u64: every byte of the journal below it was durable before this record was written."""
    HARD_STATE = 2
    """Term, vote, commit: u64 each."""
    ENTRY = 3
    """A log frame. It truncates what the replica's log held at and above its index."""
    ENTRY_REF = 4
    """Header of a log frame whose bytes stand in a segment: base index, base offset, position (u64 each)
    follow."""
    CHECKPOINT = 5
    """Term, vote, commit; then of the last entry that the replica's segments hold, synced: index (u64), term
    (u64), crc (u32), the record offset after it (u64) and its leader_time_ms (u64); and the base index (u64)
    of the first segment. The journal's entries up to that last entry are no longer needed."""
    RESET = 6
    """The body of a CHECKPOINT whose log is empty behind its last entry: a snapshot from the leader replaced
    the log. Nothing that stands before this record in the journal belongs to the replica any more."""
    ENTRY_REF_AGAIN = 7
    """An ENTRY_REF once more, of a frame that has been synced since it was written: should it not check, it
    is damaged and not torn, wherever this record stands."""


ENTRY: Final = int(RecordKind.ENTRY)
_HARD_STATE_KIND: Final = int(RecordKind.HARD_STATE)
# for what runs with every batch: to look up a member of an enum takes longer than to use it


class Place(NamedTuple):
    """Where a large frame stands: in which segment, at which position of its file."""

    base_index: int
    base_offset: int
    position: int


class Checkpoint(msgspec.Struct, frozen=True):
    """Body of a CHECKPOINT record: what the segments hold, synced."""

    hard_state: HardState
    index: int
    term: int
    crc: int
    offset: int
    leader_time_ms: int
    first_index: int


@dataclass(frozen=True, slots=True)
class FileHeader:
    """Header of a journal file."""

    disk_id: bytes
    sequence: int
    base: int
    """Position in the unbounded journal of the file's first record; everything below it is durable."""


def journal_path(sequence: int) -> str:
    """Path of the journal file of that sequence number."""
    return f"{JOURNAL_FOLDER}/{sequence:016x}.log"


def parse_journal_name(name: str) -> int | None:
    """Sequence number of a journal file's name; None for another name."""
    stem, dot, suffix = name.partition(".")
    if suffix != "log" or not dot or len(stem) != 16:
        return None
    try:
        return int(stem, 16)
    except ValueError:
        return None


def encode_file_header(header: FileHeader) -> bytes:
    """The first bytes of a journal file."""
    head = _FILE_HEADER.pack(_MAGIC, JOURNAL_VERSION, header.disk_id, header.sequence, header.base)
    return head + _U32.pack(crc32c(head))


def decode_file_header(data: Buffer) -> FileHeader | None:
    """The header, or None when the bytes are not one that checks."""
    if len(data) < FILE_HEADER_BYTES:
        return None
    magic, version, disk_id, sequence, base = _FILE_HEADER.unpack_from(data)
    crc = _U32.unpack_from(data, _FILE_HEADER.size)[0]
    if magic != _MAGIC or version != JOURNAL_VERSION or crc32c(data[: _FILE_HEADER.size]) != crc:
        return None
    return FileHeader(disk_id, sequence, base)


def record_head(position: int, kind: int, replica_id: int, body: Buffer) -> bytes:
    """The header of a record whose ``body`` the caller writes right behind it."""
    after = _AFTER_CRC.pack(position, kind, replica_id)
    return _LENGTH_CRC.pack(RECORD_HEADER_BYTES + len(body), crc32c(body, crc32c(after))) + after


def _record(position: int, kind: int, replica_id: int, body: bytes) -> bytes:
    return record_head(position, kind, replica_id, body) + body


def encode_mark(position: int, floor: int) -> bytes:
    after = _WHOLE_MARK.pack(position, RecordKind.MARK, 0, floor)
    return _LENGTH_CRC.pack(MARK_BYTES, crc32c(after)) + after


def encode_hard_state(position: int, replica_id: int, state: HardState) -> bytes:
    after = _WHOLE_HARD_STATE.pack(
        position, _HARD_STATE_KIND, replica_id, state.term, state.vote, state.commit
    )
    return _LENGTH_CRC.pack(HARD_STATE_BYTES, crc32c(after)) + after


def encode_entry_ref(
    position: int, replica_id: int, entry: Entry, place: Place, *, synced: bool = False
) -> bytes:
    """An ENTRY_REF record, or an ENTRY_REF_AGAIN."""
    body = bytes(entry.frame[:FRAME_HEADER_BYTES]) + _PLACE.pack(*place)
    kind = RecordKind.ENTRY_REF_AGAIN if synced else RecordKind.ENTRY_REF
    return _record(position, kind, replica_id, body)


def encode_checkpoint(
    position: int, replica_id: int, checkpoint: Checkpoint, kind: RecordKind = RecordKind.CHECKPOINT
) -> bytes:
    """A CHECKPOINT record, or a RESET."""
    state = checkpoint.hard_state
    body = _CHECKPOINT.pack(
        state.term,
        state.vote,
        state.commit,
        checkpoint.index,
        checkpoint.term,
        checkpoint.crc,
        checkpoint.offset,
        checkpoint.leader_time_ms,
        checkpoint.first_index,
    )
    return _record(position, kind, replica_id, body)


def decode_mark(body: Buffer) -> int:
    floor: int = _MARK.unpack(body)[0]
    return floor


def decode_hard_state(body: Buffer) -> HardState:
    return HardState(*_HARD_STATE.unpack(body))


def decode_entry_ref(body: Buffer) -> tuple[FrameHeader, Place]:
    return FrameHeader(body), Place(*_PLACE.unpack_from(body, FRAME_HEADER_BYTES))


def decode_checkpoint(body: Buffer) -> Checkpoint:
    term, vote, commit, *flushed = _CHECKPOINT.unpack(body)
    return Checkpoint(HardState(term, vote, commit), *flushed)


class Record(NamedTuple):
    """A valid record of a file."""

    position: int
    kind: int
    replica_id: int
    body: memoryview


def scan_records(
    data: memoryview, base: int, *, end: int | None = None, check: bool = True
) -> Iterator[Record]:
    """Yield the records of one file until the first that is not valid where it stands.

    Args:
        data: the whole file.
        base: position of its first record.
        end: stop at this position of the unbounded journal.
        check: verify the crcs.
    """
    at = FILE_HEADER_BYTES
    shift = base - FILE_HEADER_BYTES
    stop = len(data) if end is None else end - shift
    while at + RECORD_HEADER_BYTES <= stop:
        length, crc, position, kind, replica_id = _RECORD.unpack_from(data, at)
        if position != at + shift or not RECORD_HEADER_BYTES <= length <= _RECORD_BYTES_MAX:
            return
        next_at = at + length
        if next_at > stop or (check and crc32c(data[at + 8 : next_at]) != crc):
            return
        yield Record(position, kind, replica_id, data[at + RECORD_HEADER_BYTES : next_at])
        at = next_at


def record_begins(data: Buffer, at: int, position: int) -> bool:
    """Whether what stands at ``at`` looks like a record of that position, checked or not."""
    if at + RECORD_HEADER_BYTES > len(data):
        return False
    found: int = _RECORD.unpack_from(data, at)[2]
    return found == position


_MARK_LENGTH: Final = _U32.pack(MARK_BYTES)


def find_marks(data: bytes, start: int) -> Iterator[tuple[int, int, int]]:
    """Yield (place in the file, position, floor) of everything from ``start`` on that is a MARK whose crc
    checks, whatever stands between. The caller judges the position."""
    at = data.find(_MARK_LENGTH, start)
    while at >= 0:
        if at + MARK_BYTES <= len(data):
            _, crc, position, kind, _ = _RECORD.unpack_from(data, at)
            if kind == RecordKind.MARK and crc32c(data[at + 8 : at + MARK_BYTES]) == crc:
                yield at, position, _MARK.unpack_from(data, at + RECORD_HEADER_BYTES)[0]
        at = data.find(_MARK_LENGTH, at + 1)
