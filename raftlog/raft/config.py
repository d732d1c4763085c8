"""What a Raft node is given: its settings and what storage found of its log."""

from __future__ import annotations

from dataclasses import dataclass

from raftlog.errors import ConfigError
from raftlog.raft.types import ConfState, Entry, HardState


@dataclass(frozen=True, slots=True)
class RaftConfig:
    """Settings of one node. Times are milliseconds, sizes are bytes of whole frames.

    Raises:
        ConfigError: a value out of its range.
    """

    id: int
    """The replica id, above 0."""
    election_timeout_ms: int = 1000
    """Each timeout is drawn uniformly from [t, 2t). Also the length of a lease and of the CheckQuorum
    window."""
    heartbeat_ms: int = 100
    append_bytes_max: int = 1 << 20
    """Of entries in one AppendRequest; one entry always goes, whatever its size."""
    inflight_messages_max: int = 16
    inflight_bytes_max: int = 8 << 20
    """Per follower, unacknowledged; a single entry above it still goes when nothing else is in flight."""
    uncommitted_bytes_max: int = 64 << 20
    """On a leader: ``propose`` raises Busy above it."""
    rank_delay_ms: int = 50
    """After the leader's connection is lost, the survivor of rank r waits r times this, plus up to this at
    random."""
    quiet_after_ms: int = 0
    """A group idle for this long goes quiet; 0: never. Only for a host that watches over its peers' brokers
    and calls ``RawNode.wake``."""
    cache_bytes_max: int = 4 << 20
    """Entries kept in memory for followers once they are durable and applied here."""

    announce_commits: bool = True
    """Tell followers of a commit at once. False: with the next entries or heartbeat. That is two messages
    less per entry, and followers apply up to a heartbeat later; nothing that is promised depends on it."""

    def __post_init__(self) -> None:
        for name in (
            "id",
            "election_timeout_ms",
            "heartbeat_ms",
            "append_bytes_max",
            "inflight_messages_max",
            "inflight_bytes_max",
            "uncommitted_bytes_max",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("rank_delay_ms", "quiet_after_ms", "cache_bytes_max"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.heartbeat_ms >= self.election_timeout_ms:
            raise ConfigError(
                f"heartbeat_ms ({self.heartbeat_ms}) must be below election_timeout_ms "
                f"({self.election_timeout_ms})"
            )


@dataclass(frozen=True, slots=True)
class RecoveredLog:
    """What storage found of one replica's log. The log holds [first_index, last_index]::

          prev_term        terms: one (first index, term) per run        tail: entries kept in memory
          prev_crc         ┌──────────────┬───────────────────┬──────────┬───────────┐
        ───────────────────┤ first_index  │                   │          │           │ last_index
                           └──────────────┴───────────────────┴──────────┴───────────┘
                                                         applied ──▶│ (tail begins at or below applied + 1)

    ``tail`` must hold every entry above ``applied`` and every entry above ``hard_state.commit``.
    """

    hard_state: HardState
    confs: tuple[tuple[int, ConfState], ...]
    """Stack of (index, configuration), oldest first; at least one (index 0: the initial one)."""
    first_index: int = 1
    prev_term: int = 0
    prev_crc: int = 0
    """Of the entry at ``first_index - 1`` (0 and 0 for a new log)."""
    terms: tuple[tuple[int, int], ...] = ()
    last_index: int = 0
    tail: tuple[Entry, ...] = ()
    applied: int = 0
    """The host has applied up to here already."""
    last_crc: int = -1
    last_leader_time_ms: int = 0
    """Of the last entry; looked at only when ``tail`` is empty although the log is not, or when the log is
    empty behind a snapshot (then the time of the entry at ``first_index - 1``, and the crc is
    ``prev_crc``)."""
    amnesiac: bool = False
    """Entries that it had acknowledged may be missing at the log's end (see ``raftlog.raft.amnesia``)."""
