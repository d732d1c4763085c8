"""The window of one partition: batches that were sent and are not settled, in the order of their sequences.

Idempotence (KIP-98) in one paragraph: a producer id from the cluster, and per partition a sequence that
counts records. The leader takes only the batch that follows the last one, answers a repeated one with the
offset it has, and refuses a gap with OutOfOrderSequence. So a batch may be sent again, byte for byte, as
often as needed, and with up to five in flight (as many as the leader remembers) order survives any retry,
provided this::

    sent   1 2 3 4 5
    answer . x . .          2 failed in a way that a retry may mend
                            -> send nothing more until 3, 4, 5 are answered (by OutOfOrderSequence, or not at
                            all)
    sent     2 3 4 5        -> then all that failed again, in order; only then new ones

A batch that is given up leaves a gap that nothing can follow: the window is *broken*. Once all others are
answered, the producer goes on under its next epoch, with sequences from 0; the partition then refuses copies
of the earlier one that are still on their way (KIP-360). Only what is certainly not in the log may move to
it; what is in doubt would be doubled if its first copy survived (rp#3039), so its caller is told
"indeterminate" instead.

Pure: no clock, no loop, no thread.
"""

from __future__ import annotations

import enum
from bisect import insort
from collections.abc import Callable
from operator import attrgetter
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from raftlog.errors import DuplicateSequence, OutOfOrderSequence, RaftlogError, UnknownProducer

EPOCH_MAX: Final = 2**15 - 1
WINDOW_SIZE: Final = 5
"""Batches in flight per partition: as many as a leader remembers of each producer."""


class Identity(NamedTuple):
    """Who a producer is for deduplication."""

    producer_id: int
    epoch: int

    def renewed(self) -> Identity | None:
        """The next epoch of this producer, which fences this one; None after the last."""
        return Identity(self.producer_id, self.epoch + 1) if self.epoch < EPOCH_MAX else None


class Sent(Protocol):
    """What the window needs of a batch."""

    attempt: int
    deadline: float
    doubt_before: bool
    in_doubt: bool
    order: int

    def sequence_after(self) -> int: ...


class Verdict(enum.Enum):
    """What an error means for the batch it answers."""

    WRITTEN = "it is in the log, at an offset nobody remembers"
    RETRY = "send it again, as it is"
    RENEW = "it is certainly not in the log: send it under a new identity"
    FAIL = "tell the caller"


B = TypeVar("B", bound=Sent)
_order: Callable[[Sent], int] = attrgetter("order")


