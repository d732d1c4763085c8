"""Elections: PreVote, votes, leases, and who campaigns when.

::

    FOLLOWER ──timeout, or──▶ PRE_CANDIDATE ──majority would──▶ CANDIDATE ──majority──▶ LEADER
       ▲      connection lost       │            vote               │        votes        │
       └──── a leader speaks, a higher term, refused ◀──────────────┴──── no quorum ◀─────┘

A pre-candidate changes nothing durable (thesis section 9.6): a replica that was cut off cannot raise the term
of a healthy group. A candidate asks for votes only once its own term and vote are durable. Were it to ask
before, it could crash, forget, lose entries that were not synced, campaign again in the same term with a
shorter log, and be elected by answers to its first request.
"""

from __future__ import annotations

from raftlog.raft.leader import become_leader
from raftlog.raft.node import NEVER, Node
from raftlog.raft.quorum import VoteResult, vote_result, voter_ids
from raftlog.raft.types import TERM_MAX, Role, VoteRequest, VoteResponse


def on_deadline(node: Node, late_ms: int) -> None:
    """The election timer of a node that does not lead has run out.

    If the host was held up, the leader's heartbeats may lie unread before it: once, it gets the time to read
    them.
    """
    if late_ms > node.config.heartbeat_ms and node.leader and not node.excused:
        node.excused = True
        node.deadline_ms = node.now_ms + node.config.heartbeat_ms
    elif node.is_promotable:
        start_pre_vote(node)
    else:
        node.leader = 0
        node.deadline_ms = NEVER


def start_pre_vote(node: Node) -> None:
    """Ask whether a majority would vote for this node, without touching the term."""
    if node.term >= TERM_MAX:
        node.arm_election()
        return
    node.role = Role.PRE_CANDIDATE
    node.leader = 0
    node.votes = {}
    _arm(node, patience=2)
    _solicit(node, node.term + 1, pre=True)
    record_vote(node, node.id, True)


def start_election(node: Node, *, transfer: bool = False) -> None:
    """Campaign in the next term. ``transfer``: asked to by the leader, so leases do not bind the voters."""
    if node.term >= TERM_MAX:
        node.become_follower(node.term, 0)
        return
    node.become_follower(node.term + 1, 0)
    node.role = Role.CANDIDATE
    node.vote = node.id
    _arm(node, patience=4)
    _solicit(node, node.term, pre=False, transfer=transfer)
    # The vote for itself is a message to itself: it counts when it is durable.
    node.durability.hold(VoteResponse(node.id, node.id, node.term, True))


def _solicit(node: Node, term: int, *, pre: bool, transfer: bool = False) -> None:
    last_index, last_term = node.log.last_index, node.log.last_term
    for voter in voter_ids(node.confs.current):
        if voter != node.id:
            request = VoteRequest(voter, node.id, term, last_index, last_term, pre, transfer)
            if pre:
                node.messages.append(request)
            else:
                node.durability.hold(request)


def _arm(node: Node, patience: int) -> None:
    """When to try again: soon while the leader is known to be lost, each rank at its own time; else a full
    timeout.

    Args:
        patience: how many rank delays an answer may take (a vote waits for two disks, a pre-vote for none).
    """
    if node.now_ms < node.early_until_ms:
        delay = node.config.rank_delay_ms
        wait = delay * (patience + 2 * node.rank(lost=0))
        node.deadline_ms = node.now_ms + wait + node.random.randrange(delay + 1)
    else:
        node.arm_election()


def leader_lost(node: Node, replica: int) -> None:
    """The connection to the leader's broker broke. Its lease ends *here* only: those who still hear it refuse
    us.

    The survivor of lowest id goes first, the next one rank_delay_ms later: two at once would split the vote.
    """
    delay = node.config.rank_delay_ms
    node.leader = 0
    if node.is_promotable:
        node.early_until_ms = node.now_ms + node.config.election_timeout_ms
        wait = node.rank(lost=replica) * delay + node.random.randrange(delay + 1)
        node.deadline_ms = min(node.deadline_ms, node.now_ms + wait)


def handle_vote_request(node: Node, message: VoteRequest) -> None:
    """RequestVote, receiver's side (Raft figure 2). The caller has dealt with terms and leases."""
    candidate = message.sender
    # Who has forgotten what its own log held cannot compare.
    up_to_date = not node.amnesiac and node.log.is_up_to_date(message.last_index, message.last_term)
    if message.pre:
        # Would we vote, were it real? Several candidates may hear yes. A replica with a leader of this very
        # term and a lease has refused before it came here.
        granted = up_to_date and message.term > node.term
        term = message.term if granted else node.term
        node.messages.append(VoteResponse(candidate, node.id, term, granted, True))
        return
    free = node.vote == candidate or (node.vote == 0 and node.leader == 0)
    if free and up_to_date:
        node.vote = candidate
        node.arm_election()
        node.durability.hold(VoteResponse(candidate, node.id, node.term, True))
    else:
        node.messages.append(VoteResponse(candidate, node.id, node.term, False))


def refuse_in_lease(node: Node, message: VoteRequest) -> None:
    """A leader is there: answer a pre-vote so that the sender need not wait; leave a vote unanswered."""
    if message.pre:
        node.messages.append(VoteResponse(message.sender, node.id, node.term, False, True))


def handle_vote_response(node: Node, message: VoteResponse) -> None:
    """A vote, or a pre-vote, for the campaign under way."""
    if message.pre:
        expected = node.term + 1 if message.granted else node.term
        if node.role is not Role.PRE_CANDIDATE or message.term != expected:
            return
    elif node.role is not Role.CANDIDATE:
        return
    record_vote(node, message.sender, message.granted)


def record_vote(node: Node, voter: int, granted: bool) -> None:
    """Count one vote; the first answer of a voter stands."""
    node.votes.setdefault(voter, granted)
    result = vote_result(node.confs.current, node.votes)
    if result is VoteResult.WON:
        if node.role is Role.PRE_CANDIDATE:
            start_election(node)
        else:
            become_leader(node)
    elif result is VoteResult.LOST:
        node.become_follower(node.term, 0)
