"""What a run notes of each chunk that was written, and where in the datasets chunks lie by these notes.

The journal has a line for each chunk, in the order in which workers wrote them. It need not say where a chunk
lies: each goes behind those before it, so that follows from their sizes (``Placer``, ``Replay``).
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import orjson

from megatron_periln.data.readers.documents import BadDocument, Place

__all__ = [
    "COMPLETE",
    "Dataset",
    "Placer",
    "Record",
    "Records",
    "Replay",
    "Size",
    "bad_documents",
    "is_complete",
    "read_journal",
]

COMPLETE = '"complete"'
"""The line of a journal that has all chunks."""

_TAIL_BYTES = 100
_NUMBER = re.compile(rb'\{"number": (\d+),')

Dataset = tuple[str, int]
"""A key, and the number of the dataset among those of its key."""


class Size(NamedTuple):
    """How much a chunk has under one key, or where in a dataset it begins."""

    tokens: int
    sequences: int
    documents: int

    def __add__(self, other: object) -> Size:
        """Add each number."""
        assert isinstance(other, Size)
        return Size(self[0] + other[0], self[1] + other[1], self[2] + other[2])  # often: once a chunk


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
    skipped
        Number of documents skipped, of each kind.
    bad
        Those documents, if they go in quarantine; they stay in the journal, not in memory.
    """

    number: int
    sizes: dict[str, Size]
    checksums: dict[str, int]
    empty: dict[str, int]
    bytes: int
    weight: int
    skipped: dict[str, int] = field(default_factory=dict)
    bad: list[BadDocument] = field(default_factory=list)

    def to_json(self) -> str:
        """Return one line."""
        # The journal's own name for what was skipped, so that a run of an earlier version can be resumed.
        content = {"left_out" if name == "skipped" else name: value for name, value in vars(self).items()}
        return json.dumps(content, default=vars) + "\n"

    @classmethod
    def from_json(cls, line: Any) -> Record:
        """Read one line, text or UTF-8."""
        try:
            content = orjson.loads(line)
        except ValueError:  # a path that is not UTF-8, which orjson refuses, or a line that was cut off
            content = json.loads(line)
        content["sizes"] = {key: Size(*size) for key, size in content["sizes"].items()}
        if content["bad"]:
            content["bad"] = [
                BadDocument(Place(*place), kind, reason, text)
                for place, kind, reason, text in (document.values() for document in content["bad"])
            ]
        if "left_out" in content:
            content["skipped"] = content.pop("left_out")
        else:
            content["skipped"] = dict(Counter(document.kind for document in content["bad"]))
        return cls(**content)


class Records(Sequence[Record]):
    """The chunks of a run, without the documents that were skipped: eight bytes a number.

    There may be millions, and an object for each would take a kilobyte. All have the same keys.
    """

    def __init__(self) -> None:
        self._keys: tuple[str, ...] = ()
        self._numbers = array("q")
        self._skipped: dict[int, dict[str, int]] = {}

    @property
    def _width(self) -> int:
        return 3 + 5 * len(self._keys)

    def append(self, record: Record) -> None:
        """Add a chunk."""
        if not self._numbers:
            self._keys = tuple(record.sizes)
        if record.skipped:
            self._skipped[len(self)] = record.skipped
        row = [record.number, record.bytes, record.weight]
        for key in self._keys:
            row += (*record.sizes[key], record.checksums[key], record.empty[key])
        self._numbers.extend(row)

    def __len__(self) -> int:
        return len(self._numbers) // self._width

    @overload
    def __getitem__(self, at: int) -> Record: ...
    @overload
    def __getitem__(self, at: slice) -> list[Record]: ...
    def __getitem__(self, at: int | slice) -> Record | list[Record]:
        """Return a chunk, or some."""
        if isinstance(at, slice):
            return [self[one] for one in range(len(self))[at]]
        at = range(len(self))[at]
        row = self._numbers[at * self._width : (at + 1) * self._width].tolist()
        return self._record(row, self._skipped.get(at, {}))

    def total(self) -> Record:
        """Return the sum of all: their number, and what a chunk has, without checksums."""
        rows = np.array(self._numbers, np.int64).reshape(-1, self._width)
        skipped = Counter[str]()
        for kinds in self._skipped.values():
            skipped.update(kinds)
        total = self._record(rows.sum(axis=0).tolist(), dict(skipped))
        return replace(total, number=len(self), checksums={})

    def _record(self, row: list[int], skipped: dict[str, int]) -> Record:
        sizes, checksums, empty = {}, {}, {}
        for at, key in enumerate(self._keys):
            *size, checksums[key], empty[key] = row[3 + 5 * at : 8 + 5 * at]
            sizes[key] = Size(*size)
        return Record(row[0], sizes, checksums, empty, row[1], row[2], skipped)


