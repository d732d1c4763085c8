"""Administration of transactions: what there is, what is open where, and ending what nobody ends. All
asynchronous, on the cluster client's loop."""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec

from raftlog.client.cluster import ClusterClient, partition_of
from raftlog.client.coordinators import TRANSACTIONS_TOPIC, coordinator
from raftlog.client.metadata import PartitionView, TopicView
from raftlog.errors import UnknownTransactionalId
from raftlog.net.rpc_transactions import (
    AbortTransactionRequest,
    DescribeTransactionsRequest,
    HangingTransaction,
    OpenTransactionsRequest,
    TransactionRow,
)
from raftlog.record.types import TopicPartition

CALL_TIMEOUT_S: Final = 30.0


class TransactionDescription(msgspec.Struct, frozen=True):
    """One transactional id."""

    transactional_id: str
    state: str
    """"empty", "ongoing", "prepare_commit", "prepare_abort", "complete_commit" or "complete_abort"."""
    producer_id: int
    epoch: int
    timeout_ms: int
    start_ms: int
    """When what is open was begun, milliseconds since the epoch; 0: nothing is open."""
    update_ms: int
    """When its state changed last."""
    partitions: list[TopicPartition]
    """What is open has enlisted these; a topic that was deleted is named by its id."""
    groups: list[str]
    coordinator: int | None
    """Broker id of whoever decides about it."""
    ending: tuple[int, int] | None = None
    """(producer id, epoch) of what has ended, while not all have been told of its end."""


class OpenTransaction(msgspec.Struct, frozen=True):
    """A transaction that holds back readers of a partition."""

    topic: str
    partition: int
    producer_id: int
    epoch: int
    first_offset: int
    """Readers of committed records do not get beyond it."""
    start_ms: int
    """When it wrote here first."""
    transactional_id: str | None
    """None: it hangs, no coordinator knows of it."""


class TransactionAdmin:
    """What a Log does about transactions."""

    def __init__(self, cluster: ClusterClient) -> None:
        self._cluster = cluster

    async def transactions(self) -> list[TransactionDescription]:
        """See :meth:`raftlog.Log.transactions`."""
        topic = await self._topic()
        if topic is None:
            return []
        answers = await asyncio.gather(*(self._rows(view, None) for view in topic.partitions))
        names = await self._names()
        found = [
            _describe(row, view, names)
            for view, rows in zip(topic.partitions, answers, strict=True)
            for row in rows
        ]
        return sorted(found, key=lambda each: each.transactional_id)

    async def describe(self, transactional_id: str) -> TransactionDescription:
        """See :meth:`raftlog.Log.describe_transaction`."""
        if await self._topic() is None:
            raise UnknownTransactionalId(f"there is no transactional id {transactional_id!r}")
        view = await self._place(transactional_id)
        rows = await self._rows(view, [transactional_id])
        if not rows:
            raise UnknownTransactionalId(f"there is no transactional id {transactional_id!r}")
        return _describe(rows[0], view, await self._names())

    async def abort(self, transactional_id: str, timeout: float) -> None:
        """See :meth:`raftlog.Log.abort_transaction`."""
        await self.describe(transactional_id)
        view = await self._place(transactional_id)
        request = AbortTransactionRequest(view.topic_id, view.index, transactional_id)
        await self._cluster.call_leader(view, request, timeout=timeout)

    async def open(self, topic: str) -> list[OpenTransaction]:
        """See :meth:`raftlog.Log.open_transactions`."""
        known = {
            identity: each.transactional_id
            for each in await self.transactions()
            # one that is ending moved on to the next, if need be under another producer id
            for identity in ((each.producer_id, each.epoch), (each.producer_id, each.epoch - 1), each.ending)
            if identity is not None
        }
        views = (await self._cluster.topic(topic, timeout=CALL_TIMEOUT_S)).partitions
        answers = await asyncio.gather(
            *(
                self._cluster.call_leader(
                    view, OpenTransactionsRequest(view.topic_id, view.index), timeout=CALL_TIMEOUT_S
                )
                for view in views
            )
        )
        return [
            OpenTransaction(
                topic,
                view.index,
                row.producer_id,
                row.epoch,
                row.first_offset,
                row.start_ms,
                known.get((row.producer_id, row.epoch)),
            )
            for view, (answer, _) in zip(views, answers, strict=True)
            for row in answer.open
        ]

    async def abort_hanging(
        self, topic: str, partition: int, producer_id: int, epoch: int, timeout: float
    ) -> None:
        """See :meth:`raftlog.Log.abort_hanging_transaction`."""
        target = partition_of(await self._cluster.topic(topic, timeout=timeout), partition)
        owner = next((each for each in await self.transactions() if producer_id in _producer_ids(each)), None)
        name = "" if owner is None else owner.transactional_id
        view = await self._place(name)
        hanging = HangingTransaction(target.topic_id, partition, producer_id, epoch)
        request = AbortTransactionRequest(view.topic_id, view.index, name, hanging)
        await self._cluster.call_leader(view, request, timeout=timeout)

    # -- where -----------------------------------------------------------------------------------------------

    async def _topic(self) -> TopicView | None:
        """The coordinators' topic; None if nobody has ever had a transaction: looking is no reason to make
        it."""
        answer = await self._cluster.metadata(None, timeout=CALL_TIMEOUT_S)
        if all(row.name != TRANSACTIONS_TOPIC for row in answer.topics):
            return None
        return await self._cluster.topic(TRANSACTIONS_TOPIC, timeout=CALL_TIMEOUT_S)

    async def _place(self, transactional_id: str) -> PartitionView:
        return await coordinator(self._cluster, TRANSACTIONS_TOPIC, transactional_id, timeout=CALL_TIMEOUT_S)

    async def _rows(self, view: PartitionView, names: list[str] | None) -> list[TransactionRow]:
        request = DescribeTransactionsRequest(view.topic_id, view.index, names)
        answer, _ = await self._cluster.call_leader(view, request, timeout=CALL_TIMEOUT_S)
        return answer.transactions

    async def _names(self) -> dict[bytes, str]:
        """Topic id -> name."""
        answer = await self._cluster.metadata(None, timeout=CALL_TIMEOUT_S)
        return {row.topic_id: row.name for row in answer.topics}


def _producer_ids(transaction: TransactionDescription) -> set[int]:
    """Those under which it has written what is open."""
    ending = transaction.ending
    return {transaction.producer_id} if ending is None else {transaction.producer_id, ending[0]}


def _describe(row: TransactionRow, view: PartitionView, names: dict[bytes, str]) -> TransactionDescription:
    return TransactionDescription(
        row.transactional_id,
        row.state,
        row.producer_id,
        row.epoch,
        row.timeout_ms,
        row.start_ms,
        row.update_ms,
        sorted(TopicPartition(names.get(topic, topic.hex()), index) for topic, index in row.partitions),
        sorted(row.groups),
        view.leader if view.leader >= 0 else None,
        row.ending,
    )
