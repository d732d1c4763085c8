"""Small files that are written whole: magic, version, length, crc, body.

Layout (big endian)::

    0       8         10         12       16    20
    | magic | version | reserved | length | crc | body …

``length`` counts the body; ``crc`` is CRC-32C over the first 16 bytes and the body.
"""

from __future__ import annotations

import struct
from typing import Final, TypeVar

import msgspec
from crc32c import crc32c

from raftlog.errors import DamagedData, IncompatibleVersion
from raftlog.record.frame import Buffer

_HEAD = struct.Struct(">8sHHI")
_CRC = struct.Struct(">I")
CHECKED_HEADER_BYTES: Final = _HEAD.size + _CRC.size

T = TypeVar("T")


def seal(magic: bytes, version: int, body: Buffer) -> bytes:
    """The bytes of a checked file (or of a checked part of one) around ``body``."""
    head = _HEAD.pack(magic, version, 0, len(body))
    return b"".join((head, _CRC.pack(crc32c(body, crc32c(head))), body))


def sealed_bytes(magic: bytes, data: Buffer, path: str) -> int:
    """Length of the whole part that begins ``data``, by its header.

    Raises:
        DamagedData: no such header.
    """
    if len(data) < CHECKED_HEADER_BYTES:
        raise DamagedData(f"{path}: {len(data)} bytes are too few", path=path, position=0)
    found, _, _, length = _HEAD.unpack_from(data)
    if found != magic:
        raise DamagedData(f"{path} begins with {found!r} instead of {magic!r}", path=path, position=0)
    return CHECKED_HEADER_BYTES + int(length)


def unseal(magic: bytes, version: int, data: Buffer, path: str, *, exact: bool = True) -> memoryview:
    """The body of a checked file.

    Args:
        version: the newest version that the caller reads.
        path: for the message of an error.
        exact: refuse bytes after the body.

    Raises:
        DamagedData: cut, of another kind, or the crc does not match.
        IncompatibleVersion: written by a later release.
    """
    size = sealed_bytes(magic, data, path)
    if len(data) < size or (exact and len(data) != size):
        raise DamagedData(f"{path}: {len(data)} bytes, its header says {size}", path=path, position=len(data))
    view = memoryview(data)
    crc = _CRC.unpack_from(data, _HEAD.size)[0]
    body = view[CHECKED_HEADER_BYTES:size]
    if crc32c(body, crc32c(view[: _HEAD.size])) != crc:
        raise DamagedData(f"{path}: its checksum does not match", path=path, position=0)
    found = _HEAD.unpack_from(data)[1]
    if found > version:
        raise IncompatibleVersion(f"{path} has version {found}; this release reads up to {version}")
    return body


def unseal_as(kind: type[T], magic: bytes, version: int, data: Buffer, path: str, *, exact: bool = True) -> T:
    """:func:`unseal`, then decode the body as msgpack of ``kind`` (same errors)."""
    body = unseal(magic, version, data, path, exact=exact)
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except msgspec.DecodeError as error:  # checked, yet not what this release writes
        raise DamagedData(f"{path}: {error}", path=path, position=0) from error
