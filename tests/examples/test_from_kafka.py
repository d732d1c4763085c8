"""What docs/FROM_KAFKA.md says of settings is what the settings are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import raftlog
from raftlog import Consumer, Log, Producer, Transaction
from raftlog.config import BrokerConfig, ConsumerConfig, ProducerConfig, Settings, TopicConfig
from raftlog.errors import ConfigError

TEXT = (Path(__file__).parents[2] / "docs" / "FROM_KAFKA.md").read_text()
SECTIONS: dict[str, type[Settings]] = {
    "Producer": ProducerConfig,
    "Consumer": ConsumerConfig,
    "Topic": TopicConfig,
    "Broker and cluster": BrokerConfig,
}
UNITS = {
    "ms": (("day", 86_400_000), ("min", 60_000), ("s", 1000), ("ms", 1)),
    "bytes": (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)),
}


def table(section: str) -> list[list[str]]:
    """The cells of the table of a section."""
    body = re.split(r"^## ", TEXT.split(f"\n## {section}\n")[1], flags=re.MULTILINE)[0]
    lines = [line for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def rows(section: str) -> Iterator[tuple[list[str], str, str]]:
    """Kafka's names, ours, and our default, of each row of the table that has all three."""
    for cells in table(section):
        if re.fullmatch(r"`[a-z_]+`", cells[1]):
            yield re.findall(r"`([^`]+)`", cells[0]), cells[1].strip("`"), cells[3]


def as_text(name: str, value: object) -> str:
    """A default as the document writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value).lower()
    for suffix, units in UNITS.items():
        for unit, size in units:
            if suffix in name.split("_") and value >= size and value % size == 0:
                return f"{value // size} {unit}{'s' if unit == 'day' and value > size else ''}"
    return str(value)


@pytest.mark.parametrize("section", SECTIONS)
def test_names_and_defaults_are_the_real_ones(section: str) -> None:
    settings = SECTIONS[section]
    found = list(rows(section))
    assert len(found) >= 6
    for _, name, default in found:
        assert name in settings.model_fields, name
        assert default == as_text(name, settings.model_fields[name].default), name


@pytest.mark.parametrize("section", ["Producer", "Consumer", "Topic"])
def test_kafkas_names_are_understood(section: str) -> None:
    settings = SECTIONS[section]
    for kafka, name, _ in rows(section):
        for given in kafka:
            if given == "flush.messages":  # Kafka counts there: only the idea is the same
                continue
            assert (settings.kafka_names.get(given) or given.replace(".", "_")) == name, given
    listed = {given for kafka, _, _ in rows(section) for given in kafka}
    assert set(settings.kafka_names) <= listed, "a name that is understood, and not in the table"


def test_every_setting_has_a_row_or_no_counterpart() -> None:
    """Settings that Kafka has nothing like."""
    own = {
        "Producer": {"semantics"},
        "Consumer": {
            "assign",
            "on_assigned",
            "on_lost",
            "on_revoked",
            "prefetch_bytes",
            "semantics",
        },
        "Topic": set[str](),
    }
    for section, without in own.items():
        names = {name for _, name, _ in rows(section)}
        assert set(SECTIONS[section].model_fields) - names == without, section


def test_the_api_is_there() -> None:
    handles = {"log": Log, "producer": Producer, "consumer": Consumer, "txn": Transaction, "raftlog": raftlog}
    ours = " ".join(cells[1] for cells in table("The API side by side"))
    shown = set(re.findall(rf"`({'|'.join(handles)})\.([a-z_]+)", ours))
    assert len(shown) >= 20
    for handle, name in shown:
        assert hasattr(handles[handle], name), f"{handle}.{name}"


def test_the_checks_can_fail() -> None:
    assert as_text("linger_ms", 5) == "5 ms"
    assert as_text("batch_bytes", 256 * 1024) == "256 KiB"
    assert as_text("offsets_retention_ms", 7 * 86_400_000) == "7 days"
    with pytest.raises(ConfigError, match="did you mean"):
        ProducerConfig.model_validate({"linger.msec": 3})
