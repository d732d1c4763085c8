"""The watch's own arithmetic: quorums, configurations that overlap, what retention may drop, what a disk has
synced; and the atlas of damage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raftlog.config import TopicConfig
from raftlog.raft.types import ConfState, Entry
from raftlog.record.frame import FrameKind
from raftlog.state.partition import SetLogStart, encode_command
from raftlog.testing.atlas import Atlas, Extent
from raftlog.testing.books import Group, Member, Violation, is_quorum, overlap
from raftlog.testing.swarm import Profile
from raftlog.testing.workload import Workload


@pytest.mark.parametrize(
    ("conf", "replicas", "enough"),
    [
        (ConfState((1, 2, 3)), (1, 2), True),
        (ConfState((1, 2, 3)), (1, 4), False),
        (ConfState((1, 2, 3, 4)), (1, 2), False),
        (ConfState((1, 2), learners=(3, 4)), (1, 3, 4), False),
        (ConfState((1, 2, 4), outgoing=(1, 2, 3)), (1, 2), True),
        (ConfState((1, 4, 5), outgoing=(1, 2, 3)), (1, 4), False),
        (ConfState((1, 4, 5), outgoing=(1, 2, 3)), (1, 2, 4), True),
    ],
)
def test_a_quorum_is_a_majority_of_each_half(
    conf: ConfState, replicas: tuple[int, ...], enough: bool
) -> None:
    assert is_quorum(conf, replicas) is enough


def test_which_configurations_may_follow_one_another() -> None:
    one, other = ConfState((1, 2, 3)), ConfState((1, 2, 4))
    joint = ConfState((1, 2, 4), outgoing=(1, 2, 3))
    assert not overlap(one, other), "1 3 and 2 4 are a quorum each"
    assert overlap(one, joint)
    assert overlap(joint, other)
    assert overlap(one, ConfState((1, 2, 3), learners=(4,)))
    assert not overlap(ConfState((1,)), ConfState((2,)))


def partition(**policy: Any) -> tuple[Group, list[Entry]]:
    """Ten batches, a second and 100 bytes each, and then SetLogStart(5)."""
    group, entries, crc = Group("t/0", policy=TopicConfig(**policy)), [], 0
    for number in range(10):
        payload = number.to_bytes(8, "big") + bytes(92)
        entries.append(Entry.create(crc, FrameKind.BATCH, 1, number + 1, number * 1000, payload))
        crc = entries[-1].crc
    command = encode_command(SetLogStart(5))
    entries.append(Entry.create(crc, FrameKind.COMMAND, 1, 11, 10_000, command))
    for entry in entries:
        group.book(entry)
    return group, entries


@pytest.mark.parametrize(
    ("policy", "allowed"),
    [
        ({}, False),
        ({"retention_ms": 5_999}, True),  # the newest one that goes is 6 seconds old
        ({"retention_ms": 6_000}, False),
        ({"retention_bytes": 690}, True),  # five are kept, of 138 bytes each
        ({"retention_bytes": 691}, False),
        ({"retention_bytes": 691, "retention_ms": 5_000}, True),
    ],
)
def test_what_retention_may_drop(policy: dict[str, int], allowed: bool) -> None:
    group, _ = partition(**policy)
    if allowed:
        group.log_start_moved(5)
        assert group.starts == [0, 5]
    else:
        with pytest.raises(Violation, match="retention"):
            group.log_start_moved(5)
    with pytest.raises(Violation, match="retention"):
        group.log_start_moved(7)  # nobody said so


def test_equal_index_and_term_is_the_same_entry() -> None:
    group, entries = partition()
    with pytest.raises(Violation, match="log matching"):
        group.book(Entry.create(1, FrameKind.NOOP, 1, entries[3].index, 0, b""))
    group.book(Entry.create(1, FrameKind.NOOP, 2, entries[3].index, 0, b""))


def test_what_is_synced_and_what_a_later_sync_has_covered() -> None:
    member = Member(1, 0)
    disk: Any = SimpleNamespace(commits_done=0, commits_written=1, commits_marked=-1)
    member.flights.extend([[1, 5], [2, 9]])
    member.settle(disk)
    assert (member.durable, member.covered) == (0, 0)
    disk.commits_done = 1
    member.settle(disk)
    assert (member.durable, member.covered) == (5, 0), "it could still be taken for torn"
    disk.commits_done = 2
    member.settle(disk)
    assert (member.durable, member.covered) == (9, 0), "the second was begun before the first was synced"
    disk.commits_marked = 1
    member.settle(disk)
    assert (member.durable, member.covered) == (9, 5)
    member.cut(3)
    assert (member.durable, member.covered) == (3, 3)
    loose = Member(2, 0, loose=True)
    loose.flights.append([1, 5])
    disk.commits_done = 0
    loose.settle(disk)
    assert loose.durable == 5


def test_the_atlas_leaves_one_good_copy_of_every_entry() -> None:
    workload = Workload(Profile(4, partitions=1, weights={"break": 1.0}, fault_count=2, large_values=0.3))
    try:
        workload.run()
        atlas = Atlas(workload.cluster, set())
        files = {
            broker_id: next(
                extent
                for extent in atlas.extents(broker_id)
                if extent.path.endswith(".seg") and len(extent.path.split("/")[1]) == 4  # not the metadata
            )
            for broker_id in workload.cluster.disks
        }
        first = {broker_id: Extent(broker_id, file.path, 100, 101) for broker_id, file in files.items()}
        for broker_id in (0, 1):
            assert atlas.may_spoil(first[broker_id])
            atlas.spoil(first[broker_id])
        assert not atlas.may_spoil(first[2]), "it would be the last one"
        assert not atlas.may_lose(2)
        assert atlas.may_lose(0)
        assert atlas.spoilt == {0, 1}
        behind = Extent(2, files[2].path, files[2].end - 1, files[2].end)
        assert atlas.may_spoil(behind), "another entry"
    finally:
        workload.close()
