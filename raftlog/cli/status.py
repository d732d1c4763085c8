"""``raftlog status``: brokers and partitions as they are, once or again and again.

With ``--watch`` each look is compared with the one before: what went through per second, and who was elected.
On a terminal it is drawn in place, elsewhere block after block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from raftlog.cli.session import ClusterOption, JsonOption, connected, console, print_json, table
from raftlog.errors import RaftlogError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from raftlog.client.descriptions import ClusterDescription, PartitionDescription, TopicDescription
    from raftlog.client.log import Log

INTERVAL_S: Final = 2.0
_INTERVAL_MIN_S: Final = 0.1
_NUMBERS: Final = frozenset(
    {"partition", "partitions", "term", "start", "committed", "end", "replicas held", "leads", "pid"}
    | {"records/s", "MB/s in", "MB/s out", "elections"}
)


def status(
    ctx: typer.Context,
    seconds: Annotated[
        float | None,
        typer.Argument(
            metavar="[SECONDS]", min=_INTERVAL_MIN_S, help="With --watch: how often; 2 if not given."
        ),
    ] = None,
    cluster: ClusterOption = "default",
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Look again and again, with rates; ends with Ctrl-C.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show brokers, and each partition's leader, term and commit position; name what is under-replicated."""
    if seconds is not None and not watch:
        raise typer.BadParameter("only --watch takes SECONDS")
    with connected(ctx, cluster) as log:
        watcher = Watcher(partial(look_at, log), partial(time.sleep, seconds or INTERVAL_S))
        if as_json:
            for seen in watcher.looks(forever=watch):
                print_json(seen.as_json())
        elif watch:
            _watch(console(), watcher)
        else:
            for seen in watcher.looks(forever=False):
                for block in seen.blocks():
                    console().print(block)


# -- looking -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened at a broker between two looks.

    Args:
        records_in: appended by its leaders, per second.
        bytes_in: of their batches, per second.
        bytes_out: to consumers, per second.
        elections: that its replicas have won, in all.
    """

    records_in: float
    bytes_in: float
    bytes_out: float
    elections: int


@dataclass(frozen=True, slots=True)
class Look:
    """A cluster at one moment.

    Args:
        at: seconds, by the clock of the watcher.
        cluster: its brokers.
        topics: with their partitions.
        trouble: why nobody answers; the rest is as it was before then.
        brokers: broker id -> rates since the look before, of those that answered both times; None: this is
            the first look.
        partitions: (topic, partition) -> records per second.
    """

    at: float
    cluster: ClusterDescription
    topics: list[TopicDescription]
    trouble: str = ""
    brokers: dict[int, Rates] | None = None
    partitions: dict[tuple[str, int], float] = field(default_factory=dict)

    def since(self, before: Look) -> Look:
        """This one with the rates since ``before``."""
        seconds = max(self.at - before.at, 1e-3)
        ends = {
            (topic.name, each.index): each.end_offset for topic in before.topics for each in topic.partitions
        }
        totals = {broker.id: (broker.pid, broker.totals) for broker in before.cluster.brokers}
        rates = {}
        for broker in self.cluster.brokers:
            pid, then = totals.get(broker.id, (0, {}))
            if broker.totals and then and pid == broker.pid:  # else it was started anew, or did not answer
                grown = {name: total - then.get(name, 0) for name, total in broker.totals.items()}
                rates[broker.id] = Rates(
                    grown["records_in"] / seconds,
                    grown["bytes_in"] / seconds,
                    grown["bytes_out"] / seconds,
                    grown["elections_won"],
                )
        records = {
            key: max(each.end_offset - ends[key], 0) / seconds
            for topic in self.topics
            for each in topic.partitions
            if (key := (topic.name, each.index)) in ends
        }
        return Look(self.at, self.cluster, self.topics, "", rates, records)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``: rates only where there are some."""
        found: dict[str, Any] = {"cluster": self.cluster, "topics": self.topics}
        if self.brokers is not None:
            found["rates"] = self.brokers
        if self.trouble:
            found["trouble"] = self.trouble
        return found

    def blocks(self) -> Iterator[RenderableType]:
        """What is printed, block by block."""
        yield f"cluster [bold]{self.cluster.name}[/bold]  {self.cluster.cluster_id}"
        yield ""
        yield brokers_table(self.cluster, self.brokers)
        if self.topics:
            yield ""
            yield partitions_table(self.topics, None if self.brokers is None else self.partitions)
        yield ""
        yield _summary(self)


def look_at(log: Log) -> tuple[ClusterDescription, list[TopicDescription]]:
    """What the brokers say now."""
    return log.describe_cluster(), [log.describe_topic(name) for name in sorted(log.topics())]


