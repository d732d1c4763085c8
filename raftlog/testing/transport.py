"""Simulated transports: what one connection of the simulated network does with bytes.

Each direction of a connection is a :class:`Pipe`::

    write -> [sender's buffer] -> [in flight] -> (delay) -> [arrived] -> data_received
                                  `--- at most a window of bytes ---'

What is beyond the window waits in the sender's buffer, so that ``pause_writing`` and ``resume_writing`` come
as on a real transport when the receiver does not read. Chunks are cut and joined at random. A buffer that is
changed between ``write`` and its departure fails the simulation.

Cuts, clogs and dead nodes are looked at when bytes *arrive*: an arrival that falls into a black hole is
overdue, and happens when the hole closes.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Iterable
from contextvars import Context
from typing import Any, Final

from raftlog.net.frames import Buffer
from raftlog.net.network import StreamProtocol, deliver
from raftlog.testing.loop import SimLoop, SimNode

CHUNK_BYTES_MAX: Final = 64 * 1024
ODD_CHUNK_PROBABILITY: Final = 0.1
PROBE_SECONDS: Final = 1.0
PROBES_MAX: Final = 900
"""A connection breaks after a quarter of an hour without an answer from the other host."""
DEFAULT_HIGH_WATER: Final = 64 * 1024


class Link:
    """One direction between two nodes.

    Attributes:
        latency: (least, most) seconds that bytes travel.
        is_cut: nothing arrives.
        clogged_until: loop time before which nothing arrives.
        read_rate: bytes per second that the receiver reads of each connection; None: all at once.
    """

    __slots__ = ("clogged_until", "is_cut", "latency", "read_rate")

    def __init__(self, latency: tuple[float, float]) -> None:
        self.latency = latency
        self.is_cut = False
        self.clogged_until = 0.0
        self.read_rate: float | None = None


class Signal:
    """In a pipe's queue: not bytes, but news."""

    __slots__ = ("error", "name")

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name = name
        self.error = error


OPENED: Final = Signal("opened")
END: Final = Signal("end")


def reset(why: str) -> Signal:
    """The news that the other side's operating system has dropped the connection."""
    return Signal("reset", ConnectionResetError(why))


