"""A member's place in its group as it was at some time, kept while the group moves on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from raftlog.client.group import Membership, Seat
from raftlog.client.metadata import PartitionView
from raftlog.net.rpc import Request

R = TypeVar("R", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class OldSeat(Seat):
    """Speaks in the name of a member as it was when this was made, for ever: what its client would find out
    by itself, here only the coordinator can."""

    epoch: int

    @classmethod
    def of(cls, member: Membership) -> OldSeat:
        """That of a member as it is now."""
        return cls(member, member._member_id, member._epoch)

    async def call(self, make: Callable[[PartitionView, str, int], Request[R]], *, timeout: float) -> R:
        """As :meth:`raftlog.client.group.Seat.call`, but for who it is."""
        cluster, place = self.membership._cluster, self.membership._place
        answer, _ = await cluster.call_leader(place, make(place, self.member_id, self.epoch), timeout=timeout)
        return answer
