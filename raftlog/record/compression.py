"""Compress and decompress the records of a batch, with a limit on what decompression may produce.

LZ4 at its fast level costs about 0.8 ms per MB; aiokafka's own codec is hard-wired to level 9, 13 times
slower, so compression happens here, around the codec. Blocks are independent because Kafka's Java client
refuses linked ones.
"""

from __future__ import annotations

import threading
from typing import Final

import lz4.frame
import zstandard

from raftlog.errors import CorruptBatch
from raftlog.record.batch import Compression
from raftlog.record.frame import Buffer

UNCOMPRESSED_BYTES_MAX: Final = 128 * 1024 * 1024
"""Records of one batch may not grow above this: lz4 reaches a ratio of 255, zstd of thousands."""

_ZSTD_LEVEL: Final = 1
_STEP_BYTES: Final = 1024 * 1024


class _PerThread(threading.local):
    """zstandard's contexts are dear to make (7 µs) and must not be shared between threads."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _PerThread()


def compress(kind: Compression, data: Buffer) -> bytes:
    """``data`` as one lz4 frame or one zstd frame, its content size stored.

    Raises:
        ValueError: a compression that this release does not write.
    """
    if kind is Compression.LZ4:
        compressed: bytes = lz4.frame.compress(
            data,
            compression_level=0,
            block_size=lz4.frame.BLOCKSIZE_MAX256KB,
            block_linked=False,
            store_size=True,
        )
        return compressed
    if kind is Compression.ZSTD:
        return _zstd.compressor.compress(data)
    raise ValueError(f"cannot write compression {kind!r}")


def decompress(kind: int, data: Buffer, bytes_max: int = UNCOMPRESSED_BYTES_MAX) -> bytes:
    """The records section uncompressed.

    Memory is bounded by ``bytes_max`` (plus one step) whatever sizes the data claims.

    Raises:
        CorruptBatch: damaged, cut short, followed by something else, of an unsupported compression, or above
            ``bytes_max`` bytes.
    """
    try:
        if kind == Compression.LZ4:
            return _decompress_lz4(data, bytes_max)
        if kind == Compression.ZSTD:
            return _decompress_zstd(data, bytes_max)
    except (RuntimeError, zstandard.ZstdError) as error:  # RuntimeError is what lz4.frame raises for bad data
        raise CorruptBatch(f"records do not decompress: {error}") from error
    raise CorruptBatch(f"records of unsupported compression {kind}")


def _too_large(bytes_max: int) -> CorruptBatch:
    return CorruptBatch(f"records decompress to more than the limit of {bytes_max} bytes")


def _decompress_lz4(data: Buffer, bytes_max: int) -> bytes:
    claimed: int = lz4.frame.get_frame_info(data)["content_size"]  # 0: not stored
    if claimed > bytes_max:
        raise _too_large(bytes_max)
    context = lz4.frame.create_decompression_context()
    view = memoryview(data)
    pieces: list[bytes] = []
    position = total = 0
    ended = False
    while not ended:
        # one call does it where the size is stored and true; otherwise step by step, so that a lie costs
        # nothing
        step = claimed if claimed and not pieces else _STEP_BYTES
        piece, consumed, ended = lz4.frame.decompress_chunk(context, view[position:], max_length=step)
        if not piece and not consumed and not ended:
            raise CorruptBatch("lz4 frame is cut short")
        position += consumed
        total += len(piece)
        if total > bytes_max:
            raise _too_large(bytes_max)
        pieces.append(piece)
    if position != len(view):
        raise CorruptBatch(f"{len(view) - position} bytes follow the lz4 frame")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _decompress_zstd(data: Buffer, bytes_max: int) -> bytes:
    claimed = zstandard.frame_content_size(data)  # -1: not stored
    if claimed > bytes_max:
        raise _too_large(bytes_max)
    if claimed <= 0:
        # Written by a client that compresses as it goes. The stream tells how much comes out without
        # holding more than the limit, but not whether the frame was complete: that, the second pass checks.
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=False) as reader:
            claimed = len(reader.read(bytes_max + 1))
        if claimed > bytes_max:
            raise _too_large(bytes_max)
    return _zstd.decompressor.decompress(data, max_output_size=claimed, allow_extra_data=False)
