"""What a run notes of each chunk that was written, and where in the datasets chunks lie by these notes.

The journal has a line for each chunk, in the order in which workers wrote them. It need not say where a chunk
lies: each goes behind those before it, so that follows from their sizes (``Placer``, ``Replay``).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from megatron_periln.data.readers.documents import BadDocument, Place
from megatron_periln.files import sync

__all__ = [
    "COMPLETE",
    "Dataset",
    "Placer",
    "Record",
    "Replay",
    "Size",
    "bad_documents",
    "copy_journal",
    "read_journal",
]

COMPLETE = '"complete"'
"""The line of a journal that has all chunks."""

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
        return Size(*(a + b for a, b in zip(self, other, strict=True)))


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

    def without_bad(self) -> Record:
        """Return the same without the documents that were skipped."""
        return replace(self, bad=[]) if self.bad else self

    @classmethod
    def from_json(cls, line: Any) -> Record:
        """Read one line, text or UTF-8."""
        try:
            content = orjson.loads(line)
        except ValueError:  # a path that is not UTF-8, which orjson refuses, or a line that was cut off
            content = json.loads(line)
        content["sizes"] = {key: Size(*size) for key, size in content["sizes"].items()}
        content["bad"] = [
            BadDocument(Place(*place), kind, reason, text)
            for place, kind, reason, text in (document.values() for document in content["bad"])
        ]
        kinds = Counter(document.kind for document in content["bad"])
        content["skipped"] = content.pop("left_out", dict(kinds))
        return cls(**content)


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
        Places chunks as the run did, from the first.
    """

    def __init__(self, placer: Placer) -> None:
        self._placer = placer
        self._next = 0
        self._waiting: dict[int, Record] = {}

    def add(self, records: Iterable[Record]) -> Iterator[tuple[Record, dict[Dataset, Size]]]:
        """Yield the chunks before which none is missing any more, by number, and where their parts begin."""
        self._waiting.update((record.number, record) for record in records)
        while record := self._waiting.pop(self._next, None):
            self._next += 1
            yield record, self._placer.place(record.sizes)


def read_journal(path: Path) -> tuple[list[Record], bool]:
    """Return the chunks that a journal has, and whether they are all there are.

    The documents that were skipped are not read into memory.
    """
    with path.open("rb") as lines:
        complete = any(line.rstrip() == COMPLETE.encode() for line in lines)
    return [record.without_bad() for record, _ in _records(path)], complete


def copy_journal(path: Path, to: Path, chunks: int, *, complete: bool) -> None:
    """Write a journal with the first ``chunks`` of that at ``path``, and bring it to the disk."""
    with to.open("wb") as stream:
        for record, line in _records(path):
            if record.number < chunks:
                stream.write(line)
        stream.write(f"{COMPLETE}\n".encode() * complete)
    sync(to)


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


def _records(path: Path) -> Iterator[tuple[Record, bytes]]:
    """Yield the chunks of a journal as they stand there, with their lines."""
    with path.open("rb") as lines:
        for line in lines:
            with suppress(ValueError, TypeError, KeyError, AttributeError):  # the last line, or one cut off
                yield Record.from_json(line), line.rstrip(b"\n") + b"\n"
