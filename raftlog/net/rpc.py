"""The rpcs: requests and responses, with api numbers (all are in ``catalogue``).

A request is a msgspec struct (the *header*) and, where bytes move in bulk, a *payload* behind it that is
never decoded on the way: record batches in Produce, contiguous log frames in Fetch and Raft. Structs travel
as msgpack arrays: new fields come last and have defaults, so that an older peer's message still decodes.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, Generic, Protocol, TypeVar

import msgspec

RPC_VERSION_MIN: Final = 1
RPC_VERSION_MAX: Final = 1

R = TypeVar("R", bound=msgspec.Struct)


class Struct(msgspec.Struct, frozen=True, array_like=True):
    """Base of all values that travel."""


class Request(Struct, Generic[R], frozen=True):
    """Base of requests: ``api`` numbers it, ``response`` is the type of its answer."""

    api: ClassVar[int]
    response: ClassVar[type[Struct]]


class Empty(Struct, frozen=True):
    """An answer without content."""


class WireError(Struct, frozen=True):
    """An error inside a response (see ``raftlog.errors.from_wire``)."""

    name: str
    message: str
    details: dict[str, Any] = {}


# -- produce and fetch ---------------------------------------------------------------------------------------


class Produced(Struct, frozen=True):
    """Where a batch is in the log."""

    base_offset: int
    timestamp_ms: int
    """The leader's time of the append (Kafka's log append time; the records keep their own timestamps)."""
    log_start: int = 0
    error: WireError | None = None
    """Why it is not, or not known to be."""


class ProduceResponse(Struct, frozen=True):
    """Comes in parts where some batches are settled before others: none waits for another."""

    batches: list[Produced]
    numbers: list[int] = []
    """Which batches of the request these are, counted from 0. Empty: all that are left, in its order; this
    is the last part then."""


class CommittedBefore(Struct, frozen=True):
    """The producer's transaction before has committed (see ``raftlog.broker.transactions``)."""

    epoch: int
    coordinator_epoch: int


class ProducePartition(Struct, frozen=True):
    """Where a batch is to go."""

    topic_id: bytes
    partition: int
    before: CommittedBefore | None = None


class ProduceRequest(Request[ProduceResponse], frozen=True):
    """Payload: a record batch for each of ``partitions``, one after another. They are taken in this order,
    and each is settled by itself. Sent one-way for acks=0. A request of one batch that is refused is answered
    with the error itself."""

    partitions: list[ProducePartition]
    lengths: list[int] = []
    """Bytes of each batch but the last, which is the rest of the payload."""
    acks: int = -1

    api = 10
    response = ProduceResponse


READ_UNCOMMITTED: Final = 0
READ_COMMITTED: Final = 1
"""Only what is not, and will not be, part of an aborted transaction: up to the last stable offset."""


class FetchPartition(Struct, frozen=True):
    topic_id: bytes
    partition: int
    offset: int
    last_term: int = -1
    """Term of the last record read, to detect a truncated log; -1: unknown."""
    bytes_max: int = 1 << 20


class FetchedPartition(Struct, frozen=True):
    error: WireError | None
    committed: int
    """High watermark: the offset after the last committed record."""
    log_start: int
    length: int
    """Bytes of this partition's frames in the payload; partitions follow one another in request order."""
    last_stable: int = -1
    """What a READ_COMMITTED request may read up to: the offset where the first open transaction begins."""
    aborted: list[tuple[int, int, int]] = []
    """Of a READ_COMMITTED request: (producer id, first offset, offset of the marker) of the aborted
    transactions that overlap what is returned. Batches of that producer in between are to be hidden."""


class FetchResponse(Struct, frozen=True):
    partitions: list[FetchedPartition]


class FetchRequest(Request[FetchResponse], frozen=True):
    """Waits up to ``wait_ms`` for one byte of any partition. The frame that holds ``offset`` comes whole, and
    at least one batch comes even above ``bytes_max``. The first frame may begin below ``offset``."""

    wait_ms: int
    bytes_max: int
    partitions: list[FetchPartition]
    isolation: int = READ_UNCOMMITTED

    api = 11
    response = FetchResponse


