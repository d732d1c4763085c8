"""Snapshots that do not check are brought back from peers; and what the operator is told of damage."""

from __future__ import annotations

import pytest
from salvage_kit import (
    flip_in,
    forget_indexes,
    open_store,
    remove,
    repaired,
    segments,
)
from storage_kit import append, contents, grow, run, snapshot_at, spec

from raftlog.errors import DamagedData
from raftlog.raft.types import HardState
from raftlog.storage.damage import BrokenSnapshot
from raftlog.storage.replica_log import ReplicaLog
from raftlog.storage.snapshot_file import snapshot_path
from raftlog.storage.store import BrokerStore
from raftlog.storage.verify import Outcome, verify
from raftlog.testing.disk import SimDisk

# -- snapshots -----------------------------------------------------------------------------------------------


async def uncompacted(disk: SimDisk, *, term: int = 1) -> BrokerStore:
    """A store with a log of five segments and a snapshot at the end of each."""
    store = await open_store(disk)
    log = await store.create(spec())
    while len(log.segments) < 5:
        await grow(store, log, 1, term=term)
        if log.is_segment_end(log.last_index):
            log.save_snapshot(snapshot_at(log, log.last_index))
    await store.flush()
    return store


async def compacted(disk: SimDisk) -> BrokerStore:
    """A store whose log begins behind a snapshot; there is another one further on."""
    store = await uncompacted(disk)
    log = store.logs[1]
    await log.truncate_prefix(log.segments[2].base_index - 1)
    assert log.first_index > 1
    return store


async def lend_snapshot(store: BrokerStore, peer: BrokerStore, damage: DamagedData) -> None:
    assert isinstance(damage, BrokenSnapshot)
    for index in damage.indexes:
        data, total = await peer.ward.snapshot_chunk(1, index, 0, 1 << 20)
        if total:
            await store.ward.keep_snapshot(1, index, data)
            return
    raise damage


def test_a_log_without_any_snapshot_gets_one() -> None:
    async def main() -> None:
        disk, other = SimDisk(), SimDisk()
        peer, store = await compacted(other), await compacted(disk)
        frames = await contents(store.logs[1])
        indexes = list(store.logs[1].snapshots)
        await store.close()
        for index in indexes:
            disk.flip(snapshot_path(1, index), 25)
        store = await open_store(disk)
        damage = await store.ward.next_damage(1)
        assert damage is not None
        assert str(damage) == str(store.damaged[1])
        with pytest.raises(DamagedData):
            await store.ward.keep_snapshot(1, indexes[0], disk.content(snapshot_path(1, indexes[0])))
        await lend_snapshot(store, peer, damage)
        assert await store.ward.next_damage(1) is None
        assert await contents(store.logs[1]) == frames
        # So is the one before its first entry, which a follower may need.
        damage = await store.ward.next_damage(1)
        assert damage is not None
        await lend_snapshot(store, peer, damage)
        assert await store.ward.next_damage(1) is None
        assert not store.ward.patients
        assert (await store.logs[1].snapshot_chunk(indexes[0], 0, 1 << 20))[1] > 0
        await store.close()
        await peer.close()

    run(main())


def test_first_segment_and_snapshot_are_missing() -> None:
    async def main() -> None:
        disk, other = SimDisk(), SimDisk()
        peer, store = await compacted(other), await compacted(disk)
        frames, border = await contents(store.logs[1]), store.logs[1].first_index - 1
        await store.close()
        whole = segments(disk)
        remove(disk, next(iter(whole)))
        remove(disk, snapshot_path(1, border))
        store = await open_store(disk)
        damage = await store.ward.next_damage(1)
        assert isinstance(damage, BrokenSnapshot)
        assert damage.indexes == (border,)
        await lend_snapshot(store, peer, damage)
        await repaired(store, peer)
        assert segments(disk) == whole
        assert await contents(store.logs[1]) == frames
        await store.close()
        await peer.close()

    run(main())


