"""Kafka's murmur2 of many keys at once, a word of all keys of one length taking a few numpy operations.

See ``partitioner`` for the hash itself.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from raftlog.record.arrow import Bytes, Integers, np, npt
from raftlog.record.partitioner import MURMUR2_M, MURMUR2_SEED, murmur2

Hashes: TypeAlias = npt.NDArray[np.uint32]

_MANY: Final = 32
"""Of so many keys of one length on, numpy is faster than going through them."""


def murmur2_of(data: Bytes, begins: Integers, lengths: Integers) -> Hashes:
    """The hashes of the keys that lie in ``data`` at these places."""
    hashes = np.empty(len(lengths), np.uint32)
    for length in np.unique(lengths).tolist():
        rows = np.flatnonzero(lengths == length)
        at = begins[rows]
        if len(rows) < _MANY:
            hashes[rows] = [murmur2(data[place : place + length].tobytes()) for place in at.tolist()]
        else:
            hashes[rows] = _of_one_length(data, at, length)
    return hashes


def _of_one_length(data: Bytes, at: Integers, length: int) -> Hashes:
    mix = np.uint32(MURMUR2_M)
    h = np.full(len(at), MURMUR2_SEED ^ length, np.uint32)
    whole = length & ~3
    word = np.arange(4)
    for place in range(0, whole, 4):
        k = data[at[:, np.newaxis] + (word + place)].view("<u4")[:, 0] * mix
        k ^= k >> np.uint32(24)
        k *= mix
        h *= mix
        h ^= k
    if whole != length:
        for byte in range(length - whole):
            h ^= data[at + (whole + byte)].astype(np.uint32) << np.uint32(8 * byte)
        h *= mix
    h ^= h >> np.uint32(13)
    h *= mix
    return h ^ (h >> np.uint32(15))
