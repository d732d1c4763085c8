"""Brokers carry out transactions: every step, and what goes wrong between the steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from broker_kit import TIMEOUT_S, batch, outcome
from coordination_kit import GROUP, TXN, CoordinatedWorld, visible

from raftlog.broker.internal_topics import TRANSACTIONS_TOPIC
from raftlog.broker.markers import Markers
from raftlog.config import BrokerConfig
from raftlog.errors import (
    Busy,
    ConcurrentTransactions,
    InvalidTransaction,
    LeadershipLost,
    NotLeader,
    ProducerFenced,
    StaleCoordinator,
    TransactionAborted,
    TransactionTimedOut,
    UnstableOffsets,
    from_wire,
)
from raftlog.net.rpc import (
    OFFSET_LATEST,
    READ_COMMITTED,
    READ_UNCOMMITTED,
    DeleteTopicRequest,
    InitProducerRequest,
    ListOffsetsRequest,
    OffsetQuery,
)
from raftlog.net.rpc_transactions import (
    AbortTransactionRequest,
    EnlistRequest,
    HangingTransaction,
    InitTransactionsRequest,
    MarkerRow,
    ProducerIdentity,
    WriteMarkersRequest,
)
from raftlog.record.control import Marker
from raftlog.testing.disk import CrashMode
from raftlog.testing.sim_cluster import broker_name


def begun(world: CoordinatedWorld, value: bytes = b"a") -> ProducerIdentity:
    """A transaction over two partitions and a group, ready to end."""
    me = world.init()
    world.enlist(me, (0, 1), (GROUP,))
    world.write(me, value)
    world.write(me, value, partition=1)
    world.stage(me, 17)
    return me


def check_committed(world: CoordinatedWorld, *values: bytes) -> None:
    """Everything of it is there, once, and nothing is open."""
    world.until_state("complete_commit")
    assert (world.read(0), world.read(1)) == ([*values], [*values])
    assert world.offsets() == {0: 17}
    for partition in (0, 1):
        found = world.open_transactions(partition)
        assert not found.open
        assert found.last_stable == found.committed


def restart(world: CoordinatedWorld, broker_id: int) -> None:
    world.cluster.start_broker(broker_id)
    world.cluster.introduce()


def test_a_transaction_from_begin_to_end() -> None:
    with CoordinatedWorld(partitions=2) as world:
        me = begun(world)
        assert world.read(isolation=READ_UNCOMMITTED) == [b"a"]
        assert world.read(isolation=READ_COMMITTED) == []
        row = world.transaction()
        assert (row.state, len(row.partitions), row.groups) == ("ongoing", 2, [GROUP])
        after = world.end(me)
        assert (after.producer_id, after.epoch) == (me.producer_id, me.epoch + 1)
        check_committed(world, b"a")
        world.enlist(after)
        world.write(after, b"b")
        again = world.end(after, commit=False)
        world.until_state("complete_abort")
        assert (world.read(), again.epoch) == ([b"a"], 2)
        assert world.read(isolation=READ_UNCOMMITTED) == [b"a", b"b"], "only who asks for it is spared it"


# -- a crash at every step -----------------------------------------------------------------------------------

DELAYS_MS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 9.0, 14.0, 25.0)
"""After the request to end: before it comes, before the decision is durable, before it is applied, before any
marker is written, with some, with all, behind the end."""


@pytest.mark.parametrize("delay_ms", DELAYS_MS)
@pytest.mark.parametrize("how", ["kill", "power"])
def test_the_coordinator_dies_around_the_end(delay_ms: float, how: str) -> None:
    with CoordinatedWorld(partitions=2, seed=int(delay_ms) + 7) as world:
        me = begun(world)
        victim = world.leader_at(world.transaction_place)
        world.ask(world.connection(victim), world.end_request(me)).add_done_callback(outcome)
        world.loop.run_for(delay_ms / 1000)
        if how == "kill":
            world.cluster.kill_broker(victim)
        else:
            world.cluster.cut_power(victim, CrashMode.RANDOM)
        world.leader_at(world.transaction_place, but=victim)
        assert world.end(me).epoch == 1, "the retry is answered as the first try was, or would have been"
        check_committed(world, b"a")
        restart(world, victim)
        world.loop.run_for(2.0)
        check_committed(world, b"a")
        assert world.end(me).epoch == 1, "still"


@pytest.mark.parametrize("step", ["init", "enlist", "write", "stage"])
def test_the_coordinator_dies_between_the_steps(step: str) -> None:
    with CoordinatedWorld(partitions=2) as world:

        def crash(after: str) -> None:
            if step == after:
                victim = world.leader_at(world.transaction_place)
                world.cluster.kill_broker(victim)
                world.leader_at(world.transaction_place, but=victim)
                restart(world, victim)

        me = world.init()
        crash("init")
        world.enlist(me, (0, 1), (GROUP,))
        crash("enlist")
        world.write(me, b"a")
        world.write(me, b"a", partition=1)
        crash("write")
        world.stage(me, 17)
        crash("stage")
        world.end(me)
        check_committed(world, b"a")


@pytest.mark.parametrize("reached", [0, 1, 2])
def test_some_markers_are_written_when_the_coordinator_dies(
    reached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one sends all of them again; who has one takes it for the same."""
    send = Markers.send
    sent: list[MarkerRow] = []

    def only_some(self: Markers, row: MarkerRow, *rest: Any) -> None:
        if len(sent) < reached:
            sent.append(row)
            send(self, row, *rest)

    with CoordinatedWorld(partitions=2) as world:
        me = begun(world)
        monkeypatch.setattr(Markers, "send", only_some)
        world.end(me)
        world.loop.run_for(1.0)
        assert world.transaction().state == "prepare_commit"
        assert len(world.open_transactions(0).open) == (reached < 1)
        assert len(world.open_transactions(1).open) == (reached < 2)
        monkeypatch.undo()
        victim = world.leader_at(world.transaction_place)
        world.cluster.kill_broker(victim)
        world.leader_at(world.transaction_place, but=victim)
        check_committed(world, b"a")
        assert world.committed(world.leader()) == 2, "one record and one marker"


