"""What a broker answers about groups and transactions: one method per request, on behalf of ``Service``.

A request names the partition of the internal topic that it is for; the replica of that which is here decides,
or says who leads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from raftlog.broker.answers import answer, answer_with
from raftlog.broker.coordinator_replica import CoordinatorReplica
from raftlog.broker.group_replica import GroupReplica
from raftlog.broker.internal_topics import COORDINATED
from raftlog.broker.transaction_replica import TransactionReplica
from raftlog.errors import InvalidTopic
from raftlog.net import rpc
from raftlog.net import rpc_transactions as txn
from raftlog.net.server import Reply, ServerConnection

if TYPE_CHECKING:
    from raftlog.broker.broker import Broker

C = TypeVar("C", bound=CoordinatorReplica[Any])
Handler = Callable[[Any, memoryview, Reply], None]


class Coordination:
    """The handlers of these requests.

    Args:
        broker: whose.

    Attributes:
        handlers: request -> what serves it.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.handlers: dict[type[Any], Handler] = {
            rpc.GroupHeartbeatRequest: self._heartbeat,
            rpc.OffsetCommitRequest: self._decided(GroupReplica, GroupReplica.commit),
            rpc.OffsetFetchRequest: self._read(GroupReplica, GroupReplica.fetch),
            rpc.DescribeGroupsRequest: self._read(GroupReplica, GroupReplica.describe),
            rpc.DeleteGroupRequest: self._decided(GroupReplica, GroupReplica.delete),
            rpc.StageOffsetsRequest: self._decided(GroupReplica, GroupReplica.stage),
            rpc.DeleteOffsetsRequest: self._decided(GroupReplica, GroupReplica.delete_offsets),
            txn.InitTransactionsRequest: self._decided(TransactionReplica, TransactionReplica.init),
            txn.EnlistRequest: self._decided(TransactionReplica, TransactionReplica.enlist),
            txn.EndTransactionRequest: self._decided(TransactionReplica, TransactionReplica.end),
            txn.DescribeTransactionsRequest: self._read(TransactionReplica, TransactionReplica.describe),
            txn.AbortTransactionRequest: self._read(TransactionReplica, _abort),
            txn.WriteMarkersRequest: self._write_markers,
            txn.OpenTransactionsRequest: self._open_transactions,
        }

    def _find(self, request: Any, kind: type[C]) -> C:
        found = self._broker.place_of(request.topic_id, request.partition)
        if not isinstance(found, kind):
            raise InvalidTopic(f"{found.name} is not a place for {type(request).__name__}")
        return found

    def _decided(self, kind: type[C], serve: Callable[[C, Any, Any], None]) -> Handler:
        """A handler for requests that are answered when what was decided is committed."""

        def handle(request: Any, payload: memoryview, reply: Reply) -> None:
            serve(self._find(request, kind), request, partial(answer, reply))

        return handle

    def _read(self, kind: type[C], serve: Callable[[C, Any], Coroutine[Any, Any, rpc.Struct]]) -> Handler:
        """A handler for requests that are answered once the leadership is confirmed."""

        def handle(request: Any, payload: memoryview, reply: Reply) -> None:
            self._broker.spawn(answer_with(reply, partial(serve, self._find(request, kind), request)))

        return handle

    # -- groups ----------------------------------------------------------------------------------------------

    def _heartbeat(self, request: rpc.GroupHeartbeatRequest, payload: memoryview, reply: Reply) -> None:
        connection = reply.connection
        assert connection is not None, "it is not answered yet"
        self._find(request, GroupReplica).heartbeat(
            request, connection.remote, connection, partial(answer, reply)
        )

    def connection_lost(self, connection: ServerConnection) -> None:
        """A client is gone: so are, soon, the members that were heard of on its connection."""
        for replica in self._broker.replicas():
            if isinstance(replica, GroupReplica):
                replica.connection_lost(connection)

    # -- transactions ----------------------------------------------------------------------------------------

    def _write_markers(self, request: txn.WriteMarkersRequest, payload: memoryview, reply: Reply) -> None:
        self._broker.markers.write(request.markers, lambda errors: reply.ok(txn.WriteMarkersResponse(errors)))

    def _open_transactions(
        self, request: txn.OpenTransactionsRequest, payload: memoryview, reply: Reply
    ) -> None:
        self._broker.spawn(answer_with(reply, partial(self._find_open, request)))

    async def _find_open(self, request: txn.OpenTransactionsRequest) -> txn.OpenTransactionsResponse:
        replica = self._broker.partition(request.topic_id, request.partition)
        await replica.confirm_leadership()
        machine = replica.machine
        rows = [
            txn.OpenTransactionRow(producer_id, each.epoch, each.first_offset, each.start_ms)
            for producer_id, each in machine.open_transactions()
        ]
        return txn.OpenTransactionsResponse(machine.last_stable_offset, replica.committed_offset, rows)

    # -- topics ----------------------------------------------------------------------------------------------

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those internal topics among them that have to be made first."""
        known = self._broker.metadata.image.topics
        return [name for name in COORDINATED if name in names and name not in known]


async def _abort(replica: TransactionReplica, request: txn.AbortTransactionRequest) -> rpc.Struct:
    """An operator's abort; waits until it is carried out."""
    done: asyncio.Future[rpc.Struct] = asyncio.get_running_loop().create_future()

    def told(result: Any, error: Exception | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)

    await replica.abort(request, told)
    return await done
