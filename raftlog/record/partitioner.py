"""Which partition a record goes to: Kafka's rule, so that equal keys meet in equal partitions whoever
produced them.

With a key: ``toPositive(murmur2(key)) % partitions``. Without: stick to one partition until its batch is
full, then to another (KIP-480), which fills batches and still spreads the load.
"""

from __future__ import annotations

import random as random_module
import struct
from typing import Final

MURMUR2_SEED: Final = 0x9747B28C
MURMUR2_M: Final = 0x5BD1E995
_MASK: Final = 0xFFFFFFFF
_CACHE_KEYS_MAX: Final = 65_536


def murmur2(data: bytes) -> int:
    """Kafka's variant of MurmurHash2 (``org.apache.kafka.common.utils.Utils.murmur2``), as an unsigned
    int32."""
    length = len(data)
    h = MURMUR2_SEED ^ length
    whole = length & ~3
    for k in struct.unpack_from(f"<{whole >> 2}I", data):
        k = k * MURMUR2_M & _MASK
        k ^= k >> 24
        h = (h * MURMUR2_M & _MASK) ^ (k * MURMUR2_M & _MASK)
    if whole != length:
        h = (h ^ int.from_bytes(data[whole:], "little")) * MURMUR2_M & _MASK
    h ^= h >> 13
    h = h * MURMUR2_M & _MASK
    return h ^ (h >> 15)


class DefaultPartitioner:
    """Partitions the records of one topic.

    Args:
        random: picks the sticky partitions.

    May be called from several threads: every step is one atomic operation on a dict or an attribute.
    """

    __slots__ = ("_hashes", "_random", "_sticky")

    def __init__(self, random: random_module.Random) -> None:
        self._random = random
        self._hashes: dict[bytes, int] = {}
        self._sticky = -1

    def partition(self, key: bytes | None, n_partitions: int) -> int:
        """The partition, from 0 to ``n_partitions - 1``. A key is hashed once and remembered."""
        if key is None:
            sticky = self._sticky
            if not 0 <= sticky < n_partitions:
                sticky = self._sticky = self._random.randrange(n_partitions)
            return sticky
        positive = self._hashes.get(key)
        if positive is None:
            positive = self._remember(bytes(key))
        return positive % n_partitions

    def on_new_batch(self, partition: int, n_partitions: int) -> None:
        """A batch of ``partition`` is complete: if it was the sticky one, another takes its place."""
        if partition == self._sticky and n_partitions > 1:
            step = 1 + self._random.randrange(n_partitions - 1)
            self._sticky = (partition + step) % n_partitions

    def _remember(self, key: bytes) -> int:
        if len(self._hashes) >= _CACHE_KEYS_MAX:
            # dropping all is cheaper than any order of eviction: a full cache means keys that hardly repeat
            self._hashes.clear()
        positive = self._hashes[key] = murmur2(key) & 0x7FFFFFFF
        return positive
