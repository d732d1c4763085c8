"""The stack of configurations: each takes effect when its entry is appended and is undone when the entry is
cut.

::

    (0, initial)   (120, joint)   (131, final)        ← 131 is in force although nothing of it is committed
                        commit ──▶                      a cut at 131 brings the joint one back

Thesis section 4.1: a server uses the latest configuration in its log, committed or not. What lies below the
latest committed one can no longer come back and is let go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from raftlog.raft.types import ConfState, Entry
from raftlog.record.frame import Buffer, FrameKind

_decoder = msgspec.msgpack.Decoder(ConfState)


def encode_conf(conf: ConfState) -> bytes:
    """Payload of a CONF entry."""
    return msgspec.msgpack.encode(conf)


def decode_conf(payload: Buffer) -> ConfState:
    """The configuration in a CONF entry's payload."""
    return _decoder.decode(payload)


class ConfStack:
    """Configurations of one log, oldest first. ``current`` is the one in force."""

    __slots__ = ("_stack", "current")

    def __init__(self, confs: Iterable[tuple[int, ConfState]]) -> None:
        self._stack = list(confs)
        assert self._stack, "a replica starts from a configuration"
        indexes = [index for index, _ in self._stack]
        assert indexes == sorted(set(indexes)), indexes
        self.current: ConfState = self._stack[-1][1]

    @property
    def current_index(self) -> int:
        """Index of the entry that holds the configuration in force."""
        return self._stack[-1][0]

    def push(self, entry: Entry) -> None:
        """A CONF entry was appended."""
        assert entry.kind == FrameKind.CONF, entry.kind
        assert entry.index > self.current_index, (entry.index, self.current_index)
        self.current = decode_conf(entry.payload)
        self._stack.append((entry.index, self.current))

    def cut(self, index: int) -> bool:
        """Entries at and above ``index`` were removed. Returns whether the configuration in force changed."""
        before = len(self._stack)
        while self._stack[-1][0] >= index:
            self._stack.pop()
        self.current = self._stack[-1][1]
        return len(self._stack) != before

    def at(self, index: int) -> ConfState:
        """The configuration in force at ``index`` (for a snapshot there; not below the oldest one kept)."""
        for start, conf in reversed(self._stack):
            if start <= index:
                return conf
        raise AssertionError(f"no configuration known at {index}: the oldest is at {self._stack[0][0]}")

    def possible(self, commit: int) -> Iterator[ConfState]:
        """What may yet turn out to be in force: the configuration at ``commit`` and all above it, newest
        first."""
        at = len(self._stack) - 1
        while self._stack[at][0] > commit:
            yield self._stack[at][1]
            at -= 1
        yield self._stack[at][1]

    def forget_below(self, index: int) -> None:
        """``index`` is applied: only the configuration in force there, and later ones, still matter."""
        while len(self._stack) > 1 and self._stack[1][0] <= index:
            del self._stack[0]

    def restore(self, index: int, conf: ConfState) -> None:
        """A snapshot at ``index`` replaced the log."""
        self._stack = [(index, conf)]
        self.current = conf

    def __iter__(self) -> Iterator[tuple[int, ConfState]]:
        return iter(self._stack)
