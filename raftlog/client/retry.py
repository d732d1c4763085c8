"""Retrying, as tenacity policies whose clock is the running loop's and whose dice are the seam's.

tenacity's own ``stop_after_delay`` and ``wait_random_exponential`` read the real clock and the global Random:
a simulation could not repeat them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from raftlog.errors import RaftlogError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before trying again: exponential, with jitter.

    The default climbs slowly at first (20, 26, 34 ms …): an election takes 100 to 150 ms, and who asks for
    the new leader in steps of a third of what has gone by finds it a third too late at most.
    """

    first_s: float = 0.020
    factor: float = 1.3
    most_s: float = 0.5

    def delay(self, attempt: int, random: Random) -> float:
        """Seconds to wait after the ``attempt``-th failure in a row (from 1), within a quarter around the
        curve."""
        exact = min(self.first_s * self.factor ** min(attempt - 1, 64), self.most_s)
        return exact * random.uniform(0.75, 1.25)


BACKOFF = Backoff()


def is_retriable(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    return isinstance(error, RaftlogError) and error.retriable


async def retry(
    call: Callable[[], Awaitable[T]],
    *,
    random: Random,
    deadline: float,
    retriable: Callable[[BaseException], bool] = is_retriable,
    backoff: Backoff = BACKOFF,
) -> T:
    """Call until it succeeds, fails for good, or the deadline is near.

    Args:
        call: what to try.
        random: the seam's.
        deadline: on the running loop's clock, seconds. No attempt starts after it.
        retriable: which errors are worth another attempt.
        backoff: how long between attempts.

    Raises:
        Exception: the last attempt's own.
    """
    loop = asyncio.get_running_loop()

    def wait(state: RetryCallState) -> float:
        return backoff.delay(state.attempt_number, random)

    def stop(state: RetryCallState) -> bool:
        return loop.time() + state.upcoming_sleep >= deadline

    async def attempt() -> T:
        return await call()  # tenacity awaits only what is a coroutine function

    policy = AsyncRetrying(
        sleep=asyncio.sleep, wait=wait, stop=stop, retry=retry_if_exception(retriable), reraise=True
    )
    return await policy(attempt)
