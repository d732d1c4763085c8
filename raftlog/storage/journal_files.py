"""The journal's files: which there are, what each is still needed for, and which may go.

A file is needed while some replica has, in it, an entry above its durable checkpoint. Files go oldest first;
the newest of those that went is kept to be used again, for its blocks are written already, which makes syncs
cheaper than into fresh ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from raftlog.storage.disk import Disk, DiskFile
from raftlog.storage.journal_format import journal_path
from raftlog.storage.replica_log import ReplicaLog
from raftlog.storage.spec import StorageConfig


@dataclass(slots=True)
class JournalFile:
    """A journal file, and per replica the highest index for which it is needed."""

    sequence: int
    base: int
    file: DiskFile | None = None
    needed: dict[int, int] = field(default_factory=dict)


class JournalFiles:
    """Oldest first.

    Args:
        logs: the replicas that there are, by id.
        sequence: of the first file to be made.
        old: (sequence, base, needed) of the files that recovery found, oldest first.
    """

    def __init__(
        self,
        disk: Disk,
        config: StorageConfig,
        logs: Mapping[int, ReplicaLog],
        sequence: int,
        old: Iterable[tuple[int, int, dict[int, int]]],
    ) -> None:
        self._disk = disk
        self._config = config
        self._first_sequence = sequence
        self._files = [JournalFile(s, b, None, needed) for s, b, needed in old]
        self._spare: int | None = None
        """Sequence of the file just before the oldest one, to be used again."""
        self._names = asyncio.Lock()
        self._checkpointed = {replica_id: log.flushed_index for replica_id, log in logs.items()}

    def __len__(self) -> int:
        return len(self._files)

    @property
    def oldest(self) -> JournalFile:
        """The one to go next."""
        return self._files[0]

    @property
    def sequence(self) -> int:
        """Of the newest durable file; 0 without one."""
        return self._files[-1].sequence if self._files else 0

    async def create(self, base: int) -> JournalFile:
        """Make the next file; it counts from :meth:`add` on."""
        sequence = self.sequence + 1 if self._files else self._first_sequence
        path = journal_path(sequence)
        async with self._names:
            if self._spare is not None:
                await self._disk.rename(journal_path(self._spare), path)
                self._spare = None
        file = await self._disk.open(path, create=True, allocate=self._config.journal_bytes)
        return JournalFile(sequence, base, file)

    def add(self, file: JournalFile) -> None:
        """The file is durable."""
        self._files.append(file)

    def close(self) -> None:
        """Close those that are open."""
        for file in self._files:
            if file.file is not None:
                file.file.close()

    # -- what they are needed for ----------------------------------------------------------------------------

    def need(self, file: JournalFile, replica_id: int, first: int, last: int) -> None:
        """``file`` now holds entries [first, last]; earlier files are needed only below ``first``."""
        for older in self._files:
            if older is not file and older.needed.get(replica_id, 0) >= first:
                older.needed[replica_id] = first - 1
        file.needed[replica_id] = last

    def checkpointed(self, replica_id: int, index: int) -> None:
        """A checkpoint at ``index`` is durable: entries up to there are not needed."""
        self._checkpointed[replica_id] = max(index, self._checkpointed.get(replica_id, 0))

    def forget(self, replica_id: int) -> None:
        """No file is needed for that replica."""
        for file in self._files:
            file.needed.pop(replica_id, None)

    # -- letting go ------------------------------------------------------------------------------------------

    def can_release(self) -> bool:
        """The oldest file is not needed any more."""
        return len(self._files) > 1 and self._is_released(self._files[0])

    async def release(self) -> None:
        """Let go of the oldest files that are not needed any more: one after another, so that no crash leaves
        a gap in the sequence."""
        while self.can_release():
            async with self._names:
                if not self.can_release():
                    return  # another caller was faster
                if self._spare is not None:
                    await self._disk.remove(journal_path(self._spare))
                file = self._files.pop(0)
                if file.file is not None:
                    file.file.close()
                self._spare = file.sequence

    def _is_released(self, file: JournalFile) -> bool:
        return all(
            self._checkpointed.get(replica_id, 0) >= index for replica_id, index in file.needed.items()
        )
