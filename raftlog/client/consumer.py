"""The consumer's core: an assignment, and handing out what the fetcher brought.

It never blocks and never waits: :meth:`ConsumerCore.take` gives what is there, and
    :meth:`ConsumerCore.when_arrived` tells
when looking again may be worth it. Decoding and deserialising happen in ``take``, on the caller's thread.

A partition's position is the offset after the last record handed out. What was fetched or decoded ahead never
counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from threading import Lock
from typing import Any, Final

from raftlog.client.assigned import UNKNOWN_TERM, AssignedPartition
from raftlog.client.cluster import ClusterClient, partition_of
from raftlog.client.fetcher import LOOKUP_TIMEOUT_S, RESETS, Fetcher
from raftlog.client.metadata import TopicView
from raftlog.config import ConsumerConfig, validate_topic_name
from raftlog.errors import (
    Closed,
    ConfigError,
    DeserializationError,
    LogTruncated,
    OffsetOutOfRange,
    RaftlogError,
    UnknownPartition,
)
from raftlog.net.rpc import OFFSET_EARLIEST, OFFSET_LATEST
from raftlog.record.codec import decode_batch
from raftlog.record.frame import FRAME_HEADER_BYTES, FrameKind, iter_frames
from raftlog.record.types import Record, TopicPartition

log = logging.getLogger("raftlog.client")

Place = TopicPartition | tuple[str, int]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class ConsumerCore:
    """One consumer.

    Args:
        cluster: whose loop everything asynchronous runs on.
        config: its settings.
        topics: read all partitions of these, unless ``config.assign`` names partitions.
        loop: the cluster's.
        call_soon: the loop's ``call_soon``, or ``call_soon_threadsafe`` where another thread polls.

    Raises:
        ConfigError: neither topics nor partitions, or both; or a setting that this release does not carry
            out.
    """

    def __init__(
        self,
        cluster: ClusterClient,
        config: ConsumerConfig,
        topics: Sequence[str],
        loop: asyncio.AbstractEventLoop,
        call_soon: Callable[..., Any],
    ) -> None:
        if config.group is not None:
            raise ConfigError(
                "group: this release has no consumer groups; without one a consumer reads all partitions of "
                "its topics, or those of assign="
            )
        if bool(topics) == bool(config.assign):
            raise ConfigError("a consumer reads either topics or the partitions of assign=")
        self.topics = tuple(validate_topic_name(topic) for topic in topics)
        self.config = config
        self.closed = False
        self.started = False
        self._cluster = cluster
        self._deserializer = config.value_deserializer
        self._lock = Lock()
        self._partitions: dict[TopicPartition, AssignedPartition] = {}
        self._turns: deque[AssignedPartition] = deque()
        self._current: AssignedPartition | None = None
        self._arrivals = 0
        self._waiting: deque[Callable[[], None]] = deque()
        self._fetcher = Fetcher(cluster, loop, config, self._lock, self._arrived, call_soon)

    # -- the loop --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Find the partitions to read, and begin to fetch.

        Raises:
            UnknownTopic, UnknownPartition, ConnectionLost, RequestTimeout.
        """
        if self.started:
            return
        reset = RESETS[self.config.auto_offset_reset]
        names = dict.fromkeys([*self.topics, *(each.topic for each in self.config.assign or ())])
        views: dict[str, TopicView] = {
            name: await self._cluster.topic(validate_topic_name(name), timeout=LOOKUP_TIMEOUT_S)
            for name in names
        }
        if self.config.assign:
            chosen = [partition_of(views[topic], index) for topic, index in dict.fromkeys(self.config.assign)]
        else:
            chosen = [view for name in names for view in views[name].partitions]
        for view in chosen:
            each = AssignedPartition(view, reset)
            self._partitions[each.name] = each
        self._turns = deque(self._partitions.values())
        self.started = True
        self._fetcher.assign(self._turns)

    async def close(self) -> None:
        """Stop; who waits for records is told."""
        self.closed = True
        self._fetcher.stop()
        self._arrived()

    def _arrived(self) -> None:
        with self._lock:
            self._arrivals += 1
            waiting, self._waiting = self._waiting, deque()
        for callback in waiting:
            callback()

    async def ends(self) -> dict[TopicPartition, int]:
        """The offset after the last committed record of each assigned partition, asked now."""
        return await self._offsets(self._partitions.values(), OFFSET_LATEST)

    async def _offsets(self, partitions: Iterable[AssignedPartition], what: int) -> dict[TopicPartition, int]:
        partitions = list(partitions)
        answers = await asyncio.gather(
            *(self._fetcher.offset(each.view, what, timeout=LOOKUP_TIMEOUT_S) for each in partitions)
        )
        return {each.name: answer.offset for each, answer in zip(partitions, answers, strict=True)}

    async def position(self, place: Place) -> int:
        """The offset of the next record to be handed out, looked up if need be."""
        each = self._find(place)
        while each.position is None:
            if each.error is not None:
                self._meet(each, each.error)
            if self.closed:
                raise Closed("the consumer is closed")
            arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            seen = self._arrivals
            self._fetcher.wake()
            if each.position is None:
                self.when_arrived(seen, partial(_settle, arrived))
                await arrived
        return each.position

    async def lag(self) -> dict[TopicPartition, int]:
        """How many records each assigned partition holds from its position on, asked now."""
        positions = {name: await self.position(name) for name in self._partitions}
        ends = await self.ends()
        return {name: max(ends[name] - position, 0) for name, position in positions.items()}

    async def seek_to_time(self, when: int | datetime, places: Sequence[Place]) -> None:
        """Go to the first record of that time or later; to the end where there is none."""
        timestamp_ms = to_ms(when)
        chosen = self._chosen(places)
        found = await asyncio.gather(*(self._first_since(each, timestamp_ms) for each in chosen))
        for each, offset in zip(chosen, found, strict=True):
            self._jump(each, offset)

    async def _first_since(self, each: AssignedPartition, timestamp_ms: int) -> int:
        """The broker's index knows batches; which record of the batch it is, is found by reading on from
        there."""
        answer = await self._fetcher.offset(each.view, timestamp_ms, timeout=LOOKUP_TIMEOUT_S)
        offset = answer.offset
        if offset < 0:
            return (await self._fetcher.offset(each.view, OFFSET_LATEST, timeout=LOOKUP_TIMEOUT_S)).offset
        while True:
            chunk = await self._fetcher.read_at(each.view, offset, timeout=LOOKUP_TIMEOUT_S)
            end = offset
            for header, at in iter_frames(chunk):
                if header.kind != FrameKind.BATCH:
                    continue
                batch = chunk[at + FRAME_HEADER_BYTES : at + header.length]
                for record in decode_batch(batch, *each.name, check=False):
                    if record.offset >= offset and record.timestamp_ms >= timestamp_ms:
                        return record.offset
                    end = max(end, record.offset + 1)
            if end == offset:
                return offset
            offset = end

    # -- the consumer's thread -------------------------------------------------------------------------------

    @property
    def arrivals(self) -> int:
        """Grows whenever something new may be there: read it before :meth:`take`."""
        return self._arrivals

    def when_arrived(self, seen: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` once when ``arrivals`` is, or grows, beyond ``seen``."""
        with self._lock:
            if self._arrivals == seen:
                self._waiting.append(callback)
                return
        callback()

    def take(self, records_max: int) -> list[Record]:
        """Up to ``records_max`` records that are there, and move the positions behind them.

        Raises:
            DeserializationError, CorruptFrame, CorruptBatch, OffsetOutOfRange, LogTruncated, UnknownTopic:
                after everything before it was handed out; the position stays.
            Closed: the consumer was closed.
        """
        if self.closed:
            raise Closed("the consumer is closed")
        taken: list[Record] = []
        for _ in range(len(self._turns)):
            each = self._turns[0]
            self._turns.rotate(-1)
            while len(taken) < records_max and self._fill(each, quiet=bool(taken)):
                end = each.cursor + min(each.available(), records_max - len(taken))
                if not self._hand_out(each, end, taken):
                    return taken
            if len(taken) >= records_max:
                break
        return taken

    def pop(self) -> Record | None:
        """The next record if one is there, as :meth:`take` of one: the fast way to iterate."""
        each = self._current
        if each is not None and each.cursor < len(each.decoded):
            record = each.decoded[each.cursor]
            if each.limit is None or record.offset < each.limit:
                made = record if self._deserializer is None else self._deserialized(record)
                each.cursor += 1
                each.position = record.offset + 1
                return made
        taken = self.take(1)
        self._current = self._turns[-1] if taken else None
        return taken[0] if taken else None

    def _fill(self, each: AssignedPartition, *, quiet: bool) -> bool:
        """Have decoded records of this partition at hand, if there are any; with ``quiet``, errors wait."""
        if each.paused or (each.limit is not None and (each.position or 0) >= each.limit):
            return False
        if each.cursor < len(each.decoded):
            return True
        before = each.buffered
        try:
            found = each.decode_next(self._lock)
        except RaftlogError as error:
            with self._lock:
                each.jump(each.position, each.reset)
                each.error = error
            found = False
        if each.buffered < before:
            self._fetcher.wake()
        if found:
            return each.available() > 0
        if each.error is not None and not quiet:
            self._meet(each, each.error)
        return False

    def _meet(self, each: AssignedPartition, error: Exception) -> None:
        """Everything before an error was handed out: raise it, unless the settings say how to go on."""
        reset = RESETS[self.config.auto_offset_reset]
        if isinstance(error, OffsetOutOfRange) and reset is not None:
            log.warning("%s: %s; going on at the %s record", each.view, error, self.config.auto_offset_reset)
            self._jump(each, None, reset)
            return
        if isinstance(error, LogTruncated) and reset is not None:
            log.warning("%s: %s; going on there", each.view, error.message)
            self._jump(each, error.offset)
            return
        # fetch again from the position, so that the next poll meets the error again, or not
        last_term = each.last_term if isinstance(error, LogTruncated) else UNKNOWN_TERM
        self._jump(each, each.position, each.reset, last_term=last_term)
        raise error.with_traceback(None)

    def _hand_out(self, each: AssignedPartition, end: int, taken: list[Record]) -> bool:
        """Move decoded records up to ``end`` into ``taken``; False when one does not deserialise and others
        go first."""
        if self._deserializer is None:
            taken += each.decoded[each.cursor : end]
            each.cursor = end
            each.position = each.decoded[end - 1].offset + 1
            return True
        while each.cursor < end:
            record = each.decoded[each.cursor]
            try:
                made = self._deserialized(record)
            except DeserializationError:
                if taken:
                    return False
                raise
            taken.append(made)
            each.cursor += 1
            each.position = record.offset + 1
        return True

    def _deserialized(self, record: Record) -> Record:
        if record.value is None:
            return record
        assert self._deserializer is not None, "called only where there is one"
        try:
            value = self._deserializer(record.value)
        except Exception as error:  # user code: whatever it raises is about this one record
            raise DeserializationError(
                f"cannot deserialise {record.topic}[{record.partition}] at offset {record.offset}: {error!r}",
                topic=record.topic,
                partition=record.partition,
                offset=record.offset,
            ) from error
        return Record(
            record.topic,
            record.partition,
            record.offset,
            record.timestamp_ms,
            record.key,
            value,
            record.headers,
        )

    # -- where -----------------------------------------------------------------------------------------------

    def assignment(self) -> list[TopicPartition]:
        """The partitions that are read, in order."""
        return sorted(self._partitions)

    def seek(self, place: Place, offset: int) -> None:
        """Go to an offset; whether it exists shows when it is fetched."""
        if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
            raise ConfigError(f"an offset to seek to is an integer from 0, not {offset!r}")
        self._jump(self._find(place), offset)

    def seek_to_beginning(self, places: Sequence[Place]) -> None:
        """Go to the first record there is, looked up when it is needed."""
        for each in self._chosen(places):
            self._jump(each, None, OFFSET_EARLIEST)

    def seek_to_end(self, places: Sequence[Place]) -> None:
        """Go behind the last record there is when it is looked up."""
        for each in self._chosen(places):
            self._jump(each, None, OFFSET_LATEST)

    def pause(self, places: Sequence[Place]) -> None:
        """Hand out nothing of these until they are resumed."""
        for each in self._chosen(places):
            each.paused = True
        self._current = None

    def resume(self, places: Sequence[Place]) -> None:
        """Go on with these."""
        for each in self._chosen(places):
            each.paused = False
        self._fetcher.wake()
        self._arrived()

    def limit(self, ends: Mapping[TopicPartition, int] | None) -> None:
        """Hand out nothing from these offsets on; None lifts all limits."""
        for name, each in self._partitions.items():
            each.limit = None if ends is None else ends.get(name)
        self._current = None
        self._fetcher.wake()

    def at_limits(self) -> bool:
        """Whether every partition has reached its limit."""
        return all(
            each.limit is not None and each.position is not None and each.position >= each.limit
            for each in self._partitions.values()
        )

    def _find(self, place: Place) -> AssignedPartition:
        each = self._partitions.get(TopicPartition(*place))
        if each is None:
            raise UnknownPartition(f"{place[0]}[{place[1]}] is not assigned to this consumer")
        return each

    def _chosen(self, places: Sequence[Place]) -> list[AssignedPartition]:
        return [self._find(place) for place in places] if places else list(self._partitions.values())

    def _jump(
        self,
        each: AssignedPartition,
        offset: int | None,
        reset: int | None = None,
        *,
        last_term: int = UNKNOWN_TERM,
    ) -> None:
        with self._lock:
            each.jump(offset, reset, last_term=last_term)
        self._current = None
        self._fetcher.wake()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


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
