"""How far consumer groups are behind, as the coordinators of this broker see it.

What a group has committed is in the coordinator's state. Where the partitions end is known here, if this
broker has a replica of them; of others their leaders are asked, once per survey and broker. Nothing is
confirmed with a quorum and no group at rest is woken: this is for people who watch, and may be a moment old.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from raftlog.broker.group_replica import GroupReplica
from raftlog.broker.partition import PartitionReplica
from raftlog.errors import RaftlogError
from raftlog.net.rpc import BrokerStatusRequest, BrokerStatusResponse

if TYPE_CHECKING:
    from raftlog.broker.broker import Broker

_ASK_TIMEOUT_S: Final = 2.0

Place = tuple[str, int]
"""(topic, partition)."""


class _Committed(NamedTuple):
    group: str
    place: Place
    offset: int


class GroupLag:
    """Of the groups that one broker coordinates.

    Args:
        broker: which.

    Attributes:
        lag: (group, topic, partition) -> records between what is committed and the end.
        consumed: (group, topic) -> by how much its committed offsets have grown, in all.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._offsets: dict[tuple[str, Place], int] = {}
        """What was committed at the last survey."""
        self.lag: dict[tuple[str, str, int], int] = {}
        self.consumed: dict[tuple[str, str], int] = {}

    async def survey(self) -> None:
        """Look at all groups; a broker that does not answer leaves out what it leads."""
        committed = list(self._committed())
        ends = self._known_here({each.place for each in committed})
        await self._ask_leaders({each.place for each in committed} - ends.keys(), ends)
        self.lag = {
            (group, *place): max(ends[place] - offset, 0)
            for group, place, offset in committed
            if place in ends
        }
        self._count(committed)

    def _committed(self) -> Iterator[_Committed]:
        image = self._broker.metadata.image
        for replica in self._broker.replicas():
            if isinstance(replica, GroupReplica) and replica.staged is not None:
                for group, offsets in replica.machine.offsets.items():
                    for (topic_id, partition), known in offsets.items():
                        topic = image.topic_by_id(topic_id)
                        if topic is not None:
                            yield _Committed(group, (topic.name, partition), known.offset)

    def _known_here(self, wanted: set[Place]) -> dict[Place, int]:
        """Ends of partitions, from replicas on this broker that follow their leader or are it."""
        return {
            place: replica.committed_offset
            for replica in self._broker.replicas()
            if isinstance(replica, PartitionReplica)
            and replica.fault is None
            and replica.leader_broker is not None
            and (place := (replica.log.spec.topic, replica.log.spec.partition)) in wanted
        }

    async def _ask_leaders(self, missing: set[Place], ends: dict[Place, int]) -> None:
        """Add the ends of partitions of which this broker has no replica."""
        image = self._broker.metadata.image
        topics: dict[int, set[str]] = {}
        for name, partition in missing:
            for _, broker_id in image.topics[name].partitions[partition].replicas:
                topics.setdefault(broker_id, set()).add(name)
        answers = await asyncio.gather(*(self._ask(each, sorted(topics[each])) for each in sorted(topics)))
        for answer in answers:
            for row in () if answer is None else answer.replicas:
                place = row.topic, row.partition
                if place in missing:  # of several replicas the leader knows most
                    ends[place] = max(row.committed_offset, ends.get(place, 0))

    async def _ask(self, broker_id: int, topics: list[str]) -> BrokerStatusResponse | None:
        try:
            answer: BrokerStatusResponse = await self._broker.ask_broker(
                broker_id, BrokerStatusRequest(topics), _ASK_TIMEOUT_S
            )
        except RaftlogError:
            return None
        return answer

    def _count(self, committed: list[_Committed]) -> None:
        offsets = {(each.group, each.place): each.offset for each in committed}
        for (group, place), offset in offsets.items():
            before = self._offsets.get((group, place), offset)  # what was committed before this began
            key = group, place[0]
            self.consumed[key] = self.consumed.get(key, 0) + max(offset - before, 0)
        self._offsets = offsets
