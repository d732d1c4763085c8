"""The books of :class:`~raftlog.testing.invariants.Watch`: what it saw of every group, replica and entry.

None of it is asked of the code under test: entries are booked when they are handed to a disk, and what they
say (a configuration, a new log start) is read from their own bytes.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from raftlog.config import TopicConfig
from raftlog.raft.confstack import decode_conf
from raftlog.raft.types import AppendRequest, ConfState, Entry, Role
from raftlog.record.frame import FrameKind
from raftlog.state.partition import SetLogStart, decode_command

if TYPE_CHECKING:
    from raftlog.broker.replica import Replica
    from raftlog.testing.disk import SimDisk

GroupKey: TypeAlias = tuple[bytes, int]
"""(topic id, partition)."""
_BASE_OFFSET: Final = struct.Struct(">Q")


class Violation(AssertionError):
    """An invariant or a promise is broken."""


@dataclass(frozen=True, slots=True)
class Row:
    """One entry. Frames are chained by their crcs, so (index, crc) also names everything below."""

    index: int
    term: int
    kind: int
    crc: int
    prev_crc: int
    size: int
    leader_time_ms: int
    says: Any
    """Of a batch its base offset, of a configuration that, of SetLogStart its offset; None of others."""

    @classmethod
    def of(cls, entry: Entry, internal: bool) -> Row:
        """Book an entry of a partition, or of an ``internal`` group."""
        says: Any = None
        if entry.kind == FrameKind.BATCH:
            says = _BASE_OFFSET.unpack_from(entry.payload)[0]
        elif entry.kind == FrameKind.CONF:
            says = decode_conf(entry.payload)
        elif entry.kind == FrameKind.COMMAND and not internal:
            command = decode_command(entry.payload)
            says = command.offset if isinstance(command, SetLogStart) else None
        return cls(
            entry.index,
            entry.term,
            entry.kind,
            entry.crc,
            entry.prev_crc,
            len(entry.frame),
            entry.leader_time_ms,
            says,
        )


@dataclass(slots=True)
class Member:
    """What is known of one replica, across the restarts of its broker."""

    replica_id: int
    broker_id: int
    durable: int = 0
    """Every entry up to here has been synced."""
    flights: deque[list[int]] = field(default_factory=deque)
    """[commit of the disk that must be done, last index], oldest first: handed over, not synced."""
    landed: deque[list[int]] = field(default_factory=deque)
    """[commit of the disk, last index]: synced by that one, and by no later one yet."""
    covered: int = 0
    """A later sync has told that every entry up to here is synced (it writes the sync floor)."""
    handed: int = 0
    """The last index handed over."""
    rows: dict[int, Row] = field(default_factory=dict)
    """Its log by index, as far as it was handed over and not dropped."""
    confs: list[tuple[int, ConfState]] = field(default_factory=list)
    """The configurations in its log, oldest first."""
    trusted: bool = True
    """Its disk keeps what it synced (not after a failed sync, a wipe, or rot)."""
    loose: bool = False
    """flush=interval: what is written counts like what is synced, until the power is cut."""
    forgot: bool = False
    """It lost power since, and has not been seen again."""

    def settle(self, disk: SimDisk) -> None:
        """Take over what the disk has synced by now."""
        flights = self.flights
        commits_done = disk.commits_written if self.loose else disk.commits_done
        while flights and flights[0][0] <= commits_done:
            self.landed.append(flights.popleft())
            self.durable = max(self.durable, self.landed[-1][1])
        while self.landed and self.landed[0][0] <= disk.commits_marked:
            self.covered = max(self.covered, self.landed.popleft()[1])

    def cut(self, last: int) -> None:
        """The log now ends at ``last``."""
        self.durable = min(self.durable, last)
        self.covered = min(self.covered, last)
        for flight in (*self.flights, *self.landed):
            flight[1] = min(flight[1], last)
        while len(self.confs) > 1 and self.confs[-1][0] > last:
            self.confs.pop()


@dataclass(slots=True)
class Group:
    """What is known of one Raft group."""

    name: str
    partition: int = 0
    internal: bool = False
    policy: TopicConfig = field(default_factory=TopicConfig)
    members: dict[int, Member] = field(default_factory=dict)
    leaders: dict[int, int] = field(default_factory=dict)
    """term -> replica."""
    rows: dict[tuple[int, int], Row] = field(default_factory=dict)
    """(index, crc) -> every entry ever handed to any disk."""
    crcs: dict[tuple[int, int], int] = field(default_factory=dict)
    """(index, term) -> its crc."""
    committed: dict[int, Row] = field(default_factory=dict)
    """By index, what anyone took for committed."""
    commit: int = 0
    """The highest of these indexes."""
    ends: dict[int, tuple[int, int]] = field(default_factory=dict)
    """applied index -> (log start, next offset)."""
    starts: list[int] = field(default_factory=lambda: [0])
    """Every log start that was applied anywhere, in order."""
    served: int = 0
    """The highest offset that a leader has shown as committed."""

    def book(self, entry: Entry) -> Row:
        """An entry is handed to a disk.

        Raises:
            Violation: log matching; another log has another entry of this index and term.
        """
        key = (entry.index, entry.crc)
        row = self.rows.get(key)
        if row is None:
            row = self.rows[key] = Row.of(entry, self.internal)
            known = self.crcs.setdefault((row.index, row.term), row.crc)
            if known != row.crc:
                raise Violation(
                    f"log matching: {self.name} has entries {row.crc:08x} and {known:08x} at index "
                    f"{row.index} of term {row.term}"
                )
        return row

    def log_below(self, index: int, crc: int) -> Iterator[Row]:
        """The entries of the log that ends with this one, newest first, as far as they were booked."""
        row = self.rows.get((index, crc))
        while row is not None:
            yield row
            row = self.rows.get((row.index - 1, row.prev_crc))

    def has_quorum(self, conf: ConfState, index: int) -> bool:
        """Whether a majority (in a joint configuration, of each half) holds everything up to ``index``."""
        holders = [each.replica_id for each in self.members.values() if each.durable >= index]
        return is_quorum(conf, holders)

    def confs_in_force(self) -> list[ConfState]:
        """Every configuration that a log of a member ends with, from the last one that is committed on."""
        confs = {index: conf for member in self.members.values() for index, conf in member.confs}
        committed = max((index for index in confs if index <= self.commit), default=0)
        ends = [member.confs[-1] for member in self.members.values() if member.confs]
        return [conf for index, conf in ends if index >= committed]

    def log_start_moved(self, start: int) -> None:
        """A replica has applied that the log begins at ``start``.

        Raises:
            Violation: no SetLogStart says so, or none that the topic's retention justifies.
        """
        if start <= self.starts[-1]:
            return
        commands = [row for row in self.rows.values() if row.kind == FrameKind.COMMAND and row.says == start]
        if not any(self._may_drop(row) for row in commands):
            raise Violation(
                f"retention: the log of {self.name} begins at {start}, was {self.starts[-1]}: more than "
                f"retention_bytes={self.policy.retention_bytes} or "
                f"retention_ms={self.policy.retention_ms} allow"
            )
        self.starts.append(start)

    def _may_drop(self, command: Row) -> bool:
        """Whether the newest record that goes is too old, or as many bytes as must stay lie above it (to
        within entries that hold no records)."""
        policy, kept = self.policy, 0
        for row in self.log_below(command.index - 1, command.prev_crc):
            if row.kind == FrameKind.BATCH and row.says < command.says:
                age = command.leader_time_ms - row.leader_time_ms
                is_old = policy.retention_ms is not None and age > policy.retention_ms
                return is_old or (policy.retention_bytes is not None and kept >= policy.retention_bytes)
            kept += row.size
        return False


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
    conf: ConfState = field(default_factory=ConfState)
    serving: bool = False

    @property
    def name(self) -> str:
        """For messages."""
        return f"replica {self.member.replica_id} of {self.group.name}"


def is_quorum(conf: ConfState, replicas: Iterable[int]) -> bool:
    """Whether these can decide (counted here, not by the core)."""
    have = set(replicas)
    halves = [half for half in (conf.voters, conf.outgoing) if half]
    return all(2 * len(have.intersection(half)) > len(half) for half in halves)


def overlap(a: ConfState, b: ConfState) -> bool:
    """Whether every quorum of one configuration meets every quorum of the other (thesis section 4.3)."""
    voters = {*a.voters, *a.outgoing, *b.voters, *b.outgoing}
    for count in range(len(voters) + 1):
        for some in combinations(sorted(voters), count):
            if is_quorum(a, some) and is_quorum(b, voters.difference(some)):
                return False
    return True


@dataclass(slots=True)
class Window:
    """What a leader has sent to a follower in its term: counted here, not by the core."""

    term: int
    messages: int = 0
    entries: dict[int, tuple[int, int]] = field(default_factory=dict)
    """index -> (number of the message, bytes)."""

    def sent(self, message: AppendRequest) -> None:
        """A message is on its way."""
        self.messages += 1
        for entry in message.entries:
            self.entries[entry.index] = self.messages, len(entry.frame)

    def in_flight(self, match: int, next_index: int) -> tuple[int, int]:
        """Messages and bytes with entries above ``match`` and below ``next_index``."""
        for index in [each for each in self.entries if not match < each < next_index]:
            del self.entries[index]
        numbers = {number for number, _ in self.entries.values()}
        return len(numbers), sum(size for _, size in self.entries.values())


@dataclass(frozen=True, slots=True)
class Event:
    """A line of the trace: what happened, and how every replica of ``group`` stood."""

    seconds: float
    what: str
    group: str
    columns: Mapping[int, str]


def column(view: View) -> str:
    """How a replica stands: role, term, applied/commit/last index."""
    core = view.replica.node
    letter = {Role.LEADER: "L", Role.CANDIDATE: "C", Role.PRE_CANDIDATE: "p"}.get(core.role, "f")
    return f"{letter}{core.term} {core.applied}/{core.commit}/{core.last_index}"


def render(events: Iterable[Event], brokers: int) -> str:
    """The trace: a line an event, a column a replica, which shows role, term, applied/commit/last index."""
    width = 18
    head = "    seconds  " + "".join(f"broker {broker_id}".ljust(width) for broker_id in range(brokers))
    lines = [head + "event"]
    for event in events:
        columns = "".join(event.columns.get(broker_id, "").ljust(width) for broker_id in range(brokers))
        name = f"{event.group}: " if event.group else ""
        lines.append(f"{event.seconds:11.4f}  {columns}{name}{event.what}")
    return "\n".join(lines)
