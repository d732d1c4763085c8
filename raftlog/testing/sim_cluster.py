"""A whole cluster in one process and in virtual time: production brokers and clients on simulated seams.

Everything random comes from one seed, so a run that fails can be repeated exactly. A *kill* ends a process as
SIGKILL does: what it had written stays. A *power cut* also loses what was not synced, torn at sector borders.
"""

from __future__ import annotations

import random
from collections.abc import Coroutine
from functools import partial
from typing import Any, Final, TypeVar

import msgspec

from raftlog.broker.broker import Broker, BrokerPlace
from raftlog.broker.founding import FoundingPlan, found
from raftlog.broker.joining import JoiningPlan, join
from raftlog.broker.peers import Address
from raftlog.client.cluster import Bootstrap, ClusterClient
from raftlog.config import BrokerConfig
from raftlog.errors import RaftlogError
from raftlog.net.network import Seams
from raftlog.net.rpc import BrokerRow
from raftlog.raft.types import Message
from raftlog.storage.disk import Disk
from raftlog.storage.spec import StorageConfig
from raftlog.testing.disk import CrashMode, SimDisk
from raftlog.testing.invariants import Watch
from raftlog.testing.loop import SimLoop
from raftlog.testing.network import SimNetwork

T = TypeVar("T")

START_SECONDS_MAX: Final = 60.0
PORT: Final = 9000


