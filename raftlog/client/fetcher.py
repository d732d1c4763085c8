"""Fetching ahead: long polls to every leader, for the partitions that have room.

A request carries all partitions of one leader that are due. A partition that becomes due while another
request to that leader is waiting (after a seek, say) gets a request of its own at once. Runs on the loop, in
callbacks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import partial
from threading import Lock
from typing import Any

from raftlog.client.assigned import COMMITTED, AssignedPartition, end_of
from raftlog.client.cluster import ClusterClient
from raftlog.client.metadata import PartitionView
from raftlog.client.offsets import ISOLATIONS, RESETS, OffsetFinder
from raftlog.client.retry import BACKOFF, is_retriable
from raftlog.config import ConsumerConfig
from raftlog.errors import (
    ConnectionLost,
    NotLeader,
    OffsetOutOfRange,
    RaftlogError,
    UnknownReplica,
    UnknownTopic,
    from_wire,
)
from raftlog.net.connection import RpcConnection
from raftlog.net.rpc import FetchedPartition, FetchPartition, FetchRequest, FetchResponse, GroupOffset

_FETCHED = asyncio.Future[tuple[FetchResponse, memoryview]]
_Asked = list[tuple[AssignedPartition, int]]
"""Partitions with their epochs when they were asked for."""
CommittedOffsets = Callable[[Sequence[PartitionView]], Awaitable[dict[PartitionView, GroupOffset]]]
"""What the consumer's group has committed of these; those without are left out."""


