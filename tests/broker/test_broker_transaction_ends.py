"""Transactions that take too long, that operators abort, and that wait for one another."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from broker_kit import batch, outcome
from coordination_kit import TXN, CoordinatedWorld, begun, check_committed, restart

from raftlog.broker.internal_topics import TRANSACTIONS_TOPIC
from raftlog.broker.markers import Markers
from raftlog.config import BrokerConfig
from raftlog.errors import (
    Busy,
    ConcurrentTransactions,
    InvalidTransaction,
    LeadershipLost,
    NotLeader,
    TransactionAborted,
    TransactionTimedOut,
)
from raftlog.net.rpc import (
    DeleteTopicRequest,
    InitProducerRequest,
)
from raftlog.net.rpc_transactions import (
    AbortTransactionRequest,
    EnlistRequest,
    HangingTransaction,
    InitTransactionsRequest,
    ProducerIdentity,
)
from raftlog.record.control import Marker
from raftlog.testing.sim_cluster import broker_name


def test_a_transaction_that_takes_too_long_is_aborted() -> None:
    with CoordinatedWorld() as world:
        me = world.init(timeout_ms=5_000)
        world.enlist(me)
        world.write(me, b"a")
        world.pass_time(4.0)
        assert world.transaction().state == "ongoing"
        world.until_state("complete_abort")
        with pytest.raises(TransactionTimedOut):
            world.end(me)
        assert world.read() == []
        after = world.end(me, commit=False)
        world.enlist(after)
        world.write(after, b"b")
        world.end(after)
        world.until_true(lambda: world.read() == [b"b"])


def test_a_new_coordinator_gives_the_whole_time_again() -> None:
    with CoordinatedWorld() as world:
        me = world.init(timeout_ms=15_000)
        world.enlist(me)
        world.pass_time(13.0)
        victim = world.leader_at(world.transaction_place)
        world.cluster.kill_broker(victim)
        world.leader_at(world.transaction_place, but=victim)
        world.pass_time(12.0)
        assert world.transaction().state == "ongoing"
        world.until_state("complete_abort")


def test_an_id_that_nobody_uses_is_forgotten() -> None:
    with CoordinatedWorld(config=BrokerConfig(transactional_id_expiry_ms=20_000)) as world:
        world.init()
        place = world.transaction_place
        leader = world.leader_at(place)
        world.pass_time(15.0)
        assert TXN in world.transaction_replica(leader).machine.transactions
        world.pass_time(20.0)
        assert TXN not in world.transaction_replica(world.leader_at(place)).machine.transactions


def test_an_operator_aborts_a_transaction() -> None:
    with CoordinatedWorld(partitions=2) as world:
        me = begun(world)
        world.seek(world.transaction_place, AbortTransactionRequest(*world.transaction_place, TXN))
        world.until_state("complete_abort")
        with pytest.raises(TransactionAborted):
            world.end(me)
        assert world.read() == []


def test_a_hanging_transaction_is_seen_and_aborted() -> None:
    """Its producer wrote without enlisting, so that no coordinator knows where a marker is due."""
    with CoordinatedWorld() as world:
        stray = world.call(world.connection(0), InitProducerRequest())[0]
        world.write(ProducerIdentity(stray.producer_id, 0), b"stray")
        world.written(world.connection(world.leader()), batch(b"behind"))
        assert world.read() == []
        (row,) = world.open_transactions().open
        assert (row.producer_id, row.epoch, row.first_offset) == (stray.producer_id, 0, 0)
        place = world.transaction_place
        hanging = HangingTransaction(world.topic_id, 0, row.producer_id, row.epoch)
        world.seek(place, AbortTransactionRequest(*place, "", hanging))
        assert world.open_transactions().last_stable == 3
        assert world.read() == [b"behind"]


def test_what_hangs_of_a_known_id_is_aborted_once_it_is_over() -> None:
    with CoordinatedWorld() as world:
        me = world.init()
        world.write(me, b"stray")
        place = world.transaction_place
        hanging = HangingTransaction(world.topic_id, 0, me.producer_id, me.epoch)
        with pytest.raises(InvalidTransaction):
            world.seek(place, AbortTransactionRequest(*place, TXN, hanging))
        world.seek(place, AbortTransactionRequest(*place, TXN))
        world.seek(place, AbortTransactionRequest(*place, TXN, hanging))
        assert not world.open_transactions().open
        assert world.read() == []


def test_a_coordinator_that_cannot_confirm_that_it_leads_aborts_nothing() -> None:
    """It may have been replaced, and what it takes for an orphan may belong to a new transaction."""
    with CoordinatedWorld() as world:
        stray = world.call(world.connection(0), InitProducerRequest())[0]
        world.write(ProducerIdentity(stray.producer_id, 0), b"stray")
        names = [f"id-{number}" for number in range(20)]
        places = [world.place(TRANSACTIONS_TOPIC, name) for name in names]
        place = next(place for place in places if world.leader_at(place) != world.leader())
        deaf = world.leader_at(place)
        for other in range(3):
            if other != deaf:
                world.cluster.network.cut(broker_name(other), broker_name(deaf), both=False)
        hanging = HangingTransaction(world.topic_id, 0, stray.producer_id, 0)
        asked = world.ask(world.connection(deaf), AbortTransactionRequest(*place, "", hanging))
        world.until(asked.done)
        assert isinstance(outcome(asked), NotLeader)
        assert len(world.open_transactions().open) == 1


def test_an_operator_hears_when_the_coordinator_is_replaced() -> None:
    with CoordinatedWorld() as world:
        stray = world.call(world.connection(0), InitProducerRequest())[0]
        world.write(ProducerIdentity(stray.producer_id, 0), b"stray")
        place = world.transaction_place
        old = world.leader_at(place)
        hanging = HangingTransaction(world.topic_id, 0, stray.producer_id, 0)
        for broker_id in range(3):
            replica = world.replica(broker_id)
            replica.write_marker = _busy  # type: ignore[method-assign]
        asked = world.ask(world.connection(old), AbortTransactionRequest(*place, "", hanging))
        world.loop.run_for(0.5)
        assert not asked.done()
        world.isolate(old)
        world.until(asked.done)
        assert isinstance(outcome(asked), LeadershipLost)


def _busy(marker: Marker, done: object) -> None:
    raise Busy("not now")


def test_a_topic_that_is_deleted_holds_up_no_transaction() -> None:
    with CoordinatedWorld(partitions=2) as world:
        world.create("doomed")
        me = begun(world)
        doomed = [(world.topic_id_of("doomed"), 0)]
        place = world.transaction_place
        world.seek(place, EnlistRequest(*place, TXN, me.producer_id, me.epoch, doomed, []))
        world.call(world.connection(world.metadata_leader()), DeleteTopicRequest("doomed"))
        world.end(me)
        check_committed(world, b"a")


def test_a_transaction_is_begun_only_when_the_one_before_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with CoordinatedWorld(partitions=2) as world:
        me = begun(world)
        with monkeypatch.context() as patched:
            patched.setattr(Markers, "send", lambda *_: None)
            after = world.end(me)
            place = world.transaction_place
            early = EnlistRequest(*place, TXN, after.producer_id, after.epoch, [(world.topic_id, 0)], [])
            with pytest.raises(ConcurrentTransactions):
                world.answer(world.ask_leader(place, early))


def test_transactions_of_many_end_together() -> None:
    with CoordinatedWorld(partitions=2) as world:
        who = {f"id-{number}": world.init(f"id-{number}") for number in range(20)}
        for name, me in who.items():
            world.enlist(me, (0, 1), name=name)
            world.write(me, name.encode())
            world.write(me, name.encode(), partition=1)
        ends: list[asyncio.Task[Any]] = []
        for number, (name, me) in enumerate(who.items()):
            place = world.place(TRANSACTIONS_TOPIC, name)
            ends.append(world.ask_leader(place, world.end_request(me, number % 2 == 0, name)))
        world.until(lambda: all(task.done() for task in ends))
        world.until_true(lambda: not world.open_transactions(0).open and not world.open_transactions(1).open)
        kept = [name.encode() for number, name in enumerate(who) if number % 2 == 0]
        assert sorted(world.read(0)) == sorted(world.read(1)) == sorted(kept)


def test_the_next_transaction_waits_for_the_end_of_the_one_before() -> None:
    """One request each: nobody has to ask again, and what waits is answered when the markers are written."""
    with CoordinatedWorld(partitions=2) as world:
        me = begun(world)
        place = world.transaction_place
        after = world.end(me)
        early = EnlistRequest(*place, TXN, after.producer_id, after.epoch, [(world.topic_id, 0)], [])
        before = world.loop.time()
        world.answer(world.ask_leader(place, early))
        assert world.loop.time() - before < 0.05
        world.write(after, b"b")
        opened = world.answer(world.ask_leader(place, InitTransactionsRequest(*place, TXN, 60_000)))[0]
        assert opened.epoch == 3, "1 was the open one's, 2 only to fence with"
        assert world.read() == [b"a"]


def test_who_waits_for_an_end_hears_of_the_next_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    with CoordinatedWorld(partitions=2) as world:
        me = begun(world)
        with monkeypatch.context() as patched:
            patched.setattr(Markers, "send", lambda *_: None)
            after = world.end(me)
            place = world.transaction_place
            old = world.leader_at(place)
            early = EnlistRequest(*place, TXN, after.producer_id, after.epoch, [(world.topic_id, 0)], [])
            waiting = world.ask(world.connection(old), early)
            world.loop.run_for(0.1)
            assert not waiting.done()
        world.isolate(old)
        world.until(waiting.done)
        assert isinstance(outcome(waiting), NotLeader | ConcurrentTransactions)
        world.leader_at(place, but=old)
        check_committed(world, b"a")


def test_an_operator_aborts_what_hangs_of_an_id_that_is_forgotten() -> None:
    """Whoever is asked may be of a lower term than the one that ended the producer's transactions there."""
    with CoordinatedWorld(config=BrokerConfig(transactional_id_expiry_ms=20_000)) as world:
        me = world.init()
        place, nobodys = world.transaction_place, world.place(TRANSACTIONS_TOPIC, "")
        for _ in range(3):
            victim = world.leader_at(place)
            world.cluster.kill_broker(victim)
            world.leader_at(place, but=victim)
            restart(world, victim)
            world.pass_time(2.0)
        world.enlist(me)
        world.write(me, b"a")
        after = world.end(me)
        world.until_state("complete_commit")
        world.write(after, b"stray")
        world.pass_time(45.0)
        coordinator = world.transaction_replica(world.leader_at(place))
        assert TXN not in coordinator.machine.transactions
        other = world.broker(world.leader_at(nobodys)).place_of(*nobodys)
        assert other.node.term < coordinator.node.term
        (row,) = world.open_transactions().open
        hanging = HangingTransaction(world.topic_id, 0, row.producer_id, row.epoch)
        world.seek(nobodys, AbortTransactionRequest(*nobodys, "", hanging))
        assert world.open_transactions().open == []
        assert world.read() == [b"a"]
