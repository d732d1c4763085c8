"""The controller's hands on Ray: which nodes there are, whose data they hold, and the actors of the brokers.

Nothing in here waits for a broker: an actor on a node that has just died answers nobody. Starting and joining
go on in the background, and the controller looks again when something has come of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
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
)
from raftlog.actors.options import Actor, broker_options, probe_options
from raftlog.broker.founding import FoundingPlan
from raftlog.broker.joining import JoiningPlan
from raftlog.controller.controller import Surroundings
from raftlog.controller.reconcile import JoinBroker, Node, StartBroker
from raftlog.errors import Busy, ClusterInUse, IncompatibleVersion, RaftlogError
from raftlog.telemetry.logs import log_event
from raftlog.version import software_version

logger = logging.getLogger("raftlog.actors")

CALL_TIMEOUT_S: Final = 30.0
PING_TIMEOUT_S: Final = 5.0
_RETRY_S: Final = 0.5


class ClusterSpec(msgspec.Struct, frozen=True):
    """What ``raftlog.start`` asks for.

    Args:
        name: of the cluster.
        brokers: how many; None: as many as the nodes have, and more or fewer as nodes come and go.
        data_dir: the data directory of this cluster, on every node; ``~`` and ``$VARIABLES`` are those of
            the node.
        ephemeral: the data goes with the cluster.
        config: settings of the brokers.
        host: address that brokers bind to; None: their node's own.
        brokers_per_node: for nodes with many cores.
        replace_after_s: a broker that is away for longer is replaced.
    """

    name: str
    brokers: int | None
    data_dir: str
    ephemeral: bool = False
    config: dict[str, object] = {}
    host: str | None = None
    brokers_per_node: int = 1
    replace_after_s: float = 30.0

    def unlike(self, running: ClusterSpec) -> dict[str, object]:
        """What a cluster that runs was started with, where this asks for something else, and not only for
        what is asked for by default."""
        default = ClusterSpec(self.name, None, self.data_dir)
        return {
            field: getattr(running, field)
            for field in ("brokers", "brokers_per_node", "replace_after_s")
            if getattr(self, field) not in (getattr(default, field), getattr(running, field))
        }


class RayNode(msgspec.Struct, frozen=True):
    """A node of the Ray cluster: its address as Ray knows it, and its availability zone (or "")."""

    node_id: str
    host: str
    zone: str


class RayHands:
    """Starts, watches and stops the brokers of a cluster.

    Args:
        spec: of the cluster.
        wake: called when something has changed that the controller should look at.

    Attributes:
        running: broker id -> its actor, and where it runs.
        troubles: broker id -> why it does not run.
        gone: brokers that have lost their data.
    """

    def __init__(self, spec: ClusterSpec, wake: Callable[[], None]) -> None:
        self.spec = spec
        self.plan: FoundingPlan | None = None
        self.running: dict[int, tuple[Actor, BrokerInfo]] = {}
        self.troubles: dict[int, str] = {}
        self._wake = wake
        self._disks: dict[str, set[int]] = {}
        """Node -> brokers whose data it holds, as far as it was asked."""
        self._nodes: dict[str, RayNode] = {}
        self.gone: set[int] = set()
        self._busy: set[object] = set()
        """Brokers (by id) that are being started, nodes (by id) that are asked what they hold, nodes where
        a new broker is made."""
        self._tasks: set[asyncio.Task[None]] = set()

    # -- what the controller asks ----------------------------------------------------------------------------

    async def look(self) -> Surroundings:
        """The nodes that have said what they hold. Others are asked, and there when they have answered."""
        try:
            self._nodes, draining = alive_nodes(), draining_nodes()
        except Exception as error:  # whatever Ray raises while its control store is away
            raise Busy(f"Ray does not say which nodes there are: {error}") from error
        for node_id in self._nodes.keys() - self._disks.keys():
            self._begin(node_id, self._ask(node_id))
        for node_id in self._disks.keys() - self._nodes.keys():
            del self._disks[node_id]
        busy = {each for each in self._busy if isinstance(each, int)}
        return Surroundings(
            {
                node_id: Node(node_id, self._nodes[node_id].zone, node_id in draining, frozenset(disks))
                for node_id, disks in self._disks.items()
            },
            frozenset(self.running.keys() | busy),
            frozenset(self.gone),
            any(isinstance(each, RayNode) for each in self._busy),
        )

    async def start(self, action: StartBroker) -> None:
        """Begin to start a broker."""
        self._begin(action.broker_id, self._start(action.broker_id, action.node_id))

    async def start_all(self, actions: Iterable[StartBroker]) -> None:
        """Start these, and wait until each runs or has said why not."""
        await asyncio.gather(*(self._start(action.broker_id, action.node_id) for action in actions))

    async def join(self, action: JoinBroker) -> None:
        """Begin to make a new broker; it is started like any other."""
        node = self._nodes[action.node_id]
        self._begin(node, self._join(node))

    def _begin(self, what: object, work: Coroutine[Any, Any, None]) -> None:
        """Run it in the background, once at a time."""
        if what in self._busy:
            work.close()
            return
        self._busy.add(what)
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._busy.discard(what)
            if not task.cancelled() and task.exception() is not None:
                logger.error("%s of %s failed", what, self.spec.name, exc_info=task.exception())
            self._wake()

        task.add_done_callback(done)

    # -- nodes -----------------------------------------------------------------------------------------------

    async def probe(self, node_ids: Iterable[str]) -> list[NodeProbe]:
        """Ask nodes for their version and for the data they hold.

        Raises:
            IncompatibleVersion: one of them cannot run raftlog, or has another version.
        """
        refs = [
            probe_node.options(**probe_options(node_id)).remote(self.spec.data_dir) for node_id in node_ids
        ]
        try:
            probes: list[NodeProbe] = await asyncio.wait_for(asyncio.gather(*refs), CALL_TIMEOUT_S)
        except RayError as error:
            raise IncompatibleVersion(
                f"a node of the Ray cluster cannot run raftlog ({error}): install it in the image or "
                "environment of every node"
            ) from error
        versions = {probe.version for probe in probes}
        if versions - {software_version()}:
            raise IncompatibleVersion(
                f"the nodes have raftlog {', '.join(sorted(versions))}, the head has {software_version()}"
            )
        for probe in probes:
            self._disks[probe.node_id] = {
                broker_id
                for broker_id, identity in probe.identities.items()
                if self.plan is None or identity.cluster_id == self.plan.cluster_id
            }
        return probes

    async def _ask(self, node_id: str) -> None:
        try:
            await self.probe([node_id])
        except (IncompatibleVersion, TimeoutError) as error:
            logger.warning("node %s gets no broker of %s: %s", node_id, self.spec.name, error)
            await asyncio.sleep(_RETRY_S)

    def has(self, broker_id: int, node_id: str) -> None:
        """That node has that broker's data."""
        self._disks.setdefault(node_id, set()).add(broker_id)
        self._nodes = self._nodes or alive_nodes()

    async def _join(self, node: RayNode) -> None:
        """Let a new broker join from an empty directory on this node."""
        plan = self.plan
        assert plan is not None, "the cluster runs"
        addresses = tuple(info.address[1:] for _, info in self.running.values())
        joining = JoiningPlan(plan.cluster_id, plan.cluster_name, plan.secret, addresses)
        options = probe_options(node.node_id)
        try:
            work = join_cluster.options(**options).remote(self.spec.data_dir, joining, node.zone)
            broker_id: int = await asyncio.wait_for(work, CALL_TIMEOUT_S)
        except (RayError, RaftlogError, TimeoutError) as error:
            logger.warning("no new broker of %s on node %s yet: %s", self.spec.name, node.node_id, error)
            return
        self._log("broker_joined", broker_id, f"is new on node {node.node_id}", node=node.node_id)
        self.has(broker_id, node.node_id)

    # -- brokers ---------------------------------------------------------------------------------------------

    def _log(self, event: str, broker_id: int, what: str, **fields: object) -> None:
        message, name = "broker %d of %s %s", self.spec.name
        log_event(logger, logging.WARNING, event, message, broker_id, name, what, broker=broker_id, **fields)

    def actor_on(self, broker_id: int, node: RayNode) -> Actor:
        """A new actor for a broker."""
        assert self.plan is not None
        launch = BrokerLaunch(
            cluster=self.spec.name,
            broker_id=broker_id,
            data_dir=self.spec.data_dir,
            host=self.spec.host or node.host,
            plan=self.plan,
            zone=node.zone,
            config=self.spec.config,
            ephemeral=self.spec.ephemeral,
        )
        options = broker_options(self.spec.name, broker_id, node.node_id)
        return BrokerActor.options(**options).remote(launch)

    async def _start(self, broker_id: int, node_id: str) -> None:
        """Find the broker's actor or make one, and have it serve. A directory is given an identity while the
        cluster is founded, and never again."""
        actor = await self.find_alive(broker_id)
        try:
            if actor is None:
                actor = self.actor_on(broker_id, (self._nodes or alive_nodes())[node_id])
            if not await asyncio.wait_for(actor.has_data.remote(), CALL_TIMEOUT_S):
                self._log("broker_data_lost", broker_id, "has lost its data", node=node_id)
                self._disks[node_id].discard(broker_id)
                self.gone.add(broker_id)
                ray.kill(actor)
                return
            info = await asyncio.wait_for(actor.start.remote(), CALL_TIMEOUT_S)
        except (RayError, RaftlogError, TimeoutError, ValueError, KeyError) as error:
            # ValueError: the name of the actor that died is not free yet. KeyError: the node has just gone.
            await self._failed(broker_id, actor, error)
            return
        self.runs(broker_id, actor, info)
        self.introduce()

    async def _failed(self, broker_id: int, actor: Actor | None, error: Exception) -> None:
        self.troubles[broker_id] = str(error) or type(error).__name__  # a TimeoutError says nothing
        self._log("broker_not_started", broker_id, f"does not start: {error}")
        if actor is not None and not isinstance(error, RayActorError):
            ray.kill(actor)
        await asyncio.sleep(_RETRY_S)

    def runs(self, broker_id: int, actor: Actor, info: BrokerInfo) -> None:
        """A broker runs; from here on it is watched."""
        self.troubles.pop(broker_id, None)
        self.gone.discard(broker_id)
        self.running[broker_id] = (actor, info)
        self._begin(("watch", broker_id), self._watch(broker_id, actor))

    def introduce(self) -> None:
        """Tell every broker where the others are."""
        addresses = {broker_id: info.address for broker_id, (_, info) in self.running.items()}
        for actor, _ in self.running.values():
            actor.learn.remote(addresses)

    async def find_alive(self, broker_id: int) -> Actor | None:
        """A broker that runs already (this process is not its first controller); a name may also belong to a
        dead one."""
        actor = find_broker(self.spec.name, broker_id)
        if actor is None:
            return None
        try:
            await asyncio.wait_for(actor.info.remote(), PING_TIMEOUT_S)
        except RayActorError:
            return None
        except TimeoutError:
            logger.warning("broker %d of %s does not answer", broker_id, self.spec.name)
        return actor

    async def _watch(self, broker_id: int, actor: Actor) -> None:
        """Wait for the end of a broker: a call that it answers only then is always pending."""
        try:
            reason, removed = await actor.watch.remote()
            ray.kill(actor)
            if removed:
                for disks in self._disks.values():
                    disks.discard(broker_id)
        except RayError as error:
            reason = str(error).splitlines()[0]
        self._log("broker_process_ended", broker_id, f"ended: {reason}")
        self.running.pop(broker_id, None)

    # -- the end ---------------------------------------------------------------------------------------------

    async def check_unused(self, ignore: tuple[str, ...]) -> None:
        """Raise ClusterInUse if clients other than these are connected."""
        clients = sorted(set(await self._clients()) - set(ignore))
        if clients:
            raise ClusterInUse(
                f"cluster {self.spec.name!r} is in use by {len(clients)} clients: {', '.join(clients)}",
                clients=clients,
            )

    async def _clients(self) -> list[str]:
        found: list[str] = []
        for actor, _ in self.running.values():
            try:
                found += await asyncio.wait_for(actor.clients.remote(), PING_TIMEOUT_S)
            except (RayError, TimeoutError) as error:
                logger.info("a broker does not say who is connected: %s", error)
        return found

    async def stop(self) -> None:
        """Stop every broker cleanly."""
        for task in list(self._tasks):
            task.cancel()
        running, self.running = self.running, {}
        await asyncio.gather(*(self._stop_broker(actor) for actor, _ in running.values()))

    async def _stop_broker(self, actor: Actor) -> None:
        try:
            await asyncio.wait_for(actor.stop.remote(), CALL_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            logger.warning("a broker did not stop cleanly: %s", error)
        ray.kill(actor)


def alive_nodes() -> dict[str, RayNode]:
    """Every node that is alive and offers CPUs, by id. On one without (a head that is kept free of work) Ray
    would never place a broker."""
    return {
        node["NodeID"]: RayNode(
            node["NodeID"],
            node["NodeManagerAddress"],
            str(node.get("Labels", {}).get("ray.io/availability-zone", "")),
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0
    }


def draining_nodes() -> Mapping[str, int]:
    """Nodes that Ray is about to take away (preempted, scaled down, ``ray drain-node``), by id.

    Ray has no public way to ask. Where the private one is missing or has changed, nodes go without warning,
    and what they held is made anew afterwards.
    """
    state: Any = getattr(ray._private, "state", None)
    ask = getattr(getattr(state, "state", None), "get_draining_nodes", None)
    if ask is None:
        return {}
    found = ask()
    return found if isinstance(found, dict) else {}