class Fetcher:
    """Keeps the assigned partitions filled.

    Args:
        cluster: whose loop this runs on.
        loop: that loop.
        config: the consumer's settings.
        lock: guards what fetcher and consumer both touch.
        arrived: called when there is something new for the consumer: records, an error, or a position.
        call_soon: the loop's ``call_soon``, or ``call_soon_threadsafe`` where another thread polls.
        committed: looks up what is COMMITTED; None: there is no group.
    """

    def __init__(
        self,
        cluster: ClusterClient,
        loop: asyncio.AbstractEventLoop,
        config: ConsumerConfig,
        lock: Lock,
        arrived: Callable[[], None],
        call_soon: Callable[..., Any],
        committed: CommittedOffsets | None = None,
    ) -> None:
        self._cluster = cluster
        self._loop = loop
        self._config = config
        self._lock = lock
        self._arrived = arrived
        self._call_soon = call_soon
        self._committed = committed
        self._isolation = ISOLATIONS[config.isolation]
        self.offsets = OffsetFinder(cluster, self._isolation)
        self._partitions: list[AssignedPartition] = []
        self._turn = 0
        self._woken = False
        self._timer: asyncio.TimerHandle | None = None
        self._sought: set[PartitionView] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    def assign(self, partitions: Iterable[AssignedPartition]) -> None:
        """Fetch these from now on, and no others; from any thread."""
        self._partitions = list(partitions)
        self.wake()

    def wake(self) -> None:
        """Something is due, or has room again; from any thread."""
        if not self._woken and not self._stopped:
            self._woken = True
            self._call_soon(self._pump)

    def stop(self) -> None:
        """Fetch nothing more."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    # -- asking ----------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Ask for every partition that is due."""
        self._woken = False
        if self._stopped:
            return
        now = self._loop.time()
        by_connection: dict[RpcConnection, list[AssignedPartition]] = {}
        for each in self._due(now):
            connection = self._cluster.route(each.view)
            if connection is None:
                self._seek(each.view)
            else:
                by_connection.setdefault(connection, []).append(each)
        for connection, partitions in by_connection.items():
            self._ask(connection, partitions)
        later = [each.pause_until for each in self._partitions if each.pause_until > now]
        if later:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(min(later), self._pump)

    def _due(self, now: float) -> list[AssignedPartition]:
        room = self._config.prefetch_bytes - sum(each.buffered for each in self._partitions)
        share = self._config.prefetch_bytes // max(len(self._partitions), 1)
        self._turn += 1
        turn = self._turn % max(len(self._partitions), 1)  # who comes first gets the bytes of a full answer
        due, unknown = [], []
        for each in self._partitions[turn:] + self._partitions[:turn]:
            if each.fetching or each.error is not None or each.pause_until > now:
                continue
            if each.position is None:
                unknown.append(each)  # also of a paused one: it may be asked for
            elif each.paused:
                continue
            elif each.buffered == 0 or (room > 0 and each.buffered < share):
                due.append(each)
        if unknown:
            self._look_up(unknown)
        return due

    def _ask(self, connection: RpcConnection, partitions: list[AssignedPartition]) -> None:
        config = self._config
        asked: _Asked = []
        rows = []
        with self._lock:
            for each in partitions:
                each.fetching = True
                asked.append((each, each.epoch))
                view = each.view
                rows.append(
                    FetchPartition(
                        view.topic_id,
                        view.index,
                        each.fetch_offset,
                        each.last_term,
                        config.partition_fetch_bytes,
                    )
                )
        future = connection.request(
            FetchRequest(config.fetch_wait_ms, config.fetch_bytes_max, rows, self._isolation)
        )
        patience = (config.fetch_wait_ms + config.request_timeout_ms) / 1000
        timer = self._loop.call_later(patience, connection.close)
        future.add_done_callback(partial(self._fetched, connection, asked, self._loop.time(), timer))

    def _seek(self, view: PartitionView) -> None:
        if view not in self._sought:
            self._sought.add(view)
            self._cluster.seek_leader(view).add_done_callback(partial(self._found, view))

    def _found(self, view: PartitionView, future: asyncio.Future[RpcConnection]) -> None:
        self._sought.discard(view)
        error = future.exception()
        if self._stopped:
            return
        if isinstance(error, Exception):
            for each in self._partitions:
                if each.view is view:
                    self._fail(each, each.epoch, error)
            self._arrived()
        else:
            self._pump()

    # -- answers ---------------------------------------------------------------------------------------------

    def _fetched(
        self,
        connection: RpcConnection,
        asked: _Asked,
        asked_at: float,
        timer: asyncio.TimerHandle,
        future: _FETCHED,
    ) -> None:
        timer.cancel()
        error = ConnectionLost("cancelled") if future.cancelled() else future.exception()
        if self._stopped:
            return
        waited = self._loop.time() - asked_at
        if error is None:
            response, payload = future.result()
            self._take(connection, asked, response.partitions, payload, waited)
        elif isinstance(error, RaftlogError):
            for each, epoch in asked:
                self._refused(connection, each, epoch, error)
        else:
            raise error
        self._arrived()
        self._pump()

    def _take(
        self,
        connection: RpcConnection,
        asked: _Asked,
        rows: list[FetchedPartition],
        payload: memoryview,
        waited: float,
    ) -> None:
        at = 0
        for (each, epoch), row in zip(asked, rows, strict=True):
            chunk = payload[at : at + row.length]
            at += row.length
            if row.error is not None:
                error = from_wire(row.error.name, row.error.message, row.error.details)
                self._refused(connection, each, epoch, error)
                continue
            try:
                end = end_of(chunk) if row.length else None
            except RaftlogError as error:
                self._fail(each, epoch, error)
                continue
            with self._lock:
                if each.epoch == epoch:
                    self._add(each, row, chunk, end, waited)

    def _add(
        self,
        each: AssignedPartition,
        row: FetchedPartition,
        chunk: memoryview,
        end: tuple[int, int] | None,
        waited: float,
    ) -> None:
        each.fetching = False
        if end is not None and end[0] > each.fetch_offset:
            each.fetch_offset, each.last_term = end
            each.chunks.append((chunk, row.aborted))
            each.buffered += len(chunk)
            each.failures = 0
        elif waited < self._config.fetch_wait_ms / 2000:
            # nothing new, yet an answer at once (others in the request had records, or an entry that is no
            # batch)
            each.failures += 1
            if each.failures > 1:
                delay = BACKOFF.delay(each.failures - 1, self._cluster.seams.random)
                each.pause_until = self._loop.time() + delay

    def _refused(
        self, connection: RpcConnection, each: AssignedPartition, epoch: int, error: RaftlogError
    ) -> None:
        if not is_retriable(error):
            self._fail(each, epoch, error)
            return
        view = each.view
        if isinstance(error, NotLeader):
            self._cluster.note_refusal(view, connection, error)
        elif isinstance(error, UnknownReplica):
            view.deny(connection.peer.broker_id, view.term)
        with self._lock:
            if each.epoch == epoch:
                each.fetching = False
                each.failures += 1
                if each.failures > 1:
                    delay = BACKOFF.delay(each.failures - 1, self._cluster.seams.random)
                    each.pause_until = self._loop.time() + delay

    def _fail(self, each: AssignedPartition, epoch: int, error: Exception) -> None:
        with self._lock:
            if each.epoch == epoch:
                each.fetching = False
                each.error = error

    # -- looking up offsets ----------------------------------------------------------------------------------

    def _look_up(self, partitions: Iterable[AssignedPartition]) -> None:
        """Find out where these begin to be read."""
        of_group: _Asked = []
        for each in partitions:
            if each.resolving:
                continue
            if each.reset is None:
                self._fail(
                    each,
                    each.epoch,
                    OffsetOutOfRange(
                        f"{each.view}: there is no position, and auto_offset_reset is 'none': seek first"
                    ),
                )
                self._arrived()
                continue
            each.resolving = True
            if each.reset == COMMITTED:
                of_group.append((each, each.epoch))
            else:
                self._spawn(self._resolve(each, each.epoch, each.reset))
        if of_group:
            self._spawn(self._resolve_committed(of_group))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _resolve(self, each: AssignedPartition, epoch: int, what: int) -> None:
        try:
            offset = await self.offsets.find(each.view, what)
        except RaftlogError as error:
            self._unresolved([(each, epoch)], error)
        else:
            with self._lock:
                if each.epoch == epoch:
                    each.jump(offset)
        finally:
            each.resolving = False
        self._arrived()
        self._pump()

    async def _resolve_committed(self, asked: _Asked) -> None:
        """All partitions at once: a member may get hundreds."""
        assert self._committed is not None, "COMMITTED is looked up in groups only"
        reset = RESETS[self._config.auto_offset_reset]
        try:
            found = await self._committed([each.view for each, _ in asked])
        except RaftlogError as error:
            self._unresolved(asked, error)
        else:
            with self._lock:
                for each, epoch in asked:
                    if each.epoch == epoch:
                        offset = found.get(each.view)
                        if offset is None:
                            each.jump(None, reset)
                        else:
                            each.jump(offset.offset, last_term=offset.leader_epoch)
                            each.saved = offset.offset
        finally:
            for each, _ in asked:
                each.resolving = False
        self._arrived()
        self._pump()

    def _unresolved(self, asked: _Asked, error: RaftlogError) -> None:
        if is_retriable(error) and not isinstance(error, UnknownTopic):
            with self._lock:
                for each, _ in asked:
                    each.pause_until = self._loop.time() + BACKOFF.most_s
        else:
            for each, epoch in asked:
                self._fail(each, epoch, error)
