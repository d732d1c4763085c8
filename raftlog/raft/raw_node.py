"""The Raft core's face: inputs go in, :class:`Ready` comes out, nothing here touches the outside.

A host drives it so::

    node.step(message, now_ms) / node.tick(now_ms) / node.propose(…)
    while node.has_ready():
        ready = node.ready()
        storage.append(ready.append)        # calls node.on_durable(sequence) once synced
        network.send(ready.messages)        # at once: what must wait for the disk is held back in here
        apply(ready.committed); node.applied_to(index)

All calls come from one thread. A call that raises a typed error has changed nothing; an AssertionError
(:class:`~raftlog.raft.log.LogDiverged` above all) means that an invariant is broken and the replica must
halt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from raftlog.raft import (
    amnesia,
    election,
    follower,
    heartbeats,
    invariants,
    leader,
    proposals,
    quiescence,
    transfer,
)
from raftlog.raft.config import RaftConfig, RecoveredLog
from raftlog.raft.node import Node
from raftlog.raft.progress import Progress
from raftlog.raft.types import (
    LEADER,
    TERM_MAX,
    Append,
    AppendRequest,
    AppendResponse,
    ConfState,
    Entry,
    HardState,
    Heartbeat,
    HeartbeatResponse,
    InstallSnapshot,
    InstallSnapshotResponse,
    Message,
    ReadIndexRequest,
    ReadIndexResponse,
    Ready,
    Role,
    Snapshot,
    SoftState,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)
from raftlog.record.frame import Buffer


class RawNode:
    """One replica's Raft state machine.

    Args:
        config: settings, the replica id among them.
        recovered: what storage found.
        random: the only source of chance; a seeded one makes every run the same.
        now_ms: monotonic time in milliseconds, as in every later call.
    """

    __slots__ = ("_node", "_soft")

    def __init__(
        self, config: RaftConfig, recovered: RecoveredLog, random: random.Random, now_ms: int
    ) -> None:
        node = self._node = Node(config, recovered, random, now_ms)
        node.amnesiac = amnesia.matters(recovered, node.confs, node.log.commit)
        self._soft = (self._node.role, self._node.term, 0)

    # -- inputs ----------------------------------------------------------------------------------------------

    def step(self, message: Message, now_ms: int) -> bool:
        """Take a message from another replica.

        Returns:
            Whether the host has to look: there is a Ready, or the node rests, or did until now.

        Raises:
            LogDiverged: the sender's log and this one disagree where Raft proves that they cannot.
        """
        node = self._node
        assert message.to == node.id, f"{message} came to replica {node.id}"
        if now_ms > node.now_ms:
            node.now_ms = now_ms
        rested = node.quiet
        if rested and not (isinstance(message, Heartbeat) and message.quiet):
            node.wake()
        if message.term == node.term or self._admit(message):
            _HANDLERS[type(message)](node, message)
        return rested or self.has_ready() or node.quiet

    def _admit(self, message: Message) -> bool:
        """Settle terms (Raft section 5.1). Returns whether the message is still of interest."""
        node = self._node
        if message.term < node.term:
            if isinstance(message, AppendRequest | Heartbeat | InstallSnapshot):
                # A leader of an older term, perhaps one that leases keep in office while we went ahead: our
                # term makes it step down, and us electable again.
                node.messages.append(AppendResponse(message.sender, node.id, node.term, 0, True))
            elif isinstance(message, VoteRequest):
                node.messages.append(VoteResponse(message.sender, node.id, node.term, False, message.pre))
            return False
        if message.term > TERM_MAX:
            return False
        if isinstance(message, VoteRequest):
            if message.sender == node.leader:
                node.leader = 0  # it asks for a later term, so it leads no more in this one: no lease
            if node.in_lease and not message.transfer:
                election.refuse_in_lease(node, message)
                return False
            if message.pre:
                return True
        elif isinstance(message, VoteResponse) and message.pre and message.granted:
            return True
        known = isinstance(message, AppendRequest | Heartbeat | InstallSnapshot)
        node.become_follower(message.term, message.sender if known else 0)
        return True

    def tick(self, now_ms: int) -> None:
        """Let time pass; does nothing before ``deadline_ms``."""
        node = self._node
        node.advance(now_ms)
        if node.now_ms < node.deadline_ms:
            return
        late_ms = node.now_ms - node.deadline_ms
        if node.role is LEADER:
            leader.tick(node, late_ms)
        else:
            election.on_deadline(node, late_ms)

    @property
    def deadline_ms(self) -> int:
        """When ``tick`` next has something to do. It moves with most inputs, later more often than
        earlier."""
        return self._node.deadline_ms

    def propose(self, kind: int, payload: Buffer, leader_time_ms: int) -> Entry:
        """Append an entry as leader; it is committed when it comes out in ``Ready.committed``.

        Args:
            kind: a FrameKind other than CONF.
            payload: copied into the entry's frame.
            leader_time_ms: wall clock; raised to the last entry's if that is later.

        Raises:
            NotLeader: nothing happened; details: leader (replica id or None), term.
            Busy: ``uncommitted_bytes_max`` would be passed; nothing happened.
        """
        return proposals.propose(self._node, kind, payload, leader_time_ms)

    def propose_conf(self, voters: Iterable[int], learners: Iterable[int], leader_time_ms: int) -> Entry:
        """Begin changing the configuration to these voters and learners, through a joint one if voters
        change.

        The change is complete once ``conf`` is no longer joint and its entry is committed; the leader appends
        the second step by itself. A leader that loses its vote steps down when that is committed.

        Raises:
            NotLeader: nothing happened.
            Busy: a change is under way, or the no-op is not committed yet; nothing happened.
            ConfigError: not a possible configuration; new voters must be learners first.
        """
        return proposals.propose_conf(self._node, voters, learners, leader_time_ms)

    def transfer_leadership(self, to: int, now_ms: int) -> None:
        """Hand leadership to the voter ``to``. Proposals are Busy meanwhile, for an election timeout at most.

        Raises:
            NotLeader: nothing happened.
            ConfigError: ``to`` is not a voter.
        """
        node = self._node
        node.advance(now_ms)
        proposals.require_leader(node)
        transfer.begin(node, to)

    def read_index(self, context: int, now_ms: int) -> None:
        """Ask at which index a linearizable read may be served; the answer is (context, index) in
        ``Ready.reads``.

        No answer comes if leadership changes or a message is lost: the host asks again, under a new context.

        Raises:
            NotLeader: no leader is known.
        """
        node = self._node
        node.advance(now_ms)
        if node.role is LEADER:
            heartbeats.read(node, node.id, context)
        elif node.leader:
            heartbeats.forward_read(node, context)
        else:
            proposals.require_leader(node)

    def campaign(self, now_ms: int) -> None:
        """Start a PreVote at once, if this replica is a voter and does not lead."""
        node = self._node
        node.advance(now_ms)
        if node.role is not LEADER and node.is_promotable:
            node.wake()
            election.start_pre_vote(node)

    def peer_lost(self, replica: int, now_ms: int) -> None:
        """The connection to ``replica``'s broker broke.

        If it was the leader, its lease ends here and this replica campaigns early, in the order of ranks. On
        a leader, nothing more is sent to it until ``peer_restored``.
        """
        node = self._node
        node.advance(now_ms)
        if node.role is LEADER:
            node.wake()
            leader.peer_lost(node, replica)
        elif replica == node.leader:
            node.wake()
            election.leader_lost(node, replica)

    def peer_restored(self, replica: int, now_ms: int, *, forgot: bool = False) -> None:
        """The connection is back: a leader probes at once.

        Args:
            replica: the peer.
            now_ms: time.
            forgot: the peer is a new incarnation and may have lost entries that the former one acknowledged
                (a power cut with flush=interval): these acknowledgements count no longer, and none of them
                may be stepped after this call.
        """
        node = self._node
        node.advance(now_ms)
        if node.role is LEADER:
            node.wake()
            leader.peer_restored(node, replica, forgot)

    def wake(self, now_ms: int, heard_ms: Mapping[int, int]) -> None:
        """Let a quiet node take up its ordinary timers again; nothing happens to one that is awake.

        The host must call this when it has not heard the broker of the node's leader (on a leader: of any
        member) for an election timeout, or when that broker was started anew. Proposals and messages wake a
        node by themselves.

        Args:
            now_ms: time.
            heard_ms: replica id -> when the host last heard its broker, for the members it knows of. A
                follower's election timeout counts from there; a leader steps down in a heartbeat's time if it
                was more than an election timeout ago for too many.
        """
        node = self._node
        node.advance(now_ms)
        quiescence.wake(node, heard_ms)

    def leader_heard(self, heard_ms: int) -> None:
        """The host last heard the leader's broker at ``heard_ms``: as good as a heartbeat for the lease of a
        quiet follower. To be called before a VoteRequest is stepped into one: while its leader had nothing to
        say, nobody kept its lease fresh."""
        if self._node.quiet:
            quiescence.leader_heard(self._node, heard_ms)

    def on_durable(self, sequence: int) -> bool:
        """``Append.sequence`` and all before it are synced. Returns whether the host has to look."""
        node = self._node
        for message in node.durability.confirm(sequence):
            self._release(message)
        if node.role is LEADER:
            if node.durability.index > node.log.commit:
                leader.advance_commit(node)
        else:
            follower.acknowledge(node)
            if node.amnesiac:
                amnesia.review(node)
        log = node.log
        if log.memory_bytes > node.config.cache_bytes_max:
            log.trim(node.config.cache_bytes_max, node.durability.index)
        return self.has_ready() or node.quiet

    def _release(self, message: Message) -> None:
        """Send a message whose promise is durable now, unless its term is over: then nobody waits for it."""
        if message.term != self._node.term:
            return
        if isinstance(message, VoteRequest) and self._node.role is not Role.CANDIDATE:
            return  # a leader of this term has spoken: our log may have been cut since
        if message.to == self._node.id:
            _HANDLERS[type(message)](self._node, message)
        else:
            self._node.messages.append(message)

    def on_loaded(self, to: int, entries: Sequence[Entry]) -> None:
        """The answer to a LoadRequest for ``to``: entries without gaps from its ``index`` on."""
        leader.on_loaded(self._node, to, entries)

    def on_load_failed(self, to: int) -> None:
        """A LoadRequest for ``to`` could not be served; it is tried again when the follower next answers."""
        leader.on_load_failed(self._node, to)

    def applied_to(self, index: int) -> None:
        """The host has applied the committed entries up to ``index``."""
        node = self._node
        log = node.log
        assert log.applied <= index <= log.taken, (index, log)
        log.applied = index
        if log.memory_bytes > node.config.cache_bytes_max:
            log.trim(node.config.cache_bytes_max, node.durability.index)

    def step_down(self, now_ms: int) -> None:
        """Stop leading, in the same term (the host's disk stalls, say), and let the follower that holds most
        campaign at once. This replica itself waits a full election timeout before it campaigns."""
        node = self._node
        node.advance(now_ms)
        if node.role is LEADER:
            node.wake()
            leader.step_down(node)

    def restore(self, snapshot: Snapshot, now_ms: int, *, leader_time_ms: int = 0) -> bool:
        """The host of this follower holds ``snapshot`` durably; its log is to begin behind it.

        If True: the snapshot replaces log and state machine; the host makes storage do the same, durably
            (term and
        vote of earlier appends are kept), and the state machine too, before it takes the next Ready, which
        tells the leader. If False: the log has all that the snapshot brings; both stay as they are.

        Args:
            snapshot: its ``conf`` comes into force.
            now_ms: time.
            leader_time_ms: time of the entry at the snapshot's index, if known.
        """
        node = self._node
        node.advance(now_ms)
        node.wake()
        return follower.restore(node, snapshot, leader_time_ms)

    def on_snapshot_sent(self, to: int, index: int) -> None:
        """Follower ``to`` has confirmed that it took over the snapshot at ``index``. Each replica named in
        ``Ready.snapshots`` must end in this call or the next, for nothing else is sent to it until then."""
        leader.on_snapshot_sent(self._node, to, index)

    def on_snapshot_failed(self, to: int) -> None:
        """A snapshot asked for in ``Ready.snapshots`` could not be brought to ``to``; it is asked for again
        later."""
        leader.on_snapshot_failed(self._node, to)

    def on_compacted(self, first_index: int, prev_crc: int) -> None:
        """Storage dropped the entries below ``first_index``; ``prev_crc`` is the crc of the last one dropped.

        Only applied and durable entries may go, and a snapshot at or above ``first_index - 1`` must be there.
        """
        node = self._node
        assert first_index <= node.durability.index + 1, (first_index, node.durability.index)
        node.log.compact(first_index, prev_crc)
        node.confs.forget_below(first_index - 1)

    def conf_at(self, index: int) -> ConfState:
        """The configuration in force at ``index`` (of a snapshot there), from ``first_index - 1`` on."""
        return self._node.confs.at(index)

    # -- outputs ---------------------------------------------------------------------------------------------

    def has_ready(self) -> bool:
        """Whether ``ready()`` has anything to hand out."""
        node = self._node
        log, handed = node.log, node.handed_state
        return bool(
            node.pump_wanted
            or node.messages
            or log.taken != log.commit
            or log.handed != log.last_index
            or node.term != handed.term
            or node.vote != handed.vote
            or node.durability.unassigned
            or node.loads
            or node.snapshots
            or node.reads_done
            or self._soft != (node.role, node.term, node.leader)
        )

    def ready(self) -> Ready:
        """Hand out what the host must do now; each thing once."""
        node = self._node
        if node.pump_wanted:
            leader.pump(node)
        log, handed = node.log, node.handed_state
        append = None
        if log.handed != log.last_index or node.term != handed.term or node.vote != handed.vote:
            append = self._take_append()
        if node.durability.unassigned:
            for message in node.durability.assign():
                self._release(message)
        messages, loads, snapshots, reads = node.messages, node.loads, node.snapshots, node.reads_done
        if messages:
            node.messages = []
        if loads or snapshots or reads:
            node.loads, node.snapshots, node.reads_done = [], [], []
        soft = (node.role, node.term, node.leader)
        soft_state = None
        if soft != self._soft:
            self._soft = soft
            soft_state = SoftState(*soft)
        return Ready(
            append,
            tuple(messages),
            log.take_committed() if log.taken != log.commit else (),
            soft_state,
            tuple(loads),
            tuple(reads),
            tuple(snapshots),
        )

    def _take_append(self) -> Append:
        """Entries that storage does not have and term and vote if they changed. The commit index goes along
        with either, never alone: recovery starts lower without it, which costs nothing but time."""
        node = self._node
        entries = node.log.take_unhanded()
        hard_state = HardState(node.term, node.vote, node.log.commit)
        changed = hard_state != node.handed_state
        node.handed_state = hard_state
        sequence = node.durability.hand_out(node.log.handed, node.term)
        return Append(sequence, hard_state if changed else None, entries)

    # -- state -----------------------------------------------------------------------------------------------

    @property
    def id(self) -> int:
        return self._node.id

    @property
    def role(self) -> Role:
        return self._node.role

    @property
    def term(self) -> int:
        return self._node.term

    @property
    def vote(self) -> int:
        """Who got this replica's vote in this term; 0: nobody."""
        return self._node.vote

    @property
    def leader(self) -> int:
        """Who leads, as far as this replica knows; 0: unknown."""
        return self._node.leader

    @property
    def serving(self) -> bool:
        """Whether this is a leader whose own no-op is applied: its state machine then holds all that was ever
        committed (Raft section 8)."""
        node = self._node
        return node.role is LEADER and node.log.applied >= node.term_start

    @property
    def quiet(self) -> bool:
        """Whether this node rests: it has no deadline until something wakes it (see ``quiescence``)."""
        return self._node.quiet

    @property
    def amnesiac(self) -> bool:
        """Whether this replica may have forgotten what it acknowledged, and has not caught up with a leader
        yet."""
        return self._node.amnesiac

    @property
    def commit(self) -> int:
        return self._node.log.commit

    @property
    def applied(self) -> int:
        return self._node.log.applied

    @property
    def durable_index(self) -> int:
        """The log is durable here up to this index."""
        return self._node.durability.index

    @property
    def first_index(self) -> int:
        """The first index still in the log."""
        return self._node.log.first_index

    @property
    def last_index(self) -> int:
        return self._node.log.last_index

    @property
    def last_crc(self) -> int:
        """crc of the last entry's frame: ``prev_crc`` of the next."""
        return self._node.log.last_crc

    @property
    def last_leader_time_ms(self) -> int:
        """Time of the last entry (0 when unknown)."""
        return self._node.log.last_leader_time_ms

    @property
    def conf(self) -> ConfState:
        """The configuration in force: the last one in the log, committed or not."""
        return self._node.confs.current

    @property
    def conf_settled(self) -> bool:
        """Whether that configuration is committed and no joint one: the next change may begin."""
        return self._node.conf_settled

    @property
    def progress(self) -> Mapping[int, Progress]:
        """On a leader, every other member by replica id; empty elsewhere. Only for reading."""
        return self._node.progress

    def last_index_of(self, term: int) -> int:
        """The last index in the log of ``term`` or a lower one (``first_index - 1``: there is none)."""
        log = self._node.log
        return log.meeting_point(log.last_index, term)

    def entries_in_memory(self, low: int, high: int) -> list[Entry] | None:
        """Entries [low, high); None when part of them is not in memory."""
        return self._node.log.slice(low, high)

    def check_invariants(self) -> None:
        """Assert what must hold between two inputs (for tests).

        Raises:
            AssertionError: the first invariant that does not hold.
        """
        invariants.check_invariants(self._node)


def _handle_install_snapshot(node: Node, message: InstallSnapshot) -> None:
    node.heard_leader(message.sender)  # its bytes are the host's: see restore


def _handle_install_snapshot_response(node: Node, message: InstallSnapshotResponse) -> None:
    if message.sender in node.progress:
        node.progress[message.sender].heard_ms = node.now_ms


def _handle_timeout_now(node: Node, message: TimeoutNow) -> None:
    if node.role is not LEADER and node.is_promotable:
        election.start_election(node, transfer=True)


def _handle_read_index(node: Node, message: ReadIndexRequest) -> None:
    if node.role is LEADER:
        heartbeats.read(node, message.sender, message.context)


def _handle_read_index_response(node: Node, message: ReadIndexResponse) -> None:
    node.reads_done.append((message.context, message.index))


_HANDLERS: Final[dict[type[Any], Callable[[Node, Any], None]]] = {
    AppendRequest: follower.handle_append,
    AppendResponse: leader.handle_append_response,
    Heartbeat: follower.handle_heartbeat,
    HeartbeatResponse: leader.handle_heartbeat_response,
    VoteRequest: election.handle_vote_request,
    VoteResponse: election.handle_vote_response,
    InstallSnapshot: _handle_install_snapshot,
    InstallSnapshotResponse: _handle_install_snapshot_response,
    TimeoutNow: _handle_timeout_now,
    ReadIndexRequest: _handle_read_index,
    ReadIndexResponse: _handle_read_index_response,
}