def test_a_border_snapshot_that_rots_is_noticed_when_it_is_sent() -> None:
    async def main() -> None:
        disk, other = SimDisk(), SimDisk()
        peer, store = await compacted(other), await compacted(disk)
        log: ReplicaLog = store.logs[1]
        border = log.first_index - 1
        disk.flip(snapshot_path(1, border), 30)
        with pytest.raises(Exception, match="cannot be sent"):
            await log.snapshot_chunk(border, 0, 100)
        assert store.ward.patients == [1]
        damage = await store.ward.next_damage(1)
        assert damage is not None
        await lend_snapshot(store, peer, damage)
        assert await store.ward.next_damage(1) is None
        assert not store.ward.patients
        assert (await log.snapshot_chunk(border, 0, 1 << 20))[0] == other.content(snapshot_path(1, border))
        await store.close()
        await peer.close()

    run(main())


# -- what the operator is told -------------------------------------------------------------------------------


def test_verify_tells_what_peers_repair_from_what_stops_the_broker() -> None:
    async def main() -> None:
        base = SimDisk()
        store = await compacted(base)
        border = store.logs[1].first_index - 1
        await store.close()
        paths = list(segments(base))
        journal = next(path for path in base.paths() if path.startswith("journal/"))
        cases: dict[Outcome, list[str]] = {
            Outcome.REPAIR: [paths[0], paths[-1], snapshot_path(1, border)],
            Outcome.IGNORE: [paths[0].replace(".seg", ".idx")],
            Outcome.STOP: [journal, "MANIFEST"],
        }
        for outcome, files in cases.items():
            for path in files:
                disk = base.copy()
                disk.flip(path, len(disk.content(path)) // 2 if path.endswith(".seg") else 24)
                problems = (await verify(disk)).problems
                assert {problem.outcome for problem in problems} == {outcome}, (path, problems)
                assert str(outcome) in str(problems[0])

    run(main())


def test_a_sleeper_begins_where_the_others_do_if_its_log_goes_on_from_there() -> None:
    """The others dropped what it lacks before it could be repaired. It keeps term, vote and what follows; a
    crash on the way is harmless."""

    async def main() -> None:
        disk, other = SimDisk(), SimDisk()
        store, peer = await uncompacted(disk), await uncompacted(other)
        vote = HardState(7, 1, store.logs[1].last_index)
        await append(store, store.logs[1], [], vote)
        first_index = peer.logs[1].segments[2].base_index
        await peer.logs[1].truncate_prefix(first_index - 1)
        await store.close()
        forget_indexes(disk)
        first = min(segments(disk))
        flip_in(disk, [first], 0.5)
        snapshot = other.content(snapshot_path(1, first_index - 1))
        store = await open_store(disk)
        with pytest.raises(DamagedData):
            await store.ward.begin_behind(1, first_index - 1, snapshot[:-1])
        for _ in range(2):
            assert await store.ward.next_damage(1) is not None
            assert await store.ward.begin_behind(1, first_index - 1, snapshot)
            assert await store.ward.next_damage(1) is None
            log = store.logs[1]
            assert log.first_index == first_index
            assert (log.recovered.hard_state.term, log.recovered.hard_state.vote) == (7, 1)
            assert await contents(log) == await contents(peer.logs[1])
            assert first not in segments(disk)
            disk = disk.kill()  # before the journal says where the log begins
            store = await open_store(disk)
        await store.close()
        await peer.close()

    run(main())


def test_a_sleeper_whose_log_does_not_go_on_from_there_waits() -> None:
    async def main() -> None:
        disk, other = SimDisk(), SimDisk()
        store, peer = await uncompacted(disk), await uncompacted(other, term=2)
        first_index = peer.logs[1].segments[2].base_index
        await peer.logs[1].truncate_prefix(first_index - 1)
        await store.close()
        forget_indexes(disk)
        flip_in(disk, [min(segments(disk))], 0.5)
        whole = segments(disk)
        store = await open_store(disk)
        snapshot = other.content(snapshot_path(1, first_index - 1))
        assert not await store.ward.begin_behind(1, first_index - 1, snapshot)
        assert await store.ward.next_damage(1) is not None
        assert segments(disk) == whole
        await store.close()
        await peer.close()

    run(main())
