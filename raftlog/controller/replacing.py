"""A broker that is lost is replaced by another one: its replicas move, then it is forgotten.

What to do follows from the metadata alone, so whoever takes over in the middle goes on with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from raftlog.errors import RaftlogError
from raftlog.state.metadata import MetadataState
from raftlog.state.metadata_commands import AlterPartition, Command, RemoveBroker, TakeControl

logger = logging.getLogger("raftlog.controller")

_AGAIN_S: Final = 0.25


def replace_broker(image: MetadataState, epoch: int, old: int, new: int) -> list[AlterPartition]:
    """The moves that put ``new`` in the place of ``old`` wherever ``new`` is not wanted already.

    Args:
        epoch: of the controller.
        old, new: broker ids.
    """
    moves = []
    for topic in image.topics.values():
        for index, partition in enumerate(topic.partitions):
            holders = [broker_id for _, broker_id in partition.replicas]
            if old not in holders or new in holders:
                continue
            known = {broker_id: replica_id for replica_id, broker_id in partition.leaving}
            replicas = [
                (new, known.get(new, 0)) if broker_id == old else (broker_id, replica_id)
                for replica_id, broker_id in partition.replicas
            ]
            moves.append(AlterPartition(epoch, topic.topic_id, index, replicas))
    return moves


async def carry_out(
    call: Callable[[Command], Awaitable[Any]], image: Callable[[], MetadataState], old: int, new: int
) -> None:
    """Move everything from ``old``, which is lost, to ``new``, and forget ``old``.

    Returns when that is done, or when only partitions are left that both should hold.

    Args:
        call: has a command applied (``MetadataService.call``).
        image: the metadata as it is now.

    Raises:
        RaftlogError: not retriable: another controller has taken over, or ``old`` cannot be removed.
    """
    epoch = await _insist(call, TakeControl())
    while old in image().brokers:
        for move in replace_broker(image(), epoch, old, new):
            await _insist(call, move)
        held = [topic.partitions[index] for topic, index, _ in image().replicas_on(old)]
        if not held:
            await _insist(call, RemoveBroker(epoch, old))
            logger.info("broker %d has taken the place of broker %d", new, old)
        elif all({old, new} <= {holder for _, holder in partition.replicas} for partition in held):
            logger.warning("broker %d cannot take the place of %d in %d partitions", new, old, len(held))
            return
        await asyncio.sleep(_AGAIN_S)


async def _insist(call: Callable[[Command], Awaitable[Any]], command: Command) -> Any:
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