OFFSET_LATEST: Final = -1
OFFSET_EARLIEST: Final = -2


class OffsetQuery(Struct, frozen=True):
    topic_id: bytes
    partition: int
    timestamp_ms: int
    """Find the first record whose timestamp is at least this; or OFFSET_LATEST, OFFSET_EARLIEST."""


class OffsetAnswer(Struct, frozen=True):
    error: WireError | None
    offset: int
    timestamp_ms: int


class ListOffsetsResponse(Struct, frozen=True):
    answers: list[OffsetAnswer]


class ListOffsetsRequest(Request[ListOffsetsResponse], frozen=True):
    """With READ_COMMITTED, OFFSET_LATEST is the last stable offset."""

    queries: list[OffsetQuery]
    isolation: int = READ_UNCOMMITTED

    api = 12
    response = ListOffsetsResponse


# -- metadata ------------------------------------------------------------------------------------------------


class BrokerRow(Struct, frozen=True):
    id: int
    host: str
    port: int
    incarnation: int
    node_id: str
    state: str
    """"alive", "draining" or "lost", as the answering broker sees it."""
    pid: int = 0


class PartitionRow(Struct, frozen=True):
    replicas: list[int]
    """Broker ids, the preferred leader first."""
    leader: int = -1
    """Broker id as far as the answering broker knows; -1: unknown."""
    term: int = 0
    replica_ids: list[int] = []
    leaving: list[int] = []
    """Broker ids whose replicas are to go; until they have, one of them may lead."""


class TopicRow(Struct, frozen=True):
    name: str
    topic_id: bytes
    partitions: list[PartitionRow]
    config: dict[str, Any]
    internal: bool = False


class MetadataResponse(Struct, frozen=True):
    cluster_id: str
    brokers: list[BrokerRow]
    topics: list[TopicRow]
    unknown_topics: list[str]
    version: int
    """Applied index of the metadata group at the answering broker: a client keeps the newest."""
    metadata_leader: int = -1
    """Broker id that leads the metadata group, where topics are created; -1: unknown."""
    metadata_term: int = 0


class MetadataRequest(Request[MetadataResponse], frozen=True):
    """``topics``: names wanted; None for all."""

    topics: list[str] | None = None

    api = 13
    response = MetadataResponse


class CreateTopicResponse(Struct, frozen=True):
    topic: TopicRow
    version: int
    created: bool


class CreateTopicRequest(Request[CreateTopicResponse], frozen=True):
    """To the leader of the metadata group. ``replication_factor`` 0 means "auto": min(3, brokers)."""

    name: str
    partitions: int
    replication_factor: int
    config: dict[str, Any]
    exist_ok: bool = False

    api = 14
    response = CreateTopicResponse


class DeleteTopicResponse(Struct, frozen=True):
    version: int


class DeleteTopicRequest(Request[DeleteTopicResponse], frozen=True):
    name: str

    api = 15
    response = DeleteTopicResponse


class InitProducerResponse(Struct, frozen=True):
    producer_id: int
    epoch: int


class InitProducerRequest(Request[InitProducerResponse], frozen=True):
    """A producer id that nobody had before (from a block that the metadata group gave to this broker)."""

    transactional_id: str | None = None

    api = 16
    response = InitProducerResponse


class MetadataCommandResponse(Struct, frozen=True):
    result: Any
    version: int


class MetadataCommandRequest(Request[MetadataCommandResponse], frozen=True):
    """The controller's and brokers' way to change metadata: one encoded command of ``raftlog.state.metadata``
    as payload, to the leader of the metadata group."""

    api = 17
    response = MetadataCommandResponse


class JoinResponse(Struct, frozen=True):
    broker_id: int
    metadata_replica: int
    """Id of its replica of the metadata group."""
    founders: tuple[tuple[int, int], ...]
    """(broker id, replica id) of that group's first configuration."""
    addresses: dict[int, tuple[int, str, int]]
    """Broker id -> (incarnation, host, port)."""


