"""Files that appear whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_periln.errors import PreprocessError
from megatron_periln.files import held, remove_abandoned, sync

__all__ = ["prepare_output", "published"]


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
def published(*paths: Path, stale: Sequence[Path] = ()) -> Iterator[list[Path]]:
    """Yield a temporary name for each path; what is written there gets its final name when the block ends.

    The temporary files are brought to the disk and renamed in the order given. The last of several is
    the one that readers look for: an old one goes before any is renamed, so that it never stands beside
    new ones. A block that fails leaves no file of its own; what a killed process left is removed when the
    same path is written again.

    Parameters
    ----------
    *paths
        The files to write.
    stale
        Files that do not belong to the new ones, removed before any of those gets its name.

    Raises
    ------
    PreprocessError
        If writing fails, naming the first path.
    """
    temporary = [Path(f"{path}.{os.getpid()}.tmp") for path in paths]
    renaming = False
    locks = ExitStack()
    try:
        for path, file in zip(paths, temporary, strict=True):
            remove_abandoned(path)
            locks.enter_context(held(file, os.O_RDWR | os.O_CREAT | os.O_EXCL))
        yield temporary
        for path in temporary:
            sync(path)
        renaming = len(paths) > 1
        if renaming:
            paths[-1].unlink(missing_ok=True)
        for path in stale:
            path.unlink(missing_ok=True)
        for source, target in zip(temporary, paths, strict=True):
            source.replace(target)
        sync(paths[0].parent)
    except BaseException as error:
        for path in (*temporary, *(paths if renaming else ())):
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise PreprocessError(
                f"{paths[0]}: cannot be written: {error.strerror or error}; nothing was left there"
            ) from error
        raise
    finally:
        locks.close()
