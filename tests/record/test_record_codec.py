"""Records in and out of batches, against kafka-python's pure Python reading of the format."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Sequence

import lz4.frame
import pytest
import zstandard
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka_oracle import TheirBatch, TheirBuilder

from raftlog.errors import CorruptBatch, InvalidRecord
from raftlog.record.batch import BATCH_HEADER_BYTES, BatchHeader, Compression, check_batch, stamped
from raftlog.record.codec import TIMESTAMP_MS_MAX, BatchBuilder, decode_batch, encode_batch
from raftlog.record.compression import compress, decompress
from raftlog.record.types import Record

Row = tuple[int, bytes | None, bytes | None, tuple[tuple[str, bytes | None], ...]]

KINDS = [Compression.NONE, Compression.LZ4, Compression.ZSTD]
timestamps = st.integers(min_value=0, max_value=TIMESTAMP_MS_MAX)
payloads = st.none() | st.binary(max_size=300)
headers = st.lists(st.tuples(st.text(max_size=12), st.none() | st.binary(max_size=20)), max_size=4).map(tuple)
rows = st.lists(st.tuples(timestamps, payloads, payloads, headers), min_size=1, max_size=30)


def build(records: Sequence[Row], compression: Compression = Compression.NONE) -> bytes:
    builder = BatchBuilder(1 << 20)
    for position, row in enumerate(records):
        assert builder.append(*row) == position
    return builder.build(compression)


def rows_of(records: Sequence[Record]) -> list[Row]:
    return [(each.timestamp_ms, each.key, each.value, each.headers) for each in records]


def their_rows(batch: bytes) -> list[Row]:
    return [(each.timestamp, each.key, each.value, tuple(each.headers)) for each in TheirBatch(batch)]


def batch_of(records: bytes, count: int, *, attributes: int = 0, last_delta: int | None = None) -> bytes:
    """A batch around any bytes, crc valid: what a hostile producer could send."""
    last = count - 1 if last_delta is None else last_delta
    after = struct.pack(">hiqqqhii", attributes, last, 0, 0, -1, -1, -1, count)
    crc = crc32c(records, crc32c(after))
    return struct.pack(">qiibI", 0, 49 + len(records), -1, 2, crc) + after + records


# -- round trips ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(records=rows, compression=st.sampled_from(KINDS), base_offset=st.integers(0, 2**62))
def test_what_goes_in_comes_out(records: list[Row], compression: Compression, base_offset: int) -> None:
    batch = stamped(build(records, compression), base_offset, 3)
    header = check_batch(batch)
    assert header.record_count == len(records)
    assert header.first_timestamp == records[0][0]
    assert header.max_timestamp == max(row[0] for row in records)
    decoded = decode_batch(batch, "topic", 7)
    assert rows_of(decoded) == records
    assert [each.offset for each in decoded] == list(range(base_offset, base_offset + len(records)))
    assert {(each.topic, each.partition) for each in decoded} == {("topic", 7)}


@settings(max_examples=50, deadline=None)
@given(records=rows, compression=st.sampled_from(KINDS))
def test_kafka_python_reads_what_we_write(records: list[Row], compression: Compression) -> None:
    batch = build(records, compression)
    assert TheirBatch(batch).validate_crc()
    assert their_rows(batch) == records


@settings(max_examples=50, deadline=None)
@given(records=rows, compression=st.sampled_from(KINDS))
def test_we_read_what_kafka_python_writes(records: list[Row], compression: Compression) -> None:
    builder = TheirBuilder(
        magic=2,
        compression_type=compression,
        is_transactional=False,
        producer_id=5,
        producer_epoch=1,
        base_sequence=9,
        batch_size=1 << 20,
    )
    for position, (timestamp, key, value, pairs) in enumerate(records):
        builder.append(position, timestamp, key, value, list(pairs))
    batch = bytes(builder.build())
    assert check_batch(batch).base_sequence == 9
    assert rows_of(decode_batch(batch, "t", 0)) == records


@settings(deadline=None)
@given(values=st.lists(payloads, min_size=1, max_size=50), split=st.integers(0, 50), with_keys=st.booleans())
def test_extend_is_append_many_times(values: list[bytes | None], split: int, with_keys: bool) -> None:
    keys = [None if value is None else value[:3] for value in values] if with_keys else None
    one_by_one = BatchBuilder(1 << 20)
    for index, value in enumerate(values):
        one_by_one.append(17, keys[index] if keys else None, value)
    at_once = BatchBuilder(1 << 20)
    split = min(split, len(values))
    assert at_once.extend(values[:split], keys, 17) == split
    assert at_once.extend(values, keys, 17, start=split) == len(values)
    assert at_once.count == one_by_one.count == len(values)
    assert at_once.build() == one_by_one.build() == encode_batch(values, keys, 17)


# -- the builder ---------------------------------------------------------------------------------------------


def test_a_full_builder_takes_nothing_and_stays_within_its_limit() -> None:
    builder = BatchBuilder(1000)
    while builder.append(1, b"key", b"v" * 100) is not None:
        pass
    count, size = builder.count, builder.size
    assert 800 < size <= 1000
    assert builder.append(1, None, b"v" * 900) is None
    assert (builder.count, builder.size) == (count, size)
    batch = builder.build()
    assert len(batch) == size
    assert len(decode_batch(batch, "t", 0)) == count


def test_a_first_record_is_taken_whatever_its_size() -> None:
    builder = BatchBuilder(100)
    assert builder.append(1, None, b"v" * 10_000) == 0
    assert builder.append(1, None, b"") is None
    assert decode_batch(builder.build(), "t", 0)[0].value == b"v" * 10_000


def test_extend_says_how_far_it_came() -> None:
    values = [b"v" * 100] * 50
    batches, start = [], 0
    while start < len(values):
        builder = BatchBuilder(1000)
        end = builder.extend(values, None, 5, start)
        assert builder.count == end - start > 0
        batches.append(builder.build())
        start = end
    assert sum(len(decode_batch(batch, "t", 0)) for batch in batches) == 50
    assert all(len(batch) <= 1000 for batch in batches)


@pytest.mark.parametrize(
    ("timestamp", "key", "value", "pairs"),
    [
        (1, "text", b"", ()),
        (1, b"", "text", ()),
        (1, b"", 7, ()),
        (1, b"", b"", [("h", 7)]),
        (1, b"", b"", [(b"h", b"")]),
        (1, b"", b"", [("h", b"", 1)]),
        (1, b"", b"", [7]),
        (1, b"", b"", 7),
        (None, b"", b"", ()),
        ("now", b"", b"", ()),
        (-1, b"", b"", ()),
        (TIMESTAMP_MS_MAX + 1, b"", b"", ()),
    ],
)
def test_a_bad_record_is_refused_and_the_next_one_is_fine(
    timestamp: int, key: bytes, value: bytes, pairs: Sequence[tuple[str, bytes | None]]
) -> None:
    builder = BatchBuilder(1000)
    builder.append(1, None, b"before")
    with pytest.raises(InvalidRecord):
        builder.append(timestamp, key, value, pairs)
    assert builder.append(1, None, b"after") == 1
    assert [each.value for each in decode_batch(builder.build(), "t", 0)] == [b"before", b"after"]


def test_a_bad_value_in_a_list_is_named_and_those_before_it_are_in() -> None:
    builder = BatchBuilder(1000)
    with pytest.raises(InvalidRecord, match="record 2"):
        builder.extend([b"a", b"b", "c", b"d"], None, 1)  # type: ignore[list-item]
    assert builder.count == 2
    assert builder.extend([b"a", b"b", b"c", b"d"], None, 1, start=2) == 4
    assert [each.value for each in decode_batch(builder.build(), "t", 0)] == [b"a", b"b", b"c", b"d"]


def test_an_empty_batch_is_not_built() -> None:
    with pytest.raises(ValueError, match="at least one record"):
        BatchBuilder(100).build()


def test_build_sets_producer_fields_and_can_be_repeated() -> None:
    builder = BatchBuilder(1000)
    builder.append(5, b"k", b"v" * 200)
    first = b"".join(builder.finish(Compression.LZ4).seal(7, 2, 2**31 - 1, transactional=True))
    header = BatchHeader.parse(first)
    assert (header.producer_id, header.producer_epoch, header.base_sequence) == (7, 2, 2**31 - 1)
    assert header.is_transactional
    assert not header.is_control
    assert header.compression == Compression.LZ4
    assert TheirBatch(first).validate_crc()
    assert b"".join(builder.finish(Compression.LZ4).seal(7, 2, 2**31 - 1, transactional=True)) == first
    plain = BatchHeader.parse(builder.build())
    assert (plain.producer_id, plain.producer_epoch, plain.base_sequence, plain.attributes) == (-1, -1, -1, 0)


def test_records_that_do_not_shrink_are_not_compressed() -> None:
    assert check_batch(build([(1, None, b"x", ())], Compression.ZSTD)).compression == Compression.NONE
    assert check_batch(build([(1, None, b"x" * 500, ())], Compression.ZSTD)).compression == Compression.ZSTD


# -- damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", KINDS)
def test_every_flipped_bit_is_caught(compression: Compression) -> None:
    batch = build([(5, b"key", b"value" * 20, (("h", b"x"),))] * 3, compression)
    assert BatchHeader.parse(batch).compression == compression
    for position in range(16, len(batch)):
        flipped = bytearray(batch)
        flipped[position] ^= 0x10
        with pytest.raises(CorruptBatch):
            decode_batch(flipped, "t", 0)


@settings(max_examples=300, deadline=None)
@given(
    records=st.lists(st.tuples(st.just(0), payloads, payloads, headers), min_size=1, max_size=5),
    cuts=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=3),
    keep=st.integers(0, 2000),
    count=st.sampled_from([1, 2, 3, 5, 100, 2**31 - 1, 0, -1]),
)
def test_hostile_records_with_a_valid_crc_never_read_wrong(
    records: list[Row], cuts: list[tuple[int, int]], keep: int, count: int
) -> None:
    """Either CorruptBatch, or what a second implementation reads too: never a read past the end."""
    section = bytearray(build(records)[BATCH_HEADER_BYTES:])[: keep if keep < 400 else None]
    for position, value in cuts:
        if section:
            section[position % len(section)] = value
    batch = batch_of(bytes(section), count)
    try:
        decoded = decode_batch(batch, "t", 0)
    except CorruptBatch:
        return
    assert rows_of(decoded) == their_rows(batch)


def test_counts_must_agree_with_the_records() -> None:
    section = build([(0, None, b"v", ())] * 2)[BATCH_HEADER_BYTES:]
    assert len(decode_batch(batch_of(section, 2), "t", 0)) == 2
    for count, last_delta in ((1, 0), (3, 2), (2, 5), (0, -1), (-1, -2), (2**31 - 1, 2**31 - 2)):
        with pytest.raises(CorruptBatch):
            decode_batch(batch_of(section, count, last_delta=last_delta), "t", 0)


@pytest.mark.parametrize("compression", KINDS)
def test_log_append_time_gives_every_record_the_largest_timestamp(compression: Compression) -> None:
    """Brokers of Kafka can write such batches; ours never do, but a log may be copied from there."""
    batch = bytearray(build([(5, None, b"a" * 50, ()), (9, None, b"b" * 50, ())], compression))
    batch[22] |= 0x08
    batch[17:21] = crc32c(bytes(batch[21:])).to_bytes(4, "big")
    assert BatchHeader.parse(batch).is_log_append_time
    assert [each.timestamp_ms for each in decode_batch(batch, "t", 0)] == [9, 9]
    assert [row[0] for row in their_rows(bytes(batch))] == [9, 9]


def test_buffers_that_are_not_one_batch() -> None:
    batch = build([(0, None, b"v", ())])
    for wrong in (b"", batch[:30], batch[:-1], batch + b"x", batch + batch):
        with pytest.raises(CorruptBatch):
            decode_batch(wrong, "t", 0)


def test_unsupported_compression_in_a_stored_batch() -> None:
    for kind in (1, 2, 5, 6, 7):
        with pytest.raises(CorruptBatch, match=f"unsupported compression {kind}"):
            decode_batch(batch_of(b"whatever", 1, attributes=kind), "t", 0)


def test_the_crc_check_can_be_left_to_the_frame() -> None:
    batch = bytearray(build([(0, None, b"v", ())]))
    batch[17] ^= 1
    with pytest.raises(CorruptBatch, match="crc"):
        decode_batch(batch, "t", 0)
    assert decode_batch(batch, "t", 0, check=False)[0].value == b"v"


# -- compression ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Compression.LZ4, Compression.ZSTD])
@pytest.mark.parametrize("stored", [True, False], ids=["size stored", "size not stored"])
def test_a_decompression_bomb_is_refused(kind: Compression, stored: bool) -> None:
    plain = bytes(3_000_000)
    if kind is Compression.LZ4:
        bomb = lz4.frame.compress(plain, store_size=stored)
    else:
        bomb = zstandard.ZstdCompressor(write_content_size=stored).compress(plain)
    assert len(bomb) < 20_000
    assert decompress(kind, bomb, len(plain)) == plain
    for limit in (len(plain) - 1, 1000, 0):
        with pytest.raises(CorruptBatch, match=f"limit of {limit} bytes"):
            decompress(kind, bomb, limit)
    with pytest.raises(CorruptBatch, match="limit"):
        decode_batch(batch_of(bomb, 1, attributes=kind), "t", 0, uncompressed_bytes_max=100_000)


def test_an_lz4_frame_that_lies_about_its_size_costs_no_memory() -> None:
    honest = lz4.frame.compress(bytes(3_000_000), store_size=True)
    # frame descriptor: magic 4, flags, block size, content size 8, header checksum over the descriptor
    for claim in (100, 2**62):
        lying = bytearray(honest)
        lying[6:14] = claim.to_bytes(8, "little")
        xxhash = _xxh32(bytes(lying[4:14]))
        lying[14] = (xxhash >> 8) & 0xFF
        assert lz4.frame.get_frame_info(bytes(lying))["content_size"] == claim, "the forgery is well made"
        with pytest.raises(CorruptBatch):
            decompress(Compression.LZ4, bytes(lying), 1_000_000)


def _xxh32(data: bytes) -> int:
    """XXH32 with seed 0 of fewer than 16 bytes (the LZ4 frame specification's header checksum)."""
    mask = 0xFFFFFFFF
    prime1, prime2, prime3, prime4, prime5 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1
    h = (prime5 + len(data)) & mask
    whole = len(data) & ~3
    for (word,) in struct.iter_unpack("<I", data[:whole]):
        h = (h + word * prime3) & mask
        h = ((h << 17 | h >> 15) & mask) * prime4 & mask
    for byte in data[whole:]:
        h = (h + byte * prime5) & mask
        h = ((h << 11 | h >> 21) & mask) * prime1 & mask
    h = (h ^ h >> 15) * prime2 & mask
    h = (h ^ h >> 13) * prime3 & mask
    return h ^ h >> 16


@pytest.mark.parametrize("kind", [Compression.LZ4, Compression.ZSTD])
@pytest.mark.parametrize("size", [1, 1000, 300_000, 2_500_000])
def test_compressed_data_that_is_cut_or_followed_by_something(kind: Compression, size: int) -> None:
    plain = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    whole = compress(kind, plain)
    assert decompress(kind, whole) == plain
    for wrong in (whole[:-1], whole[: len(whole) // 2], whole[:3], b"", whole + b"x", b"garbage" * 10):
        with pytest.raises(CorruptBatch):
            decompress(kind, wrong)


@pytest.mark.parametrize("kind", [Compression.LZ4, Compression.ZSTD])
def test_streamed_frames_without_a_stored_size_are_read(kind: Compression) -> None:
    """Other clients compress as they go and do not know the size when they write the frame's header."""
    plain = b"some text that repeats, " * 100_000
    if kind is Compression.LZ4:
        context = lz4.frame.LZ4FrameCompressor()
        pieces = [context.begin(), context.compress(plain), context.flush()]
    else:
        stream = zstandard.ZstdCompressor().compressobj()
        pieces = [stream.compress(plain), stream.flush()]
    assert decompress(kind, b"".join(pieces)) == plain
    with pytest.raises(CorruptBatch):
        decompress(kind, b"".join(pieces)[:-5])
    with pytest.raises(CorruptBatch):
        decompress(kind, b"".join(pieces) + b"tail")


def test_lz4_blocks_are_independent_as_kafkas_java_client_demands() -> None:
    info = lz4.frame.get_frame_info(compress(Compression.LZ4, b"x" * 1_000_000))
    assert info["block_linked"] is False
    assert info["content_size"] == 1_000_000


def test_only_known_compressions_are_written() -> None:
    with pytest.raises(ValueError, match="GZIP"):
        compress(Compression.GZIP, b"x")


# -- import --------------------------------------------------------------------------------------------------


def test_without_the_compiled_codec_the_import_says_what_to_do() -> None:
    code = (
        "import sys; sys.modules['aiokafka.record._crecords'] = None\n"
        "try:\n"
        "    import raftlog.record.codec\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "compiled record codec" in done.stdout
    assert "install a wheel" in done.stdout


def test_brokers_check_and_stamp_without_loading_the_codec() -> None:
    code = (
        "import sys, raftlog.record.batch, raftlog.record.compression, raftlog.state.partition\n"
        "print([name for name in ('aiokafka', 'ray', 'asyncio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


LARGE = bytes(range(256)) * 400


@pytest.mark.parametrize("compression", [Compression.NONE, Compression.LZ4])
@pytest.mark.parametrize("key", [None, b"", b"k" * 300])
@pytest.mark.parametrize("others", [[], [b"after"], [None, b"x" * 100_000, b"y"]])
def test_a_large_first_record_is_encoded_as_the_codec_would(
    compression: Compression, key: bytes | None, others: list[bytes | None]
) -> None:
    def built(value: bytes | bytearray, *, extends: bool) -> tuple[int, bytes]:
        builder = BatchBuilder(1 << 20)
        assert builder.append(17, key, value) == 0
        sizes = [builder.size]
        if extends:
            assert builder.extend(others, None, 18) == len(others)
        else:
            for other in others:
                assert builder.append(18, None, other) == builder.count - 1
        return sizes[0], builder.build(compression)

    expected = built(bytearray(LARGE), extends=False)
    assert built(LARGE, extends=False) == built(LARGE, extends=True) == expected


def test_a_large_record_alone_in_its_batch_is_not_copied() -> None:
    builder = BatchBuilder(1 << 20)
    builder.append(17, b"key", LARGE)
    assert any(piece is LARGE for piece in builder.finish().seal())


def test_what_may_change_is_copied() -> None:
    value = bytearray(LARGE)
    builder = BatchBuilder(1 << 20)
    builder.append(17, None, value)
    value[:] = bytes(len(value))
    (record,) = decode_batch(builder.build(), "t", 0)
    assert record.value == LARGE


@pytest.mark.parametrize("bytes_max", [1_000, len(LARGE) + 200])
def test_a_batch_with_a_large_record_takes_what_fits(bytes_max: int) -> None:
    ours, codec = BatchBuilder(bytes_max), BatchBuilder(bytes_max)
    assert ours.append(1, None, LARGE) == codec.append(1, None, bytearray(LARGE)) == 0
    for size in (len(LARGE), 1_000, 150, 90, 60, 10, 0):
        value = b"v" * size
        assert ours.append(1, None, value) == codec.append(1, None, value)
        assert ours.extend([value], None, 1) == codec.extend([value], None, 1)
        assert (ours.count, ours.size) == (codec.count, codec.size)
    assert ours.build() == codec.build()


def test_what_is_wrong_after_a_large_record_leaves_it_as_it_was() -> None:
    builder = BatchBuilder(1 << 20)
    builder.append(1, None, LARGE)
    for wrong in (5, "text"):
        with pytest.raises(InvalidRecord):
            builder.append(1, None, wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidRecord):
            builder.extend([wrong], None, 1)  # type: ignore[list-item]
    assert builder.count == 1
    assert [each.value for each in decode_batch(builder.build(), "t", 0)] == [LARGE]
