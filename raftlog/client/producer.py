"""The producer's core: checks, serialises and partitions records, and hands them to the accumulator.

It never blocks and never waits: where a record cannot be buffered at once it says what for
    (:class:`Pending`), and the
face that calls it, blocking or awaiting, waits in its own way and resumes.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from raftlog.client.accumulator import RECORD_OVERHEAD, PartitionQueue, ProducerBatch, size_of
from raftlog.client.cluster import ClusterClient, partition_of
from raftlog.client.delivery import Delivery
from raftlog.client.identities import Identities, OwnIdentity
from raftlog.client.metadata import TopicView
from raftlog.client.sender import Sender
from raftlog.client.transaction import TransactionManager
from raftlog.config import ProducerConfig, TopicConfig, validate_topic_name
from raftlog.errors import (
    BufferFull,
    DeliveryFailed,
    InvalidRecord,
    InvalidTopic,
    RecordTooLarge,
    SerializationError,
)
from raftlog.record.batch import BATCH_HEADER_BYTES, Unsealed, compression_named
from raftlog.record.partitioner import DefaultPartitioner
from raftlog.record.rows import ListRows, Rows, as_bytes
from raftlog.record.types import Headers
from raftlog.serde import Serializer

if TYPE_CHECKING:
    from raftlog.record.arrow import Column

FAILURES_LISTED_MAX: Final = 100
BULK_BYTES: Final = 1024 * 1024
"""Of the batches of ``send_batch``, uncompressed, unless the settings say otherwise: nobody waits for a
single record of them, and one batch costs brokers half of what four smaller ones do."""
DEFAULT_MESSAGE_BYTES_MAX: Final[int] = TopicConfig.model_fields["max_message_bytes"].default


class Route:
    """What the producer keeps of a topic."""

    __slots__ = ("bytes_max", "partitioner", "queues", "record_bytes_max", "topic")

    def __init__(self, topic: TopicView, partitioner: DefaultPartitioner, bytes_max: int) -> None:
        self.topic = topic
        self.record_bytes_max = bytes_max - BATCH_HEADER_BYTES
        self.partitioner = partitioner
        self.bytes_max = bytes_max
        self.queues: dict[int, PartitionQueue] = {}


class EncodedBatch(NamedTuple):
    """A batch of ``send_batch``, not buffered yet."""

    queue: PartitionQueue
    batch: Unsealed


class Pending:
    """A record that could not be buffered yet: its topic is unknown (``needs_topic``), or the buffer is
    full."""

    __slots__ = ("arguments", "needs_topic", "topic")

    def __init__(self, topic: str, needs_topic: bool, arguments: tuple[Any, ...]) -> None:
        self.topic = topic
        self.needs_topic = needs_topic
        self.arguments = arguments


class ProducerCore:
    """One producer.

    Args:
        cluster: whose loop everything runs on.
        config: its settings.
        loop: the cluster's.
        call_soon: the loop's ``call_soon``, or ``call_soon_threadsafe`` where other threads send.

    Raises:
        ConfigError: a setting that this release does not carry out.
    """

    def __init__(
        self,
        cluster: ClusterClient,
        config: ProducerConfig,
        loop: asyncio.AbstractEventLoop,
        call_soon: Callable[..., Any],
    ) -> None:
        self.config = config
        self._cluster = cluster
        self._random = cluster.seams.random
        self._wall_ms = cluster.seams.wall_ms
        self._compression = compression_named(config.compression)
        self._bulk_bytes = config.batch_bytes
        if "batch_bytes" not in config.model_fields_set:
            self._bulk_bytes = max(config.batch_bytes, BULK_BYTES)
        self._key_serializer = config.key_serializer
        self._value_serializer = config.value_serializer
        self._routes: dict[str, Route] = {}
        self.transactions: TransactionManager | None = None
        identities: Identities | None = None
        if config.transactional_id is not None:
            identities = self.transactions = TransactionManager(
                cluster,
                config.transactional_id,
                config.transaction_timeout_ms,
                config.delivery_timeout_ms / 1000,
            )
        elif config.acks != 0:
            identities = OwnIdentity(cluster, config.delivery_timeout_ms / 1000)
        self.sender = Sender(
            cluster,
            loop,
            identities=identities,
            linger_s=config.linger_ms / 1000,
            delivery_timeout_s=config.delivery_timeout_ms / 1000,
            request_timeout_s=config.request_timeout_ms / 1000,
            compression=self._compression,
            buffer_bytes=config.buffer_bytes,
            call_soon=call_soon,
        )
        self.accumulator = self.sender.accumulator
        if self.transactions is not None:
            self.transactions.attach(self.sender)
        self.max_block_s = config.max_block_ms / 1000

    # -- one record ------------------------------------------------------------------------------------------

    def send(
        self,
        topic: str,
        value: Any,
        key: Any,
        headers: Iterable[tuple[str, bytes | None]],
        partition: int | None,
        timestamp_ms: int | None,
    ) -> Delivery | Pending:
        """Check, serialise and buffer one record; from any thread.

        Raises:
            InvalidRecord, SerializationError, RecordTooLarge, InvalidTopic, UnknownPartition, Closed: nothing
                was buffered.
        """
        if key is not None:
            if self._key_serializer is not None:
                key = self._serialize(self._key_serializer, key, topic, "key")
            elif type(key) is not bytes:
                key = as_bytes(key, "key")
        if value is not None:
            if self._value_serializer is not None:
                value = self._serialize(self._value_serializer, value, topic, "value")
            elif type(value) is not bytes:
                value = as_bytes(value, "value")
        checked = check_headers(headers) if headers else ()
        if timestamp_ms is None:
            timestamp_ms = self._wall_ms()
        return self._buffer(topic, key, value, checked, partition, timestamp_ms)

    def resume(self, pending: Pending) -> Delivery | Pending:
        """Try again, after what it waited for may have come."""
        return self._buffer(pending.topic, *pending.arguments)

    def _buffer(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers,
        partition: int | None,
        timestamp_ms: int,
    ) -> Delivery | Pending:
        route = self._routes.get(topic)
        if route is None:
            return Pending(topic, True, (key, value, headers, partition, timestamp_ms))
        size = RECORD_OVERHEAD if value is None else RECORD_OVERHEAD + len(value)
        if key is not None:
            size += len(key)
        if headers:
            size += size_of(headers)
        if size > route.record_bytes_max:
            raise too_large(size, route.record_bytes_max, topic)
        count = len(route.topic.partitions)  # there may be more of them than a moment ago
        index = route.partitioner.partition(key, count) if partition is None else partition
        queue = route.queues.get(index)
        if queue is None:
            queue = self._queue(route, index)
        if queue.view.deleted:
            self._routes.pop(topic, None)
            return Pending(topic, True, (key, value, headers, partition, timestamp_ms))
        sticky = key is None and partition is None
        delivery = self.accumulator.append(queue, timestamp_ms, key, value, headers, size, sticky)
        if delivery is None and sticky:  # to the partitioner's next choice, or there is no room
            queue = self._queue(route, route.partitioner.partition(None, count))
            delivery = self.accumulator.append(queue, timestamp_ms, key, value, headers, size)
        return delivery or Pending(topic, False, (key, value, headers, partition, timestamp_ms))

    def _serialize(self, serializer: Callable[[Any], Any], given: Any, topic: str, what: str) -> bytes:
        try:
            made = serializer(given)
        except Exception as error:  # user code: whatever it raises is about this one record
            raise SerializationError(
                f"cannot serialise the {what} of a record for topic {topic!r}: {error!r}"
            ) from error
        return made if type(made) is bytes else as_bytes(made, what)

    # -- whole batches ---------------------------------------------------------------------------------------

    def knows(self, topic: str) -> bool:
        """Whether :meth:`load_topic` has been done for this topic, and it still exists."""
        route = self._routes.get(topic)
        if route is not None and any(view.deleted for view in route.topic.partitions):
            del self._routes[topic]
            return False
        return route is not None

    def split(
        self,
        topic: str,
        values: Sequence[Any] | Column,
        keys: Sequence[Any] | Column | None,
        partition: int | None,
        timestamp_ms: int | None,
    ) -> Iterator[EncodedBatch]:
        """Encode lists or columns of records into batches, one at a time as they are asked for.

        With keys, each record goes where its key belongs. Without, a batch is filled for the partitioner's
        choice, then one for its next choice.

        Raises:
            InvalidRecord, SerializationError, RecordTooLarge, UnknownPartition: before the first batch is
                made.
        """
        route = self._routes[topic]
        rows = self._rows(topic, values, keys, self._wall_ms() if timestamp_ms is None else timestamp_ms)
        if rows.longest + RECORD_OVERHEAD + BATCH_HEADER_BYTES > route.bytes_max:
            raise too_large(rows.longest, route.bytes_max, topic)
        if partition is not None:
            self._queue(route, partition)
        return self._encode(route, rows, partition)

    def _encode(self, route: Route, rows: Rows, partition: int | None) -> Iterator[EncodedBatch]:
        count, partitioner = len(route.topic.partitions), route.partitioner
        groups: Sequence[tuple[int | None, Rows]] | None = None
        if partition is None:
            groups = rows.by_partition(partitioner, count)
        for index, some in groups or [(partition, rows)]:
            start = 0
            while start < len(some):
                chosen = partitioner.partition(None, count) if index is None else index
                queue = self._queue(route, chosen)
                batch, start = some.pack(start, queue.bulk_bytes, self._compression)
                yield EncodedBatch(queue, batch)
                if index is None:
                    partitioner.on_new_batch(chosen, count)

    def _rows(self, topic: str, values: Any, keys: Any, timestamp_ms: int) -> Rows:
        value_serializer, key_serializer = self._value_serializer, self._key_serializer
        if not (is_column(values) or is_column(keys)):
            values = self._serialized(values, value_serializer, topic, "value")
            if keys is not None:
                keys = self._serialized(keys, key_serializer, topic, "key")
            return ListRows(values, keys, timestamp_ms)
        if value_serializer is not None or (keys is not None and key_serializer is not None):
            raise InvalidRecord("columns are sent as they are, and this producer has a serializer")
        arrow_rows = importlib.import_module("raftlog.record.arrow_rows")  # loads pyarrow
        rows: Rows = arrow_rows.ArrowRows(values, keys, timestamp_ms)
        return rows

    def _serialized(
        self, given: Sequence[Any], serializer: Serializer | None, topic: str, what: str
    ) -> Sequence[Any]:
        if serializer is None:
            return given
        return [None if each is None else self._serialize(serializer, each, topic, what) for each in given]

    def encoded_elsewhere(
        self, topic: str, partition: int | None, encoded: bytes, records: int
    ) -> EncodedBatch:
        """A batch that somebody else has encoded, under no identity.

        Args:
            partition: None: any will do.

        Raises:
            UnknownPartition, RecordTooLarge.
        """
        route = self._routes[topic]
        if len(encoded) > route.bytes_max:
            raise too_large(len(encoded), route.bytes_max, topic)
        batch = Unsealed.parse(encoded)
        assert batch.count == records, "who has encoded it knows how many records it holds"
        count = len(route.topic.partitions)
        chosen = route.partitioner.partition(None, count) if partition is None else partition
        if partition is None:
            route.partitioner.on_new_batch(chosen, count)
        return EncodedBatch(self._queue(route, chosen), batch)

    def buffer_batch(self, encoded: EncodedBatch) -> ProducerBatch | None:
        """Hand a batch to the accumulator; None if there is no room for it now."""
        return self.accumulator.add_batch(*encoded)

    # -- topics ----------------------------------------------------------------------------------------------

    async def load_topic(self, name: str, timeout: float) -> None:
        """Learn of a topic, so that records can be routed.

        Raises:
            InvalidTopic, UnknownTopic, ConnectionLost, RequestTimeout.
        """
        topic = await self._cluster.topic(validate_topic_name(name), timeout=timeout)
        if topic.internal:
            raise InvalidTopic(f"topic {name!r} is internal: brokers alone write it")
        self.knows(name)
        if name not in self._routes:
            bytes_max = int(topic.config.get("max_message_bytes", DEFAULT_MESSAGE_BYTES_MAX))
            self._routes[name] = Route(
                topic, DefaultPartitioner(self._random), min(bytes_max, self.config.buffer_bytes)
            )

    def _queue(self, route: Route, index: int) -> PartitionQueue:
        queue = route.queues.get(index)
        if queue is None:
            view = partition_of(route.topic, index)
            queue = PartitionQueue(
                view,
                route.topic,
                route.partitioner,
                min(self.config.batch_bytes, route.bytes_max),
                min(self._bulk_bytes, route.bytes_max),
                self.config.max_in_flight,
            )
            queue = route.queues.setdefault(index, queue)
        return queue

    # -- the end ---------------------------------------------------------------------------------------------

    def raise_failures(self) -> None:
        """Raise DeliveryFailed if deliveries failed that nobody has looked at; then they count as looked
        at. In a transaction: raise why it cannot commit, if so."""
        if self.transactions is not None:
            self.transactions.raise_failure()
        texts: list[str] = []
        count = 0
        failed = self.sender.failed
        while failed:
            try:
                batch = failed.popleft()
            except IndexError:  # another thread took it
                break
            ignored = batch.ignored()
            if ignored:
                text = f"{batch.topic}[{batch.partition}]: {type(batch.error).__name__}: {batch.error}"
                texts += [text] * min(ignored, FAILURES_LISTED_MAX - len(texts))
                count += ignored
        if count:
            raise DeliveryFailed(
                f"{count} of the records sent were not delivered, the first to {texts[0]}",
                failures=texts,
                count=count,
            )

    def buffer_full(self) -> BufferFull:
        """The error of a ``send`` that found no room in time."""
        return BufferFull(
            f"{self.accumulator.used} bytes of records are not acknowledged yet, and there was no room for "
            f"more within {self.max_block_s:g} s"
        )


def is_column(given: Any) -> bool:
    """Whether it is of Arrow or numpy; neither is imported to find out."""
    return type(given).__module__.partition(".")[0] in ("pyarrow", "numpy")


def check_headers(headers: Iterable[tuple[str, bytes | None]]) -> Headers:
    """Headers as a tuple of pairs; a dict's items are taken too.

    Raises:
        InvalidRecord: not pairs of (str, bytes or None).
    """
    pairs = headers.items() if isinstance(headers, dict) else headers
    try:
        checked = tuple(
            (name, None if value is None else as_bytes(value, "header value")) for name, value in pairs
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidRecord):
            raise
        raise InvalidRecord("headers are pairs of (str, bytes or None)") from error
    if not all(isinstance(name, str) for name, _ in checked):
        raise InvalidRecord("a header's name is a str")
    return checked


def too_large(size: int, bytes_max: int, topic: str) -> RecordTooLarge:
    """The error for a record of ``size`` bytes."""
    return RecordTooLarge(
        f"a record of {size} bytes is above the limit of {bytes_max} for topic {topic!r}", limit=bytes_max
    )
