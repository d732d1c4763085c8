"""What becomes of old data: the leader decides, the log says so, every replica carries it out.

::

    segments   [0 ……… 900) [900 …… 1800) [1800 ……            900 = SetLogStart proposed by the leader
                    ▲ may go once SetLogStart(900) is applied and a snapshot stands at its end

A segment may go when its newest entry is older than ``retention_ms`` (by leader time: what a record says of
its own time may be years off), or when the rest still holds ``retention_bytes``. The newest segment stays
whatever its age, for segments end by size alone so that those of all replicas align. The leader also has
producers forgotten that have been idle for long. Groups that keep only their latest state (metadata) drop
what lies below their newest snapshot, without asking anyone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from raftlog.config import TopicConfig
from raftlog.errors import RaftlogError
from raftlog.storage.segment import SEGMENT_HEADER_BYTES, Segment

if TYPE_CHECKING:
    from raftlog.broker.broker import Broker

logger = logging.getLogger("raftlog.broker")

HOUSEKEEPING_S: Final = 5.0
"""How often each replica is looked at."""
EXPIRY_INTERVAL_MS: Final = 3 * 60_000
"""Least leader time between two commands of one leader that forget producers."""


@dataclass(frozen=True, slots=True)
class Retention:
    """What of a topic must be kept. None: everything.

    Args:
        ms: entries younger than this, by leader time.
        bytes: this many of the newest bytes of a partition.
    """

    ms: int | None = None
    bytes: int | None = None

    @classmethod
    def of(cls, config: TopicConfig) -> Self:
        """As the topic's settings say."""
        return cls(config.retention_ms, config.retention_bytes)

    def start_offset(self, segments: Sequence[Segment], now_ms: int) -> int | None:
        """Where the log may begin: a segment's base offset; None: nothing may go.

        Args:
            segments: of the log, oldest first.
            now_ms: leader time.
        """
        if self.ms is None and self.bytes is None:
            return None
        left = sum(_size(segment) for segment in segments)
        keep = 0
        for segment in segments[:-1]:
            left -= _size(segment)
            is_old = self.ms is not None and segment.last_leader_time_ms < now_ms - self.ms
            is_spare = self.bytes is not None and left >= self.bytes
            if not segment.sealed or not (is_old or is_spare):
                break
            keep += 1
        return segments[keep].base_offset if keep else None


def _size(segment: Segment) -> int:
    return segment.append_position - SEGMENT_HEADER_BYTES


def last_index_below(segments: Sequence[Segment], offset: int) -> int:
    """The index at which the last segment ends that holds no record at or above ``offset``; 0: none does."""
    index = 0
    for following in segments[1:]:
        if following.base_offset > offset:
            break
        index = following.base_index - 1
    return index


async def keep_house(broker: Broker) -> None:
    """Look after the replicas of a broker, one after another, for ever."""
    while True:
        await asyncio.sleep(HOUSEKEEPING_S)
        for replica in list(broker.replicas()):
            try:
                await replica.keep_house()
            except AssertionError as error:
                replica.halt("cannot drop a part of its log", error)
            except RaftlogError as error:
                logger.warning(
                    "broker %d: %s keeps what it could drop: %s", broker.broker_id, replica.name, error
                )
