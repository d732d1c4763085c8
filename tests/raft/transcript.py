"""Interaction scripts: commands to a group in memory, and the transcript of what came of them.

A script is a text file of blocks with an empty line between them. A block is comments (``#``), commands (a
line each), a line ``----`` and what the commands print. Nothing happens in a group but what a command asks
for, so a script can hold a message or a sync back until the moment that matters. The form is that of etcd's
``raft/testdata``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from incarnations import power_cut, reconnect
from raft_cluster import Cluster, chain

from raftlog.errors import RaftlogError
from raftlog.raft import types
from raftlog.raft.confstack import decode_conf
from raftlog.raft.types import (
    Append,
    AppendRequest,
    AppendResponse,
    ConfState,
    Entry,
    Heartbeat,
    HeartbeatResponse,
    InstallSnapshot,
    Message,
    ReadIndexRequest,
    ReadIndexResponse,
    Ready,
    Role,
    Snapshot,
    VoteRequest,
    VoteResponse,
)
from raftlog.record.frame import FrameKind

RULE = "----"


# -- scripts as text -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """Some commands with the comments before them, and what they should print (comments alone print
    nothing)."""

    head: tuple[str, ...]
    expected: tuple[str, ...]

    @property
    def commands(self) -> list[str]:
        return [line for line in self.head if not line.startswith("#")]

    def __str__(self) -> str:
        return "\n".join((*self.head, RULE, *self.expected) if self.commands else self.head)


def parse(text: str) -> list[Block]:
    """The blocks of a script."""
    blocks = []
    for part in text.strip().split("\n\n"):
        lines = part.strip("\n").split("\n")
        at = lines.index(RULE) if RULE in lines else len(lines)
        blocks.append(Block(tuple(lines[:at]), tuple(lines[at + 1 :])))
    return blocks


def play(text: str) -> str:
    """The script with what its commands print now."""
    stage = Stage()
    played = []
    for block in parse(text):
        printed = [line for command in block.commands for line in stage.run(command)]
        played.append(str(Block(block.head, tuple(printed or ["ok"]))))
    return "\n\n".join(played) + "\n"


# -- words ---------------------------------------------------------------------------------------------------


def conf_words(conf: ConfState) -> str:
    halves = [" ".join(map(str, half)) for half in (conf.voters, conf.outgoing) if half]
    words = f"voters ({') and ('.join(halves)})"
    for name, members in (("learners", conf.learners), ("learners next", conf.learners_next)):
        if members:
            words += f", {name} ({' '.join(map(str, members))})"
    return words


def entry_words(entry: Entry) -> str:
    place = f"{entry.index}/{entry.term}"
    if entry.kind == FrameKind.NOOP:
        return f"{place} no-op"
    if entry.kind == FrameKind.CONF:
        return f"{place} {conf_words(decode_conf(entry.payload))}"
    payload = bytes(entry.payload).decode().rstrip(".")
    return place if payload == place else f"{place} {payload}"  # entries of ``chain`` say no more


def entries_words(entries: tuple[Entry, ...]) -> str:
    return f"[{'; '.join(map(entry_words, entries))}]"


def message_words(message: Message) -> str:
    """``sender->to Kind term, what else it says``; entries are index/term."""
    words = f"{message.sender}->{message.to} {type(message).__name__} term {message.term}"
    match message:
        case VoteRequest():
            kind = "pre-vote, " if message.pre else "transfer, " if message.transfer else ""
            return f"{words}, {kind}log ends {message.last_index}/{message.last_term}"
        case VoteResponse():
            kind = "pre-vote " if message.pre else ""
            return f"{words}, {kind}{'granted' if message.granted else 'refused'}"
        case AppendRequest():
            prev = f"after {message.prev_index}/{message.prev_term}, commit {message.commit}"
            return f"{words}, {prev}{', ' + entries_words(message.entries) if message.entries else ''}"
        case AppendResponse(rejected=True):
            return f"{words}, refused {message.index}, hint {message.hint_index}/{message.hint_term}"
        case AppendResponse():
            return f"{words}, holds {message.index}"
        case Heartbeat():
            read = f", read round {message.context}" if message.context else ""
            return f"{words}, commit {message.commit}{read}{', quiet' * message.quiet}"
        case HeartbeatResponse():
            read = f", read round {message.context}" if message.context else ""
            return f"{words}{read}{', amnesiac' * message.amnesiac}"
        case InstallSnapshot():
            return f"{words}, {snapshot_words(message.snapshot)}"
        case ReadIndexRequest():
            return f"{words}, read {message.context}"
        case ReadIndexResponse():
            return f"{words}, read {message.context} at {message.index}"
    return words


def snapshot_words(snapshot: Snapshot) -> str:
    return f"snapshot at {snapshot.index}/{snapshot.term}, {conf_words(snapshot.conf)}"


def append_words(append: Append) -> str:
    words = f"write #{append.sequence}:"
    if append.hard_state is not None:
        state = append.hard_state
        words += f" term {state.term} vote {state.vote} commit {state.commit}"
    return words + (f" {entries_words(append.entries)}" if append.entries else "")


# -- the group -----------------------------------------------------------------------------------------------


class Told(Cluster):
    """A cluster that tells all that happens in it."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.lines: list[str] = []
        self.hidden: tuple[type, ...] = ()
        self.stalled: set[int] = set()
        """Their disks sync only when a command says so."""
        self.told_ms = 0
        super().__init__(*args, **settings)

    def tell(self, line: str) -> None:
        if self.now != self.told_ms:
            self.told_ms = self.now
            self.lines.append(f"({self.now} ms)")
        self.lines.append(line)

    def tell_message(self, what: str, message: Message) -> None:
        if not isinstance(message, self.hidden):
            self.tell(f"{what}{message_words(message)}")

    def take(self, replica: int, ready: Ready) -> None:
        if ready.soft_state is not None:
            soft = ready.soft_state
            self.tell(f"{replica}: {soft.role.value} in term {soft.term}, leader {soft.leader or 'unknown'}")
        if ready.append is not None:
            self.tell(f"{replica}: {append_words(ready.append)}")
        if ready.committed:
            self.tell(f"{replica}: apply {entries_words(ready.committed)}")
        for context, index in ready.reads:
            self.tell(f"{replica}: read {context} may be served at {index}")
        for to in ready.snapshots:
            self.tell(f"{replica}: {to} needs a snapshot")
        super().take(replica, ready)

    def sync(self, replica: int, count: int | None = None) -> bool:
        return replica not in self.stalled and self.sync_now(replica, count)

    def sync_now(self, replica: int, count: int | None = None) -> bool:
        pending = self.disks[replica].pending
        if pending:
            last = pending[-1 if count is None else min(count, len(pending)) - 1]
            self.tell(f"{replica}: synced #{last.sequence}")
        return super().sync(replica, count)

    def deliver(self, message: Message) -> None:
        lost = self.is_cut(message)
        self.tell_message("lost " if lost else "", message)
        super().deliver(message)

    def serve_load(self) -> bool:
        replica, load = self.loads[0]
        self.tell(f"{replica}: read from disk for {load.to} from {load.index} on")
        return super().serve_load()


