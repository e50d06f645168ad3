"""JSON Lines input: from the value of ``--input`` to the texts of each document.

Every error names the file and the line.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from megatron_periln.data.errors import PreprocessError

__all__ = ["Line", "chunk_lines", "find_inputs", "lines_in_output_order", "parse_line"]


class Line(NamedTuple):
    """One line of an input file, not decoded yet.

    Parameters
    ----------
    path
        The input file.
    number
        Line number in that file, from 1.
    content
        The bytes of the line, its line end included.
    """

    path: str
    number: int
    content: bytes

    @property
    def where(self) -> str:
        """``path:number``, as errors name the line."""
        return f"{self.path}:{self.number}"


def find_inputs(pattern: str) -> list[Path]:
    """Return the input files that ``--input`` names.

    Parameters
    ----------
    pattern
        A file, or a glob whose matches are taken in sorted order.

    Raises
    ------
    PreprocessError
        If there is no such file, the glob matches none, or it is a folder.
    """
    path = Path(pattern)
    if path.is_dir():
        raise PreprocessError(
            f"--input {pattern}: a folder; give a file or a glob such as '{path / '*.jsonl'}'"
        )
    if path.exists():
        return [path]
    if not glob.has_magic(pattern):
        raise PreprocessError(f"--input {pattern}: no such file")
    matches = [Path(match) for match in sorted(glob.glob(pattern))]  # noqa: PTH207 (Path.glob takes no absolute glob)
    inputs = [match for match in matches if not match.is_dir()]
    if not inputs:
        raise PreprocessError(f"--input {pattern}: no file matches this glob")
    return inputs


def lines_in_output_order(
    inputs: Sequence[Path], partitions: int = 1, *, keep_sequential_samples: bool = False
) -> Iterator[Line]:
    """Yield the lines of all inputs in the order in which their documents are written.

    With several partitions Megatron-LM deals lines out to them in turn and then joins the
    partitions (``main`` in tools/preprocess_data.py), so the order is lines 0, n, 2n, ... of the
    concatenated inputs, then 1, n + 1, ..., unless ``keep_sequential_samples``. The inputs are
    read once for each partition.

    Raises
    ------
    PreprocessError
        If a file cannot be read.
    """
    if partitions == 1 or keep_sequential_samples:
        return _read_lines(inputs)
    return chain.from_iterable(
        islice(_read_lines(inputs), first, None, partitions) for first in range(partitions)
    )


def chunk_lines(lines: Iterable[Line], chunk_bytes: int) -> Iterator[list[Line]]:
    """Group lines, in order, into lists of at least ``chunk_bytes`` bytes; the last may be smaller."""
    chunk: list[Line] = []
    size = 0
    for line in lines:
        chunk.append(line)
        size += len(line.content)
        if size >= chunk_bytes:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def parse_line(line: Line, keys: Sequence[str]) -> dict[str, str | list[str]]:
    """Return the text, or the list of texts, that the document on ``line`` has under each key.

    Raises
    ------
    PreprocessError
        If the line is empty, is not UTF-8, is not a JSON object, lacks a key, or has under it
        something that is neither a string nor a list of strings.
    """
    if not line.content.strip():
        raise PreprocessError(f"{line.where}: empty line; each line must be a JSON object: remove it")
    try:
        # Without the line end an error at the end of the line has the right column.
        document = json.loads(line.content.rstrip(b" \t\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PreprocessError(f"{line.where}: not UTF-8 at byte {error.start + 1}: {error.reason}") from error
    except json.JSONDecodeError as error:
        raise PreprocessError(f"{line.where}: malformed JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise PreprocessError(f"{line.where}: JSON that cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise PreprocessError(
            f"{line.where}: {_json_type(document)}; each line must be a JSON object such as "
            f'{{"{keys[0]}": "..."}}'
        )
    for key in keys:
        if key not in document:
            there = ", ".join(map(repr, document)) or "none"
            raise PreprocessError(
                f"{line.where}: no key {key!r}; the keys there are: {there}; choose with --json-keys"
            )
        value = document[key]
        wrong = [
            text for text in (value if isinstance(value, list) else [value]) if not isinstance(text, str)
        ]
        if wrong:
            kind = f"{'a list with ' if isinstance(value, list) else ''}{_json_type(wrong[0])}"
            raise PreprocessError(
                f"{line.where}: key {key!r} has {kind}; it must be a string or a list of strings"
            )
    return {key: document[key] for key in keys}


def _read_lines(inputs: Iterable[Path]) -> Iterator[Line]:
    for path in inputs:
        name, number = str(path), 0
        try:
            with _open(path) as stream:
                for number, content in enumerate(stream, start=1):
                    yield Line(name, number, content)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise PreprocessError(f"{path}: cannot be read (after line {number}): {reason}") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
