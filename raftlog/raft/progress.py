"""What a leader knows of one follower's log, and how much it may send.

    ┌───────┐  accepted   ┌───────────┐
    │ PROBE ├────────────▶│ REPLICATE │      PROBE      one message at a time: where do the logs meet?
    │       │◀────────────┤           │      REPLICATE  stream: `next` runs ahead of `match`, in a window
    └─┬───▲─┘  rejected,  └─────┬─────┘      SNAPSHOT   the entries needed are gone; nothing is sent meanwhile
      │   │    connection lost  │
      ▼   │                     ▼            always: match < next; entries in (match, next) are in flight
    ┌─────┴────────────────────────┐                 match never goes back while the follower keeps its disk
    │           SNAPSHOT           │
    └──────────────────────────────┘

Names and transitions are those of etcd's tracker.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Final


class ProgressState(Enum):
    PROBE = "probe"
    REPLICATE = "replicate"
    SNAPSHOT = "snapshot"


PROBE: Final = ProgressState.PROBE
REPLICATE: Final = ProgressState.REPLICATE
SNAPSHOT: Final = ProgressState.SNAPSHOT


class Progress:
    """One follower, as its leader sees it. Read it; only the core writes it."""

    __slots__ = (
        "_inflight",
        "commit_sent",
        "connected",
        "heard_ms",
        "id",
        "inflight_bytes",
        "loading",
        "match",
        "next",
        "paused",
        "read_round",
        "room_needed",
        "seen_last",
        "seen_match",
        "state",
    )

    def __init__(self, replica: int, next_index: int, now_ms: int) -> None:
        self.id = replica
        self.match = 0
        self.next = next_index
        self.state = ProgressState.PROBE
        self.paused = False
        """PROBE: a probe is out and unanswered."""
        self.commit_sent = 0
        """The commit index that the follower has been told, as far as messages arrive."""
        self.heard_ms = now_ms
        """When it last answered anything (CheckQuorum)."""
        self.connected = True
        self.loading = False
        """A LoadRequest for it is out."""
        self.room_needed = 0
        """The next entry was read and did not fit into the window: not to be read again with less room."""
        self.read_round = 0
        """The last round of reads that it confirmed."""
        self.inflight_bytes = 0
        self._inflight: deque[tuple[int, int]] = deque()
        self.seen_match = -1
        self.seen_last = -1
        """``match`` and the follower's own last index at its previous heartbeat response: no change, no
        progress."""

    @property
    def inflight_messages(self) -> int:
        """Messages with entries that are not acknowledged."""
        return len(self._inflight)

    def become_probe(self) -> None:
        """Forget what is in flight; ask again from just above what is known to match."""
        self._reset(ProgressState.PROBE)
        self.next = self.match + 1

    def become_replicate(self) -> None:
        """The logs meet at ``match``: stream from there."""
        self._reset(ProgressState.REPLICATE)
        self.next = self.match + 1

    def become_snapshot(self) -> None:
        """The follower needs a snapshot; wait until it acknowledges an index again."""
        self._reset(ProgressState.SNAPSHOT)

    def _reset(self, state: ProgressState) -> None:
        self.state = state
        self.paused = False
        self.loading = False
        self.room_needed = 0
        self.inflight_bytes = 0
        self._inflight.clear()
        self.seen_match = self.seen_last = -1
        self.commit_sent = min(self.commit_sent, self.match)

    def window_bytes(self, messages_max: int, bytes_max: int) -> int:
        """Bytes that may still be sent; 0 when the window is full."""
        if len(self._inflight) >= messages_max or self.inflight_bytes >= bytes_max:
            return 0
        return bytes_max - self.inflight_bytes

    def fits(self, size: int, window: int) -> bool:
        """Whether a message of ``size`` bytes may go with ``window`` bytes left; the only one always may."""
        return size <= window or not self._inflight

    def sent(self, last_index: int, size: int) -> None:
        """A message with entries up to ``last_index`` of ``size`` bytes has gone out (REPLICATE)."""
        assert last_index >= self.next, (last_index, self.next)
        self._inflight.append((last_index, size))
        self.inflight_bytes += size
        self.room_needed = 0
        self.next = last_index + 1

    def acknowledged(self, index: int) -> bool:
        """The follower holds up to ``index`` durably. Returns whether that is news."""
        inflight = self._inflight
        while inflight and inflight[0][0] <= index:
            self.inflight_bytes -= inflight.popleft()[1]
        if index <= self.match:
            return False
        self.match = index
        if self.next <= index:
            self.next = index + 1
        return True

    def rejected(self, index: int, meet: int) -> bool:
        """The follower refused ``prev_index == index``; ``meet`` is the best guess of where the logs agree.

        Returns False for a stale refusal (of a message from before the last transition), which changes
        nothing.
        """
        if self.state is ProgressState.REPLICATE:
            stale = index <= self.match  # it accepted that much since
        elif self.state is ProgressState.PROBE:
            stale = index != self.next - 1  # not the probe that is out
        else:
            stale = True
        if stale:
            return False
        self._reset(ProgressState.PROBE)
        self.next = max(self.match + 1, min(index, meet + 1))
        return True

    def check(self) -> None:
        """Assert what must hold between calls."""
        assert 0 <= self.match < self.next, self
        assert self.inflight_bytes == sum(size for _, size in self._inflight), self
        if self.state is not ProgressState.REPLICATE:
            assert not self._inflight, self
        previous = self.match
        for last, _ in self._inflight:
            assert previous < last < self.next, self
            previous = last

    def __repr__(self) -> str:
        return (
            f"Progress({self.id}, {self.state.value}, match={self.match}, next={self.next}, "
            f"inflight={len(self._inflight)}/{self.inflight_bytes}B{', paused' if self.paused else ''})"
        )
