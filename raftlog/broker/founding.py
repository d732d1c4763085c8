"""Founding a cluster: once, explicitly, and on every broker's disk before the first election.

A plan names the founding brokers and the secret. Writing it into a directory gives that directory an
identity; a directory that has one is recovered and never founded again, and one of another cluster is
refused.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random, SystemRandom

from raftlog.errors import ForeignDataDir
from raftlog.storage.disk import Disk
from raftlog.storage.identity import Identity, find_identity, store_identity


@dataclass(frozen=True, slots=True)
class FoundingPlan:
    """What all founding brokers must agree on.

    Args:
        cluster_id: random, for ever.
        cluster_name: what users call it.
        secret: proves to one another who belongs to the cluster.
        brokers: broker ids.
    """

    cluster_id: str
    cluster_name: str
    secret: bytes
    brokers: tuple[int, ...]

    @classmethod
    def new(cls, name: str, brokers: Sequence[int], random: Random | None = None) -> FoundingPlan:
        """A plan with a fresh cluster id and secret (from the operating system unless ``random`` is
        given)."""
        source = _source(random)
        cluster_id = str(uuid.UUID(bytes=source.randbytes(16), version=4))
        return cls(cluster_id, name, source.randbytes(32), tuple(brokers))

    @property
    def metadata_members(self) -> tuple[tuple[int, int], ...]:
        """(broker id, replica id) of the metadata group: replica ids 1, 2, … in the order of the brokers."""
        return tuple((broker_id, position + 1) for position, broker_id in enumerate(self.brokers))


def _source(random: Random | None) -> Random:
    return SystemRandom() if random is None else random


def decide(name: str, found: Mapping[int, Identity | None], random: Random | None = None) -> FoundingPlan:
    """What the directories say: the plan they were founded under, or a new one if not one of them has an
    identity.

    Args:
        name: the cluster's name.
        found: broker id -> the identity in its directory, None where there is none.

    Raises:
        ForeignDataDir: the directories belong to different clusters, to one of another name, or to another
            broker.
        DataDirError: ``raftlog recover`` has begun in one of them and has not finished.
    """
    known = {broker_id: identity for broker_id, identity in found.items() if identity is not None}
    if not known:
        return FoundingPlan.new(name, sorted(found), random)
    first = next(iter(known.values()))
    for broker_id, identity in known.items():
        if identity.cluster_id != first.cluster_id:
            raise ForeignDataDir(
                f"brokers {first.broker_id} and {broker_id} have data of different clusters "
                f"({first.cluster_id} and {identity.cluster_id}): "
                "move away the directory that does not belong here"
            )
        if identity.broker_id != broker_id:
            raise ForeignDataDir(
                f"the directory of broker {broker_id} holds data of broker {identity.broker_id}: "
                "move it back to where it was"
            )
    if first.cluster_name != name:
        raise ForeignDataDir(
            f"the data belongs to cluster {first.cluster_name!r}, not {name!r}: start it under its own name, "
            "or choose another data directory"
        )
    for identity in known.values():
        identity.check_recovered()
    members = tuple(broker_id for broker_id, _ in first.metadata_voters)
    # Who was lost for good is not waited for.
    members = next((identity.survivors for identity in known.values() if identity.survivors), members)
    return FoundingPlan(first.cluster_id, name, first.secret, members)


def may_run(plan: FoundingPlan, found: Mapping[int, Identity | None]) -> list[int]:
    """Which brokers may be started: those with an identity, founded or joined later. A member whose identity
    is gone has lost its data, or its node is away: an empty replica in its place must not vote.

    All founders may, where nobody has an identity (a new cluster), or a majority has one and has never run:
    then nobody can have been elected, nothing was ever acknowledged, and a founding that was interrupted is
    completed.
    """
    known = {broker_id: identity for broker_id, identity in found.items() if identity is not None}
    never_ran = sum(known[each].incarnation == 0 for each in plan.brokers if each in known)
    if not known or never_ran > len(plan.brokers) // 2:
        return list(plan.brokers)
    return sorted(known)


async def found(disk: Disk, plan: FoundingPlan, broker_id: int, random: Random | None = None) -> Identity:
    """Give the directory its identity under ``plan``; one that has it already keeps it.

    Raises:
        ForeignDataDir: the directory belongs to another cluster, or to another broker of this one.
    """
    known = await find_identity(disk)
    if known is not None:
        if (known.cluster_id, known.broker_id) != (plan.cluster_id, broker_id):
            raise ForeignDataDir(
                f"the directory belongs to broker {known.broker_id} of cluster {known.cluster_name!r} "
                f"({known.cluster_id}), not to broker {broker_id} of {plan.cluster_name!r} "
                f"({plan.cluster_id}): give each broker a directory of its own"
            )
        return known
    identity = Identity(
        cluster_id=plan.cluster_id,
        cluster_name=plan.cluster_name,
        broker_id=broker_id,
        disk_id=_source(random).randbytes(16),
        incarnation=0,
        secret=plan.secret,
        metadata_replica=dict(plan.metadata_members)[broker_id],
        metadata_voters=plan.metadata_members,
        addresses={},
    )
    await store_identity(disk, identity)
    return identity
