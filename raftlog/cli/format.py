"""How ``raftlog consume`` prints a record: by a template as kcat's, as JSON, or bare."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from raftlog.errors import ConfigError

if TYPE_CHECKING:
    from raftlog.record.types import Record

Formatter: TypeAlias = "Callable[[Record], bytes]"

_FIELDS: Final[dict[str, Callable[[Any], bytes]]] = {
    "t": lambda record: record.topic.encode(),
    "p": lambda record: b"%d" % record.partition,
    "o": lambda record: b"%d" % record.offset,
    "T": lambda record: b"%d" % record.timestamp_ms,
    "D": lambda record: record.datetime.isoformat(timespec="milliseconds").encode(),
    "k": lambda record: record.key or b"",
    "v": lambda record: record.value or b"",
    "K": lambda record: b"%d" % (-1 if record.key is None else len(record.key)),
    "V": lambda record: b"%d" % (-1 if record.value is None else len(record.value)),
    "h": lambda record: b",".join(name.encode() + b"=" + (value or b"") for name, value in record.headers),
    "%": lambda record: b"%",
}
FIELDS_HELP: Final = (
    "%t topic, %p partition, %o offset, %T timestamp in ms, %D date and time, %k key, %v value, %K and %V "
    "their lengths (-1: none), %h headers, %% a percent sign; \\\\n, \\\\t, \\\\r, \\\\0, \\\\xHH"
)
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\"}
_TOKEN: Final = re.compile(r"%(.?)|\\(x[0-9a-fA-F]{2}|.?)|([^%\\]+)", re.DOTALL)


def template(text: str, end: str = "\\n") -> Formatter:
    """The formatter of a template such as ``"%p %o %k %v"``; ``end`` (a template too) follows each record.

    Raises:
        ConfigError: an unknown field or escape, or one cut off at the end.
    """
    parts = _parse(text) + _parse(end)

    def formatted(record: Record) -> bytes:
        return b"".join([part if isinstance(part, bytes) else part(record) for part in parts])

    return formatted


def unescape(text: str) -> bytes:
    """``text`` with its backslash escapes replaced.

    Raises:
        ConfigError: an unknown escape.
    """
    return b"".join(part for part in _parse(text.replace("%", "%%")) if isinstance(part, bytes))


def _parse(text: str) -> list[bytes | Callable[[Any], bytes]]:
    parts: list[bytes | Callable[[Any], bytes]] = []
    for match in _TOKEN.finditer(text):
        field, escape, literal = match.groups()
        if literal is not None:
            parts.append(literal.encode())
        elif field == "%":
            parts.append(b"%")
        elif field is not None:
            if field not in _FIELDS:
                raise ConfigError(
                    f"unknown field %{field} in the format {text!r}: there are {_known_fields()}"
                )
            parts.append(_FIELDS[field])
        elif len(escape) == 3:
            parts.append(bytes.fromhex(escape[1:]))
        elif escape in _ESCAPES:
            parts.append(_ESCAPES[escape].encode())
        else:
            raise ConfigError(f"unknown escape \\{escape} in {text!r}: there are \\n \\t \\r \\0 \\\\ \\xHH")
    return parts


def _known_fields() -> str:
    return " ".join(f"%{field}" for field in _FIELDS)


def as_json(record: Record) -> bytes:
    """One JSON object and a newline. Bytes that are UTF-8 become a string, others ``{"base64": "…"}``."""
    return (
        msgspec.json.encode(
            {
                "topic": record.topic,
                "partition": record.partition,
                "offset": record.offset,
                "timestamp_ms": record.timestamp_ms,
                "key": _text(record.key),
                "value": _text(record.value),
                "headers": [[name, _text(value)] for name, value in record.headers],
            }
        )
        + b"\n"
    )


def _text(data: bytes | None) -> str | dict[str, bytes] | None:
    if data is None:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"base64": data}
