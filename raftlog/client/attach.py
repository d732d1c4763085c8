"""``raftlog.start``, ``connect`` and ``shutdown``: finding a cluster through Ray, or making one.

Ray and ``raftlog.actors`` are imported when one of these is called, never before.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import get_args

import msgspec

from raftlog.client.cluster import Bootstrap, ClusterClient
from raftlog.client.handle import process_client_id
from raftlog.client.log import Log
from raftlog.client.transports import transport_of
from raftlog.config import Environment, Transport
from raftlog.errors import ConfigError

_lock = threading.Lock()
_logs: dict[tuple[int, str], Log] = {}


def start(
    name: str = "default",
    brokers: int | None = None,
    data_dir: str | Path | None = None,
    ephemeral: bool = False,
    brokers_per_node: int = 1,
    replace_after: float = 30.0,
) -> Log:
    """See :func:`raftlog.start`."""
    from raftlog.actors import launch

    bootstrap = launch.start(
        name,
        brokers,
        data_dir,
        ephemeral,
        brokers_per_node=brokers_per_node,
        replace_after=replace_after,
    )
    return log_of(msgspec.structs.replace(bootstrap, transport=Environment.read().transport))


def connect(name: str | None = None, timeout: float = 30.0, transport: Transport | None = None) -> Log:
    """See :func:`raftlog.connect`."""
    name = name or Environment.read().cluster
    with _lock:
        present = _logs.get((os.getpid(), name))
    if (
        present is not None
        and not present.closed
        and (transport is None or present.bootstrap.transport == transport)
    ):
        return present
    log = log_of(find(name, timeout, transport))
    if log.bootstrap.transport == "auto":
        runtime = log._connected()
        runtime.io.call(settle(runtime.cluster, timeout))
    return log


async def settle(cluster: ClusterClient, timeout: float) -> None:
    """Reach some broker, which decides what "auto" comes to.

    Raises:
        ConnectionLost: none can be reached, in either way.
    """
    if transport_of(cluster.seams.network) == "auto":
        await cluster.metadata([], timeout=timeout)


def find(name: str, timeout: float, transport: Transport | None = None) -> Bootstrap:
    """How to reach a cluster that runs.

    Raises:
        NotRunning: none of that name does.
        ConfigError: there is no such transport.
    """
    from raftlog.actors import launch

    if transport is None:
        transport = Environment.read().transport
    elif transport not in get_args(Transport):
        raise ConfigError(f"transport={transport!r} is none of {', '.join(get_args(Transport))}")
    return msgspec.structs.replace(launch.find(name, timeout), transport=transport)


def shutdown(name: str = "default", force: bool = False) -> None:
    """See :func:`raftlog.shutdown`."""
    from raftlog.actors import launch

    launch.stop(name, force, (process_client_id(),))
    with _lock:
        present = _logs.pop((os.getpid(), name), None)
    if present is not None:
        present.close()


def log_of(bootstrap: Bootstrap) -> Log:
    """This process's Log of that cluster."""
    key = os.getpid(), bootstrap.name
    with _lock:
        present = _logs.get(key)
        if (
            present is None
            or present.closed
            or present.cluster_id != bootstrap.cluster_id
            or present.bootstrap.transport != bootstrap.transport
        ):
            present = _logs[key] = Log(bootstrap)
        return present


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
