"""The consumer's core: an assignment, and handing out what the fetcher brought.

It never blocks and never waits: :meth:`ConsumerCore.take` gives what is there, and
:meth:`ConsumerCore.when_arrived` tells when looking again may be worth it. Decoding and deserialising happen
in ``take``, on the caller's thread.

A partition's position is the offset after the last record handed out. What was fetched or decoded ahead never
counts. In a group partitions come and go, see ``sharing``.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from raftlog.client.assigned import COMMITTED, AssignedPartition, Decoder
from raftlog.client.cluster import ClusterClient, partition_of
from raftlog.client.fetcher import Fetcher
from raftlog.client.group import Membership
from raftlog.client.metadata import PartitionView, TopicView
from raftlog.client.offsets import LOOKUP_TIMEOUT_S, RESETS, UNKNOWN_TERM, Place, to_ms
from raftlog.client.sharing import Sharing
from raftlog.config import ConsumerConfig, validate_topic_name
from raftlog.errors import (
    Closed,
    ConfigError,
    DeserializationError,
    LogTruncated,
    OffsetOutOfRange,
    RaftlogError,
    UnknownPartition,
    UnknownTopic,
)
from raftlog.net.rpc import OFFSET_EARLIEST, OFFSET_LATEST
from raftlog.record.codec import decode_batch
from raftlog.record.types import Record, TopicPartition

if TYPE_CHECKING:
    from raftlog.client.columns import Pieces

log = logging.getLogger("raftlog.client")

ARROW_RECORDS: Final = 100_000
"""Rows of a table at most, unless the caller says otherwise."""
HandOut: TypeAlias = Callable[[AssignedPartition, int], bool]
"""Moves what is decoded of a partition up to an index to the caller; False: no more of anything now."""


class ConsumerCore:
    """One consumer.

    Args:
        cluster: whose loop everything asynchronous runs on.
        config: its settings.
        topics: read all partitions of these, or the group's share of them; none where ``config.assign``
            names partitions.
        loop: the cluster's.
        call_soon: the loop's ``call_soon``, or ``call_soon_threadsafe`` where another thread polls.

    Raises:
        ConfigError: neither topics nor partitions, or both.
    """

    def __init__(
        self,
        cluster: ClusterClient,
        config: ConsumerConfig,
        topics: Sequence[str],
        loop: asyncio.AbstractEventLoop,
        call_soon: Callable[..., Any],
    ) -> None:
        if bool(topics) == bool(config.assign):
            raise ConfigError("a consumer reads either topics or the partitions of assign=")
        self.topics = tuple(validate_topic_name(topic) for topic in topics)
        self.config = config
        self.closed = False
        self.started = False
        self._cluster = cluster
        self._deserializer = config.value_deserializer
        self._lock = Lock()
        self.partitions: dict[TopicPartition, AssignedPartition] = {}
        """What is read; the consumer's thread changes it."""
        self._turns: deque[AssignedPartition] = deque()
        self._current: AssignedPartition | None = None
        self._is_limited = False
        self._arrivals = 0
        self._waiting: deque[Callable[[], None]] = deque()
        self.sharing: Sharing | None = None
        """The consumer's part in its group, if it has one."""
        committed = None
        if config.group is not None:
            member = Membership(cluster, config, self.topics, loop, self._arrived, call_soon)
            self.sharing = Sharing(self, member)
            committed = member.committed
        self._fetcher = Fetcher(cluster, loop, config, self._lock, self._arrived, call_soon, committed)

    # -- the loop --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Find the partitions to read, and begin to fetch; or begin to join the group.

        Raises:
            UnknownTopic, UnknownPartition, ConnectionLost, RequestTimeout.
        """
        if self.started:
            return
        names = dict.fromkeys([*self.topics, *(each.topic for each in self.config.assign or ())])
        views: dict[str, TopicView] = {
            name: await self._cluster.topic(validate_topic_name(name), timeout=LOOKUP_TIMEOUT_S)
            for name in names
        }
        if self.sharing is not None:
            await self.sharing.member.start()
        elif self.config.assign:
            self.add(
                [partition_of(views[topic], index) for topic, index in dict.fromkeys(self.config.assign)]
            )
        else:
            self.add([view for name in names for view in views[name].partitions])
        self.fetch()
        self.started = True

    @property
    def in_group(self) -> Sharing:
        """The consumer's part in its group.

        Raises:
            ConfigError: it has none.
        """
        if self.sharing is None:
            raise ConfigError("offsets are committed by groups: this consumer has none, give it group=")
        return self.sharing

    async def close(self) -> None:
        """Stop, and leave the group; who waits for records is told."""
        self.closed = True
        self._fetcher.stop()
        self._arrived()
        if self.sharing is not None:
            await self.sharing.member.leave()

    def _arrived(self) -> None:
        with self._lock:
            self._arrivals += 1
            waiting, self._waiting = self._waiting, deque()
        for callback in waiting:
            callback()

    async def ends(self, places: Sequence[Place] = ()) -> dict[TopicPartition, int]:
        """The offset after the last record to be read of these partitions or of all, asked now."""
        chosen = self.chosen(places)
        found = await asyncio.gather(
            *(self._fetcher.offsets.find(each.view, OFFSET_LATEST) for each in chosen)
        )
        return {each.name: offset for each, offset in zip(chosen, found, strict=True)}

    async def position(self, place: Place) -> int:
        """The offset of the next record to be handed out, looked up if need be."""
        each = self.find(place)
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
        positions = {name: await self.position(name) for name in self.partitions}
        ends = await self.ends()
        return {name: max(ends[name] - position, 0) for name, position in positions.items()}

    async def seek_to_time(self, when: int | datetime, places: Sequence[Place]) -> None:
        """Go to the first record of that time or later; to the end where there is none."""
        timestamp_ms = to_ms(when)
        chosen = self.chosen(places)
        found = await asyncio.gather(
            *(self._fetcher.offsets.since(each.view, timestamp_ms) for each in chosen)
        )
        for each, offset in zip(chosen, found, strict=True):
            self.jump(each, offset)

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
        taken: list[Record] = []
        self._gather(records_max, decode_batch, partial(self._hand_out, taken))
        return taken

    def take_columns(self, records_max: int) -> Pieces:
        """The same as columns.

        Raises:
            ConfigError: pyarrow is not there, or the consumer has a deserializer.
            And as :meth:`take`.
        """
        columns = importlib.import_module("raftlog.client.columns")  # loads pyarrow
        if self._deserializer is not None:
            raise ConfigError("columns hold values as bytes: this consumer has a value_deserializer")
        pieces: Pieces = columns.Pieces()
        self._current = None
        self._gather(records_max, columns.decode, pieces.hand_out)
        return pieces

    def _gather(self, records_max: int, decode: Decoder, hand_out: HandOut) -> None:
        if self.closed:
            raise Closed("the consumer is closed")
        left = records_max
        for _ in range(len(self._turns)):
            each = self._turns[0]
            self._turns.rotate(-1)
            while left > 0 and self._fill(each, decode, quiet=left < records_max):
                end = each.cursor + min(each.available(), left)
                left -= end - each.cursor
                if not hand_out(each, end):
                    return
            if left <= 0:
                return

    def pop(self) -> Record | None:
        """The next record if one is there, as :meth:`take` of one: the fast way to iterate."""
        each = self._current
        if each is not None and each.cursor < len(each.decoded):
            record: Record = each.decoded[each.cursor]
            if each.limit is None or record.offset < each.limit:
                made = record if self._deserializer is None else self._deserialized(record)
                each.cursor += 1
                each.position = record.offset + 1
                return made
        taken = self.take(1)
        self._current = self._turns[-1] if taken else None
        return taken[0] if taken else None

    def _fill(self, each: AssignedPartition, decode: Decoder, *, quiet: bool) -> bool:
        """Have decoded records of this partition at hand, if there are any; with ``quiet``, errors wait."""
        if each.paused or (each.limit is not None and (each.position or 0) >= each.limit):
            return False
        before = each.buffered
        try:
            found = each.present(decode) or each.decode_next(self._lock, decode)
        except RaftlogError as error:
            with self._lock:
                each.jump(each.position, each.reset, last_term=each.position_term)
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
        if isinstance(error, UnknownTopic) and self.sharing is not None:
            return  # it was deleted: the group will take it away
        if isinstance(error, OffsetOutOfRange) and reset is not None:
            log.warning("%s: %s; going on at the %s record", each.view, error, self.config.auto_offset_reset)
            self.jump(each, None, reset)
            return
        if isinstance(error, LogTruncated) and reset is not None:
            log.warning("%s: %s; going on there", each.view, error.message)
            self.jump(each, error.offset)
            return
        # fetch again from the position, so that the next poll meets the error again, or not
        self.jump(each, each.position, each.reset, last_term=each.position_term)
        raise error.with_traceback(None)

    def _hand_out(self, taken: list[Record], each: AssignedPartition, end: int) -> bool:
        """Move decoded records up to ``end`` into ``taken``; False when one does not deserialise and others
        go first."""
        if self._deserializer is None:
            taken += each.decoded[each.cursor : end]
            each.move(end)
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
            each.move(each.cursor + 1)
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
        return sorted(self.partitions)

    def add(self, views: Iterable[PartitionView]) -> list[TopicPartition]:
        """Read these too, once :meth:`fetch` is called; returns their names, in order."""
        reset = COMMITTED if self.config.group is not None else RESETS[self.config.auto_offset_reset]
        names = []
        for view in views:
            each = AssignedPartition(view, reset)
            self.partitions[each.name] = each
            names.append(each.name)
        return sorted(names)

    def drop(self, partitions: Iterable[AssignedPartition]) -> None:
        """Read these no more."""
        for each in partitions:
            self.partitions.pop(each.name, None)
            with self._lock:
                each.jump(None)
        self.fetch()

    def fetch(self) -> None:
        """Fetch what is assigned now."""
        self._turns = deque(self.partitions.values())
        self._current = None
        self._fetcher.assign(self._turns)

    def seek(self, place: Place, offset: int) -> None:
        """Go to an offset; whether it exists shows when it is fetched."""
        if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
            raise ConfigError(f"an offset to seek to is an integer from 0, not {offset!r}")
        self.jump(self.find(place), offset)

    def seek_to_beginning(self, places: Sequence[Place]) -> None:
        """Go to the first record there is, looked up when it is needed."""
        for each in self.chosen(places):
            self.jump(each, None, OFFSET_EARLIEST)

    def seek_to_end(self, places: Sequence[Place]) -> None:
        """Go behind the last record there is when it is looked up."""
        for each in self.chosen(places):
            self.jump(each, None, OFFSET_LATEST)

    def pause(self, places: Sequence[Place]) -> None:
        """Hand out nothing of these until they are resumed."""
        for each in self.chosen(places):
            each.paused = True
        self._current = None

    def resume(self, places: Sequence[Place]) -> None:
        """Go on with these."""
        for each in self.chosen(places):
            each.paused = False
        self._fetcher.wake()
        self._arrived()

    @property
    def unlimited(self) -> list[TopicPartition]:
        """Partitions that have come while the others were limited."""
        if not self._is_limited:
            return []
        return [name for name, each in self.partitions.items() if each.limit is None]

    def limit(self, ends: Mapping[TopicPartition, int] | None) -> None:
        """Hand out nothing from these offsets on; None lifts all limits."""
        self._is_limited = ends is not None
        for name, each in self.partitions.items():
            each.limit = None if ends is None else ends.get(name, each.limit)
        self._current = None
        self._fetcher.wake()

    def at_limits(self) -> bool:
        """Whether every partition has reached its limit."""
        if self.sharing is not None and (not self.sharing.member.settled or self.sharing.member.disturbed):
            return False
        return all(
            each.limit is not None and each.position is not None and each.position >= each.limit
            for each in self.partitions.values()
        )

    def find(self, place: Place) -> AssignedPartition:
        """The partition of that name; UnknownPartition if it is not assigned."""
        each = self.partitions.get(TopicPartition(*place))
        if each is None:
            raise UnknownPartition(f"{place[0]}[{place[1]}] is not assigned to this consumer")
        return each

    async def view(self, place: Place) -> PartitionView:
        """A partition that need not be assigned.

        Raises:
            UnknownTopic, UnknownPartition, ConnectionLost, RequestTimeout.
        """
        return await self._cluster.partition(
            validate_topic_name(place[0]), place[1], timeout=LOOKUP_TIMEOUT_S
        )

    def chosen(self, places: Sequence[Place]) -> list[AssignedPartition]:
        """These, or all."""
        return [self.find(place) for place in places] if places else list(self.partitions.values())

    def jump(
        self,
        each: AssignedPartition,
        offset: int | None,
        reset: int | None = None,
        *,
        last_term: int = UNKNOWN_TERM,
    ) -> None:
        """Go on from elsewhere."""
        with self._lock:
            each.jump(offset, reset, last_term=last_term)
        self._current = None
        self._fetcher.wake()


def begins_of(records: Sequence[Record]) -> dict[TopicPartition, int]:
    """The first offset of each partition."""
    return {TopicPartition(each.topic, each.partition): each.offset for each in reversed(records)}


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
