"""Transactions of the client, against production brokers in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from transaction_kit import OTHER, PARTITIONS, TOPIC, TXN, TransactionWorld, spy_on_calls, transact

from raftlog import aio
from raftlog.client.delivery import Delivery
from raftlog.client.transaction import TRANSITIONS, State
from raftlog.client.window import Identity
from raftlog.errors import (
    CommitInDoubt,
    ConfigError,
    InvalidTopic,
    InvalidTransaction,
    NotPicklable,
    ProducerFenced,
    StaleMember,
    TransactionAborted,
    TransactionTimedOut,
    UnknownProducer,
)
from raftlog.net.rpc_transactions import EndTransactionRequest, EnlistRequest
from raftlog.state.partition import PartitionState


class GivenUp(Exception):
    """What the test raises inside of a transaction."""


async def give_up(producer: aio.Producer, deliveries: list[Delivery]) -> None:
    """A transaction that ends with an exception: one record was delivered, one was not."""
    async with producer.transaction() as txn:
        deliveries.append(await txn.send(TOPIC, b"a", partition=0))
        await deliveries[0]
        deliveries.append(await txn.send(TOPIC, b"b", partition=1))
        raise GivenUp


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


def test_an_exception_aborts_and_goes_on() -> None:
    with TransactionWorld() as world:

        async def work() -> None:
            async with world.log() as log, log.producer(transactional_id=TXN) as producer:
                deliveries: list[Delivery] = []
                with pytest.raises(GivenUp):
                    await give_up(producer, deliveries)
                await deliveries[0]
                with pytest.raises(TransactionAborted):
                    await deliveries[1]
                await transact(producer, 1)

        world.run(work())
        assert world.read() == [b"1"] * PARTITIONS
        assert b"a" in world.read(isolation="read_uncommitted")


def test_what_is_refused() -> None:
    with TransactionWorld() as world:

        async def work() -> None:
            async with world.log() as log, log.producer(transactional_id=TXN) as producer:
                with pytest.raises(InvalidTransaction, match="no transaction open"):
                    await producer.send(TOPIC, b"outside")
                txn = producer.transaction()
                with pytest.raises(InvalidTransaction, match="not begun"):
                    await txn.send(TOPIC, b"before")
                async with txn:
                    with pytest.raises(InvalidTransaction, match="open"):
                        await producer.transaction().begin()
                    with pytest.raises(InvalidTopic, match="internal"):
                        await txn.send("__transactions", b"x")
                    await producer.send(TOPIC, b"inside", partition=0)
                    with pytest.raises(NotPicklable):
                        txn.__reduce__()
                with pytest.raises(InvalidTransaction, match="over"):
                    await txn.send(TOPIC, b"after")
                with pytest.raises(InvalidTransaction, match="over"):
                    await txn.commit()
                async with producer.transaction() as ended_inside:
                    await ended_inside.send(TOPIC, b"given up", partition=0)
                    await ended_inside.abort()
                with pytest.raises(ConfigError, match="900001"):
                    log.producer(transactional_id=TXN, transaction_timeout_ms=900_001)

        world.run(work())
        assert world.read() == [b"inside"]


def test_every_state_can_be_reached_and_left() -> None:
    reached = {State.NEW} | {to for targets in TRANSITIONS.values() for to in targets}
    assert reached == set(State) == set(TRANSITIONS)
    assert [state for state, targets in TRANSITIONS.items() if not targets] == [State.DEAD]


# -- enlisting -----------------------------------------------------------------------------------------------


def test_several_partitions_are_enlisted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with TransactionWorld() as world:
        asked = spy_on_calls(world, monkeypatch)

        async def work() -> None:
            async with world.log() as log, log.producer(transactional_id=TXN, linger_ms=0) as producer:
                for number in range(3):
                    await transact(producer, number)

        world.run(work())
        enlisted = [len(each.partitions) for each in asked if isinstance(each, EnlistRequest)]
        assert sum(enlisted[:-1]) == PARTITIONS
        assert len(enlisted) <= 3, "one for the first partition, one for those that came meanwhile"
        assert enlisted[-1] == PARTITIONS, (
            "the second writes to the same: one is enough; the third needs none"
        )


def test_what_was_usual_and_is_gone_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with TransactionWorld() as world:

        async def work() -> None:
            async with world.log() as log, log.producer(transactional_id=TXN, linger_ms=0) as producer:
                await transact(producer, 0)
                async with producer.transaction() as txn:
                    await txn.send(OTHER, b"a")
                async with world.log() as admin:
                    await admin.delete_topic(OTHER)
                    await asyncio.sleep(1.0)
                started = asyncio.get_running_loop().time()
                await transact(producer, 1)
                assert asyncio.get_running_loop().time() - started < 1.0

        world.run(work())
        assert world.read() == [b"0", b"1"] * PARTITIONS


def test_mistake_12_nothing_is_sent_to_a_partition_that_is_not_enlisted_durably() -> None:
    """Redpanda 6019: the coordinator forgot what was enlisted. Here its log has it: with the coordinator dead
    after the enlistment the markers still come everywhere; and before it nothing is sent."""
    with TransactionWorld() as world:
        world.run(world.commit_once())
        coordinator = world.coordinator()
        log = world.log()

        async def begin() -> tuple[aio.Producer, Any]:
            producer = log.producer(transactional_id=TXN, linger_ms=0)
            txn = await producer.transaction().begin()
            return producer, txn

        producer, txn = world.run(begin())
        # the broker that coordinates neither answers nor hears of the enlistment
        world.cluster.network.cut("app", f"broker-{coordinator}")

        async def send() -> None:
            for partition in range(PARTITIONS):
                await txn.send(TOPIC, b"t", partition=partition)

        world.run(send())
        world.loop.run_for(0.4)
        assert b"t" not in world.read(isolation="read_uncommitted")
        world.cluster.network.heal()
        world.run(producer.flush())
        world.cluster.kill_broker(coordinator)
        world.run(txn.commit())
        assert world.read().count(b"t") == PARTITIONS


# -- offsets of a group --------------------------------------------------------------------------------------


def test_offsets_are_committed_with_the_transaction_or_not_at_all() -> None:
    with TransactionWorld() as world:
        world.run(world.produce(OTHER, 10))

        async def work() -> list[Any]:
            found: list[Any] = []
            async with (
                world.log() as log,
                log.producer(transactional_id=TXN) as producer,
                log.consumer(OTHER, group="g", max_poll_records=4) as consumer,
            ):
                for number in range(2):
                    records = await consumer.poll(timeout=10.0)
                    try:
                        async with producer.transaction() as txn:
                            for record in records:
                                await txn.send(TOPIC, record.value, partition=0)
                            await txn.send_offsets(consumer)
                            assert number == 0
                    except AssertionError:
                        pass
                    found.append(await consumer.committed((OTHER, 0)))
            return found

        assert world.run(work()) == [4, 4]
        assert world.read() == [b"%d" % number for number in range(4)]


def test_a_consumer_that_fell_out_of_its_group_commits_nothing() -> None:
    with TransactionWorld() as world:
        world.run(world.produce(OTHER, 3))

        async def work() -> None:
            async with (
                world.log() as log,
                log.producer(transactional_id=TXN) as producer,
                log.consumer(OTHER, group="g", session_timeout_ms=2000) as consumer,
            ):
                await consumer.poll(timeout=10.0)
                txn = await producer.transaction().begin()
                await txn.send(TOPIC, b"a", partition=0)
                await consumer.member.membership._say_goodbye(consumer.member.member_id)
                with pytest.raises((StaleMember, TransactionAborted)):
                    await txn.send_offsets(consumer)
                with pytest.raises(TransactionAborted) as caught:
                    await txn.commit()
                assert isinstance(caught.value.__cause__, StaleMember)
                await txn.abort()
                await transact(producer, 7)

        world.run(work())
        assert world.read() == [b"7"] * PARTITIONS


# -- zombies, and time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("touched", [False, True])
def test_whoever_opens_the_id_fences_the_producer_before(touched: bool) -> None:
    with TransactionWorld() as world:

        async def work() -> None:
            async with world.log() as log, log.producer(transactional_id=TXN) as zombie:
                txn = await zombie.transaction().begin()
                if touched:
                    await (await txn.send(TOPIC, b"zombie", partition=0))
                async with log.producer(transactional_id=TXN) as successor:
                    await txn.send(TOPIC, b"zombie", partition=1)
                    with pytest.raises((ProducerFenced, TransactionAborted)):
                        await txn.commit()
                    await transact(successor, 1)
                    with pytest.raises(ProducerFenced):
                        await txn.abort()
                    for _ in range(2):
                        with pytest.raises(ProducerFenced) as caught:
                            await zombie.transaction().begin()
                        assert caught.value.fatal
                    with pytest.raises(ProducerFenced):
                        await zombie.send(TOPIC, b"zombie")
                    await transact(successor, 2)

        world.run(work())
        assert world.read() == [b"1", b"2"] * PARTITIONS


def test_a_transaction_that_was_open_for_too_long_was_aborted() -> None:
    with TransactionWorld() as world:

        async def work() -> None:
            settings = {"transactional_id": TXN, "transaction_timeout_ms": 5_000}
            async with world.log() as log, log.producer(**settings) as producer:
                txn = await producer.transaction().begin()
                await (await txn.send(TOPIC, b"late", partition=0))
                await asyncio.sleep(30)
                with pytest.raises(TransactionTimedOut) as caught:
                    await txn.commit()
                assert caught.value.abortable
                assert not caught.value.indeterminate
                await transact(producer, 1)
                txn = await producer.transaction().begin()
                await (await txn.send(TOPIC, b"late", partition=0))
                await asyncio.sleep(30)
                await txn.send(TOPIC, b"later", partition=0)
                with pytest.raises(TransactionAborted):
                    await txn.commit()
                await transact(producer, 2)

        world.run(work(), seconds=300)
        assert world.read() == [b"1", b"2"] * PARTITIONS


@pytest.mark.parametrize("early_ms", [-40, -10, 0, 10, 40])
def test_timeout_against_commit_has_one_outcome(early_ms: int) -> None:
    """Both orders: the scan that aborts comes before or after the commit."""
    with TransactionWorld(seed=100 + early_ms) as world:

        async def work() -> bool:
            settings = {"transactional_id": TXN, "transaction_timeout_ms": 5_000}
            async with world.log() as log, log.producer(**settings) as producer:
                txn = await producer.transaction().begin()
                for partition in range(PARTITIONS):
                    await (await txn.send(TOPIC, b"a", partition=partition))
                await asyncio.sleep(world.until_scan() - early_ms / 1000)
                try:
                    await txn.commit()
                except TransactionTimedOut:
                    committed = False
                else:
                    committed = True
                await transact(producer, 1)
                return committed

        committed = world.run(work(), seconds=300)
        assert committed == (early_ms > 0) or abs(early_ms) <= 10
        assert world.read() == ([b"a", b"1"] if committed else [b"1"]) * PARTITIONS


# -- who dies ------------------------------------------------------------------------------------------------

DELAYS_MS = (0, 2, 4, 6, 8, 11, 15, 20, 30)
"""After the first transaction began: at every step of it, and after it."""


@pytest.mark.parametrize("delay_ms", DELAYS_MS)
def test_the_client_dies_at_any_step_and_its_successor_goes_on(delay_ms: int) -> None:
    with TransactionWorld(seed=delay_ms + 1) as world:
        world.run(world.commit_once())

        async def work() -> None:
            producer = world.log("victim").producer(transactional_id=TXN, linger_ms=0)
            async with producer:
                for number in range(1, 100):
                    await transact(producer, number)

        world.loop.run_as("victim", work())
        world.loop.run_for(0.1 + delay_ms / 1000)
        world.loop.kill("victim")

        async def successor() -> None:
            async with world.log() as log, log.producer(transactional_id=TXN) as producer:
                await transact(producer, 100)

        world.run(successor())
        values = world.read()
        assert len(values) % PARTITIONS == 0
        one = values[: len(values) // PARTITIONS]
        assert values == one * PARTITIONS, "all of a transaction or nothing, in order"
        numbers = [int(value) for value in one]
        assert numbers == [*range(len(numbers) - 1), 100]


@pytest.mark.parametrize("delay_ms", DELAYS_MS)
def test_the_coordinator_dies_at_any_step_and_nothing_is_seen_of_it(delay_ms: int) -> None:
    with TransactionWorld(seed=delay_ms + 50) as world:
        world.run(world.commit_once())

        async def work() -> None:
            async with (
                world.log() as log,
                log.producer(transactional_id=TXN, linger_ms=0) as producer,
            ):
                for number in range(1, 40):
                    await transact(producer, number)

        task = world.loop.run_as("app", work())
        world.loop.run_for(0.1 + delay_ms / 1000)
        victim = world.coordinator()
        world.cluster.kill_broker(victim)
        world.loop.run_until(task.done, 120.0)
        task.result()
        assert world.read() == [b"%d" % number for number in range(40)] * PARTITIONS


# -- outcomes that are not known -----------------------------------------------------------------------------


@pytest.mark.parametrize("heard", [True, False], ids=["answer lost", "request lost"])
def test_a_commit_without_an_answer_is_in_doubt_until_it_is_asked_again(heard: bool) -> None:
    """Mistake 15, Pulsar 19744: a transaction that is complete is not forgotten, so that the retry of its
    commit succeeds."""
    with TransactionWorld() as world:
        world.run(world.commit_once())
        brokers = [f"broker-{each}" for each in world.cluster.brokers]

        async def work() -> None:
            async with world.log() as log, log.producer(transactional_id=TXN) as producer:
                txn = await producer.transaction().begin()
                for partition in range(PARTITIONS):
                    await txn.send(TOPIC, b"a", partition=partition)
                await producer.flush()
                for broker in brokers:
                    if heard:
                        world.cluster.network.cut(broker, "app", both=False)
                    else:
                        world.cluster.network.cut("app", broker, both=False)
                with pytest.raises(CommitInDoubt) as caught:
                    await txn.commit(timeout=15.0)
                assert caught.value.indeterminate
                assert "commit() again" in caught.value.hint
                with pytest.raises(InvalidTransaction, match="outcome"):
                    await producer.transaction().begin()
                with pytest.raises(InvalidTransaction, match="outcome"):
                    await txn.abort()
                for broker in brokers:
                    world.cluster.network.cut("app", broker)
                    world.cluster.network.break_connections("app", broker)
                with pytest.raises(CommitInDoubt):  # it cannot even be asked now (simulator, seed 70075)
                    await txn.commit(timeout=3.0)
                world.cluster.network.heal()
                await txn.commit()
                await transact(producer, 1)

        world.run(work(), seconds=300)
        assert world.read() == [b"0", b"a", b"1"] * PARTITIONS


def test_mistake_14_an_end_that_comes_late_does_not_touch_the_next_transaction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bufstream 0.1, found by Jepsen."""
    with TransactionWorld() as world:
        asked = spy_on_calls(world, monkeypatch)

        async def work() -> None:
            async with world.log() as log, log.producer(transactional_id=TXN) as producer:
                with pytest.raises(GivenUp):
                    await give_up(producer, [])
                (abort,) = [each for each in asked if isinstance(each, EndTransactionRequest)]
                async with producer.transaction() as txn:
                    await (await txn.send(TOPIC, b"next", partition=0))
                    cluster = log._connected()
                    view = (await cluster.topic("__transactions", timeout=5.0)).partitions[abort.partition]
                    await cluster.call_leader(view, abort, timeout=5.0)

        world.run(work())
        assert world.read() == [b"next"]


