"""Consume, transform, produce, commit: the loop of ``log.process``, in one process.

::

    poll ---> fn(record), one after another ---> write ---> commit ---> poll
      ^            | raises: again, then            |
      |            | a dead letter                  | something fails
      +------------------- back to what is committed

With *exactly-once* writing and committing are one transaction: outputs, dead letters and the group's
positions. It begins only when ``fn`` has answered for the whole batch. So user code that takes its time keeps
no transaction open, and where it raises nothing has to be undone. With *at-least-once* everything is
acknowledged before the positions are committed; with *at-most-once* the positions were committed by ``poll``.

The loop is asynchronous; how ``fn`` is called is given to it: in a thread of its own for the blocking Log, in
place for ``raftlog.aio``.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeAlias

from raftlog.client.admin import CALL_TIMEOUT_S, Admin
from raftlog.client.aio_consumer import Consumer
from raftlog.client.aio_producer import Producer, Transaction
from raftlog.client.cluster import ClusterClient
from raftlog.client.producer import DEFAULT_MESSAGE_BYTES_MAX
from raftlog.client.retry import BACKOFF
from raftlog.config import ConsumerConfig, ProcessConfig, ProducerConfig, validate_topic_name
from raftlog.errors import CommitInDoubt, ConfigError, DeliveryFailed, RaftlogError
from raftlog.record.batch import BATCH_BYTES_LIMIT
from raftlog.record.rows import as_bytes
from raftlog.record.types import Headers, Record, TopicPartition

log = logging.getLogger("raftlog.client")

POLL_S: Final = 0.25
"""How often the loop looks whether it is to stop, or at the end."""
LOOKUP_S: Final = 30.0
ERROR_CHARS_MAX: Final = 1_000
"""Of what a function has raised, in a dead letter: some name the whole record."""
DEAD_BYTES: Final = 16 << 10
"""By how much a dead letter may be larger than its record."""


@dataclass(frozen=True, slots=True)
class Output:
    """A record that comes of another one.

    Args:
        value: bytes; None is a tombstone.
        key: bytes.
        topic: default: the sink.
        headers: pairs of (str, bytes or None).
        partition: default: the key's.
        timestamp_ms: milliseconds since the epoch; default: now.
    """

    value: Any
    key: Any = None
    topic: str | None = None
    headers: Headers = ()
    partition: int | None = None
    timestamp_ms: int | None = None


Outputs: TypeAlias = "bytes | Output | Iterable[bytes | Output] | None"
Function: TypeAlias = Callable[[Record], Outputs]
Called: TypeAlias = list[Output] | Exception
"""What the function gave for a record, or raised."""
Call: TypeAlias = Callable[[Sequence[Record]], Awaitable[Sequence[Called]]]


@dataclass(slots=True)
class ProcessStats:
    """What a loop has done so far."""

    records_in: int = 0
    """Consumed, and done with."""
    records_out: int = 0
    """Written, dead letters not counted."""
    dead_letters: int = 0
    retries: int = 0
    """Calls of the function that were repeats because it had raised."""
    rewinds: int = 0
    """Batches that were begun again from the committed positions."""


@dataclass(slots=True)
class _Task:
    """One record, and what comes of it."""

    record: Record
    outputs: list[Output] = field(default_factory=list)
    is_dead: bool = False
    is_sent: bool = False
    """Handed to the producer; where there is no transaction, that is not undone."""


class _Refused(NamedTuple):
    """One of the outputs of a record can never be written."""

    task: _Task
    error: RaftlogError


@dataclass(frozen=True, slots=True)
class Work:
    """What a loop is to do. Pickles, if the settings do."""

    source: tuple[str, ...]
    sink: str | None
    group: str
    config: ProcessConfig
    name: str
    """The transactional id: unique among the loops that run at the same time."""
    until_end: bool

    def consumer_config(self, **callbacks: Any) -> ConsumerConfig:
        """Of the loop's consumer."""
        config = self.config
        settings = {"semantics": config.semantics, "max_poll_records": config.batch_records}
        return ConsumerConfig(**{**settings, **config.consumer, **callbacks, "group": self.group})

    def producer_config(self) -> ProducerConfig:
        """Of the loop's producer."""
        config = self.config
        settings: dict[str, Any] = {"semantics": config.semantics, **config.producer}
        if config.semantics == "exactly-once":
            settings["transactional_id"] = self.name
            settings["transaction_timeout_ms"] = config.transaction_timeout_ms
        return ProducerConfig(**settings)


def describe_work(
    source: str | Sequence[str],
    sink: str | None,
    group: str,
    until: str | None,
    settings: Mapping[str, Any],
) -> Work:
    """The arguments of ``log.process``, checked.

    Raises:
        ConfigError, InvalidTopic.
    """
    if until not in (None, "end"):
        raise ConfigError(f"until={until!r} is neither None nor 'end'")
    topics = (source,) if isinstance(source, str) else tuple(source)
    for topic in (*topics, *(() if sink is None else (sink,))):
        validate_topic_name(topic)
    config = ProcessConfig(**settings)
    name = config.transactional_id or f"{group[:200]}-{uuid.uuid4().hex}"
    work = Work(topics, sink, group, config, name, until == "end")
    work.consumer_config()
    work.producer_config()
    return work


