"""Quiet groups: a group with nothing to do sends nothing and waits for nothing.

::

                    idle for quiet_after_ms, all level        the leader agrees with us
    leader  AWAKE ─────────────────────────────────▶ QUIET    follower AWAKE ───────────▶ QUIET
              ▲       last word: Heartbeat(quiet)       │        ▲   Heartbeat(quiet)       │
              └──── a proposal, a read, any message ────┘        └─ any message, RawNode.wake ┘

Who is quiet has no deadline. In its place stands what the host knows of its peers' *brokers*, which say every
heartbeat that they live: one message per pair of brokers, however many groups they share. The host wakes a
quiet node (``RawNode.wake``) when a broker that its group depends on has not been heard for an election
timeout, or says that its replica is out of service. After that the ordinary timers rule.

Why it is safe: being quiet changes no log, no term and no vote. It only puts off campaigns and prolongs the
lease, and a lease only ever delays votes: no proof of safety uses it.

Why it is live: a quiet follower believes in a leader L that may have left office without its knowing.

- L's host is dead, cut off or frozen: it is not heard, and the host wakes us.
- L is out of service on a living host: the host is told so by L's host, and wakes us.
- L follows now, in any term: then it is awake, with an election timer, and asks us for a (pre-)vote when that
  runs out. The request wakes us; and as it comes from L itself it ends L's lease (see ``RawNode.step``).
- Somebody else leads: that leader does not take us for level, so it is awake and sends to us.

What a connection swallows is one of these too: the host learns that it broke (``RawNode.peer_lost``). If the
quiet heartbeat itself is lost, the follower's timer runs out and its pre-vote wakes the leader.
"""

from __future__ import annotations

from collections.abc import Mapping

from raftlog.raft.node import Node
from raftlog.raft.progress import Progress, ProgressState
from raftlog.raft.types import Heartbeat, Role


def rest_if_idle(node: Node) -> bool:
    """On a leader whose heartbeats are due: if nothing has happened for long enough and every member is
    level, send the last word instead and rest. Returns whether it did."""
    seen = (node.log.last_index, node.reads.round)
    if seen != node.idle_seen:
        node.idle_seen = seen
        node.idle_since_ms = node.now_ms
    quiet_after_ms = node.config.quiet_after_ms
    if not quiet_after_ms or node.now_ms - node.idle_since_ms < quiet_after_ms or not _is_level(node):
        return False
    last = node.log.last_index
    for progress in node.progress.values():
        node.messages.append(Heartbeat(progress.id, node.id, node.term, last, node.reads.round, True))
        progress.commit_sent = last
    node.rest()
    return True


def _is_level(node: Node) -> bool:
    """Whether nothing is under way and all members hold the whole log, as far as this leader knows."""
    log, reads = node.log, node.reads
    return (
        log.commit == log.last_index == log.applied
        and node.durability.is_idle
        and not node.confs.current.is_joint
        and not node.transfer_to
        and not reads.arrived
        and not reads.waiting
        and all(_follower_is_level(node, progress) for progress in node.progress.values())
    )


def _follower_is_level(node: Node, progress: Progress) -> bool:
    """Whether this follower has everything and answered the last heartbeat, which was due one interval before
    this one: an answer that is still under way would wake us at once."""
    return (
        progress.connected
        and progress.state is ProgressState.REPLICATE
        and progress.match == node.log.last_index
        and progress.heard_ms >= node.deadline_ms - node.config.heartbeat_ms
    )


def rest_with_leader(node: Node, message: Heartbeat) -> bool:
    """On a follower, after it took in a heartbeat: rest if it was the leader's last word and we agree with
    it. Returns whether we do; else the answer, as to any heartbeat, wakes the leader.

    Committed entries are the same everywhere, so equal numbers are equal logs."""
    log = node.log
    if node.amnesiac or not message.quiet or not message.commit == log.commit == log.last_index:
        return False
    node.rest()
    return True


def wake(node: Node, heard_ms: Mapping[int, int]) -> None:
    """The host wakes this node, and knows when it last heard of some members' brokers: see RawNode.wake."""
    if not node.quiet:
        return
    node.wake()
    if node.role is Role.LEADER:
        # CheckQuorum judges by what the brokers said while their replicas had nothing to say.
        for replica, progress in node.progress.items():
            progress.heard_ms = min(node.now_ms, heard_ms.get(replica, node.now_ms))
    else:
        leader_heard(node, heard_ms.get(node.leader, 0))
        # The timeout counts from the last sign of life, as if each had been a heartbeat of this group.
        elapsed = node.now_ms - node.leader_heard_ms
        node.deadline_ms = max(node.now_ms, node.deadline_ms - elapsed)


def leader_heard(node: Node, heard_ms: int) -> None:
    """The leader's broker was heard then: see RawNode.leader_heard."""
    node.leader_heard_ms = max(node.leader_heard_ms, heard_ms)
