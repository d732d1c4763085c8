"""The blocking handles over real sockets, and what all handles promise about threads, processes and
imports."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import pickle
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from fake_cluster import FakeCluster, ignore, lose_answer, refuse

import raftlog
from raftlog import aio
from raftlog.client import log as log_module
from raftlog.client import sync, sync_producer
from raftlog.client.delivery import Delivery
from raftlog.errors import (
    AuthenticationFailed,
    BufferFull,
    Closed,
    ConcurrentUse,
    ConnectionLost,
    CorruptBatch,
    DeliveryFailed,
    NotPicklable,
    NotRunning,
    RaftlogError,
    RequestTimeout,
    UnknownTopic,
    UseAfterFork,
)
from raftlog.net.network import real_seams

TOPIC = "orders"


class RealWorld:
    """A fake cluster on a thread of its own, on the loopback interface."""

    def __init__(self) -> None:
        self.cluster = FakeCluster(2, uuid.uuid4().hex)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.bootstrap = self.call(self.cluster.start(lambda _: real_seams(), lambda _: ("127.0.0.1", 0)))
        self.log = raftlog.Log(self.bootstrap)

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def do(self, step: Callable[..., Any], *args: Any) -> Any:
        """Run a function on the brokers' thread."""

        async def run() -> Any:
            return step(*args)

        return self.call(run())

    def close(self) -> None:
        self.log.close()
        for broker in self.cluster.brokers.values():
            self.call(broker.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture
def world() -> Iterator[RealWorld]:
    made = RealWorld()
    yield made
    made.close()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Block until a condition of another thread holds."""
    event = threading.Event()
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        event.wait(0.005)


# -- producing and consuming ---------------------------------------------------------------------------------


def test_a_topic_from_creation_to_the_last_record(world: RealWorld) -> None:
    log = world.log
    log.create_topic(TOPIC, partitions=2)
    assert log.topics() == [TOPIC]
    with log.producer(linger_ms=0) as producer:
        meta = producer.send(TOPIC, b"first", key=b"k").result(timeout=10)
        assert (meta.topic, meta.offset) == (TOPIC, 0)
        ranges = producer.send_batch(TOPIC, [b"%d" % n for n in range(100)]).result(timeout=10)
        assert sum(each.count for each in ranges) == 100
    with log.consumer(TOPIC) as consumer:
        assert len(list(consumer.records(until="end"))) == 101
        assert consumer.lag() == {(TOPIC, 0): 0, (TOPIC, 1): 0}
        consumer.seek((TOPIC, meta.partition), 0)
        assert consumer.poll(timeout=10, max_records=1)[0].value == b"first"
        consumer.seek_to_end()
        assert consumer.poll(timeout=0.05) == []


def test_many_threads_share_a_producer(world: RealWorld) -> None:
    (partition,) = world.do(world.cluster.create, TOPIC)
    deliveries: dict[int, list[Delivery]] = {}

    with world.log.producer(linger_ms=1, batch_bytes=4096) as producer:

        def work(number: int) -> None:
            deliveries[number] = [producer.send(TOPIC, b"%d/%04d" % (number, n)) for n in range(300)]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        placed = {n: [d.result(timeout=10).offset for d in row] for n, row in deliveries.items()}
    values = partition.values()
    for number, offsets in placed.items():
        assert offsets == sorted(offsets), "each thread's records are in its order"
        assert [values[offset] for offset in offsets] == [b"%d/%04d" % (number, n) for n in range(300)]
    assert len(values) == 1800


def test_waiting_with_a_timeout_and_later_again(world: RealWorld) -> None:
    world.do(world.cluster.create, TOPIC)
    world.cluster.faults.append(ignore)
    with world.log.producer(linger_ms=0, request_timeout_ms=700) as producer:
        delivery = producer.send(TOPIC, b"v")
        with pytest.raises(TimeoutError, match="under way") as caught:
            delivery.result(timeout=0.05)
        assert isinstance(caught.value, RequestTimeout)
        assert not delivery.done()
        batch = producer.send_batch(TOPIC, [b"w"])
        with pytest.raises(RequestTimeout):
            batch.result(timeout=0.05)
        assert delivery.result(timeout=10).offset == 0
        assert batch.result(timeout=10)[0].base_offset == 1
        assert delivery.exception() is None


def test_a_lost_answer_is_not_seen_by_the_caller(world: RealWorld) -> None:
    (partition,) = world.do(world.cluster.create, TOPIC)
    world.cluster.faults.extend([None, lose_answer])
    with world.log.producer(linger_ms=0) as producer:
        offsets = [producer.send(TOPIC, b"%d" % n).result(timeout=10).offset for n in range(4)]
    assert offsets == [0, 1, 2, 3]
    assert partition.values() == [b"0", b"1", b"2", b"3"]


def test_a_full_buffer_blocks_the_sender_until_there_is_room(world: RealWorld) -> None:
    world.do(world.cluster.create, TOPIC)
    world.cluster.every_fault = ignore
    log = world.log
    settings: dict[str, Any] = {"buffer_bytes": 64 * 1024, "linger_ms": 0, "request_timeout_ms": 500}
    with log.producer(max_block_ms=100, **settings) as producer:
        with pytest.raises(BufferFull):
            send_for_ever(producer)
        with pytest.raises(BufferFull):
            producer.send_batch(TOPIC, [b"x" * 30_000] * 9)
        world.cluster.every_fault = None
        wait_until(lambda: producer._core.accumulator.used < 30_000)
        producer.send(TOPIC, b"x").result(timeout=10)


def send_for_ever(producer: sync_producer.Producer) -> None:
    while True:
        producer.send(TOPIC, b"x" * 1000)


def test_leaving_with_tells_of_failures_but_not_over_another_error(
    world: RealWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world.do(world.cluster.create, TOPIC)
    world.cluster.every_fault = refuse(CorruptBatch("bad luck"))
    with pytest.raises(DeliveryFailed, match="bad luck"), world.log.producer() as producer:
        producer.send(TOPIC, b"v")
    with pytest.raises(ZeroDivisionError):
        send_and_fail(world.log)
    assert "bad luck" in caplog.text
    producer.close()
    with pytest.raises(Closed):
        producer.send(TOPIC, b"v")


def send_and_fail(log: raftlog.Log) -> None:
    with log.producer() as producer:
        producer.send(TOPIC, b"v")
        raise ZeroDivisionError


def test_awaiting_a_delivery_on_the_users_own_loop(world: RealWorld) -> None:
    world.do(world.cluster.create, TOPIC)
    with world.log.producer() as producer:

        async def work() -> int:
            deliveries = [producer.send(TOPIC, b"%d" % n) for n in range(10)]
            return sum([(await delivery).offset for delivery in deliveries])

        assert asyncio.run(work()) == sum(range(10))


def test_callbacks_run_on_the_io_thread_which_refuses_to_wait_for_itself(world: RealWorld) -> None:
    world.do(world.cluster.create, TOPIC)
    heard: list[Any] = []
    done = threading.Event()
    with world.log.producer() as producer:

        def callback(delivery: Delivery) -> None:
            heard.append(delivery.result().offset)
            heard.append(threading.current_thread().name)
            producer.send(TOPIC, b"from a callback").add_done_callback(lambda _: done.set())
            try:
                producer.send(TOPIC, b"next").result()
            except RuntimeError as error:
                heard.append(str(error))

        producer.send(TOPIC, b"v").add_done_callback(callback)
        assert done.wait(10)
    assert heard[:2] == [0, "raftlog-io"]
    assert "await it" in heard[2]


def test_a_poll_is_woken_by_a_record_and_by_close_from_another_thread(world: RealWorld) -> None:
    world.do(world.cluster.create, TOPIC)
    consumer = world.log.consumer(TOPIC)
    outcomes: list[Any] = []

    def work() -> None:
        outcomes.append([record.value for record in consumer.poll(timeout=60)])
        try:
            consumer.poll(timeout=60)
        except Closed as error:
            outcomes.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    with world.log.producer(linger_ms=0) as producer:
        producer.send(TOPIC, b"v").result(timeout=10)
    wait_until(lambda: len(outcomes) == 1)
    wait_until(lambda: consumer._use._depth == 1)
    with pytest.raises(ConcurrentUse):
        consumer.poll(timeout=0)
    with pytest.raises(ConcurrentUse):
        next(iter(consumer))
    consumer.close()
    thread.join(10)
    assert not thread.is_alive()
    assert outcomes[0] == [b"v"]
    assert isinstance(outcomes[1], Closed)
    consumer.close()


def test_an_iteration_ends_when_another_thread_closes(world: RealWorld) -> None:
    world.do(world.cluster.create, TOPIC)
    consumer = world.log.consumer(TOPIC)
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(list(consumer)))
    thread.start()
    wait_until(lambda: consumer._use._depth == 1)
    consumer.close()
    thread.join(10)
    assert got == [[]]


def test_the_asynchronous_face_over_real_sockets(world: RealWorld) -> None:
    async def work() -> list[bytes]:
        async with aio.Log(world.bootstrap) as log:
            await log.create_topic(TOPIC)
            async with log.producer() as producer:
                deliveries = [await producer.send(TOPIC, b"%d" % n) for n in range(20)]
                assert [(await delivery).offset for delivery in deliveries] == list(range(20))
            async with log.consumer(TOPIC) as consumer:
                return [record.value async for record in consumer.records(until="end")]

    assert asyncio.run(work()) == [b"%d" % n for n in range(20)]


# -- what is wrong is told -----------------------------------------------------------------------------------


def test_a_wrong_secret_is_refused_at_once(world: RealWorld, caplog: pytest.LogCaptureFixture) -> None:
    with (
        raftlog.Log(msgspec.structs.replace(world.bootstrap, secret=b"guess")) as log,
        pytest.raises(AuthenticationFailed),
    ):
        log.topics()
    assert world.log.topics() == []


def test_nobody_there_is_told_within_max_block(world: RealWorld) -> None:
    nowhere = msgspec.structs.replace(world.bootstrap, addresses=(("127.0.0.1", 1),))
    with raftlog.Log(nowhere) as log, log.producer(max_block_ms=300) as producer:
        began = time.monotonic()
        with pytest.raises(ConnectionLost, match=r"127\.0\.0\.1:1"):
            producer.send(TOPIC, b"v")
        assert time.monotonic() - began < 2


def test_an_unknown_topic_is_told_soon_and_creating_it_helps(world: RealWorld) -> None:
    with world.log.producer() as producer:
        began = time.monotonic()
        with pytest.raises(UnknownTopic, match="create_topic"):
            producer.send("nosuch", b"v")
        assert time.monotonic() - began < 2, "max_block_ms is a minute"
        world.log.create_topic("nosuch")
        assert producer.send("nosuch", b"v").result(timeout=10).offset == 0


def test_a_ref_without_ray_says_so(world: RealWorld) -> None:
    world.do(world.cluster.create, TOPIC)
    with world.log.producer() as producer:
        delivery = producer.send(TOPIC, b"v")
        if "ray" not in sys.modules:
            with pytest.raises(NotRunning, match="Ray"):
                delivery.ref  # noqa: B018


def test_a_closed_log_says_so(world: RealWorld) -> None:
    log = raftlog.Log(world.bootstrap)
    producer = log.producer()
    log.close()
    log.close()
    for use in (log.topics, log.producer, lambda: producer.send(TOPIC, b"v"), producer.flush):
        with pytest.raises(Closed):
            use()


# -- processes -----------------------------------------------------------------------------------------------


def test_a_log_pickles_and_handles_say_what_to_pass_instead(world: RealWorld) -> None:
    world.do(world.cluster.create, TOPIC)
    copy = pickle.loads(pickle.dumps(world.log))
    assert copy.topics() == [TOPIC]
    copy.close()
    with world.log.producer() as producer, world.log.consumer(TOPIC) as consumer:
        delivery = producer.send(TOPIC, b"v")
        for handle in (producer, consumer, delivery, producer.send_batch(TOPIC, [b"v"])):
            with pytest.raises(NotPicklable, match=r"log\.|result"):
                pickle.dumps(handle)
    again = pickle.loads(pickle.dumps(aio.Log(world.bootstrap)))
    assert again.cluster_id == world.bootstrap.cluster_id
    assert b"the secret" not in repr(world.bootstrap).encode(), "secrets stay out of logs"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork_the_log_works_and_the_parents_handles_refuse(world: RealWorld) -> None:
    world.do(world.cluster.create, TOPIC)
    producer = world.log.producer(linger_ms=0, request_timeout_ms=2000)
    consumer = world.log.consumer(TOPIC)
    producer.send(TOPIC, b"parent").result(timeout=10)
    reading, writing = os.pipe()
    world.cluster.faults.append(ignore)
    under_way = producer.send(TOPIC, b"under way")
    child = os.fork()
    if child == 0:
        os.write(writing, b"|".join(in_child(world.log, producer, consumer, under_way)))
        os._exit(0)
    os.close(writing)
    told = os.read(reading, 10_000).split(b"|")
    os.close(reading)
    os.waitpid(child, 0)
    assert told == [b"UseAfterFork"] * 3 + [b"offset 1", b"parent child"]
    assert under_way.result(timeout=10).offset == 2
    assert producer.send(TOPIC, b"parent again").result(timeout=10).offset == 3
    producer.close()
    consumer.close()


def in_child(
    log: raftlog.Log, producer: sync_producer.Producer, consumer: sync.Consumer, under_way: Delivery
) -> list[bytes]:
    told: list[bytes] = []
    uses: list[Callable[[], Any]] = [
        lambda: producer.send(TOPIC, b"v"),
        lambda: consumer.poll(0),
        under_way.result,
    ]
    for use in uses:
        try:
            use()
        except UseAfterFork as error:
            told.append(type(error).__name__.encode())
    try:
        with log.producer(linger_ms=0) as own:
            told.append(b"offset %d" % own.send(TOPIC, b"child").result(timeout=10).offset)
        with log.consumer(TOPIC) as reader:
            told.append(b" ".join(record.value for record in reader.records(until="end")))
    except RaftlogError as error:
        told.append(repr(error).encode())
    return told


def test_a_producer_dropped_with_records_in_it_warns(world: RealWorld) -> None:
    world.do(world.cluster.create, TOPIC)
    world.cluster.every_fault = ignore

    def drop() -> None:
        world.log.producer().send(TOPIC, b"v")
        gc.collect()

    with pytest.warns(ResourceWarning, match="not acknowledged"):
        drop()
    world.log.producer()  # an empty one is dropped without a word
    gc.collect()


EXITS = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
import msgspec, raftlog
from raftlog.client.cluster import Bootstrap
bootstrap = msgspec.json.decode(sys.argv[1], type=Bootstrap)
producer = raftlog.Log(bootstrap).producer(linger_ms=60_000)
for number in range(10):
    producer.send("orders", b"%d" % number)
"""


def run_python(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *args], capture_output=True, text=True, timeout=60
    )