class JoinRequest(Request[JoinResponse], frozen=True):
    """From an empty data directory: let me become a broker. Any broker has it done."""

    disk_id: bytes
    """16 random bytes. The same ones give the same broker again."""
    node_id: str
    zone: str
    level: int
    """The newest feature level that its release knows."""

    api = 19
    response = JoinResponse


class UpgradeResponse(Struct, frozen=True):
    level: int
    """What the cluster runs at now."""
    known: dict[int, int]
    """Broker id -> the newest level that its release knows."""


class UpgradeRequest(Request[UpgradeResponse], frozen=True):
    """To the leader of the metadata group: run at feature level ``level``, or (0) at the newest that every
    broker knows. There is no way back."""

    level: int = 0

    api = 20
    response = UpgradeResponse


# -- status --------------------------------------------------------------------------------------------------


class ReplicaRow(Struct, frozen=True):
    """One replica as its own broker sees it."""

    topic: str
    partition: int
    replica_id: int
    role: str
    term: int
    leader: int
    """Broker id; -1: unknown."""
    start_offset: int
    end_offset: int
    """After the last record in the log, committed or not."""
    committed_offset: int
    last_index: int
    commit_index: int
    applied_index: int
    durable_index: int
    voters: list[int]
    lagging: list[int] = []
    """On a leader: those whose replica is not caught up; like voters, broker ids."""
    fault: str = ""
    """Why the replica is out of service; empty while it serves."""


class BrokerStatusResponse(Struct, frozen=True):
    broker: BrokerRow
    replicas: list[ReplicaRow]
    clients: list[str]
    """Who is connected (client ids)."""
    version: str
    started_ms: int
    totals: dict[str, int] = {}
    """What has gone through it since then (``raftlog.telemetry.counters``)."""


class BrokerStatusRequest(Request[BrokerStatusResponse], frozen=True):
    """``topics``: names wanted; None for all replicas, the metadata group's included; [] for none."""

    topics: list[str] | None = None

    api = 18
    response = BrokerStatusResponse


# -- groups --------------------------------------------------------------------------------------------------

# All go to the leader of the ``__groups`` partition (topic_id, partition) that the group's name hashes to.

JOIN_EPOCH: Final = 0
LEAVE_EPOCH: Final = -1
NO_MEMBER: Final = ""


class GroupHeartbeatResponse(Struct, frozen=True):
    member_epoch: int
    """What commits of offsets name from now on; LEAVE_EPOCH: the member is out, as it asked."""
    revision: int
    """Number of the assignment: the member echoes it once it has carried the assignment out."""
    assigned: dict[bytes, tuple[int, ...]] | None
    """topic id -> partitions, everything the member holds; None: the same as before."""
    heartbeat_ms: int
    """Heartbeat again within this time."""


class GroupHeartbeatRequest(Request[GroupHeartbeatResponse], frozen=True):
    """Join (JOIN_EPOCH), stay in, or leave (LEAVE_EPOCH) a group (KIP-848). Everything a member wants is in
    every heartbeat, so that one which is lost, late or doubled does no harm."""

    topic_id: bytes
    partition: int
    group_id: str
    member_id: str
    """Made by the client, unique; a new one for each time it joins afresh."""
    member_epoch: int
    """Of the newest answer."""
    revision: int
    """Of the newest assignment that the member has carried out: it neither reads nor commits any partition
    outside of it any more."""
    topics: tuple[str, ...]
    """Names, sorted."""
    session_timeout_ms: int
    rebalance_timeout_ms: int
    client_id: str = ""
    assignor: str = "uniform"
    """Taken from the newest member that joins."""
    wait_ms: int = 0
    """The answer may wait so long for news."""

    api = 40
    response = GroupHeartbeatResponse


class GroupOffset(Struct, frozen=True):
    """A position in one partition."""

    topic_id: bytes
    partition: int
    offset: int
    """Of the next record to read."""
    leader_epoch: int = -1
    """Of the last record read; -1: unknown."""
    metadata: str = ""


