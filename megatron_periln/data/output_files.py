"""Output files of the data tools: checked before the work begins, and one error if they can't be written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import orjson

from megatron_periln.errors import PreprocessError

__all__ = ["indented_json", "prepare_output", "writing"]


def prepare_output(path: str | Path, *, flag: str, overwrite: bool = False) -> None:
    """Make the folder of ``path``, and check that ``path`` can be written.

    Parameters
    ----------
    path
        The file to be written.
    flag
        The command-line flag that errors name.
    overwrite
        Whether the file may exist.

    Raises
    ------
    PreprocessError
        If the folder cannot be made or written to, or if the file exists and ``overwrite`` is False.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PreprocessError(f"{flag}: cannot make the folder {path.parent}: {error.strerror}") from error
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise PreprocessError(
            f"{flag}: the folder {path.parent} is not writable: {error.strerror or error}"
        ) from error
    if path.exists() and not overwrite:
        raise PreprocessError(f"{path} exists: choose another {flag} or pass --overwrite")


@contextmanager
def writing(name: str | Path, consequence: str = "") -> Iterator[None]:
    """Turn what goes wrong while writing ``name`` into a ``PreprocessError`` that ends in ``consequence``."""
    try:
        yield
    except OSError as error:
        raise PreprocessError(f"{name}: cannot be written: {error.strerror or error}{consequence}") from error


def indented_json(content: dict[str, Any], indent: str = "") -> Iterator[bytes]:
    """Yield an object's JSON in pieces, with a line for each item of a list, which may be a million files."""
    separator = "{"
    for name, value in content.items():
        yield f"{separator}\n{indent}  ".encode() + _json(name) + b": "
        separator = ","
        if value and isinstance(value, dict):
            yield from indented_json(value, f"{indent}  ")
        elif value and isinstance(value, list):
            for start, item in zip(chain("[", repeat(",")), value, strict=False):
                yield f"{start}\n{indent}    ".encode() + _json(item)
            yield f"\n{indent}  ]".encode()
        else:
            yield _json(value)
    yield f"\n{indent}}}".encode()


def _json(content: Any) -> bytes:
    try:
        return orjson.dumps(content)
    except TypeError:  # a path that is not UTF-8, an integer of more than 64 bits
        return json.dumps(content).encode()
