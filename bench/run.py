"""The bench: every contender does every work, in turn, in one run; results, tables, plots and aims.

    python bench/run.py                    # quick: a few minutes
    python bench/run.py --size full        # longer turns and more rounds, and what needs gigabytes
    python bench/run.py --only 'send-*'    # these works; the results of the others stay as they are
    python bench/run.py --with raftlog floor --json results.json   # only these contenders
    python bench/run.py --page             # write the page and the plots anew from the results

A round of a work is one turn of each contender; each round begins with another of them. Before each turn
what others have left in the page cache is written out, so that nobody pays for somebody else's disk. After
each turn the servers must hold every record. Results go to ``results/bench.json``, works that were not run
stay; a work is only ever replaced as a whole, so that whatever stands side by side was measured in one run.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final, Never

import _report
import store
from _ray import own_ray
from aims import judge
from contenders.base import UNCOUNTED, Contender, NotOffered, Unavailable, cpu_seconds
from contenders.listing import KINDS, SYSTEMS
from page import write_page
from scale import SOLO, SoloWork
from works import SIZES, WORKS, Size, Work, values_of

SHOWN: Final = ("p99_ms", "ratio_to_ack", "mb_per_s", "server_cpu_s_per_million")
"""Beside a work's own metric, on the terminal."""
WARM_CALLS: Final = 50
QUICKER: Final = 0.95
SETTLED: Final = 3
"""So many steps in a row that were not quicker than the quickest before."""
IDLE_S: Final = 3.0
"""For which the servers' processor time is looked at while nobody does anything."""


class Field:
    """The contenders that take part, their servers running; and why the others do not."""

    def __init__(self) -> None:
        self.contenders: dict[str, Contender] = {}
        self.missing: dict[str, str] = {}

    def pids(self) -> dict[str, list[int]]:
        """System -> its servers."""
        return {each.system.name: each.system.pids() for each in self.contenders.values()}


def names_of(kinds: Iterable[Any]) -> list[str]:
    """Of contenders that are not made yet."""
    return [kind.name for kind in kinds]


@contextmanager
def servers(directory: Path, wanted: set[str]) -> Iterator[Field]:
    """Start the systems of these contenders; all of them end with the block."""
    field = Field()
    with ExitStack() as stack:
        for number, (make, kinds) in enumerate(SYSTEMS):
            chosen = [kind for kind in kinds if kind.name in wanted]
            if not chosen:
                continue
            system = make()
            stack.callback(system.stop)
            begin = time.perf_counter()
            try:
                system.start(directory / f"system-{number}")
            except Unavailable as why:
                field.missing |= dict.fromkeys(names_of(chosen), str(why))
                _report.console.print(f"{system.name}: {why}")
                continue
            _report.console.print(f"{system.name}: up after {time.perf_counter() - begin:.1f} s")
            field.contenders |= {kind.name: kind(system) for kind in chosen}
        yield field


def idle(field: Field) -> dict[str, float]:
    """System -> share of a core that its servers take while nothing is asked of them."""
    before = {name: cpu_seconds(pids) for name, pids in field.pids().items()}
    time.sleep(IDLE_S)
    return {name: (cpu_seconds(pids) - before[name]) / IDLE_S for name, pids in field.pids().items()}


def settle(step: Callable[[], float], seconds: float) -> None:
    """Repeat until it gets no quicker, for so long at least and ten times as long at most.

    Args:
        step: something to do; how long it took.
        seconds: the least time.
    """
    best, since, begin = math.inf, 0, time.perf_counter()
    while True:
        took = step()
        since = 0 if took < best * QUICKER else since + 1
        best = min(best, took)
        elapsed = time.perf_counter() - begin
        if elapsed >= 10 * seconds or (elapsed >= seconds and since >= SETTLED):
            return


def warm(field: Field, size: Size) -> None:
    """Let everybody send for a while: what compiles itself at run time has done so before anything counts."""
    for name, contender in field.contenders.items():
        try:
            warm_one(contender, f"warm-{name}", size)
        except NotOffered as why:
            _report.console.print(f"{name}: {why}")


def warm_one(contender: Contender, topic: str, size: Size) -> None:
    """One record after another until that is as quick as it gets, then as many as it can."""

    def p50() -> float:
        return _report.percentile(contender.sequential(topic, b"x" * 100, WARM_CALLS), 50)

    contender.create(topic, 1)
    try:
        settle(p50, size.warm_s)
        contender.send(topic, values_of(100), size.warm_s)
    finally:
        contender.delete(topic)


def take_turn(work: Work, contender: Contender, topic: str, size: Size) -> dict[str, float]:
    """One turn, checked."""
    contender.create(topic, work.partitions)
    try:
        os.sync()
        gc.collect()
        metrics, records = work.do(contender, topic, size)
        held = None if records is None else contender.held(topic)
        if held is not None and records is not None:
            assert held == records + UNCOUNTED, f"{records + UNCOUNTED} acknowledged, {held} held"
        return metrics
    finally:
        contender.delete(topic)


