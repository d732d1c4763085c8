"""The order in which a broker lets its replicas do what they want."""

from __future__ import annotations

import asyncio
from typing import Any

from raftlog.broker.cycle import Cycle


class Spy:
    """A broker that notes what its cycle does, with a disk that is done when a commit begins."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.stored: list[Member] = []
        self.peers = self.store = self.pulse = self
        self.cycle = Cycle(self)  # type: ignore[arg-type]

    def flush(self) -> None:
        self.did.append("flush")

    def pumped(self, replica: Any) -> None:
        self.did.append(f"{replica.name} may rest")

    def begin(self) -> None:
        stored, self.stored = self.stored, []
        if stored:
            self.did.append("sync")
        for member in stored:
            self.cycle.mark(member)  # type: ignore[arg-type]


class Member:
    """A replica with one thing to store."""

    def __init__(self, spy: Spy, name: str, *, leads: bool) -> None:
        self.spy = spy
        self.name = name
        self.dirty = False
        self.staged = self if leads else None
        self._to_store = True

    def hand_out(self) -> bool:
        self.dirty = False
        self.spy.did.append(f"{self.name} sends")
        return self._to_store

    def store(self) -> None:
        assert self._to_store, "it said that it has something to store"
        self._to_store = False
        self.spy.stored.append(self)
        self.spy.did.append(f"{self.name} stores")

    def follow_up(self) -> None:
        self.spy.did.append(f"{self.name} applies")


class Answer:
    """An answer of which a part is settled."""

    def __init__(self, spy: Spy) -> None:
        self.spy = spy

    def send(self) -> None:
        self.spy.did.append("a part leaves")


def carried_out(*leads: bool) -> list[str]:
    """What one turn of the loop does, in which members, leaders or not, have been marked twice."""

    async def main() -> list[str]:
        spy = Spy()
        members = [Member(spy, "leader" if each else "follower", leads=each) for each in leads]
        for member in members * 2:
            spy.cycle.mark(member)  # type: ignore[arg-type]
        assert not spy.did, "not before the turn ends"
        await asyncio.sleep(0)
        found, spy.did = spy.did, []
        await asyncio.sleep(0)
        assert not spy.did
        return found

    return asyncio.run(main())


def test_a_follower_acknowledges_before_it_applies() -> None:
    did = carried_out(False)
    assert [each for each in did if each.startswith("follower") or each == "sync"] == [
        "follower sends",
        "follower stores",
        "sync",
        "follower sends",
        "follower applies",
        "follower may rest",
    ]
    assert did.index("flush", did.index("sync")) < did.index("follower applies")


def test_a_leaders_entries_and_answers_leave_before_its_own_sync() -> None:
    did = carried_out(True)
    assert did[:5] == ["leader sends", "flush", "leader stores", "leader applies", "leader may rest"]
    assert did[5] == "sync"


def test_all_that_is_marked_in_a_turn_shares_a_frame_and_a_sync() -> None:
    did = carried_out(True, False, False)
    assert did[:4] == ["leader sends", "follower sends", "follower sends", "flush"]
    assert did.count("sync") == 1


def test_parts_of_answers_leave_before_the_sync_or_without_one() -> None:
    async def main() -> list[str]:
        spy = Spy()
        spy.cycle.settle(Answer(spy))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert spy.did.count("a part leaves") == 1, "though nobody else has anything to do"
        spy.did.clear()
        spy.cycle.mark(Member(spy, "leader", leads=True))  # type: ignore[arg-type]
        spy.cycle.settle(Answer(spy))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        return spy.did

    did = asyncio.run(main())
    assert did.index("a part leaves") < did.index("sync")
