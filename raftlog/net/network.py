"""The Network seam and the bundle of seams that everything asynchronous is given.

Code above the core reaches the outside through four seams only: the running loop's clock (``loop.time()``,
``loop.call_later``), :class:`Network`, :class:`raftlog.storage.disk.Disk`, and a seeded ``random.Random``.
The real ones serve production; the simulated ones (``raftlog.testing``) run a whole cluster in one process in
virtual time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from raftlog.errors import ConnectionLost

StreamProtocol: TypeAlias = asyncio.Protocol | asyncio.BufferedProtocol


def deliver(protocol: StreamProtocol, data: bytes) -> None:
    """Give a protocol bytes that are there already, as a loop gives it what it receives."""
    if isinstance(protocol, asyncio.Protocol):
        protocol.data_received(data)
        return
    left = memoryview(data)
    while left:
        with memoryview(protocol.get_buffer(len(left))) as buffer:
            count = min(len(buffer), len(left))
            buffer[:count] = left[:count]
        protocol.buffer_updated(count)
        left = left[count:]


class Listener(Protocol):
    """A listening socket."""

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) it is bound to."""

    def close(self) -> None:
        """Stop accepting. Connections that are open stay open."""


class Network(Protocol):
    """Byte streams between processes, in the shape of asyncio's own protocol and transport pairs."""

    async def listen(self, protocol_factory: Callable[[], StreamProtocol], host: str, port: int) -> Listener:
        """Accept connections on (host, port); port 0 picks a free one.

        Raises:
            OSError: the address is in use or not of this machine.
        """

    async def connect(
        self, protocol_factory: Callable[[], StreamProtocol], host: str, port: int, *, timeout: float
    ) -> tuple[asyncio.Transport, StreamProtocol]:
        """Open a connection within ``timeout`` seconds.

        Raises:
            ConnectionLost: refused, unreachable, or no answer in time.
        """


@dataclass(frozen=True, slots=True)
class Seams:
    """What a broker, controller or client is given to reach the outside (brokers get a Disk as well)."""

    network: Network
    random: random.Random
    wall_ms: Callable[[], int]
    """Wall clock, milliseconds since the epoch; may jump."""
    clock_s: Callable[[], float]
    """For measuring: seconds that never go back, exact also within a turn of the loop, whose own time stands
    still meanwhile."""


class RealListener:
    """A Listener over an asyncio server."""

    def __init__(self, server: asyncio.Server) -> None:
        self._server = server
        host, port = server.sockets[0].getsockname()[:2]
        self._address = (str(host), int(port))

    @property
    def address(self) -> tuple[str, int]:
        return self._address

    def close(self) -> None:
        self._server.close()


@dataclass(frozen=True, slots=True)
class RealNetwork:
    """TCP through the running loop (uvloop in production)."""

    backlog: int = field(default=512)

    async def listen(
        self, protocol_factory: Callable[[], StreamProtocol], host: str, port: int
    ) -> RealListener:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(protocol_factory, host, port, backlog=self.backlog)
        return RealListener(server)

    async def connect(
        self, protocol_factory: Callable[[], StreamProtocol], host: str, port: int, *, timeout: float
    ) -> tuple[asyncio.Transport, StreamProtocol]:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                return await loop.create_connection(protocol_factory, host, port)
        except (OSError, TimeoutError) as error:
            raise ConnectionLost(
                f"cannot connect to {host}:{port}: {str(error) or 'no answer in time'}"
            ) from error


def real_seams(seed: int | None = None) -> Seams:
    """Production's seams. ``seed`` is for tests; by default the operating system's entropy seeds the
    Random."""
    return Seams(RealNetwork(), random.Random(seed), lambda: time.time_ns() // 1_000_000, time.perf_counter)


def seen(done: asyncio.Future[Any]) -> None:
    """To be called at a task's or a future's end: why it failed is of no interest when nobody waits any
    more."""
    if not done.cancelled():
        done.exception()
