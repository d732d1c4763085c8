"""The state of one Raft node and the steps that every role shares: terms, roles, timers, the log, the outbox.

Raft's logic is laid over this state in layers, each a module of functions on a :class:`Node`; a layer calls
only those below it::

    raw_node      the public face: dispatches inputs, assembles Ready
    election      timers, PreVote, votes, becoming leader
    leader        replication, commit, taking and leaving office     follower    appends, acknowledgements
    proposals     entries into a leader's log, configuration changes
    heartbeats    CheckQuorum, ReadIndex                             transfer    leadership transfer
    quiescence    idle groups rest
    node          this module

Nothing here reads a clock: ``now_ms`` is the time of the last input that carried one.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Final

from raftlog.raft.config import RaftConfig, RecoveredLog
from raftlog.raft.confstack import ConfStack
from raftlog.raft.durability import Durability
from raftlog.raft.log import RaftLog
from raftlog.raft.progress import Progress
from raftlog.raft.quorum import is_voter, voter_ids
from raftlog.raft.types import LEADER, Entry, HardState, LoadRequest, Message, Role
from raftlog.record.frame import CONF

NEVER: Final = 2**62
"""A deadline of a node that waits for nothing."""


class ReadQueue:
    """Reads on a leader, from arrival to confirmation."""

    __slots__ = ("arrived", "confirmed", "round", "waiting")

    def __init__(self) -> None:
        self.arrived: list[tuple[int, int]] = []
        """(replica that asks, its context): in no round yet."""
        self.waiting: deque[tuple[int, int, int, int]] = deque()
        """(round, commit index, replica, context): the round is out."""
        self.round = 0
        self.confirmed = 0


class Node:
    """Everything one node knows. Fields below "leader" mean something only while ``role`` is LEADER, and so
    on."""

    __slots__ = (
        "ack_wanted",
        "acked_index",
        "amnesiac",
        "config",
        "confs",
        "cure_index",
        "deadline_ms",
        "durability",
        "early_until_ms",
        "excused",
        "handed_state",
        "id",
        "idle_seen",
        "idle_since_ms",
        "leader",
        "leader_heard_ms",
        "loads",
        "log",
        "matched_index",
        "messages",
        "now_ms",
        "progress",
        "pump_wanted",
        "quiet",
        "random",
        "reads",
        "reads_done",
        "role",
        "snapshots",
        "term",
        "term_start",
        "transfer_to",
        "transfer_until_ms",
        "uncommitted_bytes",
        "vote",
        "votes",
    )

    def __init__(
        self, config: RaftConfig, recovered: RecoveredLog, random: random.Random, now_ms: int
    ) -> None:
        self.config = config
        self.id = config.id
        self.random = random
        self.now_ms = now_ms
        self.log = RaftLog(recovered)
        self.confs = ConfStack(recovered.confs)
        self.term = recovered.hard_state.term
        self.vote = recovered.hard_state.vote
        assert self.term >= self.log.last_term, (self.term, self.log.last_term)
        self.durability = Durability(self.log.last_index, self.term)
        self.handed_state = HardState(self.term, self.vote, recovered.hard_state.commit)
        """What storage was last given."""
        self.role = Role.FOLLOWER
        self.leader = 0
        self.amnesiac = False
        """It may have forgotten what it acknowledged, and must not vote (see amnesia)."""
        self.cure_index = -1
        """Then: where its log must be to be trusted again (-1: this term's leader has not said)."""
        # timers
        self.deadline_ms = NEVER
        self.leader_heard_ms = now_ms
        self.quiet = False
        """Resting: no deadline, nothing to say (see quiescence)."""
        self.excused = False
        """The timer ran out while the host was held up, and was put off once."""
        self.early_until_ms = 0
        """Until then the leader's broker is known to be lost, and waits are short."""
        # candidates
        self.votes: dict[int, bool] = {}
        # followers
        self.matched_index = 0
        """The log is known to agree with this term's leader up to here."""
        self.acked_index = 0
        self.ack_wanted = -1
        """Acknowledge again once this index is durable (-1: no)."""
        # leader
        self.progress: dict[int, Progress] = {}
        self.term_start = 0
        """Index of this term's no-op."""
        self.uncommitted_bytes = 0
        self.idle_seen = (0, 0)
        """(last index, round of reads) when something last happened, and when that was noticed."""
        self.idle_since_ms = 0
        self.transfer_to = 0
        """Follower that leadership is being handed to; 0: none."""
        self.transfer_until_ms = 0
        self.reads = ReadQueue()
        self.pump_wanted = False
        """Something may have to be sent: followers are looked at once, when Ready is taken."""
        # outbox
        self.messages: list[Message] = []
        self.loads: list[LoadRequest] = []
        self.snapshots: list[int] = []
        self.reads_done: list[tuple[int, int]] = []
        self.become_follower(self.term, 0)

    # -- configuration ---------------------------------------------------------------------------------------

    @property
    def is_promotable(self) -> bool:
        """Whether this node may campaign: a voter of the configuration in force, or of one that still may be,
        who has forgotten nothing.

        A leader that appended the configuration which removes it, and fell before anyone had that entry, may
        hold the longest log: those who need its vote to win cannot have it, so it must be able to campaign
        itself and finish (thesis section 4.2.2). Its own vote does not count then.
        """
        if self.amnesiac:
            return False
        return any(is_voter(conf, self.id) for conf in self.confs.possible(self.log.commit))

    @property
    def conf_settled(self) -> bool:
        """Whether the configuration in force is committed and no joint one."""
        return self.log.commit >= self.confs.current_index and not self.confs.current.is_joint

    def rank(self, lost: int) -> int:
        """Position of this node by id among the voters without ``lost``."""
        return sum(1 for voter in voter_ids(self.confs.current) if voter < self.id and voter != lost)

    # -- time ------------------------------------------------------------------------------------------------

    def advance(self, now_ms: int) -> None:
        """Take the host's time; it never runs back."""
        if now_ms > self.now_ms:
            self.now_ms = now_ms

    def arm_election(self) -> None:
        """Wait a full random timeout before campaigning (Raft section 5.2: randomised, against split
        votes)."""
        timeout = self.config.election_timeout_ms
        self.deadline_ms = self.now_ms + timeout + int(timeout * self.random.random())
        self.excused = False
        self.quiet = False

    def rest(self) -> None:
        """Go quiet, as a leader or as a follower of one."""
        self.quiet = True
        self.deadline_ms = NEVER

    def wake(self) -> None:
        """Take up the ordinary timers again. No time counts against anybody that passed in quiet."""
        if not self.quiet:
            return
        if self.role is LEADER:
            self.quiet = False
            self.idle_since_ms = self.now_ms
            for progress in self.progress.values():
                progress.heard_ms = self.now_ms
            self.deadline_ms = self.now_ms + self.config.heartbeat_ms
        else:
            self.arm_election()

    @property
    def in_lease(self) -> bool:
        """Whether votes must be refused because a leader is there (thesis section 4.2.3)."""
        if self.role is LEADER:
            return True
        return self.leader != 0 and self.now_ms - self.leader_heard_ms < self.config.election_timeout_ms

    # -- roles -----------------------------------------------------------------------------------------------

    def become_follower(self, term: int, leader: int) -> None:
        """Follow ``leader`` (0: nobody yet) in ``term``, which is this one or a later one."""
        assert term >= self.term, (term, self.term)
        if term > self.term:
            self.term = term
            self.vote = 0
            self.cure_index = -1
        self.role = Role.LEARNER if self.id in self.confs.current.learners else Role.FOLLOWER
        self.leader = leader
        self.votes = {}
        self.matched_index = self.acked_index = 0
        self.ack_wanted = -1
        self.progress = {}
        self.term_start = 0
        self.uncommitted_bytes = 0
        self.pump_wanted = False
        self.transfer_to = 0
        if self.reads.round or self.reads.arrived:
            self.reads = ReadQueue()
        self.loads.clear()
        self.snapshots.clear()
        if leader or self.now_ms >= self.early_until_ms:
            self.arm_election()
        # else the leader's broker is known to be lost: what cleared the way must not put off the next try

    def heard_leader(self, leader: int) -> None:
        """A message of this term's leader arrived: the lease begins anew."""
        assert self.role is not LEADER, f"two leaders in term {self.term}: {self.id} and {leader}"
        if self.leader != leader:
            assert self.leader == 0, f"two leaders in term {self.term}: {self.leader} and {leader}"
            self.become_follower(self.term, leader)
        self.leader_heard_ms = self.now_ms
        self.early_until_ms = 0
        self.arm_election()

    # -- log -------------------------------------------------------------------------------------------------

    def append(self, entries: Sequence[Entry]) -> bool:
        """Add entries at the end. Returns whether the configuration changed."""
        self.log.append(entries)
        changed = False
        for entry in entries:
            if entry.kind == CONF:
                self.confs.push(entry)
                changed = True
        return changed

    def cut(self, index: int) -> bool:
        """Remove the entries at and above ``index``. Returns whether the configuration changed."""
        self.log.cut(index)
        self.durability.cut(index)
        return self.confs.cut(index)
