"""The names of what the checker may find: see ``checker`` for how each shows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Anomalies."""

    INCONSISTENT_OFFSETS = "inconsistent offsets"
    DUPLICATE = "duplicate"
    LOST_WRITE = "lost write"
    UNSEEN = "unseen"
    ABORTED_READ = "aborted read"
    INTERMEDIATE_READ = "intermediate read"
    PRECOMMITTED_READ = "precommitted read"
    GARBAGE_READ = "garbage read"
    POLL_SKIP = "poll skip"
    NON_MONOTONIC_POLL = "non-monotonic poll"
    SEND_SKIP = "send skip"
    NON_MONOTONIC_SEND = "non-monotonic send"
    WRITE_CYCLE = "write cycle"
    INFORMATION_CYCLE = "information cycle"
    CONSUME_COUNT = "consume count"


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One broken promise."""

    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.text}"


def show(value: bytes) -> str:
    """A value for people: its beginning."""
    return repr(value if len(value) <= 40 else value[:40] + b"...")
