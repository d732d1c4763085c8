"""The floor: what three bare processes need to replicate a frame with a sync on each.

No Raft, no checks, no records: a leader and two followers, each one uvloop loop and one writer thread over
a file that is fully written beforehand (so that a sync never has to grow it). The client sends a frame to
the leader; the leader hands it to its writer thread and, in parallel, to both followers; a follower answers
once it has synced; the leader answers as soon as two of the three have it durably. Whatever waits while a
sync is under way goes into the next one (group commit). It is as lean as pure Python gets, and the
yardstick that ``regress.py`` holds raftlog against.

A log has to keep what it is given: a floor that *keeps* writes to a file that grows, so that every sync has
new blocks to find and to note, and begins anew only after a gigabyte.

The module run as a program is one of the three processes: ``floor.py ring|keep FILE [FOLLOWER'S PORT ...]``.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Final, Self, cast

import uvloop

_HEAD: Final = struct.Struct(">II")  # length of the payload, sequence
_ACK: Final = struct.Struct(">I")  # everything up to this sequence
_RING_BYTES: Final = 64 << 20
_KEPT_BYTES: Final = 1 << 30
_GROUP_MAX: Final = 512
_BUFFER_BYTES: Final = 4 << 20
_SWITCH_INTERVAL_S: Final = 0.0002


# -- one of the three processes ------------------------------------------------------------------------------


class Writer:
    """One thread: writes and syncs what is queued, all of it at once, round and round in one file, which
    grows from nothing each time if it is to ``keep``."""

    def __init__(
        self, path: Path, loop: asyncio.AbstractEventLoop, durable: Callable[[int], None], *, keep: bool
    ) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._keep = keep
        self._size = _KEPT_BYTES if keep else _RING_BYTES
        for position in range(0, 0 if keep else _RING_BYTES, 1 << 20):
            os.pwrite(self._fd, bytes(1 << 20), position)
        os.fsync(self._fd)
        self._queue: SimpleQueue[tuple[int, bytes]] = SimpleQueue()
        self.put = self._queue.put
        self._loop = loop
        self._durable = durable
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        queue, position = self._queue, 0
        while True:
            sequence, frame = queue.get()
            frames, size = [frame], len(frame)
            while len(frames) < _GROUP_MAX and not queue.empty():
                sequence, frame = queue.get_nowait()
                frames.append(frame)
                size += len(frame)
            if position + size > self._size:
                position = 0
                if self._keep:
                    os.ftruncate(self._fd, 0)
            written = os.pwritev(self._fd, frames, position)
            assert written == size, "a short write"
            os.fdatasync(self._fd)
            position += size
            self._loop.call_soon_threadsafe(self._durable, sequence)


class Frames(asyncio.BufferedProtocol):
    """Cuts a stream into frames and hands each on, header included."""

    def __init__(self, take: Callable[[int, bytes], None], made: Callable[[asyncio.Transport], None]) -> None:
        self._take = take
        self._made = made
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._filled = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._made(cast(asyncio.Transport, transport))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        position, filled, view = 0, self._filled, self._view
        while filled - position >= 8:
            length, sequence = _HEAD.unpack_from(view, position)
            end = position + 8 + length
            if end > filled:
                break
            self._take(sequence, bytes(view[position:end]))
            position = end
        if position:
            self._buffer[: filled - position] = self._buffer[position:filled]
            self._filled = filled - position


class Acks(asyncio.Protocol):
    """The leader's end of a connection to a follower: what comes back are sequences."""

    def __init__(self, durable: Callable[[int], None]) -> None:
        self._durable = durable
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        whole = len(data) & ~3
        self._rest = data[whole:]
        if whole:
            self._durable(_ACK.unpack_from(data, whole - 4)[0])