class Pipe:
    """One direction of a connection: what ``sender`` wrote on its way to ``receiver``."""

    __slots__ = (
        "_acks_owed",
        "_arrived",
        "_buffer",
        "_in_flight",
        "_in_window",
        "_last_arrival",
        "_loop",
        "_network_context",
        "_overdue",
        "_probes",
        "_random",
        "_window",
        "back",
        "buffer_bytes",
        "forth",
        "is_finished",
        "receiver",
        "sender",
    )

    def __init__(
        self, loop: SimLoop, rng: random.Random, context: Context, forth: Link, back: Link, window: int
    ) -> None:
        self._loop = loop
        self._random = rng
        self._network_context = context
        self._window = window
        self._buffer: deque[tuple[memoryview, memoryview | None]] = deque()
        self._in_flight: deque[bytes | Signal] = deque()
        self._arrived: deque[bytes | Signal] = deque()
        self._in_window = 0  # bytes in flight or unread
        self._acks_owed = 0  # read, but the sender cannot know: the way back is cut
        self._overdue = 0
        self._probes = 0
        self._last_arrival = 0.0
        self.forth = forth
        self.back = back
        self.buffer_bytes = 0
        self.is_finished = False
        self.sender: SimTransport
        self.receiver: SimTransport

    # -- departure -------------------------------------------------------------------------------------------

    def put(self, data: Buffer) -> None:
        """Bytes that the sender wrote."""
        if self.is_finished or not len(data):
            return
        view = memoryview(data).cast("B")
        snapshot = None if isinstance(view.obj, bytes) else memoryview(bytes(view))
        self._buffer.append((view, snapshot))
        self.buffer_bytes += len(view)
        self.pump()

    def pump(self) -> None:
        """Send what the window allows."""
        while self.buffer_bytes and self._in_window < self._window:
            chunk = self._take(min(self._window - self._in_window, CHUNK_BYTES_MAX, self.buffer_bytes))
            self._in_window += len(chunk)
            self._depart(chunk)
        self.sender._on_pumped()

    def _take(self, limit: int) -> bytes:
        if self._random.random() < ODD_CHUNK_PROBABILITY:
            limit = self._random.randint(1, limit)
        parts: list[bytes | memoryview] = []
        left = limit
        while left:
            view, snapshot = self._buffer.popleft()
            if len(view) > left:
                self._buffer.appendleft((view[left:], None if snapshot is None else snapshot[left:]))
                view = view[:left]
            if snapshot is not None:
                was = snapshot[: len(view)]
                assert view == was, "a buffer was changed after it was given to write()"
            parts.append(view)
            left -= len(view)
        self.buffer_bytes -= limit
        return b"".join(parts)

    def signal(self, news: Signal) -> None:
        """Send news behind the bytes that are in flight; after an end or a reset nothing follows."""
        if self.is_finished:
            return
        self._depart(news)
        if news is not OPENED:
            self.drop_buffer()
            self.is_finished = True

    def drop_buffer(self) -> None:
        """Forget what has not departed."""
        self._buffer.clear()
        self.buffer_bytes = 0

    def _depart(self, item: bytes | Signal) -> None:
        self._in_flight.append(item)
        when = self._loop.time() + self._random.uniform(*self.forth.latency)
        self._last_arrival = max(self._last_arrival, when)
        self._schedule(self._last_arrival)

    def _schedule(self, when: float) -> None:
        self._loop.call_at(when, self._arrive, context=self._network_context)

    # -- arrival ---------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        if self.forth.is_cut:
            self._overdue += 1
            return
        if self._loop.time() < self.forth.clogged_until:
            self._schedule(self.forth.clogged_until)
            return
        item = self._in_flight.popleft()
        receiver = self.receiver
        if receiver.is_gone:
            if item is not END and not self._probes:
                self._probe()
        elif isinstance(item, Signal) and item.name == "reset":
            self._arrived.clear()
            self._arrived.append(item)
            receiver._wake(even_if_paused=True)
        else:
            self._arrived.append(item)
            receiver._wake()

    def _probe(self) -> None:
        """Bytes have come to an end that is gone: its host says so, once it is up and can be heard. Until
        then the sender's operating system sends again and again, as TCP does."""
        self._probes += 1
        is_heard = not (self.receiver.is_silent or self.forth.is_cut or self.back.is_cut)
        if is_heard or self._probes > PROBES_MAX:
            self.sender.incoming.interrupt(reset("the peer is gone"))
        elif not self.sender.is_gone:
            when = self._loop.time() + PROBE_SECONDS
            self._loop.call_at(when, self._probe, context=self._network_context)

    def interrupt(self, news: Signal) -> None:
        """The receiver's own operating system tells it: nothing needs to travel."""
        if not self.receiver.is_gone:
            self._arrived.clear()
            self._arrived.append(news)
            self.receiver._wake(even_if_paused=True)

    def heal(self, delay: float) -> bool:
        """The black hole has closed: what is overdue arrives after ``delay`` seconds. False: nothing was."""
        overdue, self._overdue = self._overdue, 0
        for _ in range(overdue):
            self._schedule(self._loop.time() + delay)
        return bool(overdue)

    def acknowledge(self, size: int = 0) -> None:
        """``size`` more bytes were read: they leave the window, if the sender can hear of it."""
        self._acks_owed += size
        if not self.back.is_cut:
            self._in_window -= self._acks_owed
            self._acks_owed = 0
            self.pump()

    @property
    def has_arrivals(self) -> bool:
        return bool(self._arrived)

    @property
    def read_seconds(self) -> float:
        """How long the receiver takes to read what is next."""
        item = self._arrived[0]
        rate = self.forth.read_rate
        return 0.0 if rate is None or isinstance(item, Signal) else len(item) / rate

    def take_arrived(self) -> bytes | Signal:
        """The next news, or bytes: sometimes joined with what came after them."""
        item = self._arrived.popleft()
        if isinstance(item, Signal) or not self._arrived or self.forth.read_rate is not None:
            return item
        if self._random.random() < 0.5:
            return item
        parts = [item]
        while self._arrived and not isinstance(self._arrived[0], Signal):
            more = self._arrived.popleft()
            assert isinstance(more, bytes)
            parts.append(more)
        return b"".join(parts)


