"""Bringing files to the disk, and folders that appear whole, or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_periln.errors import UsageError

__all__ = ["held", "new_folder", "remove_abandoned", "sync", "write_whole"]


def sync(path: Path) -> None:
    """Bring a file to the disk, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path, *, flag: str) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``, which gets that name when the block ends.

    Every file in it is brought to the disk before it is renamed. A block that fails, or is
    interrupted, leaves nothing; what a killed process left is removed when ``path`` is to be
    written again.

    Parameters
    ----------
    path
        A folder that does not exist, or is empty.
    flag
        The command-line flag that errors name.

    Raises
    ------
    UsageError
        If ``path`` holds something, or can't be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{flag} {path} exists; choose another, or remove it")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        temporary.mkdir()
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be written: {error.strerror or error}") from error
    try:
        with held(temporary):
            yield temporary
            for inner in sorted(temporary.rglob("*"), reverse=True):
                sync(inner)
            sync(temporary)
            temporary.replace(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def held(path: Path, flags: int = os.O_RDONLY) -> Iterator[bool]:
    """Lock a file or a folder, opened with ``flags``, as long as the process lives at most.

    Yields False if another process has locked it, or the file system has no locks.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except OSError:
        locked = False
    try:
        yield locked
    finally:
        os.close(descriptor)


def remove_abandoned(path: Path) -> None:
    """Remove the temporary files and folders of ``path`` that no process holds: what killed ones left."""
    temporary = re.compile(re.escape(path.name) + r"\.\d+\.tmp")
    for left in path.parent.iterdir():
        if temporary.fullmatch(left.name):
            # An exclusive lock on a file over NFS needs it open for writing.
            flags = os.O_RDONLY if left.is_dir() else os.O_RDWR
            with suppress(OSError), held(left, flags) as abandoned:
                if abandoned:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole under its name, in place of an old one; its folder must be there."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
