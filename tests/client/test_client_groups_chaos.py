"""Groups while members and brokers come and go at random: nothing is lost, and all comes to rest."""

from __future__ import annotations

import random

import pytest
from group_kit import GroupWorld, Reader

from raftlog.errors import RequestTimeout, StaleMember

PARTITIONS = 6
STEPS = 14
SETTINGS = {"session_timeout_ms": 6_000, "rebalance_timeout_ms": 4_000, "max_poll_records": 7}


class Chaos:
    """One run."""

    def __init__(self, world: GroupWorld, seed: int, *, auto: bool) -> None:
        self.world = world
        self.dice = random.Random(seed)
        self.auto = auto
        self.all: list[Reader] = []
        self.written = 0
        for _ in range(3):
            self.join()

    def join(self) -> None:
        name = f"r{len(self.all)}"
        self.all.append(
            self.world.reader(name, commit=not self.auto, enable_auto_commit=self.auto, **SETTINGS)
        )

    def step(self) -> None:
        world, dice = self.world, self.dice
        world.produce(self.written, self.written + 30)
        self.written += 30
        what = dice.choice(["join", "kill", "stall", "pause", "break", "broker", "coordinator", "quiet"])
        victim = dice.choice(world.readers) if world.readers else None
        if what == "join" or victim is None:
            self.join()
        elif what == "kill":
            victim.kill()
        elif what == "stall":
            victim.gate.clear()
            world.loop.call_later(dice.uniform(0.1, 8.0), victim.gate.set)
        elif what == "pause":
            world.loop.pause(victim.name)
            world.loop.run_for(dice.uniform(0.1, 9.0))
            world.loop.resume(victim.name)
        elif what == "break":
            for broker in world.cluster.brokers:
                world.cluster.network.break_connections(victim.name, f"broker-{broker}")
        elif what in ("broker", "coordinator"):
            broker = (
                world.coordinator() if what == "coordinator" else dice.choice(sorted(world.cluster.brokers))
            )
            world.cluster.kill_broker(broker)
            world.loop.run_for(dice.uniform(0.0, 3.0))
            world.cluster.start_broker(broker)
            world.cluster.introduce()
        world.loop.run_for(dice.uniform(0.0, 3.0))

    def settle(self) -> None:
        """Everybody is well again, and there is somebody."""
        self.join()
        for reader in self.world.readers:
            reader.gate.set()
        self.world.loop.run_for(10.0)
        self.world.until(lambda: self.world.is_shared(PARTITIONS))
        ends = -(-self.written // PARTITIONS)
        assert self.written == ends * PARTITIONS
        self.world.until(lambda: self.world.offsets() == dict.fromkeys(range(PARTITIONS), ends))
        assert len(self.world.members()) == len(self.world.readers)


@pytest.mark.parametrize("seed", range(4))
def test_at_least_once(seed: int) -> None:
    with GroupWorld(PARTITIONS, seed=seed) as world:
        chaos = Chaos(world, seed, auto=False)
        for _ in range(STEPS):
            chaos.step()
        chaos.settle()
        assert {value for reader in chaos.all for value in reader.values} == set(range(chaos.written))
        for reader in chaos.all:
            assert all(isinstance(error, (StaleMember, RequestTimeout)) for error in reader.errors)


@pytest.mark.parametrize("seed", range(4))
def test_at_most_once(seed: int) -> None:
    with GroupWorld(PARTITIONS, seed=seed) as world:
        chaos = Chaos(world, seed, auto=True)
        for _ in range(STEPS):
            chaos.step()
        chaos.settle()
        read = [value for reader in chaos.all for value in reader.values]
        assert len(read) == len(set(read)), "nothing twice"
