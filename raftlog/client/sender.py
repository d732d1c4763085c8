"""The producer's I/O: from the accumulator through each partition's window to the leader's connection, and
back.

Everything here runs on the loop, in callbacks: no task per batch. One timer ends lingering, one watches
deadlines:

- a batch not acknowledged within its delivery timeout fails (*indeterminate* if it may have been written);
- an answer that is late makes the client ask in the background who leads now, and a newer term's leader gets
  at once what the old one never answered (the partition's state tells what it has already);
- one that does not come within the request timeout closes the connection, which is as good as dead.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from raftlog.client.accumulator import NO_SEQUENCE, Accumulator, PartitionQueue, ProducerBatch
from raftlog.client.cluster import ClusterClient
from raftlog.client.delivery import NO_OFFSET
from raftlog.client.identities import Identities
from raftlog.client.identity_pool import Place
from raftlog.client.metadata import NO_LEADER, PartitionView
from raftlog.client.outbox import Flight, Outbox
from raftlog.client.retry import BACKOFF
from raftlog.client.window import Identity, Verdict
from raftlog.errors import (
    Busy,
    Closed,
    ConnectionLost,
    DeliveryTimeout,
    LeadershipLost,
    NotLeader,
    OutOfOrderSequence,
    ProtocolError,
    RaftlogError,
    StorageFull,
    UnknownReplica,
    UnknownTopic,
    from_wire,
)
from raftlog.net.connection import RpcConnection
from raftlog.net.rpc import Produced, ProducePartition, ProduceResponse
from raftlog.record.batch import Compression

log = logging.getLogger("raftlog.client")

LATE_ANSWER_S: Final = 0.5
WATCH_S: Final = 0.25
UNSENT_BYTES_MAX: Final = 1024 * 1024
"""With acks=0 nothing but the socket's buffer slows a producer down."""
UNACKNOWLEDGED_METADATA_AGE_S: Final = 1.0
"""With acks=0 nobody says that the leader has moved."""


