"""The bare floor, see ``floor.py``: no topics, no records, nothing to read back; in two kinds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

from floor import Floor

from contenders.base import UNCOUNTED, Contender, NotOffered, System, Turn

BATCH_BYTES: Final = 1_000_000
SINGLE_WINDOW: Final = 512
"""Frames under way where each is one record, which is all that one sync takes at once."""
BATCH_WINDOW: Final = 8


class FloorProcesses(System):
    """A leader and two followers."""

    name = "floor"
    keep: ClassVar[bool] = False
    floor: Floor

    def start(self, directory: Path) -> None:
        directory.mkdir()
        self.floor = Floor(directory, keep=self.keep).__enter__()

    def pids(self) -> list[int]:
        return self.floor.pids()

    def stop(self) -> None:
        if hasattr(self, "floor"):
            self.floor.close()


class KeepingProcesses(FloorProcesses):
    """The same with files that grow."""

    name = "floor-keeps"
    keep = True


class BareFloor(Contender):
    """Frames relayed to three and synced."""

    name = "floor"
    title = "the floor, synced"
    settings = (
        "three bare processes, see below. `send` is a frame a record, 512 under way; `send_batch` and values "
        "of 100 KB and more are frames of at most 1 MB, eight under way"
    )

    def __init__(self, system: FloorProcesses) -> None:
        super().__init__(system)
        self._processes = system

    def sequential(self, topic: str, value: bytes, count: int) -> list[float]:
        return self._processes.floor.sequential(UNCOUNTED + count, value)[UNCOUNTED:]

    def send(self, topic: str, values: Sequence[bytes], seconds: float) -> Turn:
        window = BATCH_WINDOW if len(values[0]) >= BATCH_BYTES // 10 else SINGLE_WINDOW
        return self._relay(values[0], 1, seconds, window)

    def send_batch(self, topic: str, values: Sequence[bytes], seconds: float) -> Turn:
        frame = b"".join(values)
        if len(frame) > BATCH_BYTES:
            raise NotOffered("a batch is a frame of 1 MB")
        return self._relay(frame, len(values), seconds, BATCH_WINDOW)

    def _relay(self, frame: bytes, records: int, seconds: float, window: int) -> Turn:
        floor, turn = self._processes.floor, self.turn()
        floor.sequential(UNCOUNTED, frame)
        with turn.timed():
            rate = floor.pipelined(frame, seconds, window)
        frames = round(rate * turn.seconds / len(frame))
        turn.bytes, turn.records = frames * len(frame), frames * records
        return turn


class KeepingFloor(BareFloor):
    """A floor that keeps what it is given."""

    name = "floor-keeps"
    title = "the floor, synced, keeping"
    settings = "the same with files that grow, as those of a log do"
