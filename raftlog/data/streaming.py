"""``stream``: a topic without an end as one Dataset after another.

Where the stream is, the group knows: nothing else is kept. A batch whose output was written with
``commit=(group, offsets_of(batch))`` is committed by that, exactly once. If it was not when the loop asks for
the next batch, the stream commits it: at least once, for sinks that are no topics. A loop that is left
commits nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Literal

import ray.data

from raftlog.client import attach
from raftlog.client.offsets import ISOLATIONS, LOOKUP_TIMEOUT_S
from raftlog.data.groups import committed_offsets
from raftlog.data.reading import arrival
from raftlog.data.sink import check_unmoved
from raftlog.data.source import Isolation, TopicDatasource, check_columns, check_isolation, dataset_of
from raftlog.data.spans import Offsets, Span, Where, find_spans, offsets_of_spans, weigh
from raftlog.errors import ConfigError

if TYPE_CHECKING:
    from raftlog.client.log import Log

IDLE_S: Final = 5.0
"""How long a stream that has nothing waits for a record before it looks for partitions that are new."""
FILLING_S: Final = 0.25
"""How often it looks whether a batch that is not full has become so, at most."""


class DatasetStream(Iterator[ray.data.Dataset]):
    """Micro-batches; made by :func:`raftlog.stream`. For one thread, but for :meth:`stop`."""

    def __init__(
        self,
        log: Log,
        topics: Sequence[str],
        group: str,
        start: Where,
        columns: list[str],
        isolation: Isolation,
        limits: tuple[int, int, float],
        until: Literal["end"] | None,
        options: dict[str, Any],
    ) -> None:
        self._log = log
        self._runtime = log._connected()
        self._topics = list(topics)
        self._group = group
        self._columns = columns
        self._isolation = isolation
        self._rows_max, self._bytes_max, self._seconds_max = limits
        self._options = options
        self._stopped = threading.Event()
        self._waiting: Future[None] | None = None
        """For a record to come."""
        self._given: Offsets | None = None
        """Of the batch that was handed out last, until it is known to be committed."""
        spans = self._resolve(start, group)
        self._positions = {each.name: each.start for each in spans}
        self._last = {each.name: each.end for each in spans} if until == "end" else None
        """Where to end."""

    def stop(self) -> None:
        """No further batch, also where somebody waits for one; from any thread. The one in hand is not
        concerned."""
        self._stopped.set()
        waiting = self._waiting
        if waiting is not None:
            waiting.cancel()

    def __next__(self) -> ray.data.Dataset:
        self._settle()
        spans = self._wait()
        if spans is None:
            raise StopIteration
        self._given = offsets_of_spans(spans)
        self._positions = dict(self._given)
        source = TopicDatasource(self._log.bootstrap, spans, self._columns, self._isolation)
        return dataset_of(source, self._options)

    def _settle(self) -> None:
        """See to it that the batch in hand is committed.

        Raises:
            StaleOffsets: somebody else works for this group.
        """
        given, self._given = self._given, None
        if given is None:
            return
        if committed_offsets(self._log, self._group, list(given)) != given:
            check_unmoved(self._log, self._group, given)
            self._log.commit_offsets(self._group, given)

    # -- the next batch --------------------------------------------------------------------------------------

    def _wait(self) -> list[Span] | None:
        """What the next batch reads; None: the end."""
        since: float | None = None
        while not self._stopped.is_set():
            spans = self._due()
            rows = sum(each.end - each.start for each in spans)
            now = monotonic()
            if rows:
                since = since or now
                weighed = self._runtime.io.call(weigh(self._runtime.cluster, spans, self._isolation))
                full = rows >= self._rows_max or sum(each.size for each in weighed) >= self._bytes_max
                if full or self._last is not None or now - since >= self._seconds_max:
                    return limited(weighed, self._rows_max, self._bytes_max)
                self._stopped.wait(min(FILLING_S, self._seconds_max / 4))
            elif self._last is not None:
                return None
            else:
                self._idle(spans)
        return None

    def _idle(self, spans: Sequence[Span]) -> None:
        """Until there is a record behind one of these, or for a while."""
        waiting = self._waiting = asyncio.run_coroutine_threadsafe(
            self._arrival(spans), self._runtime.io.loop
        )
        try:
            if not self._stopped.is_set():  # whoever stops it from now on finds what to cancel
                waiting.result()
        except CancelledError:
            pass
        finally:
            waiting.cancel()
            self._waiting = None

    async def _arrival(self, spans: Sequence[Span]) -> None:
        cluster = self._runtime.cluster
        places = [
            (await cluster.partition(each.topic, each.partition, timeout=LOOKUP_TIMEOUT_S), each.end)
            for each in spans
        ]
        await arrival(cluster, places, ISOLATIONS[self._isolation], IDLE_S)

    def _resolve(self, start: Where, group: str | None = None) -> list[Span]:
        return find_spans(self._log, self._topics, start, "latest", group, self._isolation)

    def _due(self) -> list[Span]:
        """All that is there now and was not handed out."""
        spans = self._resolve(self._positions)
        if self._last is None:
            return spans
        return [
            replace(each, end=max(min(each.end, self._last.get(each.name, 0)), each.start)) for each in spans
        ]


def limited(spans: Sequence[Span], rows_max: int, bytes_max: int) -> list[Span]:
    """The beginnings of spans, in proportion, about as much as the limits allow; of each that is not empty at
    least one record."""
    rows = sum(each.end - each.start for each in spans)
    size = sum(each.size for each in spans)
    part = min(1.0, rows_max / max(rows, 1), bytes_max / max(size, 1))
    if part == 1.0:
        return list(spans)
    return [
        replace(each, end=min(each.end, each.start + max(int((each.end - each.start) * part), 1)))
        for each in spans
    ]


def stream(
    topics: str | Sequence[str],
    *,
    group: str,
    start: Where = "earliest",
    columns: Sequence[str] | None = None,
    isolation: Isolation = "read_committed",
    max_rows: int = 1_000_000,
    max_bytes: int = 256 * 1024 * 1024,
    max_seconds: float = 1.0,
    until: Literal["end"] | None = None,
    log: Log | None = None,
    **options: Any,
) -> DatasetStream:
    """See :func:`raftlog.stream`."""
    if max_rows < 1 or max_bytes < 1 or max_seconds <= 0:
        raise ConfigError(f"{max_rows=}, {max_bytes=} and {max_seconds=} are all above 0")
    if until not in (None, "end"):
        raise ConfigError(f"until={until!r} is neither None nor 'end'")
    return DatasetStream(
        log or attach.connect(),
        [topics] if isinstance(topics, str) else topics,
        group,
        start,
        check_columns(columns),
        check_isolation(isolation),
        (max_rows, max_bytes, max_seconds),
        until,
        options,
    )