# -- what fails a transaction --------------------------------------------------------------------------------


def test_mistake_8_a_batch_in_doubt_is_not_sent_again_under_another_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Redpanda 3039: the partition says that it does not know the producer; a client that bumps its epoch and
    sends again what may be written writes it twice. Here the transaction is aborted."""
    with TransactionWorld() as world:
        original = PartitionState.check
        forgetful = True

        def check(self: PartitionState, header: Any) -> Any:
            if forgetful and header.is_transactional and header.base_sequence > 0:
                raise UnknownProducer("forgotten")
            return original(self, header)

        monkeypatch.setattr(PartitionState, "check", check)

        async def work() -> None:
            nonlocal forgetful
            async with world.log() as log, log.producer(transactional_id=TXN, linger_ms=0) as producer:
                txn = await producer.transaction().begin()
                await (await txn.send(TOPIC, b"a", partition=0))
                second = await txn.send(TOPIC, b"b", partition=0)
                with pytest.raises(UnknownProducer):
                    await second
                with pytest.raises(TransactionAborted) as caught:
                    await txn.commit()
                assert isinstance(caught.value.__cause__, UnknownProducer)
                forgetful = False
                await transact(producer, 1)

        world.run(work())
        assert world.read() == [b"1"] * PARTITIONS
        assert world.read(isolation="read_uncommitted").count(b"b") == 0


def test_mistake_18_a_batch_given_up_leaves_its_bytes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kafka 21065: an expired batch's buffer was used again while it was in flight, and a record came out in
    another topic. Here what was given up goes out late, as it was, and is refused or hidden."""
    with TransactionWorld() as world:
        world.run(world.commit_once())

        async def work() -> None:
            settings: dict[str, Any] = {"transactional_id": TXN, "linger_ms": 0, "delivery_timeout_ms": 1000}
            async with world.log() as log, log.producer(**settings) as producer:
                txn = await producer.transaction().begin()
                await (await txn.send(TOPIC, b"first", partition=0))
                for broker in world.cluster.brokers:
                    world.cluster.network.clog("app", f"broker-{broker}", 2.0)
                stuck = [await txn.send(TOPIC, b"stuck-%d" % each, partition=0) for each in range(3)]
                with pytest.raises(TransactionAborted):
                    await txn.commit()
                for delivery in stuck:
                    assert delivery.done()
                while True:
                    try:
                        async with producer.transaction() as txn:
                            for each in range(3):
                                await txn.send(OTHER, b"other-%d" % each)
                        break
                    except TransactionAborted:
                        continue

        world.run(work())
        assert world.read() == [b"0"] * PARTITIONS
        assert world.read(OTHER) == [b"other-0", b"other-1", b"other-2"]
        assert not [each for each in world.read(OTHER, "read_uncommitted") if not each.startswith(b"other")]
        assert not [each for each in world.read(TOPIC, "read_uncommitted") if each.startswith(b"other")]


