"""What an indexed dataset holds, and whether it is what was written. Memory stays bounded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_periln.data.indexed.format import blocks
from megatron_periln.data.indexed.index_arrays import IndexArrays, check_layout
from megatron_periln.data.indexed.sidecar import Sidecar, check_counts, sha256_of, sidecar_path
from megatron_periln.errors import PreprocessError

__all__ = ["Inspection", "LengthCounts", "LengthStatistics", "Verification", "inspect", "verify"]

TABLE_SIZE = 1 << 16
"""Lengths below it are counted in a table, by index; longer ones, which are few, as sorted pairs."""


@dataclass(frozen=True)
class Inspection:
    """What a dataset holds.

    Parameters
    ----------
    dataset
        The dataset.
    bin_bytes, idx_bytes
        Sizes of its files.
    sequence_lengths, document_lengths
        Statistics, in tokens.
    sidecar
        Its sidecar, if it has one.
    """

    dataset: IndexArrays
    bin_bytes: int
    idx_bytes: int
    sequence_lengths: LengthStatistics
    document_lengths: LengthStatistics
    sidecar: Sidecar | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON takes it."""
        info = self.dataset.info
        return {
            "prefix": self.dataset.prefix,
            "documents": info.documents,
            "sequences": info.sequences,
            "tokens": info.tokens,
            "dtype": info.dtype.name,
            "multimodal": self.dataset.modes is not None,
            "bin_bytes": self.bin_bytes,
            "idx_bytes": self.idx_bytes,
            "empty_documents": self.document_lengths.empty,
            "sequence_lengths": self.sequence_lengths.to_dict(),
            "document_lengths": self.document_lengths.to_dict(),
            "sidecar": None if self.sidecar is None else vars(self.sidecar),
        }


@dataclass(frozen=True)
class Verification:
    """What was verified.

    Parameters
    ----------
    checksums
        Whether there was a sidecar to compare checksums with.
    smallest, largest
        The smallest and the largest token; None where tokens are not integers.
    vocab_size
        What the tokens were compared with, if it is known.
    """

    checksums: bool
    smallest: int | None
    largest: int | None
    vocab_size: int | None


def inspect(prefix: str) -> Inspection:
    """Inspect the dataset at ``prefix``, and compare its counts with its sidecar's.

    Raises
    ------
    IndexedDatasetError
        If Megatron cannot read the dataset.
    PreprocessError
        If its sidecar is damaged or that of another dataset.
    """
    dataset = IndexArrays.open(prefix)
    path = sidecar_path(prefix)
    sidecar = Sidecar.read(path) if path.exists() else None
    if sidecar is not None:
        check_counts(sidecar, dataset)
    sequences, documents = LengthCounts(), LengthCounts()
    for block in blocks(dataset.lengths):
        if (block < 0).any():
            raise PreprocessError(f"{dataset.idx}: a sequence has a negative length; copy the dataset again")
        sequences.add(block)
    for lengths in _document_lengths(dataset):
        documents.add(lengths)
    return Inspection(
        dataset=dataset,
        bin_bytes=dataset.bin.stat().st_size,
        idx_bytes=dataset.idx.stat().st_size,
        sequence_lengths=sequences.statistics(),
        document_lengths=documents.statistics(),
        sidecar=sidecar,
    )


def verify(inspection: Inspection, vocab_size: int | None = None, *, block: int = 1 << 22) -> Verification:
    """Read all of a dataset, and check its layout, its tokens and its checksums.

    Parameters
    ----------
    inspection
        Of the dataset.
    vocab_size
        What tokens must be below; the sidecar's if None.
    block
        Bytes read at a time, a multiple of the size of a token.

    Raises
    ------
    IndexedDatasetError
        If sequences are not back to back, or the .bin file is too long.
    PreprocessError
        If a token is negative or not in the vocabulary, or a checksum is not the sidecar's.
    """
    dataset, sidecar = inspection.dataset, inspection.sidecar
    check_layout(dataset)
    if vocab_size is None and sidecar is not None:
        vocab_size = sidecar.tokenizer["vocab_size"]
    digest = hashlib.sha256()
    smallest: int | None = None
    largest: int | None = None
    with dataset.bin.open("rb") as stream:
        while chunk := stream.read(block):
            digest.update(chunk)
            if dataset.info.dtype.kind in "iu":
                tokens = np.frombuffer(chunk, dtype=dataset.info.dtype)
                least, most = int(tokens.min()), int(tokens.max())
                smallest = least if smallest is None else min(least, smallest)
                largest = most if largest is None else max(most, largest)
    if sidecar is not None:
        for suffix, found in ((".bin", digest.hexdigest()), (".idx", sha256_of(dataset.idx))):
            if found != (expected := sidecar.sha256[suffix[1:]]):
                raise PreprocessError(
                    f"{dataset.prefix}{suffix}: its SHA-256 is {found[:16]}..., but {expected[:16]}... in "
                    f"{sidecar_path(dataset.prefix).name}: it was changed; copy or preprocess it again"
                )
    if smallest is not None and smallest < 0:
        raise PreprocessError(f"{dataset.bin}: holds the negative token {smallest}; preprocess it again")
    if vocab_size is not None and largest is not None and largest >= vocab_size:
        raise PreprocessError(
            f"{dataset.bin}: holds token {largest}, but the vocabulary has {vocab_size}: "
            f"use the tokenizer that it was made with"
        )
    return Verification(sidecar is not None, smallest, largest, vocab_size)


