"""The values that go in and out of the Raft core: entries, messages, durable state, configurations, Ready.

Everything here is immutable and free of I/O. The names are those of the Raft thesis and of etcd's
implementation. A node id is a *replica id*: allotted by the metadata group, unique in the cluster's whole
life, never used twice (0 means "none"). A message therefore finds its group by its ``to`` alone.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NewType, TypeAlias

import msgspec

from raftlog.record.frame import FRAME_HEADER_BYTES, Buffer, FrameHeader, encode_frame, parse_frame

ReplicaId = NewType("ReplicaId", int)
NO_REPLICA: Final = ReplicaId(0)
TERM_MAX: Final = 2**31 - 1
"""Terms are Kafka's leader epochs, which are int32."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One log entry. ``frame`` holds its bytes, header included, as they stand on disk and wire."""

    index: int
    term: int
    kind: int
    leader_time_ms: int
    prev_crc: int
    crc: int
    frame: Buffer

    @classmethod
    def create(
        cls, prev_crc: int, kind: int, term: int, index: int, leader_time_ms: int, payload: Buffer
    ) -> Entry:
        """Encode a new entry that follows one whose crc is ``prev_crc``."""
        frame = encode_frame(prev_crc, kind, term, index, leader_time_ms, payload)
        return cls(index, term, kind, leader_time_ms, prev_crc, int.from_bytes(frame[4:8], "big"), frame)

    @classmethod
    def parse(cls, buffer: Buffer, position: int = 0, *, check: bool = True) -> Entry:
        """Parse the frame at ``position`` (CorruptFrame when it does not check); the entry keeps a view of
        it."""
        header = parse_frame(buffer, position, check=check)
        return cls.of(header, memoryview(buffer)[position : position + header.length])

    @classmethod
    def of(cls, header: FrameHeader, frame: Buffer) -> Entry:
        """An entry from an already parsed header and the bytes of the whole frame."""
        return cls(
            header.index, header.term, header.kind, header.leader_time_ms, header.prev_crc, header.crc, frame
        )

    @property
    def payload(self) -> memoryview:
        """The bytes after the frame's header (no copy)."""
        return memoryview(self.frame)[FRAME_HEADER_BYTES:]

    @property
    def size(self) -> int:
        """Bytes of the whole frame."""
        return len(self.frame)


class HardState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a replica must never forget. Term and vote are synced before any message that depends on them
    leaves; ``commit`` is written along with the others but never synced for its own sake."""

    term: int = 0
    vote: int = 0
    commit: int = 0


class ConfState(msgspec.Struct, frozen=True, array_like=True):
    """A configuration. ``outgoing`` is non-empty only in a joint configuration (thesis section 4.3): then
    every decision needs a majority of ``voters`` and one of ``outgoing``. Learners receive the log and never
    count. ``learners_next`` are voters of ``outgoing`` that become learners when the joint configuration is
    left."""

    voters: tuple[int, ...] = ()
    learners: tuple[int, ...] = ()
    outgoing: tuple[int, ...] = ()
    learners_next: tuple[int, ...] = ()
    auto_leave: bool = False

    @property
    def is_joint(self) -> bool:
        return bool(self.outgoing)

    @property
    def members(self) -> frozenset[int]:
        """Every replica that takes part, learners included."""
        return frozenset(self.voters + self.learners + self.outgoing + self.learners_next)


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """Describes a state machine at ``index``. ``data`` is the machine's own encoding."""

    index: int
    term: int
    crc: int
    """crc of the frame at ``index``: the frame after it must name it as its ``prev_crc``."""
    conf: ConfState
    data: bytes = b""


class Role(Enum):
    FOLLOWER = "follower"
    PRE_CANDIDATE = "pre-candidate"
    CANDIDATE = "candidate"
    LEADER = "leader"
    LEARNER = "learner"


LEADER: Final = Role.LEADER
"""For what runs with every batch: to look up a member of an enum takes longer than to compare it."""


class SoftState(msgspec.Struct, frozen=True, gc=False):
    """Who leads as far as this replica knows. Not durable. Whether a leader may
    serve is ``RawNode.serving``."""

    role: Role
    term: int
    leader: int


# -- messages ------------------------------------------------------------------------------------------------


class _Message(msgspec.Struct, frozen=True, array_like=True, tag_field="t", gc=False):
    to: int
    sender: int
    term: int


