"""What a worker reads at once, and how: lines of a file, and plain text files.

A source is a part of the input, made without reading it. It becomes one chunk, itself, or many where it can
only be read from its beginning: then the parent reads it, and its chunks hold their lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Protocol, Self

from megatron_periln.data.readers.documents import Content, Oversized, Place, PlainText, RawDocument
from megatron_periln.data.readers.opening import (
    finish_line,
    open_input,
    read_rest,
    read_up_to,
    reading,
    whole_lines,
)

__all__ = ["Block", "ByteRange", "Chunk", "LineStream", "SingleChunk", "Source", "TextFiles"]


class Source(Protocol):
    """A part of the input."""

    @property
    def weight(self) -> int:
        """Its size in the input file, in bytes."""

    def chunks(self, limit: int) -> Iterator[Chunk]:
        """Yield its chunks, reading no document of more than ``limit`` bytes."""


class Chunk(Source, Protocol):
    """What one worker encodes at once; as a source, it is its only chunk."""

    def raw_documents(self, limit: int) -> Iterator[RawDocument]:
        """Yield its documents, those of more than ``limit`` bytes as ``Oversized``."""

    def count(self) -> int:
        """Return the number of its documents."""


class SingleChunk:
    """A source that is its own only chunk."""

    def chunks(self, limit: int) -> Iterator[Self]:
        """Yield itself."""
        yield self


@dataclass(frozen=True, slots=True)
class ByteRange(SingleChunk):
    """The lines that begin in bytes ``start`` to ``stop`` of a file."""

    path: str
    start: int
    stop: int

    @property
    def weight(self) -> int:  # noqa: D102
        return self.stop - self.start

    def count(self) -> int:
        """Return the number of documents."""
        return _count_lines(self)

    def raw_documents(self, limit: int) -> Iterator[RawDocument]:
        """Yield the documents."""
        with reading(self.path), Path(self.path).open("rb", buffering=0) as stream:
            begin = max(self.start - 1, 0)  # the byte before tells whether a line begins at ``start``
            stream.seek(begin)
            data = read_up_to(stream, self.stop - begin, at_once=self.stop - begin)
            lines = data.split(b"\n")
            del data  # as large as all the lines
            first = 0
            if self.start:
                if len(lines) == 1:
                    return  # all of it belongs to a line that begins before
                first = 1
            rest = lines.pop()
            offset = begin + (len(lines[0]) + 1 if first else 0)
            for line in islice(lines, first, None):
                yield RawDocument(Place(self.path, offset, None), _within(limit, line))
                offset += len(line) + 1
            if rest:
                line, size = finish_line(stream, rest, limit)
                yield RawDocument(Place(self.path, offset, None), _within(limit, line, size))


@dataclass(frozen=True)
class Block(SingleChunk):
    """Lines of a file that can only be read from its beginning, decompressed.

    Parameters
    ----------
    path
        The file.
    offset
        Where they begin in the decompressed file.
    first
        Number of the first line, from 1.
    data
        The lines; or, if it is one that is too large, what it is.
    weight
        Bytes of the file that they took.
    """

    path: str
    offset: int
    first: int
    data: bytes | Oversized
    weight: int

    def count(self) -> int:
        """Return the number of documents."""
        if isinstance(self.data, Oversized):
            return 1
        return self.data.count(b"\n") + (not self.data.endswith(b"\n"))

    def raw_documents(self, limit: int) -> Iterator[RawDocument]:
        """Yield the documents."""
        if isinstance(self.data, Oversized):
            yield RawDocument(Place(self.path, self.offset, self.first), self.data)
            return
        offset = self.offset
        for number, line in enumerate(self.data.removesuffix(b"\n").split(b"\n"), self.first):
            yield RawDocument(Place(self.path, offset, number), _within(limit, line))
            offset += len(line) + 1


@dataclass(frozen=True)
class LineStream:
    """A file that can only be read from its beginning: compressed, a pipe or standard input."""

    path: str
    chunk_bytes: int
    weight: int

    def chunks(self, limit: int) -> Iterator[Chunk]:
        """Yield its lines in blocks, decompressed."""
        number, offset, before = 1, 0, 0
        with reading(self.path, lambda: f" (after line {number - 1})"), open_input(self.path) as opened:
            for lines, size in whole_lines(opened.stream, self.chunk_bytes, limit):
                after = opened.taken()
                block = Block(self.path, offset, number, lines, after - before)
                yield block
                number, offset, before = number + block.count(), offset + size, after


@dataclass(frozen=True)
class TextFiles(SingleChunk):
    """Plain text files, each a document."""

    paths: tuple[str, ...]
    weight: int

    def count(self) -> int:
        """Return the number of documents."""
        return len(self.paths)

    def raw_documents(self, limit: int) -> Iterator[RawDocument]:
        """Yield the documents."""
        for path in self.paths:
            with reading(path), open_input(path) as opened:
                data = read_up_to(opened.stream, limit + 1)
                size = len(data)
                if size > limit:
                    size += read_rest(opened.stream)
            yield RawDocument(Place(path, 0, None), _within(limit, PlainText(data), size))


@cache  # each partition asks again
def _count_lines(part: ByteRange) -> int:
    with reading(part.path), Path(part.path).open("rb", buffering=0) as stream:
        begin = max(part.start - 1, 0)
        stream.seek(begin)
        return read_up_to(stream, part.stop - 1 - begin).count(b"\n") + (part.start == 0)


def _within(limit: int, content: bytes | PlainText, size: int | None = None) -> Content:
    size = len(content) if size is None and isinstance(content, bytes) else size
    return content if size is None or size <= limit else Oversized(size, limit)
