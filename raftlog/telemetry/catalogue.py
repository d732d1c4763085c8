"""Every metric: its name, kind, tags, and what it says. Nothing else is exported.

Names follow Prometheus' conventions: ``raftlog_``, what is measured, its unit, and ``_total`` for what only
grows. Ray puts ``ray_`` before them. All carry the tag ``cluster``; those of brokers ``broker`` as well.
Topics, groups and partitions are tags of some, as far as there are not too many (see :func:`folded`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Final, NamedTuple

MANY: Final = "*"
"""In the place of a topic's, group's or partition's name: all of them together, for there are too many."""


class Kind(Enum):
    """What the numbers of a metric mean."""

    COUNTER = "counter"
    """A sum that only grows while its process lives."""
    GAUGE = "gauge"
    """As it is now."""
    HISTOGRAM = "histogram"
    """Single observations, of a sample."""


class Metric(NamedTuple):
    """One metric.

    Args:
        name: as Prometheus has it, without Ray's prefix.
        kind: what its numbers mean.
        says: what it says.
        tags: besides ``cluster`` and, of brokers, ``broker``.
    """

    name: str
    kind: Kind
    says: str
    tags: tuple[str, ...] = ()


class Sample(NamedTuple):
    """What one metric says now.

    Args:
        metric: which.
        values: of a counter the sum so far, of a gauge what it is, one each; of a histogram what was observed
            since the last sample.
        tags: values of the metric's tags.
    """

    metric: Metric
    values: Sequence[float]
    tags: tuple[str, ...] = ()


LATENCY_BOUNDARIES_S: Final = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)

# -- of brokers: what goes through ---------------------------------------------------------------------------

PRODUCED_RECORDS = Metric(
    "raftlog_produced_records_total", Kind.COUNTER, "Records appended by leaders of this broker.", ("topic",)
)
PRODUCED_BYTES = Metric(
    "raftlog_produced_bytes_total", Kind.COUNTER, "Bytes of record batches appended by leaders.", ("topic",)
)
FETCHED_BYTES = Metric(
    "raftlog_fetched_bytes_total", Kind.COUNTER, "Bytes of records sent to consumers.", ("topic",)
)
CONSUMED_RECORDS = Metric(
    "raftlog_group_consumed_records_total",
    Kind.COUNTER,
    "Records that consumer groups have moved past, by the offsets they committed.",
    ("group", "topic"),
)
PRODUCED_BATCHES = Metric("raftlog_produced_batches_total", Kind.COUNTER, "Batches appended by leaders.")
FETCHES = Metric("raftlog_fetches_total", Kind.COUNTER, "Fetches answered.")
JOURNAL_SYNCS = Metric("raftlog_journal_syncs_total", Kind.COUNTER, "Group commits written and synced.")
REQUEST_ERRORS = Metric(
    "raftlog_request_errors_total",
    Kind.COUNTER,
    "Requests answered with an error, by its name: Busy is a refusal for want of room.",
    ("error",),
)
TRANSACTIONS = Metric(
    "raftlog_transactions_total",
    Kind.COUNTER,
    "Transactions coordinated here that were begun, committed, aborted.",
    ("outcome",),
)

# -- of brokers: how long it takes ---------------------------------------------------------------------------

PRODUCE_SECONDS = Metric(
    "raftlog_produce_seconds",
    Kind.HISTOGRAM,
    "A batch at its leader, from append until it is committed (a sample).",
)
FETCH_SECONDS = Metric(
    "raftlog_fetch_seconds",
    Kind.HISTOGRAM,
    "A fetch, from when there is something to read to the answer (a sample).",
)
SYNC_SECONDS = Metric(
    "raftlog_journal_sync_seconds", Kind.HISTOGRAM, "Writing and syncing one group commit (a sample)."
)
LOOP_DELAY = Metric(
    "raftlog_loop_delay_seconds",
    Kind.GAUGE,
    "By how much the broker's event loop was late for its last sample.",
)

# -- of brokers: replicas ------------------------------------------------------------------------------------

REPLICAS = Metric("raftlog_replicas", Kind.GAUGE, "Replicas that run here.")
LEADERS = Metric("raftlog_leaders", Kind.GAUGE, "Replicas that lead here.")
UNDER_REPLICATED = Metric(
    "raftlog_under_replicated_partitions",
    Kind.GAUGE,
    "Partitions led here that have fewer replicas up to date than they should.",
)
LEADERLESS = Metric(
    "raftlog_leaderless_replicas", Kind.GAUGE, "Replicas here that have known no leader for two samples."
)
OUT_OF_SERVICE = Metric(
    "raftlog_out_of_service_replicas", Kind.GAUGE, "Replicas here that are damaged, lost, halted or retired."
)
ELECTIONS = Metric("raftlog_elections_won_total", Kind.COUNTER, "Leaderships that replicas here have won.")
LEADERSHIPS_LOST = Metric(
    "raftlog_leaderships_lost_total", Kind.COUNTER, "Leaderships they have given up or lost."
)
REPAIRS = Metric("raftlog_repairs_total", Kind.COUNTER, "Damaged replicas made whole.")