def test_a_cancelled_commit_is_cleared_up_by_the_next_transaction() -> None:
    with TransactionWorld() as world:
        world.run(world.commit_once())
        brokers = [f"broker-{each}" for each in world.cluster.brokers]

        async def work() -> None:
            async with world.log() as log, log.producer(transactional_id=TXN) as producer:
                await transact(producer, 1)
                txn = await producer.transaction().begin()
                for broker in brokers:
                    world.cluster.network.cut("app", broker)
                await txn.send(TOPIC, b"a", partition=0)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await txn.commit()
                world.cluster.network.heal()
                await transact(producer, 2)

        world.run(work())
        assert world.read() == [b"0", b"1", b"2"] * PARTITIONS


def test_a_producer_that_is_closed_aborts_what_is_open() -> None:
    with TransactionWorld() as world:

        async def work() -> None:
            async with world.log() as log:
                async with log.producer(transactional_id=TXN) as producer:
                    txn = await producer.transaction().begin()
                    await (await txn.send(TOPIC, b"open", partition=0))
                assert producer.closed
                started = asyncio.get_running_loop().time()
                async with log.producer(transactional_id=TXN) as producer:
                    await transact(producer, 1)
                assert asyncio.get_running_loop().time() - started < 1.0, "nothing had to time out"

        world.run(work())
        assert world.read() == [b"1"] * PARTITIONS


def test_identities_go_on_from_transaction_to_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has an epoch of its own (KIP-890), and sequences from 0."""
    with TransactionWorld() as world:
        asked = spy_on_calls(world, monkeypatch)

        async def work() -> None:
            async with world.log() as log, log.producer(transactional_id=TXN) as producer:
                for number in range(3):
                    await transact(producer, number)

        world.run(work())
        ends = [
            Identity(each.producer_id, each.epoch)
            for each in asked
            if isinstance(each, EndTransactionRequest) and each.commit
        ]
        assert [each.epoch for each in ends] == [0, 1, 2]
        assert len({each.producer_id for each in ends}) == 1
