"""Output files of the data tools: checked before the work begins, and one error if they can't be written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_periln.errors import PreprocessError

__all__ = ["prepare_output", "writing"]


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
