"""Under which identities a producer writes: what the cluster tells producers apart by.

A producer without transactions takes a producer id from the cluster and keeps it, with one sequence per
partition (KIP-98); what it leaves behind is for the next producer (see ``identity_pool``). A producer with
transactions has an identity per transaction (see ``transaction``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from raftlog.client.cluster import ClusterClient
from raftlog.client.identity_pool import Lease, Place
from raftlog.client.metadata import PartitionView
from raftlog.client.window import Identity
from raftlog.errors import RaftlogError
from raftlog.net.rpc import CommittedBefore, InitProducerRequest

Obtained: TypeAlias = Callable[[RaftlogError | None], None]
"""Told on the loop that there is an identity now, or why there is none."""


class Identities(Protocol):
    """What a sender needs to know. All of it is called on the loop."""

    transactional: bool
    """Batches are parts of transactions: what fails, fails all of it."""
    before: CommittedBefore | None
    """What batches of the present identity bring along."""

    def begin_window(self, view: PartitionView) -> tuple[Identity, int] | None:
        """Identity and first sequence with which a partition goes on; None: :meth:`obtain` comes first."""

    def obtain(self, view: PartitionView, is_wanted: Callable[[], bool], obtained: Obtained) -> None:
        """Get ready for that partition, and say so.

        Args:
            is_wanted: whether there is still something to send to it.
            obtained: called once, later.
        """

    def broken(self, identity: Identity | None) -> None:
        """Under this identity a partition cannot go on: a batch of it was given up."""

    def failed(self, error: BaseException) -> None:
        """A batch was given up."""

    def close(self, sequences: dict[Place, tuple[Identity, int]] | None) -> None:
        """The producer is done.

        Args:
            sequences: identity and next sequence of each partition that it wrote to; None if that is not
                certain, because a batch was given up.
        """


class OwnIdentity:
    """The identity of a producer without transactions.

    Args:
        cluster: to ask for a producer id.
        timeout_s: how long one attempt may take.
    """

    transactional = False
    before: CommittedBefore | None = None

    def __init__(self, cluster: ClusterClient, timeout_s: float) -> None:
        self._cluster = cluster
        self._timeout_s = timeout_s
        self._lease: Lease | None = None
        self._waiting: list[tuple[Callable[[], bool], Obtained]] = []

    def begin_window(self, view: PartitionView) -> tuple[Identity, int] | None:
        """See :class:`Identities`."""
        lease = self._lease
        if lease is None:
            lease = self._lease = self._cluster.identities.take()
        if lease is None:
            return None
        return lease.identity, lease.sequences.pop((view.topic_id, view.index), 0)

    def obtain(self, view: PartitionView, is_wanted: Callable[[], bool], obtained: Obtained) -> None:
        """Ask for a producer id for as long as somebody waits for one."""
        self._waiting.append((is_wanted, obtained))
        if len(self._waiting) == 1:
            self._cluster.spawn(self._obtain())

    async def _obtain(self) -> None:
        error: RaftlogError | None = None
        while any(is_wanted() for is_wanted, _ in self._waiting):
            try:
                answer = await self._cluster.call_any(InitProducerRequest(), timeout=self._timeout_s)
            except RaftlogError as failure:
                if failure.retriable:
                    self._cluster.last_error = failure  # what a delivery that times out gives as its reason
                    continue
                error = failure
            else:
                self._lease = Lease(Identity(answer.producer_id, answer.epoch))
            break
        waiting, self._waiting = self._waiting, []
        for _, obtained in waiting:
            obtained(error)

    def broken(self, identity: Identity | None) -> None:
        """Go on under the next epoch, in which sequences begin at 0."""
        if self._lease is not None and self._lease.identity == identity:
            renewed = identity.renewed()
            self._lease = None if renewed is None else Lease(renewed)

    def failed(self, error: BaseException) -> None:
        """Others are not concerned."""

    def close(self, sequences: dict[Place, tuple[Identity, int]] | None) -> None:
        """Leave the identity to the next producer."""
        lease, self._lease = self._lease, None
        if lease is None or sequences is None:
            return
        for place, (identity, sequence) in sequences.items():
            if identity == lease.identity:
                lease.sequences[place] = sequence
        self._cluster.identities.give_back(lease)
