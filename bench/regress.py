"""Has raftlog lost ground? Its ratios to the floor, measured anew, against those of the kept results.

Machines differ and are never quiet; a ratio to three bare processes on the same machine in the same minute
says more than a number of milliseconds. Each work is run anew for raftlog and the floor alone, and its
ratio may be worse than the kept one by the tolerance; who finds one beyond it runs the work again before
believing it.

    python bench/regress.py [--tolerance 0.25] [--only 'latency-*']
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from _ray import own_ray
from _report import console, show
from run import compare, on_terminate
from store import Results, ratio, read
from works import SIZES, WORKS

TOLERANCE: Final = 0.25
"""A quarter: what two runs of one commit differ by on a machine that does other things beside."""
TRIES: Final = 2
GUARDED: Final = ("latency-100", "latency-10000", "send-100", "batch-100", "batch-1000", "bulk-1000000")
LESS_IS_BETTER: Final = frozenset({"p50_ms"})
METRICS: Final = {work.name: work.metric for work in WORKS}


@dataclass(frozen=True)
class Change:
    """One work's ratio to the floor, then and now.

    Args:
        work: its name.
        kept: ratio of the kept results.
        now: ratio measured anew.
    """

    work: str
    kept: float
    now: float

    @property
    def loss(self) -> float:
        """By which share it is worse (negative: better), for figures where less is better as for the
        others."""
        better, worse = (
            (self.kept, self.now) if METRICS[self.work] in LESS_IS_BETTER else (self.now, self.kept)
        )
        return worse / better - 1


def changes(kept: Results, now: Results) -> list[Change]:
    """Of the works that both have, for raftlog and the floor."""
    found = []
    for work in GUARDED:
        then, anew = (ratio(each, work, METRICS[work], "raftlog", "floor") for each in (kept, now))
        if then is not None and anew is not None:
            found.append(Change(work, then, anew))
    return found


def lost(found: list[Change], tolerance: float) -> list[Change]:
    """Those that are worse by more than the tolerance."""
    return [change for change in found if change.loss > tolerance]


def measure(names: list[str]) -> Results:
    """raftlog and the floor alone, with the turns of a quick run."""
    works = [work for work in WORKS if work.name in names]
    with tempfile.TemporaryDirectory(prefix="raftlog-bench-") as folder:
        path = Path(folder) / "results.json"
        failed = compare(works, {"raftlog", "floor"}, SIZES["quick"], path)
        assert not failed, failed
        return read(path)


def main() -> int:
    """Measure, compare; 1 if something is beyond the tolerance twice."""
    parser = argparse.ArgumentParser(description="raftlog's ratios to the floor against the kept results.")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"a share, default {TOLERANCE:g}")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="WORK", help="works, as shell patterns")
    options = parser.parse_args()
    kept = read()
    names = [name for name in GUARDED if any(fnmatch(name, pattern) for pattern in options.only)]
    names = [name for name in names if ratio(kept, name, METRICS[name], "raftlog", "floor") is not None]
    if not names:
        console.print("nothing to compare with: the kept results have none of these works")
        return 2
    with own_ray():
        signal.signal(signal.SIGTERM, on_terminate)
        for _ in range(TRIES):
            found = changes(kept, measure(names))
            rows = [[each.work, f"{each.kept:.2f}", f"{each.now:.2f}", f"{each.loss:+.0%}"] for each in found]
            show("raftlog against the floor", ["", "kept", "now", "worse by"], rows)
            names = [change.work for change in lost(found, options.tolerance)]
            if not names:
                return 0
    console.print(f"worse by more than {options.tolerance:.0%}, twice: {', '.join(names)}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
