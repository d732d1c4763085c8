"""A group of RawNodes with disks and a network in memory, and a checker that watches every step.

Nothing happens by itself: a test (or a seeded walk, :class:`Chaos`) decides when Ready is taken, when a disk
    syncs,
which message arrives. The checker is told of everything that leaves a node and holds it against what the
disks *really* hold, which the node cannot see.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from raftlog.raft.config import RaftConfig, RecoveredLog
from raftlog.raft.confstack import decode_conf
from raftlog.raft.raw_node import RawNode
from raftlog.raft.types import (
    Append,
    AppendRequest,
    AppendResponse,
    ConfState,
    Entry,
    HardState,
    InstallSnapshot,
    InstallSnapshotResponse,
    LoadRequest,
    Message,
    Ready,
    Role,
    Snapshot,
    VoteRequest,
    VoteResponse,
)
from raftlog.record.frame import FrameKind


def chain(terms: Sequence[int], *, first: int = 1, prev_crc: int = 0, size: int = 10) -> list[Entry]:
    """Entries with these terms. Equal (index, term) prefixes give equal bytes, as log matching demands."""
    entries = []
    for offset, term in enumerate(terms):
        index = first + offset
        payload = f"{index}/{term}".encode().ljust(size, b".")
        entry = Entry.create(prev_crc, FrameKind.BATCH, term, index, 1000 + index, payload)
        entries.append(entry)
        prev_crc = entry.crc
    return entries


@dataclass
class MemoryDisk:
    """What one replica's storage holds for certain (``entries``, ``hard_state``) and what is on its way."""

    conf: ConfState
    hard_state: HardState = field(default_factory=HardState)
    entries: list[Entry] = field(default_factory=list)
    snapshot: Snapshot | None = None
    pending: deque[Append] = field(default_factory=deque)

    @property
    def base(self) -> int:
        return self.snapshot.index if self.snapshot else 0

    def holds(self, index: int, crc: int) -> bool:
        """Whether the entry at ``index`` is durable (one covered by a snapshot counts)."""
        at = index - self.base - 1
        if at < 0:
            return True
        return at < len(self.entries) and self.entries[at].crc == crc

    def sync(self, count: int | None = None) -> int:
        """Make the oldest ``count`` pending appends durable (default: all). Returns the last sequence, or
        0."""
        sequence = 0
        for _ in range(len(self.pending) if count is None else min(count, len(self.pending))):
            append = self.pending.popleft()
            if append.hard_state is not None:
                self.hard_state = append.hard_state
            self._write(self.entries, append)
            sequence = append.sequence
        return sequence

    def _write(self, entries: list[Entry], append: Append) -> None:
        if append.entries:
            at = append.entries[0].index - self.base - 1
            assert 0 <= at <= len(entries), "an append must not leave a gap"
            del entries[at:]
            entries.extend(append.entries)

    def written(self) -> list[Entry]:
        """The log as storage serves it: everything handed over, synced or not."""
        entries = list(self.entries)
        for append in self.pending:
            self._write(entries, append)
        return entries

    def crash(self, chance: random.Random) -> None:
        """Power is cut: of what was not confirmed, a prefix may have reached the platter."""
        self.sync(chance.randint(0, len(self.pending)))
        self.pending.clear()

    def install(self, snapshot: Snapshot) -> int:
        """Replace the log; what was on its way is settled first, for term and vote must not be lost."""
        sequence = self.sync()
        self.snapshot, self.entries = snapshot, []
        return sequence

    def compact(self, snapshot: Snapshot) -> None:
        """Drop what the snapshot covers (all of it durable)."""
        self.entries = self.entries[snapshot.index - self.base :]
        self.snapshot = snapshot

    def recovered(self, applied: int | None = None, keep: int = 0) -> RecoveredLog:
        """What recovery finds. ``applied``: the state machine restarts from here; ``keep``: entries in memory
        below what is needed."""
        base = self.base
        last = base + len(self.entries)
        applied = base if applied is None else max(base, min(applied, self.hard_state.commit, last))
        confs = [(base, self.snapshot.conf if self.snapshot else self.conf)]
        runs: list[tuple[int, int]] = []
        for entry in self.entries:
            if not runs or runs[-1][1] != entry.term:
                runs.append((entry.index, entry.term))
            if entry.kind == FrameKind.CONF:
                confs.append((entry.index, decode_conf(entry.payload)))
        return RecoveredLog(
            hard_state=self.hard_state,
            confs=tuple(confs),
            first_index=base + 1,
            prev_term=self.snapshot.term if self.snapshot else 0,
            prev_crc=self.snapshot.crc if self.snapshot else 0,
            terms=tuple(runs),
            last_index=last,
            tail=tuple(self.entries[max(0, applied - base - keep) :]),
            applied=applied,
            last_crc=self.entries[-1].crc if self.entries else -1,
            last_leader_time_ms=self.entries[-1].leader_time_ms if self.entries else 0,
        )


