"""A replica of a topic's partition, whatever its state machine: the metadata says who holds the partition,
and the group's leader drives its configuration there.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from functools import partial
from typing import Any, TypeAlias

from raftlog.broker.host import Host
from raftlog.broker.membership import Wanted
from raftlog.broker.replica import Done, M, Replica
from raftlog.raft.config import RecoveredLog
from raftlog.state.image import Partition
from raftlog.storage.replica_log import ReplicaLog

Complete: TypeAlias = "Callable[[AssignedReplica[Any]], None]"


class AssignedReplica(Replica[M]):
    """One replica of one partition of a topic.

    Args:
        assignment: who holds the partition, now and when all moves are done.
        complete: called on a leader whose configuration is what ``assignment`` wants, again and again until
            that shows nobody leaving.
    """

    def __init__(
        self,
        host: Host,
        log: ReplicaLog,
        machine: M,
        recovered: RecoveredLog,
        assignment: Partition,
        complete: Complete,
    ) -> None:
        preferred = assignment.founders[0] == log.spec.replica_id
        super().__init__(host, log, machine, recovered, assignment.hosts, preferred=preferred)
        self.assignment = assignment
        self._complete = complete

    # -- members ---------------------------------------------------------------------------------------------

    def assign(self, assignment: Partition) -> bool:
        """Take in who should hold the partition; returns whether that is news."""
        news = assignment.version != self.assignment.version
        self.assignment = assignment
        self.hosts = assignment.hosts
        self.membership.due = self.membership.due or news
        return news

    def wanted_members(self, able: Set[int]) -> Wanted:
        return Wanted(self.assignment.wanted, leader=self.assignment.wanted[0])

    def members_reached(self) -> bool:
        if self.assignment.leaving:
            self._complete(self)
        return not self.assignment.leaving

    def metadata_changed(self) -> None:
        """The broker's image of the metadata has moved on (for subclasses)."""

    # -- answers ---------------------------------------------------------------------------------------------

    def when_applied(self, staged: M, answer: Any, done: Done) -> None:
        """Give an answer that rests on ``staged`` when all of that is applied: before, a crash could undo
        what the answer tells."""
        index = staged.applied_index
        if index <= self.machine.applied_index:
            done(answer, None)
        else:
            self.wait_for(index, partial(_told, answer, done))


def _told(answer: Any, done: Done, result: Any, error: Any) -> None:
    done(None if error is not None else answer, error)
