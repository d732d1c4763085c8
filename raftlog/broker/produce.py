"""What a produce request brings, and how its batches are answered.

A request holds batches for many partitions, and each of them is settled when its own group has it, or
refuses it: one of a slow group, or of one without a quorum, must not keep the news from the others. So an
answer may come in parts, one for each turn of the loop in which some batch was settled. Mostly it does not:
what leaves in one request is replicated and synced together.
"""

from __future__ import annotations

from typing import Any, Protocol

from raftlog.errors import ProtocolError, RaftlogError
from raftlog.net.rpc import Produced, ProduceRequest, ProduceResponse
from raftlog.net.server import Reply


class Turn(Protocol):
    """The turn of the loop."""

    def settle(self, answer: BatchAnswer) -> None:
        """Have :meth:`BatchAnswer.send` called before others are waited for."""


def split_batches(request: ProduceRequest, payload: memoryview) -> list[memoryview]:
    """The payload's batches, one for each partition.

    Raises:
        ProtocolError: not as many as the request has partitions, or more bytes than came.
    """
    lengths = request.lengths
    if len(lengths) + 1 != len(request.partitions) or any(length < 0 for length in lengths):
        raise ProtocolError(
            f"batches of {lengths} bytes and one more for {len(request.partitions)} partitions"
        )
    batches = []
    position = 0
    for length in lengths:
        batches.append(payload[position : position + length])
        position += length
    if position > len(payload):
        raise ProtocolError(f"batches of {lengths} bytes and one more announced, {len(payload)} came")
    batches.append(payload[position:])
    return batches


def answer_batch(reply: Reply, produced: Produced | None, error: RaftlogError | None) -> None:
    """Answer a request of one batch."""
    if produced is None:
        assert error is not None, "a batch is produced, or there is a reason"
        reply.fail(error)
    else:
        reply.ok(ProduceResponse([produced]))


class BatchAnswer:
    """The answer to a request of several batches.

    Args:
        reply: to the request.
        sizes: bytes of each of its batches.
        turn: which sends the parts.
    """

    __slots__ = ("_left", "_news", "_reply", "_sizes", "_turn")

    def __init__(self, reply: Reply, sizes: list[int], turn: Turn) -> None:
        self._reply = reply
        self._sizes = sizes
        self._turn = turn
        self._left = dict.fromkeys(range(len(sizes)))
        """Numbers of the batches that are not answered."""
        self._news: dict[int, Produced] = {}
        """Settled, and not answered."""

    def settle(self, number: int, produced: Any, error: RaftlogError | None) -> None:
        """That batch is in the log, or why it is not known to be. Once all are settled the answer leaves."""
        reply, news = self._reply, self._news
        if reply.is_done:
            return  # the request as a whole was answered with a bug of the broker
        if error is not None:
            produced = Produced(-1, -1, error=reply.refusal(error))
        if not news:
            self._turn.settle(self)
        news[number] = produced
        if len(news) == len(self._left):
            reply.ok(ProduceResponse([news[each] for each in self._left]))

    def send(self) -> None:
        """Tell what is settled, if that was not done."""
        news = self._news
        if not news or self._reply.is_done:
            return
        self._news = {}
        for number in news:
            del self._left[number]
        size = sum(self._sizes[number] for number in news)
        self._reply.part(ProduceResponse(list(news.values()), list(news)), size)