class Stage:
    """Runs commands, one line at a time; their words are replicas (``3``) or options (``terms=1,1,2``)."""

    def __init__(self) -> None:
        self.group = Told(1)

    def run(self, line: str) -> list[str]:
        """Run one command; what it prints. A refusal of the core is printed, not raised."""
        name, *words = line.split()
        options = dict(word.split("=", 1) for word in words if "=" in word)
        plain = [word for word in words if "=" not in word]
        command: Callable[..., None] = getattr(self, f"{name.replace('-', '_')}_")
        try:
            command(*plain, **{key.replace("-", "_"): value for key, value in options.items()})
        except RaftlogError as refusal:
            self.group.tell(f"{type(refusal).__name__}: {refusal}")
        lines, self.group.lines = self.group.lines, []
        return lines

    def _each(self, replicas: tuple[str, ...]) -> list[int]:
        return numbers(*replicas) or list(self.group.nodes)

    # -- the group and its parts

    def nodes_(self, voters: str, learners: str = "", spares: str = "", **settings: str) -> None:
        """``nodes 3 [learners=4,5] [spares=6] [setting=value]``: a new group."""
        given = {name: int(value) for name, value in settings.items()}
        self.group = Told(int(voters), learners=numbers(learners), spares=numbers(spares), **given)
        self.group.tell(conf_words(self.group.conf))

    def log_(self, replica: str, terms: str = "", term: str = "0", commit: str = "0") -> None:
        """``log 2 terms=1,1,4 term=4``: give a replica a past, all of it durable."""
        self.group.restart_with(int(replica), chain(numbers(terms)), int(term), int(commit))
        self.raft_log_(replica)

    def crash_(self, *replicas: str) -> None:
        for replica in numbers(*replicas):
            self.group.disks[replica].pending.clear()  # nothing unsynced survives
            self.group.crash(replica)

    def start_(self, *replicas: str) -> None:
        for replica in numbers(*replicas):
            self.group.start(replica)
            self.status_(str(replica))

    def power_cut_(self, replica: str, keep: str) -> None:
        """``power-cut 2 keep=1``: it comes back, amnesiac, with the first ``keep`` entries that it had
        acknowledged; nobody is connected to it."""
        power_cut(self.group, int(replica), int(keep))
        self.status_(replica)

    def reconnect_(self, replica: str) -> None:
        """``reconnect 2``: all notice 2's new incarnation and forget what the former one acknowledged."""
        reconnect(self.group, int(replica))

    def hide_(self, *kinds: str) -> None:
        """``hide Heartbeat``: messages of these types happen without being told; without any: tell all."""
        self.group.hidden = tuple(getattr(types, kind) for kind in kinds)

    # -- inputs

    def campaign_(self, replica: str) -> None:
        self.group.nodes[int(replica)].campaign(self.group.now)

    def elect_(self, replica: str) -> None:
        """``elect 1``: a whole campaign in one line."""
        told, self.group.lines = self.group.lines, []
        node = self.group.elect(int(replica))
        self.group.lines = told
        self.group.tell(f"{replica}: leader in term {node.term}")

    def propose_(self, replica: str, *payloads: str) -> None:
        self.group.propose(int(replica), *(payload.encode() for payload in payloads))

    def conf_(self, replica: str, voters: str, learners: str = "") -> None:
        """``conf 1 voters=1,2 learners=3``: propose this configuration."""
        node = self.group.nodes[int(replica)]
        node.propose_conf(numbers(voters), numbers(learners), self.group.now)

    def transfer_(self, replica: str, to: str) -> None:
        self.group.nodes[int(replica)].transfer_leadership(int(to), self.group.now)

    def read_index_(self, replica: str) -> None:
        context = self.group.read(int(replica))
        self.group.tell(f"{replica}: read {context} asked for")

    def step_down_(self, replica: str) -> None:
        self.group.nodes[int(replica)].step_down(self.group.now)

    def compact_(self, replica: str, index: str) -> None:
        """``compact 1 5``: take a snapshot at 5 and drop the log up to there."""
        self.group.compact(int(replica), int(index))

    def peer_lost_(self, replica: str, peer: str) -> None:
        self.group.nodes[int(replica)].peer_lost(int(peer), self.group.now)

    def peer_restored_(self, replica: str, peer: str) -> None:
        self.group.nodes[int(replica)].peer_restored(int(peer), self.group.now)

    # -- what hosts, disks and network do

    def process_ready_(self, *replicas: str) -> None:
        for replica in self._each(replicas):
            self.group.take_ready(replica)

    def sync_(self, replica: str, count: str = "") -> None:
        """``sync 2 [1]``: the disk syncs its oldest writes (default: all) and says so."""
        self.group.sync_now(int(replica), int(count) if count else None)

    def stall_(self, *replicas: str) -> None:
        """``stall 1``: from now on this disk syncs only on ``sync``; without any: all sync again."""
        self.group.stalled = set(numbers(*replicas))

    def deliver_(
        self, to: str, kind: str = "", *, sender: str = "", drop: str = "no", count: str = "0"
    ) -> None:
        """``deliver 2 [AppendRequest] [sender=1] [count=1] [drop=yes]``: what is under way to 2 arrives, or
        is lost."""
        left = int(count) or len(self.group.wire)
        for message in list(self.group.wire):
            wanted = kind in ("", type(message).__name__) and sender in ("", str(message.sender))
            if left and message.to == int(to) and wanted:
                left -= 1
                self.group.wire.remove(message)
                if drop == "yes":
                    self.group.tell_message("lost ", message)
                else:
                    self.group.deliver(message)

    def stabilize_(self, drop: str = "", snapshots: str = "yes") -> None:
        """``stabilize [drop=AppendResponse,…] [snapshots=no]``: all that can happen without time passing."""
        self.group.settle(snapshots=snapshots == "yes", only=self._passes(drop))

    def advance_(self, ms: str, drop: str = "", snapshots: str = "yes") -> None:
        """``advance 1000``: time passes, and what it brings about happens."""
        self.group.advance(int(ms), snapshots=snapshots == "yes", only=self._passes(drop))

    def _passes(self, drop: str) -> Callable[[Message], bool]:
        kinds = drop.split(",")

        def passes(message: Message) -> bool:
            kept = type(message).__name__ not in kinds
            if not kept:
                self.group.tell_message("lost ", message)
            return kept

        return passes

    def tick_(self, replica: str) -> None:
        """``tick 2``: time passes until 2's timer runs out; 2 alone notices."""
        node = self.group.nodes[int(replica)]
        self.group.now = max(self.group.now, node.deadline_ms)
        node.tick(self.group.now)

    def send_snapshot_(self, *, fail: str = "no") -> None:
        """``send-snapshot [fail=yes]``: a leader's host brings the snapshot that is asked for, or fails."""
        self.group.serve_snapshot(fail=fail == "yes")

    def partition_(self, *replicas: str) -> None:
        """``partition 1 2``: nothing passes between these and the others."""
        self.group.isolate(*numbers(*replicas))

    def heal_(self) -> None:
        self.group.heal()

    # -- looking

    def status_(self, *replicas: str) -> None:
        for replica in self._each(replicas):
            node = self.group.nodes[replica]
            role = f"{node.role.value}{' at rest' * node.quiet}{', amnesiac' * node.amnesiac}"
            self.group.tell(
                f"{replica}: {role}, term {node.term}, vote {node.vote}, leader {node.leader}, "
                f"log [{node.first_index}, {node.last_index}], durable {node.durable_index}, "
                f"commit {node.commit}, applied {node.applied}"
            )
            if node.role is Role.LEADER:
                for progress in node.progress.values():
                    self.group.tell(f"   {progress!r}")

    def raft_log_(self, *replicas: str) -> None:
        for replica in self._each(replicas):
            log = "; ".join(entry_words(entry) for entry in self.group.log_of(replica))
            self.group.tell(f"{replica}: {log or 'empty'}")

    def show_conf_(self, *replicas: str) -> None:
        for replica in self._each(replicas):
            self.group.tell(f"{replica}: {conf_words(self.group.nodes[replica].conf)}")

    def wire_(self) -> None:
        for message in self.group.wire:
            self.group.tell(f"under way: {message_words(message)}")


def numbers(*words: str) -> list[int]:
    """Numbers in words, with commas between them."""
    return [int(number) for word in words for number in word.split(",") if number]
