"""How a group's configuration follows what the metadata wants: the leader takes one step at a time.

::

    voters 1 2 3, wanted 1 2 4
      add 4 as a learner            it gets the log and does not count (thesis section 4.2.1)
      wait until it has caught up
      voters 1 2 4, jointly         one change, whatever the number of replicas (section 4.3)
      tell the metadata             3 may be deleted

A leader that is to leave hands its office to a voter that stays before the change; if none does, it manages
the change without counting itself and goes when that is committed (section 4.2.2). In a group that is as it
should be, a leader hands over to the preferred one, once that has been up to date for a while. No step is
remembered: each follows from the configuration in force and from what is wanted, so any later leader goes on
with it.
"""

from __future__ import annotations

import logging
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from raftlog.broker.events import replica_event
from raftlog.errors import Busy
from raftlog.raft.quorum import majority
from raftlog.raft.types import ConfState, Role

if TYPE_CHECKING:
    from raftlog.broker.replica import Replica

logger = logging.getLogger("raftlog.broker")

_TRANSFER_SLOTS: Final = 32
"""When a broker is back its groups are handed to it one after the other, and not all at once."""
LEARNERS_AT_ONCE: Final = 2
"""Of one group, that are being brought up to date: each costs the leader reads and bandwidth."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a group's configuration should be; ``voters``: the preferred leader first."""

    voters: tuple[int, ...]
    learners: frozenset[int] = frozenset()
    leader: int | None = None
    """Who should lead; None: that is all the same."""

    def is_reached(self, conf: ConfState) -> bool:
        """Whether this is that configuration."""
        return (
            not conf.is_joint
            and frozenset(conf.voters) == frozenset(self.voters)
            and frozenset(conf.learners) == self.learners
        )


@dataclass(frozen=True, slots=True)
class Change:
    """Propose this configuration."""

    voters: tuple[int, ...]
    learners: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Transfer:
    """Hand leadership to that voter first."""

    to: int


Step: TypeAlias = Change | Transfer


def next_step(
    me: int, conf: ConfState, wanted: Wanted, able: Set[int], behind: Set[int] = frozenset()
) -> Step | None:
    """The next step of a leader towards ``wanted``, or None: there is none, or not yet.

    Args:
        me: the leader's replica id.
        conf: the configuration in force, committed and not joint.
        wanted: where to.
        able: members that are up to date and answer, the leader included.
        behind: members that answer and are being brought up to date.
    """
    voters = frozenset(wanted.voters)
    everyone = voters | wanted.learners
    kept = [learner for learner in conf.learners if learner in everyone]
    missing = [each for each in (*wanted.voters, *sorted(wanted.learners)) if each not in conf.members]
    joining = missing[: max(0, LEARNERS_AT_ONCE - len(behind & frozenset(conf.learners)))]
    if joining or len(kept) < len(conf.learners):
        return Change(conf.voters, (*kept, *joining))
    if voters == frozenset(conf.voters):
        return None
    if me not in voters:
        heirs = [each for each in wanted.voters if each in conf.voters and each in able]
        if heirs:
            return Transfer(heirs[0])
    if voters - frozenset(conf.voters) - able or len(voters & able) < majority(len(voters)):
        return None  # the new configuration could commit nothing, or would wait for who has nothing
    demoted = wanted.learners & frozenset(conf.voters)
    return Change(wanted.voters, (*(each for each in kept if each not in voters), *sorted(demoted)))


@dataclass(slots=True)
class _Round:
    """A member is to reach ``target``, the end of the log at ``since_ms``. One that does so within an
    election timeout would hold nobody up for longer than an election does (thesis section 4.2.1)."""

    target: int
    since_ms: int
    able: bool = False
    able_since_ms: int = 0
    """When it last became able."""


class Membership:
    """Drives the configuration of one replica's group while that replica leads.

    Attributes:
        due: the configuration may not be what is wanted, or the metadata has not been told that it is. A
            leader that has nothing to do finds that out once.
    """

    __slots__ = ("_again_ms", "_replica", "_rounds", "_term", "due")

    def __init__(self, replica: Replica[Any]) -> None:
        self._replica = replica
        self._rounds: dict[int, _Round] = {}
        self._term = 0
        self._again_ms = 0
        self.due = True

    @property
    def holds_awake(self) -> bool:
        """Whether the replica must not rest."""
        return self.due and self._replica.node.role is Role.LEADER

    def tick(self, now_ms: int) -> None:
        """Take a step, if one is due and this replica leads."""
        replica = self._replica
        node = replica.node
        if now_ms < self._again_ms or replica.staged is None or node.role is not Role.LEADER:
            return  # the last: it may have lost office in this very tick, which it hears when it is pumped
        if node.term != self._term:
            self._term = node.term
            self._rounds.clear()
        self._measure(now_ms)
        if not node.conf_settled:
            return
        able = {node.id} | {member for member, round_ in self._rounds.items() if round_.able}
        wanted = replica.wanted_members(able)
        if wanted is None or wanted.is_reached(node.conf):
            is_led_as_wanted = wanted is None or wanted.leader in (None, node.id)
            self.due = not (replica.members_reached() and is_led_as_wanted)
            self._again_ms = now_ms + _timeout_ms(replica) // 4 if self.due else 0
            if wanted is not None and wanted.leader is not None and self._may_lead(wanted.leader, now_ms):
                self._take(Transfer(wanted.leader), now_ms)
            return
        step = next_step(node.id, node.conf, wanted, able, self._rounds.keys() - able)
        if step is not None:
            self._take(step, now_ms)

    def _may_lead(self, member: int, now_ms: int) -> bool:
        """Whether another member has been up to date for long enough to take over."""
        round_ = self._rounds.get(member)
        if round_ is None or not round_.able:
            return False
        after_ms = self._replica.host.config.preferred_leader_after_ms
        slot = self._replica.node.id % _TRANSFER_SLOTS
        return now_ms - round_.able_since_ms >= after_ms + after_ms * slot // (2 * _TRANSFER_SLOTS)

    def _take(self, step: Step, now_ms: int) -> None:
        replica = self._replica
        node, host = replica.node, replica.host
        event = "leadership_transfer" if isinstance(step, Transfer) else "membership_change"
        replica_event(logging.INFO, event, f"takes a step: {step}", replica, step=step)
        try:
            if isinstance(step, Transfer):
                self._again_ms = now_ms + 2 * _timeout_ms(replica)  # it may come to nothing
                node.transfer_leadership(step.to, now_ms)
            else:
                node.propose_conf(step.voters, step.learners, max(host.wall_ms(), node.last_leader_time_ms))
        except Busy as error:
            logger.debug("%s: %s", replica.name, error)
        host.mark(replica)

    def _measure(self, now_ms: int) -> None:
        """Go on with each member's round; those that do not answer have none."""
        replica = self._replica
        timeout_ms = _timeout_ms(replica)
        last_index = replica.node.last_index
        rounds: dict[int, _Round] = {}
        for member, progress in replica.node.progress.items():
            if not progress.connected or now_ms - progress.heard_ms > timeout_ms:
                continue
            round_ = rounds[member] = self._rounds.get(member) or _Round(last_index, now_ms)
            in_time = now_ms - round_.since_ms <= timeout_ms
            if progress.match >= round_.target:
                since_ms = round_.able_since_ms if round_.able else now_ms
                rounds[member] = _Round(last_index, now_ms, in_time, since_ms)
            elif not in_time:
                round_.able = False
        self._rounds = rounds


def _timeout_ms(replica: Replica[Any]) -> int:
    """The election timeout of a replica's broker."""
    return replica.host.config.election_timeout_ms
