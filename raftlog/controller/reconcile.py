"""What a controller does next: a pure function of the metadata, of what is observed, and of time.

::

    what is observed                     what follows
    a process that does not run          it is started on its data, where they are
    a node without its broker(s)         a new broker joins there, and is given its share
    a node that is to go                 its brokers drain: first leaders move away, then replicas
    a broker that stays away             after a while (at once if it drained) its replicas are made anew
    a lost broker that holds nothing     it is forgotten
    replicas too few, too many, uneven   they move, a few at a time

Nothing is remembered from one time to the next but since when a broker is away: whoever takes over in the
middle of a move goes on with it. A move is under way as long as the partition's leader has another
configuration than the metadata want, or old replicas have not left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from raftlog.controller.balance import BrokerState, Held, Move, Reason, Site, plan
from raftlog.net.rpc_cluster import LedRow
from raftlog.state.image import Partition
from raftlog.state.metadata import MetadataState

REPLICATION_AUTO: Final = 3
"""Replicas of a topic that says nothing else, and of the internal ones, as soon as there are so many
brokers."""
_ALIVE_LEAST: Final = 3
"""With fewer that are alive, one that is away keeps its place among those that vote on the metadata."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How a controller goes about it.

    Args:
        replace_after_ms: how long a broker may be away before its replicas are made anew elsewhere.
        moves_max: partitions whose replicas are being copied at the same time.
        bytes_max: that are being copied at the same time; one partition may be larger.
        leaders_max: partitions whose leaders are being changed at the same time, for the sake of balance.
        brokers_per_node: how many brokers a node has.
        brokers: how many there are in all; None: as many as the nodes have.
    """

    replace_after_ms: int = 30_000
    moves_max: int = 4
    bytes_max: int = 1 << 30
    leaders_max: int = 16
    brokers_per_node: int = 1
    brokers: int | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is up and can run brokers."""

    id: str
    zone: str = ""
    draining: bool = False
    disks: frozenset[int] = frozenset()
    """Ids of brokers whose data are there."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What is, as far as the controller can see."""

    nodes: Mapping[str, Node]
    processes: frozenset[int]
    """Brokers whose process runs, or is being started."""
    running: frozenset[int] = frozenset()
    """Brokers that answer."""
    away_since_ms: Mapping[int, int] = field(default_factory=dict)
    """Broker that does not answer -> since when."""
    gone: frozenset[int] = frozenset()
    """Brokers whose data are known to be no more."""
    led: Mapping[int, LedRow] = field(default_factory=dict)
    """Replica id of a leader -> what it says of its partition."""
    is_joining: bool = False
    """A new broker is being made: the metadata may know it, and no node has its data yet."""


@dataclass(frozen=True, slots=True)
class StartBroker:
    """Start a broker's process on its data."""

    broker_id: int
    node_id: str


@dataclass(frozen=True, slots=True)
class JoinBroker:
    """Let a new broker join on this node."""

    node_id: str


@dataclass(frozen=True, slots=True)
class DrainBroker:
    """Note in the metadata that a broker is to go."""

    broker_id: int


@dataclass(frozen=True, slots=True)
class Assign:
    """Say who should hold a partition, and lead it."""

    topic: str
    topic_id: bytes
    index: int
    replicas: tuple[tuple[int, int], ...]
    """(broker id, replica id); 0 for a new one."""
    reason: Reason

    def __str__(self) -> str:
        brokers = ", ".join(str(broker_id) for broker_id, _ in self.replicas)
        return f"{self.topic}/{self.index} on brokers {brokers}: {self.reason.value}"


@dataclass(frozen=True, slots=True)
class ForgetBroker:
    """Remove a lost broker that holds nothing."""

    broker_id: int


Action: TypeAlias = JoinBroker | DrainBroker | Assign | ForgetBroker


def decide(
    image: MetadataState, observed: Observed, now_ms: int, policy: Policy | None = None
) -> list[Action]:
    """What to do now, beside :func:`starts`.

    Args:
        image: the metadata.
        observed: the rest.
        now_ms: of the clock that ``observed.away_since_ms`` is by.
        policy: limits and timings.

    Returns:
        Actions that may be carried out in any order; done twice, or in part, they do no harm.
    """
    policy = policy or Policy()
    states = broker_states(image, observed, now_ms, policy)
    return [
        *_joins(image, observed, policy, states),
        *_drains(image, observed),
        *_assignments(image, observed, policy, states),
        *_forgotten(image, observed, now_ms, policy, states),
    ]


