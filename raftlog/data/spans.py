"""What a Dataset reads: ranges of offsets, resolved once on the driver and cut into read tasks.

Offsets tell how many records there are, not how large they are; a sample from each partition says that. It
only decides how the work is cut, never what is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from raftlog.client.metadata import PartitionView
from raftlog.client.offsets import ISOLATIONS, LOOKUP_TIMEOUT_S, OffsetFinder, to_ms
from raftlog.config import validate_topic_name
from raftlog.data.groups import committed_offsets
from raftlog.data.reading import fetch, measure
from raftlog.errors import ConfigError, OffsetOutOfRange
from raftlog.net.rpc import OFFSET_EARLIEST, OFFSET_LATEST
from raftlog.record.types import TopicPartition

if TYPE_CHECKING:
    from raftlog.client.cluster import ClusterClient
    from raftlog.client.log import Log

Where: TypeAlias = Literal["earliest", "latest"] | int | datetime | Mapping[Any, int]
"""A place in every partition: its end, an offset, a time, or an offset for each (topic, partition)."""

SAMPLE_BYTES: Final = 256 * 1024
TASK_BYTES_MIN: Final = 1024 * 1024
"""In memory; a read task that reads less than this costs more to start than to run."""


@dataclass(frozen=True, slots=True)
class Span:
    """Offsets ``start`` to ``end - 1`` of a partition."""

    topic: str
    topic_id: bytes
    partition: int
    start: int
    end: int
    log_bytes: float = 0.0
    """About what one offset takes in the log."""
    memory_bytes: float = 0.0
    """About what one offset takes as columns."""

    @property
    def name(self) -> TopicPartition:
        """The partition."""
        return TopicPartition(self.topic, self.partition)

    @property
    def size(self) -> int:
        """About how many bytes its columns take."""
        return ceil((self.end - self.start) * self.memory_bytes)


class Offsets(dict[Any, int]):
    """How far a Dataset reads: partition -> the offset after its last record. What a group commits when it is
    processed."""

    def __init__(
        self, ends: Mapping[TopicPartition, int] = {}, starts: Mapping[TopicPartition, int] | None = None
    ) -> None:
        super().__init__(ends)
        self.starts: dict[TopicPartition, int] = dict(starts or {})
        """Where it begins. A group that is beyond that has processed some of it already."""

    def __reduce__(self) -> tuple[type[Offsets], tuple[dict[TopicPartition, int], dict[TopicPartition, int]]]:
        return Offsets, (dict(self), self.starts)


def offsets_of_spans(spans: Sequence[Span]) -> Offsets:
    """Where whole partitions begin and end to be read."""
    return Offsets({each.name: each.end for each in spans}, {each.name: each.start for each in spans})


# -- resolving -----------------------------------------------------------------------------------------------


def find_spans(
    log: Log, topics: Sequence[str], start: Where, end: Where, group: str | None, isolation: str
) -> list[Span]:
    """One span for each partition of the topics, also where there is nothing to read.

    Args:
        topics: names.
        start: where to begin; with a group, where it has committed nothing.
        end: where to stop, that is the first offset that is not read.
        group: begin at its committed offsets; waits while a transaction is about to commit some.
        isolation: as in :func:`resolve`.

    Raises:
        As :func:`resolve`.
    """
    runtime = log._connected()
    views = runtime.io.call(_partitions_of(runtime.cluster, topics))
    names = [TopicPartition(view.topic, view.index) for view in views]
    committed = {} if group is None else committed_offsets(log, group, names)
    return runtime.io.call(resolve(runtime.cluster, views, start, end, committed, isolation))


async def _partitions_of(cluster: ClusterClient, topics: Sequence[str]) -> list[PartitionView]:
    if not topics:
        raise ConfigError("there is no topic to read")
    names = dict.fromkeys(validate_topic_name(name) for name in topics)
    found = [await cluster.topic(name, timeout=LOOKUP_TIMEOUT_S) for name in names]
    return [view for topic in found for view in topic.partitions]


async def resolve(
    cluster: ClusterClient,
    views: Sequence[PartitionView],
    start: Where,
    end: Where,
    committed: Mapping[Any, int],
    isolation: str,
) -> list[Span]:
    """One span for each of the partitions.

    Args:
        start: where to begin, where nothing was committed.
        end: where to stop.
        committed: (topic, partition) -> where to begin.
        isolation: for "read_committed" a partition ends where its first open transaction begins.

    Raises:
        OffsetOutOfRange: the partition does not hold these offsets (any more).
        UnknownTopic, UnknownPartition, ConfigError, ConnectionLost, RequestTimeout.
    """
    _check_places(views, start, end)
    finder = OffsetFinder(cluster, ISOLATIONS[isolation])
    return await asyncio.gather(
        *(_resolve_one(finder, view, start, end, committed.get((view.topic, view.index))) for view in views)
    )


def _check_places(views: Sequence[PartitionView], *wheres: Where) -> None:
    known = {(view.topic, view.index) for view in views}
    for where in wheres:
        if isinstance(where, Mapping):
            for place in where:
                if place not in known:
                    raise ConfigError(f"{place!r} is not a partition of the topics that are read")


async def _resolve_one(
    finder: OffsetFinder, view: PartitionView, start: Where, end: Where, committed: int | None
) -> Span:
    first, last = await asyncio.gather(finder.find(view, OFFSET_EARLIEST), finder.find(view, OFFSET_LATEST))
    from_start = committed if committed is not None else await _place(finder, view, start, first, last, first)
    to_end = await _place(finder, view, end, first, last, last)
    for offset in (from_start, to_end):
        if not first <= offset <= last:
            raise OffsetOutOfRange(
                f"{view} holds offsets {first} to {last}, not {offset}", start=first, end=last
            )
    moments = committed is not None or isinstance(start, datetime) or isinstance(end, datetime)
    if to_end < from_start and not moments:  # of these, either may come before the other
        raise ConfigError(f"{view} is to be read from offset {from_start} to {to_end}")
    return Span(view.topic, view.topic_id, view.index, from_start, max(to_end, from_start))


async def _place(
    finder: OffsetFinder, view: PartitionView, where: Where, first: int, last: int, otherwise: int
) -> int:
    if isinstance(where, Mapping):
        where = where.get((view.topic, view.index), otherwise)
    if where == "earliest":
        return first
    if where == "latest":
        return last
    if isinstance(where, datetime):
        return min(await finder.since(view, to_ms(where)), last)
    if isinstance(where, bool) or not isinstance(where, int):
        raise ConfigError(
            f"{where!r} is neither 'earliest' nor 'latest', an offset, a datetime, nor a dict of offsets by "
            "(topic, partition)"
        )
    return where


# -- sizes ---------------------------------------------------------------------------------------------------


async def weigh(cluster: ClusterClient, spans: Sequence[Span], isolation: str) -> list[Span]:
    """The same spans, with what their records take."""
    return await asyncio.gather(*(_weigh_one(cluster, each, isolation) for each in spans))


async def _weigh_one(cluster: ClusterClient, span: Span, isolation: str) -> Span:
    if span.start >= span.end:
        return span
    view = await cluster.partition(span.topic, span.partition, timeout=LOOKUP_TIMEOUT_S)
    found = await fetch(cluster, view, span.start, -1, ISOLATIONS[isolation], SAMPLE_BYTES)
    log_bytes, memory_bytes = measure(found)
    return replace(span, log_bytes=log_bytes, memory_bytes=memory_bytes)


# -- cutting -------------------------------------------------------------------------------------------------


def cut(spans: Sequence[Span], parallelism: int) -> list[list[Span]]:
    """Share spans among about ``parallelism`` tasks of about the same size, in order.

    Large spans are cut into equal pieces, small ones share a task. Always the same for the same arguments.
    """
    total = sum(each.size for each in spans)
    share = max(total / max(parallelism, 1), TASK_BYTES_MIN)
    tasks: list[list[Span]] = []
    open_size = 0.0
    """Of the last task."""
    for span in spans:
        for piece in _pieces(span, share):
            if not tasks or open_size + piece.size > share:
                tasks.append([])
                open_size = 0.0
            tasks[-1].append(piece)
            open_size += piece.size
    return tasks


def _pieces(span: Span, share: float) -> list[Span]:
    records = span.end - span.start
    if records == 0:
        return []
    # a little above a share is no reason for another piece
    count = max(1, min(records, round(span.size / share)))
    edges = [span.start + records * each // count for each in range(count + 1)]
    return [replace(span, start=low, end=high) for low, high in pairwise(edges)]