class Rounds:
    """The rounds of one work."""

    def __init__(self, work: Work, field: Field) -> None:
        self.work = work
        self.results: dict[str, list[dict[str, float]]] = {}
        self.skipped = {name: why for name, why in field.missing.items() if name in work.contenders}
        self.failed: list[str] = []
        self._field = field
        self._stamp = f"{time.time_ns() // 1_000_000:x}"

    def run(self, size: Size) -> None:
        """All of them."""
        names = [name for name in self.work.contenders if name in self._field.contenders]
        for number in range(size.rounds):
            first = number % max(len(names), 1)
            for name in names[first:] + names[:first]:
                if name not in self.skipped:
                    self._turn(name, number, size)

    def _turn(self, name: str, number: int, size: Size) -> None:
        topic = f"{self.work.name}-{self._stamp}-{number}-{name}"
        try:
            metrics = take_turn(self.work, self._field.contenders[name], topic, size)
        except NotOffered as why:
            self.skipped[name] = str(why)
        except Exception as error:  # noqa: BLE001 (shown, kept, exit is 1: the others' run goes on)
            self.results.pop(name, None)
            self.skipped[name] = f"failed: {type(error).__name__}: {str(error)[:200]}"
            self.failed.append(f"{self.work.name}, {name}: {self.skipped[name]}")
            _report.console.print_exception(max_frames=6)
        else:
            self.results.setdefault(name, []).append(metrics)

    def section(self, size: Size, beside: dict[str, Any]) -> dict[str, Any]:
        """What is kept of it."""
        contenders: dict[str, Any] = {}
        for name, rounds in self.results.items():
            contenders[name] = {key: store.rounds_of([each[key] for each in rounds]) for key in rounds[0]}
        contenders |= {name: {"skipped": why} for name, why in self.skipped.items()}
        ordered = {name: contenders[name] for name in self.work.contenders if name in contenders}
        return {**store.facts(size.rounds), **beside, "contenders": ordered}


def show(work: Work, section: dict[str, Any]) -> None:
    """Print one work's table."""
    rows = []
    for name, one in section["contenders"].items():
        if "skipped" in one:
            rows.append([name, "-", one["skipped"]])
        else:
            value = one[work.metric]
            extra = "  ".join(f"{key} {one[key]['median']:,.4g}" for key in SHOWN if key in one)
            rows.append([name, f"{value['median']:,.4g} ({value['min']:,.4g} to {value['max']:,.4g})", extra])
    _report.show(f"{work.name}: {work.metric}", ["", "median (least to greatest)", "else"], rows)


def compare(works: Sequence[Work], wanted: set[str], size: Size, path: Path) -> list[str]:
    """Run the works that contenders do in turn; what failed."""
    failed: list[str] = []
    needed = {name for work in works for name in work.contenders} & wanted
    with (
        tempfile.TemporaryDirectory(prefix="raftlog-bench-") as folder,
        servers(Path(folder), needed) as field,
    ):
        beside = {"idle_cores": idle(field)}
        warm(field, size)
        for work in works:
            rounds = Rounds(work, field)
            begin = time.perf_counter()
            rounds.run(size)
            section = rounds.section(size, beside)
            show(work, section)
            _report.console.print(f"{time.perf_counter() - begin:.0f} s")
            store.replace(path, work.name, section)
            failed += rounds.failed
    return failed


def alone(works: Sequence[SoloWork], size_name: str, path: Path) -> None:
    """Run the works that are raftlog's own."""
    for work in works:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="raftlog-bench-") as folder:
            metrics = work.do(Path(folder), size_name)
        section = {
            **store.facts(1),
            "contenders": {"raftlog": {key: store.rounds_of([value]) for key, value in metrics.items()}},
        }
        text = ", ".join(f"{key} {value:,.4g}" for key, value in metrics.items())
        _report.console.print(f"{work.name}: {text} ({time.perf_counter() - begin:.0f} s)")
        store.replace(path, work.name, section)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="raftlog side by side with what else there is.")
    parser.add_argument("--size", choices=list(SIZES), default="quick")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="WORK", help="works, as shell patterns")
    parser.add_argument("--with", nargs="+", dest="contenders", metavar="CONTENDER", help="default: all")
    parser.add_argument("--json", type=Path, default=store.RESULTS, metavar="PATH")
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    options = parser.parse_args()
    if options.contenders and options.json == store.RESULTS:
        parser.error("--with leaves contenders out, which the kept results must not: name another --json")
    return options


def on_terminate(_number: int, _frame: object) -> Never:
    """End as Ctrl-C does: whatever was started is stopped, and once is enough."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(143)


def main() -> int:
    """Measure, print, write; 1 if a contender failed."""
    options = parse()
    failed: list[str] = []
    if not options.page:
        wanted = set(options.contenders or names_of(KINDS))

        def chosen(name: str) -> bool:
            return any(fnmatch(name, pattern) for pattern in options.only)

        works = [work for work in WORKS if chosen(work.name)]
        solo = [work for work in SOLO if chosen(work.name)] if "raftlog" in wanted else []
        with own_ray():
            signal.signal(
                signal.SIGTERM, on_terminate
            )  # after Ray, which has one that ends the process at once
            if works:
                failed = compare(works, wanted, SIZES[options.size], options.json)
            alone(solo, options.size, options.json)
    results = store.read(options.json)
    for verdict in judge(results):
        _report.console.print(verdict.line())
    if options.json == store.RESULTS:
        write_page(results)
    for line in failed:
        _report.console.print(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
