"""The leader's side: replicate, count, commit, keep in touch.

Inputs only mark that something may have to be sent (``pump_wanted``); :func:`pump` looks at every follower
once, when Ready is taken. Many proposals between two Readys so become one message per follower, and the news
of a commit rides on entries that are about to go anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

from raftlog.raft import heartbeats, quiescence, transfer
from raftlog.raft.confchange import leave
from raftlog.raft.confstack import encode_conf
from raftlog.raft.node import Node
from raftlog.raft.progress import PROBE, REPLICATE, SNAPSHOT, Progress
from raftlog.raft.proposals import append_entry, follow_configuration
from raftlog.raft.quorum import is_voter, quorum_index
from raftlog.raft.types import AppendRequest, AppendResponse, Entry, HeartbeatResponse, LoadRequest, Role
from raftlog.record.frame import FrameKind


def become_leader(node: Node) -> None:
    """Take office: append the no-op at once, so that what earlier terms left can be committed (Raft section
    8)."""
    node.role = Role.LEADER
    node.leader = node.id
    node.votes = {}
    node.early_until_ms = 0
    log = node.log
    node.progress = {}
    follow_configuration(node)
    node.uncommitted_bytes = log.size_of(log.commit + 1, log.last_index + 1)
    node.term_start = append_entry(node, FrameKind.NOOP, b"", log.last_leader_time_ms).index
    node.deadline_ms = node.now_ms + node.config.heartbeat_ms


# -- commit --------------------------------------------------------------------------------------------------


def advance_commit(node: Node) -> None:
    """Commit what a quorum holds durably, counting only entries of this term.

    An entry of an earlier term on a majority may still be overwritten (Raft figure 8); it is committed
    together with the first entry of this term above it. Terms never fall along the log and this term began at
    ``term_start``, so comparing indexes is enough.
    """
    conf = node.confs.current
    match = {}
    for replica, progress in node.progress.items():
        match[replica] = progress.match
    match[node.id] = node.durability.index  # its own disk counts as one, and only what is synced
    index = quorum_index(conf, match)
    log = node.log
    if index > log.commit and index >= node.term_start:
        node.uncommitted_bytes -= log.size_of(log.commit + 1, index + 1)
        log.commit = index
        node.pump_wanted = node.pump_wanted or node.config.announce_commits
        _configuration_committed(node)


def _configuration_committed(node: Node) -> None:
    """If the configuration in force is committed: end a joint phase, or end office when it has no vote for
    us."""
    conf = node.confs.current
    if node.log.commit < node.confs.current_index:
        return
    if conf.is_joint and conf.auto_leave:
        append_entry(node, FrameKind.CONF, encode_conf(leave(conf)), node.log.last_leader_time_ms)
    elif not is_voter(conf, node.id):
        # Thesis section 4.2.2: it managed the group without counting itself until now. The others learn of
        # the commit from messages that are made before it goes.
        pump(node, announce=True)
        step_down(node)


# -- sending -------------------------------------------------------------------------------------------------


def pump(node: Node, *, announce: bool = False) -> None:
    """Send every follower what it can take now.

    Args:
        node: a leader.
        announce: tell followers of a commit even when nothing else goes to them.
    """
    node.pump_wanted = False
    announce = announce or node.config.announce_commits
    heartbeats.start_round(node)
    for progress in node.progress.values():
        if progress.connected:
            if progress.state is REPLICATE:
                _stream(node, progress, announce)
            elif progress.state is PROBE and not progress.paused:
                _probe(node, progress)


def _stream(node: Node, progress: Progress, announce: bool) -> None:
    """Fill the follower's window; if there is nothing to send it, tell it the commit index if that is news
    and to be told at once (else the next entries or heartbeat do)."""
    log, config = node.log, node.config
    sent = False
    while progress.next <= log.last_index:
        if progress.next < log.first_index:
            _need_snapshot(node, progress)
            return
        window = progress.window_bytes(config.inflight_messages_max, config.inflight_bytes_max)
        if not window or progress.loading:
            break
        limit = min(window, config.append_bytes_max)
        if progress.next < log.offset:
            if not progress.fits(progress.room_needed, window):
                break
            progress.loading = True
            node.loads.append(LoadRequest(progress.id, progress.next, limit))
            break
        entries, size = log.batch(progress.next, limit)
        if not progress.fits(size, window):
            break
        _send(node, progress, entries[0].prev_crc, entries)
        progress.sent(entries[-1].index, size)
        sent = True
    if announce and not sent and progress.commit_sent < min(log.commit, progress.next - 1):
        _send(node, progress, log.crc(progress.next - 1), ())


def _probe(node: Node, progress: Progress) -> None:
    """Ask whether the logs meet below ``next``. What is in memory goes along: the guess is mostly right."""
    log = node.log
    if log.term(progress.next - 1) is None:
        _need_snapshot(node, progress)
        return
    if log.offset <= progress.next <= log.last_index:
        entries, _ = log.batch(progress.next, node.config.append_bytes_max)
        _send(node, progress, entries[0].prev_crc, entries)
    else:
        _send(node, progress, log.crc(progress.next - 1), ())
    progress.paused = True


def _need_snapshot(node: Node, progress: Progress) -> None:
    progress.become_snapshot()
    node.snapshots.append(progress.id)


def _send(node: Node, progress: Progress, prev_crc: int, entries: tuple[Entry, ...]) -> None:
    log = node.log
    prev_index = progress.next - 1
    prev_term = log.term(prev_index)
    assert prev_term is not None, (prev_index, log)
    progress.commit_sent = min(log.commit, prev_index + len(entries))
    node.messages.append(
        AppendRequest(progress.id, node.id, node.term, prev_index, prev_term, prev_crc, log.commit, entries)
    )


def on_loaded(node: Node, to: int, entries: Sequence[Entry]) -> None:
    """Entries that were not in memory have been read for follower ``to``."""
    progress = node.progress.get(to)
    if progress is None or not progress.loading:
        return
    progress.loading = False
    node.pump_wanted = True
    if not entries or progress.state is not REPLICATE or entries[0].index != progress.next:
        return  # the follower moved on meanwhile
    if node.log.term(entries[-1].index) != entries[-1].term:
        return  # read before this term began, and cut since (log matching: the last one speaks for all)
    size = sum(len(entry.frame) for entry in entries)
    if progress.fits(
        size, progress.window_bytes(node.config.inflight_messages_max, node.config.inflight_bytes_max)
    ):
        _send(node, progress, entries[0].prev_crc, tuple(entries))
        progress.sent(entries[-1].index, size)
    else:
        progress.room_needed = size  # storage reads one entry at least, however large


def on_load_failed(node: Node, to: int) -> None:
    """Storage could not read for ``to``: try again after its next heartbeat response."""
    progress = node.progress.get(to)
    if progress is not None and progress.loading:
        progress.become_probe()
        progress.paused = True


def on_snapshot_sent(node: Node, to: int, index: int) -> None:
    """Follower ``to`` says that it has a snapshot at ``index``: go on behind it, with a probe, for the log
    there may be another by now."""
    progress = node.progress.get(to)
    if progress is not None and progress.state is SNAPSHOT:
        progress.become_probe()
        progress.next = max(progress.next, min(index, node.log.last_index) + 1)
        node.pump_wanted = True


def on_snapshot_failed(node: Node, to: int) -> None:
    """The host could not bring a snapshot to ``to``: look again where it stands after its next answer."""
    progress = node.progress.get(to)
    if progress is not None and progress.state is SNAPSHOT:
        progress.become_probe()
        progress.paused = True


# -- answers -------------------------------------------------------------------------------------------------


def handle_append_response(node: Node, message: AppendResponse) -> None:
    """A follower accepted or refused."""
    progress = node.progress.get(message.sender)
    if progress is None:
        return
    progress.heard_ms = node.now_ms
    if message.rejected:
        # Its hint names a term not above ours at the refused index; nor can the logs agree where ours is
        # higher.
        meet = node.log.meeting_point(message.hint_index, message.hint_term)
        if progress.rejected(message.index, meet):
            node.pump_wanted = True
        return
    assert message.index <= node.log.last_index, f"{message} is beyond {node.log}"
    news = progress.acknowledged(message.index)
    if progress.state is PROBE:
        streams = message.index == progress.match  # else an old answer, which does not speak of this probe
    else:
        streams = progress.state is SNAPSHOT and message.index >= node.log.first_index - 1
    if streams:
        progress.become_replicate()
    if streams or progress.next <= node.log.last_index:
        node.pump_wanted = True
    if news:
        if node.transfer_to:
            transfer.go_on(node, progress)
        if message.index > node.log.commit:
            advance_commit(node)


def handle_heartbeat_response(node: Node, message: HeartbeatResponse) -> None:
    """A sign of life; also the moment to notice that something was lost."""
    progress = node.progress.get(message.sender)
    if progress is None:
        return
    progress.heard_ms = node.now_ms
    progress.connected = True
    heartbeats.answered(node, progress, message.context)
    log = node.log
    if progress.state is PROBE:
        progress.paused = False
        node.pump_wanted = True
    elif progress.state is REPLICATE and progress.match < progress.next - 1:
        # Something is in flight. If neither log nor acknowledgement moved for a whole heartbeat, ask with an
        # empty append behind it: a slow follower answers in its time, one that lost a message refuses it.
        if progress.next < log.first_index:
            node.pump_wanted = True  # what comes next was compacted away meanwhile
        elif (progress.seen_match, progress.seen_last) == (progress.match, message.last_index):
            _send(node, progress, log.crc(progress.next - 1), ())
        progress.seen_match, progress.seen_last = progress.match, message.last_index
    elif progress.state is REPLICATE and message.amnesiac and progress.next >= log.first_index:
        _send(node, progress, log.crc(progress.next - 1), ())  # it waits for our commit index


# -- connections and time ------------------------------------------------------------------------------------


def peer_lost(node: Node, replica: int) -> None:
    """The connection to a follower's broker broke, and what was in flight with it."""
    progress = node.progress.get(replica)
    if progress is not None:
        progress.connected = False
        if progress.state is not SNAPSHOT:
            progress.become_probe()
        if node.transfer_to == replica:
            node.transfer_to = 0


