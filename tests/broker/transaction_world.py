"""Transactions without a network: coordinator, partitions and producers as pure machines, and messages that
may come late, twice, in any order or never.

A group is its committed log and its leaders: the present one, and those before it that do not know that they
have been replaced. Only the present one commits; what it had not committed may or may not survive it. What a
leader answers waits for what it has staged, as a broker's answers do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from raftlog.broker.transactions import (
    Decision,
    Enlisted,
    NeedsProducerId,
    TransactionCoordinator,
    has_landed,
)
from raftlog.errors import ConcurrentTransactions, RaftlogError
from raftlog.raft.types import Entry
from raftlog.record.batch import BatchHeader, check_batch, stamped
from raftlog.record.codec import decode_batch, encode_batch
from raftlog.record.control import Marker, encode_marker
from raftlog.record.frame import FrameKind
from raftlog.state.partition import PartitionState
from raftlog.state.transactions import (
    Cause,
    Command,
    Identity,
    Phase,
    PutTransaction,
    TransactionsState,
    decode_command,
    encode_command,
)

TOPIC = b"t" * 16
Answer = Callable[[Any, RaftlogError | None], None]
M = TypeVar("M", TransactionsState, PartitionState)


class Leader(Generic[M]):
    """One term of one group. ``machine`` is what it has applied; a deposed one applies no more."""

    def __init__(self, term: int, machine: M, kept: Iterable[Entry] = ()) -> None:
        self.term = term
        self.machine = machine
        self.staged = machine.copy()
        self.uncommitted: list[tuple[Entry, list[Answer]]] = []
        for entry in kept:
            self.staged.apply(entry)
            self.uncommitted.append((entry, []))

    def propose(self, kind: int, payload: bytes, now_ms: int, answer: Answer) -> None:
        entry = Entry.create(0, kind, self.term, self.staged.applied_index + 1, now_ms, payload)
        self.staged.apply(entry)
        self.uncommitted.append((entry, [answer]))

    def when_committed(self, answer: Answer) -> None:
        """Answer when all that is staged now is committed."""
        if self.uncommitted:
            self.uncommitted[-1][1].append(answer)
        else:
            answer(None, None)


class ReplicatedGroup(Generic[M]):
    """A group: what is committed, and who leads, led, and does not know better."""

    def __init__(self, machine: M) -> None:
        self.machine = machine
        self.log: list[Entry] = []
        self.leader: Leader[M] = Leader(1, machine)
        self.deposed: list[Leader[M]] = []

    def leaders(self) -> list[Leader[M]]:
        """The present one first."""
        return [self.leader, *self.deposed]

    def commit(self) -> bool:
        """Commit the next entry and answer who waits for it."""
        if not self.leader.uncommitted:
            return False
        entry, answers = self.leader.uncommitted.pop(0)
        result = self.machine.apply(entry)
        self.log.append(entry)
        for answer in answers:
            answer(result, None)
        return True

    def elect(self, kept: int) -> None:
        """The next leader has ``kept`` of the entries that the present one has not committed."""
        old = self.leader
        old.machine = self.machine.copy()
        self.deposed = [old, *self.deposed][:2]
        self.leader = Leader(old.term + 1, self.machine, [entry for entry, _ in old.uncommitted[:kept]])

    def restart(self, machine: M) -> None:
        """All of it comes back from this snapshot of what is committed."""
        assert machine == self.machine
        self.machine = machine
        self.deposed = []
        self.leader = Leader(self.leader.term + 1, machine)


@dataclass
class Request:
    """A message to the coordinator or to a partition; ``reply`` may be called any number of times."""

    what: str
    fields: tuple[Any, ...]
    to: int
    """Partition; -1: the coordinator."""
    reply: Answer


@dataclass
class Book:
    """What a test knows of one transaction, by its identity."""

    sent: set[tuple[int, bytes]] = field(default_factory=set)
    acknowledged: set[tuple[int, bytes]] = field(default_factory=set)
    told: bool | None = None
    """The outcome its producer was told: True is commit."""


class World:
    """Everything; tests decide what happens next."""

    def __init__(self, partitions: int = 3, timeout_ms: int = 1000) -> None:
        self.now_ms = 10_000
        self.timeout_ms = timeout_ms
        self.coordination: ReplicatedGroup[TransactionsState] = ReplicatedGroup(TransactionsState())
        self.partitions = [ReplicatedGroup(PartitionState()) for _ in range(partitions)]
        self.messages: list[Callable[[], None]] = []
        """Requests and answers on their way; calling one delivers it."""
        self.books: dict[Identity, Book] = {}
        self.given: dict[Identity, str] = {}
        """Identity -> the producer that was told to write under it."""
        self.begun = 0
        """Transactions that began with the end of the one before."""
        self._next_producer_id = 100
        self._coordinators: dict[int, TransactionCoordinator] = {}
        self._landed: dict[tuple[int, str, Identity], set[int]] = {}
        """(term, transactional id, identity) -> partitions whose marker landed: memory of that leader."""

    # -- messages --------------------------------------------------------------------------------------------

    def send(self, request: Request, leader: int = 0) -> None:
        """Put a request on its way to that leader (0: whoever leads when it arrives)."""
        self.messages.append(lambda: self.deliver(request, leader))

    def deliver(self, request: Request, leader: int) -> None:
        def reply(result: Any, error: RaftlogError | None) -> None:
            self.messages.append(lambda: request.reply(result, error))

        if request.to < 0:
            candidates = self.coordination.leaders()
            self._coordinate(candidates[min(leader, len(candidates) - 1)], request, reply)
        else:
            group = self.partitions[request.to]
            candidates_of = group.leaders()
            self._at_partition(candidates_of[min(leader, len(candidates_of) - 1)], request, reply)

    # -- coordinator -----------------------------------------------------------------------------------------

    def coordinator(self, leader: Leader[TransactionsState]) -> TransactionCoordinator:
        known = self._coordinators.get(leader.term)
        if known is None:
            known = self._coordinators[leader.term] = TransactionCoordinator(leader.term, self.now_ms)
        return known

    def fresh_id(self) -> int:
        self._next_producer_id += 1
        return self._next_producer_id

    def decide(self, decide: Callable[[int | None], Decision]) -> Decision:
        try:
            return decide(None)
        except NeedsProducerId:
            return decide(self.fresh_id())

    def _coordinate(self, leader: Leader[TransactionsState], request: Request, reply: Answer) -> None:
        coordinator, state = self.coordinator(leader), leader.staged
        method = getattr(coordinator, request.what)
        try:
            if request.what == "enlist":
                decision = method(state, self.now_ms, *request.fields)
            elif request.what == "end":
                decision = self._end(leader, *request.fields)
            else:
                decision = self.decide(lambda fresh: method(state, self.now_ms, *request.fields, fresh=fresh))
        except RaftlogError as error:
            reply(None, error)
            return
        self.carry_out(leader, decision, reply)

    def _end(
        self,
        leader: Leader[TransactionsState],
        name: str,
        identity: Identity,
        commit: bool,
        written: frozenset[int],
        again: bool,
    ) -> Decision:
        coordinator, state = self.coordinator(leader), leader.staged
        settled = self._is_settled(leader, name, identity, written)
        targets = tuple((TOPIC, each) for each in sorted(written))
        begin = Enlisted(targets, ()) if again and written else None
        return self.decide(
            lambda fresh: coordinator.end(
                state, self.now_ms, name, identity, commit, fresh, settled=settled, again=begin
            )
        )

    def _is_settled(
        self, leader: Leader[TransactionsState], name: str, identity: Identity, written: frozenset[int]
    ) -> bool:
        """As a broker knows it: of what is applied, by answers to markers and by the word of the producer."""
        present, applied = (each.transactions.get(name) for each in (leader.staged, leader.machine))
        if present is None or applied is None or present.identity != identity:
            return False
        ended = present.ended
        if ended is None or applied.ended is None or applied.ended.identity != ended.identity:
            return False
        landed = self._landed.setdefault((leader.term, name, ended.identity), set())
        landed |= written
        return {partition for _, partition in ended.partitions} <= landed

    def carry_out(self, leader: Leader[TransactionsState], decision: Decision, reply: Answer) -> None:
        def done(_: Any, error: RaftlogError | None) -> None:
            assert error is None
            reply((decision.answer, leader.term, decision.begun), decision.error)

        if decision.command is None:
            leader.when_committed(done)
        else:
            self.propose(leader, decision.command, done)

    def propose(self, leader: Leader[TransactionsState], command: Command, done: Answer) -> None:
        assert leader.staged.check_command(command) is None, command
        leader.propose(FrameKind.COMMAND, encode_command(command), self.now_ms, done)

    def send_markers(self, leader: Leader[TransactionsState]) -> None:
        """What a leader sends, again and again, of all that it has applied and not seen to its end."""
        for transaction in leader.machine.ending():
            assert transaction.ended is not None
            key = (leader.term, transaction.transactional_id, transaction.ended.identity)
            marker = self.coordinator(leader).marker(transaction)
            due = {partition for _, partition in transaction.ended.partitions}
            landed = self._landed.setdefault(key, set())
            for partition in due - landed:
                self.send(Request("marker", (marker,), partition, self._on_marker(leader, key, partition)))
            if due <= landed:
                command = self.coordinator(leader).complete(leader.staged, self.now_ms, *key[1:])
                if command is not None:
                    self.propose(leader, command, _ignore)

    def _on_marker(
        self, leader: Leader[TransactionsState], key: tuple[int, str, Identity], partition: int
    ) -> Answer:
        def answered(_: Any, error: RaftlogError | None) -> None:
            if has_landed(error):
                self._landed[key].add(partition)

        return answered

    def abort_overdue(self, cause: Cause = Cause.TIMEOUT) -> None:
        leader = self.coordination.leader
        coordinator, state = self.coordinator(leader), leader.staged
        for name in coordinator.overdue(state, self.now_ms):
            try:
                decision = self.decide(
                    lambda fresh, name=name: coordinator.abort(state, self.now_ms, name, cause, fresh)  # type: ignore[misc]
                )
            except ConcurrentTransactions:
                continue  # the one before comes first
            self.carry_out(leader, decision, _ignore)

    # -- partitions ------------------------------------------------------------------------------------------

    def _at_partition(self, leader: Leader[PartitionState], request: Request, reply: Answer) -> None:
        try:
            if request.what == "marker":
                due = leader.staged.check_marker(*request.fields)
                batch = encode_marker(request.fields[0], self.now_ms)
            else:
                batch, before = request.fields
                header = check_batch(batch)
                opened = leader.staged.open.get(header.producer_id)
                if before is not None and opened is not None and opened.epoch == before.epoch:
                    word = encode_marker(before, self.now_ms)
                    self._append(leader, word, _ignore)
                due = leader.staged.check(header) is None
        except RaftlogError as error:
            reply(None, error)
            return
        if due:
            self._append(leader, batch, reply)
        else:
            leader.when_committed(reply)

    def _append(self, leader: Leader[PartitionState], batch: bytes, reply: Answer) -> None:
        payload = stamped(batch, leader.staged.next_offset, leader.term)
        leader.propose(FrameKind.BATCH, payload, self.now_ms, reply)

    # -- what must hold --------------------------------------------------------------------------------------

    def decisions(self) -> dict[Identity, bool]:
        """Identity -> how its transaction was decided, from the coordinator's committed log."""
        found: dict[Identity, bool] = {}
        for entry in self.coordination.log:
            command = decode_command(entry.payload)
            ended = command.transaction.ended if isinstance(command, PutTransaction) else None
            if ended is not None and not ended.is_complete:
                assert found.setdefault(ended.identity, ended.commit) == ended.commit, "decided otherwise"
        return found

    def check(self) -> None:
        """What holds at any time."""
        decided = self.decisions()
        for number, partition in enumerate(self.partitions):
            self._check_partition(number, partition, decided)
        for identity, book in self.books.items():
            if book.told is not None and book.sent:
                assert decided[identity] == book.told, f"{identity} was told otherwise"

    def _check_partition(
        self, number: int, partition: ReplicatedGroup[PartitionState], decided: dict[Identity, bool]
    ) -> None:
        """Books of its own, from the partition's committed log."""
        open_at: dict[Identity, int] = {}
        wrote: list[tuple[int, Identity, bytes]] = []
        for entry in partition.log:
            (record,) = decode_batch(entry.payload, "t", number)
            header = BatchHeader.parse(entry.payload)
            identity = Identity(header.producer_id, header.producer_epoch)
            if not header.is_control:
                open_at.setdefault(identity, record.offset)
                wrote.append((record.offset, identity, record.value))
                continue
            assert record.key is not None
            assert decided[identity] == bool(record.key[3]), f"marker of {identity} is not what was decided"
            open_at.pop(identity, None)
        state = partition.machine
        stable = min([*open_at.values(), state.next_offset])
        assert state.last_stable_offset == stable
        hidden = state.aborted_in(0, stable)
        view = [
            (identity, value)
            for offset, identity, value in wrote
            if offset < stable
            and not any(pid == identity.producer_id and a <= offset < b for pid, a, b in hidden)
        ]
        assert view == [(i, v) for offset, i, v in wrote if offset < stable and decided[i]]
        assert len({value for _, value in view}) == len(view), "a value is read twice"

    def check_settled(self) -> None:
        """What holds when nothing is under way any more."""
        self.check()
        assert all(
            each.phase is not Phase.ONGOING for each in self.coordination.machine.transactions.values()
        )
        assert self.coordination.machine.ending() == []
        assert all(not each.machine.open for each in self.partitions), "a transaction hangs"
        decided = self.decisions()
        for identity, book in self.books.items():
            if decided.get(identity):
                assert book.acknowledged <= self.read(identity), "an acknowledged record is lost"

    def read(self, identity: Identity) -> set[tuple[int, bytes]]:
        """(partition, value) of all that was written under an identity."""
        return {
            (number, decode_batch(entry.payload, "t", number)[0].value)
            for number, partition in enumerate(self.partitions)
            for entry in partition.log
            if _is_of(BatchHeader.parse(entry.payload), identity)
        }

    # -- coming to rest --------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Deliver and commit everything that is under way, in order."""
        groups: list[ReplicatedGroup[Any]] = [self.coordination, *self.partitions]
        busy = True
        while busy:
            busy = bool(self.messages)
            pending, self.messages = self.messages, []
            for deliver in pending:
                deliver()
            for group in groups:
                while group.commit():
                    busy = True

    def settle(self) -> None:
        """All messages arrive, all transactions come to their end."""
        for _ in range(4):
            self.drain()
            self.now_ms += self.timeout_ms * 100
            self.abort_overdue()
            self.drain()
            for _ in range(2):
                self.send_markers(self.coordination.leader)
                self.drain()


