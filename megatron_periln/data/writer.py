"""Writing of indexed datasets: whole, or not at all.

The bytes are those of ``IndexedDatasetBuilder`` (megatron/core/datasets/indexed_dataset.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_periln.data.errors import PreprocessError
from megatron_periln.data.indexed import DTYPES, HEADER, MAGIC, VERSION

__all__ = ["EncodedDocuments", "IndexedDatasetWriter", "open_writers"]


@dataclass(frozen=True)
class EncodedDocuments:
    """Tokens of consecutive documents under one key.

    Parameters
    ----------
    tokens
        ``[tokens]``, in the dtype of the dataset.
    sequence_lengths
        ``[sequences]``, int32: tokens in each sequence.
    document_lengths
        ``[documents]``, int64: sequences in each document; 0 for an empty document.
    """

    tokens: NDArray[np.integer]
    sequence_lengths: NDArray[np.int32]
    document_lengths: NDArray[np.int64]


class IndexedDatasetWriter:
    """Writes one dataset under temporary names beside its final ones.

    Parameters
    ----------
    prefix
        The final files are ``{prefix}.bin`` and ``{prefix}.idx``.
    dtype
        The dtype of the tokens.
    """

    def __init__(self, prefix: str, dtype: np.dtype) -> None:
        self.prefix = prefix
        self.tokens = 0
        self._dtype = dtype
        self._final = {suffix: Path(prefix + suffix) for suffix in (".bin", ".idx")}
        self._temporary = {suffix: Path(f"{prefix}{suffix}.{os.getpid()}.tmp") for suffix in (".bin", ".idx")}
        self._publishing = False
        self._sequence_lengths: list[NDArray[np.int32]] = []
        self._document_lengths: list[NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
        with _errors_name(prefix):
            self._bin = self._temporary[".bin"].open("xb")

    @property
    def files(self) -> list[Path]:
        """The final .bin and .idx files."""
        return list(self._final.values())

    def add(self, documents: EncodedDocuments) -> None:
        """Append documents."""
        with _errors_name(self.prefix):
            self._bin.write(documents.tokens.tobytes())
        self.tokens += documents.tokens.size
        self._sequence_lengths.append(documents.sequence_lengths)
        self._document_lengths.append(documents.document_lengths)

    def finish(self) -> None:
        """Bring both temporary files, complete, to the disk.

        Raises
        ------
        PreprocessError
            If there are no tokens, as Megatron cannot map an empty .bin file, or if writing fails.
        """
        if self.tokens == 0:
            raise PreprocessError(f"{self.prefix}: every document is empty, so there are no tokens to write")
        lengths = np.concatenate(self._sequence_lengths)
        sizes = lengths.astype(np.int64) * self._dtype.itemsize
        document_index = np.cumsum(np.concatenate(self._document_lengths))
        code = next(code for code, dtype in DTYPES.items() if dtype == self._dtype)
        with _errors_name(self.prefix):
            _sync(self._bin)
            self._bin.close()
            with self._temporary[".idx"].open("xb") as idx:
                idx.write(HEADER.pack(MAGIC, VERSION, code, lengths.size, document_index.size))
                idx.write(lengths.tobytes())
                idx.write((np.cumsum(sizes) - sizes).tobytes())
                idx.write(document_index.tobytes())
                _sync(idx)

    def publish(self) -> None:
        """Give the finished files their final names, the .idx last: it never stands without its .bin."""
        self._publishing = True
        with _errors_name(self.prefix):
            self._final[".idx"].unlink(missing_ok=True)
            for suffix in (".bin", ".idx"):
                self._temporary[suffix].replace(self._final[suffix])
            folder = os.open(self._final[".idx"].parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def discard(self) -> None:
        """Remove the temporary files, and the final ones if ``publish`` had begun."""
        with suppress(OSError):  # closing writes what is buffered, and the disk may be full
            self._bin.close()
        for path in [*self._temporary.values(), *(self._final.values() if self._publishing else ())]:
            path.unlink(missing_ok=True)


@contextmanager
def open_writers(prefixes: Sequence[str], dtype: np.dtype) -> Iterator[list[IndexedDatasetWriter]]:
    """Open a writer for each prefix; all datasets appear when the block ends, none if it fails."""
    writers: list[IndexedDatasetWriter] = []
    try:
        for prefix in prefixes:
            writers.append(IndexedDatasetWriter(prefix, dtype))
        yield writers
        for writer in writers:
            writer.finish()
        for writer in writers:
            writer.publish()
    except BaseException:
        for writer in writers:
            writer.discard()
        raise


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


@contextmanager
def _errors_name(prefix: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PreprocessError(f"{prefix}: cannot be written: {error.strerror or error}") from error
