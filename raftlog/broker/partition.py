"""A topic partition's replica: produce, and where consumers wait."""

from __future__ import annotations

import logging
from typing import Any, Final, Protocol

from raftlog.broker.assigned import AssignedReplica, Complete
from raftlog.broker.host import Host
from raftlog.broker.recovery import restored
from raftlog.broker.replica import Done
from raftlog.broker.retention import EXPIRY_INTERVAL_MS, Retention, last_index_below
from raftlog.errors import OffsetOutOfRange, RaftlogError
from raftlog.net.rpc import READ_COMMITTED, READ_UNCOMMITTED, CommittedBefore, Produced
from raftlog.raft.config import RecoveredLog
from raftlog.raft.types import Entry
from raftlog.record.batch import BatchHeader, check_batch, stamped
from raftlog.record.control import Marker, encode_marker
from raftlog.record.frame import BATCH, COMMAND, Buffer
from raftlog.state.image import Partition
from raftlog.state.partition import Command, ExpireProducers, PartitionState, SetLogStart, encode_command
from raftlog.storage.replica_log import ReplicaLog

logger = logging.getLogger("raftlog.broker")


class Waiter(Protocol):
    """Someone who waits for records."""

    def wake(self) -> None: ...


class PartitionReplica(AssignedReplica[PartitionState]):
    """One replica of one partition of a topic.

    Args:
        assignment, complete: see :class:`~raftlog.broker.assigned.AssignedReplica`.
        batch_bytes_max: a batch above this is refused (topic setting ``max_message_bytes``).
        retention: what must be kept.
    """

    def __init__(
        self,
        host: Host,
        log: ReplicaLog,
        machine: PartitionState,
        recovered: RecoveredLog,
        assignment: Partition,
        *,
        batch_bytes_max: int,
        retention: Retention,
        complete: Complete,
    ) -> None:
        super().__init__(host, log, machine, recovered, assignment, complete)
        self.batch_bytes_max = batch_bytes_max
        self.retention = retention
        self._expired_ms = 0
        """Leader time at which this leader last had producers forgotten."""
        self._in_flight: dict[int, int] = {}
        """base offset -> index of batches above the applied index, for duplicates of a batch in flight."""
        self.traffic: Final = host.counters.traffic(log.spec.topic)
        self._latency: Final = host.counters.produce
        self._timed = (0, 0.0)
        """Index of a batch that is timed, and when it was appended; 0: none is."""
        self._waiters_for_records: dict[int, dict[Waiter, None]] = {
            READ_UNCOMMITTED: {},
            READ_COMMITTED: {},
        }
        self._woken = False
        self._stable = machine.last_stable_offset
        """As readers of committed records that wait last heard of it."""

    @classmethod
    async def open(
        cls,
        host: Host,
        log: ReplicaLog,
        assignment: Partition,
        *,
        batch_bytes_max: int,
        retention: Retention,
        complete: Complete,
    ) -> PartitionReplica:
        """Restore the machine from the newest snapshot and the committed log above it."""
        machine, recovered = await restored(log, PartitionState)
        return cls(
            host,
            log,
            machine,
            recovered,
            assignment,
            batch_bytes_max=batch_bytes_max,
            retention=retention,
            complete=complete,
        )

    # -- produce ---------------------------------------------------------------------------------------------

    def produce(self, batch: Buffer, done: Done, before: CommittedBefore | None = None) -> None:
        """Append a record batch; ``done(Produced, None)`` once it is committed and applied.

        If the transaction ``before`` the batch's own is open here, its marker comes first: both get into the
        log at once, and share a sync.

        A duplicate of a batch that is committed is answered with the original offset; of one in flight, it
        waits for the original's outcome.

        Raises:
            NotLeader, Busy, CorruptBatch, RecordTooLarge, StorageFull, OutOfOrderSequence, DuplicateSequence,
            ProducerFenced, UnknownProducer: nothing was appended.
        """
        staged = self.check_serving()
        header = check_batch(batch, self.batch_bytes_max)
        if before is not None:
            self._end_before(staged, header, before)
        duplicate = staged.check(header)
        if duplicate is not None:
            index = self._in_flight.get(duplicate.base_offset)
            if index is None:
                done(Produced(duplicate.base_offset, duplicate.timestamp_ms, self.machine.log_start), None)
            else:
                self.wait_for(index, done)
            return
        base_offset = staged.next_offset
        payload = stamped(batch, base_offset, self.node.term)
        entry = self.propose(staged, BATCH, payload, done)
        self._in_flight[base_offset] = entry.index
        self.traffic.records_in += header.record_count
        self.traffic.bytes_in += len(payload)
        latency = self._latency
        latency.count += 1
        if latency.count >= latency.next and not self._timed[0]:
            self._timed = entry.index, self.host.counters.clock()

    def _end_before(self, staged: PartitionState, header: BatchHeader, before: CommittedBefore) -> None:
        """Write the marker that a batch brings along. Where nothing is open it needs none: from the batch on,
        its newer epoch keeps out what is late."""
        opened = staged.open.get(header.producer_id)
        if opened is not None and opened.epoch == before.epoch < header.producer_epoch:
            marker = Marker(header.producer_id, before.epoch, before.coordinator_epoch, commit=True)
            self.write_marker(marker, _nobody_waits)

    def write_marker(self, marker: Marker, done: Done) -> None:
        """End a transaction here; ``done`` hears when that is committed and applied. A marker that was
        written before is not written again.

        Raises:
            NotLeader, Busy, StorageFull, StaleCoordinator, ProducerFenced, InvalidTransaction: nothing was
                appended.
        """
        staged = self.check_serving()
        if not staged.check_marker(marker):
            self.when_applied(staged, None, done)
            return
        batch = encode_marker(marker, self.leader_time_ms())
        self.propose(staged, BATCH, stamped(batch, staged.next_offset, self.node.term), done)

    def applied(self, entry: Entry, result: object) -> object:
        if entry.kind != BATCH:
            return result
        self._woken = True
        if self.staged is None:
            return None  # nobody waits for it here
        base_offset = result
        assert isinstance(base_offset, int), "a batch is applied with its base offset"
        self._in_flight.pop(base_offset, None)
        index, since = self._timed
        if index == entry.index:
            self._timed = 0, 0.0
            self._latency.add(self.host.counters.clock() - since)
        return Produced(base_offset, entry.leader_time_ms, self.machine.log_start)

    # -- retention -------------------------------------------------------------------------------------------

    async def keep_house(self) -> None:
        """As leader, decide what may go; on any replica, drop what the log says is gone."""
        if self.staged is not None:
            now_ms = self.leader_time_ms()
            try:
                self._retain(now_ms)
                self._expire_producers(now_ms)
            except RaftlogError as error:
                logger.debug("%s: retention waits: %s", self.name, error)
        await super().keep_house()

    @property
    def spent_index(self) -> int:
        return last_index_below(self.log.segments, self.machine.log_start)

    def _retain(self, now_ms: int) -> None:
        start = self.retention.start_offset(self.log.segments, now_ms)
        staged = self.check_serving()
        if start is not None and start > staged.log_start:
            self._command(staged, SetLogStart(start))

    def _expire_producers(self, now_ms: int) -> None:
        staged = self.check_serving()
        if now_ms - self._expired_ms < EXPIRY_INTERVAL_MS or not staged.producers:
            return
        before_ms = now_ms - self.host.config.producer_expiry_ms
        idlest = next((state for each, state in staged.producers.items() if each not in staged.open), None)
        if idlest is not None and idlest.last_time_ms < before_ms:
            self._expired_ms = now_ms
            self._command(staged, ExpireProducers(before_ms))

    def _command(self, staged: PartitionState, command: Command) -> None:
        self.check_level(command)
        refusal = staged.check_command(command)
        assert refusal is None, refusal
        self.propose(staged, COMMAND, encode_command(command), _nobody_waits)

    # -- fetch -----------------------------------------------------------------------------------------------

    @property
    def committed_offset(self) -> int:
        """The offset after the last committed record: what consumers may read up to (high watermark)."""
        return self.machine.next_offset

    def check_readable(self, offset: int) -> None:
        """A consumer may wait at or read from ``offset`` here.

        Raises:
            NotLeader: ask the leader.
            OffsetOutOfRange: below the log's start or above its committed end.
        """
        self.check_in_service()
        if not self.node.serving:
            self.check_serving()
        start, end = self.machine.log_start, self.machine.next_offset
        if not start <= offset <= end:
            raise OffsetOutOfRange(
                f"offset {offset} of {self.name} is outside [{start}, {end}]", start=start, end=end
            )

    def wait_for_records(self, waiter: Waiter, isolation: int = READ_UNCOMMITTED) -> None:
        """Wake once when there is more for readers of this isolation, or when this replica leads no more."""
        waiting = self._waiters_for_records[isolation]
        if not waiting:
            self._stable = self.machine.last_stable_offset
        waiting[waiter] = None

    @property
    def readers_waiting(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiters_for_records.values()))

    def stop_waiting(self, waiter: Waiter, isolation: int = READ_UNCOMMITTED) -> None:
        """Do not, after all."""
        self._waiters_for_records[isolation].pop(waiter, None)

    def applied_all(self) -> None:
        if self._woken:
            self._woken = False
            waiting = self._waiters_for_records
            if waiting[READ_UNCOMMITTED]:
                self._wake(READ_UNCOMMITTED)
            if waiting[READ_COMMITTED]:
                stable = self.machine.last_stable_offset
                if stable != self._stable:
                    self._stable = stable
                    self._wake(READ_COMMITTED)

    def _wake(self, isolation: int) -> None:
        waiters = self._waiters_for_records[isolation]
        if waiters:
            self._waiters_for_records[isolation] = {}
            for waiter in waiters:
                waiter.wake()

    def replaced(self) -> None:
        self._wake_all()

    def stopped_serving(self) -> None:
        self._in_flight.clear()
        self._timed = 0, 0.0
        self._wake_all()

    def _wake_all(self) -> None:
        self._wake(READ_UNCOMMITTED)
        self._wake(READ_COMMITTED)


def _nobody_waits(result: Any, error: RaftlogError | None) -> None:
    """A command that is decided anew if its outcome is lost."""
