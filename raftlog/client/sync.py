"""The blocking consumer. What it does is in ``consumer``; here is how a thread waits for it.

Decoding and looking at what is there happen on the caller's thread; only I/O is the I/O thread's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Sized
from contextlib import closing
from datetime import datetime
from functools import partial
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, Self, TypeVar

from raftlog.client.cluster import ClusterClient
from raftlog.client.consumer import ARROW_RECORDS, ConsumerCore, begins_of
from raftlog.client.group import Seat
from raftlog.client.handle import Deadline, Handle, OneUser, block_until
from raftlog.client.io_thread import IoThread
from raftlog.client.offsets import LOOKUP_TIMEOUT_S, Offset, Place
from raftlog.client.sharing import Callback, Step
from raftlog.config import ConsumerConfig
from raftlog.errors import Closed, ConcurrentUse
from raftlog.record.types import Record, TopicPartition

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T", bound=Sized)

FOREVER_S: Final = 3600.0
"""A poll without a deadline looks up this often, so that Ctrl-C is never held up for good."""


class Consumer(Handle):
    """Reads records. Belongs to one thread at a time; ``close`` may come from any. Made by
    :meth:`raftlog.Log.consumer`."""

    def __init__(
        self,
        owner: object,
        io: IoThread,
        cluster: ClusterClient,
        topics: Sequence[str],
        config: ConsumerConfig,
    ) -> None:
        super().__init__("consumer")
        self._owner = owner  # a Log that nobody holds closes its connections
        self._io = io
        self._core = ConsumerCore(cluster, config, topics, io.loop, io.loop.call_soon_threadsafe)
        self._use = OneUser()
        io.call(self._core.start())

    def poll(self, timeout: float = 1.0, max_records: int | None = None) -> list[Record]:
        """The next records: as soon as there are any, or none after ``timeout`` seconds.

        In a group, partitions that come or go do so here.

        Args:
            timeout: seconds; 0 only looks.
            max_records: at most so many; default ``max_poll_records``.

        Raises:
            Whatever a rebalance callback raises.
            StaleMember: with auto commit: these records went to another member.
            DeserializationError: of the record at the position; seek past it.
            OffsetOutOfRange, LogTruncated: the log no longer has what the position names.
            CorruptBatch, CorruptFrame, UnknownTopic: what was read is damaged, or its topic was deleted.
            ConcurrentUse: another thread is using this consumer.
            Closed: it was closed, perhaps by another thread just now.
        """
        records_max = self._core.config.max_poll_records if max_records is None else max_records
        return self._poll(timeout, records_max, self._core.take, begins_of)

    def poll_arrow(self, timeout: float = 1.0, max_records: int = ARROW_RECORDS) -> pa.Table:
        """As :meth:`poll`, as a ``pyarrow.Table``: columns key, value (binary), topic, partition, offset,
        timestamp (milliseconds, UTC; null where a producer gave none) and headers (lists of pairs).

        Takes little time per record where batches are large. The table has a chunk for each batch that was
        read, and no rows when nothing came. Needs ``raftlog[data]``. May take turns with :meth:`poll`.

        Args:
            timeout: seconds; 0 only looks.
            max_records: at most so many rows.

        Raises:
            ConfigError: pyarrow is not installed, or the consumer has a ``value_deserializer``: columns hold
                values as bytes.
            And as :meth:`poll`.
        """
        return self._poll(timeout, max_records, self._core.take_columns, attrgetter("begins")).table()

    def _poll(
        self,
        timeout: float,
        records_max: int,
        take: Callable[[int], T],
        begins: Callable[[T], Mapping[TopicPartition, int]],
    ) -> T:
        """What ``take`` gives, as soon as there is any."""
        deadline = Deadline(timeout)
        self._check_open()
        core = self._core
        with self._use:
            while True:
                seen = core.arrivals
                self._rebalance()
                taken = take(records_max)
                if taken and core.config.enable_auto_commit:
                    self._io.call(core.in_group.save_before(partial(begins, taken)))
                if taken or deadline.over():
                    return taken
                block_until(partial(core.when_arrived, seen), deadline.left())

    def _rebalance(self) -> None:
        sharing = self._core.sharing
        if sharing is not None and sharing.is_due:
            self._go(sharing.rebalance())

    def _go(self, steps: Generator[Step]) -> None:
        with closing(steps):
            for step in steps:
                if isinstance(step, Callback):
                    step()
                else:
                    self._io.call(step)

    def __iter__(self) -> Iterator[Record]:
        """Record after record, for ever; ends when the consumer is closed."""
        return self.records()

    def records(
        self, until: Literal["end"] | None = None, idle_timeout: float | None = None
    ) -> Iterator[Record]:
        """Record after record.

        Args:
            until: "end": stop where the partitions end now (asked once, at the first record; of those that
                come later, when they come). None: go on for ever.
            idle_timeout: stop when nothing has come for so many seconds.

        Raises:
            As :meth:`poll`; when another thread closes the consumer, the iteration just ends.
        """
        self._check_open()
        with self._use:  # of this thread for as long as the iteration lasts
            yield from self._records(until, idle_timeout)

    def _records(self, until: Literal["end"] | None, idle_timeout: float | None) -> Iterator[Record]:
        core, sharing = self._core, self._core.sharing
        member = None if sharing is None else sharing.member
        claims = sharing if core.config.enable_auto_commit else None
        if until is not None:
            core.limit(self._io.call(core.ends()))
        try:
            while True:
                record = core.pop() if member is None or not member.disturbed else None
                if record is None:
                    record = self._wait_and_pop(until is not None, idle_timeout)
                    if record is None:
                        return
                if claims is not None and (claim := claims.claim(record)) is not None:
                    self._io.call(claim)
                yield record
        except Closed:
            return
        finally:
            if until is not None:
                core.limit(None)

    def _wait_and_pop(self, limited: bool, idle_timeout: float | None) -> Record | None:
        core = self._core
        deadline = Deadline(idle_timeout)
        while True:
            seen = core.arrivals
            self._rebalance()
            record = core.pop()
            if record is not None or (limited and core.at_limits()) or deadline.over():
                return record
            left = deadline.left()
            block_until(partial(core.when_arrived, seen), FOREVER_S if left is None else left)

    def assignment(self) -> list[TopicPartition]:
        """The partitions that are read, in order; in a group: those this member has now."""
        return self._core.assignment()

    def position(self, partition: Place) -> int:
        """The offset of the next record to be handed out. What is fetched ahead does not count."""
        self._check_open()
        with self._use:
            return self._io.call(self._core.position(partition))

    def seek(self, partition: Place, offset: int) -> None:
        """Go to an offset; whether it exists shows at the next poll (see ``auto_offset_reset``)."""
        self._check_open()
        with self._use:
            self._core.seek(partition, offset)

    def seek_to_beginning(self, *partitions: Place) -> None:
        """Go to the first record there is, of these partitions or of all."""
        self._check_open()
        with self._use:
            self._core.seek_to_beginning(partitions)

    def seek_to_end(self, *partitions: Place) -> None:
        """Go behind the last record there is, of these partitions or of all: only new ones will come.

        Where that is, is looked up when it is needed; ``position`` does so.
        """
        self._check_open()
        with self._use:
            self._core.seek_to_end(partitions)

    def seek_to_time(self, timestamp: int | datetime, *partitions: Place) -> None:
        """Go to the first record of that time or later, of these partitions or of all; to the end if there is
        none.

        Args:
            timestamp: milliseconds since the epoch, or an aware datetime.
        """
        self._check_open()
        with self._use:
            self._io.call(self._core.seek_to_time(timestamp, partitions))

    def seek_to_committed(self, *partitions: Place) -> None:
        """Go back to what the group has committed, of these partitions or of all: what was handed out since
        comes again.

        Raises:
            ConfigError: the consumer has no group.
        """
        self._check_open()
        with self._use:
            self._core.in_group.seek_to_committed(partitions)

    def commit(
        self, offsets: Mapping[Place, Offset] | None = None, timeout: float = LOOKUP_TIMEOUT_S
    ) -> None:
        """Commit, and return when it is durable.

        Args:
            offsets: partition -> offset of the next record to read, or (that, metadata). None: everything
                that was handed out, and nothing that is fetched ahead; then partitions that the group wants
                back are given up.
            timeout: seconds.

        Raises:
            StaleMember: partitions went to another member, which reads from what was committed before. Drop
                what you have of them, and go on polling.
            ConfigError: the consumer has no group, or no such offset exists.
            RequestTimeout, ConnectionLost: it may have been committed; commit again.
        """
        self._check_open()
        with self._use:
            self._io.call(self._core.in_group.commit(offsets, timeout))
            if offsets is None:
                self._rebalance()

    def committed(self, partition: Place) -> int | None:
        """The offset that the group has committed of a partition, its own or another member's; None: none.

        Raises:
            UnstableOffsets: a transaction holds it back for too long.
        """
        self._check_open()
        with self._use:
            found = self._io.call(self._core.in_group.committed(partition))
            return None if found is None else found.offset

    def committed_metadata(self, partition: Place) -> str | None:
        """The metadata that was committed with that offset; None: there is no offset."""
        self._check_open()
        with self._use:
            found = self._io.call(self._core.in_group.committed(partition))
            return None if found is None else found.metadata

    @property
    def member(self) -> Seat:
        """Who this consumer is in its group now; ConfigError if it has none."""
        return self._core.in_group.member.seat

    def positions_for_commit(self) -> dict[TopicPartition, tuple[int, int]]:
        """What a transaction commits (see ``Transaction.send_offsets``): of each partition the position, and
        the leader epoch of the record before it.

        Raises:
            StaleMember: partitions went to another member.
            ConfigError: the consumer has no group.
        """
        self._check_open()
        with self._use:
            return self._core.in_group.positions()

    def pause(self, *partitions: Place) -> None:
        """Hand out nothing of these partitions, or of all, until they are resumed."""
        self._check_open()
        with self._use:
            self._core.pause(partitions)

    def resume(self, *partitions: Place) -> None:
        """Go on with these partitions, or with all."""
        self._check_open()
        with self._use:
            self._core.resume(partitions)

    def lag(self) -> dict[TopicPartition, int]:
        """How many records each partition holds from the position on, asked now."""
        self._check_open()
        with self._use:
            return self._io.call(self._core.lag())

    def close(self) -> None:
        """Stop reading, and leave the group; from any thread. A poll that waits raises Closed, an iteration
        ends. Positions are committed here only with auto commit.

        Raises:
            Whatever ``on_revoked`` raises; it is closed all the same. The callback is left out where another
            thread is just using the consumer.
        """
        try:
            if self._usable and self._core.sharing is not None:
                self._part(self._core.sharing.part())
        finally:
            if self._begin_close():
                self._io.call(self._core.close())

    def _part(self, steps: Generator[Step]) -> None:
        try:
            with self._use:
                self._go(steps)
        except ConcurrentUse:
            steps.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_usable", False) and hasattr(self, "_use"):
            self._io.spawn(self._core.close())
