"""SHA-256 of files while they are written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

__all__ = ["RunningChecksums"]

_BLOCK = 1 << 20


class RunningChecksums:
    """Reads files behind those who write them, in a thread of its own.

    What was just written is still in memory, so nothing is read from the disk twice. Hashing lets go of the
    interpreter's lock, so the parent's work goes on beside it.
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
                start = self._sizes.get(path, 0)
                with Path(path).open("rb", buffering=0) as stream:
                    stream.seek(start)
                    while start < end and (block := stream.read(min(_BLOCK, end - start))):
                        digest.update(block)
                        start += len(block)
                self._sizes[path] = end
        except OSError as error:
            self._error = error
