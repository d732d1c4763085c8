"""Where raftlog's actors are placed, what they reserve, and how they are named."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

NAMESPACE: Final = "raftlog"
Actor: TypeAlias = Any
"""A Ray actor handle. (Ray types what ``.remote()`` returns as a union that no method can be called on.)"""
Ref: TypeAlias = Any
"""A Ray ObjectRef."""
_CPU_SLIVER: Final = 0.01
"""Of a core: an actor that reserves nothing can be placed on a node that has nothing, and one reserves 1 by
default."""
_HEAD_SLIVER: Final = 0.001

_ENVIRONMENT: Final = {
    # Ray runs workers at niceness 15: a broker must not be the first to starve when the node is busy.
    "env_vars": {"RAY_worker_niceness": "0"}
}


def metadata_name(cluster: str) -> str:
    """Name of the metadata actor."""
    return f"{cluster}:metadata"


def broker_name(cluster: str, broker_id: int) -> str:
    """Name of a broker's actor."""
    return f"{cluster}:broker-{broker_id}"


def metadata_options(cluster: str) -> dict[str, Any]:
    """The metadata actor lives on the head node and is brought back by Ray."""
    return {
        "name": metadata_name(cluster),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": 1000,
        "num_cpus": 0,
        "resources": {"node:__internal_head__": _HEAD_SLIVER},
    }


def broker_options(cluster: str, broker_id: int, node_id: str) -> dict[str, Any]:
    """A broker lives on the node of its data; the controller, not Ray, brings it back."""
    return {
        "name": broker_name(cluster, broker_id),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": 1000,
        "num_cpus": _CPU_SLIVER,
        "label_selector": {"ray.io/node-id": node_id},
        "runtime_env": _ENVIRONMENT,
    }


def probe_options(node_id: str) -> dict[str, Any]:
    """A short task on one node."""
    return {"num_cpus": 0, "max_retries": 2, "label_selector": {"ray.io/node-id": node_id}}


def promises_options() -> dict[str, Any]:
    """The promises actor belongs to one process of a job and goes with it."""
    return {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": 1000}


def processor_options() -> dict[str, Any]:
    """Workers of ``log.process`` belong to the job, and are brought back by Ray: what they do may be done
    again. They run user code, at the niceness of user code."""
    return {"num_cpus": _CPU_SLIVER, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 4}