class ProcessLoop:
    """The loop.

    Args:
        cluster: whose loop everything runs on.
        work: what it is to do.
        call: calls the user's function for records, and returns as soon as it has raised for one.
    """

    def __init__(self, cluster: ClusterClient, work: Work, call: Call) -> None:
        self.stats = ProcessStats()
        self._cluster = cluster
        self._work = work
        self._config = work.config
        self._call = call
        self._stopping = asyncio.Event()
        self._gone: set[TopicPartition] = set()
        """Partitions that went away since the last look."""
        self._dead_topics: set[str] = set()

    def stop(self) -> None:
        """End after the batch that is under way; on the loop."""
        self._stopping.set()

    async def run(self) -> ProcessStats:
        """Go on until stopped, or until everything that was there at the beginning is done.

        Raises:
            RaftlogError: that no repetition mends: another worker of the same name, a topic that is gone.
        """
        async with AsyncExitStack() as stack:
            work, cluster = self._work, self._cluster
            if work.sink is not None:
                await cluster.topic(work.sink, timeout=LOOKUP_S)
            producer = await stack.enter_async_context(Producer(cluster, work.producer_config()))
            config = work.consumer_config(on_revoked=self._gone.update, on_lost=self._gone.update)
            consumer = await stack.enter_async_context(Consumer(cluster, work.source, config))
            core = consumer._core
            if work.until_end:
                core.limit(await core.ends())
            failures = 0
            while not self._stopping.is_set():
                try:
                    records = await self._gather(consumer)
                    if records:
                        await self._process(producer, consumer, records)
                    elif work.until_end and core.at_limits():
                        break
                except RaftlogError as error:
                    failures += 1
                    await self._rewind(consumer, error, failures)
                else:
                    failures = 0
        return self.stats

    async def _gather(self, consumer: Consumer) -> list[Record]:
        """A batch: what is there, and what comes within ``batch_ms``."""
        config = self._config
        records = await self._poll(consumer, POLL_S, config.batch_records)
        clock = asyncio.get_running_loop().time
        deadline = clock() + config.batch_ms / 1000
        while records and len(records) < config.batch_records and clock() < deadline:
            if sum(len(each.value or b"") for each in records) >= config.batch_bytes:
                break
            more = await self._poll(consumer, deadline - clock(), config.batch_records - len(records))
            if self._gone and config.semantics != "at-most-once":  # their next owner begins with these
                records = [each for each in records if (each.topic, each.partition) not in self._gone]
            records += more
        return records

    async def _poll(self, consumer: Consumer, timeout: float, records_max: int) -> list[Record]:
        self._gone.clear()
        return await consumer.poll(max(timeout, 0.0), records_max)

    async def _rewind(self, consumer: Consumer, error: RaftlogError, failures: int) -> None:
        """Begin again from the committed positions, if that may help."""
        if error.fatal or not (error.retriable or error.abortable or isinstance(error, DeliveryFailed)):
            raise error
        log.info("group %s: a batch is done again: %s", self._work.group, error)
        self.stats.rewinds += 1
        await asyncio.sleep(BACKOFF.delay(failures, self._cluster.seams.random))
        if self._config.semantics != "at-most-once":
            await consumer.seek_to_committed()

    # -- from records to outputs -----------------------------------------------------------------------------

    async def _process(self, producer: Producer, consumer: Consumer, records: list[Record]) -> None:
        tasks = [_Task(record) for record in records]
        self._step("polled")
        await self._transform(tasks)
        self._step("transformed")
        await self._write(producer, consumer, tasks)
        self._step("committed")
        stats = self.stats
        stats.records_in += len(tasks)
        stats.dead_letters += sum(task.is_dead for task in tasks)
        stats.records_out += sum(len(task.outputs) for task in tasks if not task.is_dead)

    def _step(self, name: str) -> None:
        if self._config.on_step is not None:
            self._config.on_step(name)

    async def _transform(self, tasks: list[_Task]) -> None:
        """Call the function for every record, again where it raises, until it has done so too often."""
        done, attempts = 0, 0
        while done < len(tasks):
            for called in await self._call([task.record for task in tasks[done:]]):
                task = tasks[done]
                if isinstance(called, Exception):
                    attempts += 1
                    if attempts <= self._config.retries:
                        break
                    self._bury(task, called, attempts)
                else:
                    task.outputs = called
                done, attempts = done + 1, 0
            if attempts:
                self.stats.retries += 1
                await asyncio.sleep(BACKOFF.delay(attempts, self._cluster.seams.random))

    def _bury(self, task: _Task, error: Exception, attempts: int) -> None:
        """What comes of the record is a dead letter: the record, and headers that say why."""
        record = task.record
        log.warning(
            "group %s: %s[%d] offset %d becomes a dead letter: %r",
            self._work.group,
            record.topic,
            record.partition,
            record.offset,
            error,
        )
        why = {
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "group": self._work.group,
            "attempts": attempts,
            "error": f"{type(error).__name__}: {error}"[:ERROR_CHARS_MAX],
        }
        headers = (
            *record.headers,
            *((f"dead.{name}", str(value).encode(errors="backslashreplace")) for name, value in why.items()),
        )
        topic = self._config.dead_letters or f"{record.topic}.dead"
        task.is_dead = True
        task.outputs = [Output(record.value, record.key, topic, headers, timestamp_ms=record.timestamp_ms)]

    # -- from outputs to the log -----------------------------------------------------------------------------

    async def _write(self, producer: Producer, consumer: Consumer, tasks: list[_Task]) -> None:
        """Write all outputs, and commit; a record whose outputs cannot be written becomes a dead letter."""
        write = self._in_transaction if self._config.semantics == "exactly-once" else self._apart
        while True:
            await self._make_dead_topics(tasks)
            refused = await write(producer, consumer, tasks)
            if refused is None:
                return
            self._bury(*refused, attempts=1)

    async def _in_transaction(
        self, producer: Producer, consumer: Consumer, tasks: list[_Task]
    ) -> _Refused | None:
        """Outputs and positions, all or nothing."""
        txn = producer.transaction()
        try:
            async with txn:
                refused = await self._send(producer, tasks)
                if refused is not None:
                    await txn.abort()
                    return refused
                self._step("sent")
                # nobody polls before the commit: there is no need to wait for it
                producer._manager.stage(consumer.member, consumer.positions_for_commit())
        except CommitInDoubt:
            await self._settle(txn)
        return None

    async def _apart(self, producer: Producer, consumer: Consumer, tasks: list[_Task]) -> _Refused | None:
        """First the outputs, then the positions, unless these were committed before."""
        left = [task for task in tasks if not task.is_sent]
        refused = await self._send(producer, left)
        if refused is not None:
            return refused
        await producer.flush()
        self._step("sent")
        if self._config.semantics == "at-least-once":
            await consumer.commit()
        return None

    async def _settle(self, txn: Transaction) -> None:
        """Ask until it is known whether the transaction was committed."""
        while True:
            try:
                await txn.commit()
            except CommitInDoubt as error:
                log.warning("group %s: %s", self._work.group, error)
            else:
                return

    async def _send(self, producer: Producer, tasks: list[_Task]) -> _Refused | None:
        """Send everything; the first record of which something cannot be sent, ever, and why."""
        for task in tasks:
            try:
                for each in task.outputs:
                    topic = each.topic or self._work.sink
                    if topic is None:
                        raise ConfigError("an Output without a topic, and there is no sink")
                    await producer.send(
                        topic, each.value, each.key, each.headers, each.partition, each.timestamp_ms
                    )
            except RaftlogError as error:
                if task.is_dead or error.retriable or error.abortable or error.fatal:
                    raise
                return _Refused(task, error)
            task.is_sent = True
        return None

    async def _make_dead_topics(self, tasks: list[_Task]) -> None:
        for name in {task.outputs[0].topic for task in tasks if task.is_dead}:
            if name is not None and name not in self._dead_topics:
                config = {"max_message_bytes": await self._dead_bytes_max()}
                await Admin(self._cluster).create_topic(name, 1, "auto", config, True, CALL_TIMEOUT_S)
                self._dead_topics.add(name)

    async def _dead_bytes_max(self) -> int:
        """What a topic of dead letters has to take: the largest record of any source, and why it is there."""
        sizes = []
        for name in self._work.source:
            topic = await self._cluster.topic(name, timeout=LOOKUP_S)
            sizes.append(int(topic.config.get("max_message_bytes", DEFAULT_MESSAGE_BYTES_MAX)))
        return min(max(sizes) + DEAD_BYTES, BATCH_BYTES_LIMIT)


