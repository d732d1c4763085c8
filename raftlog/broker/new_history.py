"""Has a cluster that lost its majority go on with what is left: ``raftlog recover``, carried out.

The brokers are stopped and their directories locked. What is written, each step synced before the next::

    identities      "being recovered": from here on nobody starts a broker on half of this
    partitions      survivors: term and vote of the new history; the most recent log: its configuration
    metadata        the same, and with it: lost brokers hold nothing, and are removed
    what is lost    empty replicas in the place of partitions of which nothing is left
    identities      recovered

A run that is killed is repeated: what is done already needs nothing any more, for the groups then have
configurations whose members are all here.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import msgspec

from raftlog.broker.history import HISTORY_TERMS
from raftlog.broker.hosting import replica_spec
from raftlog.broker.majority_loss import Fate, Group, Loss, assess, metadata_source
from raftlog.config import TopicConfig
from raftlog.errors import RaftlogError, RecoveryRefused
from raftlog.net.connection import RpcConnection
from raftlog.net.handshake import Local
from raftlog.net.network import Seams
from raftlog.raft.confstack import encode_conf
from raftlog.raft.types import Append, ConfState, Entry, HardState
from raftlog.record.frame import FrameKind
from raftlog.state.metadata import PRODUCER_ID_BLOCK_MAX, MetadataState
from raftlog.state.metadata_commands import (
    AllocateProducerIds,
    AlterPartition,
    Command,
    CompletePartition,
    RemoveBroker,
    ReplaceReplica,
    TakeControl,
)
from raftlog.storage.disk import Disk
from raftlog.storage.identity import Identity, store_identity
from raftlog.storage.offline import OfflineStore, entries_above, look_into
from raftlog.storage.replica_log import ReplicaLog
from raftlog.storage.store import BrokerStore

Say = Callable[[str], None]
_ANSWER_TIMEOUT_S: Final = 2.0


async def examine(disks: Mapping[str, Disk]) -> tuple[dict[int, OfflineStore], dict[int, Disk], Loss]:
    """Look at directories and say what is left of their cluster; nothing is changed.

    Args:
        disks: by what to call each in a message; locked.

    Returns:
        What each broker's directory holds, the disks, and what is left, by broker id.

    Raises:
        RecoveryRefused: these are not the directories of one cluster's surviving brokers.
        DataDirError: one of them cannot be read.
    """
    stores: dict[int, OfflineStore] = {}
    by_broker: dict[int, Disk] = {}
    for name, disk in disks.items():
        found = await look_into(disk)
        broker_id = found.identity.broker_id
        if broker_id in stores:
            raise RecoveryRefused(f"{name} is a second directory of broker {broker_id}")
        stores[broker_id], by_broker[broker_id] = found, disk
    check_together({broker_id: store.identity for broker_id, store in stores.items()})
    image = await _image(stores, by_broker)
    return stores, by_broker, assess(stores, image)


def check_together(identities: Mapping[int, Identity]) -> None:
    """Raise RecoveryRefused if these are not of one cluster, or not those of a recovery that was begun."""
    clusters = {identity.cluster_id for identity in identities.values()}
    if len(clusters) != 1:
        raise RecoveryRefused(f"these are directories of {len(clusters)} clusters")
    begun = next((identity.survivors for identity in identities.values() if identity.recovering), None)
    if begun is not None and set(begun) != set(identities):
        raise RecoveryRefused(
            f"a recovery was begun with the directories of brokers {sorted(begun)}: it can only be finished "
            f"with the same, not with those of {sorted(identities)}"
        )


async def check_stopped(seams: Seams, identities: Mapping[int, Identity]) -> None:
    """Raise RecoveryRefused if a broker of the cluster answers: it is not lost, or not stopped."""
    book: dict[int, tuple[int, str, int]] = {}
    for identity in identities.values():
        for broker_id, address in identity.addresses.items():
            book[broker_id] = max(book.get(broker_id, address), address)
    known = next(iter(identities.values()))
    local = Local(known.cluster_id, "client", client_id="recover")

    async def answers(host: str, port: int) -> bool:
        try:
            connection = await RpcConnection.open(
                seams, host, port, local, known.secret, timeout=_ANSWER_TIMEOUT_S
            )
        except RaftlogError:
            return False  # nobody there, or somebody else's port by now
        connection.close()
        return True

    found = await asyncio.gather(*(answers(host, port) for _, host, port in book.values()))
    running = [broker_id for broker_id, is_there in zip(book, found, strict=True) if is_there]
    if running:
        raise RecoveryRefused(
            f"brokers {_listed(running)} run: what runs is not lost. Stop them (`raftlog shutdown`), and "
            "name their directories too"
        )


async def _image(stores: Mapping[int, OfflineStore], disks: Mapping[int, Disk]) -> MetadataState:
    """The metadata by the whole of the most recent log."""
    source = metadata_source(stores)
    replica = stores[source].replicas[stores[source].identity.metadata_replica]
    snapshot = replica.snapshot
    image = MetadataState() if snapshot is None else MetadataState.restore(snapshot.data)
    async for entry in entries_above(disks[source], replica, image.applied_index):
        image.apply(entry)
    if not image.cluster_id:
        raise RecoveryRefused("the cluster was never founded: nothing was ever acknowledged")
    return image


async def begin(
    loss: Loss, stores: Mapping[int, OfflineStore], disks: Mapping[int, Disk], now_ms: int, say: Say
) -> None:
    """Carry it out. The disks are closed at the end.

    Args:
        loss: what :func:`examine` found in these directories.
        stores: what each holds.
        disks: of the surviving brokers, locked.
        now_ms: wall clock.
        say: told of each step once it is durable.

    Raises:
        StorageFailed, StorageFull: the device; to be run again.
    """
    for broker_id in loss.survivors:
        await _mark(disks[broker_id], stores[broker_id].identity, loss.survivors, recovering=True)
    say(f"brokers {_listed(loss.survivors)} are marked: they do not start until this is finished")
    opened: dict[int, BrokerStore] = {}
    try:
        for broker_id in loss.survivors:
            identity = stores[broker_id].identity
            opened[broker_id] = await BrokerStore.open(disks[broker_id], disk_id=identity.disk_id)
        await _Rewriting(loss, opened, now_ms, say).run()
        for broker_id in loss.survivors:  # all that was written is synced
            await _mark(disks[broker_id], stores[broker_id].identity, loss.survivors, recovering=False)
    finally:
        for store in opened.values():
            await store.close()
    say("finished: start the cluster")


async def _mark(disk: Disk, identity: Identity, survivors: tuple[int, ...], *, recovering: bool) -> None:
    changed = msgspec.structs.replace(identity, survivors=survivors, recovering=recovering)
    await store_identity(disk, changed)


class _Rewriting:
    """What is written into the logs."""

    def __init__(self, loss: Loss, stores: Mapping[int, BrokerStore], now_ms: int, say: Say) -> None:
        self._loss = loss
        self._stores = stores
        self._now_ms = now_ms
        self._say = say

    async def run(self) -> None:
        for group in self._loss.groups:
            if group.copies:
                await self._go_on(group, [])
        commands, metadata = Changes(self._loss), self._loss.metadata
        if commands.found or metadata.missing or metadata.fate is not Fate.KEPT:
            await self._go_on(metadata, commands.found)
        for topic_id, index, replica_id, broker_id in commands.made:
            await self._make_empty(commands.image, topic_id, index, replica_id, broker_id)

    async def _go_on(self, group: Group, commands: list[Command]) -> None:
        """The group's new history: survivors alone, one of which votes; then these commands."""
        best, *others = group.copies
        for copy in others:
            log = self._stores[copy.broker_id].logs[copy.replica_id]
            # As if it had voted for the one that goes on. By the term it knows that it lacks the beginning.
            state = HardState(group.term, best.replica_id, log.hard_state.commit)
            await self._append(copy.broker_id, log, state, ())
        log = self._stores[best.broker_id].logs[best.replica_id]
        assert log.last_index == best.index, "it changed since it was looked at"
        state = HardState(group.term, best.replica_id, log.hard_state.commit)
        entries = self._entries(group, log.last_index, log.last_crc, log.last_leader_time_ms, commands)
        await self._begin_history(best.broker_id, log, state, entries)
        for copy in group.copies:
            # What it may have forgotten were promises to the old history.
            await self._stores[copy.broker_id].logs[copy.replica_id].cured()
        members = _listed(copy.broker_id for copy in group.copies)
        self._say(f"{group.name}: goes on with brokers {members}, from broker {best.broker_id}'s log")

    def _entries(
        self, group: Group, last_index: int, last_crc: int, last_time_ms: int, commands: list[Command]
    ) -> tuple[Entry, ...]:
        time_ms = max(self._now_ms, last_time_ms)
        contents = [(int(FrameKind.CONF), encode_conf(group.conf))]
        contents += [(int(FrameKind.COMMAND), MetadataState.codec.encode(command)) for command in commands]
        entries = []
        for kind, payload in contents:
            last_index += 1
            entry = Entry.create(last_crc, kind, group.term, last_index, time_ms, payload)
            last_crc = entry.crc
            entries.append(entry)
        return tuple(entries)

    async def _make_empty(
        self, image: MetadataState, topic_id: bytes, index: int, replica_id: int, broker_id: int
    ) -> None:
        """A partition begins anew, on one broker."""
        topic = image.topic_by_id(topic_id)
        assert topic is not None
        store = self._stores[broker_id]
        spec = replica_spec(topic, index, replica_id, TopicConfig.model_validate(topic.config))
        log = await store.create(spec)
        group = Group(
            topic.name, topic_id, index, Fate.LOST, (), (), ConfState(voters=(replica_id,)), HISTORY_TERMS
        )
        state = HardState(group.term, replica_id, 0)
        await self._begin_history(broker_id, log, state, self._entries(group, 0, spec.origin_crc, 0, []))
        self._say(f"{group.name}: begins anew, empty, on broker {broker_id}")

    async def _begin_history(
        self, broker_id: int, log: ReplicaLog, state: HardState, entries: tuple[Entry, ...]
    ) -> None:
        """Append, and decree that all of the log is committed: from then on no earlier configuration can be
        in force again, and the group needs nothing more."""
        await self._append(broker_id, log, state, entries)
        await self._append(broker_id, log, HardState(state.term, state.vote, log.last_index), ())

    async def _append(
        self, broker_id: int, log: ReplicaLog, state: HardState, entries: tuple[Entry, ...]
    ) -> None:
        """Append, and wait until that is synced."""
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: BaseException | None) -> None:
            if error is None:
                durable.set_result(None)
            else:
                durable.set_exception(error)

        store = self._stores[broker_id]
        store.append(log, Append(1, state, entries), done)
        store.begin()
        await durable


