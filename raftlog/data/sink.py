"""Topics as Ray Data writes them: ``write_topic``.

::

    tasks      rows -> batches, as values in the object store           (tried again, doubled: no matter)
    driver     all are there
                 -> open the transactional id: whoever had it is fenced, what it left open is aborted
                 -> is the group still where the records were read?      (else StaleOffsets)
                 -> send the batches, stage the offsets, commit          (one decision of one coordinator)

Why it is exactly once:

- *Of each task one result.* A task writes nothing. Ray may run it as often as it likes; the driver takes one
  value for each, and sends it once: the producer's sequences keep a batch that is sent again from counting
  twice.
- *All or nothing.* Until the commit is decided, nothing can be read; afterwards everything will be. Should
  the driver die before, the transaction is aborted when its time is over, or when the same group is written
  for again.
- *Nothing twice.* With ``commit=``, outputs and offsets are one transaction. All that write for a group use
  one transactional id, so after one has opened it nobody else can commit; that the group is still where the
  records were read from is looked at after that. So of two drivers that have read the same, only one commits.

A transaction is open while the batches are sent, not while they are made: readers of the topic wait for
nobody's computation. Sending may take 15 minutes, for brokers allow no more. The batches wait in Ray's object
store, which moves to disk what does not fit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import ray
import ray.data
from ray.data.block import BlockAccessor
from ray.data.datasource import Datasink

from raftlog.client import attach
from raftlog.client.group_admin import Memberless
from raftlog.client.offsets import LOOKUP_TIMEOUT_S
from raftlog.client.retry import retry
from raftlog.config import validate_topic_name
from raftlog.data.encoding import ANY_PARTITION, Layout, encode, encode_table
from raftlog.data.groups import committed_offsets, id_of_our_own, transactional_id
from raftlog.data.spans import Offsets
from raftlog.errors import (
    CommitInDoubt,
    ConfigError,
    InvalidTopic,
    RaftlogError,
    StaleOffsets,
    UnstableOffsets,
)
from raftlog.net.rpc_transactions import OpenTransactionsRequest
from raftlog.record.types import TopicPartition

if TYPE_CHECKING:
    import pyarrow as pa

    from raftlog.client.cluster import Bootstrap
    from raftlog.client.log import Log
    from raftlog.client.metadata import PartitionView, TopicView
    from raftlog.client.sync_producer import Producer
    from raftlog.client.window import Identity

logger = logging.getLogger("raftlog.data")

Commit: TypeAlias = tuple[str, Mapping[Any, int]]
"""A group, and the offsets it has processed."""

TIMEOUT_MS_MIN: Final = 60_000
TIMEOUT_MS_MAX: Final = 15 * 60_000
"""Brokers allow no more."""
SLOWEST_BYTES_PER_MS: Final = 4_000
"""What a transaction is given time for."""
DEFAULT_MESSAGE_BYTES_MAX: Final = 8 * 1024 * 1024
SEEN_TIMEOUT_S: Final = 30.0
FETCHED_AHEAD: Final = 3
"""Blocks on their way from other nodes while one is sent."""


def write_topic(
    ds: ray.data.Dataset,
    topic: str,
    *,
    value: str,
    key: str | None = None,
    partition: str | None = None,
    headers: str | None = None,
    timestamp: str | None = None,
    semantics: Literal["exactly-once", "at-least-once"] = "exactly-once",
    commit: Commit | None = None,
    compression: str = "lz4",
    transaction_timeout_ms: int | None = None,
    log: Log | None = None,
) -> None:
    """See :func:`raftlog.write_topic`."""
    log = log or attach.connect()
    layout = Layout(topic, *_room_of(log, topic), value, key, partition, compression, headers, timestamp)
    if commit is not None:
        commit = _check_commit(commit)
        check_unmoved(log, *commit)  # the answer may be another one at the end, but then the work was in vain
    if semantics == "at-least-once":
        with _ours_out():
            ds.write_datasink(TopicDatasink(log.bootstrap, layout))
        if commit is not None:
            log.commit_offsets(*commit)
    elif semantics == "exactly-once":
        blocks, size = _encoded(ds, layout)
        if blocks or commit is not None:
            _send_all(log, layout, blocks, commit, transaction_timeout_ms or timeout_for(size))
    else:
        raise ConfigError(
            f"semantics={semantics!r}: a Dataset is written 'exactly-once' or 'at-least-once', for Ray may "
            "run a task more than once"
        )


def _room_of(log: Log, topic: str) -> tuple[int, int]:
    """How many partitions a topic has, and how many bytes a batch of it may have."""
    runtime = log._connected()
    view: TopicView = runtime.io.call(
        runtime.cluster.topic(validate_topic_name(topic), timeout=LOOKUP_TIMEOUT_S)
    )
    if view.internal:
        raise InvalidTopic(f"topic {topic!r} is internal: brokers alone write it")
    return len(view.partitions), int(view.config.get("max_message_bytes", DEFAULT_MESSAGE_BYTES_MAX))


# -- the transaction -----------------------------------------------------------------------------------------


def _encoded(ds: ray.data.Dataset, layout: Layout) -> tuple[list[Any], int]:
    """References to what the tasks have made of the Dataset, in its order, and how many bytes that are."""
    encoding = ds.map_batches(
        partial(encode_table, layout=layout), batch_size=None, batch_format="pyarrow", zero_copy_batch=True
    )
    with (
        _set(encoding.context.execution_options, "preserve_order", True),
        _set(encoding.context, "raise_original_map_exception", True),
        _ours_out(),
    ):
        made = encoding.materialize()
    bundles = list(made.iter_internal_ref_bundles())
    refs = [ref for bundle in bundles for ref in bundle.block_refs]
    return refs, sum(bundle.size_bytes() for bundle in bundles)


def timeout_for(size: int) -> int:
    """How long a transaction of so many bytes may be open, in ms: should this process die, readers wait so
    long."""
    return min(TIMEOUT_MS_MIN + size // SLOWEST_BYTES_PER_MS, TIMEOUT_MS_MAX)


@contextlib.contextmanager
def _set(options: Any, name: str, value: bool) -> Iterator[None]:
    """An option of Ray's, for a while."""
    before = getattr(options, name)
    setattr(options, name, value)
    try:
        yield
    finally:
        setattr(options, name, before)


