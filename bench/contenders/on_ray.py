"""What Ray itself offers: its queue, and a bare actor. In the memory of one process; nothing is
replicated."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import ray
from _ray import echo_actor
from ray.util.queue import Queue

from contenders.base import UNCOUNTED, Contender, System, Turn, stepwise

CHUNK: Final = 1000
"""Calls under way."""
CHUNK_BYTES: Final = 32 << 20
CHUNK_GOT: Final = 10_000
ACTOR_OPTIONS: Final[dict[str, Any]] = {
    "num_cpus": 0,
    "runtime_env": {"env_vars": {"RAY_worker_niceness": "0"}},
}


class RayItself(System):
    """The Ray that the run has started, and two actors on it. A turn's processor time is that of both; the
    other one rests."""

    name = "ray"

    def start(self, directory: Path) -> None:
        self.actor = echo_actor()
        self.queue = Queue(actor_options=ACTOR_OPTIONS)
        self._pids = [pid_of(self.actor), pid_of(self.queue.actor)]

    def pids(self) -> list[int]:
        return self._pids

    def stop(self) -> None:
        self.queue.shutdown(force=True)
        ray.kill(self.actor)


class RayActor(Contender):
    """One async actor that returns what it is given."""

    name = "ray-actor"
    title = "a bare Ray actor call"
    settings = (
        "one async actor that returns its argument; pipelined: 1,000 calls under way. In memory, one copy"
    )

    def __init__(self, system: RayItself) -> None:
        super().__init__(system)
        self._actor = system.actor

    def sequential(self, topic: str, value: bytes, count: int) -> list[float]:
        echo = self._actor.echo
        return stepwise(lambda: ray.get(echo.remote(value)), count)

    def send(self, topic: str, values: Sequence[bytes], seconds: float) -> Turn:
        return pipelined(self.turn(), self._actor.echo, values, seconds)


class RayQueue(Contender):
    """``ray.util.queue``."""

    name = "ray-queue"
    title = "ray.util.queue"
    settings = (
        "`put`, `get` one after another; pipelined: `put_nowait` of its actor with 1,000 calls under way; "
        "`put_nowait_batch`, `get_nowait_batch` with 10,000. In memory, one copy"
    )

    def __init__(self, system: RayItself) -> None:
        super().__init__(system)
        self._queue = system.queue

    def delete(self, topic: str) -> None:
        while left := self._queue.qsize():
            self._queue.get_nowait_batch(min(left, CHUNK_GOT))

    def held(self, topic: str) -> int | None:
        return self._queue.qsize()

    def sequential(self, topic: str, value: bytes, count: int) -> list[float]:
        return stepwise(lambda: self._queue.put(value), count)

    def send(self, topic: str, values: Sequence[bytes], seconds: float) -> Turn:
        return pipelined(self.turn(), self._queue.actor.put_nowait, values, seconds)

    def send_batch(self, topic: str, values: Sequence[bytes], seconds: float) -> Turn:
        turn, items = self.turn(), list(values)
        self._queue.put_nowait_batch(items[:UNCOUNTED])
        with turn.timed():
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                self._queue.put_nowait_batch(items)
                turn.add(items)
        return turn

    def consume(self, topic: str, count: int) -> Turn:
        turn = self.turn()

        def poll() -> int:
            left = count - turn.untimed - turn.records
            return len(self._queue.get_nowait_batch(min(CHUNK_GOT, left)))

        return turn.read(count, poll)

    def end_to_end(self, topic: str, value: bytes, count: int) -> list[float]:
        def once() -> None:
            got = self._queue.actor.get.remote()
            self._queue.put(value)
            assert ray.get(got) == value

        return stepwise(once, count)


def pipelined(turn: Turn, method: Any, values: Sequence[bytes], seconds: float) -> Turn:
    """Call after call of an actor's method, with up to two chunks under way."""
    chunk = values[: max(1, min(CHUNK, CHUNK_BYTES // len(values[0])))]
    for _ in range(UNCOUNTED):
        ray.get(method.remote(values[0]))
    under_way: list[Any] = []
    with turn.timed():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            started = [method.remote(value) for value in chunk]
            ray.get(under_way)
            under_way = started
            turn.add(chunk)
        ray.get(under_way)
    return turn


def pid_of(actor: Any) -> int:
    """The process of an actor."""
    call = actor.__ray_call__.remote(lambda _: os.getpid())
    return int(ray.get(call))
