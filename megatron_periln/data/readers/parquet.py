"""Rows of Parquet files; pyarrow, whose import takes 0.2 s, is imported where one is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

from megatron_periln.data.readers.documents import Oversized, Place, RawDocument, text_size
from megatron_periln.data.readers.shared_buffers import SharedBuffer, borrow
from megatron_periln.data.readers.sources import SingleChunk, Source
from megatron_periln.errors import PreprocessError

__all__ = ["RANGE_BYTES", "STREAMED_PARTS", "RowRange", "RowStream", "Rows", "row_ranges", "streamed"]

RANGE_BYTES = 32 << 20
"""Size of a range, decompressed."""
STREAMED_PARTS = 4
"""Parts in which a range is handed on by the process that reads it: four of them wait for each worker."""
_ROWS_AT_ONCE = 256
_READ_BYTES = 1 << 20
_SCHEMA_BYTES = 1 << 16


@dataclass(frozen=True)
class RowRange(SingleChunk):
    """Rows ``start`` to ``stop`` of a row group.

    Parameters
    ----------
    path
        The Parquet file.
    keys
        The columns to read.
    group
        The row group.
    start, stop
        The rows, counted in the group.
    first
        Number of the group's first row in the file, from 1.
    weight
        Their size in the file, in bytes, about.
    """

    path: str
    keys: tuple[str, ...]
    group: int
    start: int
    stop: int
    first: int
    weight: int

    def count(self) -> int:
        """Return the number of rows."""
        return self.stop - self.start

    def cut(self, parts: int) -> list[RowRange]:
        """Return the same rows in at most ``parts`` ranges."""
        parts = max(1, min(parts, self.count()))
        rows = [self.start + self.count() * part // parts for part in range(parts + 1)]
        weights = [self.weight * part // parts for part in range(parts + 1)]
        return [
            replace(self, start=start, stop=stop, weight=end - begin)
            for (start, stop), (begin, end) in zip(pairwise(rows), pairwise(weights), strict=True)
        ]

    def raw_documents(self, limit: int) -> Iterator[RawDocument]:
        """Yield the rows, those of more than ``limit`` bytes as ``Oversized``."""
        for row, batch in self.batches():
            yield from _documents(self.path, self.first + row, batch, limit)

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Yield the rows in pyarrow's record batches, with the number in the group of the first of each."""
        with _open(self.path) as file:
            row = 0
            for batch in file.iter_batches(
                _ROWS_AT_ONCE, row_groups=[self.group], columns=list(self.keys), use_threads=False
            ):
                begin = max(self.start, row)
                if begin < min(self.stop, row + batch.num_rows):
                    yield begin, batch.slice(begin - row, self.stop - begin)
                row += batch.num_rows
                if row >= self.stop:
                    return


@dataclass(frozen=True)
class Rows(SingleChunk):
    """Rows that were read.

    Parameters
    ----------
    path
        The Parquet file.
    first
        Number of the first row in the file, from 1.
    number
        How many they are.
    data
        They, as a stream of Arrow's inter-process format.
    weight
        Their size in the file, in bytes, about.
    """

    path: str
    first: int
    number: int
    data: bytearray | memoryview | SharedBuffer
    weight: int

    def count(self) -> int:
        """Return the number of rows."""
        return self.number

    def raw_documents(self, limit: int) -> Iterator[RawDocument]:
        """Yield the rows, those of more than ``limit`` bytes as ``Oversized``."""
        import pyarrow  # here: 0.2 s

        row = self.first
        for batch in pyarrow.ipc.open_stream(_bytes(self.data)):
            yield from _documents(self.path, row, batch, limit)
            row += batch.num_rows


@dataclass(frozen=True)
class RowStream:
    """Consecutive ranges of a row group, read once.

    A row group can only be read from its beginning: were each range read by itself, those of a large group
    would take as many readings of half of it on average.
    """

    ranges: tuple[RowRange, ...]

    @property
    def weight(self) -> int:
        """Their size in the file, in bytes, about."""
        return sum(part.weight for part in self.ranges)

    def chunks(self, limit: int) -> Iterator[Rows]:
        """Yield the rows of each range, read."""
        first, last = self.ranges[0], self.ranges[-1]
        whole = RowRange(
            first.path, first.keys, first.group, first.start, last.stop, first.first, self.weight
        )
        all_parts = [part for wide in self.ranges for part in wide.cut(STREAMED_PARTS)]
        parts, last, held = iter(all_parts), all_parts[-1], list[Any]()
        part = next(parts)
        for row, batch in whole.batches():
            taken = 0
            while (size := part.stop - row - taken) <= batch.num_rows - taken:
                yield _packed(part, [*held, batch.slice(taken, size)])
                taken, held = taken + size, []
                if part is last:
                    return
                part = next(parts)
            if taken < batch.num_rows:
                held.append(batch.slice(taken))


