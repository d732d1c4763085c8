"""What ``send`` returns: a light view on one record of a batch. The batch completes once, for all of its
records.

A ``concurrent.futures.Future`` per record would cost more than everything else that is done for it (5.8 us);
a :class:`Delivery` is three references, and waiting is a callback on the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, Final

from raftlog.errors import NotPicklable, NotRunning, RequestTimeout, UseAfterFork
from raftlog.record.types import BatchRange, RecordMetadata

log = logging.getLogger("raftlog.client")

NO_OFFSET: Final = -1

ref_factory: Callable[[Completion, int, int], Any] | None = None
"""Makes ``Delivery.ref`` from (batch, index, timestamp_ms); installed by ``raftlog.actors.promises``."""


class Completion:
    """The outcome of a batch, to be.

    Thread-safe without a lock: :meth:`complete` sets ``done`` before it runs the callbacks, and who adds a
    callback looks at ``done`` after adding it. So one of the two sees the other, and ``deque.popleft`` gives
    each callback to exactly one of them.
    """

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_looked_at",
        "_loop",
        "_pid",
        "base_offset",
        "count",
        "done",
        "error",
        "hurry",
        "partition",
        "topic",
    )

    def __init__(self, topic: str, partition: int, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pid = os.getpid()
        self.topic = topic
        self.partition = partition
        self.count = 0
        """Records in it."""
        self.done = False
        self.base_offset = NO_OFFSET
        self.error: BaseException | None = None
        self.hurry: Callable[[], None] | None = None
        """Called when somebody begins to wait, so that an open batch does not linger."""
        self._callbacks: deque[Callable[[], None]] = deque()
        self._looked_at: set[int] = set()

    def complete(self, base_offset: int, error: BaseException | None) -> None:
        """Settle it, once: with the offset of its first record (NO_OFFSET: unknown), or with an error."""
        assert not self.done, "a batch completes once"
        self.base_offset = base_offset
        self.error = error
        self.hurry = None
        self.done = True
        self._run_callbacks()

    def add_callback(self, callback: Callable[[], None]) -> None:
        """Run ``callback`` when it is done, on the thread that completes it; now, if it is done."""
        self._callbacks.append(callback)
        if self.done:
            self._run_callbacks()

    def wait(self, timeout: float | None) -> bool:
        """Block until it is done; False when ``timeout`` seconds were not enough."""
        if self.done:
            return True
        self.prepare_to_block()
        latch = threading.Lock()
        latch.acquire()
        self.add_callback(latch.release)
        return latch.acquire(timeout=-1 if timeout is None else max(timeout, 0.0))

    def prepare_to_block(self) -> None:
        """What has to happen before a thread waits for it: send it, and see that somebody else can complete
        it."""
        if self._pid != os.getpid():
            raise UseAfterFork(f"this was sent by process {self._pid}, before a fork: wait for it there")
        if _running_loop() is self._loop:
            raise RuntimeError("this would block the event loop that has to complete it: await it instead")
        if self.hurry is not None:
            self.hurry()

    async def until_done(self) -> None:
        """Wait on the running loop until it is done."""
        if self.done:
            return
        if self.hurry is not None:
            self.hurry()
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self.add_callback(partial(_settle, future) if loop is self._loop else partial(_wake, loop, future))
        await future

    def look_at(self, index: int) -> None:
        """The caller takes notice of this record's outcome."""
        self._looked_at.add(index)

    def ignored(self) -> int:
        """How many records failed without anybody having taken notice."""
        return 0 if self.error is None else self.count - len(self._looked_at)

    def _run_callbacks(self) -> None:
        while True:
            try:
                callback = self._callbacks.popleft()
            except IndexError:
                return
            callback()


