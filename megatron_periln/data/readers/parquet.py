"""Rows of Parquet files; pyarrow, whose import takes 0.2 s, is imported where one is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from megatron_periln.data.readers.documents import Oversized, Place, RawDocument, text_size
from megatron_periln.data.readers.sources import SingleChunk
from megatron_periln.errors import PreprocessError

__all__ = ["RANGE_BYTES", "RowRange", "row_ranges"]

RANGE_BYTES = 32 << 20
"""Size of a range, decompressed. Smaller ones would cost time: to read from the middle of a row group is to
decode it from its beginning."""
_ROWS_AT_ONCE = 256


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

    def raw_documents(self, limit: int) -> Iterator[RawDocument]:
        """Yield the rows, those of more than ``limit`` bytes as ``Oversized``."""
        with _open(self.path) as file:
            row = 0
            batches = file.iter_batches(
                _ROWS_AT_ONCE, row_groups=[self.group], columns=list(self.keys), use_threads=False
            )
            for batch in batches:
                wanted = batch.slice(max(self.start - row, 0), max(self.stop - max(row, self.start), 0))
                for number, values in enumerate(_rows(wanted), self.first + max(row, self.start)):
                    size = sum(map(text_size, values.values()))
                    place = Place(self.path, None, number)
                    yield RawDocument(place, values if size <= limit else Oversized(size, limit))
                row += batch.num_rows
                if row >= self.stop:
                    return


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
        with ParquetFile(path) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise PreprocessError(f"{path}: cannot be read: {error}") from error