class VoteRequest(_Message, frozen=True, tag=1):
    """RequestVote (Raft figure 2); with ``pre``, PreVote (thesis section 9.6): ``term`` is then the term the
    sender *would* campaign in. ``transfer``: sent on TimeoutNow, so it overrides the receivers' leases."""

    last_index: int
    last_term: int
    pre: bool = False
    transfer: bool = False


class VoteResponse(_Message, frozen=True, tag=2):
    granted: bool
    pre: bool = False


class AppendRequest(_Message, frozen=True, tag=3):
    """AppendEntries. ``prev_crc`` is the crc of the frame at ``prev_index``: a check of the chain, on top of
    the term check that Raft makes. Entries travel as one contiguous range of frames behind the message's
    header."""

    prev_index: int
    prev_term: int
    prev_crc: int
    commit: int
    entries: tuple[Entry, ...] = ()


class AppendResponse(_Message, frozen=True, tag=4):
    """``index`` is the last index the sender holds durably and in agreement with the leader; when
    ``rejected``, it is the ``prev_index`` refused, and (hint_index, hint_term) the sender's best guess of
    where logs meet."""

    index: int
    rejected: bool = False
    hint_index: int = 0
    hint_term: int = 0


class Heartbeat(_Message, frozen=True, tag=5):
    """``context`` is echoed by the response (ReadIndex round). ``quiet``: the leader's last word before it
    rests; a follower that holds exactly the log up to ``commit`` rests too and does not answer."""

    commit: int
    context: int = 0
    quiet: bool = False


class HeartbeatResponse(_Message, frozen=True, tag=6):
    """``amnesiac``: the sender waits to be told the commit index in an AppendRequest."""

    context: int = 0
    last_index: int = 0
    amnesiac: bool = False


class InstallSnapshot(_Message, frozen=True, tag=7):
    """One chunk of a snapshot: bytes [position, position + len(data)) of ``total``."""

    snapshot: Snapshot
    position: int = 0
    total: int = 0


class InstallSnapshotResponse(_Message, frozen=True, tag=8):
    index: int
    position: int
    rejected: bool = False


class TimeoutNow(_Message, frozen=True, tag=9):
    """Leadership transfer (thesis section 3.10): campaign at once."""


class ReadIndexRequest(_Message, frozen=True, tag=10):
    context: int


class ReadIndexResponse(_Message, frozen=True, tag=11):
    context: int
    index: int


Message: TypeAlias = (
    VoteRequest
    | VoteResponse
    | AppendRequest
    | AppendResponse
    | Heartbeat
    | HeartbeatResponse
    | InstallSnapshot
    | InstallSnapshotResponse
    | TimeoutNow
    | ReadIndexRequest
    | ReadIndexResponse
)


# -- Ready ---------------------------------------------------------------------------------------------------


class Append(msgspec.Struct, frozen=True, gc=False):
    """What must become durable, in order. ``entries[0].index`` truncates what the log held at and above it.

    When it is durable the host calls ``RawNode.on_durable(sequence)``. Sequences grow by one for each Append
    of a node; being told of N means that all up to N are durable."""

    sequence: int
    hard_state: HardState | None
    entries: tuple[Entry, ...] = ()


class LoadRequest(msgspec.Struct, frozen=True, gc=False):
    """The core needs entries that are no longer in memory, for follower ``to``, from ``index`` on and of at
    most ``bytes_max``. The host answers with ``RawNode.on_loaded(to, entries)`` (or
    ``on_load_failed(to)``)."""

    to: int
    index: int
    bytes_max: int


class Ready(msgspec.Struct, frozen=True, gc=False):
    """What the host must do now. Order: hand ``append`` to storage; send ``messages`` (they need not wait for
    it: what must wait for durability the core holds back itself until ``on_durable``); apply
    ``committed``."""

    append: Append | None = None
    messages: tuple[Message, ...] = ()
    committed: tuple[Entry, ...] = ()
    soft_state: SoftState | None = None
    """Set only when it changed."""
    loads: tuple[LoadRequest, ...] = ()
    reads: tuple[tuple[int, int], ...] = ()
    """(context, index) of ReadIndex requests that may now be served once ``index`` is applied."""
    snapshots: tuple[int, ...] = ()
    """Followers that need entries the log no longer has: the host sends each a snapshot at or above
    ``first_index - 1`` and ends with ``RawNode.on_snapshot_sent(to, index)`` or ``on_snapshot_failed(to)``.
    One named again (its connection was lost) starts over."""