@dataclass(frozen=True)
class LengthStatistics:
    """Statistics of lengths, in tokens.

    Parameters
    ----------
    count
        Number of lengths.
    empty
        How many are 0.
    min, median, mean, p99, max
        Quantiles are interpolated as numpy does.
    histogram
        First and last length of each bin, and the number in it. Bins are 0, 1, 2 to 3, 4 to 7, ...
    """

    count: int
    empty: int
    min: int
    median: float
    mean: float
    p99: float
    max: int
    histogram: list[tuple[int, int, int]]

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics as JSON takes them."""
        bins = [{"from": first, "to": last, "count": count} for first, last, count in self.histogram]
        return {**vars(self), "histogram": bins}


class LengthCounts:
    """How often each length occurs, of lengths that arrive in blocks: their statistics are exact.

    Memory grows with the number of different lengths, which is at most the square root of twice the
    number of tokens.
    """

    def __init__(self) -> None:
        self._small = np.zeros(TABLE_SIZE, dtype=np.int64)
        self._values: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def add(self, lengths: NDArray[np.integer]) -> None:
        """Count ``lengths``, which are not negative."""
        small = lengths < TABLE_SIZE
        self._small += np.bincount(lengths[small], minlength=TABLE_SIZE)
        values, counts = np.unique(lengths[~small], return_counts=True)
        if values.size:
            both = np.concatenate([self._values, values])
            self._values, place = np.unique(both, return_inverse=True)
            weights = np.concatenate([self._counts, counts])
            self._counts = np.zeros(self._values.size, dtype=np.int64)
            np.add.at(self._counts, place, weights)

    def statistics(self) -> LengthStatistics:
        """Return the statistics of what was counted, which must be something."""
        there = np.flatnonzero(self._small)
        values = np.concatenate([there, self._values])
        counts = np.concatenate([self._small[there], self._counts])
        below = np.cumsum(counts)
        count = int(below[-1])

        def quantile(part: float) -> float:
            place = part * (count - 1)
            low, high = (int(values[np.searchsorted(below, rank, side="right")]) for rank in _around(place))
            return low + (high - low) * (place - math.floor(place))

        bits = np.array([int(value).bit_length() for value in values])
        return LengthStatistics(
            count=count,
            empty=int(self._small[0]),
            min=int(values[0]),
            median=quantile(0.5),
            mean=sum(int(value) * int(number) for value, number in zip(values, counts, strict=True)) / count,
            p99=quantile(0.99),
            max=int(values[-1]),
            histogram=[
                ((1 << bit) >> 1, max((1 << bit) - 1, 0), int(counts[bits == bit].sum()))
                for bit in range(int(bits[0]), int(bits[-1]) + 1)
            ],
        )


def _document_lengths(dataset: IndexArrays) -> Iterator[NDArray[np.int64]]:
    """Yield the tokens of each document, in blocks."""
    sequences = blocks(dataset.lengths)
    first = last = 0  # the sequences of the block at hand
    tokens_before = np.zeros(1, dtype=np.int64)  # tokens before first, first + 1, ..., last
    previous_end = previous_tokens = 0
    for ends in blocks(dataset.document_ends[1:]):
        if ends[0] < previous_end or (np.diff(ends) < 0).any():
            raise PreprocessError(f"{dataset.idx}: a document ends before it starts; copy the dataset again")
        tokens_to_end = np.empty(len(ends), dtype=np.int64)
        done = 0
        while True:
            here = int(np.searchsorted(ends, last, side="right"))
            tokens_to_end[done:here] = tokens_before[ends[done:here] - first]
            done = here
            if done == len(ends):
                break
            block = next(sequences)
            first, last = last, last + len(block)
            tokens_before = tokens_before[-1] + np.concatenate([[0], np.cumsum(block, dtype=np.int64)])
        yield np.diff(tokens_to_end, prepend=previous_tokens)
        previous_end, previous_tokens = int(ends[-1]), int(tokens_to_end[-1])


def _around(place: float) -> tuple[int, int]:
    return math.floor(place), math.ceil(place)
