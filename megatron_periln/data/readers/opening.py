"""Input files: opened, read to the ends of their lines, their lines counted."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from megatron_periln.data.readers.compression import HEAD_BYTES, compression_by_head, compression_of
from megatron_periln.data.readers.documents import BadDocument, Oversized
from megatron_periln.errors import PreprocessError

__all__ = [
    "READ_BYTES",
    "Opened",
    "finish_line",
    "number_lines",
    "open_input",
    "read_rest",
    "read_up_to",
    "reading",
    "whole_lines",
]

READ_BYTES = 1 << 20
"""How much is read at once."""


class Opened(NamedTuple):
    """An input file that is open for reading.

    Parameters
    ----------
    stream
        Its content, decompressed.
    taken
        Returns how many bytes of the file itself have been read.
    compressed
        Whether the file is compressed.
    """

    stream: BinaryIO
    taken: Callable[[], int]
    compressed: bool


class _WithHead:
    """A stream of which the beginning is known before it is read.

    Parameters
    ----------
    stream
        The stream.
    """

    closed = False  # pyarrow asks, and closes

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.head = self._unread = read_up_to(stream, HEAD_BYTES)

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes or fewer, none only at the end."""
        if not self._unread:
            return self._stream.read(size)
        part, self._unread = self._unread[:size], self._unread[size:]
        return part

    def close(self) -> None:
        """Leave the stream to who opened it."""


@contextmanager
def open_input(path: str) -> Iterator[Opened]:
    """Open an input file; ``-`` is standard input. Its first bytes say how it is compressed.

    Raises
    ------
    PreprocessError
        If its compression cannot be read, or it has none although its name says so.
    """
    if path == "-":
        yield _opened(sys.stdin.buffer, path, lambda: 0)
        return
    with Path(path).open("rb") as file:
        yield _opened(file, path, file.tell if file.seekable() else lambda: 0)


def _opened(file: BinaryIO, path: str, taken: Callable[[], int]) -> Opened:
    stream = _WithHead(file)
    compression = compression_of(stream.head, path)
    compressed = compression is not None
    while compression is not None:
        stream = _WithHead(compression.decompress(cast(BinaryIO, stream)))
        compression = compression_by_head(stream.head, path)
    return Opened(cast(BinaryIO, stream), taken, compressed)


@contextmanager
def reading(path: str, where: object = lambda: "") -> Iterator[None]:
    """Turn what goes wrong while reading ``path`` into a ``PreprocessError``."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        place = where() if callable(where) else where
        raise PreprocessError(f"{path}: cannot be read{place}: {reason}") from error


def read_up_to(stream: BinaryIO, size: int, at_once: int = READ_BYTES) -> bytes:
    """Read ``size`` bytes, fewer only at the end.

    Memory is taken for ``at_once`` of them before they are read.
    """
    parts = []
    while size > 0 and (part := stream.read(min(size, at_once))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_rest(stream: BinaryIO) -> int:
    """Read to the end; return how many bytes that were."""
    size = 0
    while part := stream.read(READ_BYTES):
        size += len(part)
    return size


def finish_line(stream: BinaryIO, beginning: bytes, limit: int) -> tuple[bytes, int]:
    """Return the line that begins with ``beginning``, and its size.

    Of a line of more than ``limit`` bytes only the size counts: what exceeds the limit is not kept.
    """
    parts, size, ended = [beginning], len(beginning), False
    while not ended and (part := stream.read(READ_BYTES)):
        end = part.find(b"\n")
        ended = end >= 0
        part = part[:end] if ended else part
        size += len(part)
        if size <= limit:
            parts.append(part)
    return b"".join(parts), size


def whole_lines(stream: BinaryIO, chunk_bytes: int, limit: int) -> Iterator[tuple[bytes | Oversized, int]]:
    """Yield lines, about ``chunk_bytes`` at once, and their size; a line that is too large alone.

    At most ``limit + chunk_bytes`` bytes, or two chunks, are in memory: a line that has outgrown the limit
    is counted, and what was read of it dropped.
    """
    unfinished: list[bytes] = []  # the beginning of the line that is being read
    size = 0  # of that line, even where ``unfinished`` was dropped
    while part := read_up_to(stream, chunk_bytes):
        end = part.rfind(b"\n") + 1
        if not end:
            size += len(part)
            unfinished.append(part)
            if size > limit:
                unfinished.clear()
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


def number_lines(bad: Callable[[], Iterable[BadDocument]]) -> Iterator[BadDocument]:
    """Yield the same documents, those that were read from the middle of a file with their lines.

    Parameters
    ----------
    bad
        Returns the documents; called twice, so that they need not stay in memory.

    Raises
    ------
    PreprocessError
        If a file cannot be read.
    """
    offsets: dict[str, set[int]] = {}
    for document in bad():
        if document.place.number is None and document.place.offset is not None:
            offsets.setdefault(document.place.path, set()).add(document.place.offset)
    lines = {path: _lines_at(path, sorted(wanted)) for path, wanted in offsets.items()}
    for document in bad():
        if document.place.number is None and document.place.offset is not None:
            yield document.on_line(lines[document.place.path][document.place.offset])
        else:
            yield document


def _lines_at(path: str, offsets: list[int]) -> dict[int, int]:
    """Return the number of the line that begins at each of the ascending ``offsets``."""
    lines: dict[int, int] = {}
    line, position = 1, 0
    with reading(path), open_input(path) as opened:
        for offset in offsets:
            while position < offset and (block := opened.stream.read(min(READ_BYTES, offset - position))):
                line += block.count(b"\n")
                position += len(block)
            lines[offset] = line
    return lines
