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
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raftlog import aio, config, errors, serde, testing
    from raftlog.client.delivery import BatchDelivery, Delivery
    from raftlog.client.log import Log
    from raftlog.client.process import Output, ProcessStats
    from raftlog.client.processing import Processing
    from raftlog.client.sync import Consumer
    from raftlog.client.sync_producer import Producer, Transaction
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
    "serde",
    "shutdown",
    "start",
    "testing",
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
) -> Log:
    """Start a cluster on Ray, recover it from its data, or attach to it if it runs.

    Ray is initialised if it is not: the Ray cluster that runs, or else one of this process.

    Args:
        name: of the cluster.
        brokers: how many to found it with; default: one per node of the Ray cluster.
        data_dir: where brokers keep their data, on every node; default: the environment's RAFTLOG_DATA_DIR,
            or the user's data folder.
        ephemeral: keep the data in a temporary folder that goes with the cluster.

    Raises:
        DataDirError, ConfigError, IncompatibleVersion: why it cannot be started, and what to do.
    """
    from raftlog.client import attach

    return attach.start(name, brokers, data_dir, ephemeral)


def connect(name: str | None = None, timeout: float = 30.0) -> Log:
    """Attach to a cluster that runs. Never starts Ray; the same Log is returned until it is closed.

    Args:
        name: of the cluster; default: the environment's RAFTLOG_CLUSTER, or "default".
        timeout: seconds.

    Raises:
        NotRunning: no Ray, or no cluster of that name on it.
    """
    from raftlog.client import attach

    return attach.connect(name, timeout)


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
