"""Small inputs read together: what a chunk costs beside its text is the same for a line and for 4 MB."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_periln.data.readers.documents import Oversized, RawDocument
from megatron_periln.data.readers.parquet import Rows, streamed
from megatron_periln.data.readers.sources import Block, Chunk, SingleChunk, Source

__all__ = ["Chunks", "SmallSources", "together"]

_MOST = 256
"""Sources that are read together at most: a few bytes of Parquet may be many rows."""


@dataclass(frozen=True)
class Chunks(SingleChunk):
    """Consecutive chunks that one worker encodes at once."""

    parts: tuple[Chunk, ...]

    @property
    def weight(self) -> int:
        """Their size in the input files, in bytes."""
        return sum(part.weight for part in self.parts)

    def count(self) -> int:
        """Return the number of documents."""
        return sum(part.count() for part in self.parts)

    def raw_documents(self, limit: int) -> Iterator[RawDocument]:
        """Yield the documents."""
        for part in self.parts:
            yield from part.raw_documents(limit)


@dataclass(frozen=True)
class SmallSources:
    """Consecutive sources that are about one chunk.

    Parameters
    ----------
    sources
        The sources.
    chunk_bytes
        Size of a chunk; sources that are compressed may be several.
    """

    sources: tuple[Source, ...]
    chunk_bytes: int

    @property
    def weight(self) -> int:
        """Their size in the input files, in bytes."""
        return sum(source.weight for source in self.sources)

    def chunks(self, limit: int) -> Iterator[Chunk]:
        """Yield what they hold, in chunks across sources."""
        held, size = list[Chunk](), 0
        for source in self.sources:
            for chunk in source.chunks(limit):
                taken = _size(chunk)
                if held and size + taken > self.chunk_bytes:
                    yield _joined(held)
                    held, size = [], 0
                held.append(chunk)
                size += taken
        if held:
            yield _joined(held)


def together(sources: Iterable[Source], chunk_bytes: int) -> list[Source]:
    """Return the sources in the order in which they are read, consecutive small ones as one."""
    found, small, size = list[Source](), list[Source](), 0

    def end() -> None:
        found.extend([SmallSources(tuple(small), chunk_bytes)] if len(small) > 1 else small)
        small.clear()

    for source in streamed(sources):
        weight = source.weight
        if size + weight > chunk_bytes or len(small) == _MOST:
            end()
            size = 0
        small.append(source)
        size += weight
    end()
    return found


def _size(chunk: Chunk) -> int:
    """Return the size in memory of what was read, or in the input of what will be."""
    if isinstance(chunk, Block | Rows):
        return 0 if isinstance(chunk.data, Oversized) else len(chunk.data)
    return chunk.weight


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    return chunks[0] if len(chunks) == 1 else Chunks(tuple(chunks))
