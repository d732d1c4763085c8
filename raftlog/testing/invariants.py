"""What must hold after every event of a simulated cluster, seen from outside of the code that is tested.

After every callback of a broker, :class:`Watch` compares its replicas with how it last saw them and checks
what changed, so that an event in which nothing changed costs next to nothing. It keeps its own books: what
was handed to a disk and which sync has covered it, what votes left, what was committed by anyone. None of
that is asked of the code under test, which might be wrong about it.

====================== =================================================================================
invariant              how it is held
====================== =================================================================================
election safety        one leader per group and term (Raft figure 3)
cut at conflicts only  an entry is never replaced by the same one (Raft figure 2, AppendEntries 3)
one vote per term      by votes that left the replica, across restarts
leader completeness    a new leader's log holds the highest entry that was committed in any earlier term
log matching           entries of equal index and term have equal crc; frames are chained by their crcs,
                       so equal crcs mean equal logs below
state machine safety   one crc per committed index, one end of the log per applied index
durable before told    an acknowledgement names no index, a commit no majority, that the disks did not sync
commit rule            a leader counts entries of its own term only (Raft figure 8)
nothing synced is lost a restarted replica has what was synced before
high watermark         commit and applied never step back while a replica runs; a leader serves only once it
                       holds everything that was ever served
bounds                 uncommitted bytes, messages and bytes in flight to a follower
node                   ``RawNode.check_invariants``, when role, term or configuration changed
====================== =================================================================================
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from raftlog.errors import RaftlogError
from raftlog.raft.types import Append, AppendResponse, Message, Role, VoteRequest, VoteResponse
from raftlog.testing.disk import SimDisk
from raftlog.testing.loop import START_TIME, SimLoop, SimNode

if TYPE_CHECKING:
    from raftlog.broker.broker import Broker
    from raftlog.broker.replica import Replica

GroupKey: TypeAlias = tuple[bytes, int]
"""(topic id, partition)."""
EVENTS_MAX: Final = 400
"""Events kept for the trace of a failure."""


class Violation(AssertionError):
    """An invariant or a promise is broken."""


@dataclass(slots=True)
class Member:
    """What is known of one replica, across the restarts of its broker."""

    replica_id: int
    broker_id: int
    durable: int = 0
    """Every entry up to here has been synced."""
    flights: deque[list[int]] = field(default_factory=deque)
    """[commit of the disk that must be done, last index], oldest first: handed over, not synced."""
    handed: int = 0
    """The last index handed over."""
    crcs: dict[int, int] = field(default_factory=dict)
    """index -> crc of what this run of its broker handed over."""
    trusted: bool = True
    """Its disk keeps what it synced (not after a failed sync, a wipe, or rot)."""

    def settle(self, commits_done: int) -> None:
        """Take over what the disk has synced by now."""
        flights = self.flights
        while flights and flights[0][0] <= commits_done:
            self.durable = max(self.durable, flights.popleft()[1])

    def cut(self, last: int) -> None:
        """The log now ends at ``last``."""
        self.durable = min(self.durable, last)
        for flight in self.flights:
            flight[1] = min(flight[1], last)


@dataclass(slots=True)
class Group:
    """What is known of one Raft group."""

    name: str
    members: dict[int, Member] = field(default_factory=dict)
    leaders: dict[int, int] = field(default_factory=dict)
    """term -> replica."""
    crcs: dict[tuple[int, int], int] = field(default_factory=dict)
    """(index, term) -> crc, of every entry ever seen in any log."""
    committed: dict[int, tuple[int, int]] = field(default_factory=dict)
    """index -> (term, crc)."""
    commit: int = 0
    """The highest index that anyone took for committed."""
    ends: dict[int, int] = field(default_factory=dict)
    """applied index -> next offset."""
    largest: int = 0
    """Bytes of the largest entry."""
    served: int = 0
    """The highest offset that a leader has shown as committed."""


@dataclass(slots=True)
class View:
    """How a running replica was seen last."""

    replica: Replica[Any]
    group: Group
    member: Member
    state: tuple[Any, ...] = ()
    role: Role = Role.FOLLOWER
    term: int = 0
    commit: int = 0
    applied: int = 0
    last_index: int = 0
    last_crc: int = 0
    conf: object = None
    serving: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """A line of the trace: what happened, and how every replica of ``group`` stood."""

    seconds: float
    what: str
    group: str
    columns: dict[int, str]


class Watch:
    """The watch over one cluster: install it once, on the loop.

    Attributes:
        counts: elections, truncations and the like, for reports.
        events: the last of them.
    """

    def __init__(self, loop: SimLoop) -> None:
        self.counts: Counter[str] = Counter()
        self.events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self.groups: dict[GroupKey, Group] = {}
        self._loop = loop
        self._brokers: dict[str, tuple[Broker, SimDisk]] = {}
        self._views: dict[int, dict[int, View]] = {}
        self._votes: dict[tuple[int, int], int] = {}
        self._last_vote: dict[int, tuple[int, int]] = {}
        self._broken: Violation | None = None
        loop.on_step = self._after_step

    # -- brokers come and go ---------------------------------------------------------------------------------

    def started(self, broker: Broker, disk: SimDisk) -> None:
        """A broker's process has recovered its disk."""
        self._brokers[f"broker-{broker.broker_id}"] = (broker, disk)
        self._views[broker.broker_id] = {}
        hand_over = broker.store.append

        def append(log: Any, append: Append, done: Any) -> None:
            self._appended(broker.broker_id, disk, log.spec.replica_id, append)
            hand_over(log, append, done)

        setattr(broker.store, "append", append)  # noqa: B010 - a method, to type checkers

    def ended(self, broker_id: int) -> None:
        """Its process has ended; what was in flight to the disk may or may not be there later."""
        self._brokers.pop(f"broker-{broker_id}", None)
        for view in self._views.pop(broker_id, {}).values():
            view.member.flights.clear()
        self.note(f"broker {broker_id} ended")

    def distrust(self, broker_id: int) -> None:
        """The disk may have lost what it synced: a fault did that, not the code under test."""
        for group in self.groups.values():
            for member in group.members.values():
                if member.broker_id == broker_id:
                    member.trusted = False

    def note(self, what: str, group: Group | None = None) -> None:
        """A line for the trace."""
        columns = {}
        for broker_id, views in self._views.items():
            for view in views.values():
                if group is not None and view.group is group:
                    columns[broker_id] = _column(view)
        name = "" if group is None else group.name
        self.events.append(Event(self._loop.time() - START_TIME, what, name, columns))

    # -- what leaves a replica -------------------------------------------------------------------------------

    def _appended(self, broker_id: int, disk: SimDisk, replica_id: int, append: Append) -> None:
        view = self._views[broker_id].get(replica_id)
        if view is None or not append.entries:
            return
        member = view.member
        first, last = append.entries[0].index, append.entries[-1].index
        member.settle(disk.commits_done)
        if first <= member.handed:
            self.counts["truncations"] += 1
            if member.crcs.get(first) == append.entries[0].crc:
                self._broken = Violation(
                    f"cut without conflict: replica {replica_id} of {view.group.name} replaced entry {first} "
                    "by the same one, and dropped what followed"
                )
            member.cut(first - 1)
        member.handed = last
        for entry in append.entries:
            member.crcs[entry.index] = entry.crc
            view.group.largest = max(view.group.largest, entry.size)
        member.flights.append([disk.commits + 1, last])

    def sent(self, broker: Broker, message: Message) -> None:
        """A message is on its way."""
        try:
            self._check_sent(broker, message)
        except Violation as violation:  # the broker must not meet it: raised behind this event
            self._broken = self._broken or violation

    def _check_sent(self, broker: Broker, message: Message) -> None:
        if isinstance(message, VoteResponse):
            if message.granted and not message.pre:
                self._voted(message.sender, message.term, message.to)
        elif isinstance(message, VoteRequest):
            if not message.pre:
                self._voted(message.sender, message.term, message.sender)
        elif isinstance(message, AppendResponse) and not message.rejected:
            view = self._views[broker.broker_id].get(message.sender)
            if view is not None:
                self._check_acknowledgement(view, message.index)

    def _voted(self, voter: int, term: int, candidate: int) -> None:
        before = self._votes.setdefault((voter, term), candidate)
        if before != candidate:
            raise Violation(
                f"one vote per term: replica {voter} voted for {before} and {candidate} in term {term}"
            )
        self._last_vote[voter] = max(self._last_vote.get(voter, (0, 0)), (term, candidate))

    def _check_acknowledgement(self, view: View, index: int) -> None:
        member = view.member
        _, disk = self._brokers[f"broker-{member.broker_id}"]
        member.settle(disk.commits_done)
        if member.trusted and index > member.durable:
            raise Violation(
                f"durable before told: replica {member.replica_id} of {view.group.name} acknowledged index "
                f"{index}, synced is {member.durable}"
            )

    # -- after every event -----------------------------------------------------------------------------------

    def _after_step(self, node: SimNode) -> None:
        if self._broken is not None:
            raise self._broken
        found = self._brokers.get(node.name)
        if found is None:
            return
        broker = found[0]
        views = self._views[broker.broker_id]
        for replica in broker.replicas():
            view = views.get(replica.replica_id)
            if view is None:
                view = views[replica.replica_id] = self._first_seen(broker.broker_id, replica)
            if replica.fault is not None:
                _check_fault(replica, replica.fault)
                continue
            core = replica.node
            state = (
                core.last_crc,
                core.commit,
                core.applied,
                core.last_index,
                core.term,
                core.role,
                replica.staged is None,
            )
            if state != view.state:
                view.state = state
                self._changed(view)

    def _first_seen(self, broker_id: int, replica: Replica[Any]) -> View:
        spec, core = replica.log.spec, replica.node
        key = (spec.topic_id, spec.partition)
        group = self.groups.setdefault(key, Group(f"{spec.topic}/{spec.partition}"))
        member = group.members.setdefault(spec.replica_id, Member(spec.replica_id, broker_id))
        recovered = replica.log.recovered.last_index
        if member.trusted and recovered < member.durable:
            raise Violation(
                f"nothing synced is lost: replica {spec.replica_id} of {group.name} came back with entries "
                f"up to {recovered}, synced were {member.durable}"
            )
        term, candidate = self._last_vote.get(spec.replica_id, (0, 0))
        if member.trusted and (core.term < term or (core.term == term and core.vote != candidate)):
            raise Violation(
                f"one vote per term: replica {spec.replica_id} of {group.name} voted for {candidate} in term "
                f"{term} and came back in term {core.term} with its vote for {core.vote or 'nobody'}"
            )
        known_crc = group.crcs.get((recovered, _term(replica, recovered)))
        if known_crc not in (None, replica.log.recovered.last_crc):
            raise Violation(
                f"log matching: replica {spec.replica_id} of {group.name} came back with another entry "
                f"at index {recovered}"
            )
        member.durable = member.handed = recovered
        member.crcs.clear()
        self._count_duplicates(replica)
        view = View(replica, group, member, last_index=recovered, last_crc=core.last_crc)
        view.commit, view.applied = core.commit, core.applied
        if recovered:
            self.note(f"replica {spec.replica_id} is back", group)
        return view

    def _count_duplicates(self, replica: Replica[Any]) -> None:
        """Count the batches that a partition takes without appending anything."""
        produce = getattr(replica, "produce", None)
        if produce is None:
            return

        def counted(batch: Any, done: Any) -> None:
            before = replica.node.last_index
            produce(batch, done)
            if replica.node.last_index == before:
                self.counts["duplicates recognised"] += 1

        setattr(replica, "produce", counted)  # noqa: B010 - a method, to type checkers

    def _changed(self, view: View) -> None:
        core, group = view.replica.node, view.group
        if core.last_crc != view.last_crc or core.last_index != view.last_index:
            self._check_entries(view)
        if core.role is not view.role or core.term != view.term or core.conf is not view.conf:
            self._check_role(view)
        if core.commit != view.commit:
            self._check_commit(view)
        if core.applied != view.applied:
            self._check_applied(view)
        serving = view.replica.staged is not None
        if serving and not view.serving:
            self._check_serving(view)
        if serving:
            group.served = max(group.served, _next_offset(view.replica))
        view.serving = serving
        if core.role is Role.LEADER:
            self._check_bounds(view)

    def _check_entries(self, view: View) -> None:
        """Log matching, of all that is new in this log."""
        core, group = view.replica.node, view.group
        first = min(view.last_index, core.last_index)
        entries = core.entries_in_memory(max(first, core.first_index), core.last_index + 1)
        for entry in entries or ():
            known = group.crcs.setdefault((entry.index, entry.term), entry.crc)
            if known != entry.crc:
                raise Violation(
                    f"log matching: replica {core.id} of {group.name} has {entry.crc:08x} at index "
                    f"{entry.index} of term {entry.term}, another has {known:08x}"
                )
        view.last_index, view.last_crc = core.last_index, core.last_crc

    def _check_role(self, view: View) -> None:
        core, group = view.replica.node, view.group
        if core.term < view.term:
            raise Violation(f"replica {core.id} of {group.name} fell from term {view.term} to {core.term}")
        try:
            core.check_invariants()
        except AssertionError as error:
            raise Violation(f"node: replica {core.id} of {group.name}: {error!r}") from error
        if core.role is Role.LEADER and (view.role is not Role.LEADER or core.term != view.term):
            self._check_election(view)
        if core.role is not view.role or core.term != view.term:
            view.role, view.term = core.role, core.term
            self.note(f"replica {core.id} is {core.role.value} in term {core.term}", group)
        view.conf = core.conf

    def _check_election(self, view: View) -> None:
        core, group = view.replica.node, view.group
        self.counts["elections"] += 1
        other = group.leaders.setdefault(core.term, core.id)
        if other != core.id:
            raise Violation(f"election safety: {other} and {core.id} lead {group.name} in term {core.term}")
        wanted = group.committed.get(group.commit)
        if wanted is not None and core.term < wanted[0]:
            # A candidate whose votes, or whose own disk, took so long that others were elected in later terms
            # meanwhile: what these committed it need not hold (Raft figure 3), for it can commit nothing.
            return
        if group.commit > core.last_index:
            raise Violation(
                f"leader completeness: replica {core.id} leads {group.name} in term {core.term} with entries "
                f"up to {core.last_index}, committed are {group.commit}"
            )
        if group.commit >= core.first_index:
            entries = core.entries_in_memory(group.commit, group.commit + 1)
            if entries and wanted is not None and (entries[0].term, entries[0].crc) != wanted:
                raise Violation(
                    f"leader completeness: replica {core.id} leads {group.name} in term {core.term} with "
                    f"another entry at committed index {group.commit}"
                )

    def _check_commit(self, view: View) -> None:
        core, group = view.replica.node, view.group
        if core.commit < view.commit:
            raise Violation(
                f"high watermark: replica {core.id} of {group.name} went from {view.commit} to {core.commit}"
            )
        entries = core.entries_in_memory(view.commit + 1, core.commit + 1)
        for entry in entries or ():
            known = group.committed.setdefault(entry.index, (entry.term, entry.crc))
            if known != (entry.term, entry.crc):
                raise Violation(
                    f"state machine safety: replica {core.id} of {group.name} committed term {entry.term} at "
                    f"index {entry.index}, another term {known[0]}"
                )
        view.commit = core.commit
        if core.commit > group.commit:
            self._check_quorum(view)
            if core.role is Role.LEADER and entries and entries[-1].term != core.term:
                raise Violation(
                    f"commit rule: replica {core.id} of {group.name} leads in term {core.term} and committed "
                    f"index {core.commit} of term {entries[-1].term} by counting"
                )
            group.commit = core.commit

    def _check_quorum(self, view: View) -> None:
        """A majority has synced what is committed for the first time (counted here, not by the core)."""
        core, group = view.replica.node, view.group
        durable = {}
        for replica_id, member in group.members.items():
            running = self._brokers.get(f"broker-{member.broker_id}")
            if running is not None:
                member.settle(running[1].commits_done)
            durable[replica_id] = member.durable
        halves = [half for half in (core.conf.voters, core.conf.outgoing) if half]
        if any(2 * sum(durable.get(each, 0) >= core.commit for each in half) <= len(half) for half in halves):
            raise Violation(
                f"durable before told: replica {core.id} of {group.name} committed {core.commit}, synced are "
                f"{durable}"
            )

    def _check_applied(self, view: View) -> None:
        core, group = view.replica.node, view.group
        if core.applied < view.applied or core.applied > core.commit:
            raise Violation(f"applied of {group.name} went from {view.applied} to {core.applied}")
        view.applied = core.applied
        end = _next_offset(view.replica)
        known = group.ends.setdefault(core.applied, end)
        if known != end:
            raise Violation(
                f"state machine safety: replica {core.id} of {group.name} ends at offset {end} at index "
                f"{core.applied}, another at {known}"
            )

    def _check_serving(self, view: View) -> None:
        core, group = view.replica.node, view.group
        if _next_offset(view.replica) < group.served:
            raise Violation(
                f"high watermark: replica {core.id} serves {group.name} up to {_next_offset(view.replica)}, "
                f"{group.served} was served before"
            )
        self.note(f"replica {core.id} serves in term {core.term}", group)

    def _check_bounds(self, view: View) -> None:
        replica, core = view.replica, view.replica.node
        config = replica.host.raft_config(core.id)
        for progress in core.progress.values():
            if progress.inflight_messages > config.inflight_messages_max:
                raise Violation(f"bounds: {progress} of {view.group.name}")
            # Entries that are read from storage come at least one at a time, whatever room is left for them,
            # and a single one always goes.
            if (
                progress.inflight_messages > 1
                and progress.inflight_bytes > config.inflight_bytes_max + view.group.largest
            ):
                raise Violation(f"bounds: {progress} of {view.group.name}")


