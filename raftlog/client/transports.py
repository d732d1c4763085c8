"""How a client's bytes reach the brokers: over streams to their ports, or inside calls of their actors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Protocol

from raftlog.client.connections import Address, Bootstrap
from raftlog.errors import ConnectionLost
from raftlog.net.network import Listener, Network, RealNetwork, StreamProtocol, seen

log = logging.getLogger("raftlog.client")

STREAMS_S: Final = 1.0
"""How long "auto" waits for a port to answer."""

_Made = tuple[asyncio.Transport, StreamProtocol]
_Factory = Callable[[], StreamProtocol]


class Tunnels(Protocol):
    """What connects inside calls; see ``raftlog.actors.tunnels``."""

    async def addresses(self) -> list[Address]:
        """Where the brokers are that can be called now."""

    async def connect(self, protocol_factory: _Factory, host: str, port: int, *, timeout: float) -> _Made:
        """As :meth:`Network.connect`."""


class ChosenNetwork:
    """A Network that connects by what was asked for. "auto" means streams, unless actors answer and none of
    their brokers' ports does: then, and for as long as this client lives, their calls.

    Args:
        wanted: "actor" or "auto".
        cluster: name, for the log.
        streams: connects to ports.
        tunnels: connects inside calls.

    Attributes:
        transport: "streams" or "actor"; "auto" until that is known.
    """

    def __init__(self, wanted: str, cluster: str, streams: Network, tunnels: Tunnels) -> None:
        self.transport = wanted
        self._cluster = cluster
        self._streams = streams
        self._tunnels = tunnels
        self._choice: asyncio.Task[None] | None = None

    async def listen(self, protocol_factory: _Factory, host: str, port: int) -> Listener:
        """As :meth:`Network.listen`: whoever listens, does so at a port."""
        return await self._streams.listen(protocol_factory, host, port)

    async def connect(self, protocol_factory: _Factory, host: str, port: int, *, timeout: float) -> _Made:
        """As :meth:`Network.connect`.

        Raises:
            ConnectionLost: neither way leads there.
        """
        if self.transport == "auto":
            try:
                made = await self._streams.connect(
                    protocol_factory, host, port, timeout=min(timeout, STREAMS_S)
                )
            except ConnectionLost:
                await self._choose()
            else:
                self._take("streams", f"{host}:{port} answers")
                return made
        way = self._tunnels if self.transport == "actor" else self._streams
        return await way.connect(protocol_factory, host, port, timeout=timeout)

    async def _choose(self) -> None:
        if self._choice is None or self._choice.done():
            self._choice = asyncio.get_running_loop().create_task(self._look())
            self._choice.add_done_callback(seen)
        await asyncio.shield(self._choice)  # it goes on when who asked has no more time

    async def _look(self) -> None:
        addresses = await self._tunnels.addresses()
        if not addresses:
            raise ConnectionLost(f"neither ports nor actors of cluster {self._cluster!r} answer")
        answers = await asyncio.gather(*(self._answers(address) for address in addresses))
        if any(answers):
            self._take("streams", "a broker's port answers")
        else:
            self._take("actor", f"actors answer, and none of {len(addresses)} brokers' ports")

    async def _answers(self, address: Address) -> bool:
        try:
            transport, _ = await self._streams.connect(asyncio.Protocol, *address, timeout=STREAMS_S)
        except ConnectionLost:
            return False
        transport.abort()
        return True

    def _take(self, transport: str, reason: str) -> None:
        if self.transport == "auto":
            self.transport = transport
            log.info("cluster %r is reached over transport=%r: %s", self._cluster, transport, reason)


def network_for(bootstrap: Bootstrap) -> Network:
    """The network of a client of this process."""
    if bootstrap.transport in (None, "streams"):
        return RealNetwork()
    from raftlog.actors.tunnels import ActorTunnels

    return ChosenNetwork(bootstrap.transport, bootstrap.name, RealNetwork(), ActorTunnels(bootstrap.name))


def transport_of(network: Network) -> str:
    """ "streams", "actor", or "auto" where it is not known yet."""
    return network.transport if isinstance(network, ChosenNetwork) else "streams"
