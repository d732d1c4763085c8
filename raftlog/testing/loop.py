"""An event loop in virtual time: a whole cluster in one thread, repeatable from one seed.

Nothing here waits. When no callback is ready the clock jumps to the next timer, so hours pass in a second and
a test never depends on how fast the machine is. What runs next is drawn from a seeded Random, and everything
random in the simulation (:mod:`raftlog.testing.network`, disks, faults) draws from seeds too: the same seed
gives the same run, callback for callback, and :attr:`SimLoop.trace` proves it.

A simulated process is a *node*. Code belongs to the node in whose context it was started (``current_node`` is
a context variable, so tasks and callbacks inherit it). Callbacks of one node run in the order in which they
were scheduled, as on a real loop; between nodes the order is shuffled, as between real processes. ``kill`` is
SIGKILL: the node's callbacks and timers never run and its tasks stop where they stand, without running
``finally`` blocks.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
import struct
import sys
import threading
import time
import weakref
from asyncio import Handle, Task, TimerHandle
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from typing import Any, Final, NoReturn, TypeVar, TypeVarTuple
from zlib import crc32

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

WALL_EPOCH_MS: Final = 1_700_000_000_000
"""Where the simulated wall clocks start."""
START_TIME: Final = 1_000.0
"""``loop.time()`` at the start: not 0, so that code which takes 0 for "unset" is found out."""
CLOSE_ATTEMPTS_MAX: Final = 100


class SimulationError(Exception):
    """The simulation cannot go on; the message says why."""


class NoProgress(SimulationError):
    """What should go on by itself did not."""


class Deadlock(SimulationError):
    """Nothing is ready and no timer is set, yet what was waited for has not happened."""


class LimitReached(SimulationError):
    """The cap on steps or on virtual time: a livelock, or a simulation that is too long."""


class ConditionTimeout(SimulationError):
    """``run_until``'s condition did not become true in (virtual) time."""


class UnhandledError(SimulationError):
    """An error that nobody handled: in a callback, or in a task that nobody awaited. The cause is chained."""


class SimTask(Task[T]):
    """A task whose hash is its number. Sets of tasks are common (``gather(*tasks)``), and with the usual
    hash, an address, their order would be another in each run."""

    def __init__(self, number: int, coro: Generator[Any, None, T] | Coroutine[Any, Any, T], **options: Any):
        self._number = number  # the constructor hashes it already
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._number


class SimNode:
    """One run of a simulated process, from its start until it is killed. A restart makes a new one."""

    __slots__ = ("_clock", "_queue", "_tasks", "alive", "name", "paused")

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self._queue: deque[Handle] = deque()
        self._tasks: weakref.WeakSet[Task[Any]] = weakref.WeakSet()

    def __repr__(self) -> str:
        state = "dead" if not self.alive else "paused" if self.paused else "alive"
        return f"<SimNode {self.name or 'world'} {state}>"


class _WallClock:
    """Milliseconds as one node's clock shows them: offset + (1 + drift) x elapsed."""

    __slots__ = ("base_ms", "drift", "since")

    def __init__(self, since: float) -> None:
        self.base_ms = float(WALL_EPOCH_MS)
        self.drift = 0.0
        self.since = since

    def read(self, now: float) -> float:
        return self.base_ms + (now - self.since) * 1000.0 * (1.0 + self.drift)

    def adjust(self, now: float, jump_ms: float, drift: float | None) -> None:
        self.base_ms = self.read(now) + jump_ms
        self.since = now
        if drift is not None:
            self.drift = drift


current_node: ContextVar[SimNode | None] = ContextVar("current_node", default=None)
"""The node whose code is running; None for the test itself ("the world")."""


