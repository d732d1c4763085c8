"""Planted bugs of the controller and of replicas that move; see ``mutations``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from raftlog.testing.mutation import Mutation

_FAULTS: Final = ("move", "drain", "grow", "kill controller", "two controllers", "kill", "isolate")
_LOSSES: Final = ("wipe", "move", "kill controller", "two controllers")
_FIVE: Final[Mapping[str, Any]] = {"brokers": 5, "replication": 3}
_FIVE_FAR_APART: Final[Mapping[str, Any]] = {**_FIVE, "latency": (0.01, 0.06)}
"""Moves take long enough to be met by another fault."""

CONTROLLER: Final = (
    Mutation(
        "who leaves is deleted before the group is without it",
        "raftlog.state.image",
        "return Partition(replicas, leaving, self.founders, self.version + 1)",
        "return Partition(replicas, (), self.founders, self.version + 1)",
        _FAULTS,
        _FIVE,
    ),
    Mutation(
        "a partition is said to have moved before its group has",
        "raftlog.broker.membership",
        "if wanted is None or wanted.is_reached(node.conf):",
        "if wanted is None or wanted.is_reached(node.conf) or not replica.members_reached():",
        _FAULTS,
        _FIVE,
    ),
    Mutation(
        "a replica id is given out twice",
        "raftlog.state.metadata",
        "self.next_replica_id += not replica_id",
        "self.next_replica_id += not (replica_id or replicas[:-1])",
        _FAULTS,
        _FIVE,
    ),
    Mutation(
        "a replica that moves in begins with a configuration of its own",
        "raftlog.state.image",
        "return Partition(replicas, leaving, self.founders, self.version + 1)",
        "return Partition(replicas, leaving, tuple(each for each, _ in replicas), self.version + 1)",
        _FAULTS,
        _FIVE,
    ),
    Mutation(
        "what a lost broker held waits for it",
        "raftlog.controller.reconcile",
        "if _is_gone(broker_id, broker.node_id, observed):",
        "if False:",
        _LOSSES,
        _FIVE,
    ),
    Mutation(
        "a move that waits for a lost broker is left alone",
        "raftlog.controller.reconcile",
        "if move.reason is Reason.LOST:  # it waits for somebody who does not come",
        "if False:",
        _LOSSES,
        _FIVE_FAR_APART,
    ),
)
