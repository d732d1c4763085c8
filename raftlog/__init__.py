"""raftlog: a replicated, durable log that lives inside a Ray cluster.

::

    import raftlog

    log = raftlog.start()                                    # or raftlog.connect()
    log.create_topic("orders", partitions=6, exist_ok=True)

    with log.producer() as producer:
        delivery = producer.send("orders", b"value", key=b"key")
        print(delivery.result().offset)

    with log.consumer("orders") as consumer:
        for record in consumer.records(until="end"):
            print(record.offset, record.value)

This module is the public API and nothing else; ``raftlog.aio`` is the same with ``await``. What it offers is
loaded when it is first used: importing raftlog is quick, and loads no Ray.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ray.data import Dataset

    from raftlog import aio, config, errors, serde, testing
    from raftlog.client.delivery import BatchDelivery, Delivery
    from raftlog.client.log import Log
    from raftlog.client.process import Output, ProcessStats
    from raftlog.client.processing import Processing
    from raftlog.client.sync import Consumer
    from raftlog.client.sync_producer import Producer, Transaction
    from raftlog.config import Transport
    from raftlog.data.sink import Commit
    from raftlog.data.source import Isolation
    from raftlog.data.spans import Offsets, Where
    from raftlog.data.streaming import DatasetStream
    from raftlog.errors import RaftlogError
    from raftlog.record.types import BatchRange, Record, RecordMetadata, TopicPartition

__all__ = [
    "BatchDelivery",
    "BatchRange",
    "Consumer",
    "Delivery",
    "Log",
    "Output",
    "ProcessStats",
    "Processing",
    "Producer",
    "RaftlogError",
    "Record",
    "RecordMetadata",
    "TopicPartition",
    "Transaction",
    "__version__",
    "aio",
    "config",
    "connect",
    "errors",
    "offsets_of",
    "read_topic",
    "serde",
    "shutdown",
    "start",
    "stream",
    "testing",
    "write_topic",
]

_FROM = {
    "BatchDelivery": "raftlog.client.delivery",
    "BatchRange": "raftlog.record.types",
    "Consumer": "raftlog.client.sync",
    "Delivery": "raftlog.client.delivery",
    "Log": "raftlog.client.log",
    "Output": "raftlog.client.process",
    "ProcessStats": "raftlog.client.process",
    "Processing": "raftlog.client.processing",
    "Producer": "raftlog.client.sync_producer",
    "RaftlogError": "raftlog.errors",
    "Record": "raftlog.record.types",
    "RecordMetadata": "raftlog.record.types",
    "TopicPartition": "raftlog.record.types",
    "Transaction": "raftlog.client.sync_producer",
}
_SUBMODULES = frozenset({"aio", "config", "errors", "serde", "testing"})


def start(
    name: str = "default",
    brokers: int | None = None,
    data_dir: str | Path | None = None,
    ephemeral: bool = False,
    brokers_per_node: int = 1,
    replace_after: float = 30.0,
) -> Log:
    """Start a cluster on Ray, recover it from its data, or attach to it if it runs.

    Ray is initialised if it is not: the Ray cluster that runs, or else one of this process. A cluster that
    runs keeps what it was started with; a warning says so where something else is asked for.

    Args:
        name: of the cluster.
        brokers: how many there are; default: one on every node of the Ray cluster, also on those that are
            added later.
        data_dir: where brokers keep their data, on every node (``~`` and ``$VARIABLES`` are the node's own);
            default: the environment's RAFTLOG_DATA_DIR, or the user's data folder.
        ephemeral: keep the data in a temporary folder that goes with the cluster.
        brokers_per_node: for nodes with many cores.
        replace_after: seconds that a broker may be away before others get copies of what it holds; at once
            where its node was drained.

    Raises:
        DataDirError, ConfigError, IncompatibleVersion: why it cannot be started, and what to do.
    """
    from raftlog.client import attach

    return attach.start(name, brokers, data_dir, ephemeral, brokers_per_node, replace_after)


def connect(name: str | None = None, timeout: float = 30.0, transport: Transport | None = None) -> Log:
    """Attach to a cluster that runs. Never starts Ray; the same Log is returned until it is closed.

    Args:
        name: of the cluster; default: the environment's RAFTLOG_CLUSTER, or "default".
        timeout: seconds.
        transport: how bytes reach the brokers. "streams": to their ports. "actor": inside calls of their
            actors, for clients that Ray's calls get through from, and nothing else does; slower (see
            docs/PERFORMANCE.md). "auto": streams if a port answers, or else "actor"; the Log's ``transport``
            says which it is. Default: the environment's RAFTLOG_TRANSPORT, or "streams".

    Raises:
        NotRunning: no Ray, or no cluster of that name on it.
        ConfigError: there is no such transport.
        ConnectionLost: ("auto") neither leads to a broker.
    """
    from raftlog.client import attach

    return attach.connect(name, timeout, transport)


def shutdown(name: str = "default", force: bool = False) -> None:
    """Stop a cluster's brokers. Its data stays, unless it was started as ephemeral.

    Args:
        name: of the cluster.
        force: even though other processes are connected.

    Raises:
        NotRunning: no such cluster.
        ClusterInUse: other processes are connected; it names them.
    """
    from raftlog.client import attach

    attach.shutdown(name, force)


# -- Ray Data (the extra ``data``) ---------------------------------------------------------------------------


def read_topic(
    topics: str | Sequence[str],
    *,
    start: Where = "earliest",
    end: Where = "latest",
    group: str | None = None,
    columns: Sequence[str] | None = None,
    isolation: Isolation = "read_committed",
    log: Log | None = None,
    **options: Any,
) -> Dataset:
    """A Ray Dataset of what is in topics now. Nothing is read yet, but what will be is fixed: as often as the
    Dataset is run, and its tasks are tried again, it reads the same records.

    Its columns: ``key`` and ``value`` (bytes), ``topic``, ``partition``, ``offset``, ``timestamp`` (UTC,
    milliseconds), ``headers`` (a list of pairs of ``key`` and ``value``).

    Args:
        topics: a name, or several.
        start: where to begin: "earliest", an offset, an aware datetime (the first record of that time or
            later), or offsets: {(topic, partition): offset}, where the other partitions begin at their
            earliest.
        end: where to stop: "latest", or what ``start`` may be; the record there is not read any more.
        group: begin where this group is, and at ``start`` where it has never been. See :func:`offsets_of`.
        columns: those to read; None: all.
        isolation: "read_committed" leaves out what aborted transactions wrote, and ends where the first open
            one begins.
        log: the cluster; None: the one that :func:`connect` finds.
        options: of ``ray.data.read_datasource``, as ``override_num_blocks`` or ``num_cpus``.

    Raises:
        OffsetOutOfRange: a partition does not hold the offsets asked for (any more).
        UnknownTopic, ConfigError, NotRunning, ConnectionLost, RequestTimeout.
    """
    from raftlog.data import source

    return source.read_topic(
        topics,
        start=start,
        end=end,
        group=group,
        columns=columns,
        isolation=isolation,
        log=log,
        **options,
    )


def offsets_of(ds: Dataset) -> Offsets:
    """How far a Dataset reads its topics: what a group commits when it was processed.

    Args:
        ds: what :func:`read_topic` or :func:`stream` gave, or what was made of it; not materialized. What
            ``limit`` or ``filter`` leave out counts as read.

    Returns:
        {(topic, partition): offset after the last record}, for ``write_topic(…, commit=(group, offsets))`` or
        ``log.commit_offsets(group, offsets)``.

    Raises:
        ConfigError: it reads no topic, or one twice and to different offsets.
    """
    from raftlog.data import source

    return source.offsets_of(ds)


def write_topic(
    ds: Dataset,
    topic: str,
    *,
    value: str,
    key: str | None = None,
    partition: str | None = None,
    headers: str | None = None,
    timestamp: str | None = None,
    semantics: Literal["exactly-once", "at-least-once"] = "exactly-once",
    commit: Commit | None = None,
    compression: Literal["none", "lz4", "zstd"] = "lz4",
    transaction_timeout_ms: int | None = None,
    log: Log | None = None,
) -> None:
    """Run a Dataset and write its rows to a topic, each as a record; all of them or, if this raises, none.

    Exactly once, whatever Ray runs again: tasks encode, and this process sends what they have made of it in
    one transaction when all are done. Records of a key, and those with a ``partition``, keep their order.
    "at-least-once" has the tasks write by themselves, as soon as they can: faster where many nodes write
    more than one process can send.

    Args:
        topic: must exist.
        value: column of the values: bytes or text; null is a tombstone.
        key: column of the keys; null or None: no key.
        partition: column of the partitions; None: by key, and any without.
        headers: column of the headers, as :func:`read_topic` has it: lists of structs of ``key`` and
            ``value``; or maps. Null or None: no headers.
        timestamp: column of the timestamps: Arrow's of any unit, or milliseconds since the epoch; null or
            None: the time at which the row is encoded.
        semantics: see above.
        commit: (group, offsets): commit these offsets of a group without members with it, in the same
            transaction; at least once: afterwards.
        compression: of the batches.
        transaction_timeout_ms: sending may take so long, at most 15 minutes; None: by the size, a minute and
            another for each 240 MB. Should this process die meanwhile, readers of the topic wait for so long,
            or until the group is written for again.
        log: the cluster; None: the one that :func:`connect` finds.

    Raises:
        StaleOffsets: the group is not where the Dataset was read from any more. Nothing was written.
        TransactionAborted, TransactionTimedOut, ProducerFenced: nothing was written; another write for the
            same group has begun, or it took too long.
        CommitInDoubt: nobody answered for minutes. With ``commit=``, where the group is tells.
        GroupNotEmpty: the group has members, which commit by themselves.
        InvalidRecord, RecordTooLarge, UnknownPartition: about a row; nothing was written.
        UnknownTopic, ConfigError, NotRunning, ConnectionLost, RequestTimeout.
    """
    from raftlog.data import sink

    sink.write_topic(
        ds,
        topic,
        value=value,
        key=key,
        partition=partition,
        headers=headers,
        timestamp=timestamp,
        semantics=semantics,
        commit=commit,
        compression=compression,
        transaction_timeout_ms=transaction_timeout_ms,
        log=log,
    )


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
    """Topics without an end, as one Dataset after another; begins where the group is::

        for batch in raftlog.stream("orders", group="enrich"):
            raftlog.write_topic(
                batch.map_batches(enrich),
                "enriched",
                value="value",
                commit=("enrich", raftlog.offsets_of(batch)),
            )

    A batch that was written so counts exactly once. One that was not committed when the next is asked for, is
    committed then: at least once, for sinks that are no topics. After a stop, a crash or an exception, the
    next stream of the group goes on behind the last batch that was committed.

    Args:
        group: whose position it is. It must not have members, and one stream at a time.
        start: where to begin where the group has never been, as in :func:`read_topic`.
        max_rows: offsets in a batch, about.
        max_bytes: size of a batch as columns, about, judged by samples.
        max_seconds: a batch that is not full waits so long for more records.
        until: "end": end behind what is there now. None: when :meth:`~DatasetStream.stop` is called.
        topics, columns, isolation, log, options: as in :func:`read_topic`.

    Raises:
        StaleOffsets: (from the iterator) somebody else works for the group.
        As :func:`read_topic`.
    """
    from raftlog.data import streaming

    return streaming.stream(
        topics,
        group=group,
        start=start,
        columns=columns,
        isolation=isolation,
        max_rows=max_rows,
        max_bytes=max_bytes,
        max_seconds=max_seconds,
        until=until,
        log=log,
        **options,
    )


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"raftlog.{name}")
    if name == "__version__":
        from raftlog.version import software_version

        return software_version()
    module = _FROM.get(name)
    if module is None:
        raise AttributeError(f"module 'raftlog' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