def streamed(sources: Iterable[Source]) -> Iterator[Source]:
    """Yield the sources, consecutive ranges of a row group as one that is read once."""

    def row_group(source: Source) -> tuple[str, int] | None:
        return (source.path, source.group) if isinstance(source, RowRange) else None

    for group, members in groupby(sources, row_group):
        found = list(members)
        if group is None or len(found) == 1:
            yield from found
        else:
            yield RowStream(tuple(part for part in found if isinstance(part, RowRange)))


def row_ranges(path: str, keys: Sequence[str]) -> list[RowRange]:
    """Return the rows of a Parquet file in ranges of some megabytes.

    Raises
    ------
    PreprocessError
        If the file is not Parquet, or has no column of texts under a key.
    """
    with _open(path) as file:
        _check_columns(path, file.schema_arrow, keys)
        ranges, first = [], 1
        for group in range(file.num_row_groups):
            described = file.metadata.row_group(group)
            columns = [described.column(at) for at in range(described.num_columns)]
            read = [column for column in columns if column.path_in_schema.split(".")[0] in keys]
            rows = described.num_rows
            pieces = max(1, min(rows, sum(column.total_uncompressed_size for column in read) // RANGE_BYTES))
            weight = sum(column.total_compressed_size for column in read) // pieces
            cuts = [rows * piece // pieces for piece in range(pieces + 1)]
            ranges += [
                RowRange(path, tuple(keys), group, start, stop, first, weight)
                for start, stop in pairwise(cuts)
                if stop > start
            ]
            first += rows
    return ranges


def _check_columns(path: str, schema: Any, keys: Sequence[str]) -> None:
    import pyarrow  # here: 0.2 s

    def holds_texts(kind: Any) -> bool:
        if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            kind = kind.value_type
        return _is_text(kind)

    for key in keys:
        if key not in schema.names:
            raise PreprocessError(
                f"{path}: no column {key!r}; the columns there are: {', '.join(map(repr, schema.names))}; "
                f"choose with --json-keys"
            )
        if not holds_texts(schema.field(key).type):
            raise PreprocessError(
                f"{path}: column {key!r} has {schema.field(key).type}; it must be strings or lists of strings"
            )


def _documents(path: str, first: int, batch: Any, limit: int) -> Iterator[RawDocument]:
    for number, values in enumerate(_rows(batch), first):
        size = sum(map(text_size, values.values()))
        yield RawDocument(Place(path, None, number), values if size <= limit else Oversized(size, limit))


def _packed(part: RowRange, batches: list[Any]) -> Rows:
    import pyarrow  # here: 0.2 s

    def write(sink: Any) -> None:
        with pyarrow.ipc.new_stream(sink, batches[0].schema) as stream:
            for batch in batches:
                stream.write_batch(batch)

    # Into memory of the right size: a stream that grows costs three times as much.
    size = sum(map(pyarrow.ipc.get_record_batch_size, batches)) + _SCHEMA_BYTES
    data = borrow(size) or bytearray(size)
    try:
        write(pyarrow.FixedSizeBufferWriter(pyarrow.py_buffer(_bytes(data))))
    except (OSError, pyarrow.ArrowException):  # dictionaries, which that size leaves out
        write(sink := pyarrow.BufferOutputStream())
        data = bytearray(sink.getvalue())
    return Rows(part.path, part.first + part.start, part.count(), data, part.weight)


def _bytes(data: bytearray | memoryview | SharedBuffer) -> bytearray | memoryview:
    return data.view if isinstance(data, SharedBuffer) else data


def _rows(batch: Any) -> list[dict[str, object]]:
    """Return the values of each row; those that are not UTF-8, which Parquet does not check, as bytes."""
    import pyarrow  # here: 0.2 s

    def decoded(value: object) -> object:
        if isinstance(value, list):
            return [decoded(item) for item in value]
        try:
            return value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError:
            return value

    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        bytes_ = [
            column.cast(
                pyarrow.large_binary()
                if _is_text(column.type)
                else pyarrow.large_list(pyarrow.large_binary())
            )
            for column in batch.columns
        ]
        rows = pyarrow.record_batch(bytes_, batch.schema.names).to_pylist()
        return [{key: decoded(value) for key, value in row.items()} for row in rows]


def _is_text(kind: Any) -> bool:
    import pyarrow  # here: 0.2 s

    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


@contextmanager
def _open(path: str) -> Iterator[Any]:
    import pyarrow  # here: 0.2 s
    from pyarrow.parquet import ParquetFile

    try:
        # Not all of the columns' bytes at once, which stay in memory while rows are read.
        with ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise PreprocessError(f"{path}: cannot be read: {error}") from error
