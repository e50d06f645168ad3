"""What belongs to a checkpoint: ``manifest.json`` in its folder, every file with its size and checksum."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

from megatron_periln.checkpoints.sums import SIDECAR, read_sidecar, sum_file
from megatron_periln.files import sync, write_text

__all__ = ["MANIFEST", "BrokenCheckpointError", "CheckpointFile", "Manifest"]

MANIFEST = "manifest.json"

_VERSION = 1
_THREADS = min(4, os.cpu_count() or 1)
_MOST_AT_ONCE = 64
"""Files that a thread looks at before it asks for more, where there are many."""


class BrokenCheckpointError(Exception):
    """A checkpoint is not what was saved: the message names the file."""


@dataclass(frozen=True)
class CheckpointFile:
    """A file of a checkpoint.

    Attributes
    ----------
    name
        Its path within the checkpoint's folder.
    size
        In bytes.
    crc32
        In hex; None where it was not to be computed.
    """

    name: str
    size: int
    crc32: str | None

    def to_json(self) -> str:
        """Return one line."""
        crc32 = "null" if self.crc32 is None else f'"{self.crc32}"'
        return f'{{"name": {json.dumps(self.name)}, "size": {self.size}, "crc32": {crc32}}}'

    def check_size(self, folder: Path) -> None:
        """Raise `BrokenCheckpointError` if the file is missing or has another size."""
        try:
            size = (folder / self.name).stat().st_size
        except FileNotFoundError:
            raise BrokenCheckpointError(f"{self.name} is missing") from None
        except OSError as error:
            raise BrokenCheckpointError(f"{self.name} can't be read: {error.strerror}") from error
        if size != self.size:
            raise BrokenCheckpointError(f"{self.name} has {size:,} bytes instead of {self.size:,}")

    def check_sum(self, folder: Path) -> None:
        """Raise `BrokenCheckpointError` if the file's bytes are others."""
        if self.crc32 is None:
            return
        try:
            crc = sum_file(folder / self.name)
        except OSError as error:
            raise BrokenCheckpointError(f"{self.name} can't be read: {error.strerror}") from error
        if crc != self.crc32:
            raise BrokenCheckpointError(f"{self.name} has checksum {crc} instead of {self.crc32}")


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint, sorted by name."""

    files: tuple[CheckpointFile, ...]

    @classmethod
    def of(cls, folder: Path, *, sums: bool) -> Manifest:
        """Describe a checkpoint that was just written, and bring to the disk what the writer did not.

        Files whose writer left no sidecar are read for their checksum: Megatron's small ones, and those
        of other formats than torch_dist.

        Raises
        ------
        BrokenCheckpointError
            If a file has another size than was written to it.
        OSError
            If the folder can't be read.
        """
        there = set(_names(folder))
        names = sorted(
            name for name in there if not name.endswith(SIDECAR) and name.rpartition("/")[2] != MANIFEST
        )

        def describe(some: list[str]) -> list[CheckpointFile]:
            return [_describe(folder, name, sums, summed=f"{name}{SIDECAR}" in there) for name in some]

        with ThreadPoolExecutor(_THREADS) as threads:
            parts = threads.map(describe, map(list, batched(names, _at_once(names))))
            return cls(tuple(entry for part in parts for entry in part))

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Return a checkpoint's manifest, None if it has none.

        Raises
        ------
        BrokenCheckpointError
            If it is cut off.
        """
        try:
            entries = json.loads((folder / MANIFEST).read_text())["files"]
            return cls(tuple(CheckpointFile(**entry) for entry in entries))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BrokenCheckpointError(f"{MANIFEST} can't be read: {error}") from error

    def write(self, folder: Path) -> None:
        """Put the manifest in its place, whole, and remove the sidecars."""
        files = ",\n".join(entry.to_json() for entry in self.files)
        write_text(folder / MANIFEST, f'{{"version": {_VERSION}, "files": [\n{files}\n]}}\n')
        sync(folder)
        for name in _names(folder):
            if name.endswith(SIDECAR):
                os.unlink(f"{folder}/{name}")  # noqa: PTH108

    @property
    def size(self) -> int:
        """Of all files, in bytes."""
        return sum(entry.size for entry in self.files)

    @property
    def has_sums(self) -> bool:
        """Whether every file has a checksum."""
        return all(entry.crc32 is not None for entry in self.files)

    def check_sizes(self, folder: Path) -> None:
        """Raise `BrokenCheckpointError` for the first file that is missing, or has another size."""
        _each(self.files, lambda entry: entry.check_size(folder))

    def check_sums(self, folder: Path, part: int = 0, parts: int = 1) -> None:
        """Raise `BrokenCheckpointError` for the first file with another checksum, of one part of them all."""
        by_size = sorted(self.files, key=lambda entry: -entry.size)
        _each(by_size[part::parts], lambda entry: entry.check_sum(folder))


def _names(folder: Path, within: str = "") -> Iterator[str]:
    """Yield the paths of all files within a folder; strings, since there may be tens of thousands."""
    with os.scandir(os.path.join(folder, within)) as entries:  # noqa: PTH118
        for entry in entries:
            name = f"{within}/{entry.name}" if within else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _names(folder, name)
            elif entry.is_file():
                yield name


def _describe(folder: Path, name: str, sums: bool, *, summed: bool) -> CheckpointFile:
    path = f"{folder}/{name}"
    size = os.stat(path).st_size  # noqa: PTH116
    written = read_sidecar(path) if summed else None
    if written is None:
        sync(Path(path))
        return CheckpointFile(name, size, sum_file(Path(path)) if sums else None)
    if written[0] != size:
        raise BrokenCheckpointError(f"{name} has {size:,} bytes instead of {written[0]:,}")
    return CheckpointFile(name, size, written[1] if sums else None)


def _each(entries: Sequence[CheckpointFile], check: Callable[[CheckpointFile], None]) -> None:
    def check_some(some: Iterable[CheckpointFile]) -> None:
        for entry in some:
            check(entry)

    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(check_some, batched(entries, _at_once(entries))):
            pass


def _at_once(files: Sequence[object]) -> int:
    """Return how many of the files a thread takes at once; all are busy to the end."""
    return max(1, min(_MOST_AT_ONCE, len(files) // (16 * _THREADS)))
