"""Which appended entries and promises are durable, and what must wait until they are.

Every Append handed to storage has a sequence; storage confirms sequences in order. What a confirmation proves
is not "the entry at index i", for the log may have been cut and rewritten meanwhile::

    sequence 1   append  (5, term 2)          log: … (5,2)
    sequence 2   append  (5, term 3)  cuts 5  log: … (5,3)
    sequence 3   append  (5, term 2)  cuts 5  log: … (5,2)   ← what sequence 1 wrote, yet written anew:
                                                            a crash now may leave (5,3) on disk

so a cut at index i lowers what every sequence still in flight may prove to i - 1. Sequence 1 then proves 4,
and only sequence 3 proves 5.
"""

from __future__ import annotations

from collections import deque

from raftlog.raft.types import Message


class Durability:
    """Sequences of one node. ``index``: the log is durable up to here. ``term``: term and vote of this term
    are."""

    __slots__ = ("_flights", "_held", "confirmed", "handed", "index", "term", "unassigned")

    def __init__(self, index: int, term: int) -> None:
        self.index = index
        self.term = term
        self.handed = 0
        """Sequence of the last Append given to storage."""
        self.confirmed = 0
        self._flights: deque[list[int]] = deque()
        """[sequence, last index it proves, term it proves], oldest first."""
        self._held: deque[tuple[int, Message]] = deque()
        self.unassigned: list[Message] = []
        """Held for the next Append, which has no sequence yet."""

    def hold(self, message: Message) -> None:
        """Keep ``message`` back until everything changed so far is durable."""
        self.unassigned.append(message)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way to the disk."""
        return self.confirmed == self.handed and not self.unassigned

    def hand_out(self, last_index: int, term: int) -> int:
        """Another Append goes to storage; it will prove ``last_index`` and ``term``. Returns its sequence."""
        self.handed += 1
        self._flights.append([self.handed, last_index, term])
        return self.handed

    def assign(self) -> list[Message]:
        """Tie messages held since the last call to the last Append; returns those that need not wait."""
        messages, self.unassigned = self.unassigned, []
        if self.confirmed == self.handed:
            return messages
        self._held.extend((self.handed, message) for message in messages)
        return []

    def confirm(self, sequence: int) -> list[Message]:
        """Storage has synced ``sequence`` and all before. Returns the messages that waited for it."""
        assert sequence <= self.handed, f"sequence {sequence} was never handed out (last: {self.handed})"
        flights = self._flights
        while flights and flights[0][0] <= sequence:
            _, index, term = flights.popleft()
            if index > self.index:
                self.index = index
            self.term = term
        if sequence > self.confirmed:
            self.confirmed = sequence
        released = []
        while self._held and self._held[0][0] <= sequence:
            released.append(self._held.popleft()[1])
        return released

    def cut(self, index: int) -> None:
        """The log is rewritten from ``index`` on."""
        last = index - 1
        if self.index > last:
            self.index = last
        for flight in self._flights:
            if flight[1] > last:
                flight[1] = last

    def restored(self, index: int) -> None:
        """A durable snapshot at ``index`` replaced the whole log."""
        for flight in self._flights:
            flight[1] = index
        self.index = index
