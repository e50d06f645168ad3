"""What a run notes about each chunk that it wrote, and how a chunk is written and found again."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_periln.data.preprocess.encode import Part
from megatron_periln.data.readers.documents import BadDocument, Place
from megatron_periln.files import sync

__all__ = [
    "COMPLETE",
    "SUFFIXES",
    "Location",
    "Record",
    "Size",
    "bad_documents",
    "checksum_of",
    "copy_journal",
    "read_journal",
    "write_part",
]

SUFFIXES = (".bin", ".lengths", ".documents")
"""The files of a growing dataset: tokens, tokens in each sequence, sequences in each document."""

_NUMBER = re.compile(rb'\{"number": (\d+),')

COMPLETE = '"complete"'
"""The line of a journal that has all chunks."""


class Size(NamedTuple):
    """How much a chunk has under one key, or where in a dataset it begins."""

    tokens: int
    sequences: int
    documents: int

    def __add__(self, other: object) -> Size:
        """Add each number."""
        assert isinstance(other, Size)
        return Size(*(a + b for a, b in zip(self, other, strict=True)))


class Location(NamedTuple):
    """Where a chunk is written: a dataset, by the path of its files without suffix, and where in it."""

    stem: str
    start: Size


@dataclass(frozen=True)
class Record:
    """A chunk that was written, as the journal has it.

    Parameters
    ----------
    number
        Its number, from 0.
    sizes
        For each key, how much it has.
    checksums
        For each key, the CRC-32 of what was written.
    empty
        For each key, its documents without tokens.
    bytes
        Size of its documents, decompressed.
    weight
        Its size in the input, in bytes.
    left_out
        Number of documents left out, of each kind.
    bad
        Those documents, if they go in quarantine; they stay in the journal, not in memory.
    """

    number: int
    sizes: dict[str, Size]
    checksums: dict[str, int]
    empty: dict[str, int]
    bytes: int
    weight: int
    left_out: dict[str, int] = field(default_factory=dict)
    bad: list[BadDocument] = field(default_factory=list)

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(vars(self), default=vars) + "\n"

    def without_bad(self) -> Record:
        """Return the same without the documents left out."""
        return replace(self, bad=[])

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Read one line."""
        content = json.loads(line)
        content["sizes"] = {key: Size(*size) for key, size in content["sizes"].items()}
        content["bad"] = [
            BadDocument(Place(*place), kind, reason, text)
            for place, kind, reason, text in (document.values() for document in content["bad"])
        ]
        kinds = Counter(document.kind for document in content["bad"])
        return cls(**{"left_out": dict(kinds), **content})


def write_part(location: Location, part: Part) -> int:
    """Write a chunk's part at its place; return its CRC-32.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    checksum = 0
    arrays: tuple[NDArray[Any], ...] = part
    for suffix, start, array in zip(SUFFIXES, location.start, arrays, strict=True):
        data = memoryview(np.ascontiguousarray(array)).cast("B")
        checksum = zlib.crc32(data, checksum)
        descriptor = os.open(location.stem + suffix, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            at = start * array.itemsize
            while data:
                written = os.pwrite(descriptor, data, at)
                data, at = data[written:], at + written
        finally:
            os.close(descriptor)
    return checksum


def checksum_of(location: Location, size: Size, dtype: np.dtype) -> int | None:
    """Return the CRC-32 of what lies where a part of ``size`` was written; None if less lies there."""
    checksum = 0
    itemsizes = (dtype.itemsize, np.dtype(np.int32).itemsize, np.dtype(np.int64).itemsize)
    for suffix, start, length, itemsize in zip(SUFFIXES, location.start, size, itemsizes, strict=True):
        try:
            with open(location.stem + suffix, "rb") as stream:  # noqa: PTH123 (a stem is no Path)
                stream.seek(start * itemsize)
                data = stream.read(length * itemsize)
        except FileNotFoundError:
            return None
        if len(data) < length * itemsize:
            return None
        checksum = zlib.crc32(data, checksum)
    return checksum


def read_journal(path: Path) -> tuple[dict[int, Record], bool]:
    """Return the chunks that a journal has, by number, and whether they are all there are.

    The documents that were left out are not read into memory.
    """
    with path.open("rb") as lines:
        complete = any(line.rstrip() == COMPLETE.encode() for line in lines)
    return {record.number: record.without_bad() for record in _records(path)}, complete


def copy_journal(path: Path, to: Path, chunks: int, *, complete: bool) -> None:
    """Write a journal with the first ``chunks`` of that at ``path``, and bring it to the disk."""
    with to.open("w", encoding="utf-8") as stream:
        for record in _records(path):
            if record.number < chunks:
                stream.write(record.to_json())
        stream.write((COMPLETE + "\n") * complete)
    sync(to)


def bad_documents(path: Path) -> Iterator[BadDocument]:
    """Yield the documents that a journal of whole lines has as left out, in the order of the input."""
    starts: dict[int, int] = {}
    with path.open("rb") as stream:
        start = 0
        for line in stream:
            if found := _NUMBER.match(line):
                starts[int(found[1])] = start
            start += len(line)
        for number in sorted(starts):
            stream.seek(starts[number])
            yield from Record.from_json(stream.readline().decode()).bad


def _records(path: Path) -> Iterator[Record]:
    """Yield the chunks of a journal as they stand there."""
    with path.open("rb") as lines:
        for line in lines:
            with suppress(ValueError, TypeError, KeyError, AttributeError):  # the last line, or one cut off
                yield Record.from_json(line.decode())