class SimTransport(asyncio.Transport):
    """One end of a simulated connection.

    Attributes:
        node: whose end it is; ``peer``: the other end.
        is_gone: closed, or its node is dead.
        is_silent: its host is down: nobody answers for it.
    """

    def __init__(
        self,
        node: SimNode,
        context: Context,
        outgoing: Pipe,
        incoming: Pipe,
        extra: dict[str, Any],
    ) -> None:
        super().__init__(extra)
        self.node = node
        self.context = context
        self.is_gone = False
        self.is_silent = False
        self.peer: SimTransport
        self.opened: asyncio.Future[None] | None = None
        self._loop = outgoing._loop
        self.outgoing = outgoing
        self.incoming = incoming
        self._protocol: StreamProtocol | None = None
        self._is_closing = False
        self._is_reading = True
        self._wake_scheduled = False
        self._urgent = False  # a reset has arrived: it is news even to those who do not read
        self._high = DEFAULT_HIGH_WATER
        self._low = DEFAULT_HIGH_WATER // 4
        self._write_paused = False
        outgoing.sender = self
        incoming.receiver = self

    def __repr__(self) -> str:
        return f"<SimTransport {self.node.name} to {self.peer.node.name}>"

    # -- the transport's interface ---------------------------------------------------------------------------

    def write(self, data: Buffer) -> None:
        if self._is_closing or not self.node.alive:
            return
        self.outgoing.put(data)
        if self.outgoing.buffer_bytes > self._high and not self._write_paused:
            self._write_paused = True
            self._get().pause_writing()

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        for data in list_of_data:
            self.write(data)

    def get_write_buffer_size(self) -> int:
        return self.outgoing.buffer_bytes

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high if high is not None else 4 * low if low is not None else DEFAULT_HIGH_WATER
        self._low = low if low is not None else self._high // 4
        assert 0 <= self._low <= self._high

    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return self._is_closing

    def is_reading(self) -> bool:
        return self._is_reading and not self._is_closing

    def pause_reading(self) -> None:
        self._is_reading = False

    def resume_reading(self) -> None:
        self._is_reading = True
        self._wake()

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._get()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol | asyncio.BufferedProtocol)
        self._protocol = protocol

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._on_pumped()

    def abort(self) -> None:
        if not self.is_gone and self.node.alive:
            self._is_closing = True
            self._leave(reset("connection reset by peer"))
            if self._protocol is not None:
                self._loop.call_soon(self._protocol.connection_lost, None, context=self.context)

    # -- from the pipes --------------------------------------------------------------------------------------

    def _get(self) -> StreamProtocol:
        assert self._protocol is not None, "the connection was not made yet"
        return self._protocol

    def _leave(self, news: Signal) -> None:
        """The operating system's part of closing: the peer is told, whatever comes from it is refused. What
        had come and was not read makes it a reset, as on Linux."""
        if news is END and self.incoming.has_arrivals:
            news = reset("connection reset by peer")
        self.outgoing.signal(news)
        self.is_gone = True

    def _on_pumped(self) -> None:
        """Bytes may have left the buffer."""
        left = self.outgoing.buffer_bytes
        if self._write_paused and left <= self._low and not self.is_gone:
            self._write_paused = False
            self._loop.call_soon(self._get().resume_writing, context=self.context)
        if self._is_closing and not left and not self.is_gone:
            self._leave(END)
            self._loop.call_soon(self._get().connection_lost, None, context=self.context)

    def _wake(self, *, even_if_paused: bool = False) -> None:
        """Deliver what has arrived, soon and in this node's context."""
        self._urgent |= even_if_paused
        if not self._wake_scheduled and self._can_deliver():
            self._wake_scheduled = True
            if self.incoming.forth.read_rate is None:
                self._loop.call_soon(self._deliver, context=self.context)
            else:
                self._loop.call_later(self.incoming.read_seconds, self._deliver, context=self.context)

    def _can_deliver(self) -> bool:
        """False also between the news that the connection is open and its protocol's making."""
        is_ready = self._protocol is not None or (self.opened is not None and not self.opened.done())
        return is_ready and self.incoming.has_arrivals and (self._is_reading or self._urgent)

    def _deliver(self) -> None:
        self._wake_scheduled = False
        if self.is_gone or not self._can_deliver():
            return
        item = self.incoming.take_arrived()
        if isinstance(item, Signal):
            self._on_news(item)
        elif not self._is_closing:
            self.incoming.acknowledge(len(item))
            self._loop.note(item)
            deliver(self._get(), item)
        self._wake()

    def _on_news(self, news: Signal) -> None:
        if news is OPENED:
            assert self.opened is not None, "the accepting side hears of no opening"
            self.opened.set_result(None)
        elif news is END:
            if not self._is_closing and not self._get().eof_received():
                self.close()
        else:
            self.is_gone = self._is_closing = True
            self.outgoing.drop_buffer()
            self.outgoing.is_finished = True
            if self._protocol is not None:
                self._protocol.connection_lost(news.error)
            elif self.opened is not None and not self.opened.done() and news.error is not None:
                self.opened.set_exception(news.error)

    def made(self, protocol: StreamProtocol) -> None:
        """Give the connection its protocol (in this node's context)."""
        self._protocol = protocol
        protocol.connection_made(self)
        self._wake()

    def die(self, news: Signal | None) -> None:
        """The node was killed: the peer gets ``news``; None: its host is down and nobody tells."""
        self._is_closing = True
        if news is None:
            self.outgoing.drop_buffer()
            self.outgoing.is_finished = True
            self.is_gone = self.is_silent = True
        elif not self.is_gone:
            self._leave(news)
