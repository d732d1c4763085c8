"""``raftlog recover`` by seeds: disks are lost or the power is, whoever is left goes on, and again."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
from host_kit import Host

from raftlog.broker.majority_loss import Fate, Loss
from raftlog.broker.new_history import begin, examine
from raftlog.storage.disk import Disk
from raftlog.testing.disk import CrashMode

SEEDS = [*range(24), 287]
"""287: killed when all but one replica of the metadata had been told to wait for it."""
ROUNDS = 2


async def look(disks: Mapping[int, Disk]) -> Loss:
    _, _, loss = await examine({str(broker_id): disk for broker_id, disk in disks.items()})
    return loss


async def carry_out(disks: Mapping[int, Disk]) -> None:
    stores, by_broker, loss = await examine({str(broker_id): disk for broker_id, disk in disks.items()})
    await begin(loss, stores, by_broker, 0, lambda _: None)


class Story:
    """A cluster, and what its topic has to hold."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(f"recover {seed}")
        self.brokers = self.random.choice([3, 3, 4, 5])
        self.is_loose = self.random.random() < 0.5
        settings = {"flush": "interval", "flush_interval_ms": 200} if self.is_loose else {}
        self.host = Host(seed, self.brokers, topic=settings)
        self.host.loop.on_step = None  # the watch cannot believe what is lost here

    def lose(self) -> None:
        """All go down; the disks of some are gone."""
        host, rng = self.host, self.random
        for broker_id in rng.sample(list(host.cluster.brokers), len(host.cluster.brokers)):
            if rng.random() < 0.5:
                host.cluster.kill_broker(broker_id)
            else:
                host.cluster.cut_power(broker_id, CrashMode.RANDOM)
            host.loop.run_for(rng.choice([0.0, 0.05, 1.0]))
        disks = host.cluster.disks
        least = 0 if self.is_loose else len(disks) // 2
        for broker_id in rng.sample(list(disks), rng.randint(least, len(disks) - 1)):
            del disks[broker_id]

    def recover(self) -> Loss:
        """Perhaps killed in the middle, and repeated. Returns what was said before anything was done."""
        host, rng = self.host, self.random
        disks = host.cluster.disks
        loss = host.cluster.run(look(disks), node="recover")
        while rng.random() < 0.5:
            host.loop.run_as("recover", carry_out(disks))
            host.loop.run_for(rng.choice([0.001, 0.003, 0.01, 0.03]))
            host.loop.kill("recover")
            self._reopen(None if self.is_loose else CrashMode.RANDOM)
        host.cluster.run(carry_out(disks), node="recover")
        self._reopen(CrashMode.NONE if loss.groups else None)
        return loss

    def _reopen(self, mode: CrashMode | None) -> None:
        """After a power cut, if it has a mode: what nobody had synced before may be gone then, with
        flush=interval, but nothing that was carried out to the end."""
        disks = self.host.cluster.disks
        for broker_id, disk in list(disks.items()):
            disks[broker_id] = disk.kill() if mode is None else disk.crash(mode)

    def promised(self, loss: Loss) -> tuple[int, int]:
        """How many records there must be at least and at most, by what was said."""
        count = self.host.count
        for group in loss.groups:
            if not group.copies:
                return 0, 0
            end = group.copies[0].end_offset
            return (count if group.fate is Fate.KEPT else end), end
        return count, count

    def start(self) -> None:
        """In any order, with more kills meanwhile."""
        host, rng = self.host, self.random
        for broker_id in rng.sample(list(host.cluster.disks), len(host.cluster.disks)):
            host.cluster.start_broker(broker_id)
            host.loop.run_for(rng.choice([0.0, 0.2, 3.0]))
            if rng.random() < 0.4:
                victim = rng.choice(list(host.cluster.brokers))
                host.cluster.kill_broker(victim)
                host.cluster.start_broker(victim)

    def holds(self) -> list[int]:
        return [int(record.value.split(b":")[0]) for record in self.host.consume()]

    def is_healed(self) -> bool:
        host = self.host
        leader = host.leader_id
        if leader is None:
            return False
        replicas = [each for broker in host.cluster.brokers.values() for each in broker.replicas()]
        return not any(each.fault or each.node.amnesiac for each in replicas) and all(
            len(each.node.conf.voters) == len(each.node.conf.members) for each in replicas
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_whoever_is_left_goes_on_with_one_history(seed: int) -> None:
    story = Story(seed)
    host = story.host
    for _ in range(ROUNDS):
        host.produce(story.random.randint(1, 6))
        host.loop.run_for(story.random.choice([0.0, 0.1, 1.0]))
        story.lose()
        least, most = story.promised(story.recover())
        story.start()
        host.wait(story.is_healed)
        held = story.holds()
        assert held == list(range(len(held))), "the beginning of what was written, in order"
        assert least <= len(held) <= most, "what the table said"
        host.count = len(held)
        host.produce(2)
        held = story.holds()
        assert held == list(range(host.count)), "what is acknowledged from here on stays"
    host.close()
