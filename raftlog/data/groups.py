"""Groups of pipelines: where they are, and under which transactional id they are written for.

A driver that died between staging its offsets and committing leaves a group whose position nobody can tell
until that transaction is over. Staging is the last thing before the commit, so this normally lasts for
milliseconds; when it lasts for seconds, whoever wants to know ends the transaction, as it would at its own
write.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from raftlog.client.offsets import LOOKUP_TIMEOUT_S, Place
from raftlog.errors import UnstableOffsets

if TYPE_CHECKING:
    from raftlog.client.log import Log

logger = logging.getLogger("raftlog.data")

PATIENCE_S: Final = 5.0
"""How long a transaction may be about to commit before it is taken for abandoned."""
_ID_LENGTH_MAX: Final = 249

_free: list[str] = []
_free_lock = threading.Lock()


def committed_offsets(log: Log, group: str, places: Sequence[Place]) -> dict[Place, int]:
    """Where a group is in these partitions; those where it has never been are left out.

    Raises:
        UnstableOffsets: somebody else than a driver of Ray Data is about to commit offsets, and does not.
        UnknownTopic, UnknownPartition, ConfigError, ConnectionLost, RequestTimeout.
    """
    runtime = log._connected()
    try:
        return runtime.io.call(runtime.groups.committed(group, places, LOOKUP_TIMEOUT_S, PATIENCE_S))
    except UnstableOffsets as error:
        logger.warning("%s: taken for a driver that died", error.message)
    with log.producer(transactional_id=transactional_id(group)):
        pass  # opening it is enough
    return runtime.io.call(runtime.groups.committed(group, places, LOOKUP_TIMEOUT_S))


def transactional_id(group: str) -> str:
    """Under which all drivers write for a group, so that each fences the one before."""
    name = f"write_topic:{group}"
    return name if len(name) <= _ID_LENGTH_MAX else hashlib.sha256(name.encode()).hexdigest()


@contextlib.contextmanager
def id_of_our_own() -> Iterator[str]:
    """A transactional id that nobody else has, and that the next write of this process uses again:
    coordinators remember each for a week."""
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
