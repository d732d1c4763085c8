"""Late copies: requests of clients and coordinators that arrive once more, when everybody has moved on.

A connection keeps order and doubles nothing, but a request that was given up on one connection may still be
on its way when its repetition, and much else, has come by another. So each message must name what it is
about so well that it can do no harm later. Here random requests of the last seconds are sent again to whoever
leads their partition now. Not those that were refused: whoever was told so may rely on it, for no connection
delivers a request once more after its answer.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

from raftlog.broker.group_replica import GroupReplica
from raftlog.broker.partition import PartitionReplica
from raftlog.broker.produce import split_batches
from raftlog.broker.replica import Replica
from raftlog.errors import RaftlogError, from_wire
from raftlog.net.connection import Answered, RpcConnection
from raftlog.net.handshake import Local
from raftlog.net.rpc import (
    JOIN_EPOCH,
    LEAVE_EPOCH,
    GroupHeartbeatRequest,
    ProduceRequest,
    ProduceResponse,
    StageOffsetsRequest,
)
from raftlog.net.rpc_transactions import EndTransactionRequest, EnlistRequest, MarkerRow, WriteMarkersRequest
from raftlog.record.control import Marker
from raftlog.record.frame import Buffer
from raftlog.testing.sim_cluster import PORT, SimCluster, broker_name

NODE: Final = "echo"
KEPT_MAX: Final = 40
"""How many requests of its kind ago an echo comes from at most."""
_CALL_S: Final = 1.0
_ECHOED: Final = (
    StageOffsetsRequest,
    EndTransactionRequest,
    EnlistRequest,
    GroupHeartbeatRequest,
    WriteMarkersRequest,
)
_Answer: TypeAlias = "asyncio.Future[Any]"
_Message: TypeAlias = tuple[Any, tuple[bytes, ...], _Answer]


class Echo:
    """Listens to all connections and repeats some of what it heard.

    Args:
        cluster: whose.
        rng: decides what, and when.
        counts: what it did.
    """

    def __init__(self, cluster: SimCluster, rng: random.Random, counts: Counter[str]) -> None:
        self.counts = counts
        self._cluster = cluster
        self._random = rng
        self._heard: dict[type[Any], deque[_Message]] = {}
        self._connections: dict[int, RpcConnection] = {}
        self._before: tuple[Any, Any] | None = None
        """What connections had before this listened to them."""

    def start(self) -> None:
        """Listen, and repeat."""
        request, ask = self._before = RpcConnection.request, RpcConnection.ask

        def requested(connection: RpcConnection, message: Any, payload: Sequence[Buffer] = ()) -> Any:
            answer = request(connection, message, payload)
            if isinstance(message, _ECHOED) and _is_harmless(message):
                self._note(message, tuple(bytes(part) for part in payload), answer)
            return answer

        def asked(
            connection: RpcConnection, message: Any, payload: Sequence[Buffer], answered: Answered[Any]
        ) -> None:
            if isinstance(message, ProduceRequest):
                answered = self._note_batches(message, b"".join(payload), answered)
            ask(connection, message, payload, answered)

        setattr(RpcConnection, "request", requested)  # noqa: B010 - a method, to type checkers
        setattr(RpcConnection, "ask", asked)  # noqa: B010
        self._cluster.loop.run_as(NODE, self._repeat())

    def stop(self) -> None:
        """Repeat nothing more."""
        if self._before is not None:
            request, ask = self._before
            setattr(RpcConnection, "request", request)  # noqa: B010
            setattr(RpcConnection, "ask", ask)  # noqa: B010
            self._before = None
            self._cluster.loop.kill(NODE)

    def _note(self, message: Any, payload: tuple[bytes, ...], answer: _Answer) -> None:
        self._heard.setdefault(type(message), deque(maxlen=KEPT_MAX)).append((message, payload, answer))

    def _note_batches(self, message: ProduceRequest, sent: bytes, answered: Answered[Any]) -> Answered[Any]:
        """Each batch of a request may come late by itself; returns who is to be told the answer."""
        answers: list[_Answer] = []
        for to, batch in zip(message.partitions, split_batches(message, memoryview(sent)), strict=True):
            answers.append(self._cluster.loop.create_future())
            self._note(ProduceRequest([to]), (bytes(batch),), answers[-1])

        def told(response: Any, data: memoryview | None, error: RaftlogError | None) -> None:
            settle_batches(answers, response, error)
            answered(response, data, error)

        return told

    async def _repeat(self) -> None:
        rng = self._random
        tasks: set[asyncio.Task[None]] = set()
        while True:
            await asyncio.sleep(rng.choice([0.005, 0.05, 0.2]))
            if not self._heard:
                continue
            message, payload, answer = rng.choice(self._heard[rng.choice(list(self._heard))])
            if may_come_late(answer):
                self.counts[f"{type(message).__name__} came late"] += 1
                task = asyncio.get_running_loop().create_task(self._try(message, payload))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

    async def _try(self, message: Any, payload: tuple[bytes, ...]) -> None:
        try:
            await self._again(message, payload)
        except RaftlogError as error:
            self.counts[f"late {type(error).__name__}"] += 1

    async def _again(self, message: Any, payload: tuple[bytes, ...]) -> None:
        if isinstance(message, WriteMarkersRequest):
            for row in message.markers:
                self._mark(row)
            return
        to = message.partitions[0] if isinstance(message, ProduceRequest) else message
        leader = self._leader((to.topic_id, to.partition))
        if leader is not None:
            connection = await self._connection(leader[0])
            await connection.call(message, payload, timeout=_CALL_S)

    def _mark(self, row: MarkerRow) -> None:
        """A marker comes once more; of brokers only, so it is handed over."""
        leader = self._leader((row.topic_id, row.partition))
        if leader is None:
            return
        broker_id, replica = leader
        assert isinstance(replica, PartitionReplica | GroupReplica), replica
        marker = Marker(row.producer_id, row.epoch, row.coordinator_epoch, row.commit)
        with self._cluster.loop.node(broker_name(broker_id)):
            replica.write_marker(marker, _nobody_waits)

    def _leader(self, place: tuple[bytes, int]) -> tuple[int, Replica[Any]] | None:
        for broker_id, broker in self._cluster.brokers.items():
            replica = broker.hosting.by_place.get(place)
            if replica is not None and replica.staged is not None:
                return broker_id, replica
        return None

    async def _connection(self, broker_id: int) -> RpcConnection:
        known = self._connections.get(broker_id)
        if known is None or known.closed:
            cluster = self._cluster
            known = self._connections[broker_id] = await RpcConnection.open(
                cluster.seams(NODE, NODE),
                broker_name(broker_id),
                PORT,
                Local(cluster.plan.cluster_id, "client", -1, NODE),
                cluster.plan.secret,
                timeout=_CALL_S,
            )
        return known


def settle_batches(
    answers: Sequence[_Answer], response: ProduceResponse | None, error: RaftlogError | None
) -> None:
    """Note what the sender of batches is told.

    Args:
        answers: one for each batch of the request.
        response: the answer, or a part of it.
        error: or why there is none to what is left.
    """
    left = [number for number, answer in enumerate(answers) if not answer.done()]
    if response is None:
        assert error is not None, "an answer is a response or an error"
        for number in left:
            _refuse(answers[number], error)
        return
    for number, produced in zip(response.numbers or left, response.batches, strict=True):
        if produced.error is None:
            answers[number].set_result(produced)
        else:
            refusal = produced.error
            _refuse(answers[number], from_wire(refusal.name, refusal.message, refusal.details))


def _refuse(answer: _Answer, error: RaftlogError) -> None:
    answer.set_exception(error)
    answer.exception()  # nobody else looks at it


def may_come_late(answer: _Answer) -> bool:
    """Whether a copy of a request can still be on its way, by what its sender was told: that it was carried
    out, or nothing. (Its sender may repeat it then, and the copy is of the first attempt.)

    Args:
        answer: to the request.
    """
    if not answer.done():
        return False  # it may be refused yet
    error = None if answer.cancelled() else answer._exception  # exception() would count as having seen it
    return error is None or (isinstance(error, RaftlogError) and error.indeterminate)


def _is_harmless(message: Any) -> bool:
    """Whether a late copy must change nothing. One that joins a group makes a member that nobody is."""
    return not isinstance(message, GroupHeartbeatRequest) or message.member_epoch not in (
        JOIN_EPOCH,
        LEAVE_EPOCH,
    )


def _nobody_waits(result: Any, error: RaftlogError | None) -> None:
    pass