class Placer:
    """Decides where chunks go, one after the other.

    Parameters
    ----------
    dtype
        The dtype of the tokens.
    max_bin_size
        Bytes that a dataset's tokens may take before its key goes on in another; None for no limit.
    """

    def __init__(self, dtype: np.dtype, max_bin_size: int | None = None) -> None:
        self._itemsize, self._max = dtype.itemsize, max_bin_size
        self.ends: dict[Dataset, Size] = {}
        self._last: dict[str, int] = {}

    def copy(self) -> Placer:
        """Return another that goes on from here."""
        other = copy(self)
        other.ends, other._last = dict(self.ends), dict(self._last)
        return other

    def place(self, sizes: dict[str, Size]) -> dict[Dataset, Size]:
        """Return the datasets that the next chunk goes to, and where in them it begins."""
        starts = {}
        for key, size in sizes.items():
            dataset = (key, self._last.setdefault(key, 0))
            start = self.ends.get(dataset, Size(0, 0, 0))
            full = self._max and (start.tokens + size.tokens) * self._itemsize > self._max
            if full and start.tokens and size.tokens:  # each dataset has tokens
                self._last[key] += 1
                dataset, start = (key, self._last[key]), Size(0, 0, 0)
            starts[dataset] = start
            self.ends[dataset] = start + size
        return starts


class Replay:
    """Finds the places of chunks again, which become known in any order.

    Parameters
    ----------
    placer
        Places chunks as the run did, from the first that is to come.
    first
        Number of that.
    """

    def __init__(self, placer: Placer, first: int = 0) -> None:
        self._placer = placer
        self._next = first
        self._waiting: dict[int, Record] = {}

    def add(self, records: Iterable[Record]) -> Iterator[tuple[Record, dict[Dataset, Size]]]:
        """Yield the chunks before which none is missing any more, by number, and where their parts begin."""
        for known in records:
            self._waiting[known.number] = known
            while record := self._waiting.pop(self._next, None):
                self._next += 1
                yield record, self._placer.place(record.sizes)


def is_complete(path: Path) -> bool:
    """Return whether the chunks that a journal has are all there are: by its last line."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return stream.read().rstrip().split(b"\n")[-1] == COMPLETE.encode()


def read_journal(path: Path) -> Iterator[tuple[Record, bytes]]:
    """Yield the chunks of a journal as they stand there, with their lines."""
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = Record.from_json(line)
            except (ValueError, TypeError, KeyError, AttributeError):  # the last line, or one cut off
                continue
            yield record, line.rstrip(b"\n") + b"\n"


def bad_documents(path: Path) -> Iterator[BadDocument]:
    """Yield the documents that a journal of whole lines has as skipped, in the order of the input."""
    # Documents may be large: only where the lines begin is kept in memory, and a line is read when it is due.
    starts: dict[int, int] = {}
    with path.open("rb") as stream:
        start = 0
        for line in stream:
            if found := _NUMBER.match(line):
                starts[int(found[1])] = start
            start += len(line)
        for number in sorted(starts):
            stream.seek(starts[number])
            yield from Record.from_json(stream.readline()).bad
