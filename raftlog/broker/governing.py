"""What a broker answers to those who change the cluster: users, and the controller that carries it out.

Topics get more partitions on the spot; how many replicas they should have, and which brokers drain, is only
noted in the metadata: the controller sees to it. It is given the metadata as a snapshot, and is told by each
broker about the groups that this one leads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from raftlog.broker.answers import answer
from raftlog.broker.internal_topics import check_reserved
from raftlog.broker.metadata import TOPIC_PARTITIONS_MAX
from raftlog.errors import ConfigError, InvalidReplicationFactor, RaftlogError
from raftlog.net import rpc_cluster
from raftlog.net.rpc_cluster import (
    UNCHANGED,
    AlterTopicRequest,
    AlterTopicResponse,
    DrainRequest,
    DrainResponse,
    ImageRequest,
    ImageResponse,
    LedRow,
    ReportRequest,
    ReportResponse,
)
from raftlog.net.server import Reply
from raftlog.state.image import Topic
from raftlog.state.metadata import MetadataState
from raftlog.state.metadata_commands import AddPartitions, Command, SetDraining, SetReplication

if TYPE_CHECKING:
    from raftlog.broker.broker import Broker


class Governing:
    """Handlers for the requests of ``rpc_cluster``.

    Args:
        broker: whose.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.handlers: dict[type[Any], Callable[[Any, memoryview, Reply], None]] = {
            rpc_cluster.AlterTopicRequest: self._alter_topic,
            rpc_cluster.DrainRequest: self._drain,
            rpc_cluster.ImageRequest: self._image,
            rpc_cluster.ReportRequest: self._report,
        }

    # -- users -----------------------------------------------------------------------------------------------

    def _alter_topic(self, request: AlterTopicRequest, payload: memoryview, reply: Reply) -> None:
        staged = self._broker.metadata.replica.check_serving()
        check_reserved(request.name, internal=False)
        topic = staged.topic(request.name)
        commands: list[Command] = []
        if request.partitions != UNCHANGED:
            commands += self._more_partitions(staged, topic, request)
        if request.replication_factor not in (UNCHANGED, topic.replication):
            _check_factor(staged, request.replication_factor)
            commands.append(SetReplication(topic.topic_id, request.replication_factor))
        self._propose(commands, reply, partial(self._altered, request.name))

    def _altered(self, name: str) -> AlterTopicResponse:
        image = self._broker.metadata.image
        return AlterTopicResponse(image.applied_index, len(image.topic(name).partitions))

    def _more_partitions(
        self, staged: MetadataState, topic: Topic, request: AlterTopicRequest
    ) -> list[Command]:
        """How the topic gets as many partitions as asked for; it may have them already."""
        there, wanted = len(topic.partitions), request.partitions
        if wanted == there:
            return []
        if not there < wanted <= TOPIC_PARTITIONS_MAX:
            raise ConfigError(
                f"topic {topic.name!r} has {there} partitions: it can have more, up to "
                f"{TOPIC_PARTITIONS_MAX}, and never fewer; not {wanted}"
            )
        if not request.allow_key_reorder:
            raise ConfigError(
                f"with {wanted} partitions instead of {there} most keys of topic {topic.name!r} go to other "
                "partitions, and records of one key are in order within each partition only: say "
                "allow_key_reorder=True (--allow-key-reorder) if that is all right, or nothing has a key"
            )
        replication = topic.replication or max(len(each.replicas) for each in topic.partitions)
        assignment = self._broker.metadata.place(staged, wanted - there, replication)
        return [AddPartitions(topic.topic_id, there, assignment)]

    def _drain(self, request: DrainRequest, payload: memoryview, reply: Reply) -> None:
        staged = self._broker.metadata.replica.check_serving()
        for broker_id in request.brokers:
            if broker_id not in staged.brokers:
                raise ConfigError(f"no broker {broker_id}")
        commands = [
            SetDraining(broker_id, request.draining)
            for broker_id in request.brokers
            if staged.brokers[broker_id].draining != request.draining
        ]
        self._propose(commands, reply, lambda: DrainResponse(self._broker.metadata.image.applied_index))

    def _propose(self, commands: Sequence[Command], reply: Reply, done: Callable[[], Any]) -> None:
        """Propose these in order; answer when the last is applied, or with why the first that fails did."""
        if not commands:
            answer(reply, done(), None)
            return
        command, *others = commands

        def applied(result: Any, error: RaftlogError | None) -> None:
            if error is None and isinstance(result, RaftlogError):
                error = result
            if error is not None:
                reply.fail(error)
                return
            try:
                self._propose(others, reply, done)
            except RaftlogError as refusal:
                reply.fail(refusal)

        self._broker.metadata.replica.command(command, applied)

    # -- the controller --------------------------------------------------------------------------------------

    def _image(self, request: ImageRequest, payload: memoryview, reply: Reply) -> None:
        self._broker.metadata.replica.check_serving()
        image = self._broker.metadata.image
        is_news = image.applied_index != request.known
        own, pulse = self._broker.broker_id, self._broker.pulse
        heard = [broker_id for broker_id in image.brokers if broker_id == own or pulse.is_heard(broker_id)]
        reply.ok(ImageResponse(image.applied_index, heard), (image.snapshot(),) if is_news else ())

    def _report(self, request: ReportRequest, payload: memoryview, reply: Reply) -> None:
        own = self._broker.metadata.replica
        rows = [
            LedRow(
                replica.replica_id,
                replica.node.conf.voters,
                replica.log.size_bytes,
                replica.node.conf.is_joint or bool(replica.node.conf.learners),
            )
            for replica in self._broker.replicas()
            if replica is not own and replica.staged is not None
        ]
        reply.ok(ReportResponse(self._broker.row(), rows))


def _check_factor(staged: MetadataState, factor: int) -> None:
    if not 0 <= factor <= len(staged.brokers):
        raise InvalidReplicationFactor(
            f"replication factor {factor} is not in 1 to {len(staged.brokers)}, the number of brokers",
            replication_factor=factor,
            brokers=len(staged.brokers),
        )
