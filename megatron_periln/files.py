"""Files and folders that appear whole, or not at all, and locks that end with their process."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megatron_periln.errors import UsageError

__all__ = [
    "allow_open_files",
    "check_new_folder",
    "locked",
    "new_folder",
    "remove_abandoned",
    "replacing",
    "sync",
    "try_lock",
    "write_text",
]

# What flock raises on file systems that have no locks, or whose lock server is away.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_MANY = 1 << 20


def allow_open_files() -> int:
    """Raise this process's limit of open files to what the machine allows; return that.

    Shells set 1,024, which `select` cannot go beyond; nothing here uses that call.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MANY if hard == resource.RLIM_INFINITY else hard
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def sync(path: Path) -> None:
    """Bring a file to the disk, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(*paths: Path, stale: Sequence[Path] = ()) -> Iterator[list[Path]]:
    """Yield a temporary name for each path; what is written there gets its final name when the block ends.

    The temporary files are brought to the disk and renamed in the order given. The last of several is
    the one that readers look for: an old one goes before any is renamed, so that it never stands beside
    new ones. A block that fails leaves no file of its own; what a killed process left is removed when the
    same path is written again.

    Parameters
    ----------
    *paths
        The files to write, all in one folder, which exists.
    stale
        Files that do not belong to the new ones, removed before any of those gets its name.

    Raises
    ------
    OSError
        If writing fails.
    """
    temporary = [_temporary(path) for path in paths]
    renaming = False
    try:
        with ExitStack() as locks:
            for path, file in zip(paths, temporary, strict=True):
                remove_abandoned(path)
                locks.enter_context(locked(file, os.O_RDWR | os.O_CREAT | os.O_EXCL))
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
    except BaseException:
        for path in (*temporary, *(paths if renaming else ())):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole under its name, in place of an old one; its folder must be there."""
    with replacing(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(path: Path, *, flag: str, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``, which gets that name when the block ends.

    Every file in it is brought to the disk before it is renamed. A block that fails, or is
    interrupted, leaves what was there; what a killed process left is removed when ``path`` is to be
    written again.

    Parameters
    ----------
    path
        A folder that does not exist, or is empty, unless ``replace`` is True.
    flag
        The command-line flag that errors name.
    replace
        Whether the new folder takes the place of one that holds something.

    Raises
    ------
    UsageError
        If ``path`` holds something that must stay, or can't be written.
    """
    if not replace and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{flag} {path} exists; choose another, or remove it")
    temporary, old = _temporary(path), path.with_name(f"{path.name}.{os.getpid()}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        temporary.mkdir()
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be written: {error.strerror or error}") from error
    try:
        with locked(temporary):
            yield temporary
            for inner in sorted(temporary.rglob("*"), reverse=True):
                sync(inner)
            sync(temporary)
            if replace and path.exists():
                path.rename(old)  # a rename replaces an empty folder only
            temporary.replace(path)
        sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


class _NothingWrittenError(Exception):
    pass


def check_new_folder(path: Path, *, flag: str) -> None:
    """Find out whether `new_folder` could make ``path``; leave nothing but the folders above it.

    Raises
    ------
    UsageError
        If it couldn't.
    """
    with suppress(_NothingWrittenError), new_folder(path, flag=flag):
        raise _NothingWrittenError


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder until it is closed everywhere, at the latest when the process ends.

    Returns
    -------
    bool or None
        True if it is locked now, False if another process holds it, None if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


@contextmanager
def locked(path: Path, flags: int = os.O_RDONLY) -> Iterator[bool]:
    """Lock a file or a folder, opened with ``flags``, as long as the process lives at most.

    Yields False if another process has locked it, or the file system has no locks.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        ours = None
        with suppress(OSError):
            ours = try_lock(descriptor)
        yield ours is True
    finally:
        os.close(descriptor)


def remove_abandoned(path: Path) -> None:
    """Remove the temporary files and folders of ``path`` that no process holds: what killed ones left."""
    temporary = re.compile(re.escape(path.name) + r"\.\d+\.tmp")
    for left in path.parent.iterdir():
        if temporary.fullmatch(left.name):
            # An exclusive lock on a file over NFS needs it open for writing.
            flags = os.O_RDONLY if left.is_dir() else os.O_RDWR
            with suppress(OSError), locked(left, flags) as abandoned:
                if abandoned:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")
