"""Reading a range of offsets of one partition into Arrow tables: what a read task does.

The next fetch is under way while the answer to the last one is decoded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from raftlog.client.assigned import Aborted, end_of, is_hidden
from raftlog.client.metadata import PartitionView
from raftlog.client.offsets import ISOLATIONS, LOOKUP_TIMEOUT_S, UNKNOWN_TERM
from raftlog.client.retry import retry
from raftlog.errors import NotLeader, RequestTimeout, UnknownReplica, UnknownTopic, from_wire
from raftlog.net.rpc import FetchPartition, FetchRequest, FetchResponse
from raftlog.record.arrow import pa
from raftlog.record.batch import BatchHeader
from raftlog.record.columns import SCHEMA, decode_columns
from raftlog.record.frame import FRAME_HEADER_BYTES, FrameKind, iter_frames

if TYPE_CHECKING:
    from raftlog.client.cluster import ClusterClient
    from raftlog.client.log import Log
    from raftlog.data.spans import Span
    from raftlog.net.connection import RpcConnection

FETCH_BYTES: Final = 4 * 1024 * 1024
FETCH_BYTES_MIN: Final = 64 * 1024
WAIT_MS: Final = 500
AMISS_S: Final = 0.25
STALLED_S: Final = 60.0
"""A range that was there when it was resolved is there: who cannot read on for so long gives up."""
SMALL_BATCH: Final = 1_000
"""Records; a table of smaller batches is made one piece."""


class Fetched(NamedTuple):
    """Frames from some offset on."""

    chunk: memoryview
    aborted: Aborted
    start: int
    end: int
    """The offset after the last record."""
    term: int
    """Of that record."""


async def fetch(
    cluster: ClusterClient, view: PartitionView, offset: int, last_term: int, isolation: int, bytes_max: int
) -> Fetched:
    """The frames from ``offset`` on, one batch at least.

    Args:
        last_term: of the record before; UNKNOWN_TERM if that was not read.
        bytes_max: about how much.

    Raises:
        OffsetOutOfRange, LogTruncated: they are not there any more.
        RequestTimeout: nothing came for a minute.
        RaftlogError: the last attempt's.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + STALLED_S
    wanted = FetchPartition(view.topic_id, view.index, offset, last_term, bytes_max)
    request = FetchRequest(WAIT_MS, bytes_max, [wanted], isolation)

    async def attempt() -> Fetched:
        left = max(deadline - loop.time(), 0.001)
        response, payload = await cluster.call_leader(view, request, timeout=left)
        row = response.partitions[0]
        if row.error is not None:
            error = from_wire(row.error.name, row.error.message, row.error.details)
            connection = cluster.route(view)
            if isinstance(error, (NotLeader, UnknownReplica)) and connection is not None:
                cluster.note_refusal(view, connection, error)
            raise error
        chunk = payload[: row.length]
        end = end_of(chunk) if row.length else None
        if end is None or end[0] <= offset:
            raise RequestTimeout(f"{view} has nothing to read at offset {offset} yet", indeterminate=False)
        return Fetched(chunk, row.aborted, offset, *end)

    return await retry(attempt, random=cluster.seams.random, deadline=deadline)


async def arrival(
    cluster: ClusterClient, places: Sequence[tuple[PartitionView, int]], isolation: int, seconds: float
) -> None:
    """Wait until one of these partitions has a record at its offset or behind it, with one long poll to each
    leader. Returns also when something is amiss with one of them, and after ``seconds`` anyway."""
    polls: list[asyncio.Future[tuple[FetchResponse, memoryview]]] = []
    try:
        async with asyncio.timeout(seconds):
            leaders = await asyncio.gather(*(cluster.seek_leader(view) for view, _ in places))
            by_leader: dict[RpcConnection, list[FetchPartition]] = {}
            for leader, (view, offset) in zip(leaders, places, strict=True):
                wanted = FetchPartition(view.topic_id, view.index, offset, UNKNOWN_TERM, 1)
                by_leader.setdefault(leader, []).append(wanted)
            wait_ms = round(seconds * 1000)
            for leader, rows in by_leader.items():
                polls.append(leader.request(FetchRequest(wait_ms, 1, rows, isolation)))
            done, _ = await asyncio.wait(polls, return_when=asyncio.FIRST_COMPLETED)
            amiss = any(each.exception() is not None or _has_error(each.result()[0]) for each in done)
            if amiss:  # whoever reads hears of it, and knows what is to be done; not at once again, though
                await asyncio.sleep(AMISS_S)
    except TimeoutError:
        pass
    finally:
        for poll in polls:
            poll.cancel()


