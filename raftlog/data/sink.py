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
nobody's computation. Sending may take 15 minutes (brokers allow no more). The batches wait in Ray's object
store, which moves to disk what does not fit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import ray
import ray.data
from ray.data.block import BlockAccessor
from ray.data.datasource import Datasink

from raftlog.client import attach
from raftlog.client.group_admin import Memberless
from raftlog.client.offsets import LOOKUP_TIMEOUT_S
from raftlog.config import validate_topic_name
from raftlog.data.encoding import ANY_PARTITION, Layout, encode, encode_table
from raftlog.data.spans import Offsets
from raftlog.errors import CommitInDoubt, ConfigError, InvalidTopic, RaftlogError, StaleOffsets
from raftlog.record.types import TopicPartition

if TYPE_CHECKING:
    import pyarrow as pa

    from raftlog.client.cluster import Bootstrap
    from raftlog.client.log import Log
    from raftlog.client.metadata import TopicView
    from raftlog.client.sync_producer import Producer

Commit: TypeAlias = tuple[str, Mapping[Any, int]]
"""A group, and the offsets it has processed."""

TRANSACTION_TIMEOUT_MS: Final = 15 * 60_000
DEFAULT_MESSAGE_BYTES_MAX: Final = 8 * 1024 * 1024
FETCHED_AHEAD: Final = 3
"""Blocks on their way from other nodes while one is sent."""
_ID_LENGTH_MAX: Final = 249


def write_topic(
    ds: ray.data.Dataset,
    topic: str,
    *,
    value: str,
    key: str | None = None,
    partition: str | None = None,
    semantics: Literal["exactly-once", "at-least-once"] = "exactly-once",
    commit: Commit | None = None,
    compression: str = "lz4",
    transaction_timeout_ms: int = TRANSACTION_TIMEOUT_MS,
    log: Log | None = None,
) -> None:
    """See :func:`raftlog.write_topic`."""
    log = log or attach.connect()
    layout = _layout(log, topic, value, key, partition, compression)
    if commit is not None:
        commit = _check_commit(commit)
        check_unmoved(log, *commit)  # the answer may be another one at the end, but then the work was in vain
    if semantics == "at-least-once":
        with _ours_out():
            ds.write_datasink(TopicDatasink(log.bootstrap, layout))
        if commit is not None:
            log.commit_offsets(*commit)
    elif semantics == "exactly-once":
        blocks = _encoded(ds, layout)
        if blocks or commit is not None:
            _send_all(log, layout, blocks, commit, transaction_timeout_ms)
    else:
        raise ConfigError(
            f"semantics={semantics!r}: a Dataset is written 'exactly-once' or 'at-least-once', for Ray may "
            "run a task more than once"
        )


def _layout(
    log: Log, topic: str, value: str, key: str | None, partition: str | None, compression: str
) -> Layout:
    runtime = log._connected()
    view: TopicView = runtime.io.call(
        runtime.cluster.topic(validate_topic_name(topic), timeout=LOOKUP_TIMEOUT_S)
    )
    if view.internal:
        raise InvalidTopic(f"topic {topic!r} is internal: brokers alone write it")
    bytes_max = int(view.config.get("max_message_bytes", DEFAULT_MESSAGE_BYTES_MAX))
    return Layout(topic, len(view.partitions), bytes_max, value, key, partition, compression)


# -- the transaction -----------------------------------------------------------------------------------------


def _encoded(ds: ray.data.Dataset, layout: Layout) -> list[Any]:
    """References to what the tasks have made of the Dataset, in its order."""
    encoding = ds.map_batches(
        partial(encode_table, layout=layout), batch_size=None, batch_format="pyarrow", zero_copy_batch=True
    )
    options = encoding.context.execution_options
    before, options.preserve_order = options.preserve_order, True
    try:
        with _ours_out():
            made = encoding.materialize()
    finally:
        options.preserve_order = before
    return [ref for bundle in made.iter_internal_ref_bundles() for ref in bundle.block_refs]


def _send_all(
    log: Log, layout: Layout, blocks: list[Any], commit: Commit | None, transaction_timeout_ms: int
) -> None:
    with (
        _transactional_id(None if commit is None else commit[0]) as name,
        log.producer(transactional_id=name, transaction_timeout_ms=transaction_timeout_ms) as producer,
    ):
        if commit is not None:
            check_unmoved(log, *commit)
        txn = producer.transaction()
        try:
            with txn:
                for block in _fetched(blocks):
                    _send_block(producer, layout.topic, block)
                if commit is not None:
                    _stage(log, producer, *commit)
        except CommitInDoubt:
            txn.commit()  # once more: the coordinator answers the second time as it would have the first


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
        producer._send_encoded(topic, where, batch.as_py(), records)


def _stage(log: Log, producer: Producer, group: str, offsets: Mapping[Any, int]) -> None:
    runtime = log._connected()
    positions = {name: (offset, -1) for name, offset in offsets.items()}
    runtime.io.call(producer._manager.send_offsets(Memberless(runtime.cluster, group), positions))


def check_unmoved(log: Log, group: str, offsets: Mapping[Any, int]) -> None:
    """Raise StaleOffsets unless the group is where these records were read from, or has never been
    anywhere."""
    runtime = log._connected()
    committed = runtime.io.call(runtime.groups.committed(group, list(offsets), LOOKUP_TIMEOUT_S))
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


# -- transactional ids ---------------------------------------------------------------------------------------

_free: list[str] = []
_free_lock = threading.Lock()


@contextlib.contextmanager
def _transactional_id(group: str | None) -> Iterator[str]:
    """One per group; without a group one that nobody else has, and that the next write of this process uses
    again: coordinators remember each for a week."""
    if group is not None:
        name = f"write_topic:{group}"
        yield name if len(name) <= _ID_LENGTH_MAX else hashlib.sha256(name.encode()).hexdigest()
        return
    with _free_lock:
        name = _free.pop() if _free else f"write_topic-{uuid.uuid4().hex}"
    try:
        yield name
    finally:
        with _free_lock:
            _free.append(name)


def _after_fork_in_child() -> None:
    global _free_lock
    _free_lock = threading.Lock()  # another thread may have held it
    _free.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


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
