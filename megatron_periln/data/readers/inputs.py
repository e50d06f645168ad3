"""From the values of ``--input`` to files."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_periln.data.input_order import in_order
from megatron_periln.data.readers.compression import (
    COMPRESSIONS,
    HEAD_BYTES,
    compression_of,
    uncompressed_suffix,
)
from megatron_periln.data.readers.opening import open_input, reading
from megatron_periln.errors import PreprocessError

__all__ = ["FORMATS", "STDIN", "InputFile", "find_inputs"]

FORMATS = ("auto", "jsonl", "parquet", "text")
STDIN = "-"
_COMPRESSED = [suffix for compression in COMPRESSIONS for suffix in compression.suffixes]
_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text"}


# Of files there may be a million: no Path is made of one, nor a file object, and no dictionary of its fields.


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input.

    Parameters
    ----------
    path
        The file; ``-`` is standard input.
    format
        ``jsonl``, ``parquet`` or ``text``.
    bytes
        Size of the file.
    modified
        Time of its last change, in ns.
    """

    path: str
    format: str
    bytes: int = 0
    modified: int = 0
    _seekable: bool | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def regular(self) -> bool:
        """Whether it can be read again: a file, no pipe."""
        return self.path != STDIN and os.path.isfile(self.path)  # noqa: PTH113

    @property
    def seekable(self) -> bool:
        """Whether it can be read from the middle.

        Raises
        ------
        PreprocessError
            If it cannot be opened, or its compression cannot be read.
        """
        if self._seekable is None:
            object.__setattr__(self, "_seekable", self.regular and not _is_compressed(self.path))
        return bool(self._seekable)


def find_inputs(
    values: Sequence[str],
    format: str = "auto",
    order: str = "bytes",
    differs: Callable[[Path, Path], None] = lambda *_: None,
) -> list[InputFile]:
    """Return the input files that ``--input`` names, in the order of the output.

    Parameters
    ----------
    values
        Files; globs; folders, which stand for the files below them with a known suffix; ``-`` for
        standard input.
    format
        One of ``FORMATS``. ``auto`` goes by the suffix; what has none that is known is Parquet, if it
        begins and ends so, or else JSON Lines.
    order
        That of the files of a glob or a folder, one of ``ORDERS``.
    differs
        Is called with two files that the other order has the other way round, if there are any.

    Raises
    ------
    PreprocessError
        If there is no such file, a glob or a folder has none, standard input is not alone, or a file
        cannot be opened or decompressed.
    """
    found: list[InputFile] = []
    for value in values:
        if value == STDIN:
            if len(values) > 1:
                raise PreprocessError("--input -: standard input must be the only input")
            found.append(InputFile(STDIN, "jsonl" if format == "auto" else format))
        else:
            found.extend(_describe(path, format) for path in _paths(value, order, differs))
    for file in found:
        if file.format == "text" and not file.regular:
            raise PreprocessError(f"{file.path}: plain text cannot come through a pipe: give the file itself")
        if file.format == "text" and format == "auto":
            _refuse_json(file)
        if not file.seekable and file.format == "parquet":  # opens every file, before anything is written
            raise PreprocessError(
                f"{file.path}: Parquet cannot be compressed or a pipe: give the file itself"
            )
    return found


def _is_compressed(path: str) -> bool:
    with reading(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            head = os.read(descriptor, HEAD_BYTES)
        finally:
            os.close(descriptor)
        enough = len(head) == HEAD_BYTES or head[:1] == b"{"
        if enough and compression_of(head, path) is None:
            return False
        with open_input(path) as opened:  # looks into what is compressed too
            return opened.compressed


def _paths(value: str, order: str, differs: Callable[[Path, Path], None]) -> list[str]:
    path = Path(value)
    if path.is_dir():
        below = (file for file in _files_below(str(path)) if uncompressed_suffix(file) in _SUFFIXES)
        files = in_order(below, order, name=lambda file: tuple(file.split("/")), differs=_paths_of(differs))
        if not files:
            raise PreprocessError(
                f"--input {value}: no files in this folder that end with {', '.join(_SUFFIXES)}, "
                f"or with those and one of {', '.join(_COMPRESSED)}"
            )
        return files
    if path.exists():
        return [str(path)]
    if not glob.has_magic(value):
        raise PreprocessError(f"--input {value}: no such file")
    matches = [match for match in glob.glob(value, recursive=True) if not os.path.isdir(match)]  # noqa: PTH112, PTH207 (Path.glob takes no absolute glob)
    files = in_order(matches, order, name=lambda match: (match,), differs=_paths_of(differs))
    if not files:
        raise PreprocessError(f"--input {value}: no file matches this glob")
    return [str(Path(file)) for file in files]


def _paths_of(differs: Callable[[Path, Path], None]) -> Callable[[str, str], None]:
    return lambda here, there: differs(Path(here), Path(there))


def _files_below(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield the files of a folder and its subfolders; a link to a folder above is not followed."""
    if (real := os.path.realpath(folder)) in above:
        return
    with reading(folder), os.scandir(folder) as found:
        entries = list(found)
    start = "" if folder == "." else os.path.join(folder, "")  # noqa: PTH118
    for entry in entries:
        if entry.is_dir():
            yield from _files_below(start + entry.name, above | {real})
        elif entry.is_file():
            yield start + entry.name


def _describe(path: str, format: str) -> InputFile:
    status = os.stat(path)  # noqa: PTH116
    if format == "auto":
        found = _SUFFIXES.get(uncompressed_suffix(path))
        format = found or ("parquet" if _is_parquet(path, status) else "jsonl")
    return InputFile(path, format, status.st_size, status.st_mtime_ns)


def _is_parquet(path: str, status: os.stat_result) -> bool:
    """Whether a file whose name does not say what it is is Parquet, by its first and last bytes."""
    size = status.st_size
    if not stat.S_ISREG(status.st_mode) or size < 12:
        return False
    with reading(path), Path(path).open("rb") as file:
        first = file.read(4)
        file.seek(size - 4)
        return first == file.read(4) == b"PAR1"


def _refuse_json(file: InputFile) -> None:
    with reading(file.path), open_input(file.path) as opened:
        if file.bytes and opened.stream.read(64).lstrip().startswith(b'{"'):
            raise PreprocessError(
                f"{file.path}: JSON Lines by its look, plain text by its name: choose with --input-format"
            )
