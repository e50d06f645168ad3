"""Input files opened and decompressed, and read to the ends of their lines."""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from megatron_periln.data.readers.documents import Oversized
from megatron_periln.errors import PreprocessError

__all__ = ["Opened", "finish_line", "open_input", "read_rest", "read_up_to", "reading", "whole_lines"]

_READ = 1 << 20


class Opened(NamedTuple):
    """An input file that is open for reading.

    Parameters
    ----------
    stream
        Its content, decompressed.
    taken
        Returns how many bytes of the file itself have been read.
    """

    stream: BinaryIO
    taken: Callable[[], int]


@contextmanager
def open_input(path: str) -> Iterator[Opened]:
    """Open an input file; ``-`` is standard input."""
    if path == "-":
        yield Opened(sys.stdin.buffer, lambda: 0)
        return
    with Path(path).open("rb") as file:
        stream: BinaryIO = file
        if path.endswith(".gz"):
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=file))
        elif path.endswith(".zst"):
            stream = _zstandard(file)
        yield Opened(stream, file.tell if file.seekable() else lambda: 0)


def _zstandard(file: BinaryIO) -> BinaryIO:
    from pyarrow import CompressedInputStream  # zstandard's reader takes a file that is cut off for whole

    return cast(BinaryIO, CompressedInputStream(file, "zstd"))


@contextmanager
def reading(path: str, where: object = lambda: "") -> Iterator[None]:
    """Turn what goes wrong while reading ``path`` into a ``PreprocessError``."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        place = where() if callable(where) else where
        raise PreprocessError(f"{path}: cannot be read{place}: {reason}") from error


def read_up_to(stream: BinaryIO, size: int) -> bytes:
    """Read ``size`` bytes, fewer only at the end."""
    parts = []
    while size > 0 and (part := stream.read(min(size, _READ))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_rest(stream: BinaryIO) -> int:
    """Read to the end; return how many bytes that were."""
    size = 0
    while part := stream.read(_READ):
        size += len(part)
    return size


def finish_line(stream: BinaryIO, beginning: bytes, limit: int) -> tuple[bytes, int]:
    """Return the line that begins with ``beginning``, and its size; of a large line, not all of it."""
    parts, size, ended = [beginning], len(beginning), False
    while not ended and (part := stream.read(_READ)):
        end = part.find(b"\n")
        ended = end >= 0
        part = part[:end] if ended else part
        size += len(part)
        if size <= limit:
            parts.append(part)
    return b"".join(parts), size


def whole_lines(stream: BinaryIO, chunk_bytes: int, limit: int) -> Iterator[tuple[bytes | Oversized, int]]:
    """Yield lines, about ``chunk_bytes`` at once, and their size; a line that is too large alone."""
    unfinished: list[bytes] = []
    size = 0
    while part := read_up_to(stream, chunk_bytes):
        end = part.rfind(b"\n") + 1
        if not end:
            size += len(part)
            unfinished = [*unfinished, part] if size <= limit else []
            continue
        if size > limit:
            first = part.find(b"\n") + 1
            yield Oversized(size + first - 1, limit), size + first
            lines = part[first:end]
        else:
            lines = b"".join([*unfinished, part[:end]])
        if lines:
            yield lines, len(lines)
        unfinished, size = [part[end:]], len(part) - end
    if size > limit:
        yield Oversized(size, limit), size
    elif size:
        yield b"".join(unfinished), size
