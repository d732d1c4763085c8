"""A broker: many replicas, one store, one server, one clock.

The broker drives its replicas. Whatever has something to do is *marked*; marked replicas are pumped together,
once per turn of the loop (:mod:`raftlog.broker.cycle`), and what they want sent leaves in one frame per
connection. That is where the cost of a message is shared between groups.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import msgspec

from raftlog.broker import events
from raftlog.broker.assigned import AssignedReplica
from raftlog.broker.cycle import Cycle
from raftlog.broker.group_replica import GroupReplica
from raftlog.broker.hosting import Hosting
from raftlog.broker.internal_topics import InternalTopics
from raftlog.broker.markers import MarkedReplica, Markers
from raftlog.broker.metadata import MetadataReplica, MetadataService, found_metadata_replica
from raftlog.broker.partition import PartitionReplica
from raftlog.broker.peers import Address, Peers
from raftlog.broker.pulse import Pulse
from raftlog.broker.repair import Repairs
from raftlog.broker.replica import Replica
from raftlog.broker.retention import keep_house
from raftlog.broker.service import Service
from raftlog.broker.snapshots import SnapshotSlots
from raftlog.config import BrokerConfig
from raftlog.errors import (
    DamagedData,
    ForeignDataDir,
    IncompatibleVersion,
    InvalidTopic,
    RaftlogError,
    StaleIncarnation,
    StorageFull,
    UnknownReplica,
)
from raftlog.net.handshake import Local
from raftlog.net.network import Seams
from raftlog.net.rpc import (
    RPC_VERSION_MAX,
    RPC_VERSION_MIN,
    BrokerRow,
    MetadataCommandRequest,
    ReplicaRow,
    Request,
)
from raftlog.net.server import RpcServer
from raftlog.net.stream import Limits
from raftlog.raft.config import RaftConfig
from raftlog.raft.types import Message, Role, SoftState, VoteRequest
from raftlog.state.command import UnknownToRelease
from raftlog.state.image import Broker as RegisteredBroker
from raftlog.state.metadata import MetadataState
from raftlog.state.metadata_commands import RegisterBroker
from raftlog.storage.disk import Disk
from raftlog.storage.identity import Identity, load_identity, store_identity
from raftlog.storage.spec import StorageConfig
from raftlog.storage.store import BrokerStore
from raftlog.telemetry.counters import Counters

logger = logging.getLogger("raftlog.broker")

_AMNESIAC: Final = "waits for a leader before it votes: a reboot may have lost its last writes"


@dataclass(frozen=True, slots=True)
class BrokerPlace:
    """Where a broker runs.

    Args:
        host: address of the node to bind to and be reached at.
        port: 0 to take the one it had before if that is free, else any.
        node_id: the node (Ray's id, or any name).
        zone: its zone, empty if unknown.
    """

    host: str = "127.0.0.1"
    port: int = 0
    node_id: str = "local"
    zone: str = ""


class Broker:
    """One broker. Make it with :meth:`start`.

    Args:
        seams: the way out.
        identity: as stored, with this run's incarnation.
        store: recovered.
        config: limits and timings.
        place: where it runs.
    """

    metadata_machine: ClassVar[type[MetadataState]] = MetadataState
    rpc_versions: ClassVar[tuple[int, int]] = (RPC_VERSION_MIN, RPC_VERSION_MAX)
    """With it, what makes this release another than the next."""

    def __init__(
        self,
        seams: Seams,
        disk: Disk,
        identity: Identity,
        store: BrokerStore,
        config: BrokerConfig,
        place: BrokerPlace,
    ) -> None:
        self.seams = seams
        self.identity = identity
        self.store = store
        self.config = config
        self.place = place
        self.started_ms: Final = seams.wall_ms()
        self.counters: Final = Counters(seams.clock_s)
        self.failed: asyncio.Future[RaftlogError] = asyncio.get_running_loop().create_future()
        """Done when the broker cannot go on (its storage failed): whoever hosts it should end the process."""
        self._metadata_replica_id: Final = identity.metadata_replica
        self._disk = disk
        self._loop = asyncio.get_running_loop()
        self.hosting = Hosting(self)
        self.cycle: Final = Cycle(self)
        self.mark: Final = self.cycle.mark
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._saving = asyncio.Lock()
        local = Local(
            cluster_id=identity.cluster_id,
            role="broker",
            broker_id=identity.broker_id,
            client_id=f"broker-{identity.broker_id}",
            incarnation=identity.incarnation,
            version_min=self.rpc_versions[0],
            version_max=self.rpc_versions[1],
        )
        limits = Limits(connection_bytes=config.connection_bytes_max, broker_bytes=config.broker_bytes_max)
        self.server = RpcServer(seams, local, identity.secret, Service(self), limits)
        self.peers = Peers(
            seams,
            local,
            identity.secret,
            on_up=self._peer_up,
            on_down=self._peer_down,
            on_learned=self._addresses_changed,
            on_replaced=self._replaced,
        )
        self.pulse = Pulse(self)
        self.repairs = Repairs(self)
        self.snapshot_slots = SnapshotSlots(config.snapshots_sent_max)
        self.markers = Markers(self)
        self.metadata: MetadataService
        self.internal_topics: InternalTopics
        self._registered: asyncio.Task[None]
        store.on_fault = self._store_fault

    @classmethod
    async def start(
        cls,
        seams: Seams,
        disk: Disk,
        *,
        config: BrokerConfig | None = None,
        place: BrokerPlace | None = None,
        storage: StorageConfig | None = None,
    ) -> Broker:
        """Recover what is in a founded directory (see ``founding.py``) and begin to serve.

        Raises:
            DataDirError: not founded, locked by another process, of another broker, or damaged.
        """
        config = config or BrokerConfig()
        place = place or BrokerPlace()
        identity = await load_identity(disk)
        store = await BrokerStore.open(disk, storage or StorageConfig(), disk_id=identity.disk_id)
        try:
            await found_metadata_replica(identity, store)
            identity = identity.next_incarnation()
            await store_identity(disk, identity)
            broker = cls(seams, disk, identity, store, config, place)
            try:
                await broker._begin()
            except (Exception, asyncio.CancelledError):
                await broker._stop()
                raise
        except (Exception, asyncio.CancelledError):
            await store.close()
            raise
        return broker

    async def _begin(self) -> None:
        address = await self._listen()
        self.peers.local = self.server.local
        self.peers.learn({**self.identity.addresses, self.broker_id: (self.identity.incarnation, *address)})
        own = self._metadata_replica_id
        replica = await self._open_metadata(own)
        self.hosting.by_id[own] = replica
        self.pulse.watch(replica)
        registration = RegisterBroker(
            self.broker_id,
            self.identity.disk_id,
            self.place.node_id,
            self.place.zone,
            own,
            self.metadata_machine.level_max,
        )
        self.metadata = MetadataService(self, replica, self.identity, registration)
        self.internal_topics = InternalTopics(self.metadata, self.config, self.random_bytes)
        await self.hosting.open()
        self.follow_removals()
        self.pulse.start()
        self.spawn(self.hosting.follow())
        self.spawn(self.repairs.run())
        self.spawn(keep_house(self))
        self._registered = self.spawn(self.metadata.register())
        events.started(self)

    async def _open_metadata(self, replica_id: int) -> MetadataReplica:
        """Without its replica of the metadata group a broker knows nothing: should it be damaged, that is
        repaired first.

        Raises:
            DamagedData: it cannot be, or nobody was there in time.
            IncompatibleVersion: it was written by a newer release.
        """
        while True:
            if replica_id in self.store.ward.patients:
                await self.repairs.mend_first(replica_id)
            try:
                return await MetadataReplica.open(
                    self,
                    self.store.logs[replica_id],
                    self.identity.metadata_voters,
                    self.hosting.image_changed,
                )
            except DamagedData:
                if not self.store.ward.is_hurt(replica_id):
                    raise
            except UnknownToRelease as error:
                raise IncompatibleVersion(
                    f"broker {self.broker_id} needs the newer release it ran before: {error}"
                ) from error

    async def _listen(self) -> tuple[str, int]:
        known = self.identity.addresses.get(self.broker_id)
        ports = [self.place.port]
        if self.place.port == 0 and known is not None:
            ports.insert(0, known[2])
        for port in ports:
            try:
                return await self.server.start(self.place.host, port)
            except OSError as error:
                if port == ports[-1]:
                    raise
                logger.info("port %d is taken (%s): another will do", port, error)
        raise AssertionError("a port was tried")

    # -- Host: what replicas need ----------------------------------------------------------------------------

    @property
    def broker_id(self) -> int:
        return self.identity.broker_id

    @property
    def feature_level(self) -> int:
        """Of the cluster, as far as this broker knows; it never goes down."""
        return self.metadata.image.feature_level

    def raft_config(self, replica_id: int) -> RaftConfig:
        return RaftConfig(
            id=replica_id,
            election_timeout_ms=self.config.election_timeout_ms,
            heartbeat_ms=self.config.heartbeat_ms,
            quiet_after_ms=self.config.quiet_after_ms,
            append_bytes_max=self.config.append_bytes_max,
            inflight_messages_max=self.config.inflight_messages_max,
            inflight_bytes_max=self.config.inflight_bytes_max,
            uncommitted_bytes_max=self.config.uncommitted_bytes_max,
            rank_delay_ms=self.config.rank_delay_ms,
            cache_bytes_max=self.config.cache_bytes_max,
            # Brokers act on metadata as soon as it is committed; of a partition only the leader serves.
            announce_commits=replica_id == self._metadata_replica_id,
        )

    def now_ms(self) -> int:
        return int(self._loop.time() * 1000)

    def wall_ms(self) -> int:
        return self.seams.wall_ms()

    def random_for(self, replica_id: int) -> random.Random:
        return random.Random(self.seams.random.getrandbits(64) ^ replica_id)

    def random_bytes(self, count: int) -> bytes:
        return self.seams.random.randbytes(count)

    def send(self, broker_id: int, message: Message) -> None:
        self.peers.send(broker_id, message)

    async def ready(self) -> None:
        """Wait until the metadata group has a leader and knows this broker."""
        await asyncio.shield(self._registered)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine of this broker; what it raises is logged, and it is cancelled at close."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("broker %d: a task failed", self.broker_id, exc_info=task.exception())

    def leadership_changed(self, replica: Replica[Any], before: SoftState | None) -> None:
        events.leadership_changed(self, replica, before)

    # -- peers -----------------------------------------------------------------------------------------------

    def _peer_up(self, broker_id: int, incarnation: int | None) -> None:
        if incarnation is not None:
            # What the former incarnation acknowledged and is not read yet must not count from here on.
            with contextlib.suppress(StaleIncarnation):  # a newer one has dialled us and is to be dialled
                self.server.note_incarnation(broker_id, incarnation)
        self.repairs.hurry()
        for replica in self.hosting.by_id.values():
            replica.peer_up(broker_id, restarted=incarnation is not None)

    def _peer_down(self, broker_id: int) -> None:
        for replica in self.hosting.by_id.values():
            replica.peer_down(broker_id)

    def alive_brokers(self) -> set[int]:
        """Broker ids this broker is connected to, itself included."""
        return {broker_id for broker_id in self.metadata.image.brokers if self.peers.is_up(broker_id)}

    def learn(self, addresses: dict[int, Address]) -> None:
        """Tell this broker where others are."""
        self.peers.learn(addresses)

    @property
    def address(self) -> Address:
        """(incarnation, host, port) of this broker."""
        return self.peers.book[self.broker_id]

    def _addresses_changed(self) -> None:
        self.spawn(self._save_addresses())

    async def free_bytes(self) -> int:
        """That the device of the data directory has left."""
        return await self._disk.free_bytes()

    async def _save_addresses(self) -> None:
        async with self._saving:
            if self.identity.addresses != self.peers.book:
                self.identity = msgspec.structs.replace(self.identity, addresses=dict(self.peers.book))
                await store_identity(self._disk, self.identity)

    async def call_broker(
        self, broker_id: int, request: MetadataCommandRequest, payload: bytes, timeout: float
    ) -> Any:
        response, _ = await self.peers.connection(broker_id).call(request, (payload,), timeout=timeout)
        return response.result

    def step(self, messages: Iterable[Message], sender: int) -> None:
        """Take Raft messages from the broker ``sender``; one for a replica that is not here is dropped."""
        by_id, now_ms = self.hosting.by_id, self.now_ms()
        for message in messages:
            replica = by_id.get(message.to)
            if replica is None:
                continue
            if message.sender not in replica.hosts:
                replica.hosts[message.sender] = sender  # a member that the image here does not name yet
            if type(message) is VoteRequest and replica.node.quiet:
                self.pulse.refresh_lease(replica)
            replica.step(message, now_ms)

    # -- which replicas are here -----------------------------------------------------------------------------

    def replica(self, replica_id: int) -> Replica[Any] | None:
        return self.hosting.by_id.get(replica_id)

    def replicas(self) -> Iterable[Replica[Any]]:
        return self.hosting.by_id.values()

    def place_of(self, topic_id: bytes, partition: int) -> AssignedReplica[Any]:
        """The replica of a partition on this broker, whatever its topic.

        Raises:
            UnknownReplica: there is none (any more, or yet).
        """
        found = self.hosting.by_place.get((topic_id, partition))
        if found is None:
            topic = self.metadata.image.topic_by_id(topic_id)
            name = topic.name if topic is not None else topic_id.hex()
            raise UnknownReplica(f"broker {self.broker_id} has no replica of {name}/{partition}")
        return found

    def partition(self, topic_id: bytes, partition: int) -> PartitionReplica:
        """The replica of a partition that holds records.

        Raises:
            UnknownReplica: there is none (any more, or yet).
            InvalidTopic: the topic is internal.
        """
        found = self.place_of(topic_id, partition)
        if not isinstance(found, PartitionReplica):
            raise InvalidTopic(f"topic {found.log.spec.topic!r} is internal: brokers alone read and write it")
        return found

    # -- what markers need -----------------------------------------------------------------------------------

    @property
    def image(self) -> MetadataState:
        """The applied metadata."""
        return self.metadata.image

    def marked(self, topic_id: bytes, partition: int) -> MarkedReplica:
        """The replica of a partition that takes markers: of records, or of groups.

        Raises:
            UnknownReplica: there is none.
            InvalidTopic: a partition that takes none.
        """
        found = self.place_of(topic_id, partition)
        if not isinstance(found, PartitionReplica | GroupReplica):
            raise InvalidTopic(f"{found.name} takes no markers")
        return found

    def known_leader(self, topic_id: bytes, partition: int) -> int | None:
        """Broker id of the partition's leader, as far as a replica here knows."""
        found = self.hosting.by_place.get((topic_id, partition))
        return None if found is None else found.leader_broker

    async def ask_broker(self, broker_id: int, request: Request[Any], timeout: float) -> Any:
        """The answer of another broker to a request without payload."""
        response, _ = await self.peers.connection(broker_id).call(request, timeout=timeout)
        return response

    # -- trouble and the end ---------------------------------------------------------------------------------

    def _store_fault(self, fault: RaftlogError | None) -> None:
        events.storage(self, fault)
        if fault is not None and not isinstance(fault, StorageFull):
            self._fail(fault)

    def check_belongs(self, broker_id: int) -> None:
        """Raise ForeignDataDir if that broker was removed from the cluster. Until its replica has left the
        metadata group it is needed there: its vote may be the one without which it could not leave."""
        member = self.metadata.image.removed.get(broker_id)
        if member is not None and member not in self.metadata.replica.node.conf.members:
            raise ForeignDataDir(
                f"broker {broker_id} was removed from the cluster: move its data directory away, an empty "
                "one joins as a new broker"
            )

    def follow_removals(self) -> None:
        """Have done with brokers that the metadata has removed; with this one too."""
        for broker_id in self.metadata.image.removed:
            try:
                self.check_belongs(broker_id)
            except ForeignDataDir as error:
                if broker_id == self.broker_id:
                    self._replaced(error)
                elif self.peers.forget(broker_id):
                    for connection in list(self.server.connections):
                        if connection.peer.role == "broker" and connection.peer.broker_id == broker_id:
                            connection.close(error)  # it dials again, and is told why it is refused

    def _replaced(self, error: RaftlogError) -> None:
        """A newer process runs this broker, or it was removed: this one must not go on."""
        events.replaced(self, error)
        self._fail(error)

    def _fail(self, error: RaftlogError) -> None:
        for replica in self.hosting.by_id.values():
            replica.retire(error)
        if not self.failed.done():
            self.failed.set_result(error)

    async def close(self) -> None:
        """Stop serving, make everything durable, release the directory."""
        await self._stop()
        await self.store.close()

    async def abort(self) -> None:
        """Stop as a killed process would, as far as a living one can: nothing is flushed."""
        await self._stop()
        await self.store.abort()

    async def _stop(self) -> None:
        self._closed = True
        self.pulse.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.server.close()
        await self.peers.close()

    # -- looking ---------------------------------------------------------------------------------------------

    def row(self) -> BrokerRow:
        """This broker as it presents itself."""
        incarnation, host, port = self.address
        known = self.metadata.image.brokers.get(self.broker_id)
        state = "alive" if known is None else self._state(known)
        return BrokerRow(self.broker_id, host, port, incarnation, self.place.node_id, state, os.getpid())

    def _state(self, info: RegisteredBroker) -> str:
        return "draining" if info.draining else "alive"

    def broker_rows(self) -> list[BrokerRow]:
        """Every broker of the cluster as this one sees it."""
        rows = []
        for broker_id, info in sorted(self.metadata.image.brokers.items()):
            if broker_id == self.broker_id:
                rows.append(self.row())
                continue
            incarnation, host, port = self.peers.book.get(broker_id, (0, "", 0))
            state = self._state(info) if self.peers.is_up(broker_id) else "lost"
            rows.append(BrokerRow(broker_id, host, port, incarnation, info.node_id, state))
        return rows

    def replica_row(self, replica: Replica[Any]) -> ReplicaRow:
        """One replica as this broker sees it."""
        node, log = replica.node, replica.log
        committed = replica.committed_offset if isinstance(replica, PartitionReplica) else 0
        lagging = []
        if node.role is Role.LEADER:
            lagging = sorted(
                host
                for member, progress in node.progress.items()
                if (host := replica.hosts.get(member)) is not None
                and (progress.match < node.commit or not self.peers.is_up(host))
            )
        leader = replica.leader_broker
        amnesiac = _AMNESIAC if node.amnesiac else ""
        return ReplicaRow(
            topic=log.spec.topic,
            partition=log.spec.partition,
            replica_id=replica.replica_id,
            role=node.role.value,
            term=node.term,
            leader=-1 if leader is None else leader,
            start_offset=log.start_offset,
            end_offset=log.end_offset,
            committed_offset=committed,
            last_index=node.last_index,
            commit_index=node.commit,
            applied_index=node.applied,
            durable_index=node.durable_index,
            voters=sorted(replica.hosts[member] for member in node.conf.voters if member in replica.hosts),
            lagging=lagging,
            fault=str(replica.fault or self.repairs.note(replica.replica_id) or amnesiac),
        )