def _send_all(
    log: Log, layout: Layout, blocks: list[Any], commit: Commit | None, transaction_timeout_ms: int
) -> None:
    with (
        id_of_our_own() if commit is None else nullcontext(transactional_id(commit[0])) as name,
        log.producer(transactional_id=name, transaction_timeout_ms=transaction_timeout_ms) as producer,
    ):
        if commit is not None:
            check_unmoved(log, *commit)
        txn = producer.transaction()
        try:
            with txn:
                identity = producer._manager._identity
                for block in _fetched(blocks):
                    _send_block(producer, layout.topic, block)
                if commit is not None:
                    _stage(log, producer, *commit)
        except CommitInDoubt:
            txn.commit()  # once more: the coordinator answers the second time as it would have the first
        _wait_until_seen(log, layout.topic, identity)


def _fetched(blocks: list[Any]) -> Iterator[pa.Table]:
    for number, ref in enumerate(blocks):
        ray.wait(blocks[number : number + FETCHED_AHEAD], timeout=0)  # begins to fetch them
        yield ray.get(ref)
        blocks[number] = None  # a block that was sent may go


def _send_block(producer: Producer, topic: str, block: pa.Table) -> None:
    if not block.num_rows:
        return  # also one without columns: Ray makes it where a task had no rows
    rows = zip(
        block.column("partition").to_pylist(),
        block.column("records").to_pylist(),
        block.column("batch"),
        strict=True,
    )
    for partition, records, batch in rows:
        where = None if partition == ANY_PARTITION else partition
        encoded: Any = memoryview(batch.as_buffer())  # where Ray has put it: nothing is copied
        producer._send_encoded(topic, where, encoded, records)


