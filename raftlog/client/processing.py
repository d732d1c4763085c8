"""Handles of the loops that ``log.process`` started: to wait for them, and to stop them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

from raftlog.client.cluster import ClusterClient
from raftlog.client.io_thread import IoThread
from raftlog.client.process import Called, Function, ProcessLoop, ProcessStats, Work, await_all, call_all
from raftlog.errors import RaftlogError, RequestTimeout
from raftlog.record.types import Record

log = logging.getLogger("raftlog.client")

STOP_S: Final = 30.0

_running: set[Processing] = set()
"""Nobody has to hold a handle for its loop to go on."""


class Processing(ABC):
    """Loops that run in the background, in this process or in actors. Leaving the ``with`` of this handle
    stops them."""

    @property
    @abstractmethod
    def stats(self) -> ProcessStats:
        """What has been done so far, by all workers."""

    @abstractmethod
    def done(self) -> bool:
        """Whether they have ended."""

    @abstractmethod
    def wait(self, timeout: float | None = None) -> ProcessStats:
        """Block until they have ended.

        Args:
            timeout: seconds; None: as long as it takes.

        Raises:
            RequestTimeout: they go on.
            RaftlogError: what one ended with.
        """

    @abstractmethod
    def stop(self, timeout: float | None = STOP_S) -> ProcessStats:
        """End after the batches that are under way.

        Args:
            timeout: seconds that they get to do so; then they are broken off, and whoever reads those batches
                next does them again.

        Raises:
            RequestTimeout: they were broken off.
            RaftlogError: what one ended with.
        """

    def close(self) -> None:
        """Stop, for the end of the Log; what it ended with is only logged."""
        try:
            self.stop()
        except RaftlogError as failure:
            log.warning("log.process has ended: %s", failure)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except RaftlogError as failure:
            if error is None:
                raise
            log.warning("while leaving on %r: %r", error, failure)


class ThreadProcessing(Processing):
    """A loop in this process, which calls its function on a thread of its own."""

    def __init__(
        self, owner: object, io: IoThread, cluster: ClusterClient, work: Work, function: Function
    ) -> None:
        self._owner = owner  # a Log that nobody holds closes its connections
        self._io = io
        self._executor = concurrent.futures.ThreadPoolExecutor(1, f"raftlog-{work.group}")
        self._loop = ProcessLoop(cluster, work, partial(self._call, function))
        self._ended = asyncio.run_coroutine_threadsafe(self._loop.run(), io.loop)
        _running.add(self)
        self._ended.add_done_callback(self._forget)

    async def _call(self, function: Function, records: Sequence[Record]) -> Sequence[Called]:
        running = asyncio.get_running_loop()
        return await running.run_in_executor(self._executor, call_all, function, records)

    def _forget(self, _: object) -> None:
        _running.discard(self)
        self._executor.shutdown(wait=False)

    @property
    def stats(self) -> ProcessStats:
        """See :class:`Processing`."""
        return self._loop.stats

    def done(self) -> bool:
        """See :class:`Processing`."""
        return self._ended.done()

    def wait(self, timeout: float | None = None) -> ProcessStats:
        """See :class:`Processing`."""
        try:
            return self._ended.result(timeout)
        except concurrent.futures.TimeoutError:
            raise not_ended(timeout) from None

    def stop(self, timeout: float | None = STOP_S) -> ProcessStats:
        """See :class:`Processing`."""
        self._io.call_soon(self._loop.stop)
        try:
            return self.wait(timeout)
        except RequestTimeout:
            self._ended.cancel()
            raise


class AioProcessing:
    """As :class:`Processing`, on the loop on which it was started. The function may be asynchronous; if it is
    not, it is called in place and should be short."""

    def __init__(
        self,
        cluster: ClusterClient,
        work: Work,
        function: Callable[[Record], Any],
    ) -> None:
        self._loop = ProcessLoop(cluster, work, partial(await_all, function))
        self._task = asyncio.get_running_loop().create_task(self._loop.run())

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._task.done()

    @property
    def stats(self) -> ProcessStats:
        """What it has done so far."""
        return self._loop.stats

    def done(self) -> bool:
        """Whether it has ended."""
        return self._task.done()

    async def wait(self, timeout: float | None = None) -> ProcessStats:
        """As :meth:`Processing.wait`."""
        await asyncio.wait([self._task], timeout=timeout)
        if not self._task.done():
            raise not_ended(timeout)
        return self._task.result()

    async def stop(self, timeout: float | None = STOP_S) -> ProcessStats:
        """As :meth:`Processing.stop`."""
        self._loop.stop()
        try:
            return await self.wait(timeout)
        except RequestTimeout:
            self._task.cancel()
            raise

    async def close(self) -> None:
        """Stop, for the end of the Log; what it ended with is only logged."""
        try:
            await self.stop()
        except RaftlogError as failure:
            log.warning("log.process has ended: %s", failure)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.stop()
        except RaftlogError as failure:
            if error is None:
                raise
            log.warning("while leaving on %r: %r", error, failure)


def not_ended(timeout: float | None) -> RequestTimeout:
    """The error of waiting in vain."""
    return RequestTimeout(f"it has not ended within {timeout} s", indeterminate=False)
