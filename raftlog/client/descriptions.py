"""What ``describe_topic``, ``describe_group`` and ``describe_cluster`` return, put together from what the
brokers say of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from raftlog.net.rpc import BrokerRow, BrokerStatusResponse, GroupOffset, GroupRow, ReplicaRow, TopicRow
from raftlog.record.types import TopicPartition

LEADER = "leader"
METADATA = "__metadata"


class PartitionDescription(msgspec.Struct, frozen=True):
    """One partition of a topic. Offsets and term are the leader's; without one, the furthest replica's."""

    index: int
    leader: int | None
    """Broker id; None while there is none."""
    replicas: list[int]
    """Broker ids, the preferred leader first."""
    term: int
    start_offset: int
    end_offset: int
    """After the last record in the log, committed or not."""
    committed: int
    """After the last record that is committed."""
    lagging: list[int]
    """Broker ids whose replica is behind, out of service or does not answer."""


class TopicDescription(msgspec.Struct, frozen=True):
    """One topic."""

    name: str
    topic_id: str
    config: dict[str, Any]
    """What was set when it was created."""
    partitions: list[PartitionDescription]


class BrokerDescription(msgspec.Struct, frozen=True):
    """One broker."""

    id: int
    node_id: str
    address: str
    """host:port"""
    state: str
    """"alive", "draining" or "lost"."""
    pid: int
    replicas: int
    """How many it holds, of topics; of the metadata every broker has one."""
    leaders: int
    """How many of them lead."""
    totals: dict[str, int]
    """What has gone through it since it was started: records_in, bytes_in, bytes_out, elections_won."""


class MemberDescription(msgspec.Struct, frozen=True):
    """One member of a group."""

    member_id: str
    client_id: str
    """host:pid:random, of the process."""
    host: str
    """Where its connection comes from."""
    epoch: int
    state: str
    """"stable", "unrevoked" (has partitions to give up) or "unreleased" (waits for some)."""
    topics: list[str]
    partitions: list[TopicPartition]
    """Those it reads now."""


class GroupOffsetDescription(msgspec.Struct, frozen=True):
    """A partition that a group reads, or has read."""

    topic: str
    partition: int
    committed: int | None
    """Of the next record to read; None: nothing was committed."""
    end: int
    lag: int | None
    """Records from there to the end; None where nothing was committed."""
    metadata: str
    member_id: str | None
    """Whose it is now."""


class GroupDescription(msgspec.Struct, frozen=True):
    """One consumer group."""

    name: str
    state: str
    """"empty", "reconciling" or "stable"."""
    epoch: int
    assignor: str
    members: list[MemberDescription]
    offsets: list[GroupOffsetDescription]


class ClusterDescription(msgspec.Struct, frozen=True):
    """A cluster."""

    name: str
    cluster_id: str
    brokers: list[BrokerDescription]


def describe_partitions(
    topic: TopicRow, statuses: Sequence[BrokerStatusResponse]
) -> list[PartitionDescription]:
    """A topic's partitions, from the answers of the brokers that host them."""
    seen: dict[int, dict[int, ReplicaRow]] = {}
    for status in statuses:
        for row in status.replicas:
            if row.topic == topic.name:
                seen.setdefault(row.partition, {})[status.broker.id] = row
    return [
        _describe_partition(index, each.replicas, seen.get(index, {}))
        for index, each in enumerate(topic.partitions)
    ]


def _describe_partition(index: int, replicas: list[int], rows: dict[int, ReplicaRow]) -> PartitionDescription:
    leader = max(
        (broker for broker, row in rows.items() if row.role == LEADER),
        key=lambda broker: rows[broker].term,
        default=None,
    )
    best = rows[leader] if leader is not None else max(rows.values(), key=_progress, default=None)
    unwell = {broker for broker in replicas if broker not in rows or rows[broker].fault}
    if leader is not None:
        unwell |= set(rows[leader].lagging)
    return PartitionDescription(
        index=index,
        leader=leader,
        replicas=list(replicas),
        term=0 if best is None else best.term,
        start_offset=0 if best is None else best.start_offset,
        end_offset=0 if best is None else best.end_offset,
        committed=0 if best is None else best.committed_offset,
        lagging=sorted(unwell),
    )


def _progress(row: ReplicaRow) -> tuple[int, int]:
    return row.committed_offset, row.term


def describe_brokers(
    known: Iterable[BrokerRow], statuses: Sequence[BrokerStatusResponse]
) -> list[BrokerDescription]:
    """All brokers that metadata knows; one that did not answer is lost, whatever was last heard of it."""
    answers = {status.broker.id: status for status in statuses}
    described = []
    for row in sorted(known, key=lambda each: each.id):
        status = answers.get(row.id)
        shown = row if status is None else status.broker
        held = [] if status is None else [each for each in status.replicas if each.topic != METADATA]
        described.append(
            BrokerDescription(
                id=row.id,
                node_id=shown.node_id or row.node_id,
                address=f"{shown.host or row.host}:{shown.port or row.port}",
                state="lost" if status is None else shown.state,
                pid=shown.pid,
                replicas=len(held),
                leaders=sum(each.role == LEADER for each in held),
                totals={} if status is None else status.totals,
            )
        )
    return described


def describe_members(row: GroupRow, names: Mapping[bytes, str]) -> list[MemberDescription]:
    """The members of a group; ``names``: of topics, by id."""
    return [
        MemberDescription(
            each.member_id,
            each.client_id,
            each.host,
            each.epoch,
            each.state,
            [*each.topics],
            sorted(
                TopicPartition(names[topic_id], index)
                for topic_id, indices in each.assigned.items()
                if topic_id in names
                for index in indices
            ),
        )
        for each in row.members
    ]


def describe_offsets(
    committed: Mapping[TopicPartition, GroupOffset],
    members: Iterable[MemberDescription],
    ends: Mapping[TopicPartition, int],
) -> list[GroupOffsetDescription]:
    """How far a group has come with every partition in ``ends``."""
    owners = {name: member.member_id for member in members for name in member.partitions}
    found = []
    for name, end in ends.items():
        row = committed.get(name)
        offset = None if row is None else row.offset
        lag = None if offset is None else max(end - offset, 0)
        metadata = "" if row is None else row.metadata
        found.append(GroupOffsetDescription(*name, offset, end, lag, metadata, owners.get(name)))
    return found
