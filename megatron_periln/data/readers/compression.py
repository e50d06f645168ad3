"""Which compression a file has, by its first bytes, and its content decompressed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from megatron_periln.errors import PreprocessError

__all__ = [
    "COMPRESSIONS",
    "HEAD_BYTES",
    "Compression",
    "FileFormat",
    "compression_by_head",
    "compression_of",
    "uncompressed_suffix",
]

HEAD_BYTES = 264
"""How many bytes at a file's beginning tell its compression; a tar archive tells it in bytes 257 to 263."""

_READ_BYTES = 1 << 16
_LARGEST_WINDOW_LOG = 31


@dataclass(frozen=True)
class FileFormat:
    """A compression or an archive.

    Parameters
    ----------
    name
        What a file that has it is, for people.
    suffixes
        How such files are named.
    matches
        Whether a file that begins with these bytes has it.
    """

    name: str
    suffixes: tuple[str, ...]
    matches: Callable[[bytes], bool]


@dataclass(frozen=True)
class Compression(FileFormat):
    """A compression that can be read.

    Parameters
    ----------
    decompress
        Returns what an open file holds.
    """

    decompress: Callable[[BinaryIO], BinaryIO]


class _Streams:
    """The content of the compressed streams that a file is made of, one behind the other.

    What follows a stream and is none is an error; ``BZ2File`` and ``LZMAFile`` take it for the end.

    Parameters
    ----------
    file
        The file.
    decompressor
        Returns the decompressor of a stream: one of ``bz2``, ``lzma`` or ``compression.zstd``.
    errors
        What it raises for a damaged stream.
    padding
        The byte that may stand behind a stream.
    """

    def __init__(
        self,
        file: BinaryIO,
        decompressor: Callable[[], Any],
        errors: type[Exception],
        padding: bytes = b"",
    ) -> None:
        self._file = file
        self._decompressor = decompressor
        self._errors = (errors, MemoryError)
        self._padding = padding
        self._stream: Any = None
        self._input = b""

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes or fewer, none only at the end."""
        try:
            while self._in_stream():
                data, self._input = self._input, b""
                if not data and self._stream.needs_input and not (data := self._file.read(_READ_BYTES)):
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                if content := self._stream.decompress(data, size):
                    return content
        except self._errors as error:
            raise OSError(str(error) or "not enough memory to decompress it") from error
        return b""

    def _in_stream(self) -> bool:
        """Whether there is more; where a stream has ended, the next one is begun."""
        if self._stream is not None and not self._stream.eof:
            return True
        rest = self._stream.unused_data.lstrip(self._padding) if self._stream is not None else b""
        while not rest and (data := self._file.read(_READ_BYTES)):
            rest = data.lstrip(self._padding)
        if rest:
            self._stream, self._input = self._decompressor(), rest
        return bool(rest)


def _begins(*magics: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magics)


def _is_bzip2(head: bytes) -> bool:
    # The magic of a first block, or of the end where there is none: three letters alone may begin a text.
    return head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90")


def _is_tar(head: bytes) -> bool:
    return head[257:263] in (b"ustar\0", b"ustar ") and b"\0" in head[:257]


def _gzip(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=file))


def _bzip2(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, _Streams(file, bz2.BZ2Decompressor, OSError))


def _xz(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, _Streams(file, lzma.LZMADecompressor, lzma.LZMAError, padding=b"\0"))


def _zstandard(file: BinaryIO) -> BinaryIO:
    # Not pyarrow's, whose windows end at 128 MiB.
    if sys.version_info >= (3, 14):
        from compression import zstd  # not at the top: its import takes 10 ms
    else:
        from backports import zstd  # not at the top: its import takes 10 ms

    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _LARGEST_WINDOW_LOG}
    return cast(BinaryIO, _Streams(file, lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError))


def _lz4(file: BinaryIO) -> BinaryIO:
    from pyarrow import CompressedInputStream  # not at the top: its import takes 0.2 s

    return cast(BinaryIO, CompressedInputStream(file, "lz4"))


_ZSTANDARD = [bytes([version]) + b"\xb5\x2f\xfd" for version in range(0x1E, 0x29)]
_SKIPPABLE = [bytes([kind]) + b"\x2a\x4d\x18" for kind in range(0x50, 0x60)]  # pzstd begins with one
COMPRESSIONS = (
    Compression("a gzipped file", (".gz", ".gzip", ".bgz"), _begins(b"\x1f\x8b"), _gzip),
    Compression("a Zstandard file", (".zst", ".zstd"), _begins(*_ZSTANDARD, *_SKIPPABLE), _zstandard),
    Compression("an xz file", (".xz", ".lzma"), _begins(b"\xfd7zXZ\0", b"\x5d\0\0"), _xz),
    Compression("a bzip2 file", (".bz2",), _is_bzip2, _bzip2),
    Compression("an LZ4 file", (".lz4",), _begins(b"\x04\x22\x4d\x18"), _lz4),
)
_UNREADABLE = (
    FileFormat("a zip archive", (".zip",), _begins(b"PK\x03\x04", b"PK\x05\x06")),
    FileFormat("a 7z archive", (".7z",), _begins(b"7z\xbc\xaf\x27\x1c")),
    FileFormat("a RAR archive", (".rar",), _begins(b"Rar!\x1a\x07")),
    FileFormat("a tar archive", (".tar",), _is_tar),
    FileFormat("a file of compress", (".Z",), _begins(b"\x1f\x9d")),
    FileFormat("an lzip file", (".lz",), _begins(b"LZIP\x01")),
    FileFormat("an lzop file", (".lzo",), _begins(b"\x89LZO\0\r\n\x1a\n")),
    FileFormat("a Snappy file", (".sz", ".snappy"), _begins(b"\xff\x06\0\0sNaPpY")),
)
_SUFFIXES = {suffix for format in (*COMPRESSIONS, *_UNREADABLE) for suffix in format.suffixes}


def compression_of(head: bytes, path: str) -> Compression | None:
    """Return the compression of a file, None where it has none.

    Parameters
    ----------
    head
        Its first ``HEAD_BYTES`` bytes, fewer only where it is smaller.
    path
        Its name.

    Raises
    ------
    PreprocessError
        If its compression cannot be read, or it has none although its name says so.
    """
    if (found := compression_by_head(head, path)) is not None:
        return found
    suffix = os.path.splitext(path)[1]  # noqa: PTH122 (Python 3.12 keeps the parts of every Path for ever)
    named = next((compression for compression in COMPRESSIONS if suffix in compression.suffixes), None)
    if named is not None and head:
        raise PreprocessError(
            f"{path}: cannot be read: Not {named.name}: it begins with {head[:6]!r}; "
            f"if it is not compressed, name it without {suffix}"
        )
    return named


def compression_by_head(head: bytes, path: str) -> Compression | None:
    """Return the compression that the first bytes of ``path``, or of what is compressed in it, show.

    Raises
    ------
    PreprocessError
        If it cannot be read.
    """
    for format in _UNREADABLE:
        if format.matches(head):
            raise PreprocessError(
                f"{path}: cannot be read: by its first bytes it is {format.name}; unpack it first"
            )
    return next((compression for compression in COMPRESSIONS if compression.matches(head)), None)


def uncompressed_suffix(path: str) -> str:
    """Return the suffix of a file's name, without that of its compression."""
    stem, suffix = os.path.splitext(path)  # noqa: PTH122
    return os.path.splitext(stem)[1] if suffix in _SUFFIXES else suffix  # noqa: PTH122
