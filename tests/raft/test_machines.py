"""Hypothesis state machines: quorums, the log and the stack of configurations, each against a plain model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from raft_cluster import MemoryDisk, chain

from raftlog.errors import ConfigError
from raftlog.raft.confchange import enter, leave
from raftlog.raft.confstack import ConfStack, encode_conf
from raftlog.raft.log import UNKNOWN_CRC, LogDiverged, RaftLog
from raftlog.raft.quorum import VoteResult, is_voter, quorum_index, vote_result, voter_ids
from raftlog.raft.types import ConfState, Entry, HardState, Snapshot
from raftlog.record.frame import FrameKind

REPEATABLE = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)

REPLICAS = st.integers(1, 6)
PART = st.sampled_from([1.0, 0.7, 0.3])
SOME = st.frozensets(REPLICAS, max_size=5)
CONF = ConfState((1, 2, 3))


def quorums(conf: ConfState) -> Iterator[frozenset[int]]:
    """Every set of replicas that may decide, by the definition: more than half of each half."""
    members = sorted({*conf.voters, *conf.outgoing})
    for size in range(1, len(members) + 1):
        for chosen in itertools.combinations(members, size):
            if all(2 * len({*half} & {*chosen}) > len(half) for half in (conf.voters, conf.outgoing) if half):
                yield frozenset(chosen)


class Quorums(RuleBasedStateMachine):
    """One leader's or candidate's view while the configuration changes under it."""

    @initialize(voters=st.frozensets(REPLICAS, min_size=1, max_size=5))
    def begin(self, voters: frozenset[int]) -> None:
        self.conf = ConfState(tuple(sorted(voters)))
        self.votes: dict[int, bool] = {}
        self.match: dict[int, int] = {}

    @rule(replica=REPLICAS, granted=st.booleans())
    def vote(self, replica: int, granted: bool) -> None:
        self.votes[replica] = granted

    @rule(replica=REPLICAS, index=st.integers(0, 5))
    def acknowledge(self, replica: int, index: int) -> None:
        self.match[replica] = index

    @rule()
    def forget(self) -> None:
        self.votes.clear()
        self.match.clear()

    @precondition(lambda self: not self.conf.is_joint)
    @rule(voters=SOME, learners=SOME)
    def change(self, voters: frozenset[int], learners: frozenset[int]) -> None:
        """As a leader would; whoever is to vote is made a learner first."""
        before, old = list(quorums(self.conf)), self.conf
        try:
            ready = enter(self.conf, old.voters, (voters | learners) - {*old.voters})
        except ConfigError:
            ready = old
        assert list(quorums(ready)) == before, "learners do not count"
        try:
            self.conf = enter(ready, voters, learners - voters)
        except ConfigError:
            assert not voters or (voters, learners - voters) == (set(old.voters), set(ready.learners))
            self.conf = ready
            return
        self.meets(before, list(quorums(self.conf)))
        assert self.conf.members == voters | learners | ({*old.voters} if self.conf.is_joint else set())
        assert self.conf.is_joint == (voters != set(old.voters))

    @precondition(lambda self: self.conf.is_joint)
    @rule()
    def finish(self) -> None:
        before, joint = list(quorums(self.conf)), self.conf
        self.conf = leave(joint)
        self.meets(before, list(quorums(self.conf)))
        assert self.conf.voters == joint.voters
        assert not {*self.conf.voters} & {*self.conf.learners}

    def meets(self, one: list[frozenset[int]], other: list[frozenset[int]]) -> None:
        """No two sets that may decide are without a common member: two leaders cannot both be elected."""
        assert all(a & b for a in one for b in other)

    @invariant()
    def agrees(self) -> None:
        conf, sets = self.conf, list(quorums(self.conf))
        assert voter_ids(conf) == sorted({replica for chosen in sets for replica in chosen})
        assert all(is_voter(conf, replica) == (replica in voter_ids(conf)) for replica in range(1, 7))
        granted = {replica for replica, vote in self.votes.items() if vote}
        refused = self.votes.keys() - granted
        expected = VoteResult.PENDING
        if any(chosen <= granted for chosen in sets):
            expected = VoteResult.WON
        elif all(chosen & refused for chosen in sets):
            expected = VoteResult.LOST
        assert vote_result(conf, self.votes) is expected
        reached = max(min(self.match.get(replica, 0) for replica in chosen) for chosen in sets)
        assert quorum_index(conf, self.match) == reached


class Log(RuleBasedStateMachine):
    """RaftLog against a list of all entries. What storage would know (durable) is kept beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.model: list[Entry] = []
        """Entry i is at i - 1. What was compacted stays here; what a snapshot skipped is made up."""
        self.first, self.term, self.durable = 1, 1, 0
        self.first_since_restart = 1
        self.handed: list[Entry] = []
        """What storage was given, as it would hold it."""
        self.applied: list[Entry] = []
        self.log = RaftLog(MemoryDisk(CONF, HardState(1, 0, 0)).recovered())

    def next_entries(self, count: int, at: int) -> list[Entry]:
        prev_crc = self.model[at - 2].crc if at > 1 else 0
        return chain([self.term] * count, first=at, prev_crc=prev_crc)

    @rule(count=st.integers(1, 4), later=st.integers(0, 2))
    def append(self, count: int, later: int) -> None:
        self.term += later
        entries = self.next_entries(count, self.log.last_index + 1)
        self.log.append(entries)
        self.model += entries

    @precondition(lambda self: self.log.last_index > self.log.commit)
    @rule(back=st.integers(0, 5), count=st.integers(0, 3))
    def conflict(self, back: int, count: int) -> None:
        """A new leader's entries replace some that are not committed."""
        index = max(self.log.commit + 1, self.log.last_index - back)
        self.log.cut(index)
        del self.model[index - 1 :]
        self.durable = min(self.durable, index - 1)
        self.term += 1
        if count:
            self.append(count, 0)

    @rule()
    def write(self) -> None:
        entries = self.log.take_unhanded()
        assert not self.log.take_unhanded()
        if entries:
            del self.handed[entries[0].index - 1 :]
            self.handed += entries
        assert self.handed[: self.log.handed] == self.model, "storage learns of a cut with what comes next"

    @precondition(lambda self: self.durable < self.log.last_index)
    @rule(part=PART)
    def sync(self, part: float) -> None:
        self.write()
        self.durable += round((self.log.handed - self.durable) * part)

    @precondition(lambda self: self.log.commit < self.log.last_index)
    @rule(part=PART)
    def commit(self, part: float) -> None:
        self.log.commit += round((self.log.last_index - self.log.commit) * part)

    @precondition(lambda self: self.log.applied < self.log.commit)
    @rule()
    def apply(self) -> None:
        entries = self.log.take_committed()
        assert not self.log.take_committed()
        self.applied += entries
        assert self.applied == self.model[: self.log.commit]
        self.log.applied = self.log.taken

    @rule(part=PART)
    def quiet_times(self, part: float) -> None:
        """Disk and state machine catch up."""
        self.commit(part)
        self.sync(1.0)
        self.apply()

    @precondition(lambda self: self.log.memory_bytes)
    @rule(bytes_max=st.sampled_from([0, 100]))
    def trim(self, bytes_max: int) -> None:
        self.log.trim(bytes_max, self.durable)
        needed = min(self.log.applied, self.durable, self.log.handed) + 1
        assert self.log.offset <= max(needed, self.log.first_index)
        assert self.log.memory_bytes <= bytes_max or self.log.offset == needed

    @precondition(lambda self: min(self.log.applied, self.durable) >= self.first)
    @rule(part=PART)
    def compact(self, part: float) -> None:
        """Storage drops applied and durable entries; to drop those that it has not got is nothing."""
        most = min(self.log.applied, self.durable) + 1 - self.first
        for first in (self.first, self.first + round(most * part)):
            self.log.compact(first, self.model[first - 2].crc if first > 1 else 0)
        self.first = first

    @rule(beyond=st.integers(1, 4))
    def take_over_a_snapshot(self, beyond: int) -> None:
        """It lies behind the log's end; what it skips no longer matters."""
        index = self.log.last_index + beyond
        self.term += 1
        self.model += self.next_entries(beyond, index - beyond + 1)
        last = self.model[-1]
        self.log.restore(index, last.term, last.crc, last.leader_time_ms)
        self.first, self.durable = index + 1, index
        self.handed, self.applied = list(self.model), list(self.model)

    @rule()
    def restart(self) -> None:
        """What is not durable is lost; the state machine is where the log begins."""
        del self.model[max(self.durable, self.log.commit) :]
        disk = MemoryDisk(CONF, HardState(self.term, 0, self.log.commit), self.model[self.first - 1 :])
        if self.first > 1:
            last = self.model[self.first - 2]
            disk.snapshot = Snapshot(self.first - 1, last.term, last.crc, CONF)
        self.log = RaftLog(disk.recovered())
        self.durable = self.log.last_index
        self.first_since_restart = self.first
        self.handed, self.applied = list(self.model), self.model[: self.log.applied]

    @rule()
    def stranger(self) -> None:
        """An entry off the chain is refused and nothing changes."""
        with pytest.raises(LogDiverged):
            self.log.append(chain([self.term], first=self.log.last_index + 1, prev_crc=self.log.last_crc ^ 1))

    @rule(back=st.integers(-2, 20), older=st.integers(-1, 6))
    def hint(self, back: int, older: int) -> None:
        """Where this log has a term of at most ``term`` at or below ``at``, by looking at each entry."""
        at, term = self.log.last_index - back, self.term - older
        found = [i for i in range(self.first, min(at, len(self.model)) + 1) if self.model[i - 1].term <= term]
        assert self.log.meeting_point(at, term) == max(found, default=self.first - 1)

    @rule(back=st.integers(0, 9), count=st.integers(0, 5), frames=st.integers(0, 6), less=st.integers(0, 1))
    def read(self, back: int, count: int, frames: int, less: int) -> None:
        """Entries by number, and by bytes: as many as fit into those of some frames, or in one byte less."""
        log = self.log
        low = log.last_index - back
        known = log.offset <= low and low + count <= log.last_index + 1
        assert log.slice(low, low + count) == (self.model[low - 1 : low - 1 + count] if known else None)
        if log.offset <= low <= log.last_index:
            bytes_max = sum(entry.size for entry in self.model[low - 1 : low - 1 + frames]) - less
            entries, size = log.batch(low, bytes_max)
            assert list(entries) == self.model[low - 1 : low - 1 + len(entries)]
            assert size == sum(entry.size for entry in entries)
            assert size <= bytes_max or len(entries) == 1
            rest = self.model[low - 1 + len(entries) :]
            assert not rest or size + rest[0].size > bytes_max

    @invariant()
    def agrees(self) -> None:
        log, model = self.log, self.model
        log.check()
        assert (log.first_index, log.last_index) == (self.first, len(model))
        assert log.last_term == (model[-1].term if model else 0)
        for index in range(self.first - 1, len(model) + 1):
            entry = model[index - 1] if index else None
            assert log.term(index) == (entry.term if entry else 0)
            in_memory = index >= log.offset - 1 and log.offset <= log.last_index
            known = in_memory or index in (self.first - 1, len(model))
            assert log.crc(index) in ((entry.crc if entry else 0), *(() if known else (UNKNOWN_CRC,)))
        assert log.term(self.first - 2) is None
        assert log.term(len(model) + 1) is None
        assert log.memory_bytes == log.size_of(log.offset, log.last_index + 1)
        assert log.slice(log.offset, log.last_index + 1) == model[log.offset - 1 :]
        last = model[-1] if model else None
        assert log.is_up_to_date(len(model), last.term if last else 0)
        assert not log.is_up_to_date(len(model) - 1, last.term if last else 0)
        known_ms = last.leader_time_ms if last else 0
        if len(model) < self.first == self.first_since_restart:
            assert log.last_leader_time_ms in (0, known_ms), "recovery has not told the time before the log"
        else:
            assert log.last_leader_time_ms == known_ms


