"""Settings: names of both kinds, did-you-mean, limits, contradictions, environment."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from raftlog import serde
from raftlog.config import (
    BrokerConfig,
    ConsumerConfig,
    Environment,
    ProducerConfig,
    Settings,
    TopicConfig,
    default_data_dir,
    validate_topic_name,
)
from raftlog.errors import ConfigError, InvalidTopic
from raftlog.record.types import TopicPartition

ALL = [TopicConfig, ProducerConfig, ConsumerConfig, BrokerConfig, Environment]


# -- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_defaults_are_valid_and_round_trip(kind: type[Settings]) -> None:
    made = kind()
    assert (
        kind.model_validate(made.model_dump()) == made == kind.model_validate({}) == kind.model_validate(None)
    )
    assert kind.model_validate(made) is made
    assert made.model_dump(exclude_unset=True) == {}
    assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize("kind", ALL)
def test_every_setting_has_a_dotted_name(kind: type[Settings]) -> None:
    for name, value in kind().model_dump().items():
        assert getattr(kind.model_validate({name.replace("_", "."): value}), name) == value


@pytest.mark.parametrize("kind", ALL)
def test_kafkas_names_lead_to_settings_that_exist(kind: type[Settings]) -> None:
    assert set(kind.kafka_names.values()) <= set(kind.model_fields)


@pytest.mark.parametrize(
    ("kind", "given", "name", "value"),
    [
        (TopicConfig, {"retention.ms": "86400000"}, "retention_ms", 86_400_000),
        (TopicConfig, {"max.message.bytes": 1_048_588}, "max_message_bytes", 1_048_588),
        (TopicConfig, {"segment-bytes": 1 << 20}, "segment_bytes", 1 << 20),
        (TopicConfig, {"retention.ms": -1}, "retention_ms", None),
        (TopicConfig, {"retention.bytes": "-1"}, "retention_bytes", None),
        (ProducerConfig, {"linger.ms": 0}, "linger_ms", 0),
        (ProducerConfig, {"batch.size": 16_384}, "batch_bytes", 16_384),
        (ProducerConfig, {"compression.type": "zstd"}, "compression", "zstd"),
        (ProducerConfig, {"acks": -1}, "acks", "all"),
        (ProducerConfig, {"acks": "-1"}, "acks", "all"),
        (ProducerConfig, {"acks": "0"}, "acks", 0),
        (ConsumerConfig, {"group.id": "g"}, "group", "g"),
        (ConsumerConfig, {"isolation.level": "read_uncommitted"}, "isolation", "read_uncommitted"),
        (ConsumerConfig, {"auto.offset.reset": "latest"}, "auto_offset_reset", "latest"),
    ],
)
def test_kafkas_names_and_values(
    kind: type[Settings], given: dict[str, Any], name: str, value: object
) -> None:
    made = kind.model_validate(given)
    assert getattr(made, name) == value
    assert set(made.model_dump(exclude_unset=True)) == {name}


@pytest.mark.parametrize(
    ("kind", "wrong", "meant"),
    [
        (TopicConfig, "retention_sm", "retention_ms"),
        (TopicConfig, "retention.m", "retention.ms"),
        (TopicConfig, "Retention.MS", "retention.ms"),
        (TopicConfig, "max_mesage_bytes", "max_message_bytes"),
        (ProducerConfig, "linger", "linger_ms"),
        (ProducerConfig, "batch_size", "batch_bytes"),
        (ProducerConfig, "batch.siz", "batch.size"),
        (ProducerConfig, "compresion", "compression"),
        (ConsumerConfig, "group_id", "group"),
        (ConsumerConfig, "auto_ofset_reset", "auto_offset_reset"),
        (BrokerConfig, "heartbeat", "heartbeat_ms"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_one_that_was_meant(
    kind: type[Settings], wrong: str, meant: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        kind.model_validate({wrong: 1})
    assert caught.value.message == f"unknown setting {wrong!r}: did you mean {meant!r}?"


def test_an_unknown_setting_like_no_other_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'zzz'; there are flush, flush_interval_ms, max_"):
        TopicConfig(zzz=1)  # type: ignore[call-arg]


def test_one_setting_under_two_names_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'retention_ms' is given twice.*'retention\.ms'"):
        TopicConfig.model_validate({"retention_ms": 1, "retention.ms": 1})


@pytest.mark.parametrize("wrong", [[], "retention_ms=1", 7])
def test_settings_are_made_from_mappings(wrong: object) -> None:
    with pytest.raises(ConfigError, match="made from a mapping"):
        TopicConfig.model_validate(wrong)


# -- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        (TopicConfig, "retention_ms", -2),
        (TopicConfig, "retention_ms", "soon"),
        (TopicConfig, "segment_bytes", 100),
        (TopicConfig, "max_message_bytes", 64 << 20),
        (TopicConfig, "flush", "never"),
        (TopicConfig, "flush_interval_ms", 0),
        (ProducerConfig, "acks", "some"),
        (ProducerConfig, "acks", 2),
        (ProducerConfig, "acks", 1),
        (ProducerConfig, "linger_ms", -1),
        (ProducerConfig, "linger_ms", 2.5),
        (ProducerConfig, "compression", "gzip"),
        (ProducerConfig, "max_in_flight", 6),
        (ProducerConfig, "value_serializer", 7),
        (ProducerConfig, "transactional_id", ""),
        (ConsumerConfig, "isolation", "serializable"),
        (ConsumerConfig, "auto_offset_reset", "middle"),
        (ConsumerConfig, "assign", "t"),
        (ConsumerConfig, "assign", [("t", "x")]),
        (BrokerConfig, "heartbeat_ms", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(kind: type[Settings], setting: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        kind.model_validate({setting: value})
    assert setting in caught.value.message
    assert isinstance(caught.value, ValueError)
    kind.model_validate({})


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"linger_ms=-1: .*; compression='gzip': "):
        ProducerConfig(linger_ms=-1, compression="gzip")  # type: ignore[arg-type]


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TopicConfig().retention_ms = 5  # type: ignore[misc]


def test_serializers_are_resolved_to_callables() -> None:
    producer = ProducerConfig.model_validate({"key_serializer": str.encode, "value_serializer": serde.json})
    assert producer.key_serializer is str.encode
    assert producer.value_serializer is serde.json.serialize
    consumer = ConsumerConfig.model_validate({"value_deserializer": serde.json})
    assert consumer.value_deserializer is serde.json.deserialize


def test_assign_takes_plain_pairs() -> None:
    made = ConsumerConfig.model_validate({"assign": [("t", 1), TopicPartition("u", 0)]})
    assert made.assign == (TopicPartition("t", 1), TopicPartition("u", 0))
    assert made.assign[0].topic == "t"


# -- semantics and contradictions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("semantics", "acks"), [("at-most-once", 0), ("at-least-once", "all"), ("exactly-once", "all")]
)
def test_producer_semantics_set_and_defend_acks(semantics: Any, acks: Any) -> None:
    assert ProducerConfig(semantics=semantics).acks == acks
    assert ProducerConfig(semantics=semantics, acks=acks).acks == acks
    other = "all" if acks == 0 else 0
    with pytest.raises(ConfigError, match=f"acks={other!r} contradicts semantics='{semantics}'"):
        ProducerConfig(semantics=semantics, acks=other)


def test_consumer_semantics() -> None:
    assert ConsumerConfig(semantics="at-most-once", group="g").enable_auto_commit
    assert not ConsumerConfig(semantics="at-least-once").enable_auto_commit
    exactly = ConsumerConfig(semantics="exactly-once")
    assert (exactly.enable_auto_commit, exactly.isolation) == (False, "read_committed")
    assert not ConsumerConfig.model_validate(
        {"semantics": "exactly-once", "enable_auto_commit": "false"}
    ).group
    for contradiction in (
        {"semantics": "at-most-once", "group": "g", "enable_auto_commit": False},
        {"semantics": "at-least-once", "group": "g", "enable_auto_commit": True},
        {"semantics": "exactly-once", "group": "g", "enable_auto_commit": True},
        {"semantics": "exactly-once", "isolation": "read_uncommitted"},
        {"semantics": "exactly-once", "isolation.level": "read_uncommitted"},
    ):
        with pytest.raises(ConfigError, match="contradicts semantics"):
            ConsumerConfig.model_validate(contradiction)


@pytest.mark.parametrize("kind", [ProducerConfig, ConsumerConfig])
@pytest.mark.parametrize("wrong", ["exactly_once", "EOS", 1, []])
def test_unknown_semantics(kind: type[Settings], wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"semantics=.*'at-most-once', 'at-least-once' or 'exactly-once'"):
        kind.model_validate({"semantics": wrong})


@pytest.mark.parametrize(
    ("kind", "given", "complaint"),
    [
        (ProducerConfig, {"acks": 0, "transactional_id": "x"}, "acks=0 contradicts transactional_id"),
        (
            ProducerConfig,
            {"semantics": "at-most-once", "transactional_id": "x"},
            "contradicts transactional_id",
        ),
        (ConsumerConfig, {"group": "g", "assign": [("t", 0)]}, "group and assign exclude each other"),
        (ConsumerConfig, {"enable_auto_commit": True}, "needs a group"),
        (ConsumerConfig, {"semantics": "at-most-once"}, "needs a group"),
        (BrokerConfig, {"heartbeat_ms": 600}, "at most half of election_timeout_ms=1000"),
        (BrokerConfig, {"heartbeat_ms": "600"}, "at most half of election_timeout_ms=1000"),
    ],
)
def test_contradictions(kind: type[Settings], given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        kind.model_validate(given)


# -- topic names, environment, folders ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "x" * 249, "...", "__internal", "-"])
def test_valid_topic_names(name: str) -> None:
    assert validate_topic_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "x" * 250, "a b", "a/b", "a\n", "tür", "a\0", b"a", None, 7])
def test_invalid_topic_names_are_shown(name: object) -> None:
    with pytest.raises(InvalidTopic) as caught:
        validate_topic_name(name)
    assert repr(name) in caught.value.message


def test_the_environment_is_read_and_empty_means_unset() -> None:
    assert Environment.read({}) == Environment()
    read = Environment.read(
        {
            "RAFTLOG_CLUSTER": "prod",
            "RAFTLOG_DATA_DIR": "/data",
            "RAFTLOG_TRANSPORT": "",
            "RAFTLOG_LOG_LEVEL": "debug",
            "HOME": "/x",
        }
    )
    assert (read.cluster, read.data_dir, read.log_level) == ("prod", Path("/data"), "DEBUG")


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAFTLOG_CLUSTER", "from-env")
    assert Environment.read().cluster == "from-env"


@pytest.mark.parametrize(
    ("variable", "value"),
    [("RAFTLOG_LOG_LEVEL", "loud"), ("RAFTLOG_TRANSPORT", "pigeon"), ("RAFTLOG_CLUSTER", "a b")],
)
def test_a_bad_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        Environment.read({variable: value})


def test_data_lives_in_the_users_folder_one_folder_per_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/users/me/data")
    assert default_data_dir() != default_data_dir("other")
    assert default_data_dir("other").parts[-2:] == ("raftlog", "other")