class SimLoop(asyncio.BaseEventLoop):
    """The loop. ``asyncio`` itself (tasks, futures, locks, timeouts) works on it unchanged.

    Args:
        seed: of the shuffle between nodes.
        steps_max: callbacks run in the loop's whole life before LimitReached.
        seconds_max: virtual seconds before LimitReached.

    Attributes:
        steps: callbacks run so far.
        on_kill: called with a SimNode right after it was killed (the network and disks listen here).
        on_step: called with the SimNode whose callback has just run (invariants are checked here).
    """

    def __init__(self, seed: int, *, steps_max: int = 20_000_000, seconds_max: float = 30 * 86_400.0) -> None:
        super().__init__()
        self.set_debug(False)
        self.steps = 0
        self.on_kill: list[Callable[[SimNode], None]] = []
        self.on_step: Callable[[SimNode], None] | None = None
        self._random = random.Random(seed)
        self._now = START_TIME
        self._steps_max = steps_max
        self._end = START_TIME + seconds_max
        self._thread = threading.get_ident()
        self._trace = crc32(b"%d" % seed)
        self._world = SimNode("")
        self._nodes: dict[str, SimNode] = {}
        self._clocks: dict[str, _WallClock] = {}
        self._runnable: list[SimNode] = []
        self._timers: list[tuple[float, int, TimerHandle, SimNode]] = []
        self._timer_sequence = 0
        self._timers_cancelled = 0
        self._task_sequence = 0
        self._graveyard: list[object] = []
        self._unhandled: list[dict[str, Any]] = []
        self._condition: Callable[[], bool] | None = None
        self._deadline: float | None = None
        self._burying = False

    # -- time and traces -------------------------------------------------------------------------------------

    def time(self) -> float:
        return self._now

    def wall_ms(self, node: str = "") -> int:
        """The wall clock of ``node``, milliseconds since the epoch."""
        clock = self._clocks.get(node)
        return int((clock or _WallClock(START_TIME)).read(self._now))

    def adjust_clock(self, node: str, *, jump_ms: float = 0, drift: float | None = None) -> None:
        """Let the wall clock of ``node`` jump, or run fast (``drift`` 0.01: by 1 %) or slow from now on."""
        self._clocks.setdefault(node, _WallClock(START_TIME)).adjust(self._now, jump_ms, drift)

    @property
    def trace(self) -> int:
        """A running hash of what ran when and of all that was given to :meth:`note`."""
        return self._trace

    def note(self, data: bytes | bytearray | memoryview) -> None:
        """Mix ``data`` into the trace."""
        self._trace = crc32(data, self._trace)

    # -- nodes -----------------------------------------------------------------------------------------------

    def get_node(self, name: str) -> SimNode:
        """The live node of that name; started if there is none."""
        node = self._nodes.get(name)
        if node is None:
            node = self._nodes[name] = SimNode(name)
        return node

    def is_alive(self, name: str) -> bool:
        """Whether a node of that name was started and not killed since."""
        return name in self._nodes

    @contextmanager
    def node(self, name: str) -> Iterator[SimNode]:
        """Within the block the code belongs to node ``name`` (which is started if need be)."""
        node = self.get_node(name)
        token = current_node.set(node)
        try:
            yield node
        finally:
            current_node.reset(token)

    def run_as(self, name: str, coro: Coroutine[Any, Any, T]) -> Task[T]:
        """Start ``coro`` as a task of node ``name`` (which is started if need be)."""
        context = copy_context()
        context.run(current_node.set, self.get_node(name))
        return self.create_task(coro, context=context)

    def pause(self, name: str) -> None:
        """SIGSTOP: nothing of the node runs until ``resume``; its timers go off and wait. Not alive: nothing
        happens."""
        node = self._nodes.get(name)
        if node is not None and not node.paused:
            node.paused = True
            if node._queue:
                self._runnable.remove(node)

    def resume(self, name: str) -> None:
        """SIGCONT."""
        node = self._nodes.get(name)
        if node is not None and node.paused:
            node.paused = False
            if node._queue:
                self._runnable.append(node)

    def kill(self, name: str) -> None:
        """SIGKILL: callbacks, timers and tasks of the node are gone. Unknown or dead: nothing happens.

        Called from within the node itself, the callback that is running still runs to its end (a task: to its
        next await); nothing that it schedules does."""
        node = self._nodes.pop(name, None)
        if node is None:
            return
        node.alive = False
        self._discard(node)
        for hook in self.on_kill:
            hook(node)

    def _discard(self, node: SimNode) -> None:
        """Take all that ``node`` has pending. It is kept, not dropped: a coroutine that is collected while it
        is suspended runs its ``finally`` blocks, which a killed process does not."""
        if node._queue and not node.paused:
            self._runnable.remove(node)
        self._graveyard.extend(node._queue)
        node._queue.clear()
        self._graveyard.extend(entry for entry in self._timers if entry[3] is node)
        self._timers = [entry for entry in self._timers if entry[3] is not node]
        heapq.heapify(self._timers)
        for task in list(node._tasks):
            if task.done():
                _set(task, "_log_traceback", False)
            else:
                _set(task, "_log_destroy_pending", False)
                self._graveyard.append(task)

    # -- scheduling ------------------------------------------------------------------------------------------

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> Handle:
        handle = Handle(callback, args, self, context)
        self._push(handle, self._owner(context))
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> Handle:
        if threading.get_ident() != self._thread:
            self._refuse("a call from another thread")
        return self.call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> TimerHandle:
        handle = TimerHandle(when, callback, args, self, context)
        node = self._owner(context)
        if not node.alive or self._burying:
            self._graveyard.append(handle)
            return handle
        self._timer_sequence += 1
        heapq.heappush(self._timers, (when, self._timer_sequence, handle, node))
        _set(handle, "_scheduled", True)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: object = None,
        context: Context | None = None,
    ) -> Task[T]:
        if self._burying or self.is_closed():
            coro.close()
            raise RuntimeError("the simulation has ended")
        self._task_sequence += 1
        task_name = f"task-{self._task_sequence}" if name is None else str(name)
        task = SimTask(self._task_sequence, coro, loop=self, name=task_name, context=context)
        self._owner(context)._tasks.add(task)
        return task

    def _owner(self, context: Context | None) -> SimNode:
        node = current_node.get() if context is None else context.get(current_node)
        return node or self._world

    def _push(self, handle: Handle, node: SimNode) -> None:
        if not node.alive or self._burying:
            self._graveyard.append(handle)
            return
        queue = node._queue
        if not queue and not node.paused:
            self._runnable.append(node)
        queue.append(handle)

    def _timer_handle_cancelled(self, handle: TimerHandle) -> None:
        self._timers_cancelled += 1
        if self._timers_cancelled > 100 and 2 * self._timers_cancelled > len(self._timers):
            self._timers = [entry for entry in self._timers if not entry[2].cancelled()]
            heapq.heapify(self._timers)
            self._timers_cancelled = 0

    # -- running ---------------------------------------------------------------------------------------------

    def run_forever(self) -> None:
        """Run until ``stop``; see asyncio. Meanwhile there is no real clock and no thread to start."""
        with _no_real_time():
            super().run_forever()

    def run_until(self, condition: Callable[[], bool], timeout: float) -> None:
        """Run until ``condition()`` holds; it is asked after every callback.

        Raises:
            ConditionTimeout: not within ``timeout`` virtual seconds.
            Deadlock: nothing is left that could make it true.
        """
        if condition():
            return
        self._run(condition, self._now + timeout)
        if not condition():
            raise ConditionTimeout(f"not within {timeout} s: {condition}; {self._describe()}")

    def run_for(self, seconds: float) -> None:
        """Run for so many virtual seconds, idle or not."""
        self._run(None, self._now + seconds)

    def _run(self, condition: Callable[[], bool] | None, deadline: float) -> None:
        self._condition, self._deadline = condition, deadline
        try:
            self.run_forever()
        finally:
            self._condition = self._deadline = None
        self._raise_unhandled()

    def run_until_complete(self, future: Generator[Any, None, T] | Awaitable[T]) -> T:
        """Run until ``future`` is done and return its result; see asyncio.

        Raises:
            Deadlock: nothing is left that could complete it.
        """
        result = super().run_until_complete(future)
        self._raise_unhandled()
        return result

    def _run_once(self) -> None:
        """One callback (asyncio's run_forever calls this until ``stop``)."""
        if not self._runnable and not self._advance():
            return
        count = len(self._runnable)
        at = 0 if count == 1 else int(self._random.random() * count)
        node = self._runnable[at]
        handle = node._queue.popleft()
        if not node._queue:
            self._runnable[at] = self._runnable[-1]
            self._runnable.pop()
        if handle.cancelled():
            return
        self.steps += 1
        self._trace = crc32(node.name.encode(), self._trace)
        handle._run()
        if self.on_step is not None:
            self.on_step(node)
        if self._unhandled:
            self._raise_unhandled()
        if self.steps > self._steps_max:
            raise LimitReached(f"{self.steps} steps; {self._describe()}")
        if self._condition is not None and self._condition():
            self.stop()

    def _advance(self) -> bool:
        """Move the clock to the next timer and make what is due ready. False: the deadline comes first."""
        timers = self._timers
        while timers and timers[0][2].cancelled():
            _set(heapq.heappop(timers)[2], "_scheduled", False)
            self._timers_cancelled -= 1
        deadline = self._deadline
        if not timers and (deadline is None or self._condition is not None):
            raise Deadlock(f"nothing left to run; {self._describe()}")
        when = timers[0][0] if timers else math.inf
        if deadline is not None and when > deadline:
            self._now = deadline
            self.stop()
            return False
        if when > self._end:
            raise LimitReached(f"virtual time is over; {self._describe()}")
        if when > self._now:
            self._now = when
            self._trace = crc32(struct.pack(">d", when), self._trace)
        while timers and timers[0][0] <= self._now:
            _, _, handle, node = heapq.heappop(timers)
            _set(handle, "_scheduled", False)
            if handle.cancelled():
                self._timers_cancelled -= 1
            else:
                self._push(handle, node)
        return bool(self._runnable)

    def _describe(self) -> str:
        waiting = [
            f"{node.name or 'world'}:{task.get_name()} {getattr(task.get_coro(), '__qualname__', '?')}"
            for node in (self._world, *self._nodes.values())
            for task in node._tasks
            if not task.done()
        ]
        return f"time {self._now - START_TIME:.6f} s, step {self.steps}, waiting: {sorted(waiting)[:40]}"

    # -- errors and the end ----------------------------------------------------------------------------------

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """Errors that nobody handled end the simulation (unless ``set_exception_handler`` was called)."""
        if not self.is_closed():
            self._unhandled.append(context)

    def _raise_unhandled(self) -> None:
        if not self._unhandled:
            return
        context, self._unhandled = self._unhandled[0], []
        raise UnhandledError(f"{context.get('message')}; {self._describe()}") from context.get("exception")

    def close(self) -> None:
        """End the simulation. Every node and the world is discarded as by ``kill``; only now are the
        coroutines closed, when nothing that their ``finally`` blocks could do has an effect any more."""
        if self.is_closed():
            return
        for node in (self._world, *self._nodes.values()):
            self._discard(node)
            node.alive = False
        self._nodes.clear()
        super().close()
        self._burying = True
        for item in self._graveyard:
            if isinstance(item, Task):
                _close(item.get_coro())
        self._graveyard.clear()

    # -- refused ---------------------------------------------------------------------------------------------

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(f"{what} is not possible in the simulation: go through the Network and Disk seams")


