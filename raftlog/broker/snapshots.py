"""Snapshots between replicas, for followers whose next entry the leader no longer has.

::

    leader                                                    follower
      Ready.snapshots names it                                  |
      | InstallSnapshot position 0, one chunk ----------------> |  collects chunks
      | <------------------ InstallSnapshotResponse position p  |  p: what it has so far
      | InstallSnapshot position p ---------------------------> |
      |  …                                                      |  has all: file written, log begun behind it
      | <----------- AppendResponse, InstallSnapshotResponse    |  position = total
      on_snapshot_sent: frames follow

The bytes are those of the leader's snapshot file at the oldest kept segment's base, so the follower's
segments begin where the leader's do. The leader always goes on from where the follower says it is: a
transfer that was cut off, or a new leader with the same snapshot (replicas in the same state write the same
bytes, and the file's checksum settles it), resumes by itself. One chunk is under way at a time; it is sent
again when no answer comes, for links drop messages. A broker sends few snapshots at a time: when many
replicas move, the others wait their turn.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from raftlog.errors import RaftlogError
from raftlog.raft.types import ConfState, InstallSnapshot, InstallSnapshotResponse, Role, Snapshot
from raftlog.storage.snapshot_file import LogSnapshot

if TYPE_CHECKING:
    from raftlog.broker.replica import Replica

logger = logging.getLogger("raftlog.broker")

CHUNK_BYTES: Final = 256 << 10
SNAPSHOT_BYTES_MAX: Final = 512 << 20
"""A snapshot above this is refused: no length field of a peer asks for more memory."""
RESEND_MS: Final = 1_000
COMPLAIN_MS: Final = 10_000
GIVE_UP_MS: Final = 10_000
"""A follower that takes nothing for so long makes room for another one."""
FORGET_MS: Final = 60_000
"""A transfer of which no chunk has come for so long is forgotten."""

SnapshotMessage: TypeAlias = InstallSnapshot | InstallSnapshotResponse


@dataclass(slots=True)
class _Outgoing:
    """A transfer to one follower, in one term of ours."""

    to: int
    term: int
    header: Snapshot
    """Without data and configuration."""
    position: int
    total: int
    sent_ms: int
    moved_ms: int
    """When the follower last took something."""
    begun: bool = False


class SnapshotSlots:
    """How many snapshots a broker sends at the same time.

    Args:
        count: at least 1.

    Attributes:
        free: how many more could be sent now.
    """

    def __init__(self, count: int) -> None:
        self.free = count
        self._waiting: deque[tuple[_Outgoing, Callable[[_Outgoing], None]]] = deque()

    def ask(self, out: _Outgoing, begin: Callable[[_Outgoing], None]) -> None:
        """Have ``begin`` called once there is room."""
        self._waiting.append((out, begin))
        self._admit()

    def give_back(self, out: _Outgoing) -> None:
        """The transfer is over, or never began."""
        if out.begun:
            self.free += 1
            self._admit()
        else:
            self._waiting = deque(each for each in self._waiting if each[0] is not out)

    def _admit(self) -> None:
        while self.free and self._waiting:
            out, begin = self._waiting.popleft()
            self.free -= 1
            out.begun = True
            begin(out)


@dataclass(slots=True)
class _Incoming:
    key: tuple[int, int, int, int]
    """Index, term and crc of the snapshot, and its total."""
    heard_ms: int
    data: bytearray = field(default_factory=bytearray)


class SnapshotExchange:
    """One replica's transfers, in either direction.

    Attributes:
        active: there may be something to do as time passes.
        installing: the log is being replaced: Ready must not be taken.
    """

    __slots__ = (
        "_incoming",
        "_outgoing",
        "_quiet_until_ms",
        "_replica",
        "_storing",
        "active",
        "installing",
    )

    def __init__(self, replica: Replica[Any]) -> None:
        self._replica = replica
        self._outgoing: dict[int, _Outgoing] = {}
        self._incoming: _Incoming | None = None
        self._storing = False
        self._quiet_until_ms = 0
        self.active = False
        self.installing = False

    # -- the leader's side -----------------------------------------------------------------------------------

    def begin(self, to: int) -> None:
        """The core wants follower ``to`` to have a snapshot."""
        replica = self._replica
        log, node = replica.log, replica.node
        index = log.first_index - 1
        header = Snapshot(index, log.prev_term, log.prev_crc, ConfState())  # the bytes hold the configuration
        now_ms = replica.host.now_ms()
        before = self._outgoing.get(to)
        if before is not None:
            self._end(before)
        out = self._outgoing[to] = _Outgoing(to, node.term, header, 0, 0, now_ms, now_ms)
        self.active = True
        logger.debug("broker %d: %s: replica %d needs the snapshot at %d", *self._names, to, index)
        replica.host.snapshot_slots.ask(out, self._begin)

    def _begin(self, out: _Outgoing) -> None:
        out.moved_ms = self._replica.host.now_ms()
        self._replica.host.spawn(self._send(out))

    async def _send(self, out: _Outgoing) -> None:
        replica = self._replica
        out.sent_ms = replica.host.now_ms()
        position = out.position
        try:
            data, total = await replica.log.snapshot_chunk(out.header.index, position, CHUNK_BYTES)
        except RaftlogError as error:
            self._complain("cannot send a snapshot", error)
            self._fail(out)
            return
        node = replica.node
        broker_id = replica.hosts.get(out.to)
        if not self._is_current(out) or out.position != position:
            return
        if broker_id is None:
            self._fail(out)
            return
        out.total = total
        header = out.header
        chunk = Snapshot(header.index, header.term, header.crc, header.conf, data)
        replica.host.send(broker_id, InstallSnapshot(out.to, node.id, node.term, chunk, position, total))
        replica.host.mark(replica)

    def answered(self, message: InstallSnapshotResponse) -> None:
        """A follower says how much it has."""
        out = self._outgoing.get(message.sender)
        if out is None or not self._is_current(out) or message.index != out.header.index:
            return
        if message.rejected:
            self._fail(out)
        elif out.total and message.position >= out.total:
            self._end(out)
            self._replica.snapshots_sent += 1
            self._replica.node.on_snapshot_sent(out.to, message.index)
            self._replica.host.mark(self._replica)
        elif message.position != out.position:  # else it is the answer to a chunk that was sent twice
            out.position = message.position
            out.moved_ms = self._replica.host.now_ms()
            self._replica.host.spawn(self._send(out))

    def peer_lost(self, replica_id: int) -> None:
        """The connection to that replica's broker broke: the core will name it again."""
        out = self._outgoing.get(replica_id)
        if out is not None:
            self._fail(out)

    def _fail(self, out: _Outgoing) -> None:
        if self._is_current(out):
            self._end(out)
            self._replica.node.on_snapshot_failed(out.to)
            self._replica.host.mark(self._replica)

    def _end(self, out: _Outgoing) -> None:
        del self._outgoing[out.to]
        self._replica.host.snapshot_slots.give_back(out)

    def stop_sending(self) -> None:
        """This replica leads no more."""
        for out in list(self._outgoing.values()):
            self._end(out)

    def _is_current(self, out: _Outgoing) -> bool:
        node = self._replica.node
        return (
            self._outgoing.get(out.to) is out
            and node.role is Role.LEADER
            and node.term == out.term
            and self._replica.fault is None
        )

    # -- the follower's side ---------------------------------------------------------------------------------

    def chunk(self, message: InstallSnapshot) -> None:
        """A chunk from the leader of this term."""
        replica = self._replica
        snapshot, total = message.snapshot, message.total
        if snapshot.index <= replica.node.commit:
            self._answer(message, total)  # all that the snapshot brings is here
            return
        if self._storing:
            return
        key = (snapshot.index, snapshot.term, snapshot.crc, total)
        incoming = self._incoming
        if incoming is None or incoming.key != key:
            incoming = self._incoming = _Incoming(key, 0)
            self.active = True
        incoming.heard_ms = replica.host.now_ms()
        data = incoming.data
        if message.position == len(data):
            data += snapshot.data
        if not 0 < total <= SNAPSHOT_BYTES_MAX or len(data) > total:
            self._incoming = None
            self._answer(message, 0, rejected=True)
        elif len(data) < total:
            self._answer(message, len(data))
        else:
            self._incoming = None
            self._storing = True
            replica.host.spawn(self._install(message, bytes(data)))

    async def _install(self, message: InstallSnapshot, data: bytes) -> None:
        try:
            installed = await self._take_over(message.snapshot.index, data)
        except RaftlogError as error:
            self._complain("cannot take a snapshot", error)
            installed = False
        finally:
            self._storing = self.installing = False
        if self._replica.fault is None:
            if installed:
                self._answer(message, message.total)
            else:
                self._answer(message, 0, rejected=True)

    async def _take_over(self, index: int, data: bytes) -> bool:
        """Whether log and state machine have all that the snapshot brings."""
        replica = self._replica
        log, node = replica.log, replica.node
        snapshot = await log.keep_snapshot(index, data)
        # From here on nothing is appended, so that the log stands still while it is replaced.
        self.installing = True
        replaced = False

        def accept() -> bool:
            nonlocal replaced
            replaced = self._accept(snapshot)
            return replaced

        try:
            await log.begin_behind(snapshot, accept)
        except RaftlogError as error:
            if replaced:
                replica.retire(error)
            raise
        except AssertionError as error:
            replica.halt(f"cannot begin behind the snapshot at {index}", error)
            return False
        if replaced:
            replica.snapshots_installed += 1
            logger.info("broker %d: %s begins behind the snapshot at %d", *self._names, index)
            replica.replaced()
        return node.commit >= index

    def _accept(self, snapshot: LogSnapshot) -> bool:
        replica = self._replica
        if replica.fault is not None or replica.node.role is Role.LEADER:
            return False  # a leader has all that is committed
        try:
            machine = type(replica.machine).restore(snapshot.data)
            now_ms = replica.host.now_ms()
            fresh = replica.node.restore(snapshot, now_ms, leader_time_ms=snapshot.leader_time_ms)
        except AssertionError as error:
            replica.halt(f"cannot take over the snapshot at {snapshot.index}", error)
            return False
        if fresh:
            replica.machine = machine
        return fresh

    def _answer(self, message: InstallSnapshot, position: int, *, rejected: bool = False) -> None:
        replica = self._replica
        node = replica.node
        broker_id = replica.hosts.get(message.sender)
        if broker_id is not None and node.term == message.term:
            index = message.snapshot.index
            answer = InstallSnapshotResponse(message.sender, node.id, node.term, index, position, rejected)
            replica.host.send(broker_id, answer)
        replica.host.mark(replica)

    # -- time ------------------------------------------------------------------------------------------------

    def tick(self, now_ms: int) -> None:
        """Send again what was not answered; forget what is over."""
        for out in list(self._outgoing.values()):
            if not self._is_current(out):
                self._end(out)
            elif out.begun and now_ms - out.moved_ms >= GIVE_UP_MS:
                self._fail(out)
            elif out.begun and now_ms - out.sent_ms >= RESEND_MS:
                self._replica.host.spawn(self._send(out))
        incoming = self._incoming
        if incoming is not None and (
            incoming.key[0] <= self._replica.node.commit or now_ms - incoming.heard_ms >= FORGET_MS
        ):
            self._incoming = None
        self.active = bool(self._outgoing) or self._incoming is not None

    def _complain(self, what: str, error: RaftlogError) -> None:
        """It is tried again with every heartbeat: say so now and then."""
        now_ms = self._replica.host.now_ms()
        if now_ms >= self._quiet_until_ms:
            self._quiet_until_ms = now_ms + COMPLAIN_MS
            logger.warning("broker %d: %s: %s: %s", *self._names, what, error)

    @property
    def _names(self) -> tuple[int, str]:
        return self._replica.host.broker_id, self._replica.name