class Delivery:
    """One record under way. Wait for it with :meth:`result`, or ``await`` it; or look later, or never:
    failures that nobody looked at are raised by ``flush``, ``close`` and at the end of ``with``."""

    __slots__ = ("_batch", "_index", "_ref", "_timestamp_ms")

    _ref: Any

    def __init__(self, batch: Completion, index: int, timestamp_ms: int) -> None:
        self._batch = batch
        self._index = index
        self._timestamp_ms = timestamp_ms

    def __repr__(self) -> str:
        batch = self._batch
        if not batch.done:
            state = "under way"
        elif batch.error is None:
            state = f"offset {self._metadata().offset}"
        else:
            state = f"failed: {batch.error}"
        return f"<Delivery to {batch.topic}[{batch.partition}], {state}>"

    def result(self, timeout: float | None = None) -> RecordMetadata:
        """Block until the record is acknowledged.

        A record that lingers for company is sent at once.

        Args:
            timeout: seconds; None waits as long as it takes, which ``delivery_timeout_ms`` bounds.

        Raises:
            RequestTimeout: still under way; ask again.
            RaftlogError: it failed, and ``indeterminate`` says whether it may have been written nevertheless.
        """
        batch = self._batch
        if not batch.done and not batch.wait(timeout):
            raise _still_under_way(batch, timeout)
        if batch.error is not None:
            batch.look_at(self._index)
            raise batch.error.with_traceback(None)
        return self._metadata()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Block until it is acknowledged (None) or failed (why).

        Raises:
            RequestTimeout: still under way after ``timeout`` seconds.
        """
        batch = self._batch
        if not batch.done and not batch.wait(timeout):
            raise _still_under_way(batch, timeout)
        batch.look_at(self._index)
        return batch.error

    def done(self) -> bool:
        """Whether it is acknowledged or failed."""
        return self._batch.done

    def add_done_callback(self, callback: Callable[[Delivery], None]) -> None:
        """Call ``callback(delivery)`` when it is done; now, if it is.

        It runs on the client's I/O thread: it should be short, and must not block on another delivery. What
        it raises is logged.
        """
        self._batch.look_at(self._index)

        def run() -> None:
            try:
                callback(self)
            except Exception:  # user code, on a thread that others depend on
                log.exception("a callback of %r raised", self)

        self._batch.add_callback(run)

    @property
    def ref(self) -> Any:
        """The same as a Ray ``ObjectRef`` of the RecordMetadata, made when first asked for: pass it to tasks
        and actors, ``ray.get`` it, ``ray.wait`` on it.

        Raises:
            NotRunning: Ray is not initialised in this process.
        """
        try:
            return self._ref
        except AttributeError:
            self._batch.look_at(self._index)
            self._ref = _make_ref(self._batch, self._index, self._timestamp_ms)
        return self._ref

    def __await__(self) -> Generator[Any, None, RecordMetadata]:
        batch = self._batch
        if not batch.done:
            yield from batch.until_done().__await__()
        if batch.error is not None:
            batch.look_at(self._index)
            raise batch.error.with_traceback(None)
        return self._metadata()

    def _metadata(self) -> RecordMetadata:
        batch = self._batch
        offset = NO_OFFSET if batch.base_offset == NO_OFFSET else batch.base_offset + self._index
        return RecordMetadata(batch.topic, batch.partition, offset, self._timestamp_ms)

    def __reduce__(self) -> Any:
        raise not_picklable("a Delivery", "delivery.ref, or what delivery.result() returns")


class BatchDelivery:
    """What ``send_batch`` returns: whole batches under way."""

    __slots__ = ("_batches",)

    def __init__(self, batches: Sequence[Completion]) -> None:
        self._batches = batches

    def __repr__(self) -> str:
        done = sum(batch.done for batch in self._batches)
        count = sum(batch.count for batch in self._batches)
        return f"<BatchDelivery of {count} records, {done} of {len(self._batches)} batches done>"

    def result(self, timeout: float | None = None) -> list[BatchRange]:
        """Block until all of it is acknowledged.

        Args:
            timeout: seconds for all of it; None waits as long as it takes, which ``delivery_timeout_ms``
                bounds.

        Returns:
            Where each batch was written, in the order of the values.

        Raises:
            RequestTimeout: still under way; ask again.
            RaftlogError: one of them failed; the others may have succeeded.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self._ranges()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Block until all of it is settled; the first failure, or None.

        Raises:
            RequestTimeout: still under way after ``timeout`` seconds.
        """
        if not wait_for_all(self._batches, timeout):
            raise _still_under_way(self, timeout)
        return self._look()

    def done(self) -> bool:
        """Whether every batch is acknowledged or failed."""
        return all(batch.done for batch in self._batches)

    def add_done_callback(self, callback: Callable[[BatchDelivery], None]) -> None:
        """Call ``callback(batch_delivery)`` once all of it is done; see
        :meth:`Delivery.add_done_callback`."""
        for batch in self._batches:
            _look_at_all(batch)

        def run() -> None:
            try:
                callback(self)
            except Exception:  # user code, on a thread that others depend on
                log.exception("a callback of %r raised", self)

        when_all_done(self._batches, run)

    def __await__(self) -> Generator[Any, None, list[BatchRange]]:
        for batch in self._batches:
            if not batch.done:
                yield from batch.until_done().__await__()
        error = self._look()
        if error is not None:
            raise error
        return self._ranges()

    def _look(self) -> BaseException | None:
        first: BaseException | None = None
        for batch in self._batches:
            if batch.error is not None:
                _look_at_all(batch)
                first = first or batch.error
        return first

    def _ranges(self) -> list[BatchRange]:
        return [
            BatchRange(batch.topic, batch.partition, batch.base_offset, batch.count)
            for batch in self._batches
        ]

    def __reduce__(self) -> Any:
        raise not_picklable("a BatchDelivery", "what batch_delivery.result() returns")


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _wake(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    """Tell who waits on another loop than the one that completes batches."""
    with contextlib.suppress(RuntimeError):  # that loop was closed: nobody waits any more
        loop.call_soon_threadsafe(_settle, future)


def wait_for_all(batches: Sequence[Completion], timeout: float | None) -> bool:
    """Block until all are done; False when ``timeout`` seconds were not enough."""
    left = [batch for batch in batches if not batch.done]
    if not left:
        return True
    for batch in left:
        batch.prepare_to_block()
    latch = threading.Lock()
    latch.acquire()
    when_all_done(left, latch.release)
    return latch.acquire(timeout=-1 if timeout is None else max(timeout, 0.0))


def when_all_done(batches: Sequence[Completion], callback: Callable[[], None]) -> None:
    """Run ``callback`` once, when the last of the batches is done."""
    tokens = deque(reversed(range(len(batches))))

    def one_is_done() -> None:
        # popleft is atomic and goes in order: whoever draws 0 is the last, on whichever thread
        if tokens.popleft() == 0:
            callback()

    for batch in batches:
        batch.add_callback(one_is_done)


def _look_at_all(batch: Completion) -> None:
    for index in range(batch.count):
        batch.look_at(index)


def _still_under_way(what: object, timeout: float | None) -> RequestTimeout:
    return RequestTimeout(f"still under way after {timeout:g} s: {what!r}")


def not_picklable(what: str, instead: str) -> NotPicklable:
    """The error for pickling a handle that cannot leave its process; says what to pass instead."""
    return NotPicklable(f"{what} is tied to its process: pass {instead}")


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _make_ref(batch: Completion, index: int, timestamp_ms: int) -> Any:
    if ref_factory is None and "ray" in sys.modules:
        importlib.import_module("raftlog.actors.promises")  # installs itself as ref_factory
    if ref_factory is None:
        raise NotRunning("delivery.ref is a Ray ObjectRef, and Ray is not initialised in this process")
    return ref_factory(batch, index, timestamp_ms)
