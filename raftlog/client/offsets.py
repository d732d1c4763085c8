"""Offsets as users name them, and looking them up: where a partition begins and ends, and where in it a time
is."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Final, TypeAlias

from raftlog.client.cluster import ClusterClient
from raftlog.client.metadata import PartitionView
from raftlog.client.retry import retry
from raftlog.errors import ConfigError, NotLeader, UnknownReplica, from_wire
from raftlog.net.rpc import (
    OFFSET_EARLIEST,
    OFFSET_LATEST,
    READ_COMMITTED,
    READ_UNCOMMITTED,
    FetchPartition,
    FetchRequest,
    GroupOffset,
    ListOffsetsRequest,
    OffsetQuery,
)
from raftlog.record.batch import BatchHeader
from raftlog.record.frame import FRAME_HEADER_BYTES, FrameKind, iter_frames
from raftlog.record.types import TopicPartition

Place: TypeAlias = TopicPartition | tuple[str, int]
Offset: TypeAlias = int | tuple[int, str]
"""What is committed: the offset of the next record to read, alone or with metadata."""

LOOKUP_TIMEOUT_S: Final = 30.0
RESETS: Final = {"earliest": OFFSET_EARLIEST, "latest": OFFSET_LATEST, "none": None}
ISOLATIONS: Final = {"read_committed": READ_COMMITTED, "read_uncommitted": READ_UNCOMMITTED}
UNKNOWN_TERM: Final = -1
_READ_BYTES: Final = 1 << 20
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class OffsetFinder:
    """Asks the leaders of partitions.

    Args:
        cluster: whose loop this runs on.
        isolation: for READ_COMMITTED a partition ends where its first open transaction begins.
        timeout: seconds that a lookup may take.
    """

    def __init__(
        self, cluster: ClusterClient, isolation: int = READ_COMMITTED, timeout: float = LOOKUP_TIMEOUT_S
    ) -> None:
        self._cluster = cluster
        self._isolation = isolation
        self._timeout = timeout

    async def find(self, view: PartitionView, timestamp_ms: int) -> int:
        """OFFSET_EARLIEST, OFFSET_LATEST, or an offset not above the first record of that time or later.

        Raises:
            RaftlogError: the last attempt's, when the time is over.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        query = OffsetQuery(view.topic_id, view.index, timestamp_ms)
        request = ListOffsetsRequest([query], self._isolation)

        async def attempt() -> int:
            left = max(deadline - loop.time(), 0.001)
            response, _ = await self._cluster.call_leader(view, request, timeout=left)
            answer = response.answers[0]
            if answer.error is not None:
                error = from_wire(answer.error.name, answer.error.message, answer.error.details)
                connection = self._cluster.route(view)
                if isinstance(error, (NotLeader, UnknownReplica)) and connection is not None:
                    self._cluster.note_refusal(view, connection, error)
                raise error
            return answer.offset

        return await retry(attempt, random=self._cluster.seams.random, deadline=deadline)

    async def since(self, view: PartitionView, timestamp_ms: int) -> int:
        """The offset of the first record of that time or later; the end where there is none.

        A broker's index knows batches; which record of the batch it is, is found by reading on from there.
        """
        from raftlog.record.codec import decode_batch  # takes 0.2 s: not for who only lists topics

        offset = await self.find(view, timestamp_ms)
        if offset < 0:
            return await self.find(view, OFFSET_LATEST)
        while True:
            chunk = await self._read_at(view, offset)
            end = offset
            for header, at in iter_frames(chunk):
                if header.kind != FrameKind.BATCH:
                    continue
                batch = chunk[at + FRAME_HEADER_BYTES : at + header.length]
                parsed = BatchHeader.parse(batch)
                end = max(end, parsed.next_offset)
                if parsed.is_control:
                    continue
                for record in decode_batch(batch, view.topic, view.index, check=False):
                    if record.offset >= offset and record.timestamp_ms >= timestamp_ms:
                        return record.offset
            if end == offset:
                return offset
            offset = end

    async def _read_at(self, view: PartitionView, offset: int) -> memoryview:
        """One fetch at ``offset`` that does not wait: the frames from there on, none at the end of the
        log."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        wanted = FetchPartition(view.topic_id, view.index, offset, -1, _READ_BYTES)
        request = FetchRequest(0, _READ_BYTES, [wanted], self._isolation)

        async def attempt() -> memoryview:
            left = max(deadline - loop.time(), 0.001)
            response, payload = await self._cluster.call_leader(view, request, timeout=left)
            row = response.partitions[0]
            if row.error is not None:
                raise from_wire(row.error.name, row.error.message, row.error.details)
            return payload[: row.length]

        return await retry(attempt, random=self._cluster.seams.random, deadline=deadline)


def to_ms(when: int | datetime) -> int:
    """Milliseconds since the epoch.

    Raises:
        ConfigError: a datetime without a timezone, or something else.
    """
    if isinstance(when, datetime):
        if when.tzinfo is None:
            raise ConfigError(f"{when!r} has no timezone: say datetime.now(UTC), or pass milliseconds")
        return (when - _EPOCH) // timedelta(milliseconds=1)
    if isinstance(when, bool) or not isinstance(when, int):
        raise ConfigError(f"a time is milliseconds or a datetime with a timezone, not {when!r}")
    return when


def row_of(view: PartitionView, offset: Offset, term: int = UNKNOWN_TERM) -> GroupOffset:
    """An offset to commit.

    Raises:
        ConfigError: it is none.
    """
    number, metadata = offset if isinstance(offset, tuple) else (offset, "")
    if isinstance(number, bool) or not isinstance(number, int) or number < 0 or not isinstance(metadata, str):
        raise ConfigError(
            f"an offset to commit is an integer from 0, or a pair of that and a str, not {offset!r}"
        )
    return GroupOffset(view.topic_id, view.index, number, term, metadata)