class Checker:
    """The safety properties of Raft figure 3, and the durability rules on top of them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.leaders: dict[int, int] = {}
        self.crcs: dict[tuple[int, int], int] = {}
        self.committed: dict[int, Entry] = {}
        self.votes: dict[tuple[int, int], int] = {}
        self.leader_commit: dict[int, int] = {}

    def after_step(self, replica: int) -> None:
        node = self.cluster.nodes[replica]
        node.check_invariants()
        if node.role is Role.LEADER:
            first = node.term not in self.leaders
            assert self.leaders.setdefault(node.term, node.id) == node.id, f"two leaders in term {node.term}"
            if first:
                self._leader_completeness(node)
                self.leader_commit[node.term] = node.commit
            if node.commit > self.leader_commit[node.term]:
                self._commit_is_durable(node)

    def _leader_completeness(self, node: RawNode) -> None:
        log = {entry.index: entry for entry in self.cluster.log_of(node.id)}
        for index, entry in self.committed.items():
            if index >= node.first_index:
                assert index in log, f"leader {node.id} of term {node.term} lacks committed entry {index}"
                assert log[index].crc == entry.crc, f"leader {node.id} has another entry at {index}"

    def _commit_is_durable(self, node: RawNode) -> None:
        self.leader_commit[node.term] = node.commit
        found = node.entries_in_memory(node.commit, node.commit + 1)
        assert found, "a commit that advances is in memory"
        crc = found[0].crc
        for half in (node.conf.voters, node.conf.outgoing):
            if half:
                holders = [voter for voter in half if self.cluster.disks[voter].holds(node.commit, crc)]
                assert len(holders) > len(half) // 2, (
                    f"leader {node.id} committed {node.commit}, durable on {holders} of {half} only"
                )

    def appended(self, entries: Iterable[Entry]) -> None:
        """Log matching: (index, term) names the bytes, and through the chain of crcs all bytes before."""
        for entry in entries:
            known = self.crcs.setdefault((entry.index, entry.term), entry.crc)
            assert known == entry.crc, f"two entries at {entry.index} of term {entry.term}"

    def applied(self, entries: Iterable[Entry]) -> None:
        """State machine safety."""
        for entry in entries:
            known = self.committed.setdefault(entry.index, entry)
            assert known.crc == entry.crc, f"two entries applied at {entry.index}"

    def sent(self, message: Message) -> None:
        """What leaves a node must be backed by its disk."""
        disk = self.cluster.disks[message.sender]
        if isinstance(message, VoteResponse) and message.granted and not message.pre:
            known = self.votes.setdefault((message.sender, message.term), message.to)
            assert known == message.to, f"{message.sender} voted twice in term {message.term}"
            assert (disk.hard_state.term, disk.hard_state.vote) == (message.term, message.to), (
                "vote not durable"
            )
        elif isinstance(message, VoteRequest) and not message.pre:
            assert (disk.hard_state.term, disk.hard_state.vote) == (message.term, message.sender)
            assert disk.base + len(disk.entries) >= message.last_index, "asks with entries it may lose"
        elif isinstance(message, AppendResponse) and not message.rejected:
            assert disk.hard_state.term == message.term
            assert disk.base + len(disk.entries) >= message.index, "acknowledged before durable"
            assert not any(
                append.entries and append.entries[0].index <= message.index for append in disk.pending
            )
        elif isinstance(message, AppendRequest):
            index = message.prev_index
            for entry in message.entries:
                index += 1
                assert entry.index == index


class Cluster:
    """Replicas 1..n, all voters unless ``learners`` says otherwise."""

    def __init__(
        self,
        voters: int = 3,
        *,
        learners: Sequence[int] = (),
        spares: Sequence[int] = (),
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.conf = ConfState(tuple(range(1, voters + 1)), tuple(learners))
        self.random = random.Random(seed)
        self.settings = settings
        self.now = 0
        self.nodes: dict[int, RawNode] = {}
        self.disks: dict[int, MemoryDisk] = {}
        self.wire: deque[Message] = deque()
        self.loads: deque[tuple[int, LoadRequest]] = deque()
        self.committed: dict[int, list[Entry]] = {}
        self.reads: dict[int, list[tuple[int, int]]] = {}
        self.snapshots_wanted: list[tuple[int, int]] = []
        self.cut_links: set[tuple[int, int]] = set()
        self.down: set[int] = set()
        self.sent: list[Message] = []
        self.readies: dict[int, int] = {}
        self.checker = Checker(self)
        self.heard: dict[tuple[int, int], tuple[int, int]] = {}
        """(host, peer's host) -> when the peer's host was last heard, in which incarnation."""
        self.incarnations: dict[int, int] = {}
        self.beat_ms = 0
        self.rests = 0
        """How often a node went quiet."""
        self.read_floors: dict[int, int] = {}
        for replica in sorted(self.conf.members | set(spares)):
            self.disks[replica] = MemoryDisk(self.conf)
            self.start(replica)

    # -- one replica -----------------------------------------------------------------------------------------

    def start(self, replica: int, applied: int | None = None) -> RawNode:
        """(Re)start from what the disk holds."""
        recovered = self.disks[replica].recovered(applied)
        config = RaftConfig(id=replica, **self.settings)
        seed = self.random.getrandbits(32)
        node = RawNode(config, recovered, random.Random(seed), self.now)
        self.incarnations[replica] = self.incarnations.get(replica, 0) + 1
        self.nodes[replica] = node
        self.committed[replica] = []
        self.reads[replica] = []
        self.down.discard(replica)
        return node

    def restart_with(self, replica: int, entries: list[Entry], term: int, commit: int = 0) -> RawNode:
        """Give the replica another past."""
        self.disks[replica] = MemoryDisk(self.conf, HardState(term, 0, commit), entries)
        self.checker.appended(entries)
        return self.start(replica)

    def crash(self, replica: int) -> None:
        self.disks[replica].crash(self.random)
        self.down.add(replica)
        self.wire = deque(message for message in self.wire if message.to != replica)
        self.loads = deque(load for load in self.loads if load[0] != replica)

    def take_ready(self, replica: int) -> bool:
        """Let the host of ``replica`` work once. Returns whether there was anything to do."""
        node = self.nodes[replica]
        if replica in self.down or not node.has_ready():
            return False
        self.readies[replica] = self.readies.get(replica, 0) + 1
        self.take(replica, node.ready())
        self.checker.after_step(replica)
        return True

    def take(self, replica: int, ready: Ready) -> None:
        """Do what one Ready asks for, as far as it happens at once."""
        node = self.nodes[replica]
        if ready.append is not None:
            self.checker.appended(ready.append.entries)
            self.disks[replica].pending.append(ready.append)
        for message in ready.messages:
            self.checker.sent(message)
            self.sent.append(message)
            if not self.is_cut(message):
                self.wire.append(message)
        if ready.committed:
            assert ready.committed[0].index == node.applied + 1, "applied with a gap or twice"
            self.checker.applied(ready.committed)
            self.committed[replica].extend(ready.committed)
            node.applied_to(ready.committed[-1].index)
        self.loads.extend((replica, load) for load in ready.loads)
        self.snapshots_wanted.extend((replica, to) for to in ready.snapshots)
        for context, index in ready.reads:
            assert index >= self.read_floors[context], (
                f"read {context} misses what was committed before it came"
            )
            self.reads[replica].append((context, index))
        self._watch(replica)

    def sync(self, replica: int, count: int | None = None) -> bool:
        """The disk syncs the oldest ``count`` appends and says so. Returns whether there was any."""
        sequence = self.disks[replica].sync(count)
        if sequence and replica not in self.down:
            self.nodes[replica].on_durable(sequence)
            self.checker.after_step(replica)
        return bool(sequence)

    def is_cut(self, message: Message) -> bool:
        return (message.sender, message.to) in self.cut_links or message.to in self.down

    def deliver(self, message: Message) -> None:
        if not self.is_cut(message):
            node = self.nodes[message.to]
            if isinstance(message, VoteRequest):
                node.leader_heard(self.heard.get((node.id, node.leader), (0, 0))[0])
            was_quiet = node.quiet
            node.step(message, self.now)
            self.rests += node.quiet and not was_quiet
            self._watch(message.to)
            self.checker.after_step(message.to)

    # -- the hosts' heartbeats, on which quiet nodes rely (one host per replica) -----------------------------

    def beat(self, lost: Callable[[], bool] = lambda: False) -> None:
        """Every host tells every other that it lives; then each looks for silent ones and for new
        incarnations.

        Args:
            lost: whether the next of these messages is lost.
        """
        alive = [replica for replica in self.nodes if replica not in self.down]
        for sender in alive:
            for to in alive:
                if sender != to and (sender, to) not in self.cut_links and not lost():
                    _, known = self.heard.get((to, sender), (0, 0))
                    incarnation = self.incarnations[sender]
                    if known not in (0, incarnation):
                        self._wake(to, sender)
                    self.heard[to, sender] = (self.now, incarnation)
        for replica in alive:
            self._watch(replica)

    def _watch(self, replica: int) -> None:
        """Wake a quiet node that relies on a host which is silent."""
        for member in self._relies_on(replica):
            if self.now - self.heard.get((replica, member), (-(10**9), 0))[0] >= 1000:
                self._wake(replica, member)

    def _relies_on(self, replica: int) -> list[int]:
        node = self.nodes[replica]
        if not node.quiet:
            return []
        return list(node.progress) if node.role is Role.LEADER else [node.leader]

    def _wake(self, replica: int, lost: int) -> None:
        if lost in self._relies_on(replica):
            heard = {of: ms for (at, of), (ms, _) in self.heard.items() if at == replica}
            self.nodes[replica].wake(self.now, heard)

    def serve_load(self) -> bool:
        if not self.loads:
            return False
        replica, load = self.loads.popleft()
        node, disk = self.nodes[replica], self.disks[replica]
        entries: list[Entry] = []
        size = 0
        for entry in disk.written()[load.index - disk.base - 1 :]:
            size += entry.size
            if entries and size > load.bytes_max:
                break
            entries.append(entry)
        node.on_loaded(load.to, entries)
        return True

    def read(self, replica: int) -> int:
        """Ask for a linearizable read; returns its context."""
        context = len(self.read_floors) + 1
        self.read_floors[context] = max(node.commit for node in self.nodes.values())
        self.nodes[replica].read_index(context, self.now)
        return context

    def compact(self, replica: int, index: int | None = None) -> None:
        """Take a snapshot at ``index`` (default: as high as may be) and drop the entries that it covers."""
        node, disk = self.nodes[replica], self.disks[replica]
        index = min(node.applied, node.durable_index) if index is None else index
        if index > disk.base:
            entry = disk.entries[index - disk.base - 1]
            disk.compact(Snapshot(index, entry.term, entry.crc, node.conf_at(index)))
            node.on_compacted(index + 1, entry.crc)
            self.checker.after_step(replica)

    def serve_snapshot(self, *, fail: bool = False) -> bool:
        """Bring one snapshot that a leader asked for to its follower, or fail to."""
        if not self.snapshots_wanted:
            return False
        replica, to = self.snapshots_wanted.pop(0)
        node, snapshot = self.nodes[replica], self.disks[replica].snapshot
        message = InstallSnapshot(to, replica, node.term, snapshot or Snapshot(0, 0, 0, self.conf))
        if replica in self.down or node.role is not Role.LEADER:
            return True
        if fail or snapshot is None or self.is_cut(message):
            node.on_snapshot_failed(to)
        else:
            self.deliver(message)
            node.step(InstallSnapshotResponse(replica, to, node.term, snapshot.index, 0), self.now)
            if self.nodes[to].term != message.term:
                node.on_snapshot_failed(to)
                return True
            if self.nodes[to].restore(snapshot, self.now):
                self.nodes[to].on_durable(self.disks[to].install(snapshot))
            self.checker.after_step(to)
            node.on_snapshot_sent(to, snapshot.index)
        return True

    def log_of(self, replica: int) -> list[Entry]:
        """The whole log as the core sees it: what storage was given and what it was not yet."""
        node = self.nodes[replica]
        entries = {entry.index: entry for entry in self.disks[replica].written()}
        low = max(node.first_index, node.applied + 1)
        memory = node.entries_in_memory(low, node.last_index + 1) or []
        entries.update((entry.index, entry) for entry in memory)
        return [entries[index] for index in sorted(entries) if index <= node.last_index]

    def terms_of(self, replica: int) -> list[int]:
        return [entry.term for entry in self.log_of(replica)]

    # -- all together ----------------------------------------------------------------------------------------

    def isolate(self, *replicas: int) -> None:
        """Cut these off from all others, both ways (not from one another)."""
        for one in self.nodes:
            for other in self.nodes:
                if (one in replicas) != (other in replicas):
                    self.cut_links.add((one, other))

    def heal(self) -> None:
        self.cut_links.clear()

    def settle(
        self,
        *,
        sync: bool = True,
        snapshots: bool = True,
        only: Callable[[Message], bool] = lambda message: True,
    ) -> None:
        """Let everything happen, in order, until nothing is left to do at this moment."""
        for _ in range(10_000):
            busy = False
            for replica in self.nodes:
                busy |= self.take_ready(replica)
                if sync and replica not in self.down:
                    busy |= self.sync(replica)
            while self.loads:
                busy |= self.serve_load()
            while snapshots and self.snapshots_wanted:
                busy |= self.serve_snapshot()
            if self.wire:
                busy = True
                message = self.wire.popleft()
                if only(message):
                    self.deliver(message)
            if not busy:
                return
        raise AssertionError("it never comes to rest")

    def advance(self, ms: int, **settle: Any) -> None:
        """Let time pass, stopping at every deadline."""
        end = self.now + ms
        while True:
            alive = [node for replica, node in self.nodes.items() if replica not in self.down]
            next_ms = min(node.deadline_ms for node in alive)
            if self.settings.get("quiet_after_ms"):
                next_ms = min(next_ms, self.beat_ms)
            self.now = min(end, max(self.now, next_ms))
            if self.now >= self.beat_ms:
                self.beat_ms = self.now + 100
                self.beat()
            for node in alive:
                node.tick(self.now)
                self.checker.after_step(node.id)
            self.settle(**settle)
            if self.now >= end:
                return

    def elect(self, replica: int) -> RawNode:
        """Make ``replica`` leader through an ordinary campaign."""
        node = self.nodes[replica]
        node.campaign(self.now)
        self.settle()
        assert node.role is Role.LEADER, f"{replica} was not elected"
        return node

    def propose(self, replica: int, *payloads: bytes) -> list[Entry]:
        return [self.nodes[replica].propose(FrameKind.BATCH, payload, self.now) for payload in payloads]

    def leader(self) -> RawNode:
        """The leader of the highest term among those that run."""
        leaders = [
            node
            for replica, node in self.nodes.items()
            if node.role is Role.LEADER and replica not in self.down
        ]
        assert leaders, "nobody leads"
        return max(leaders, key=lambda node: node.term)

    def of(self, kind: type[Message], **fields: Any) -> list[Any]:
        """Messages sent so far of one type with these fields."""
        return [
            message
            for message in self.sent
            if isinstance(message, kind)
            and all(getattr(message, name) == value for name, value in fields.items())
        ]
