"""``delivery.ref``: a Ray ObjectRef that resolves to a delivery's RecordMetadata.

Refs of deliveries under way hang on a small *promises* actor of this process, never on a broker: hundreds of
pending calls on an async actor starve every other call on it. Even here only one call per *batch* is pending;
a record's ref is a call that takes that batch's outcome as its argument, and such a call waits at the caller
until its argument is there. 5,000 refs therefore cost the actor a handful of pending calls.

The actor and the refs are owned by the producing process: when that is killed, whoever waits on them gets
Ray's OwnerDiedError at once. While it lives, it settles every batch within its delivery timeout.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import weakref
from typing import Any

import ray

from raftlog.actors.options import Actor, Ref, promises_options
from raftlog.client import delivery
from raftlog.client.delivery import NO_OFFSET, Completion
from raftlog.errors import NotRunning, RaftlogError
from raftlog.record.types import RecordMetadata


class PromisesHost:
    """The actor's class: outcomes of batches, each told once by the producer and awaited by one call."""

    def __init__(self) -> None:
        self._outcomes: dict[int, asyncio.Future[Any]] = {}

    def _future(self, batch: int) -> asyncio.Future[Any]:
        # Calls of an async actor arrive in any order: whichever comes first makes the future.
        return self._outcomes.setdefault(batch, asyncio.get_running_loop().create_future())

    async def outcome(self, batch: int) -> Any:
        """Wait for a batch's outcome: (topic, partition, base offset), or the error it failed with. The
        producer settles every batch within its delivery timeout, and this actor ends with the producer's
        process."""
        try:
            return await self._future(batch)
        finally:
            self._outcomes.pop(batch, None)

    async def tell(self, batch: int, outcome: Any) -> None:
        """The producer's word on a batch."""
        future = self._future(batch)
        if not future.done():
            future.set_result(outcome)

    async def watch(self) -> None:
        """Never answered: the call fails when this actor ends, and so its caller hears of it."""
        await asyncio.Event().wait()

    def pick(self, outcome: Any, index: int, timestamp_ms: int) -> RecordMetadata:
        """One record's metadata out of its batch's outcome.

        Raises:
            RaftlogError: what the batch failed with.
        """
        if isinstance(outcome, RaftlogError):
            raise outcome
        return _metadata(outcome, index, timestamp_ms)


PromisesActor: Any = ray.remote(PromisesHost)


class _Promises:
    """This process's side: its actor, and which batches have a call pending there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.actor: Actor | None = None
        self._pid = 0
        self._job = ""
        self._numbers = itertools.count()
        self._outcomes: weakref.WeakKeyDictionary[Completion, Ref] = weakref.WeakKeyDictionary()

    def ref(self, batch: Completion, index: int, timestamp_ms: int) -> Ref:
        """The ref of one record."""
        if not ray.is_initialized():
            raise NotRunning("delivery.ref is a Ray ObjectRef, and Ray is not initialised in this process")
        if batch.done and batch.error is None:
            return ray.put(_metadata(_outcome(batch), index, timestamp_ms))
        with self._lock:
            actor = self._actor_here()
            outcome = self._outcomes.get(batch)
            if outcome is None:
                number = next(self._numbers)
                outcome = self._outcomes[batch] = actor.outcome.remote(number)
                batch.add_callback(lambda: actor.tell.remote(number, _outcome(batch)))
            return actor.pick.remote(outcome, index, timestamp_ms)

    def _actor_here(self) -> Actor:
        """The actor of this process and this connection to Ray; a new one if it was killed."""
        job = ray.get_runtime_context().get_job_id()
        if self.actor is None or (self._pid, self._job) != (os.getpid(), job):
            actor = self.actor = PromisesActor.options(**promises_options()).remote()
            self._pid, self._job = os.getpid(), job
            self._outcomes.clear()
            actor.watch.remote().future().add_done_callback(lambda _: self._ended(actor))
        return self.actor

    def _ended(self, actor: Actor) -> None:
        with self._lock:
            if self.actor is actor:
                self.actor = None


def _outcome(batch: Completion) -> Any:
    if batch.error is None:
        return batch.topic, batch.partition, batch.base_offset
    if isinstance(batch.error, RaftlogError):
        return batch.error
    return RaftlogError(str(batch.error))


def _metadata(outcome: tuple[str, int, int], index: int, timestamp_ms: int) -> RecordMetadata:
    topic, partition, base_offset = outcome
    offset = base_offset if base_offset == NO_OFFSET else base_offset + index
    return RecordMetadata(topic, partition, offset, timestamp_ms)


_promises = _Promises()
delivery.ref_factory = _promises.ref


def actor_of_this_process() -> Actor | None:
    """The promises actor, if a ref has been asked for in this process."""
    return _promises.actor