def test_leaders_of_partitions_die_while_markers_are_due() -> None:
    with CoordinatedWorld(brokers=5, partitions=2, replication=3) as world:
        me = begun(world)
        coordinator = world.leader_at(world.transaction_place)
        victims = {world.leader(0), world.leader(1), world.leader_at(world.group_place)} - {coordinator}
        assert victims
        for victim in sorted(victims)[:2]:
            world.cluster.kill_broker(victim)
        world.end(me)
        world.loop.run_for(2.0)
        for victim in sorted(victims)[:2]:
            restart(world, victim)
        check_committed(world, b"a")


def test_all_brokers_lose_power_with_a_decision_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with CoordinatedWorld(partitions=2) as world:
        me = begun(world)
        with monkeypatch.context() as patched:
            patched.setattr(Markers, "send", lambda *_: None)
            world.end(me)
        for broker_id in range(3):
            world.cluster.cut_power(broker_id, CrashMode.RANDOM)
        for broker_id in range(3):
            world.cluster.start_broker(broker_id)
        world.cluster.introduce()
        check_committed(world, b"a")


# -- who is who ----------------------------------------------------------------------------------------------


def test_a_marker_of_a_replaced_coordinator_is_refused() -> None:
    """The old one is cut off, another takes over, and then the old one's word comes after all."""
    with CoordinatedWorld(partitions=2) as world:
        me = begun(world)
        old = world.leader_at(world.transaction_place)
        term = world.transaction_replica(old).node.term
        world.isolate(old)
        world.leader_at(world.transaction_place, but=old)
        world.until(lambda: world.transaction_replica(old).staged is None)
        world.end(me)
        check_committed(world, b"a")
        after = ProducerIdentity(me.producer_id, 1)
        world.enlist(after, (0, 1))
        world.write(after, b"b")
        leader = world.leader(0)
        peer = world.dial(leader, "broker", as_broker=old, incarnation=1 << 40, purpose="control")
        late = MarkerRow(world.topic_id, 0, me.producer_id, 1, term, commit=False)
        errors = world.call(peer, WriteMarkersRequest([late]))[0].errors
        assert isinstance(from_wire(errors[0].name, errors[0].message, errors[0].details), StaleCoordinator)
        assert len(world.open_transactions(0).open) == 1, "the next transaction goes on"


def test_a_coordinator_that_is_cut_off_decides_nothing() -> None:
    with CoordinatedWorld(partitions=2) as world:
        me = begun(world)
        old = world.leader_at(world.transaction_place)
        world.isolate(old)
        doomed = world.ask(world.connection(old), world.end_request(me, commit=False))
        world.leader_at(world.transaction_place, but=old)
        world.end(me)
        world.cluster.network.heal()
        world.until(doomed.done, 2 * TIMEOUT_S)
        assert doomed.exception() is not None
        check_committed(world, b"a")


