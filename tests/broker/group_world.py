"""One ``__groups`` partition with its coordinator, and consumers that behave as the protocol says, over a
network that delays, loses and doubles. What is logged becomes committed only when the test says so; answers
wait for that, and a change of leader loses the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

from raftlog.broker.group_offsets import Decision
from raftlog.broker.groups import GroupCoordinator, TopicView
from raftlog.errors import StaleMember
from raftlog.net.rpc import JOIN_EPOCH, LEAVE_EPOCH, GroupHeartbeatRequest, GroupHeartbeatResponse
from raftlog.raft.types import Entry
from raftlog.record.frame import FrameKind
from raftlog.state.groups import CODEC, Command, Group, GroupsState, Key, Member, keys_of

GROUP = "g"
SESSION_MS = 1000
REBALANCE_MS = 3000


def topic_id(name: str) -> bytes:
    return name.encode() * 16


@dataclass(eq=False)
class Consumer:
    """A member as it sees itself."""

    member_id: str
    topics: tuple[str, ...]
    epoch: int = JOIN_EPOCH
    revision: int = 0
    reads: set[Key] = field(default_factory=set)
    """Partitions that it reads now, letting go of some included."""
    told: tuple[int, set[Key]] | None = None
    """(revision, partitions) of a newer assignment, while it still lets go of others."""
    asked: int = 0
    is_out: bool = False

    def request(self) -> GroupHeartbeatRequest:
        self.asked += 1
        return GroupHeartbeatRequest(
            b"groups",
            0,
            GROUP,
            self.member_id,
            self.epoch,
            self.revision,
            self.topics,
            SESSION_MS,
            REBALANCE_MS,
        )

    def answered(self, answer: GroupHeartbeatResponse, *, lets_go: bool = True) -> None:
        """Take in the answer to the newest request."""
        if answer.member_epoch == LEAVE_EPOCH:
            self.is_out = True
            self.reads.clear()
            return
        self.epoch = answer.member_epoch
        if answer.assigned is not None:
            self.told = answer.revision, set(keys_of(answer.assigned))
            if lets_go or self.reads <= self.told[1]:
                self.let_go()

    def let_go(self) -> None:
        """Stop reading what is not assigned any more; begin to read the rest."""
        if self.told is not None:
            self.revision, self.reads = self.told
            self.reads = set(self.reads)
            self.told = None

    def fenced(self) -> None:
        self.is_out = True
        self.reads.clear()


class World:
    """The partition's log and its present leader."""

    def __init__(self, **topics: int) -> None:
        self.now_ms = 10_000
        self.topics: dict[str, tuple[bytes, int]] = {}
        self.version = 0
        self.entries: list[Entry] = []
        self.applied = GroupsState()
        self.staged = GroupsState()
        self.coordinator = GroupCoordinator()
        for name, count in topics.items():
            self.grow(name, count)

    @property
    def view(self) -> TopicView:
        return TopicView(self.version, self.topics.get)

    def grow(self, name: str, count: int) -> None:
        self.version += 1
        self.topics[name] = topic_id(name), count

    def drop(self, name: str) -> None:
        self.version += 1
        del self.topics[name]

    @property
    def group(self) -> Group:
        return self.staged.groups[GROUP]

    def member(self, name: str) -> Member:
        return self.group.members[name]

    # -- the log ---------------------------------------------------------------------------------------------

    def log(self, *commands: Command) -> None:
        """Propose; every step is checked against the one before."""
        for command in commands:
            before = self.staged.copy()
            index = self.staged.applied_index + 1
            entry = Entry.create(0, FrameKind.COMMAND, 1, index, self.now_ms, CODEC.encode(command))
            assert not isinstance(self.staged.apply(entry), Exception)
            self.entries.append(entry)
            check_step(before, self.staged)

    def commit(self, index: int | None = None) -> None:
        for entry in self.entries[self.applied.applied_index : index]:
            self.applied.apply(entry)

    def lead(self, *, through_snapshot: bool = False) -> None:
        """Another broker leads: it has what is committed, and no memory of timers."""
        del self.entries[self.applied.applied_index :]
        if through_snapshot:
            self.staged = GroupsState.restore(self.applied.snapshot())
        else:
            self.staged = GroupsState()
            for entry in self.entries:
                self.staged.apply(entry)
        assert self.staged == self.applied
        self.coordinator = GroupCoordinator()
        self.coordinator.restart(self.staged, self.now_ms)

    # -- what members do -------------------------------------------------------------------------------------

    def decide(
        self, request: GroupHeartbeatRequest, connection: object = None
    ) -> Decision[GroupHeartbeatResponse]:
        decision = self.coordinator.heartbeat(
            self.staged, request, self.now_ms, self.view, host="h", connection=connection
        )
        self.log(*decision.commands)
        return decision

    def heartbeat(self, consumer: Consumer, *, lets_go: bool = True, connection: object = None) -> bool:
        """A heartbeat that gets through, at once committed and answered; False: the consumer is out."""
        try:
            decision = self.decide(consumer.request(), connection)
        except StaleMember:
            consumer.fenced()
            return False
        self.commit()
        consumer.answered(decision.answer, lets_go=lets_go)
        return True

    def join(self, name: str, *topics: str) -> Consumer:
        consumer = Consumer(name, topics)
        assert self.heartbeat(consumer)
        return consumer

    def leave(self, consumer: Consumer) -> None:
        consumer.epoch = LEAVE_EPOCH
        self.heartbeat(consumer)

    def pass_time(self, ms: int) -> None:
        """Time goes by, the coordinator looks whenever something is due."""
        end = self.now_ms + ms
        while (due := self.coordinator.due_ms) is not None and due <= end:
            self.now_ms = max(self.now_ms, due)
            self.log(*self.coordinator.expire(self.staged, self.now_ms, self.view))
        self.now_ms = end
        self.commit()

    def settle(self, *consumers: Consumer) -> int:
        """Everybody heartbeats in turn until nobody has to move; returns how many rounds it took."""
        for rounds in range(20):
            if all(self.coordinator.settled(self.staged, GROUP, each.member_id) for each in consumers):
                return rounds
            for consumer in consumers:
                assert self.heartbeat(consumer)
        raise AssertionError("the group does not come to rest")

    def check_reading(self, *consumers: Consumer) -> None:
        """Every partition that somebody subscribes to is read by exactly one of these."""
        wanted = {
            (found, partition)
            for name, (found, count) in self.topics.items()
            if any(name in consumer.topics for consumer in consumers)
            for partition in range(count)
        }
        reads = [key for consumer in consumers for key in consumer.reads]
        assert sorted(reads) == sorted(wanted)
        for consumer in consumers:
            assert consumer.reads == set(keys_of(self.member(consumer.member_id).assigned))


def check_step(before: GroupsState, after: GroupsState) -> None:
    """What must hold from one entry to the next."""
    after.check_invariants()
    assert after.epoch_floor >= before.epoch_floor
    for group_id, group in after.groups.items():
        known = before.groups.get(group_id)
        assert group.epoch >= (known.epoch if known is not None else before.epoch_floor)
        for name, member in group.members.items():
            if known is None or name not in known.members:
                assert member.epoch > before.epoch_floor
                continue
            was = known.members[name]
            assert (member.epoch, member.revision) >= (was.epoch, was.revision)
            lost = set(keys_of(was.assigned)) - set(keys_of(member.assigned))
            kept = lost.intersection(keys_of(member.target))
            assert not kept, f"{name} pauses {kept}, which it keeps"
            assert member.assigned == was.assigned or member.revision > was.revision
            if known.epoch == group.epoch:
                assert member.target == was.target, "a target is that of its epoch"
