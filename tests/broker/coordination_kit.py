"""Groups and transactions of a simulated cluster, spoken to in bare rpcs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from broker_kit import RAW, TIMEOUT_S, TOPIC, World, batch

from raftlog.broker.group_replica import GroupReplica
from raftlog.broker.internal_topics import GROUPS_TOPIC, TRANSACTIONS_TOPIC, partition_of
from raftlog.broker.transaction_replica import TransactionReplica
from raftlog.errors import NotLeader, RaftlogError
from raftlog.net.connection import RpcConnection
from raftlog.net.rpc import (
    READ_COMMITTED,
    FetchPartition,
    FetchRequest,
    FetchResponse,
    GroupHeartbeatRequest,
    GroupHeartbeatResponse,
    GroupOffset,
    MetadataRequest,
    OffsetCommitRequest,
    OffsetFetchRequest,
    OffsetFetchResponse,
    ProducePartition,
    ProduceRequest,
    Request,
    StageOffsetsRequest,
)
from raftlog.net.rpc_transactions import (
    DescribeTransactionsRequest,
    EndTransactionRequest,
    EnlistRequest,
    InitTransactionsRequest,
    OpenTransactionsRequest,
    OpenTransactionsResponse,
    ProducerIdentity,
    TransactionRow,
)
from raftlog.record.batch import BatchHeader
from raftlog.record.codec import decode_batch
from raftlog.record.frame import FRAME_HEADER_BYTES, FrameKind, iter_frames

GROUP = "readers"
TXN = "transfer"


class CoordinatedWorld(World):
    """A world in which the internal topics exist, and whose requests find the leader by themselves."""

    def __init__(self, brokers: int = 3, **options: Any) -> None:
        super().__init__(brokers, **options)
        self._connections: dict[int, RpcConnection] = {}
        self.call(self.dial(0), MetadataRequest([GROUPS_TOPIC, TRANSACTIONS_TOPIC]))

    # -- who leads -------------------------------------------------------------------------------------------

    def topic_id_of(self, name: str) -> bytes:
        """Of a topic, as the broker that knows most has it."""
        images = [broker.metadata.image for broker in self.cluster.brokers.values()]
        return max(images, key=lambda image: image.applied_index).topics[name].topic_id

    def place(self, topic: str, name: str) -> tuple[bytes, int]:
        """(topic id, partition) of the coordinator of a name."""
        partitions = self.cluster.config.internal_partitions
        return self.topic_id_of(topic), partition_of(name, partitions)

    def leader_at(self, place: tuple[bytes, int], *, but: int | None = None) -> int:
        """Wait until a broker (other than ``but``) serves that partition; returns its id."""

        def serving() -> list[int]:
            found = []
            for broker_id, broker in self.cluster.brokers.items():
                replica = broker.hosting.by_place.get(place)
                if replica is not None and replica.staged is not None and broker_id != but:
                    found.append(broker_id)
            return found

        self.until(lambda: bool(serving()))
        return serving()[0]

    @property
    def group_place(self) -> tuple[bytes, int]:
        return self.place(GROUPS_TOPIC, GROUP)

    @property
    def transaction_place(self) -> tuple[bytes, int]:
        return self.place(TRANSACTIONS_TOPIC, TXN)

    def group_replica(self, broker_id: int) -> GroupReplica:
        """A broker's replica of the group's partition."""
        found = self.broker(broker_id).place_of(*self.group_place)
        assert isinstance(found, GroupReplica)
        return found

    def transaction_replica(self, broker_id: int) -> TransactionReplica:
        """A broker's replica of the transactional id's partition."""
        found = self.broker(broker_id).place_of(*self.transaction_place)
        assert isinstance(found, TransactionReplica)
        return found

    # -- asking ----------------------------------------------------------------------------------------------

    def connection(self, broker_id: int) -> RpcConnection:
        """A connection to a broker, kept."""
        known = self._connections.get(broker_id)
        if known is None or known.closed:
            known = self._connections[broker_id] = self.dial(broker_id)
        return known

    def seek(
        self, place: tuple[bytes, int], request: Request[Any], payload: Sequence[bytes] = ()
    ) -> tuple[Any, memoryview]:
        """Ask whoever leads, again while the error is one that passes."""
        while True:
            try:
                return self.call(self.connection(self.leader_at(place)), request, payload)
            except RaftlogError as error:
                if not isinstance(error, NotLeader) and not error.indeterminate and not error.retriable:
                    raise
                self.pass_time(0.02)

    def pass_time(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.loop.run_for(seconds)

    # -- groups ----------------------------------------------------------------------------------------------

    def heartbeat_request(
        self, member: str, epoch: int = 0, revision: int = 0, wait_ms: int = 0, **options: Any
    ) -> GroupHeartbeatRequest:
        """A heartbeat of a member that reads the topic."""
        values: dict[str, Any] = {
            "topics": (TOPIC,),
            "session_timeout_ms": 10_000,
            "rebalance_timeout_ms": 20_000,
            "wait_ms": wait_ms,
            "client_id": RAW,
        }
        return GroupHeartbeatRequest(
            *self.group_place,
            group_id=GROUP,
            member_id=member,
            member_epoch=epoch,
            revision=revision,
            **(values | options),
        )

    def heartbeat(
        self, member: str, epoch: int = 0, revision: int = 0, **options: Any
    ) -> GroupHeartbeatResponse:
        """Send one and wait for its answer."""
        request = self.heartbeat_request(member, epoch, revision, **options)
        answer: GroupHeartbeatResponse = self.seek(self.group_place, request)[0]
        return answer

    def commit(self, offset: int, member: str = "", epoch: int = -1, partition: int = 0) -> None:
        """Commit an offset of the topic."""
        offsets = [GroupOffset(self.topic_id, partition, offset)]
        self.seek(self.group_place, OffsetCommitRequest(*self.group_place, GROUP, member, epoch, offsets))

    def fetch_offsets_request(self) -> OffsetFetchRequest:
        return OffsetFetchRequest(*self.group_place, GROUP)

    def offsets(self) -> dict[int, int]:
        """Partition of the topic -> committed offset."""
        answer: OffsetFetchResponse = self.seek(self.group_place, self.fetch_offsets_request())[0]
        return {each.partition: each.offset for each in answer.offsets}

    # -- transactions ----------------------------------------------------------------------------------------

    def init(self, name: str = TXN, timeout_ms: int = 60_000) -> ProducerIdentity:
        """Open the transactional id."""
        place = self.place(TRANSACTIONS_TOPIC, name)
        answer: ProducerIdentity = self.seek(place, InitTransactionsRequest(*place, name, timeout_ms))[0]
        return answer

    def enlist(
        self,
        who: ProducerIdentity,
        partitions: Sequence[int] = (0,),
        groups: Sequence[str] = (),
        name: str = TXN,
    ) -> None:
        """Let partitions of the topic take part."""
        place = self.place(TRANSACTIONS_TOPIC, name)
        targets = [(self.topic_id, partition) for partition in partitions]
        self.seek(place, EnlistRequest(*place, name, who.producer_id, who.epoch, targets, list(groups)))

    def write(self, who: ProducerIdentity, *values: bytes, sequence: int = 0, partition: int = 0) -> int:
        """Produce a batch of the transaction; returns its base offset."""
        encoded = batch(
            *values, producer=who.producer_id, epoch=who.epoch, sequence=sequence, transactional=True
        )
        request = ProduceRequest([ProducePartition(self.topic_id, partition)])
        offset: int = self.seek((self.topic_id, partition), request, (encoded,))[0].batches[0].base_offset
        return offset

    def stage(self, who: ProducerIdentity, offset: int, member: str = "", epoch: int = -1) -> None:
        """Send an offset of the topic with the transaction."""
        offsets = [GroupOffset(self.topic_id, 0, offset)]
        request = StageOffsetsRequest(
            *self.group_place, GROUP, member, epoch, who.producer_id, who.epoch, offsets
        )
        self.seek(self.group_place, request)

    def end_request(
        self, who: ProducerIdentity, commit: bool = True, name: str = TXN
    ) -> EndTransactionRequest:
        place = self.place(TRANSACTIONS_TOPIC, name)
        return EndTransactionRequest(*place, name, who.producer_id, who.epoch, commit)

    def end(self, who: ProducerIdentity, commit: bool = True, name: str = TXN) -> ProducerIdentity:
        """Commit or abort; returns who to be next."""
        place = self.place(TRANSACTIONS_TOPIC, name)
        answer: ProducerIdentity = self.seek(place, self.end_request(who, commit, name))[0]
        return answer

    def transaction(self, name: str = TXN) -> TransactionRow:
        """The transactional id as its coordinator has it."""
        place = self.place(TRANSACTIONS_TOPIC, name)
        answer = self.seek(place, DescribeTransactionsRequest(*place, [name]))[0]
        row: TransactionRow = answer.transactions[0]
        return row

    def until_state(self, state: str) -> None:
        """Wait until the transaction is there."""
        self.until_true(lambda: self.transaction().state == state)

    def until_true(self, condition: Callable[[], bool]) -> None:
        """Ask again and again, in virtual time."""
        end = self.loop.time() + TIMEOUT_S
        while not condition():
            assert self.loop.time() < end, "it did not come about"
            self.pass_time(0.05)

    # -- records ---------------------------------------------------------------------------------------------

    def open_transactions(self, partition: int = 0) -> OpenTransactionsResponse:
        """What is open at a partition of the topic."""
        request = OpenTransactionsRequest(self.topic_id, partition)
        answer: OpenTransactionsResponse = self.seek((self.topic_id, partition), request)[0]
        return answer

    def committed_fetch(self, offset: int = 0, partition: int = 0, wait_ms: int = 0) -> FetchRequest:
        """A fetch of a reader of committed records."""
        wanted = FetchPartition(self.topic_id, partition, offset)
        return FetchRequest(wait_ms, 1 << 20, [wanted], READ_COMMITTED)

    def ask_leader(
        self, place: tuple[bytes, int], request: Request[Any], payload: Sequence[bytes] = ()
    ) -> asyncio.Task[tuple[Any, memoryview]]:
        """Ask whoever leads now, once, and do not wait."""
        return self.ask(self.connection(self.leader_at(place)), request, payload)

    def read(self, partition: int = 0, isolation: int = READ_COMMITTED) -> list[bytes]:
        """All values that a reader sees, markers and what aborted transactions wrote left out."""
        found: list[bytes] = []
        offset = 0
        while True:
            request = FetchRequest(0, 1 << 20, [FetchPartition(self.topic_id, partition, offset)], isolation)
            response: FetchResponse
            response, payload = self.seek((self.topic_id, partition), request)
            row = response.partitions[0]
            assert row.error is None, row
            if not row.length:
                return found
            values, offset = visible(payload, row.aborted)
            found += values


def visible(payload: Any, aborted: Sequence[tuple[int, int, int]] = ()) -> tuple[list[bytes], int]:
    """The record values in what a fetch returned, without markers and what aborted transactions wrote; and
    the offset behind."""
    found: list[bytes] = []
    behind = 0
    for header, position in iter_frames(payload):
        frame = bytes(payload[position + FRAME_HEADER_BYTES : position + header.length])
        if header.kind != FrameKind.BATCH:
            continue
        each = BatchHeader.parse(frame)
        behind = each.next_offset
        is_hidden = any(
            each.producer_id == producer_id and first <= each.base_offset < marker
            for producer_id, first, marker in aborted
        )
        if not each.is_control and not is_hidden:
            found += [bytes(record.value or b"") for record in decode_batch(frame, TOPIC, 0)]
    return found, behind


def begun(world: CoordinatedWorld, value: bytes = b"a") -> ProducerIdentity:
    """A transaction over two partitions and a group, ready to end."""
    me = world.init()
    world.enlist(me, (0, 1), (GROUP,))
    world.write(me, value)
    world.write(me, value, partition=1)
    world.stage(me, 17)
    return me


def check_committed(world: CoordinatedWorld, *values: bytes) -> None:
    """Everything of it is there, once, and nothing is open."""
    world.until_state("complete_commit")
    assert (world.read(0), world.read(1)) == ([*values], [*values])
    assert world.offsets() == {0: 17}
    for partition in (0, 1):
        found = world.open_transactions(partition)
        assert not found.open
        assert found.last_stable == found.committed


def restart(world: CoordinatedWorld, broker_id: int) -> None:
    world.cluster.start_broker(broker_id)
    world.cluster.introduce()
