"""Canaries: a core broken on purpose must be caught by the walk, or the walk proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_replication
from chaos import Chaos

from raftlog.raft import follower, heartbeats, leader, raw_node
from raftlog.raft.confstack import ConfStack
from raftlog.raft.durability import Durability
from raftlog.raft.log import RaftLog
from raftlog.raft.node import Node
from raftlog.raft.progress import Progress
from raftlog.raft.quorum import quorum_index, voter_ids
from raftlog.raft.types import AppendRequest, ConfState, HeartbeatResponse

pytestmark = pytest.mark.walk

Patch = Callable[[pytest.MonkeyPatch], None]


def acknowledges_before_the_sync(patch: pytest.MonkeyPatch) -> None:
    hand_out = Durability.hand_out

    def hand_out_as_if_synced(self: Durability, last_index: int, term: int) -> int:
        self.index, self.term = max(self.index, last_index), term
        return hand_out(self, last_index, term)

    patch.setattr(Durability, "hand_out", hand_out_as_if_synced)


def votes_before_the_sync(patch: pytest.MonkeyPatch) -> None:
    def assign(self: Durability) -> list[Any]:
        messages, self.unassigned = self.unassigned, []
        return list(messages)

    patch.setattr(Durability, "assign", assign)


def votes_twice(patch: pytest.MonkeyPatch) -> None:
    heard = Node.advance

    def forget(self: Node, now_ms: int) -> None:
        heard(self, now_ms)
        self.vote = self.vote if self.leader == self.id or self.votes else 0

    patch.setattr(Node, "advance", forget)


def votes_for_any_log(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RaftLog, "is_up_to_date", lambda self, last_index, last_term: True)


def commits_what_one_replica_has(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(leader, "quorum_index", lambda conf, match: max(match.values()))


def commits_with_one_vote_too_few(patch: pytest.MonkeyPatch) -> None:
    def index(conf: Any, match: dict[int, int]) -> int:
        ranked = sorted((match.get(voter, 0) for voter in voter_ids(conf)), reverse=True)
        return ranked[max(0, len(ranked) // 2 - 1)]

    patch.setattr(leader, "quorum_index", index)


def a_short_message_cuts_the_log(patch: pytest.MonkeyPatch) -> None:
    merge = follower._merge

    def merge_and_cut(node: Node, entries: tuple[Any, ...]) -> None:
        merge(node, entries)
        last = entries[-1].index
        if node.log.last_index > last >= node.log.commit:
            node.cut(last + 1)
            node.matched_index = min(node.matched_index, last)
            node.acked_index = min(node.acked_index, last)

    patch.setattr(follower, "_merge", merge_and_cut)


def believes_the_leaders_commit_blindly(patch: pytest.MonkeyPatch) -> None:
    handle = follower.handle_append

    def handle_and_commit(node: Node, message: Any) -> None:
        handle(node, message)
        node.log.commit = max(node.log.commit, min(message.commit, node.log.last_index))

    patch.setitem(raw_node._HANDLERS, AppendRequest, handle_and_commit)


def skips_the_term_check(patch: pytest.MonkeyPatch) -> None:
    term = RaftLog.term

    def any_term(self: RaftLog, index: int) -> int | None:
        return self.last_term if index <= self.last_index else term(self, index)

    patch.setattr(RaftLog, "term", any_term)


def believes_a_sync_from_before_a_cut(patch: pytest.MonkeyPatch) -> None:
    def cut(self: Durability, index: int) -> None:
        self.index = min(self.index, index - 1)

    patch.setattr(Durability, "cut", cut)


def commits_with_the_new_half_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(leader, "quorum_index", lambda conf, match: quorum_index(ConfState(conf.voters), match))


def serves_reads_without_asking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(heartbeats, "quorum_index", lambda conf, rounds: max(rounds.values()))


def forgets_to_roll_a_configuration_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ConfStack, "cut", lambda self, index: False)


def streams_without_probing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Progress, "rejected", lambda self, index, meet: False)


def never_sends_again(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(raw_node._HANDLERS, HeartbeatResponse, lambda node, message: None)


def test_figure_8_catches_counting_entries_of_earlier_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too rare for the walk: it takes the figure's own steps."""
    advance = leader.advance_commit

    def any_term(node: Node) -> None:
        start, node.term_start = node.term_start, 0
        advance(node)
        node.term_start = start

    monkeypatch.setattr(leader, "advance_commit", any_term)
    with pytest.raises(AssertionError):
        test_replication.test_figure_8_an_old_entry_on_a_majority_is_not_committed_by_counting()


@pytest.mark.parametrize(
    "broken",
    [
        acknowledges_before_the_sync,
        votes_before_the_sync,
        votes_twice,
        votes_for_any_log,
        commits_what_one_replica_has,
        commits_with_one_vote_too_few,
        a_short_message_cuts_the_log,
        believes_the_leaders_commit_blindly,
        skips_the_term_check,
        believes_a_sync_from_before_a_cut,
        commits_with_the_new_half_alone,
        serves_reads_without_asking,
        forgets_to_roll_a_configuration_back,
        streams_without_probing,
        never_sends_again,
    ],
)
def test_the_walk_catches(broken: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    for seed in range(300):
        try:
            Chaos(seed).run(500)
        except AssertionError:
            return
    pytest.fail(f"300 seeds did not notice that the core {broken.__name__}")
