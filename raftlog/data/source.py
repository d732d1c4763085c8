"""Topics as Ray Data reads them: ``read_topic``, and how far a Dataset reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, Final, Literal

import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from raftlog.client import attach
from raftlog.data.reading import read_span, schema_of
from raftlog.data.spans import Offsets, Span, Where, cut, find_spans, offsets_of_spans, weigh
from raftlog.errors import ConfigError
from raftlog.record.columns import SCHEMA

if TYPE_CHECKING:
    import pyarrow as pa

    from raftlog.client.cluster import Bootstrap
    from raftlog.client.log import Log

Isolation = Literal["read_committed", "read_uncommitted"]

TASKS_PER_CPU: Final = 4
"""They are not all of the same length, and nodes may join."""
TASK_BYTES_WORTH_WHILE: Final = 8 * 1024 * 1024
"""In memory. Ray takes about 20 ms of a core for a task, which reads as much in that time."""
TASK_BYTES_MAX: Final = 64 * 1024 * 1024
"""About: what is lost when a task is tried again."""


class TopicDatasource(Datasource):
    """A fixed range of each partition of some topics.

    Args:
        bootstrap: the cluster.
        spans: one for each partition.
        columns: names of :data:`raftlog.data.reading.SCHEMA`.
        isolation: "read_committed" leaves out what aborted transactions wrote.
    """

    def __init__(
        self, bootstrap: Bootstrap, spans: Sequence[Span], columns: Sequence[str], isolation: Isolation
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bootstrap = bootstrap
        self._spans = list(spans)
        self._columns = list(columns)
        self._isolation = isolation

    @property
    def offsets(self) -> Offsets:
        """Where it begins and ends."""
        return offsets_of_spans(self._spans)

    def estimate_inmemory_data_size(self) -> int:
        """In bytes, by samples."""
        return sum(each.size for each in self._spans)

    def tasks_worth_while(self, cpus: int) -> int:
        """How many tasks to read it with."""
        size = self.estimate_inmemory_data_size()
        spread = min(TASKS_PER_CPU * cpus, ceil(size / TASK_BYTES_WORTH_WHILE))
        count = max(spread, ceil(size / TASK_BYTES_MAX), 1)
        while (made := max(len(cut(self._spans, count)), 1)) < count:  # spans do not divide into any number
            count = made
        return count

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """About ``parallelism`` tasks of about the same size; the same ones each time."""
        schema = schema_of(self._columns)
        # how many records there are shows when they are read: markers and what was aborted take offsets, too
        return [
            ReadTask(
                partial(_read, self._bootstrap, spans, self._columns, self._isolation),
                BlockMetadata(
                    num_rows=None,
                    size_bytes=sum(each.size for each in spans),
                    input_files=None,
                    exec_stats=None,
                ),
                schema=schema,
                per_task_row_limit=per_task_row_limit,
            )
            for spans in cut(self._spans, parallelism) or [[]]
        ]


def _read(
    bootstrap: Bootstrap, spans: Sequence[Span], columns: Sequence[str], isolation: Isolation
) -> Iterator[pa.Table]:
    """What a read task does."""
    log = attach.log_of(bootstrap)  # one per process, so that tasks share connections
    nothing = True
    for span in spans:
        for table in read_span(log, span, columns, isolation):
            nothing = False
            yield table
    if nothing:
        yield schema_of(columns).empty_table()


def read_topic(
    topics: str | Sequence[str],
    *,
    start: Where = "earliest",
    end: Where = "latest",
    group: str | None = None,
    columns: Sequence[str] | None = None,
    isolation: Isolation = "read_committed",
    log: Log | None = None,
    **options: Any,
) -> ray.data.Dataset:
    """See :func:`raftlog.read_topic`."""
    log = log or attach.connect()
    runtime = log._connected()
    names = [topics] if isinstance(topics, str) else list(topics)
    checked, wanted = check_isolation(isolation), check_columns(columns)
    spans = find_spans(log, names, start, end, group, checked)
    weighed = runtime.io.call(weigh(runtime.cluster, spans, checked))
    return dataset_of(TopicDatasource(log.bootstrap, weighed, wanted, checked), options)


def dataset_of(source: TopicDatasource, options: dict[str, Any]) -> ray.data.Dataset:
    """The Dataset that reads a source.

    Ray would make 200 tasks of whatever there is, most of which would take longer to start than to run; and
    where it gets fewer than it asked for, it does not run what follows in the same task. So it is told.
    """
    if not options.keys() & {"override_num_blocks", "parallelism"}:
        options = options | {"override_num_blocks": source.tasks_worth_while(_cpus())}
    ds: ray.data.Dataset = ray.data.read_datasource(source, **options)
    return ds


def _cpus() -> int:
    if not ray.is_initialized():
        ray.init()  # as Ray Data would
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(int(resources.get("CPU", 1)), 1)


def check_columns(columns: Sequence[str] | None) -> list[str]:
    """The columns to read; None: all.

    Raises:
        ConfigError: there is no such column.
    """
    names = SCHEMA.names if columns is None else list(columns)
    unknown = [name for name in names if name not in SCHEMA.names]
    if unknown or not names:
        raise ConfigError(f"columns={columns!r}: a topic has {', '.join(SCHEMA.names)}")
    return names


def check_isolation(isolation: str) -> Isolation:
    """Raises ConfigError for anything else than the two there are."""
    if isolation == "read_committed" or isolation == "read_uncommitted":
        return isolation  # type: ignore[return-value]
    raise ConfigError(f"isolation={isolation!r} is neither 'read_committed' nor 'read_uncommitted'")


def offsets_of(ds: ray.data.Dataset) -> Offsets:
    """See :func:`raftlog.offsets_of`."""
    sources = list(_sources(ds._logical_plan.dag))
    if not sources:
        raise ConfigError(
            "this Dataset does not read a topic: take the offsets of what read_topic returned, or of what "
            "was made of it before it was materialized"
        )
    offsets = Offsets()
    for source in sources:
        for name, end in source.offsets.items():
            known = (
                offsets.setdefault(name, end),
                offsets.starts.setdefault(name, source.offsets.starts[name]),
            )
            if known != (end, source.offsets.starts[name]):
                raise ConfigError(f"{name.topic}[{name.partition}] is read twice, to different offsets")
    return offsets


def _sources(operator: Any) -> Iterator[TopicDatasource]:
    """What a plan reads; Ray has no public way to ask."""
    source = getattr(operator, "datasource", None)
    if isinstance(source, TopicDatasource):
        yield source
    for each in operator.input_dependencies:
        yield from _sources(each)
