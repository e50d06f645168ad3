"""SHA-256 of files while they are written."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

__all__ = ["RunningChecksums"]

_BLOCK = 1 << 20
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


class RunningChecksums:
    """Reads files behind those who write them, in a thread of its own.

    What was just written is still in memory, so nothing is read from the disk twice. Hashing lets go of the
    interpreter's lock, so the parent's work goes on beside it. What was hashed begins its way to the disk, so
    that bringing all of it there takes less long at the end.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[str, int] | None] = SimpleQueue()
        self._hashes: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._error: OSError | None = None
        self._thread: Thread | None = None

    def extend(self, path: str, end: int) -> None:
        """Note that the first ``end`` bytes of ``path`` are final."""
        if self._thread is None:  # not before the workers were forked
            self._thread = Thread(target=self._read, daemon=True)
            self._thread.start()
        self._queue.put((path, end))

    def result(self) -> dict[str, str]:
        """Return the checksum of each file, in hex.

        Raises
        ------
        OSError
            If a file could not be read.
        """
        if self._thread:
            self._queue.put(None)
            self._thread.join()
        if self._error:
            raise self._error
        return {path: digest.hexdigest() for path, digest in self._hashes.items()}

    def _read(self) -> None:
        try:
            while item := self._queue.get():
                path, end = item
                digest = self._hashes.setdefault(path, hashlib.sha256())
                start = hashed = self._sizes.get(path, 0)
                with Path(path).open("rb", buffering=0) as stream:
                    stream.seek(start)
                    while start < end and (block := stream.read(min(_BLOCK, end - start))):
                        digest.update(block)
                        start += len(block)
                    if start > hashed:
                        _begin_to_sync(stream.fileno(), hashed, start)
                self._sizes[path] = end
        except OSError as error:
            self._error = error


def _begin_to_sync(descriptor: int, start: int, end: int) -> int | None:
    """Have the system begin to write a part of a file; a hint, which may have no effect.

    Return 0 where it was taken, -1 where it was not, and None where the C library does not have it.
    """
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    where = ctypes.c_int64(start), ctypes.c_int64(end - start)
    return call(descriptor, *where, _SYNC_FILE_RANGE_WRITE) if call else None
