"""The broker's cycle: what its replicas have to do is done for all of them together, once a turn of the loop.

Whatever gives a replica something to do (a message, a tick, a proposal, a sync that is done) marks it. The
marked ones are pumped when all that came in this turn has been taken in: so what they want sent to one peer
leaves in one frame, and what they want durable shares a write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raftlog.broker.produce import BatchAnswer
from raftlog.broker.replica import Replica

if TYPE_CHECKING:
    from raftlog.broker.broker import Broker


class Cycle:
    """Of one broker.

    Args:
        broker: whose.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._loop = asyncio.get_running_loop()
        self._marked: list[Replica[Any]] = []
        self._answers: list[BatchAnswer] = []
        """Of which something is settled."""
        self._due = False
        """:meth:`_pump` is about to be called, or runs."""

    def mark(self, replica: Replica[Any]) -> None:
        """The replica has something to do."""
        if not replica.dirty:
            replica.dirty = True
            self._marked.append(replica)
            if not self._due:
                self._due = True
                self._loop.call_soon(self._pump)

    def settle(self, answer: BatchAnswer) -> None:
        """A batch of it is settled: tell, unless the others follow in this turn."""
        self._answers.append(answer)
        if not self._due:
            self._due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """First what others wait for: messages leave, then a leader's answers. Then the journal begins to
        write. It may be done when that call returns: then acknowledgements leave, too, before followers apply
        what is committed, for which nobody waits."""
        broker = self._broker
        pumped = broker.pulse.pumped
        followers: dict[Replica[Any], None] = {}
        try:
            while self._marked or followers or self._answers:
                marked, self._marked = self._marked, []
                storing = [replica for replica in marked if _taken(replica, replica.hand_out)]
                broker.peers.flush()
                for replica in storing:
                    _taken(replica, replica.store)
                for replica in marked:
                    if replica.staged is None:
                        followers[replica] = None
                    else:
                        _taken(replica, replica.follow_up)
                        pumped(replica)
                self._send_answers()
                broker.store.begin()
                if not self._marked:
                    for replica in followers:
                        _taken(replica, replica.follow_up)
                        pumped(replica)
                    followers.clear()
        finally:
            self._due = False
        broker.peers.flush()

    def _send_answers(self) -> None:
        answers, self._answers = self._answers, []
        for answer in answers:
            answer.send()


def _taken(replica: Replica[Any], step: Callable[[], bool | None]) -> bool | None:
    """Take one replica's step. What it meets there ends this replica, and keeps none of the others from
    theirs: they are marked, and nobody would mark them again."""
    try:
        return step()
    except Exception as bug:  # noqa: BLE001 - the broker's other groups can go on
        replica.halt("cannot go on", bug)
        return False
