"""SHA-256 of files while they grow."""

from __future__ import annotations

import hashlib
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from megatron_periln.data.preprocess.journal import Record
from megatron_periln.data.preprocess.outputs import Outputs

__all__ = ["GrowingChecksums", "Growth"]

_BLOCK = 1 << 20


class GrowingChecksums:
    """Reads files behind those who write them, in a thread of its own.

    What was just written is still in memory, so nothing is read from the disk twice.
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


class Growth:
    """Lets the checksums follow the chunks before which all were written."""

    def __init__(self, outputs: Outputs, checksums: GrowingChecksums) -> None:
        self._outputs, self._checksums = outputs, checksums
        self._placer = outputs.new_placer()
        self._seen, self._next = 0, 0
        self._waiting: dict[int, Record] = {}

    def advance(self) -> None:
        """Take note of what was written since the last call."""
        for record in self._outputs.records[self._seen :]:
            self._waiting[record.number] = record
        self._seen = len(self._outputs.records)
        while self._next in self._waiting:
            record = self._waiting.pop(self._next)
            self._next += 1
            for dataset in self._placer.place(record.sizes):
                end = self._placer.ends[dataset].tokens * self._placer.itemsize
                self._checksums.extend(f"{self._outputs.stem(dataset)}.bin", end)
