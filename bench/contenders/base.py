"""The interface behind which every contender stands, and what their implementations share.

A *system* is a set of servers, started once for a whole run. A *contender* is one way to use a system: a
topic's settings and a client. Contenders of one system share its servers.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

REPLICAS: Final = 3
UNCOUNTED: Final = 20
"""Calls at the beginning of each turn that do not count: connections, caches and clocks."""
MESSAGE_BYTES_MAX: Final = 8 << 20
STOP_TIMEOUT_S: Final = 15.0
START_TIMEOUT_S: Final = 90.0
_TICK_S: Final = 0.001
_CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")


class NotOffered(Exception):
    """The contender has no such thing; the text is the reason, for the table."""


class Unavailable(Exception):
    """The system cannot run on this machine; the text says in plain words what is missing."""


class Turn:
    """What one timed stretch of work came to.

    Args:
        pids: of the servers whose processor time counts.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self.records = 0
        self.untimed = 0
        """Records read before the clock started."""
        self.bytes = 0
        """Of values."""
        self.seconds = 0.0
        self.server_cpu_s = 0.0
        self.client_cpu_s = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measures the block."""
        servers, client, begin = cpu_seconds(self._pids), time.process_time(), time.perf_counter()
        yield
        self.seconds = time.perf_counter() - begin
        self.client_cpu_s = time.process_time() - client
        self.server_cpu_s = cpu_seconds(self._pids) - servers

    def read(self, count: int, poll: Callable[[], int]) -> Self:
        """Read ``count`` records. The clock starts when the first have come: connecting is not measured.

        Args:
            count: how many there are.
            poll: reads some; how many.
        """
        while self.untimed == 0:
            self.untimed = poll()
        with self.timed():
            while self.untimed + self.records < count:
                self.records += poll()
        return self

    def add(self, values: Sequence[bytes]) -> None:
        """Count records."""
        self.records += len(values)
        self.bytes += sum(map(len, values))


class System:
    """Servers. A context manager: they run within the block, and are stopped by their pids however it
    ends."""

    name = ""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[Any]] = []

    def start(self, directory: Path) -> None:
        """Start them with their data below ``directory``, and wait until they serve.

        Raises:
            Unavailable: they cannot run here.
        """
        raise NotOffered("a system starts")

    def pids(self) -> list[int]:
        """Of the servers' processes."""
        return [process.pid for process in self.processes]

    def stop(self) -> None:
        """End the processes that were started."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def spawn(self, command: Sequence[str | Path], output: Path, **options: Any) -> None:
        """Start one server in a session of its own: Ctrl-C reaches it through :meth:`stop` only. Where there
        is setpriv, it ends also if this process is killed."""
        bound = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
        with output.open("wb") as file:
            self.processes.append(
                subprocess.Popen(
                    [*bound, *map(str, command)],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    **options,
                )
            )

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = START_TIMEOUT_S) -> None:
        """Look again until it holds.

        Raises:
            Unavailable: it did not within ``timeout`` seconds, or a server ended.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if any(process.poll() is not None for process in self.processes):
                raise Unavailable(f"{self.name}: a server ended instead of: {what}")
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.name}: not within {timeout:.0f} s: {what}")
            time.sleep(0.02)


class Contender:
    """One way to use a system. What it does not override, it does not offer.

    Topics are new for each turn. Every method that writes begins with :data:`UNCOUNTED` records that are
    neither timed nor counted, returns only when all is acknowledged, and raises if anything failed.
    """

    name = ""
    """In JSON and on the command line."""
    title = ""
    """In tables."""
    settings = ""
    """Client and server settings that matter, for the page."""

    def __init__(self, system: System) -> None:
        self.system = system

    def turn(self) -> Turn:
        """A stretch of work to be timed."""
        return Turn(self.system.pids())

    def create(self, topic: str, partitions: int) -> None:
        """Make a topic with three replicas, and wait until it can be written."""

    def delete(self, topic: str) -> None:
        """Remove it and what is in it."""

    def held(self, topic: str) -> int | None:
        """How many records the servers say it holds; None where nothing is kept."""
        return None

    def sequential(self, topic: str, value: bytes, count: int) -> list[float]:
        """One acknowledged record after another; seconds each, after :data:`UNCOUNTED` more."""
        raise NotOffered("no acknowledged writes")

    def send(self, topic: str, values: Sequence[bytes], seconds: float) -> Turn:
        """One record a call, as many as it can for so long."""
        raise NotOffered("no pipelined writes")

    def send_batch(self, topic: str, values: Sequence[bytes], seconds: float) -> Turn:
        """Lists of records, as many as it can for so long."""
        raise NotOffered("its client takes one record a call")

    def paced(self, topic: str, value: bytes, rate: float, seconds: float) -> tuple[list[float], int]:
        """Send ``rate`` records a second, lingering as little as can be; seconds from when a record was due
        to its acknowledgement, of one record a millisecond, and the number of all."""
        raise NotOffered("no pipelined writes")

    def consume(self, topic: str, count: int) -> Turn:
        """Read ``count`` records from the first on, as the client's record objects."""
        raise NotOffered("nothing is kept that could be read")

    def consume_columns(self, topic: str, count: int) -> Turn:
        """The same as columns."""
        raise NotOffered("its client has no columns")

    def end_to_end(self, topic: str, value: bytes, count: int) -> list[float]:
        """From sending a record until a consumer that waits for it has it; seconds each."""
        raise NotOffered("no consumer")


def pace(
    fire: Callable[[Callable[[], None] | None], None],
    wait: Callable[[float], Any],
    rate: float,
    seconds: float,
) -> tuple[list[float], int]:
    """Open-loop load from one thread: whatever is due is fired once a millisecond.

    Args:
        fire: sends one record; calls back at its acknowledgement, if it is given something to call.
        wait: lets so many seconds pass.
        rate: records a second.
        seconds: how long.

    Returns: Seconds from when each probed record was due (not from when it was sent: a sender that is held
        up must not hide it) to its acknowledgement, of one record of each tick, complete when everything is
        acknowledged; and how many were sent.
    """
    times: list[float] = []
    begin, sent = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < seconds:
        burst = int(elapsed * rate) - sent
        if burst > 0:
            due = begin + sent / rate
            fire(lambda due=due: times.append(time.perf_counter() - due))
            for _ in range(burst - 1):
                fire(None)
            sent += burst
        wait(max(0.0, _TICK_S - (time.perf_counter() - begin - elapsed)))
    return times, sent


def stepwise(step: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each of ``count`` calls, after :data:`UNCOUNTED` more."""
    times = []
    for number in range(UNCOUNTED + count):
        begin = time.perf_counter()
        step()
        if number >= UNCOUNTED:
            times.append(time.perf_counter() - begin)
    return times


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time, user and system, that these processes have used so far."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _CLOCK_TICKS


def resident_bytes(pid: int) -> int:
    """Memory of a process that is its own or resident, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def listens(port: int) -> bool:
    """Whether somebody accepts connections there."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True
