"""One transaction coordinator, whose decisions are committed at once."""

from __future__ import annotations

from collections.abc import Callable

from transaction_world import TOPIC

from raftlog.broker.transactions import Decision, NeedsProducerId, TransactionCoordinator
from raftlog.raft.types import Entry
from raftlog.record.frame import FrameKind
from raftlog.state.transactions import (
    Cause,
    Command,
    Identity,
    Transaction,
    TransactionsState,
    encode_command,
)

P0, P1, P2 = ((TOPIC, number) for number in range(3))


class Coordinated:
    """The coordinator of the transactional id "x", and the state that it decides on."""

    def __init__(self) -> None:
        self.state = TransactionsState()
        self.now_ms = 50_000
        self.term = 1
        self.coordinator = TransactionCoordinator(1, self.now_ms)
        self.fresh = 6

    def carry_out(self, decision: Decision) -> Identity | None:
        if decision.command is not None:
            self.put(decision.command)
        if decision.error is not None:
            raise decision.error
        return decision.answer

    def put(self, command: Command) -> None:
        assert self.state.check_command(command) is None
        index = self.state.applied_index + 1
        payload = encode_command(command)
        self.state.apply(Entry.create(0, FrameKind.COMMAND, self.term, index, self.now_ms, payload))

    def decide(self, decide: Callable[[int | None], Decision]) -> Identity | None:
        try:
            return self.carry_out(decide(None))
        except NeedsProducerId:
            self.fresh += 1
            return self.carry_out(decide(self.fresh))

    def init(self, holder: Identity | None = None, timeout_ms: int = 60_000) -> Identity:
        identity = self.decide(
            lambda fresh: self.coordinator.init(
                self.state, self.now_ms, "x", timeout_ms, holder=holder, fresh=fresh
            )
        )
        assert identity is not None
        return identity

    def enlist(
        self, identity: Identity, *partitions: tuple[bytes, int], groups: tuple[str, ...] = ()
    ) -> None:
        self.carry_out(self.coordinator.enlist(self.state, self.now_ms, "x", identity, partitions, groups))

    def end(self, identity: Identity, commit: bool) -> Identity:
        following = self.decide(
            lambda fresh: self.coordinator.end(self.state, self.now_ms, "x", identity, commit, fresh)
        )
        assert following is not None
        return following

    def abort(self, cause: Cause) -> None:
        self.decide(lambda fresh: self.coordinator.abort(self.state, self.now_ms, "x", cause, fresh))

    def complete(self) -> None:
        ended = self.transaction.ended
        assert ended is not None
        command = self.coordinator.complete(self.state, self.now_ms, "x", ended.identity)
        assert command is not None
        self.put(command)

    def move(self, term: int) -> None:
        """Another leader: what is committed comes with it, and nothing else."""
        self.state = TransactionsState.restore(self.state.snapshot())
        self.term = term
        self.coordinator = TransactionCoordinator(term, self.now_ms)

    @property
    def transaction(self) -> Transaction:
        return self.state.transaction("x")
