"""What recovery believes of the journal. Reads, never writes: ``verify`` uses it too.

A crash can damage only what no sync had covered, and every gathered write begins with a mark that says how
far the syncs had come (the *floor*)::

      … | mark floor=f1 | records … | mark floor=f2 | records … ### bytes that do not check
                                    ^f2                          ^p

Let p be the first position that does not check and F the highest floor proven anywhere, also by marks behind
p and by the headers of later files. p >= F: the sync that would have covered p never was followed by another
write, so nothing above p need be trusted: a *torn tail*, cut at p. p < F: these bytes had been synced; now
they are wrong. That is *damage*, and cutting there would drop acknowledged entries: it is reported and never
cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from raftlog.errors import DamagedData, ForeignDataDir
from raftlog.storage.disk import Disk
from raftlog.storage.journal_format import (
    FILE_HEADER_BYTES,
    JOURNAL_FOLDER,
    RECORD_HEADER_BYTES,
    Record,
    RecordKind,
    decode_file_header,
    decode_mark,
    find_marks,
    journal_path,
    parse_journal_name,
    scan_records,
)


@dataclass(slots=True)
class ScannedFile:
    """A journal file and how much of it is valid. Positions are those of the unbounded journal."""

    sequence: int
    data: bytes
    base: int
    end: int
    header_valid: bool

    @property
    def path(self) -> str:
        return journal_path(self.sequence)

    @property
    def size(self) -> int:
        """Bytes of the file up to ``end``."""
        return FILE_HEADER_BYTES + self.end - self.base

    def records(self, *, end: int | None = None) -> Iterator[Record]:
        """The valid records (their crcs were checked by the scan)."""
        stop = self.end if end is None else min(end, self.end)
        return scan_records(memoryview(self.data), self.base, end=stop, check=False)


@dataclass(slots=True)
class JournalScan:
    """Result of :func:`scan_journal`."""

    files: list[ScannedFile] = field(default_factory=list)
    floor: int = 0
    """Everything below this position was durable once."""
    damage: list[DamagedData] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Position behind the last valid record."""
        return self.files[-1].end if self.files else 0

    @property
    def sequence(self) -> int:
        """Of the newest file; 0 without one."""
        return self.files[-1].sequence if self.files else 0

    def cut(self, position: int) -> None:
        """Take ``position`` for the end: the caller found what the journal refers to there to be torn."""
        assert self.floor <= position <= self.end
        while len(self.files) > 1 and self.files[-1].base > position:
            self.files.pop()
        self.files[-1].end = position

    def records(self) -> Iterator[tuple[int, Record]]:
        """(sequence of the file, record) of everything valid, in order."""
        for file in self.files:
            for record in file.records():
                yield file.sequence, record


async def scan_journal(disk: Disk, disk_id: bytes | None, sequence_min: int = 0) -> JournalScan:
    """Read all journal files.

    Args:
        disk_id: must be that of the files; None: any.
        sequence_min: a file of this sequence number was durable once (the manifest says so).

    Raises:
        ForeignDataDir: a file of another disk.
    """
    names = await disk.list(JOURNAL_FOLDER)
    sequences = sorted(s for s in map(parse_journal_name, names) if s is not None)
    scan = JournalScan()
    for sequence in sequences:
        data = await disk.read_file(journal_path(sequence))
        _add_file(scan, sequence, data, disk_id)
    _check_files(scan, sequence_min)
    return scan


def _add_file(scan: JournalScan, sequence: int, data: bytes, disk_id: bytes | None) -> None:
    path = journal_path(sequence)
    header = decode_file_header(data)
    if header is not None and disk_id is not None and header.disk_id != disk_id:
        raise ForeignDataDir(
            f"{path} was written on disk {header.disk_id.hex()}, this is {disk_id.hex()}: "
            "give this broker the directory it had, or an empty one",
            path=path,
        )
    if header is None or header.sequence != sequence:
        # New and not yet written, or damaged: the marks tell. A file that was recycled holds marks of older
        # positions.
        base = scan.end
        for _, position, floor in find_marks(data, 0):
            if position >= base and floor > base:
                scan.floor = max(scan.floor, floor)
        scan.files.append(ScannedFile(sequence, data, base, base, header_valid=False))
        return
    file = ScannedFile(sequence, data, header.base, header.base, header_valid=True)
    # The header is written only after everything below its base was synced.
    scan.floor = max(scan.floor, header.base)
    for record in scan_records(memoryview(data), header.base):
        file.end = record.position + RECORD_HEADER_BYTES + len(record.body)
        if record.kind == RecordKind.MARK:
            scan.floor = max(scan.floor, decode_mark(record.body))
    for at, position, floor in find_marks(data, file.size):
        if position == file.base + at - FILE_HEADER_BYTES:
            scan.floor = max(scan.floor, floor)
    scan.files.append(file)


def _check_files(scan: JournalScan, sequence_min: int) -> None:
    """Report what contradicts the floor."""
    files = scan.files
    for previous, file in pairwise(files):
        if file.sequence != previous.sequence + 1:
            scan.damage.append(_damage(journal_path(previous.sequence + 1), 0, "the journal file is missing"))
        elif file.header_valid and previous.end != file.base:
            scan.damage.append(
                _damage(previous.path, previous.size, "bytes that had been synced do not check")
            )
        elif not file.header_valid and (file is not files[-1] or file.sequence <= sequence_min):
            scan.damage.append(_damage(file.path, 0, "the header does not check"))
    if files and len(files) == 1 and not files[0].header_valid and files[0].sequence <= sequence_min:
        scan.damage.append(_damage(files[0].path, 0, "the header does not check"))
    if scan.sequence < sequence_min:
        scan.damage.append(_damage(journal_path(sequence_min), 0, "the journal file is missing"))
    if files and not scan.damage and scan.end < scan.floor:
        last = files[-1]
        scan.damage.append(_damage(last.path, last.size, "bytes that had been synced do not check"))


def _damage(path: str, position: int, what: str) -> DamagedData:
    return DamagedData(
        f"{path}: {what} at byte {position}: keep the directory for inspection (`raftlog verify` says more) "
        "and let this broker come back with an empty one, its replicas are then replaced",
        path=path,
        position=position,
    )