class Producer:
    """A transactional client: one request at a time, sent again as often as one likes."""

    def __init__(self, world: World, name: str, transactional_id: str) -> None:
        self.world = world
        self.name = name
        self.transactional_id = transactional_id
        self.identity: Identity | None = None
        self.enlisted: set[int] = set()
        self.sequences: dict[int, int] = {}
        self.before: Marker | None = None
        """The end with which the transaction has begun."""
        self.failed = False
        """The transaction cannot commit: only an abort is left."""
        self.fenced = False
        self.pending: Request | None = None
        self._counter = 0

    @property
    def idle(self) -> bool:
        return self.pending is None and not self.fenced

    def ask(self, what: str, fields: tuple[Any, ...], to: int, took: Callable[[Any], None]) -> None:
        assert self.idle

        def answered(result: Any, error: RaftlogError | None) -> None:
            if self.pending is not request:
                return  # of a request that was answered before
            if isinstance(error, ConcurrentTransactions):
                return  # asks again
            self.pending = None
            if error is None:
                took(result)
            elif error.fatal:
                self.fenced = True
            else:
                assert error.abortable, error
                self.failed = True

        request = self.pending = Request(what, fields, to, answered)
        self.again()

    def again(self, leader: int = 0) -> None:
        """Send what is pending (again)."""
        if self.pending is not None:
            self.world.send(self.pending, leader)

    def begin_writing(self, identity: Identity) -> None:
        owner = self.world.given.setdefault(identity, self.name)
        assert owner == self.name, f"{identity} was given to {owner} and to {self.name}"
        self.identity = identity
        self.enlisted, self.sequences, self.before, self.failed = set(), {}, None, False

    def init(self, recover: bool = False) -> None:
        holder = self.identity if recover else None
        fields = (self.transactional_id, self.world.timeout_ms, holder)
        self.ask("init", fields, -1, lambda answer: self.begin_writing(answer[0]))

    def enlist(self, *partitions: int) -> None:
        targets = [(TOPIC, each) for each in partitions]
        fields = (self.transactional_id, self.identity, targets)
        self.ask("enlist", fields, -1, lambda _: self.enlisted.update(partitions))

    def produce(self, partition: int) -> None:
        assert partition in self.enlisted
        assert self.identity is not None
        sequence = self.sequences.get(partition, 0)
        self._counter += 1
        value = f"{self.name} {self.identity.producer_id} {self._counter}".encode()
        book = self.world.books.setdefault(self.identity, Book())
        book.sent.add((partition, value))
        batch = encode_batch(
            [value],
            None,
            5,
            producer_id=self.identity.producer_id,
            producer_epoch=self.identity.epoch,
            base_sequence=sequence,
            transactional=True,
        )

        def took(_: Any) -> None:
            self.sequences[partition] = sequence + 1
            book.acknowledged.add((partition, value))

        self.ask("produce", (batch, self.before), partition, took)

    def end(self, commit: bool, again: bool = False) -> None:
        assert self.identity is not None
        ended = self.identity
        written = frozenset(self.sequences) if commit else frozenset()

        def took(answer: tuple[Identity, int, bool]) -> None:
            following, term, begun = answer
            self.world.books.setdefault(ended, Book()).told = commit
            self.begin_writing(following)
            if begun:
                self.world.begun += 1
                self.enlisted = set(written)
                self.before = Marker(*ended, term, commit=True)

        self.ask("end", (self.transactional_id, self.identity, commit, written, again), -1, took)


def _ignore(result: Any, error: RaftlogError | None) -> None:
    """Nobody waits."""


def _is_of(header: BatchHeader, identity: Identity) -> bool:
    return not header.is_control and (header.producer_id, header.producer_epoch) == identity
