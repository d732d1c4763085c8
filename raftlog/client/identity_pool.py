"""Producer identities that are free for the next producer.

A producer that is closed in good order leaves its producer id behind, and the sequence that each partition
expects next, for the next one of its process. So thousands of short-lived producers (one in every Ray task)
do not take thousands of ids, each of which a partition would have to remember for a day. An identity belongs
to one producer at a time; a forked child has none of its parent's.
"""

from __future__ import annotations

import os
from typing import Final, TypeAlias

from raftlog.client.window import Identity

LEASES_MAX: Final = 64
"""Identities that a process keeps for later, per cluster."""

Place: TypeAlias = tuple[bytes, int]
"""A partition: (topic id, index)."""


class Lease:
    """An identity, and the next sequence of each partition written under it."""

    __slots__ = ("identity", "sequences")

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.sequences: dict[Place, int] = {}


class IdentityPool:
    """Leases that nobody uses now. Thread-safe."""

    def __init__(self) -> None:
        self._free: list[Lease] = []

    def take(self) -> Lease | None:
        """The one that was used last, if there is any."""
        try:
            return self._free.pop()
        except IndexError:
            return None

    def give_back(self, lease: Lease) -> None:
        """Leave it to the next producer."""
        if len(self._free) < LEASES_MAX:
            self._free.append(lease)

    def clear(self) -> None:
        """Forget them all."""
        self._free.clear()


_pools: dict[str, IdentityPool] = {}


def process_pool(cluster_id: str) -> IdentityPool:
    """What all Logs of this process share for a cluster."""
    return _pools.setdefault(cluster_id, IdentityPool())


def _after_fork_in_child() -> None:
    for pool in _pools.values():
        pool.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
