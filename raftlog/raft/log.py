"""The log as the core sees it: terms of all entries, the entries themselves only at the end.

::

      first_index - 1      first_index                  offset         applied    commit      last_index
    ──────┼────────────────────┼──────────────────────────┼───────────────┼──────────┼────────────┼
     prev_term, prev_crc       │ terms only (runs)        │ entries in memory                     │
                               └── storage has them ──────┴── kept for followers ─┘               │
                                                          └── needed to apply and to sync ────────┘

    offset <= applied + 1, and offset <= handed + 1: nothing leaves memory before it is applied, given to
    storage and durable. An entry above `commit` may be cut; never one at or below it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from raftlog.raft.config import RecoveredLog
from raftlog.raft.types import Entry

UNKNOWN_CRC = -1


class LogDiverged(AssertionError):
    """Two logs agree on (index, term) yet not on the bytes: Raft's log matching property is broken, by a bug
    or by damage that went unnoticed. The replica must halt; going on would spread it."""


class RaftLog:
    """Terms, the entries in memory, and the commit and apply positions of one replica's log."""

    __slots__ = (
        "_before_memory_time_ms",
        "_entries",
        "_run_starts",
        "_run_terms",
        "applied",
        "commit",
        "first_index",
        "handed",
        "last_crc",
        "last_index",
        "last_leader_time_ms",
        "last_term",
        "memory_bytes",
        "offset",
        "prev_crc",
        "prev_term",
        "taken",
    )

    def __init__(self, recovered: RecoveredLog) -> None:
        self.first_index = recovered.first_index
        self.prev_term = recovered.prev_term
        self.prev_crc = recovered.prev_crc
        self._run_starts = [start for start, _ in recovered.terms]
        self._run_terms = [term for _, term in recovered.terms]
        self.last_index = recovered.last_index
        self.last_term = self._run_terms[-1] if self._run_terms else self.prev_term
        self.commit = max(min(recovered.hard_state.commit, recovered.last_index), recovered.applied)
        self.applied = recovered.applied
        self.taken = recovered.applied
        """Committed entries up to here have been given to the host to apply."""
        self.handed = recovered.last_index
        """Entries up to here have been given to storage."""
        self._entries = list(recovered.tail)
        self.offset = self._entries[0].index if self._entries else self.last_index + 1
        """Index of the first entry in memory, or ``last_index + 1``."""
        self.memory_bytes = sum(len(entry.frame) for entry in self._entries)
        self._before_memory_time_ms = 0
        """Time of the entry at ``offset - 1``, as far as known."""
        if self._entries:
            self.last_crc = self._entries[-1].crc
            self.last_leader_time_ms = self._entries[-1].leader_time_ms
        else:
            self.last_crc = recovered.last_crc if self.last_index >= self.first_index else recovered.prev_crc
            self.last_leader_time_ms = self._before_memory_time_ms = recovered.last_leader_time_ms
        self.check()

    # -- looking ---------------------------------------------------------------------------------------------

    def term(self, index: int) -> int | None:
        """Term of the entry at ``index``; None where the log does not know (compacted away, or beyond its
        end)."""
        if index > self.last_index:
            return None
        starts = self._run_starts
        if starts and index >= starts[-1]:
            return self._run_terms[-1]
        if index >= self.first_index:
            return self._run_terms[bisect_right(starts, index) - 1]
        return self.prev_term if index == self.first_index - 1 else None

    def crc(self, index: int) -> int:
        """crc of the entry at ``index``, or UNKNOWN_CRC when nothing in memory tells."""
        if index == self.last_index:
            return self.last_crc
        if index == self.first_index - 1:
            return self.prev_crc
        at = index - self.offset
        if 0 <= at < len(self._entries):
            return self._entries[at].crc
        if at == -1 and self._entries:
            return self._entries[0].prev_crc
        return UNKNOWN_CRC

    def slice(self, low: int, high: int) -> list[Entry] | None:
        """Entries [low, high); None when part of them is not in memory."""
        if low < self.offset or high > self.last_index + 1:
            return None
        return self._entries[low - self.offset : high - self.offset]

    def batch(self, low: int, bytes_max: int) -> tuple[tuple[Entry, ...], int]:
        """Entries from ``low`` (in memory) on, of at most ``bytes_max`` but at least one, and their size."""
        entries = self._entries
        start = low - self.offset
        assert 0 <= start < len(entries), (low, self.offset, self.last_index)
        size = len(entries[start].frame)
        end = start + 1
        while end < len(entries):
            longer = size + len(entries[end].frame)
            if longer > bytes_max:
                break
            size = longer
            end += 1
        return tuple(entries[start:end]), size

    def is_up_to_date(self, last_index: int, last_term: int) -> bool:
        """Whether a log that ends so is at least as up to date as this one (Raft section 5.4.1)."""
        return (last_term, last_index) >= (self.last_term, self.last_index)

    def meeting_point(self, index: int, term: int) -> int:
        """The highest index not above ``index`` whose term is at most ``term``, or ``first_index - 1``.

        Logs whose entry at ``index`` has ``term`` cannot agree with this one above the result, for there this
        log has a higher term: terms never fall along a log. One refusal so skips a whole term (thesis section
        5.3).
        """
        index = min(index, self.last_index)
        while index >= self.first_index:
            run = bisect_right(self._run_starts, index) - 1
            if self._run_terms[run] <= term:
                return index
            index = self._run_starts[run] - 1
        return self.first_index - 1

    def size_of(self, low: int, high: int) -> int:
        """Bytes of the entries [low, high), which are in memory."""
        return sum(len(entry.frame) for entry in self._entries[low - self.offset : high - self.offset])

    # -- changing --------------------------------------------------------------------------------------------

    def append(self, entries: Sequence[Entry]) -> None:
        """Add entries, at least one, that follow the last one.

        Raises:
            LogDiverged: an entry whose ``prev_crc`` is not the crc of the one before it.
        """
        for entry in entries:
            assert entry.index == self.last_index + 1, (entry.index, self.last_index)
            if entry.prev_crc != self.last_crc:
                raise LogDiverged(
                    f"entry {entry.index} of term {entry.term} follows crc {entry.prev_crc:08x}, "
                    f"but entry {self.last_index} of term {self.last_term} has {self.last_crc:08x}"
                )
            if entry.term != self.last_term or not self._run_starts:
                assert entry.term >= self.last_term, (entry.term, self.last_term)
                self._run_starts.append(entry.index)
                self._run_terms.append(entry.term)
            self.last_index = entry.index
            self.last_term = entry.term
            self.last_crc = entry.crc
            self.memory_bytes += len(entry.frame)
            self._entries.append(entry)
        self.last_leader_time_ms = entries[-1].leader_time_ms

    def cut(self, index: int) -> None:
        """Remove the entries at and above ``index``, none of which may be committed."""
        assert self.commit < index <= self.last_index, (self.commit, index, self.last_index)
        at = index - self.offset
        removed = self._entries[at:]
        del self._entries[at:]
        self.memory_bytes -= sum(len(entry.frame) for entry in removed)
        while self._run_starts and self._run_starts[-1] >= index:
            self._run_starts.pop()
            self._run_terms.pop()
        self.last_index = index - 1
        self.last_term = self._run_terms[-1] if self._run_terms else self.prev_term
        self.last_crc = removed[0].prev_crc
        self.last_leader_time_ms = (
            self._entries[-1].leader_time_ms if self._entries else self._before_memory_time_ms
        )
        self.handed = min(self.handed, index - 1)

    def take_unhanded(self) -> tuple[Entry, ...]:
        """The entries that storage has not been given; they now count as given."""
        if self.handed == self.last_index:
            return ()
        entries = tuple(self._entries[self.handed + 1 - self.offset :])
        self.handed = self.last_index
        return entries

    def take_committed(self) -> tuple[Entry, ...]:
        """The committed entries that the host has not been given; they now count as given."""
        entries = tuple(self._entries[self.taken + 1 - self.offset : self.commit + 1 - self.offset])
        self.taken = self.commit
        return entries

    def trim(self, bytes_max: int, durable_index: int) -> None:
        """Let the oldest entries go from memory until ``bytes_max`` are left, none that is still needed
        here."""
        removable = min(self.applied, durable_index) + 1 - self.offset
        count = 0
        while count < removable and self.memory_bytes > bytes_max:
            self.memory_bytes -= len(self._entries[count].frame)
            count += 1
        if count:
            self._before_memory_time_ms = self._entries[count - 1].leader_time_ms
            del self._entries[:count]
            self.offset += count

    def compact(self, first_index: int, prev_crc: int) -> None:
        """Storage no longer has the entries below ``first_index`` (all applied and durable)."""
        if first_index <= self.first_index:
            return
        assert first_index <= self.applied + 1, (first_index, self.applied)
        prev_term = self.term(first_index - 1)
        assert prev_term is not None
        known = self.crc(first_index - 1)
        assert known in (UNKNOWN_CRC, prev_crc), (known, prev_crc)
        drop = first_index - self.offset
        if drop > 0:
            self.memory_bytes -= sum(len(entry.frame) for entry in self._entries[:drop])
            self._before_memory_time_ms = self._entries[drop - 1].leader_time_ms
            del self._entries[:drop]
            self.offset = first_index
        keep = bisect_right(self._run_starts, first_index) - 1
        del self._run_starts[:keep], self._run_terms[:keep]
        if first_index > self.last_index:
            self._run_starts.clear()
            self._run_terms.clear()
        else:
            self._run_starts[0] = first_index
        self.first_index, self.prev_term, self.prev_crc = first_index, prev_term, prev_crc

    def restore(self, index: int, term: int, crc: int, leader_time_ms: int) -> None:
        """Become an empty log behind a snapshot at ``index``."""
        self.first_index = self.offset = index + 1
        self.prev_term = self.last_term = term
        self.prev_crc = self.last_crc = crc
        self.last_index = self.commit = self.applied = self.taken = self.handed = index
        self._run_starts, self._run_terms, self._entries = [], [], []
        self.memory_bytes = 0
        self.last_leader_time_ms = self._before_memory_time_ms = max(leader_time_ms, self.last_leader_time_ms)

    def check(self) -> None:
        """Assert what must hold between calls."""
        assert self.first_index - 1 <= self.applied <= self.taken <= self.commit <= self.last_index, self
        assert self.first_index <= self.offset <= self.last_index + 1, self
        assert self.offset + len(self._entries) == self.last_index + 1, self
        assert self.offset <= self.applied + 1, f"entries above applied must be in memory: {self}"
        assert self.offset <= self.handed + 1 <= self.last_index + 1, self
        assert self.last_crc != UNKNOWN_CRC, "the crc of the last entry must be known"
        assert len(self._run_starts) == len(self._run_terms)
        assert self._run_starts == sorted(set(self._run_starts)), self._run_starts
        assert self._run_terms == sorted(set(self._run_terms)), self._run_terms
        if self.last_index >= self.first_index:
            assert self._run_starts[0] == self.first_index, (self._run_starts, self.first_index)
        else:
            assert not self._run_starts, self._run_starts

    def __repr__(self) -> str:
        return (
            f"RaftLog([{self.first_index}, {self.last_index}], memory from {self.offset}, "
            f"applied={self.applied}, commit={self.commit}, handed={self.handed}, last_term={self.last_term})"
        )
