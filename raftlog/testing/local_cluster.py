"""A real cluster without Ray, for tests of programs that use raftlog.

The brokers are the production ones (real disk, real sockets on the loopback interface) on the event loop of
one background thread. It is up in a fraction of a second and leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import uvloop

from raftlog.broker.broker import Broker, BrokerPlace
from raftlog.broker.founding import FoundingPlan, decide, found, may_run
from raftlog.broker.joining import JoiningPlan, join
from raftlog.client.cluster import Bootstrap, ClusterClient
from raftlog.client.log import Log
from raftlog.config import BrokerConfig
from raftlog.controller.controller import Controller, Surroundings
from raftlog.controller.reconcile import JoinBroker, Node, Policy, StartBroker
from raftlog.net.network import real_seams
from raftlog.storage.identity import IDENTITY_PATH, Identity, find_identity
from raftlog.storage.real_disk import RealDisk

T = TypeVar("T")

_START_TIMEOUT_S = 30.0


class LocalCluster:
    """Brokers in this process, and a :class:`raftlog.Log` on them.

    Args:
        brokers: how many (1 to 5).
        data_dir: where they keep their data; None: a temporary folder that goes with the cluster. A folder
            that
            holds an earlier LocalCluster's data is recovered.
        config: limits and timings of the brokers.

    Example::

        with LocalCluster(brokers=3) as cluster:
            cluster.log.create_topic("orders", partitions=2)
    """

    def __init__(
        self, brokers: int = 1, *, data_dir: str | Path | None = None, config: BrokerConfig | None = None
    ) -> None:
        if brokers < 1:
            raise ValueError(f"a cluster has at least one broker, not {brokers}")
        self._count = brokers
        self._temporary = data_dir is None
        self.data_dir = Path(data_dir) if data_dir is not None else Path(tempfile.mkdtemp(prefix="raftlog-"))
        self._config = config
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._brokers: dict[int, Broker] = {}
        self._plan: FoundingPlan | None = None
        self._log: Log | None = None
        self._governing: asyncio.Task[None] | None = None
        self._controller_client: ClusterClient | None = None

    # -- life ------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Found or recover the cluster and wait until every broker answers."""
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="raftlog-local", daemon=True)
        self._thread.start()
        started.wait()
        try:
            self._await(self._start_all())
        except BaseException:  # also an interrupt: no thread may stay
            self.stop()
            raise
        return self

    def _run(self, started: threading.Event) -> None:
        loop = self._loop = uvloop.new_event_loop()
        asyncio.set_event_loop(loop)
        loop.call_soon(started.set)
        try:
            loop.run_forever()
        finally:
            loop.close()

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None, "the cluster is not started"
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_START_TIMEOUT_S)

    async def _start_all(self) -> None:
        there = [int(path.name.removeprefix("broker-")) for path in self.data_dir.glob("broker-*")]
        identities = {
            broker_id: await self._identity(broker_id) for broker_id in {*there, *range(self._count)}
        }
        if any(identities.values()):  # those without one have lost their data, or never were
            identities = {broker_id: each for broker_id, each in identities.items() if each is not None}
        self._plan = decide("local", identities)
        members = may_run(self._plan, identities)
        for broker_id in members:
            disk = RealDisk(self._folder(broker_id))
            await found(disk, self._plan, broker_id)
            await disk.close()
        for broker_id in members:
            await self._start_one(broker_id)
        self._introduce()
        for broker in self._brokers.values():
            await broker.ready()
        for number in range(self._count - len(members)):
            await self._join_one(number)
        self._introduce()
        client = ClusterClient(real_seams(), self.bootstrap, "controller", role="controller")
        controller = Controller(client, _Hands(self.data_dir, self._brokers), Policy(brokers=self._count))
        self._governing = asyncio.get_running_loop().create_task(controller.run())
        self._controller_client = client

    async def _identity(self, broker_id: int) -> Identity | None:
        disk = RealDisk(self._folder(broker_id))
        try:
            return await find_identity(disk)
        finally:
            await disk.close()

    async def _join_one(self, number: int) -> None:
        """A broker with an empty directory, where one has lost its data or has not been before."""
        assert self._plan is not None
        folder = self.data_dir / f"joining-{number}"
        addresses = tuple(broker.address[1:] for broker in self._brokers.values())
        plan = JoiningPlan(self._plan.cluster_id, self._plan.cluster_name, self._plan.secret, addresses)
        disk = RealDisk(folder)
        identity = await join(real_seams(), disk, plan, node_id=f"local-{number}")
        await disk.close()
        folder.rename(self._folder(identity.broker_id))
        await self._start_one(identity.broker_id)

    def _folder(self, broker_id: int) -> Path:
        return self.data_dir / f"broker-{broker_id}"

    async def _start_one(self, broker_id: int) -> None:
        disk = RealDisk(self._folder(broker_id))
        place = BrokerPlace(node_id=f"local-{broker_id}")
        self._brokers[broker_id] = await Broker.start(real_seams(), disk, config=self._config, place=place)

    def _introduce(self) -> None:
        addresses = {broker_id: broker.address for broker_id, broker in self._brokers.items()}
        for broker in self._brokers.values():
            broker.learn(addresses)

    def stop(self) -> None:
        """Close the log and the brokers; a temporary folder is removed."""
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._loop is not None and self._thread is not None:
            try:
                self._await(self._stop_all())
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(_START_TIMEOUT_S)
                self._loop = self._thread = None
        if self._temporary:
            shutil.rmtree(self.data_dir, ignore_errors=True)

    async def _stop_all(self) -> None:
        if self._governing is not None and self._controller_client is not None:
            self._governing.cancel()
            await asyncio.gather(self._governing, return_exceptions=True)
            await self._controller_client.close()
            self._governing = self._controller_client = None
        brokers = list(self._brokers.values())
        self._brokers.clear()
        for broker in brokers:
            await broker.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- use -------------------------------------------------------------------------------------------------

    @property
    def bootstrap(self) -> Bootstrap:
        """How to reach the cluster (picklable)."""
        assert self._plan is not None, "the cluster is not started"
        addresses = tuple(broker.address[1:] for broker in self._brokers.values())
        return Bootstrap(self._plan.cluster_name, self._plan.cluster_id, self._plan.secret, addresses)

    @property
    def log(self) -> Log:
        """A Log of this cluster, closed with it."""
        if self._log is None:
            self._log = Log(self.bootstrap)
        return self._log

    def kill_broker(self, broker_id: int) -> None:
        """End a broker abruptly: its connections break and nothing is flushed."""
        self._await(self._brokers.pop(broker_id).abort())

    def restart_broker(self, broker_id: int) -> None:
        """Start a broker that was killed, on its own data."""
        self._await(self._restart(broker_id))

    async def _restart(self, broker_id: int) -> None:
        await self._start_one(broker_id)
        self._introduce()


class _Hands:
    """The controller's. Every broker has a node of its own, and who is killed stays down."""

    def __init__(self, data_dir: Path, brokers: Mapping[int, Broker]) -> None:
        self._data_dir = data_dir
        self._brokers = brokers

    async def look(self) -> Surroundings:
        found = self._data_dir.glob(f"broker-*/{IDENTITY_PATH}")
        there = {int(path.parent.name.removeprefix("broker-")) for path in found}
        nodes = {f"local-{each}": Node(f"local-{each}", disks=frozenset({each})) for each in self._brokers}
        gone = set(range(max(there, default=0))) - there
        return Surroundings(nodes, frozenset(self._brokers), frozenset(gone))

    async def start(self, action: StartBroker) -> None:
        pass

    async def join(self, action: JoinBroker) -> None:
        pass
