"""From the values of ``--input`` to files."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_periln.data.input_order import in_order
from megatron_periln.data.readers.compression import COMPRESSIONS, uncompressed_suffix
from megatron_periln.data.readers.opening import open_input, reading
from megatron_periln.errors import PreprocessError

__all__ = ["FORMATS", "STDIN", "InputFile", "find_inputs"]

FORMATS = ("auto", "jsonl", "parquet", "text")
STDIN = "-"
_COMPRESSED = [suffix for compression in COMPRESSIONS for suffix in compression.suffixes]
_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
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

    @property
    def regular(self) -> bool:
        """Whether it can be read again: a file, no pipe."""
        return self.path != STDIN and Path(self.path).is_file()

    @cached_property
    def seekable(self) -> bool:
        """Whether it can be read from the middle.

        Raises
        ------
        PreprocessError
            If it cannot be opened, or its compression cannot be read.
        """
        if not self.regular:
            return False
        with reading(self.path), open_input(self.path) as opened:
            return not opened.compressed


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


def _paths(value: str, order: str, differs: Callable[[Path, Path], None]) -> Iterable[Path]:
    path = Path(value)
    if path.is_dir():
        below = (file for file in _files_below(path) if uncompressed_suffix(file) in _SUFFIXES)
        files = in_order(below, order, name=lambda file: file.parts, differs=differs)
        if not files:
            raise PreprocessError(
                f"--input {value}: no files in this folder that end with {', '.join(_SUFFIXES)}, "
                f"or with those and one of {', '.join(_COMPRESSED)}"
            )
        return files
    if path.exists():
        return [path]
    if not glob.has_magic(value):
        raise PreprocessError(f"--input {value}: no such file")
    matches = [match for match in glob.glob(value, recursive=True) if not Path(match).is_dir()]  # noqa: PTH207 (Path.glob takes no absolute glob)
    files = list(map(Path, in_order(matches, order, name=lambda match: (match,), differs=_paths_of(differs))))
    if not files:
        raise PreprocessError(f"--input {value}: no file matches this glob")
    return files


def _paths_of(differs: Callable[[Path, Path], None]) -> Callable[[str, str], None]:
    return lambda here, there: differs(Path(here), Path(there))


def _files_below(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders; a link to a folder above is not followed."""
    if (real := folder.resolve()) in above:
        return
    with reading(str(folder)):
        paths = list(folder.iterdir())
    for path in paths:
        if path.is_dir():
            yield from _files_below(path, above | {real})
        elif path.is_file():
            yield path


def _describe(path: Path, format: str) -> InputFile:
    if format == "auto":
        suffix = uncompressed_suffix(path)
        format = _SUFFIXES.get(suffix) or ("parquet" if _is_parquet(path) else "jsonl")
    status = path.stat()
    return InputFile(str(path), format, status.st_size, status.st_mtime_ns)


def _is_parquet(path: Path) -> bool:
    """Whether a file whose name does not say what it is is Parquet, by its first and last bytes."""
    if not path.is_file() or (size := path.stat().st_size) < 12:
        return False
    with reading(str(path)), path.open("rb") as file:
        first = file.read(4)
        file.seek(size - 4)
        return first == file.read(4) == b"PAR1"


def _refuse_json(file: InputFile) -> None:
    with reading(file.path), open_input(file.path) as opened:
        if file.bytes and opened.stream.read(64).lstrip().startswith(b'{"'):
            raise PreprocessError(
                f"{file.path}: JSON Lines by its look, plain text by its name: choose with --input-format"
            )
