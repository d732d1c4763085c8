"""Starting, finding and stopping clusters: what is behind ``raftlog.start``, ``connect`` and ``shutdown``."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Final

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError

from raftlog.actors.broker import find_broker
from raftlog.actors.hands import ClusterSpec
from raftlog.actors.metadata import MetadataActor
from raftlog.actors.options import NAMESPACE, Actor, metadata_name, metadata_options
from raftlog.client.cluster import Bootstrap
from raftlog.config import Environment, default_data_dir
from raftlog.controller.controller import PlannedMove
from raftlog.errors import NoRay, NotRunning, RaftlogError

logger = logging.getLogger("raftlog.actors")

START_TIMEOUT_S: Final = 120.0
_STEP_S: Final = 5.0
_POLL_S: Final = 0.1
_LOOPBACK: Final = "127.0.0.1"


def start(
    name: str = "default",
    brokers: int | None = None,
    data_dir: str | Path | None = None,
    ephemeral: bool = False,
    *,
    config: dict[str, object] | None = None,
    brokers_per_node: int = 1,
    replace_after: float = 30.0,
) -> Bootstrap:
    """Attach to the cluster if it runs; else recover it from its data, or found it.

    Ray is initialised if it is not: the running cluster if there is one, else one of this process.

    Args:
        name: of the cluster.
        brokers: how many there are; None: as many as the nodes of the Ray cluster have.
        data_dir: the cluster's data directory on every node; None: RAFTLOG_DATA_DIR or the user's data
            folder.
        ephemeral: keep the data in a temporary folder, removed at shutdown.
        config: settings of the brokers (``raftlog.config.BrokerConfig``).
        brokers_per_node: for nodes with many cores.
        replace_after: seconds that a broker may be away before it is replaced.

    A cluster that runs keeps what it was started with; a warning says so where something else is asked for.

    Returns:
        How to reach it.

    Raises:
        DataDirError, ConfigError, IncompatibleVersion: why it cannot be started.
    """
    if not ray.is_initialized():
        _init_ray()
    if ephemeral:
        data_dir = Path(tempfile.gettempdir()) / f"raftlog-{uuid.uuid4().hex}"
    environment = Environment.read()
    spec = ClusterSpec(
        name=name,
        brokers=brokers,
        data_dir=str(data_dir or environment.data_dir or default_data_dir(name)),
        ephemeral=ephemeral,
        config={"log_format": environment.log_format, "log_level": environment.log_level, **(config or {})},
        host=_LOOPBACK if _is_ray_of_this_process() else None,
        brokers_per_node=brokers_per_node,
        replace_after_s=replace_after,
    )
    actor = MetadataActor.options(**metadata_options(name)).remote(spec)
    try:
        bootstrap: Bootstrap = _call(actor, "bootstrap", timeout=START_TIMEOUT_S)
        running: ClusterSpec = _call(actor, "spec", timeout=START_TIMEOUT_S)
    except RaftlogError:
        ray.kill(actor)
        raise
    kept = ", ".join(f"{field}={value}" for field, value in spec.unlike(running).items())
    if kept:
        logger.warning("cluster %r runs already, and with %s: stop and start it to change that", name, kept)
    return bootstrap


def find(name: str = "default", timeout: float = 30.0) -> Bootstrap:
    """How to reach a cluster that runs. Never starts Ray.

    Raises:
        NotRunning: no Ray, no such cluster, or it does not answer within ``timeout`` seconds.
    """
    attach_ray()
    deadline = time.monotonic() + timeout
    while True:
        _check_attached()
        try:
            actor = ray.get_actor(metadata_name(name), namespace=NAMESPACE)
        except ValueError:
            raise NotRunning(f"no raftlog cluster {name!r} on this Ray cluster") from None
        left = deadline - time.monotonic()
        try:
            bootstrap: Bootstrap = _call(actor, "bootstrap", timeout=max(min(left, _STEP_S), _POLL_S))
            return bootstrap
        except (RayActorError, GetTimeoutError) as error:
            if left <= 0:
                raise NotRunning(
                    f"the metadata actor of cluster {name!r} does not answer within {timeout:g} s ({error})"
                ) from error
            time.sleep(_POLL_S)  # it is being restarted


def stop(name: str = "default", force: bool = False, ignore: tuple[str, ...] = ()) -> None:
    """Stop a cluster's brokers and its metadata actor; the data stays (unless the cluster is ephemeral).

    Args:
        name: of the cluster.
        force: even though clients are connected.
        ignore: ids of clients that do not count.

    Raises:
        NotRunning: no such cluster.
        ClusterInUse: clients are connected.
    """
    attach_ray()
    try:
        actor = ray.get_actor(metadata_name(name), namespace=NAMESPACE)
    except ValueError:
        raise NotRunning(f"no raftlog cluster {name!r} on this Ray cluster") from None
    _call(actor, "stop", force, ignore, timeout=START_TIMEOUT_S)
    ray.kill(actor)
    _wait_until_gone(name)


def plan(name: str, begin: bool) -> list[PlannedMove]:
    """What the controller of a cluster will move, as things stand.

    Args:
        name: of the cluster.
        begin: have it look at once.

    Raises:
        NotRunning: no such cluster.
    """
    attach_ray()
    moves: list[PlannedMove] = _call(metadata_actor(name), "plan", begin, timeout=START_TIMEOUT_S)
    return moves


def broker_actor(name: str, broker_id: int) -> Actor:
    """The actor that hosts a broker.

    Raises:
        NotRunning: no such broker runs.
    """
    actor = find_broker(name, broker_id)
    if actor is None:
        raise NotRunning(f"no broker {broker_id} of cluster {name!r} runs")
    return actor


def metadata_actor(name: str) -> Actor:
    """The metadata actor of a cluster.

    Raises:
        NotRunning: no such cluster.
    """
    try:
        return ray.get_actor(metadata_name(name), namespace=NAMESPACE)
    except ValueError:
        raise NotRunning(f"no raftlog cluster {name!r} on this Ray cluster") from None


def _check_attached() -> None:
    """A thread that looks for a cluster again must not attach this process to a Ray by itself: where the user
    has just left one, to go to another, Ray would begin anew with the old one at the next call."""
    if not ray.is_initialized():
        raise NotRunning("this process has left its Ray cluster")


def _call(actor: Actor, method: str, *args: object, timeout: float) -> Any:
    """Call a method of the metadata actor; what it raised comes out as it was raised there.

    While Ray is just starting that actor anew it is asked again: all of its methods may be called twice.
    """
    deadline = time.monotonic() + timeout
    while True:
        _check_attached()
        try:
            return ray.get(
                getattr(actor, method).remote(*args), timeout=max(deadline - time.monotonic(), 0.1)
            )
        except ActorUnavailableError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_POLL_S)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RaftlogError):
                raise cause from None
            raise


def _wait_until_gone(name: str) -> None:
    """Until the name can be taken again."""
    deadline = time.monotonic() + _STEP_S
    while time.monotonic() < deadline:
        try:
            ray.get_actor(metadata_name(name), namespace=NAMESPACE)
        except (ValueError, RayError):
            return
        time.sleep(_POLL_S)
    logger.warning("Ray still knows the metadata actor of %r", name)


def _init_ray() -> None:
    """Attach to the Ray cluster of RAY_ADDRESS or of this machine; where none is named and none runs, start a
    local one.

    Raises:
        NoRay: the one that is named does not answer.
    """
    try:
        _attach()
    except NoRay:
        if os.environ.get("RAY_ADDRESS"):
            raise
        logger.info("no Ray cluster found: starting a local one")
        ray.init(address="local", namespace=NAMESPACE, log_to_driver=False, include_dashboard=False)


def attach_ray() -> None:
    """Attach to the Ray cluster of RAY_ADDRESS or of this machine, quietly; never start one.

    Raises:
        NoRay: there is none, or it does not answer.
    """
    if not ray.is_initialized():
        _attach(logging_level=logging.WARNING)


def _attach(**settings: Any) -> None:
    try:
        ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, **settings)
    except ConnectionError as error:
        named = os.environ.get("RAY_ADDRESS")
        if not named:
            raise NoRay("no Ray cluster runs here") from error
        raise NoRay(
            f"the Ray cluster at RAY_ADDRESS={named} does not answer, or does not know this process's token: "
            f"{error}"
        ) from error


def _is_ray_of_this_process() -> bool:
    """Whether this process started its own local Ray: no other machine takes part in it, so brokers need not
    be reachable from any. (Ray has no public way to ask; without an answer brokers bind to their node's
    address.)"""
    node = getattr(ray._private.worker, "_global_node", None)
    return node is not None and bool(node.is_head())
