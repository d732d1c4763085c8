"""Brokers carry out transactions: every step, and what goes wrong between the steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from broker_kit import RAW, TIMEOUT_S, batch, outcome
from coordination_kit import GROUP, TXN, CoordinatedWorld, begun, check_committed, restart, visible

from raftlog.broker.markers import Markers
from raftlog.config import BrokerConfig
from raftlog.errors import (
    InvalidTransaction,
    LeadershipLost,
    ProducerFenced,
    StaleCoordinator,
    TransactionAborted,
    UnstableOffsets,
    from_wire,
)
from raftlog.net.rpc import (
    OFFSET_LATEST,
    READ_COMMITTED,
    READ_UNCOMMITTED,
    InitProducerRequest,
    ListOffsetsRequest,
    OffsetQuery,
)
from raftlog.net.rpc_transactions import (
    InitTransactionsRequest,
    MarkerRow,
    ProducerIdentity,
    WriteMarkersRequest,
)
from raftlog.storage.replica_log import ReplicaLog
from raftlog.testing.disk import CrashMode


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
        assert world.end(me).epoch == after.epoch, "the late copy is answered as the first"
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


def test_what_retention_drops_while_it_is_read_does_not_show_what_was_aborted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {"segment_bytes": 64 << 10, "retention_ms": 15_000}
    with CoordinatedWorld(brokers=1, topic_config=config) as world:
        me = world.init()
        world.enlist(me)
        world.write(me, b"aborted")
        world.end(me, commit=False)
        world.until_state("complete_abort")
        connection = world.dial(0)
        for number in range(120):
            world.written(connection, batch(b"%d-" % number + b"v" * 2_000))
        world.cluster.run(world.broker(0).store.flush(), node="broker-0")
        world.cluster.kill_broker(0)
        world.cluster.start_broker(0)
        world.leader()
        replica = world.replica(0)
        assert replica.machine.log_start == 0
        world.cluster.disks[0].cached = False
        original = ReplicaLog.read

        async def slow_read(self: ReplicaLog, *args: Any) -> Any:
            """The device takes its time; meanwhile the log's start moves."""
            found = await original(self, *args)
            while self is replica.log and not replica.machine.log_start:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            return found

        monkeypatch.setattr(ReplicaLog, "read", slow_read)
        response, payload = world.call(world.dial(0), world.committed_fetch(0))
        assert replica.machine.log_start > 0
        row = response.partitions[0]
        if row.error is None:
            assert b"aborted" not in visible(payload, row.aborted)[0]
        else:
            assert row.error.name == "OffsetOutOfRange"


# -- size ----------------------------------------------------------------------------------------------------


def test_what_coordinators_write_down_stays_bounded_under_endless_transactions() -> None:
    segment = 64 << 10
    config = BrokerConfig(internal_partitions=1, internal_segment_bytes=segment)
    with CoordinatedWorld(config=config) as world:
        connection = world.connection(world.leader_at(world.transaction_place))
        request = InitTransactionsRequest(*world.transaction_place, TXN, 60_000)
        last = []

        async def begin_many() -> None:
            for _ in range(400):
                answer, _ = await connection.call(request, timeout=TIMEOUT_S)
                last.append((answer.producer_id, answer.epoch))

        logs = [world.transaction_replica(broker_id).log for broker_id in range(3)]
        for _ in range(8):
            task = world.loop.run_as(RAW, begin_many())
            world.until(task.done)
            task.result()
            world.pass_time(12.0)  # the housekeepers come by
            sizes = [sum(each.append_position for each in log.segments) for log in logs]
            assert max(sizes) <= 3 * segment, sizes
        assert min(log.first_index for log in logs) > 1_000, "what came before was written, and is gone"
        victim = world.leader_at(world.transaction_place)
        world.cluster.kill_broker(victim)
        world.leader_at(world.transaction_place, but=victim)
        row = world.transaction()
        assert (row.producer_id, row.epoch) == last[-1]