def starts(
    image: MetadataState | None, nodes: Mapping[str, Node], processes: Collection[int]
) -> list[StartBroker]:
    """Every broker whose data are somewhere and that does not run, where it ran before if it can.

    Args:
        image: the metadata as they were when last heard of, if ever: it needs no broker to say so.
        nodes: that are up, by id.
        processes: brokers that run, or are being started.
    """
    where: dict[int, list[str]] = {}
    for node in nodes.values():
        for broker_id in node.disks.difference(processes):
            where.setdefault(broker_id, []).append(node.id)
    found = []
    load: Counter[str] = Counter()
    for broker_id, node_ids in sorted(where.items()):
        known = None if image is None else image.brokers.get(broker_id)
        if image is not None and known is None and broker_id in image.removed:
            continue
        if known is not None and known.node_id in node_ids:
            node_id = known.node_id
        else:  # several nodes see one directory when they share a machine or a file system: spread over them
            node_id = min(node_ids, key=lambda each: (load[each], each))
        load[node_id] += 1
        found.append(StartBroker(broker_id, node_id))
    return found


def broker_states(
    image: MetadataState, observed: Observed, now_ms: int, policy: Policy
) -> dict[int, BrokerState]:
    """What may be done with each broker of the metadata."""
    states = {}
    for broker in image.brokers.values():
        broker_id = broker.broker_id
        if _is_gone(broker_id, broker.node_id, observed):
            states[broker_id] = BrokerState.LOST
        elif broker_id in observed.running:
            states[broker_id] = BrokerState.DRAINING if broker.draining else BrokerState.ALIVE
        elif broker.draining or _is_overdue(broker_id, observed, now_ms, policy):
            states[broker_id] = BrokerState.LOST
        else:
            states[broker_id] = BrokerState.AWAY
    return states


def _is_gone(broker_id: int, node_id: str, observed: Observed) -> bool:
    """Whether the broker's data are no more. Where all nodes see the same directories, nobody can come back
    with data that are in none of them. A single node says that only of its own brokers, those of ``node_id``:
    others may be about to be seen."""
    if broker_id in observed.running or broker_id in observed.processes:
        return False
    if broker_id in observed.gone:
        return True
    nodes = observed.nodes
    disks = {node.disks for node in nodes.values()}
    if len(disks) != 1 or observed.is_joining or (len(nodes) == 1 and node_id not in nodes):
        return False
    return broker_id not in next(iter(disks))


def _is_overdue(broker_id: int, observed: Observed, now_ms: int, policy: Policy) -> bool:
    return now_ms - observed.away_since_ms.get(broker_id, now_ms) >= policy.replace_after_ms


# -- brokers that come and go -------------------------------------------------------------------------------


