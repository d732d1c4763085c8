"""A simulated network: byte streams with delays, odd chunks, back-pressure and faults, in virtual time.

:class:`SimNetwork` is the world; each node gets its ``Network`` seam from ``for_node``. Addresses are made
up. Bytes of one connection arrive in order, as TCP's do; between connections nothing is ordered.

=================  ====================================================================================
fault              what the nodes see
=================  ====================================================================================
cut                a black hole, in one direction or both: nothing arrives, nobody is told, connecting hangs.
                   After ``heal`` some of the connections go on with their bytes late; some have broken
clog               bytes of one direction arrive only after some seconds
read_slowly        a node takes bytes off its connections at a low rate: back-pressure
break_connections  both ends are reset
loop.kill          peers see an end or a reset, after what was in flight; connecting is refused
power_cut          peers hear nothing until the host is back (``for_node``); then they are reset
=================  ====================================================================================
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Final

from raftlog.errors import ConnectionLost
from raftlog.net.network import StreamProtocol
from raftlog.testing.loop import SimLoop, SimNode, current_node
from raftlog.testing.transport import END, OPENED, Link, Pipe, SimTransport, reset

Address = tuple[str, int]
ProtocolFactory = Callable[[], StreamProtocol]

FIRST_FREE_PORT: Final = 40_000
CONNECT_RETRY_SECONDS: Final = 1.0
"""How often a connection attempt into a black hole is repeated (as the kernel repeats a SYN)."""
BREAK_PROBABILITY: Final = 0.3
"""That a connection whose bytes fell into a black hole does not survive it."""
HEAL_DELAY_MAX: Final = 1.0
"""Seconds until TCP notices that a black hole has closed."""
WINDOWS: Final = (16 * 1024, 64 * 1024, 256 * 1024)


class SimListener:
    """A listening socket of the simulated network."""

    def __init__(self, world: SimNetwork, address: Address, factory: ProtocolFactory, node: SimNode) -> None:
        self._world = world
        self._address = address
        self.factory = factory
        self.node = node
        self.context = copy_context()

    @property
    def address(self) -> Address:
        return self._address

    def close(self) -> None:
        self._world._unlisten(self)


class SimNetwork:
    """The world that all nodes share.

    Args:
        loop: in whose virtual time it runs. rng: draws delays, chunks, windows, and how connections end.
        latency: (least, most) seconds that bytes travel between two nodes, unless ``set_latency`` says
        otherwise.
    """

    def __init__(
        self, loop: SimLoop, rng: random.Random, *, latency: tuple[float, float] = (0.0001, 0.002)
    ) -> None:
        self.loop = loop
        self.random = rng
        self._latency = latency
        self._links: dict[tuple[str, str], Link] = {}
        self._hosts: dict[str, str] = {}
        self._down: set[str] = set()
        self._read_rates: dict[str, float] = {}
        self._listeners: dict[Address, SimListener] = {}
        self._transports: dict[SimTransport, None] = {}
        self._next_port = FIRST_FREE_PORT
        self._context = Context()  # of the network itself: belongs to no node
        loop.on_kill.append(self._on_kill)

    def for_node(self, name: str, host: str) -> NodeNetwork:
        """The Network of node ``name`` on ``host`` (several nodes may share one). The host is up from now
        on."""
        self._hosts.setdefault(host, name)
        self._down.discard(name)
        for transport in self._transports:
            if transport.node.name == name:
                transport.is_silent = False
        return NodeNetwork(self, name, host)

    # -- faults ----------------------------------------------------------------------------------------------

    def cut(self, a: str, b: str, *, both: bool = True) -> None:
        """From now on nothing from node ``a`` arrives at node ``b`` (with ``both``: nor the other way)."""
        self.link(a, b).is_cut = True
        if both:
            self.link(b, a).is_cut = True

    def partition(self, *groups: list[str]) -> None:
        """Cut every node of a group from all nodes of the other groups."""
        for group in groups:
            for other in groups:
                if other is not group:
                    for a in group:
                        for b in other:
                            self.cut(a, b, both=False)

    def heal(self, a: str | None = None, b: str | None = None) -> None:
        """End the cuts between ``a`` and ``b``; of ``a`` with everybody; or, without arguments, all."""
        healed = set()
        for (source, target), link in self._links.items():
            if link.is_cut and (a is None or a in (source, target)) and (b is None or b in (source, target)):
                link.is_cut = False
                healed.add((source, target))
        for transport in list(self._transports):
            ends = transport.node.name, transport.peer.node.name
            if ends in healed:
                was_cut = transport.outgoing.heal(self.random.uniform(0, HEAL_DELAY_MAX))
                if was_cut and self.random.random() < BREAK_PROBABILITY:
                    self._break(transport)
            if (ends[1], ends[0]) in healed:
                transport.outgoing.acknowledge()

    def clog(self, a: str, b: str, seconds: float) -> None:
        """What travels from ``a`` to ``b`` arrives only after ``seconds`` from now."""
        self.link(a, b).clogged_until = self.loop.time() + seconds

    def set_latency(self, a: str, b: str, least: float, most: float) -> None:
        """Seconds that bytes travel from ``a`` to ``b``, from now on."""
        self.link(a, b).latency = (least, most)

    def read_slowly(self, name: str, rate: float | None) -> None:
        """The node reads so many bytes per second of each of its connections from now on; None: as they
        come."""
        self._read_rates.pop(name, None)
        if rate is not None:
            self._read_rates[name] = rate
        for (_, target), link in self._links.items():
            if target == name:
                link.read_rate = rate

    def break_connections(self, a: str, b: str) -> int:
        """Reset all connections between ``a`` and ``b``; returns how many."""
        broken = [
            transport
            for transport in self._transports
            if {transport.node.name, transport.peer.node.name} == {a, b}
        ]
        for transport in broken:
            transport.incoming.interrupt(reset("connection reset by the network"))
        return len(broken) // 2

    def power_cut(self, name: str) -> None:
        """Kill the node and its host: peers are not told."""
        self._down.add(name)
        self.loop.kill(name)

    def link(self, a: str, b: str) -> Link:
        """The direction from ``a`` to ``b``."""
        link = self._links.get((a, b))
        if link is None:
            link = self._links[a, b] = Link(self._latency)
            link.read_rate = self._read_rates.get(b)
        return link

    def _forget_gone(self) -> None:
        self._transports = {
            transport: None
            for transport in self._transports
            if not (transport.is_gone and transport.peer.is_gone)
        }

    def _break(self, transport: SimTransport) -> None:
        for end in (transport, transport.peer):
            end.incoming.interrupt(reset("connection timed out"))

    def _on_kill(self, node: SimNode) -> None:
        for listener in [listener for listener in self._listeners.values() if listener.node is node]:
            self._unlisten(listener)
        is_down = node.name in self._down
        for transport in [transport for transport in self._transports if transport.node is node]:
            news = END if self.random.random() < 0.5 else reset("connection reset by peer")
            transport.die(None if is_down else news)

    # -- listening and connecting ----------------------------------------------------------------------------

    def _listen(self, node: SimNode, host: str, port: int, factory: ProtocolFactory) -> SimListener:
        if port == 0:
            port = self._free_port()
        address = (host, port)
        if address in self._listeners:
            raise OSError(98, f"address already in use: {host}:{port}")
        listener = self._listeners[address] = SimListener(self, address, factory, node)
        return listener

    def _unlisten(self, listener: SimListener) -> None:
        if self._listeners.get(listener.address) is listener:
            del self._listeners[listener.address]

    def _free_port(self) -> int:
        self._next_port += 1
        return self._next_port

    def _dial(self, node: SimNode, host: str, address: Address, opened: asyncio.Future[None]) -> _Attempt:
        attempt = _Attempt(self, node, host, address, opened, copy_context())
        attempt.start()
        return attempt


class _Attempt:
    """One attempt to connect: what the kernels of both sides do."""

    __slots__ = ("_address", "_context", "_host", "_node", "_opened", "_world", "transport")

    def __init__(
        self,
        world: SimNetwork,
        node: SimNode,
        host: str,
        address: Address,
        opened: asyncio.Future[None],
        context: Context,
    ) -> None:
        self._world = world
        self._node = node
        self._host = host
        self._address = address
        self._opened = opened
        self._context = context
        self.transport: SimTransport | None = None

    def start(self) -> None:
        self._later(self._delay(self._node.name, self._target), self._syn)

    @property
    def _target(self) -> str:
        """The node that answers for the host; "" while there is no such host."""
        return self._world._hosts.get(self._address[0], "")

    def _delay(self, a: str, b: str) -> float:
        return self._world.random.uniform(*self._world.link(a, b).latency)

    def _later(self, delay: float, step: Callable[[], None]) -> None:
        self._world.loop.call_later(delay, step, context=self._world._context)

    def _syn(self) -> None:
        """The attempt reaches the other host."""
        world, listener = self._world, self._world._listeners.get(self._address)
        if self._opened.done() or not self._node.alive:
            return
        target = listener.node.name if listener is not None else self._target
        forth, back = world.link(self._node.name, target), world.link(target, self._node.name)
        wait = max(forth.clogged_until, back.clogged_until) - world.loop.time()
        if forth.is_cut or back.is_cut or target in world._down or not target:
            self._later(CONNECT_RETRY_SECONDS, self._syn)
        elif wait > 0:
            self._later(wait, self._syn)
        elif listener is None:
            self._later(self._delay(target, self._node.name), self._refused)
        else:
            self._accept(listener, forth, back)

    def _refused(self) -> None:
        if not self._opened.done():
            self._opened.set_exception(ConnectionRefusedError("connection refused"))

    def _accept(self, listener: SimListener, forth: Link, back: Link) -> None:
        world = self._world
        loop, rng = world.loop, world.random
        here = Pipe(loop, rng, world._context, forth, back, rng.choice(WINDOWS))
        there = Pipe(loop, rng, world._context, back, forth, rng.choice(WINDOWS))
        dialer: Address = (self._host, world._free_port())
        client = SimTransport(
            self._node, self._context, here, there, {"sockname": dialer, "peername": self._address}
        )
        server = SimTransport(
            listener.node, listener.context, there, here, {"sockname": self._address, "peername": dialer}
        )
        client.peer, server.peer = server, client
        client.opened = self._opened
        self.transport = client
        world._forget_gone()
        world._transports[client] = world._transports[server] = None
        there.signal(OPENED)
        loop.call_soon(_made, server, listener.factory, context=listener.context)


def _made(transport: SimTransport, factory: ProtocolFactory) -> None:
    transport.made(factory())


class NodeNetwork:
    """The Network seam of one node."""

    def __init__(self, world: SimNetwork, name: str, host: str) -> None:
        self.world = world
        self.name = name
        self.host = host

    def _node(self) -> SimNode:
        node = current_node.get()
        assert node is not None, f"run code of node {self.name} with loop.run_as({self.name!r}, …)"
        assert node.name == self.name, f"node {node.name} uses the network of node {self.name}"
        return node

    async def listen(self, protocol_factory: ProtocolFactory, host: str, port: int) -> SimListener:
        if host not in (self.host, "", "0.0.0.0"):
            raise OSError(99, f"cannot assign requested address {host}: this is {self.host}")
        return self.world._listen(self._node(), self.host, port, protocol_factory)

    async def connect(
        self, protocol_factory: ProtocolFactory, host: str, port: int, *, timeout: float
    ) -> tuple[asyncio.Transport, StreamProtocol]:
        opened: asyncio.Future[None] = self.world.loop.create_future()
        attempt = self.world._dial(self._node(), self.host, (host, port), opened)
        try:
            async with asyncio.timeout(timeout):
                await opened
        except BaseException as error:  # also cancelled: nobody will close it
            if attempt.transport is not None:
                attempt.transport.abort()  # given up while the answer was on its way, or had just come
            if isinstance(error, OSError | TimeoutError):
                reason = str(error) or "no answer in time"
                raise ConnectionLost(f"cannot connect to {host}:{port}: {reason}") from error
            raise
        transport = attempt.transport
        assert transport is not None, "opened without a transport"
        protocol = protocol_factory()
        transport.made(protocol)
        return transport, protocol