def _has_error(response: FetchResponse) -> bool:
    return any(row.error is not None for row in response.partitions)


def batches_of(topic: str, partition: int, fetched: Fetched, end: int) -> Iterator[pa.RecordBatch]:
    """The records that may be seen, below offset ``end``, as columns of :data:`SCHEMA`.

    Raises:
        CorruptFrame, CorruptBatch: what was fetched does not check.
    """
    start = fetched.start
    for header, at in iter_frames(fetched.chunk):
        if header.kind != FrameKind.BATCH:
            continue
        batch = fetched.chunk[at + FRAME_HEADER_BYTES : at + header.length]
        parsed = BatchHeader.parse(batch)
        if parsed.next_offset <= start or parsed.is_control or is_hidden(parsed, fetched.aborted):
            continue
        if parsed.base_offset >= end:
            return
        decoded = decode_columns(batch, topic, partition, check=False)  # the frame's crc has covered it
        first = max(start - parsed.base_offset, 0)
        yield decoded.slice(first, min(end, parsed.next_offset) - parsed.base_offset - first)


def measure(fetched: Fetched) -> tuple[float, float]:
    """(bytes in the log, bytes as columns) that one offset takes."""
    offsets = fetched.end - fetched.start
    size = sum(batch.nbytes for batch in batches_of("", 0, fetched, fetched.end))
    return len(fetched.chunk) / offsets, size / offsets


def read_span(log: Log, span: Span, columns: Sequence[str], isolation: str) -> Iterator[pa.Table]:
    """The records of a span, in order, in tables of a few MB.

    Raises:
        UnknownTopic: the topic is not the one that was resolved.
        And what :func:`fetch` and :func:`batches_of` raise.
    """
    runtime = log._connected()
    cluster, loop = runtime.cluster, runtime.io.loop
    view = runtime.io.call(cluster.partition(span.topic, span.partition, timeout=LOOKUP_TIMEOUT_S))
    if view.topic_id != span.topic_id:
        raise UnknownTopic(f"topic {span.topic!r} was deleted, and made anew, since the Dataset was made")
    level = ISOLATIONS[isolation]

    def ask(offset: int, term: int) -> asyncio.Future[Fetched]:
        left = round((span.end - offset) * span.log_bytes * 1.1)
        wanted = min(max(left, FETCH_BYTES_MIN), FETCH_BYTES)
        return asyncio.run_coroutine_threadsafe(  # type: ignore[return-value]
            fetch(cluster, view, offset, term, level, wanted), loop
        )

    pending = ask(span.start, UNKNOWN_TERM)
    try:
        while True:
            fetched = pending.result()
            more = fetched.end < span.end
            if more:
                pending = ask(fetched.end, fetched.term)
            batches = list(batches_of(span.topic, span.partition, fetched, span.end))
            if batches:
                yield _table(batches, columns)
            if not more:
                return
    finally:
        pending.cancel()


def _table(batches: Sequence[pa.RecordBatch], columns: Sequence[str]) -> pa.Table:
    """One table, of few pieces."""
    table = pa.Table.from_batches(batches).select(columns)
    return table.combine_chunks() if table.num_rows < SMALL_BATCH * len(batches) else table


def schema_of(columns: Sequence[str]) -> pa.Schema:
    """Those columns of :data:`SCHEMA`."""
    return pa.schema([SCHEMA.field(name) for name in columns])
