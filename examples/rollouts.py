"""Reinforcement learning's plumbing: actors that make rollouts and a learner that consumes them, by a topic.

Each actor writes tensors (observations of an episode, float32) as records: the bytes of the array, its shape
and type in headers. The learner reads them in the order of each actor, and makes arrays of them without
copying. Actors and learner know only the topic: either may be killed, started anew or multiplied, and another
learner can read the same rollouts again.

The learner adds up what it has got; the exit code is 0 only if that is what the actors have sent.

    python examples/rollouts.py [--episodes N] [--actors N]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from rich.console import Console

import raftlog
from flights import start_ray

if TYPE_CHECKING:
    import numpy.typing as npt

    from raftlog.client.log import Log
    from raftlog.record.types import Record

CLUSTER = "rollouts-demo"
TOPIC = "rollouts"
BROKERS = 1
STEPS, WIDTH = 500, 256
"""An episode is so many observations of so many numbers: 512 KB."""


class Actor:
    """Makes episodes, each a tensor."""

    def __init__(self, log: Log, number: int) -> None:
        self._log = log
        self._number = number
        self._random = np.random.default_rng(number)

    def roll_out(self, episodes: int) -> float:
        """Send so many; returns the sum of all their numbers."""
        total = 0.0
        with self._log.producer(compression="none") as producer:
            for _ in range(episodes):
                tensor = self._random.random((STEPS, WIDTH), dtype=np.float32)
                producer.send(TOPIC, tensor.tobytes(), partition=self._number, headers=describe(tensor))
                total += float(tensor.sum(dtype=np.float64))
        return total


class Learner:
    """Consumes episodes."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def learn(self, episodes: int) -> tuple[float, int, float]:
        """Read so many; returns the sum of their numbers, how many bytes they were, and the seconds taken."""
        total, size, seen = 0.0, 0, 0
        with self._log.consumer(TOPIC) as consumer:
            began = time.perf_counter()
            while seen < episodes:
                for record in consumer.poll(timeout=1.0):
                    tensor = tensor_of(record)
                    total += float(tensor.sum(dtype=np.float64))
                    size += tensor.nbytes
                    seen += 1
        return total, size, time.perf_counter() - began


def describe(tensor: npt.NDArray[Any]) -> list[tuple[str, bytes | None]]:
    """What the bytes alone do not say, as headers."""
    return [("dtype", str(tensor.dtype).encode()), ("shape", ",".join(map(str, tensor.shape)).encode())]


def tensor_of(record: Record) -> npt.NDArray[Any]:
    """The tensor of a record; a view of its value, read-only."""
    headers = dict(record.headers)
    shape = [int(each) for each in (headers["shape"] or b"").split(b",")]
    return np.frombuffer(record.value, (headers["dtype"] or b"").decode()).reshape(shape)


def demonstrate(log: Log, actors: int, episodes: int, console: Console) -> int:
    """Actors and learner at once; the exit code."""
    log.create_topic(TOPIC, partitions=actors)
    actor: Any = ray.remote(num_cpus=0)(Actor)
    learner: Any = ray.remote(num_cpus=0)(Learner)
    learning = learner.remote(log).learn.remote(actors * episodes)
    made = [actor.remote(log, number) for number in range(actors)]
    began = time.perf_counter()
    sent = sum(ray.get([each.roll_out.remote(episodes) for each in made]))
    seconds = time.perf_counter() - began
    got, size, took = ray.get(learning)
    console.print(f"{actors} actors sent {actors * episodes} episodes: {size / seconds / 1e6:.0f} MB/s")
    console.print(f"the learner got {size / 1e6:.0f} MB: {size / took / 1e6:.0f} MB/s")
    right = bool(np.isclose(got, sent, rtol=1e-9))
    console.print(f"what it got adds up to what was sent: {'yes' if right else 'no'}")
    return 0 if right else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; the exit code."""
    parser = argparse.ArgumentParser(description="Tensors from actors to a learner, through a topic.")
    parser.add_argument("--episodes", type=int, default=200, metavar="N", help="of each actor")
    parser.add_argument("--actors", type=int, default=2, metavar="N")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    start_ray()
    try:
        with tempfile.TemporaryDirectory(prefix="raftlog-rollouts-") as directory:
            log = raftlog.start(CLUSTER, brokers=BROKERS, data_dir=str(Path(directory) / "log"))
            try:
                return demonstrate(log, options.actors, options.episodes, console)
            finally:
                log.close()
                raftlog.shutdown(CLUSTER, force=True)
    except KeyboardInterrupt:
        return 130
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
