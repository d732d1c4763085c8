"""Planted bugs: can the simulator find them?

Each mutation replaces one piece of source by another, in memory, in a process of its own, and seeds run until
a checker objects. A piece that does not stand in its module exactly once is an error: the code has moved on,
and the mutation must follow.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Final

from raftlog.testing.mutation import Mutation
from raftlog.testing.mutations_controller import CONTROLLER
from raftlog.testing.mutations_coordination import COORDINATION
from raftlog.testing.run import Verdict, run_once
from raftlog.testing.swarm import SEGMENT_BYTES_MIN, Profile, draw

PACKAGE: Final = "raftlog"


_MOVES: Final = {"brokers": 5, "replication": 3}
_INTERVAL: Final = {
    "topic": {"segment_bytes": SEGMENT_BYTES_MIN, "flush": "interval", "flush_interval_ms": 5_000}
}
_RETENTION: Final = {
    "topic": {"segment_bytes": SEGMENT_BYTES_MIN, "retention_ms": 3_000},
    "large_values": 0.4,
}

MUTATIONS: Final = (
    Mutation(
        "votes and requests leave before term and vote are synced",
        "raftlog.raft.durability",
        "if self.confirmed == self.handed:",
        "if True:",
    ),
    Mutation(
        "a late sync confirms entries that have been cut",
        "raftlog.raft.durability",
        "if flight[1] > last:",
        "if False:",
    ),
    Mutation(
        "entries of older terms are committed by counting",
        "raftlog.raft.leader",
        "if index > log.commit and index >= node.term_start:",
        "if index > log.commit:",
    ),
    Mutation(
        "a leader counts itself before its own disk has synced",
        "raftlog.raft.leader",
        "match[node.id] = node.durability.index",
        "match[node.id] = node.log.last_index",
    ),
    Mutation(
        "what is sent to a follower takes no room in its window",
        "raftlog.raft.progress",
        """        self._inflight.append((last_index, size))
        self.inflight_bytes += size