def _refusal(what: str) -> Callable[..., NoReturn]:
    def refuse(self: SimLoop, *_: object, **__: object) -> NoReturn:
        self._refuse(what)

    return refuse


for _name, _what in (
    ("run_in_executor", "a thread"),
    ("getaddrinfo", "a real network address"),
    ("create_connection", "a real connection"),
    ("create_server", "a real socket"),
    ("create_datagram_endpoint", "a real socket"),
    ("sock_connect", "a real socket"),
    ("add_reader", "a real file descriptor"),
    ("add_writer", "a real file descriptor"),
    ("add_signal_handler", "a signal"),
    ("subprocess_exec", "a real process"),
    ("subprocess_shell", "a real process"),
):
    setattr(SimLoop, _name, _refusal(_what))


_CLOCKS: Final = ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "sleep")


@contextmanager
def _no_real_time() -> Iterator[None]:
    """Within the block raftlog's code reads no real clock in this thread, which starts no other one."""
    here = threading.get_ident()
    clocks = {name: getattr(time, name) for name in _CLOCKS}
    start = threading.Thread.start

    def refused(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def clock(*args: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if threading.get_ident() == here and caller.partition(".")[0] == "raftlog":
                raise RuntimeError(f"time.{name} is not possible in the simulation: go through the seams")
            return real(*args)

        return clock

    def start_refused(thread: threading.Thread) -> None:
        if threading.get_ident() == here:
            raise RuntimeError("a thread is not possible in the simulation: go through the seams")
        start(thread)

    for name, real in clocks.items():
        setattr(time, name, refused(name, real))
    _set(threading.Thread, "start", start_refused)
    try:
        yield
    finally:
        _set(threading.Thread, "start", start)
        for name, real in clocks.items():
            setattr(time, name, real)


def _set(target: object, attribute: str, value: object) -> None:
    """Set an attribute that asyncio keeps for event loops (and that its type stubs therefore do not show)."""
    setattr(target, attribute, value)


def _close(coro: Any) -> None:
    for _ in range(CLOSE_ATTEMPTS_MAX):
        try:
            coro.close()
        except BaseException:  # noqa: BLE001 - a dead node's finally blocks may raise anything
            continue
        return
