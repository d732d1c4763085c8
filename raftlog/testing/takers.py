"""Groups that commit their positions without transactions, as part of a pipeline.

Members of one group process what they have polled and commit then (*at least once*), those of the other
commit first, as ``poll`` does for them (*at most once*). What ends them in between, faults decide.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from random import Random
from typing import Final

from raftlog import aio
from raftlog.broker.group_replica import GroupReplica
from raftlog.client.aio_consumer import Consumer
from raftlog.errors import RaftlogError
from raftlog.testing.checker_delivery import AT_LEAST_ONCE, AT_MOST_ONCE
from raftlog.testing.history import History
from raftlog.testing.pipeline_profile import PipelineProfile

GROUPS: Final = (AT_LEAST_ONCE, AT_MOST_ONCE)
"""Named after what they promise."""
VISITORS: Final = "visitors"
"""A group that looks in once."""
LEAVE_CHANCE: Final = 0.03
WORK_CHANCE: Final = 0.3
"""That a record takes its time, so that faults come between its processing and its commit."""


class Taker:
    """One member.

    Args:
        group: of ``GROUPS``.
        topic: that it reads.
        profile: of the pipeline.
        history: where it notes what it has processed.
        rng: decides what it does.
        counts: what it did.
        joined: told of each new consumer.
        failed: told what went wrong.
        committing: around each commit.
    """

    def __init__(
        self,
        group: str,
        topic: str,
        profile: PipelineProfile,
        history: History,
        rng: Random,
        counts: Counter[str],
        *,
        joined: Callable[[Consumer], None],
        failed: Callable[[RaftlogError], None],
        committing: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._group = group
        self._topic = topic
        self._profile = profile
        self._history = history
        self._random = rng
        self._counts = counts
        self._joined = joined
        self._failed = failed
        self._committing = committing
        history.promises[group] = group

    async def work(self, log: aio.Log) -> None:
        """Read along for ever; now and then leave the group and join it again."""
        rng, profile = self._random, self._profile
        while True:
            try:
                async with log.consumer(
                    self._topic,
                    group=self._group,
                    semantics=self._group,
                    isolation="read_committed",
                    session_timeout_ms=profile.session_timeout_ms,
                    rebalance_timeout_ms=profile.rebalance_timeout_ms,
                    fetch_wait_ms=100,
                ) as consumer:
                    self._joined(consumer)
                    while rng.random() > LEAVE_CHANCE:
                        await self._take(consumer)
            except RaftlogError as error:
                self._failed(error)
                await asyncio.sleep(rng.uniform(0.05, 1.0))

    async def _take(self, consumer: Consumer) -> None:
        rng = self._random
        for record in await consumer.poll(0.5, rng.randint(1, 8)):
            place = f"{record.topic}/{record.partition}"
            self._counts[f"records taken {self._group}"] += 1
            self._history.processed.append((self._group, place, record.offset, bytes(record.value)))
            if rng.random() < WORK_CHANCE:
                await asyncio.sleep(rng.choice([0.01, 0.1, 1.0]))
        if self._group == AT_LEAST_ONCE:
            await self._commit(consumer)

    async def _commit(self, consumer: Consumer) -> None:
        with self._committing():
            await consumer.commit(timeout=self._random.choice([0.5, 5.0]))


async def visit(log: aio.Log, topic: str) -> None:
    """Join the group of visitors, commit a position, and never come back."""
    async with log.consumer(topic, group=VISITORS) as consumer:
        while not await consumer.assignment():
            await consumer.poll(0.1)
        await consumer.commit(dict.fromkeys(await consumer.assignment(), 0))
    await log.close()


def is_forgotten(replicas: list[GroupReplica]) -> bool:
    """Whether no coordinator knows anything of the visitors."""
    return not any(
        VISITORS in replica.machine.groups or VISITORS in replica.machine.offsets for replica in replicas
    )
