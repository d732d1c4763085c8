"""Consumer groups from the outside: sharing, moving, committing, and what faults do to it."""

from __future__ import annotations

from group_kit import GroupWorld

ALL = 4


def test_members_share_the_partitions_and_read_everything_once() -> None:
    with GroupWorld() as world:
        world.produce(0, 100)
        one = world.reader("one")
        world.until(lambda: len(one.records) == 100)
        two = world.reader("two")
        world.until(world.is_shared)
        world.produce(100, 200)
        world.until(lambda: len(one.records) + len(two.records) == 200)
        assert sorted(one.values + two.values) == [*range(200)]
        assert two.values
        assert len(one.called("on_revoked")) == 2
        assert one.called("on_lost") == []
        two.stop()
        world.readers.remove(two)
        assert world.until(world.is_shared) < 0.5, "who leaves says so"
        assert not one.errors
        assert not two.errors
