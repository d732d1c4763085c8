"""One connection per broker, shared by all handles of a process: where brokers are, and how one is reached.

Addresses are soft: the bootstrap's are only where to begin, metadata brings newer ones (the highest
incarnation of a broker counts), and what a broker says of itself in the handshake decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Final

import msgspec

from raftlog.client.retry import is_retriable
from raftlog.errors import Closed, ConnectionLost, IncompatibleVersion, RaftlogError
from raftlog.net.connection import RpcConnection
from raftlog.net.handshake import Local
from raftlog.net.network import Seams, seen
from raftlog.net.rpc import BrokerRow

log = logging.getLogger("raftlog.client")

DIAL_TIMEOUT_S: Final = 3.0
DIALS_AT_ONCE: Final = 3

Address = tuple[str, int]


class Bootstrap(msgspec.Struct, frozen=True):
    """How to reach a cluster. Picklable; found through Ray, or given by ``LocalCluster``."""

    name: str
    cluster_id: str
    secret: bytes
    addresses: tuple[Address, ...]
    transport: str | None = None
    """What :func:`raftlog.connect` was asked for; None: streams, and there is no Ray with other ways."""

    def __repr__(self) -> str:
        return f"Bootstrap(name={self.name!r}, cluster_id={self.cluster_id!r}, addresses={self.addresses!r})"


class Link:
    """What is known of one broker, and the connection to it if there is one."""

    __slots__ = ("address", "broker_id", "connection", "dialing", "incarnation")

    def __init__(self, broker_id: int, address: Address, incarnation: int) -> None:
        self.broker_id = broker_id
        self.address = address
        self.incarnation = incarnation
        self.connection: RpcConnection | None = None
        self.dialing: asyncio.Task[RpcConnection] | None = None

    def open(self) -> RpcConnection | None:
        """The connection, if it is open."""
        connection = self.connection
        return None if connection is None or connection.closed else connection


class Connections:
    """The links to all brokers of a cluster.

    Args:
        seams: network and Random.
        bootstrap: where to begin.
        client_id: who we are in the brokers' logs.
        refresh: asked for a new bootstrap when no known address answers.
        changed: called when a connection was made or lost.
        role: "client" or "controller".
    """

    def __init__(
        self,
        seams: Seams,
        bootstrap: Bootstrap,
        client_id: str,
        refresh: Callable[[], Awaitable[Bootstrap]] | None,
        changed: Callable[[], None],
        role: str = "client",
    ) -> None:
        self._seams = seams
        self._bootstrap = bootstrap
        self._refresh = refresh
        self._changed = changed
        self._local = Local(cluster_id=bootstrap.cluster_id, role=role, client_id=client_id)
        self._dials: dict[Address, asyncio.Task[RpcConnection]] = {}
        self._search: asyncio.Task[RpcConnection] | None = None
        self._closed = False
        self.links: dict[int, Link] = {}

    def open(self, broker_id: int) -> RpcConnection | None:
        """The open connection to a broker, if there is one."""
        link = self.links.get(broker_id)
        return None if link is None else link.open()

    def open_ones(self) -> list[RpcConnection]:
        """Every open connection."""
        return [connection for link in self.links.values() if (connection := link.open()) is not None]

    def learn(self, brokers: Iterable[BrokerRow]) -> None:
        """Take in where brokers are. A connection to an older incarnation is to a process that is gone."""
        for row in brokers:
            if not row.port:
                continue
            link = self.links.get(row.id)
            if link is None:
                self.links[row.id] = Link(row.id, (row.host, row.port), row.incarnation)
            elif row.incarnation > link.incarnation:
                link.address, link.incarnation = (row.host, row.port), row.incarnation
                if link.connection is not None and link.connection.peer.incarnation < row.incarnation:
                    link.connection.close()

    def dial(self, broker_id: int) -> None:
        """Begin to connect to a broker, unless it is connected or under way; ``changed`` tells when it is
        connected. Of a failure nobody is told: who still needs it tries again in time."""
        link = self.links.get(broker_id)
        if link is not None and link.open() is None and not self._closed:
            self._dial(link.address)

    async def to(self, broker_id: int) -> RpcConnection:
        """The connection to one broker, made if there is none.

        Raises:
            ConnectionLost: it cannot be reached, or nobody has said where it is.
        """
        opened = self.open(broker_id)
        if opened is not None:
            return opened
        link = self.links.get(broker_id)
        if link is None or self._closed:
            raise ConnectionLost(f"there is no address of broker {broker_id}")
        connection = await asyncio.shield(self._dial(link.address))
        if connection.peer.broker_id != broker_id:
            raise ConnectionLost(f"broker {broker_id} is not at {link.address} any more")
        return connection

    async def any(self, avoid: Collection[int] = ()) -> RpcConnection:
        """An open connection to whichever broker answers.

        Args:
            avoid: ids of brokers that are asked only if no other can be.

        Raises:
            ConnectionLost: none does (now).
            AuthenticationFailed, IncompatibleVersion: the cluster refuses us.
            Closed: this client was closed.
        """
        if self._closed:
            raise Closed("this client is closed")
        opened = self.open_ones()
        preferred = [connection for connection in opened if connection.peer.broker_id not in avoid]
        if not preferred and avoid:
            others = [link.address for broker_id, link in self.links.items() if broker_id not in avoid]
            with contextlib.suppress(ConnectionLost):
                return await self._first(others)
        if opened:
            return self._seams.random.choice(preferred or opened)
        if self._search is None or self._search.done():
            self._search = asyncio.get_running_loop().create_task(self._find())
            self._search.add_done_callback(seen)
        search = self._search
        try:
            return await asyncio.shield(search)  # it goes on when who asked has no more time
        except asyncio.CancelledError:
            if search.cancelled():
                raise Closed("this client is closed") from None
            raise

    async def _find(self) -> RpcConnection:
        """A connection to any broker, at the addresses known; if none answers, at those that come to be."""
        known = [link.address for link in self.links.values()]
        try:
            return await self._first([*dict.fromkeys([*known, *self._bootstrap.addresses])])
        except ConnectionLost:
            if self._refresh is None:
                raise
        self._bootstrap = await self._refresh()
        return await self._first(list(self._bootstrap.addresses))

    async def _first(self, addresses: list[Address]) -> RpcConnection:
        """The first of these that answers, a few dialed at a time. One that speaks no version of ours is not
        all: others may, while releases are replaced."""
        error: RaftlogError = ConnectionLost(f"no address of cluster {self._bootstrap.name!r} is known")
        stranger: IncompatibleVersion | None = None
        self._seams.random.shuffle(addresses)
        for start in range(0, len(addresses), DIALS_AT_ONCE):
            pending = {self._dial(address) for address in addresses[start : start + DIALS_AT_ONCE]}
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    failure = task.exception() if not task.cancelled() else Closed("this client is closed")
                    if failure is None:
                        return task.result()
                    if isinstance(failure, IncompatibleVersion):
                        stranger = failure
                    elif not isinstance(failure, RaftlogError) or not is_retriable(failure):
                        raise failure
                    else:
                        error = failure
        if stranger is not None:
            raise stranger
        way = ""
        if self._bootstrap.transport == "streams":
            way = "; a client that cannot reach these ports connects with transport='actor'"
        raise ConnectionLost(
            f"no broker of cluster {self._bootstrap.name!r} answers at "
            + ", ".join(f"{host}:{port}" for host, port in addresses)
            + way
        ) from error

    def _dial(self, address: Address) -> asyncio.Task[RpcConnection]:
        task = self._dials.get(address)
        if task is None:
            task = self._dials[address] = asyncio.get_running_loop().create_task(self._open(address))
            task.add_done_callback(lambda done: self._dialed(address, done))
        return task

    async def _open(self, address: Address) -> RpcConnection:
        connection = await RpcConnection.open(
            self._seams,
            *address,
            self._local,
            self._bootstrap.secret,
            purpose="client",
            timeout=DIAL_TIMEOUT_S,
            on_close=self._lost,
        )
        return self._adopt(connection, address)

    def _dialed(self, address: Address, task: asyncio.Task[RpcConnection]) -> None:
        """Nothing has changed unless :meth:`_adopt` said so: who looks for a leader would dial again at once,
        and who listens there, if anybody, would get no rest."""
        self._dials.pop(address, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("cannot reach %s:%d: %s", *address, error)

    def _adopt(self, connection: RpcConnection, address: Address) -> RpcConnection:
        """Put a new connection where it belongs; the peer says which broker it is."""
        if self._closed:
            connection.close()
            raise Closed("this client is closed")
        peer = connection.peer
        link = self.links.setdefault(peer.broker_id, Link(peer.broker_id, address, peer.incarnation))
        present = link.open()
        if present is not None and present.peer.incarnation >= peer.incarnation:
            connection.close()
            return present
        link.connection = connection
        if peer.incarnation >= link.incarnation:
            link.address, link.incarnation = peer.address or address, peer.incarnation
        if present is not None:
            present.close()
        self._changed()
        return connection

    def _lost(self, connection: RpcConnection, error: Exception | None) -> None:
        link = self.links.get(connection.peer.broker_id)
        if link is not None and link.connection is connection:
            link.connection = None
            if not self._closed:
                log.debug("connection to broker %d ended: %s", link.broker_id, error)
        self._changed()

    async def close(self) -> None:
        """Close all connections; what waits for an answer on them fails with ConnectionLost."""
        self._closed = True
        tasks = list(self._dials.values())
        if self._search is not None:
            tasks.append(self._search)
        for task in tasks:
            task.cancel()
        for connection in self.open_ones():
            connection.close()
        if tasks:
            await asyncio.wait(tasks)
