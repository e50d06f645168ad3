"""Checksums of a checkpoint's files, computed while they are written.

CRC-32 finds every flipped bit and every burst of up to 32, runs at about twice SHA-256's speed here,
and is in Python's zlib. What is to be written is summed, so that nothing is read again, and what the
disk made of it is not believed.
"""

from __future__ import annotations

import io
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["SIDECAR", "open_summed", "read_sidecar", "sum_file"]

SIDECAR = ".crc32"
"""The suffix of the file that holds size and checksum of another, until they are in the manifest."""

_BLOCK = 4 << 20
_MOST_SIDECAR_BYTES = 64
_IN_PARALLEL = 1 << 20


def sum_file(path: Path) -> str:
    """Return the CRC-32 of a file, in hex."""
    crc = 0
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def read_sidecar(path: str | Path) -> tuple[int, str] | None:
    """Return the size and checksum of what was written to ``path``, None if nobody summed it."""
    try:
        descriptor = os.open(f"{path}{SIDECAR}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        size, crc = os.read(descriptor, _MOST_SIDECAR_BYTES).decode("ascii").split()
        return int(size), crc
    except ValueError:
        return None
    finally:
        os.close(descriptor)


def open_summed(path: str, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
    """Open a file as ``open`` does; one that is written in binary leaves a sidecar beside it."""
    return _SummedFile(path) if mode == "wb" else open(path, mode, *args, **kwargs)  # noqa: PTH123


class _SummedFile(io.BufferedWriter):
    """A file that is written from beginning to end, and sums large pieces while the system writes them."""

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._path = Path(path)
        self._crc: int | None = 0
        self._size = 0
        self._thread = ThreadPoolExecutor(1)

    def write(self, data: Any) -> int:
        if self._crc is None:
            return super().write(data)
        view = memoryview(data).cast("B")
        self._size += len(view)
        if len(view) < _IN_PARALLEL:
            self._crc = zlib.crc32(view, self._crc)
            return super().write(view)
        crc = self._thread.submit(zlib.crc32, view, self._crc)
        try:
            return super().write(view)
        finally:
            self._crc = crc.result()

    def seek(self, *args: Any) -> int:
        self._crc = None  # it goes back: what is summed is not what will be there
        return super().seek(*args)

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        self._thread.shutdown()
        if self._crc is not None:
            self._path.with_name(f"{self._path.name}{SIDECAR}").write_text(f"{self._size} {self._crc:08x}")