class OffsetCommitRequest(Request[Empty], frozen=True):
    """By a member, of partitions it holds; or by NO_MEMBER with LEAVE_EPOCH, for a group without members."""

    topic_id: bytes
    partition: int
    group_id: str
    member_id: str
    member_epoch: int
    offsets: list[GroupOffset]

    api = 41
    response = Empty


class OffsetFetchResponse(Struct, frozen=True):
    offsets: list[GroupOffset]
    """Partitions without a committed offset are left out."""


class OffsetFetchRequest(Request[OffsetFetchResponse], frozen=True):
    """``partitions``: (topic id, partition) wanted; None for all."""

    topic_id: bytes
    partition: int
    group_id: str
    partitions: list[tuple[bytes, int]] | None = None

    api = 42
    response = OffsetFetchResponse


class MemberRow(Struct, frozen=True):
    member_id: str
    client_id: str
    host: str
    epoch: int
    state: str
    """"stable", "unrevoked" (has partitions to give up) or "unreleased" (waits for some)."""
    topics: tuple[str, ...]
    assigned: dict[bytes, tuple[int, ...]]
    target: dict[bytes, tuple[int, ...]]


class GroupRow(Struct, frozen=True):
    group_id: str
    state: str
    """"empty", "reconciling" or "stable"."""
    epoch: int
    assignor: str
    members: list[MemberRow]
    offsets: list[GroupOffset]
    pending: list[tuple[bytes, int]] = []
    """(topic id, partition) whose offsets an open transaction holds."""


class DescribeGroupsResponse(Struct, frozen=True):
    groups: list[GroupRow]
    """Groups that this partition does not know are left out."""


class DescribeGroupsRequest(Request[DescribeGroupsResponse], frozen=True):
    """``groups``: names wanted; None for all of this partition, without their offsets."""

    topic_id: bytes
    partition: int
    groups: list[str] | None = None

    api = 43
    response = DescribeGroupsResponse


class DeleteGroupRequest(Request[Empty], frozen=True):
    """Forget a group without members, and its offsets."""

    topic_id: bytes
    partition: int
    group_id: str

    api = 44
    response = Empty


class StageOffsetsRequest(Request[Empty], frozen=True):
    """Offsets that become visible when the transaction of (producer_id, producer_epoch) commits (Kafka's
    TxnOffsetCommit). The group must be enlisted in it."""

    topic_id: bytes
    partition: int
    group_id: str
    member_id: str
    member_epoch: int
    producer_id: int
    producer_epoch: int
    offsets: list[GroupOffset]
    before: CommittedBefore | None = None

    api = 45
    response = Empty


class DeleteOffsetsRequest(Request[Empty], frozen=True):
    """Forget committed offsets of (topic id, partition) each; not of topics that a member reads."""

    topic_id: bytes
    partition: int
    group_id: str
    partitions: list[tuple[bytes, int]]

    api = 46
    response = Empty


class OneWay(Protocol):
    """A message that is not answered: its class is in ``catalogue.ONE_WAY``."""

    @property
    def api(self) -> int:
        """Its number."""


# -- between brokers -----------------------------------------------------------------------------------------


class Addresses(Struct, frozen=True):
    """One-way: where brokers are, broker id -> (incarnation, host, port). The highest incarnation wins."""

    brokers: dict[int, tuple[int, str, int]]

    api: ClassVar[int] = 30


class RaftMessages(Struct, frozen=True):
    """One-way: Raft messages for replicas of the receiving broker, encoded by ``raftlog.broker.wire``; the
    entries of each AppendRequest are its ``lengths`` bytes of the payload, in order."""

    messages: list[Any]
    lengths: list[int]

    api: ClassVar[int] = 31


class BrokerHeartbeat(Struct, frozen=True):
    """One-way, every heartbeat: this broker lives, and so do its replicas, all but those named (replica ids).
    Groups with nothing to say rely on it."""

    retired: list[int] = []

    api: ClassVar[int] = 32
