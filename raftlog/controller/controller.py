"""The loop around :func:`raftlog.controller.reconcile.decide`: look, decide, act, again and again.

It speaks to brokers as any client does, from wherever it runs, and has others (its *hands*) look after
processes and nodes. It may end at any point, and two may run: whoever has taken control last is obeyed, the
other stands aside for a while, for the one that has deposed it may have died at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from raftlog.client.cluster import ClusterClient
from raftlog.controller.reconcile import (
    Action,
    Assign,
    DrainBroker,
    ForgetBroker,
    JoinBroker,
    Node,
    Observed,
    Policy,
    StartBroker,
    broker_states,
    decide,
    is_at_rest,
    proposed,
    starts,
)
from raftlog.controller.sampling import View, log_news
from raftlog.errors import RaftlogError, StaleController
from raftlog.net.rpc import MetadataCommandRequest
from raftlog.net.rpc_cluster import ImageRequest, LedRow, ReportRequest, ReportResponse
from raftlog.state.metadata import MetadataState
from raftlog.state.metadata_commands import (
    AlterPartition,
    Command,
    RemoveBroker,
    SetDraining,
    TakeControl,
)
from raftlog.telemetry.logs import log_event

logger = logging.getLogger("raftlog.controller")

CALL_TIMEOUT_S: Final = 5.0
REPORT_TIMEOUT_S: Final = 1.0
BUSY_S: Final = 0.5
"""Between looks while something is to do, or under way."""
IDLE_S: Final = 2.0
STAND_ASIDE_S: Final = 15.0
_THREAD_PARTITIONS: Final = 2000
"""With more, deciding takes so long that it must not hold up the loop."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is known without asking a broker."""

    nodes: Mapping[str, Node]
    """That are up, by id."""
    processes: frozenset[int]
    """Brokers whose process runs, or is being started."""
    gone: frozenset[int] = frozenset()
    """Brokers whose data are known to be no more."""
    is_joining: bool = False
    """A new broker is being made."""


class Hands(Protocol):
    """Who looks after nodes and processes. Nothing waits for long, and nothing raises: the next look shows
    what came of it."""

    async def look(self) -> Surroundings:
        """What there is."""

    async def start(self, action: StartBroker) -> None:
        """Start a broker's process."""

    async def join(self, action: JoinBroker) -> None:
        """Have a new broker join."""


class PlannedMove(msgspec.Struct, frozen=True):
    """A partition that should be held by others."""

    topic: str
    partition: int
    brokers: tuple[int, ...]
    """That should hold it now, the preferred leader first."""
    to: tuple[int, ...]
    """That should then."""
    bytes: int
    """To be copied."""
    reason: str


