"""The actor that hosts one broker.

The broker's server runs on the actor's own event loop: peers and clients talk to it through sockets. The
metadata actor calls methods here, and clients that reach no socket call one.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Final

import msgspec
import ray

from raftlog.actors.logs import log_as
from raftlog.actors.metrics import RayMetrics, export
from raftlog.actors.options import NAMESPACE, Actor, broker_name
from raftlog.broker.broker import Broker, BrokerPlace
from raftlog.broker.founding import FoundingPlan, found
from raftlog.broker.joining import JoiningPlan, join
from raftlog.broker.peers import Address
from raftlog.broker.sampling import BrokerSampler
from raftlog.config import BrokerConfig
from raftlog.errors import ForeignDataDir, NotRunning
from raftlog.net.network import real_seams
from raftlog.net.tunnel_serve import Tunnels
from raftlog.storage.identity import Identity, find_identity
from raftlog.storage.real_disk import RealDisk
from raftlog.version import software_version

logger = logging.getLogger("raftlog.actors")

_SWITCH_INTERVAL_S: Final = 0.0002
"""Between threads of a broker: Python's default of 5 ms keeps the loop waiting for the thread that has
synced."""


class BrokerLaunch(msgspec.Struct, frozen=True):
    """What a broker actor is started with.

    Args:
        cluster: name of the cluster.
        broker_id: which broker.
        data_dir: the cluster's data directory on its node; the broker's own folder is below it.
        host: the node's own address, to bind to and be reached at.
        plan: under which the cluster was founded.
        zone: availability zone of the node, empty if unknown.
        config: settings of the broker.
        ephemeral: the data goes with the cluster.
    """

    cluster: str
    broker_id: int
    data_dir: str
    host: str
    plan: FoundingPlan
    zone: str = ""
    config: dict[str, object] = {}
    ephemeral: bool = False


class BrokerInfo(msgspec.Struct, frozen=True):
    """A running broker: who and where."""

    broker_id: int
    address: Address
    node_id: str
    pid: int


class NodeProbe(msgspec.Struct, frozen=True):
    """What a node says of itself before brokers are placed on it."""

    node_id: str
    version: str
    identities: dict[int, Identity]
    """Broker id -> identity found below the data directory."""


def broker_folder(data_dir: str, broker_id: int) -> Path:
    """The directory of one broker's data below the cluster's."""
    return here(data_dir) / f"broker-{broker_id}"


def here(data_dir: str) -> Path:
    """The cluster's data directory on this node."""
    return Path(os.path.expandvars(data_dir)).expanduser()


async def _identities(folders: list[Path]) -> dict[int, Identity]:
    """Broker id -> identity, of those of the folders that have one."""
    found_here: dict[int, Identity] = {}
    for folder in folders:
        disk = RealDisk(folder)
        identity = await find_identity(disk)
        await disk.close()
        if identity is not None:
            found_here[int(folder.name.removeprefix("broker-"))] = identity
    return found_here


@ray.remote
def probe_node(data_dir: str) -> NodeProbe:
    """Run on a node: its version of raftlog, and whose data it holds."""
    folders = sorted(here(data_dir).glob("broker-*"))
    node_id = ray.get_runtime_context().get_node_id()
    return NodeProbe(node_id, software_version(), asyncio.run(_identities(folders)))


async def _join(folder: Path, plan: JoiningPlan, node_id: str, zone: str) -> int:
    disk = RealDisk(folder)
    try:
        identity = await join(real_seams(), disk, plan, node_id=node_id, zone=zone)
    finally:
        await disk.close()
    return identity.broker_id


@ray.remote
def join_cluster(data_dir: str, plan: JoiningPlan, zone: str) -> int:
    """Run on a node: make a data directory there for a new broker of a running cluster; returns its id."""
    folder = here(data_dir) / "joining"
    broker_id = asyncio.run(_join(folder, plan, ray.get_runtime_context().get_node_id(), zone))
    folder.rename(broker_folder(data_dir, broker_id))
    return broker_id


@ray.remote
def remove_data(data_dir: str) -> None:
    """Run on a node: remove what an ephemeral cluster kept there."""
    shutil.rmtree(here(data_dir), ignore_errors=True)