def _stage(log: Log, producer: Producer, group: str, offsets: Mapping[Any, int]) -> None:
    runtime = log._connected()
    positions = {name: (offset, -1) for name, offset in offsets.items()}
    runtime.io.call(producer._manager.send_offsets(Memberless(runtime.cluster, group), positions))


def _wait_until_seen(log: Log, topic: str, identity: Identity) -> None:
    """Wait until readers of the topic see what was committed: whoever writes and then reads expects that."""
    cluster = log._connected().cluster

    async def ended(view: PartitionView) -> None:
        request = OpenTransactionsRequest(view.topic_id, view.index)

        async def look() -> None:
            answer, _ = await cluster.call_leader(view, request, timeout=SEEN_TIMEOUT_S)
            if any((row.producer_id, row.epoch) == identity for row in answer.open):
                raise UnstableOffsets(f"{view} was not told of the commit yet")

        deadline = asyncio.get_running_loop().time() + SEEN_TIMEOUT_S
        await retry(look, random=cluster.seams.random, deadline=deadline)

    async def all_ended() -> None:
        views = (await cluster.topic(topic, timeout=SEEN_TIMEOUT_S)).partitions
        await asyncio.gather(*(ended(view) for view in views))

    try:
        log._connected().io.call(all_ended())
    except RaftlogError as error:
        logger.info("what was written to %r is committed, and not seen everywhere yet: %s", topic, error)


def check_unmoved(log: Log, group: str, offsets: Mapping[Any, int]) -> None:
    """Raise StaleOffsets unless the group is where these records were read from, or has never been
    anywhere."""
    committed = committed_offsets(log, group, list(offsets))
    starts = offsets.starts if isinstance(offsets, Offsets) else {}
    for name, end in offsets.items():
        position = committed.get(name)
        start = starts.get(name)
        if position is None or position == start:
            continue
        if start is not None or position > end:
            raise StaleOffsets(
                f"group {group!r} is at offset {position} of {name.topic}[{name.partition}], and these are "
                f"the records from {start} to {end}"
            )


def _check_commit(commit: Commit) -> Commit:
    if not isinstance(commit, tuple) or len(commit) != 2 or not isinstance(commit[1], Mapping):
        raise ConfigError(f"commit is a pair of a group and offsets (see offsets_of), not {commit!r}")
    group, offsets = commit
    if isinstance(offsets, Offsets):
        return group, offsets
    return group, {TopicPartition(*place): offset for place, offset in offsets.items()}


# -- at least once -------------------------------------------------------------------------------------------


class TopicDatasink(Datasink[int]):
    """Tasks write by themselves: what one wrote before it failed stays, and its next attempt writes it
    again.

    Args:
        bootstrap: the cluster.
        layout: what becomes a record.
    """

    def __init__(self, bootstrap: Bootstrap, layout: Layout) -> None:
        self._bootstrap = bootstrap
        self._layout = layout

    def write(self, blocks: Iterable[Any], ctx: Any) -> int:
        """What a write task does; returns how many records it wrote."""
        written = 0
        with attach.log_of(self._bootstrap).producer() as producer:
            for block in blocks:
                accessor = BlockAccessor.for_block(block)
                if not accessor.num_rows():
                    continue
                for partition, records, encoded in encode(accessor.to_arrow(), self._layout):
                    where = None if partition == ANY_PARTITION else partition
                    producer._send_encoded(self._layout.topic, where, encoded, records)
                    written += records
        return written


@contextlib.contextmanager
def _ours_out() -> Iterator[None]:
    """What a task of ours raised is raised as it was, not wrapped in Ray's errors."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, RaftlogError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        raise cause from error
