"""``log.process`` with several workers: one Ray actor each, members of one group.

An actor is a thin host of the loop that one process would run. Ray brings back one that died; it comes under
the same name, so that it fences its predecessor at once, and begins where the group's positions are. The
actors belong to the job that started them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Final

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from raftlog.actors.options import Actor, Ref, processor_options
from raftlog.client.log import Log
from raftlog.client.process import Function, ProcessStats, Work
from raftlog.client.processing import STOP_S, Processing, not_ended

GRACE_S: Final = 5.0
"""What a call may take beyond the time that its work is given."""


class ProcessorHost:
    """The actor's class: one worker."""

    def __init__(self, log: Log, work: Work, function: Function) -> None:
        self._processing = log._start_work(work, function)

    def run(self) -> ProcessStats:
        """Returns when the loop has ended."""
        return self._processing.wait()

    def stats(self) -> ProcessStats:
        """What it has done since it was started last."""
        return self._processing.stats

    def stop(self, timeout: float | None) -> ProcessStats:
        """See :class:`raftlog.client.processing.Processing`."""
        return self._processing.stop(timeout)


ProcessorActor: Any = ray.remote(ProcessorHost)


class ActorProcessing(Processing):
    """See the module.

    Args:
        log: the cluster.
        work: what each is to do.
        function: pickled to each.
        workers: how many.
    """

    def __init__(self, log: Log, work: Work, function: Function, workers: int) -> None:
        options = processor_options() | work.config.actor_options
        self.actors: list[Actor] = [
            ProcessorActor.options(**options).remote(log, replace(work, name=f"{work.name}-{each}"), function)
            for each in range(workers)
        ]
        self._runs: list[Ref] = [actor.run.remote() for actor in self.actors]
        self._final: ProcessStats | None = None

    @property
    def stats(self) -> ProcessStats:
        """See :class:`raftlog.client.processing.Processing`. What workers did that died is not counted."""
        if self._final is not None:
            return self._final
        return total(ray.get([actor.stats.remote() for actor in self.actors], timeout=STOP_S))

    def done(self) -> bool:
        """See :class:`raftlog.client.processing.Processing`."""
        if self._final is not None:
            return True
        _, running = ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        return not running

    def wait(self, timeout: float | None = None) -> ProcessStats:
        """See :class:`raftlog.client.processing.Processing`."""
        if self._final is None:
            try:
                self._final = total(ray.get(self._runs, timeout=timeout))
            except GetTimeoutError:
                raise not_ended(timeout) from None
            self._kill()
        return self._final

    def stop(self, timeout: float | None = STOP_S) -> ProcessStats:
        """See :class:`raftlog.client.processing.Processing`."""
        if self._final is None:
            stopping = [actor.stop.remote(timeout) for actor in self.actors]
            try:
                limit = None if timeout is None else timeout + GRACE_S
                self._final = total(ray.get(stopping, timeout=limit))
            except GetTimeoutError:
                raise not_ended(timeout) from None
            finally:
                self._kill()
        return self._final

    def _kill(self) -> None:
        for actor in self.actors:
            try:
                ray.kill(actor)
            except RayActorError:
                continue  # it is gone already


def process_in_actors(log: Log, work: Work, function: Function, workers: int) -> ActorProcessing:
    """Start the workers; ``ray.init()`` if need be."""
    if not ray.is_initialized():
        ray.init()
    return ActorProcessing(log, work, function, workers)


def total(parts: Sequence[ProcessStats]) -> ProcessStats:
    """The sum of what several workers did."""
    return ProcessStats(*(sum(getattr(each, field.name) for each in parts) for field in fields(ProcessStats)))
