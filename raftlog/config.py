"""Settings of topics, producers, consumers and brokers.

One model per kind. Names are Python's (``retention_ms``); Kafka's dotted names work too (``retention.ms``),
also where Kafka calls the thing differently (``batch.size`` is ``batch_bytes`` here). Everything wrong with
settings is a ConfigError that names the setting; a name that does not exist is answered with the one that was
meant. Units are in the names: ``_ms`` milliseconds, ``_bytes`` bytes.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeAlias

import platformdirs
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from raftlog.errors import ConfigError, InvalidTopic
from raftlog.record.batch import BATCH_BYTES_LIMIT
from raftlog.record.types import TopicPartition
from raftlog.serde import Deserializer, Serializer, deserializer_of, serializer_of

KIB: Final = 1024
MIB: Final = 1024 * KIB
DAY_MS: Final = 24 * 60 * 60 * 1000

_TOPIC_NAME: Final = re.compile(r"[a-zA-Z0-9._-]{1,249}")


def validate_topic_name(name: object) -> str:
    """Return ``name`` if a topic may have it: 1 to 249 of ``[a-zA-Z0-9._-]``, neither "." nor "..".

    Raises:
        InvalidTopic: it may not.
    """
    if not isinstance(name, str) or not _TOPIC_NAME.fullmatch(name) or name in (".", ".."):
        raise InvalidTopic(
            f"invalid topic name {name!r}: 1 to 249 characters of a-z A-Z 0-9 . _ - and not '.' or '..'"
        )
    return name


class Settings(BaseModel):
    """Base of all settings: immutable, checked when made, ConfigError for all that is wrong with them."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=False, arbitrary_types_allowed=True
    )

    kafka_names: ClassVar[Mapping[str, str]] = {}
    """Kafka's name -> ours, where they differ by more than dots."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Value of ``semantics`` -> what it sets."""

    def __init__(self, **values: Any) -> None:
        given = self._translate(self._by_field_name(values))
        try:
            super().__init__(**given)
            implied = self._implied()
            if implied:
                super().__init__(**given, **implied)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from error
        self._check()

    @classmethod
    def model_validate(cls, obj: Any, **_options: Any) -> Self:
        """Make settings from a mapping (None: all defaults) with names of either kind.

        Raises:
            ConfigError: not a mapping, or what the constructor raises.
        """
        if isinstance(obj, cls):
            return obj
        if obj is None:
            return cls()
        if not isinstance(obj, Mapping):
            raise ConfigError(f"{cls.__name__} is made from a mapping, not from {type(obj).__name__}")
        return cls(**{str(name): value for name, value in obj.items()})

    @classmethod
    def _by_field_name(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for given, value in values.items():
            name = cls.kafka_names.get(given) or given.replace(".", "_").replace("-", "_")
            if name not in cls.model_fields:
                raise ConfigError(f"unknown setting {given!r}{_did_you_mean(given, cls)}")
            if name in named:
                raise ConfigError(f"setting {name!r} is given twice, the second time as {given!r}")
            named[name] = value
        return named

    @classmethod
    def _translate(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Hook: Kafka's ways to write a value."""
        return values

    def _implied(self) -> dict[str, Any]:
        """What ``semantics`` sets and was not set already; ConfigError where it was set to something else."""
        semantics = getattr(self, "semantics", None)
        implied: dict[str, Any] = {}
        for name, value in self.presets.get(semantics or "", {}).items():
            if name not in self.model_fields_set:
                implied[name] = value
            elif (given := getattr(self, name)) != value:
                raise ConfigError(
                    f"{name}={given!r} contradicts semantics={semantics!r}: that is {name}={value!r}"
                )
        return implied

    def _check(self) -> None:
        """Hook: ConfigError where settings, each valid by itself, contradict each other."""


def _did_you_mean(given: str, cls: type[Settings]) -> str:
    dotted = "." in given
    candidates = {name.replace("_", ".") if dotted else name: name for name in cls.model_fields}
    candidates |= {each if dotted else each.replace(".", "_"): name for each, name in cls.kafka_names.items()}
    close = difflib.get_close_matches(given.lower().replace("-", "_"), candidates, n=1)
    if close:
        meant = close[0] if dotted else candidates[close[0]]
        return f": did you mean {meant!r}?"
    return f"; there are {', '.join(sorted(cls.model_fields))}"


def _explain(cls: type[Settings], error: ValidationError) -> str:
    problems = []
    for each in error.errors(include_url=False):
        name = ".".join(str(part) for part in each["loc"])
        message = each["msg"].removeprefix("Value error, ")
        problems.append(f"{name}={each['input']!r}: {message[:1].lower()}{message[1:]}")
    return f"{cls.__name__}: " + "; ".join(problems)


def _unlimited(value: Any) -> Any:
    """Kafka writes -1 for "no limit"."""
    return None if value in (-1, "-1") else value


Semantics: TypeAlias = Literal["at-most-once", "at-least-once", "exactly-once"]
Transport: TypeAlias = Literal["streams", "actor", "auto"]
LogFormat: TypeAlias = Literal["text", "logfmt", "json"]
LogLevel: TypeAlias = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
Milliseconds: TypeAlias = Annotated[int, Field(ge=0, le=2**53)]
_Limit: TypeAlias = Annotated[Annotated[int, Field(ge=0, le=2**63 - 1)] | None, BeforeValidator(_unlimited)]
_BatchBytes: TypeAlias = Annotated[int, Field(ge=1 * KIB, le=BATCH_BYTES_LIMIT)]
_Compression: TypeAlias = Literal["none", "lz4", "zstd"]
_SerializerField: TypeAlias = Annotated[Serializer | None, BeforeValidator(serializer_of)]
_Callback: TypeAlias = Callable[[list[TopicPartition]], Any] | None
_DeserializerField: TypeAlias = Annotated[Deserializer | None, BeforeValidator(deserializer_of)]


class TopicConfig(Settings):
    """Settings of a topic, replicated with it. What was set explicitly:
    ``model_dump(exclude_unset=True)``."""

    kafka_names = {
        "flush.ms": "flush_interval_ms",
        "max.message.bytes": "max_message_bytes",
        "segment.bytes": "segment_bytes",
        "unclean.leader.election.enable": "unclean_leader_election",
    }

    retention_ms: _Limit = None
    """Records older than this may be removed; None: never."""
    retention_bytes: _Limit = None
    """A partition's oldest segments may be removed while it is larger than this; None: never."""
    segment_bytes: Annotated[int, Field(ge=64 * KIB, le=2**31 - 1)] = 128 * MIB
    """Size of a segment file: the unit in which retention removes."""
    max_message_bytes: _BatchBytes = 8 * MIB
    """Largest record batch accepted, compressed."""
    flush: Literal["commit", "interval"] = "commit"
    """commit: synced on a majority before it is acknowledged. interval: acknowledged when a majority has
    written it, synced within flush_interval_ms; a killed process loses nothing then, a power cut may."""
    flush_interval_ms: Annotated[int, Field(ge=1, le=60_000)] = 1000
    unclean_leader_election: bool = False
    """With flush="interval": go on after a power cut of a majority of the replicas, though they may have lost
    the last interval of what was acknowledged. False: the partition has no leader then."""


class ProducerConfig(Settings):
    """Settings of a producer."""

    kafka_names = {
        "batch.size": "batch_bytes",
        "buffer.memory": "buffer_bytes",
        "compression.type": "compression",
        "key.serializer": "key_serializer",
        "max.in.flight.requests.per.connection": "max_in_flight",
        "transactional.id": "transactional_id",
        "value.serializer": "value_serializer",
    }
    presets = {
        "at-most-once": {"acks": 0},
        "at-least-once": {"acks": "all"},
        "exactly-once": {"acks": "all"},
    }

    semantics: Semantics | None = None
    """Sets the knobs of a mode of delivery; one that contradicts it is refused."""
    acks: Literal["all", 0] = "all"
    """all: acknowledged by a majority, and idempotent. 0: sent once, nobody answers."""
    linger_ms: Annotated[int, Field(ge=0, le=60_000)] = 5
    """How long a batch that is not full waits for more records."""
    batch_bytes: _BatchBytes = 256 * KIB
    """A batch is sent when it has reached this size, uncompressed; a larger record travels alone. What
    ``send_batch`` is given travels in batches of up to 1 MiB, unless this is set."""
    buffer_bytes: Annotated[int, Field(ge=64 * KIB)] = 64 * MIB
    """Records not yet acknowledged, of all partitions; ``send`` blocks above."""
    compression: _Compression = "lz4"
    delivery_timeout_ms: Annotated[int, Field(ge=1)] = 120_000
    """From ``send`` until the delivery has succeeded or failed, whatever happens."""
    request_timeout_ms: Annotated[int, Field(ge=1)] = 10_000
    """How long one attempt may go unanswered before the next."""
    max_block_ms: Milliseconds = 60_000
    """How long ``send`` may wait for room in the buffer, or for a topic's metadata."""
    max_in_flight: Annotated[int, Field(ge=1, le=5)] = 5
    """Batches under way per partition; a partition remembers the last five of each producer."""
    key_serializer: _SerializerField = None
    value_serializer: _SerializerField = None
    transactional_id: Annotated[str, Field(min_length=1, max_length=249)] | None = None
    """The name under which a producer's transactions go on after a restart. Whoever opens it fences the one
    before."""
    transaction_timeout_ms: Annotated[int, Field(ge=1, le=15 * 60_000)] = 60_000
    """A transaction that is open for longer is aborted."""

    @classmethod
    def _translate(cls, values: dict[str, Any]) -> dict[str, Any]:
        acks = str(values.get("acks", ""))
        if acks == "1":
            raise ConfigError(
                "acks=1 does not exist: a write is acknowledged by a majority ('all') or not at all (0)"
            )
        return {**values, "acks": {"-1": "all", "0": 0}[acks]} if acks in ("-1", "0") else values

    def _check(self) -> None:
        if self.acks == 0 and self.transactional_id is not None:
            raise ConfigError("acks=0 contradicts transactional_id: a transaction needs acknowledgements")


class ConsumerConfig(Settings):
    """Settings of a consumer."""

    kafka_names = {
        "fetch.max.bytes": "fetch_bytes_max",
        "fetch.max.wait.ms": "fetch_wait_ms",
        "group.id": "group",
        "group.remote.assignor": "assignor",
        "isolation.level": "isolation",
        "max.partition.fetch.bytes": "partition_fetch_bytes",
        "max.poll.interval.ms": "rebalance_timeout_ms",
        "max.poll.records": "max_poll_records",
        "value.deserializer": "value_deserializer",
    }
    presets = {
        "at-most-once": {"enable_auto_commit": True},
        "at-least-once": {"enable_auto_commit": False},
        "exactly-once": {"enable_auto_commit": False, "isolation": "read_committed"},
    }

    semantics: Semantics | None = None
    """Sets the knobs of a mode of delivery; one that contradicts it is refused."""
    group: Annotated[str, Field(min_length=1, max_length=249)] | None = None
    """Share the topics' partitions with the other members of this group."""
    assign: tuple[TopicPartition, ...] | None = None
    """Read these partitions and no others. Without group and assign: all partitions."""
    isolation: Literal["read_committed", "read_uncommitted"] = "read_committed"
    auto_offset_reset: Literal["earliest", "latest", "none"] = "earliest"
    """Where to begin where there is no position, or none that exists any more; none: raise
    OffsetOutOfRange."""
    enable_auto_commit: bool = False
    """Commit what ``poll`` returns before it returns it: at most once."""
    session_timeout_ms: Annotated[int, Field(ge=100, le=1_800_000)] = 30_000
    """A member of a group of which nothing is heard for this long is out. Heartbeats are sent in the
    background, and where a process ends its connection breaks, which leaves a second: this is for processes
    that stand still and for networks that fall silent."""
    rebalance_timeout_ms: Annotated[int, Field(ge=100, le=1_800_000)] = 300_000
    """A partition that is to go to another member goes when its consumer is used next (``poll``, ``commit``
    without offsets, ``close``), and without being asked when that takes longer than this."""
    assignor: Literal["uniform", "sticky"] = "uniform"
    """How the group's partitions are shared; taken from the newest member that joins."""
    on_assigned: _Callback = None
    """Called with the partitions (a list) that a member gets, before it reads them: the place to seek. Like
    the others it is called by ``poll`` and the like, in their thread; what it raises, they raise."""
    on_revoked: _Callback = None
    """Called with the partitions that go to another member: the last chance to commit."""
    on_lost: _Callback = None
    """Called with partitions that others may have already; default: on_revoked."""
    value_deserializer: _DeserializerField = None
    max_poll_records: Annotated[int, Field(ge=1)] = 500
    """What one ``poll`` returns at most, unless it says otherwise."""
    fetch_bytes_max: Annotated[int, Field(ge=1 * KIB, le=BATCH_BYTES_LIMIT)] = 8 * MIB
    """Asked for in one fetch from a broker; a batch that is larger still comes."""
    partition_fetch_bytes: Annotated[int, Field(ge=1 * KIB, le=BATCH_BYTES_LIMIT)] = 1 * MIB
    """The same per partition."""
    prefetch_bytes: Annotated[int, Field(ge=64 * KIB)] = 32 * MIB
    """Fetched and not yet handed out, of all partitions; fetching pauses above."""
    fetch_wait_ms: Annotated[int, Field(ge=0, le=60_000)] = 500
    """How long a broker may wait for records before it answers with none."""
    request_timeout_ms: Annotated[int, Field(ge=1)] = 10_000
    """How long a request may go unanswered, ``fetch_wait_ms`` not counted."""

    def _check(self) -> None:
        if self.group is not None and self.assign is not None:
            raise ConfigError(
                "group and assign exclude each other: a group assigns partitions to its members"
            )
        if self.enable_auto_commit and self.group is None:
            raise ConfigError("committing offsets (enable_auto_commit, at-most-once) needs a group")
        for name in ("on_assigned", "on_revoked", "on_lost"):
            if self.group is None and getattr(self, name) is not None:
                raise ConfigError(f"{name} needs a group: without one, nothing is assigned or revoked")


class ProcessConfig(Settings):
    """Settings of ``log.process``."""

    semantics: Semantics = "exactly-once"
    retries: Annotated[int, Field(ge=0)] = 3
    """How often the function is called again for a record for which it has raised."""
    dead_letters: str | None = None
    """Topic of the records for which it raised once more; default: the source, with ".dead" behind. Made if
    it is not there."""
    batch_records: Annotated[int, Field(ge=1)] = 500
    """Records per transaction, at most."""
    batch_bytes: Annotated[int, Field(ge=1)] = 1 * MIB
    """A batch with so many bytes of values waits for no more."""
    batch_ms: Milliseconds = 5
    """How long a batch that is not full waits for more records."""
    transaction_timeout_ms: Annotated[int, Field(ge=1000, le=15 * 60_000)] = 15_000
    """A transaction is open only while its outputs are written. One of a worker that died holds up readers
    for this long, unless a worker of the same name takes its place."""
    transactional_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Name of this worker, if it is to take its own place at once when it is started again; only one may
    have it at a time. Default: a new one each time."""
    consumer: dict[str, Any] = {}
    """More settings of the consumer."""
    producer: dict[str, Any] = {}
    """More settings of the producer."""
    actor_options: dict[str, Any] = {}
    """Options of the Ray actors, as ``num_cpus``, where there are several workers."""
    on_step: Callable[[str], None] | None = None
    """Called at each step of a batch: "polled", "transformed", "sent", "committed". For tests, which let the
    process die there."""

    def _check(self) -> None:
        ours = {"group", "assign", "semantics", "transactional_id", "transaction_timeout_ms"}
        ours |= {"on_assigned", "on_revoked", "on_lost", "key_serializer", "value_serializer"}
        ours |= {"value_deserializer"}
        for name in (*self.consumer, *self.producer):
            if name.replace(".", "_") in ours:
                raise ConfigError(f"{name} is not yours to set in log.process")


class BrokerConfig(Settings):
    """Settings of a broker."""

    election_timeout_ms: Annotated[int, Field(ge=10)] = 1000
    """A follower that hears nothing for one to two times this campaigns."""
    heartbeat_ms: Annotated[int, Field(ge=1)] = 100
    quiet_after_ms: Annotated[int, Field(ge=0)] = 500
    """A partition with nothing to do for this long sends no heartbeats of its own; 0: it always does."""
    rank_delay_ms: Annotated[int, Field(ge=0)] = 50
    """When the connection to the leader's broker breaks, the n-th survivor campaigns after n times this."""
    preferred_leader_after_ms: Annotated[int, Field(ge=0)] = 5000
    """A partition's preferred leader leads again when it has been up to date for this long to one and a half
    times this."""
    append_bytes_max: Annotated[int, Field(ge=1 * KIB)] = 1 * MIB
    """Entries in one message to a follower."""
    inflight_messages_max: Annotated[int, Field(ge=1)] = 16
    """Messages with entries under way to a follower."""
    inflight_bytes_max: Annotated[int, Field(ge=1 * KIB)] = 8 * MIB
    uncommitted_bytes_max: Annotated[int, Field(ge=1 * MIB)] = 64 * MIB
    """Entries of a partition that are not committed; produce is answered Busy above."""
    cache_bytes_max: Annotated[int, Field(ge=0)] = 4 * MIB
    """Recent entries of a partition kept in memory."""
    connection_bytes_max: Annotated[int, Field(ge=1 * MIB)] = 64 * MIB
    """Requests under way of one connection; it is not read above."""
    broker_bytes_max: Annotated[int, Field(ge=1 * MIB)] = 512 * MIB
    """The same for all connections together."""
    snapshots_sent_max: Annotated[int, Field(ge=1)] = 2
    """Snapshots that a broker sends to others at the same time."""
    producer_expiry_ms: Annotated[int, Field(ge=1000)] = DAY_MS
    """A partition forgets a producer that has not written to it for this long."""
    internal_partitions: Annotated[int, Field(ge=1, le=1000)] = 8
    """Of the topics that hold groups and transactions, when they are made; it stays."""
    internal_segment_bytes: Annotated[int, Field(ge=64 * KIB, le=2**31 - 1)] = 8 * MIB
    """Size of their segments, when they are made; they keep two or three of them."""
    offsets_retention_ms: Annotated[int, Field(ge=1000)] = 7 * DAY_MS
    """A group without members forgets offsets this old."""
    transaction_timeout_ms_max: Annotated[int, Field(ge=1000)] = 15 * 60_000
    """The longest time for which a producer may keep a transaction open."""
    transactional_id_expiry_ms: Annotated[int, Field(ge=1000)] = 7 * DAY_MS
    """A transactional id that is not used for this long is forgotten."""
    metrics_interval_ms: Annotated[int, Field(ge=0)] = 5000
    """How often metrics are given to Ray; 0: never. Ray shows them on every 10 seconds."""
    metrics_series_max: Annotated[int, Field(ge=1)] = 1000
    """Series of one metric that a broker shows. If topics, groups and partitions make more, they are added
    up."""
    log_format: LogFormat = "text"
    """Of the log files of brokers and of the metadata actor."""
    log_level: LogLevel = "INFO"
    """Of the same."""

    def _check(self) -> None:
        if self.heartbeat_ms * 2 > self.election_timeout_ms:
            raise ConfigError(
                f"heartbeat_ms={self.heartbeat_ms} must be at most half of "
                f"election_timeout_ms={self.election_timeout_ms}"
            )


class Environment(Settings):
    """What environment variables say; arguments take precedence over them."""

    cluster: Annotated[str, Field(pattern=r"^[a-zA-Z0-9._-]{1,100}$")] = "default"
    """RAFTLOG_CLUSTER: the cluster's name."""
    data_dir: Path | None = None
    """RAFTLOG_DATA_DIR: where brokers keep their data."""
    transport: Transport = "streams"
    """RAFTLOG_TRANSPORT: how a client's bytes reach the brokers; see :func:`raftlog.connect`."""
    log_level: LogLevel = "INFO"
    """RAFTLOG_LOG_LEVEL: of the loggers below ``raftlog``; of a cluster's brokers where it is started."""
    log_format: LogFormat = "text"
    """RAFTLOG_LOG_FORMAT: where a cluster is started, of the log files of its brokers."""

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Environment:
        """Read the variables; empty ones count as not set.

        Raises:
            ConfigError: one has a value it cannot have; the message names the variable.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for name in cls.model_fields:
            variable = f"RAFTLOG_{name.upper()}"
            value = environ.get(variable)
            if value:
                values[name] = value.upper() if name == "log_level" else value
                try:
                    cls(**values)
                except ConfigError as error:
                    raise ConfigError(f"{variable}: {error.message.removeprefix('Environment: ')}") from error
        return cls(**values)


def default_data_dir(cluster: str = "default") -> Path:
    """Where a cluster's brokers keep their data unless told otherwise: in the user's data folder."""
    return Path(platformdirs.user_data_dir("raftlog", appauthor=False)) / cluster
