"""A seeded walk through everything that can go wrong, then a healed network that must make progress."""

from __future__ import annotations

import random
from contextlib import suppress

from raft_cluster import Cluster

from raftlog.errors import Busy, ConfigError, NotLeader
from raftlog.raft.raw_node import RawNode
from raftlog.raft.types import Role


class Chaos:
    """Drives a cluster from one seed. The profile of faults is drawn from the seed too, so that some runs are
    nearly quiet and others hostile: a fixed mix would visit the same corner for ever.

    Args:
        seed: everything follows from it.
    """

    def __init__(self, seed: int) -> None:
        self.cluster = Cluster(
            voters=(1, 3, 3, 3, 5)[seed % 5],
            learners=(9,) if seed % 3 == 0 else (),
            spares=(7, 8),
            seed=seed,
            append_bytes_max=(120, 1 << 20)[seed % 2],
            inflight_messages_max=(2, 16)[seed // 2 % 2],
            inflight_bytes_max=(200, 8 << 20)[seed // 4 % 2],
            cache_bytes_max=(0, 150, 4 << 20)[seed % 3],
            quiet_after_ms=(0, 100, 400)[seed // 3 % 3],
        )
        self.random = self.cluster.random
        draw = self.random.random
        self.loss = draw() * 0.2 * (draw() < 0.6)
        self.double = draw() * 0.2 * (draw() < 0.6)
        self.reorder = draw() < 0.5
        weights = {
            self.work: 20.0,
            self.propose: 4.0,
            self.tick: 6.0,
            self.load: 2.0,
            self.crash: 0.8 * draw(),
            self.restart: 0.5,
            self.partition: 0.8 * draw(),
            self.heal: 0.6,
            self.lose_connection: 0.5 * draw(),
            self.stall: 0.5 * draw(),
            self.campaign: 0.3 * draw(),
            self.step_down: 0.2 * draw(),
            self.transfer: 0.3 * draw(),
            self.change_conf: 0.8 * draw() * (draw() < 0.6),
            self.read: 1.0,
            self.compact: 0.4 * draw() * (draw() < 0.6),
            self.snapshot: 1.0,
        }
        self.actions = list(weights)
        self.weights = list(weights.values())
        self.beats = random.Random(seed)
        self.proposed = 0
        self.stalled: set[int] = set()

    def run(self, steps: int) -> None:
        """Walk, heal, and demand progress."""
        for action in self.random.choices(self.actions, self.weights, k=steps):
            action()
        self.demand_progress()

    def some(self) -> int:
        return self.random.choice(list(self.cluster.nodes))

    def running(self) -> RawNode:
        """Some replica that is up; more often than not the leader."""
        alive = [node for replica, node in self.cluster.nodes.items() if replica not in self.cluster.down]
        leaders = [node for node in alive if node.role is Role.LEADER]
        return self.random.choice(
            leaders if leaders and self.random.random() < 0.7 else alive or [self.lone()]
        )

    def lone(self) -> RawNode:
        """All are down: bring one back."""
        return self.cluster.start(self.some())

    def work(self) -> None:
        """Hosts, network and disks each do a part of what lies before them."""
        for replica in self.cluster.nodes:
            if self.random.random() < 0.8:
                self.cluster.take_ready(replica)
        for _ in range(self.random.randint(0, len(self.cluster.wire))):
            self.deliver()
        for replica in self.cluster.nodes:
            if replica not in self.stalled and self.random.random() < 0.5:
                self.cluster.sync(replica, self.random.choice((1, 2, None)))

    def deliver(self) -> None:
        wire = self.cluster.wire
        if not wire:
            return
        if self.reorder:
            wire.rotate(-self.random.randrange(min(len(wire), 8)))
        message = wire.popleft()
        if self.random.random() < self.double:
            wire.append(message)
        if self.random.random() >= self.loss:
            self.cluster.deliver(message)

    def stall(self) -> None:
        """A disk stops syncing, or those that did go on."""
        self.stalled = {self.some()} if not self.stalled else set()

    def propose(self) -> None:
        for replica, node in self.cluster.nodes.items():
            if node.role is Role.LEADER and replica not in self.cluster.down:
                for _ in range(self.random.choice((1, 1, 3))):
                    self.proposed += 1
                    with suppress(Busy):
                        self.cluster.propose(replica, b"%d" % self.proposed)

    def tick(self) -> None:
        self.cluster.now += self.random.choice((5, 20, 50, 100, 100, 300))
        self.cluster.beat(lambda: self.beats.random() < self.loss)
        for replica, node in self.cluster.nodes.items():
            if replica not in self.cluster.down and self.random.random() < 0.8:
                node.tick(self.cluster.now)
                self.cluster.checker.after_step(replica)

    def load(self) -> None:
        self.cluster.serve_load()

    def crash(self) -> None:
        replica = self.some()
        if replica not in self.cluster.down:
            self.cluster.crash(replica)

    def restart(self) -> None:
        for replica in sorted(self.cluster.down):
            self.cluster.start(replica, self.random.randrange(30))

    def partition(self) -> None:
        """Cut one replica off, mostly the leader: both sides may lead for a while, for some notice at
        once."""
        alone = self.running().id
        self.cluster.isolate(alone)
        for replica, node in self.cluster.nodes.items():
            if replica not in self.cluster.down and replica != alone and self.random.random() < 0.7:
                node.peer_lost(alone, self.cluster.now)

    def heal(self) -> None:
        self.cluster.heal()

    def lose_connection(self) -> None:
        one, other = self.some(), self.some()
        if one == other:
            return
        self.cluster.wire = type(self.cluster.wire)(
            message for message in self.cluster.wire if {message.to, message.sender} != {one, other}
        )
        for here, there in ((one, other), (other, one)):
            if here not in self.cluster.down:
                self.cluster.nodes[here].peer_lost(there, self.cluster.now)
                if self.random.random() < 0.9:
                    self.cluster.nodes[here].peer_restored(there, self.cluster.now)

    def campaign(self) -> None:
        replica = self.some()
        if replica not in self.cluster.down:
            self.cluster.nodes[replica].campaign(self.cluster.now)

    def step_down(self) -> None:
        replica = self.some()
        if replica not in self.cluster.down:
            self.cluster.nodes[replica].step_down(self.cluster.now)

    def transfer(self) -> None:
        with suppress(NotLeader, ConfigError):
            self.running().transfer_leadership(self.some(), self.cluster.now)

    def change_conf(self) -> None:
        """Towards any other configuration: new voters must have been learners, so try learners often."""
        node = self.running()
        replicas = list(self.cluster.nodes)
        voters = [replica for replica in replicas if self.random.random() < 0.6]
        learners = [replica for replica in replicas if replica not in voters and self.random.random() < 0.6]
        if self.random.random() < 0.4:
            voters = list(node.conf.voters)
            learners = [replica for replica in replicas if replica not in voters]
        with suppress(NotLeader, Busy, ConfigError):
            node.propose_conf(voters, learners, self.cluster.now)

    def read(self) -> None:
        with suppress(NotLeader):
            self.cluster.read(self.running().id)

    def compact(self) -> None:
        self.cluster.compact(self.running().id)

    def snapshot(self) -> None:
        self.cluster.serve_snapshot(fail=self.random.random() < 0.3)

    def demand_progress(self) -> None:
        """Faults end: everybody must come to hold every committed entry and what is proposed now."""
        cluster = self.cluster
        cluster.heal()
        self.restart()
        for _ in range(40):
            cluster.advance(500)
            if any(node.serving for node in cluster.nodes.values()):
                break
        cluster.advance(1000)
        leader = cluster.leader()
        try:
            last = cluster.propose(leader.id, b"last")[0]
            context = cluster.read(leader.id)
        except Busy:
            raise AssertionError(f"still busy after healing: {leader.progress}") from None
        cluster.advance(500)
        assert (context, last.index - 1) in cluster.reads[leader.id]
        for node in (cluster.nodes[replica] for replica in leader.conf.members):
            assert node.applied == last.index, (
                f"{node.id} applied {node.applied}, not {last.index}: {leader.progress}"
            )
            assert node.last_crc == last.crc
        assert set(cluster.checker.committed) == set(range(1, last.index + 1))
        assert not leader.conf.is_joint
