"""Founding: once, and what is found decides; every refusal says whose the data is and what to do."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec
import pytest

from raftlog.broker.founding import FoundingPlan, decide, found, may_run
from raftlog.errors import ForeignDataDir
from raftlog.storage.identity import IDENTITY_PATH, Identity, find_identity
from raftlog.testing.disk import SimDisk

PLAN = FoundingPlan.new("shop", range(3), random.Random(1))


def identity(broker_id: int, plan: FoundingPlan = PLAN, **changes: Any) -> Identity:
    """What founding writes into a broker's directory."""
    made = Identity(
        cluster_id=plan.cluster_id,
        cluster_name=plan.cluster_name,
        broker_id=broker_id,
        disk_id=bytes([broker_id]) * 16,
        incarnation=0,
        secret=plan.secret,
        metadata_replica=dict(plan.metadata_members).get(broker_id, 0),
        metadata_voters=plan.metadata_members,
    )
    return msgspec.structs.replace(made, **changes)


# -- a plan --------------------------------------------------------------------------------------------------


def test_a_new_plan_is_like_no_other() -> None:
    plans = [FoundingPlan.new("shop", range(3)) for _ in range(50)]
    assert len({plan.cluster_id for plan in plans}) == 50
    assert len({plan.secret for plan in plans}) == 50
    assert all(len(plan.secret) == 32 for plan in plans)


def test_a_seed_gives_the_plan_again() -> None:
    assert FoundingPlan.new("shop", range(3), random.Random(1)) == PLAN


def test_metadata_replicas_are_numbered_from_one_in_the_order_of_the_brokers() -> None:
    assert FoundingPlan("c", "n", b"s", (7, 2, 9)).metadata_members == ((7, 1), (2, 2), (9, 3))


# -- decide --------------------------------------------------------------------------------------------------


def test_a_cluster_is_founded_where_nothing_is_found() -> None:
    plan = decide("shop", {2: None, 0: None, 1: None})
    assert (plan.cluster_name, plan.brokers) == ("shop", (0, 1, 2))


@pytest.mark.parametrize("present", [(0,), (2,), (1, 2), (0, 1, 2)])
def test_one_identity_is_enough_to_recover(present: tuple[int, ...]) -> None:
    """Whatever the others lost: nothing is founded again."""
    directories = {broker: identity(broker) if broker in present else None for broker in range(3)}
    assert decide("shop", directories) == PLAN


def test_directories_of_different_clusters_are_refused() -> None:
    other = FoundingPlan.new("shop", range(3), random.Random(2))
    with pytest.raises(ForeignDataDir, match="move away") as caught:
        decide("shop", {0: identity(0), 1: identity(1, other), 2: None})
    for named in ("brokers 0 and 1", PLAN.cluster_id, other.cluster_id):
        assert named in str(caught.value)
    assert decide("shop", {0: identity(0), 1: identity(1), 2: None}) == PLAN


def test_a_directory_under_another_brokers_name_is_refused() -> None:
    with pytest.raises(ForeignDataDir, match=r"directory of broker 0 holds data of broker 1.*move") as caught:
        decide("shop", {0: identity(1), 1: None})
    assert caught.value.fatal
    assert decide("shop", {0: None, 1: identity(1)}) == PLAN


def test_data_of_a_cluster_of_another_name_is_refused() -> None:
    with pytest.raises(ForeignDataDir, match=r"'shop', not 'test'.*under its own name"):
        decide("test", {0: identity(0)})
    assert decide("shop", {0: identity(0)}) == PLAN


# -- may_run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("present", [(), (1, 2), (0, 1, 2)])
def test_an_interrupted_founding_is_completed(present: tuple[int, ...]) -> None:
    directories = {broker: identity(broker) if broker in present else None for broker in range(3)}
    assert may_run(PLAN, directories) == [0, 1, 2]


def test_a_minority_that_never_ran_founds_nobody_anew() -> None:
    """The others may have run and be out of sight: made anew, they would be an empty majority."""
    assert may_run(PLAN, {0: identity(0), 1: None, 2: None}) == [0]


@pytest.mark.parametrize("ran", [0, 1, 2])
def test_once_one_has_run_an_empty_directory_may_not(ran: int) -> None:
    """It may have voted and acknowledged: an empty replica in its place must not."""
    directories = {0: identity(0), 1: None, 2: identity(2)}
    directories[ran] = identity(ran, incarnation=4)
    lost = {1} - {ran}
    assert may_run(PLAN, directories) == [broker for broker in range(3) if broker not in lost]


def test_a_directory_that_cannot_be_seen_does_not_run_here() -> None:
    assert may_run(PLAN, {1: identity(1, incarnation=1)}) == [1]


def test_a_broker_that_joined_later_runs_like_the_founders() -> None:
    joined = identity(7, incarnation=0, metadata_replica=1000)
    assert may_run(PLAN, {0: identity(0, incarnation=1), 7: joined}) == [0, 7]
    assert may_run(PLAN, {7: joined}) == [7]


# -- found ---------------------------------------------------------------------------------------------------


def test_founding_gives_each_directory_an_identity_that_it_keeps() -> None:
    async def main() -> None:
        disks = [SimDisk() for _ in range(3)]
        made = [await found(disk, PLAN, broker) for broker, disk in enumerate(disks)]
        assert len({each.disk_id for each in made}) == 3
        for broker, disk in enumerate(disks):
            assert made[broker].incarnation == 0
            assert made[broker].metadata_voters == PLAN.metadata_members
            assert await find_identity(disk) == made[broker]
            assert await found(disk, PLAN, broker) == made[broker], "again: it keeps it"

    asyncio.run(main())


def test_a_directory_of_another_cluster_or_broker_is_not_founded_over() -> None:
    async def main() -> None:
        disk = SimDisk()
        await found(disk, PLAN, 0)
        before = disk.content(IDENTITY_PATH)
        other = FoundingPlan.new("other", range(3), random.Random(2))
        for plan, broker_id in ((other, 0), (PLAN, 1)):
            with pytest.raises(ForeignDataDir, match=r"belongs to broker 0 of cluster 'shop'.*its own"):
                await found(disk, plan, broker_id)
            assert disk.content(IDENTITY_PATH) == before
        assert (await found(disk, PLAN, 0)).broker_id == 0

    asyncio.run(main())