# -- of brokers: what waits ----------------------------------------------------------------------------------

JOURNAL_BYTES = Metric("raftlog_journal_pending_bytes", Kind.GAUGE, "Bytes appended and not yet durable.")
JOURNAL_AGE = Metric(
    "raftlog_journal_pending_seconds",
    Kind.GAUGE,
    "How long the oldest append waits for the disk; 0: none does.",
)
UNCOMMITTED = Metric(
    "raftlog_uncommitted_entries", Kind.GAUGE, "Batches and commands of leaders here that are not committed."
)
REQUEST_BYTES = Metric("raftlog_request_bytes", Kind.GAUGE, "Bytes of requests that are not answered yet.")
WAITING_FETCHES = Metric("raftlog_waiting_fetches", Kind.GAUGE, "Fetches that wait for records.")
CONNECTIONS = Metric("raftlog_connections", Kind.GAUGE, "Open connections, by who dialled.", ("role",))
OPEN_TRANSACTIONS = Metric(
    "raftlog_open_transactions", Kind.GAUGE, "Transactions coordinated here that are open."
)
GROUP_LAG = Metric(
    "raftlog_group_lag_records",
    Kind.GAUGE,
    "Records between what a group has committed and the end of a partition.",
    ("group", "topic", "partition"),
)
DISK_FREE = Metric("raftlog_disk_free_bytes", Kind.GAUGE, "Bytes free behind the data directory.")
STORAGE_FAULT = Metric(
    "raftlog_storage_fault", Kind.GAUGE, "1 while the device is full or has failed: nothing is acknowledged."
)

# -- of the cluster, by its controller -----------------------------------------------------------------------

OFFLINE = Metric("raftlog_offline_partitions", Kind.GAUGE, "Partitions that no broker says it leads.")
PARTITIONS = Metric("raftlog_partitions", Kind.GAUGE, "Partitions of all topics, internal ones included.")
BROKERS = Metric("raftlog_brokers", Kind.GAUGE, "Brokers that are alive, draining, lost.", ("state",))
MOVES = Metric("raftlog_moving_partitions", Kind.GAUGE, "Partitions whose replicas are being changed.")
LOOK_AGE = Metric(
    "raftlog_controller_look_seconds", Kind.GAUGE, "Since the controller last saw the whole cluster."
)

BROKER_METRICS: Final = (
    *(PRODUCED_RECORDS, PRODUCED_BYTES, FETCHED_BYTES, CONSUMED_RECORDS, PRODUCED_BATCHES, FETCHES),
    *(JOURNAL_SYNCS, REQUEST_ERRORS, TRANSACTIONS, PRODUCE_SECONDS, FETCH_SECONDS, SYNC_SECONDS, LOOP_DELAY),
    *(REPLICAS, LEADERS, UNDER_REPLICATED, LEADERLESS, OUT_OF_SERVICE, ELECTIONS, LEADERSHIPS_LOST, REPAIRS),
    *(JOURNAL_BYTES, JOURNAL_AGE, UNCOMMITTED, REQUEST_BYTES, WAITING_FETCHES, CONNECTIONS),
    *(OPEN_TRANSACTIONS, GROUP_LAG, DISK_FREE, STORAGE_FAULT),
)
CLUSTER_METRICS: Final = (OFFLINE, PARTITIONS, BROKERS, MOVES, LOOK_AGE)


def folded(samples: Iterable[Sample], series_max: int) -> list[Sample]:
    """The samples, of at most ``series_max`` series for each metric with tags that users name: if there are
    more, their last tags become ``MANY`` and what falls together is added up, until there are not."""
    by_metric: dict[Metric, dict[tuple[str, ...], Sequence[float]]] = {}
    for metric, values, tags in samples:
        by_metric.setdefault(metric, {})[tags] = values
    found: list[Sample] = []
    for metric, series in by_metric.items():
        for last in range(len(metric.tags) - 1, -1, -1):
            if len(series) <= series_max:
                break
            sums: dict[tuple[str, ...], float] = {}
            for tags, values in series.items():
                short = (*tags[:last], MANY, *tags[last + 1 :])
                sums[short] = sums.get(short, 0) + sum(values)
            series = {tags: (value,) for tags, value in sums.items()}
        found += [Sample(metric, values, tags) for tags, values in series.items()]
    return found
