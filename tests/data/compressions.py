"""Compressed content, by suffix, as the usual tools write it."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable

import pyarrow
import zstandard

from megatron_periln.data.readers.compression import HEAD_BYTES, compression_by_head
from megatron_periln.errors import PreprocessError

__all__ = ["COMPRESS", "is_plain", "zstandard_frame"]

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".xz": lambda data: lzma.compress(data, preset=0),  # with a small dictionary
    ".bz2": bz2.compress,
    ".lz4": lambda data: pyarrow.compress(data, "lz4", asbytes=True),
}


def is_plain(content: bytes) -> bool:
    """Whether content is not taken for compressed: Hypothesis tries the bytes that the package names."""
    try:
        return compression_by_head(content[:HEAD_BYTES], "") is None
    except PreprocessError:
        return False


def zstandard_frame(content: bytes, window_log: int) -> bytes:
    """Return a frame of one uncompressed block that demands a window of ``2**window_log`` bytes."""
    header = bytes([0, (window_log - 10) << 3])
    return b"\x28\xb5\x2f\xfd" + header + (len(content) << 3 | 1).to_bytes(3, "little") + content
