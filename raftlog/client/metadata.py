"""What a client knows of topics: who leads which partition, and how it learns of a change.

Every broker answers a MetadataRequest from what it has applied and heard, so answers differ in age. Two rules
sort them: of topics, the answer with the higher version counts (the applied index of the metadata group); of
a partition's leader, the one with the higher term, since a term has at most one leader.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from raftlog.net.rpc import MetadataResponse, PartitionRow, TopicRow

NO_LEADER: Final = -1


class PartitionView:
    """One partition as this client sees it. The object stays the same as long as its topic lives."""

    __slots__ = ("deleted", "index", "leader", "replicas", "term", "topic", "topic_id")

    def __init__(self, topic: str, topic_id: bytes, index: int, row: PartitionRow) -> None:
        self.topic = topic
        self.topic_id = topic_id
        self.index = index
        self.replicas: list[int] = [*row.replicas, *row.leaving]
        """Brokers that may know who leads."""
        self.leader = NO_LEADER
        """Broker id, or NO_LEADER."""
        self.term = 0
        """Who leads in an older term is of no interest."""
        self.deleted = False
        self.learn(row.leader, row.term)

    def __repr__(self) -> str:
        return f"{self.topic}[{self.index}]"

    def learn(self, leader: int, term: int) -> bool:
        """Take in that ``leader`` leads in ``term``; True if that changed who is thought to lead.

        An older term says nothing, and nobody else can lead in the term of the leader that is known.
        """
        if leader == NO_LEADER or term < self.term or (term == self.term and self.leader != NO_LEADER):
            return False
        changed = leader != self.leader
        self.leader, self.term = leader, term
        return changed

    def deny(self, broker: int, term: int) -> None:
        """Take in that ``broker`` says it does not lead, in its term.

        It counts from the broker that is thought to lead, which then leads in no term up to the one it was
        thought to lead in, if its own is newer. That newer term itself says nothing: nobody may ever lead in
        it, and a broker that dies before it has stored it comes back in an older one.
        """
        if broker == self.leader and term >= self.term:
            self.leader = NO_LEADER
            if term > self.term:
                self.term += 1


class TopicView:
    """One topic as this client sees it."""

    __slots__ = ("config", "internal", "name", "partitions", "topic_id", "version")

    def __init__(self, row: TopicRow, version: int) -> None:
        self.name = row.name
        self.topic_id = row.topic_id
        self.config: dict[str, Any] = row.config
        self.internal = row.internal
        self.version = version
        self.partitions = [
            PartitionView(row.name, row.topic_id, index, each) for index, each in enumerate(row.partitions)
        ]

    def update(self, row: TopicRow, version: int) -> list[PartitionView]:
        """Take in a row of the same topic; returns the partitions whose leader changed."""
        if version >= self.version:
            self.version = version
            self.config = row.config
            for view, each in zip(self.partitions, row.partitions, strict=False):
                view.replicas = [*each.replicas, *each.leaving]
            for index in range(len(self.partitions), len(row.partitions)):
                self.partitions.append(PartitionView(self.name, self.topic_id, index, row.partitions[index]))
        return [
            view
            for view, each in zip(self.partitions, row.partitions, strict=False)
            if view.learn(each.leader, each.term)
        ]

    def mark_deleted(self) -> None:
        for view in self.partitions:
            view.deleted = True


class MetadataCache:
    """The topics this client has asked about."""

    def __init__(self) -> None:
        self.topics: dict[str, TopicView] = {}
        self.version = 0
        """The newest version seen in any answer."""

    def merge(self, response: MetadataResponse) -> list[PartitionView]:
        """Take in an answer, of whatever age; returns the partitions whose leader changed."""
        changed: list[PartitionView] = []
        for row in response.topics:
            changed += self._merge_row(row, response.version)
        self.forget(response.unknown_topics, response.version)
        self.version = max(self.version, response.version)
        return changed

    def _merge_row(self, row: TopicRow, version: int) -> list[PartitionView]:
        known = self.topics.get(row.name)
        if known is not None and known.topic_id == row.topic_id:
            return known.update(row, version)
        if known is not None and version < known.version:
            return []
        if known is not None:  # deleted and made anew under the same name
            known.mark_deleted()
        elif version < self.version:  # may have been deleted since
            return []
        self.topics[row.name] = TopicView(row, version)
        return []

    def forget(self, names: Iterable[str], version: int) -> None:
        """These topics do not exist as of ``version``."""
        for name in names:
            known = self.topics.get(name)
            if known is not None and version >= known.version:
                known.mark_deleted()
                del self.topics[name]
