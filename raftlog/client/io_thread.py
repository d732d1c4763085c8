"""The one thread of a process on which all blocking handles do their I/O: a daemon with a uvloop loop of its
own.

It starts with the first handle that needs it. After a fork the child has no such thread; it gets a new one
when it asks, and what it inherited is kept for ever, untouched: freeing the parent's loop would unregister
sockets that the parent still waits on (both share one epoll instance).
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from raftlog.errors import Closed

T = TypeVar("T")

_JOIN_S: Final = 2.0


class IoThread:
    """A running event loop on a thread of its own."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = _new_loop()
        self._thread = threading.Thread(target=self._run, name="raftlog-io", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()

    def call(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on the loop and block until it is done.

        Raises:
            TimeoutError: not within ``timeout`` seconds; it was cancelled.
            RuntimeError: called on the I/O thread itself, which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError(
                "a callback on raftlog's I/O thread may not block: hand over to another thread"
            )
        if self.loop.is_closed():
            work.close()
            raise Closed("the process is ending")
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise
        except KeyboardInterrupt:
            future.cancel()
            raise

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Run a callback on the loop; nothing happens if the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(callback, *args)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine on the loop; nobody waits for it."""
        try:
            asyncio.run_coroutine_threadsafe(work, self.loop)
        except RuntimeError:  # the loop has ended
            work.close()

    def stop(self) -> None:
        """End the loop and its thread."""
        self.call_soon(self.loop.stop)
        self._thread.join(_JOIN_S)


_lock = threading.Lock()
_present: IoThread | None = None
_inherited: list[IoThread] = []
"""Of parent processes: never freed, see the module."""


def io_thread() -> IoThread:
    """This process's I/O thread."""
    global _present
    present = _present
    if present is not None and present.pid == os.getpid():
        return present
    with _lock:
        if _present is None or _present.pid != os.getpid():
            _present = IoThread()
        return _present


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _after_fork_in_child() -> None:
    global _present, _lock
    _lock = threading.Lock()  # another thread may have held it
    if _present is not None:
        _inherited.append(_present)
        _present = None


@atexit.register
def _at_exit() -> None:
    if _present is not None and _present.pid == os.getpid():
        _present.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
