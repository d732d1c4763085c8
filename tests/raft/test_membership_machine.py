"""A Hypothesis state machine: a small group whose configuration is changed at random while messages get lost.

``raft_cluster.Checker`` holds Raft's safety after every step. Here is added what joint consensus promises
(thesis section 4.3), by definitions of its own and not by the core's code.
"""

from __future__ import annotations

import itertools
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from raft_cluster import Cluster

from raftlog.errors import Busy, ConfigError
from raftlog.raft.confstack import decode_conf
from raftlog.raft.raw_node import RawNode
from raftlog.raft.types import AppendRequest, AppendResponse, ConfState, Role
from raftlog.record.frame import FrameKind

pytestmark = pytest.mark.walk

REPLICAS = st.integers(1, 5)
VOTERS = [frozenset(some) for some in ((1, 4, 5), (1, 2, 3), (4, 5), (2, 3), (1, 2), (4,), (1, 2, 3, 4, 5))]
"""Configurations to change to: most pairs have majorities that do not meet."""


def deciding(conf: ConfState) -> list[frozenset[int]]:
    """Every set of members that is a majority of each half."""
    halves = [set(half) for half in (conf.voters, conf.outgoing) if half]
    voters = sorted(set().union(*halves))
    return [
        frozenset(some)
        for size in range(1, len(voters) + 1)
        for some in itertools.combinations(voters, size)
        if all(2 * len(half & set(some)) > len(half) for half in halves)
    ]


class Membership(RuleBasedStateMachine):
    """Three voters and two learners to begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.group = Cluster(3, learners=(4, 5), append_bytes_max=200)
        self.group.elect(1)
        self.commit = 1
        """The highest index that anybody ever knew to be committed."""
        self.met: set[tuple[ConfState, ConfState]] = set()

    # -- what is done to the group

    @rule(
        voters=st.sampled_from(VOTERS),
        outside=st.frozensets(REPLICAS, max_size=1),
        lost=st.sampled_from([None, AppendRequest, AppendResponse]),
    )
    def change(self, voters: frozenset[int], outside: frozenset[int], lost: type | None) -> None:
        """Leaders change towards these voters, all others but ``outside`` learners; strangers become learners
        first. Then it goes as far as it gets without messages of one kind."""
        for node in self.leaders():
            known = voters & node.conf.members
            learners = frozenset(self.group.nodes) - known - outside
            before = (node.last_index, node.conf, node.conf_settled, node.commit)
            try:
                entry = node.propose_conf(known, learners, self.group.now)
            except (Busy, ConfigError):
                assert (node.last_index, node.conf, node.conf_settled, node.commit) == before
            else:
                assert before[2], "one change at a time"
                assert node.conf == decode_conf(entry.payload), "in force at once"
                self.settle(lost)

    @rule(lost=st.sampled_from([None, None, AppendRequest, AppendResponse]))
    def settle(self, lost: type | None) -> None:
        self.group.settle(only=lambda message: type(message) is not lost)

    @rule(replicas=st.sets(REPLICAS, min_size=1), count=st.integers(1, 6))
    def go_on(self, replicas: set[int], count: int) -> None:
        """Some of it happens."""
        for replica in sorted(replicas):
            self.group.take_ready(replica)
        for _ in range(min(count, len(self.group.wire))):
            self.group.deliver(self.group.wire.popleft())
        for replica in sorted(replicas):
            self.group.sync(replica, 1)

    @precondition(lambda self: not self.group.cut_links)
    @rule(others=st.sampled_from([{2, 3}, {4, 5}, {4}, set()]))
    def cut_off(self, others: set[int]) -> None:
        """The leader, with or without some others."""
        self.group.isolate(*{*others, *(node.id for node in self.leaders())})

    @precondition(lambda self: self.group.cut_links)
    @rule()
    def fail_over(self) -> None:
        """Those on the other side notice at once, and may elect another."""
        for node in self.leaders():
            for peer in self.group.nodes.values():
                if (node.id, peer.id) in self.group.cut_links and peer.id not in self.group.down:
                    peer.peer_lost(node.id, self.group.now)
        self.group.advance(1200)

    @precondition(lambda self: not self.group.down)
    @rule(replica=REPLICAS)
    def crash(self, replica: int) -> None:
        self.group.crash(replica)

    @precondition(lambda self: self.group.cut_links or self.group.down)
    @rule(ms=st.sampled_from([0, 2500]))
    def heal(self, ms: int) -> None:
        self.group.heal()
        for replica in sorted(self.group.down):
            self.group.start(replica)
        self.group.advance(ms)

    @rule(ms=st.sampled_from([100, 2500]))
    def advance(self, ms: int) -> None:
        self.group.advance(ms)

    @rule(replica=REPLICAS)
    def compact(self, replica: int) -> None:
        if replica not in self.group.down:
            self.group.compact(replica)

    @rule()
    def propose(self) -> None:
        for node in self.leaders():
            with suppress(Busy):
                self.group.propose(node.id, b"x")

    def leaders(self) -> list[RawNode]:
        nodes = self.group.nodes.values()
        return [node for node in nodes if node.role is Role.LEADER and node.id not in self.group.down]

    # -- what is promised

    @invariant()
    def one_change_is_pending(self) -> None:
        """Above what is committed there is at most one configuration in any log; and each can follow the one
        before it: no two deciding sets without a common member."""
        self.commit = max(self.commit, *(node.commit for node in self.group.nodes.values()))
        for replica, node in self.group.nodes.items():
            if replica in self.group.down:
                continue
            log = self.group.log_of(replica)
            confs = [
                (entry.index, decode_conf(entry.payload)) for entry in log if entry.kind == FrameKind.CONF
            ]
            assert sum(index > self.commit for index, _ in confs) <= 1, (replica, confs, self.commit)
            chain = [node.conf_at(node.first_index - 1), *(conf for _, conf in confs)]
            assert node.conf == chain[-1]
            for pair in itertools.pairwise(chain):
                if pair not in self.met:
                    assert all(a & b for a in deciding(pair[0]) for b in deciding(pair[1])), pair
                    self.met.add(pair)

    @invariant()
    def a_joint_phase_is_left_by_its_leader(self) -> None:
        """A leader never rests on a joint configuration that it has committed."""
        for node in self.leaders():
            assert not node.conf.is_joint or not self.holds_committed(node)

    def holds_committed(self, node: RawNode) -> bool:
        confs = [entry.index for entry in self.group.log_of(node.id) if entry.kind == FrameKind.CONF]
        return bool(confs) and node.commit >= confs[-1]

    def teardown(self) -> None:
        """Faults end: some leader finishes what was begun, and all members come to hold it."""
        group = self.group
        self.heal(0)
        for _ in range(20):
            group.advance(1000)
            if any(node.serving and node.conf_settled for node in group.nodes.values()):
                break
        leader = group.leader()
        assert leader.serving
        assert leader.conf_settled
        last = group.propose(leader.id, b"last")[0]
        group.advance(1000)
        assert all(group.nodes[member].applied == last.index for member in leader.conf.members)
        assert all(group.nodes[member].conf == leader.conf for member in leader.conf.members)


Membership.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestMembership = Membership.TestCase
