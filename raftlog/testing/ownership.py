"""One owner per partition: what coordinators write down, compared with what members really hold.

A member that is told to give up a partition says when it has. From then on the coordinator may give it to
another; if a late copy of a message, or a mistake, made it believe so too early, two would read it. No client
can see that at once, but the simulator sees both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from raftlog.broker.group_replica import GroupReplica
from raftlog.state.groups import Group, Key, Member, keys_of
from raftlog.testing.books import GroupKey, Violation


class Ownership:
    """The books of one cluster's groups.

    Attributes:
        holds: member id -> the partitions that its consumer holds now; of those that nobody knows: none.
    """

    def __init__(self) -> None:
        self.holds: Callable[[str], Iterable[Key]] = lambda _: ()
        self._last: dict[GroupKey, tuple[int, dict[str, Group]]] = {}
        """The newest state of each partition of ``__groups`` that any replica has applied."""

    def applied(self, replica: GroupReplica) -> None:
        """A replica has applied something.

        Raises:
            Violation: two members own a partition, or one is released that its member still holds.
        """
        spec, machine = replica.log.spec, replica.machine
        index, before = self._last.get((spec.topic_id, spec.partition), (0, {}))
        if machine.applied_index <= index:
            return
        self._last[spec.topic_id, spec.partition] = machine.applied_index, dict(machine.groups)
        try:
            machine.check_invariants()
        except AssertionError as error:
            raise Violation(f"one owner: {error}") from error
        for group_id, old in before.items():
            new = machine.groups.get(group_id)
            if new is not None and new is not old:
                for member in new.members.values():
                    if member.member_id in old.members:
                        self._check_released(group_id, old.members[member.member_id], member)

    def _check_released(self, group_id: str, old: Member, new: Member) -> None:
        if old is new:
            return
        released = {*keys_of(old.assigned), *keys_of(old.revoking)}
        released.difference_update(keys_of(new.assigned), keys_of(new.revoking))
        kept = released.intersection(self.holds(new.member_id)) if released else ()
        if kept:
            parts = sorted(partition for _, partition in kept)
            raise Violation(
                f"one owner: group {group_id} takes partitions {parts} for released, which member "
                f"{new.member_id[:8]} still holds"
            )
