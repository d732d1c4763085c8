"""Find bugs before users do: whole clusters in virtual time, everything drawn from one seed.

    python -m raftlog.testing.simulate --seeds 500
    python -m raftlog.testing.simulate --seed 1234 --trace          # one seed again, with its trace
    python -m raftlog.testing.simulate --mutations                  # does it find planted bugs?

Exit codes: 0 all good; 3 a crash; 4 no progress; 5 a broken promise; 6 the simulator is blind (a kind of
fault or event never came up, or a seed did not repeat its run); 7 a planted bug was not found.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from raftlog.testing.pipeline_profile import CLIENT_FAULTS
from raftlog.testing.run import Result, Verdict, run_once, shrink
from raftlog.testing.swarm import ELASTIC_FAULTS, FAULTS, Profile, draw

EXIT_CODES: Final = {Verdict.GOOD: 0, Verdict.CRASH: 3, Verdict.LIVENESS: 4, Verdict.CORRECTNESS: 5}
EXIT_BLIND: Final = 6
EXIT_ESCAPED: Final = 7
MUTATION_SEEDS: Final = 120
"""Tried for each planted bug; the rarest has taken 57."""
SEEDS_UNTIL_BLIND: Final = 50
"""From this many seeds on, every counter must have counted something."""
TWICE_EVERY: Final = 25
"""One seed in so many is run twice."""
GC_THRESHOLD: Final = (50_000, 20, 100)
"""The cyclic collector looks at all there is ten times less often: a sixth of a run's time."""
REPLACED: Final = ("joined", "forgotten")
"""What follows when a broker is lost for good."""
EVENTS_EXPECTED: Final = (
    "elections",
    "truncations",
    "snapshot installs",
    "log starts moved",
    "joint changes",
    "repairs",
    "amnesias",
    "duplicates recognised",
    "sends ok",
    "sends failed",
    "sends unknown",
    "sends open",
    "records polled",
    "transactions committed",
    "transactions aborted",
    "commits in doubt",
    "records processed",
    "records taken at-least-once",
    "records taken at-most-once",
    "epochs used up",
    "groups forgotten",
    "ProduceRequest came late",
    "EnlistRequest came late",
    "StageOffsetsRequest came late",
    "EndTransactionRequest came late",
    "WriteMarkersRequest came late",
    "GroupHeartbeatRequest came late",
    "ProducerFenced",
    "StaleMember",
    "TransactionTimedOut",
    "late ProducerFenced",
    "late StaleMember",
)