class Watcher:
    """Looks again and again.

    Args:
        look: what there is; raises RaftlogError where nobody answers.
        sleep: waits until the next look.
        clock: seconds.
    """

    def __init__(
        self,
        look: Callable[[], tuple[ClusterDescription, list[TopicDescription]]],
        sleep: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look = look
        self._sleep = sleep
        self._clock = clock

    def looks(self, *, forever: bool) -> Iterator[Look]:
        """One look after another, each compared with the last that was answered; only one, unless
        ``forever``.

        Raises:
            RaftlogError: the first is not answered.
        """
        before = Look(self._clock(), *self._look())
        yield before
        while forever:
            self._sleep()
            try:
                now = Look(self._clock(), *self._look())
            except RaftlogError as error:
                yield Look(before.at, before.cluster, before.topics, str(error))
            else:
                yield now.since(before)
                before = now


def _watch(out: Console, watcher: Watcher) -> None:
    if not out.is_terminal:
        for seen in watcher.looks(forever=True):
            for block in seen.blocks():
                out.print(block)
            out.print()
        return
    from rich.console import Group
    from rich.live import Live

    with Live(console=out, auto_refresh=False, vertical_overflow="ellipsis") as live:
        for seen in watcher.looks(forever=True):
            live.update(Group(*seen.blocks()), refresh=True)


# -- tables --------------------------------------------------------------------------------------------------


def brokers_table(described: ClusterDescription, rates: dict[int, Rates] | None = None) -> Table:
    """One line per broker, with what went through it if that is known."""
    names = ["broker", "state", "address", "node", "pid", "replicas held", "leads"]
    if rates is not None:
        names += ["records/s", "MB/s in", "MB/s out", "elections"]
    rows = table(*names, right=_NUMBERS)
    for broker in described.brokers:
        colour = {"alive": "green", "draining": "yellow"}.get(broker.state, "red")
        passed = None if rates is None else rates.get(broker.id)
        rows.add_row(
            str(broker.id),
            f"[{colour}]{broker.state}[/{colour}]",
            str(broker.address),
            broker.node_id[:12],
            str(broker.pid),
            str(broker.replicas),
            str(broker.leaders),
            *([] if passed is None else _cells(passed)),
        )
    return rows


def _cells(rates: Rates) -> list[str]:
    elections = f"[yellow]{rates.elections}[/yellow]" if rates.elections else "0"
    return [
        f"{rates.records_in:,.0f}",
        f"{rates.bytes_in / 1e6:.2f}",
        f"{rates.bytes_out / 1e6:.2f}",
        elections,
    ]


def partitions_table(
    topics: list[TopicDescription], records: dict[tuple[str, int], float] | None = None
) -> Table:
    """One line per partition: leader, term, replicas, offsets, records per second if that is known, and who
    is behind."""
    names = ["topic", "partition", "leader", "term", "replicas", "start", "committed", "end", "behind"]
    if records is not None:
        names.insert(-1, "records/s")
    rows = table(*names, right=_NUMBERS)
    for topic in topics:
        for partition in topic.partitions:
            cells = [
                topic.name,
                str(partition.index),
                "[red]none[/red]" if partition.leader is None else str(partition.leader),
                str(partition.term),
                " ".join(map(str, partition.replicas)),
                str(partition.start_offset),
                str(partition.committed),
                str(partition.end_offset),
                f"[yellow]{' '.join(map(str, partition.lagging))}[/yellow]",
            ]
            if records is not None:
                rate = records.get((topic.name, partition.index))
                cells.insert(-1, "" if rate is None else f"{rate:,.0f}")
            rows.add_row(*cells)
    return rows


def is_under_replicated(partition: PartitionDescription) -> bool:
    """Whether a replica is behind, or there is no leader to tell."""
    return partition.leader is None or bool(partition.lagging)


def _summary(seen: Look) -> str:
    if seen.trouble:
        from rich.markup import escape

        return f"[red]no answer: {escape(seen.trouble)}[/red]"
    partitions = [partition for topic in seen.topics for partition in topic.partitions]
    behind = sum(map(is_under_replicated, partitions))
    alive = sum(broker.state == "alive" for broker in seen.cluster.brokers)
    counts = f"{alive} of {len(seen.cluster.brokers)} brokers alive, {len(partitions)} partitions"
    if seen.brokers is not None:
        rates = seen.brokers.values()
        counts += f", {sum(each.records_in for each in rates):,.0f} records/s"
        counts += f", {sum(each.bytes_in for each in rates) / 1e6:.2f} MB/s in"
        counts += f", {sum(each.bytes_out for each in rates) / 1e6:.2f} MB/s out"
    if behind:
        return f"{counts}, [yellow]{behind} under-replicated[/yellow]"
    return f"{counts}, [green]none under-replicated[/green]"
