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
log matching           entries of equal index and term that are handed to any disk have equal crc; frames
                       are chained by their crcs, so equal crcs mean equal logs below
state machine safety   one crc per committed index, one end of the log per applied index
durable before told    an acknowledgement names no index, a commit no majority, that the disks did not sync
commit rule            a leader counts entries of its own term only (Raft figure 8)
nothing synced is lost a restarted replica has what was synced before
high watermark         commit and applied never step back while a replica runs; a leader serves only once it
                       holds everything that was ever served
joint overlap          every quorum of a configuration meets every quorum of the next in the same log, and
                       the next begins only when a quorum holds the one before (thesis section 4.3)
retention              the log start moves only as far as the topic's settings allow, and no replica drops
                       a record above it
bounds                 messages and bytes in flight to a follower
node                   ``RawNode.check_invariants``, when role, term or configuration changed
====================== =================================================================================
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final

from raftlog.broker.group_replica import GroupReplica
from raftlog.config import TopicConfig
from raftlog.errors import RaftlogError
from raftlog.raft.progress import ProgressState
from raftlog.raft.types import (
    Append,
    AppendRequest,
    AppendResponse,
    ConfState,
    Message,
    Role,
    VoteRequest,
    VoteResponse,
)
from raftlog.record.frame import FrameKind
from raftlog.storage.replica_log import Accept, ReplicaLog
from raftlog.storage.snapshot_file import LogSnapshot
from raftlog.testing.books import (
    Event,
    Group,
    GroupKey,
    Member,
    View,
    Violation,
    Window,
    column,
    overlap,
)
from raftlog.testing.disk import SimDisk
from raftlog.testing.loop import START_TIME, SimLoop, SimNode
from raftlog.testing.ownership import Ownership

if TYPE_CHECKING:
    from raftlog.broker.broker import Broker
from raftlog.broker.replica import Replica