def test_a_retry_is_not_answered_with_what_is_only_staged() -> None:
    with CoordinatedWorld(partitions=2) as world:
        me = begun(world)
        old = world.leader_at(world.transaction_place)
        world.isolate(old)
        first = world.ask(world.connection(old), world.end_request(me))
        world.loop.run_for(0.02)
        again = world.ask(world.connection(old), world.end_request(me))
        world.loop.run_for(0.3)
        assert not again.done(), "nobody else has the decision: it may yet be lost"
        world.leader_at(world.transaction_place, but=old)
        world.until(lambda: first.done() and again.done())
        assert isinstance(outcome(first), LeadershipLost)
        assert isinstance(outcome(again), LeadershipLost)
        world.end(me, commit=False)
        world.until_state("complete_abort")
        assert world.read() == []


def test_a_second_producer_fences_the_first() -> None:
    with CoordinatedWorld(partitions=2) as world:
        first = begun(world)
        second = world.init()
        assert (second.producer_id, second.epoch) == (first.producer_id, 2), "1 was only to fence with"
        with pytest.raises(ProducerFenced):
            world.end(first)
        with pytest.raises((ProducerFenced, TransactionAborted)):
            world.write(first, b"late", sequence=1)
        assert world.read(0) == []
        with pytest.raises((ProducerFenced, InvalidTransaction)):
            world.stage(first, 18)
        world.enlist(second)
        world.write(second, b"b")
        world.end(second)
        world.until_state("complete_commit")
        assert world.read(0) == [b"b"]


def test_a_delayed_end_does_not_touch_the_next_transaction() -> None:
    with CoordinatedWorld(partitions=2) as world:
        me = begun(world)
        after = world.end(me)
        world.enlist(after)
        world.write(after, b"b")
        assert world.end(me) == after, "the late copy is answered as the first"
        with pytest.raises(InvalidTransaction):
            world.end(me, commit=False)
        assert world.transaction().state == "ongoing"
        world.end(after, commit=False)
        world.until_state("complete_abort")
        assert world.read() == [b"a"]


def test_no_producer_id_is_given_twice() -> None:
    """10,000 ask at once, brokers die amid their blocks and come back."""
    with CoordinatedWorld() as world:
        found: list[int] = []

        async def ask(broker_id: int, count: int) -> None:
            connection = connections[broker_id]
            for _ in range(count):
                try:
                    answer, _ = await connection.call(InitProducerRequest(), timeout=TIMEOUT_S)
                except Exception:  # noqa: BLE001 - whatever a dying broker does
                    return
                found.append(answer.producer_id)

        connections = {broker_id: world.dial(broker_id) for broker_id in range(3)}
        tasks = [world.loop.run_as("raw", ask(n % 3, 100)) for n in range(99)]
        world.until(lambda: len(found) > 3_000)
        world.cluster.kill_broker(1)
        world.until(lambda: len(found) > 5_000)
        restart(world, 1)
        connections = {broker_id: world.dial(broker_id) for broker_id in range(3)}
        tasks += [world.loop.run_as("raw", ask(n % 3, 100)) for n in range(60)]
        world.until(lambda: all(task.done() for task in tasks))
        assert len(found) > 10_000
        inits = [world.init(f"id-{number}").producer_id for number in range(20)]
        found += inits
        assert len(set(found)) == len(found)


def test_many_open_the_same_id_at_once() -> None:
    """Each gets an identity of its own, or is told to ask again."""
    with CoordinatedWorld() as world:
        world.init()
        place = world.transaction_place
        request = InitTransactionsRequest(*place, TXN, 60_000)
        tasks = [world.ask_leader(place, request) for _ in range(20)]
        world.until(lambda: all(task.done() for task in tasks))
        given = [(task.result()[0].producer_id, task.result()[0].epoch) for task in tasks]
        assert len(set(given)) == 20


# -- readers of committed records ----------------------------------------------------------------------------


def test_a_reader_waits_for_the_marker() -> None:
    with CoordinatedWorld() as world:
        me = world.init()
        world.enlist(me)
        place = (world.topic_id, 0)
        poll = world.ask_leader(place, world.committed_fetch(wait_ms=20_000))
        world.write(me, b"a")
        world.write(me, b"b", sequence=1)
        world.loop.run_for(1.0)
        assert not poll.done(), "no empty answer for each batch of an open transaction"
        world.end(me)
        response, payload = world.answer(poll)
        assert visible(payload, response.partitions[0].aborted) == ([b"a", b"b"], 3)
        assert (response.partitions[0].last_stable, response.partitions[0].committed) == (3, 3)


