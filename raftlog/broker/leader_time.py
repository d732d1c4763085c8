"""The time that a leader stamps on entries."""

from __future__ import annotations


class LeaderTime:
    """It follows the wall clock and never goes back along the log.

    Where the log is ahead of the clock (somebody's was wrong, or was set back), time goes on at half its pace
    until the clock has caught up: stood it still, no timeout would end meanwhile.
    """

    __slots__ = ("_ahead",)

    def __init__(self) -> None:
        self._ahead: tuple[int, int] | None = None
        """Since when the log's time is ahead of the clock, and where it stood."""

    def of(self, last_ms: int, wall_ms: int, now_ms: int) -> int:
        """The time of the next entry.

        Args:
            last_ms: that of the last one in the log.
            wall_ms: the clock's, since the epoch.
            now_ms: monotonic.
        """
        if wall_ms >= last_ms and self._ahead is None:
            return wall_ms
        since_ms, began_ms = self._ahead or (now_ms, last_ms)
        time_ms = max(last_ms, began_ms + (now_ms - since_ms) // 2)
        self._ahead = (since_ms, began_ms) if wall_ms < time_ms else None
        return max(wall_ms, time_ms)
