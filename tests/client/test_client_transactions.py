"""Transactions of the client, against production brokers in virtual time."""

from __future__ import annotations

from transaction_kit import OTHER, TOPIC, TXN, TransactionWorld


def test_a_transaction_commits_at_the_end_of_with() -> None:
    with TransactionWorld() as world:

        async def work() -> None:
            async with world.log() as log, log.producer(transactional_id=TXN) as producer:
                for number in range(3):
                    async with producer.transaction() as txn:
                        for each in range(9):
                            await txn.send(TOPIC, b"%d-%d" % (number, each), partition=each % 3)
                        await txn.send_batch(OTHER, [b"%d" % number])

        world.run(work())
        assert sorted(world.read()) == [b"%d-%d" % (number, each) for number in range(3) for each in range(9)]
        assert world.read(OTHER) == [b"0", b"1", b"2"]