class Configurations(RuleBasedStateMachine):
    """ConfStack against the entries of a log, of which some hold configurations."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[ConfState | None] = []
        """Element i is at index i + 1; what lies below ``base`` was let go."""
        self.base, self.at_base, self.commit = 0, CONF, 0
        self.stack = ConfStack([(0, CONF)])

    @rule(voters=st.frozensets(REPLICAS, min_size=1), learners=SOME)
    def append_configuration(self, voters: frozenset[int], learners: frozenset[int]) -> None:
        conf = ConfState(tuple(sorted(voters)), tuple(sorted(learners - voters)))
        self.log.append(conf)
        entry = Entry.create(0, FrameKind.CONF, 1, len(self.log), 0, encode_conf(conf))
        self.stack.push(entry)

    @rule(count=st.integers(1, 3))
    def append_others(self, count: int) -> None:
        self.log += [None] * count

    @precondition(lambda self: self.commit < len(self.log))
    @rule(part=PART)
    def cut(self, part: float) -> None:
        index = self.commit + 1 + int((len(self.log) - self.commit - 1) * part)
        before = self.in_force(len(self.log))
        had_any = any(conf is not None for conf in self.log[index - 1 :])
        del self.log[index - 1 :]
        assert self.stack.cut(index) == had_any
        assert had_any or self.stack.current == before

    @rule(part=PART)
    def commit_more(self, part: float) -> None:
        self.commit += round((len(self.log) - self.commit) * part)

    @rule(part=PART)
    def compact(self, part: float) -> None:
        index = self.base + round((self.commit - self.base) * part)
        self.at_base, self.base = self.in_force(index), index
        self.stack.forget_below(index)
        if index:
            assert sum(start <= index for start, _ in self.stack) == 1, "one is kept, the one in force there"

    @rule(beyond=st.integers(1, 3), voters=st.frozensets(REPLICAS, min_size=1))
    def take_over_a_snapshot(self, beyond: int, voters: frozenset[int]) -> None:
        self.log += [None] * beyond
        self.base = self.commit = len(self.log)
        self.at_base = ConfState(tuple(sorted(voters)))
        self.stack.restore(self.base, self.at_base)

    @rule()
    def restart(self) -> None:
        """Storage keeps the pairs of the stack."""
        self.stack = ConfStack(list(self.stack))

    def in_force(self, index: int) -> ConfState:
        above = [conf for conf in self.log[self.base : index] if conf is not None]
        return above[-1] if above else self.at_base

    @invariant()
    def agrees(self) -> None:
        last = len(self.log)
        assert self.stack.current == self.in_force(last)
        for index in range(self.base, last + 1):
            assert self.stack.at(index) == self.in_force(index)
        uncommitted = [conf for conf in self.log[self.commit :] if conf is not None]
        assert list(self.stack.possible(self.commit)) == [*reversed(uncommitted), self.in_force(self.commit)]
        indexes = [start for start, _ in self.stack]
        assert indexes == sorted(set(indexes))
        assert self.stack.current_index == indexes[-1] <= last


for machine in (Quorums, Log, Configurations):
    machine.TestCase.settings = REPEATABLE

TestQuorums = Quorums.TestCase
TestLog = Log.TestCase
TestConfigurations = Configurations.TestCase