class Report:
    """What all runs came to.

    Args:
        first: seed.
        trace: print traces too; of a failure that of its shrunk run.
        shrinks: shrink failures.
    """

    def __init__(self, *, trace: bool, shrinks: bool) -> None:
        self.results = 0
        self.failed: list[Result] = []
        self.unrepeatable: list[int] = []
        self.faults: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.lag_seconds = 0.0
        self._trace = trace
        self._shrinks = shrinks

    def add(self, result: Result) -> None:
        """Count a run; tell about it when it failed."""
        self.results += 1
        self.faults += result.faults
        self.counts += result.counts
        self.seconds += result.seconds
        self.cpu_seconds += result.cpu_seconds
        self.lag_seconds = max(self.lag_seconds, result.lag_seconds)
        if result.verdict is not Verdict.GOOD:
            self.failed.append(result)
            self._tell(result)
        elif self._trace:
            print(f"\nseed {result.profile.seed}: good")
            print(result.events)

    def _tell(self, result: Result) -> None:
        seed = result.profile.seed
        print(f"\nseed {seed}: {result.verdict.value}: {result.text}")
        best = shrink(result) if self._shrinks else result
        print(f"  {result.profile.fault_count} faults drawn; these are enough:")
        for line in best.fault_log:
            print(f"    {line}")
        skip = ",".join(map(str, sorted(best.profile.skip)))
        command = f"python -m raftlog.testing.simulate --seed {seed} --seeds 1 --trace"
        print(f"  again: {command}{f' --skip {skip}' if skip else ''}")
        if self._trace:
            print(best.events)
            print(best.stack)
        sys.stdout.flush()

    def blind_spots(self) -> list[str]:
        """What should have come up and never did."""
        if self.results < SEEDS_UNTIL_BLIND:
            return []
        faults = (*FAULTS, *CLIENT_FAULTS, *ELASTIC_FAULTS, *REPLACED)
        return [name for name in faults if not self.faults[name]] + [
            name for name in EVENTS_EXPECTED if not self.counts[name]
        ]

    @property
    def exit_code(self) -> int:
        """Of the worst that happened: a broken promise before a crash before no progress."""
        for verdict in (Verdict.CORRECTNESS, Verdict.CRASH, Verdict.LIVENESS):
            if any(result.verdict is verdict for result in self.failed):
                return EXIT_CODES[verdict]
        return EXIT_BLIND if self.unrepeatable or self.blind_spots() else 0

    def summary(self) -> str:
        """For the end of the run."""
        per_minute = self.seconds / 3600 / max(self.cpu_seconds / 60, 1e-9)
        lines = [
            f"{self.results} seeds, {len(self.failed)} failed; {self.seconds / 3600:.2f} simulated hours in "
            f"{self.cpu_seconds:.0f} CPU-seconds ({per_minute:.2f} hours per CPU-minute)",
            "faults: " + _listed(self.faults),
            "events: " + _listed(self.counts),
            f"worst time from acknowledgement to visibility: {self.lag_seconds:.2f} s",
        ]
        lines += [f"never happened: {name}" for name in self.blind_spots()]
        lines += [f"seed {seed} did not repeat its run" for seed in self.unrepeatable]
        lines += [f"failed: seed {each.profile.seed}: {each.verdict.value}" for each in self.failed]
        return "\n".join(lines)


def _listed(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))


def simulate(profiles: Sequence[Profile], report: Report, *, progress: bool = True) -> None:
    """Run all profiles, some of them twice."""
    begin = time.monotonic()
    gc.set_threshold(*GC_THRESHOLD)
    for number, profile in enumerate(profiles, 1):
        result = run_once(profile)
        report.add(result)
        if number % TWICE_EVERY == 1 and run_once(profile).trace != result.trace:
            report.unrepeatable.append(profile.seed)
        if number % 50 == 0:
            gc.collect()
            if progress:
                print(f"{number} seeds in {time.monotonic() - begin:.0f} s", flush=True)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m raftlog.testing.simulate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, help="how many (default: 50, or 1 with --seed)")
    parser.add_argument("--seed", type=int, help="the first one (default: 0)")
    parser.add_argument("--skip", default="", help="numbers of faults to leave out: 1,4,5")
    parser.add_argument("--trace", action="store_true", help="print the trace of each run")
    parser.add_argument("--no-shrink", action="store_true", help="print failures as they are")
    parser.add_argument("--mutations", action="store_true", help="plant bugs; each must be found")
    parser.add_argument("--only", default="", help="with --mutations: the one of this name")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    arguments = _arguments(argv)
    if arguments.mutations:
        from raftlog.testing.mutations import run_all

        return EXIT_ESCAPED if run_all(arguments.seeds or MUTATION_SEEDS, arguments.only) else 0
    first = arguments.seed or 0
    count = arguments.seeds or (1 if arguments.seed is not None else SEEDS_UNTIL_BLIND)
    skip = frozenset(int(number) for number in arguments.skip.split(",") if number)
    report = Report(trace=arguments.trace, shrinks=not arguments.no_shrink)
    simulate([draw(seed).without(skip) for seed in range(first, first + count)], report)
    print(report.summary())
    return report.exit_code


def _with_fixed_hashes() -> None:
    """Hashes of strings must be the same in every run: start anew if they are not."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        environ = {**os.environ, "PYTHONHASHSEED": "0"}
        os.execve(sys.executable, [sys.executable, "-m", "raftlog.testing.simulate", *sys.argv[1:]], environ)


if __name__ == "__main__":
    _with_fixed_hashes()
    logging.disable(logging.CRITICAL)  # brokers log what faults do to them
    sys.exit(main(sys.argv[1:]))
