"""Planted bugs of groups and transactions; see ``mutations``."""

from __future__ import annotations

from typing import Final

from raftlog.testing.mutation import Mutation
from raftlog.testing.pipeline_profile import PipelineProfile

_FAULTS: Final = ("client crash", "client pause", "kill coordinator", "isolate", "transfer")
_BUSY: Final = PipelineProfile(
    partitions=2,
    feeders=3,
    shares_ids=False,
    transactions=16,
    workers=3,
    timeout_ms=(2_000,),
    session_timeout_ms=1_000,
    rebalance_timeout_ms=2_000,
    stall=0.1,
    echoes=True,
    large_values=0.4,
)


_PROFILE: Final = {"pipeline": _BUSY, "values": 20, "liveness": False}


def _planted(name: str, module: str, old: str, new: str) -> Mutation:
    return Mutation(name, f"raftlog.{module}", old, new, _FAULTS, _PROFILE)


COORDINATION: Final = (
    _planted(
        "a late marker ends the transaction of a later epoch",
        "state.producers",
        "if marker.epoch < known.epoch:",
        "if False:",
    ),
    _planted(
        "readers of committed records read into open transactions",
        "state.partition",
        "for first in self.open.values():",
        "for first in ():",
    ),
    _planted(
        "readers are not told what was aborted",
        "broker.isolation",
        "return found, machine.aborted_in(offset, end) if end > offset else []",
        "return found, []",
    ),
    _planted(
        "what was aborted is hidden by producer, in and out of its range",
        "client.assigned",
        "producer_id == batch.producer_id and first <= batch.base_offset < marker",
        "producer_id == batch.producer_id",
    ),
    _planted(
        "batches are told apart without their epochs",
        "state.producers",
        "    if header.producer_epoch != known.epoch:\n        _check_epoch",
        "    for each in known.batches:\n"
        "        if (each.first_sequence, each.last_sequence) == (first, header.last_sequence):\n"
        "            return Duplicate(each.base_offset, each.timestamp_ms)\n"
        "    if header.producer_epoch != known.epoch:\n        _check_epoch",
    ),
    _planted(
        "staged offsets are visible before the marker",
        "state.groups",
        "        self.pending[command.producer_id] = Pending(command.epoch, offsets)",
        "        self.pending[command.producer_id] = Pending(command.epoch, offsets)\n"
        "        for (group_id, *key), each in offsets.items():\n"
        "            self.offsets.setdefault(group_id, {})[key[0], key[1]] = each",
    ),
    _planted(
        "offsets are fetched while a transaction is about to commit others",
        "broker.group_offsets",
        "if pending and (request.partitions is None or not pending.isdisjoint(keys)):",
        "if False:",
    ),
    _planted(
        "offsets of an aborted transaction are committed",
        "state.groups",
        "if pending is not None and command.commit:",
        "if pending is not None:",
    ),
    _planted(
        "members of a former epoch, and who is none, commit offsets",
        "broker.group_offsets",
        "        raise stale(group_id, member_id, member)\n    for each in offsets:",
        "        return\n    for each in offsets:",
    ),
    _planted(
        "any heartbeat of the epoch releases partitions",
        "broker.groups",
        "elif request.member_epoch == member.epoch and request.revision == member.revision:",
        "elif request.member_epoch == member.epoch:",
    ),
    _planted(
        "partitions that are being revoked are given to others",
        "broker.groups",
        "                held.update(keys_of(other.revoking))\n",
        "",
    ),
    _planted(
        "enlisting forgets what was enlisted before",
        "broker.transactions",
        "all_partitions = tuple(dict.fromkeys((*old.partitions, *partitions)))",
        "all_partitions = tuple(partitions) or old.partitions",
    ),
    _planted(
        "a coordinator answers before its decision is durable",
        "broker.transaction_replica",
        "        self.carry_out(staged, commands, answer, done)",
        "        self.carry_out(staged, commands, None, nobody_waits)\n        done(answer, None)",
    ),
    _planted(
        "a late end meets the next transaction",
        "broker.transactions",
        "        _held(state, transactional_id, identity)\n        if old.is_ending and not (settled",
        "        if old.is_ending and not (settled",
    ),
    _planted(
        "a transaction's end hands out its own epoch again",
        "broker.transactions",
        "        return Identity(identity.producer_id, identity.epoch + 1)\n    if fresh",
        "        return identity\n    if fresh",
    ),
    _planted(
        "records of the next transaction are taken without the marker that they bring along",
        "broker.partition",
        "            self.write_marker(marker, _nobody_waits)",
        "            del staged.open[header.producer_id]",
    ),
    _planted(
        "a producer's word counts for partitions to which it has not written",
        "broker.transaction_replica",
        "left.difference_update(self._targets(request.partitions, request.groups))",
        "left.clear()",
    ),
    _planted(
        "what is enlisted is lost when the transaction before is complete",
        "broker.transactions",
        "phase=phase, ended=_remembered(ended)",
        "phase=phase, ended=_remembered(ended), partitions=old.partitions[:1]",
    ),
    _planted(
        "a transaction that is begun with a commit counts as told of it",
        "broker.transactions",
        "            ended=_end(old, True, Cause.PRODUCER),",
        "            ended=_remembered(_end(old, True, Cause.PRODUCER)),",
    ),
    _planted(
        "a new producer leaves the transaction of the last one open",
        "broker.transactions",
        "        if old.phase is Phase.ONGOING:\n            cause",
        "        if False:\n            cause",
    ),
    _planted(
        "a client writes before it has enlisted",
        "client.transaction",
        "        if view not in self._members:\n            return None\n        self._written",
        "        self._written",
    ),
)
