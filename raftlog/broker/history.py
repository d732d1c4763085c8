"""Whether the log still holds what a consumer has read (KIP-320).

With flush=interval a power cut may take committed records, and others get their offsets; so may the loss of
a majority for good, in any topic (``majority_loss.py``). A consumer says of which term the last record was
that it read. The leader of a term alone gives offsets to its records, so an equal term at that offset is the
same record, and all before it are the same too. Where the term differs, or the log ends before, the two agree
up to the end of what the log holds of that term or of lower ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from raftlog.errors import LogTruncated
from raftlog.net.rpc import FetchPartition
from raftlog.record.frame import FrameHeader, FrameKind
from raftlog.storage.replica_log import Recovered
from raftlog.storage.segment import batch_base_offset

if TYPE_CHECKING:
    from raftlog.broker.partition import PartitionReplica

HISTORY_TERMS: Final = 1_000_000
"""A group that goes on without a majority begins a new history at the next multiple of this. By the term
consumers tell that what they read is gone, also where the lost went through terms of which no survivor
knows."""
_READ_BYTES = 64 << 10


def lacks_beginning(recovered: Recovered) -> bool:
    """Whether a history began of which this log holds nothing yet.

    Its configuration is of the old history then, and others that lack the new one may be a majority in that:
    it must neither vote nor campaign until it has heard from whoever has the beginning. So it is taken for
    amnesiac.
    """
    last_term = recovered.terms[-1][1] if recovered.terms else recovered.prev_term
    return recovered.hard_state.term // HISTORY_TERMS > last_term // HISTORY_TERMS


def is_suspect(replica: PartitionReplica, wanted: FetchPartition) -> bool:
    """Whether :func:`check` has to look closer. Replicas that sync before they acknowledge lose nothing,
    unless their majority was lost."""
    log, offset = replica.log, wanted.offset
    if not log.spec.flush_interval_ms and replica.node.term < HISTORY_TERMS:
        return False
    if wanted.last_term < 0 or offset <= log.start_offset:
        return False
    return offset > replica.committed_offset or log.term_before(offset) != wanted.last_term


async def check(replica: PartitionReplica, wanted: FetchPartition) -> None:
    """Compare with what a consumer has read.

    Raises:
        LogTruncated: the record before ``wanted.offset`` is gone; details: offset, up to which both agree.
        NotLeader: this replica cannot tell.
        StorageFailed, DamagedData: the device.
    """
    replica.check_readable(replica.committed_offset)
    log, offset, term = replica.log, wanted.offset, wanted.last_term
    if offset <= replica.committed_offset:
        frames = await log.read(offset - 1, replica.node.applied, 1)
        if frames and FrameHeader(frames[0]).term == term:
            return
    agreed = await _end_of_term(replica, term)
    if agreed >= offset:
        agreed = offset - 1  # nothing of that term is left: what the consumer read there is another record
    raise LogTruncated(
        f"{replica.name} does not hold the record before offset {offset} that was read of term {term} any "
        f"more; up to offset {agreed} it may",
        offset=max(agreed, replica.machine.log_start),
    )


async def _end_of_term(replica: PartitionReplica, term: int) -> int:
    """The record offset behind the last entry of ``term`` or a lower one."""
    log, node = replica.log, replica.node
    index = node.last_index_of(term) + 1
    while index <= node.applied:
        for entry in await log.entries(max(index, log.first_index), node.applied + 1, _READ_BYTES):
            if entry.kind == FrameKind.BATCH:
                return batch_base_offset(entry.frame)
            index = entry.index + 1
    return replica.committed_offset