class Changes:
    """How the metadata let go of the lost brokers.

    Args:
        loss: what is left.

    Attributes:
        found: the commands, in order.
        image: the metadata behind them.
        made: (topic id, partition, replica id, broker id) of replicas that begin empty.
    """

    def __init__(self, loss: Loss) -> None:
        self.found: list[Command] = []
        self.image = loss.image.copy()
        self.made: list[tuple[bytes, int, int, int]] = []
        if not loss.lost and not loss.groups:
            return
        self._do(TakeControl())  # the controller that is lost is obeyed no more
        load = Counter(dict.fromkeys(loss.survivors, 0))
        for topic in loss.image.topics.values():
            for partition in topic.partitions:
                load.update(holder for _, holder in partition.replicas if holder in load)
        for group in loss.groups:
            if group.copies:
                self._keep(group)
            else:
                self._begin_anew(group, load)
        for broker_id in loss.lost:
            self._do(RemoveBroker(self.image.controller_epoch, broker_id))
        # Ids that nobody here knows to have been given out are not given out again.
        self._do(AllocateProducerIds(PRODUCER_ID_BLOCK_MAX))

    def _do(self, command: Command) -> None:
        payload = self.image.codec.encode(command)
        entry = Entry.create(0, FrameKind.COMMAND, 1, self.image.applied_index + 1, 0, payload)
        result = self.image.apply(entry)
        assert not isinstance(result, RaftlogError), (command, result)
        self.found.append(command)

    def _keep(self, group: Group) -> None:
        """The partition is held by its survivors, in the order in which they were wanted."""
        partition = self.image.partition(group.topic_id, group.partition)
        order = [member for member, _ in partition.members]
        copies = sorted(group.copies, key=lambda copy: order.index(copy.replica_id))
        self._alter(group, [(copy.broker_id, copy.replica_id) for copy in copies])

    def _begin_anew(self, group: Group, load: Counter[int]) -> None:
        partition = self.image.partition(group.topic_id, group.partition)
        broker_id = min(load, key=lambda each: (load[each], each))
        load[broker_id] += 1
        before = [member for member, holder in partition.members if holder == broker_id]
        self._alter(group, [(broker_id, before[0] if before else 0)])
        if before:
            self._do(ReplaceReplica(group.topic_id, group.partition, before[0]))
            self._complete(group)
        (replica_id,) = self.image.partition(group.topic_id, group.partition).wanted
        self.made.append((group.topic_id, group.partition, replica_id, broker_id))

    def _alter(self, group: Group, replicas: list[tuple[int, int]]) -> None:
        epoch = self.image.controller_epoch
        self._do(AlterPartition(epoch, group.topic_id, group.partition, replicas))
        self._complete(group)

    def _complete(self, group: Group) -> None:
        partition = self.image.partition(group.topic_id, group.partition)
        if partition.leaving:
            self._do(CompletePartition(group.topic_id, group.partition, partition.version))


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
