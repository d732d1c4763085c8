"""Brokers carry out transactions: every step under faults."""

from __future__ import annotations

from coordination_kit import GROUP, CoordinatedWorld

from raftlog.net.rpc import READ_UNCOMMITTED


def test_a_transaction_from_begin_to_end() -> None:
    with CoordinatedWorld(partitions=2) as world:
        me = world.init()
        world.enlist(me, (0, 1), (GROUP,))
        world.write(me, b"a", b"b")
        world.write(me, b"c", partition=1)
        world.stage(me, 17)
        assert world.read(isolation=READ_UNCOMMITTED) == [b"a", b"b"]
        after = world.end(me)
        assert (after.producer_id, after.epoch) == (me.producer_id, me.epoch + 1)
        world.until_state("complete_commit")
        assert world.read(0, READ_UNCOMMITTED) == [b"a", b"b"]
        assert world.offsets() == {0: 17}
