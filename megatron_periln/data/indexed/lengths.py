"""Exact statistics of lengths that arrive in blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LengthCounts", "LengthStatistics"]

_SMALL = 1 << 16


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
    """How often each length occurs.

    Memory grows with the number of different lengths, which is at most the square root of twice the
    number of tokens.
    """

    def __init__(self) -> None:
        self._small = np.zeros(_SMALL, dtype=np.int64)
        self._values: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def add(self, lengths: NDArray[np.integer]) -> None:
        """Count ``lengths``, which are not negative."""
        small = lengths < _SMALL
        self._small += np.bincount(lengths[small], minlength=_SMALL)
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


def _around(place: float) -> tuple[int, int]:
    return math.floor(place), math.ceil(place)
