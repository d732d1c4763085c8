"""Majorities: what a set of voters, or two sets in a joint configuration, has decided.

Pure functions on a ConfState. In a joint configuration a decision needs a majority of each half (thesis
section 4.3), so an index is committed up to the lower of the two halves and a vote is won when both are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from itertools import repeat

from raftlog.raft.types import ConfState


class VoteResult(Enum):
    PENDING = "pending"
    WON = "won"
    LOST = "lost"


def majority(count: int) -> int:
    """How many of ``count`` voters are a majority."""
    return count // 2 + 1


def voter_ids(conf: ConfState) -> list[int]:
    """Every replica whose vote counts, each once, in ascending order."""
    return sorted({*conf.voters, *conf.outgoing})


def is_voter(conf: ConfState, replica: int) -> bool:
    """Whether ``replica`` counts in any half."""
    return replica in conf.voters or replica in conf.outgoing


def _half_index(voters: Iterable[int], match: Mapping[int, int]) -> int:
    indexes = sorted(map(match.get, voters, repeat(0)))
    # In ascending order, the element at (n - 1) // 2 and all n // 2 after it are at least as high: a
    # majority.
    return indexes[(len(indexes) - 1) // 2]


def quorum_index(conf: ConfState, match: Mapping[int, int]) -> int:
    """The highest index that a quorum has reached.

    Args:
        conf: with at least one voter.
        match: durable index of each replica; one that is missing counts as 0.
    """
    index = _half_index(conf.voters, match)
    if conf.outgoing:
        index = min(index, _half_index(conf.outgoing, match))
    return index


def _half_result(voters: tuple[int, ...], votes: Mapping[int, bool]) -> VoteResult:
    needed = majority(len(voters))
    granted = refused = 0
    for voter in voters:
        vote = votes.get(voter)
        if vote is None:
            continue
        if vote:
            granted += 1
        else:
            refused += 1
    if granted >= needed:
        return VoteResult.WON
    if len(voters) - refused < needed:
        return VoteResult.LOST
    return VoteResult.PENDING


def vote_result(conf: ConfState, votes: Mapping[int, bool]) -> VoteResult:
    """Outcome of an election given the votes so far; votes of replicas that are not voters do not count."""
    result = _half_result(conf.voters, votes)
    if not conf.outgoing:
        return result
    other = _half_result(conf.outgoing, votes)
    if VoteResult.LOST in (result, other):
        return VoteResult.LOST
    return VoteResult.WON if result is other is VoteResult.WON else VoteResult.PENDING