def test_a_reader_ahead_of_the_last_stable_offset_waits_until_that_has_come_by() -> None:
    with CoordinatedWorld() as world:
        me, other = world.init(), world.init("other")
        world.enlist(me)
        world.enlist(other, name="other")
        world.write(me, b"a")
        world.write(other, b"b")
        poll = world.ask_leader((world.topic_id, 0), world.committed_fetch(2, wait_ms=20_000))
        world.end(me)
        world.until_true(lambda: world.open_transactions().last_stable == 1)
        world.loop.run_for(0.5)
        assert not poll.done(), "it has moved, and is behind the reader still"
        world.end(other, name="other")
        response, payload = world.answer(poll)
        assert visible(payload, response.partitions[0].aborted)[1] == 4


def test_nothing_above_the_first_open_transaction_is_read() -> None:
    with CoordinatedWorld() as world:
        me, other = world.init(), world.init("other")
        world.written(world.dial(world.leader()), batch(b"plain"))
        world.enlist(me)
        world.write(me, b"a")
        world.enlist(other, name="other")
        world.write(other, b"b")
        world.end(other, commit=False, name="other")
        world.until_true(lambda: len(world.open_transactions().open) == 1)
        assert world.read() == [b"plain"]
        latest = [
            world.seek(
                (world.topic_id, 0),
                ListOffsetsRequest([OffsetQuery(world.topic_id, 0, OFFSET_LATEST)], isolation),
            )[0]
            .answers[0]
            .offset
            for isolation in (READ_UNCOMMITTED, READ_COMMITTED)
        ]
        assert latest == [4, 1]
        world.end(me)
        world.until_true(lambda: not world.open_transactions().open)
        assert world.read() == [b"plain", b"a"]


@pytest.mark.parametrize("how", ["kill", "all lose power"])
def test_the_last_stable_offset_survives_elections_and_replay(how: str) -> None:
    with CoordinatedWorld(topic_config={"segment_bytes": 1 << 16}) as world:
        me = world.init()
        world.enlist(me)
        connection = world.connection(world.leader())
        world.written(connection, batch(b"before"))
        first = world.write(me, b"a")
        for number in range(4):  # the transaction lies segments, and so a snapshot, behind the end
            world.written(connection, batch(b"%d" % number + bytes(40_000)))
        if how == "kill":
            victim = world.leader()
            world.cluster.kill_broker(victim)
            world.leader(but=victim)
        else:
            for broker_id in range(3):
                world.cluster.cut_power(broker_id, CrashMode.RANDOM)
            for broker_id in range(3):
                world.cluster.start_broker(broker_id)
            world.cluster.introduce()
        assert world.open_transactions().last_stable == first
        assert world.read() == [b"before"]
        for broker in world.cluster.brokers.values():
            machine = broker.partition(world.topic_id, 0).machine
            assert machine.last_stable_offset <= first, "no replica is ahead of what it has applied"
        world.end(me)
        world.until_true(lambda: not world.open_transactions().open)
        assert world.read()[:2] == [b"before", b"a"]


# -- offsets of a group --------------------------------------------------------------------------------------


def test_offsets_are_not_told_while_a_decision_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    send = Markers.send
    held: list[Callable[[], None]] = []
    with CoordinatedWorld(partitions=2) as world:
        world.commit(3)
        me = begun(world)
        with monkeypatch.context() as patched:
            patched.setattr(
                Markers, "send", lambda self, *rest: held.append(lambda: send(self, *rest)), raising=True
            )
            world.end(me)
            world.loop.run_for(0.5)
        assert len(held) == 3
        with pytest.raises(UnstableOffsets):
            world.answer(world.ask_leader(world.group_place, world.fetch_offsets_request()))
        world.loop.run_as("raw", _call_all(held))
        check_committed(world, b"a")


async def _call_all(held: list[Callable[[], None]]) -> None:
    for each in held:
        each()


def test_offsets_of_an_aborted_transaction_are_forgotten() -> None:
    with CoordinatedWorld(partitions=2) as world:
        world.commit(3)
        me = begun(world)
        world.end(me, commit=False)
        world.until_state("complete_abort")
        assert world.offsets() == {0: 3}


# -- time, and operators -------------------------------------------------------------------------------------


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
