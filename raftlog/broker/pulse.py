"""The broker's pulse: it lets time pass for replicas, and tells peers' deaths from their silence.

A replica is ticked only while it is awake. A group with nothing to do goes quiet (see
``raftlog.raft.quiescence``) and leaves the tick set; its members then rely on one small message per pair of
brokers, sent every ``heartbeat_ms`` over the control connection: *this broker lives, and all its replicas but
these are in service*. A thousand idle groups so cost as much as one.

======================================== =====================================================================
what is noticed                          what it does to quiet replicas
======================================== =====================================================================
a broker not heard for an election       those that it leads take up their election timers, counted from when
timeout                                  it was last heard; those that lead members there check their quorum
a broker heard in a new incarnation      the same
a replica out of service over there      as if the connection to it were lost: its followers campaign early
a connection lost                        see ``Replica.peer_down``
======================================== =====================================================================

A replica may rest only while all brokers that it would rely on are heard: one that is not is woken at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from raftlog.broker.replica import Replica
from raftlog.net.rpc import BrokerHeartbeat
from raftlog.raft.types import Role

if TYPE_CHECKING:
    from raftlog.broker.broker import Broker

_TICK_MS: Final = 20


class _Heard:
    """What one other broker has said of itself."""

    __slots__ = ("at_ms", "incarnation", "retired", "silent")

    def __init__(self, incarnation: int, now_ms: int) -> None:
        self.incarnation = incarnation
        self.at_ms = now_ms
        self.silent = False
        """Not heard for an election timeout, and what relies on it has been woken."""
        self.retired: frozenset[int] = frozenset()


class Pulse:
    """Time and life signs of one broker.

    Args:
        broker: whose. Nothing happens before :meth:`start`.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._loop = asyncio.get_running_loop()
        self._heartbeat_ms: Final = broker.config.heartbeat_ms
        self._silence_ms: Final = broker.config.election_timeout_ms
        self._awake: dict[Replica[Any], None] = {}
        self._heard: dict[int, _Heard] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due_ms = 0
        self._beat_ms = 0
        self._closed = False

    @property
    def awake(self) -> int:
        """Replicas in the tick set."""
        return len(self._awake)

    # -- time ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to beat."""
        self._tick()

    def close(self) -> None:
        """Stop."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        now = self._broker.now_ms()
        try:
            late_ms = now - self._due_ms
            if late_ms > self._heartbeat_ms:
                # This process was held up: what the others said meanwhile lies unread before it.
                for heard in self._heard.values():
                    heard.at_ms = min(now, heard.at_ms + late_ms)
            if now >= self._beat_ms:
                self._beat(now)
            for replica in [*self._awake]:
                if replica.fault is None:
                    replica.tick(now)
                else:
                    del self._awake[replica]
        finally:
            self._schedule(now)

    def _schedule(self, now_ms: int) -> None:
        """Come back for the replicas that are awake, or only for the next beat."""
        if self._timer is not None:
            self._timer.cancel()
        if not self._closed:
            self._due_ms = now_ms + _TICK_MS if self._awake else max(now_ms + 1, self._beat_ms)
            self._timer = self._loop.call_later((self._due_ms - now_ms) / 1000, self._tick)

    # -- the tick set ----------------------------------------------------------------------------------------

    def watch(self, replica: Replica[Any]) -> None:
        """Have an awake replica ticked."""
        if replica not in self._awake:
            self._awake[replica] = None
            if len(self._awake) == 1:
                self._schedule(self._broker.now_ms())

    def pumped(self, replica: Replica[Any]) -> None:
        """The replica was given something to do, which may have woken it or let it rest."""
        node = replica.node
        if not node.quiet:
            if replica not in self._awake and replica.fault is None:
                self.watch(replica)
        elif replica in self._awake:
            if self._may_rest(replica):
                del self._awake[replica]
            else:
                node.wake(self._broker.now_ms(), {})

    def rouse(self, replica: Replica[Any]) -> None:
        """It has something to do as a leader: should it lead and rest, it does so no longer."""
        if replica.node.quiet and replica.holds_awake:
            replica.node.wake(self._broker.now_ms(), self._heard_members(replica))
            self._broker.mark(replica)

    def _may_rest(self, replica: Replica[Any]) -> bool:
        if replica.holds_awake:
            return False
        for member in _relies_on(replica):
            heard = self._heard.get(replica.hosts.get(member, -1))
            if heard is None or heard.silent or member in heard.retired:
                return False
        return True

    # -- signs of life ---------------------------------------------------------------------------------------

    def _beat(self, now_ms: int) -> None:
        broker = self._broker
        self._beat_ms = max(self._beat_ms + self._heartbeat_ms, now_ms + 1)
        retired = [replica.replica_id for replica in broker.replicas() if replica.fault is not None]
        broker.peers.broadcast(
            BrokerHeartbeat([*retired, *broker.store.out_of_service, *broker.hosting.halted])
        )
        for broker_id, heard in self._heard.items():
            if not heard.silent and now_ms - heard.at_ms >= self._silence_ms:
                heard.silent = True
                self._wake_reliant(broker_id, now_ms)

    def heard(self, broker_id: int, incarnation: int, message: BrokerHeartbeat) -> None:
        """Another broker lives."""
        now = self._broker.now_ms()
        heard = self._heard.get(broker_id)
        if heard is None or incarnation > heard.incarnation:
            self._wake_reliant(broker_id, now)
            heard = self._heard[broker_id] = _Heard(incarnation, now)
        elif incarnation < heard.incarnation:
            return
        heard.at_ms = now
        heard.silent = False
        if message.retired or heard.retired:
            retired = frozenset(message.retired)
            news, heard.retired = retired - heard.retired, retired
            self._members_retired(news, now)

    def is_heard(self, broker_id: int) -> bool:
        """Whether another broker was heard within the last election timeout, about."""
        heard = self._heard.get(broker_id)
        return heard is not None and not heard.silent

    def _wake_reliant(self, broker_id: int, now_ms: int) -> None:
        """Wake the quiet replicas that rely on that broker."""
        for replica in self._broker.replicas():
            if replica.node.quiet and any(
                replica.hosts.get(member) == broker_id for member in _relies_on(replica)
            ):
                replica.node.wake(now_ms, self._heard_members(replica))
                self._broker.mark(replica)

    def _heard_members(self, replica: Replica[Any]) -> dict[int, int]:
        return {
            member: self._heard[host].at_ms for member, host in replica.hosts.items() if host in self._heard
        }

    def _members_retired(self, members: frozenset[int], now_ms: int) -> None:
        for replica in self._broker.replicas():
            for member in members & replica.hosts.keys():
                if replica.fault is None:
                    replica.node.peer_lost(member, now_ms)
                    self._broker.mark(replica)

    def refresh_lease(self, replica: Replica[Any]) -> None:
        """A vote is about to be asked of a quiet replica: its lease is as fresh as the last word of its
        leader's broker."""
        leader = replica.node.leader
        heard = self._heard.get(replica.hosts.get(leader, -1))
        if heard is not None and leader not in heard.retired:
            replica.node.leader_heard(heard.at_ms)


def _relies_on(replica: Replica[Any]) -> Iterable[int]:
    """The members whose hosts must live for this replica to rest: all others of a leader, the leader of a
    follower."""
    node = replica.node
    return node.progress.keys() if node.role is Role.LEADER else (node.leader,)
