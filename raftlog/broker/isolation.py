"""What a reader of committed records gets of a partition: nothing at or above the last stable offset, where
the first open transaction begins, and with the rest the list of what aborted transactions wrote in it.

The frames themselves are those that every reader gets: markers, and what the reader has to hide, are in them.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from raftlog.net.rpc import READ_COMMITTED
from raftlog.record.frame import FRAME_HEADER_BYTES, Buffer, FrameKind, frame_length

if TYPE_CHECKING:
    from raftlog.broker.partition import PartitionReplica

_KIND_AT: Final = 12
_BATCH: Final = struct.Struct(">q 15x i")
"""Base offset and last offset delta, where a batch begins."""


def readable_end(replica: PartitionReplica, isolation: int) -> int:
    """The offset behind the last record that a reader may have."""
    machine = replica.machine
    return machine.last_stable_offset if isolation == READ_COMMITTED else machine.next_offset


def committed_only(
    replica: PartitionReplica, offset: int, found: list[Buffer]
) -> tuple[list[Buffer], list[tuple[int, int, int]]]:
    """What a reader of committed records gets of frames that were read from ``offset`` on.

    Returns:
        (the frames below the last stable offset, what to hide in them: see ``FetchedPartition.aborted``)
    """
    machine = replica.machine
    stable = machine.last_stable_offset
    if stable == machine.next_offset and not machine.aborted:
        return found, []  # most partitions never see a transaction
    found, end = cut(found, stable)
    return found, machine.aborted_in(offset, end) if end > offset else []


def cut(buffers: list[Buffer], end: int) -> tuple[list[Buffer], int]:
    """Contiguous frames, up to the first batch that begins at ``end`` or above.

    Args:
        buffers: whole frames each.

    Returns:
        (the frames, the offset behind their last record or -1 if there is no record in them)
    """
    behind = -1
    for number, buffer in enumerate(buffers):
        position, size = 0, len(buffer)
        while position < size:
            if buffer[position + _KIND_AT] == FrameKind.BATCH:
                base, delta = _BATCH.unpack_from(buffer, position + FRAME_HEADER_BYTES)
                if base >= end:
                    head = [memoryview(buffer)[:position]] if position else []
                    return [*buffers[:number], *head], behind
                behind = base + delta + 1
            position += frame_length(buffer, position)
    return buffers, behind
