"""A topic partition's replica: produce, and where consumers wait."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final, Protocol

from raftlog.broker.replica import Done, Host, Replica, recover
from raftlog.errors import OffsetOutOfRange
from raftlog.net.rpc import ProduceResponse
from raftlog.raft.config import RecoveredLog
from raftlog.raft.types import Entry
from raftlog.record.batch import check_batch, stamped
from raftlog.record.frame import Buffer, FrameKind
from raftlog.state.partition import PartitionState
from raftlog.storage.replica_log import ReplicaLog

_BASE_OFFSET: Final = struct.Struct(">Q")


class Waiter(Protocol):
    """Someone who waits for records."""

    def wake(self) -> None: ...


class PartitionReplica(Replica[PartitionState]):
    """One replica of one partition of a topic.

    Args:
        batch_bytes_max: a batch above this is refused (topic setting ``max_message_bytes``).
    """

    def __init__(
        self,
        host: Host,
        log: ReplicaLog,
        machine: PartitionState,
        recovered: RecoveredLog,
        hosts: Mapping[int, int],
        *,
        preferred: bool,
        batch_bytes_max: int,
    ) -> None:
        super().__init__(host, log, machine, recovered, hosts, preferred=preferred)
        self.batch_bytes_max = batch_bytes_max
        self._in_flight: dict[int, int] = {}
        """base offset -> index of batches above the applied index, for duplicates of a batch in flight."""
        self._waiters_for_records: set[Waiter] = set()
        self._woken = False

    @classmethod
    async def open(
        cls, host: Host, log: ReplicaLog, hosts: Mapping[int, int], *, preferred: bool, batch_bytes_max: int
    ) -> PartitionReplica:
        """Restore the machine from the newest snapshot and the committed log above it."""
        machine = PartitionState.restore(log.snapshot.data) if log.snapshot is not None else PartitionState()
        recovered = await recover(log, machine)
        return cls(host, log, machine, recovered, hosts, preferred=preferred, batch_bytes_max=batch_bytes_max)

    # -- produce ---------------------------------------------------------------------------------------------

    def produce(self, batch: Buffer, done: Done) -> None:
        """Append a record batch; ``done(ProduceResponse, None)`` once it is committed and applied.

        A duplicate of a batch that is committed is answered with the original offset; of one in flight, it
        waits for the original's outcome.

        Raises:
            NotLeader, Busy, CorruptBatch, RecordTooLarge, StorageFull, OutOfOrderSequence, DuplicateSequence,
            ProducerFenced, UnknownProducer: nothing was appended.
        """
        staged = self.check_serving()
        header = check_batch(batch, self.batch_bytes_max)
        duplicate = staged.check(header)
        if duplicate is not None:
            index = self._in_flight.get(duplicate.base_offset)
            if index is None:
                done(
                    ProduceResponse(duplicate.base_offset, duplicate.timestamp_ms, self.machine.log_start),
                    None,
                )
            else:
                self.wait_for(index, done)
            return
        base_offset = staged.next_offset
        payload = stamped(batch, base_offset, self.node.term)
        entry = self.propose(staged, FrameKind.BATCH, payload, done)
        self._in_flight[base_offset] = entry.index

    def applied(self, entry: Entry, result: object) -> object:
        if entry.kind != FrameKind.BATCH:
            return result
        self._woken = True
        base_offset = _BASE_OFFSET.unpack_from(entry.payload)[0]
        self._in_flight.pop(base_offset, None)
        return ProduceResponse(base_offset, entry.leader_time_ms, self.machine.log_start)

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

    def wait_for_records(self, waiter: Waiter) -> None:
        self._waiters_for_records.add(waiter)

    def stop_waiting(self, waiter: Waiter) -> None:
        self._waiters_for_records.discard(waiter)

    def applied_all(self) -> None:
        if self._woken:
            self._woken = False
            self._wake()

    def _wake(self) -> None:
        if self._waiters_for_records:
            waiters, self._waiters_for_records = self._waiters_for_records, set()
            for waiter in waiters:
                waiter.wake()

    def replaced(self) -> None:
        self._wake()

    def stopped_serving(self) -> None:
        self._in_flight.clear()
        self._wake()
