"""A broker that is lost is replaced by another one: its replicas move, then it is forgotten.

What to do follows from the metadata alone, so whoever takes over in the middle goes on with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final, TypeAlias

from raftlog.errors import RaftlogError
from raftlog.state.metadata import MetadataState
from raftlog.state.metadata_commands import AlterPartition, Command, RemoveBroker, TakeControl

logger = logging.getLogger("raftlog.controller")

_AGAIN_S: Final = 0.25

Call: TypeAlias = Callable[[Command], Awaitable[Any]]
Image: TypeAlias = Callable[[], MetadataState]


def substitutes(image: MetadataState, known: Collection[int]) -> list[tuple[int, int]]:
    """(lost broker, one to take its place) for each broker of the image that is not known.

    The choice falls on the one that has the fewest of its partitions already, and then the fewest of all: one
    that has just joined, or had begun to take over.

    Args:
        known: broker ids whose data are there.
    """
    held: dict[int, set[tuple[bytes, int]]] = {broker_id: set() for broker_id in image.brokers}
    for topic in image.topics.values():
        for index, partition in enumerate(topic.partitions):
            for _, broker_id in partition.replicas:
                held[broker_id].add((topic.topic_id, index))
    free = sorted(broker_id for broker_id in held if broker_id in known)
    pairs = []
    for old in sorted(broker_id for broker_id in held if broker_id not in known):
        if free:
            new = min(free, key=lambda each: (len(held[old] & held[each]), len(held[each])))
            free.remove(new)
            pairs.append((old, new))
    return pairs


def replace_broker(image: MetadataState, epoch: int, old: int, new: int) -> list[AlterPartition]:
    """The moves that put ``new`` in the place of ``old``; where ``new`` is wanted already, another broker:
    the one that holds least.

    Args:
        epoch: of the controller.
        old, new: broker ids.
    """
    held = Counter(
        broker_id
        for topic in image.topics.values()
        for partition in topic.partitions
        for _, broker_id in partition.replicas
    )
    takers = [new, *sorted(image.brokers.keys() - {old, new}, key=lambda each: (held[each], each))]
    moves = []
    for topic in image.topics.values():
        for index, partition in enumerate(topic.partitions):
            holders = [broker_id for _, broker_id in partition.replicas]
            free = [each for each in takers if each not in holders and not _drains(image, each)]
            if old not in holders or not free:
                continue
            known = {broker_id: replica_id for replica_id, broker_id in partition.leaving}
            replicas = [
                (free[0], known.get(free[0], 0)) if broker_id == old else (broker_id, replica_id)
                for replica_id, broker_id in partition.replicas
            ]
            moves.append(AlterPartition(epoch, topic.topic_id, index, replicas))
    return moves


def _drains(image: MetadataState, broker_id: int) -> bool:
    broker = image.brokers.get(broker_id)
    return broker is not None and broker.draining


async def replace_lost(call: Call, image: Image, known: Collection[int]) -> None:
    """Let others take the place of all brokers that are not known.

    Args:
        call: has a command applied (``MetadataService.call``).
        image: the metadata as it is now.
        known: broker ids whose data are there; those that have just joined are waited for.

    Raises:
        RaftlogError: see :func:`carry_out`.
    """
    while True:
        if image().brokers.keys() >= set(known).difference(image().removed):
            break
        await asyncio.sleep(_AGAIN_S)
    for old, new in substitutes(image(), known):
        await carry_out(call, image, old, new)


async def carry_out(call: Call, image: Image, old: int, new: int) -> None:
    """Move everything from ``old``, which is lost, to ``new``, and forget ``old``.

    Returns when that is done, or when only partitions are left that all the others hold already.

    Raises:
        RaftlogError: not retriable: another controller has taken over, or ``old`` cannot be removed.
    """
    epoch = await _insist(call, TakeControl())
    while old in image().brokers:
        moves = replace_broker(image(), epoch, old, new)
        for move in moves:
            await _insist(call, move)
        held = [topic.partitions[index] for topic, index, _ in image().replicas_on(old)]
        if not held:
            await _insist(call, RemoveBroker(epoch, old))
            logger.info("broker %d has taken the place of broker %d", new, old)
        elif not moves and all(old in [holder for _, holder in partition.replicas] for partition in held):
            logger.warning("nobody can take the place of broker %d in %d partitions", old, len(held))
            return
        await asyncio.sleep(_AGAIN_S)


async def _insist(call: Call, command: Command) -> Any:
    """Ask until it is applied or refused. One that was applied although nobody said so is refused or changes
    nothing when it is asked for again."""
    while True:
        try:
            return await call(command)
        except RaftlogError as error:
            if not error.retriable:
                raise
            logger.debug("%s: %s", type(command).__name__, error)
        await asyncio.sleep(_AGAIN_S)
