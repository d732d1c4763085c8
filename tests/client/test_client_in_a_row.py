"""Transactions of one producer that follow each other: what they ask for, and what becomes of one that was
begun with a commit and is not wanted, or not heard of."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from transaction_kit import PARTITIONS, TOPIC, TXN, TransactionWorld, spy_on_calls, transact

from raftlog.broker.markers import Markers
from raftlog.client.cluster import ClusterClient
from raftlog.errors import CommitInDoubt, ConnectionLost
from raftlog.net.rpc_transactions import EndTransactionRequest
from raftlog.state.transactions import Phase


def test_transactions_in_a_row_ask_for_their_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is enlisted any more, and no marker is sent by the coordinator: records bring them along."""
    marked: list[Any] = []
    original = Markers.send

    def send(self: Markers, row: Any, *args: Any) -> None:
        marked.append(row)
        original(self, row, *args)

    monkeypatch.setattr(Markers, "send", send)
    with TransactionWorld() as world:
        asked = spy_on_calls(world, monkeypatch)

        async def work() -> None:
            async with world.log() as log, log.producer(transactional_id=TXN) as producer:
                for number in range(2):
                    await transact(producer, number)
                asked.clear()
                marked.clear()
                for number in range(2, 12):
                    await transact(producer, number)
                assert [type(each) for each in asked] == [EndTransactionRequest] * 10
                assert not marked

        world.run(work())
        assert world.read() == [b"%d" % number for number in range(12)] * PARTITIONS


@pytest.mark.parametrize("wait_s", [0.0, 0.99, 1.0, 1.001, 30.0])
def test_a_transaction_that_nobody_wants_is_given_back(wait_s: float) -> None:
    with TransactionWorld() as world:

        async def work() -> None:
            async with world.log() as log, log.producer(transactional_id=TXN) as producer:
                for number in range(3):
                    await transact(producer, number)
                await asyncio.sleep(wait_s)
                if wait_s > 1.5:
                    assert world.phase() is Phase.COMPLETE_ABORT
                await transact(producer, 3)

        world.run(work())
        world.loop.run_for(1.0)
        assert world.phase() in (Phase.COMPLETE_ABORT, Phase.COMPLETE_COMMIT), (
            "closed, it leaves nothing open"
        )
        assert world.read() == [b"0", b"1", b"2", b"3"] * PARTITIONS


def test_the_answer_to_a_commit_may_come_when_the_next_transaction_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It began with the commit, nobody heard of it, and its time ran out."""
    with TransactionWorld() as world:

        async def work() -> None:
            options: Any = {"transactional_id": TXN, "transaction_timeout_ms": 2_000}
            async with world.log() as log, log.producer(**options) as producer:
                for number in range(2):
                    await transact(producer, number)
                txn = await producer.transaction().begin()
                await txn.send(TOPIC, b"2", partition=0)
                original = ClusterClient.call

                async def loses(self: ClusterClient, where: Any, request: Any, *args: Any, **kw: Any) -> Any:
                    answer = await original(self, where, request, *args, **kw)
                    if isinstance(request, EndTransactionRequest):
                        raise ConnectionLost("the answer is lost", indeterminate=True)
                    return answer

                with monkeypatch.context() as patch:
                    patch.setattr(ClusterClient, "call", loses)
                    with pytest.raises(CommitInDoubt):
                        await txn.commit(timeout=1.0)
                await asyncio.sleep(20.0)
                assert world.phase() is Phase.COMPLETE_ABORT
                await txn.commit()
                await transact(producer, 3)

        world.run(work())
        assert world.read() == [b"0", b"1", b"2", b"3"] + [b"0", b"1", b"3"] * (PARTITIONS - 1)
