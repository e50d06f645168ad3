"""The documents that were left out, for people to look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megatron_periln.data.output_files import writing
from megatron_periln.data.readers.documents import BadDocument
from megatron_periln.data.readers.opening import open_input, reading
from megatron_periln.files import sync

__all__ = ["number_lines", "write_quarantine"]

_BLOCK = 1 << 20


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


def write_quarantine(path: Path, bad: Iterable[BadDocument]) -> None:
    """Write the documents as JSON Lines, with what is wrong with each.

    ``content`` is the document as it was read: bytes that are not UTF-8 stand in it as lone
    surrogates, as Python's ``surrogateescape`` writes them. It is null for a document that was too
    large to be read.

    Raises
    ------
    PreprocessError
        If the file cannot be written.
    """
    with writing(path), path.open("w", encoding="utf-8") as stream:
        for document in bad:
            entry = {
                "path": document.place.path,
                "number": document.place.number,
                "byte": document.place.offset,
                "kind": document.kind,
                "reason": document.reason,
                "content": document.content,
            }
            stream.write(json.dumps(entry) + "\n")
        stream.flush()
        sync(path)


def _lines_at(path: str, offsets: list[int]) -> dict[int, int]:
    """Return the number of the line that begins at each of the ascending ``offsets``."""
    lines: dict[int, int] = {}
    line, position = 1, 0
    with reading(path), open_input(path) as opened:
        for offset in offsets:
            while position < offset and (block := opened.stream.read(min(_BLOCK, offset - position))):
                line += block.count(b"\n")
                position += len(block)
            lines[offset] = line
    return lines
