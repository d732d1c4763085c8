"""What operators see of transactions that hold up readers, and what they may end."""

from __future__ import annotations

import pytest
from transaction_kit import OTHER, TXN, TransactionWorld

from raftlog.client.metadata import PartitionView
from raftlog.client.transaction import TransactionManager
from raftlog.client.window import Identity
from raftlog.errors import ConcurrentTransactions


def test_what_is_ending_under_the_last_epoch_of_a_producer_id_does_not_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The id has another producer id already; an operator must not abort what was committed."""
    with TransactionWorld() as world:
        monkeypatch.setattr("raftlog.broker.transactions.EPOCH_MAX", 0)

        async def work() -> None:
            async with world.log() as log, log.producer(transactional_id=TXN) as producer:
                with monkeypatch.context() as patched:
                    patched.setattr("raftlog.broker.markers.Markers.send", lambda *_: None)
                    async with producer.transaction() as txn:
                        await txn.send(OTHER, b"committed", partition=0)
                    (found,) = await log.open_transactions(OTHER)
                    assert found.transactional_id == TXN
                with pytest.raises(ConcurrentTransactions):
                    await log.abort_hanging_transaction(OTHER, 0, found.producer_id, found.epoch, timeout=1.0)

        world.run(work())
        world.cluster.kill_broker(world.coordinator())
        world.loop.run_for(5.0)
        assert world.read(OTHER) == [b"committed"]


def test_what_hangs_is_seen_and_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A producer that writes without enlisting, so that no coordinator knows where a marker is due."""

    def begin_window(self: TransactionManager, view: PartitionView) -> tuple[Identity, int]:
        return self._identity, 0

    with TransactionWorld() as world:

        async def work() -> None:
            async with world.log() as log:
                with monkeypatch.context() as patched:
                    patched.setattr(TransactionManager, "begin_window", begin_window)
                    async with log.producer(transactional_id=TXN) as producer:
                        txn = producer.transaction()
                        await txn.begin()
                        await (await txn.send(OTHER, b"stray", partition=0))
                        await txn.abort()
                (found,) = await log.open_transactions(OTHER)
                await log.abort_transaction(TXN)  # its producer may yet enlist that
                await log.abort_hanging_transaction(OTHER, 0, found.producer_id, found.epoch)
                assert await log.open_transactions(OTHER) == []

        world.run(work())
        assert world.read(OTHER) == []
