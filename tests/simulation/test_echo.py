"""Late copies: which requests may come once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from raftlog.errors import ConnectionLost, RequestTimeout, StorageFull
from raftlog.net.handshake import encode_error
from raftlog.net.rpc import Produced, ProduceResponse
from raftlog.testing.echo import may_come_late, settle_batches
from raftlog.testing.loop import SimLoop

CASES: dict[str, tuple[Callable[[Any], object], bool]] = {
    "on its way": (lambda answer: None, False),
    "carried out": (lambda answer: answer.set_result((None, b"")), True),
    "refused": (lambda answer: answer.set_exception(StorageFull("no room")), False),
    "lost on its way": (
        lambda answer: answer.set_exception(ConnectionLost("reset", indeterminate=True)),
        True,
    ),
    "never sent": (lambda answer: answer.set_exception(ConnectionLost("closed", indeterminate=False)), False),
    "given up": (lambda answer: answer.set_exception(RequestTimeout("no answer")), True),
    "nobody waits": (lambda answer: answer.cancel(), True),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_refused_does_not_come_once_more(case: str) -> None:
    """Found by seed 70110: a batch that a full disk had refused, as its producer was told, came again when
    there was room. No connection does that."""
    end, may = CASES[case]
    loop = SimLoop(1)
    try:
        answer = loop.create_future()
        end(answer)
        assert may_come_late(answer) is may
        if answer.done() and not answer.cancelled():
            answer.exception()
    finally:
        loop.close()


def test_each_batch_of_a_request_may_come_once_more_by_its_own_answer() -> None:
    loop = SimLoop(1)
    try:
        answers = [loop.create_future() for _ in range(4)]
        refused = Produced(-1, -1, error=encode_error(StorageFull("no room")))
        settle_batches(answers, ProduceResponse([refused, Produced(7, 0)], [2, 0]), None)
        assert [may_come_late(answer) for answer in answers] == [True, False, False, False]
        settle_batches(answers, None, ConnectionLost("reset", indeterminate=True))
        assert [may_come_late(answer) for answer in answers] == [True, True, False, True]
    finally:
        loop.close()