""",
        "",
    ),
    Mutation(
        "a follower acknowledges what is not synced",
        "raftlog.raft.follower",
        "index = min(node.matched_index, durability.index)",
        "index = node.matched_index",
    ),
    Mutation(
        "a follower cuts its log without a conflict",
        "raftlog.raft.follower",
        "if log.term(entry.index) != entry.term:",
        "if True:",
    ),
    Mutation(
        "a follower commits what it has not compared",
        "raftlog.raft.follower",
        "commit = min(message.commit, last)",
        "commit = min(message.commit, log.last_index)",
    ),
    Mutation(
        "a follower does not compare the entry before",
        "raftlog.raft.follower",
        "elif log.term(prev_index) != prev_term:",
        "elif prev_index > log.last_index:",
        ("usurp",),
    ),
    Mutation(
        "heartbeats do not put off elections",
        "raftlog.raft.follower",
        '''have acknowledged to it."""
    node.heard_leader(message.sender)''',
        '''have acknowledged to it."""
    node.leader = message.sender''',
    ),
    Mutation(
        "votes for candidates with shorter logs",
        "raftlog.raft.log",
        "return (last_term, last_index) >= (self.last_term, self.last_index)",
        "return True",
    ),
    Mutation(
        "votes go by length of the log, not by term",
        "raftlog.raft.log",
        "return (last_term, last_index) >= (self.last_term, self.last_index)",
        "return last_index >= self.last_index",
        ("usurp",),
    ),
    Mutation(
        "two votes in one term",
        "raftlog.raft.election",
        "free = node.vote == candidate or (node.vote == 0 and node.leader == 0)",
        "free = True",
    ),
    Mutation(
        "a majority is one too few",
        "raftlog.raft.quorum",
        "return count // 2 + 1",
        "return count // 2",
    ),
    Mutation(
        "committed when one has it",
        "raftlog.raft.quorum",
        "return indexes[(len(indexes) - 1) // 2]",
        "return indexes[-1]",
    ),
    Mutation(
        "a leader serves before its no-op is applied",
        "raftlog.raft.raw_node",
        "return node.role is LEADER and node.log.applied >= node.term_start",
        "return node.role is LEADER",
    ),
    Mutation(
        "a leader that nobody answers stays in office",
        "raftlog.raft.heartbeats",
        "return vote_result(node.confs.current, active) is VoteResult.WON",
        "return True",
        ("deafen", "usurp"),
    ),
    Mutation(
        "the journal tells of a sync before it happens",
        "raftlog.storage.journal",
        "self._disk.begin_commit((write,), partial(self._written, file, write, group, now), group.sync)",
        "self._disk.begin_commit((write,), bool, group.sync); self._written(file, write, group, now, None)",
    ),
    Mutation(
        "a large entry's segment is not synced with the journal",
        "raftlog.storage.journal",
        "await self._disk.commit([*before, *writes] if group.sync else writes, sync=group.sync)",
        "await self._disk.commit(writes[:1]); await self._disk.write(writes[1:], sync=False)",
    ),
    Mutation(
        "term and vote are not recovered",
        "raftlog.storage.recovery",
        "replica.hard_state = decode_hard_state(record.body)",
        "decode_hard_state(record.body)",
    ),
    Mutation(
        "recovery does not replay that entries were replaced",
        "raftlog.storage.recovery",
        "while entries and entries[-1].header.index >= header.index:",
        "while False:",
        ("usurp", "split", "crash twice", "power cut"),
    ),
    Mutation(
        "recovery trusts bytes that no sync has covered",
        "raftlog.storage.store",
        "await self._write_again_what_was_read(scan, found, source)",
        "pass",
    ),
    Mutation(
        "recovery cuts where bytes had been synced",
        "raftlog.storage.journal_scan",
        "if files and not scan.damage and scan.end < scan.floor:",
        "if False:",
    ),
    Mutation(
        "what is not committed is flushed to segments",
        "raftlog.storage.replica_log",
        "return min(self.committed, self.durable_index)",
        "return self.durable_index",
    ),
    Mutation(
        "the last batches of a producer are not known again",
        "raftlog.state.producers",
        "if each.first_sequence == first and each.last_sequence == last:",
        "if False:",
    ),
    Mutation(
        "a snapshot loses the producers",
        "raftlog.state.partition",
        "list(self.producers.items()),",
        "[],",
    ),
    Mutation(
        "a batch is acknowledged when it is appended",
        "raftlog.broker.partition",
        "self._in_flight[base_offset] = entry.index",
        "done(Produced(base_offset, entry.leader_time_ms, self.machine.log_start), None)",
    ),
    Mutation(
        "in a joint configuration one majority commits",
        "raftlog.raft.quorum",
        "index = min(index, _half_index(conf.outgoing, match))",
        "pass",
        ("move", "isolate", "stall"),
        _MOVES,
    ),
    Mutation(
        "voters change in one step",
        "raftlog.raft.confchange",
        """        current.voters,
        tuple(learner for learner in new_learners if learner in still_voting),
        auto_leave=True,""",
        """        (),
        (),""",
        ("move",),
        _MOVES,
    ),
    Mutation(
        "a learner counts like a voter",
        "raftlog.raft.quorum",
        "index = _half_index(conf.voters, match)",
        "index = _half_index(conf.learners or conf.voters, match)",
        ("move", "isolate", "stall"),
        _MOVES,
    ),
    Mutation(
        "an amnesiac replica votes",
        "raftlog.raft.amnesia",
        "return recovered.amnesiac and any(",
        "return False and any(",
        ("power cut", "usurp", "deafen"),
        _INTERVAL,
    ),
    Mutation(
        "what a forgetful follower acknowledged still counts",
        "raftlog.broker.replica",
        "forgot = restarted and self.log.spec.flush_interval_ms > 0",
        "forgot = False",
        ("power cut", "usurp", "isolate", "stall"),
        _INTERVAL,
    ),
    Mutation(
        "replicas drop what is above the log start",
        "raftlog.broker.partition",
        "return last_index_below(self.log.segments, self.machine.log_start)",
        "return last_index_below(self.log.segments, self.machine.next_offset)",
        ("fall behind", "kill"),
        _RETENTION,
    ),
    Mutation(
        "retention takes no notice of age",
        "raftlog.broker.retention",
        "segment.last_leader_time_ms < now_ms - self.ms",
        "segment.last_leader_time_ms < now_ms",
        ("fall behind", "kill"),
        _RETENTION,
    ),
    Mutation(
        "what is read from segments is not checked",
        "raftlog.storage.segment_reader",
        "or crc32c(view[at + 8 : end]) != crc",
        "or False",
        ("rot",),
        {"large_values": 0.4},
    ),
    Mutation(
        "frames are read that do not follow from one another",
        "raftlog.storage.segment_reader",
        "or prev_crc != before",
        "or False",
        ("misdirected write",),
        {"partitions": 3},
    ),
    Mutation(
        "repair takes for proved what nothing proves",
        "raftlog.storage.repair",
        "        if self._proved_size:\n            return True\n",
        "        return True\n",
        ("rot", "misdirected write"),
        {"large_values": 0.4},
    ),
    Mutation(
        "a consumer passes over a record between two fetches",
        "raftlog.client.fetcher",
        "each.fetch_offset, each.last_term = end\n",
        "each.fetch_offset, each.last_term = end[0] + 1, end[1]\n",
    ),
    *COORDINATION,
    *CONTROLLER,
)


class PatchFailed(Exception):
    """The piece of source is not there, or stands there more than once."""


def patched_source(mutation: Mutation, source: str) -> str:
    """The module's source with the bug in it.

    Raises:
        PatchFailed: the mutation no longer applies.
    """
    count = source.count(mutation.old)
    if count != 1:
        raise PatchFailed(f"{mutation.name!r}: found {count} times in {mutation.module}: {mutation.old!r}")
    return source.replace(mutation.old, mutation.new)


def check_all_apply() -> None:
    """Raise PatchFailed for the first mutation that no longer applies or is no Python."""
    for mutation in MUTATIONS:
        spec = importlib.util.find_spec(mutation.module)
        assert spec is not None, mutation.module
        assert spec.origin is not None, mutation.module
        source = patched_source(mutation, Path(spec.origin).read_text(encoding="utf-8"))
        compile(source, spec.origin, "exec")


class _Loader(SourceFileLoader):
    """Loads one module with a bug in it."""

    def __init__(self, fullname: str, path: str, mutation: Mutation) -> None:
        super().__init__(fullname, path)
        self._mutation = mutation

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = patched_source(self._mutation, Path(path).read_text(encoding="utf-8"))
        return compile(source, path, "exec")


class _Finder(MetaPathFinder):
    def __init__(self, mutation: Mutation) -> None:
        self._mutation = mutation

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._mutation.module:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None, fullname
        assert spec.origin is not None, fullname
        spec.loader = _Loader(fullname, spec.origin, self._mutation)
        return spec


def _run_mutant(mutation: Mutation, seeds: int) -> dict[str, object]:
    """In a process of its own: import everything anew with the bug in it, and run seeds until it is found."""
    sys.meta_path.insert(0, _Finder(mutation))
    for name in [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]:
        del sys.modules[name]
    run = importlib.import_module("raftlog.testing.run")
    drawn = importlib.import_module("raftlog.testing.swarm").draw
    for seed in range(seeds):
        result = run.run_once(shaped(mutation, drawn(seed)))
        if result.verdict is not run.Verdict.GOOD:
            return {"seeds": seed + 1, "verdict": result.verdict.value, "text": result.text}
    return {"seeds": seeds, "verdict": "good", "text": ""}


def shaped(mutation: Mutation, profile: Profile) -> Profile:
    """The profile with the faults and settings that a rare bug takes."""
    if not mutation.faults:
        return profile
    weights = dict.fromkeys(mutation.faults, 1.0)
    changes = {"brokers": 3, "replication": 3, **mutation.profile}
    policy = replace(profile.policy, brokers=changes["brokers"])
    return replace(
        profile, weights=weights, policy=policy, fault_count=14, gap_seconds=(0.02, 0.5), **changes
    )


def plant(number: int, seeds: int) -> dict[str, object]:
    """Plant mutation ``number`` in a new process and run up to so many seeds.

    Returns:
        ``seeds`` it took, ``verdict`` of the last run and its ``text``.

    Raises:
        PatchFailed: the process did not come to a verdict.
    """
    command = [sys.executable, "-m", "raftlog.testing.mutations", str(number), str(seeds)]
    environ = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PatchFailed(f"{MUTATIONS[number].name!r} does not run:\n{done.stderr}")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_all(seeds: int, only: str = "") -> list[str]:
    """Plant every mutation in turn; print what found it. The run that did must be good without the bug.

    Args:
        seeds: to try for each.
        only: part of the name of those to plant.

    Returns:
        Names of the mutations that were not found, or not they.

    Raises:
        PatchFailed: a mutation no longer applies, or there is none of that name.
    """
    check_all_apply()
    if not any(only in mutation.name for mutation in MUTATIONS):
        raise PatchFailed(f"no planted bug has {only!r} in its name")
    escaped = []
    for number, mutation in enumerate(MUTATIONS):
        if only not in mutation.name:
            continue
        found = plant(number, seeds)
        if found["verdict"] == "good":
            escaped.append(mutation.name)
            print(f"NOT FOUND   {mutation.name} ({seeds} seeds)", flush=True)
        else:
            text = str(found["text"]).split(":")[0][:60]
            print(f"{found['seeds']:3d} seeds   {mutation.name}: {found['verdict']}: {text}", flush=True)
            same = run_once(shaped(mutation, draw(int(str(found["seeds"])) - 1)))
            if same.verdict is not Verdict.GOOD:
                escaped.append(mutation.name)
                print(
                    f"            the same run without the bug: {same.verdict.value}: {same.text}", flush=True
                )
    return escaped


if __name__ == "__main__":
    import logging

    logging.disable(logging.CRITICAL)
    print(json.dumps(_run_mutant(MUTATIONS[int(sys.argv[1])], int(sys.argv[2]))))
