"""How entries get into a leader's log: proposals, configuration changes, and the leader's own."""

from __future__ import annotations

from collections.abc import Iterable

from raftlog.errors import Busy, NotLeader
from raftlog.raft.confchange import enter
from raftlog.raft.confstack import encode_conf
from raftlog.raft.node import Node
from raftlog.raft.progress import Progress
from raftlog.raft.quorum import is_voter
from raftlog.raft.types import LEADER, Entry
from raftlog.record.frame import CONF, FRAME_HEADER_BYTES, Buffer


def require_leader(node: Node) -> None:
    """Raise NotLeader unless ``node`` leads. It names no leader: clients take that for a broker's id, and the
    core knows replicas."""
    if node.role is not LEADER:
        raise NotLeader(f"replica {node.id} does not lead in term {node.term}", leader=None, term=node.term)


def propose(node: Node, kind: int, payload: Buffer, leader_time_ms: int) -> Entry:
    """Append one entry as leader (see RawNode.propose)."""
    require_leader(node)
    assert kind != CONF, "configurations change through propose_conf"
    if node.transfer_to:
        raise Busy(f"leadership is being transferred to replica {node.transfer_to}")
    size = FRAME_HEADER_BYTES + len(payload)
    limit = node.config.uncommitted_bytes_max
    if node.uncommitted_bytes and node.uncommitted_bytes + size > limit:
        raise Busy(
            f"{node.uncommitted_bytes} bytes are uncommitted; {size} more would pass the limit of {limit}"
        )
    return append_entry(node, kind, payload, leader_time_ms)


def propose_conf(node: Node, voters: Iterable[int], learners: Iterable[int], leader_time_ms: int) -> Entry:
    """Begin a configuration change (see RawNode.propose_conf).

    One at a time, and none before this term's no-op is committed: otherwise two leaders could each commit a
    change that the other does not know of, with majorities that do not meet (the bug in the thesis'
    single-server change, raft-dev, July 2015).
    """
    require_leader(node)
    if node.transfer_to:
        raise Busy(f"leadership is being transferred to replica {node.transfer_to}")
    if node.log.commit < node.term_start:
        raise Busy("this leader has committed nothing in its term yet")
    if not node.conf_settled:
        raise Busy("a configuration change is under way")
    conf = enter(node.confs.current, voters, learners)
    return append_entry(node, CONF, encode_conf(conf), leader_time_ms)


def append_entry(node: Node, kind: int, payload: Buffer, leader_time_ms: int) -> Entry:
    """Encode and append; the leader's time never runs back along the log."""
    if node.quiet:
        node.wake()
    log = node.log
    entry = Entry.create(
        log.last_crc,
        kind,
        node.term,
        log.last_index + 1,
        max(leader_time_ms, log.last_leader_time_ms),
        payload,
    )
    if node.append((entry,)):
        follow_configuration(node)
    node.uncommitted_bytes += len(entry.frame)
    node.pump_wanted = True
    return entry


def follow_configuration(node: Node) -> None:
    """Make ``progress`` hold exactly the other members of the configuration in force."""
    members = node.confs.current.members - {node.id}
    for gone in [replica for replica in node.progress if replica not in members]:
        del node.progress[gone]
    for replica in sorted(members - node.progress.keys()):
        node.progress[replica] = Progress(replica, node.log.last_index + 1, node.now_ms)
    if not is_voter(node.confs.current, node.transfer_to):
        node.transfer_to = 0  # it is to lose its vote: nothing to wait for
    node.pump_wanted = True