class SimCluster:
    """Simulated brokers, and places for clients.

    Args:
        seed: of everything.
        brokers: how many.
        config: of the brokers.
        storage: of the brokers; small files by default, so that rolling and recycling happen often.
        sync_seconds: (least, most) a synced write takes; drawn per broker.
        latency: (least, most) seconds that bytes travel between nodes.
    """

    def __init__(
        self,
        seed: int,
        brokers: int = 3,
        *,
        config: BrokerConfig | None = None,
        storage: StorageConfig | None = None,
        sync_seconds: tuple[float, float] = (0.0002, 0.003),
        latency: tuple[float, float] = (0.0001, 0.002),
    ) -> None:
        self.random = random.Random(seed)
        self.loop = SimLoop(self.random.getrandbits(64))
        self._seed = seed
        self._sync_seconds = sync_seconds
        self._joined = 0
        self.network = SimNetwork(self.loop, self._fork(), latency=latency)
        self.config = config or BrokerConfig()
        self.storage = storage or StorageConfig(
            journal_bytes=256 << 10, direct_bytes=8 << 10, flush_bytes=64 << 10
        )
        self.plan = FoundingPlan.new("sim", range(brokers), self._fork())
        self.brokers: dict[int, Broker] = {}
        """Those that run."""
        self.disks = {
            broker_id: self._new_disk(self.random, broker_name(broker_id)) for broker_id in range(brokers)
        }
        self.watch = Watch(self.loop)
        """Holds every invariant after every event."""
        self._broker_class = _watched(self.watch)

    def _fork(self) -> random.Random:
        return random.Random(self.random.getrandbits(64))

    # -- processes -------------------------------------------------------------------------------------------

    def seams(self, node: str, host: str) -> Seams:
        """The seams of a simulated process."""
        network = self.network.for_node(node, host)
        return Seams(network, self._fork(), partial(self.loop.wall_ms, node), self.loop.time)

    def client(self, node: str) -> ClusterClient:
        """A client in a process of its own. When nobody answers at the addresses it has, it hears where the
        brokers are now, as it would from Ray."""
        return ClusterClient(self.seams(node, node), self.bootstrap, node, self._find)

    async def _find(self) -> Bootstrap:
        return self.bootstrap

    def start(self) -> None:
        """Found the cluster and wait until every broker is registered."""
        for broker_id in self.disks:
            self.run(found(self.disks[broker_id], self.plan, broker_id, self._fork()))
        for broker_id in self.disks:
            self.start_broker(broker_id)
        self.introduce()
        for broker_id, broker in self.brokers.items():
            self.run(broker.ready(), node=broker_name(broker_id))

    def start_broker(self, broker_id: int) -> None:
        """Start a broker's process on its disk and wait until it listens.

        Raises:
            RaftlogError: what ``Broker.start`` raises; the process has ended then.
        """
        try:
            self.brokers[broker_id] = self.run(self._start(broker_id), node=broker_name(broker_id))
        except RaftlogError:
            self.loop.kill(broker_name(broker_id))
            self.watch.ended(broker_id)
            self.disks[broker_id] = self.disks[broker_id].kill()
            raise

    async def _start(self, broker_id: int) -> Broker:
        name = broker_name(broker_id)
        return await self._broker_class.start(
            self.seams(name, name),
            self.disks[broker_id],
            config=self.config,
            place=BrokerPlace(host=name, port=PORT, node_id=name),
            storage=self.storage,
        )

    def _new_disk(self, rng: random.Random, name: str) -> SimDisk:
        """An empty one; every third carries out commits at once, and every third has nothing that is read in
        memory."""
        prompt = random.Random(f"{self._seed}/{name}/prompt").random() < 1 / 3
        disk = SimDisk(self._fork(), latency=rng.uniform(*self._sync_seconds), prompt=prompt)
        reads = random.Random(f"{self._seed}/{name}/reads")
        if reads.random() < 1 / 3:
            disk.cached, disk.read_latency = False, reads.uniform(*self._sync_seconds)
        return disk

    def join_broker(self) -> int:
        """Start a new broker on an empty disk; returns its id once it runs. After an error the next call goes
        on with the same disk, so that the cluster knows it.

        Raises:
            RaftlogError: the cluster could not be asked, or refuses.
        """
        joiner = f"joining-{self._joined}"
        rng = random.Random(f"{self._seed}/{joiner}")
        disk = self._new_disk(rng, joiner)
        addresses = tuple((broker_name(broker_id), PORT) for broker_id in self.brokers)
        plan = JoiningPlan(self.plan.cluster_id, self.plan.cluster_name, self.plan.secret, addresses)
        work = join(self.seams(joiner, joiner), disk, plan, node_id=joiner, random=rng)
        try:
            broker_id = self.run(work, node=joiner).broker_id
        finally:
            self.loop.kill(joiner)
        self._joined += 1
        self.disks[broker_id] = disk.kill()
        self.start_broker(broker_id)
        return broker_id

    def introduce(self) -> None:
        """Tell the brokers where the others are, as whoever starts them does."""
        addresses = {broker_id: broker.address for broker_id, broker in self.brokers.items()}
        for broker_id, broker in self.brokers.items():
            self.run(_learn(broker, addresses), node=broker_name(broker_id))

    def kill_broker(self, broker_id: int) -> None:
        """SIGKILL."""
        self.loop.kill(broker_name(broker_id))
        self.watch.ended(broker_id)
        del self.brokers[broker_id]
        self.disks[broker_id] = self.disks[broker_id].kill()

    def cut_power(self, broker_id: int, mode: CrashMode = CrashMode.RANDOM) -> None:
        """The broker's machine loses power: peers hear nothing, and unsynced writes are lost in part."""
        self.network.power_cut(broker_name(broker_id))
        if self.loop.is_alive(broker_name(broker_id)):
            self.loop.kill(broker_name(broker_id))
        self.watch.ended(broker_id, power=True)
        del self.brokers[broker_id]
        self.disks[broker_id] = self.disks[broker_id].crash(mode)

    @property
    def bootstrap(self) -> Bootstrap:
        """How clients reach the cluster."""
        addresses = tuple((broker_name(broker_id), PORT) for broker_id in self.disks)
        return Bootstrap(self.plan.cluster_name, self.plan.cluster_id, self.plan.secret, addresses)

    # -- running ---------------------------------------------------------------------------------------------

    def run(
        self, work: Coroutine[Any, Any, T], *, node: str = "driver", seconds: float = START_SECONDS_MAX
    ) -> T:
        """Run a coroutine as a process of the simulation and return its result.

        Raises:
            ConditionTimeout: it took more virtual time than ``seconds``.
        """
        task = self.loop.run_as(node, work)
        self.loop.run_until(task.done, seconds)
        return task.result()

    def close(self) -> None:
        """End the simulation."""
        self.loop.on_step = None
        for broker_id in list(self.brokers):
            self.loop.kill(broker_name(broker_id))
        self.loop.close()


async def _learn(broker: Broker, addresses: dict[int, Address]) -> None:
    broker.learn(addresses)


def _watched(watch: Watch) -> type[Broker]:
    """Production's broker, with ears for what it hands to its disk and to its peers."""

    class WatchedBroker(Broker):
        def __init__(self, seams: Seams, disk: Disk, *args: Any) -> None:
            super().__init__(seams, disk, *args)
            assert isinstance(disk, SimDisk)
            watch.started(self, disk)

        def send(self, broker_id: int, message: Message) -> None:
            watch.sent(self, message)
            super().send(broker_id, message)

        def row(self) -> BrokerRow:
            # The process id of the simulation itself would make each run's bytes another.
            return msgspec.structs.replace(super().row(), pid=1000 + self.broker_id)

    return WatchedBroker


def broker_name(broker_id: int) -> str:
    """Name of a broker's process, host and node."""
    return f"broker-{broker_id}"
