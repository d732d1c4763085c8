"""The metadata actor: founds or recovers a cluster, and keeps its brokers running.

It is named, detached, pinned to the head node and restarted by Ray. It holds nothing that cannot be found
again: the cluster's identity is on the brokers' disks, topics and assignments are in the metadata Raft group,
and running brokers are found by their names. Produce and consume go on while it is down.

One loop compares what should run with what runs. It is woken by the end of a broker (a call that a broker
answers only when it dies is always pending) and otherwise looks around every few seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections import Counter
from typing import Any, Final

import msgspec
import ray
from ray.exceptions import RayActorError, RayError

from raftlog.actors.broker import (
    BrokerActor,
    BrokerInfo,
    BrokerLaunch,
    NodeProbe,
    find_broker,
    join_cluster,
    probe_node,
    remove_data,
    running_brokers,
)
from raftlog.actors.options import Actor, broker_options, probe_options
from raftlog.broker.founding import FoundingPlan, decide, may_run
from raftlog.broker.joining import JoiningPlan
from raftlog.client.cluster import Bootstrap
from raftlog.errors import (
    ClusterInUse,
    ConfigError,
    DataDirError,
    ForeignDataDir,
    IncompatibleVersion,
    RaftlogError,
)
from raftlog.storage.identity import Identity
from raftlog.version import software_version

logger = logging.getLogger("raftlog.actors")

_CALL_TIMEOUT_S: Final = 30.0
_PING_TIMEOUT_S: Final = 5.0
_LOOK_AROUND_S: Final = 5.0
_RETRY_S: Final = 0.5


class ClusterSpec(msgspec.Struct, frozen=True):
    """What ``raftlog.start`` asks for.

    Args:
        name: of the cluster.
        brokers: how many; None: one per node.
        data_dir: the data directory of this cluster, on every node.
        ephemeral: the data goes with the cluster.
        config: settings of the brokers.
        host: address that brokers bind to; None: their node's own.
    """

    name: str
    brokers: int | None
    data_dir: str
    ephemeral: bool = False
    config: dict[str, object] = {}
    host: str | None = None


class Node(msgspec.Struct, frozen=True):
    """A node of the Ray cluster: its address as Ray knows it, and its availability zone (or "")."""

    node_id: str
    host: str
    zone: str


class MetadataHost:
    """The actor's class.

    Args:
        spec: the cluster to run.
    """

    def __init__(self, spec: ClusterSpec) -> None:
        self._spec = spec
        self._plan: FoundingPlan | None = None
        self._nodes: dict[int, Node] = {}
        """broker id -> where it belongs."""
        self._running: dict[int, tuple[Actor, BrokerInfo]] = {}
        self._troubles: dict[int, str] = {}
        self._founding = False
        self._emptied: list[Node] = []
        """Nodes with an empty directory where a broker's data should be."""
        self._wake = asyncio.Event()
        self._watchers: set[asyncio.Task[None]] = set()
        self._begun: asyncio.Task[None] = asyncio.get_running_loop().create_task(self._begin())
        self._stopping = False
        self._loop_task: asyncio.Task[None] | None = None

    # -- what handles call -----------------------------------------------------------------------------------

    async def bootstrap(self) -> Bootstrap:
        """How to reach the cluster, once every broker that can run runs.

        Raises:
            DataDirError, IncompatibleVersion, ConfigError: why there is no cluster.
        """
        await asyncio.shield(self._begun)
        assert self._plan is not None
        addresses = tuple(info.address[1:] for _, info in self._running.values())
        return Bootstrap(self._plan.cluster_name, self._plan.cluster_id, self._plan.secret, addresses)

    async def spec(self) -> ClusterSpec:
        """What it was started with."""
        return self._spec

    async def pid(self) -> int:
        """Of this actor's process."""
        return os.getpid()

    async def brokers(self) -> dict[int, BrokerInfo | str]:
        """Broker id -> where it runs, or why it does not."""
        return {
            broker_id: self._running[broker_id][1]
            if broker_id in self._running
            else self._troubles.get(broker_id, "starting")
            for broker_id in sorted(self._nodes)
        }

    async def stop(self, force: bool, ignore: tuple[str, ...] = ()) -> None:
        """Stop every broker cleanly. The caller kills this actor afterwards.

        Args:
            force: even though clients are connected.
            ignore: ids of clients that do not count (the caller's own).

        Raises:
            ClusterInUse: clients are connected; details: clients.
        """
        if not force:
            clients = sorted(set(await self._clients()) - set(ignore))
            if clients:
                raise ClusterInUse(
                    f"cluster {self._spec.name!r} is in use by {len(clients)} clients: {', '.join(clients)}",
                    clients=clients,
                )
        self._stopping = True
        for task in [self._loop_task, self._begun, *self._watchers]:
            if task is not None:
                task.cancel()
        running, self._running = self._running, {}
        await asyncio.gather(*(self._stop_broker(actor) for actor, _ in running.values()))
        if self._spec.ephemeral:
            nodes = {node.node_id for node in self._nodes.values()}
            await asyncio.gather(
                *(
                    remove_data.options(**probe_options(node_id)).remote(self._spec.data_dir)
                    for node_id in nodes
                ),
                return_exceptions=True,
            )

    async def _clients(self) -> list[str]:
        found: list[str] = []
        for actor, _ in self._running.values():
            try:
                found += await asyncio.wait_for(actor.clients.remote(), _PING_TIMEOUT_S)
            except (RayError, TimeoutError) as error:
                logger.info("a broker does not say who is connected: %s", error)
        return found

    async def _stop_broker(self, actor: Actor) -> None:
        try:
            await asyncio.wait_for(actor.stop.remote(), _CALL_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            logger.warning("a broker did not stop cleanly: %s", error)
        ray.kill(actor)

    # -- beginning -------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        running = await self._adopt()
        nodes = _alive_nodes()
        probes = await self._probe(nodes)
        self._plan, self._nodes = self._decide(nodes, probes)
        for broker_id, (launch, info) in running.items():
            if launch.plan.cluster_id != self._plan.cluster_id:
                raise ForeignDataDir(
                    f"broker {broker_id} of cluster {self._spec.name!r} runs on data of another cluster "
                    f"({launch.plan.cluster_id}) than what is in {self._spec.data_dir} "
                    f"({self._plan.cluster_id})"
                )
            self._nodes[broker_id] = nodes[info.node_id]
        await self._reconcile()
        if not self._running:
            raise self._why_nothing_runs()
        await asyncio.wait_for(
            asyncio.gather(*(actor.ready.remote() for actor, _ in self._running.values())), _CALL_TIMEOUT_S
        )
        self._emptied += self._without_data(nodes, probes)
        await self._reconcile()
        self._loop_task = asyncio.get_running_loop().create_task(self._reconcile_forever())

    async def _adopt(self) -> dict[int, tuple[BrokerLaunch, BrokerInfo]]:
        """Brokers that run already: this actor was restarted, or lost and started anew. Where their data is
        they know better than whoever starts it now."""
        running: dict[int, tuple[BrokerLaunch, BrokerInfo]] = {}
        for broker_id in running_brokers(self._spec.name):
            actor = await self._find_alive(broker_id)
            if actor is None:
                continue
            launch: BrokerLaunch = await asyncio.wait_for(actor.launch.remote(), _PING_TIMEOUT_S)
            info: BrokerInfo = await asyncio.wait_for(actor.start.remote(), _CALL_TIMEOUT_S)
            running[broker_id] = launch, info
            self._spec = msgspec.structs.replace(
                self._spec, data_dir=launch.data_dir, ephemeral=launch.ephemeral, config=launch.config
            )
        return running

    async def _probe(self, nodes: dict[str, Node]) -> list[NodeProbe]:
        """Ask every node for its version and for the data it holds."""
        refs = [probe_node.options(**probe_options(node_id)).remote(self._spec.data_dir) for node_id in nodes]
        try:
            probes: list[NodeProbe] = await asyncio.wait_for(asyncio.gather(*refs), _CALL_TIMEOUT_S)
        except RayError as error:
            raise IncompatibleVersion(
                f"a node of the Ray cluster cannot run raftlog ({error}): install it in the image or "
                "environment of every node"
            ) from error
        versions = {probe.version for probe in probes}
        if versions != {software_version()}:
            raise IncompatibleVersion(
                f"the nodes have raftlog {', '.join(sorted(versions))}, the head has {software_version()}"
            )
        return probes

    def _decide(
        self, nodes: dict[str, Node], probes: list[NodeProbe]
    ) -> tuple[FoundingPlan, dict[int, Node]]:
        """The plan, and which broker runs on which node."""
        spec = self._spec
        where: dict[int, list[str]] = {}
        found: dict[int, Identity | None] = {}
        for probe in probes:
            for broker_id, identity in probe.identities.items():
                before = found.setdefault(broker_id, identity)
                if before is not None and before.disk_id != identity.disk_id:
                    raise ForeignDataDir(
                        f"two nodes hold different data of broker {broker_id} of cluster {spec.name!r}: "
                        "move away the one that does not belong"
                    )
                where.setdefault(broker_id, []).append(probe.node_id)
        count = spec.brokers if spec.brokers is not None else len(nodes)
        if not found:
            if count < 1:
                raise ConfigError(f"brokers={count}: a cluster has at least one")
            found = dict.fromkeys(range(count))
        plan = decide(spec.name, found)
        # Else an identity that is missing has been lost, and the directory must not be founded again.
        self._founding = not set(may_run(plan, found)) <= {each for each in found if found[each] is not None}
        node_ids = sorted(nodes)
        load = Counter(dict.fromkeys(node_ids, 0))
        assigned = {}
        for broker_id in may_run(plan, found):
            # Several nodes see one directory when they share a machine or a file system: spread over them.
            node_id = min(where.get(broker_id, node_ids), key=lambda node_id: (load[node_id], node_id))
            load[node_id] += 1
            assigned[broker_id] = nodes[node_id]
        if len(assigned) <= len(plan.brokers) // 2:
            raise DataDirError(
                f"the data of only {len(assigned)} of the {len(plan.brokers)} brokers of cluster "
                f"{spec.name!r} is here ({spec.data_dir}), which is no majority: bring back the nodes or "
                "directories of the others"
            )
        return plan, assigned

    # -- lost data -------------------------------------------------------------------------------------------

    def _without_data(self, nodes: dict[str, Node], probes: list[NodeProbe]) -> list[Node]:
        """Where to put a new broker for each one whose data are gone: on a node that has none of this
        cluster's data. Where all nodes see the same directories (one machine, a shared file system), on
        any."""
        assert self._plan is not None
        lost = len(self._plan.brokers) - len(self._nodes)
        see_the_same = len({frozenset(probe.identities) for probe in probes}) == 1
        free = [probe.node_id for probe in probes if see_the_same or not probe.identities]
        return [nodes[node_id] for _, node_id in zip(range(lost), itertools.cycle(free), strict=False)]

    async def _join(self, node: Node) -> None:
        """Let a new broker join from an empty directory on this node, and take the place of a lost one."""
        assert self._plan is not None
        plan = self._plan
        addresses = tuple(info.address[1:] for _, info in self._running.values())
        joining = JoiningPlan(plan.cluster_id, plan.cluster_name, plan.secret, addresses)
        try:
            broker_id: int = await asyncio.wait_for(
                join_cluster.options(**probe_options(node.node_id)).remote(
                    self._spec.data_dir, joining, node.zone
                ),
                _CALL_TIMEOUT_S,
            )
        except (RayError, RaftlogError, TimeoutError) as error:
            logger.warning("no new broker of %s on node %s yet: %s", self._spec.name, node.node_id, error)
            self._emptied.append(node)
            return
        logger.warning("broker %d of %s is new on node %s", broker_id, self._spec.name, node.node_id)
        self._nodes[broker_id] = node

    async def _replace_lost(self) -> None:
        """Ask a broker to see to it that new ones take the place of lost ones, should there be any. As long
        as there are fewer than were founded, the others may come back."""
        assert self._plan is not None
        if len(self._nodes) < len(self._plan.brokers):
            return
        actor, _ = next(iter(self._running.values()))
        try:
            await asyncio.wait_for(actor.replace_lost.remote(list(self._nodes)), _CALL_TIMEOUT_S)
        except (RayError, RaftlogError, TimeoutError) as error:
            logger.warning("lost brokers of %s are not replaced yet: %s", self._spec.name, error)

    def _why_nothing_runs(self) -> RaftlogError:
        reasons = "; ".join(f"broker {one}: {why}" for one, why in sorted(self._troubles.items()))
        return DataDirError(f"no broker of cluster {self._spec.name!r} could be started: {reasons}")

    # -- keeping it so ---------------------------------------------------------------------------------------

    async def _reconcile_forever(self) -> None:
        while not self._stopping:
            try:
                async with asyncio.timeout(_LOOK_AROUND_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            await self._reconcile()

    async def _reconcile(self) -> None:
        """Have every broker run that has data, and others in the place of those that have lost theirs."""
        started = await self._start_missing()
        if self._emptied and self._running:
            emptied, self._emptied = self._emptied, []
            for node in emptied:
                await self._join(node)
            started |= await self._start_missing()
        if started:
            await self._replace_lost()

    async def _start_missing(self) -> bool:
        """Start what should run and does not, and tell everyone where everyone is. Returns whether anything
        was started."""
        missing = [broker_id for broker_id in self._nodes if broker_id not in self._running]
        if not missing:
            return False
        actors = await asyncio.gather(*(self._place_broker(broker_id) for broker_id in missing))
        if self._founding and not all(actors):
            return False  # no broker of a new cluster runs before every one of them knows who belongs to it
        self._founding = False
        started = await asyncio.gather(
            *(
                self._start_broker(broker_id, actor)
                for broker_id, actor in zip(missing, actors, strict=True)
                if actor
            )
        )
        if not any(started):
            return False
        addresses = {broker_id: info.address for broker_id, (_, info) in self._running.items()}
        await asyncio.gather(
            *(actor.learn.remote(addresses) for actor, _ in self._running.values()), return_exceptions=True
        )
        return True

    async def _place_broker(self, broker_id: int) -> Actor | None:
        """Find the broker's actor or make one, and see that its directory has its identity: it is given one
        while the cluster is founded, and never again."""
        assert self._plan is not None
        actor = await self._find_alive(broker_id)
        try:
            if actor is None:
                node = self._nodes[broker_id]
                launch = BrokerLaunch(
                    cluster=self._spec.name,
                    broker_id=broker_id,
                    data_dir=self._spec.data_dir,
                    host=self._spec.host or node.host,
                    plan=self._plan,
                    zone=node.zone,
                    config=self._spec.config,
                    ephemeral=self._spec.ephemeral,
                )
                options = broker_options(self._spec.name, broker_id, node.node_id)
                actor = BrokerActor.options(**options).remote(launch)
            if self._founding:
                await asyncio.wait_for(actor.found.remote(), _CALL_TIMEOUT_S)
            elif not await asyncio.wait_for(actor.has_data.remote(), _CALL_TIMEOUT_S):
                self._emptied.append(self._nodes.pop(broker_id))
                logger.error("broker %d of %s has lost its data", broker_id, self._spec.name)
                ray.kill(actor)
                return None
        except (RayError, RaftlogError, TimeoutError, ValueError) as error:
            # ValueError: the name of the actor that died is not free yet.
            self._failed_to_start(broker_id, actor, error)
            return None
        return actor

    def _failed_to_start(self, broker_id: int, actor: Actor | None, error: Exception) -> None:
        self._troubles[broker_id] = str(error) or type(error).__name__  # a TimeoutError says nothing
        logger.warning("broker %d of %s does not start: %s", broker_id, self._spec.name, error)
        if actor is not None and not isinstance(error, RayActorError):
            ray.kill(actor)
        asyncio.get_running_loop().call_later(_RETRY_S, self._wake.set)

    async def _start_broker(self, broker_id: int, actor: Actor) -> bool:
        """True when it runs."""
        try:
            info: BrokerInfo = await asyncio.wait_for(actor.start.remote(), _CALL_TIMEOUT_S)
        except (RayError, RaftlogError, TimeoutError) as error:
            self._failed_to_start(broker_id, actor, error)
            return False
        self._troubles.pop(broker_id, None)
        self._running[broker_id] = (actor, info)
        watcher = asyncio.get_running_loop().create_task(self._watch(broker_id, actor))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return True

    async def _find_alive(self, broker_id: int) -> Actor | None:
        """A broker that runs already (this actor was restarted); a name may also belong to a dead one."""
        actor = find_broker(self._spec.name, broker_id)
        if actor is None:
            return None
        try:
            await asyncio.wait_for(actor.info.remote(), _PING_TIMEOUT_S)
        except RayActorError:
            return None
        except TimeoutError:
            logger.warning("broker %d of %s does not answer", broker_id, self._spec.name)
        return actor

    async def _watch(self, broker_id: int, actor: Actor) -> None:
        """Wait for the end of a broker, and have it started again."""
        try:
            reason, removed = await actor.watch.remote()
            ray.kill(actor)
            if removed:
                self._nodes.pop(broker_id, None)
        except RayError as error:
            reason = str(error).splitlines()[0]
        if self._stopping:
            return
        logger.warning("broker %d of %s ended: %s", broker_id, self._spec.name, reason)
        self._running.pop(broker_id, None)
        self._wake.set()


def _alive_nodes() -> dict[str, Node]:
    """Every node that is alive, by id."""
    return {
        node["NodeID"]: Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            str(node.get("Labels", {}).get("ray.io/availability-zone", "")),
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    }


MetadataActor: Any = ray.remote(MetadataHost)