def peer_restored(node: Node, replica: int, forgot: bool) -> None:
    """The connection is back: probe at once. ``forgot``: its disk may have lost what it acknowledged."""
    progress = node.progress.get(replica)
    if progress is not None:
        if forgot:
            progress.match = 0
            # What was said to the former incarnation, commit indexes above all, must not reach this one.
            node.messages = [message for message in node.messages if message.to != replica]
        progress.connected = True
        progress.become_probe()
        progress.next = node.log.last_index + 1 if forgot else progress.next
        node.pump_wanted = True


def tick(node: Node, late_ms: int) -> None:
    """Heartbeats are due: see first whether a quorum still answers, and whether a transfer takes too long.

    A host that was held up did not read answers meanwhile either: that time does not count against the
        followers.
    """
    if late_ms > node.config.heartbeat_ms:
        for progress in node.progress.values():
            progress.heard_ms += late_ms
    if not heartbeats.has_quorum(node):
        node.become_follower(node.term, 0)
        return
    transfer.give_up_late(node)
    if not quiescence.rest_if_idle(node):
        heartbeats.broadcast(node)
        node.deadline_ms = node.now_ms + node.config.heartbeat_ms


def step_down(node: Node) -> None:
    """Stop leading, in the same term; the follower that holds most is told to campaign at once."""
    transfer.nudge_best_follower(node)
    node.become_follower(node.term, 0)
