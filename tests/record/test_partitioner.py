"""Keys go where Kafka's clients send them; records without one stick to a partition per batch."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka_oracle import their_murmur2

from raftlog.record import partitioner
from raftlog.record.partitioner import DefaultPartitioner, murmur2


def make(seed: int = 0) -> DefaultPartitioner:
    return DefaultPartitioner(random.Random(seed))


@pytest.mark.parametrize(
    ("key", "signed"),
    # from Kafka's own UtilsTest.testMurmur2
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_murmur2_of_kafkas_own_test_vectors(key: bytes, signed: int) -> None:
    assert murmur2(key) == signed & 0xFFFFFFFF


@given(st.binary(max_size=70))
def test_murmur2_agrees_with_kafka_python(key: bytes) -> None:
    assert murmur2(key) == their_murmur2(key)


@given(st.binary(max_size=30), st.integers(1, 1000))
def test_a_key_goes_to_its_positive_hash_modulo_the_partitions(key: bytes, partitions: int) -> None:
    mine = make()
    expected = (their_murmur2(key) & 0x7FFFFFFF) % partitions
    assert mine.partition(key, partitions) == expected
    assert mine.partition(key, partitions) == expected, "also from the cache"


def test_the_number_of_partitions_may_change_under_a_cached_key() -> None:
    mine = make()
    assert [mine.partition(b"foobar", n) for n in (1, 6, 7)] == [
        (-790332482 & 0x7FFFFFFF) % n for n in (1, 6, 7)
    ]


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitioner, "_CACHE_KEYS_MAX", 10)
    mine = make()
    keys = [b"key-%d" % i for i in range(25)]
    first = [mine.partition(key, 12) for key in keys]
    assert len(mine._hashes) <= 10
    assert [mine.partition(key, 12) for key in keys] == first


def test_without_a_key_it_sticks_until_the_batch_is_complete() -> None:
    mine = make()
    sticky = mine.partition(None, 6)
    assert {mine.partition(None, 6) for _ in range(100)} == {sticky}
    mine.on_new_batch((sticky + 1) % 6, 6)
    assert mine.partition(None, 6) == sticky, "a batch of another partition, filled by keyed records"
    mine.on_new_batch(sticky, 6)
    assert mine.partition(None, 6) != sticky


def test_sticky_partitions_are_all_used_about_equally() -> None:
    mine = make()
    seen: Counter[int] = Counter()
    for _ in range(6000):
        chosen = mine.partition(None, 6)
        seen[chosen] += 1
        mine.on_new_batch(chosen, 6)
    assert sorted(seen) == list(range(6))
    assert min(seen.values()) > 800


def test_one_partition_is_no_choice() -> None:
    mine = make()
    for _ in range(3):
        assert mine.partition(None, 1) == 0
        mine.on_new_batch(0, 1)


def test_a_sticky_partition_that_no_longer_exists_is_left() -> None:
    """A topic deleted and made again may have fewer partitions."""
    mine = make()
    while mine.partition(None, 100) < 5:
        mine.on_new_batch(mine.partition(None, 100), 100)
    assert 0 <= mine.partition(None, 5) < 5


def test_one_seed_gives_one_sequence() -> None:
    def sequence(seed: int) -> list[int]:
        mine, chosen = make(seed), []
        for _ in range(50):
            chosen.append(mine.partition(None, 9))
            mine.on_new_batch(chosen[-1], 9)
        return chosen

    assert sequence(3) == sequence(3) != sequence(4)