class Controller:
    """Keeps a cluster as it should be.

    Args:
        client: of the cluster, in the role of a controller.
        hands: for nodes and processes.
        policy: limits and timings.

    Attributes:
        rests_since: since when, by the loop's clock, there is nothing to do, nothing under way, and no news
            in the metadata; None: there is.
        seen: applied index of the metadata that it decided on last.
        view: what it saw last; None: nothing yet.
    """

    def __init__(self, client: ClusterClient, hands: Hands, policy: Policy | None = None) -> None:
        self._client = client
        self._hands = hands
        self._policy = policy or Policy()
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._image: MetadataState | None = None
        self._away_since_ms: dict[int, int] = {}
        self._epoch: int | None = None
        self._aside_until = 0.0
        self.rests_since: float | None = None
        self.seen = -1
        self.view: View | None = None

    async def run(self) -> None:
        """Look, decide and act, for ever."""
        while True:
            try:
                await self.step()
            except RaftlogError as error:
                logger.info("the controller goes on later: %s", error)
                self.rests_since = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BUSY_S if self.rests_since is None else IDLE_S):
                    await self._wake.wait()
            self._wake.clear()

    def wake(self) -> None:
        """Something has happened: look at once."""
        self._wake.set()

    async def step(self) -> list[Action]:
        """Look, decide and act once; returns what was to be done.

        Raises:
            RaftlogError: some of it could not be done now.
        """
        surroundings = await self._hands.look()
        for action in starts(self._image, surroundings.nodes, surroundings.processes):
            await self._hands.start(action)  # first of all: without brokers there is nobody to ask
        image, observed = await self._look(surroundings)
        before, self.view = self.view, View(image, observed, self._loop.time())
        log_news(logger, before, self.view)
        actions = await self._decided(image, observed)
        if actions or self.seen != image.applied_index or not is_at_rest(image, observed):
            self.rests_since = None
        elif self.rests_since is None:
            self.rests_since = self._loop.time()
        self.seen = image.applied_index
        await self._act(image, actions)
        return actions

    async def plan(self) -> list[PlannedMove]:
        """Everything that should be held by others, as things stand, the most urgent first.

        Raises:
            RaftlogError: no broker can tell.
        """
        image, observed = await self._look(await self._hands.look())
        states = broker_states(image, observed, self._now_ms(), self._policy)
        moves = await asyncio.to_thread(proposed, image, observed, states)
        names = {topic.topic_id: topic.name for topic in image.topics.values()}
        return [
            PlannedMove(
                names[move.held.topic_id],
                move.held.index,
                move.held.brokers,
                move.brokers,
                move.bytes,
                move.reason.value,
            )
            for move in moves
        ]

    # -- looking ---------------------------------------------------------------------------------------------

    def _now_ms(self) -> int:
        return int(self._loop.time() * 1000)

    async def _look(self, around: Surroundings) -> tuple[MetadataState, Observed]:
        image, heard = await self._newest_image()
        reports = await asyncio.gather(*(self._report(broker_id) for broker_id in image.brokers))
        answers = [report for report in reports if report is not None]
        running = frozenset(report.broker.id for report in answers).union(heard)
        now_ms = self._now_ms()
        self._away_since_ms = {
            broker_id: self._away_since_ms.get(broker_id, now_ms)
            for broker_id in image.brokers
            if broker_id not in running
        }
        led: dict[int, LedRow] = {row.replica_id: row for report in answers for row in report.leads}
        away = dict(self._away_since_ms)
        return image, Observed(
            around.nodes, around.processes, running, away, around.gone, led, around.is_joining
        )

    async def _newest_image(self) -> tuple[MetadataState, list[int]]:
        """The metadata, and the brokers that their leader hears."""
        await self._client.metadata([], timeout=CALL_TIMEOUT_S)  # where the brokers are
        known = -1 if self._image is None else self._image.applied_index
        answer, payload = await self._client.call_leader(
            self._client.metadata_view, ImageRequest(known), timeout=CALL_TIMEOUT_S
        )
        if answer.version != known or self._image is None:
            self._image = MetadataState.restore(payload)
        return self._image, answer.heard

    async def _report(self, broker_id: int) -> ReportResponse | None:
        try:
            async with asyncio.timeout(REPORT_TIMEOUT_S):
                connection = await self._client.connections.to(broker_id)
                answer, _ = await self._client.call(connection, ReportRequest(), timeout=REPORT_TIMEOUT_S)
        except (RaftlogError, TimeoutError):
            return None  # it is away, or slow: seen by the others it may be neither
        return answer

    async def _decided(self, image: MetadataState, observed: Observed) -> list[Action]:
        arguments = image, observed, self._now_ms(), self._policy
        if sum(len(topic.partitions) for topic in image.topics.values()) > _THREAD_PARTITIONS:
            return await asyncio.to_thread(decide, *arguments)
        return decide(*arguments)

    # -- acting ----------------------------------------------------------------------------------------------

    async def _act(self, image: MetadataState, actions: list[Action]) -> None:
        commands: list[Assign | ForgetBroker] = []
        for action in actions:
            if isinstance(action, JoinBroker):
                await self._hands.join(action)
            elif isinstance(action, DrainBroker):
                await self._call(SetDraining(action.broker_id, True))
            else:
                commands.append(action)
        if commands and await self._is_in_control(image):
            await self._change(commands)

    async def _is_in_control(self, image: MetadataState) -> bool:
        """Whether what was decided on this image may be carried out. Control is taken first, and then all is
        looked at afresh: until then another controller may have changed it."""
        if self._epoch is not None and self._epoch != image.controller_epoch:
            logger.warning("another controller has taken over: this one stands aside")
            self._stand_aside()
        if self._epoch is None and self._loop.time() >= self._aside_until:
            self._epoch = await self._call(TakeControl())
            self._wake.set()
            return False
        return self._epoch is not None

    def _stand_aside(self) -> None:
        self._epoch = None
        self._aside_until = self._loop.time() + STAND_ASIDE_S * self._client.seams.random.uniform(0.5, 1.5)

    async def _change(self, commands: list[Assign | ForgetBroker]) -> None:
        epoch = self._epoch
        assert epoch is not None, "in control"
        for action in commands:
            event = "partition_assigned" if isinstance(action, Assign) else "broker_removed"
            log_event(logger, logging.INFO, event, "controller %d: %s", epoch, action, controller=epoch)
            try:
                if isinstance(action, Assign):
                    replicas = list(action.replicas)
                    await self._call(AlterPartition(epoch, action.topic_id, action.index, replicas))
                else:
                    await self._call(RemoveBroker(epoch, action.broker_id))
            except StaleController:
                self._stand_aside()
                return
            except RaftlogError as error:
                # The metadata have changed, or an answer was lost: the next look shows what is left to do.
                logger.info("controller %d: %s: %s", epoch, action, error)
                if error.retriable:
                    return

    async def _call(self, command: Command) -> Any:
        """Have a command applied by the leader of the metadata group; its result.

        Raises:
            RaftlogError: what it was refused with, or nobody answers in time.
        """
        payload = MetadataState.codec.encode(command)
        answer, _ = await self._client.call_leader(
            self._client.metadata_view, MetadataCommandRequest(), (payload,), timeout=CALL_TIMEOUT_S
        )
        return msgspec.convert(answer.result, command.result)
