"""The metadata actor: founds or recovers a cluster, and runs the controller that keeps it as it should be.

It is named, detached, pinned to the head node and restarted by Ray. It holds nothing that cannot be found
again: the cluster's identity is on the brokers' disks, topics and assignments are in the metadata Raft group,
and running brokers are found by their names. Produce and consume go on while it is down.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError

from raftlog.actors.broker import BrokerInfo, BrokerLaunch, NodeProbe, remove_data, running_brokers
from raftlog.actors.hands import (
    CALL_TIMEOUT_S,
    PING_TIMEOUT_S,
    ClusterSpec,
    RayHands,
    RayNode,
    alive_nodes,
)
from raftlog.actors.logs import log_as
from raftlog.actors.metrics import RayMetrics, export
from raftlog.actors.options import metadata_name, probe_options
from raftlog.broker.founding import FoundingPlan, decide, may_run
from raftlog.client.cluster import Bootstrap, ClusterClient
from raftlog.config import BrokerConfig
from raftlog.controller.controller import Controller, PlannedMove
from raftlog.controller.reconcile import Policy, StartBroker
from raftlog.controller.sampling import cluster_samples
from raftlog.errors import ConfigError, DataDirError, ForeignDataDir, RaftlogError
from raftlog.net.network import real_seams
from raftlog.storage.identity import Identity
from raftlog.telemetry.logs import log_event

logger = logging.getLogger("raftlog.actors")


class MetadataHost:
    """The actor's class.

    Args:
        spec: the cluster to run.
    """

    def __init__(self, spec: ClusterSpec) -> None:
        log_as(metadata_name(spec.name), BrokerConfig.model_validate(spec.config))
        self._hands = RayHands(spec, self._changed)
        self._where: dict[int, RayNode] = {}
        """Broker id -> the node of its data, when this began."""
        self._founding = False
        self._controller: Controller | None = None
        self._begun: asyncio.Task[None] = asyncio.get_running_loop().create_task(self._begin())
        self._begun.add_done_callback(_ended)
        self._governing: asyncio.Task[None] | None = None
        self._exporting: asyncio.Task[None] | None = None

    def _changed(self) -> None:
        if self._controller is not None:
            self._controller.wake()

    # -- what handles call -----------------------------------------------------------------------------------

    async def bootstrap(self) -> Bootstrap:
        """How to reach the cluster, once every broker that can run runs.

        Raises:
            DataDirError, IncompatibleVersion, ConfigError: why there is no cluster.
        """
        await asyncio.shield(self._begun)
        return self._reached()

    def _reached(self) -> Bootstrap:
        plan = self._hands.plan
        assert plan is not None, "it has begun"
        addresses = tuple(info.address[1:] for _, info in self._hands.running.values())
        return Bootstrap(plan.cluster_name, plan.cluster_id, plan.secret, addresses)

    async def spec(self) -> ClusterSpec:
        """What it was started with."""
        return self._hands.spec

    async def pid(self) -> int:
        """Of this actor's process."""
        return os.getpid()

    async def brokers(self) -> dict[int, BrokerInfo | str]:
        """Broker id -> where it runs, or why it does not."""
        hands = self._hands
        return {
            broker_id: hands.running[broker_id][1]
            if broker_id in hands.running
            else hands.troubles.get(broker_id, "starting")
            for broker_id in sorted(hands.running.keys() | hands.troubles.keys())
        }

    async def plan(self, begin: bool = False) -> list[PlannedMove]:
        """Everything that the controller will move, as things stand, in its order.

        Args:
            begin: have it look at once.

        Raises:
            RaftlogError: no broker can tell.
        """
        await asyncio.shield(self._begun)
        assert self._controller is not None, "it has begun"
        moves = await self._controller.plan()
        if begin:
            self._controller.wake()
        return moves

    async def stop(self, force: bool, ignore: tuple[str, ...] = ()) -> None:
        """Stop every broker cleanly. The caller kills this actor afterwards.

        Args:
            force: even though clients are connected.
            ignore: ids of clients that do not count (the caller's own).

        Raises:
            ClusterInUse: clients are connected; details: clients.
        """
        if not force:
            await self._hands.check_unused(ignore)
        for task in (self._governing, self._exporting, self._begun):
            if task is not None:
                task.cancel()
        await self._hands.stop()
        spec = self._hands.spec
        if spec.ephemeral:
            removals = [
                remove_data.options(**probe_options(node_id)).remote(spec.data_dir)
                for node_id in alive_nodes()
            ]
            await asyncio.gather(*removals, return_exceptions=True)

    # -- beginning -------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        hands = self._hands
        running = await self._adopt()
        nodes = alive_nodes()
        if running:  # they know best; what else is there is found by asking node after node
            hands.plan = next(launch.plan for launch, _ in running.values())
            self._where = {
                broker_id: nodes[info.node_id]
                for broker_id, (_, info) in running.items()
                if info.node_id in nodes
            }
        else:
            hands.plan, self._where = self._decide(nodes, await hands.probe(nodes))
            for broker_id, node in self._where.items():
                hands.has(broker_id, node.node_id)
        if self._founding:
            await self._found()
        await hands.start_all(StartBroker(broker_id, node.node_id) for broker_id, node in self._where.items())
        if not hands.running:
            reasons = "; ".join(f"broker {one}: {why}" for one, why in sorted(hands.troubles.items()))
            raise DataDirError(f"no broker of cluster {hands.spec.name!r} could be started: {reasons}")
        ready = asyncio.gather(*(actor.ready.remote() for actor, _ in hands.running.values()))
        await asyncio.wait_for(ready, CALL_TIMEOUT_S)
        how = "founded" if self._founding else "adopted" if running else "recovered"
        log_event(
            logger,
            logging.INFO,
            "cluster_running",
            "cluster %s runs with %d brokers: %s",
            hands.spec.name,
            len(hands.running),
            how,
            cluster=hands.spec.name,
            brokers=len(hands.running),
            how=how,
        )
        self._controller = self._make_controller()
        self._governing = asyncio.get_running_loop().create_task(self._controller.run())
        self._governing.add_done_callback(_ended)
        self._exporting = asyncio.get_running_loop().create_task(self._export_metrics(self._controller))

    async def _export_metrics(self, controller: Controller) -> None:
        loop, spec = asyncio.get_running_loop(), self._hands.spec
        interval_ms = BrokerConfig.model_validate(spec.config).metrics_interval_ms
        if interval_ms:
            metrics = RayMetrics(cluster=spec.name)
            await export(
                metrics, interval_ms / 1000, lambda _: list(cluster_samples(controller.view, loop.time()))
            )

    def _make_controller(self) -> Controller:
        spec = self._hands.spec

        async def refresh() -> Bootstrap:
            return self._reached()

        name = f"{spec.name}:metadata"
        client = ClusterClient(real_seams(), self._reached(), name, refresh, role="controller")
        policy = Policy(
            replace_after_ms=int(spec.replace_after_s * 1000),
            brokers=spec.brokers,
            brokers_per_node=spec.brokers_per_node,
        )
        return Controller(client, self._hands, policy)

    async def _found(self) -> None:
        """Give every founding broker's directory its identity: no broker of a new cluster runs before every
        one of them knows who belongs to it."""
        hands = self._hands
        actors = {
            broker_id: await hands.find_alive(broker_id) or hands.actor_on(broker_id, node)
            for broker_id, node in self._where.items()
        }
        work = asyncio.gather(*(actor.found.remote() for actor in actors.values()))
        try:
            await asyncio.wait_for(work, CALL_TIMEOUT_S)
        except BaseException:  # raised again; half a cluster must not stay
            for actor in actors.values():
                ray.kill(actor)
            raise

    async def _adopt(self) -> dict[int, tuple[BrokerLaunch, BrokerInfo]]:
        """Brokers that run already: this actor was restarted, or lost and started anew. Where their data is
        they know better than whoever starts it now."""
        hands = self._hands
        running: dict[int, tuple[BrokerLaunch, BrokerInfo]] = {}
        for broker_id in running_brokers(hands.spec.name):
            actor = await hands.find_alive(broker_id)
            if actor is None:
                continue
            try:
                launch: BrokerLaunch = await asyncio.wait_for(actor.launch.remote(), PING_TIMEOUT_S)
                info: BrokerInfo = await asyncio.wait_for(actor.start.remote(), CALL_TIMEOUT_S)
            except (RayError, TimeoutError) as error:
                logger.warning("broker %d of %s does not answer: %s", broker_id, hands.spec.name, error)
                continue  # its node may have died a moment ago, and Ray does not know yet
            running[broker_id] = launch, info
            hands.spec = msgspec.structs.replace(
                hands.spec, data_dir=launch.data_dir, ephemeral=launch.ephemeral, config=launch.config
            )
        return running

    def _decide(
        self, nodes: dict[str, RayNode], probes: list[NodeProbe]
    ) -> tuple[FoundingPlan, dict[int, RayNode]]:
        """The plan, and which broker runs on which node."""
        spec = self._hands.spec
        if not nodes:
            raise ConfigError("no node of the Ray cluster offers CPUs, and brokers run only on those that do")
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
        count = spec.brokers if spec.brokers is not None else len(nodes) * spec.brokers_per_node
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
                "directories of the others, or see `raftlog recover` if they are lost for good"
            )
        return plan, assigned


def _ended(task: asyncio.Task[None]) -> None:
    """Have Ray start all of this anew when it has met what it does not know. What is wrong with the cluster
    is told to whoever asks for it."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, RaftlogError):
        logger.critical("the metadata actor cannot go on", exc_info=error)
        os._exit(1)


MetadataActor: Any = ray.remote(MetadataHost)
