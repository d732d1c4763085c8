"""Connections from this broker to every other: who is where, and the way out for Raft messages.

Two connections lead to each peer: *control* for heartbeats, votes and everything small and urgent, *bulk* for
entries and their acknowledgements, so that a large frame cannot starve a heartbeat. Each direction of a pair
has its own: an answer travels on the answering broker's connections. A message for a peer that cannot be
reached is dropped; Raft repeats what matters.

Addresses are soft state: broker id -> (incarnation, host, port), the highest incarnation wins. They are
seeded by whoever starts the brokers, exchanged in handshakes and between connected peers, and remembered on
disk.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from raftlog.broker.wire import encode_messages
from raftlog.errors import ConnectionLost, ForeignDataDir, RaftlogError, StaleIncarnation
from raftlog.net.connection import RpcConnection
from raftlog.net.handshake import Local
from raftlog.net.network import Seams
from raftlog.net.rpc import Addresses, OneWay
from raftlog.raft.types import AppendRequest, AppendResponse, InstallSnapshot, Message
from raftlog.record.frame import Buffer

logger = logging.getLogger("raftlog.broker")

Address = tuple[int, str, int]
"""(incarnation, host, port)."""

_DIAL_TIMEOUT_S: Final = 3.0
_BACKOFF_MIN_S: Final = 0.02
_BACKOFF_MAX_S: Final = 0.5
_BULK: Final = frozenset({AppendRequest, AppendResponse, InstallSnapshot})


class _Link:
    """The two connections to one peer, kept up by one task."""

    __slots__ = (
        "broker_id",
        "bulk",
        "bulk_out",
        "control",
        "control_out",
        "incarnation",
        "nudge",
        "task",
    )

    def __init__(self, broker_id: int) -> None:
        self.broker_id = broker_id
        self.incarnation = -1
        """Of the peer when it was last connected."""
        self.control: RpcConnection | None = None
        self.bulk: RpcConnection | None = None
        self.control_out: list[Message] = []
        self.bulk_out: list[Message] = []
        self.nudge = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Peers:
    """All links of one broker.

    Args:
        seams: the way out.
        local: who this broker is; its ``address`` is set by the time of :meth:`start`.
        secret: the cluster's.
        on_up: told when both connections to a broker stand, and to which incarnation of it if it is another
            one than the last time (else None).
        on_down: told when one of them broke.
        on_learned: told when the address book changed (to remember it on disk).
        on_replaced: told when a peer knows that this broker must end: a newer incarnation of it runs, or it
            was removed from the cluster.
    """

    def __init__(
        self,
        seams: Seams,
        local: Local,
        secret: bytes,
        *,
        on_up: Callable[[int, int | None], None],
        on_down: Callable[[int], None],
        on_learned: Callable[[], None],
        on_replaced: Callable[[RaftlogError], None],
    ) -> None:
        self._seams = seams
        self.local = local
        self._secret = secret
        self._on_up = on_up
        self._on_down = on_down
        self._on_learned = on_learned
        self._on_replaced = on_replaced
        self._links: dict[int, _Link] = {}
        self._waiting: dict[_Link, None] = {}
        self._gone: set[int] = set()
        self._closed = False
        self.book: dict[int, Address] = {}

    # -- the address book ------------------------------------------------------------------------------------

    def learn(self, addresses: Mapping[int, Address]) -> None:
        """Take over what is newer than what is known, and start or hurry the dialling of those brokers."""
        news = {
            broker_id: address
            for broker_id, address in addresses.items()
            if self._is_news(broker_id, address)
        }
        if not news:
            return
        self.book.update(news)
        for broker_id in news:
            if broker_id != self.local.broker_id:
                self._dial(broker_id)
        for link in self._links.values():
            if link.broker_id not in news:
                _send(link.control, Addresses(self.book))
        self._on_learned()

    def _is_news(self, broker_id: int, address: Address) -> bool:
        known = self.book.get(broker_id)
        if known is None:
            return broker_id not in self._gone
        return broker_id != self.local.broker_id and address[0] > known[0]

    def forget(self, broker_id: int) -> bool:
        """This one belongs to the cluster no more: end the link to it, and learn of it from nobody.

        Returns False if that is done already."""
        if broker_id in self._gone:
            return False
        self._gone.add(broker_id)
        self.book.pop(broker_id, None)
        link = self._links.pop(broker_id, None)
        if link is not None and link.task is not None:
            self._waiting.pop(link, None)
            link.task.cancel()
            self._on_down(broker_id)
        return True

    def hurry(self, broker_id: int) -> None:
        """That broker has just shown signs of life: do not wait for the back-off to dial it."""
        link = self._links.get(broker_id)
        if link is not None:
            link.nudge.set()

    def is_up(self, broker_id: int) -> bool:
        """True while both connections to that broker stand (and always for this broker itself)."""
        if broker_id == self.local.broker_id:
            return True
        link = self._links.get(broker_id)
        return link is not None and link.bulk is not None

    def connection(self, broker_id: int, *, bulk: bool = False) -> RpcConnection:
        """The control connection, for requests; the ``bulk`` one for those with large answers.

        Raises:
            ConnectionLost: it is down.
        """
        link = self._links.get(broker_id)
        connection = None if link is None else link.bulk if bulk else link.control
        if connection is None:
            raise ConnectionLost(f"no connection to broker {broker_id}")
        return connection

    # -- messages --------------------------------------------------------------------------------------------

    def send(self, broker_id: int, message: Message) -> None:
        """Queue a message; it leaves with the next :meth:`flush`."""
        link = self._links.get(broker_id)
        if link is None or link.bulk is None:
            return
        (link.bulk_out if type(message) in _BULK else link.control_out).append(message)
        self._waiting[link] = None

    def broadcast(self, message: OneWay) -> None:
        """Send a small message to every peer at once, on the control connection."""
        for link in self._links.values():
            _send(link.control, message)

    def flush(self) -> None:
        """Send what is queued: at most one frame per connection."""
        if not self._waiting:
            return
        for link in self._waiting:
            if link.control_out:
                _send(link.control, *encode_messages(link.control_out))
                link.control_out = []
            if link.bulk_out:
                _send(link.bulk, *encode_messages(link.bulk_out))
                link.bulk_out = []
        self._waiting.clear()

    # -- dialling --------------------------------------------------------------------------------------------

    def _dial(self, broker_id: int) -> None:
        if self._closed:
            return
        link = self._links.get(broker_id)
        if link is None:
            link = self._links[broker_id] = _Link(broker_id)
            link.task = asyncio.get_running_loop().create_task(self._maintain(link))
        else:
            link.nudge.set()
            if link.control is not None and link.incarnation < self.book[broker_id][0]:
                link.control.close()  # to a process that has a successor, and may not know

    async def _maintain(self, link: _Link) -> None:
        """Dial, hold, and dial again, until closed."""
        backoff = _BACKOFF_MIN_S
        while not self._closed:
            down = asyncio.Event()
            try:
                control, bulk = await self._open_both(link.broker_id, down)
            except (StaleIncarnation, ForeignDataDir) as error:
                self._on_replaced(error)
                return
            except (RaftlogError, ValueError, OverflowError) as error:
                # the latter two: what was learned is no address that could exist
                logger.debug(
                    "broker %d cannot reach broker %d: %s", self.local.broker_id, link.broker_id, error
                )
                link.nudge.clear()
                try:
                    async with asyncio.timeout(backoff * self._seams.random.uniform(0.5, 1.0)):
                        await link.nudge.wait()
                    backoff = _BACKOFF_MIN_S
                except TimeoutError:
                    backoff = min(backoff * 2, _BACKOFF_MAX_S)
                continue
            backoff = _BACKOFF_MIN_S
            link.control, link.bulk = control, bulk
            _send(control, Addresses(self.book))
            incarnation = control.peer.incarnation
            restarted, link.incarnation = incarnation != link.incarnation, incarnation
            self._on_up(link.broker_id, incarnation if restarted else None)
            try:
                await down.wait()
            finally:
                link.control = link.bulk = None
                link.control_out, link.bulk_out = [], []
                control.close()
                bulk.close()
            if not self._closed:
                self._on_down(link.broker_id)

    async def _open_both(self, broker_id: int, down: asyncio.Event) -> tuple[RpcConnection, RpcConnection]:
        control = await self._open(broker_id, "control", down)
        try:
            bulk = await self._open(broker_id, "bulk", down)
            if down.is_set():
                bulk.close()
                raise ConnectionLost(
                    f"the first connection to broker {broker_id} broke during the second's making"
                )
            if bulk.peer.incarnation != control.peer.incarnation:
                bulk.close()
                raise ConnectionLost(f"broker {broker_id} was started anew between the two connections")
        except BaseException:  # also cancelled: half a pair is none
            control.close()
            raise
        return control, bulk

    async def _open(self, broker_id: int, purpose: str, down: asyncio.Event) -> RpcConnection:
        _, host, port = self.book[broker_id]
        connection = await RpcConnection.open(
            self._seams,
            host,
            port,
            self.local,
            self._secret,
            purpose=purpose,
            timeout=_DIAL_TIMEOUT_S,
            on_close=lambda _connection, _error: down.set(),
        )
        if connection.peer.broker_id != broker_id:
            connection.close()
            raise ConnectionLost(
                f"{host}:{port} is broker {connection.peer.broker_id} now, not broker {broker_id}"
            )
        return connection

    async def close(self) -> None:
        """Close every connection and stop dialling."""
        self._closed = True
        tasks = [link.task for link in self._links.values() if link.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._links.clear()


def _send(connection: RpcConnection | None, message: OneWay, payload: Sequence[Buffer] = ()) -> None:
    """Send, or drop what a connection that is down or closing cannot take: its link hears of that in a
    moment."""
    if connection is not None and not connection.closed:
        connection.send(message, payload, is_lone=True)