def _check_fault(replica: Replica[Any], fault: RaftlogError) -> None:
    """A replica goes out of service because its disk failed or it was deleted, never for what it was told."""
    if "cannot apply" in str(fault) or "cannot take" in str(fault):
        raise Violation(f"halted: replica {replica.replica_id} on broker {replica.host.broker_id}: {fault}")


def _term(replica: Replica[Any], index: int) -> int:
    terms = [term for start, term in replica.log.recovered.terms if start <= index]
    return terms[-1] if terms else 0


def _next_offset(replica: Replica[Any]) -> int:
    """End of the committed records; of other groups than partitions 0."""
    return int(getattr(replica.machine, "next_offset", 0))


def _column(view: View) -> str:
    core = view.replica.node
    letter = {Role.LEADER: "L", Role.CANDIDATE: "C", Role.PRE_CANDIDATE: "p"}.get(core.role, "f")
    return f"{letter}{core.term} {core.applied}/{core.commit}/{core.last_index}"


def render(events: deque[Event], brokers: int) -> str:
    """The trace: a line an event, a column a replica, which shows role, term, applied/commit/last index."""
    width = 18
    head = "    seconds  " + "".join(f"broker {broker_id}".ljust(width) for broker_id in range(brokers))
    lines = [head + "event"]
    for event in events:
        columns = "".join(event.columns.get(broker_id, "").ljust(width) for broker_id in range(brokers))
        name = f"{event.group}: " if event.group else ""
        lines.append(f"{event.seconds:11.4f}  {columns}{name}{event.what}")
    return "\n".join(lines)
