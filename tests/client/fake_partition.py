"""One partition of the fake cluster, in memory: committed frames, and the production state machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raftlog.raft.types import Entry
from raftlog.record.batch import BatchHeader, check_batch, stamped
from raftlog.record.codec import decode_batch
from raftlog.record.frame import FRAME_HEADER_BYTES, FrameKind, iter_frames
from raftlog.record.types import Record
from raftlog.state.partition import PartitionState


class FakePartition:
    """One partition: committed frames, and the production state machine."""

    def __init__(self, topic: str, topic_id: bytes, index: int, replicas: list[int]) -> None:
        self.topic = topic
        self.topic_id = topic_id
        self.index = index
        self.replicas = replicas
        self.leader: int | None = replicas[0]
        self.term = 1
        self.state = PartitionState()
        self.frames: list[bytes] = []
        self.last_index = 0
        self.waiting: list[Callable[[], None]] = []

    def append(self, batch: memoryview, time_ms: int) -> tuple[int, int]:
        """Append a batch unless it is there already; (base offset, append time)."""
        header = check_batch(batch)
        duplicate = self.state.check(header)
        if duplicate is not None:
            return duplicate.base_offset, duplicate.timestamp_ms
        base = self.state.next_offset
        self._frame(FrameKind.BATCH, stamped(batch, base, self.term), time_ms)
        return base, time_ms

    def append_noop(self) -> None:
        """What a new leader commits."""
        self._frame(FrameKind.NOOP, b"", 0)

    def _frame(self, kind: FrameKind, payload: bytes, time_ms: int) -> None:
        self.last_index += 1
        entry = Entry.create(0, kind, self.term, self.last_index, time_ms, payload)
        self.state.apply(entry)
        self.frames.append(bytes(entry.frame))
        waiting, self.waiting = self.waiting, []
        for wake in waiting:
            wake()

    def lose_last(self) -> None:
        """It forgets the last that was appended, as after ``raftlog recover``."""
        *kept, _ = self.frames
        self.frames, self.last_index, self.state = [], 0, PartitionState()
        for frame in kept:
            self.state.apply(Entry.parse(memoryview(frame)))
            self.frames.append(frame)
            self.last_index += 1

    def records(self) -> list[Record]:
        """Everything in it."""
        found: list[Record] = []
        for frame in self.frames:
            for header, at in iter_frames(frame):
                if header.kind == FrameKind.BATCH:
                    batch = frame[at + FRAME_HEADER_BYTES : at + header.length]
                    found += decode_batch(batch, self.topic, self.index)
        return found

    def values(self) -> list[Any]:
        """The values of everything in it."""
        return [record.value for record in self.records()]

    def read(self, offset: int, bytes_max: int) -> list[bytes]:
        """Frames from the one that holds ``offset`` on."""
        taken: list[bytes] = []
        size = 0
        for frame in self.frames:
            if frame[12] == FrameKind.BATCH:
                if BatchHeader.parse(frame, FRAME_HEADER_BYTES).last_offset < offset:
                    continue
            elif not taken:
                continue
            if taken and size + len(frame) > bytes_max:
                break
            taken.append(frame)
            size += len(frame)
        return taken
