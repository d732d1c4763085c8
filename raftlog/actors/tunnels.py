"""Connections to brokers through calls of their actors (``raftlog.net.tunnel``), for who reaches no port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

import ray
from ray.exceptions import RayError

from raftlog.actors.broker import find_broker, running_brokers
from raftlog.actors.launch import attach_ray
from raftlog.actors.options import Actor
from raftlog.client.connections import Address
from raftlog.errors import ConnectionLost
from raftlog.net.network import StreamProtocol, seen
from raftlog.net.tunnel_dial import dial

LOOK_S: Final = 2.0
"""How long actors may take to say where they are."""


class ActorTunnels:
    """Dials the brokers of a cluster by their addresses, as the metadata tell them, and calls their actors.

    For one event loop.

    Args:
        cluster: its name.
    """

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster
        self._actors: dict[Address, Actor] = {}
        self._look: asyncio.Task[None] | None = None

    async def addresses(self) -> list[Address]:
        """Where the brokers are whose actors answer now.

        Raises:
            NoRay: this process is not attached to Ray, and there is none here.
        """
        await self._look_again()
        return list(self._actors)

    async def connect(
        self, protocol_factory: Callable[[], StreamProtocol], host: str, port: int, *, timeout: float
    ) -> tuple[asyncio.Transport, StreamProtocol]:
        """As ``Network.connect``.

        Raises:
            ConnectionLost: no actor has a broker at this address, or it does not answer.
            NoRay: as :meth:`addresses`.
        """
        address = host, port
        known = self._actors.get(address)
        if known is None:
            await self._look_again()
            known = self._actors.get(address)
        if known is None:
            raise ConnectionLost(f"no actor of cluster {self._cluster!r} has a broker at {host}:{port}")
        peer = f"the actor of the broker at {host}:{port}"
        try:
            return await dial(partial(_call, known), protocol_factory, peer, timeout=timeout)
        except ConnectionLost:
            self._actors.pop(address, None)  # another one may be in its place
            raise

    async def _look_again(self) -> None:
        if self._look is None or self._look.done():
            self._look = asyncio.get_running_loop().create_task(self._find())
            self._look.add_done_callback(seen)
        await asyncio.shield(self._look)

    async def _find(self) -> None:
        self._actors = await asyncio.get_running_loop().run_in_executor(None, _find_all, self._cluster)


def _find_all(cluster: str) -> dict[Address, Actor]:
    """The brokers' actors that answer, by the addresses of their brokers. Blocks."""
    attach_ray()
    asked = {
        actor.info.remote(): actor
        for broker_id in running_brokers(cluster)
        if (actor := find_broker(cluster, broker_id)) is not None
    }
    if not asked:
        return {}
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_S)
    found: dict[Address, Actor] = {}
    for ref in answered:
        try:
            info = ray.get(ref)
        except RayError:  # it has just died
            continue
        if info is not None:
            _, host, port = info.address
            found[host, port] = asked[ref]
    return found


def _call(actor: Actor, message: bytes) -> asyncio.Future[bytes]:
    future: asyncio.Future[bytes] = asyncio.wrap_future(actor.exchange.remote(message).future())
    return future
