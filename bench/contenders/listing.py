"""All contenders, by the systems that they run on, in the order of tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from contenders.base import Contender, System
from contenders.on_floor import BareFloor, FloorProcesses, KeepingFloor, KeepingProcesses
from contenders.on_kafka import Kafka, KafkaBrokers
from contenders.on_nats import Nats, NatsServers, NatsSynced
from contenders.on_raftlog import Raftlog, RaftlogAio, RaftlogBrokers, RaftlogInterval
from contenders.on_ray import RayActor, RayItself, RayQueue

SYSTEMS: Final[tuple[tuple[Callable[[], System], tuple[type[Any], ...]], ...]] = (
    (RaftlogBrokers, (Raftlog, RaftlogInterval, RaftlogAio)),
    (FloorProcesses, (BareFloor,)),
    (KeepingProcesses, (KeepingFloor,)),
    (partial(NatsServers, "always"), (NatsSynced,)),
    (NatsServers, (Nats,)),
    (KafkaBrokers, (Kafka,)),
    (RayItself, (RayQueue, RayActor)),
)
KINDS: Final[tuple[type[Contender], ...]] = tuple(kind for _, kinds in SYSTEMS for kind in kinds)
