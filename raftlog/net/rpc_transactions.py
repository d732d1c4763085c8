"""The rpc catalogue's requests of transactions: producers to coordinators, coordinators to partitions.

Where nothing else is said a request goes to the leader of the ``__transactions`` partition ``(topic_id,
partition)`` that the transactional id hashes to. The steps are drawn in ``raftlog.broker.transactions``. All
may be sent again when the answer is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from raftlog.net.rpc import Empty, Request, Struct, WireError


class ProducerIdentity(Struct, frozen=True):
    """What to write under from now on: sequences begin at 0."""

    producer_id: int
    epoch: int
    coordinator_epoch: int = -1
    """Of the coordinator that says so: what an end is carried with (see ``rpc.CommittedBefore``)."""
    begun: bool = False
    """The next transaction has begun under it, as EndTransaction asked."""


class InitTransactionsRequest(Request[ProducerIdentity], frozen=True):
    """Open the transactional id and fence whoever had it. A transaction that is open is aborted first: the
    answer waits for that, and is ConcurrentTransactions if it takes long."""

    topic_id: bytes
    partition: int
    transactional_id: str
    timeout_ms: int
    """Its transactions are aborted when they are open for longer."""
    producer_id: int = -1
    epoch: int = -1
    """With the identity that the producer has: another epoch for it, unless somebody else opened the id
    since."""

    api = 60
    response = ProducerIdentity


class EnlistRequest(Request[Empty], frozen=True):
    """Before anything is sent to them, partitions ``(topic id, partition)`` and consumer groups become part
    of the transaction; the first request of an identity begins it."""

    topic_id: bytes
    partition: int
    transactional_id: str
    producer_id: int
    epoch: int
    partitions: list[tuple[bytes, int]]
    groups: list[str]

    api = 61
    response = Empty


class EndTransactionRequest(Request[ProducerIdentity], frozen=True):
    """Commit or abort. The answer, with the identity for the next transaction, comes once that is decided
    durably; what it wrote becomes visible soon after."""

    topic_id: bytes
    partition: int
    transactional_id: str
    producer_id: int
    epoch: int
    commit: bool
    partitions: Sequence[tuple[bytes, int]] = ()
    """Of a commit: what this transaction has written to, all of it acknowledged. So these know how the one
    before has ended, if this one has begun with that."""
    groups: Sequence[str] = ()
    again: bool = False
    """Begin the next transaction, with the same partitions and groups."""

    api = 62
    response = ProducerIdentity


class MarkerRow(Struct, frozen=True):
    """The end of one transaction for one partition, of a topic or of ``__groups``."""

    topic_id: bytes
    partition: int
    producer_id: int
    epoch: int
    coordinator_epoch: int
    """Term of the coordinator that sends it."""
    commit: bool


class WriteMarkersResponse(Struct, frozen=True):
    errors: list[WireError | None]
    """One per marker, in their order; None: it is committed there."""


class WriteMarkersRequest(Request[WriteMarkersResponse], frozen=True):
    """From a coordinator to the broker that leads these partitions; brokers only."""

    markers: list[MarkerRow]

    api = 63
    response = WriteMarkersResponse


class TransactionRow(Struct, frozen=True):
    transactional_id: str
    producer_id: int
    epoch: int
    state: str
    """"empty", "ongoing", "prepare_commit", "prepare_abort", "complete_commit" or "complete_abort"."""
    timeout_ms: int
    start_ms: int
    """When it was begun; 0 if nothing is open."""
    update_ms: int
    partitions: list[tuple[bytes, int]]
    groups: list[str]
    coordinator_epoch: int
    ending: tuple[int, int] | None = None
    """(producer id, epoch) of what has ended, while not all have been told of its end. After the last epoch
    of a producer id that is another one than the id has now."""


class DescribeTransactionsResponse(Struct, frozen=True):
    transactions: list[TransactionRow]
    """Ids that this partition does not know are left out."""


class DescribeTransactionsRequest(Request[DescribeTransactionsResponse], frozen=True):
    """``transactional_ids``: wanted; None for all of this partition."""

    topic_id: bytes
    partition: int
    transactional_ids: list[str] | None = None

    api = 64
    response = DescribeTransactionsResponse


class HangingTransaction(Struct, frozen=True):
    """What is open at a partition though no transaction knows of it (see OpenTransactionsRequest)."""

    topic_id: bytes
    partition: int
    producer_id: int
    epoch: int


class AbortTransactionRequest(Request[Empty], frozen=True):
    """An operator aborts the transaction of an id; or, with ``hanging``, what is open at one partition. Then
    the id may be "" if no partition of ``__transactions`` knows the producer id."""

    topic_id: bytes
    partition: int
    transactional_id: str
    hanging: HangingTransaction | None = None

    api = 65
    response = Empty


class OpenTransactionRow(Struct, frozen=True):
    producer_id: int
    epoch: int
    first_offset: int
    start_ms: int
    """Leader's time of its first batch."""


class OpenTransactionsResponse(Struct, frozen=True):
    last_stable: int
    committed: int
    """High watermark."""
    open: list[OpenTransactionRow]
    """The one that holds back the last stable offset first."""


class OpenTransactionsRequest(Request[OpenTransactionsResponse], frozen=True):
    """To the leader of a topic's partition: which transactions are open in it."""

    topic_id: bytes
    partition: int

    api = 66
    response = OpenTransactionsResponse
