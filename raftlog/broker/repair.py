"""Damaged replicas of this broker are repaired in place, from whoever has the bytes.

::

    ward: what is damaged here ----> ask the brokers that host the partition, one after another:
      ^                                 frames from index i on that follow crc c?
      |                              until they have reached an entry whose crc was known before,
      '---- look again <---- put them in their place

A damaged replica that recovery could not put together is silent until it is repaired: no vote, no
acknowledgement. It could vote meanwhile, if its term and vote are intact, but nothing would be gained: what
is damaged had been committed (nothing else goes to segments, but for large frames whose checksum is in the
journal), so whoever could be elected with its vote has the bytes, and may be asked for them. So repair needs
no leader and no quorum, and one peer that has the bytes is enough.

A replica that runs keeps running when something in its files is found not to check. The damaged range is not
served, it does not campaign, and as leader it gives up after an election timeout: others may have what it
lacks.

The chain of checksums proves all frames, so it does not matter who sends them, nor in which state that one
is: two replicas that are damaged at different places repair each other.

What nobody has any more cannot be repaired. Where retention has dropped it everywhere, a log that goes on
behind a peer's snapshot begins there; where it does not, or where the journal lacks the replica's term and
vote, the metadata is asked for another replica in its place.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from raftlog.broker.snapshots import CHUNK_BYTES, SNAPSHOT_BYTES_MAX
from raftlog.errors import CorruptFrame, DamagedData, ProtocolError, RaftlogError
from raftlog.net.rpc_repair import (
    LogFramesRequest,
    LogFramesResponse,
    SnapshotBytesRequest,
    SnapshotBytesResponse,
)
from raftlog.storage.damage import BrokenLog, BrokenSnapshot
from raftlog.storage.repair import Patch
from raftlog.storage.spec import ReplicaSpec
from raftlog.telemetry.logs import log_event

if TYPE_CHECKING:
    from raftlog.broker.broker import Broker

logger = logging.getLogger("raftlog.broker")

FRAMES_BYTES_MAX: Final = 1 << 20
"""Of frames in an answer, whatever was asked for; a single frame may be larger."""
_ASK_TIMEOUT_S: Final = 5.0
_MEND_FIRST_S: Final = 10.0
_BACKOFF_MIN_S: Final = 0.1
_BACKOFF_MAX_S: Final = 5.0


class Repairs:
    """The repairs of one broker: one at a time.

    Args:
        broker: whose.

    Attributes:
        completed: replicas made whole so far.
        beyond_help: replicas that cannot be repaired: others must take their places.
    """

    def __init__(self, broker: Broker) -> None:
        self.completed = 0
        self._broker = broker
        self._ward = broker.store.ward
        self._wanted = asyncio.Event()
        self._notes: dict[int, str] = {}
        self.beyond_help: set[int] = set()
        self._dropped_below = 0
        """In the repair under way: where the log of a peer begins that was asked in vain."""
        self._ward.on_found = self._found

    # -- what goes on ----------------------------------------------------------------------------------------

    def hurry(self) -> None:
        """Something has changed that may help: a peer can be reached again."""
        self._wanted.set()

    def note(self, replica_id: int) -> str:
        """What is done about a replica's damage, for its row in the status; empty when all is well."""
        return self._notes.get(replica_id, "")

    def _log(self, level: int, event: str, replica_id: int, what: str) -> None:
        broker_id, spec = self._broker.broker_id, self._ward.spec_of(replica_id)
        place = {} if spec is None else {"topic": spec.topic, "partition": spec.partition}
        name = "" if spec is None else f" ({spec.topic}/{spec.partition})"
        log_event(
            logger,
            level,
            event,
            "broker %d: replica %d%s: %s",
            broker_id,
            replica_id,
            name,
            what,
            broker=broker_id,
            replica=replica_id,
            **place,
        )

    def _found(self, replica_id: int) -> None:
        self._log(logging.WARNING, "replica_damaged", replica_id, "a file is damaged")
        self._wanted.set()
        replica = self._broker.replica(replica_id)
        if replica is not None:
            self._broker.pulse.rouse(replica)

    async def run(self) -> None:
        """Repair what is damaged, for ever."""
        backoff = _BACKOFF_MIN_S
        while True:
            self._wanted.clear()
            before = self.completed
            for replica_id in self._ward.patients:
                if replica_id not in self.beyond_help:
                    await self._try(replica_id)
            if self.beyond_help.issuperset(self._ward.patients):
                await self._wanted.wait()
                continue
            backoff = _BACKOFF_MIN_S if self.completed > before else min(2 * backoff, _BACKOFF_MAX_S)
            try:
                async with asyncio.timeout(backoff):
                    await self._wanted.wait()
            except TimeoutError:
                pass

    async def mend_first(self, replica_id: int) -> None:
        """Repair that replica before anything else goes on.

        Raises:
            DamagedData: it cannot be repaired, or nobody was there to help in time.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + _MEND_FIRST_S
        while replica_id in self._ward.patients:
            await self._try(replica_id)
            if replica_id not in self._ward.patients:
                return
            alone = len(self._broker.peers.book) == 1
            if alone or replica_id in self.beyond_help or loop.time() >= until:
                error = self._broker.store.damaged.get(replica_id)
                raise error or DamagedData(self.note(replica_id))
            await asyncio.sleep(_BACKOFF_MIN_S)

    async def _try(self, replica_id: int) -> None:
        try:
            await self._repair(replica_id)
        except (RaftlogError, FileNotFoundError) as error:  # the latter: it was removed meanwhile
            self._notes[replica_id] = f"cannot be repaired now: {error}"
            self._log(logging.WARNING, "repair_waits", replica_id, self._notes[replica_id])

    async def _repair(self, replica_id: int) -> None:
        steps, was_asleep = 0, replica_id in self._ward.sleepers
        while (damage := await self._ward.next_damage(replica_id)) is not None:
            spec = self._ward.spec_of(replica_id)
            if spec is None:
                break
            if isinstance(damage, BrokenLog):
                done = await self._mend_log(spec, damage)
            elif isinstance(damage, BrokenSnapshot):
                done = await self._mend_snapshot(spec, damage)
            else:
                self._give_up(spec, damage.message)
                return
            if not done:
                return
            steps += 1
        self._notes.pop(replica_id, None)
        if steps or was_asleep:  # the last step may have been written although it was reported as failed
            self.completed += 1
            self._log(logging.INFO, "replica_repaired", replica_id, "repaired")
            self._broker.hosting.image_changed()  # it can be opened now, if it could not before

    def _give_up(self, spec: ReplicaSpec, why: str) -> None:
        """Another replica must take the place of this one."""
        self.beyond_help.add(spec.replica_id)
        note = self._notes[spec.replica_id] = f"cannot be repaired: {why}"
        self._log(logging.ERROR, "replica_beyond_help", spec.replica_id, note)
        self._broker.hosting.image_changed()

    def _sources(self, spec: ReplicaSpec) -> list[int]:
        """Brokers that may have what this one lacks and can be reached, in an order of chance."""
        broker = self._broker
        topic = None if spec.internal else broker.metadata.image.topic_by_id(spec.topic_id)
        if topic is None:
            hosts = set(broker.peers.book)
        else:
            hosts = set(topic.partitions[spec.partition].hosts.values())
        found = sorted(host for host in hosts if host != broker.broker_id and broker.peers.is_up(host))
        broker.seams.random.shuffle(found)
        return found

    # -- frames ----------------------------------------------------------------------------------------------

    async def _mend_log(self, spec: ReplicaSpec, damage: BrokenLog) -> bool:
        """Whether one break is repaired."""
        patch = await self._ward.patch(damage)
        index, last_index = patch.index, patch.last_index
        self._dropped_below = 0
        self._notes[spec.replica_id] = f"being repaired: {damage.message}"
        try:
            sources = self._sources(spec)
            for first in range(max(1, len(sources))):  # where they differ, the first one decides
                if await self._collect(spec, patch, sources[first:] + sources[:first]):
                    if self._ward.spec_of(spec.replica_id) is not None:  # else it was removed meanwhile
                        await patch.apply()
                    return True
                patch.restart()
        finally:
            await patch.close()
        if self._dropped_below > index and self._broker.replica(spec.replica_id) is None:
            if await self._begin_behind(spec, self._dropped_below - 1):
                return True
            self._give_up(spec, f"the others begin with entry {self._dropped_below}: {damage.message}")
        else:
            self._notes[spec.replica_id] = (
                f"waits for a peer that has entries {index} to {last_index}: {damage.message}"
            )
        return False

    async def _collect(self, spec: ReplicaSpec, patch: Patch, sources: list[int]) -> bool:
        """Whether the patch is proved by what these have."""
        while not patch.is_proved:
            for broker_id in sources:
                try:
                    await patch.add(await self._frames_of(broker_id, spec, patch.index, patch.prev_crc))
                except CorruptFrame:
                    continue  # it has none, or none that check
                break
            else:
                return False
            if patch.is_hopeless:
                return False
        return True

    async def _frames_of(self, broker_id: int, spec: ReplicaSpec, index: int, prev_crc: int) -> memoryview:
        request = LogFramesRequest(spec.topic_id, spec.partition, index, prev_crc, FRAMES_BYTES_MAX)
        try:
            connection = self._broker.peers.connection(broker_id, bulk=True)
            answer, payload = await connection.call(request, timeout=_ASK_TIMEOUT_S)
        except RaftlogError as error:
            logger.debug("broker %d cannot ask broker %d: %s", self._broker.broker_id, broker_id, error)
            return memoryview(b"")
        self._dropped_below = max(self._dropped_below, answer.first_index)
        return payload

    # -- snapshots -------------------------------------------------------------------------------------------

    async def _mend_snapshot(self, spec: ReplicaSpec, damage: BrokenSnapshot) -> bool:
        """Whether a snapshot is there again, or is not needed any more."""
        self._notes[spec.replica_id] = f"being repaired: {damage.message}"
        for index in damage.indexes:
            for broker_id in self._sources(spec):
                data = await self._snapshot_of(broker_id, spec, index)
                try:
                    await self._ward.keep_snapshot(spec.replica_id, index, data)
                except DamagedData:
                    continue  # it has none, or it does not check either
                return True
            if await self._do_without(spec, index):
                return True
        if self._broker.replica(spec.replica_id) is None:
            self._dropped_below = 0
            for broker_id in self._sources(spec):  # who has no such entry says with which its log begins
                await self._frames_of(broker_id, spec, damage.indexes[0] + 1, 0)
            first_index = self._dropped_below
            if first_index > damage.indexes[0] + 1 and await self._begin_behind(spec, first_index - 1):
                return True
        indexes = ", ".join(map(str, damage.indexes))
        self._notes[spec.replica_id] = f"waits for a peer that has a snapshot at {indexes}: {damage.message}"
        return False

    async def _begin_behind(self, spec: ReplicaSpec, index: int) -> bool:
        """Whether the log goes on behind a snapshot of those who have dropped what it lacks."""
        for broker_id in self._sources(spec):
            data = await self._snapshot_of(broker_id, spec, index)
            try:
                if await self._ward.begin_behind(spec.replica_id, index, data):
                    return True
            except DamagedData:
                continue  # it has none, or it does not check
        return False

    async def _snapshot_of(self, broker_id: int, spec: ReplicaSpec, index: int) -> bytes:
        data = bytearray()
        try:
            connection = self._broker.peers.connection(broker_id, bulk=True)
            while True:
                request = SnapshotBytesRequest(spec.topic_id, spec.partition, index, len(data), CHUNK_BYTES)
                answer, payload = await connection.call(request, timeout=_ASK_TIMEOUT_S)
                data += payload
                if not payload or not len(data) < answer.total <= SNAPSHOT_BYTES_MAX:
                    return bytes(data)
        except RaftlogError as error:
            logger.debug("broker %d cannot ask broker %d: %s", self._broker.broker_id, broker_id, error)
            return b""

    async def _do_without(self, spec: ReplicaSpec, index: int) -> bool:
        """Nobody has it: a newer one will do, if the log up to that may go. Otherwise it is missing until
        retention has come so far, and followers that need it wait: no record goes for a snapshot's sake."""
        if await self._ward.drop_snapshot(spec.replica_id, index):
            return True
        replica = self._broker.replica(spec.replica_id)
        if replica is None:
            return False
        for newer in [kept for kept in replica.log.snapshots if index < kept <= replica.spent_index]:
            await replica.compact(newer)
            if replica.log.first_index - 1 > index:
                return True
        return False

    # -- for peers -------------------------------------------------------------------------------------------

    async def lend_frames(self, request: LogFramesRequest) -> tuple[LogFramesResponse, bytes]:
        """Answer a broker whose replica is damaged."""
        if not (0 < request.index < 1 << 64 and 0 <= request.prev_crc < 1 << 32):
            raise ProtocolError(f"no log has such entries: {request}")
        bytes_max = min(request.bytes_max, FRAMES_BYTES_MAX)
        first_index = 0
        for replica_id in self._ward.replicas_of(request.topic_id, request.partition):
            found = await self._ward.frames(replica_id, request.index, request.prev_crc, bytes_max)
            if found:
                return LogFramesResponse(), found
            log = self._broker.store.logs.get(replica_id)
            first_index = log.first_index if log is not None else first_index
        return LogFramesResponse(first_index), b""

    async def lend_snapshot(self, request: SnapshotBytesRequest) -> tuple[SnapshotBytesResponse, bytes]:
        """The same for a snapshot."""
        if not (0 < request.index < 1 << 64 and 0 <= request.position < SNAPSHOT_BYTES_MAX):
            raise ProtocolError(f"no log has such a snapshot: {request}")
        for replica_id in self._ward.replicas_of(request.topic_id, request.partition):
            data, total = await self._ward.snapshot_chunk(
                replica_id, request.index, request.position, max(0, min(request.bytes_max, CHUNK_BYTES))
            )
            if total:
                return SnapshotBytesResponse(total), data
        return SnapshotBytesResponse(0), b""
