"""raftlog: three brokers as Ray actors, replication 3; synced before the acknowledgement, or within a
second."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import uvloop
from _ray import CLUSTER, is_level, wait_until

import raftlog
import raftlog.aio
from contenders.base import REPLICAS, UNCOUNTED, Contender, NotOffered, System, Turn, pace, stepwise

if TYPE_CHECKING:
    from raftlog.client.log import Log

TIMEOUT_S: Final = 30.0
CALLS_UNDER_WAY: Final = 8
POLL_RECORDS: Final = 10_000
COLUMN_RECORDS: Final = 100_000
BULK: Final[dict[str, Any]] = {"compression": "none", "batch_bytes": 1 << 20}
AT_ONCE: Final[dict[str, Any]] = {"compression": "none", "linger_ms": 0}


class RaftlogBrokers(System):
    """Three brokers on the Ray that the run has started."""

    name = "raftlog"
    log: Log

    def start(self, directory: Path) -> None:
        self._pids: list[int] = []
        self.log = raftlog.start(CLUSTER, brokers=REPLICAS, data_dir=str(directory))

    def pids(self) -> list[int]:
        if not self._pids:
            self._pids = [broker.pid for broker in self.log.describe_cluster().brokers]
        return self._pids

    def stop(self) -> None:
        if hasattr(self, "log"):
            self.log.close()
            raftlog.shutdown(CLUSTER, force=True)


class Raftlog(Contender):
    """Through the blocking handles."""

    name = "raftlog"
    title = "raftlog, synced"
    settings = (
        "three brokers as Ray actors; `flush=commit`: a majority has synced before it is acknowledged. One "
        "record after another and under half load: `linger_ms=0`. Throughput: `batch_bytes=1 MiB`, no "
        "compression, `send_batch` with 1 MB a call and eight calls under way, `poll` of 10,000 records"
    )
    topic_settings: ClassVar[dict[str, Any]] = {"flush": "commit"}

    def __init__(self, system: RaftlogBrokers) -> None:
        super().__init__(system)
        self._brokers = system

    @property
    def log(self) -> Log:
        """The cluster."""
        return self._brokers.log

    def create(self, topic: str, partitions: int) -> None:
        self.log.create_topic(
            topic, partitions=partitions, replication_factor=REPLICAS, config=self.topic_settings
        )
        wait_until(lambda: is_level(self.log, topic), f"topic {topic} is ready")

    def delete(self, topic: str) -> None:
        self.log.delete_topic(topic)

    def held(self, topic: str) -> int | None:
        return sum(each.end_offset for each in self.log.describe_topic(topic).partitions)

    def sequential(self, topic: str, value: bytes, count: int) -> list[float]:
        with self.log.producer(**AT_ONCE) as producer:
            return stepwise(lambda: producer.send(topic, value).result(TIMEOUT_S), count)

    def send(self, topic: str, values: Sequence[bytes], seconds: float) -> Turn:
        turn = self.turn()
        with self.log.producer(**BULK) as producer:
            self._warm(producer, topic, values)
            send = producer.send
            with turn.timed():
                end = time.perf_counter() + seconds
                while time.perf_counter() < end:
                    for value in values:
                        send(topic, value)
                    turn.add(values)
                producer.flush()
        return turn

    def send_batch(self, topic: str, values: Sequence[bytes], seconds: float) -> Turn:
        turn = self.turn()
        with self.log.producer(**BULK) as producer:
            self._warm(producer, topic, values)
            under_way: deque[Any] = deque()
            with turn.timed():
                end = time.perf_counter() + seconds
                while time.perf_counter() < end:
                    under_way.append(producer.send_batch(topic, values))
                    turn.add(values)
                    if len(under_way) >= CALLS_UNDER_WAY:
                        under_way.popleft().result(TIMEOUT_S)
                producer.flush()
        return turn

    def _warm(self, producer: Any, topic: str, values: Sequence[bytes]) -> None:
        for _ in range(UNCOUNTED):
            producer.send(topic, values[0]).result(TIMEOUT_S)

    def paced(self, topic: str, value: bytes, rate: float, seconds: float) -> tuple[list[float], int]:
        with self.log.producer(**AT_ONCE) as producer:
            self._warm(producer, topic, [value])

            def fire(acknowledged: Callable[[], None] | None) -> None:
                delivery = producer.send(topic, value)
                if acknowledged is not None:
                    delivery.add_done_callback(lambda _: acknowledged())

            found = pace(fire, time.sleep, rate, seconds)
            producer.flush()
        return found

    def consume(self, topic: str, count: int) -> Turn:
        with self.log.consumer(topic) as consumer:
            return self.turn().read(
                count, lambda: len(consumer.poll(timeout=TIMEOUT_S, max_records=POLL_RECORDS))
            )

    def consume_columns(self, topic: str, count: int) -> Turn:
        with self.log.consumer(topic) as consumer:
            poll = getattr(consumer, "poll_arrow", None)
            if poll is None:
                raise NotOffered("this release has no poll_arrow")
            if find_spec("pyarrow") is None:
                raise NotOffered("pyarrow is not installed")
            return self.turn().read(
                count, lambda: int(poll(timeout=TIMEOUT_S, max_records=COLUMN_RECORDS).num_rows)
            )

    def end_to_end(self, topic: str, value: bytes, count: int) -> list[float]:
        with self.log.producer(**AT_ONCE) as producer, self.log.consumer(topic) as consumer:

            def once() -> None:
                producer.send(topic, value)
                assert len(consumer.poll(timeout=TIMEOUT_S)) == 1

            return stepwise(once, count)


class RaftlogInterval(Raftlog):
    """Acknowledged when a majority has written it, synced within a second."""

    name = "raftlog-interval"
    title = "raftlog, written"
    settings = "the same with `flush=interval`: a majority has written, each syncs within a second"
    topic_settings: ClassVar[dict[str, Any]] = {"flush": "interval"}


class RaftlogAio(Raftlog):
    """Through ``raftlog.aio``: for what the event loop makes a difference to."""

    name = "raftlog-aio"
    title = "raftlog.aio, synced"
    settings = "`raftlog.aio` on uvloop, otherwise as the first"

    def sequential(self, topic: str, value: bytes, count: int) -> list[float]:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self._sequential(topic, value, count))

    async def _sequential(self, topic: str, value: bytes, count: int) -> list[float]:
        log = await raftlog.aio.connect(CLUSTER)
        producer = log.producer(**AT_ONCE)
        times = []
        for number in range(UNCOUNTED + count):
            begin = time.perf_counter()
            await (await producer.send(topic, value))
            if number >= UNCOUNTED:
                times.append(time.perf_counter() - begin)
        await producer.close()
        await log.close()
        return times