def _joins(
    image: MetadataState,
    observed: Observed,
    policy: Policy,
    states: Mapping[int, BrokerState],
) -> Iterator[JoinBroker]:
    """One new broker, on the node that lacks one most."""
    leaving = {broker.node_id for broker in image.brokers.values() if broker.draining}
    usable = _machines(
        [node for node in observed.nodes.values() if not node.draining and node.id not in leaving],
        policy.brokers_per_node,
    )
    if not usable:
        return
    staying = [
        broker_id for broker_id, state in states.items() if state in (BrokerState.ALIVE, BrokerState.AWAY)
    ]
    wanted = policy.brokers
    if wanted is None:
        wanted = policy.brokers_per_node * len(usable)
        if len({node.disks for node in usable}) == 1:
            # Nodes that see the same directories say nothing about how many brokers there should be: as many
            # as there were at first.
            wanted = max(wanted, len(image.founders))
    if len(staying) >= wanted or observed.is_joining:
        return
    place = {each.broker_id: each.node_id for each in starts(image, observed.nodes, observed.processes)}
    here = Counter(place.get(each, image.brokers[each].node_id) for each in staying)
    node = min(usable, key=lambda node: (here[node.id], node.id))
    if here[node.id] < max(policy.brokers_per_node, -(-wanted // len(usable))):
        yield JoinBroker(node.id)


def _machines(nodes: Sequence[Node], brokers_per_node: int) -> Sequence[Node]:
    """Nodes without those that are others once more. One that comes back has another id, and for a while the
    old one is not known to be dead: both have the same data, and they are one machine."""
    if len({node.disks for node in nodes}) == 1:
        return nodes  # they all see the same directories
    found: list[Node] = []
    alike: Counter[frozenset[int]] = Counter()
    for node in nodes:
        if not node.disks or alike[node.disks] * brokers_per_node < len(node.disks):
            found.append(node)
        alike[node.disks] += 1
    return found


def _drains(image: MetadataState, observed: Observed) -> Iterator[DrainBroker]:
    for broker in image.brokers.values():
        node = observed.nodes.get(broker.node_id)
        if node is not None and node.draining and not broker.draining:
            yield DrainBroker(broker.broker_id)


def _forgotten(
    image: MetadataState,
    observed: Observed,
    now_ms: int,
    policy: Policy,
    states: Mapping[int, BrokerState],
) -> Iterator[ForgetBroker]:
    alive = sum(state is BrokerState.ALIVE for state in states.values())
    holders = {
        broker_id
        for topic in image.topics.values()
        for partition in topic.partitions
        for _, broker_id in partition.members
    }
    for broker_id, state in states.items():
        if state is not BrokerState.LOST or broker_id in holders or not alive:
            continue
        is_gone = _is_gone(broker_id, image.brokers[broker_id].node_id, observed)
        if not is_gone and not _is_overdue(broker_id, observed, now_ms, policy):
            continue
        is_wanted = not image.brokers[broker_id].draining and not is_gone
        if alive >= _ALIVE_LEAST or not is_wanted:
            yield ForgetBroker(broker_id)


# -- replicas ------------------------------------------------------------------------------------------------


def held(image: MetadataState, observed: Observed, alive: int) -> list[Held]:
    """Every partition for the plan.

    Args:
        alive: how many brokers are.
    """
    found = []
    for topic in image.topics.values():
        for index, partition in enumerate(topic.partitions):
            brokers = tuple(broker_id for _, broker_id in partition.replicas)
            factor = topic.replication or max(len(brokers), min(REPLICATION_AUTO, alive))
            row = _leader_row(partition, observed)
            found.append(Held(topic.topic_id, index, brokers, factor, 0 if row is None else row.bytes))
    return found


def proposed(image: MetadataState, observed: Observed, states: Mapping[int, BrokerState]) -> list[Move]:
    """Everything that should be held by others, if it could all be done at once."""
    sites = [
        Site(broker.broker_id, broker.node_id, broker.zone, states[broker.broker_id])
        for broker in image.brokers.values()
    ]
    alive = sum(state is BrokerState.ALIVE for state in states.values())
    # While a broker may be back any moment, nothing moves that can wait.
    balance = BrokerState.AWAY not in states.values()
    return plan(held(image, observed, alive), sites, balance=balance)


def _leader_row(partition: Partition, observed: Observed) -> LedRow | None:
    rows = (observed.led.get(replica_id) for replica_id, _ in partition.members)
    return next((row for row in rows if row is not None), None)


def moving(partition: Partition, observed: Observed) -> LedRow | None:
    """What the leader of a partition says, while that has not got the replicas that are wanted."""
    row = _leader_row(partition, observed)
    if row is None:
        return None
    is_there = not partition.leaving and not row.changes and set(row.voters) == set(partition.wanted)
    return None if is_there else row


def is_at_rest(image: MetadataState, observed: Observed) -> bool:
    """Whether every partition has the replicas that are wanted, and the leader."""
    return all(
        partition.wanted[0] in observed.led and moving(partition, observed) is None
        for topic in image.topics.values()
        for partition in topic.partitions
    )


def _assignments(
    image: MetadataState, observed: Observed, policy: Policy, states: Mapping[int, BrokerState]
) -> Iterator[Assign]:
    """The most urgent moves, as far as limits allow."""
    flying, leaders, bytes_now = 0, 0, 0
    for topic in image.topics.values():
        for partition in topic.partitions:
            row = moving(partition, observed)
            if row is not None:
                flying += 1
                bytes_now += row.bytes * len(set(partition.wanted).difference(row.voters))
            elif partition.wanted[0] not in observed.led:
                leaders += 1
    moves = proposed(image, observed, states)
    leaders_first = any(_hands_over_first(move, states) for move in moves)
    for move in moves:
        partition = image.partition(move.held.topic_id, move.held.index)
        if _hands_over_first(move, states):
            yield _assign(image, move, _leader_moved(move, states))
        elif set(move.brokers) == set(move.held.brokers):
            if leaders < policy.leaders_max:
                leaders += 1
                yield _assign(image, move, move.brokers)
        elif moving(partition, observed) is not None:
            if move.reason is Reason.LOST:  # it waits for somebody who does not come
                yield _assign(image, move, move.brokers)
        elif leaders_first and move.reason is not Reason.LOST:
            continue
        elif flying < policy.moves_max and (not flying or bytes_now + move.bytes <= policy.bytes_max):
            flying += 1
            bytes_now += move.bytes
            yield _assign(image, move, move.brokers)


def _hands_over_first(move: Move, states: Mapping[int, BrokerState]) -> bool:
    """Whether the partition should be led by another of its holders before a replica moves."""
    return states.get(move.held.brokers[0]) is BrokerState.DRAINING and any(
        states.get(each) is BrokerState.ALIVE for each in move.held.brokers
    )


def _leader_moved(move: Move, states: Mapping[int, BrokerState]) -> tuple[int, ...]:
    """The holders of now, led by one that stays."""
    holders = move.held.brokers
    staying = [each for each in move.brokers if each in holders] + [*holders]
    leader = next(each for each in staying if states.get(each) is BrokerState.ALIVE)
    return (leader, *(each for each in holders if each != leader))


def _assign(image: MetadataState, move: Move, brokers: tuple[int, ...]) -> Assign:
    topic = image.topic_by_id(move.held.topic_id)
    assert topic is not None, "the plan is of this image"
    partition = topic.partitions[move.held.index]
    known = {broker_id: replica_id for replica_id, broker_id in (*partition.leaving, *partition.replicas)}
    replicas = tuple((broker_id, known.get(broker_id, 0)) for broker_id in brokers)
    return Assign(topic.name, topic.topic_id, move.held.index, replicas, move.reason)
