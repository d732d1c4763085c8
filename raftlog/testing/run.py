"""One seed, run and judged; and a failing one, shrunk to the faults that it takes."""

from __future__ import annotations

import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from raftlog.testing.books import Violation, render
from raftlog.testing.history import Outcome
from raftlog.testing.loop import START_TIME, SimulationError, UnhandledError
from raftlog.testing.swarm import Profile
from raftlog.testing.workload import Workload

SHRINK_RUNS_MAX: Final = 40
CPU_SECONDS_MAX: Final = 30.0
"""A run takes a few; one that goes round for ever would never come to its next step."""


class DoesNotEnd(KeyboardInterrupt):
    """A run takes too much CPU time. What the code under test catches, it is not."""


@contextmanager
def limited(cpu_seconds: float) -> Iterator[None]:
    """Raise DoesNotEnd in the block once this process has spent so many seconds in it; main thread only."""

    def over(_signal: int, _frame: object) -> None:
        raise DoesNotEnd(f"no end after {cpu_seconds:g} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds, 1.0)  # again, should it be lost in a callback of C
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


class Verdict(Enum):
    """How a run ended."""

    GOOD = "good"
    CRASH = "crash"
    """An error that nobody expected."""
    LIVENESS = "liveness"
    """It did not go on, or did not end."""
    CORRECTNESS = "correctness"
    """A promise or an invariant is broken."""


@dataclass
class Result:
    """What one run came to."""

    profile: Profile
    verdict: Verdict = Verdict.GOOD
    text: str = ""
    """What is wrong, in one line."""
    faults: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    """Virtual."""
    cpu_seconds: float = 0.0
    steps: int = 0
    trace: int = 0
    lag_seconds: float = 0.0
    fault_log: list[str] = field(default_factory=list)
    events: str = ""
    """The readable trace of its last events."""
    stack: str = ""

    @property
    def kind(self) -> tuple[Verdict, str]:
        """What two failures have in common that are the same bug, as far as can be told."""
        return self.verdict, self.text.split(":")[0]


def run_once(profile: Profile) -> Result:
    """Run a profile to its end, whatever that is."""
    result = Result(profile)
    begin = time.process_time()
    workload = Workload(profile)
    try:
        with limited(CPU_SECONDS_MAX):
            workload.run()
    except Violation as error:
        _judge(result, Verdict.CORRECTNESS, error)
    except UnhandledError as error:
        _judge(result, Verdict.CRASH, error)
    except (SimulationError, DoesNotEnd) as error:
        _judge(result, Verdict.LIVENESS, error)
    except Exception as error:  # noqa: BLE001 - whatever code under test raises is what we look for
        _judge(result, Verdict.CRASH, error)
    cluster = workload.cluster
    for broker_id in sorted(cluster.brokers):
        cluster.watch.ended(broker_id)
    result.faults = workload.nemesis.fired
    result.fault_log = workload.nemesis.log
    result.counts = cluster.watch.counts
    if workload.pipeline is not None:
        result.counts += workload.pipeline.counts
    for outcome in Outcome:
        result.counts[f"sends {outcome.value}"] += workload.history.count(outcome)
    result.counts["records polled"] += sum(len(row) for row in workload.history.polls.values())
    result.lag_seconds = workload.history.lag_seconds
    result.seconds = cluster.loop.time() - START_TIME
    result.steps, result.trace = cluster.loop.steps, cluster.loop.trace
    result.events = render(cluster.watch.events, max(cluster.disks) + 1)
    workload.close()
    result.cpu_seconds = time.process_time() - begin
    return result


def _judge(result: Result, verdict: Verdict, error: BaseException) -> None:
    result.verdict = verdict
    text = str(error)
    result.text = text if isinstance(error, Violation) else f"{type(error).__name__}: {text}"
    result.stack = "".join(traceback.format_exception(error))


def shrink(failed: Result, runs_max: int = SHRINK_RUNS_MAX) -> Result:
    """Leave out faults while the run still fails in the same way: first halves of them, then fewer."""
    best = failed
    kept = [number for number in range(failed.profile.fault_count) if number not in failed.profile.skip]
    runs, size = 0, max(1, len(kept) // 2)
    while kept and runs < runs_max:
        smaller = False
        for at in range(0, len(kept), size):
            runs += 1
            result = run_once(best.profile.without(frozenset(kept[at : at + size])))
            if result.kind == failed.kind:
                best, smaller = result, True
                kept = [number for number in kept if number not in result.profile.skip]
                break
            if runs >= runs_max:
                break
        if not smaller:
            if size == 1:
                break
            size //= 2
    return best
