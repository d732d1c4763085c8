"""A new broker joins a running cluster, and a wiped disk comes back as one.

Any broker of the cluster has the newcomer added: the metadata group gives it a broker id and an id for its
replica of the metadata group. With these it writes its identity and starts like any other. Its replica
begins with the group's first configuration, in which it is not, so it cannot vote before the group's leader
has made it a learner, brought it up to date, and perhaps a voter.

The disk id is on the disk before anyone is asked: whoever asks again after a crash is given the same ids.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from random import Random, SystemRandom
from typing import Final

from raftlog.errors import ForeignDataDir, RaftlogError, RequestTimeout
from raftlog.net.connection import RpcConnection
from raftlog.net.handshake import Local
from raftlog.net.network import Seams
from raftlog.net.rpc import JoinRequest, JoinResponse
from raftlog.state.metadata import MetadataState
from raftlog.storage.checked_file import seal, unseal
from raftlog.storage.disk import Disk
from raftlog.storage.identity import Identity, find_identity, store_identity
from raftlog.storage.manifest import MANIFEST_PATH

logger = logging.getLogger("raftlog.broker")

JOINING_PATH: Final = "JOINING"
_MAGIC: Final = b"RLOGJOIN"
_VERSION: Final = 1
_CALL_TIMEOUT_S: Final = 5.0
_AGAIN_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class JoiningPlan:
    """The cluster to join.

    Args:
        cluster_id: its id.
        cluster_name: what users call it.
        secret: proves that the newcomer may belong to it.
        addresses: (host, port) of brokers that run.
    """

    cluster_id: str
    cluster_name: str
    secret: bytes
    addresses: tuple[tuple[str, int], ...]


async def join(
    seams: Seams,
    disk: Disk,
    plan: JoiningPlan,
    *,
    node_id: str,
    zone: str = "",
    level: int = MetadataState.level_max,
    timeout: float = 30.0,
    random: Random | None = None,
) -> Identity:
    """Give an empty directory the identity of a new broker; one that has an identity keeps it.

    Args:
        node_id, zone: where the broker will run.
        level: the newest feature level that its release knows.
        timeout: seconds until the cluster must have answered.
        random: source of the disk id; from the operating system unless given.

    Raises:
        ForeignDataDir: the directory belongs to another cluster.
        RaftlogError: why the cluster refuses, or the last reason why nobody could be asked.
    """
    known = await find_identity(disk)
    if known is not None:
        known.check(cluster_id=plan.cluster_id)
        return known
    disk_id = await _disk_id(disk, SystemRandom() if random is None else random)
    answer = await _ask(seams, plan, JoinRequest(disk_id, node_id, zone, level), timeout)
    identity = Identity(
        cluster_id=plan.cluster_id,
        cluster_name=plan.cluster_name,
        broker_id=answer.broker_id,
        disk_id=disk_id,
        incarnation=0,
        secret=plan.secret,
        metadata_replica=answer.metadata_replica,
        metadata_voters=answer.founders,
        addresses=answer.addresses,
    )
    await store_identity(disk, identity)
    await disk.remove(JOINING_PATH)
    logger.info("a new broker of cluster %s: %d", plan.cluster_name, answer.broker_id)
    return identity


async def _disk_id(disk: Disk, random: Random) -> bytes:
    """The directory's id to be: the one it asked with before, or a new one."""
    if await disk.exists(JOINING_PATH):
        return bytes(unseal(_MAGIC, _VERSION, await disk.read_file(JOINING_PATH), JOINING_PATH))
    if await disk.exists(MANIFEST_PATH):
        raise ForeignDataDir("the data directory has data and no identity: move away what is in it")
    disk_id = random.randbytes(16)
    await disk.replace_file(JOINING_PATH, seal(_MAGIC, _VERSION, disk_id))
    return disk_id


async def _ask(seams: Seams, plan: JoiningPlan, request: JoinRequest, timeout: float) -> JoinResponse:
    """Ask one broker after the other until one answers."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    error: RaftlogError = RequestTimeout("there is nobody to ask", indeterminate=False)
    while loop.time() < deadline:
        for host, port in plan.addresses:
            try:
                return await _ask_one(seams, plan, host, port, request)
            except RaftlogError as refusal:
                if not refusal.retriable:
                    raise
                error = refusal
        await asyncio.sleep(_AGAIN_S)
    raise error


async def _ask_one(
    seams: Seams, plan: JoiningPlan, host: str, port: int, request: JoinRequest
) -> JoinResponse:
    local = Local(plan.cluster_id, "client", client_id="joining")
    connection = await RpcConnection.open(
        seams, host, port, local, plan.secret, purpose="client", timeout=_CALL_TIMEOUT_S
    )
    try:
        response, _ = await connection.call(request, timeout=_CALL_TIMEOUT_S)
    finally:
        connection.close()
    return response
