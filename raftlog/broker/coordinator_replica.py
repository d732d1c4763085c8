"""What the replicas of ``__groups`` and ``__transactions`` have in common: a leader that decides.

The leader of such a partition is the coordinator of the names that hash to it. It decides against its staged
machine, logs what it decided, and answers when that is applied. Should it lose its leadership before, the
caller hears that the outcome is not known, and asks the next leader; every request may be asked twice.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, Self

from raftlog.broker.assigned import AssignedReplica, Complete
from raftlog.broker.host import Host
from raftlog.broker.internal_topics import partition_of
from raftlog.broker.markers import Markers
from raftlog.broker.recovery import restored
from raftlog.broker.replica import Done, M
from raftlog.errors import ConfigError, RaftlogError
from raftlog.raft.config import RecoveredLog
from raftlog.record.frame import FrameKind
from raftlog.state.command import CommandStruct
from raftlog.state.image import Partition
from raftlog.state.metadata import MetadataState
from raftlog.storage.replica_log import ReplicaLog


class Metadata(Protocol):
    """What a coordinator needs of the metadata service."""

    @property
    def image(self) -> MetadataState:
        """The applied metadata."""

    async def producer_id(self) -> int:
        """An id that nobody had before."""


class CoordinatorHost(Host, Protocol):
    """What a coordinator needs of its broker, on top of what any replica does."""

    @property
    def metadata(self) -> Metadata: ...

    @property
    def markers(self) -> Markers: ...


class CoordinatorReplica(AssignedReplica[M]):
    """One replica of one partition of an internal topic."""

    host: CoordinatorHost
    kind: type[M]
    """Of the state machine."""

    def __init__(
        self,
        host: CoordinatorHost,
        log: ReplicaLog,
        machine: M,
        recovered: RecoveredLog,
        assignment: Partition,
        complete: Complete,
    ) -> None:
        super().__init__(host, log, machine, recovered, assignment, complete)
        self.timers: dict[str, asyncio.TimerHandle] = {}

    @classmethod
    async def open(
        cls, host: CoordinatorHost, log: ReplicaLog, assignment: Partition, complete: Complete
    ) -> Self:
        """Restore the machine from the newest snapshot and the committed log above it."""
        machine, recovered = await restored(log, cls.kind)
        return cls(host, log, machine, recovered, assignment, complete)

    # -- leadership ------------------------------------------------------------------------------------------

    def stopped_serving(self) -> None:
        timers, self.timers = self.timers, {}
        for timer in timers.values():
            timer.cancel()

    def call_later(self, name: str, seconds: float, work: Callable[[], None]) -> None:
        """Call once, unless the leadership is lost before. A timer of the same name is replaced."""
        before = self.timers.get(name)
        if before is not None:
            before.cancel()
        self.timers[name] = asyncio.get_running_loop().call_later(seconds, self._due, name, work)

    def _due(self, name: str, work: Callable[[], None]) -> None:
        del self.timers[name]
        work()

    # -- decisions -------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, command: Any) -> bytes:
        """A command of the machine as the payload of an entry."""

    def log_command(self, staged: M, command: CommandStruct, done: Done) -> None:
        """Propose a command that was decided against ``staged``.

        Raises:
            NeedsUpgrade: the cluster does not run at the command's feature level; nothing happened.
            Busy: too much is in flight; nothing happened.
        """
        self.check_level(command)
        self.propose(staged, FrameKind.COMMAND, self.encode(command), done)

    def carry_out(self, staged: M, commands: Sequence[CommandStruct], answer: Any, done: Done) -> None:
        """Log the commands; ``done`` gets the answer when the last is applied. Without any, when all that was
        staged is: the answer rests on it.

        Raises:
            Busy: too much is in flight.
        """
        if not commands:
            self.when_applied(staged, answer, done)
            return
        *others, last = commands
        for command in others:
            self.log_command(staged, command, nobody_waits)
        self.log_command(staged, last, partial(_answered, answer, done))

    # -- names -----------------------------------------------------------------------------------------------

    def check_name(self, name: str) -> None:
        """Raise ConfigError unless this partition is that of the name: two coordinators for one name would
        not know of each other."""
        spec = self.log.spec
        topic = self.host.metadata.image.topic_by_id(spec.topic_id)
        if topic is not None and partition_of(name, len(topic.partitions)) != spec.partition:
            raise ConfigError(f"{name!r} does not belong to {self.name}")


def _answered(answer: Any, done: Done, result: Any, error: RaftlogError | None) -> None:
    if error is None and isinstance(result, RaftlogError):
        error = result
    done(None if error is not None else answer, error)


def nobody_waits(result: Any, error: RaftlogError | None) -> None:
    """A command that is decided anew if its outcome is lost."""
