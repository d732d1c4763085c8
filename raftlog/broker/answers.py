"""How a request is answered with what was decided, or with what a coroutine returns."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from raftlog.errors import RaftlogError
from raftlog.net.rpc import Struct
from raftlog.net.server import Reply


def answer(reply: Reply, result: Any, error: RaftlogError | None) -> None:
    """Answer with a result, or with why there is none."""
    if error is not None:
        reply.fail(error)
    else:
        reply.ok(result)


async def answer_with(reply: Reply, work: Callable[[], Coroutine[Any, Any, Struct]]) -> None:
    """Answer with what ``work`` returns, or with why it could not. (It is called in here, for a task that is
    cancelled before it began would leave a coroutine behind that nobody awaits.)"""
    try:
        reply.ok(await work())
    except RaftlogError as error:
        reply.fail(error)
    except Exception as bug:  # of whatever kind, it is told and raised again
        # whoever asked must not wait in vain; raised again, it is logged where the task ends
        reply.fail(RaftlogError(f"internal error of the broker: {bug!r}"))
        raise
