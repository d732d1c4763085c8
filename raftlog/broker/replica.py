"""A replica: drives one RawNode and the state machine behind it.

The host's whole part in Raft is a cycle of three steps, each taken for all replicas before the next.
:meth:`Replica.hand_out`: the core's messages go to the peers. :meth:`Replica.store`: what must become durable
goes to the store. :meth:`Replica.follow_up`: committed entries are applied. What comes back (a sync that is
done, a message, time) goes into the core. Everything here is synchronous and runs on the broker's loop.

On a leader there are two machines: ``machine`` is the applied state; ``staged`` is the applied state plus
every entry above it in the log. Decisions (which offset, is it a duplicate, may the topic be created) are
made against ``staged`` and ``staged`` is advanced in the same step as the append, so that what is decided is
what ``apply`` will find. ``staged`` exists only while the leader serves: from its no-op applied until it
leaves leadership, when whoever waits hears that the outcome is indeterminate.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from functools import partial
from typing import Any, Final, Generic, TypeVar

from raftlog.broker.events import replica_event
from raftlog.broker.host import Host
from raftlog.broker.leader_time import LeaderTime
from raftlog.broker.machine import StateMachine, stage
from raftlog.broker.membership import Membership, Wanted
from raftlog.broker.snapshots import SnapshotExchange
from raftlog.errors import LeadershipLost, NotLeader, RaftlogError, StorageFailed, UnknownReplica
from raftlog.raft.config import RecoveredLog
from raftlog.raft.raw_node import RawNode
from raftlog.raft.types import (
    LEADER,
    Append,
    Entry,
    InstallSnapshot,
    InstallSnapshotResponse,
    LoadRequest,
    Message,
    Ready,
    Role,
    Snapshot,
    SoftState,
)
from raftlog.record.frame import Buffer
from raftlog.state.command import CommandStruct, needs_upgrade
from raftlog.storage.replica_log import ReplicaLog

logger = logging.getLogger("raftlog.broker")

Done = Callable[[Any, RaftlogError | None], None]
"""Told the result of an entry once it is applied, or why it never will be known."""

_CAMPAIGN_AGAIN_MS: Final = 50
_HURT_PATIENCE: Final = 3
"""A damaged replica campaigns this many election timeouts later than others."""


M = TypeVar("M", bound=StateMachine)


class Replica(Generic[M]):
    """One member of one group on this broker.

    Args:
        host: the broker.
        log: the replica's log as storage recovered it.
        machine: its state machine, as :func:`recover` left it.
        recovered: what :func:`recover` returned.
        hosts: replica id -> broker id of every member.
        preferred: this replica is the one that should lead a brand-new group.
    """

    def __init__(
        self,
        host: Host,
        log: ReplicaLog,
        machine: M,
        recovered: RecoveredLog,
        hosts: Mapping[int, int],
        *,
        preferred: bool,
    ) -> None:
        self.host = host
        self.log = log
        self.machine = machine
        self.hosts = dict(hosts)
        self.preferred = preferred
        self.staged: M | None = None
        self.fault: RaftlogError | None = None
        self.dirty = False
        self.snapshots_sent = 0
        self.snapshots_installed = 0
        self.replica_id: Final = log.spec.replica_id
        self._waiters: dict[int, list[Done]] = {}
        self._served_term = 0
        """In which all that is waited for was proposed."""
        self._reads: dict[int, asyncio.Future[None]] = {}
        self._reads_asked = 0
        self._soft: SoftState | None = None
        self._append: Append | None = None
        """What was handed out and is to be stored."""
        self._handed_out: list[Ready] = []
        """What is to be followed up."""
        self._time = LeaderTime()
        self._campaign_at = 0
        self._hurt_since_ms = -1
        self._gave_up = False
        self._exchange = SnapshotExchange(self)
        self.membership = Membership(self)
        self.node = RawNode(
            host.raft_config(self.replica_id), recovered, host.random_for(self.replica_id), host.now_ms()
        )

    # -- what comes in ---------------------------------------------------------------------------------------

    def step(self, message: Message, now_ms: int) -> None:
        """A message from a peer."""
        if self.fault is not None:
            return
        try:
            stirred = self.node.step(message, now_ms)
        except AssertionError as error:
            self.halt(f"cannot take {type(message).__name__} from replica {message.sender}", error)
            stirred = True
        else:
            kind = type(message)
            if kind is InstallSnapshot or kind is InstallSnapshotResponse:
                self._step_snapshot(message)
        if stirred or self.log.amnesiac or self.fault is not None:
            self.host.mark(self)

    def _step_snapshot(self, message: Message) -> None:
        """The core has settled terms; the bytes are ours."""
        if message.term != self.node.term:
            return
        if isinstance(message, InstallSnapshotResponse):
            self._exchange.answered(message)
        elif isinstance(message, InstallSnapshot) and self.node.leader == message.sender:
            self._exchange.chunk(message)

    def tick(self, now_ms: int) -> None:
        """Time has passed. Cheap when nothing is due."""
        if self.fault is not None:
            return
        node = self.node
        if node.deadline_ms <= now_ms and not self._is_stalled(now_ms) and not self._is_hurt(now_ms):
            node.tick(now_ms)
            self.host.mark(self)
        if self._exchange.active:
            self._exchange.tick(now_ms)
        if self.membership.due:
            self.membership.tick(now_ms)
        if self.preferred and node.term == 0 and now_ms >= self._campaign_at and not self._is_stalled(now_ms):
            # A brand-new group: nobody has voted yet, so its first replica need not wait for a timeout. It
            # asks again until a majority of the others have come into being.
            self._campaign_at = now_ms + _CAMPAIGN_AGAIN_MS
            node.campaign(now_ms)
            self.host.mark(self)

    def _is_stalled(self, now_ms: int) -> bool:
        """Whether the broker's disk has kept an append waiting for an election timeout, when this replica was
        about to act on a timer: then it does not. It gives leadership to one whose disk moves, and does not
        campaign. A full device is not a stalled one: reads go on, and writes are refused with a reason.
        """
        store = self.host.store
        since = store.oldest_pending_since
        if since is None or store.fault is not None:
            return False
        if now_ms - since * 1000 < self.host.config.election_timeout_ms:
            return False
        node = self.node
        if node.role is Role.LEADER:
            if len(node.conf.voters) == 1:
                return False  # nobody to hand over to
            replica_event(logging.WARNING, "disk_stalled", "is given up as leader: the disk stalls", self)
            node.step_down(now_ms)
            self.host.mark(self)
        return True

    def _is_hurt(self, now_ms: int) -> bool:
        """Whether this replica, about to act on a timer, should not, for something in its files is damaged.
        As leader it gives up, once, when that is not repaired within an election timeout; and it lets others
        campaign first. If all are damaged, and nobody can help, one of them must lead all the same."""
        if not self.host.store.ward.is_hurt(self.replica_id):
            self._hurt_since_ms = -1
            self._gave_up = False
            return False
        if self._hurt_since_ms < 0:
            self._hurt_since_ms = now_ms
        node, timeout_ms = self.node, self.host.config.election_timeout_ms
        if node.conf.voters == (self.replica_id,):
            return False  # nobody else could do better
        if node.role is Role.LEADER:
            if self._gave_up or now_ms - self._hurt_since_ms < timeout_ms:
                return False
            replica_event(logging.WARNING, "leader_damaged", "is given up as leader: it is damaged", self)
            self._gave_up = True
            node.step_down(now_ms)
            self.host.mark(self)
            return True
        return now_ms - node.deadline_ms < _HURT_PATIENCE * timeout_ms

    @property
    def holds_awake(self) -> bool:
        """It has something to do that a group at rest would not."""
        return self.membership.holds_awake or (
            self.node.role is Role.LEADER and self.host.store.ward.is_hurt(self.replica_id)
        )

    def peer_up(self, broker_id: int, *, restarted: bool) -> None:
        """The connections to that broker stand again; ``restarted``: to a new incarnation of it."""
        forgot = restarted and self.log.spec.flush_interval_ms > 0
        for replica_id, host_id in self.hosts.items():
            if host_id == broker_id and self.fault is None:
                self.node.peer_restored(replica_id, self.host.now_ms(), forgot=forgot)
                self.host.mark(self)

    def peer_down(self, broker_id: int) -> None:
        """A connection to that broker broke: if it led this group, campaign without waiting for the
        timeout."""
        for replica_id, host_id in self.hosts.items():
            if host_id == broker_id and self.fault is None:
                self._exchange.peer_lost(replica_id)
                self.node.peer_lost(replica_id, self.host.now_ms())
                self.host.mark(self)

    # -- proposing -------------------------------------------------------------------------------------------

    def check_serving(self) -> M:
        """The staged machine of a leader that serves.

        Raises:
            NotLeader: this replica does not lead, or has not applied its no-op yet. Nothing happened.
            StorageFull, StorageFailed: the broker's device takes no writes.
        """
        self.check_in_service()
        if self.staged is None:
            raise self._not_leader()
        if self.host.store.fault is not None:
            raise self.host.store.fault
        return self.staged

    def _not_leader(self) -> NotLeader:
        return NotLeader(
            f"{self.name} is not led by broker {self.host.broker_id}",
            leader=self.leader_broker,
            term=self.node.term,
        )

    def check_in_service(self) -> None:
        """Raise if this replica was retired. For a client that is no end: where the storage failed, or a
        newer process of the broker has taken over, another one leads soon.

        Raises:
            NotLeader: it is out of service.
            UnknownReplica: it was deleted.
        """
        fault = self.fault
        if isinstance(fault, UnknownReplica):
            raise fault
        if fault is not None:
            raise NotLeader(f"{self.name} is out of service: {fault}", leader=None, term=self.node.term)

    def check_level(self, command: CommandStruct) -> None:
        """Raise NeedsUpgrade if not every broker of the cluster knows the command."""
        upgrade = needs_upgrade(command, self.host.feature_level)
        if upgrade is not None:
            raise upgrade

    def propose(self, staged: M, kind: int, payload: Buffer, done: Done) -> Entry:
        """Append an entry that was decided against ``staged``; ``done`` hears the result of its application.

        Raises:
            Busy: too much is in flight. Nothing happened.
        """
        node = self.node
        entry = node.propose(kind, payload, self.leader_time_ms())
        if staged.applied_index < entry.index - 1:
            own = node.entries_in_memory(staged.applied_index + 1, entry.index)
            assert own is not None, "what was not handed to storage is in memory"
            stage(staged, own)
        staged.apply(entry)
        self._waiters[entry.index] = [done]
        self.host.mark(self)
        return entry

    def wait_for(self, index: int, done: Done) -> None:
        """``done`` also hears the result of the entry at ``index``, which is in flight."""
        self._waiters.setdefault(index, []).append(done)

    def leader_time_ms(self) -> int:
        """The time that an entry proposed now gets: it never goes back along the log."""
        return self._time.of(self.node.last_leader_time_ms, self.host.wall_ms(), self.host.now_ms())

    async def confirm_leadership(self) -> None:
        """Wait until a quorum has confirmed that this replica leads: what it has applied then covers all
        that was acknowledged to anybody before the call (ReadIndex, thesis section 6.4).

        Raises:
            NotLeader, UnknownReplica: it does not, or not any more.
        """
        self.check_in_service()
        if not self.node.serving:
            raise self._not_leader()
        self._reads_asked += 1
        confirmed = self._reads[self._reads_asked] = asyncio.get_running_loop().create_future()
        self.node.read_index(self._reads_asked, self.host.now_ms())
        self.host.mark(self)
        await confirmed

    # -- the cycle -------------------------------------------------------------------------------------------

    def hand_out(self) -> bool:
        """First: what the core has for its peers leaves. Returns whether it has something to store."""
        self.dirty = False
        node = self.node
        if self.fault is not None or self._exchange.installing:
            return False
        ready = node.ready()
        self._handed_out.append(ready)
        if ready.messages:
            send, hosts = self.host.send, self.hosts
            for message in ready.messages:
                broker_id = hosts.get(message.to)
                if broker_id is not None:
                    send(broker_id, message)
        self._append = ready.append
        return ready.append is not None

    def store(self) -> None:
        """Second: what it says must become durable goes to the store."""
        append, self._append = self._append, None
        assert append is not None, "it was handed out"
        self.host.store.append(self.log, append, partial(self._durable, append.sequence))
        # Not of a successor, whose entries may come before this replica has left the leadership.
        if self.staged is not None and self.node.role is LEADER and self.node.term == self._served_term:
            stage(self.staged, append.entries)

    def follow_up(self) -> None:
        """Third: everything else that it asks for. If there is more then, the replica is marked again."""
        handed_out, self._handed_out = self._handed_out, []
        if self.fault is not None or self._exchange.installing:
            return
        node, host = self.node, self.host
        for ready in handed_out:
            if ready.committed and not self._apply(ready.committed):
                return
            if ready.reads:
                self._confirm_reads(ready.reads)
            if ready.soft_state is not None:
                self._leadership(ready.soft_state)
            for load in ready.loads:
                host.spawn(self._load(load))
            for follower in ready.snapshots:
                self._exchange.begin(follower)
        if handed_out and node.has_ready():
            host.mark(self)
            return
        if self.staged is None and node.serving:
            self._begin_serving()
        if self.log.amnesiac and not node.amnesiac:
            self.log.amnesiac = False
            host.spawn(self._cured())

    def _confirm_reads(self, reads: tuple[tuple[int, int], ...]) -> None:
        for context, index in reads:
            assert index <= self.node.applied, (index, self.node.applied)
            confirmed = self._reads.pop(context)
            if not confirmed.done():
                confirmed.set_result(None)

    def _durable(self, sequence: int, error: BaseException | None) -> None:
        if error is not None:
            self.retire(error if isinstance(error, RaftlogError) else StorageFailed(str(error)))
        elif self.fault is None and (self.node.on_durable(sequence) or self.log.amnesiac):
            self.host.mark(self)

    def _apply(self, entries: tuple[Entry, ...]) -> bool:
        """Apply; False when the replica had to halt."""
        machine, log, waiters = self.machine, self.log, self._waiters
        log.set_committed(entries[-1].index)
        for entry in entries:
            try:
                result = machine.apply(entry)
            except AssertionError as error:
                self.halt(f"cannot apply index {entry.index}", error)
                return False
            if log.is_segment_end(entry.index):
                self._save_snapshot(entry)
            # Of another term it is not what somebody waits for, but what a later leader put in its place.
            done = waiters.pop(entry.index, None) if entry.term == self._served_term else None
            answer = self.applied(entry, result)
            if done is not None:
                for tell in done:
                    tell(answer, None)
        self.node.applied_to(entries[-1].index)
        self.applied_all()
        return True

    def applied(self, entry: Entry, result: object) -> object:
        """One entry was applied with ``result``; returns what to tell who proposed it (for subclasses)."""
        return result

    def applied_all(self) -> None:
        """A run of entries was applied (for subclasses)."""

    def replaced(self) -> None:
        """A snapshot from the leader has replaced log and state machine (for subclasses)."""
        self.applied_all()

    def wanted_members(self, able: Set[int]) -> Wanted | None:
        """What the metadata wants the group's configuration to be, None if it says nothing (for subclasses).

        Args:
            able: members that are up to date and answer.
        """
        return None

    def members_reached(self) -> bool:
        """On a leader: the configuration is what is wanted, and committed. Returns False while something is
        yet to be done about it (for subclasses)."""
        return True

    def began_serving(self, staged: M) -> None:
        """This replica serves as leader from now on (for subclasses)."""

    def stopped_serving(self) -> None:
        """This replica served as leader and does no longer (for subclasses)."""

    async def keep_house(self) -> None:
        """Called every few seconds: drop what is not needed any more.

        Raises:
            StorageFull, StorageFailed: the device.
        """
        await self.compact(self.spent_index)

    @property
    def spent_index(self) -> int:
        """Entries up to here may go: of the metadata and of coordinators, what their newest snapshot holds;
        of partitions, what retention has given up (0: nothing)."""
        log = self.log
        return log.snapshots[-1] if log.spec.internal and log.snapshots else 0

    async def compact(self, index: int) -> None:
        """Drop whole segments of the log that end at or below ``index``; see
        :meth:`~raftlog.storage.replica_log.ReplicaLog.truncate_prefix`."""
        log, node = self.log, self.node
        if self.fault is not None or index < log.first_index:
            return
        try:
            await log.truncate_prefix(index)
        finally:
            if self.fault is None and log.first_index > node.first_index:
                node.on_compacted(log.first_index, log.prev_crc)

    async def _cured(self) -> None:
        with suppress(RaftlogError):  # if the disk cannot note it, the replica is cured again after a restart
            await self.log.cured()

    def halt(self, what: str, error: Exception) -> None:
        """An invariant is broken: this replica must not go on. The broker's other groups can."""
        logger.error("broker %d: %s %s", self.host.broker_id, self.name, what, exc_info=error)
        self.retire(StorageFailed(f"{self.name} {what}: {error}"))

    def _save_snapshot(self, last: Entry) -> None:
        """The machine stands exactly at the end of a segment: keep its state there."""
        self.log.save_snapshot(
            Snapshot(
                last.index,
                last.term,
                last.crc,
                self.node.conf_at(last.index),
                self.machine.snapshot(),
            )
        )

    def _leadership(self, soft: SoftState) -> None:
        before, self._soft = self._soft, soft
        if soft.role is not Role.LEADER:
            self._exchange.stop_sending()
        if self.staged is not None and (
            soft.role is not Role.LEADER or before is None or soft.term != before.term
        ):
            self.staged = None
            self._fail_waiters()
            self.stopped_serving()
        if soft.role is not Role.LEADER:
            self._fail_reads()
        self.host.leadership_changed(self, before)

    def _begin_serving(self) -> None:
        staged = self.machine.copy()
        node = self.node
        if node.last_index > node.applied:
            above = node.entries_in_memory(node.applied + 1, node.last_index + 1)
            assert above is not None, "entries above the applied index are always in memory"
            for entry in above:
                staged.apply(entry)
        self.staged = staged
        self._served_term = node.term
        self.began_serving(staged)
        replica_event(logging.INFO, "leader_won", f"is led by it from term {node.term} on", self)

    def _fail_waiters(self) -> None:
        waiters, self._waiters = self._waiters, {}
        if waiters:
            error = LeadershipLost(
                f"broker {self.host.broker_id} left the leadership of {self.name} while the write "
                "was under way"
            )
            for done in waiters.values():
                for tell in done:
                    tell(None, error)

    def _fail_reads(self) -> None:
        reads, self._reads = self._reads, {}
        for confirmed in reads.values():
            if not confirmed.done():
                confirmed.set_exception(self._not_leader())

    async def _load(self, load: LoadRequest) -> None:
        log = self.log
        if not log.first_index <= load.index <= log.last_index:
            self.node.on_load_failed(load.to)  # dropped or cut meanwhile
            return
        try:
            entries = await log.entries(load.index, log.last_index + 1, load.bytes_max)
        except RaftlogError as error:
            logger.warning("%s: cannot read entries from index %d: %s", self.name, load.index, error)
            self.node.on_load_failed(load.to)
        else:
            self.node.on_loaded(load.to, entries)
        self.host.mark(self)

    def retire(self, error: RaftlogError) -> None:
        """Take this replica out of service for good (until the broker is started anew)."""
        if self.fault is None:
            self.fault = error
            self.staged = None
            self._exchange.stop_sending()
            self._fail_waiters()
            self._fail_reads()
            self.stopped_serving()
            level = logging.INFO if isinstance(error, UnknownReplica) else logging.ERROR  # it was deleted
            replica_event(level, "replica_retired", f"is out of service: {error}", self)

    # -- looking ---------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return f"{self.log.spec.topic}/{self.log.spec.partition}"

    @property
    def leader_broker(self) -> int | None:
        """Broker id of the leader as far as this replica knows."""
        return self.hosts.get(self.node.leader)