class Sender:
    """Sends what its accumulator gathers.

    Args:
        cluster: whose loop this runs on.
        identities: under which identities it writes; None for acks=0: written to the socket counts as
            delivered.
        linger_s: how long an open batch waits for more records.
        delivery_timeout_s: from the first record of a batch until it must be settled.
        request_timeout_s: how long to wait for one answer.
        compression: of batches.
        buffer_bytes: of the accumulator.
        call_soon: the loop's ``call_soon``, or ``call_soon_threadsafe`` where other threads append.
    """

    def __init__(
        self,
        cluster: ClusterClient,
        loop: asyncio.AbstractEventLoop,
        *,
        identities: Identities | None,
        linger_s: float,
        delivery_timeout_s: float,
        request_timeout_s: float,
        compression: Compression,
        buffer_bytes: int,
        call_soon: Callable[..., Any],
    ) -> None:
        self._cluster = cluster
        self._loop = loop
        self._linger_s = linger_s
        self._delivery_timeout_s = delivery_timeout_s
        self._request_timeout_s = request_timeout_s
        self._compression = compression
        self._identities = identities
        self._transactional = identities is not None and identities.transactional
        self._advance = self._advance_unacknowledged if identities is None else self._advance_window
        self._outbox = Outbox(None if identities is None else self._answered)
        self.accumulator = Accumulator(loop, buffer_bytes=buffer_bytes, wake=lambda: call_soon(self._pump))
        self.failed: deque[ProducerBatch] = deque()
        """Batches that failed, for who asks at the next flush."""
        self._active: dict[PartitionQueue, None] = {}
        self._by_view: dict[PartitionView, PartitionQueue] = {}
        self._lingering: deque[ProducerBatch] = deque()
        self._linger_timer: asyncio.TimerHandle | None = None
        self._watch_timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False
        cluster.leaders_changed.add(self._leaders_changed)
        if identities is None:
            cluster.metadata_age_s = min(cluster.metadata_age_s, UNACKNOWLEDGED_METADATA_AGE_S)

    def stop(self) -> None:
        """Give up everything that is not settled."""
        self._stopped = True
        self.accumulator.close()
        self._cluster.leaders_changed.discard(self._leaders_changed)
        for timer in (self._linger_timer, self._watch_timer):
            if timer is not None:
                timer.cancel()
        for task in self._tasks:
            task.cancel()
        unsettled = self.accumulator.unsettled()
        if self._identities is not None:
            self._identities.close(None if unsettled else self._sequences())
        error = Closed("the producer was closed before this was delivered")
        for batch in unsettled:
            self._fail(batch, error)

    def _sequences(self) -> dict[Place, tuple[Identity, int]] | None:
        """Identity and next sequence of each partition written to; None if one is not certain."""
        found: dict[Place, tuple[Identity, int]] = {}
        for view, queue in self._by_view.items():
            window = queue.window
            if window.broken:
                return None
            if window.identity is not None:
                found[view.topic_id, view.index] = window.identity, window.next_sequence
        return found

    def abandon(self, error: RaftlogError) -> None:
        """Give up every batch that is not settled; answers to what was sent come too late."""
        for batch in self.accumulator.unsettled():
            self._fail_queue(batch.queue, error)

    def end_windows(self) -> None:
        """A transaction is over, and its identity with it; nothing is unsettled."""
        for queue in self._by_view.values():
            queue.window.end()

    # -- when ------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        if self._stopped:
            return
        arrived, changed = self.accumulator.take_changes()
        now = self._loop.time()
        for batch in arrived:
            batch.deadline = now + self._delivery_timeout_s
            if self._linger_s > 0:
                batch.linger_until = now + self._linger_s
                self._lingering.append(batch)
            else:
                batch.hurried = True
            self._active[batch.queue] = None
            self._by_view[batch.queue.view] = batch.queue
        for queue in changed:
            self._advance(queue)
        self._outbox.flush()
        if self._lingering and self._linger_timer is None:
            self._linger_timer = self._loop.call_at(self._lingering[0].linger_until, self._lingered)
        if arrived and self._watch_timer is None:
            self._watch_timer = self._loop.call_later(min(WATCH_S, self._delivery_timeout_s), self._watch)

    def _lingered(self) -> None:
        self._linger_timer = None
        now = self._loop.time()
        while self._lingering and (self._lingering[0].closed or self._lingering[0].linger_until <= now):
            batch = self._lingering.popleft()
            if not batch.closed:
                self._advance(batch.queue)
        self._outbox.flush()
        if self._lingering:
            self._linger_timer = self._loop.call_at(self._lingering[0].linger_until, self._lingered)

    def _watch(self) -> None:
        """Look after deadlines and late answers."""
        self._watch_timer = None
        now = self._loop.time()
        late: set[str] = set()
        for queue in list(self._active):
            self._expire(queue, now)
            waited = now - queue.window.in_flight[0].sent_at if queue.window.in_flight else 0.0
            if waited >= self._request_timeout_s:
                assert queue.connection is not None, "what is in flight went somewhere"
                log.info("%s: no answer for %.1f s, closing the connection", queue.view, waited)
                queue.connection.close()
            elif waited >= LATE_ANSWER_S:
                late.add(queue.view.topic)
                if self._is_left(queue):
                    queue.window.abandon_in_flight()
                    self._advance(queue)
            if queue.is_empty():
                del self._active[queue]
                if queue.view.deleted:
                    self._by_view.pop(queue.view, None)
        self._outbox.flush()
        if late:
            self._cluster.refresh_soon(late)
        if self._active:
            deadline = min(self._first_deadline(queue) for queue in self._active)
            self._watch_timer = self._loop.call_at(min(now + WATCH_S, deadline), self._watch)

    def _first_deadline(self, queue: PartitionQueue) -> float:
        batches = [*queue.window.in_flight[:1], *queue.window.retry[:1], *list(queue.ready)[:1]]
        if not batches and queue.open is not None:
            batches.append(queue.open)
        return min((batch.deadline for batch in batches), default=self._loop.time() + WATCH_S)

    def _expire(self, queue: PartitionQueue, now: float) -> None:
        unsent = self.accumulator.remove_expired(queue, now)
        sent = [batch for batch in queue.window.unsettled() if batch.deadline <= now]
        for batch in sent:
            queue.window.give_up(batch)
        for batch in [*sent, *unsent]:
            reason = batch.last_error or self._cluster.last_error
            error = DeliveryTimeout(
                f"{queue.view}: not acknowledged within {self._delivery_timeout_s:g} s"
                + (f"; last: {type(reason).__name__}: {reason}" if reason is not None else ""),
                indeterminate=batch.in_doubt,
            )
            error.__cause__ = reason
            self._fail(batch, error)
        if sent or unsent:
            self._advance(queue)

    # -- sending ---------------------------------------------------------------------------------------------

    def _advance_window(self, queue: PartitionQueue) -> None:
        """Send what the partition's window allows."""
        window = queue.window
        while not queue.waiting and not self._stopped:
            if queue.view.deleted:
                self._fail_queue(queue, UnknownTopic(f"topic {queue.view.topic!r} was deleted"))
                return
            if not (queue.ready or queue.open or window.retry or window.broken):
                return  # nothing to send: the usual end of it
            if (window.broken or window.identity is None) and (
                window.needs_identity() and not self._begin_window(queue)
            ):
                return
            resend = bool(window.retry) and window.may_resend()
            if not resend and not window.may_send_new():
                return
            now = self._loop.time()
            if resend and now < queue.pause_until:
                queue.waiting = True
                self._loop.call_at(queue.pause_until, self._resume, queue)
                return
            batch = window.retry[0] if resend else self.accumulator.take(queue, now)
            if batch is None:
                return
            connection = self._cluster.route(queue.view)
            if connection is None:
                if not resend:
                    self.accumulator.put_back(queue, [batch])
                self._seek(queue)
                return
            if window.in_flight and connection is not queue.connection:
                # another handle heard first who leads now: that one gets what the other never answered
                if not resend:
                    self.accumulator.put_back(queue, [batch])
                window.abandon_in_flight()
                continue
            if resend:
                window.resend()
            else:
                batch.encode(self._compression, window.identity, window.next_sequence, self._transactional)
                window.sent_new(batch)
            queue.connection = connection
            batch.sent_at = now
            self._outbox.add(connection, queue.target or self._target(queue), batch)

    def _target(self, queue: PartitionQueue) -> ProducePartition:
        before = None if self._identities is None else self._identities.before
        queue.target = ProducePartition(queue.view.topic_id, queue.view.index, before)
        return queue.target

    def _answered(
        self,
        flight: Flight,
        response: ProduceResponse | None,
        _payload: memoryview | None,
        error: RaftlogError | None,
    ) -> None:
        connection = flight.connection
        produced: list[tuple[ProducerBatch, int]] = []
        if response is not None:
            try:
                answered = flight.take(response)
            except ProtocolError as nonsense:
                log.warning("closed %r: %s", connection, nonsense)
                connection.close()
                error = ConnectionLost(str(nonsense), indeterminate=True)
            else:
                produced = self._take_in(flight, answered, response.batches)
        if error is not None:
            for number, batch in flight.take_rest():
                if not self._stopped and flight.is_news(number, batch):
                    self._refused(batch.queue, batch, connection, error)
                    self._advance(batch.queue)
        if self._outbox.gathered:
            self._outbox.flush()
        # last, for a thread that waits for it has to wait for this one's turn to end
        for batch, base_offset in produced:
            if not batch.done:  # whoever heard of another just now may have closed the producer
                self._settle(batch, base_offset)

    def _take_in(
        self, flight: Flight, answered: list[tuple[int, ProducerBatch]], outcomes: list[Produced]
    ) -> list[tuple[ProducerBatch, int]]:
        """Go on where batches were answered; returns those that are in the log, and their offsets."""
        produced = []
        for (number, batch), each in zip(answered, outcomes, strict=True):
            if self._stopped or not flight.is_news(number, batch):
                continue
            queue = batch.queue
            if each.error is None:
                queue.failures = 0
                queue.window.acknowledged(batch)
                produced.append((batch, each.base_offset))
            else:
                refusal = from_wire(each.error.name, each.error.message, each.error.details)
                self._refused(queue, batch, flight.connection, refusal)
            self._advance(queue)
        return produced

    def _refused(
        self, queue: PartitionQueue, batch: ProducerBatch, connection: RpcConnection, error: RaftlogError
    ) -> None:
        batch.last_error = error
        verdict = queue.window.refused(batch, error, renewable=not self._transactional)
        log.debug("%s: %s: %s; %s", queue.view, type(error).__name__, error, verdict.value)
        if verdict is Verdict.WRITTEN:
            self._settle(batch, NO_OFFSET)
            return
        if verdict is Verdict.FAIL:
            self._fail(batch, error)
            return
        if isinstance(error, NotLeader):
            self._cluster.note_refusal(queue.view, connection, error)
        elif isinstance(error, (LeadershipLost, UnknownReplica)):
            queue.view.deny(connection.peer.broker_id, queue.view.term)
        if not queue.window.in_flight:
            queue.failures += 1
            at_once = queue.failures == 1 and not isinstance(error, (Busy, StorageFull))
            delay = 0.0 if at_once else BACKOFF.delay(queue.failures, self._cluster.seams.random)
            queue.pause_until = self._loop.time() + delay

    def _advance_unacknowledged(self, queue: PartitionQueue) -> None:
        """acks=0: what is written to the socket is done with."""
        while not queue.waiting and not self._stopped:
            if queue.view.deleted:
                self._fail_queue(queue, UnknownTopic(f"topic {queue.view.topic!r} was deleted"))
                return
            batch = self.accumulator.take(queue, self._loop.time())
            if batch is None:
                return
            connection = self._cluster.route(queue.view)
            if connection is None:
                self.accumulator.put_back(queue, [batch])
                self._seek(queue)
                return
            if connection.buffered_bytes > UNSENT_BYTES_MAX:
                self.accumulator.put_back(queue, [batch])
                queue.waiting = True
                self._spawn(self._drain(queue, connection))
                return
            batch.encode(self._compression, None, NO_SEQUENCE)
            self._outbox.add(connection, queue.target or self._target(queue), batch)
            self._settle(batch, NO_OFFSET)

    async def _drain(self, queue: PartitionQueue, connection: RpcConnection) -> None:
        await connection.drain()
        self._resume(queue)

    # -- waiting ---------------------------------------------------------------------------------------------

    def _resume(self, queue: PartitionQueue) -> None:
        queue.waiting = False
        self._advance(queue)
        self._outbox.flush()

    def _seek(self, queue: PartitionQueue) -> None:
        queue.waiting = True
        self._cluster.seek_leader(queue.view).add_done_callback(partial(self._found, queue))

    def _found(self, queue: PartitionQueue, future: asyncio.Future[RpcConnection]) -> None:
        queue.waiting = False
        error = future.exception()
        if self._stopped:
            return
        if error is not None:
            self._fail_queue(queue, error)
        else:
            self._advance(queue)
            self._outbox.flush()

    def _leaders_changed(self, views: list[PartitionView]) -> None:
        for view in views:
            queue = self._by_view.get(view)
            if queue is None or not queue.window.in_flight or queue.connection is None:
                continue
            if self._is_left(queue):
                queue.window.abandon_in_flight()
                self._advance(queue)
        self._outbox.flush()

    def _is_left(self, queue: PartitionQueue) -> bool:
        """What is in flight went to another broker than the one that leads, as far as is known."""
        leader = queue.view.leader
        return (
            leader != NO_LEADER and queue.connection is not None and queue.connection.peer.broker_id != leader
        )

    # -- identity --------------------------------------------------------------------------------------------

    def _begin_window(self, queue: PartitionQueue) -> bool:
        """Give the partition an identity to go on with; False while there is none, or nothing to send."""
        window = queue.window
        identities = self._identities
        assert identities is not None, "with acks=0 there is no window"
        if window.broken:
            identities.broken(window.identity)
            movable, doubtful = window.dissolve()
            self.accumulator.put_back(queue, movable)
            for batch in doubtful:
                error = OutOfOrderSequence(
                    f"{queue.view}: a batch before this one was given up, so whether this one was written "
                    "cannot be settled any more",
                    indeterminate=True,
                )
                self._fail(batch, error)
        if not queue.ready and queue.open is None:
            return False
        begun = identities.begin_window(queue.view)
        if begun is None:
            queue.waiting = True
            identities.obtain(
                queue.view, lambda: not queue.is_empty() and not self._stopped, partial(self._obtained, queue)
            )
            return False
        window.begin(*begun)
        if self._transactional:
            queue.target = None  # what it brings along changes with the transaction
        return True

    def _obtained(self, queue: PartitionQueue, error: RaftlogError | None) -> None:
        if self._stopped:
            return
        if error is not None:
            self._fail_queue(queue, error)
        self._resume(queue)

    # -- the end of a batch ----------------------------------------------------------------------------------

    def _settle(self, batch: ProducerBatch, base_offset: int) -> None:
        batch.complete(base_offset, None)
        self.accumulator.release(batch)

    def _fail(self, batch: ProducerBatch, error: BaseException) -> None:
        if batch.done:
            return  # with its transaction
        in_doubt = batch.in_doubt and not self._transactional  # what is aborted is not read, written or not
        if isinstance(error, RaftlogError) and in_doubt and not error.indeterminate:
            cause = error
            error = type(cause)(cause.message, **{**cause.details, "indeterminate": True})
            error.__cause__ = cause
        if not self._transactional:
            self.failed.append(batch)
        batch.complete(NO_OFFSET, error)
        self.accumulator.release(batch)
        if self._identities is not None:
            self._identities.failed(error)

    def _fail_queue(self, queue: PartitionQueue, error: BaseException) -> None:
        sent = queue.window.unsettled()
        for batch in sent:
            queue.window.give_up(batch)
        for batch in [*sent, *self.accumulator.remove_all(queue)]:
            self._fail(batch, error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
