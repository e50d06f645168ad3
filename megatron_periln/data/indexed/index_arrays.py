"""The arrays of an indexed dataset's .idx file, mapped, and a check of its layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_periln.data.indexed.format import (
    HEADER,
    IndexedDatasetError,
    IndexedDatasetInfo,
    blocks,
    check_indexed_dataset,
)

__all__ = ["IndexArrays", "check_layout"]


@dataclass(frozen=True)
class IndexArrays:
    """An indexed dataset and the arrays of its .idx file, mapped where they are asked for, not read.

    No file stays open between, so that thousands of datasets can be held.

    Attributes
    ----------
    prefix
        The dataset is ``{prefix}.bin`` and ``{prefix}.idx``.
    info
        Dtype and counts.
    size
        Bytes of the .idx file.
    """

    prefix: str
    info: IndexedDatasetInfo
    size: int

    @classmethod
    def open(cls, prefix: str | Path, *, may_be_empty: bool = False) -> IndexArrays:
        """Check the dataset at ``prefix`` with ``check_indexed_dataset``.

        Raises
        ------
        IndexedDatasetError
            If Megatron cannot read the dataset.
        """
        info = check_indexed_dataset(prefix, may_be_empty=may_be_empty)
        return cls(str(prefix), info, Path(f"{prefix}.idx").stat().st_size)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """``[sequences]``: tokens in each sequence."""
        return self._part(np.int32, HEADER.size, self.info.sequences)

    @property
    def pointers(self) -> NDArray[np.int64]:
        """``[sequences]``: byte offset of each sequence in the .bin file."""
        return self._part(np.int64, HEADER.size + 4 * self.info.sequences, self.info.sequences)

    @property
    def document_ends(self) -> NDArray[np.int64]:
        """``[documents + 1]``: 0, and the sequence at which each document ends."""
        return self._part(np.int64, HEADER.size + 12 * self.info.sequences, self.info.documents + 1)

    @property
    def modes(self) -> NDArray[np.int8] | None:
        """``[sequences]``, in multimodal datasets."""
        offset = HEADER.size + 12 * self.info.sequences + 8 * (self.info.documents + 1)
        return self._part(np.int8, offset, self.info.sequences) if self.size > offset else None

    def _part[Entry: np.generic](self, dtype: type[Entry], offset: int, entries: int) -> NDArray[Entry]:
        if self.idx.stat().st_size != self.size:
            raise IndexedDatasetError(f"{self.idx}: changed while it was read; start again")
        return np.memmap(self.idx, dtype=dtype, mode="r", offset=offset, shape=(entries,))

    @property
    def bin(self) -> Path:
        """The .bin file."""
        return Path(f"{self.prefix}.bin")

    @property
    def idx(self) -> Path:
        """The .idx file."""
        return Path(f"{self.prefix}.idx")


def check_layout(dataset: IndexArrays) -> None:
    """Check that a dataset is laid out as Megatron's builder lays it out, and its .bin file is no longer.

    Megatron reads a dataset whose sequences stand in any order, with gaps. Megatron-LM's merge does not:
    it copies the .bin file and counts new offsets.

    Raises
    ------
    IndexedDatasetError
        If sequences are not back to back in order, documents do not start at 0 and follow each other,
        or the .bin file holds more than the sequences.
    """
    advice = "copy or preprocess the dataset again"
    offset = 0
    lengths, pointers = blocks(dataset.lengths), blocks(dataset.pointers)
    for block, starts in zip(lengths, pointers, strict=True):
        if (block < 0).any():
            raise IndexedDatasetError(f"{dataset.idx}: a sequence has a negative length; {advice}")
        ends = offset + np.cumsum(block, dtype=np.int64) * dataset.info.dtype.itemsize
        if starts[0] != offset or (starts[1:] != ends[:-1]).any():
            raise IndexedDatasetError(
                f"{dataset.idx}: the sequences are not back to back in {dataset.bin.name}; {advice}"
            )
        offset = int(ends[-1])
    previous = 0
    for ends in blocks(dataset.document_ends):
        if ends[0] < previous or (np.diff(ends) < 0).any():
            raise IndexedDatasetError(f"{dataset.idx}: a document ends before it starts; {advice}")
        previous = int(ends[-1])
    if dataset.document_ends[0] != 0:
        start = dataset.document_ends[0]
        raise IndexedDatasetError(f"{dataset.idx}: the first document starts at {start}, not 0; {advice}")
    if (size := dataset.bin.stat().st_size) != offset:
        raise IndexedDatasetError(
            f"{dataset.bin}: too long: {size} bytes, but {dataset.idx.name} accounts for {offset}; {advice}"
        )
