"""Groups and transactions under faults: a pipeline of production clients, and what must be true of it.

Feeders write transactions to the topic ``in``; some share a transactional id, so that each becomes the
other's zombie. Workers are a group that processes ``in`` into ``out`` exactly once: records and offsets in
one transaction. Takers commit positions without any. Watchers read along, with and without what is not
committed. In the end nothing hangs, every committed input was processed once, and the groups' positions say
so.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from raftlog import aio
from raftlog.broker import transactions
from raftlog.broker.group_replica import GroupReplica
from raftlog.broker.partition import PartitionReplica
from raftlog.broker.replica import Replica
from raftlog.broker.transaction_replica import TransactionReplica
from raftlog.client.aio_consumer import Consumer
from raftlog.client.aio_producer import Producer, Transaction
from raftlog.errors import CommitInDoubt, RaftlogError, TransactionAborted
from raftlog.record.types import Record, TopicPartition
from raftlog.state.groups import Key
from raftlog.state.transactions import Phase
from raftlog.testing.books import Violation
from raftlog.testing.echo import Echo
from raftlog.testing.history import History, Outcome, Place, Read, Send
from raftlog.testing.history import Transaction as Story
from raftlog.testing.loop import current_node
from raftlog.testing.old_seat import OldSeat
from raftlog.testing.pipeline_profile import PipelineProfile
from raftlog.testing.sim_cluster import SimCluster
from raftlog.testing.takers import GROUPS, Taker, is_forgotten, visit

IN: Final = "in"
OUT: Final = "out"
GROUP: Final = "workers"
COMMITS_MAX: Final = 3
"""How often a producer asks for the outcome of its commit before it gives up."""
LEAVE_CHANCE: Final = 0.01
"""That a worker leaves its group after a poll, and joins again."""
VALUE_BYTES_MAX: Final = 12_000
AUDIT_SECONDS: Final = 120.0


class Pipeline:
    """The clients of one run.

    Args:
        cluster: that they use.
        profile: how many, and of what kind.
        history: where they note what they do.
        rng: decides what they do.
    """

    def __init__(
        self, cluster: SimCluster, profile: PipelineProfile, history: History, rng: random.Random
    ) -> None:
        self.cluster = cluster
        self.profile = profile
        self.history = history
        self.random = rng
        self.clients: dict[str, asyncio.Task[None]] = {}
        """Node -> what runs there."""
        self.committing: set[str] = set()
        """Nodes that wait for the answer to a commit."""
        self.counts: Counter[str] = Counter()
        self._incarnations: Counter[str] = Counter()
        self._is_ending = False
        self._names: Counter[str] = Counter()
        self._left: Counter[str] = Counter()
        self._sessions: dict[str, str] = {}
        """Worker -> under which name it reads now."""
        self._consumers: dict[str, Consumer] = {}
        """Worker -> its member of the group."""
        cluster.watch.ownership.holds = self._holds
        self._echo = Echo(cluster, random.Random(rng.getrandbits(64)), self.counts)

    # -- clients ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Make the topics, and start everybody."""
        setattr(transactions, "EPOCH_MAX", self.profile.epoch_max)  # noqa: B010 - a constant, to type checkers
        profile = self.profile
        self.cluster.run(self._create(), node="admin")
        if profile.offsets_retention_ms is not None:
            self.cluster.run(visit(self.log("visitor"), IN), node="visitor")
        for number in range(profile.feeders):
            self._left[f"feeder-{number}"] = profile.transactions
            self._start(f"feeder-{number}")
        for number in range(profile.workers):
            self._start(f"worker-{number}")
        for name in ("watcher-committed", "watcher-all"):
            self._start(name)
        for group in GROUPS:
            for number in range(profile.takers):
                self._start(f"taker-{group}-{number}")
        if profile.echoes:
            self._echo.start()

    def restart(self, node: str) -> None:
        """SIGKILL a client; another one takes its place."""
        self.cluster.loop.kill(node)
        self._start(node)

    def _start(self, node: str) -> None:
        self.committing.discard(node)
        self._incarnations[node] += 1
        name = f"{node}.{self._incarnations[node]}"
        kind, _, which = node.partition("-")
        if kind == "feeder":
            work = self._feed(name, node, f"feed-{0 if self.profile.shares_ids else which}")
        elif kind == "worker":
            work = self._work(name, node, f"work-{which}")
        elif kind == "taker":
            work = self._take(name, node, which.rpartition("-")[0])
        else:
            work = self._watch(name, node, "read_committed" if which == "committed" else "read_uncommitted")
        self.clients[node] = self.cluster.loop.run_as(node, work)

    async def _take(self, name: str, node: str, group: str) -> None:
        def joined(consumer: Consumer) -> None:
            self._consumers[name] = consumer

        taker = Taker(
            group,
            IN,
            self.profile,
            self.history,
            self.random,
            self.counts,
            joined=joined,
            failed=self._count,
            committing=self._is_committing,
        )
        await taker.work(self.log(node))

    def log(self, node: str) -> aio.Log:
        """A client in a process of its own."""
        return aio.Log(self.cluster.bootstrap, lambda _: self.cluster.client(node))

    async def _create(self) -> None:
        log = self.log("admin")
        for topic in (IN, OUT):
            await log.create_topic(topic, self.profile.partitions, config={"segment_bytes": 64 << 10})
        await log.close()

    def _new_name(self, name: str) -> str:
        self._names[name] += 1
        return f"{name}/{self._names[name]}"

    def _settings(self) -> dict[str, Any]:
        rng = self.random
        return {
            "linger_ms": rng.choice([0, 1, 20]),
            "delivery_timeout_ms": rng.choice([2_000, 20_000]),
            "request_timeout_ms": rng.choice([300, 2_000]),
            "max_block_ms": 20_000,
            "transaction_timeout_ms": rng.choice(self.profile.timeout_ms),
            "max_in_flight": rng.choice([1, 5]),
        }

    # -- feeders ---------------------------------------------------------------------------------------------

    async def _feed(self, name: str, node: str, transactional_id: str) -> None:
        rng = self.random
        log = self.log(node)
        while self._left[node] > 0:
            try:
                async with log.producer(transactional_id=transactional_id, **self._settings()) as producer:
                    while self._left[node] > 0:
                        self._left[node] -= 1
                        await self._write(producer, self._new_name(name))
                        await asyncio.sleep(rng.choice([0, 0.05, 0.3, 1.0]))
            except RaftlogError as error:
                self._count(error)
                await asyncio.sleep(rng.uniform(0.1, 2.0))
        await log.close()

    async def _write(self, producer: Producer, name: str) -> None:
        """One transaction. A fatal error, or one that leaves it in doubt, goes on."""
        rng = self.random
        story = self.history.transactions[name] = Story(name)
        transaction = producer.transaction()
        await transaction.begin()
        try:
            for number in range(rng.randint(1, 5)):
                place = rng.randrange(self.profile.partitions)
                value = f"{name}/{number}".encode()
                if rng.random() < self.profile.large_values:
                    value += rng.randbytes(rng.randrange(VALUE_BYTES_MAX))
                await self._send(transaction, story, IN, place, value)
                await self._dawdle()
            if rng.random() < 0.2:
                story.outcome = Outcome.FAILED
                await transaction.abort(10.0)
                self.counts["transactions aborted"] += 1
            else:
                await self._commit(transaction, story)
        except RaftlogError as error:
            await self._give_up(transaction, story, error)

    async def _send(
        self, transaction: Transaction, story: Story, topic: str, partition: int, value: bytes
    ) -> None:
        place = f"{topic}/{partition}"
        send = self.history.sends[value] = Send(story.name, place, value, transaction=story.name)
        delivery = await transaction.send(topic, value, partition=partition)
        story.sent.append(value)
        asyncio.get_running_loop().create_task(_note(send, delivery))

    def _stalls(self, share: float = 1.0) -> bool:
        """Not in the end: a single worker would not get there in time."""
        return not self._is_ending and self.random.random() < self.profile.stall * share

    async def _dawdle(self) -> None:
        """User code takes its time."""
        if self._stalls():
            await asyncio.sleep(self.random.choice([0.1, 1.0, max(self.profile.timeout_ms) / 1000]))

    async def _commit(self, transaction: Transaction, story: Story) -> None:
        story.end_asked = asyncio.get_running_loop().time()
        producer_id = transaction._producer._manager._identity.producer_id
        for attempt in range(COMMITS_MAX):
            story.outcome = Outcome.UNKNOWN
            try:
                with self._is_committing():
                    await transaction.commit(self.random.choice([0.5, 5.0, 20.0]))
            except CommitInDoubt:
                self.counts["commits in doubt"] += 1
                if attempt == COMMITS_MAX - 1:
                    raise
            except TransactionAborted:
                story.outcome = Outcome.FAILED
                raise
            else:
                story.outcome = Outcome.OK
                self.counts["transactions committed"] += 1
                if transaction._producer._manager._identity.producer_id != producer_id:
                    self.counts["epochs used up"] += 1
                return

    @contextmanager
    def _is_committing(self) -> Iterator[None]:
        """A client waits for the answer to a commit in this block."""
        node = current_node.get()
        assert node is not None, "clients run on nodes of their own"
        self.committing.add(node.name)
        try:
            yield
        finally:
            self.committing.discard(node.name)

    async def _give_up(self, transaction: Transaction, story: Story, error: RaftlogError) -> None:
        """It has failed: abort it, so that the next can begin; raise where that is not possible."""
        self._count(error)
        if story.end_asked is None:
            story.outcome = Outcome.FAILED  # nobody has asked for a commit
        if error.fatal or isinstance(error, CommitInDoubt):
            raise error
        await transaction.abort(10.0)

    def _count(self, error: RaftlogError) -> None:
        """Note an error, and what it came of: an abort has a cause."""
        each: BaseException | None = error
        while isinstance(each, RaftlogError):
            self.counts[type(each).__name__] += 1
            each = each.__cause__

    # -- workers ---------------------------------------------------------------------------------------------

    async def _work(self, name: str, node: str, transactional_id: str) -> None:
        rng, profile = self.random, self.profile
        log = self.log(node)
        while True:
            try:
                async with log.producer(transactional_id=transactional_id, **self._settings()) as producer:
                    consumer = log.consumer(
                        IN,
                        group=GROUP,
                        session_timeout_ms=profile.session_timeout_ms,
                        rebalance_timeout_ms=profile.rebalance_timeout_ms,
                        fetch_wait_ms=100,
                        assignor=rng.choice(["uniform", "sticky"]),
                        on_assigned=lambda _: self._new_session(name),
                    )
                    try:
                        await self._pump(producer, consumer, name)
                    finally:
                        await consumer.close()
            except RaftlogError as error:
                self._count(error)
                await asyncio.sleep(rng.uniform(0.05, 1.0))

    async def _pump(self, producer: Producer, consumer: Consumer, name: str) -> None:
        """Consume, transform, produce; now and then leave the group."""
        rng = self.random
        self._consumers[name] = consumer
        self._new_session(name)
        while rng.random() > LEAVE_CHANCE:
            records = await consumer.poll(0.5, rng.randint(1, 8))
            if records:
                self._polled(name, records)
                if self._stalls(0.5):  # others may get these partitions meanwhile
                    await asyncio.sleep(rng.choice([0.3, 1.2 * self.profile.rebalance_timeout_ms / 1000]))
                if not await self._process(producer, consumer, records, name):
                    await consumer.seek_to_committed()
                    self._new_session(name)

    def _holds(self, member_id: str) -> list[Key]:
        """The partitions that a worker's consumer reads, as a member of this id."""
        return [
            (view.topic_id, view.index)
            for consumer in self._consumers.values()
            for member in [consumer._core.in_group.member]
            if member._member_id == member_id
            for view in member._held
        ]

    def _new_session(self, name: str) -> None:
        """From now on it is a reader that begins anew, where its group is."""
        session = self._sessions[name] = self._new_name(f"{name} reads")
        self.history.committed_only.add(session)

    def _polled(self, name: str, records: Iterable[Record]) -> None:
        now = asyncio.get_running_loop().time()
        for record in records:
            reader = self._sessions[name], _place(record)
            self.history.begins.setdefault(reader, record.offset)
            self.history.polled(reader, [(record.offset, bytes(record.value))], now)

    async def _process(
        self, producer: Producer, consumer: Consumer, records: list[Record], name: str
    ) -> bool:
        """One transaction of outputs and positions; False: it was aborted, read again."""
        rng = self.random
        name = self._new_name(name)
        story = self.history.transactions[name] = Story(name, GROUP)
        story.polled = [(_place(each), each.offset, bytes(each.value)) for each in records]
        positions = consumer.positions_for_commit()
        story.offsets = {_place(where): offset for where, (offset, _) in positions.items()}
        seat = consumer.member
        if rng.random() < 0.5:
            seat = OldSeat.of(seat.membership)
        transaction = producer.transaction()
        await transaction.begin()
        try:
            early = rng.random() < 0.5
            if early:
                await producer._manager.send_offsets(seat, positions)
            for record in records:
                value = b"%s|%s" % (record.value, name.encode())
                await self._send(transaction, story, OUT, rng.randrange(self.profile.partitions), value)
                await self._dawdle()
            if not early:
                await producer._manager.send_offsets(seat, positions)
            if rng.random() < 0.05:
                story.outcome = Outcome.FAILED
                await transaction.abort(10.0)
                return False
            await self._commit(transaction, story)
        except RaftlogError as error:
            await self._give_up(transaction, story, error)
            return False
        self.counts["records processed"] += len(records)
        return True

    # -- watchers --------------------------------------------------------------------------------------------

    async def _watch(self, name: str, node: str, isolation: str) -> None:
        if isolation == "read_committed":
            self.history.committed_only.add(name)
        loop = asyncio.get_running_loop()
        consumer = self.log(node).consumer(IN, OUT, isolation=isolation, fetch_wait_ms=100)
        while True:
            for record in await consumer.poll(1.0, 50):
                read = record.offset, bytes(record.value)
                self.history.polled((name, _place(record)), [read], loop.time())

    # -- the end ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Whatever happened: leave nothing behind."""
        self._echo.stop()
        setattr(transactions, "EPOCH_MAX", PipelineProfile.epoch_max)  # noqa: B010 - a constant, to type checkers

    @property
    def feeders_done(self) -> bool:
        """Whether all that was to be written was tried."""
        return all(task.done() for node, task in self.clients.items() if node.startswith("feeder"))

    def finish(self, wait_until: Callable[[Callable[[], bool]], None]) -> None:
        """Let the workers catch up, end everybody, and read it all.

        Raises:
            Violation: something hangs.
        """
        wait_until(lambda: self.feeders_done)
        self._is_ending = True
        self._raise_what_ended()
        self._echo.stop()
        wait_until(self._nothing_is_open)
        ends = self.cluster.run(self._ends(), node="pipeline auditor", seconds=AUDIT_SECONDS)
        wait_until(lambda: all(self._are_at(group, ends) for group in self._groups()))
        self._raise_what_ended()
        for node in self.clients:
            self.cluster.loop.kill(node)
        wait_until(self._nothing_is_open)
        self._check_stable()
        self.cluster.run(self._audit(), node="pipeline auditor", seconds=AUDIT_SECONDS)
        if self.profile.offsets_retention_ms is not None:
            wait_until(self._visitors_are_forgotten)
            self.counts["groups forgotten"] += 1

    def _raise_what_ended(self) -> None:
        for task in self.clients.values():
            if task.done():
                task.result()

    def _leaders(self) -> list[Replica[Any]]:
        return [
            replica
            for broker in self.cluster.brokers.values()
            for replica in broker.replicas()
            if replica.staged is not None and replica.fault is None
        ]

    def _lead_everything(self, leaders: list[Replica[Any]]) -> bool:
        """Whether every partition has one of these leaders: of one that has none nobody can tell what is
        open."""
        led = {(each.log.spec.topic_id, each.log.spec.partition) for each in leaders}
        return led.issuperset(
            (topic.topic_id, index)
            for broker in self.cluster.brokers.values()
            for topic in broker.metadata.image.topics.values()
            for index in range(len(topic.partitions))
        )

    def _nothing_is_open(self) -> bool:
        """No transaction is under way, by what the leaders of all coordinators and partitions say."""
        leaders = self._leaders()
        if not self._lead_everything(leaders):
            return False
        for replica in leaders:
            if isinstance(replica, TransactionReplica):
                phases = [each.phase for each in replica.machine.transactions.values()]
                if any(phase is Phase.ONGOING or phase.is_ending for phase in phases):
                    return False
            elif isinstance(replica, PartitionReplica) and replica.log.spec.topic in (IN, OUT):
                if replica.node.applied < replica.node.last_index:
                    return False
            elif isinstance(replica, GroupReplica) and replica.machine.pending:
                return False
        return True

    def _check_stable(self) -> None:
        """With no transaction under way, none is open anywhere, and all that is committed is readable."""
        for replica in self._leaders():
            if isinstance(replica, PartitionReplica) and replica.machine.open:
                machine, spec = replica.machine, replica.log.spec
                raise Violation(
                    f"hanging transaction: {machine.open} in {spec.topic}/{spec.partition}, the last stable "
                    f"offset is {machine.last_stable_offset} of {machine.next_offset}"
                )

    def _groups(self) -> tuple[str, ...]:
        return (GROUP, *GROUPS) if self.profile.takers else (GROUP,)

    def _coordinators(self) -> list[GroupReplica]:
        return [replica for replica in self._leaders() if isinstance(replica, GroupReplica)]

    def _are_at(self, group: str, ends: dict[Place, int]) -> bool:
        """Whether a group has come to the end of what there is."""
        found: dict[Place, int] = {}
        for replica in self._coordinators():
            names = {each.topic_id: each.name for each in replica.host.metadata.image.topics.values()}
            for (topic_id, partition), offset in replica.machine.offsets.get(group, {}).items():
                found[f"{names[topic_id]}/{partition}"] = offset.offset
        return all(found.get(place, 0) >= end for place, end in ends.items())

    def _visitors_are_forgotten(self) -> bool:
        return self._lead_everything(self._leaders()) and is_forgotten(self._coordinators())

    async def _read(self, topic: str) -> dict[Place, list[Read]]:
        log = self.log("pipeline auditor")
        rows: dict[Place, list[Read]] = {f"{topic}/{each}": [] for each in range(self.profile.partitions)}
        consumer = log.consumer(topic)
        async for record in consumer.records(until="end"):
            rows[_place(record)].append((record.offset, bytes(record.value)))
        await log.close()
        return rows

    async def _ends(self) -> dict[Place, int]:
        rows = await self._read(IN)
        return {place: row[-1][0] + 1 for place, row in rows.items() if row}

    async def _audit(self) -> None:
        """Ask where the groups are, before their offsets expire; read everything with fresh clients."""
        history = self.history
        log = self.log("pipeline auditor")
        for group in self._groups():
            for each in (await log.describe_group(group)).offsets:
                history.groups[group, f"{each.topic}/{each.partition}"] = each.committed or 0
        await log.close()
        history.committed_only.add("auditor of committed records")
        for topic in (IN, OUT):
            for place, row in (await self._read(topic)).items():
                history.finals["auditor of committed records", place] = row


async def _note(send: Send, delivery: Any) -> None:
    try:
        metadata = await delivery
    except RaftlogError as error:
        send.outcome = Outcome.UNKNOWN if error.indeterminate else Outcome.FAILED
    else:
        send.outcome, send.offset = Outcome.OK, metadata.offset
    send.ended = asyncio.get_running_loop().time()


def _place(record: Record | TopicPartition) -> Place:
    return f"{record.topic}/{record.partition}"
