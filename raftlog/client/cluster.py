"""The cluster as one client sees it: metadata, connections, and the way to whoever leads a partition.

Finding a leader is one loop for all partitions that have none to talk to (:meth:`ClusterClient._seek`): it
asks the brokers that host them, all at once, takes in what each says by the rules of ``metadata``, and is
done with a partition when a connection to its leader is open. When a broker dies, the hundreds of partitions
it led are looked for together.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from operator import attrgetter
from typing import Any, Final, TypeVar

import msgspec

from raftlog.client.connections import Bootstrap, Connections
from raftlog.client.identity_pool import IdentityPool
from raftlog.client.metadata import NO_LEADER, MetadataCache, PartitionView, TopicView
from raftlog.client.retry import BACKOFF, is_retriable, retry
from raftlog.errors import (
    Busy,
    Closed,
    NotLeader,
    RaftlogError,
    RequestTimeout,
    UnknownPartition,
    UnknownReplica,
    UnknownTopic,
)
from raftlog.net.connection import RpcConnection
from raftlog.net.network import Seams
from raftlog.net.rpc import MetadataRequest, MetadataResponse, PartitionRow, Request
from raftlog.record.frame import Buffer

__all__ = ["Bootstrap", "ClusterClient"]

R = TypeVar("R", bound=msgspec.Struct)

REQUEST_TIMEOUT_S: Final = 10.0
ASK_S: Final = 0.25
"""How long one round of asking for leaders waits for the slowest answer."""
UNKNOWN_TOPIC_GRACE_S: Final = 0.3
"""How long "unknown" is doubted: the topic may have been created a moment ago, through another broker."""
METADATA_AGE_S: Final = 10.0

LeadersChanged = Callable[[list[PartitionView]], None]


class ClusterClient:
    """Metadata cache, connections and leader discovery, on one event loop.

    Args:
        seams: network, Random and wall clock.
        bootstrap: where to begin.
        client_id: who we are in the brokers' logs and in ``ClusterInUse``.
        refresh: asked for a new bootstrap when no known address answers.
        identities: what producers that were closed have left; default: of this client alone.
        role: "client" or "controller".
    """

    def __init__(
        self,
        seams: Seams,
        bootstrap: Bootstrap,
        client_id: str,
        refresh: Callable[[], Awaitable[Bootstrap]] | None = None,
        identities: IdentityPool | None = None,
        *,
        role: str = "client",
    ) -> None:
        self.seams = seams
        self.bootstrap = bootstrap
        self.client_id = client_id
        self.identities = identities or IdentityPool()
        self.cache = MetadataCache()
        self.connections = Connections(seams, bootstrap, client_id, refresh, self._wake_seek, role)
        self.metadata_view = PartitionView("metadata", b"", 0, PartitionRow(replicas=[]))
        """The metadata group, as if it were a partition: its leader is looked for in the same way."""
        self.leaders_changed: set[LeadersChanged] = set()
        self.metadata_age_s = METADATA_AGE_S
        self.last_error: RaftlogError | None = None
        """Why nobody could be reached, the last time that nobody could."""
        self._seekers: dict[PartitionView, list[asyncio.Future[RpcConnection]]] = {}
        self._seek_wakeup = asyncio.Event()
        self._seek_afresh = False
        self._seek_task: asyncio.Task[None] | None = None
        self._age_timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    # -- metadata --------------------------------------------------------------------------------------------

    async def topic(self, name: str, *, timeout: float) -> TopicView:
        """What is known of a topic, asked for if nothing is.

        Args:
            timeout: seconds.

        Raises:
            UnknownTopic: a fresh answer says so, and goes on saying so for a moment.
            ConnectionLost, RequestTimeout: no broker answers in time.
        """
        known = self.cache.topics.get(name)
        if known is not None:
            return known
        loop = asyncio.get_running_loop()
        doubted_until = 0.0

        async def look() -> TopicView:
            nonlocal doubted_until
            answer = await (self._ask_all if doubted_until else self._ask_any)([name], timeout)
            found = self.cache.topics.get(name)
            if found is not None:
                return found
            doubted_until = doubted_until or loop.time() + UNKNOWN_TOPIC_GRACE_S
            if answer.version < self.cache.version:
                raise Busy(f"every broker that answers has old metadata: version {answer.version}")
            if answer.metadata_leader < 0:
                raise Busy(f"nobody can say now whether there is a topic {name!r}: metadata has no leader")
            raise UnknownTopic(f"there is no topic {name!r}")

        def worth_it(error: BaseException) -> bool:
            return is_retriable(error) or (isinstance(error, UnknownTopic) and loop.time() < doubted_until)

        return await retry(look, random=self.seams.random, deadline=loop.time() + timeout, retriable=worth_it)

    async def partition(self, topic: str, index: int, *, timeout: float) -> PartitionView:
        """One partition of a topic.

        Raises:
            UnknownTopic, UnknownPartition, ConnectionLost, RequestTimeout.
        """
        view = await self.topic(topic, timeout=timeout)
        return partition_of(view, index)

    async def metadata(self, topics: list[str] | None = None, *, timeout: float) -> MetadataResponse:
        """A fresh answer from any broker; ``topics`` None asks for all."""
        deadline = asyncio.get_running_loop().time() + timeout
        return await retry(
            lambda: self._ask_any(topics, timeout), random=self.seams.random, deadline=deadline
        )

    async def _ask_any(self, topics: list[str] | None, timeout: float) -> MetadataResponse:
        return await self._ask_one(await self.connections.any(), topics, timeout)

    async def _ask_all(self, topics: list[str] | None, timeout: float) -> MetadataResponse:
        """The newest of what all brokers say that can be asked now and answer soon."""
        answers = [await self._ask_any(topics, timeout)]
        for broker in self.connections.links:
            self.connections.dial(broker)

        async def ask(connection: RpcConnection) -> None:
            with contextlib.suppress(RaftlogError):  # others are asked as well
                answers.append(await self._ask_one(connection, topics, REQUEST_TIMEOUT_S))

        await asyncio.wait(
            [self.spawn(ask(connection)) for connection in self.connections.open_ones()], timeout=ASK_S
        )
        return max(answers, key=attrgetter("version"))

    async def _ask_one(
        self, connection: RpcConnection, topics: list[str] | None, timeout: float
    ) -> MetadataResponse:
        response, _ = await self.call(connection, MetadataRequest(topics), timeout=timeout)
        self._learn(response)
        return response

    def _learn(self, response: MetadataResponse) -> None:
        self.connections.learn(response.brokers)
        self.metadata_view.replicas = sorted(self.connections.links)
        changed = self.cache.merge(response)
        if self.metadata_view.learn(response.metadata_leader, response.metadata_term):
            changed.append(self.metadata_view)
        if changed:
            for tell in list(self.leaders_changed):
                tell(changed)
        if self._age_timer is None and not self._closed:
            self._set_age_timer()

    def _set_age_timer(self) -> None:
        delay = self.metadata_age_s * self.seams.random.uniform(0.9, 1.1)
        self._age_timer = asyncio.get_running_loop().call_later(delay, self._metadata_aged)

    def _metadata_aged(self) -> None:
        """Leaders move, addresses change: ask again now and then, even when nothing fails, or nobody answered
        the last time."""
        self._set_age_timer()
        self.refresh_soon(self.cache.topics)

    def refresh_soon(self, topics: Iterable[str]) -> None:
        """Ask for these topics in the background, a broker at random."""
        names = sorted(topics)

        async def ask() -> None:
            with contextlib.suppress(RaftlogError):  # it is asked again when something needs it
                await self._ask_any(names, REQUEST_TIMEOUT_S)

        self.spawn(ask())

    # -- calls -----------------------------------------------------------------------------------------------

    async def call(
        self,
        connection: RpcConnection,
        request: Request[R],
        payload: Sequence[Buffer] = (),
        *,
        timeout: float,
    ) -> tuple[R, memoryview]:
        """One call on one connection. A connection that does not answer is closed: TCP may need minutes to
        see."""
        try:
            return await connection.call(request, payload, timeout=min(timeout, REQUEST_TIMEOUT_S))
        except RequestTimeout:
            connection.close()
            raise

    async def call_any(self, request: Request[R], *, timeout: float) -> R:
        """Ask whichever broker answers, again and again until ``timeout`` seconds are over. One that could
        not help (it may be cut off from the others) is asked again only after the rest."""
        failed: set[int] = set()

        async def attempt() -> R:
            connection = await self.connections.any(failed)
            try:
                return (await self.call(connection, request, timeout=timeout))[0]
            except RaftlogError:
                failed.add(connection.peer.broker_id)
                if failed >= self.connections.links.keys():
                    failed.clear()
                raise

        return await retry(
            attempt, random=self.seams.random, deadline=asyncio.get_running_loop().time() + timeout
        )

    async def call_leader(
        self,
        view: PartitionView,
        request: Request[R],
        payload: Sequence[Buffer] = (),
        *,
        timeout: float,
        retriable: Callable[[BaseException], bool] = is_retriable,
    ) -> tuple[R, memoryview]:
        """Ask the leader of a partition, whoever that is, until ``timeout`` seconds are over.

        Raises:
            RaftlogError: the last attempt's.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout

        async def attempt() -> tuple[R, memoryview]:
            left = max(deadline - loop.time(), 0.001)
            try:
                async with asyncio.timeout(left):
                    connection = await self.seek_leader(view)
            except TimeoutError as error:
                nobody = self.last_error is not None and not self.connections.open_ones()
                reason = f": {self.last_error}" if nobody else ""
                raise RequestTimeout(
                    f"no leader of {view} in {timeout:g} s{reason}", indeterminate=False
                ) from error
            try:
                return await self.call(connection, request, payload, timeout=left)
            except (NotLeader, UnknownReplica) as error:
                self.note_refusal(view, connection, error)
                raise

        return await retry(attempt, random=self.seams.random, deadline=deadline, retriable=retriable)

    # -- who leads -------------------------------------------------------------------------------------------

    def route(self, view: PartitionView) -> RpcConnection | None:
        """The open connection to the partition's leader, if it is known and there is one."""
        link = self.connections.links.get(view.leader)
        return None if link is None else link.open()

    def note_refusal(self, view: PartitionView, connection: RpcConnection, error: RaftlogError) -> None:
        """Take in that this broker does not lead the partition, and whom it takes for the leader."""
        hint, term = error.details.get("leader"), error.details.get("term")
        known_term = view.term if term is None else int(term)
        view.deny(connection.peer.broker_id, known_term)
        if hint is not None and hint != connection.peer.broker_id:
            view.learn(int(hint), known_term)

    def seek_leader(self, view: PartitionView) -> asyncio.Future[RpcConnection]:
        """A future connection to the partition's leader. It fails only when the topic is gone or this is
        closed."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[RpcConnection] = loop.create_future()
        if self._closed:
            future.set_exception(Closed("this client is closed"))
            return future
        connection = None if view.deleted else self.route(view)
        if connection is not None:
            future.set_result(connection)
            return future
        self._seekers.setdefault(view, []).append(future)
        self._seek_afresh = True
        self._seek_wakeup.set()
        if self._seek_task is None:
            self._seek_task = self.spawn(self._seek())
            self._seek_task.add_done_callback(self._seek_ended)
        return future

    async def _seek(self) -> None:
        attempt = 0
        while True:
            self._seek_wakeup.clear()
            self._settle()
            if not self._seekers:
                return
            attempt = 1 if self._seek_afresh else attempt + 1
            self._seek_afresh = False
            await self._ask_hosts()
            self._settle()
            if self._seekers and not self._seek_afresh:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(BACKOFF.delay(attempt, self.seams.random)):
                        await self._seek_wakeup.wait()

    def _seek_ended(self, task: asyncio.Task[None]) -> None:
        self._seek_task = None
        if self._seekers and not task.cancelled() and task.exception() is None:
            # Somebody came between the task's last look, which found nobody, and this call.
            self._seek_task = self.spawn(self._seek())
            self._seek_task.add_done_callback(self._seek_ended)
            return
        error = Closed("this client is closed") if task.cancelled() else task.exception()
        seekers, self._seekers = self._seekers, {}
        for futures in seekers.values():
            for future in futures:
                if not future.done():
                    future.set_exception(error or Closed("this client is closed"))

    def _wake_seek(self) -> None:
        """A connection came or went: somebody may be settled, or have to look again."""
        self._settle()

    def _settle(self) -> None:
        """Be done with every partition whose leader can be talked to; begin to connect to the leaders of
        others."""
        for view in list(self._seekers):
            connection = self.route(view)
            if connection is None and not view.deleted:
                if view.leader != NO_LEADER and not self._closed:
                    self.connections.dial(view.leader)
                continue
            for future in self._seekers.pop(view):
                if future.done():
                    continue
                if view.deleted or connection is None:
                    future.set_exception(UnknownTopic(f"topic {view.topic!r} was deleted"))
                else:
                    future.set_result(connection)

    async def _ask_hosts(self) -> None:
        """Ask all brokers that host a partition looked for, and wait a moment for what they say."""
        topics = sorted({view.topic for view in self._seekers if view is not self.metadata_view})
        hosts = {broker for view in self._seekers for broker in view.replicas}
        for broker in hosts:
            self.connections.dial(broker)
        asked = [connection for broker in hosts if (connection := self.connections.open(broker)) is not None]
        if not asked:
            try:
                async with asyncio.timeout(ASK_S):
                    asked = [await self.connections.any()]
            except RaftlogError as error:
                self.last_error = error  # nobody answers now: the next round tries again
                return
            except TimeoutError:
                return
        waiting = [self.spawn(self._ask_quietly(connection, topics)) for connection in asked]
        await asyncio.wait(waiting, timeout=ASK_S)

    async def _ask_quietly(self, connection: RpcConnection, topics: list[str]) -> None:
        with contextlib.suppress(RaftlogError):  # others are asked as well, and the next round asks again
            await self._ask_one(connection, topics, REQUEST_TIMEOUT_S)
            self._settle()

    # -- life ------------------------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run it in the background, until this client is closed."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Close the connections; what waits for a leader fails with Closed."""
        self._closed = True
        if self._age_timer is not None:
            self._age_timer.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await self.connections.close()
        if tasks:
            await asyncio.wait(tasks)


def partition_of(topic: TopicView, index: int) -> PartitionView:
    """The topic's partition of that number; UnknownPartition if there is none."""
    if not 0 <= index < len(topic.partitions):
        raise UnknownPartition(f"topic {topic.name!r} has {len(topic.partitions)} partitions, no {index}")
    return topic.partitions[index]
