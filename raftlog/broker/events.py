"""What a broker logs of itself: one line for each event worth waking for, with its fields.

The names of the events are for machines, and stay; see docs/OPERATIONS.md.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

from raftlog.errors import RaftlogError
from raftlog.raft.types import Role, SoftState
from raftlog.storage.store import BrokerStore
from raftlog.telemetry.counters import Counters
from raftlog.telemetry.logs import log_event

if TYPE_CHECKING:
    from raftlog.broker.replica import Replica

logger = logging.getLogger("raftlog.broker")


class _Broker(Protocol):
    @property
    def broker_id(self) -> int: ...

    @property
    def counters(self) -> Counters: ...

    @property
    def store(self) -> BrokerStore: ...

    @property
    def address(self) -> tuple[int, str, int]: ...


def replica_event(level: int, event: str, message: str, replica: Replica[Any], **fields: object) -> None:
    """Log an event of a replica.

    Args:
        level: of the logging module.
        event: its name.
        message: what happened to it, to be read behind "broker 2: orders/0 ".
        replica: whose.
        fields: more than broker, topic, partition and term.
    """
    if logger.isEnabledFor(level):
        spec, broker_id = replica.log.spec, replica.host.broker_id
        log_event(
            logger,
            level,
            event,
            "broker %d: %s %s",
            broker_id,
            replica.name,
            message,
            broker=broker_id,
            topic=spec.topic,
            partition=spec.partition,
            replica=replica.replica_id,
            term=replica.node.term,
            **fields,
        )


def leadership_changed(broker: _Broker, replica: Replica[Any], before: SoftState | None) -> None:
    """A replica is in another role, or of another term or leader, than ``before``. (When a leader begins to
    serve, which is when others may notice, it says so itself.)"""
    led = before is not None and before.role is Role.LEADER
    leads = replica.node.role is Role.LEADER
    # In a later term it has been out of office in between.
    won = leads and not (led and before is not None and before.term == replica.node.term)
    broker.counters.elections_won += won
    if led and (won or not leads):
        assert before is not None
        broker.counters.leaderships_lost += 1
        replica_event(
            logging.INFO,
            "leader_lost",
            f"is led by it no longer, after term {before.term}",
            replica,
            led_term=before.term,
            leader=replica.leader_broker,
        )


def started(broker: _Broker) -> None:
    """The broker has recovered what is on its disk, and serves."""
    store, (incarnation, host, port) = broker.store, broker.address
    log_event(
        logger,
        logging.INFO,
        "broker_started",
        "broker %d serves at %s:%d as incarnation %d: %d replicas after %s stop, %d out of service",
        broker.broker_id,
        host,
        port,
        incarnation,
        len(store.logs),
        "a clean" if store.was_clean else "an unclean",
        len(store.out_of_service),
        broker=broker.broker_id,
        incarnation=incarnation,
        address=f"{host}:{port}",
        replicas=len(store.logs),
        clean=store.was_clean,
        out_of_service=len(store.out_of_service),
    )


def storage(broker: _Broker, fault: RaftlogError | None) -> None:
    """The storage takes no writes, or (None) takes them again."""
    broker_id = broker.broker_id
    if fault is None:
        log_event(
            logger,
            logging.WARNING,
            "storage_recovered",
            "broker %d: its storage takes writes again",
            broker_id,
            broker=broker_id,
        )
    else:
        log_event(
            logger,
            logging.ERROR,
            "storage_fault",
            "broker %d: %s",
            broker_id,
            fault,
            broker=broker_id,
            error=type(fault).__name__,
        )


def replaced(broker: _Broker, error: RaftlogError) -> None:
    """A newer process runs the broker, or it was removed from the cluster."""
    log_event(
        logger,
        logging.ERROR,
        "broker_replaced",
        "broker %d: %s",
        broker.broker_id,
        error,
        broker=broker.broker_id,
        error=type(error).__name__,
    )