class Node:
    """A follower; with followers of its own, the leader."""

    def __init__(self, path: Path, *, keep: bool) -> None:
        self._upstream: asyncio.Transport | None = None
        self._followers: list[asyncio.Transport] = []
        self._durable = [0]
        self._acknowledged = 0
        self._writer = Writer(path, asyncio.get_running_loop(), partial(self._on_durable, 0), keep=keep)

    async def follow_up(self, ports: list[int]) -> None:
        """Connect to the followers."""
        for number, port in enumerate(ports, start=1):
            self._durable.append(0)
            acks = Acks(partial(self._on_durable, number))
            self._followers.append(await self._connect(acks, port))

    async def _connect(self, acks: Acks, port: int) -> asyncio.Transport:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: acks, "127.0.0.1", port)
        return transport

    async def serve(self) -> int:
        """Listen; the port."""
        server = await asyncio.get_running_loop().create_server(
            lambda: Frames(self._take, self._accept), "127.0.0.1", 0
        )
        port: int = server.sockets[0].getsockname()[1]
        return port

    def _accept(self, transport: asyncio.Transport) -> None:
        self._upstream = transport
        self._durable = [0] * len(self._durable)
        self._acknowledged = 0

    def _take(self, sequence: int, frame: bytes) -> None:
        self._writer.put((sequence, frame))
        for follower in self._followers:
            follower.write(frame)

    def _on_durable(self, number: int, sequence: int) -> None:
        self._durable[number] = sequence
        # Of three, what two have is the middle one; a follower has only its own.
        reached = sorted(self._durable)[len(self._durable) // 2]
        if reached > self._acknowledged:
            self._acknowledged = reached
            if self._upstream is not None and not self._upstream.is_closing():
                self._upstream.write(_ACK.pack(reached))


async def run_node(path: Path, followers: list[int], *, keep: bool) -> None:
    """Serve until the parent closes our standard input."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    node = Node(path, keep=keep)
    await node.follow_up(followers)
    print(await node.serve(), flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    await ended.wait()


# -- the measuring side --------------------------------------------------------------------------------------


class Floor:
    """The three processes, and a blocking socket to their leader.

    Args:
        directory: where each has its file.
        keep: the files grow, see the module.
    """

    def __init__(self, directory: Path, *, keep: bool = False) -> None:
        self._directory = directory
        self._kind = "keep" if keep else "ring"
        self._nodes: list[subprocess.Popen[str]] = []
        self._socket: socket.socket | None = None
        self._sequence = 0

    def __enter__(self) -> Self:
        try:
            ports = [self._start(f"follower-{i}", []) for i in (1, 2)]
            leader = self._start("leader", ports)
            self._socket = socket.create_connection(("127.0.0.1", leader))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:  # also an interrupt: no process may stay
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, name: str, followers: list[int]) -> int:
        command = [sys.executable, __file__, self._kind, str(self._directory / name), *map(str, followers)]
        node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._nodes.append(node)
        assert node.stdout is not None
        return int(node.stdout.readline())

    def pids(self) -> list[int]:
        """Of the processes."""
        return [node.pid for node in self._nodes]

    def close(self) -> None:
        """End the processes."""
        if self._socket is not None:
            self._socket.close()
        for node in reversed(self._nodes):
            assert node.stdin is not None
            assert node.stdout is not None
            node.stdin.close()
            node.wait(10)
            node.stdout.close()
        self._nodes.clear()

    def sequential(self, count: int, payload: bytes) -> list[float]:
        """Send a frame, wait for its acknowledgement, ``count`` times; seconds each."""
        connection = self._socket
        assert connection is not None
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            self._sequence += 1
            connection.sendall(_HEAD.pack(len(payload), self._sequence) + payload)
            acknowledged = _ACK.unpack(connection.recv(4, socket.MSG_WAITALL))[0]
            times.append(time.perf_counter() - begin)
            assert acknowledged == self._sequence
        return times

    def pipelined(self, payload: bytes, seconds: float, window: int) -> float:
        """Keep ``window`` frames under way for a while; bytes per second acknowledged."""
        connection = self._socket
        assert connection is not None
        first = acknowledged = self._sequence
        size = len(payload)
        begin = time.perf_counter()
        while True:
            sending = time.perf_counter() - begin < seconds
            if sending and self._sequence - acknowledged < window:
                self._sequence += 1
                connection.sendall(_HEAD.pack(size, self._sequence))
                connection.sendall(payload)
                if self._sequence - acknowledged < window and not select.select([connection], [], [], 0)[0]:
                    continue
            if acknowledged == self._sequence:
                break
            acknowledged = _ACK.unpack(connection.recv(4, socket.MSG_WAITALL))[0]
        return (acknowledged - first) * size / (time.perf_counter() - begin)


if __name__ == "__main__":
    uvloop.run(run_node(Path(sys.argv[2]), list(map(int, sys.argv[3:])), keep=sys.argv[1] == "keep"))
