"""A broker's metrics, from its counters and from what is to be seen of its replicas.

Costs about a microsecond per replica, every few seconds; see :mod:`raftlog.telemetry.catalogue` for what the
metrics mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from raftlog.broker.assigned import AssignedReplica
from raftlog.broker.group_lag import GroupLag
from raftlog.broker.out_of_service import out_of_service_rows
from raftlog.broker.partition import PartitionReplica
from raftlog.broker.transaction_replica import TransactionReplica
from raftlog.errors import RaftlogError
from raftlog.raft.quorum import voter_ids
from raftlog.raft.types import Role
from raftlog.telemetry import catalogue as c
from raftlog.telemetry.catalogue import Sample
from raftlog.telemetry.counters import Latency

if TYPE_CHECKING:
    from raftlog.broker.broker import Broker
    from raftlog.broker.replica import Replica

_ROLES: Final = ("broker", "client", "controller")


class BrokerSampler:
    """Samples one broker.

    Args:
        broker: which.
        syncs: of its disk's journal lane.
        series_max: per metric; see :func:`raftlog.telemetry.catalogue.folded`.
    """

    def __init__(self, broker: Broker, syncs: Latency, series_max: int) -> None:
        self._broker = broker
        self._syncs = syncs
        self._series_max = series_max
        self._group_lag = GroupLag(broker)
        self._free_bytes: int | None = None
        self._committed: dict[int, int] = {}
        """Replica id -> commit index of those that led, at the last sample."""
        self._leaderless: set[int] = set()
        """Replicas that knew no leader at the last sample."""

    async def survey(self) -> None:
        """Look at what takes longer: how far groups are behind, and the room on the device."""
        await self._group_lag.survey()
        try:
            self._free_bytes = await self._broker.free_bytes()
        except (RaftlogError, OSError):
            self._free_bytes = None

    def sample(self, loop_delay_s: float) -> list[Sample]:
        """Everything, as it stands.

        Args:
            loop_delay_s: by how much this call comes too late.
        """
        found = [Sample(c.LOOP_DELAY, (loop_delay_s,)), *self._passing(), *self._replicas(), *self._waiting()]
        return c.folded(found, self._series_max)

    # -- what goes through -----------------------------------------------------------------------------------

    def _passing(self) -> Iterator[Sample]:
        broker = self._broker
        counters = broker.counters
        for topic, traffic in counters.topics.items():
            yield Sample(c.PRODUCED_RECORDS, (traffic.records_in,), (topic,))
            yield Sample(c.PRODUCED_BYTES, (traffic.bytes_in,), (topic,))
            yield Sample(c.FETCHED_BYTES, (traffic.bytes_out,), (topic,))
        for of_group, count in self._group_lag.consumed.items():
            yield Sample(c.CONSUMED_RECORDS, (count,), of_group)
        for name, error_count in broker.server.errors.items():
            yield Sample(c.REQUEST_ERRORS, (error_count,), (name,))
        if "Busy" not in broker.server.errors:
            yield Sample(c.REQUEST_ERRORS, (0,), ("Busy",))
        yield Sample(c.TRANSACTIONS, (counters.transactions_begun,), ("begun",))
        yield Sample(c.TRANSACTIONS, (counters.transactions_committed,), ("committed",))
        yield Sample(c.TRANSACTIONS, (counters.transactions_aborted,), ("aborted",))
        yield Sample(c.ELECTIONS, (counters.elections_won,))
        yield Sample(c.LEADERSHIPS_LOST, (counters.leaderships_lost,))
        yield Sample(c.REPAIRS, (broker.repairs.completed,))
        for total, seconds, latency in (
            (c.PRODUCED_BATCHES, c.PRODUCE_SECONDS, counters.produce),
            (c.FETCHES, c.FETCH_SECONDS, counters.fetch),
            (c.JOURNAL_SYNCS, c.SYNC_SECONDS, self._syncs),
        ):
            yield Sample(total, (latency.count,))
            yield Sample(seconds, latency.take())

    # -- replicas --------------------------------------------------------------------------------------------

    def _replicas(self) -> Iterator[Sample]:
        broker = self._broker
        committed, self._committed = self._committed, {}
        leaderless, self._leaderless = self._leaderless, set()
        leaders = under_replicated = uncommitted = waiting = transactions = replicas = 0
        for replica in broker.replicas():
            if replica.fault is not None:
                continue
            replicas += 1
            node, replica_id = replica.node, replica.replica_id
            if node.role is Role.LEADER:
                leaders += 1
                uncommitted += node.last_index - node.commit
                under_replicated += self._is_under_replicated(replica, committed.get(replica_id, 0))
                self._committed[replica_id] = node.commit
            elif node.leader == 0:
                self._leaderless.add(replica_id)
            if isinstance(replica, PartitionReplica):
                waiting += replica.readers_waiting
            elif isinstance(replica, TransactionReplica):
                transactions += replica.open_transactions
        yield Sample(c.REPLICAS, (replicas,))
        yield Sample(c.LEADERS, (leaders,))
        yield Sample(c.UNDER_REPLICATED, (under_replicated,))
        yield Sample(c.LEADERLESS, (len(self._leaderless & leaderless),))
        retired = sum(replica.fault is not None for replica in broker.replicas())
        yield Sample(c.OUT_OF_SERVICE, (retired + len(out_of_service_rows(broker)),))
        yield Sample(c.UNCOMMITTED, (uncommitted,))
        yield Sample(c.WAITING_FETCHES, (waiting,))
        yield Sample(c.OPEN_TRANSACTIONS, (transactions,))

    def _is_under_replicated(self, replica: Replica[Any], committed: int) -> bool:
        """Whether fewer voters than should have all that was committed a sample ago: what is on its way just
        now is no reason to worry."""
        node, is_up = replica.node, self._broker.peers.is_up
        progress = node.progress
        able = sum(
            member == node.id
            or (
                member in progress
                and progress[member].match >= committed
                and is_up(replica.hosts.get(member, -1))
            )
            for member in voter_ids(node.conf)
        )
        if isinstance(replica, AssignedReplica):
            return able < len(replica.assignment.replicas)
        return able < len(node.conf.voters)

    # -- what waits ------------------------------------------------------------------------------------------

    def _waiting(self) -> Iterator[Sample]:
        broker = self._broker
        store, server = broker.store, broker.server
        since = store.oldest_pending_since
        age = 0.0 if since is None else max(asyncio.get_running_loop().time() - since, 0.0)
        yield Sample(c.JOURNAL_BYTES, (store.pending_bytes,))
        yield Sample(c.JOURNAL_AGE, (age,))
        yield Sample(c.STORAGE_FAULT, (int(store.fault is not None),))
        yield Sample(c.REQUEST_BYTES, (server.in_flight_bytes,))
        roles = [connection.peer.role for connection in server.connections]
        for role in _ROLES:
            yield Sample(c.CONNECTIONS, (roles.count(role),), (role,))
        for place, lag in self._group_lag.lag.items():
            yield Sample(c.GROUP_LAG, (lag,), tuple(map(str, place)))
        if self._free_bytes is not None:
            yield Sample(c.DISK_FREE, (self._free_bytes,))
