"""The metadata group as a broker sees it: its own replica of it, and how topics and producer ids come about.

Every broker holds a replica, so every broker has the image at hand (KIP-500's idea): it answers
MetadataRequest from it and finds out from it which partitions it hosts. Changes are commands to the group's
leader; a broker that does not lead forwards its own needs (registration, a block of producer ids) to the one
that does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, ClassVar, Final, Protocol

import msgspec

from raftlog.broker.host import Host
from raftlog.broker.internal_topics import METADATA_TOPIC, check_reserved
from raftlog.broker.membership import Wanted
from raftlog.broker.recovery import restored
from raftlog.broker.replica import Done, Replica
from raftlog.config import TopicConfig, validate_topic_name
from raftlog.controller.placement import BrokerInfo, place
from raftlog.errors import (
    ConfigError,
    DamagedData,
    NotLeader,
    RaftlogError,
    TopicExists,
    UnknownTopic,
)
from raftlog.net.rpc import (
    CreateTopicRequest,
    CreateTopicResponse,
    DeleteTopicRequest,
    DeleteTopicResponse,
    MetadataCommandRequest,
    PartitionRow,
    TopicRow,
    UpgradeRequest,
    UpgradeResponse,
)
from raftlog.raft.config import RecoveredLog
from raftlog.raft.types import ConfState, Entry
from raftlog.record.frame import FrameKind
from raftlog.state.command import needs_upgrade
from raftlog.state.image import Broker, Topic
from raftlog.state.metadata import MetadataState
from raftlog.state.metadata_commands import (
    AllocateProducerIds,
    Command,
    CreateTopic,
    DeleteTopic,
    FoundCluster,
    RegisterBroker,
    SetFeatureLevel,
)
from raftlog.storage.identity import Identity
from raftlog.storage.replica_log import ReplicaLog
from raftlog.storage.spec import ReplicaSpec
from raftlog.storage.store import BrokerStore

logger = logging.getLogger("raftlog.broker")

METADATA_TOPIC_ID: Final = bytes(16)
METADATA_VOTERS_MAX: Final = 5
"""Voters of the metadata group; every further broker is a learner of it."""
TOPIC_PARTITIONS_MAX: Final = 10_000
"""Placing more in one step would hold up the broker for more than half a second."""
PRODUCER_ID_BLOCK: Final = 1000
_FORWARD_TIMEOUT_S: Final = 5.0
_RETRY_S: Final = 0.03


def metadata_spec(members: Sequence[tuple[int, int]], own: int) -> ReplicaSpec:
    """The metadata group's replica on one broker.

    Args:
        members: (broker id, replica id) of the founding brokers; the first five vote.
        own: id of this broker's replica: one of those, or of a broker that was added later. That one begins
            in no configuration.
    """
    voters = tuple(replica_id for _, replica_id in members[:METADATA_VOTERS_MAX])
    learners = tuple(replica_id for _, replica_id in members[METADATA_VOTERS_MAX:])
    return ReplicaSpec(
        replica_id=own,
        topic=METADATA_TOPIC,
        topic_id=METADATA_TOPIC_ID,
        partition=0,
        conf=ConfState(voters=voters, learners=learners),
        segment_bytes=16 << 20,
        internal=True,
    )


async def found_metadata_replica(identity: Identity, store: BrokerStore) -> None:
    """A directory that never ran (incarnation 0) gets its replica of the metadata group; any other must have
    it."""
    spec = metadata_spec(identity.metadata_voters, identity.metadata_replica)
    if spec.replica_id in store.logs:
        return
    if spec.replica_id in store.ward.sleepers:
        return
    if spec.replica_id in store.damaged:
        raise store.damaged[spec.replica_id]
    if identity.incarnation > 0:
        raise DamagedData(
            f"broker {identity.broker_id} has lost its replica of the metadata group, and an empty one "
            "must not vote: move the directory away and add the broker anew"
        )
    await store.create(spec)


class MetadataHost(Host, Protocol):
    """What the metadata group needs of its broker, on top of what a replica does."""

    metadata_machine: ClassVar[type[MetadataState]]

    async def call_broker(
        self, broker_id: int, request: MetadataCommandRequest, payload: bytes, timeout: float
    ) -> Any: ...

    def alive_brokers(self) -> set[int]: ...

    def random_bytes(self, count: int) -> bytes: ...


class MetadataReplica(Replica[MetadataState]):
    """This broker's replica of the metadata group.

    Args:
        members: (broker id, replica id) of the founding brokers.
        changed: told after the image changed.
    """

    def __init__(
        self,
        host: Host,
        log: ReplicaLog,
        machine: MetadataState,
        recovered: RecoveredLog,
        members: Sequence[tuple[int, int]],
        changed: Callable[[], None],
    ) -> None:
        hosts = {replica_id: broker_id for broker_id, replica_id in members}
        hosts |= _hosts(machine)
        super().__init__(host, log, machine, recovered, hosts, preferred=members[0][0] == host.broker_id)
        self._changed = changed
        self._brokers = dict(machine.brokers)

    @classmethod
    async def open(
        cls,
        host: MetadataHost,
        log: ReplicaLog,
        members: Sequence[tuple[int, int]],
        changed: Callable[[], None],
    ) -> MetadataReplica:
        """Restore the image from the newest snapshot and the committed log above it."""
        machine, recovered = await restored(log, host.metadata_machine)
        return cls(host, log, machine, recovered, members, changed)

    def command(self, command: Command, done: Done) -> None:
        """Propose a command; ``done`` hears its result, or the typed error it was refused with.

        Raises:
            NotLeader, Busy, StorageFull, and whatever the staged image refuses the command with: nothing
            happened.
        """
        staged = self.check_serving()
        refusal = staged.check(command)
        if refusal is not None:
            raise refusal
        self.propose(staged, FrameKind.COMMAND, staged.codec.encode(command), done)

    def applied(self, entry: Entry, result: object) -> object:
        return result

    def applied_all(self) -> None:
        brokers = self.machine.brokers
        if brokers != self._brokers:
            self._brokers = dict(brokers)
            self.hosts |= _hosts(self.machine)
            self.membership.due = True
        self._changed()

    def wanted_members(self, able: Set[int]) -> Wanted | None:
        """Every broker takes part. Voters stay voters, and up to five are made of the others, as they are up
        to date. One that drains gives its vote to another; where there is none it keeps it, or gets it back,
        for three voters bear more than two, unless an odd number is left."""
        image = self.machine
        members = {broker.metadata_replica for broker in image.brokers.values()}
        members |= {member for broker_id, member in image.founders if broker_id not in image.removed}
        draining = {broker.metadata_replica for broker in image.brokers.values() if broker.draining}
        before = [member for member in self.node.conf.voters if member in members]
        voters = [member for member in before if member not in draining]
        for member in sorted(members & able - draining):
            if member not in voters and len(voters) < METADATA_VOTERS_MAX:
                voters.append(member)
        leader = min((member for member in voters if member in able), default=None)
        for member in before:
            if member in draining and (len(voters) < len(before) - 1 or len(voters) % 2 == 0):
                voters.append(member)
        for member in sorted(members & able & draining):
            if member not in voters and len(voters) % 2 == 0:
                voters.append(member)
        if not voters:
            return None
        leader = leader if self.node.id in draining else None
        return Wanted(tuple(voters), frozenset(members.difference(voters)), leader)

    def members_reached(self) -> bool:
        conf = self.node.conf
        return len(conf.voters) == METADATA_VOTERS_MAX or not conf.learners


def _presents_itself(known: Broker) -> tuple[object, ...]:
    """What a registered broker says of itself; others say that it drains."""
    return msgspec.structs.astuple(known)[:-1]


def _hosts(image: MetadataState) -> dict[int, int]:
    """Replica id -> broker id in the metadata group, of brokers that are to leave it too."""
    hosts = {replica_id: broker_id for broker_id, replica_id in image.removed.items()}
    return hosts | {broker.metadata_replica: broker.broker_id for broker in image.brokers.values()}


def check_topic(
    name: str, partitions: int, config: Mapping[str, Any], *, internal: bool = False
) -> dict[str, Any]:
    """Check what a new topic is to be; every broker has to open what is created here.

    Args:
        internal: the brokers keep state of their own in it.

    Returns:
        The settings by their own names.

    Raises:
        InvalidTopic, ConfigError.
    """
    check_reserved(validate_topic_name(name), internal)
    if not 1 <= partitions <= TOPIC_PARTITIONS_MAX:
        raise ConfigError(f"a topic has 1 to {TOPIC_PARTITIONS_MAX} partitions, not {partitions}")
    settings = TopicConfig.model_validate(config)
    if internal and settings.flush != "commit":
        raise ConfigError(f"flush={settings.flush!r}: internal topics are always synced (flush='commit')")
    return settings.model_dump(exclude_unset=True, mode="json")


class MetadataService:
    """Topics, producer ids and the registration of this broker.

    Args:
        host: the broker.
        replica: its replica of the metadata group.
        identity: this broker's; the group's first leader founds what it says.
        registration: how this broker presents itself.
    """

    def __init__(
        self, host: MetadataHost, replica: MetadataReplica, identity: Identity, registration: RegisterBroker
    ) -> None:
        self._host = host
        self.replica = replica
        self._identity = identity
        self._registration = registration
        self._producer_ids = range(0)
        self._filling = asyncio.Lock()

    @property
    def image(self) -> MetadataState:
        """The applied metadata."""
        return self.replica.machine

    # -- topics ----------------------------------------------------------------------------------------------

    def create_topic(self, request: CreateTopicRequest, done: Done) -> None:
        """Place and create a topic; ``done(CreateTopicResponse, None)`` once it is committed.

        Raises:
            NotLeader, InvalidTopic, ConfigError, TopicExists, InvalidReplicationFactor.
        """
        staged = self.replica.check_serving()
        config = check_topic(request.name, request.partitions, request.config)
        existing = staged.topics.get(request.name)
        if existing is not None:
            if not request.exist_ok:
                raise TopicExists(f"topic {request.name!r} exists")
            done(CreateTopicResponse(self.row(existing), staged.applied_index, created=False), None)
            return
        command = CreateTopic(
            name=request.name,
            topic_id=self._host.random_bytes(16),
            config=config,
            internal=False,
            assignment=self.place(staged, request.partitions, request.replication_factor),
            replication=request.replication_factor,
        )

        def created(result: Any, error: RaftlogError | None) -> None:
            topic = self.image.topics.get(request.name)
            if error is None and isinstance(result, RaftlogError):
                error = result
            if error is not None or topic is None:
                done(None, error or UnknownTopic(f"topic {request.name!r} was deleted at once"))
            else:
                done(CreateTopicResponse(self.row(topic), self.image.applied_index, created=True), None)

        self.replica.command(command, created)

    def place(self, staged: MetadataState, partitions: int, replication_factor: int) -> list[list[int]]:
        """Brokers for each partition of a new topic, the preferred leader first; factor 0: "auto"."""
        alive = self._host.alive_brokers()
        replicas: dict[int, int] = dict.fromkeys(staged.brokers, 0)
        leaders: dict[int, int] = dict.fromkeys(staged.brokers, 0)
        for topic in staged.topics.values():
            for partition in topic.partitions:
                for position, (_, broker_id) in enumerate(partition.replicas):
                    replicas[broker_id] = replicas.get(broker_id, 0) + 1
                    if position == 0:
                        leaders[broker_id] = leaders.get(broker_id, 0) + 1
        infos = [
            BrokerInfo(
                info.broker_id, info.node_id, info.zone, replicas[info.broker_id], leaders[info.broker_id]
            )
            for info in staged.brokers.values()
        ]
        usable = [info for info in infos if info.id in alive and not staged.brokers[info.id].draining]
        if replication_factor == 0:
            replication_factor = min(3, len(usable))
        if len(usable) < replication_factor <= len(infos):
            usable = infos  # as many brokers as asked for exist; the absent ones will catch up
        return place(partitions, replication_factor, usable)

    def delete_topic(self, request: DeleteTopicRequest, done: Done) -> None:
        """Delete a topic; ``done(DeleteTopicResponse, None)`` once that is committed.

        Raises:
            NotLeader, UnknownTopic.
        """
        staged = self.replica.check_serving()
        check_reserved(request.name, internal=False)
        topic = staged.topics.get(request.name)
        if topic is None:
            raise UnknownTopic(f"no topic {request.name!r}")

        def deleted(result: Any, error: RaftlogError | None) -> None:
            if error is None and isinstance(result, RaftlogError):
                error = result
            done(None if error else DeleteTopicResponse(self.image.applied_index), error)

        self.replica.command(DeleteTopic(name=topic.name, topic_id=topic.topic_id), deleted)

    def upgrade(self, request: UpgradeRequest, done: Done) -> None:
        """Raise the feature level; ``done(UpgradeResponse, None)`` once that is committed.

        Raises:
            NotLeader, ConfigError: a broker does not know that level.
        """
        staged = self.replica.check_serving()
        known = {broker.broker_id: broker.level for broker in staged.brokers.values()}
        level = request.level or max(staged.feature_level, min(known.values(), default=1))

        def raised(result: Any, error: RaftlogError | None) -> None:
            if error is None and isinstance(result, RaftlogError):
                error = result
            done(None if error else UpgradeResponse(level, known), error)

        if level == staged.feature_level:
            raised(level, None)
        else:
            self.replica.command(SetFeatureLevel(staged.controller_epoch, level), raised)

    def row(self, topic: Topic, leader_of: Callable[[int], tuple[int, int]] | None = None) -> TopicRow:
        """A topic for clients. ``leader_of``: replica ids -> (leader's broker id, term) as far as known
        here."""
        rows = []
        for partition in topic.partitions:
            leader, term = -1, 0
            if leader_of is not None:
                for replica_id, _ in partition.members:
                    found = leader_of(replica_id)
                    if found[1] > term:
                        leader, term = found
            rows.append(
                PartitionRow(
                    replicas=[broker_id for _, broker_id in partition.replicas],
                    leader=leader,
                    term=term,
                    replica_ids=[replica_id for replica_id, _ in partition.replicas],
                    leaving=[broker_id for _, broker_id in partition.leaving],
                )
            )
        return TopicRow(topic.name, topic.topic_id, rows, dict(topic.config), topic.internal)

    # -- commands of this broker -----------------------------------------------------------------------------

    async def call(self, command: Command) -> Any:
        """Have a command applied, here or by whichever broker leads the metadata group; return its result.

        Raises:
            NeedsUpgrade: the cluster does not run at the command's feature level yet.
            RaftlogError: what it was refused with, or the leader cannot be reached (retriable).
        """
        upgrade = needs_upgrade(command, self.image.feature_level)
        if upgrade is not None:
            raise upgrade
        replica = self.replica
        if replica.staged is not None:
            return await self.apply_here(command)
        leader = replica.leader_broker
        if leader is None or leader == self._host.broker_id:
            raise NotLeader(
                "the metadata group has no leader that serves yet", leader=None, term=replica.node.term
            )
        encoded = self.image.codec.encode(command)
        result = await self._host.call_broker(leader, MetadataCommandRequest(), encoded, _FORWARD_TIMEOUT_S)
        return msgspec.convert(result, command.result)

    async def apply_here(self, command: Command) -> Any:
        """The same on the leader."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(result: Any, error: RaftlogError | None) -> None:
            if future.done():
                return
            if error is None and isinstance(result, RaftlogError):
                error = result
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.replica.command(command, done)
        return await future

    async def register(self) -> None:
        """See to it that this broker, as it is now, is in the image; the first leader also founds the
        cluster."""
        wanted = self._registration
        while True:
            image = self.image
            try:
                if not image.cluster_id:
                    if self.replica.staged is not None:
                        await self.apply_here(
                            FoundCluster(
                                self._identity.cluster_id, self._identity.metadata_voters, image.level_max
                            )
                        )
                else:
                    known = image.brokers.get(wanted.broker_id)
                    if known is not None and _presents_itself(known) == msgspec.structs.astuple(wanted):
                        return
                    await self.call(wanted)
            except RaftlogError as error:
                if not error.retriable:
                    raise
                logger.debug("broker %d is not registered yet: %s", self._host.broker_id, error)
            await asyncio.sleep(_RETRY_S)

    async def producer_id(self) -> int:
        """An id that no producer of this cluster ever had or will have.

        It comes from a block that the metadata group gave to this incarnation of this broker alone; what is
        left of a block when the broker goes is never used.
        """
        async with self._filling:
            if not self._producer_ids:
                start = await self.call(AllocateProducerIds(PRODUCER_ID_BLOCK))
                self._producer_ids = range(start, start + PRODUCER_ID_BLOCK)
            producer_id, self._producer_ids = self._producer_ids[0], self._producer_ids[1:]
            return producer_id