class BrokerHost:
    """The actor's class. One broker, from :meth:`start` to the end of the process.

    Args:
        launch: what to run.
    """

    def __init__(self, launch: BrokerLaunch) -> None:
        self._launch = launch
        self._broker: Broker | None = None
        self._tunnels: Tunnels | None = None

    def _disk(self) -> RealDisk:
        return RealDisk(broker_folder(self._launch.data_dir, self._launch.broker_id))

    async def found(self) -> None:
        """Give the directory its identity, if it has none. Every founding broker's is written before the
        first of them is started.

        Raises:
            DataDirError: the directory is of another cluster or broker, or cannot be written.
        """
        if self._broker is None:
            disk = self._disk()
            try:
                await found(disk, self._launch.plan, self._launch.broker_id)
            finally:
                await disk.close()

    async def has_data(self) -> bool:
        """Whether the broker's directory has its identity."""
        if self._broker is not None:
            return True
        disk = self._disk()
        try:
            return await find_identity(disk) is not None
        finally:
            await disk.close()

    async def start(self) -> BrokerInfo:
        """Recover what is in the directory and serve.

        Raises:
            DataDirError: the directory was not founded, is locked, or damaged.
        """
        if self._broker is not None:
            return self._info(self._broker)
        launch = self._launch
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        config = BrokerConfig.model_validate(launch.config)
        log_as(broker_name(launch.cluster, launch.broker_id), config)
        disk = self._disk()
        try:
            place = BrokerPlace(
                host=launch.host,
                node_id=ray.get_runtime_context().get_node_id(),
                zone=launch.zone,
            )
            self._broker = await Broker.start(real_seams(), disk, config=config, place=place)
        except BaseException:  # raised again; the lock must not stay
            await disk.close()
            raise
        self._tunnels = Tunnels(self._broker.server.accept)
        self._export_metrics(self._broker, disk)
        gc.collect()
        gc.freeze()
        return self._info(self._broker)

    def _export_metrics(self, broker: Broker, disk: RealDisk) -> None:
        config = broker.config
        if config.metrics_interval_ms:
            sampler = BrokerSampler(broker, disk.syncs, config.metrics_series_max)
            metrics = RayMetrics(cluster=self._launch.cluster, broker=str(broker.broker_id))
            interval_s = config.metrics_interval_ms / 1000
            broker.spawn(export(metrics, interval_s, sampler.sample, sampler.survey))

    def _info(self, broker: Broker) -> BrokerInfo:
        return BrokerInfo(broker.broker_id, broker.address, broker.place.node_id, os.getpid())

    async def launch(self) -> BrokerLaunch:
        """What it was started with: how a metadata actor without memory finds the cluster again."""
        return self._launch

    async def learn(self, addresses: dict[int, Address]) -> None:
        """Where the other brokers are."""
        if self._broker is not None:
            self._broker.learn(addresses)

    async def info(self) -> BrokerInfo | None:
        """Who and where; None before :meth:`start`."""
        return self._info(self._broker) if self._broker is not None else None

    async def ready(self) -> None:
        """Wait until the broker is registered with the metadata group."""
        assert self._broker is not None, "start() comes first"
        await self._broker.ready()

    async def watch(self) -> tuple[str, bool]:
        """Return only when the broker cannot go on: the reason, and whether it was removed from the cluster
        and is not to be started again. (The call fails when the process dies.)"""
        assert self._broker is not None, "start() comes first"
        error = await asyncio.shield(self._broker.failed)
        return str(error), isinstance(error, ForeignDataDir)

    async def clients(self) -> list[str]:
        """Ids of the clients that are connected."""
        if self._broker is None:
            return []
        connections = self._broker.server.connections
        return sorted({one.peer.client_id for one in connections if one.peer.role == "client"})

    async def exchange(self, message: bytes) -> bytes:
        """Bytes of a client's connection there and back, for clients that reach no port; see
        ``raftlog.net.tunnel``. What they say is what they would say at a port, the handshake included.

        Raises:
            NotRunning: before :meth:`start`, or after :meth:`stop`.
            ProtocolError: these are bytes of something else.
        """
        if self._tunnels is None:
            raise NotRunning("the actor has no broker")
        return await self._tunnels.exchange(message)

    async def stop(self) -> None:
        """Close the broker cleanly; the actor may be killed afterwards."""
        if self._broker is not None:
            broker, self._broker, self._tunnels = self._broker, None, None
            await broker.close()


BrokerActor: Any = ray.remote(BrokerHost)


def running_brokers(cluster: str) -> list[int]:
    """Ids of the cluster's brokers whose actors Ray knows (some may be dying)."""
    prefix = broker_name(cluster, 0).removesuffix("0")
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        int(row["name"].removeprefix(prefix))
        for row in named
        if row["namespace"] == NAMESPACE and row["name"].startswith(prefix)
    )


def find_broker(cluster: str, broker_id: int) -> Actor | None:
    """The broker's actor if its name is taken (it may still be dead: ping it)."""
    try:
        return ray.get_actor(broker_name(cluster, broker_id), namespace=NAMESPACE)
    except ValueError:
        return None