EVENTS_MAX: Final = 400
"""Events kept for the trace of a failure."""


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
        self.ownership = Ownership()
        self._loop = loop
        self._brokers: dict[str, tuple[Broker, SimDisk]] = {}
        self._views: dict[int, dict[int, View]] = {}
        self._votes: dict[tuple[int, int], int] = {}
        self._last_vote: dict[int, tuple[int, int]] = {}
        self._windows: dict[tuple[int, int], Window] = {}
        self._broken: Violation | None = None
        loop.on_step = self._after_step

    # -- brokers come and go ---------------------------------------------------------------------------------

    def started(self, broker: Broker, disk: SimDisk) -> None:
        """A broker's process has recovered its disk."""
        self._brokers[f"broker-{broker.broker_id}"] = (broker, disk)
        self._views[broker.broker_id] = {}
        _Ears(self, broker, disk)

    def ended(self, broker_id: int, *, power: bool = False) -> None:
        """Its process has ended; what was in flight to the disk may or may not be there later. With its
        ``power``, what was written and not synced is in flight too."""
        running = self._brokers.pop(f"broker-{broker_id}", None)
        if running is not None and hasattr(running[0], "repairs"):  # else it did not get that far
            self.counts["repairs"] += running[0].repairs.completed
        for view in self._views.pop(broker_id, {}).values():
            view.member.flights.clear()
        if power:
            for group in self.groups.values():
                for member in group.members.values():
                    member.forgot |= member.loose and member.broker_id == broker_id
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
                    columns[broker_id] = column(view)
        name = "" if group is None else group.name
        self.events.append(Event(self._loop.time() - START_TIME, what, name, columns))

    def view(self, broker_id: int, replica_id: int) -> View | None:
        """How a replica of a running broker was seen last."""
        return self._views[broker_id].get(replica_id)

    def violated(self, violation: Violation) -> None:
        """Seen in the middle of an event. The code under test must not meet it: it is raised behind that."""
        self._broken = self._broken or violation

    # -- what leaves a replica -------------------------------------------------------------------------------

    def appended(self, view: View, disk: SimDisk, commit: int, append: Append) -> None:
        """Entries are handed to a disk; they go into its commit of that number."""
        member, group = view.member, view.group
        first, last = append.entries[0].index, append.entries[-1].index
        member.settle(disk)
        if first <= member.handed:
            self.counts["truncations"] += 1
            known = member.rows.get(first)
            if known is not None and known.crc == append.entries[0].crc:
                raise Violation(
                    f"cut without conflict: {view.name} replaced entry {first} by the same one, and dropped "
                    "what followed"
                )
            member.cut(first - 1)
        member.handed = last
        for entry in append.entries:
            row = member.rows[entry.index] = group.book(entry)
            if row.kind == FrameKind.CONF:
                self._configured(view, row.index, row.says)
        member.flights.append([commit, last])

    def _configured(self, view: View, index: int, conf: ConfState) -> None:
        """A configuration is in force in this log."""
        group, confs = view.group, view.member.confs
        before_index, before = confs[-1]
        if not overlap(before, conf):
            raise Violation(f"joint overlap: {view.name} went from {before} to {conf} at index {index}")
        if view.replica.node.role is Role.LEADER:
            self._settle(group)
            if not group.has_quorum(before, before_index):
                raise Violation(
                    f"joint overlap: {view.name} began {conf} at index {index}, and {before} of index "
                    f"{before_index} is not committed"
                )
        confs.append((index, conf))

    def sent(self, broker: Broker, message: Message) -> None:
        """A message is on its way."""
        try:
            self._check_sent(broker, message)
        except Violation as violation:
            self.violated(violation)

    def _check_sent(self, broker: Broker, message: Message) -> None:
        if isinstance(message, AppendRequest):
            self._check_window(broker, message)
        elif isinstance(message, AppendResponse):
            if not message.rejected:
                view = self.view(broker.broker_id, message.sender)
                if view is not None:
                    self._check_acknowledgement(view, message.index)
        elif isinstance(message, VoteResponse):
            if message.granted and not message.pre:
                self._voted(message.sender, message.term, message.to)
        elif isinstance(message, VoteRequest) and not message.pre:
            self._voted(message.sender, message.term, message.sender)

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
        member.settle(disk)
        if member.trusted and index > member.durable:
            raise Violation(
                f"durable before told: {view.name} acknowledged index {index}, synced is {member.durable}"
            )

    def _check_window(self, broker: Broker, message: AppendRequest) -> None:
        replica = broker.replica(message.sender)
        if replica is None or replica.node.role is not Role.LEADER:
            return
        progress = replica.node.progress.get(message.to)
        if progress is None:
            return
        window = self._windows.get((message.sender, message.to))
        if window is None or window.term != message.term:
            window = self._windows[message.sender, message.to] = Window(message.term)
        window.sent(message)
        if progress.state is not ProgressState.REPLICATE:
            return
        messages, size = window.in_flight(progress.match, progress.next)
        config = broker.config
        # A single message always goes, however large its first entry.
        if messages > config.inflight_messages_max or (messages > 1 and size > config.inflight_bytes_max):
            raise Violation(f"bounds: {messages} messages, {size} bytes to {progress} of {replica.name}")

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
                view = views[replica.replica_id] = self._first_seen(broker, replica)
            if replica.fault is not None:
                _check_fault(replica, replica.fault)
                continue
            if replica.dirty:
                continue  # what it took in is not carried out yet: that comes at the end of this turn
            core = replica.node._node  # not through its properties: this line runs a million times a minute
            log = core.log
            state = (
                log.commit,
                log.applied,
                core.term,
                core.role,
                core.confs.current,
                replica.staged is None,
            )
            if state != view.state:
                view.state = state
                self._changed(view)

    def _first_seen(self, broker: Broker, replica: Replica[Any]) -> View:
        spec, core, log = replica.log.spec, replica.node, replica.log
        group = self.groups.get((spec.topic_id, spec.partition))
        if group is None:
            topic = None if spec.internal else broker.metadata.image.topic_by_id(spec.topic_id)
            policy = TopicConfig() if topic is None else TopicConfig.model_validate(topic.config)
            group = Group(f"{spec.topic}/{spec.partition}", spec.partition, spec.internal, policy)
            self.groups[spec.topic_id, spec.partition] = group
        member = group.members.setdefault(spec.replica_id, Member(spec.replica_id, broker.broker_id))
        member.loose = spec.flush_interval_ms > 0
        self.counts["amnesias"] += log.amnesiac
        recovered = log.recovered.last_index
        view = View(replica, group, member, conf=core.conf, commit=core.commit, applied=core.applied)
        if member.trusted:
            self._check_recovered(view, recovered)
        if (
            group.crcs.get((recovered, _term(log, recovered)), log.recovered.last_crc)
            != log.recovered.last_crc
        ):
            raise Violation(f"log matching: {view.name} came back with another entry at index {recovered}")
        self.check_start(view)
        member.durable = member.handed = recovered
        member.covered = 0
        member.landed = deque([[self._brokers[f"broker-{broker.broker_id}"][1].commits, recovered]])
        member.forgot = False
        member.confs = list(log.recovered.confs)
        member.rows = {row.index: row for row in group.log_below(recovered, log.recovered.last_crc)}
        self._count_duplicates(replica)
        if recovered:
            self.note(f"replica {spec.replica_id} is back", group)
        return view

    def _check_recovered(self, view: View, recovered: int) -> None:
        core, member = view.replica.node, view.member
        if recovered < member.durable and not member.forgot:
            raise Violation(
                f"nothing synced is lost: {view.name} came back with entries up to {recovered}, synced were "
                f"{member.durable}"
            )
        term, candidate = self._last_vote.get(member.replica_id, (0, 0))
        if core.term < term or (core.term == term and core.vote != candidate):
            raise Violation(
                f"one vote per term: {view.name} voted for {candidate} in term {term} and came back in term "
                f"{core.term} with its vote for {core.vote or 'nobody'}"
            )

    def check_start(self, view: View) -> None:
        """No replica has dropped records above the log start that somebody applied."""
        start = view.replica.log.start_offset
        if start > view.group.starts[-1]:
            raise Violation(
                f"retention: {view.name} has dropped records below {start}, the log begins at "
                f"{view.group.starts[-1]}"
            )

    def _count_duplicates(self, replica: Replica[Any]) -> None:
        """Count the batches that a partition takes without appending anything."""
        produce = getattr(replica, "produce", None)
        if produce is None:
            return

        def counted(*args: Any) -> None:
            last_index = replica.node.last_index
            produce(*args)
            if replica.node.last_index == last_index:
                self.counts["duplicates recognised"] += 1

        setattr(replica, "produce", counted)  # noqa: B010 - a method, to type checkers

    def _changed(self, view: View) -> None:
        core, group = view.replica.node, view.group
        conf = view.conf
        if core.role is not view.role or core.term != view.term or core.conf is not conf:
            self._check_role(view)
        if core.commit != view.commit:
            self._check_commit(view, conf)
        if core.applied != view.applied:
            self._check_applied(view)
        serving = view.replica.staged is not None
        if serving and not view.serving:
            self._check_serving(view)
        if serving:
            group.served = max(group.served, _next_offset(view.replica))
        view.serving = serving

    def _check_role(self, view: View) -> None:
        core, group = view.replica.node, view.group
        if core.term < view.term:
            raise Violation(f"{view.name} fell from term {view.term} to {core.term}")
        try:
            core.check_invariants()
        except AssertionError as error:
            raise Violation(f"node: {view.name}: {error!r}") from error
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
        if wanted is not None and core.term < wanted.term:
            # A candidate whose votes, or whose own disk, took so long that others were elected in later terms
            # meanwhile: what these committed it need not hold (Raft figure 3), for it can commit nothing.
            return
        if group.commit > core.last_index:
            raise Violation(
                f"leader completeness: {view.name} leads in term {core.term} with entries up to "
                f"{core.last_index}, committed are {group.commit}"
            )
        has = view.member.rows.get(group.commit)
        if has is not None and wanted is not None and has != wanted:
            raise Violation(
                f"leader completeness: {view.name} leads in term {core.term} with another entry at committed "
                f"index {group.commit}"
            )

    def _check_commit(self, view: View, conf_before: ConfState) -> None:
        core, group, member = view.replica.node, view.group, view.member
        if core.commit < view.commit:
            raise Violation(f"high watermark: {view.name} went from {view.commit} to {core.commit}")
        for index in range(view.commit + 1, core.commit + 1):
            row = member.rows.get(index)
            if row is None:
                continue  # it came with a snapshot
            known = group.committed.setdefault(index, row)
            if known != row:
                raise Violation(
                    f"state machine safety: {view.name} committed term {row.term} at index {index}, another "
                    f"term {known.term}"
                )
        view.commit = core.commit
        if core.commit > group.commit:
            self._check_quorum(view, conf_before)
            self._committed(view)

    def _check_quorum(self, view: View, conf_before: ConfState) -> None:
        """A majority has synced what is committed for the first time, in the configuration of before or after
        this event."""
        core, group = view.replica.node, view.group
        self._settle(group)
        if not (group.has_quorum(conf_before, core.commit) or group.has_quorum(core.conf, core.commit)):
            durable = {replica_id: member.durable for replica_id, member in group.members.items()}
            raise Violation(
                f"durable before told: {view.name} committed {core.commit} in {core.conf}, synced are "
                f"{durable}"
            )

    def _settle(self, group: Group) -> None:
        for member in group.members.values():
            running = self._brokers.get(f"broker-{member.broker_id}")
            if running is not None:
                member.settle(running[1])

    def _committed(self, view: View) -> None:
        core, group = view.replica.node, view.group
        last = group.committed.get(core.commit)
        if core.role is Role.LEADER and last is not None and last.term != core.term:
            raise Violation(
                f"commit rule: {view.name} leads in term {core.term} and committed index {core.commit} of "
                f"term {last.term} by counting"
            )
        for index in range(group.commit + 1, core.commit + 1):
            row = group.committed.get(index)
            if row is not None and row.kind == FrameKind.CONF and row.says.is_joint:
                self.counts["joint changes"] += 1
        group.commit = core.commit

    def _check_applied(self, view: View) -> None:
        core, group = view.replica.node, view.group
        if core.applied < view.applied or core.applied > core.commit:
            raise Violation(f"applied of {group.name} went from {view.applied} to {core.applied}")
        view.applied = core.applied
        if isinstance(view.replica, GroupReplica):
            self.ownership.applied(view.replica)
        end = (_log_start(view.replica), _next_offset(view.replica))
        known = group.ends.setdefault(core.applied, end)
        if known != end:
            raise Violation(
                f"state machine safety: {view.name} holds offsets [start, end) {end} at index "
                f"{core.applied}, another {known}"
            )
        if end[0] > group.starts[-1]:
            group.log_start_moved(end[0])
            self.counts["log starts moved"] += 1

    def _check_serving(self, view: View) -> None:
        core, group = view.replica.node, view.group
        # one that stood still may come to serve its own term when a later one has its leader already
        is_newest = core.term >= max(group.leaders)
        if is_newest and _next_offset(view.replica) < group.served:
            raise Violation(
                f"high watermark: replica {core.id} serves {group.name} up to {_next_offset(view.replica)}, "
                f"{group.served} was served before"
            )
        self.note(f"replica {core.id} serves in term {core.term}", group)


