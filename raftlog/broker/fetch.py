"""Fetch: a consumer's long poll over several partitions of one broker.

A session reads what is there. If that is nothing, it waits on every partition at once and is woken by the
first that applies records, or by its timer. Frames go out as the contiguous ranges that storage returns,
never copied or decoded. Only committed entries are read, so what a consumer saw cannot be taken back; of
those, readers of committed records get what ``isolation`` lets through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

from raftlog.broker import history
from raftlog.broker.isolation import committed_only, readable_end
from raftlog.broker.partition import PartitionReplica
from raftlog.errors import Busy, DamagedData, RaftlogError, to_wire
from raftlog.net.rpc import (
    READ_COMMITTED,
    READ_UNCOMMITTED,
    FetchedPartition,
    FetchPartition,
    FetchRequest,
    FetchResponse,
    WireError,
)
from raftlog.net.server import Reply
from raftlog.record.batch import BATCH_BYTES_LIMIT
from raftlog.record.frame import Buffer
from raftlog.telemetry.counters import Counters

FETCH_BYTES_MAX: Final = BATCH_BYTES_LIMIT
"""Of records in an answer, whatever was asked for. The last batch may pass it, by its own size at most, so an
answer is never above what a frame may carry."""
WAIT_MS_MAX: Final = 60_000


def wire_error(error: RaftlogError) -> WireError:
    """An error as part of a response. What is damaged here is being repaired: for a client that is no end."""
    if isinstance(error, DamagedData):
        error = Busy(f"being repaired: {error.message}")
    return WireError(*to_wire(error))


class FetchSession:
    """One FetchRequest until it is answered.

    Args:
        request: what is wanted.
        reply: how to answer; exactly once.
        find: the partition's replica on this broker (raises UnknownReplica and the like).
        spawn: runs a coroutine, for reads that must wait for the disk.
        counters: where it is counted.
    """

    __slots__ = (
        "_answered",
        "_began",
        "_counters",
        "_find",
        "_isolation",
        "_parked",
        "_reply",
        "_request",
        "_spawn",
        "_timer",
    )

    def __init__(
        self,
        request: FetchRequest,
        reply: Reply,
        find: Callable[[bytes, int], PartitionReplica],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        counters: Counters,
    ) -> None:
        self._request = request
        self._isolation = READ_COMMITTED if request.isolation == READ_COMMITTED else READ_UNCOMMITTED
        self._reply = reply
        self._find = find
        self._spawn = spawn
        self._counters = counters
        self._began = -1.0
        """When its answer was begun; -1: it is not timed."""
        self._parked: list[PartitionReplica] = []
        self._timer: asyncio.TimerHandle | None = None
        self._answered = False

    def serve(self) -> None:
        """Answer now if there is anything to say, else wait."""
        ready, waiting = self._look()
        wait_ms = min(self._request.wait_ms, WAIT_MS_MAX)
        if ready or wait_ms <= 0 or not waiting:
            self._answer()
            return
        for replica in waiting:
            replica.wait_for_records(self, self._isolation)
        self._parked = waiting
        self._timer = asyncio.get_running_loop().call_later(wait_ms / 1000, self._time_is_up)

    def wake(self) -> None:
        """Records came, or the leadership went."""
        if self._answered:
            return
        if self._isolation == READ_COMMITTED:
            ready, waiting = self._look()
            if waiting and not ready:  # it is ahead of the last stable offset
                for replica in waiting:
                    replica.wait_for_records(self, self._isolation)
                return
        self._answer()

    def _time_is_up(self) -> None:
        if not self._answered:
            self._answer()

    def _look(self) -> tuple[bool, list[PartitionReplica]]:
        """Whether anything can be answered at once (records or an error), and which partitions have to
        wait."""
        waiting = []
        for wanted in self._request.partitions:
            try:
                replica = self._find(wanted.topic_id, wanted.partition)
                replica.check_readable(wanted.offset)
            except RaftlogError:
                return True, []
            if wanted.offset < readable_end(replica, self._isolation) or history.is_suspect(replica, wanted):
                return True, []
            waiting.append(replica)
        return False, waiting

    def _answer(self) -> None:
        self._answered = True
        if self._timer is not None:
            self._timer.cancel()
        for replica in self._parked:
            replica.stop_waiting(self, self._isolation)
        latency = self._counters.fetch
        latency.count += 1
        if latency.count >= latency.next:
            self._began = self._counters.clock()
        answer = _Answer(self._request.bytes_max, self._isolation)
        for wanted in self._request.partitions:
            source = self._readable(wanted, answer)
            if source is None:
                continue
            if history.is_suspect(source, wanted):
                self._spawn(self._answer_from_disk())
                return
            try:
                found = source.log.try_read(wanted.offset, source.node.applied, answer.room(wanted))
            except RaftlogError as error:
                answer.fail(error)
                continue
            if found is None:
                self._spawn(self._answer_from_disk())
                return
            answer.add(source, wanted, found)
        self._finish(answer)

    def _finish(self, answer: _Answer) -> None:
        self._reply.ok(FetchResponse(answer.rows), answer.buffers)
        if self._began >= 0:
            self._counters.fetch.add(self._counters.clock() - self._began)

    async def _answer_from_disk(self) -> None:
        """The same where memory did not suffice; the partitions before are read again (they are cached)."""
        try:
            await self._read_from_disk()
        except Exception as bug:  # of whatever kind, it is told and raised again
            # whoever asked must not wait in vain; raised again, it is logged where the task ends
            if not self._reply.is_done:
                self._reply.fail(RaftlogError(f"internal error of the broker: {bug!r}"))
            raise

    async def _read_from_disk(self) -> None:
        answer = _Answer(self._request.bytes_max, self._isolation)
        for wanted in self._request.partitions:
            source = self._readable(wanted, answer)
            if source is not None:
                try:
                    if history.is_suspect(source, wanted):
                        await history.check(source, wanted)
                    found = await source.log.read(wanted.offset, source.node.applied, answer.room(wanted))
                    # below the log's start nobody knows any more what was aborted
                    source.check_readable(wanted.offset)
                except RaftlogError as error:
                    answer.fail(error)
                else:
                    answer.add(source, wanted, found)
        self._finish(answer)

    def _readable(self, wanted: FetchPartition, answer: _Answer) -> PartitionReplica | None:
        """The replica to read from (or to compare with, see ``history``); None when the partition's row is
        complete without reading."""
        try:
            replica = self._find(wanted.topic_id, wanted.partition)
            if replica.node.serving and history.is_suspect(replica, wanted):
                return replica
            replica.check_readable(wanted.offset)
        except RaftlogError as error:
            answer.fail(error)
            return None
        if answer.is_full or wanted.offset >= readable_end(replica, self._isolation):
            answer.add(replica, wanted, [])
            return None
        return replica


class _Answer:
    """A FetchResponse being put together."""

    __slots__ = ("_isolation", "buffers", "left", "rows")

    def __init__(self, bytes_max: int, isolation: int) -> None:
        self._isolation = isolation
        self.rows: list[FetchedPartition] = []
        self.buffers: list[Buffer] = []
        self.left = min(bytes_max, FETCH_BYTES_MAX)

    @property
    def is_full(self) -> bool:
        """Nothing more goes in; one batch goes in whatever was asked for, or nobody would get on."""
        return self.left <= 0 and bool(self.buffers)

    def room(self, wanted: FetchPartition) -> int:
        """Bytes that a partition may take."""
        return max(1, min(self.left, wanted.bytes_max))

    def add(self, replica: PartitionReplica, wanted: FetchPartition, found: list[Buffer]) -> None:
        aborted: list[tuple[int, int, int]] = []
        if found and self._isolation == READ_COMMITTED:
            found, aborted = committed_only(replica, wanted.offset, found)
        length = sum(map(len, found))
        replica.traffic.bytes_out += length
        machine = replica.machine
        self.rows.append(
            FetchedPartition(
                None,
                machine.next_offset,
                machine.log_start,
                length,
                machine.last_stable_offset,
                aborted,
            )
        )
        self.buffers += found
        self.left -= length

    def fail(self, error: RaftlogError) -> None:
        self.rows.append(FetchedPartition(wire_error(error), -1, -1, 0))
