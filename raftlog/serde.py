"""Serializers: from objects to the bytes of a record's key or value, and back.

A producer takes ``key_serializer`` and ``value_serializer``, a consumer ``value_deserializer``: any callable
from object to bytes, or from bytes to object. What this module offers has both directions as attributes, and
the handles take the one they need::

    log.producer(value_serializer=raftlog.serde.json)
    log.consumer("orders", value_deserializer=raftlog.serde.pydantic(Order))

A value of None is a null in the log and never passes through a serializer. There is no pickle here: bytes
from a log that others can write to must not run code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar

import msgspec as _msgspec

from raftlog.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel

Serializer: TypeAlias = Callable[[Any], bytes]
Deserializer: TypeAlias = Callable[[bytes], Any]

T = TypeVar("T")
ModelT = TypeVar("ModelT", bound="BaseModel")


@dataclass(frozen=True, slots=True)
class Serde(Generic[T]):
    """Both directions. What they raise is wrapped by the handle, which knows topic and offset."""

    serialize: Callable[[T], bytes]
    deserialize: Callable[[bytes], T]


def serializer_of(given: Any) -> Serializer | None:
    """The serializer in what a user passed: a callable, an object with ``serialize``, or None for raw bytes.

    Raises:
        ConfigError: none of these.
    """
    return _direction(given, "serialize")


def deserializer_of(given: Any) -> Deserializer | None:
    """The deserializer in what a user passed: a callable, an object with ``deserialize``, or None for raw
    bytes.

    Raises:
        ConfigError: none of these.
    """
    return _direction(given, "deserialize")


def _direction(given: Any, name: str) -> Callable[[Any], Any] | None:
    if given is None:
        return None
    found: Callable[[Any], Any] = getattr(given, name, given)
    if callable(found):
        return found
    raise ConfigError(f"{given!r} is neither callable nor has a callable {name!r}")


json: Final[Serde[Any]] = Serde(_msgspec.json.encode, _msgspec.json.decode)
"""JSON of plain values, dataclasses and msgspec structs in UTF-8; back come plain values."""

string: Final[Serde[str]] = Serde(str.encode, lambda data: str(data, "utf-8"))
"""Text in UTF-8."""


def pydantic(model: type[ModelT]) -> Serde[ModelT]:
    """JSON of a pydantic model.

    Args:
        model: serialising takes its instances (anything else is validated into one first); deserialising
            validates.
    """

    def serialize(value: ModelT) -> bytes:
        checked = value if isinstance(value, model) else model.model_validate(value)
        return checked.model_dump_json().encode()

    return Serde(serialize, model.model_validate_json)


def msgspec(kind: type[T]) -> Serde[T]:
    """JSON of a msgspec struct, dataclass or any other type that msgspec knows, checked when it is read."""
    return Serde(_msgspec.json.Encoder().encode, _msgspec.json.Decoder(kind).decode)
