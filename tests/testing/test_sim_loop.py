"""The simulated loop: virtual time, order, kill, determinism, and what it refuses."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest

from raftlog.testing.loop import (
    WALL_EPOCH_MS,
    ConditionTimeout,
    Deadlock,
    LimitReached,
    SimLoop,
    UnhandledError,
)


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    loop = SimLoop(7)
    yield loop
    loop.close()
    gc.collect()  # warnings about what was dropped belong to this test


def test_time_is_virtual(loop: SimLoop) -> None:
    start = loop.time()
    loop.run_until_complete(asyncio.wait_for(_sleep(loop, 86_400.0), 90_000))
    assert loop.time() - start == 86_400.0


async def _sleep(loop: SimLoop, seconds: float) -> None:
    await asyncio.sleep(seconds)


def test_timers_go_off_in_order_of_time_then_of_creation(loop: SimLoop) -> None:
    seen: list[str] = []
    for name, delay in (("late", 2.0), ("first", 1.0), ("second", 1.0)):
        loop.call_later(delay, seen.append, name)
    loop.call_later(1.5, seen.append, "cancelled").cancel()
    loop.run_for(3.0)
    assert seen == ["first", "second", "late"]


def test_many_cancelled_timers_do_not_pile_up(loop: SimLoop) -> None:
    for _ in range(10_000):
        loop.call_later(1000.0, print).cancel()
    assert len(loop._timers) < 500
    loop.run_for(2000.0)


def test_callbacks_of_one_node_are_fifo_and_nodes_are_shuffled() -> None:
    orders = set()
    for seed in range(5):
        loop = SimLoop(seed)
        seen: list[tuple[str, int]] = []
        for i in range(50):
            for node in ("a", "b", "c"):
                with loop.node(node):
                    loop.call_soon(seen.append, (node, i))
        loop.run_for(0.1)
        for node in ("a", "b", "c"):
            assert [i for name, i in seen if name == node] == list(range(50))
        orders.add(tuple(seen))
        loop.close()
    assert len(orders) == 5, "every seed gives another order"


def test_same_seed_same_trace_other_seed_other_trace() -> None:
    def trace(seed: int) -> tuple[int, list[str]]:
        loop = SimLoop(seed)
        rng = random.Random(seed)
        seen: list[str] = []

        async def work(node: str) -> None:
            for _ in range(30):
                await asyncio.sleep(rng.random())
                seen.append(node)

        async def main() -> None:
            await asyncio.gather(*(loop.run_as(node, work(node)) for node in "abc"))

        loop.run_until_complete(main())
        loop.close()
        return loop.trace, seen

    assert trace(1) == trace(1)
    assert trace(1)[0] != trace(2)[0]


def test_tasks_inherit_their_node_and_die_with_it(loop: SimLoop) -> None:
    beats: list[str] = []

    async def beat(name: str) -> None:
        while True:
            await asyncio.sleep(1.0)
            beats.append(name)

    async def main() -> None:
        task = asyncio.create_task(beat("child"))
        await task

    loop.run_as("a", main())
    loop.run_as("b", beat("other"))
    loop.run_for(3.5)
    assert beats.count("child") == 3
    loop.kill("a")
    loop.run_for(3.0)
    assert beats.count("child") == 3
    assert beats.count("other") == 6
    assert not loop.is_alive("a")


def test_kill_runs_no_finally_block(loop: SimLoop) -> None:
    seen: list[str] = []

    @asynccontextmanager
    async def resource() -> Any:
        try:
            yield
        finally:
            seen.append("resource closed")

    async def numbers() -> Any:
        try:
            while True:
                yield 1
                await asyncio.sleep(1.0)
        finally:
            seen.append("generator closed")

    async def work() -> None:
        try:
            async with resource(), asyncio.timeout(100), asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(50))
                async for _ in numbers():
                    await asyncio.sleep(1.0)
        except BaseException:  # what a killed task must not come to
            seen.append("except")
            raise
        finally:
            seen.append("finally")
            await asyncio.sleep(1)

    loop.run_as("a", work())
    with loop.node("a"):
        loop.call_later(5.0, seen.append, "timer")
    loop.run_for(2.5)
    loop.run_as("a", work())  # not even started
    loop.kill("a")
    gc.collect()
    loop.run_for(100.0)
    gc.collect()
    assert seen == []


def test_a_node_that_kills_itself_runs_to_its_next_await_only(loop: SimLoop) -> None:
    seen: list[str] = []

    async def work() -> None:
        loop.kill("a")
        seen.append("same step")
        loop.call_soon(seen.append, "scheduled after death")
        loop.call_later(1.0, seen.append, "timer set after death")
        await asyncio.sleep(0)
        seen.append("after await")

    loop.run_as("a", work())
    loop.run_for(10.0)
    assert seen == ["same step"]


def test_a_killed_node_can_be_started_again(loop: SimLoop) -> None:
    async def answer() -> int:
        await asyncio.sleep(1.0)
        return 42

    old = loop.run_as("a", answer())
    loop.run_for(0.5)
    loop.kill("a")
    new = loop.run_as("a", answer())
    assert loop.run_until_complete(new) == 42
    assert not old.done()


def test_a_future_of_the_living_does_not_wake_the_dead(loop: SimLoop) -> None:
    seen: list[str] = []
    future = loop.create_future()

    async def wait() -> None:
        await future
        seen.append("woken")

    loop.run_as("a", wait())
    loop.run_for(0.1)
    loop.kill("a")
    future.set_result(None)
    loop.run_for(0.1)
    assert seen == []


def test_paused_node_stands_still_and_catches_up(loop: SimLoop) -> None:
    seen: list[float] = []
    start = loop.time()

    async def tick() -> None:
        for _ in range(3):
            await asyncio.sleep(1.0)
            seen.append(loop.time() - start)

    loop.run_as("a", tick())
    loop.run_for(1.5)
    loop.pause("a")
    loop.run_for(10.0)
    assert seen == [1.0]
    loop.resume("a")
    loop.run_for(5.0)
    assert seen == [1.0, 11.5, 12.5]


def test_a_paused_node_can_be_killed_and_a_dead_one_is_not_revived_by_resume(loop: SimLoop) -> None:
    seen: list[int] = []
    with loop.node("a"):
        loop.call_soon(seen.append, 1)
    loop.pause("a")
    loop.kill("a")
    loop.resume("a")
    loop.pause("a")
    assert not loop.is_alive("a")
    with loop.node("a"):
        loop.call_soon(seen.append, 2)
    loop.run_for(1.0)
    assert seen == [2]


def test_run_until_and_its_timeout(loop: SimLoop) -> None:
    start = loop.time()
    seen: list[int] = []
    loop.call_later(5.0, seen.append, 1)
    loop.call_later(50.0, seen.append, 2)
    loop.run_until(lambda: bool(seen), timeout=10.0)
    assert loop.time() - start == 5.0
    with pytest.raises(ConditionTimeout):
        loop.run_until(lambda: len(seen) > 1, timeout=10.0)
    assert loop.time() - start == 15.0
    loop.run_until(lambda: len(seen) > 1, timeout=100.0)


def test_deadlock_names_who_waits(loop: SimLoop) -> None:
    async def stuck() -> None:
        await loop.create_future()

    with pytest.raises(Deadlock, match=r"b1:.*stuck"):
        loop.run_until_complete(loop.run_as("b1", stuck()))


def test_limits_on_steps_and_time() -> None:
    async def spin() -> None:
        while True:  # noqa: ASYNC110 - a livelock is what is wanted
            await asyncio.sleep(0)

    async def tick() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(1.0)

    loop = SimLoop(0, steps_max=1000)
    with pytest.raises(LimitReached, match="steps"):
        loop.run_until_complete(spin())
    loop.close()
    loop = SimLoop(0, seconds_max=100)
    with pytest.raises(LimitReached, match="time"):
        loop.run_until_complete(tick())
    loop.close()


def test_an_error_in_a_callback_ends_the_simulation(loop: SimLoop) -> None:
    def bad() -> None:
        raise ValueError("bad callback")

    loop.call_soon(bad)
    with pytest.raises(UnhandledError) as caught:
        loop.run_for(1.0)
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_error_in_a_task_that_nobody_awaits_ends_the_simulation(loop: SimLoop) -> None:
    async def bad() -> None:
        raise ValueError("bad task")

    loop.run_as("a", bad())
    with pytest.raises(UnhandledError):
        loop.run_for(1.0)


def test_errors_in_killed_tasks_are_nobodys_business(loop: SimLoop) -> None:
    async def bad() -> None:
        raise ValueError("bad task")

    task = loop.run_as("a", bad())
    loop.run_for(1.0)
    loop.kill("a")
    del task
    gc.collect()
    loop.run_for(1.0)


def test_wall_clocks_jump_and_drift_apart(loop: SimLoop) -> None:
    assert loop.wall_ms("a") == loop.wall_ms("b") == WALL_EPOCH_MS
    loop.adjust_clock("a", jump_ms=-5000, drift=0.01)
    loop.run_for(100.0)
    assert loop.wall_ms("a") == WALL_EPOCH_MS - 5000 + 101_000
    assert loop.wall_ms("b") == WALL_EPOCH_MS + 100_000


def test_the_real_world_is_refused(loop: SimLoop) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="seams"):
            await asyncio.to_thread(print)
        with pytest.raises(RuntimeError, match="seams"):
            await asyncio.open_connection("127.0.0.1", 1)
        with pytest.raises(RuntimeError, match="seams"):
            await asyncio.start_server(print, "127.0.0.1", 0)
        with pytest.raises(RuntimeError, match="seams"):
            threading.Thread(target=print).start()
        with pytest.raises(RuntimeError, match="seams"):
            ThreadPoolExecutor(1).submit(print)
        for clock in ("time()", "time_ns()", "monotonic()", "perf_counter()", "sleep(0)"):
            with pytest.raises(RuntimeError, match="seams"):
                eval(f"time.{clock}", {"__name__": "raftlog.broker.any", "time": time})
        assert time.time(), "others may"

    loop.run_until_complete(main())
    failures: list[Exception] = []

    def call() -> None:
        try:
            loop.call_soon_threadsafe(print)
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "another thread" in str(failures[0])


def test_asyncio_itself_works_on_it(loop: SimLoop) -> None:
    async def main() -> list[str]:
        queue: asyncio.Queue[str] = asyncio.Queue(1)
        lock = asyncio.Lock()

        async def put() -> None:
            for name in ("a", "b", "c"):
                async with lock:
                    await queue.put(name)

        async with asyncio.TaskGroup() as group:
            group.create_task(put())
            got = [await queue.get() for _ in range(3)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await queue.get()
        return got

    assert loop.run_until_complete(main()) == ["a", "b", "c"]
