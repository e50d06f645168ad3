"""The inputs cut into sources, a shard's part of them, and tasks in the order of the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from megatron_periln.data.readers.inputs import InputFile
from megatron_periln.data.readers.parquet import row_ranges, streamed
from megatron_periln.data.readers.sources import ByteRange, Chunk, LineStream, Source, TextFiles
from megatron_periln.errors import PreprocessError

__all__ = ["Task", "cut_into_sources", "take_shard", "to_tasks"]


class Task(NamedTuple):
    """Documents ``skip``, ``skip + step``, ... of a chunk, counted from 0."""

    chunk: Chunk
    skip: int = 0
    step: int = 1


def cut_into_sources(inputs: Sequence[InputFile], keys: Sequence[str], chunk_bytes: int) -> list[Source]:
    """Return the sources of ``inputs``, in order: what can be read from the middle is cut in pieces.

    Raises
    ------
    PreprocessError
        If a Parquet file cannot be read or lacks a column, or plain text shall have several keys.
    """
    found: list[Source] = []
    texts: list[InputFile] = []
    texts_bytes = 0

    def end_texts() -> None:
        nonlocal texts_bytes
        if texts:
            found.append(TextFiles(tuple(file.path for file in texts), texts_bytes))
            texts.clear()
            texts_bytes = 0

    for file in inputs:
        if file.format == "text":
            if len(keys) > 1:
                raise PreprocessError(f"{file.path}: plain text has no keys: give one --json-keys")
            texts.append(file)
            texts_bytes += file.bytes
            if texts_bytes >= chunk_bytes:
                end_texts()
            continue
        end_texts()
        if file.format == "parquet":
            found.extend(row_ranges(file.path, keys))
        elif file.seekable:
            cuts = range(0, file.bytes, chunk_bytes)
            found.extend(ByteRange(file.path, at, min(at + chunk_bytes, file.bytes)) for at in cuts)
        else:
            found.append(LineStream(file.path, chunk_bytes, file.bytes))
    end_texts()
    return found


def take_shard(sources: Sequence[Source], shard: int, shards: int) -> list[Source]:
    """Return the part of the sources that shard ``shard`` of ``shards`` encodes.

    The shards are consecutive and of about the same size, so their datasets, merged in order, are
    that of one run. A source, a compressed file as a whole, is in the shard that its middle falls in.
    """
    weights = [max(source.weight, 1) for source in sources]
    total = sum(weights)
    middles = [2 * end - weight for end, weight in zip(accumulate(weights), weights, strict=True)]
    return [
        source
        for source, middle in zip(sources, middles, strict=True)
        if middle * shards // (2 * total) == shard
    ]


def to_tasks(sources: Sequence[Source], partitions: int, limit: int) -> Iterator[Task]:
    """Yield the tasks of the sources, in the order in which their documents are written.

    With several partitions Megatron-LM deals documents out to them in turn and then joins the
    partitions (``main`` in tools/preprocess_data.py), so the order is documents 0, n, 2n, ... of
    all inputs, then 1, n + 1, ... The inputs are then read once for each.

    Parameters
    ----------
    sources
        What to read.
    partitions
        Number of partitions.
    limit
        The largest size of a document, in bytes.

    Raises
    ------
    PreprocessError
        If a file cannot be read.
    """
    sources = list(streamed(sources))
    if partitions == 1:
        for source in sources:
            for chunk in source.chunks(limit):
                yield Task(chunk)
        return
    for partition in range(partitions):
        first = 0
        for source in sources:
            for chunk in source.chunks(limit):
                yield Task(chunk, skip=(partition - first) % partitions, step=partitions)
                first += chunk.count()
