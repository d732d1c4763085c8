"""Administration: creating, listing, describing and deleting topics. All asynchronous, on the cluster
client's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from raftlog.client.cluster import ClusterClient
from raftlog.client.descriptions import (
    ClusterDescription,
    TopicDescription,
    describe_brokers,
    describe_partitions,
)
from raftlog.client.metadata import TopicView
from raftlog.client.retry import is_retriable
from raftlog.config import TopicConfig, validate_topic_name
from raftlog.errors import ConfigError, RaftlogError, RequestTimeout, TopicExists, UnknownTopic
from raftlog.net.connection import RpcConnection
from raftlog.net.rpc import (
    BrokerRow,
    BrokerStatusRequest,
    BrokerStatusResponse,
    CreateTopicRequest,
    DeleteTopicRequest,
    UpgradeRequest,
    UpgradeResponse,
)
from raftlog.net.rpc_cluster import UNCHANGED, AlterTopicRequest, DrainRequest

CALL_TIMEOUT_S: Final = 30.0
_LOOK_S: Final = 0.05
STATUS_TIMEOUT_S: Final = 2.0
"""A broker that does not say how it is within this time is described as lost."""
AUTO_REPLICATION: Final = 0


class Admin:
    """What a Log does beside producing and consuming."""

    def __init__(self, cluster: ClusterClient) -> None:
        self._cluster = cluster

    async def create_topic(
        self,
        name: str,
        partitions: int,
        replication_factor: int | str,
        config: Mapping[str, Any] | TopicConfig | None,
        exist_ok: bool,
        timeout: float,
    ) -> None:
        """See :meth:`raftlog.client.log.Log.create_topic`."""
        factor = check_replication_factor(replication_factor)
        if isinstance(partitions, bool) or not isinstance(partitions, int) or partitions < 1:
            raise ConfigError(f"partitions={partitions!r}: a topic has at least one partition")
        settings = TopicConfig.model_validate(config).model_dump(exclude_unset=True)
        request = CreateTopicRequest(validate_topic_name(name), partitions, factor, settings, exist_ok)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        doubtful = False

        def retriable(error: BaseException) -> bool:
            nonlocal doubtful
            doubtful = doubtful or (isinstance(error, RaftlogError) and error.indeterminate)
            return is_retriable(error)

        try:
            await self._cluster.call_leader(
                self._cluster.metadata_view, request, timeout=timeout, retriable=retriable
            )
        except TopicExists:
            if not doubtful:
                raise
            # an earlier attempt of ours, whose answer was lost, has most likely created it
        try:
            async with asyncio.timeout_at(deadline):
                topic = await self._known(name, timeout)
                await asyncio.gather(*(self._cluster.seek_leader(view) for view in topic.partitions))
        except TimeoutError as error:
            raise RequestTimeout(
                f"topic {name!r} was created, but not all of its partitions had a leader within {timeout:g} s"
            ) from error

    async def _known(self, name: str, timeout: float) -> TopicView:
        """The topic just created: brokers that have not heard of it yet are asked again."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            try:
                return await self._cluster.topic(name, timeout=max(deadline - loop.time(), 0.001))
            except UnknownTopic:
                if loop.time() >= deadline:
                    raise

    async def topics(self) -> list[str]:
        """Names of all topics that are not internal, in order."""
        answer = await self._cluster.metadata(None, timeout=CALL_TIMEOUT_S)
        return sorted(row.name for row in answer.topics if not row.internal)

    async def describe_topic(self, name: str) -> TopicDescription:
        """See :meth:`raftlog.client.log.Log.describe_topic`."""
        await self._cluster.topic(validate_topic_name(name), timeout=CALL_TIMEOUT_S)
        answer = await self._cluster.metadata([name], timeout=CALL_TIMEOUT_S)
        row = next((row for row in answer.topics if row.name == name), None)
        if row is None:
            raise UnknownTopic(f"there is no topic {name!r}")
        hosts = {broker for partition in row.partitions for broker in partition.replicas}
        statuses = await self._statuses([each for each in answer.brokers if each.id in hosts], [name])
        return TopicDescription(name, row.topic_id.hex(), row.config, describe_partitions(row, statuses))

    async def delete_topic(self, name: str, timeout: float) -> None:
        """See :meth:`raftlog.client.log.Log.delete_topic`."""
        request = DeleteTopicRequest(validate_topic_name(name))
        doubtful = False

        def retriable(error: BaseException) -> bool:
            nonlocal doubtful
            doubtful = doubtful or (isinstance(error, RaftlogError) and error.indeterminate)
            return is_retriable(error)

        try:
            answer, _ = await self._cluster.call_leader(
                self._cluster.metadata_view, request, timeout=timeout, retriable=retriable
            )
        except UnknownTopic:
            if not doubtful:
                raise
            # an earlier attempt of ours, whose answer was lost, has deleted it
        else:
            self._cluster.cache.forget([name], answer.version)

    async def alter_topic(
        self,
        name: str,
        timeout: float,
        *,
        more_partitions: int = 0,
        replication_factor: int | str | None = None,
        allow_key_reorder: bool = False,
    ) -> int:
        """See :meth:`raftlog.client.log.Log.add_partitions` and ``set_replication``; returns how many
        partitions the topic has now."""
        factor = UNCHANGED if replication_factor is None else check_replication_factor(replication_factor)
        count = UNCHANGED
        if more_partitions:
            if isinstance(more_partitions, bool) or more_partitions < 1:
                raise ConfigError(f"{more_partitions!r} more partitions: at least one")
            topic = await self._cluster.topic(validate_topic_name(name), timeout=timeout)
            await self._cluster.metadata([name], timeout=timeout)
            count = len(topic.partitions) + more_partitions  # so that a retry adds no more
        request = AlterTopicRequest(validate_topic_name(name), count, factor, allow_key_reorder)
        answer, _ = await self._cluster.call_leader(self._cluster.metadata_view, request, timeout=timeout)
        if more_partitions:
            await self._grown(name, answer.partitions, timeout)
        return answer.partitions

    async def _grown(self, name: str, partitions: int, timeout: float) -> None:
        """Wait until all partitions of a topic are known here, and have leaders."""
        try:
            async with asyncio.timeout(timeout):
                topic = await self._cluster.topic(name, timeout=timeout)
                while len(topic.partitions) < partitions:
                    await self._cluster.metadata([name], timeout=timeout)
                    await asyncio.sleep(_LOOK_S)
                await asyncio.gather(*(self._cluster.seek_leader(view) for view in topic.partitions))
        except TimeoutError as error:
            raise RequestTimeout(
                f"topic {name!r} has {partitions} partitions, and not all had a leader within {timeout:g} s"
            ) from error

    async def drain(self, brokers: Sequence[int], draining: bool, timeout: float) -> None:
        """See :meth:`raftlog.client.log.Log.drain`."""
        request = DrainRequest(list(brokers), draining)
        await self._cluster.call_leader(self._cluster.metadata_view, request, timeout=timeout)

    async def upgrade(self, level: int, timeout: float) -> UpgradeResponse:
        """See :meth:`raftlog.client.log.Log.upgrade`."""
        request = UpgradeRequest(level)
        answer, _ = await self._cluster.call_leader(self._cluster.metadata_view, request, timeout=timeout)
        return answer

    async def describe_cluster(self) -> ClusterDescription:
        """See :meth:`raftlog.client.log.Log.describe_cluster`."""
        answer = await self._cluster.metadata([], timeout=CALL_TIMEOUT_S)
        statuses = await self._statuses(answer.brokers, None)
        bootstrap = self._cluster.bootstrap
        return ClusterDescription(
            bootstrap.name, bootstrap.cluster_id, describe_brokers(answer.brokers, statuses)
        )

    async def _statuses(
        self, brokers: Sequence[BrokerRow], topics: list[str] | None
    ) -> list[BrokerStatusResponse]:
        """What each broker says of itself, of those that answer."""
        answers = await asyncio.gather(*(self._status(each.id, topics) for each in brokers))
        return [answer for answer in answers if answer is not None]

    async def _status(self, broker_id: int, topics: list[str] | None) -> BrokerStatusResponse | None:
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                connection: RpcConnection = await self._cluster.connections.to(broker_id)
                answer, _ = await self._cluster.call(
                    connection, BrokerStatusRequest(topics), timeout=STATUS_TIMEOUT_S
                )
        except (RaftlogError, TimeoutError):
            return None
        return answer


def check_replication_factor(given: int | str) -> int:
    """The number to ask for; 0 stands for "auto"."""
    if given == "auto":
        return AUTO_REPLICATION
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ConfigError(f"replication_factor={given!r} is neither 'auto' nor an integer from 1")
    return given
