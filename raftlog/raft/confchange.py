"""Changing the configuration by joint consensus (thesis section 4.3): pure functions from one ConfState to
another.

::

    voters 1 2 3            voters 2 3 4, outgoing 1 2 3             voters 2 3 4
    ───── enter ──────────▶ ───── leave, once committed ───────────▶
                            every decision needs both majorities

Entering and leaving are ordinary log entries, in force as soon as they are appended. The leader appends the
leaving one by itself when the joint one is committed; so does a new leader that finds the group in a joint
phase.
"""

from __future__ import annotations

from collections.abc import Iterable

from raftlog.errors import ConfigError
from raftlog.raft.types import ConfState


def enter(current: ConfState, voters: Iterable[int], learners: Iterable[int]) -> ConfState:
    """The first step from ``current`` (not joint) towards these voters and learners.

    If only learners change it is the last step as well: they do not count. A voter that becomes a learner
        stays a
    voter of the outgoing half until the joint phase ends.

    Raises:
        ConfigError: no voter, an id twice or below 1, a new voter that is not a learner yet (it would count
            before it has the log), or nothing to change.
    """
    assert not current.is_joint, current
    new_voters, new_learners = tuple(sorted(voters)), tuple(sorted(learners))
    together = new_voters + new_learners
    if not new_voters:
        raise ConfigError("a group needs at least one voter")
    if len(set(together)) != len(together) or min(together) < 1:
        raise ConfigError(f"voters {new_voters} and learners {new_learners}: each id once, and above 0")
    strangers = set(new_voters) - current.members
    if strangers:
        raise ConfigError(f"replicas {sorted(strangers)} must be learners before they become voters")
    if new_voters == tuple(sorted(current.voters)):
        if new_learners == tuple(sorted(current.learners)):
            raise ConfigError("that is the configuration in force")
        return ConfState(new_voters, new_learners)
    still_voting = set(current.voters)
    return ConfState(
        new_voters,
        tuple(learner for learner in new_learners if learner not in still_voting),
        current.voters,
        tuple(learner for learner in new_learners if learner in still_voting),
        auto_leave=True,
    )


def leave(joint: ConfState) -> ConfState:
    """The configuration that ends a joint phase."""
    assert joint.is_joint, joint
    return ConfState(joint.voters, tuple(sorted({*joint.learners, *joint.learners_next})))
