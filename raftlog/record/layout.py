"""How one record lies in a batch: its fields and their sizes (the record format of KIP-98)."""

from __future__ import annotations

from typing import Final

NULL: Final = -1
"""The length of a key or value that is not there."""
BODY_BYTES: Final = 3
"""Of a record, beside offset delta, key and value: attributes, timestamp delta, number of headers."""
RECORD_BYTES_MIN: Final = 7
DELTA_WIDTHS: Final = ((0, 64, 1), (64, 8_192, 2), (8_192, 1_048_576, 3))
"""(from, to, bytes) of offset deltas; no batch made here holds more records."""


def varint(number: int) -> bytes:
    """``number`` (int64) as a zigzag varint: seven bits a byte, the lowest first."""
    left = (number << 1) ^ (number >> 63)
    encoded = bytearray()
    while left > 0x7F:
        encoded.append(left & 0x7F | 0x80)
        left >>= 7
    encoded.append(left)
    return bytes(encoded)


def record_bytes(key_length: int, value_length: int, delta_bytes: int) -> tuple[int, int]:
    """(what the length of such a record says, bytes that it takes)"""
    key_bytes = len(varint(key_length)) + max(key_length, 0)
    body = BODY_BYTES + delta_bytes + key_bytes + len(varint(value_length)) + value_length
    return body, len(varint(body)) + body
