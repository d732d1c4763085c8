"""The controller as a process of a simulated cluster: brokers come and go, and it may die at any step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from raftlog.client.admin import Admin
from raftlog.client.cluster import ClusterClient
from raftlog.config import BrokerConfig
from raftlog.controller.reconcile import Policy
from raftlog.errors import ConfigError, InvalidReplicationFactor, ProtocolError, UnknownTopic
from raftlog.net.rpc_cluster import ImageRequest, ReportRequest
from raftlog.state.image import Topic
from raftlog.testing.moves import CONTROLLER, RIVAL, Mover
from raftlog.testing.sim_cluster import SimCluster

POLICY = Policy(replace_after_ms=3_000, brokers=0)


class Governed:
    """A simulated cluster with a topic, and its controller."""

    def __init__(self, brokers: int, partitions: int, replication: int | str = "auto") -> None:
        self.cluster = SimCluster(7, brokers, config=BrokerConfig(preferred_leader_after_ms=200))
        self.cluster.start()
        self.lost: set[int] = set()
        self.mover = Mover(self.cluster, POLICY, self.lost)
        self.ask(lambda admin: admin.create_topic("t", partitions, replication, None, False, 60.0))

    def ask(self, what: Callable[[Admin], Coroutine[Any, Any, Any]]) -> Any:
        """What an administrator asks for, and the answer."""
        return self.cluster.run(self._ask(what), node="admin")

    async def _ask(self, what: Callable[[Admin], Coroutine[Any, Any, Any]]) -> Any:
        client = ClusterClient(self.cluster.seams("admin", "admin"), self.cluster.bootstrap, "admin")
        try:
            return await what(Admin(client))
        finally:
            await client.close()

    @property
    def topic(self) -> Topic:
        image = self.mover.image
        assert image is not None
        return image.topic("t")

    @property
    def holders(self) -> list[list[int]]:
        return [[broker for _, broker in each.replicas] for each in self.topic.partitions]

    @property
    def held(self) -> Counter[int]:
        return Counter(broker for holders in self.holders for broker in holders)

    @property
    def led(self) -> Counter[int]:
        return Counter(holders[0] for holders in self.holders)

    def wait(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        self.cluster.loop.run_until(condition, seconds)

    def settle(self) -> None:
        """Until the controller has nothing to do any more."""
        self.mover.govern()
        self.wait(self.mover.has_arrived, 120.0)


@pytest.fixture
def governed() -> Iterator[Callable[..., Governed]]:
    made: list[Governed] = []

    def make(*arguments: Any) -> Governed:
        made.append(Governed(*arguments))
        return made[-1]

    yield make
    for each in made:
        each.mover.kill_controllers()
        each.cluster.close()


def test_a_broker_that_joins_gets_its_share(governed: Callable[..., Governed]) -> None:
    world = governed(3, 8)
    world.settle()
    before = world.topic
    world.settle()
    assert world.topic == before, "nothing moves for nothing"
    added = world.cluster.join_broker()
    world.settle()
    assert sorted(world.held.values()) == [6, 6, 6, 6]
    assert sorted(world.led.values()) == [2, 2, 2, 2]
    assert world.led[added] == 2


def test_a_broker_drains_leaders_first_and_may_stay_after_all(governed: Callable[..., Governed]) -> None:
    world = governed(4, 8)
    world.settle()
    world.ask(lambda admin: admin.drain([1], True, 10.0))
    order: list[str] = []

    def is_empty() -> bool:
        if not world.led[1]:
            order.append("no leader")
        if world.held[1] < 6:
            order.append("fewer replicas")
        return not world.held[1] and not world.mover.is_moving

    world.wait(is_empty)
    assert order[0] == "no leader"
    rows = {row.id: row.state for row in world.cluster.brokers[0].broker_rows()}
    assert rows[1] == "draining"
    world.ask(lambda admin: admin.drain([1], False, 10.0))
    world.settle()
    assert sorted(world.held.values()) == [6, 6, 6, 6]
    with pytest.raises(ConfigError):
        world.ask(lambda admin: admin.drain([9], True, 10.0))


def test_a_drained_broker_is_forgotten_when_it_is_gone(governed: Callable[..., Governed]) -> None:
    world = governed(4, 4)
    world.mover.govern()
    world.ask(lambda admin: admin.drain([2], True, 10.0))
    world.wait(lambda: not world.held[2] and not world.mover.is_moving)
    world.cluster.kill_broker(2)
    world.wait(lambda: world.mover.forgotten() == [2])
    assert sorted(world.held) == [0, 1, 3]


def test_who_stays_away_is_replaced_and_who_is_back_soon_is_not(governed: Callable[..., Governed]) -> None:
    world = governed(4, 4)
    world.settle()
    before = world.holders
    world.cluster.kill_broker(2)
    world.cluster.loop.run_for(2.0)
    world.cluster.start_broker(2)
    world.settle()
    assert world.holders == before
    world.cluster.kill_broker(2)
    world.wait(lambda: not world.held[2] and not world.mover.is_moving)
    assert all(len(set(holders)) == 3 for holders in world.holders)


@pytest.mark.parametrize("after", [0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3])
def test_a_controller_may_die_at_any_step(governed: Callable[..., Governed], after: float) -> None:
    world = governed(3, 4)
    world.settle()
    world.cluster.join_broker()
    for _ in range(4):
        world.mover.govern()
        world.wait(lambda: world.mover.is_governed)
        world.cluster.loop.run_for(after)
        world.mover.kill_controllers()
    world.settle()
    assert sorted(world.held.values()) == [3, 3, 3, 3]
    assert sorted(world.led.values()) == [1, 1, 1, 1]


def test_two_controllers_come_to_one_end(governed: Callable[..., Governed]) -> None:
    world = governed(3, 8)
    world.mover.govern(RIVAL)
    world.mover.govern(CONTROLLER)
    world.cluster.join_broker()
    world.settle()
    assert sorted(world.held.values()) == [6, 6, 6, 6]


def test_a_topic_gets_more_partitions_and_other_replication(governed: Callable[..., Governed]) -> None:
    world = governed(4, 2, 1)
    with pytest.raises(ConfigError, match="allow_key_reorder"):
        world.ask(lambda admin: admin.alter_topic("t", 10.0, more_partitions=2))
    more = world.ask(lambda admin: admin.alter_topic("t", 10.0, more_partitions=2, allow_key_reorder=True))
    assert more == 4
    assert [len(holders) for holders in world.holders] == [1, 1, 1, 1]
    with pytest.raises(UnknownTopic):
        world.ask(lambda admin: admin.alter_topic("nothing", 10.0, replication_factor=2))
    with pytest.raises(InvalidReplicationFactor):
        world.ask(lambda admin: admin.alter_topic("t", 10.0, replication_factor=9))
    world.ask(lambda admin: admin.alter_topic("t", 10.0, replication_factor=3))
    world.settle()
    assert sorted(world.held.values()) == [3, 3, 3, 3]
    world.ask(lambda admin: admin.alter_topic("t", 10.0, replication_factor=2))
    world.settle()
    assert sorted(world.held.values()) == [2, 2, 2, 2]


def test_topics_made_with_few_brokers_are_raised_to_three_replicas(governed: Callable[..., Governed]) -> None:
    world = governed(1, 3)
    assert {len(holders) for holders in world.holders} == {1}
    for _ in range(2):
        world.cluster.join_broker()
    world.settle()
    assert {len(holders) for holders in world.holders} == {3}


def test_only_controllers_are_told_what_is_theirs(governed: Callable[..., Governed]) -> None:
    world = governed(1, 1)

    async def ask(admin: Admin) -> None:
        with pytest.raises(ProtocolError):
            await admin._cluster.call_any(ImageRequest(0), timeout=5.0)
        with pytest.raises(ProtocolError):
            await admin._cluster.call_any(ReportRequest(), timeout=5.0)

    world.ask(ask)
