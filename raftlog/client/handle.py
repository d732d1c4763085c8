"""What the blocking and the asynchronous handles have in common: who may use them, and how they wait."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Never

from raftlog.client.delivery import not_picklable
from raftlog.errors import Closed, ConcurrentUse, UseAfterFork

_client_ids: dict[int, str] = {}


def process_client_id() -> str:
    """Who this process is in the brokers' logs: ``host:pid:random``."""
    pid = os.getpid()
    found = _client_ids.get(pid)
    if found is None:
        found = _client_ids[pid] = f"{socket.gethostname()}:{pid}:{uuid.uuid4().hex[:6]}"
    return found


class Handle:
    """A handle that is tied to the process it was made in."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._pid = os.getpid()
        self._closed = False
        self._usable = True
        """Neither closed nor inherited through a fork: one look at it is all that a hot path pays."""
        _handles.add(self)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def _check_open(self) -> None:
        if self._usable:
            return
        if self._pid != os.getpid():
            raise UseAfterFork(f"this {self._kind} was made in process {self._pid}, before a fork")
        raise Closed(f"the {self._kind} is closed")

    def _begin_close(self) -> bool:
        """Mark it closed; False if there is nothing to do, because it is or because it is the parent
        process's."""
        if not self._usable:
            return False
        self._closed = True
        self._usable = False
        return True

    def __reduce__(self) -> Never:
        raise not_picklable(
            f"a {self._kind.capitalize()}", f"the Log, and call log.{self._kind}(…) where it is used"
        )

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__name__}{' (closed)' if self._closed else ''}>"


_handles: weakref.WeakSet[Handle] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for handle in _handles:
        handle._usable = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class OneUser:
    """Refuses a second thread, or a second task, while a first is inside."""

    __slots__ = ("_depth", "_identify", "_lock", "_user")

    def __init__(self, identify: Callable[[], Any] = threading.get_ident) -> None:
        self._identify = identify
        self._lock = threading.Lock()
        self._user: Any = None
        self._depth = 0

    def __enter__(self) -> None:
        user = self._identify()
        with self._lock:
            if self._depth and self._user != user:
                raise ConcurrentUse(
                    "a consumer belongs to one user at a time: give each thread or task its own"
                )
            self._user = user
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth:
                self._user = None


def block_until(register: Callable[[Callable[[], None]], None], timeout: float | None) -> bool:
    """Block the calling thread until the callback given to ``register`` was called.

    Args:
        register: is given the callback; may call it at once, from any thread, once.
        timeout: seconds; None: as long as it takes.

    Returns:
        False if ``timeout`` seconds were not enough.
    """
    latch = threading.Lock()
    latch.acquire()
    register(latch.release)
    return latch.acquire(timeout=-1 if timeout is None else min(max(timeout, 0.0), threading.TIMEOUT_MAX))


async def wait_until(register: Callable[[Callable[[], None]], None], timeout: float | None) -> bool:
    """The same on the running loop, on which ``register``'s callback is called too."""
    arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    register(partial(_settle, arrived))
    if timeout is None:
        await arrived
        return True
    try:
        async with asyncio.timeout(max(timeout, 0.0)):
            await arrived
    except TimeoutError:
        return False
    return True


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Deadline:
    """What is left of a timeout."""

    __slots__ = ("_at", "_clock")

    def __init__(self, timeout: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = None if timeout is None else clock() + timeout

    def left(self) -> float | None:
        """Seconds left, not below 0; None if there is no limit."""
        return None if self._at is None else max(self._at - self._clock(), 0.0)

    def over(self) -> bool:
        """Whether nothing is left."""
        return self._at is not None and self._clock() >= self._at