def test_what_is_buffered_at_exit_is_flushed(world: RealWorld) -> None:
    (partition,) = world.do(world.cluster.create, TOPIC)
    ended = run_python(EXITS, msgspec.json.encode(world.bootstrap).decode())
    assert (ended.returncode, ended.stderr) == (0, "")
    assert partition.values() == [b"%d" % n for n in range(10)]


def test_what_cannot_be_flushed_at_exit_is_logged(world: RealWorld) -> None:
    world.do(world.cluster.create, TOPIC)
    world.cluster.every_fault = ignore
    program = EXITS + "from raftlog.client import sync_producer\nsync_producer.EXIT_FLUSH_S = 0.3\n"
    ended = run_python(program, msgspec.json.encode(world.bootstrap).decode())
    assert ended.returncode == 0
    assert "10 records are still under way" in ended.stderr


def test_importing_raftlog_loads_nothing_heavy() -> None:
    program = """
import sys, raftlog
heavy = {"ray", "pandas", "pyarrow", "aiokafka", "numpy", "uvloop", "pydantic"} & set(sys.modules)
assert not heavy, heavy
assert "start" in dir(raftlog)
import raftlog.aio, raftlog.client.log
heavy = {"ray", "pandas", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
for name in raftlog.__all__:
    getattr(raftlog, name)
heavy = {"ray", "pandas", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""
    ended = run_python(program)
    assert ended.returncode == 0, ended.stderr
    with pytest.raises(AttributeError, match="nosuch"):
        raftlog.nosuch  # noqa: B018


# -- two faces -----------------------------------------------------------------------------------------------


def surface(cls: type) -> dict[str, Any]:
    """Public names of a class, with the parameters of what can be called."""
    found: dict[str, Any] = {}
    for name, member in inspect.getmembers(cls):
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            found[name] = "property"
        elif callable(member):
            found[name] = [
                (each.name, each.kind, each.default, each.annotation)
                for each in inspect.signature(member).parameters.values()
            ]
    return found


@pytest.mark.parametrize(
    ("blocking", "asynchronous"),
    [
        (log_module.Log, aio.Log),
        (sync_producer.Producer, aio.Producer),
        (sync_producer.Transaction, aio.Transaction),
        (sync.Consumer, aio.Consumer),
    ],
)
def test_both_faces_offer_the_same(blocking: type, asynchronous: type) -> None:
    assert surface(blocking) == surface(asynchronous)


@pytest.mark.parametrize("name", ["start", "connect", "shutdown"])
def test_both_modules_offer_the_same(name: str) -> None:
    parameters = [inspect.signature(getattr(module, name)).parameters for module in (raftlog, aio)]
    assert [str(each) for each in parameters[0].values()] == [str(each) for each in parameters[1].values()]


def test_waiting_is_awaiting_and_nothing_else_is() -> None:
    """What blocks in one face is awaited in the other; making handles and looking at properties is
    neither."""
    plain = {"producer", "consumer", "records", "closed", "name", "cluster_id", "bootstrap", "transaction"}
    plain |= {"process", "member", "positions_for_commit", "transport"}
    for cls in (aio.Log, aio.Producer, aio.Transaction, aio.Consumer):
        for name in surface(cls):
            assert inspect.iscoroutinefunction(getattr(cls, name)) == (name not in plain), (cls, name)