class _Ears:
    """Hears what a broker hands to its store."""

    def __init__(self, watch: Watch, broker: Broker, disk: SimDisk) -> None:
        self._watch = watch
        self._broker = broker
        self._disk = disk
        store = broker.store
        self._append, self._begin_behind, self._truncate = (
            store.append,
            store.begin_behind,
            store.truncate_prefix,
        )
        for name in ("append", "begin_behind", "truncate_prefix"):
            setattr(store, name, getattr(self, name))

    def _view(self, log: ReplicaLog) -> View | None:
        return self._watch.view(self._broker.broker_id, log.spec.replica_id)

    def append(self, log: ReplicaLog, append: Append, done: Any) -> None:
        view = self._view(log)
        if view is not None and append.entries:
            try:
                self._watch.appended(view, self._disk, self._broker.store.groups + 1, append)
            except Violation as violation:
                self._watch.violated(violation)
        self._append(log, append, done)

    async def begin_behind(self, log: ReplicaLog, snapshot: LogSnapshot, accept: Accept) -> bool:
        """A snapshot replaces a log: all below it is synced with it."""
        view = self._view(log)
        assert view is not None
        member = view.member

        def accepted() -> bool:
            wanted = accept()
            if wanted:
                member.flights.clear()
                member.cut(snapshot.index)
                member.rows.clear()
            return wanted

        replaced = await self._begin_behind(log, snapshot, accepted)
        if replaced:
            member.durable = member.handed = snapshot.index
            member.confs = [(snapshot.index, snapshot.conf)]
            self._watch.counts["snapshot installs"] += 1
            self._watch.note(f"replica {member.replica_id} begins behind {snapshot.index}", view.group)
            self._check_start(view)
        return replaced

    async def truncate_prefix(self, log: ReplicaLog, index: int) -> None:
        await self._truncate(log, index)
        view = self._view(log)
        if view is not None:
            self._check_start(view)

    def _check_start(self, view: View) -> None:
        try:
            self._watch.check_start(view)
        except Violation as violation:
            self._watch.violated(violation)


def _check_fault(replica: Replica[Any], fault: RaftlogError) -> None:
    """A replica goes out of service because its disk failed or it was deleted, never for what it was told."""
    if "cannot apply" in str(fault) or "cannot take" in str(fault):
        raise Violation(f"halted: replica {replica.replica_id} on broker {replica.host.broker_id}: {fault}")


def _term(log: ReplicaLog, index: int) -> int:
    terms = [term for start, term in log.recovered.terms if start <= index]
    return terms[-1] if terms else 0


def _next_offset(replica: Replica[Any]) -> int:
    """End of the committed records; of other groups than partitions 0."""
    return int(getattr(replica.machine, "next_offset", 0))


def _log_start(replica: Replica[Any]) -> int:
    return int(getattr(replica.machine, "log_start", 0))
