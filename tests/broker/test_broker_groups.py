"""Brokers coordinate groups: members, their sessions, and the offsets they commit."""

from __future__ import annotations

from coordination_kit import CoordinatedWorld


def test_two_members_share_the_partitions() -> None:
    with CoordinatedWorld(partitions=4) as world:
        one = world.heartbeat("one")
        assert one.assigned == {world.topic_id: (0, 1, 2, 3)}
