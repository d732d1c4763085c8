"""docs/PERFORMANCE.md and its plots, from the results. What stands between markers is written here, the
rest by hand.

A marker is a comment on a line of its own, ``<!-- bench:latency -->``, and ends with ``<!-- /bench -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from aims import judge
from contenders.listing import KINDS
from scale import FIGURES, SOLO
from store import Results, script
from works import WORKS, Work

PAGE: Final = Path(__file__).parents[1] / "docs" / "PERFORMANCE.md"
PLOTS: Final = PAGE.parent / "performance"
_MARKED: Final = re.compile(r"(<!-- bench:(\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)

TITLES: Final = {kind.name: kind.title for kind in KINDS}
COLORS: Final = {
    "raftlog": "#1b6ca8",
    "raftlog-interval": "#74b3dd",
    "raftlog-aio": "#0b3c5d",
    "floor": "#9a9a9a",
    "floor-keeps": "#5f5f5f",
    "nats-sync": "#2e8b57",
    "nats": "#8fd3a8",
    "kafka": "#c0572b",
    "ray-queue": "#8e63b0",
    "ray-actor": "#c9b3db",
}
AXES: Final = {
    "latency": ("one acknowledged record after another", "p50, ms"),
    "half-load": ("at half the maximum load", "p50, ms"),
    "end-to-end": ("producer to waiting consumer", "p50, ms"),
    "send": ("send, one record a call", "records/s"),
    "batch": ("send_batch", "records/s"),
    "bulk": ("large values", "MB/s"),
    "consume": ("consume, one consumer", "records/s"),
    "partitions": ("send_batch, 100 B, by partitions", "records/s"),
}


def write_page(results: Results, page: Path = PAGE, plots: Path = PLOTS) -> None:
    """Write every marked part anew, and a plot for each group that has results."""
    plots.mkdir(parents=True, exist_ok=True)
    for group in AXES:
        draw(group, results, plots)
    page.write_text(fill(page.read_text(), results))


def fill(text: str, results: Results) -> str:
    """The page with its marked parts written anew.

    Raises:
        KeyError: a marker names something that there is not.
    """

    def part(found: re.Match[str]) -> str:
        return f"{found[1]}{PARTS[found[2]](results)}\n{found[3]}"

    return _MARKED.sub(part, text)


# -- parts ---------------------------------------------------------------------------------------------------


def group_table(group: str) -> Callable[[Results], str]:
    """Contenders by works of a group: median, least and greatest; and why some are not there."""

    def part(results: Results) -> str:
        works = [work for work in WORKS if work.group == group and work.name in results]
        if not works:
            return "Not measured."
        names = [name for name in TITLES if any(cell_of(results, work, name) for work in works)]
        rows = [[TITLES[name], *(cell_of(results, work, name) for work in works)] for name in names]
        table = markdown(["", *(f"{work.column}, {unit(work.metric)}" for work in works)], rows)
        return "\n\n".join([f"![{AXES[group][0]}](performance/{group}.png)", table, *reasons(results, works)])

    return part


def cell_of(results: Results, work: Work, name: str) -> str:
    """One figure; empty where there is none."""
    found = results[work.name]["contenders"].get(name, {}).get(work.metric)
    if found is None:
        return ""
    return f"{number(found['median'])} ({number(found['min'])} to {number(found['max'])})"


def reasons(results: Results, works: Sequence[Work]) -> list[str]:
    """Who is not in the table, and why."""
    found: dict[str, None] = {}
    for work in works:
        for name, one in results[work.name]["contenders"].items():
            if "skipped" in one:
                found[f"{TITLES[name]}: {one['skipped']}"] = None
    return [f"Not there: {'; '.join(found)}."] if found else []


def cost_table(results: Results) -> str:
    """Processor time of the servers."""
    works = [work for work in WORKS if work.name in ("send-100", "batch-100", "batch-1000", "bulk-1000000")]
    rows = []
    for work in works:
        for name, one in results.get(work.name, {"contenders": {}})["contenders"].items():
            if "skipped" in one:
                continue
            figures = (one[key]["median"] for key in _COSTS)
            rows.append([f"{work.group}, {work.column}", TITLES[name], *map(number, figures)])
    if not rows:
        return "Not measured."
    return markdown(
        ["work", "", "servers, s per million records", "servers, s per GB", "client, s per million"], rows
    )


_COSTS: Final = ("server_cpu_s_per_million", "server_cpu_s_per_gb", "client_cpu_s_per_million")


def tails(results: Results) -> str:
    """p99 of whatever has one."""
    works = [
        work
        for work in WORKS
        if work.group in ("latency", "half-load", "end-to-end") and work.name in results
    ]
    rows = []
    for name, title in TITLES.items():
        found = [results[work.name]["contenders"].get(name, {}).get("p99_ms") for work in works]
        if any(found):
            rows.append([title, *(number(each["median"]) if each else "" for each in found)])
    headings = [work.column if work.group == "latency" else work.group for work in works]
    return markdown(["p99, ms", *headings], rows) if rows else "Not measured."


def solo_table(results: Results) -> str:
    """What raftlog does alone."""
    rows = []
    for work in SOLO:
        figures = results.get(work.name, {"contenders": {"raftlog": {}}})["contenders"]["raftlog"]
        rows += [[FIGURES[key], number(one["median"])] for key, one in figures.items()]
    return markdown(["", ""], rows) if rows else "Not measured."


def aims_table(results: Results) -> str:
    """Aims, figures, verdicts; those that matter most in bold."""
    rows = []
    last = None
    for verdict in judge(results):
        what = verdict.aim.what if verdict.aim is not last else ""
        bold = f"**{what}**" if verdict.aim.decides and what else what
        word = f"**{verdict.word}**" if verdict.word == "missed" else verdict.word
        rows.append([bold, verdict.limit.text, verdict.number, word])
        last = verdict.aim
    return markdown(["what", "aim", "measured", ""], rows)


def contenders_table(_results: Results) -> str:
    """Who takes part, and with which settings."""
    return markdown(["contender", "settings"], [[kind.title, kind.settings] for kind in KINDS])


def machine_text(results: Results) -> str:
    """What the figures were measured on, and what the servers took at rest."""
    sections = list(results.values())
    if not sections:
        return "Not measured."
    machine = sections[0]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    dates = sorted({section["machine"]["date"] for section in sections})
    loads = [section["machine"]["load_1_minute_at_start"] for section in sections]
    rounds = sorted({section["rounds"] for section in sections if len(section["contenders"]) > 1})
    text = (
        f"{machine['cores']} cores ({machine['processor']}, {machine['system']}), "
        f"Python {machine['python']}; {versions}. {' and '.join(dates)}; {' or '.join(map(str, rounds))} "
        f"rounds; load average at the end of a work between {min(loads):.1f} and {max(loads):.1f}."
    )
    idle = next((section["idle_cores"] for section in sections if "idle_cores" in section), None)
    if idle is None:
        return text
    shares = ", ".join(f"{name} {share:.1%}" for name, share in idle.items())
    return f"{text}\n\nShare of a core that all servers of a system take while nobody asks: {shares}."


def transactions_table(_results: Results) -> str:
    """Of ``transactions.py``."""
    found = script("transactions")
    if found is None:
        return "Not measured."
    rows = [
        [name, number(one["records_per_second"]["median"]), number(one["ratio_to_plain"]["median"])]
        for name, one in found["contenders"].items()
    ]
    return markdown(["", "records/s", "of plain"], rows)


def failover_table(_results: Results) -> str:
    """Of ``failover.py``."""
    found = script("failover")
    if found is None:
        return "Not measured."
    keys = ("kills", "p50_ms", "max_ms", "silence_p50_ms", "back_p50_s")
    rows = [[name, *(number(one[key]) for key in keys)] for name, one in found["failover"].items()]
    counts = found["records"]
    table = markdown(["kills by", "number", "p50 ms", "max ms", "silence p50 ms", "broker back p50 s"], rows)
    return (
        f"{table}\n\n{counts['acknowledged']:,} records acknowledged, {counts['failed']:,} failed, "
        f"{counts['read']:,} read back: {counts['lost']} lost, {counts['doubled']} doubled, "
        f"{counts['moved']} moved."
    )


def elastic_table(_results: Results) -> str:
    """Of ``elastic.py``."""
    found = script("elastic")
    if found is None:
        return "Not measured."
    rows = [
        [one["step"], f"{one['seconds']:.1f}", number(one["p50_ms"]), number(one["worst_ms"])]
        for one in found["steps"]
    ]
    counts, rate = found["records"], found["records_per_s"]
    table = markdown(["", "settled after s", "acknowledged, p50 ms", "worst ms"], rows)
    return (
        f"{table}\n\n{rate:.0f} records/s: {counts['sent']:,} sent, {counts['failed']} failed, "
        f"{counts['lost']} lost, {counts['doubled']} doubled, {counts['moved']} moved. "
        f"The group read all of them, and {counts['read_again_by_group']:,} again where a member took over "
        "before a commit."
    )


def data_table(_results: Results) -> str:
    """Of ``data.py``."""
    found = script("data")
    if found is None:
        return "Not measured."
    rows = []
    for size, works in found["sizes"].items():
        for name, one in works.items():
            parquet = works[name.replace("topic", "parquet").replace("kafka", "parquet")]
            share = one["mb_per_s"]["median"] / parquet["mb_per_s"]["median"]
            figures = (number(one[key]["median"]) for key in ("records_per_s", "mb_per_s"))
            rows.append([f"{name}, {int(size):,} B", *figures, f"{share:.0%}"])
    table = markdown(["", "records/s", "MB/s", "of Parquet"], rows)
    times = "; ".join(
        f"{int(size):,} B: {each:.1f} times read_kafka" for size, each in found["times_read_kafka"].items()
    )
    return f"{table}\n\nread_topic, {times}." if times else table


def transport_table(_results: Results) -> str:
    """Of ``transport.py``."""
    found = script("transport")
    if found is None:
        return "Not measured."
    keys = ("p50_ms", "p99_ms", "write_mb_per_s", "read_mb_per_s")
    rows = [[way, *(number(one[key]["median"]) for key in keys)] for way, one in found["transports"].items()]
    return markdown(["", "one record, p50 ms", "p99 ms", "send_batch, MB/s", "poll_arrow, MB/s"], rows)


def slow_table(_results: Results) -> str:
    """Of ``slow.py``."""
    found = script("slow")
    if found is None:
        return "Not measured."
    keys = ("p50_ms", "p99_ms", "leader_grew_mb", "slow_one_grew_mb", "caught_up_after_s")
    rows = [
        [slow, *(number(one[key]["median"]) if key in one else "" for key in keys)]
        for slow, one in found["turns"].items()
    ]
    columns = [
        "slow is",
        "p50 ms",
        "p99 ms",
        "leader grew by MB",
        "the slow one by MB",
        "level again after s",
    ]
    sent = found["turns"]["nothing"]["sent_mb"]["median"]
    return f"{markdown(columns, rows)}\n\n{sent:.0f} MB a turn, at {found['mb_per_s']:.0f} MB/s."


PARTS: Final[dict[str, Callable[[Results], str]]] = {
    **{group: group_table(group) for group in AXES},
    "aims": aims_table,
    "contenders": contenders_table,
    "cost": cost_table,
    "data": data_table,
    "elastic": elastic_table,
    "failover": failover_table,
    "machine": machine_text,
    "p99": tails,
    "scale": solo_table,
    "slow": slow_table,
    "transactions": transactions_table,
    "transport": transport_table,
}


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Three digits that matter, and no more than that of a large one."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def unit(name: str) -> str:
    """Of a metric, for a heading."""
    return {"p50_ms": "p50 ms", "records_per_s": "records/s", "mb_per_s": "MB/s"}[name]


# -- plots ---------------------------------------------------------------------------------------------------


def draw(group: str, results: Results, folder: Path) -> None:
    """Bars of the contenders for each work of a group, with whiskers from least to greatest."""
    works = [work for work in WORKS if work.group == group and work.name in results]
    if not works:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained")
    axes: Any = figure.subplots()
    names = [name for name in TITLES if any(cell_of(results, work, name) for work in works)]
    width = 0.8 / max(len(names), 1)
    for place, name in enumerate(names):
        found = [
            (at, results[work.name]["contenders"].get(name, {}).get(work.metric))
            for at, work in enumerate(works)
        ]
        there = [(at, one) for at, one in found if one is not None]
        medians = [one["median"] for _, one in there]
        spread = [
            [one["median"] - one["min"] for _, one in there],
            [one["max"] - one["median"] for _, one in there],
        ]
        at = [each - 0.4 + (place + 0.5) * width for each, _ in there]
        axes.bar(
            at, medians, width, yerr=spread, label=TITLES[name], color=COLORS[name], ecolor="#444", capsize=2
        )
    axes.set_xticks(range(len(works)), [work.column for work in works])
    axes.set_yscale("log")
    axes.set_title(AXES[group][0])
    axes.set_ylabel(f"{AXES[group][1]} (logarithmic)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(folder / f"{group}.png", metadata={"Software": None})