class Window(Generic[B]):
    """See the module."""

    __slots__ = (
        "_orders",
        "broken",
        "draining",
        "identity",
        "in_flight",
        "inherited",
        "next_sequence",
        "retry",
        "size",
    )

    def __init__(self, size: int = WINDOW_SIZE) -> None:
        assert 1 <= size <= WINDOW_SIZE, "a leader remembers five batches"
        self.size = size
        self.in_flight: list[B] = []
        """Sent, unanswered; in order."""
        self.retry: list[B] = []
        """To be sent again; in order."""
        self.draining = False
        """Something failed: nothing goes out until all in flight are answered."""
        self.broken = False
        self.identity: Identity | None = None
        self.next_sequence = 0
        self.inherited = False
        """The sequences before the first were an earlier producer's, and none of ours is acknowledged."""
        self._orders = 0

    def unsettled(self) -> list[B]:
        """All of them, the oldest first."""
        return sorted([*self.in_flight, *self.retry], key=_order)

    def begin(self, identity: Identity, sequence: int = 0) -> None:
        """Go on under an identity that the partition knows up to this sequence, or under a new one."""
        assert not self.in_flight, "nothing of the old identity is left"
        assert not self.retry, "nothing of the old identity is left"
        self.identity = identity
        self.next_sequence = sequence
        self.inherited = sequence > 0
        self.draining = self.broken = False

    def end(self) -> None:
        """The identity is over: everything under it is settled, and :meth:`begin` comes next."""
        assert not self.in_flight, "an identity ends when nothing of it is under way"
        assert not self.retry, "an identity ends when nothing of it is under way"
        self.identity = None

    def may_resend(self) -> bool:
        """Whether the first of ``retry`` may go out now."""
        return bool(self.retry) and not self.draining and not self.broken

    def may_send_new(self) -> bool:
        """Whether a batch that was never sent may go out now."""
        if self.retry or self.draining or self.broken:
            return False
        # counted from the oldest, not by number: were one answer late and others not, the leader would
        # remember five batches beyond the late one, and no longer know its offset
        return not self.in_flight or self._orders + 1 - self.in_flight[0].order < self.size

    def sent_new(self, batch: B) -> None:
        """A batch goes out for the first time; it bears ``next_sequence``."""
        assert not self.retry, "what failed goes first"
        assert not self.draining, "the window is recovering"
        assert not self.broken, "the window is broken"
        self._orders += 1
        batch.order = self._orders
        self.next_sequence = batch.sequence_after()
        self._sent(batch)

    def resend(self) -> B:
        """The batch to send again now."""
        assert self.may_resend(), "the window is recovering"
        batch = self.retry.pop(0)
        self._sent(batch)
        return batch

    def _sent(self, batch: B) -> None:
        assert not self.in_flight or self.in_flight[-1].order < batch.order, "batches go out in order"
        batch.attempt += 1
        batch.doubt_before = batch.in_doubt
        batch.in_doubt = True
        self.in_flight.append(batch)

    def acknowledged(self, batch: B) -> None:
        """It is in the log."""
        self.in_flight.remove(batch)
        self.inherited = False
        if not self.in_flight:
            self.draining = False

    def refused(self, batch: B, error: RaftlogError, *, renewable: bool = True) -> Verdict:
        """Take in an answer that is an error; says what is to become of the batch, which is out of the window
        unless it waits for its retry. See :func:`judge`."""
        oldest = self._is_oldest(batch)
        self.in_flight.remove(batch)
        batch.in_doubt = batch.doubt_before or error.indeterminate
        verdict = judge(
            error,
            oldest=oldest,
            broken=self.broken,
            in_doubt=batch.in_doubt,
            renewable=renewable,
            inherited=self.inherited,
        )
        if verdict is Verdict.FAIL:
            self.broken = True
        elif verdict in (Verdict.RETRY, Verdict.RENEW):
            insort(self.retry, batch, key=_order)
            self.draining = True
            self.broken = self.broken or verdict is Verdict.RENEW
        self._drained()
        return verdict

    def give_up(self, batch: B) -> None:
        """Its time is over. What it leaves behind is a gap, and an answer that comes late is stale."""
        (self.in_flight if batch in self.in_flight else self.retry).remove(batch)
        batch.attempt += 1
        self.broken = True
        self._drained()

    def abandon_in_flight(self) -> None:
        """No answer is to be expected any more: all in flight are to be sent again, in doubt as they are."""
        for batch in self.in_flight:
            batch.attempt += 1
        self.retry = sorted([*self.retry, *self.in_flight], key=_order)
        self.in_flight = []
        self._drained()

    def needs_identity(self) -> bool:
        """Whether :meth:`begin` has to come before anything else can be sent."""
        return not self.in_flight and (self.broken or self.identity is None)

    def dissolve(self) -> tuple[list[B], list[B]]:
        """Empty a broken window that has nothing in flight: (certainly not in the log, in doubt), each in
        order."""
        assert self.broken, "only a broken window is dissolved"
        assert not self.in_flight, "it is dissolved when everything is answered"
        movable = [batch for batch in self.retry if not batch.in_doubt]
        doubtful = [batch for batch in self.retry if batch.in_doubt]
        self.retry = []
        self.identity = None
        self._drained()
        return movable, doubtful

    def _is_oldest(self, batch: B) -> bool:
        return not any(other.order < batch.order for other in [*self.in_flight, *self.retry])

    def _drained(self) -> None:
        if not self.in_flight:
            self.draining = False


def judge(
    error: RaftlogError,
    *,
    oldest: bool,
    broken: bool,
    in_doubt: bool,
    renewable: bool = True,
    inherited: bool = False,
) -> Verdict:
    """What an error means.

    Args:
        error: the answer.
        oldest: no batch before it in the window is unsettled.
        broken: a batch before it was given up.
        in_doubt: an earlier attempt of it may have been written.
        renewable: it may be sent under another identity: it is not part of a transaction.
        inherited: all that was acknowledged under its identity here is an earlier producer's.
    """
    if isinstance(error, DuplicateSequence):
        return Verdict.WRITTEN
    if isinstance(error, (OutOfOrderSequence, UnknownProducer)) and (broken or not oldest):
        # what comes of following a batch that failed (UnknownProducer, if that one was the producer's first)
        return Verdict.RETRY
    if isinstance(error, UnknownProducer) or (isinstance(error, OutOfOrderSequence) and inherited):
        # the partition forgot this producer (it was idle for long): KIP-360; or it lost what an earlier
        # producer wrote (``raftlog recover``, a copy of the data from before), not this one's to tell
        return Verdict.RENEW if renewable and not in_doubt else Verdict.FAIL
    # OutOfOrderSequence for the oldest means that the log lost what it acknowledged to us: not retriable
    return Verdict.RETRY if error.retriable else Verdict.FAIL
