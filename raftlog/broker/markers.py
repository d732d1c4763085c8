"""Markers: how a coordinator's word reaches the partitions of a transaction.

A marker goes to the leader of its partition, on this broker or another, and again, with growing intervals,
until that partition has it or needs it no more. Markers for the same partition that are due in the same turn
of the loop travel together. Those for different partitions do not, for the answer comes when all are
committed, and a partition without a leader must hold up nobody else's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

from raftlog.broker.fetch import wire_error
from raftlog.broker.replica import Done
from raftlog.errors import (
    InvalidTransaction,
    LeadershipLost,
    NotLeader,
    ProducerFenced,
    RaftlogError,
    StaleCoordinator,
    from_wire,
)
from raftlog.net.rpc import Request, WireError
from raftlog.net.rpc_transactions import MarkerRow, WriteMarkersRequest, WriteMarkersResponse
from raftlog.record.control import Marker
from raftlog.state.metadata import MetadataState
from raftlog.state.transactions import Target

logger = logging.getLogger("raftlog.broker")

_TIMEOUT_S: Final = 5.0
_BACKOFF_MIN_S: Final = 0.01
_BACKOFF_MAX_S: Final = 1.0
_MARKERS_MAX: Final = 1_000
"""In one request."""
_FINAL: Final = (ProducerFenced, InvalidTransaction, StaleCoordinator)
"""Answers that no repetition changes."""

Landed: TypeAlias = Callable[[RaftlogError | None], None]
"""Told that the partition has the marker, or for which of the final reasons it does not take it; or
LeadershipLost: the coordinator has given up, and it may or may not have it."""


class MarkedReplica(Protocol):
    """A partition's replica that takes markers."""

    def write_marker(self, marker: Marker, done: Done) -> None:
        """Log it; ``done`` hears when it is applied."""


class MarkersHost(Protocol):
    """What is needed of the broker."""

    @property
    def broker_id(self) -> int: ...

    @property
    def image(self) -> MetadataState: ...

    def marked(self, topic_id: bytes, partition: int) -> MarkedReplica: ...

    def known_leader(self, topic_id: bytes, partition: int) -> int | None: ...

    async def ask_broker(self, broker_id: int, request: Request[Any], timeout: float) -> Any: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> object: ...


@dataclass(slots=True, eq=False)
class _Errand:
    row: MarkerRow
    landed: Landed
    is_wanted: Callable[[], bool]
    attempts: int = 0


class Markers:
    """The markers that leave one broker, and those that reach it.

    Args:
        host: the broker.
    """

    def __init__(self, host: MarkersHost) -> None:
        self._host = host
        self._outbox: dict[Target, list[_Errand]] = {}
        self._leaders: dict[Target, int] = {}
        """Who led a partition of which no replica is here, as far as was heard."""
        self._scheduled = False

    # -- out -------------------------------------------------------------------------------------------------

    def send(self, row: MarkerRow, landed: Landed, is_wanted: Callable[[], bool]) -> None:
        """Have a marker written.

        Args:
            row: what and where. If the topic is not in this broker's image, it counts as deleted: whoever
                sends has seen to it that the image is new enough.
            landed: called once, never from in here.
            is_wanted: whether the coordinator leads still; asked before each attempt.
        """
        self._put(_Errand(row, landed, is_wanted))

    def _put(self, errand: _Errand) -> None:
        row = errand.row
        self._outbox.setdefault((row.topic_id, row.partition), []).append(errand)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        outbox, self._outbox = self._outbox, {}
        for target, waiting in outbox.items():
            errands: list[_Errand] = []
            for errand in waiting:
                if errand.is_wanted():
                    errands.append(errand)
                else:
                    errand.landed(LeadershipLost("the coordinator of the transaction was replaced"))
            for start in range(0, len(errands), _MARKERS_MAX):
                self._carry(target, errands[start : start + _MARKERS_MAX])

    def _carry(self, target: Target, errands: list[_Errand]) -> None:
        broker_id = self._route(target, errands[0].attempts)
        if broker_id is None:
            self._leaders.pop(target, None)
            for errand in errands:
                errand.landed(None)  # the topic was deleted
        elif broker_id == self._host.broker_id:
            self.write(
                [errand.row for errand in errands], partial(self._answered, target, broker_id, errands)
            )
        else:
            self._host.spawn(self._call(target, broker_id, errands))

    def _route(self, target: Target, attempts: int) -> int | None:
        """Which broker to ask; None: there is no such partition any more."""
        topic = self._host.image.topic_by_id(target[0])
        if topic is None:
            return None
        leader = self._leaders.get(target)
        if leader is None:
            leader = self._host.known_leader(*target)
        if leader is not None:
            return leader
        members = topic.partitions[target[1]].members
        return members[attempts % len(members)][1]

    async def _call(self, target: Target, broker_id: int, errands: list[_Errand]) -> None:
        request = WriteMarkersRequest([errand.row for errand in errands])
        try:
            response: WriteMarkersResponse = await self._host.ask_broker(broker_id, request, _TIMEOUT_S)
        except RaftlogError as error:
            self._answered(target, broker_id, errands, [wire_error(error)] * len(errands))
        else:
            self._answered(target, broker_id, errands, response.errors)

    def _answered(
        self, target: Target, asked: int, errands: list[_Errand], errors: Sequence[WireError | None]
    ) -> None:
        for errand, answer in zip(errands, errors, strict=True):
            error = None if answer is None else from_wire(answer.name, answer.message, answer.details)
            if error is None or isinstance(error, _FINAL):
                errand.landed(error)
            else:
                self._again(target, asked, errand, error)

    def _again(self, target: Target, asked: int, errand: _Errand, error: RaftlogError) -> None:
        leader = error.details.get("leader") if isinstance(error, NotLeader) else None
        if leader is not None and leader != asked:
            self._leaders[target] = leader
        else:
            self._leaders.pop(target, None)
        logger.debug("marker %s for %s, at broker %d: %s", errand.row, target, asked, error)
        errand.attempts += 1
        delay = min(_BACKOFF_MIN_S * 2 ** min(errand.attempts, 10), _BACKOFF_MAX_S)
        asyncio.get_running_loop().call_later(delay, self._put, errand)

    # -- in --------------------------------------------------------------------------------------------------

    def write(self, rows: Sequence[MarkerRow], done: Callable[[list[WireError | None]], None]) -> None:
        """Write markers to partitions that are led here; ``done`` hears how that went, one by one, when all
        are committed or refused."""
        errors: list[WireError | None] = [None] * len(rows)
        left = len(rows)

        def told(position: int, result: Any, error: RaftlogError | None) -> None:
            nonlocal left
            errors[position] = None if error is None else wire_error(error)
            left -= 1
            if not left:
                done(errors)

        if not rows:
            done(errors)
        for position, row in enumerate(rows):
            marker = Marker(row.producer_id, row.epoch, row.coordinator_epoch, row.commit)
            try:
                replica = self._host.marked(row.topic_id, row.partition)
                replica.write_marker(marker, partial(told, position))
            except RaftlogError as error:
                told(position, None, error)
