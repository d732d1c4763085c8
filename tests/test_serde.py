"""Serializers: both directions, what users may pass, and that nothing is pickled."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pydantic
import pytest

from raftlog import serde
from raftlog.errors import ConfigError


class Order(pydantic.BaseModel):
    id: int
    at: datetime
    note: str = ""


class Point(msgspec.Struct):
    x: int
    y: int = 0


@dataclass
class Named:
    name: str


def test_json_takes_plain_values_and_structures_and_returns_plain_values() -> None:
    for value in (None, True, 1.5, "ü", [1, {"a": None}], {"k": [1, 2]}):
        assert serde.json.deserialize(serde.json.serialize(value)) == value
    assert serde.json.serialize({"a": 1}) == b'{"a":1}'
    assert serde.json.serialize(Named("n")) == b'{"name":"n"}'
    assert serde.json.deserialize(serde.json.serialize(Point(1))) == {"x": 1, "y": 0}
    with pytest.raises(msgspec.DecodeError):
        serde.json.deserialize(b"{")
    with pytest.raises(TypeError):
        serde.json.serialize(object())


def test_string_is_utf8() -> None:
    assert serde.string.serialize("gr\u00fc\u00df") == b"gr\xc3\xbc\xc3\x9f"
    assert serde.string.deserialize(memoryview(b"\xc3\xbc")) == "\u00fc"  # type: ignore[arg-type]
    with pytest.raises(UnicodeDecodeError):
        serde.string.deserialize(b"\xff")
    with pytest.raises(TypeError):
        serde.string.serialize(7)  # type: ignore[arg-type]


def test_pydantic_checks_both_ways() -> None:
    orders = serde.pydantic(Order)
    order = Order(id=1, at=datetime(2013, 1, 1, tzinfo=UTC))
    assert orders.deserialize(orders.serialize(order)) == order
    assert orders.deserialize(orders.serialize({"id": 1, "at": order.at})) == order  # type: ignore[arg-type]
    for bad in (b"{}", b"not json", b'{"id": "x", "at": "2013-01-01"}'):
        with pytest.raises(pydantic.ValidationError):
            orders.deserialize(bad)
    with pytest.raises(pydantic.ValidationError):
        orders.serialize({"id": 1})  # type: ignore[arg-type]


def test_msgspec_checks_what_it_reads() -> None:
    points = serde.msgspec(Point)
    assert points.deserialize(points.serialize(Point(1, 2))) == Point(1, 2)
    with pytest.raises(msgspec.ValidationError):
        points.deserialize(b'{"x": "1"}')
    assert serde.msgspec(list[int]).deserialize(b"[1,2]") == [1, 2]


def test_handles_take_a_callable_or_an_object_with_both_directions_or_nothing() -> None:
    assert serde.serializer_of(None) is None
    assert serde.deserializer_of(None) is None
    assert serde.serializer_of(str.encode) is str.encode
    assert serde.deserializer_of(bytes.decode) is bytes.decode
    for each in (serde.json, serde.string, serde.pydantic(Order), serde.msgspec(Point)):
        assert serde.serializer_of(each) is each.serialize
        assert serde.deserializer_of(each) is each.deserialize


@pytest.mark.parametrize("wrong", [7, "json", b"json", [], {}, object()])
def test_anything_else_is_a_config_error_that_shows_it(wrong: object) -> None:
    for take in (serde.serializer_of, serde.deserializer_of):
        with pytest.raises(ConfigError, match="neither callable"):
            take(wrong)


def test_there_is_no_pickle() -> None:
    assert "import pickle" not in Path(serde.__file__).read_text()
