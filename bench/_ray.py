"""A Ray and a raftlog cluster of our own, for as long as a benchmark runs."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

import raftlog

if TYPE_CHECKING:
    from raftlog.client.log import Log

CLUSTER = "bench"
BROKERS = 3
_LEVEL_S = 60.0


@contextmanager
def own_ray() -> Iterator[None]:
    """A local Ray, quiet, that ends with the block."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def own_cluster() -> Iterator[Log]:
    """Three brokers as Ray actors on a local Ray, their data in a temporary folder; all of it ends with the
    block."""
    with own_ray(), tempfile.TemporaryDirectory(prefix="raftlog-bench-") as directory:
        log = raftlog.start(CLUSTER, brokers=BROKERS, data_dir=str(Path(directory) / "log"))
        try:
            yield log
        finally:
            log.close()
            raftlog.shutdown(CLUSTER, force=True)


def wait_until(
    condition: Callable[[], bool], what: str, timeout: float = _LEVEL_S, step: float = 0.005
) -> None:
    """Look again every ``step`` seconds.

    Raises:
        TimeoutError: it did not come true within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:.0f} s: {what}")
        time.sleep(step)


def is_level(log: Log, topic: str) -> bool:
    """Whether every broker is alive, and every partition has a leader and no replica that lags."""
    brokers = log.describe_cluster().brokers
    partitions = log.describe_topic(topic).partitions
    return all(broker.state == "alive" for broker in brokers) and all(
        partition.leader is not None and not partition.lagging for partition in partitions
    )


def new_topic(log: Log, name: str, partitions: int) -> str:
    """Create a topic with three replicas, and wait until all of it is ready; the name."""
    log.create_topic(name, partitions=partitions, replication_factor=BROKERS)
    wait_until(lambda: is_level(log, name), f"topic {name} is ready")
    return name


def echo_actor() -> Any:
    """One bare async actor, at the niceness that brokers run at."""

    class Echo:
        async def echo(self, data: bytes) -> bytes:
            return data

    options = {"num_cpus": 0, "runtime_env": {"env_vars": {"RAY_worker_niceness": "0"}}}
    return ray.remote(Echo).options(**options).remote()
