"""What a broker answers: one method per request of the rpc catalogue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from raftlog.broker.answers import answer, answer_with
from raftlog.broker.coordination import Coordination
from raftlog.broker.fetch import FetchSession, wire_error
from raftlog.broker.governing import Governing
from raftlog.broker.isolation import readable_end
from raftlog.broker.metadata import check_topic
from raftlog.broker.out_of_service import out_of_service_rows
from raftlog.broker.produce import BatchAnswer, answer_batch, split_batches
from raftlog.broker.wire import decode_messages
from raftlog.errors import Busy, ConfigError, ProtocolError, RaftlogError
from raftlog.net import rpc
from raftlog.net.rpc_cluster import ImageRequest, ReportRequest
from raftlog.net.rpc_repair import LogFramesRequest, SnapshotBytesRequest
from raftlog.net.rpc_transactions import WriteMarkersRequest
from raftlog.net.server import Reply, ServerConnection
from raftlog.state.command import UnknownCommand
from raftlog.state.metadata_commands import AddBroker, CreateTopic
from raftlog.version import software_version

if TYPE_CHECKING:
    from raftlog.broker.broker import Broker

logger = logging.getLogger("raftlog.broker")

_FOR_CONTROLLERS = (ImageRequest, ReportRequest)
_FOR_BROKERS = (LogFramesRequest, SnapshotBytesRequest, WriteMarkersRequest)


class Service:
    """The handler behind a broker's server.

    Args:
        broker: whose.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._handlers: dict[type[Any], Callable[[Any, memoryview, Reply], None]] = {
            rpc.ProduceRequest: self._produce,
            rpc.FetchRequest: self._fetch,
            rpc.ListOffsetsRequest: self._list_offsets,
            rpc.MetadataRequest: self._metadata,
            rpc.CreateTopicRequest: self._create_topic,
            rpc.DeleteTopicRequest: self._delete_topic,
            rpc.InitProducerRequest: self._init_producer,
            rpc.MetadataCommandRequest: self._metadata_command,
            rpc.JoinRequest: self._join,
            rpc.UpgradeRequest: self._upgrade,
            rpc.BrokerStatusRequest: self._status,
            LogFramesRequest: self._lend_frames,
            SnapshotBytesRequest: self._lend_snapshot,
        }
        self._coordination = Coordination(broker)
        self._handlers |= self._coordination.handlers
        self._handlers |= Governing(broker).handlers

    # -- Handler ---------------------------------------------------------------------------------------------

    def on_open(self, connection: ServerConnection) -> None:
        if not hasattr(self._broker, "metadata"):
            # it listens already, for others have to be told its address, and still reads its metadata
            raise Busy(f"broker {self._broker.broker_id} is starting")
        peer = connection.peer
        if peer.role == "broker" and peer.address is not None:
            self._broker.check_belongs(peer.broker_id)
            host, port = peer.address
            self._broker.learn({peer.broker_id: (peer.incarnation, host, port)})
            self._broker.peers.hurry(peer.broker_id)

    def on_request(
        self, connection: ServerConnection, request: rpc.Request[Any], payload: memoryview, reply: Reply
    ) -> None:
        if type(request) is rpc.MetadataCommandRequest and connection.peer.role == "client":
            raise ProtocolError("clients change metadata through requests of their own")
        if isinstance(request, _FOR_CONTROLLERS) and connection.peer.role != "controller":
            raise ProtocolError(f"{type(request).__name__} from a {connection.peer.role}")
        if isinstance(request, _FOR_BROKERS) and connection.peer.role != "broker":
            raise ProtocolError(f"{type(request).__name__} from a {connection.peer.role}")
        self._handlers[type(request)](request, payload, reply)

    def on_one_way(self, connection: ServerConnection, message: rpc.Struct, payload: memoryview) -> None:
        broker = self._broker
        if type(message) is rpc.ProduceRequest:
            self._take_unacknowledged(message, payload)
            return
        try:
            self._from_peer(connection, message, payload)
        except ProtocolError as error:
            # nothing that this peer sends can be trusted to follow from what it sent before
            logger.warning("broker %d closed %r: %s", broker.broker_id, connection, error)
            connection.close(error)

    def _from_peer(self, connection: ServerConnection, message: rpc.Struct, payload: memoryview) -> None:
        """Take what only brokers tell each other."""
        broker = self._broker
        if connection.peer.role != "broker":
            raise ProtocolError(f"{type(message).__name__} from a {connection.peer.role}")
        if type(message) is rpc.RaftMessages:
            broker.step(decode_messages(message, payload), connection.peer.broker_id)
        elif type(message) is rpc.BrokerHeartbeat:
            broker.pulse.heard(connection.peer.broker_id, connection.peer.incarnation, message)
        elif type(message) is rpc.Addresses:
            broker.learn(message.brokers)

    def on_close(self, connection: ServerConnection, error: Exception | None) -> None:
        self._coordination.connection_lost(connection)

    # -- records ---------------------------------------------------------------------------------------------

    def _produce(self, request: rpc.ProduceRequest, payload: memoryview, reply: Reply) -> None:
        partition, partitions = self._broker.partition, request.partitions
        if len(partitions) == 1 and not request.lengths:
            (to,) = partitions
            replica = partition(to.topic_id, to.partition)
            replica.produce(payload, partial(answer_batch, reply), to.before)
            return
        batches = split_batches(request, payload)
        answer = BatchAnswer(reply, list(map(len, batches)), self._broker.cycle)
        for number, (to, batch) in enumerate(zip(partitions, batches, strict=True)):
            try:
                replica = partition(to.topic_id, to.partition)
                replica.produce(batch, partial(answer.settle, number), to.before)
            except RaftlogError as error:
                answer.settle(number, None, error)
            except Exception as bug:  # noqa: BLE001 - what one batch met must not be told of the others
                message = f"error in taking a batch for partition {to.partition}"
                asyncio.get_running_loop().call_exception_handler({"message": message, "exception": bug})
                answer.settle(number, None, RaftlogError(f"internal error of the broker: {bug!r}"))

    def _take_unacknowledged(self, message: rpc.ProduceRequest, payload: memoryview) -> None:
        broker = self._broker
        try:
            batches = split_batches(message, payload)
        except ProtocolError as error:
            logger.warning("broker %d drops unacknowledged batches: %s", broker.broker_id, error)
            return
        for to, batch in zip(message.partitions, batches, strict=True):
            try:
                broker.partition(to.topic_id, to.partition).produce(batch, _nobody_waits)
            except RaftlogError as error:
                logger.debug("broker %d drops an unacknowledged batch: %s", broker.broker_id, error)

    def _fetch(self, request: rpc.FetchRequest, payload: memoryview, reply: Reply) -> None:
        broker = self._broker
        FetchSession(request, reply, broker.partition, broker.spawn, broker.counters).serve()

    def _list_offsets(self, request: rpc.ListOffsetsRequest, payload: memoryview, reply: Reply) -> None:
        self._broker.spawn(answer_with(reply, partial(self._find_offsets, request)))

    async def _find_offsets(self, request: rpc.ListOffsetsRequest) -> rpc.ListOffsetsResponse:
        answers = (self._answer_query(query, request.isolation) for query in request.queries)
        return rpc.ListOffsetsResponse(list(await asyncio.gather(*answers)))

    async def _answer_query(self, query: rpc.OffsetQuery, isolation: int) -> rpc.OffsetAnswer:
        try:
            return await self._find_offset(query, isolation)
        except RaftlogError as error:
            return rpc.OffsetAnswer(wire_error(error), -1, -1)

    async def _find_offset(self, query: rpc.OffsetQuery, isolation: int) -> rpc.OffsetAnswer:
        replica = self._broker.partition(query.topic_id, query.partition)
        # who reads "until the end" must get all that was acknowledged before, also by a later leader
        await replica.confirm_leadership()
        if query.timestamp_ms == rpc.OFFSET_EARLIEST:
            return rpc.OffsetAnswer(None, replica.machine.log_start, -1)
        if query.timestamp_ms == rpc.OFFSET_LATEST:
            return rpc.OffsetAnswer(None, readable_end(replica, isolation), -1)
        found = await replica.log.find_time(query.timestamp_ms, replica.node.applied)
        if found is None:
            return rpc.OffsetAnswer(None, readable_end(replica, isolation), -1)
        return rpc.OffsetAnswer(None, max(found, replica.machine.log_start), query.timestamp_ms)

    # -- metadata --------------------------------------------------------------------------------------------

    def _metadata(self, request: rpc.MetadataRequest, payload: memoryview, reply: Reply) -> None:
        broker_id = self._broker.broker_id
        if broker_id not in self._broker.metadata.image.brokers:
            # its image is of a time before it: that a topic is not in there says nothing
            raise Busy(f"broker {broker_id} does not have the metadata yet")
        missing = self._coordination.missing(request.topics or ())
        if missing:
            self._broker.spawn(answer_with(reply, partial(self._made, missing, request)))
        else:
            reply.ok(self._known(request))

    async def _made(self, missing: list[str], request: rpc.MetadataRequest) -> rpc.MetadataResponse:
        await self._broker.internal_topics.ensure(missing)
        return self._known(request)

    def _known(self, request: rpc.MetadataRequest) -> rpc.MetadataResponse:
        broker = self._broker
        service = broker.metadata
        image = service.image
        unknown = []
        if request.topics is None:
            topics = list(image.topics.values())
        else:
            topics = []
            for name in request.topics:
                topic = image.topics.get(name)
                if topic is None:
                    unknown.append(name)
                else:
                    topics.append(topic)
        leader = service.replica.leader_broker
        return rpc.MetadataResponse(
            cluster_id=broker.identity.cluster_id,
            brokers=broker.broker_rows(),
            topics=[service.row(topic, self._leader_of) for topic in topics],
            unknown_topics=unknown,
            version=image.applied_index,
            metadata_leader=-1 if leader is None else leader,
            metadata_term=service.replica.node.term,
        )

    def _leader_of(self, replica_id: int) -> tuple[int, int]:
        replica = self._broker.replica(replica_id)
        if replica is None or replica.leader_broker is None:
            return -1, 0
        return replica.leader_broker, replica.node.term

    def _create_topic(self, request: rpc.CreateTopicRequest, payload: memoryview, reply: Reply) -> None:
        self._broker.metadata.create_topic(request, partial(answer, reply))

    def _delete_topic(self, request: rpc.DeleteTopicRequest, payload: memoryview, reply: Reply) -> None:
        self._broker.metadata.delete_topic(request, partial(answer, reply))

    def _init_producer(self, request: rpc.InitProducerRequest, payload: memoryview, reply: Reply) -> None:
        if request.transactional_id is not None:
            raise ConfigError("a transactional id is opened with InitTransactions")
        self._broker.spawn(answer_with(reply, self._producer))

    async def _producer(self) -> rpc.InitProducerResponse:
        return rpc.InitProducerResponse(await self._broker.metadata.producer_id(), 0)

    def _metadata_command(
        self, request: rpc.MetadataCommandRequest, payload: memoryview, reply: Reply
    ) -> None:
        def done(result: Any, error: RaftlogError | None) -> None:
            if error is None and isinstance(result, RaftlogError):
                error = result
            if error is not None:
                reply.fail(error)
            else:
                reply.ok(rpc.MetadataCommandResponse(result, self._broker.metadata.image.applied_index))

        try:
            command = self._broker.metadata.image.codec.decode(payload)
        except UnknownCommand as error:
            raise ProtocolError(str(error)) from error
        if isinstance(command, CreateTopic):
            check_topic(command.name, len(command.assignment), command.config, internal=command.internal)
        self._broker.metadata.replica.command(command, done)

    def _upgrade(self, request: rpc.UpgradeRequest, payload: memoryview, reply: Reply) -> None:
        self._broker.metadata.upgrade(request, partial(answer, reply))

    def _join(self, request: rpc.JoinRequest, payload: memoryview, reply: Reply) -> None:
        self._broker.spawn(answer_with(reply, partial(self._add_broker, request)))

    async def _add_broker(self, request: rpc.JoinRequest) -> rpc.JoinResponse:
        if len(request.disk_id) != 16:
            raise ProtocolError(f"a disk id has 16 bytes, not {len(request.disk_id)}")
        broker = self._broker
        added, founders = await broker.metadata.call(
            AddBroker(request.disk_id, request.node_id, request.zone, request.level)
        )
        return rpc.JoinResponse(added.broker_id, added.metadata_replica, founders, dict(broker.peers.book))

    # -- repair ----------------------------------------------------------------------------------------------

    def _lend_frames(self, request: LogFramesRequest, payload: memoryview, reply: Reply) -> None:
        self._broker.spawn(_lend(reply, partial(self._broker.repairs.lend_frames, request)))

    def _lend_snapshot(self, request: SnapshotBytesRequest, payload: memoryview, reply: Reply) -> None:
        self._broker.spawn(_lend(reply, partial(self._broker.repairs.lend_snapshot, request)))

    # -- status ----------------------------------------------------------------------------------------------

    def _status(self, request: rpc.BrokerStatusRequest, payload: memoryview, reply: Reply) -> None:
        broker = self._broker
        wanted = None if request.topics is None else set(request.topics)
        rows = [
            broker.replica_row(replica)
            for replica in broker.replicas()
            if wanted is None or replica.log.spec.topic in wanted
        ]
        rows += [row for row in out_of_service_rows(broker) if wanted is None or row.topic in wanted]
        clients = sorted(
            {
                connection.peer.client_id
                for connection in broker.server.connections
                if connection.peer.role == "client"
            }
        )
        totals = broker.counters.totals()
        version, since = software_version(), broker.started_ms
        reply.ok(rpc.BrokerStatusResponse(broker.row(), rows, clients, version, since, totals))


async def _lend(reply: Reply, work: Callable[[], Coroutine[Any, Any, tuple[rpc.Struct, bytes]]]) -> None:
    """Answer a broker that repairs a replica; what fails here it finds elsewhere."""
    try:
        answer, data = await work()
    except RaftlogError as error:
        reply.fail(error)
    else:
        reply.ok(answer, (data,))


def _nobody_waits(result: Any, error: RaftlogError | None) -> None:
    """acks=0: the outcome goes nowhere."""