def outputs_of(made: Any, record: Record) -> list[Output]:
    """What a function returned, as a list; bytes get the record's key.

    Raises:
        TypeError: it is none of what a function may return.
    """
    if made is None:
        return []
    if isinstance(made, Output):
        return [made]
    if isinstance(made, bytes | bytearray | memoryview):
        return [Output(as_bytes(made, "value"), record.key)]
    if isinstance(made, Iterable) and not isinstance(made, str):
        return [output for each in made for output in outputs_of(each, record)]
    raise TypeError(f"it gave a {type(made).__name__}: neither None, bytes, an Output nor several of these")


def call_all(function: Function, records: Sequence[Record]) -> list[Called]:
    """Call the function for records, until it raises for one."""
    called: list[Called] = []
    for record in records:
        try:
            called.append(outputs_of(function(record), record))
        except Exception as error:  # noqa: BLE001  user code: whatever it raises is about this one record
            called.append(error)
            break
    return called


async def await_all(function: Callable[[Record], Any], records: Sequence[Record]) -> list[Called]:
    """The same with a function that may be asynchronous."""
    called: list[Called] = []
    for record in records:
        try:
            made = function(record)
            if inspect.isawaitable(made):
                made = await made
            called.append(outputs_of(made, record))
        except Exception as error:  # noqa: BLE001  user code: whatever it raises is about this one record
            called.append(error)
            break
    return called
